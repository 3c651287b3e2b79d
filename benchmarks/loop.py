"""Compare the stream loop and the predictor with alternatives on the same topic and broker."""

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import mlflow.artifacts
import requests

from benchmarks.load import Bench, backlog, watch
from benchmarks.measure import Bar, Section, side_by_side
from benchmarks.predictor import BOOSTING, FOREST, FOREST_COLUMNS, drained
from sandbox.processes import Process, free_port
from training.features import RAW

_PEERS = Path(__file__).parent / "peers"
_REQUIREMENTS = _PEERS / "requirements.txt"
_COLUMNS = {BOOSTING: RAW, FOREST: FOREST_COLUMNS}


def loops(bench: Bench, *, rounds: int, rows: int) -> Section:
    """Compare stream loops that only decode each record, add a field, and encode the record."""
    source = bench.backlog(rows)
    ours, alone = ([sys.executable, str(_PEERS / f"{name}.py")] for name in ("stream_loop", "pass_through"))
    found = side_by_side(
        {
            "the clients alone, nothing decoded": lambda: _run(bench, alone, source, rows=rows),
            "this stream loop": lambda: _run(bench, ours, source, rows=rows),
            "Quix Streams": lambda: _peer(bench, "quix", "loop", source, rows=rows),
            "Faust": lambda: _peer(bench, "faust_agent", "loop", source, rows=rows),
        },
        rounds=rounds,
    )
    loop = found["this stream loop"]["rows/s"]
    return Section(
        "A field added to every record",
        f"Conditions: {rows:,} rows, Apache Kafka, 6 partitions, at-least-once delivery. "
        "Each program only decodes a record, adds a field and encodes the record, unless the label says otherwise",
        ("rows/s",),
        found,
        [Bar("this stream loop / Quix Streams", loop.over(found["Quix Streams"]["rows/s"]), 4)],
    )


def scoring(bench: Bench, *, rounds: int, rows: int) -> Section:
    """Compare the predictor with alternatives that use the same model."""
    source = bench.backlog(rows)
    with _server(bench) as url:
        found = side_by_side(
            {
                "predictor, boosting": lambda: _throughput(bench, source, rows, BOOSTING),
                "Quix Streams, boosting": lambda: _peer(bench, "quix", "predict", source, rows=rows, model=BOOSTING),
                "MLflow's server, 1,000 rows per call": lambda: _served(url, rows=20_000, batch=1000),
                "MLflow's server, one row per call": lambda: _served(url, rows=100, batch=1),
                "predictor, forest": lambda: _throughput(bench, source, rows, FOREST),
                "one at a time, forest": lambda: _peer(bench, "original", "predict", source, rows=rows, model=FOREST),
            },
            rounds=rounds,
        )
    boosting, forest = found["predictor, boosting"]["rows/s"], found["predictor, forest"]["rows/s"]
    return Section(
        "The same model, one row at a time",
        f"Conditions: up to {rows:,} rows. The predictor reads batches of 1,000 rows from Apache Kafka, with "
        'exactly-once delivery. Quix Streams and the program "one at a time" also read from Apache Kafka. They call '
        "the model once per row, and do not deliver exactly once. MLflow's server receives the rows over HTTP, without "
        "Kafka",
        ("rows/s",),
        found,
        [
            Bar("predictor / Quix Streams", boosting.over(found["Quix Streams, boosting"]["rows/s"]), 20),
            Bar("predictor / one at a time", forest.over(found["one at a time, forest"]["rows/s"]), 300),
        ],
    )


@contextmanager
def _server(bench: Bench) -> Iterator[str]:
    """Run MLflow's scoring server and yield its URL."""
    port = free_port()
    arguments = ["-m", _downloaded(bench, BOOSTING), "-h", "127.0.0.1", "-p", str(port), "--env-manager", "local"]
    url = f"http://127.0.0.1:{port}"
    with Process(
        "MLflow's scoring server",
        [sys.executable, "-m", "mlflow", "models", "serve", "--workers", "1", *arguments],
        log=bench.directory / f"serve-{port}.log",
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},  # to find uvicorn
        ready=lambda: _answers(f"{url}/ping"),
    ):
        yield url


def _served(url: str, *, rows: int, batch: int) -> dict[str, float]:
    """Measure how many rows per second MLflow's scoring server handles over HTTP, without Kafka."""
    values = [[getattr(each, name) for name in RAW] for each in backlog(rows)]
    calls = [{"dataframe_split": {"columns": RAW, "data": values[at : at + batch]}} for at in range(0, rows, batch)]
    with requests.Session() as session:
        began = time.monotonic()
        for call in calls:
            session.post(f"{url}/invocations", json=call, timeout=60).raise_for_status()
        return {"rows/s": rows / (time.monotonic() - began)}


def _answers(url: str) -> bool:
    try:
        return requests.get(url, timeout=2).ok
    except requests.RequestException:
        return False


def _downloaded(bench: Bench, model: str) -> str:
    return mlflow.artifacts.download_artifacts(
        f"models:/{model}@champion", dst_path=str(bench.directory / "peers"), tracking_uri=bench.stack.registry.uri
    )


def peers_python() -> Path:
    """Return the Python interpreter for the peers. The first call creates the peers' virtual environment."""
    name = "peers-" + hashlib.sha256(_REQUIREMENTS.read_bytes()).hexdigest()[:12]
    home = Path.home() / ".cache" / "fraud-alarm" / name
    interpreter = home / "bin" / "python"
    if not (home / "complete").exists():
        uv = str(Path(sys.executable).with_name("uv"))
        subprocess.run([uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(home)], check=True)
        install = [uv, "pip", "install", "--quiet", "--python", str(interpreter), "-r", str(_REQUIREMENTS)]
        subprocess.run(install, check=True)
        (home / "complete").touch()
    return interpreter


def _peer(
    bench: Bench, program: str, work: str, source: str, *, rows: int, model: str | None = None
) -> dict[str, float]:
    command = [str(peers_python()), str(_PEERS / f"{program}.py"), work]
    if model:
        command += ["--model", _downloaded(bench, model), "--columns", ",".join(_COLUMNS[model])]
    return _run(bench, command, source, rows=rows)


def _run(bench: Bench, command: Sequence[str], source: str, *, rows: int, at_most_s: float = 10.0) -> dict[str, float]:
    """Measure the rate at which a program writes records to a new topic.

    The measurement ends when all records are written, or after `at_most_s` seconds.
    """
    (target,) = bench.topics("copied")
    broker = bench.properties["bootstrap.servers"]
    arguments = ["--bootstrap", broker, "--group", target, "--source", source, "--target", target]
    process = Process(command[-1], [*command, *arguments], log=bench.directory / f"{target}.log", cwd=bench.directory)
    with bench.written(target) as written:
        process.spawn()
        try:
            return {"rows/s": watch([process], written, rows=rows, at_most_s=at_most_s).rows_per_s}
        finally:
            process.kill()


def _throughput(bench: Bench, source: str, rows: int, model: str) -> dict[str, float]:
    return {"rows/s": drained(bench, source, rows, settings={"MODEL_NAME": model})["rows/s"]}
