"""Labels as an analyst gives them, and the training file that comes of them."""

import csv
import os
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from subprocess import CompletedProcess

import fsspec
import pandas as pd
import pytest
import sqlalchemy as sa
from command_line import call
from conftest import SAMPLE, make_transactions, needs_sample

from fraudctl import export, labels
from fraudctl.call import CallError
from fraudctl.labels import Label, Performance
from services.db_sink.table import Row, copy_text, migrate, upsert
from shared.provenance import Provenance
from shared.records import FEATURES, Prediction, Transaction
from training.train import read


def stored(engine: sa.Engine, batch: Sequence[Transaction], *, prediction: int = 0, version: str = "3") -> None:
    """Put them into the table as the db_sink does."""
    migrate(engine)
    provenance = Provenance("fraud", version, 0.25, 1730134684025, 4, 1234)
    rows = [
        Row(Prediction(**{name: getattr(each, name) for name in FEATURES}, prediction=prediction), provenance)
        for each in batch
    ]
    upsert(engine, copy_text(rows))


def label_of(engine: sa.Engine, transaction: Transaction) -> tuple[object, ...]:
    query = "SELECT is_fraud, validated_by, validated_at IS NOT NULL FROM transactions WHERE trans_num = :t"
    with engine.connect() as connection:
        return tuple(connection.execute(sa.text(query), {"t": transaction.trans_num}).one())


def changes(engine: sa.Engine) -> list[tuple[object, ...]]:
    query = "SELECT trans_num, was_fraud, was_validated_by, is_fraud, changed_by FROM label_changes ORDER BY id"
    with engine.connect() as connection:
        return [tuple(row) for row in connection.execute(sa.text(query))]


def exported(engine: sa.Engine, out: Path, *, append: bool = False, **bounds: int | None) -> int:
    bounds = {"since": None, "until": None} | bounds
    return export.export(engine, str(out), append=append, progress=lambda _done, _total: None, **bounds)


def fraudctl(engine: sa.Engine, *arguments: str, cwd: Path, **variables: str) -> CompletedProcess[str]:
    url = engine.url.render_as_string(hide_password=False)
    return call(*arguments, cwd=cwd, environment={"COLUMNS": "200", "DATABASE_URL": url, **variables})


def test_a_label_is_written_and_what_was_there_before_is_kept(engine: sa.Engine) -> None:
    first, second = make_transactions(2)
    stored(engine, [first, second])

    done = labels.confirm(engine, [Label(first.trans_num, True, "ana")])

    assert done == (1, 0)
    assert label_of(engine, first) == (1, "ana", True)
    assert label_of(engine, second) == (second.is_fraud, None, False)
    assert changes(engine) == [(first.trans_num, first.is_fraud, None, 1, "ana")]


def test_the_same_again_changes_nothing_and_the_contrary_needs_to_overrule(engine: sa.Engine) -> None:
    (transaction,) = make_transactions(1)
    stored(engine, [transaction])
    labels.confirm(engine, [Label(transaction.trans_num, True, "ana")])

    assert labels.confirm(engine, [Label(transaction.trans_num, True, "ben")]) == (0, 1)
    with pytest.raises(CallError, match=f"{transaction.trans_num} was confirmed as fraud by ana"):
        labels.confirm(engine, [Label(transaction.trans_num, False, "ben")])
    assert label_of(engine, transaction) == (1, "ana", True)

    assert labels.confirm(engine, [Label(transaction.trans_num, False, "ben")], overrule=True) == (1, 0)
    assert label_of(engine, transaction) == (0, "ben", True)
    assert changes(engine)[1] == (transaction.trans_num, 1, "ana", 0, "ben")


