"""Whatever the decoder accepts, everything behind it can store, mail, post and score."""

import csv
import io
import itertools
import json
import math
import re
import smtplib
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from email import message_from_bytes
from email.header import decode_header, make_header
from email.message import EmailMessage, Message
from pathlib import Path
from typing import Any

import coverage
import hostile
import hypothesis
import numpy as np
import pytest
import sqlalchemy as sa
from conftest import EFFORT
from hostile import Drawn
from hypothesis import strategies as st
from msgspec.structs import asdict, astuple
from served import answers, made
from sklearn.ensemble import GradientBoostingClassifier, RandomForestClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from fraudctl.export import export
from sandbox.generator import training_frame
from services.alerter.alarm import Alarm
from services.alerter.mail import Composer
from services.alerter.webhook import payload
from services.db_sink.table import Row, copy_text, migrate, upsert
from services.predictor.host import Served
from services.predictor.model import recorded
from shared.errors import Poison
from shared.kafka.messages import Headers
from shared.provenance import HEADER, Provenance, from_headers
from shared.records import (
    FEATURES,
    Transaction,
    decode_prediction,
    encode_prediction,
    encode_transaction,
    read_topic_1,
)
from training.features import RAW
from training.train import build_pipeline

pytestmark = pytest.mark.filterwarnings("ignore:Generating overly large repr")  # of a batch that fails

EXAMPLES = 50_000 * EFFORT  # transactions
PARTS = 4  # so that several workers share them
SINGLE_MAILS, IN_SPLIT_FORM = 2, 10  # of each batch, because these take longest
NOW = datetime(2026, 1, 31, 22, 30, tzinfo=UTC)
HEADER_NAMES = ["Subject", "From", "To", "Date", "Message-ID", "Auto-Submitted", "MIME-Version", "Content-Type"]
THREAD_HEADER_NAMES = ["In-Reply-To", "References"]  # of a card's second mail
PART_HEADER_NAMES = ["Content-Transfer-Encoding", "Content-Disposition"]
FORMULA = re.compile("\\s*[=+@\uff1d\uff0b\uff0d\uff20-]").match
NUMBER = re.compile(r"-?[0-9.]+(e[+-]?[0-9]+)?").fullmatch
MODEL_COLUMNS = ["amt", "lat", "long", "city_pop", "unix_time"]
LARGE_SCORED = 3  # transactions of each batch whose amount a model may refuse; each is scored alone
OWN_DIGITS = re.compile(r"^row \d+: |list of 2[12] values|at most 19 digits|before 2100")
AS_TEXT = ("trans_date_trans_time", "cc_num", "dob")
COLUMNS = ", ".join(f'"{name}"' + "::text" * (name in AS_TEXT) for name in FEATURES)
SOURCE = (
    "model_name, model_version, probability, (extract(epoch FROM predicted_at) * 1000)::float8,"
    " source_partition, source_offset"
)
STORED = sa.text(f"SELECT {COLUMNS}, prediction, {SOURCE} FROM transactions")


@pytest.fixture(autouse=True, scope="module")
def _not_traced() -> Iterator[None]:
    """Other tests cover the same lines, and with tracing these many examples take half as long again."""
    tracing = coverage.Coverage.current()
    if tracing:
        tracing.stop()
    yield
    if tracing:
        tracing.start()


def for_all(
    batches: st.SearchStrategy[list[Any]], check: Callable[[list[Any]], None], *, examples: int, part: int = 0
) -> None:
    """Call the check with batches of so many different examples in all, other ones in each part.

    To shrink a batch would take minutes. Instead, the shortest example that fails alone is reported.
    """
    seen: set[str] = set()

    def check_new(batch: list[Any]) -> None:
        new = {repr(each): each for each in batch if repr(each) not in seen}
        try:
            if new:
                check(list(new.values()))
        except Exception:
            for text, each in sorted(new.items(), key=lambda item: len(item[0])):
                try:
                    check([each])
                except Exception as error:
                    error.add_note(f"Example: {text}")
                    raise
            raise
        seen.update(new)

    settings = hypothesis.settings(
        max_examples=10,  # because from the eleventh on, most of a batch would be copied from earlier ones
        phases=[hypothesis.Phase.generate],
        verbosity=hypothesis.Verbosity.quiet,
        report_multiple_bugs=False,
    )
    for turn in itertools.count():
        draw = settings(hypothesis.given(batches)(check_new))
        if settings.derandomize:
            draw = hypothesis.seed(1000 * turn + part)(draw)
        draw()
        if len(seen) >= examples:
            break


