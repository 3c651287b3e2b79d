"""Settings from the environment, `secrets.env` and `client.properties`; a wrong one is one line and exit code 2."""

import difflib
import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from dotenv import dotenv_values
from pydantic import BeforeValidator, Field, SecretStr, ValidationError
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

Backoff = Annotated[float, Field(gt=0)]  # without any, a consumer would try again and never poll
Milliseconds = Annotated[int, Field(ge=0)]
DeliveryGuarantee = Literal["exactly_once", "at_least_once"]
LogLevel = Annotated[Literal["DEBUG", "INFO", "WARNING", "ERROR"], BeforeValidator(str.upper)]
LogFormat = Literal["console", "json"]

# A line that is torn, or not of this form at all, may begin with a secret: it is not repeated.
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{1,39}").fullmatch
_PROPERTY = re.compile(r"[a-z0-9._-]+").fullmatch

# Files from Confluent Cloud's console carry these for other clients; librdkafka refuses to start with them.
_FOREIGN_PROPERTIES = ("schema.registry.", "basic.auth.")


class Settings(BaseSettings):
    """Each field is an environment variable of the same name in capitals, or of that name and _FILE: what a file holds.

    What may hold a secret is not shown by `repr`.
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
    """What every service reads."""

    client_properties: Path = Field(Path("client.properties"), description="The Kafka client's settings file")
    sasl_username: str | None = Field(None, repr=False, description="Laid over sasl.username in client.properties")
    sasl_password: SecretStr | None = Field(None, description="Laid over sasl.password in client.properties")
    topic_1: str = Field("topic_1", min_length=1, description="Topic of the transactions")
    topic_2: str = Field("topic_2", min_length=1, description="Topic of the transactions with their predictions")
    log_level: LogLevel = Field("INFO", description="The lowest level that is logged")
    log_format: LogFormat = Field("console", description="How log lines look")
    metrics_port: int = Field(9100, ge=0, le=65535, description="Port of /metrics, /live and /ready; 0: none")
    metrics_host: str = Field("127.0.0.1", min_length=1, description="Address they listen on")
    stall_seconds: float = Field(
        120.0,
        gt=0,
        description="A loop, or a call of the model, the database or the mail server, that takes longer is stalled",
    )

    @property
    def challenger_topic(self) -> str:
        """Where the predictions of a challenger go, if there is one."""
        return f"{self.topic_2}.challenger"


class StreamSettings(ServiceSettings):
    """What every consumer reads on top: how large its batches grow, and how long it waits when something is away."""

    replica: str = Field(
        default_factory=socket.gethostname,
        pattern=r"^[A-Za-z0-9._-]{1,200}$",
        description="Stable over restarts, and unique among the replicas of a service; the host name tells a container",
    )
    max_batch_size: int = Field(1000, ge=1, le=100_000, description="Most records in a batch")
    max_batch_wait_ms: Milliseconds = Field(2, description="Longest wait, in ms, for a batch to fill")
    dead_letter_limit_ratio: float = Field(
        0.5, gt=0, le=1, description="Share of refused rows above which it is not the rows that are bad: wait"
    )
    dead_letter_limit_consecutive: int = Field(
        20, ge=1, le=1000, description="The same, as refused rows one after the other"
    )
    backoff_initial_seconds: Backoff = Field(0.2, description="First wait after a failure; doubled each time")
    backoff_max_seconds: Backoff = Field(10.0, description="Longest wait between two tries")


class RegistrySettings(Settings):
    """What whoever deals with models reads."""

    mlflow_tracking_uri: str = Field(min_length=1, repr=False, description="The MLflow registry")
    mlflow_tracking_username: str | None = Field(None, description="Login, if the registry wants one")
    mlflow_tracking_password: SecretStr | None = Field(None, description="Its password")
    model_name: str = Field("fraud", min_length=1, description="Registered model")
    model_alias: str = Field("champion", min_length=1, description="Alias of the version that is served")

    def log_in(self) -> None:
        """Put the login where MLflow looks for it: into the environment."""
        if self.mlflow_tracking_username and self.mlflow_tracking_password:
            os.environ["MLFLOW_TRACKING_USERNAME"] = self.mlflow_tracking_username
            os.environ["MLFLOW_TRACKING_PASSWORD"] = self.mlflow_tracking_password.get_secret_value()


S = TypeVar("S", bound=BaseSettings)


def load(settings: type[S], **given: Any) -> S:
    """Read the settings, of which those given are not looked for.

    Raises SettingsError: one line that names each missing or wrong variable, not its value.
    """
    try:
        return settings(**given)
    except ValidationError as error:
        problems = "; ".join(
            f"{'_'.join(str(part) for part in problem['loc'][:1]).upper()}: {_plain(problem['type'], problem['msg'])}"
            for problem in error.errors(include_input=False, include_url=False)
        )
        raise SettingsError(problems) from None
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{SECRETS_FILE}: {error}") from None


def unknown_variables() -> dict[str, str | None]:
    """What `secrets.env` sets and nobody reads, each with the known name that is most like it, if one is.

    In the environment most is somebody else's: of that, long names that differ from a setting's in a letter or so.
    Raises SettingsError.
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
    """`client.properties` with the credentials of the environment laid over it. Raises SettingsError."""
    path = settings.client_properties
    try:
        properties = parse_properties(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise SettingsError(
            f"CLIENT_PROPERTIES: cannot read {path}: {reason} (copy client.properties.example)"
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
    """By field, the text of the file that NAME_FILE names, without the end of its last line. Raises SettingsError."""
    found = {}
    for field in fields:
        name, path = field.upper(), given.get(f"{field}_file")
        if not path:
            continue
        if given.get(field):
            raise SettingsError(f"{name}: set, and so is {name}_FILE")
        try:
            found[field] = Path(path).read_text(encoding="utf-8").removesuffix("\n")
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise SettingsError(f"{name}_FILE: {reason}") from None  # not its path, which may be the secret itself
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
            raise SettingsError(f"{variable}: missing, and client.properties has no {name}")


def _plain(kind: str, message: str) -> str:
    return "missing" if kind == "missing" else message[:1].lower() + message[1:]
