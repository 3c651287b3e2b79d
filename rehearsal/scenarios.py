"""Defines the fault campaign's scenarios: which faults to inject, how long, and what to check besides the ledger."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median

from rehearsal.faults import (
    STOP_TIMEOUT_S,
    Faults,
    Run,
    all_of,
    api_troubles,
    broker_restarts,
    connection_kills,
    database_away,
    hostile_records,
    kills,
    mail_server_away,
    mail_troubles,
    poison,
    registry_away,
    scaling,
    stops,
)
from rehearsal.ledger import Ledger
from rehearsal.stack import RECIPIENT, SENDER
from sandbox.mailbox import messages
from sandbox.payments_api import FAULTS, HOSTILITIES

_OUTAGE_S = 60.0
_LONGEST_ADDED_DELAY_MS = 250.0
_GONE = "gone@fraud-alarm.example"
_TWO_RECIPIENTS = {"ALERT_TO": f"{_GONE},{RECIPIENT}"}
_IMPATIENT = {"SMTP_TIMEOUT_SECONDS": "2"}
_MAIL_HEADERS = ["Auto-Submitted", "Content-Type", "Date", "From", "MIME-Version", "Message-ID", "Subject", "To"]
_THREAD_HEADERS = ["In-Reply-To", "References"]


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """The faults of a scenario, how long to inject them, and the guarantees to check in addition to the ledger.

    `environment` is added to the services' environment. `broken` returns one line for each guarantee that did not hold.
    """

    faults: Faults
    minutes: float = 2.0
    least_kills: int = 0
    environment: Mapping[str, str] = field(default_factory=dict)
    broken: Callable[[Run, Ledger], list[str]] = lambda _run, _ledger: []


def _mails_as_fast(run: Run, ledger: Ledger) -> list[str]:
    """Check that mails take no longer during a database outage than at other times."""
    outages = run.database_outages_ms
    during = [delay for at, delay in ledger.mail_delays if any(begin <= at <= end for begin, end in outages)]
    outside = [delay for at, delay in ledger.mail_delays if all(at < begin or at > end for begin, end in outages)]
    if not during or not outside:
        return ["no mails were sent during a database outage, or none at other times, so there is nothing to compare"]
    run.figures["mail, ms, database there"] = round(median(outside))
    run.figures["mail, ms, database away"] = round(median(during))
    added_ms = median(during) - median(outside)
    return [f"mails took {added_ms:.0f} ms longer while the database was away"] * (added_ms > _LONGEST_ADDED_DELAY_MS)


def _clean_stops(run: Run, _ledger: Ledger) -> list[str]:
    return [f"{name} did not exit with 0 within {STOP_TIMEOUT_S:.0f} s of SIGTERM" for name in run.bad_stops]


def _fixed_is_predicted(run: Run, _ledger: Ledger) -> list[str]:
    predicted = {trans_num for trans_num, _ in run.scene.topics.visible_ms}
    return [] if run.fixed in predicted else [f"the fixed and replayed record {run.fixed} has no prediction"]


def _other_recipient_has_all(run: Run, ledger: Ledger) -> list[str]:
    received = Counter(
        address for mail in messages(run.work_dir / "mail") for address in mail.message["X-Envelope-To"].split(", ")
    )
    reached = received[RECIPIENT]
    return [] if reached == ledger.emails else [f"{reached} of {ledger.emails} mails reached the other recipient"]


def _mails_are_ours(run: Run, _ledger: Ledger) -> list[str]:
    """Check that nothing in a payment adds or changes a header of a mail, or is markup in its body."""
    broken = []
    for mail in messages(run.work_dir / "mail"):
        message = mail.message
        names = sorted(name for name in message if name not in ("X-Envelope-To", *_THREAD_HEADERS))
        addresses = str(message["From"]), *str(message["To"]).split(", ")
        subject = str(message["Subject"])
        html = message.get_body(("html",))
        if (
            names != _MAIL_HEADERS
            or not {*addresses} <= {SENDER, RECIPIENT, _GONE}
            or not subject.startswith("Fraud alert: $")
            or not subject.isprintable()
            or html is None
            or any(markup in html.get_content() for markup in ("<h1>hi", "<script"))
        ):
            broken.append(f"a mail is not what it should be: {mail.path.name}")
    return broken


SCENARIOS: dict[str, Scenario] = {
    "kill-predictor": Scenario(faults=kills("predictor"), least_kills=20),
    "kill-sink": Scenario(faults=kills("db_sink"), least_kills=20),
    "kill-alerter": Scenario(faults=kills("alerter"), least_kills=20),
    "kill-producer": Scenario(faults=kills("producer"), least_kills=20),
    "stop": Scenario(faults=stops(), broken=_clean_stops),
    "scale": Scenario(faults=scaling()),
    "broker-restart": Scenario(faults=broker_restarts()),
    "database-down": Scenario(
        faults=database_away(seconds=(_OUTAGE_S, _OUTAGE_S), pause_s=20.0), broken=_mails_as_fast
    ),
    "database-kill-connections": Scenario(faults=connection_kills, minutes=1.0),
    "smtp-down": Scenario(faults=mail_server_away, minutes=1.0),
    "smtp-4xx": Scenario(faults=mail_troubles("4xx"), minutes=1.0),
    "smtp-5xx-one-recipient": Scenario(
        faults=mail_troubles("5xx-one-recipient", rest_s=0.0),
        minutes=1.0,
        environment=_TWO_RECIPIENTS,
        broken=_other_recipient_has_all,
    ),
    "smtp-hangs": Scenario(faults=mail_troubles("hang"), minutes=1.0, environment=_IMPATIENT),
    "registry-down-at-start": Scenario(faults=registry_away, minutes=1.0),
    "api-misbehaves": Scenario(faults=api_troubles(*FAULTS), minutes=1.0),
    "poison": Scenario(faults=poison, minutes=1.0, broken=_fixed_is_predicted),
    "hostile": Scenario(
        faults=all_of(
            hostile_records,
            poison,
            api_troubles(*HOSTILITIES),
            mail_troubles("4xx", "5xx-one-recipient"),
        ),
        environment=_TWO_RECIPIENTS | {"API_TIMEOUT_SECONDS": "3"},
        broken=_mails_are_ours,
    ),
    "everything": Scenario(
        faults=all_of(
            kills("predictor", pause_s=40.0),
            kills("db_sink", pause_s=40.0),
            kills("alerter", pause_s=40.0),
            kills("producer", pause_s=40.0),
            scaling(pause_s=20.0),
            broker_restarts(pause_s=25.0),
            database_away(seconds=(1.0, 15.0), pause_s=15.0),
            connection_kills,
            mail_troubles("4xx", "5xx-one-recipient", "hang", rest_s=20.0),
            api_troubles(*FAULTS),
            poison,
        ),
        minutes=5.5,
        environment=_TWO_RECIPIENTS | _IMPATIENT,
        broken=_fixed_is_predicted,
    ),
}
