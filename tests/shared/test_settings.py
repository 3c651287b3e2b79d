"""Settings: what an operator writes, and what a mistake says."""

from pathlib import Path

import pytest
from pydantic import Field, SecretStr

from shared.errors import SettingsError
from shared.settings import (
    ServiceSettings,
    StreamSettings,
    kafka_properties,
    load,
    parse_properties,
    unknown_variables,
)

CONFLUENT_CLOUD = """\
# Required connection configs for Kafka producer, consumer, and admin
bootstrap.servers=pkc-00000.region.provider.example:9092
security.protocol=SASL_SSL
sasl.mechanisms=PLAIN
sasl.username=KEY
sasl.password=a=secret==

# Best practice for higher availability in librdkafka clients prior to 1.7
session.timeout.ms=45000

schema.registry.url=https://registry.example
basic.auth.credentials.source=USER_INFO
"""


class ExampleSettings(StreamSettings):
    """A service's settings."""

    place: str = Field(description="Required")
    token: SecretStr | None = Field(None, description="A secret")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def settings_with(path: Path, text: str) -> ServiceSettings:
    path.write_text(text)
    return ServiceSettings(client_properties=path)


def test_the_file_of_confluent_cloud_works_as_it_is(tmp_path: Path) -> None:
    properties = kafka_properties(settings_with(tmp_path / "client.properties", CONFLUENT_CLOUD))

    assert properties == {
        "bootstrap.servers": "pkc-00000.region.provider.example:9092",
        "security.protocol": "SASL_SSL",
        "sasl.mechanisms": "PLAIN",
        "sasl.username": "KEY",
        "sasl.password": "a=secret==",
        "session.timeout.ms": "45000",
    }


def test_credentials_of_the_environment_lie_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SASL_USERNAME", "other")
    monkeypatch.setenv("SASL_PASSWORD", "hidden")

    properties = kafka_properties(settings_with(tmp_path / "client.properties", CONFLUENT_CLOUD))

    assert (properties["sasl.username"], properties["sasl.password"]) == ("other", "hidden")


def test_secrets_env_is_read_and_the_environment_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secrets.env").write_text("PLACE=file\nMAX_BATCH_SIZE=7\nTOKEN=hush\nUNRELATED=1\n")
    monkeypatch.setenv("PLACE", "environment")

    settings = load(ExampleSettings)

    assert (settings.place, settings.max_batch_size) == ("environment", 7)
    assert "hush" not in repr(settings)


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        ({}, "PLACE: missing"),
        ({"PLACE": ""}, "PLACE: missing"),
        ({"PLACE": "x", "MAX_BATCH_SIZE": "many"}, "MAX_BATCH_SIZE: not a whole number"),
        ({"PLACE": "x", "MAX_BATCH_SIZE": "0"}, "MAX_BATCH_SIZE: must be at least 1"),
        ({"PLACE": "x", "LOG_FORMAT": "xml"}, "LOG_FORMAT: must be console or json"),
        ({"MAX_BATCH_WAIT_MS": "-1"}, "MAX_BATCH_WAIT_MS: must be at least 0; PLACE: missing"),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_it(
    environment: dict[str, str], line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    with pytest.raises(SettingsError) as error:
        load(ExampleSettings)

    assert str(error.value).startswith(line)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("bootstrap.servers=a:1\nnonsense\n", "line 2 is not key=value"),
        ("security.protocol=PLAINTEXT\n", "bootstrap.servers is missing"),
        ("bootstrap.servers=a:1\nsecurity.protocol=SASL_SSL\nsasl.mechanisms=PLAIN\n", "SASL_USERNAME: missing"),
        (
            "bootstrap.servers=a:1\nsecurity.protocol=SASL_SSL\nsasl.mechanism=SCRAM-SHA-512\nsasl.username=u\n",
            "SASL_PASSWORD: missing",
        ),
    ],
)
def test_a_wrong_client_properties_is_named(text: str, named: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=named):
        kafka_properties(settings_with(tmp_path / "client.properties", text))


def test_a_missing_client_properties_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(
        SettingsError, match=r"CLIENT_PROPERTIES: cannot read .*: No such file.*client.properties.example"
    ):
        kafka_properties(ServiceSettings(client_properties=tmp_path / "none"))


def test_values_keep_their_equals_signs_and_comments_go() -> None:
    assert parse_properties("# a=b\n\n k = v=w \n") == {"k": "v=w"}


