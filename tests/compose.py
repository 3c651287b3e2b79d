"""docker-compose.yml and docker-compose.cloud.yml as compose reads them."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from dotenv import dotenv_values

from services.alerter.settings import AlerterSettings
from services.db_sink.settings import SinkSettings
from services.predictor.settings import PredictorSettings
from services.producer.settings import ProducerSettings
from shared.settings import ServiceSettings

ROOT = Path(__file__).parents[1]
COMPOSE, OVERRIDE = ROOT / "docker-compose.yml", ROOT / "docker-compose.cloud.yml"
EXAMPLE = dotenv_values(ROOT / "secrets.example.env")
_ASKED_FOR = re.compile(r"\$\{(\w+):([?+-])([^}]*)\}")
# What somebody who goes to the cloud gives compose, with the local stack as their own servers.
GIVEN = {
    "API_URL": "http://payments-api:8080/current-transactions",
    "POLL_INTERVAL_SECONDS": "0",  # at one a second a fraud is a minute away
    "MLFLOW_TRACKING_URI": "http://mlflow:5000",
    "SMTP_HOST": "mailpit",
    "SMTP_PORT": "1025",
    "SMTP_TLS": "none",
    "ALERT_FROM": "alarm@fraud-alarm.example",
    "ALERT_TO": "analyst@fraud-alarm.example",
}
WITH_SECRETS = GIVEN | {
    "MLFLOW_TRACKING_USERNAME": "fraud",
    "SMTP_USERNAME": "alarm",
    "WEBHOOK_URL": "https://hooks.example.com/fraud",
}


def filled_in(value: Any, given: Mapping[str, str]) -> Any:
    """The values of ${NAME:-otherwise}, ${NAME:+instead} and ${NAME:?question}. Raises KeyError for the last."""

    def fill(asked: re.Match[str]) -> str:
        name, operator, text = asked.groups()
        if operator == "+":
            return text if given.get(name) else ""
        return given[name] if operator == "?" else given.get(name) or text

    if isinstance(value, dict):
        return {key: filled_in(each, given) for key, each in value.items()}
    if isinstance(value, list):
        return [filled_in(each, given) for each in value]
    return _ASKED_FOR.sub(fill, value) if isinstance(value, str) else value


def merged(file: Any, override: Any) -> Any:
    """As compose merges files: maps key by key, secrets by their places in the container, of all else the later."""
    if isinstance(file, dict) and isinstance(override, dict):
        return file | {key: merged(file.get(key), each) for key, each in override.items()}
    if isinstance(file, list) and isinstance(override, list):
        return list({place(each): each for each in [*file, *override]}.values())
    return override


def place(secret: Any) -> str:
    """Where compose takes a secret to be mounted: a target that is no full path is to it none in /run/secrets."""
    return str(secret["target"] if isinstance(secret, dict) else f"/run/secrets/{secret}")


def in_the_cloud(given: Mapping[str, str]) -> Any:
    """Both files, with these variables in the shell. Raises KeyError if one is missing that the override asks for."""
    return merged(LOCAL, filled_in(yaml.safe_load(OVERRIDE.read_text()), given))


LOCAL = filled_in(yaml.safe_load(COMPOSE.read_text()), {})
CLOUD = in_the_cloud(GIVEN)
CONTAINERS: dict[str, Any] = LOCAL["services"]
IN_THE_CLOUD: dict[str, Any] = {name: each for name, each in CLOUD["services"].items() if "profiles" not in each}
SETTINGS: dict[str, type[ServiceSettings]] = {
    "producer": ProducerSettings,
    "predictor": PredictorSettings,
    "alerter": AlerterSettings,
    "db_sink": SinkSettings,
}
FIELDS = {name.upper(): field for each in SETTINGS.values() for name, field in each.model_fields.items()}


def variables(container: Mapping[str, Any], *, own: Path = Path(os.devnull)) -> dict[str, str]:
    """What compose sets in a container: its env files in order, then its environment.

    `own` is the folder of the files that need not be there, so that nobody's real secrets.env is read.
    """
    values: dict[str, str | None] = {}
    for file in container.get("env_file", []):
        values |= dotenv_values((ROOT if file.get("required", True) else own) / file["path"])
    return {key: value or "" for key, value in (values | container.get("environment", {})).items()}
