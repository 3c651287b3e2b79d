"""Loads model versions from the MLflow registry.

If the registry is unreachable, the last good version is loaded from disk.
"""

import errno
import hashlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple

import mlflow.artifacts
import msgspec
import requests
import structlog
from mlflow.exceptions import MlflowException
from mlflow.models import Model as LoggedModel
from mlflow.tracking import MlflowClient

from services.predictor import packages
from services.predictor.hosted import Allowance, Host
from services.predictor.model import Logged, Model, UnusableModel
from services.predictor.settings import ModelSettings
from shared.errors import Outage, SettingsError
from shared.privacy import without_credentials
from shared.profile import Profile
from shared.registry import why_registry_failed

log = structlog.get_logger()

_LONGEST_LOAD_S = 3600.0
_MAX_REASON = 500  # characters
_WITHOUT_RUN = "without-run"


class Found(NamedTuple):
    """A model version in the registry."""

    version: str
    run_id: str | None


class Registry:
    """The versions of the registered model `name`. Loaded versions are cached on disk."""

    def __init__(
        self,
        settings: ModelSettings,
        *,
        cache: Path,
        compiled: bool,
        spare: Host | None = None,
        shutdown: Event | None = None,
    ) -> None:
        """If `compiled`, the trees of models are compiled. If `shutdown` is set, loading a model ends with an Outage.

        `spare` is a process for the first model that this interpreter can load.

        Raises SettingsError if the folder `cache` is not writable, unless the reason is a full disk.
        """
        self.name = settings.model_name
        self._python = settings.model_python if os.access(settings.model_python or "", os.X_OK) else None
        self._allowance = Allowance(settings.model_load_seconds, settings.model_batch_seconds, settings.model_memory_mb)
        self._address = without_credentials(settings.mlflow_tracking_uri)
        self._compiled = compiled
        self._spare = spare
        self._shutdown = shutdown
        self._cache = cache / hashlib.sha256(self.name.encode()).hexdigest()[:16]
        mlflow.set_tracking_uri(settings.mlflow_tracking_uri)
        try:
            self._cache.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self._cache).close()
        except OSError as error:
            if error.errno == errno.ENOSPC:
                return
            raise SettingsError(
                f"MODEL_CACHE_DIRECTORY: cannot write to {cache}: {str(error.strerror).lower()}"
            ) from None

    def find(self, alias: str) -> Found | None:
        """Return the version that has the alias, or None if no version has it. Raises Outage if the registry fails."""
        try:
            found = MlflowClient().get_model_version_by_alias(self.name, alias)
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise self._outage(f"cannot read the alias {alias} of the model {self.name}", error) from None
        except Exception as error:
            raise self._outage(f"cannot read the alias {alias} of the model {self.name}", error) from None
        return Found(str(found.version), found.run_id)

    def load(self, found: Found) -> Model:
        """Load the version. Returns a model that is ready to score transactions, in a process of its own.

        Raises Outage if the version cannot be fetched, and UnusableModel if it cannot be served.
        """
        with self._fetched(found) as folder:
            return self._read(folder, found.version)

    def interpreter(self, found: Found) -> packages.Interpreter:
        """Return the interpreter that loads the version, and how its packages differ. Raises Outage."""
        with self._fetched(found) as folder:
            return packages.closest(folder, self._python)

    @contextmanager
    def _fetched(self, found: Found) -> Iterator[Path]:
        """Yield the folder with the version's files. Raises Outage if they cannot be fetched."""
        folder = self._folder(found)
        with tempfile.TemporaryDirectory() as uncached:
            try:
                try:
                    if not _intact(folder):
                        self._fetch(found.version, folder)
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise
                    log.warning("model_not_kept", folder=str(self._cache), reason=str(error.strerror).lower())
                    folder = Path(_download(self.name, found.version, uncached))
            except Exception as error:  # raised by MLflow, its HTTP client or an artifact store
                raise self._outage(f"cannot fetch version {found.version} of the model {self.name}", error) from None
            yield folder

    def last_good(self, alias: str, *, unless: Found | None) -> tuple[Found, Model] | None:
        """Load the version that `keep` recorded for the alias.

        Returns None if this version is `unless`, or if its files are missing, damaged or unusable.
        """
        try:
            folder = self._cache / self._last_good(alias).read_text()
            version, _, run_id = folder.name.partition("-")
            kept = Found(version, None if run_id == _WITHOUT_RUN else run_id)
            if kept == unless or not _intact(folder):
                return None
            return kept, self._read(folder, version)
        except OSError:
            return None
        except UnusableModel as error:
            log.error("model_refused", alias=alias, reason=str(error), serving="none")
            return None

    def keep(self, found: Found, alias: str) -> None:
        """Record the version as the alias's last good version, and remove cached versions that no alias needs."""
        folder, note = self._folder(found), self._last_good(alias)
        if not folder.exists():
            return
        try:
            with tempfile.NamedTemporaryFile("w", dir=self._cache, suffix=".partial", delete=False) as partial:
                partial.write(folder.name)
            Path(partial.name).rename(note)
            wanted = {each.read_text() for each in self._cache.glob("*.last-good")}
        except OSError as error:
            log.warning("model_not_kept", folder=str(self._cache), reason=str(error.strerror).lower())
            return
        for other in self._cache.iterdir():
            with suppress(OSError):  # another replica may be removing the same version
                recent = time.time() - other.stat().st_mtime < _LONGEST_LOAD_S  # another replica may be loading it
                if other.is_dir() and other.name not in wanted and not recent:
                    shutil.rmtree(other, ignore_errors=True)
                    _digest_file(other).unlink(missing_ok=True)

    def _folder(self, found: Found) -> Path:
        return self._cache / f"{found.version}-{found.run_id or _WITHOUT_RUN}"

    def _last_good(self, alias: str) -> Path:
        return self._cache / f"{hashlib.sha256(alias.encode()).hexdigest()[:16]}.last-good"

    def _outage(self, failed: str, error: Exception) -> Outage:
        return Outage(f"MLflow registry at {self._address}: {failed}: {_problem(error)}")

    def _fetch(self, version: str, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=self._cache) as directory:
            path = Path(_download(self.name, version, directory))
            _digest_file(folder).write_text(_digest(path))
            with suppress(OSError):  # another replica may already have cached this version
                path.rename(folder)

    def _read(self, folder: Path, version: str) -> Model:
        try:
            interpreter = packages.closest(folder, self._python)
            logged = _logged(folder, self.name, version)
            spare = None
            if interpreter.path == sys.executable:
                spare, self._spare = self._spare, None
            return Model(
                logged,
                interpreter,
                allowance=self._allowance,
                compiled=self._compiled,
                spare=spare,
                shutdown=self._shutdown,
            )
        except UnusableModel as error:
            if error.damaged:  # a retry fetches the files again
                _digest_file(folder).unlink(missing_ok=True)
            raise UnusableModel(f"models:/{self.name}/{version}: {error}") from None