@pytest.mark.parametrize("by", ["the environment", "secrets.env"])
def test_a_secret_can_lie_in_a_file(by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "token").write_text(" with spaces and\na line \n")
    (tmp_path / "size").write_text("7\r\n")
    given = {"PLACE": "here", "TOKEN_FILE": str(tmp_path / "token"), "MAX_BATCH_SIZE_FILE": "size", "TOKEN": ""}
    if by == "secrets.env":
        (tmp_path / "secrets.env").write_text("".join(f"{name}={value}\n" for name, value in given.items()))
    else:
        for name, value in given.items():
            monkeypatch.setenv(name, value)

    settings = load(ExampleSettings)

    assert settings.token is not None
    assert settings.token.get_secret_value() == " with spaces and\na line "
    assert settings.max_batch_size == 7
    assert "with spaces" not in repr(settings)


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        ({"TOKEN": "a", "TOKEN_FILE": "token"}, "TOKEN and TOKEN_FILE are both set"),
        ({"TOKEN_FILE": "none"}, "TOKEN_FILE: No such file or directory"),
        ({"TOKEN_FILE": "."}, "TOKEN_FILE: Is a directory"),
        ({"TOKEN_FILE": "empty"}, "TOKEN_FILE: the file is empty"),
        ({"TOKEN_FILE": "binary"}, "TOKEN_FILE: not UTF-8 text"),
        ({"MAX_BATCH_SIZE_FILE": "token"}, "MAX_BATCH_SIZE: not a whole number"),
    ],
)
def test_a_wrong_file_is_one_line_that_names_its_variable(
    environment: dict[str, str], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "secrets.env").write_text("PLACE=here\n")
    (tmp_path / "token").write_text("hush")
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    with pytest.raises(SettingsError) as error:
        load(ExampleSettings)

    assert str(error.value).startswith(line)
    assert "hush" not in str(error.value)
    assert "\n" not in str(error.value)


def test_the_same_setting_in_secrets_env_and_as_a_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "secrets.env").write_text("PLACE=here\nTOKEN=a\n")
    monkeypatch.setenv("TOKEN_FILE", "token")

    with pytest.raises(SettingsError, match="TOKEN and TOKEN_FILE are both set"):
        load(ExampleSettings)


def test_what_nothing_reads_is_reported_with_what_was_meant(tmp_path: Path) -> None:
    (tmp_path / "secrets.env").write_text(
        "SASL_PASWORD=hush\nsasl_username=a\nSMTP_HOST=of the alerter\nDATABASE_URL_FILE=b\nSMTP_PASSWORDFILE=c\n"
        "COLOUR=blue\nAWS_SECRET_ACCESS_KEY=of a library\n"
        "MIIEvQIBADANBgkqhkiG9w0BAQEFAASCBKcwggSjAgEAAoIBAQC7==\nhunter2\n"  # of a secret that was torn
    )

    assert unknown_variables() == {
        "SASL_PASWORD": "SASL_PASSWORD",
        "SMTP_PASSWORDFILE": "SMTP_PASSWORD_FILE",
        "COLOUR": None,
    }


OF_OTHERS = """
HOSTNAME LOGNAME LANGUAGE HISTFILESIZE SSH_AUTH_SOCK XDG_RUNTIME_DIR PYTHONUNBUFFERED VIRTUAL_ENV
REPLICAS LOGLEVEL LOG_LEVELS TOPIC TOPIC_3 DATABASE_URI DATABASE_USER POSTGRES_PASSWORD SMTPS_PORT SMTP_USER API_TIMEOUT
MODEL_PATH MLFLOW_TRACKING_TOKEN MLFLOW_REGISTRY_URI METRICS_PATH METRICS_PORTS2 SASL_MECHANISM WEBHOOK_PORT KAFKA_HOME
"""


def test_a_near_miss_of_a_setting_in_the_environment_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    misspelt = {
        "SMTP_PASWORD": "SMTP_PASSWORD",
        "DATABASE_URLFILE": "DATABASE_URL_FILE",
        "MLFLOW_TRACKING_URL": "MLFLOW_TRACKING_URI",
    }
    for name in misspelt:
        monkeypatch.setenv(name, "hush")

    assert unknown_variables() == misspelt


def test_other_programs_variables_are_not_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    services = ("ALERTER", "PRODUCER", "PREDICTOR", "DB_SINK", "KAFKA", "MLFLOW", "POSTGRES", "MAILPIT", "SMTP", "API")
    ends = ("PORT", "SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_HTTP", "PORT_9092_TCP", "PORT_9092_TCP_ADDR")
    of_kubernetes = [f"{service}_{end}" for service in (*services, "METRICS_2", "MLFLOW_TRACKING") for end in ends]
    for name in {*of_kubernetes, *OF_OTHERS.split()} - {"SMTP_PORT"}:
        monkeypatch.setenv(name, "theirs")
    monkeypatch.setenv("smtp_pasword", "not in capitals")

    assert unknown_variables() == {}


def test_secrets_env_that_is_not_utf_8_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "secrets.env").write_bytes("SMTP_PASSWORD=café\n".encode("latin-1"))

    with pytest.raises(SettingsError, match=r"^secrets\.env: .*utf-8.*$"):
        unknown_variables()


def test_without_secrets_env_nothing_is_unknown() -> None:
    assert unknown_variables() == {}


def test_a_torn_line_of_client_properties_is_not_repeated() -> None:
    with pytest.raises(ValueError, match=r"^line 2 is not key=value$"):
        parse_properties("bootstrap.servers=a:1\nsasl.password: c2VjcmV0=\n")
