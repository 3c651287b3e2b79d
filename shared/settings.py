"""Settings from the environment, `secrets.env` and `client.properties`. A wrong one is reported in one line."""

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
    """Accept text that matches as a whole; of any other, report the `problem`."""
    matches = re.compile(pattern).fullmatch

    def check(text: str) -> str:
        if not matches(text):
            raise ValueError(problem)
        return text

    return AfterValidator(check)


Replica = Annotated[
    str, matching(r"[A-Za-z0-9._-]{1,200}", "may only have letters, digits, dots, _ and -, at most 200")
]
Milliseconds = Annotated[int, Field(ge=0)]
DeliveryGuarantee = Literal["exactly_once", "at_least_once"]
LogLevel = Annotated[Literal["DEBUG", "INFO", "WARNING", "ERROR"], BeforeValidator(str.upper)]
LogFormat = Literal["console", "json"]

# A line of another form may begin with a secret: it is not quoted.
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{1,39}").fullmatch
_PROPERTY = re.compile(r"[a-z0-9._-]+").fullmatch

# Files from Confluent Cloud's console carry these for other clients; librdkafka refuses to start with them.
_FOREIGN_PROPERTIES = ("schema.registry.", "basic.auth.")


class Settings(BaseSettings):
    """Each field is read from the environment variable of its name in capitals, or from the file that NAME_FILE names.

    `repr` does not show fields that may hold a secret.
    """

    model_config = SettingsConfigDict(env_file=SECRETS_FILE, env_ignore_empty=True, extra="ignore", frozen=True)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - a folder of secrets, which nothing sets
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The environment, `secrets.env`, and the files that either of them names. Raises SettingsError."""
        given: dict[str, str | None] = {}
        for source in (dotenv_settings, env_settings):
            if isinstance(source, EnvSettingsSource):
                given |= source.env_vars
        files = InitSettingsSource(settings_cls, _from_files(settings_cls.model_fields, given))
        return init_settings, files, env_settings, dotenv_settings


class ServiceSettings(Settings):
    """Read by every service."""

    client_properties: Path = Field(Path("client.properties"), description="The Kafka client's settings file")
    sasl_username: str | None = Field(None, repr=False, description="Overrides sasl.username in client.properties")
    sasl_password: SecretStr | None = Field(None, description="Overrides sasl.password in client.properties")
    topic_1: str = Field("topic_1", min_length=1, description="Topic of the transactions")
    topic_2: str = Field("topic_2", min_length=1, description="Topic of the transactions with their predictions")
    log_level: LogLevel = Field("INFO", description="The lowest level that is logged")
    log_format: LogFormat = Field("console", description="Format of the log lines")
    metrics_port: int = Field(9100, ge=0, le=65535, description="Port of /metrics, /live and /ready; 0: none")
    metrics_host: str = Field(
        "127.0.0.1", min_length=1, description="Address on which /metrics, /live and /ready listen"
    )
    stall_seconds: float = Field(
        120.0,
        gt=0,
        description="A loop, or a call to the model, the database or the mail server, that takes longer is stalled",
    )

    @property
    def challenger_topic(self) -> str:
        """The topic of a challenger's predictions."""
        return f"{self.topic_2}.challenger"


class StreamSettings(ServiceSettings):
    """Read by every consumer: the size of its batches, and its backoff during outages."""

    replica: Replica = Field(
        default_factory=socket.gethostname,
        description="Name of this replica: the same after a restart, and unique among the replicas of a service",
    )
    max_batch_size: int = Field(1000, ge=1, le=100_000, description="Most records in a batch")
    max_batch_wait_ms: Milliseconds = Field(2, description="Longest wait, in ms, for a batch to fill")
    dead_letter_limit_ratio: float = Field(
        0.5, gt=0, le=1, description="Share of refused rows above which the service waits instead of dead-lettering"
    )
    dead_letter_limit_consecutive: int = Field(
        20,
        ge=1,
        le=1000,
        description="Number of consecutive refused rows from which the service waits instead of dead-lettering",
    )
    backoff_initial_seconds: Backoff = Field(0.2, description="First wait after a failure; doubled each time")
    backoff_max_seconds: Backoff = Field(10.0, description="Longest wait between two retries")


class RegistrySettings(Settings):
    """Read by everything that uses the model registry."""

    mlflow_tracking_uri: str = Field(min_length=1, repr=False, description="The MLflow registry")
    mlflow_tracking_username: str | None = Field(None, description="User name, if the registry needs a login")
    mlflow_tracking_password: SecretStr | None = Field(None, description="Password for MLFLOW_TRACKING_USERNAME")
    model_name: str = Field("fraud", min_length=1, description="Registered model")
    model_alias: str = Field("champion", min_length=1, description="Alias of the version that is served")

    def set_up_mlflow(self) -> None:
        """Put the login into the environment, where MLflow reads it, and turn its telemetry off: before its import."""
        # The telemetry thread changes os.environ while requests reads it.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        if self.mlflow_tracking_username and self.mlflow_tracking_password:
            os.environ["MLFLOW_TRACKING_USERNAME"] = self.mlflow_tracking_username
            os.environ["MLFLOW_TRACKING_PASSWORD"] = self.mlflow_tracking_password.get_secret_value()


S = TypeVar("S", bound=BaseSettings)


def load(settings: type[S], **given: Any) -> S:
    """Read the settings; `given` ones are taken as they are.

    Raises SettingsError: one line that names each missing or wrong variable, without its value.
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
    """Names that `secrets.env` sets and nothing reads, each with the most similar known name, or None.

    Most of the environment belongs to other programs: of that, only long names that nearly match a setting are
    returned. Raises SettingsError.
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
    """`client.properties`, with the credentials from the environment. Raises SettingsError."""
    path = settings.client_properties
    try:
        properties = parse_properties(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise SettingsError(
            f"CLIENT_PROPERTIES: cannot read {path}: {reason}. Copy client.properties.example to start with."
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
    """Read librdkafka's `key=value` lines; `#` starts a comment line. Raises ValueError naming the line's number."""
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
    """By field, the content of the file that NAME_FILE names, without its last newline. Raises SettingsError."""
    found = {}
    for field in fields:
        name, path = field.upper(), given.get(f"{field}_file")
        if not path:
            continue
        if given.get(field):
            raise SettingsError(f"{name}: set together with {name}_FILE; set only one of them")
        try:
            found[field] = Path(path).read_text(encoding="utf-8").removesuffix("\n")
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise SettingsError(f"{name}_FILE: {reason}") from None  # without the path, which may be the secret itself
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
    """What is wrong with a value, in our words, without the value."""
    known = _PROBLEMS.get(error["type"])
    context = error.get("ctx", {})
    if error["type"] == "literal_error":
        return f"must be {str(context['expected']).replace(chr(39), '')}"
    if error["type"] == "too_short":
        return f"too short: {context['actual_length']} characters, at least {context['min_length']} needed"
    return error["msg"][:1].lower() + error["msg"][1:] if known is None else known.format(**context)
