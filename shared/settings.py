"""Settings from the environment, `secrets.env` and `client.properties`; a wrong one is one line and exit code 2."""

import socket
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import BeforeValidator, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from shared.errors import SettingsError

SECRETS_FILE = "secrets.env"

Backoff = Annotated[float, Field(gt=0)]  # without any, a consumer would try again and never poll
Milliseconds = Annotated[int, Field(ge=0)]
DeliveryGuarantee = Literal["exactly_once", "at_least_once"]
LogLevel = Annotated[Literal["DEBUG", "INFO", "WARNING", "ERROR"], BeforeValidator(str.upper)]
LogFormat = Literal["console", "json"]

# Files from Confluent Cloud's console carry these for other clients; librdkafka refuses to start with them.
_FOREIGN_PROPERTIES = ("schema.registry.", "basic.auth.")


class ServiceSettings(BaseSettings):
    """What every service reads. Each field is an environment variable of the same name in capitals."""

    model_config = SettingsConfigDict(env_file=SECRETS_FILE, env_ignore_empty=True, extra="ignore", frozen=True)

    client_properties: Path = Field(Path("client.properties"), description="The Kafka client's settings file")
    sasl_username: str | None = Field(None, description="Laid over sasl.username in client.properties")
    sasl_password: SecretStr | None = Field(None, description="Laid over sasl.password in client.properties")
    topic_1: str = Field("topic_1", min_length=1, description="Topic of the transactions")
    topic_2: str = Field("topic_2", min_length=1, description="Topic of the transactions with their predictions")
    log_level: LogLevel = Field("INFO", description="The lowest level that is logged")
    log_format: LogFormat = Field("console", description="How log lines look")

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


S = TypeVar("S", bound=BaseSettings)


def load(settings: type[S]) -> S:
    """Read the settings. Raises SettingsError: one line that names each missing or wrong variable, not its value."""
    try:
        return settings()
    except ValidationError as error:
        problems = "; ".join(
            f"{'_'.join(str(part) for part in problem['loc'][:1]).upper()}: {_plain(problem['type'], problem['msg'])}"
            for problem in error.errors(include_input=False, include_url=False)
        )
        raise SettingsError(problems) from None
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{SECRETS_FILE}: {error}") from None


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
        if not separator or not key.strip():
            raise ValueError(f"line {number} is not key=value")
        if not key.startswith(_FOREIGN_PROPERTIES):
            properties[key.strip()] = value.strip()
    return properties


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
