"""Loads the models that aliases in the registry point to. A new model takes effect between two batches.

Before it takes effect, a new model is tried on recorded transactions. After that, it is on probation: the last model
that passed its probation stays loaded, and scores every batch for which the new model fails or is slow. If the new
model fails where the one before does not, it is refused.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from threading import Event, Lock, Thread

import structlog

from services.predictor.hosted import HostFailed
from services.predictor.model import Ended, Model, Prediction, UnusableModel
from services.predictor.registry import Found, Registry
from shared import metrics
from shared.errors import Outage, Poison
from shared.records import Transaction
from shared.retry import OutageLog, retry_outages
from shared.settings import StreamSettings

log = structlog.get_logger()

_SLOW_S = 0.1  # after which the model before scores a batch
_PROBATION_S = 60.0
_PROBATION_ROWS = 10_000
_LONGEST_PROBATION_S = 3600.0

Results = Sequence[Prediction | Poison]


class Followed:
    """Follows an alias in the registry. If the model with the alias cannot be used, keeps the last good model."""

    def __init__(self, registry: Registry, alias: str, *, required: bool) -> None:
        self._registry = registry
        self._alias = alias
        self._required = required
        self._found: Found | None = None
        self._refused: Found | None = None
        self._refusal_reason = ""
        # Both are replaced together, so that a thread sees the one with the other. The second is there in probation.
        self._serving: tuple[Model | None, Model | None] = (None, None)
        self._kept: tuple[Found, Model] | None = (
            None  # the last version that passed its probation, while another is on it
        )
        self._began = 0.0  # monotonic time at which it was replaced
        self._rows = 0  # that the new model has scored in probation
        self._slow = False  # whether it was slow in probation
        self._lock = Lock()  # two threads replace models: the one that looks, and the one that scores

    @property
    def model(self) -> Model | None:
        """The model that is being served."""
        return self._serving[0]

    @property
    def version(self) -> str:
        """The version that is being served, or `none`."""
        return self.model.version if self.model else "none"

    def first(self) -> None:
        """Load the first model: the version that has the alias, or the last good one if that cannot be used.

        If these are different versions, both are loaded, because the version with the alias is still on probation.
        Raises Outage if neither can be loaded.
        """
        found, reason = None, ""
        try:
            found = self._registry.find(self._alias)
        except Outage as outage:
            reason = str(outage)
        if kept := self._registry.last_good(self._alias, unless=found):
            self._found, model = kept
            self._serve(model, None)
        if not reason:
            try:
                self.look()
                reason = self._refusal_reason
            except Outage as outage:
                reason = str(outage)
        if self.model is None:
            raise Outage(f"no usable model: {reason}")
        if reason:
            log.warning("last_good_model", version=self.version, digest=self.model.logged.digest, reason=reason)

    def look(self) -> None:
        """Load the version that has the alias now, unless this version is already loaded.

        If the version cannot be used, the reason is logged once, and the current model stays in use. Raises Outage if
        the registry does not respond, or if the alias is required but no version has it.
        """
        self._end_probation()
        try:
            found = self._registry.find(self._alias)
            if found is None and self._required:
                raise Outage(f"no version of {self._registry.name} has the alias {self._alias}; run fraudctl promote")
            if found == self._found or (found and found == self._refused):
                return
            began = time.monotonic()
            back = self._kept and self._kept[0] == found  # no need to load it again
            model = self._kept[1] if back and self._kept else self._registry.load(found) if found else None
        except UnusableModel as error:
            self._refused, self._refusal_reason = found, str(error)
            log.error("model_refused", alias=self._alias, reason=str(error), serving=self.version)
            return
        except Outage as outage:
            raise Outage(f"{outage}; still serving version {self.version}" if self.model else str(outage)) from None
        gone = self.version
        with self._lock:
            if found == self._found:  # the version that it had moved away from has just been refused
                return
            current = (self._found, self.model) if self._found and self.model else None
            # A version that is replaced while it is on probation is never the one to fall back on.
            proven = self._kept or current
            self._kept = proven if self._required and not back else None
            unneeded = current if current is not self._kept else None
            self._found, self._refused = found, None
            self._began, self._rows, self._slow = time.monotonic(), 0, False
            self._serve(model, self._kept[1] if self._kept else None)
        if unneeded:
            unneeded[1].end()
        if found and not self._kept:
            self._registry.keep(found, self._alias)
        # Logged only now, because whoever reads these lines expects the next batch to be scored accordingly.
        if model is None:
            log.info("model_gone", alias=self._alias, version=gone)
        else:
            log.info(
                "model_loaded",
                alias=self._alias,
                model=model.name,
                version=model.version,
                digest=model.logged.digest,
                took_ms=round(1000 * (time.monotonic() - began)),
            )

    def score(self, transactions: Sequence[Transaction], *, alive: Callable[[], object]) -> tuple[Model, Results]:
        """Score the transactions. Returns the model that has scored them, and one result each, as `Model.score` does.

        Raises Outage if there is no model yet, or if the model fails on good transactions, too.
        """
        while True:
            model, before = self._serving
            if model is None:
                raise Outage("no model is loaded yet")
            try:
                if before is None or not transactions:
                    return model, model.score(transactions, alive=alive)
                return self._on_probation(model, before, transactions, alive)
            except Ended:  # another one has just taken its place
                continue

    def _on_probation(
        self, model: Model, before: Model, transactions: Sequence[Transaction], alive: Callable[[], object]
    ) -> tuple[Model, Results]:
        try:
            if model.busy and model.finish(0.0) is None:  # with a batch that the model before has scored
                return before, before.score(transactions, alive=alive)
            model.begin(transactions)
            found = model.finish(_SLOW_S)
        except (Poison, HostFailed) as problem:
            theirs = before.score(transactions, alive=alive)
            if any(isinstance(each, Poison) for each in theirs):  # perhaps the rows are at fault
                return model, model.score(transactions, alive=alive)
            self._refuse(model, before, str(problem))
            return before, theirs
        if found is None:
            if not self._slow:
                log.warning("model_slow", version=model.version, seconds=_SLOW_S, scored_by=before.version)
            self._slow = True
            return before, before.score(transactions, alive=alive)
        self._rows += len(transactions)
        return model, found

    def end(self) -> None:
        """End the models' processes."""
        with self._lock:
            for model in (self.model, self._kept and self._kept[1]):
                if model:
                    model.end()

    def _refuse(self, model: Model, before: Model, reason: str) -> None:
        """Go back to the model before, because the new one fails where that one does not."""
        with self._lock:
            if self._serving != (model, before):  # another version has just been loaded
                return
            self._refused, self._found = self._found, self._kept[0] if self._kept else None
            self._kept = None
            self._serve(before, None)
        model.end()
        log.error(
            "model_refused",
            alias=self._alias,
            reason=f"models:/{model.name}/{model.version}: {reason}",
            serving=self.version,
        )

    def _end_probation(self) -> None:
        """End the model before if the new one has scored enough, or the new one if it hangs."""
        model, before = self._serving
        if model and before and model.overdue:  # and no other batch has come in which this would show
            self._refuse(model, before, "it does not answer")
        lasted_s = time.monotonic() - self._began
        enough = lasted_s > _PROBATION_S and self._rows >= _PROBATION_ROWS
        with self._lock:
            kept = self._kept
            if not kept or not (enough or lasted_s > _LONGEST_PROBATION_S):
                return
            self._kept = None
            self._serving = (self.model, None)
        kept[1].end()
        if self._found:
            self._registry.keep(self._found, self._alias)

    def _serve(self, model: Model | None, before: Model | None) -> None:
        if self.model:
            metrics.MODEL.remove(self._alias, self.model.name, self.model.version)
            metrics.MODEL_LOGGED_AT.remove(self._alias)
        self._serving = (model, before)
        if model and model.differing_packages:
            log.warning(
                "model_packages_differ", model=model.name, version=model.version, reason=model.differing_packages
            )
        if model:
            metrics.MODEL.labels(self._alias, model.name, model.version).set(1)
            metrics.MODEL_LOGGED_AT.labels(self._alias).set(model.logged.logged_at)


def keep_up(
    followed: Sequence[Followed], *, every_s: float, now: Event, shutdown: Event, settings: StreamSettings
) -> Thread:
    """Start a thread that checks the aliases every `every_s` seconds and whenever `now` is set, until shutdown.

    The caller must join the thread at the end, so that no conversion process and no partial download is left behind.
    """

    def look() -> None:
        outages = []
        for each in followed:
            try:
                each.look()
            except Outage as outage:  # the other alias must still be checked
                outages.append(outage)
        if outages:
            raise outages[0]

    def run() -> None:
        outage_log = OutageLog()  # /ready does not show this outage, because the loaded version is still served
        with suppress(Outage):
            while not shutdown.is_set():
                now.wait(every_s)
                now.clear()
                if shutdown.is_set():
                    break
                retry_outages(
                    look,
                    shutdown=shutdown,
                    initial_s=settings.backoff_initial_seconds,
                    max_s=settings.backoff_max_seconds,
                    outage_log=outage_log,
                )

    thread = Thread(target=run, daemon=True, name="registry")
    thread.start()
    return thread
