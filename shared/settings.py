"""Reads settings from the environment, `secrets.env` and `client.properties`.

All wrong settings are reported in one line.
"""

import difflib
import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from dotenv import dotenv_values
from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from shared.errors import SettingsError
from shared.variables import NAMES, OF_LIBRARIES

SECRETS_FILE = "secrets.env"

Backoff = Annotated[float, Field(gt=0)]  # with 0, a consumer would retry without polling


def matching(pattern: str, problem: str) -> AfterValidator:
    """Make a validator that accepts text only if the whole text matches `pattern`, and otherwise reports `problem`."""
    matches = re.compile(pattern).fullmatch

    def check(text: str) -> str:
        if not matches(text):
            raise ValueError(problem)
        return text

    return AfterValidator(check)


Replica = Annotated[
    str, matching(r"[A-Za-z0-9._-]{1,200}", "must have 1 to 200 characters, and only letters, digits, dots, _ and -")
]
Milliseconds = Annotated[int, Field(ge=0)]
DeliveryGuarantee = Literal["exactly_once", "at_least_once"]
LogLevel = Annotated[Literal["DEBUG", "INFO", "WARNING", "ERROR"], BeforeValidator(str.upper)]
LogFormat = Literal["console", "json"]

# Messages quote only names of this form, because any other line of a file may begin with a secret.
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{1,39}").fullmatch
_PROPERTY = re.compile(r"[a-z0-9._-]+").fullmatch

# Files from Confluent Cloud's console contain properties with these prefixes for other clients. librdkafka refuses to
# start with them.
_FOREIGN_PROPERTIES = ("schema.registry.", "basic.auth.")


class Settings(BaseSettings):
    """Each field is read from the environment variable with the field's name in capitals, or from a file.

    If the value of NAME is in a file, the variable NAME_FILE contains the path of this file. `repr` does not show
    fields that may be secret.
    """

    model_config = SettingsConfigDict(env_file=SECRETS_FILE, env_ignore_empty=True, extra="ignore", frozen=True)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - pydantic's secrets folder, which is not used
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Return the sources of settings: the environment, `secrets.env`, and the files of NAME_FILE variables.

        Raises SettingsError if one of these files cannot be used.
        """
        given: dict[str, str | None] = {}
        for source in (dotenv_settings, env_settings):
            if isinstance(source, EnvSettingsSource):
                given |= source.env_vars
        files = InitSettingsSource(settings_cls, _from_files(settings_cls.model_fields, given))
        return init_settings, files, env_settings, dotenv_settings


class ServiceSettings(Settings):
    """The settings that every service reads."""

    client_properties: Path = Field(Path("client.properties"), description="Path of the file with the Kafka settings")
    sasl_username: str | None = Field(None, repr=False, description="Overrides sasl.username in client.properties")
    sasl_password: SecretStr | None = Field(None, description="Overrides sasl.password in client.properties")
    topic_1: str = Field("topic_1", min_length=1, description="Topic for the transactions")
    topic_2: str = Field("topic_2", min_length=1, description="Topic for the transactions with their predictions")
    log_level: LogLevel = Field("INFO", description="Lowest level that is logged")
    log_format: LogFormat = Field("console", description="Format of the log lines")
    metrics_port: int = Field(9100, ge=0, le=65535, description="Port for /metrics, /live and /ready; 0 disables them")
    metrics_host: str = Field(
        "127.0.0.1", min_length=1, description="Address on which /metrics, /live and /ready are served"
    )
    stall_seconds: float = Field(
        120.0,
        gt=0,
        description="Seconds after which a loop, or a call to the model, database or mail server, counts as stalled",
    )

    @property
    def challenger_topic(self) -> str:
        """The topic for a challenger's predictions."""
        return f"{self.topic_2}.challenger"


