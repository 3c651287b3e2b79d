"""docker-compose.yml without Docker: its shape, and its own commands and variables at work on the stand-ins."""

import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import requests
import sqlalchemy as sa
import yaml
from conftest import until
from dotenv import dotenv_values

from sandbox.apache import VERSION, ApacheKafka
from sandbox.mailbox import Mailbox, messages
from sandbox.postgres import Postgres
from sandbox.processes import Process, free_port
from services.alerter.__main__ import AlerterSettings
from services.db_sink.__main__ import SinkSettings
from services.db_sink.table import connect
from services.predictor.__main__ import PredictorSettings
from services.producer.__main__ import ProducerSettings
from shared.settings import ServiceSettings, load, parse_properties

ROOT = Path(__file__).parents[1]
COMPOSE = ROOT / "docker-compose.yml"
CONTAINERS, CONFIGS = itemgetter("services", "configs")(yaml.safe_load(COMPOSE.read_text()))
CLIENT_PROPERTIES = ROOT / CONFIGS["client_properties"]["file"].removeprefix("${CLIENT_PROPERTIES:-").removesuffix("}")
EXAMPLE = dotenv_values(ROOT / "secrets.example.env")
SETTINGS: dict[str, type[ServiceSettings]] = {
    "producer": ProducerSettings,
    "predictor": PredictorSettings,
    "alerter": AlerterSettings,
    "db_sink": SinkSettings,
}
FIELDS = {name.upper(): field for each in SETTINGS.values() for name, field in each.model_fields.items()}
ONE_SHOTS = {"topics": "all topics are there", "train": "is champion already"}
ADDRESSES = re.compile(rf"\b({'|'.join(CONTAINERS.keys() - SETTINGS)})(?=:\d|$)")  # a group is named like its service
STOP_GRACE_S = 10  # of `docker compose stop`


def variables(name: str, *, own: Path = Path(os.devnull)) -> dict[str, str]:
    """What compose sets in a container: its env files in order, then its environment.

    `own` is the folder of the files that need not be there, so that nobody's real secrets.env is read.
    """
    merged: dict[str, str | None] = {}
    for file in CONTAINERS[name].get("env_file", []):
        merged |= dotenv_values((ROOT if file.get("required", True) else own) / file["path"])
    return {key: value or "" for key, value in (merged | CONTAINERS[name].get("environment", {})).items()}


