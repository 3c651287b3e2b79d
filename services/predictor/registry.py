"""The champion: from the MLflow registry, or the last good one from the disk while the registry is away."""

import errno
import hashlib
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import mlflow.artifacts
import mlflow.sklearn
import structlog
from mlflow.models import Model as LoggedModel
from mlflow.tracking import MlflowClient

from services.predictor.model import Model, UnusableModel, make_model
from shared.errors import Outage, SettingsError

log = structlog.get_logger()

_UNDER_WAY = "download-"
_LONGEST_FETCH_S = 3600.0


class Registry:
    """The versions of one registered model, each kept on disk once it was loaded."""

    def __init__(self, *, tracking_uri: str, name: str, alias: str, cache: Path, compiled: bool) -> None:
        """Raises SettingsError if nothing can be kept in the folder `cache`."""
        self._name = name
        self._alias = alias
        self._compiled = compiled
        self._cache = cache / hashlib.sha256(f"{name}@{alias}".encode()).hexdigest()[:16]
        self._last_good = self._cache / "last-good"
        mlflow.set_tracking_uri(tracking_uri)
        try:
            self._cache.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self._cache).close()
        except OSError as error:
            if error.errno == errno.ENOSPC:
                return
            raise SettingsError(f"MODEL_CACHE_DIRECTORY: {cache}: {error.strerror}") from None

    def champion(self, *, but_not: str | None = None) -> Model:
        """The version that bears the alias, ready to score, and from now on the last good one.

        Raises Outage if the registry does not answer, has no such version, or none but version `but_not`;
        UnusableModel if it cannot be served.
        """
        source = f"models:/{self._name}@{self._alias}"
        try:
            found = MlflowClient().get_model_version_by_alias(self._name, self._alias)
            version = str(found.version)
            if version == but_not:
                raise Outage(f"{source} is still version {version}")
            folder = self._cache / f"{version}-{found.run_id or 'without-run'}"
            with tempfile.TemporaryDirectory() as elsewhere:
                try:
                    if not _intact(folder):
                        self._fetch(version, folder)
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise
                    log.warning("model_not_kept", reason=str(error))
                    folder = Path(_download(self._name, version, elsewhere))
                model = self._read(folder, version)
        except (Outage, UnusableModel):
            raise
        except Exception as error:  # the client's, its transport's, or an artifact store's own
            raise Outage(f"{source}: {type(error).__name__}: {error}") from None
        if folder.parent == self._cache:
            self._keep(folder)
        return model

    def last_good(self) -> Model | None:
        """The version that was served last, if it is still on disk as it was then."""
        try:
            folder = self._cache / self._last_good.read_text()
            return self._read(folder, folder.name.partition("-")[0]) if _intact(folder) else None
        except (OSError, UnusableModel):
            return None

    def _fetch(self, version: str, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=self._cache, prefix=_UNDER_WAY) as directory:
            path = Path(_download(self._name, version, directory))
            _digest_file(folder).write_text(_digest(path))
            with suppress(OSError):  # another replica with the same cache was faster
                path.rename(folder)

    def _read(self, folder: Path, version: str) -> Model:
        model = f"models:/{self._name}/{version}"
        try:
            logged = LoggedModel.load(str(folder))
            if "sklearn" not in logged.flavors:
                raise UnusableModel("it was not logged with mlflow.sklearn")
            inputs = logged.signature.inputs if logged.signature else None
            return make_model(
                name=self._name,
                version=version,
                estimator=mlflow.sklearn.load_model(str(folder)),
                columns=inputs.input_names() if inputs is not None and inputs.has_input_names() else None,
                metadata=logged.metadata or {},
                compiled=self._compiled,
            )
        except UnusableModel as error:
            raise UnusableModel(f"{model}: {error}") from None
        except Exception as error:  # unpickling runs whatever the artifact holds
            raise UnusableModel(f"{model} does not load: {type(error).__name__}: {error}") from None

    def _keep(self, folder: Path) -> None:
        """Note the last good version, and forget those before it."""
        try:
            partial = self._last_good.with_suffix(".partial")
            partial.write_text(folder.name)
            partial.rename(self._last_good)
        except OSError as error:
            log.warning("model_not_kept", reason=str(error))
            return
        for other in self._cache.iterdir():
            under_way = other.name.startswith(_UNDER_WAY) and time.time() - other.stat().st_mtime < _LONGEST_FETCH_S
            if other.is_dir() and other != folder and not under_way:
                shutil.rmtree(other, ignore_errors=True)
                _digest_file(other).unlink(missing_ok=True)


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
