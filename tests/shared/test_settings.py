"""Settings: what an operator writes, and what a mistake says."""

from pathlib import Path

import pytest
from pydantic import Field, SecretStr

from shared.errors import SettingsError
from shared.settings import ServiceSettings, StreamSettings, kafka_properties, load, parse_properties

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
        ({"PLACE": "x", "MAX_BATCH_SIZE": "many"}, "MAX_BATCH_SIZE: input should be a valid integer"),
        ({"PLACE": "x", "MAX_BATCH_SIZE": "0"}, "MAX_BATCH_SIZE: input should be greater than or equal to 1"),
        ({"PLACE": "x", "LOG_FORMAT": "xml"}, "LOG_FORMAT: input should be 'console' or 'json'"),
        ({"MAX_BATCH_WAIT_MS": "-1"}, "MAX_BATCH_WAIT_MS: input should be greater than or equal to 0; PLACE: missing"),
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
