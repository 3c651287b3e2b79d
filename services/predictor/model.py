"""A version of the model, in a process of its own: starts and tries it, and scores batches of transactions with it."""

import gzip
import random
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import count
from operator import attrgetter
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple

import structlog

from services.predictor import packages
from services.predictor.host import Failed, Load, Loaded, Own, Refused, Reply, Score, Scored
from services.predictor.hosted import Allowance, Host, HostFailed
from shared.dead_letters import isolate
from shared.errors import Outage, Poison
from shared.privacy import without_digits
from shared.profile import Profile
from shared.records import FEATURES, REFERENCE, Transaction, read_topic_1
from shared.text import one_line

log = structlog.get_logger()

_RECORDED = Path(__file__).with_name("recorded.jsonl.gz")
_PIECE = 32  # rows
_MOST_DEATHS = 20  # of a model's process, in one batch
_ROWS_A_BATCH = 1000  # for which the time of `Allowance.batch_s` is meant
_MOST_TRIAL_S = 2.0  # for each way to try a model, unless a single batch takes longer
_SAME = 1e-9  # the largest accepted difference between two probabilities of the same row
_SAME_IN_FLOAT32 = 1e-6  # the same for a model that computes with 32 bits
_MOST_REASON = 1500  # characters
_MOST_REASONS = 3  # logged for one batch, besides the first


class UnusableModel(Exception):
    """The model cannot be served. The message gives the reason."""

    def __init__(self, reason: str, *, damaged: bool = False) -> None:
        """`damaged` means that the files may be incomplete, so that they should be fetched again."""
        super().__init__(one_line(reason, limit=_MOST_REASON))
        self.damaged = damaged


class Ended(Exception):
    """The model has been ended, because another one has taken its place."""


class Prediction(NamedTuple):
    """The prediction for one transaction."""

    label: int  # 1 is fraud
    probability: float | None  # probability of fraud; None if the model provides no probabilities


@dataclass(frozen=True, kw_only=True)
class Logged:
    """A model version as it was logged."""

    name: str
    version: str
    folder: Path
    threshold: float | None  # the lowest probability that counts as fraud; None if no threshold was logged
    profile: Profile | None  # profile of the training data; None if no readable profile was logged
    logged_at: float  # epoch seconds
    digest: str  # SHA-256 of the files


