"""Ten thousand transactions, on a good day and on a bad one: what people and machines get to see holds no card number,
no birth date and no secret."""

import base64
import re
from collections.abc import Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import ClassVar

import msgspec
import pytest
import sqlalchemy as sa
from conftest import Rig, make_transactions, until
from pipeline import pipeline

from sandbox.mailbox import Mailbox, ReceivedMail
from sandbox.postgres import Postgres
from sandbox.registry import Registry
from services.db_sink.table import connect
from shared.records import Transaction, encode_transaction

pytestmark = pytest.mark.server

SECRETS = {
    "SMTP_PASSWORD": "planted-for-smtp",
    "DATABASE_URL": "planted-for-the-database",
    "WEBHOOK_SECRET": "planted-for-the-webhook",
    "WEBHOOK_URL": "planted-in-the-webhooks-path",
    "SASL_PASSWORD": "planted-for-kafka",
    "MLFLOW_TRACKING_PASSWORD": "planted-for-mlflow",
}
HEALTH = ("/metrics", "/ready", "/live")


def leaks(texts: Iterable[str], *, cards: set[str], birth_dates: set[str]) -> set[str]:
    """Which of the cards, birth dates and secrets occur in the texts, be it in groups of digits or in base64."""
    together = "\n".join(texts)
    runs = "\n".join(set(re.findall(r"\d{11,}", together + re.sub(r"(?<=\d)[ -](?=\d)", "", together))))
    dates = set(re.findall(r"\d{4}-\d{2}-\d{2}", together))
    disguised = {form: name for name, secret in SECRETS.items() for form in (secret, _base64(secret))}
    found = {name for form, name in disguised.items() if form in together}
    return found | {card for card in cards if card in runs} | (birth_dates & dates)


def _base64(secret: str) -> str:
    return base64.b64encode(secret.encode()).decode().rstrip("=")


def in_full(mail: ReceivedMail) -> str:
    """A mail as it was sent, and what its parts say."""
    parts = [str(part.get_content()) for part in mail.message.walk() if not part.is_multipart()]
    return "\n".join([mail.path.read_text(errors="replace"), *parts])


def refused(transaction: Transaction) -> list[bytes]:
    """A transaction in ways that cannot be read or scored, each of which an error would like to quote."""
    good = msgspec.json.decode(encode_transaction(transaction))
    card, born = good["cc_num"], good["dob"]
    spoilt = [{"zip": f"{card} {born}"}, {"cc_num": f"{card} "}, {"cc_num": [card]}, {"dob": f"{card}"}]
    return [*(msgspec.json.encode(good | each) for each in spoilt), f"{card},{born}".encode(), f'"{card}'.encode()]


class Hook(BaseHTTPRequestHandler):
    """Takes posts, or refuses them."""

    status: ClassVar[int] = 200
    bodies: ClassVar[list[str]] = []

    def do_POST(self) -> None:
        self.bodies.append(self.rfile.read(int(self.headers["content-length"])).decode())
        self.send_response(self.status)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def hook() -> Iterator[tuple[type[Hook], str]]:
    """A web server that takes posts, and its URL."""

    class Own(Hook):
        bodies: ClassVar[list[str]] = []

    server = ThreadingHTTPServer(("127.0.0.1", 0), Own)
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield Own, f"http://127.0.0.1:{server.server_port}/{SECRETS['WEBHOOK_URL']}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_what_would_leak_is_found() -> None:
    texts = [
        "card 4497913965512794052.",
        "4497-9139 6551-2795",
        "born 1955-11-07",
        "AUTH " + _base64("planted-for-smtp"),
    ]

    found = leaks(
        texts, cards={"4497913965512794052", "4497913965512795", "30000000000004"}, birth_dates={"1955-11-07"}
    )

    assert found == {"4497913965512794052", "4497913965512795", "1955-11-07", "SMTP_PASSWORD"}


@pytest.mark.kafka
@pytest.mark.timeout(300)
def test_logs_mails_metrics_and_health_hold_no_card_number_no_birth_date_and_no_secret(
    tmp_path: Path, apache_rig: Rig, registry: Registry, hook: tuple[type[Hook], str]
) -> None:
    posts, webhook_url = hook
    [unlucky] = make_transactions(1)
    environment = {
        "SMTP_USERNAME": "alarm",
        "SMTP_PASSWORD": SECRETS["SMTP_PASSWORD"],
        "WEBHOOK_URL": webhook_url,
        "WEBHOOK_SECRET": SECRETS["WEBHOOK_SECRET"],
        "SASL_USERNAME": "fraud",
        "SASL_PASSWORD": SECRETS["SASL_PASSWORD"],
        "MLFLOW_TRACKING_USERNAME": "fraud",
        "MLFLOW_TRACKING_PASSWORD": SECRETS["MLFLOW_TRACKING_PASSWORD"],
        "ALERT_DIGEST_SECONDS": "1",
        "ALERT_BURST": "5",
        "BACKOFF_MAX_SECONDS": "0.5",
        "LOG_LEVEL": "DEBUG",
    }
    with (
        Postgres(tmp_path / "own") as database,
        Mailbox(tmp_path / "mail", login=("alarm", SECRETS["SMTP_PASSWORD"])) as mailbox,
    ):
        url = sa.make_url(database.url).set(password=SECRETS["DATABASE_URL"])  # which it does not ask for
        engine = connect(url.render_as_string(hide_password=False))
        with pipeline(apache_rig, engine=engine, registry=registry, mailbox=mailbox, **environment) as running:
            running.stream(5000)

            database.stop()
            mailbox.misbehave("4xx")
            posts.status = 500
            running.api.misbehave("html", "broken-json", "5xx", share=0.3)
            for topic in apache_rig.topic_1, apache_rig.topic_2:
                apache_rig.put(topic, refused(unlucky))
            running.let_in(5000)
            for name in "alerter", "db_sink":
                until(lambda name=name: running.get(name, "/ready").status_code == 503, what=f"{name} waiting")
            texts = [running.get(name, path).text for name in running.services for path in HEALTH]

            database.start()
            mailbox.misbehave(None)
            posts.status = 200
            running.wait_through()
            texts += [running.get(name, path).text for name in running.services for path in HEALTH]
            texts += [*running.logs().values(), *map(in_full, running.mails()), *posts.bodies]
            with engine.connect() as connection:
                rows = connection.execute(sa.text("SELECT cc_num::text, dob::text FROM transactions")).all()
        engine.dispose()

    cards = {str(unlucky.cc_num), *(card for card, _ in rows)}
    birth_dates = {str(unlucky.dob), *(born for _, born in rows)}
    assert len(rows) == 10_000
    assert len(cards) > 100
    assert all("event='dead_letters'" in log for name, log in running.logs().items() if name != "producer")
    assert leaks(texts, cards=cards, birth_dates=birth_dates) == set()
