"""Secrets are planted everywhere, everything is made to fail, and all that can be seen is searched for them."""

import base64
import re
import secrets
import shutil
import string
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from subprocess import CompletedProcess
from threading import Thread
from urllib.parse import urlsplit

import pytest
import sqlalchemy as sa
from command_line import call
from confluent_kafka import Producer
from conftest import Rig, make_transactions, until

from sandbox.mailbox import Mailbox
from services.alerter.settings import AlerterSettings
from services.db_sink.settings import SinkSettings
from services.predictor.settings import PredictorSettings
from services.producer.settings import ProducerSettings
from shared.provenance import Provenance, to_headers
from shared.records import encode_prediction, encode_transaction
from shared.settings import load

pytestmark = pytest.mark.xdist_group("logins")  # of the one PostgreSQL, for which it writes rules

ROOT = Path(__file__).parents[2]
USER = "guarded"
SETTINGS = {
    "producer": ProducerSettings,
    "predictor": PredictorSettings,
    "alerter": AlerterSettings,
    "db_sink": SinkSettings,
}
REFUSED = {
    "producer": ["HTTP 401"],
    "predictor": ["401"],
    "alerter": ["answered 535", "answered 401"],
    "db_sink": ["password authentication failed"],
}


def secret() -> str:
    """Without digits, which are left out of many lines."""
    return "".join(secrets.choice(string.ascii_letters) for _ in range(24))


def assert_hidden(planted: Iterable[str], where: str, seen: str | bytes) -> None:
    """None of them is there, nor as clients send them."""
    data = seen.encode() if isinstance(seen, str) else seen
    for each in planted:
        sent = (each, f"{USER}:{each}", f"\0{USER}\0{each}")
        forms = [each.encode(), *(base64.b64encode(form.encode()).rstrip(b"=")[:-1] for form in sent)]
        assert not any(form in data for form in forms), f"a secret in {where}"


def cmdlines() -> str:
    """The arguments of every process."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_text(errors="replace"))
        except OSError:  # it ended
            continue
    return "\n".join(found)


@pytest.fixture
def logins() -> list[str]:
    """What the refusing server was sent."""
    return []


@pytest.fixture
def refusing(logins: list[str]) -> Iterator[str]:
    """HOST:PORT of a server that wants another login."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            logins.append(self.headers.get("Authorization") or "")
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(401)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def guarded(engine: sa.Engine) -> Iterator[str]:
    """HOST:PORT/NAME of a database that lets the user in by password only."""
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:

        def say(text: str) -> str:
            result = connection.execute(sa.text(text))
            return str(result.scalar_one()) if result.returns_rows else ""

        rules = Path(say("SHOW hba_file"))
        before = rules.read_text()
        say(f"CREATE ROLE {USER} LOGIN PASSWORD 'another'")
        rules.write_text(f"host all {USER} 127.0.0.1/32 scram-sha-256\n{before}")
        say("SELECT pg_reload_conf()")
        yield f"{engine.url.host}:{engine.url.port}/{engine.url.database}"
        rules.write_text(before)
        say("SELECT pg_reload_conf()")
        say(f"DROP ROLE {USER}")


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[Mailbox]:
    """A mail server with another password."""
    with Mailbox(tmp_path / "mail", login=(USER, "another")) as server:
        yield server


def planted_settings(refusing: str, guarded: str) -> tuple[dict[str, str], set[str]]:
    """Settings with wrong logins, and what in them is secret."""
    settings = {
        "SASL_USERNAME": secret(),
        "SASL_PASSWORD": secret(),
        "API_URL": f"http://{USER}:{secret()}@{refusing}/current-transactions",
        "MLFLOW_TRACKING_URI": f"http://{USER}:{secret()}@{refusing}",
        "MLFLOW_TRACKING_PASSWORD": secret(),
        "SMTP_PASSWORD": secret(),
        "WEBHOOK_URL": f"http://{refusing}/{secret()}",
        "WEBHOOK_SECRET": secret(),
        "DATABASE_URL": f"postgresql://{USER}:{secret()}@{guarded}",
    }
    found = set()
    for value in settings.values():
        parts = urlsplit(value)
        found.add(parts.password or (parts.path.strip("/") if "://" in value else value))
    return settings, found


