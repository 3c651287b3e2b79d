"""Send thousands of frauds at once, and count the mails.

In a second variant, the alerter is killed. In a third variant, the mail server is stopped for a while.
"""

import time
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain

from benchmarks.latency import wait_until
from benchmarks.load import Bench, backlog
from benchmarks.measure import Bar, Figure, Section, side_by_side
from sandbox.mailbox import Mailbox, ReceivedMail, messages, repeated_mails
from sandbox.processes import Process
from shared.kafka.messages import Record
from shared.provenance import Provenance, to_headers
from shared.records import encode_prediction, encode_transaction

_AWAY_S = 60.0
_PATIENCE_S = 600.0
_HEADERS = to_headers(Provenance("flood", "1", 0.99))

BadDay = Callable[[Process, Mailbox], None]


def flood(bench: Bench, *, rounds: int, frauds: int) -> Section:
    """Measure the alerter with its default limits: a burst of ten mails, then one digest per minute."""
    found = side_by_side(
        {
            "a good day": partial(_flooded, bench, frauds, lambda _alerter, _mailbox: None),
            "the alerter is killed": partial(_flooded, bench, frauds, _kill),
            f"the mail server is away for {_AWAY_S:.0f} s": partial(_flooded, bench, frauds, _away),
        },
        rounds=rounds,
    )

    def worst(quantity: str) -> Figure:
        return Figure(tuple(map(max, zip(*(row[quantity].values for row in found.values()), strict=True))))

    good, _, away = found.values()
    return Section(
        "A flood of frauds",
        f"{frauds:,} frauds at once, Apache Kafka; defaults of the alerter",
        ("first mail ms", "mails", "most in a mail", "lost", "repeated", "repeated mails", "dead letters", "s"),
        found,
        [
            Bar("first mail after the first fraud, ms", good["first mail ms"], 1000, at_most=True),
            Bar("mails", worst("mails"), 30, at_most=True),
            Bar("frauds lost", worst("lost"), 0, at_most=True),
            Bar(
                "frauds repeated, nothing being killed",
                Figure((*good["repeated"].values, *away["repeated"].values)),
                0,
                at_most=True,
            ),
            Bar("mails whose alarms are repeated", worst("repeated mails"), 1, at_most=True),
            Bar("dead letters", worst("dead letters"), 0, at_most=True),
        ],
    )


def _flooded(bench: Bench, frauds: int, bad_day: BadDay) -> dict[str, float]:
    (topic,) = bench.topics("flood")
    directory = bench.directory / uuid.uuid4().hex[:8]
    directory.mkdir()
    batch = backlog(frauds)
    with Mailbox(directory / "mail") as mailbox:
        own = {"TOPIC_2": topic, "ALERTER_GROUP": topic, "SMTP_PORT": str(mailbox.port), "ALERT_BURST": "10"}
        alerter = bench.service("alerter", own)
        with alerter:
            began_ms = time.time() * 1000
            bench.fill(
                Record(topic, encode_prediction(encode_transaction(each), 1), each.key, _HEADERS) for each in batch
            )
            wait_until(lambda: len(_mails(mailbox)) >= 3, "first mails", [alerter])
            bad_day(alerter, mailbox)
            wanted = {each.identity for each in batch}
            wait_until(
                lambda: wanted <= set(_named(_mails(mailbox))),
                "mails about all frauds",
                [alerter],
                patience_s=_PATIENCE_S,
            )
            took_s = time.time() - began_ms / 1000
        mails = _mails(mailbox)
    return {
        "first mail ms": mails[0].received_ms - began_ms,
        "mails": len(mails),
        "most in a mail": max(len(mail.alarms) for mail in mails),
        "lost": len(wanted - set(_named(mails))),
        "repeated": len(_named(mails)) - len(wanted),
        "repeated mails": len(repeated_mails(mails)),
        "dead letters": alerter.said("event='dead_letters'"),
        "s": took_s,
    }


def _kill(alerter: Process, mailbox: Mailbox) -> None:
    wait_until(
        lambda: max(len(mail.alarms) for mail in _mails(mailbox)) > 1, "first digest", [alerter], patience_s=_PATIENCE_S
    )
    alerter.kill()
    alerter.start()


def _away(_alerter: Process, mailbox: Mailbox) -> None:
    mailbox.stop()
    time.sleep(_AWAY_S)
    mailbox.start()


def _mails(mailbox: Mailbox) -> Sequence[ReceivedMail]:
    return list(messages(mailbox.directory))


def _named(mails: Sequence[ReceivedMail]) -> list[tuple[str, int]]:
    return list(chain.from_iterable(mail.alarms for mail in mails))