class StreamSettings(ServiceSettings):
    """The settings that every consumer reads: the replica's name, batches, dead letters and backoff."""

    replica: Replica = Field(
        default_factory=socket.gethostname,
        description="Name of this replica; must stay the same after a restart and be unique among a service's replicas",
    )
    max_batch_size: int = Field(1000, ge=1, le=100_000, description="Maximum number of records in a batch")
    max_batch_wait_ms: Milliseconds = Field(2, description="Maximum number of milliseconds to wait for a batch to fill")
    dead_letter_limit_ratio: float = Field(
        0.5,
        gt=0,
        le=1,
        description="If more than this share of recent rows is refused, the service waits instead of dead-lettering",
    )
    dead_letter_limit_consecutive: int = Field(
        20,
        ge=1,
        le=1000,
        description="If this many consecutive rows are refused, the service waits instead of dead-lettering",
    )
    backoff_initial_seconds: Backoff = Field(
        0.2, description="Seconds to wait after the first failure; doubled after each further failure"
    )
    backoff_max_seconds: Backoff = Field(10.0, description="Maximum number of seconds to wait between two tries")


class RegistrySettings(Settings):
    """The settings for the model registry. Every program that uses the registry reads these settings."""

    mlflow_tracking_uri: str = Field(min_length=1, repr=False, description="URI of the MLflow registry")
    mlflow_tracking_username: str | None = Field(None, description="User name for the registry, if it requires a login")
    mlflow_tracking_password: SecretStr | None = Field(None, description="Password for MLFLOW_TRACKING_USERNAME")
    model_name: str = Field("fraud", min_length=1, description="Name of the registered model")
    model_alias: str = Field("champion", min_length=1, description="Alias of the model version to use")

    def set_up_mlflow(self) -> None:
        """Put MLflow's login into the environment, and disable MLflow's telemetry.

        Call this before importing MLflow.
        """
        # MLflow's telemetry thread changes os.environ while the `requests` library reads os.environ.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        if self.mlflow_tracking_username and self.mlflow_tracking_password:
            os.environ["MLFLOW_TRACKING_USERNAME"] = self.mlflow_tracking_username
            os.environ["MLFLOW_TRACKING_PASSWORD"] = self.mlflow_tracking_password.get_secret_value()


S = TypeVar("S", bound=BaseSettings)


def load(settings: type[S], **given: Any) -> S:
    """Read the settings. Values in `given` override values from other sources.

    Raises SettingsError with one line that names each missing or wrong variable, but no value that may be secret.
    """
    try:
        return settings(**given)
    except ValidationError as error:
        problems = "; ".join(
            f"{'_'.join(str(part) for part in problem['loc'][:1]).upper()}: {_problem(problem)}"
            for problem in error.errors(include_input=False, include_url=False)
        )
        raise SettingsError(problems) from None
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{SECRETS_FILE}: {error}") from None