def put_fraud(rig: Rig) -> None:
    producer = Producer({**rig.properties, "log_level": 0})
    value = encode_prediction(encode_transaction(make_transactions(1)[0]), 1)
    producer.produce(rig.topic_2, value=value, headers=to_headers(Provenance("fraud", "3", 0.97, 1730134684025, 0, 0)))
    assert producer.flush(20) == 0


def fraudctl(*arguments: str, rig: Rig) -> CompletedProcess[str]:
    return call(*arguments, cwd=rig.directory, environment=rig.environment)


@pytest.mark.parametrize("by", ["the environment", "files that secrets.env names"])
def test_what_is_refused_gives_no_secret_away(
    by: str, rig: Rig, refusing: str, guarded: str, locked: Mailbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, planted = planted_settings(refusing, guarded)
    assert len(planted) == 9
    with (rig.directory / "client.properties").open("a") as properties:
        properties.write(f"ssl.key.password={secret()}\ndebug=security,broker,conf\n")
    planted.add((rig.directory / "client.properties").read_text().rpartition("ssl.key.password=")[2].split()[0])
    for name in settings:
        rig.environment.pop(name, None)
    give(settings, by, rig)
    names = {"SMTP_PORT": str(locked.port), "SMTP_USERNAME": USER, "MLFLOW_TRACKING_USERNAME": USER}
    rig.environment |= names | {"LOG_LEVEL": "DEBUG", "BACKOFF_INITIAL_SECONDS": "0.2", "BACKOFF_MAX_SECONDS": "0.5"}
    put_fraud(rig)

    rig.launch = subprocess.Popen  # a fork has the environment of the process that it is a fork of, too
    processes = [rig.start(name, ready=False) for name in REFUSED]
    for name, lines in REFUSED.items():
        for line in lines:
            until(lambda name=name, line=line: line in rig.log(name), what=f"{line!r} in the log of {name}")  # type: ignore[misc]
    assert_hidden(planted, "the arguments of a process", cmdlines())
    if by != "the environment":
        for process in processes:
            assert_hidden(planted, f"{process.name}'s environment", Path(f"/proc/{process.pid}/environ").read_bytes())
    codes = [process.stop() for process in processes]

    assert codes == [0] * len(processes)
    for name in REFUSED:
        assert_hidden(planted, f"the log of {name}", rig.log(name))
        misspelt = "event='unknown_setting' ignored='SMTP_PASWORD' did_you_mean='SMTP_PASSWORD'"
        assert (misspelt in rig.log(name)) == (by != "the environment")
    commands = {
        ("train", "--if-absent"): "401",
        ("labels", "stats"): "password authentication failed",
        ("alert-test",): "answered 535",
    }
    for command, words in commands.items():
        done = fraudctl(*command, rig=rig)
        assert done.returncode, done.stdout
        assert words in done.stdout + done.stderr
        assert_hidden(planted, f"what fraudctl {command[0]} says", done.stdout + done.stderr)
    monkeypatch.chdir(rig.directory)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)  # MLflow itself sets it, in other tests
    for name, value in rig.environment.items():
        monkeypatch.setenv(name, value)
    for each in SETTINGS.values():
        assert_hidden(planted, f"the repr of {each.__name__}", repr(load(each)) + str(load(each)))


def test_a_login_in_a_file_reaches_the_registry(rig: Rig, refusing: str, logins: list[str]) -> None:
    password = rig.directory / "password"
    password.write_text("open sesame\n")
    rig.environment |= {"MLFLOW_TRACKING_URI": f"http://{refusing}", "MLFLOW_TRACKING_USERNAME": USER}
    rig.environment["MLFLOW_TRACKING_PASSWORD_FILE"] = str(password)

    assert fraudctl("rollback", rig=rig).returncode == 2

    assert logins[0] == f"Basic {base64.b64encode(f'{USER}:open sesame'.encode()).decode()}"


