"""The champion: from the MLflow registry, or the last good one from the disk while the registry is away."""

import hashlib
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import mlflow.artifacts
import mlflow.sklearn
import msgspec
import structlog
from mlflow.exceptions import MlflowException
from mlflow.models import Model as LoggedModel
from mlflow.tracking import MlflowClient
from requests import RequestException

from services.predictor.model import Model, UnusableModel, make_model
from shared.errors import Outage, SettingsError

log = structlog.get_logger()

_UNDER_WAY = "download-"
_LONGEST_FETCH_S = 3600.0


class _LastGood(msgspec.Struct):
    """What the cache says of the version that was served last."""

    version: str
    folder: str
    digest: str


class Registry:
    """The versions of one registered model, each kept on disk once it was loaded."""

    def __init__(self, *, tracking_uri: str, name: str, alias: str, cache: Path) -> None:
        """Raises SettingsError if nothing can be kept in the folder `cache`."""
        self._name = name
        self._alias = alias
        self._cache = cache / hashlib.sha256(f"{name}@{alias}".encode()).hexdigest()[:16]
        self._last_good = self._cache / "last-good.json"
        try:
            self._cache.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self._cache).close()
        except OSError as error:
            raise SettingsError(f"MODEL_CACHE_DIRECTORY: {cache}: {error.strerror}") from None
        mlflow.set_tracking_uri(tracking_uri)

    def champion(self, *, but_not: str | None = None) -> Model:
        """The version that bears the alias, ready to score, and from now on the last good one.

        Raises Outage if the registry does not answer, has no such version, or none but version `but_not`;
        UnusableModel if it cannot be served.
        """
        try:
            found = MlflowClient().get_model_version_by_alias(self._name, self._alias)
            version = str(found.version)
            if version == but_not:
                raise Outage(f"models:/{self._name}@{self._alias} is still version {version}")
            folder = self._cache / f"{version}-{found.run_id or 'without-run'}"
            if not folder.exists():
                self._fetch(version, folder)
        except (MlflowException, RequestException, OSError) as error:
            raise Outage(f"models:/{self._name}@{self._alias}: {str(error).splitlines()[0]}") from None
        model = _read(folder, name=self._name, version=version)
        try:
            self._keep(_LastGood(version, folder.name, _digest(folder)))
        except OSError as error:
            log.warning("model_not_kept", reason=str(error))
        return model

    def last_good(self) -> Model | None:
        """The version that was served last, if it is still on disk as it was then."""
        try:
            kept = msgspec.json.decode(self._last_good.read_bytes(), type=_LastGood)
            folder = self._cache / kept.folder
            if _digest(folder) != kept.digest:
                return None
            return _read(folder, name=self._name, version=kept.version)
        except (OSError, msgspec.DecodeError, UnusableModel):
            return None

    def _fetch(self, version: str, folder: Path) -> None:
        with tempfile.TemporaryDirectory(dir=self._cache, prefix=_UNDER_WAY) as directory:
            path = mlflow.artifacts.download_artifacts(f"models:/{self._name}/{version}", dst_path=directory)
            with suppress(OSError):  # another replica with the same cache was faster
                Path(path).rename(folder)

    def _keep(self, kept: _LastGood) -> None:
        """Note the last good version, and forget those before it."""
        partial = self._last_good.with_suffix(".partial")
        partial.write_bytes(msgspec.json.encode(kept))
        partial.rename(self._last_good)
        for folder in self._cache.iterdir():
            under_way = folder.name.startswith(_UNDER_WAY) and time.time() - folder.stat().st_mtime < _LONGEST_FETCH_S
            if folder.is_dir() and folder.name != kept.folder and not under_way:
                shutil.rmtree(folder, ignore_errors=True)


def _digest(folder: Path) -> str:
    """SHA-256 of all files with their names."""
    total = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        total.update(f"{path.relative_to(folder)}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def _read(folder: Path, *, name: str, version: str) -> Model:
    try:
        logged = LoggedModel.load(str(folder))
    except (MlflowException, OSError) as error:
        raise UnusableModel(f"models:/{name}/{version} has no MLmodel file that can be read: {error}") from None
    if "sklearn" not in logged.flavors:
        raise UnusableModel(f"models:/{name}/{version} was not logged with mlflow.sklearn")
    try:
        estimator = mlflow.sklearn.load_model(str(folder))
    except Exception as error:  # unpickling runs whatever the artifact holds
        raise UnusableModel(f"models:/{name}/{version} does not load: {type(error).__name__}: {error}") from None
    inputs = logged.signature.inputs if logged.signature else None
    columns = inputs.input_names() if inputs is not None and inputs.has_input_names() else None
    try:
        return make_model(
            name=name, version=version, estimator=estimator, columns=columns, metadata=logged.metadata or {}
        )
    except UnusableModel as error:
        raise UnusableModel(f"models:/{name}/{version}: {error}") from None
