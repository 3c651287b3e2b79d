"""Loads the models that aliases in the registry point to. A new model takes effect between two batches."""

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
    """Follows an alias in the registry. If the model with the alias cannot be used, keeps the last good model."""

    def __init__(self, registry: Registry, alias: str, *, required: bool) -> None:
        self.model: Model | None = None
        self._registry = registry
        self._alias = alias
        self._required = required
        self._found: Found | None = None
        self._refused: Found | None = None
        self._refusal_reason = ""

    def first(self) -> None:
        """Load the first model from the registry or, if that fails, the last good model from disk.

        Raises Outage if neither model can be loaded.
        """
        try:
            self.look()
            reason = self._refusal_reason
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
        """Load the version that has the alias now, unless this version is already loaded.

        If the version cannot be used, the reason is logged once, and the current model stays in use. Raises Outage if
        the registry does not respond, or if the alias is required but no version has it.
        """
        try:
            found = self._registry.find(self._alias)
            if found is None and self._required:
                raise Outage(f"no version of {self._registry.name} has the alias {self._alias}; run fraudctl promote")
            if found == self._found or (found and found == self._refused):
                return
            began = time.monotonic()
            model = self._load(found) if found else None
        except UnusableModel as error:
            self._refused, self._refusal_reason = found, str(error)
            log.error("model_refused", alias=self._alias, reason=str(error), serving=self.version)
            return
        except Outage as outage:
            raise Outage(f"{outage}; still serving version {self.version}" if self.model else str(outage)) from None
        gone = self.version
        self._serve(model)
        self._found = found
        # Logged only now, because whoever reads these lines expects the next batch to be scored accordingly.
        if model is None:
            log.info("model_gone", alias=self._alias, version=gone)
        else:
            log.info(
                "model_loaded",
                alias=self._alias,
                model=model.name,
                version=model.version,
                digest=model.digest,
                took_ms=round(1000 * (time.monotonic() - began)),
            )

    @property
    def version(self) -> str:
        """The version that is being served, or `none`."""
        return self.model.version if self.model else "none"

    def _load(self, found: Found) -> Model:
        model = self._registry.load(found)
        self._registry.keep(found, self._alias)
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