class Model:
    """A version that is ready to score transactions. One thread at a time may score; any thread may end it."""

    def __init__(
        self,
        logged: Logged,
        interpreter: packages.Interpreter,
        *,
        allowance: Allowance,
        compiled: bool,
        spare: Host | None = None,
        shutdown: Event | None = None,
    ) -> None:
        """Start the model's process, and try the model. If `compiled`, its trees are compiled if that is possible.

        `spare` is a process of the same interpreter that has been started already.

        Raises UnusableModel if the model cannot be served, and Outage if this may only be so now.
        """
        self.logged = logged
        self._interpreter = interpreter
        self._allowance = allowance
        self._shutdown = shutdown or Event()
        self._load = load_request(logged.folder, threshold=logged.threshold, compiled=compiled, allowance=allowance)
        self._ended = False
        self._columns: Sequence[str] = ()
        try:
            self._host = self._started(spare)
        except HostFailed as failed:
            raise UnusableModel(self._with_packages(f"it cannot be loaded: {failed}"), damaged=True) from None
        try:
            self._try()
        except (UnusableModel, Outage):
            self.end()
            raise

    @property
    def differing_packages(self) -> str:
        """In words, which packages differ from those that the version was logged with. Empty if none does."""
        return packages.in_words(self._interpreter.differences)

    @property
    def name(self) -> str:
        return self.logged.name

    @property
    def version(self) -> str:
        return self.logged.version

    def score(
        self, transactions: Sequence[Transaction], *, alive: Callable[[], object] = lambda: None
    ) -> list[Prediction | Poison]:
        """Score the transactions. Returns one result each, in order.

        A transaction that the model cannot score, or that ends the model's process, becomes a Poison. If the process
        has ended, it is started again, and the batch is repeated once before it is taken apart; `alive()` is called
        meanwhile. Raises Outage if the model cannot score the reference transaction either, and Ended after `end`.
        """
        if not transactions:
            return []
        for _ in range(2):
            try:
                return self._scored(transactions)
            except HostFailed as failed:
                log.error("model_failed", version=self.version, reason=str(failed), rows=len(transactions))
                self._start_again()
                alive()
        return self._taken_apart(transactions, _PIECE, alive, count(1))

    def begin(self, transactions: Sequence[Transaction]) -> None:
        """Begin to score without waiting. `finish` must be called until it returns the results."""
        self._host.send(self._request(transactions))

    def finish(self, within_s: float) -> list[Prediction | Poison] | None:
        """Return the results of what was begun, or None if they have not come within this time.

        Raises Poison if the model raises or answers nonsense, and HostFailed if its process ends or is late.
        """
        reply = self._host.reply(within_s)
        return None if reply is None else _results(reply, private=True)

    @property
    def busy(self) -> bool:
        """Whether something that was begun has not been finished."""
        return self._host.busy

    @property
    def overdue(self) -> bool:
        """Whether something that was begun has not been finished in time. Any thread may ask."""
        return self._host.overdue

    def own_answers(self, transactions: Sequence[Transaction]) -> list[Prediction | Poison]:
        """Return what MLflow and the model's library answer by themselves. Raises Poison if they cannot."""
        return _results(self._host.ask(Own(named_columns(transactions), self._allowance.load_s)), private=False)

    def end(self) -> None:
        """End the process for good."""
        self._ended = True
        self._host.end()

    def _started(self, spare: Host | None = None) -> Host:
        """Return a process that has loaded the model. Raises UnusableModel, Outage or HostFailed."""
        host = spare or Host(self._interpreter.path)
        host.shutdown = self._shutdown
        try:
            reply = host.ask(self._load)
            if isinstance(reply, Refused):
                raise self._refusal(reply)
            if not isinstance(reply, Loaded):
                raise HostFailed("its process does not say that it has loaded the model")
        except BaseException:
            host.end()
            raise
        self._columns = reply.columns
        about = {"model": self.name, "version": self.version}
        if reply.not_compiled:
            log.info("scoring_not_compiled", **about, reason=reply.not_compiled)
        elif self._load.compiled:
            log.info("scoring_compiled", **about)
        return host

    def _refusal(self, refused: Refused) -> Exception:
        if refused.transient:
            return Outage(f"the model cannot be loaded: {one_line(refused.reason, limit=_MOST_REASON)}")
        return UnusableModel(self._with_packages(refused.reason), damaged=refused.damaged)

    def _start_again(self) -> None:
        """Raises Outage if the model cannot be loaded any more, and Ended after `end`."""
        self._host.end()
        if self._ended:
            raise Ended
        try:
            self._host = self._started()
        except (HostFailed, UnusableModel) as problem:
            raise Outage(f"version {self.version} cannot be started again: {problem}") from None
        if self._ended:
            self._host.end()
            raise Ended

    def _with_packages(self, reason: str) -> str:
        differences = self.differing_packages
        return f"{reason}; {differences}" if differences else reason

    def _request(self, transactions: Sequence[Transaction]) -> Score:
        return Score(
            _columns(transactions, self._columns), self._allowance.batch_s * max(1.0, len(transactions) / _ROWS_A_BATCH)
        )

    def _ask(self, transactions: Sequence[Transaction], *, private: bool = True) -> list[Prediction | Poison]:
        return _results(self._host.ask(self._request(transactions)), private=private)

    def _scored(self, transactions: Sequence[Transaction]) -> list[Prediction | Poison]:
        """Score the rows. If the model raises, find the rows that it raises for. Raises HostFailed and Outage."""
        try:
            return self._ask(transactions)
        except Poison as poison:
            log.warning("model_failed", version=self.version, reason=str(poison), rows=len(transactions))
            self.check([REFERENCE])
            found = isolate(transactions, self._ask)
            reasons = Counter(str(each) for each in found if isinstance(each, Poison) and str(each) != str(poison))
            for reason, rows in reasons.most_common(_MOST_REASONS):
                log.warning("model_failed", version=self.version, reason=reason, rows=rows)
            return found

    def check(self, transactions: Sequence[Transaction]) -> None:
        """Raise Outage if the model cannot score all of these good transactions, because then it is at fault."""
        try:
            bad = next((each for each in self._ask(transactions) if isinstance(each, Poison)), None)
        except (Poison, HostFailed) as error:
            bad = Poison(str(error))
        if bad:
            raise Outage(f"the model fails on the reference transaction: {bad}")

    def _taken_apart(
        self, transactions: Sequence[Transaction], size: int, alive: Callable[[], object], deaths: Iterator[int]
    ) -> list[Prediction | Poison]:
        """Score the rows in pieces. A row that ends the process even alone becomes a Poison."""
        found: list[Prediction | Poison] = []
        while len(found) < len(transactions):
            piece = transactions[len(found) : len(found) + size]
            try:
                found += self._scored(piece)
            except HostFailed as failed:
                if next(deaths) > _MOST_DEATHS:
                    raise Outage(f"the model's process has ended {_MOST_DEATHS} times in one batch: {failed}") from None
                self._start_again()
                self.check([REFERENCE])
                alive()
                if len(piece) > 1:
                    found += self._taken_apart(piece, 1, alive, deaths)
                else:
                    log.error("model_failed", version=self.version, reason=str(failed), rows=1)
                    found.append(Poison(f"this row ended the model's process: {failed}"))
        return found

    def _try(self) -> None:
        """Score the recorded transactions in several ways. Raises UnusableModel if the results differ."""
        rows = recorded()
        together = self._tried(rows, "all at once")
        for how, batches in _ways(len(rows)):
            found, expected = [], []
            until = time.monotonic() + _MOST_TRIAL_S
            for batch in batches:
                found += self._tried([rows[number] for number in batch], how)
                expected += [together[number] for number in batch]
                if time.monotonic() > until:
                    break
            labels = sum(one.label != other.label for one, other in zip(found, expected, strict=True))
            apart = max(
                abs((one.probability or 0.0) - (other.probability or 0.0))
                for one, other in zip(found, expected, strict=True)
            )
            if labels or apart > _accepted(together):
                raise UnusableModel(
                    "its answer to a transaction depends on the others of a batch, or changes when it is asked again: "
                    f"{how}, {labels} of {len(found)} labels differ, and probabilities by up to {apart:.1e}"
                )

    def _tried(self, transactions: Sequence[Transaction], how: str) -> list[Prediction]:
        try:
            found = self._ask(transactions, private=False)
            if bad := next((each for each in found if isinstance(each, Poison)), None):
                raise bad
        except (HostFailed, Poison) as problem:
            reason = self._with_packages(f"it fails on the recorded transactions ({how}): {problem}")
            raise UnusableModel(reason) from None
        return [each for each in found if isinstance(each, Prediction)]