def test_an_import_is_all_or_nothing_and_names_each_bad_line(engine: sa.Engine, tmp_path: Path) -> None:
    first, second = make_transactions(2)
    stored(engine, [first, second])
    file = tmp_path / "labels.csv"
    file.write_text(
        f"trans_num,is_fraud\n{first.trans_num},1\nunheard-of,0\n{second.trans_num},0\n{second.trans_num},1\n"
    )

    refused = fraudctl(engine, "labels", "import", str(file), "--by", "ana", cwd=tmp_path)

    assert refused.returncode == 2
    assert "line 3: no transaction unheard-of" in refused.stderr
    assert f"line 5: {second.trans_num} is labelled both fraud and not fraud in this import" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert label_of(engine, first)[2] is False

    file.write_text("trans_num,is_fraud\na,maybe\n,1\n")
    unreadable = fraudctl(engine, "labels", "import", str(file), "--by", "ana", cwd=tmp_path)
    assert unreadable.returncode == 2
    assert "line 2: is_fraud: expected 0 or 1, not 'maybe'" in unreadable.stderr
    assert "line 3: trans_num is empty" in unreadable.stderr

    file.write_text(f"trans_num,is_fraud,by\n{first.trans_num},1,ben\n{second.trans_num},0,\n")
    done = fraudctl(engine, "labels", "import", str(file), "--by", "ana", cwd=tmp_path)
    assert done.stdout == "confirmed: 2\n", done.stderr
    assert label_of(engine, first) == (1, "ben", True)
    assert label_of(engine, second) == (0, "ana", True)


def test_a_number_that_came_several_times_is_identified_by_its_time(engine: sa.Engine) -> None:
    early, late = make_transactions(2)
    late.trans_num = early.trans_num
    stored(engine, [early, late])

    with pytest.raises(
        CallError, match=f"exists 2 times. Add its unix_time, one of {early.unix_time}, {late.unix_time}"
    ):
        labels.confirm(engine, [Label(early.trans_num, True, "ana")])
    assert labels.confirm(engine, [Label(early.trans_num, True, "ana", unix_time=late.unix_time)]) == (1, 0)
    with pytest.raises(CallError, match=r"no transaction .* with unix_time 1"):
        labels.confirm(engine, [Label(early.trans_num, True, "ana", unix_time=1)])


def test_confirmed_labels_survive_redelivered_predictions(engine: sa.Engine) -> None:
    batch = make_transactions(10_000)
    stored(engine, batch)
    given = [Label(each.trans_num, number % 3 == 0, "ana") for number, each in enumerate(batch)]
    labels.confirm(engine, given)

    stored(engine, batch, prediction=1, version="4")

    with engine.connect() as connection:
        query = "SELECT trans_num, is_fraud, validated_by, model_version FROM transactions"
        found = {row.trans_num: tuple(row)[1:] for row in connection.execute(sa.text(query))}
    assert found == {each.trans_num: (int(each.is_fraud), "ana", "4") for each in given}


def test_each_model_version_is_measured_on_what_was_confirmed(engine: sa.Engine, tmp_path: Path) -> None:
    batch = make_transactions(10)
    stored(engine, batch[:4], prediction=1, version="1")
    stored(engine, batch[4:8], prediction=0, version="1")
    stored(engine, batch[8:], prediction=0, version="2")
    truth = [True, True, True, False, True, False, False, False, False]
    labels.confirm(
        engine, [Label(each.trans_num, is_fraud, "ana") for each, is_fraud in zip(batch, truth, strict=False)]
    )

    found = {each.model: each for each in labels.performance(engine)}

    assert found["fraud version 1"] == Performance("fraud version 1", 8, 4, 0.75, 0.75)
    assert found["fraud version 2"] == Performance("fraud version 2", 1, 0, None, None)
    shown = fraudctl(engine, "labels", "stats", cwd=tmp_path).stdout
    assert "fraud version 1" in shown
    assert "0.750" in shown