def validate(file: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_file_is_what_the_compose_specification_allows(tmp_path: Path) -> None:
    broken = tmp_path / "docker-compose.yml"
    broken.write_text(COMPOSE.read_text().replace("restart:", "restarts:"))

    assert validate(COMPOSE).returncode == 0
    assert "restarts" in validate(broken).stdout


@pytest.mark.parametrize("name", SETTINGS)
def test_a_service_can_be_scaled(name: str) -> None:
    assert not {"container_name", "ports"} & CONTAINERS[name].keys()
    # Replicas tell themselves apart by their host names: one name would have them take each other's place.
    assert "hostname" not in CONTAINERS[name]
    assert "REPLICA" not in variables(name)


@pytest.mark.parametrize("name", CONTAINERS)
def test_what_a_container_waits_for_can_come_true(name: str) -> None:
    for other, wait in CONTAINERS[name].get("depends_on", {}).items():
        if wait["condition"] == "service_healthy":
            assert "healthcheck" in CONTAINERS[other]
        else:
            assert wait["condition"] == "service_completed_successfully"
            assert CONTAINERS[other].get("restart") not in ("always", "unless-stopped")


@pytest.mark.parametrize("name", SETTINGS)
def test_a_service_takes_the_variables_that_compose_sets(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where no secrets.env is read
    for key in FIELDS:
        monkeypatch.delenv(key, raising=False)
    for key, value in variables(name).items():
        monkeypatch.setenv(key, value)

    settings = load(SETTINGS[name])

    assert str(settings.client_properties) in [config["target"] for config in CONTAINERS[name]["configs"]]


def test_the_example_names_every_setting_and_nothing_else() -> None:
    named = re.findall(r"^#? ?([A-Z][A-Z0-9_]+)=", (ROOT / "secrets.example.env").read_text(), re.MULTILINE)

    assert set(named) == FIELDS.keys() - {"CLIENT_PROPERTIES"}  # which compose sets
    assert all(EXAMPLE[name] for name, field in FIELDS.items() if field.is_required())


def test_the_example_gives_no_secret_away() -> None:
    secrets = [name for name, field in FIELDS.items() if "SecretStr" in str(field.annotation) or "USERNAME" in name]

    for name in secrets:
        assert not EXAMPLE[name] or urlsplit(EXAMPLE[name]).password == "local-only"


def test_both_sides_of_a_connection_name_the_same() -> None:
    database, kafka = CONTAINERS["postgres"]["environment"], CONTAINERS["kafka"]["environment"]
    login = f"{database['POSTGRES_USER']}:{database['POSTGRES_PASSWORD']}"

    assert EXAMPLE["DATABASE_URL"] == f"postgresql://{login}@postgres:5432/{database['POSTGRES_DB']}"
    broker = parse_properties(CLIENT_PROPERTIES.read_text())["bootstrap.servers"]
    assert kafka["KAFKA_ADVERTISED_LISTENERS"] == f"PLAINTEXT://{broker}"
    assert CONTAINERS["kafka"]["image"] == f"apache/kafka:{VERSION}"  # the one these tests run on


@pytest.mark.parametrize("name", [name for name, container in CONTAINERS.items() if "build" in container])
def test_an_image_holds_what_its_command_runs(name: str) -> None:
    build, program = CONTAINERS[name]["build"], CONTAINERS[name]["command"][0]
    lock = ROOT / build["context"] / "services" / "requirements" / f"{build['args']['SERVICE']}.txt"

    assert (ROOT / build["context"] / build["dockerfile"]).is_file()
    assert lock.is_file()
    if program == "python":
        option, module, *_ = CONTAINERS[name]["command"][1:]
        assert option == "-m"
        assert importlib.util.find_spec(module)
    else:
        assert f"\n{program}==" in lock.read_text()


def test_the_dockerfile_copies_every_package_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    copied = re.findall(r"^COPY (\w+) /app/\1$", (ROOT / "services" / "Dockerfile").read_text(), re.MULTILINE)

    assert sorted(copied) == sorted(set(project["tool"]["importlinter"]["root_packages"]) - {"benchmarks"})


@dataclass
class Machine:
    """Containers as processes of this machine: their own commands and variables, but its ports and folders."""

    directory: Path
    places: dict[str, object]  # in the compose file: here
    processes: ExitStack = field(default_factory=ExitStack)

    def here(self, text: str) -> str:
        """A container's own ports and folders, as they are here."""
        places = "|".join(rf"(?<![\w.]){re.escape(place)}\b" for place in self.places)
        return re.sub(places, lambda found: str(self.places[found[0]]), text)

    def address(self, text: str) -> str:
        """Other containers' names and ports, as they are here."""
        return self.here(ADDRESSES.sub("127.0.0.1", text))

    def environment(self, name: str) -> dict[str, str]:
        """The container's variables and those of its image, none from outside."""
        image = {
            "PATH": f"{Path(sys.executable).parent}:{os.defpath}",
            "HOME": str(self.directory),
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        own = {key: self.address(value) for key, value in variables(name, own=self.directory).items()}
        return image | own | {"METRICS_PORT": "0"}  # a container has its ports for itself

    def healthy(self, name: str) -> bool:
        command = [self.here(part) for part in CONTAINERS[name]["healthcheck"]["test"][1:]]
        return not subprocess.run(command, env=self.environment(name), capture_output=True, check=False).returncode

    def start(self, name: str) -> Process:
        process = Process(
            name,
            [self.here(part) for part in CONTAINERS[name]["command"]],
            env=self.environment(name),
            cwd=self.directory / "app",  # where no settings file lies
            log=self.directory / f"{name}.log",
            ready=lambda: "healthcheck" not in CONTAINERS[name] or self.healthy(name),
        )
        self.processes.callback(process.kill)  # with its own children, of which `mlflow server` has some
        return process.start()


@pytest.fixture
def machine(tmp_path: Path, apache: ApacheKafka, mailbox: Mailbox) -> Iterator[Machine]:
    """All that the containers need and that is not run by Python."""
    with Postgres(tmp_path / "database") as database:
        places: dict[str, object] = {"8080": free_port(), "5000": free_port(), "1025": mailbox.port}
        places |= {"9092": urlsplit(f"//{apache.bootstrap}").port, "5432": urlsplit(database.url).port}
        places |= {
            "/etc/fraud-alarm": tmp_path,
            "/var/lib/mlflow": tmp_path / "mlflow",
            "/var/lib/fraud-alarm": tmp_path / "state",
        }
        made = Machine(tmp_path, places)
        for folder in "app", "mlflow":
            (tmp_path / folder).mkdir()
        (tmp_path / "secrets.env").write_text("POLL_INTERVAL_SECONDS=0\n")  # at one a second a fraud is a minute away
        (tmp_path / "client.properties").write_text(made.address(CLIENT_PROPERTIES.read_text()))
        with made.processes:
            yield made


@pytest.mark.kafka
@pytest.mark.timeout(360)
def test_the_commands_and_variables_of_the_file_make_alarms_and_rows(machine: Machine, mailbox: Mailbox) -> None:
    machine.start("payments-api")
    machine.start("mlflow")
    registry = f"http://127.0.0.1:{machine.places['5000']}/api/2.0/mlflow/experiments/get?experiment_id=0"
    by_name = {"Host": f"mlflow:{machine.places['5000']}"}  # as the containers call it; MLflow refuses names unheard of
    assert requests.get(registry, headers=by_name, timeout=10).ok
    for name, said_again in ONE_SHOTS.items():
        for _ in "up", "up again":
            one_shot = machine.start(name)
            assert one_shot.wait(120) == 0, (machine.directory / f"{name}.log").read_text()
        assert one_shot.said(said_again)

    services = [machine.start(name) for name in SETTINGS]

    engine = connect(machine.environment("db_sink")["DATABASE_URL"])
    until(lambda: sa.inspect(engine).has_table("transactions"), what="the table")
    with engine.connect() as connection:
        rows = sa.text("SELECT count(*) FROM transactions WHERE prediction IS NOT NULL")
        until(lambda: connection.execute(rows).scalar_one(), timeout_s=60, what="a row with its prediction")
    engine.dispose()
    until(lambda: list(messages(mailbox.directory)), timeout_s=60, what="an alarm")
    for service in services:
        assert service.stop(timeout_s=STOP_GRACE_S) == 0, service.last_line()
        assert service.said("event='stopped'")
        assert not service.said("Traceback")