def load_request(folder: Path, *, threshold: float | None, compiled: bool, allowance: Allowance) -> Load:
    """Make the request to load the model in `folder`, and to try it on the recorded transactions."""
    return Load(
        str(folder),
        {name: type(getattr(REFERENCE, name)).__name__ for name in FEATURES if name != "is_fraud"},
        named_columns([REFERENCE, *recorded()]),
        threshold,
        compiled,
        allowance.load_s,
        allowance.memory_mb,
    )


def named_columns(transactions: Sequence[Transaction]) -> dict[str, list[Any]]:
    """Return the values of each column by its name."""
    return dict(zip(FEATURES, _columns(transactions, FEATURES), strict=True))


@cache
def recorded() -> Sequence[Transaction]:
    """Return several hundred transactions of made-up people.

    A model is usable only if it can score all of these transactions.
    """
    return [row for line in gzip.open(_RECORDED) for row in read_topic_1(line).transactions]


def _ways(rows: int) -> list[tuple[str, list[list[int]]]]:
    """Return how the recorded transactions are scored besides all at once: groups of their numbers."""
    numbers = list(range(rows))
    shuffled = random.Random(1).sample(numbers, rows)  # noqa: S311 - not used for security
    return [
        ("in reverse order", [numbers[::-1]]),
        ("shuffled", [shuffled]),
        ("in batches of 10", [shuffled[start : start + 10] for start in range(0, rows // 2, 10)]),
        ("in batches of 2", [shuffled[start : start + 2] for start in range(0, rows // 20, 2)]),
        ("one at a time", [[number] for number in shuffled[: rows // 20]]),
    ]


def _accepted(found: Sequence[Prediction]) -> float:
    probabilities = [each.probability or 0.0 for each in found]
    return _SAME_IN_FLOAT32 if array("d", array("f", probabilities)).tolist() == probabilities else _SAME


def _columns(transactions: Sequence[Transaction], names: Sequence[str]) -> list[list[Any]]:
    """Return the values of each of these columns."""
    return [list(map(attrgetter(name), transactions)) for name in names]


def _results(reply: Reply, *, private: bool) -> list[Prediction | Poison]:
    """Return what a reply contains. Raises Poison if the model has raised, and HostFailed for other replies.

    If the rows are `private`, digits in the model's messages are masked.
    """
    if isinstance(reply, Failed):
        if reply.memory:
            raise HostFailed(reply.reason)
        raise Poison(without_digits(reply.reason) if private else reply.reason)
    if not isinstance(reply, Scored):
        raise HostFailed("its process does not answer what it was asked")
    labels = reply.labels
    if reply.probabilities is None:
        found: list[Prediction | Poison] = [Prediction(label, None) for label in labels]
    else:
        found = list(map(Prediction, labels, array("d", reply.probabilities)))
    for number, reason in reply.faults.items():
        found[number] = Poison(reason)
    return found
