"""The versions that bear an alias: followed in the registry by a thread, and swapped between two batches."""

import time
from collections.abc import Sequence
from contextlib import suppress
from threading import Event, Thread

import structlog

from services.predictor.model import Model, UnusableModel
from services.predictor.registry import Found, Registry
from shared import metrics
from shared.errors import Outage
from shared.retry import OutageLog, retry_outages
from shared.settings import StreamSettings

log = structlog.get_logger()


class Followed:
    """The model that bears an alias, or the last one that did and was good."""

    def __init__(self, registry: Registry, alias: str, *, required: bool) -> None:
        self.model: Model | None = None
        self._registry = registry
        self._alias = alias
        self._required = required
        self._found: Found | None = None
        self._refused: Found | None = None
        self._why = ""  # it was

    def first(self) -> None:
        """Have a model to begin with, if need be the last good one. Raises Outage if there is neither."""
        try:
            self.look()
            reason = self._why
        except Outage as outage:
            reason = str(outage)
        if self.model is None:
            kept = self._registry.last_good(self._alias)
            if kept is None:
                raise Outage(f"no usable model: {reason}")
            self._found, model = kept
            self._serve(model)
            log.warning("last_good_model", version=self.version, digest=model.digest, reason=reason)

    def look(self) -> None:
        """Have what bears the alias by now; a version that cannot be served changes nothing. Raises Outage."""
        try:
            found = self._registry.find(self._alias)
            if found is None and self._required:
                raise Outage(f"no version is {self._alias}")
            if found == self._found or (found and found == self._refused):
                return
            model = self._ready(found) if found else None
        except UnusableModel as error:
            self._refused, self._why = found, str(error)
            log.error("model_refused", alias=self._alias, reason=str(error), serving=self.version)
            return
        except Outage as outage:
            raise Outage(f"{outage}; serving version {self.version}" if self.model else str(outage)) from None
        if model is None:
            log.info("model_gone", alias=self._alias, version=self.version)
        self._serve(model)
        self._found = found

    @property
    def version(self) -> str:
        """In words."""
        return self.model.version if self.model else "none"

    def _ready(self, found: Found) -> Model:
        began = time.monotonic()
        model = self._registry.load(found)
        self._registry.keep(found, self._alias)
        took_ms = round(1000 * (time.monotonic() - began))
        log.info(
            "model_loaded",
            alias=self._alias,
            model=model.name,
            version=model.version,
            digest=model.digest,
            took_ms=took_ms,
        )
        return model

    def _serve(self, model: Model | None) -> None:
        if self.model:
            metrics.MODEL.remove(self._alias, self.model.name, self.model.version)
            metrics.MODEL_LOGGED_AT.remove(self._alias)
        self.model = model
        if model:
            metrics.MODEL.labels(self._alias, model.name, model.version).set(1)
            metrics.MODEL_LOGGED_AT.labels(self._alias).set(model.logged_at)


def keep_up(
    followed: Sequence[Followed], *, every_s: float, now: Event, shutdown: Event, settings: StreamSettings
) -> Thread:
    """Follow the aliases until shutdown, in the background: every so often, and `now` when that is set.

    Join the thread at the end, so that no process that converts a model, and no file half fetched, is left behind.
    """

    def look() -> None:
        outages = []
        for each in followed:
            try:
                each.look()
            except Outage as outage:  # of one alias, perhaps
                outages.append(outage)
        if outages:
            raise outages[0]

    def run() -> None:
        outage_log = OutageLog()  # the version that serves goes on serving
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