def test_what_is_still_to_be_reviewed_is_listed_without_card_numbers(engine: sa.Engine, tmp_path: Path) -> None:
    seen, open_, calm = make_transactions(3)
    stored(engine, [seen, open_], prediction=1)
    stored(engine, [calm])
    labels.confirm(engine, [Label(seen.trans_num, True, "ana")])

    shown = fraudctl(engine, "labels", "list", "--unreviewed", "--predicted-fraud", cwd=tmp_path).stdout

    assert open_.trans_num in shown
    assert seen.trans_num not in shown
    assert calm.trans_num not in shown
    assert str(open_.cc_num) not in shown


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (("labels", "confirm", "unheard-of", "--fraud", "yes", "--by", "ana"), "no transaction unheard-of"),
        (("labels", "confirm", "unheard-of", "--fraud", "perhaps", "--by", "ana"), "--fraud: expected yes or no"),
        (("labels", "import", "/nowhere.csv"), "/nowhere.csv: No such file"),
        (("export", "--since", "yesterday"), "--since: 'yesterday' is neither"),
        (("export", "--out", "/nowhere/validated.csv"), "/nowhere"),
    ],
)
def test_a_wrong_call_is_named(engine: sa.Engine, tmp_path: Path, call: Sequence[str], said: str) -> None:
    migrate(engine)

    done = fraudctl(engine, *call, cwd=tmp_path)

    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_confirmed_rows_come_back_as_a_training_file(engine: sa.Engine, tmp_path: Path) -> None:
    batch = make_transactions(2000)
    for each, name in zip(
        batch, ('A "quoted", name', "line\nfeed", "carriage\rreturn", "both\r\n", "\U0001f4a9", " "), strict=False
    ):
        each.merchant = name
    stored(engine, batch)
    confirmed = {each.trans_num: number % 7 == 0 for number, each in enumerate(batch[:1500])}
    labels.confirm(engine, [Label(trans_num, is_fraud, "ana") for trans_num, is_fraud in confirmed.items()])
    out = tmp_path / "validated.csv"

    assert exported(engine, out) == 1500
    once = out.read_bytes()
    assert exported(engine, out, append=True) == 1500
    assert out.read_bytes() == once
    assert out.stat().st_mode & 0o777 == 0o600  # it has card numbers and birth dates

    with out.open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["", *FEATURES]
    assert {row[0] for row in rows} == {""}
    by_number = {each.trans_num: each for each in batch}
    frame = read([str(out)])
    for values in frame.to_dict("records"):
        transaction = by_number[values["trans_num"]]
        wanted = {name: getattr(transaction, name) for name in FEATURES}
        wanted |= {"cc_num": str(transaction.cc_num), "is_fraud": int(confirmed[transaction.trans_num])}
        assert values == wanted


@needs_sample
def test_the_file_has_the_types_of_the_training_file(engine: sa.Engine, tmp_path: Path) -> None:
    batch = [each for each in make_transactions(500) if each.cc_num < 2**63]  # pandas reads larger ones as uint64
    stored(engine, batch)
    labels.confirm(engine, [Label(each.trans_num, False, "ana") for each in batch])
    exported(engine, tmp_path / "validated.csv")

    sample, validated = pd.read_csv(SAMPLE), pd.read_csv(tmp_path / "validated.csv")

    assert list(validated.columns) == list(sample.columns)
    assert validated.dtypes[1:].to_dict() == sample.dtypes[1:].to_dict()  # the first is empty


def test_appending_twice_changes_nothing_and_a_new_label_replaces_the_old(engine: sa.Engine, tmp_path: Path) -> None:
    batch = make_transactions(300)
    stored(engine, batch)
    labels.confirm(engine, [Label(each.trans_num, False, "ana") for each in batch[:200]])
    out = tmp_path / "validated.csv"
    exported(engine, out)
    labels.confirm(engine, [Label(each.trans_num, False, "ana") for each in batch[200:]])

    assert exported(engine, out, append=True, since=batch[200].unix_time) == 300
    once = out.read_bytes()
    exported(engine, out, append=True)

    assert out.read_bytes() == once
    labels.confirm(engine, [Label(batch[0].trans_num, True, "ben")], overrule=True)
    assert exported(engine, out, append=True) == 300
    assert read([str(out)])["is_fraud"].sum() == 1
    assert [path.name for path in tmp_path.iterdir()] == ["validated.csv"]