def alarm(values: dict[str, Any]) -> Alarm:
    """The transaction on topic_2, as a prediction of fraud, on its way through the decoders and encoders."""
    rows = read_topic_1(hostile.canonical(values))
    (transaction,) = rows.transactions
    value = encode_prediction(rows.canonical or encode_transaction(transaction), 1)
    return Alarm(decode_prediction(value), from_headers([(HEADER, json.dumps(hostile.provenance(values)).encode())]))


def exactly(values: Iterable[object]) -> str:
    """Text that differs if anything does: 0.0 and -0.0, 1 and 1.0, "1" and 1."""
    return repr(tuple(values))


@pytest.mark.parametrize("part", range(PARTS))
def test_it_is_stored_mailed_and_posted(part: int, engine: sa.Engine, tmp_path: Path) -> None:
    migrate(engine)
    composer = Composer(sender="alerts@bank.example", recipients=["analysts@bank.example"])

    def check(batch: list[Drawn]) -> None:
        transactions = hostile.transactions(batch)
        alarms = [alarm(each) for each in transactions]
        check_values(transactions, alarms)
        check_split_form(transactions[:IN_SPLIT_FORM])
        check_database(engine, transactions, alarms)
        check_export(engine, tmp_path / "export.csv", transactions)
        check_digest(composer, alarms)
        for some in alarms[:SINGLE_MAILS]:
            check_mail(composer, some)
        check_webhook(alarms)

    for_all(hostile.batches, check, examples=EXAMPLES // PARTS, part=part)


def check_values(transactions: Sequence[dict[str, Any]], alarms: Sequence[Alarm]) -> None:
    """Nothing has changed on the way, and it does not the next time."""
    for values, (prediction, provenance) in zip(transactions, alarms, strict=True):
        assert exactly(astuple(prediction)) == exactly((*values.values(), 1))
        assert asdict(provenance) == dict.fromkeys(asdict(provenance)) | hostile.provenance(values)
        assert prediction.key == str(values["cc_num"]).encode()
        assert prediction.identity == (values["trans_num"], values["unix_time"])


def check_split_form(transactions: Sequence[dict[str, Any]]) -> None:
    """A table in split form has the same transactions, and what is encoded from it can be replayed."""
    read = read_topic_1(hostile.split(transactions)).transactions
    replayed = [read_topic_1(encode_transaction(each)).transactions[0] for each in read]
    assert [exactly(astuple(each)) for each in read] == [exactly(each.values()) for each in transactions]
    assert replayed == read


def check_database(engine: sa.Engine, transactions: Sequence[dict[str, Any]], alarms: Sequence[Alarm]) -> None:
    """Everything is stored bit for bit, of an identity the last."""
    with engine.begin() as connection:
        connection.execute(sa.text("TRUNCATE transactions"))
    upsert(engine, copy_text(Row(*each) for each in alarms))

    with engine.begin() as connection:
        found = connection.execute(STORED).all()
    wanted = {}
    for values in transactions:
        source = dict.fromkeys(asdict(Provenance())) | hostile.provenance(values)
        if source["predicted_at_ms"] is not None:
            source["predicted_at_ms"] = float(source["predicted_at_ms"])
        stored = values | {"cc_num": str(values["cc_num"])}
        wanted[values["trans_num"], values["unix_time"]] = exactly((*stored.values(), 1, *source.values()))
    assert sorted(exactly(row) for row in found) == sorted(wanted.values())


def check_export(engine: sa.Engine, file: Path, transactions: Sequence[dict[str, Any]]) -> None:
    """What is stored is exported digit for digit."""
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE transactions SET validated_at = now()"))
    export(engine, str(file), since=None, until=None, append=False, progress=lambda *_: None)

    with file.open(newline="", encoding="utf-8") as text:
        header, *rows = list(csv.reader(text))
    wanted = {(values["trans_num"], values["unix_time"]): ["", *map(str, values.values())] for values in transactions}
    assert header == ["", *FEATURES]
    assert sorted(rows) == sorted(row for row in wanted.values() if row[-1] != "None")


def check_digest(composer: Composer, alarms: Sequence[Alarm]) -> None:
    mail = received(composer.digest(alarms, now=NOW))

    assert [part.get_content_type() for part in mail.walk()] == [
        "multipart/mixed",
        "multipart/alternative",
        "text/plain",
        "text/html",
        "text/csv",
    ]
    check_header(mail)
    *_, attachment = mail.walk()
    check_table(text_of(attachment), len(alarms))


def check_mail(composer: Composer, alarm: Alarm) -> None:
    mail = received(composer.single(alarm, now=NOW))

    assert [part.get_content_type() for part in mail.walk()] == ["multipart/alternative", "text/plain", "text/html"]
    check_header(mail)


def check_header(mail: Message) -> None:
    """The mail has this project's headers alone, and a subject in which everything can be seen."""
    assert [name for name in mail if name not in THREAD_HEADER_NAMES] == HEADER_NAMES
    subject = str(make_header(decode_header(mail["Subject"])))
    assert not {unicodedata.category(each) for each in subject} & {"Cc", "Cf", "Cs", "Zl", "Zp"}
    assert not any(part.defects for part in mail.walk())
    for part in mail.walk():
        assert {*part.keys()} <= {*HEADER_NAMES, *THREAD_HEADER_NAMES, *PART_HEADER_NAMES}


def received(mail: EmailMessage) -> Message:
    """The mail as a server receives it, and as another program parses it."""
    wire = Wire()
    wire.send_message(mail)
    assert wire.sent.isascii()
    assert max(map(len, wire.sent.split(b"\r\n"))) <= 998
    assert not re.search(rb"(?<!\r)\n|\r(?!\n)", wire.sent)
    return message_from_bytes(wire.sent)


class Wire(smtplib.SMTP):
    """An SMTP client that keeps what it would send."""

    ehlo_resp = b"250 as if it had been said"
    sent = b""

    def sendmail(self, _from: Any, _to: Any, message: Any, *_options: Any) -> dict[str, tuple[int, bytes]]:
        self.sent = message
        return {}


def text_of(part: Message) -> str:
    content = part.get_payload(decode=True)
    assert isinstance(content, bytes)
    return content.decode(str(part.get_content_charset()))


def check_table(text: str, rows: int) -> None:
    """The table has as many cells as it should, and none that a spreadsheet runs, whatever separates its cells."""
    header, *found = csv.reader(io.StringIO(text, newline=""))
    assert [len(row) for row in found] == [len(header)] * rows
    for separator in ",;\t|":
        cells = [cell for row in csv.reader(io.StringIO(text, newline=""), delimiter=separator) for cell in row]
        assert [cell for cell in cells if FORMULA(cell) and not NUMBER(cell)] == []


def check_webhook(alarms: Sequence[Alarm]) -> None:
    found = json.loads(payload(alarms, kind="fraud.alarms", now=NOW))["data"]["alarms"]

    assert [each["trans_num"] for each in found] == [each.prediction.trans_num for each in alarms]
    assert [repr(each["amount"]) for each in found] == [repr(each.prediction.amt) for each in alarms]


@pytest.mark.parametrize(
    ("estimator", "metadata"),
    [
        (RandomForestClassifier(10, random_state=0), {"threshold": 0.300000001}),  # 3 trees of 10, but not in float32
        (make_pipeline(StandardScaler(), GradientBoostingClassifier(n_estimators=10, random_state=0)), {}),
    ],
    ids=["array", "frame"],
)
def test_it_is_labelled_by_the_compiled_model_as_by_the_model_itself(
    estimator: Any, metadata: dict[str, float]
) -> None:
    known = recorded()
    rows = np.array([[getattr(each, name) for name in MODEL_COLUMNS] for each in known], dtype=float)
    estimator.fit(rows, (rows[:, 0] * np.sin(rows[:, 4]) > 20).astype(int))
    (compiled, problem), (own, _) = (
        made(estimator, MODEL_COLUMNS, compiled=each, **metadata) for each in (True, False)
    )
    assert not problem
    edges = decisive_amounts(estimator)

    def check(batch: list[Drawn]) -> None:
        on_edges = [("", float(edges[whole % len(edges)]), whole) for _, _, whole in batch]
        transactions = [alarm(each).prediction for each in hostile.transactions([*batch, *on_edges])]
        small = [each for each in transactions if abs(each.amt) < 1e38]
        labels = [[label for label, _ in answers(either, small)] for either in (compiled, own)]
        assert labels[0] == labels[1]
        for each in [each for each in transactions if abs(each.amt) >= 1e38][:LARGE_SCORED]:
            assert label_or_none(compiled, each) == label_or_none(own, each)

    for_all(hostile.numbers, check, examples=EXAMPLES // 10)


def test_it_is_labelled_by_the_trained_model() -> None:
    frame = training_frame(seed=1)
    champion, _ = made(build_pipeline(seed=1).fit(frame[RAW], frame["is_fraud"]), RAW)

    def check(batch: list[Drawn]) -> None:
        transactions = [alarm(each).prediction for each in hostile.transactions(batch)]
        assert {label for label, _ in answers(champion, transactions)} <= {0, 1}

    for_all(hostile.numbers, check, examples=EXAMPLES // 10)


def decisive_amounts(estimator: Any) -> np.ndarray:
    """The amounts at which the trees decide, and their neighbours: float32 holds few of these exactly."""
    scaler, trees = (estimator[0], estimator[1]) if isinstance(estimator, Pipeline) else (None, estimator)
    nodes = [tree.tree_ for tree in np.ravel(trees.estimators_)]
    at = np.concatenate([each.threshold[each.feature == MODEL_COLUMNS.index("amt")] for each in nodes])
    if scaler:
        at = at * scaler.scale_[0] + scaler.mean_[0]
    narrow = at.astype(np.float32)
    return np.concatenate([at, narrow, *(np.nextafter(narrow, np.float32(end)) for end in (-np.inf, np.inf))])


def label_or_none(model: Served, transaction: Transaction) -> int | None:
    try:
        return answers(model, [transaction])[0][0]
    except ValueError:
        return None


def test_what_is_refused_is_refused_with_a_reason_that_quotes_no_digit() -> None:
    accepted = 0

    def check(batch: list[hostile.Spoilt]) -> None:
        nonlocal accepted
        for spoilt in batch:
            for value in hostile.spoilt(spoilt):
                try:
                    rows = read_topic_1(value)
                except Poison as poison:
                    assert_quotes_no_digit(str(poison))
                    continue
                for bad in rows.bad:
                    assert_quotes_no_digit(bad.reason)
                for each in rows.transactions:
                    accepted += 1
                    check_accepted(each, encode_transaction(each))

    for_all(hostile.spoilt_batches, check, examples=EXAMPLES // 10)
    assert accepted > EXAMPLES // 50


def assert_quotes_no_digit(reason: str) -> None:
    assert not re.search(r"\d", OWN_DIGITS.sub("", reason)), reason


def check_accepted(transaction: Transaction, value: bytes) -> None:
    """The transaction is one of those that the other tests make, and comes back as itself."""
    values = json.loads(value)
    assert list(values) == list(FEATURES)
    assert exactly(astuple(transaction)) == exactly(values.values())
    assert exactly(astuple(read_topic_1(value).transactions[0])) == exactly(values.values())
    datetime.strptime(values["trans_date_trans_time"], "%Y-%m-%d %H:%M:%S")
    datetime.strptime(values["dob"], "%Y-%m-%d")
    assert 0 < values["cc_num"] < 10**19
    assert 0 <= values["unix_time"] < 4_102_444_800
    assert all("\0" not in values[name] and len(values[name]) <= 1000 for name in (*hostile.TEXTS, "trans_num"))
    assert len(values["trans_num"]) <= 200
    assert all(math.isfinite(values[name]) for name in ("amt", "lat", "long", "merch_lat", "merch_long"))


def test_any_header_is_a_provenance_that_is_stored_or_none(engine: sa.Engine) -> None:
    migrate(engine)

    def check(batch: list[Headers]) -> None:
        transactions = hostile.transactions([("", 0.0, number) for number in range(len(batch))])
        rows = [
            Row(alarm(values).prediction, from_headers(headers))
            for values, headers in zip(transactions, batch, strict=True)
        ]
        upsert(engine, copy_text(rows))

        with engine.connect() as connection:
            stored = connection.execute(sa.text(f"SELECT {SOURCE} FROM transactions ORDER BY unix_time")).all()
        for found, row, headers in zip(
            stored, rows, batch, strict=False
        ):  # the table may have more, of earlier batches
            known = {name: value for name, value in asdict(row.provenance).items() if value is not None}
            assert list(found) == list(asdict(row.provenance).values())
            if known:
                header = json.loads(next(raw for name, raw in headers if name == HEADER and raw is not None))
                assert known == {name: header[name] for name in known}

    for_all(hostile.header_batches, check, examples=EXAMPLES // 10)