def unknown_variables() -> dict[str, str | None]:
    """Return the names in `secrets.env` that nothing reads, each with the most similar known name, or None.

    Also returns environment variables whose names are long and nearly match a known name. Most other environment
    variables belong to other programs. Raises SettingsError if `secrets.env` cannot be read.
    """
    try:
        lines = dotenv_values(SECRETS_FILE, encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{SECRETS_FILE}: {error}") from None
    written = (name.upper() for name, value in lines.items() if value is not None and _NAME(name))
    known = (*NAMES, *(f"{name}_FILE" for name in NAMES))

    def like(name: str, cutoff: float) -> str | None:
        return next(iter(difflib.get_close_matches(name, known, n=1, cutoff=cutoff)), None)

    unknown = {name: like(name, 0.8) for name in written if name not in (*known, *OF_LIBRARIES)}
    around = {name: like(name, 0.94) for name in os.environ if name.isupper() and len(name) > 10 and name not in known}
    return {name: meant for name, meant in around.items() if meant} | unknown


def kafka_properties(settings: ServiceSettings) -> dict[str, str]:
    """Read `client.properties`, and add credentials from the environment.

    Raises SettingsError if the file cannot be used, or if required credentials are missing.
    """
    path = settings.client_properties
    try:
        properties = parse_properties(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise SettingsError(
            f"CLIENT_PROPERTIES: cannot read {path}: {reason}. Copy client.properties.example, and edit the copy."
        ) from None
    except ValueError as error:
        raise SettingsError(f"CLIENT_PROPERTIES: {path}: {error}") from None
    if settings.sasl_username:
        properties["sasl.username"] = settings.sasl_username
    if settings.sasl_password:
        properties["sasl.password"] = settings.sasl_password.get_secret_value()
    if not properties.get("bootstrap.servers"):
        raise SettingsError(f"CLIENT_PROPERTIES: {path}: bootstrap.servers is missing")
    if properties.get("security.protocol", "").upper().startswith("SASL"):
        _check_credentials(properties)
    return properties


def parse_properties(text: str) -> dict[str, str]:
    """Read librdkafka's `key=value` lines. `#` starts a comment. Raises ValueError with the number of a bad line."""
    properties = {}
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        key, separator, value = line.partition("=")
        if not separator or not _PROPERTY(key.strip()):
            raise ValueError(f"line {number} is not key=value")
        if not key.startswith(_FOREIGN_PROPERTIES):
            properties[key.strip()] = value.strip()
    return properties


def _from_files(fields: Mapping[str, Any], given: Mapping[str, str | None]) -> dict[str, str]:
    """For each field whose NAME_FILE variable is set, return the content of the named file, without the final newline.

    Raises SettingsError if a file cannot be used, or if NAME and NAME_FILE are both set.
    """
    found = {}
    for field in fields:
        name, path = field.upper(), given.get(f"{field}_file")
        if not path:
            continue
        if given.get(field):
            raise SettingsError(f"{name} and {name}_FILE are both set. Set only one of them")
        try:
            found[field] = Path(path).read_text(encoding="utf-8").removesuffix("\n")
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise SettingsError(f"{name}_FILE: {reason}") from None  # not the path, which may be the secret itself
        if not found[field]:
            raise SettingsError(f"{name}_FILE: the file is empty")
    return found


def _check_credentials(properties: dict[str, str]) -> None:
    mechanism = properties.get("sasl.mechanisms", properties.get("sasl.mechanism", "PLAIN")).upper()
    if mechanism != "PLAIN" and not mechanism.startswith("SCRAM"):
        return
    for name in ("sasl.username", "sasl.password"):
        if not properties.get(name):
            variable = name.upper().replace(".", "_")
            raise SettingsError(f"{variable}: missing, and client.properties does not set {name}")


_PROBLEMS = {
    "missing": "missing",
    "int_parsing": "not a whole number",
    "int_from_float": "not a whole number",
    "int_parsing_size": "too large",
    "float_parsing": "not a number",
    "finite_number": "not a finite number",
    "bool_parsing": "must be true or false",
    "url_parsing": "not a URL",
    "url_scheme": "the URL must begin with http:// or https://",
    "greater_than": "must be more than {gt:g}",
    "greater_than_equal": "must be at least {ge:g}",
    "less_than": "must be less than {lt:g}",
    "less_than_equal": "must be at most {le:g}",
    "string_too_short": "must not be empty",
    "value_error": "{error}",
}


def _problem(error: ErrorDetails) -> str:
    """Describe what is wrong with a setting, without quoting its value."""
    known = _PROBLEMS.get(error["type"])
    context = error.get("ctx", {})
    if error["type"] == "literal_error":
        return f"must be {str(context['expected']).replace(chr(39), '')}"
    if error["type"] == "too_short":
        return f"too short: {context['actual_length']} characters, at least {context['min_length']} needed"
    return error["msg"][:1].lower() + error["msg"][1:] if known is None else known.format(**context)
