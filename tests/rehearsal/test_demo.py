"""The demo, as a newcomer runs it."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sqlalchemy as sa
from command_line import call
from conftest import SAMPLE, START, needs_sample, until

from sandbox.generator import training_frame
from sandbox.mailbox import messages
from sandbox.postgres import Postgres

pytestmark = [pytest.mark.timeout(240), pytest.mark.server]

COUNTED = (
    "served", "fetched", "skipped_repeats", "topic_1", "topic_2", "predicted_frauds", "emails", "mailed_frauds", "rows",
    "repeated_mails", "dead_letters", "lost", "duplicates", "out_of_order", "seconds", "latency_ms",
)  # fmt: skip


def fraudctl(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "fraudctl", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


def children_of(directory: Path) -> list[str]:
    """The command lines of the processes that use this folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            if str(directory) in command or (process / "cwd").resolve() == directory.resolve():
                found.append(command)
        except OSError:
            continue
    return found


def test_a_file_goes_through_and_every_digit_arrives(tmp_path: Path) -> None:
    history = training_frame(rows=400, seed=11, start=START, fraud_rate=0.05)
    history["unix_time"] -= 220_924_800  # as in the training file, seven years off
    source = tmp_path / "source.csv"
    history.to_csv(source)
    work, report = tmp_path / "work", tmp_path / "report.json"
    with Postgres(tmp_path / "own") as database:
        process = fraudctl(
            *("demo", "--source", str(source), "--rate", "0", "--broker", "embedded"),
            *("--report", str(report), "--work-dir", str(work), "--database", database.url),
        )
        out, err = process.communicate(timeout=180)
        assert process.returncode == 0, out + err
        with sa.create_engine(database.url).connect() as connection:
            stored = connection.execute(sa.text("SELECT trans_num, cc_num::text, unix_time FROM transactions")).all()

    figures = json.loads(report.read_text())
    assert set(COUNTED) == set(figures)
    assert figures["served"] == figures["fetched"] == figures["topic_1"] == figures["topic_2"] == figures["rows"] == 400
    assert figures["lost"] == figures["duplicates"] == figures["dead_letters"] == figures["skipped_repeats"] == 0
    assert figures["mailed_frauds"] == figures["predicted_frauds"] == figures["emails"] > 0
    assert figures["emails"] == len(list(messages(work / "mail")))
    assert set(figures["latency_ms"]) == {"topic_1_to_topic_2", "topic_1_to_email", "topic_1_to_row"}
    assert all(
        0 < figures["latency_ms"][span]["p50"] <= figures["latency_ms"][span]["p99"] for span in figures["latency_ms"]
    )
    wanted = {(row["trans_num"], row["cc_num"]) for row in csv.DictReader(source.open())}
    assert {(trans_num, cc_num) for trans_num, cc_num, _ in stored} == wanted
    assert {unix_time for *_, unix_time in stored} == set(history["unix_time"] + 220_924_800)
    assert {path.name for path in (work / "logs").glob("*.log")} >= {
        "producer.log",
        "predictor.log",
        "alerter.log",
        "db_sink.log",
    }
    assert (work / "registry" / "mlflow.db").exists()
    assert "embedded broker" in out
    assert "balances" in out
    assert children_of(work) == []


@pytest.mark.timeout(300)
def test_without_a_number_it_streams_until_ctrl_c_and_then_drains(tmp_path: Path, trained_directory: Path) -> None:
    work, report, source = trained_directory, tmp_path / "report.json", tmp_path / "source.csv"
    training_frame(rows=30_000, seed=11, start=START).to_csv(source, index=False)  # five minutes
    process = fraudctl(
        *("demo", "--source", str(source), "--rate", "100", "--broker", "embedded"),
        *("--report", str(report), "--work-dir", str(work)),
    )
    log = work / "logs" / "producer.log"
    until(lambda: log.exists() and "event='fetched'" in log.read_text(), timeout_s=150, what="the stream")
    time.sleep(1)  # let it be in the middle of things

    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=90)

    assert process.returncode == 0, out + err
    figures = json.loads(report.read_text())
    assert figures["served"] == figures["rows"] > 0
    assert figures["lost"] == figures["duplicates"] == 0
    assert children_of(work) == []


def test_without_java_it_takes_the_embedded_broker_and_says_so(tmp_path: Path) -> None:
    from rehearsal.stack import choose_broker

    environment = {"PATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", "from rehearsal.stack import choose_broker; print(*choose_broker('auto'))"],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )

    assert done.stdout.startswith("embedded embedded broker: at least once")
    assert "Java 17 or newer is missing" in done.stdout
    assert choose_broker("127.0.0.1:9092")[0] == "127.0.0.1:9092"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--source", "/nowhere.csv"], "/nowhere.csv: No such file"),
        (["--broker", "rabbit"], "--broker: 'rabbit'"),
        (["--rate", "-1"], "--rate"),
        (["--transactions", "0"], "--transactions"),
        (["--broker", "127.0.0.1:9", "--transactions", "1"], "Kafka at 127.0.0.1:9"),
        (["--database", "postgresql://nobody@127.0.0.1:9/none"], "--database"),
        (["--report", f"{__file__}/report.json"], "test_demo.py"),
        (["--work-dir", __file__, "--broker", "embedded"], f"{__file__}: File exists"),
    ],
)
def test_a_wrong_call_is_refused_by_name(tmp_path: Path, arguments: list[str], named: str) -> None:
    refused = call("demo", *arguments, cwd=tmp_path, environment=os.environ)

    assert refused.returncode == 2
    assert named in refused.stderr
    assert "Traceback" not in refused.stdout + refused.stderr


@pytest.mark.parametrize(
    ("text", "named"),
    [("a,b\n1,2\n", "columns missing: trans_date_trans_time"), ("", "columns missing"), (None, "no rows")],
)
def test_a_source_in_another_format_is_refused_by_name(tmp_path: Path, text: str | None, named: str) -> None:
    source = tmp_path / "source.csv"
    header = ",".join(training_frame(rows=1, seed=1, start=START).columns) + "\n"
    source.write_text(header if text is None else text)
    refused = call("demo", "--source", source, cwd=tmp_path, environment=os.environ)

    assert refused.returncode == 2
    assert named in refused.stderr


@needs_sample
@pytest.mark.usefixtures("forking")
def test_the_real_sample_balances(tmp_path: Path, trained_directory: Path) -> None:
    report = tmp_path / "report.json"
    done = call(
        *("demo", "--source", SAMPLE, "--rate", "0", "--broker", "embedded"),
        *("--report", report, "--work-dir", trained_directory),
        cwd=tmp_path,
        environment=os.environ,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(report.read_text())
    assert figures["served"] == figures["topic_1"] == figures["topic_2"] == figures["rows"] == 5591
    assert figures["lost"] == figures["duplicates"] == 0
    assert figures["mailed_frauds"] == figures["predicted_frauds"]
