"""What an operator reads, and what nobody may read."""

import json
import logging

import pytest
import structlog

from services.alerter.settings import AlerterSettings
from shared.logs import configure
from shared.privacy import passes_luhn, without_cards
from shared.settings import ServiceSettings

CARD = "4497913965512794052"


@pytest.mark.parametrize("log_format", ["console", "json"])
def test_no_line_holds_a_full_card_number(
    log_format: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOG_FORMAT", log_format)
    luhn = next(int(CARD[:-1] + digit) for digit in "0123456789" if passes_luhn(CARD[:-1] + digit))
    configure("tests", ServiceSettings())

    structlog.get_logger().info("event", card=luhn, text=f"card {luhn}.", offset=1730134684025)
    logging.getLogger("librdkafka").warning("saw %s", luhn)

    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert all(str(luhn) not in line and f"**** {luhn % 10000:04d}" in line for line in lines)
    assert "1730134684025" in lines[0]


def test_our_own_names_are_readable_even_if_they_look_like_a_card(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    card = "4539578763621486"
    monkeypatch.setenv("REPLICA", card)
    monkeypatch.setenv("ALERTER_GROUP", f"alerter-demo-{card}")
    configure("tests", AlerterSettings())

    structlog.get_logger().info(
        "event", group=f"alerter-demo-{card}", text=f"replica {card} of alerter-demo-{card}, 6011000990139424"
    )

    line = capsys.readouterr().out
    assert f"group='alerter-demo-{card}'" in line
    assert f"replica {card} of alerter-demo-{card}, **** 9424" in line


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("4539578763621486", "**** 1486"),
        ("card_4539578763621486_", "card_**** 1486_"),
        ("cc_num.4539578763621486", "cc_num.**** 1486"),
        ("0.4539578763621486", "0.4539578763621486"),
        ("4539578763621486abcdef0123456789", "4539578763621486abcdef0123456789"),
        ("4539578763621486abcdef01234567890", "**** 1486abcdef01234567890"),
    ],
)
def test_a_card_is_known_wherever_it_stands_and_a_decimal_or_a_transaction_is_none(text: str, said: str) -> None:
    assert without_cards(text) == said


def test_json_lines_say_who_and_how_bad(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOG_FORMAT", "json")
    configure("predictor", ServiceSettings())

    structlog.get_logger().warning("outage", reason="gone")

    line = json.loads(capsys.readouterr().out)
    assert (line["service"], line["level"], line["event"], line["reason"]) == ("predictor", "warning", "outage", "gone")


@pytest.mark.parametrize(("digits", "valid"), [("4539578763621486", True), ("4539578763621487", False)])
def test_luhn(digits: str, valid: bool) -> None:
    assert passes_luhn(digits) is valid
