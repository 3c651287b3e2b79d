"""Looks up which model version has a given alias, moves the alias to another version, and moves it back."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from shared.errors import Outage
from shared.privacy import without_credentials
from shared.registry import why_registry_failed

_MOST_REMEMBERED = 20


class Alias(NamedTuple):
    """An alias of a registered model."""

    tracking_uri: str
    name: str
    alias: str

    def __str__(self) -> str:
        return f"{self.name}@{self.alias}"


class NoSuchVersion(Exception):
    """The alias cannot be moved, because the version does not exist."""


def bearer(of: Alias) -> str | None:
    """Return the version that has the alias, or None. Raises Outage if the registry does not respond."""
    with _registry(of) as client:
        try:
            return str(client.get_model_version_by_alias(of.name, of.alias).version)
        except MlflowException as error:
            if error.error_code not in _ABSENT:
                raise
            return None


def exists(of: Alias, version: str) -> bool:
    """Return whether the registered model has this version. Raises Outage if the registry does not respond."""
    with _registry(of) as client:
        try:
            return client.get_model_version(of.name, version) is not None
        except MlflowException as error:
            if error.error_code not in _ABSENT:
                raise
            return False


def move(of: Alias, version: str) -> None:
    """Move the alias to a version, and record the version that had the alias before. Raises Outage."""
    before = bearer(of)
    with _registry(of) as client:
        client.set_registered_model_alias(of.name, of.alias, version)
        if before and before != version:
            _remember(client, of, [before, *_earlier(client, of)])


def move_back(of: Alias) -> str:
    """Move the alias back to its previous version, and return this version.

    Each further call moves the alias back by one more version. Raises NoSuchVersion if there is no earlier version, and
    Outage if the registry does not respond.
    """
    now = bearer(of)
    with _registry(of) as client:
        # Somebody may have moved the alias by hand to one of the earlier versions.
        earlier = [version for version in _earlier(client, of) if version != now]
        while earlier:
            version = earlier.pop(0)
            if exists(of, version):
                client.set_registered_model_alias(of.name, of.alias, version)
                _remember(client, of, earlier)
                return version
    raise NoSuchVersion(f"no earlier version of {of} to go back to")


def away(tracking_uri: str, error: MlflowException) -> Outage:
    """Return the Outage to raise for an error of the registry."""
    reason = why_registry_failed(error, default=str(error).splitlines()[0])
    return Outage(without_credentials(f"MLflow at {tracking_uri}: {reason}"))


_ABSENT = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")


@contextmanager
def _registry(of: Alias) -> Iterator[MlflowClient]:
    try:
        yield MlflowClient(of.tracking_uri)
    except MlflowException as error:
        raise away(of.tracking_uri, error) from None


def _earlier(client: MlflowClient, of: Alias) -> list[str]:
    return [each for each in client.get_registered_model(of.name).tags.get(_tag(of), "").split(",") if each]


def _remember(client: MlflowClient, of: Alias, versions: list[str]) -> None:
    client.set_registered_model_tag(of.name, _tag(of), ",".join(versions[:_MOST_REMEMBERED]))


def _tag(of: Alias) -> str:
    return f"before.{of.alias}"