def give(settings: Mapping[str, str], by: str, rig: Rig) -> None:
    """Set them one way or another."""
    if by == "the environment":
        rig.environment |= settings
        return
    with (rig.directory / "secrets.env").open("w") as file:
        for name, value in settings.items():
            path = rig.directory / f"{name.lower()}.txt"
            path.write_text(f"{value}\n")
            file.write(f"{name}_FILE={path}\n")
        file.write(f"SMTP_PASWORD={settings['SMTP_PASSWORD']}\n")


def test_a_broker_that_is_away_and_a_key_that_does_not_open_give_no_secret_away(rig: Rig) -> None:
    password, login = secret(), secret()
    key = rig.directory / "client.key"
    making = ["openssl", "genpkey", "-algorithm", "RSA", "-aes256", "-pass", "pass:another", "-out", str(key)]
    subprocess.run(making, check=True, capture_output=True)
    away = (
        "bootstrap.servers=127.0.0.1:9\nsecurity.protocol=SASL_SSL\nsasl.mechanisms=PLAIN\ndebug=all\n"
        f"sasl.username={USER}\nsasl.password={login}\n"
    )
    cases = {
        "away": (away, "Connection refused"),
        "locked": (f"{away}ssl.key.location={key}\nssl.key.password={password}\n", "ssl.key.location failed"),
        "torn": (f"{away}sasl.password: {password}=\n", "line 7 is not key=value"),
    }
    for case, (text, words) in cases.items():
        (rig.directory / "client.properties").write_text(text)
        process = rig.start("alerter", ready=False, LOG_LEVEL="DEBUG")
        until(lambda words=words: words in rig.log("alerter"), what=words)  # type: ignore[misc]
        assert (process.stop() == 0) if case == "away" else (process.wait(30) == 2)
        assert_hidden({password, login}, f"the log, {case}", rig.log("alerter"))


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://guarded:ab@{}@127.0.0.1/fraud",
        "postgresql://guarded:{}@127.0.0.1:port/fraud",
        "mysql://guarded:{}@127.0.0.1/fraud",
        "postgresql:/guarded:{}@127.0.0.1/fraud",
    ],
)
def test_a_wrong_database_url_is_not_repeated(url: str, rig: Rig) -> None:
    password = secret()
    rig.environment["DATABASE_URL"] = url.format(password)

    done = fraudctl("labels", "stats", rig=rig)

    assert done.returncode == 2
    assert re.fullmatch(r"fraudctl: DATABASE_URL: not a (PostgreSQL|database) URL.*\n", done.stderr)
    assert_hidden({password}, "what fraudctl says", done.stdout + done.stderr)


def test_neither_git_nor_a_wheel_takes_what_lies_in_the_checkout(tmp_path: Path) -> None:
    """Where people keep their secrets."""
    checkout = tmp_path / "checkout"
    made = (".git", ".venv", "*.egg-info", "build", ".*_cache", "__pycache__", ".hypothesis")
    shutil.copytree(ROOT, checkout, ignore=shutil.ignore_patterns(*made))
    planted = {name: secret() for name in ("secrets.env", "client.properties", ".env", "secrets/sasl_password")}
    (checkout / "secrets").mkdir(exist_ok=True)
    for name, value in planted.items():
        (checkout / name).write_text(value)

    subprocess.run(["git", "init", "--quiet"], cwd=checkout, check=True)
    added = subprocess.run(["git", "add", "--all", "--dry-run"], cwd=checkout, check=True, capture_output=True).stdout
    wheel = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), "."]
    subprocess.run([sys.executable, *wheel], cwd=checkout, check=True, capture_output=True)

    assert b"'secrets.example.env'" in added
    assert not [name for name in planted if f"'{name}'".encode() in added]
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as built:
        assert "shared/settings.py" in built.namelist()
        for name in built.namelist():
            assert_hidden(planted.values(), name, built.read(name))