def _logged(folder: Path, name: str, version: str) -> Logged:
    """Read what the version was logged with. Raises UnusableModel if its threshold is none."""
    digest = _digest(folder)
    try:
        logged = LoggedModel.load(str(folder))
        metadata = logged.metadata or {}
        logged_at = datetime.fromisoformat(logged.utc_time_created).replace(tzinfo=UTC).timestamp()
    except Exception as error:  # a library may have written anything
        raise UnusableModel(f"its file MLmodel cannot be read: {type(error).__name__}: {error}", damaged=True) from None
    return Logged(
        name=name,
        version=version,
        folder=folder,
        threshold=_threshold(metadata.get("threshold")),
        profile=_profile(metadata.get("reference_profile")),
        logged_at=logged_at,
        digest=digest,
    )


def _threshold(logged: Any) -> float | None:
    if logged is None:
        return None
    if type(logged) not in (int, float) or not 0 < logged <= 1:
        raise UnusableModel(f"it was logged with the threshold {str(logged)[:20]!r}, which is no number in (0, 1]")
    return float(logged)


def _profile(text: Any) -> Profile | None:
    """Read the profile of the training data. Returns None if the profile is missing or unreadable.

    Scoring works without a profile.
    """
    if text is None:
        return None
    try:
        return msgspec.json.decode(text, type=Profile)
    except (msgspec.MsgspecError, TypeError) as error:
        log.warning("reference_profile_unreadable", reason=str(error))
        return None


def _problem(error: Exception) -> str:
    """Return why a call to the registry failed, in plain words if the cause is known."""
    as_it_is = f"{type(error).__name__}: {without_credentials(str(error))}"[:_MAX_REASON]
    if not isinstance(error, (MlflowException, requests.RequestException)):
        return as_it_is  # raised by an artifact store, whose message names the store
    return why_registry_failed(error, default=as_it_is)


def _download(name: str, version: str, directory: str) -> str:
    return str(mlflow.artifacts.download_artifacts(f"models:/{name}/{version}", dst_path=directory))


def _digest_file(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.sha256")


def _intact(folder: Path) -> bool:
    """Return whether the files in the folder are unchanged since they were fetched."""
    try:
        return _digest_file(folder).read_text() == _digest(folder)
    except OSError:
        return False


def _digest(folder: Path) -> str:
    """Return the hexadecimal SHA-256 of the names and contents of all files in the folder."""
    total = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        total.update(f"{path.relative_to(folder)}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()
