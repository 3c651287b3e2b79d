"""The champion, fetched from the MLflow registry."""

import tempfile

import mlflow.artifacts
import mlflow.sklearn
from mlflow.exceptions import MlflowException
from mlflow.models import Model as LoggedModel
from mlflow.tracking import MlflowClient
from requests import RequestException

from services.predictor.model import Model, UnusableModel, make_model
from shared.errors import Outage


def load(*, tracking_uri: str, name: str, alias: str) -> Model:
    """Fetch the version that bears `alias` and make it ready.

    Raises Outage if the registry does not answer or has no such version yet, UnusableModel if it cannot be served.
    """
    mlflow.set_tracking_uri(tracking_uri)
    try:
        version = MlflowClient().get_model_version_by_alias(name, alias).version
        with tempfile.TemporaryDirectory() as directory:
            path = mlflow.artifacts.download_artifacts(f"models:/{name}/{version}", dst_path=directory)
            return _read(path, name=name, version=str(version))
    except (MlflowException, RequestException, OSError) as error:
        raise Outage(f"models:/{name}@{alias}: {str(error).splitlines()[0]}") from None


def _read(path: str, *, name: str, version: str) -> Model:
    logged = LoggedModel.load(path)
    if "sklearn" not in logged.flavors:
        raise UnusableModel(f"models:/{name}/{version} was not logged with mlflow.sklearn")
    try:
        estimator = mlflow.sklearn.load_model(path)
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
