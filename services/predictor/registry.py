"""The champion: from the MLflow registry, or the last good one from the disk while the registry is away."""

import ctypes
import errno
import hashlib
import importlib
import shutil
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple

import mlflow.artifacts
import mlflow.pyfunc
import structlog
from mlflow.exceptions import MlflowException
from mlflow.models import Model as LoggedModel
from mlflow.tracking import MlflowClient

from services.predictor.model import Model, UnusableModel, make_model
from shared.errors import Outage, SettingsError

log = structlog.get_logger()

_WITH_ESTIMATOR = ("sklearn", "lightgbm", "xgboost", "catboost")
_LONGEST_LOAD_S = 3600.0
_WITHOUT_RUN = "without-run"
_PASSING = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC})


class Found(NamedTuple):
    """A version as the registry names it."""

    version: str
    run_id: str | None


class Registry:
    """The versions of one registered model, each kept on disk once it was loaded."""

    def __init__(
        self, *, tracking_uri: str, name: str, cache: Path, compiled: bool, shutdown: Event | None = None
    ) -> None:
        """Raises SettingsError if nothing can be kept in the folder `cache`."""
        self._name = name
        self._compiled = compiled
        self._shutdown = shutdown
        self._cache = cache / hashlib.sha256(name.encode()).hexdigest()[:16]
        mlflow.set_tracking_uri(tracking_uri)
        try:
            self._cache.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self._cache).close()
        except OSError as error:
            if error.errno == errno.ENOSPC:
                return
            raise SettingsError(f"MODEL_CACHE_DIRECTORY: {cache}: {error.strerror}") from None

    def find(self, alias: str) -> Found | None:
        """The version that bears the alias, or None. Raises Outage if the registry does not answer."""
        try:
            found = MlflowClient().get_model_version_by_alias(self._name, alias)
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise self._away(error) from None
        except Exception as error:
            raise self._away(error) from None
        return Found(str(found.version), found.run_id)

    def load(self, found: Found) -> Model:
        """That version, ready to score. Raises Outage if it cannot be fetched, UnusableModel if it cannot be served."""
        folder = self._folder(found)
        try:
            with tempfile.TemporaryDirectory() as elsewhere:
                try:
                    if not _intact(folder):
                        self._fetch(found.version, folder)
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise
                    log.warning("model_not_kept", reason=str(error))
                    folder = Path(_download(self._name, found.version, elsewhere))
                return self._read(folder, found.version)
        except (Outage, UnusableModel):
            raise
        except Exception as error:  # the client's, its transport's, or an artifact store's own
            raise self._away(error) from None

    def last_good(self, alias: str) -> tuple[Found, Model] | None:
        """The version that was kept for the alias, if it is still on disk as it was then."""
        try:
            folder = self._cache / self._last_good(alias).read_text()
            version, _, run_id = folder.name.partition("-")
            if not _intact(folder):
                return None
            return Found(version, None if run_id == _WITHOUT_RUN else run_id), self._read(folder, version)
        except OSError:
            return None
        except UnusableModel as error:
            log.error("model_refused", alias=alias, reason=str(error), serving="none")
            return None

    def keep(self, found: Found, alias: str) -> None:
        """Note that this version is good, and forget those that no alias needs any more."""
        folder, note = self._folder(found), self._last_good(alias)
        if not folder.exists():
            return
        try:
            with tempfile.NamedTemporaryFile("w", dir=self._cache, suffix=".partial", delete=False) as partial:
                partial.write(folder.name)
            Path(partial.name).rename(note)
            wanted = {each.read_text() for each in self._cache.glob("*.last-good")}
        except OSError as error:
            log.warning("model_not_kept", reason=str(error))
            return
        for other in self._cache.iterdir():
            with suppress(OSError):  # another replica may tidy up as well
                under_way = time.time() - other.stat().st_mtime < _LONGEST_LOAD_S  # perhaps by another replica
                if other.is_dir() and other.name not in wanted and not under_way:
                    shutil.rmtree(other, ignore_errors=True)
                    _digest_file(other).unlink(missing_ok=True)

    def _folder(self, found: Found) -> Path:
        return self._cache / f"{found.version}-{found.run_id or _WITHOUT_RUN}"

    def _last_good(self, alias: str) -> Path:
        return self._cache / f"{hashlib.sha256(alias.encode()).hexdigest()[:16]}.last-good"

    def _away(self, error: Exception) -> Outage:
        return Outage(f"the registry, for {self._name}: {type(error).__name__}: {error}")

    def _fetch(self, version: str, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=self._cache) as directory:
            path = Path(_download(self._name, version, directory))
            _digest_file(folder).write_text(_digest(path))
            with suppress(OSError):  # another replica with the same cache was faster
                path.rename(folder)

    def _read(self, folder: Path, version: str) -> Model:
        model = f"models:/{self._name}/{version}"
        try:
            logged = LoggedModel.load(str(folder))
            inputs = logged.signature.inputs if logged.signature else None
            digest = _digest(folder)  # of what is run now
            made = make_model(
                name=self._name,
                version=version,
                estimator=_estimator(folder, logged),
                columns=inputs.input_names() if inputs is not None and inputs.has_input_names() else None,
                metadata=logged.metadata or {},
                logged_at=datetime.fromisoformat(logged.utc_time_created).replace(tzinfo=UTC).timestamp(),
                compiled=self._compiled,
                shutdown=self._shutdown,
            )
            _give_back()
            return replace(made, digest=digest)
        except UnusableModel as error:
            raise UnusableModel(f"{model}: {error}") from None
        except ImportError as error:
            raise UnusableModel(f"{model} needs {error.name or error}, which is not installed here") from None
        except Exception as error:  # unpickling runs whatever the artifact holds
            reason = f"{model} does not load: {type(error).__name__}: {error}"
            if isinstance(error, MemoryError) or getattr(error, "errno", None) in _PASSING:
                raise Outage(reason) from None
            _digest_file(folder).unlink(
                missing_ok=True
            )  # fetched anew when it is tried again: perhaps it was not whole
            raise UnusableModel(reason) from None


def _estimator(folder: Path, logged: LoggedModel) -> Any:
    """The model itself where it has scikit-learn's interface, else MLflow's own wrapping of it."""
    for flavor in _WITH_ESTIMATOR:
        if flavor in logged.flavors:
            found = importlib.import_module(f"mlflow.{flavor}").load_model(str(folder))
            if flavor == "sklearn" or hasattr(found, "classes_"):
                return found
    if "python_function" not in logged.flavors:
        raise UnusableModel("it was logged without a flavor that can be served")
    return mlflow.pyfunc.load_model(str(folder))


def _give_back() -> None:
    """Memory that loading took for a while: glibc keeps it otherwise, tens of megabytes after a forest."""
    with suppress(AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _download(name: str, version: str, directory: str) -> str:
    return str(mlflow.artifacts.download_artifacts(f"models:/{name}/{version}", dst_path=directory))


def _digest_file(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.sha256")


def _intact(folder: Path) -> bool:
    """Whether the folder is as it was when it was fetched."""
    try:
        return _digest_file(folder).read_text() == _digest(folder)
    except OSError:
        return False


def _digest(folder: Path) -> str:
    """SHA-256 of all files with their names."""
    total = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        total.update(f"{path.relative_to(folder)}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()