def test_a_file_with_another_header_is_left_alone(engine: sa.Engine, tmp_path: Path) -> None:
    migrate(engine)
    out = tmp_path / "validated.csv"
    out.write_text("trans_num,is_fraud\na,1\n")

    with pytest.raises(CallError, match="a different header") as refusal:
        exported(engine, out, append=True)

    assert "trans_num,is_fraud" in str(refusal.value)
    assert ",trans_date_trans_time,cc_num" in str(refusal.value)
    assert out.read_text() == "trans_num,is_fraud\na,1\n"


def test_a_folder_that_is_not_there_is_named(engine: sa.Engine, tmp_path: Path) -> None:
    refused = fraudctl(engine, "export", "--out", "nowhere/validated.csv", cwd=tmp_path)

    assert refused.returncode == 2
    assert "cannot write nowhere/validated.csv: the folder nowhere does not exist" in refused.stderr


def test_a_period_is_exported(engine: sa.Engine, tmp_path: Path) -> None:
    batch = sorted(make_transactions(100), key=lambda each: each.unix_time)
    stored(engine, batch)
    labels.confirm(engine, [Label(each.trans_num, False, "ana") for each in batch])
    since, until = batch[20].unix_time, batch[60].unix_time
    wanted = sum(since <= each.unix_time < until for each in batch)

    assert exported(engine, tmp_path / "validated.csv", since=since, until=until) == wanted


def test_many_rows_come_back_value_by_value_and_appending_them_changes_nothing(
    engine: sa.Engine, tmp_path: Path
) -> None:
    batch = make_transactions(20_000)
    stored(engine, batch)
    rule = "UPDATE transactions SET is_fraud = (amt > 500)::int, validated_at = now(), validated_by = 'ana'"
    with engine.begin() as connection:
        connection.execute(sa.text(rule))
    out = tmp_path / "validated.csv"

    assert exported(engine, out) == len(batch)
    once = out.read_bytes()
    assert exported(engine, out, append=True) == len(batch)
    assert out.read_bytes() == once

    wanted = pd.DataFrame([{name: getattr(each, name) for name in FEATURES} for each in batch])
    wanted["is_fraud"] = (wanted["amt"] > 500).astype(int)
    wanted["cc_num"] = wanted["cc_num"].astype(str)
    order = ["unix_time", "trans_num"]
    found = pd.read_csv(out, dtype={"cc_num": str}).iloc[:, 1:]
    pd.testing.assert_frame_equal(found, wanted.sort_values(order, ignore_index=True))


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket of an S3 server of this test's own, which the usual AWS variables lead to."""
    import s3fs  # which takes seconds, as the next does
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    name = f"labels-{uuid.uuid4().hex}"  # all servers of a process have the same buckets
    s3fs.S3FileSystem().mkdir(name)
    yield f"s3://{name}/validated.csv"
    server.stop()


def test_to_s3_and_back_into_training(engine: sa.Engine, bucket: str, tmp_path: Path) -> None:
    batch = make_transactions(300)
    stored(engine, batch)
    labels.confirm(engine, [Label(each.trans_num, False, "ana") for each in batch[:200]])

    assert exported(engine, bucket) == 200
    assert exported(engine, bucket, append=True) == 200
    labels.confirm(engine, [Label(each.trans_num, False, "ana") for each in batch[200:]])
    assert exported(engine, bucket, append=True, since=batch[200].unix_time) == 300

    assert exported(engine, tmp_path / "validated.csv") == 300
    assert fsspec.filesystem("s3").cat(bucket) == (tmp_path / "validated.csv").read_bytes()
    assert set(read([bucket])["trans_num"]) == {each.trans_num for each in batch}


def test_a_bucket_that_is_not_there_is_named(engine: sa.Engine, bucket: str, tmp_path: Path) -> None:
    stored(engine, make_transactions(3))
    elsewhere = bucket.replace("labels-", "nowhere-")
    aws = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}

    refused = fraudctl(engine, "export", "--out", elsewhere, cwd=tmp_path, **aws)

    assert refused.returncode == 2
    assert elsewhere in refused.stderr
    assert "Traceback" not in refused.stderr
