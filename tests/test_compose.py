"""docker-compose.yml and its override without Docker: their shape, and their commands and variables at work."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
import time
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests
import sqlalchemy as sa
import yaml
from click.testing import CliRunner, Result
from compose import (
    CLOUD,
    COMPOSE,
    CONTAINERS,
    EXAMPLE,
    FIELDS,
    GIVEN,
    IN_THE_CLOUD,
    LOCAL,
    OVERRIDE,
    ROOT,
    SETTINGS,
    WITH_SECRETS,
    in_the_cloud,
    merged,
    place,
    variables,
)
from conftest import until

from sandbox.apache import VERSION, ApacheKafka
from sandbox.mailbox import Mailbox, messages
from sandbox.postgres import Postgres
from sandbox.processes import Process, free_port
from sandbox.registry import Registry
from services.db_sink.settings import DatabaseSettings
from services.db_sink.table import connect
from shared.settings import load, parse_properties

SCALING = (ROOT / "docs" / "scaling.md").read_text()
CLIENT_PROPERTIES = ROOT / LOCAL["configs"]["client_properties"]["file"]
ONE_SHOTS = {"topics": "all topics exist", "train": "is already champion"}
# Who is started with which settings: fraudctl, by its commands, with those of all services.
READERS = [(container, service) for service in SETTINGS for container in (service, "fraudctl")]
ADDRESSES = re.compile(rf"\b({'|'.join(CONTAINERS.keys() - SETTINGS)})(?=:\d|$)")  # a group is named like its service
STOP_GRACE_S = 10  # of `docker compose stop`


def started(container: dict[str, Any], *arguments: str) -> list[str]:
    """What runs in a container. Arguments take the place of its command, as those of `docker compose run` do."""
    return [*container.get("entrypoint", []), *(arguments or container["command"])]


def typed(command: str) -> list[str]:
    """The commands of the block in docs/scaling.md that has this one."""
    (block,) = (each for each in re.findall(r"```console\n(.*?)```", SCALING, re.DOTALL) if command in each)
    return re.findall(r"^\$ (.+)$", block, re.MULTILINE)


def validate(*files: Path) -> Result:
    from check_jsonschema import main  # which takes seconds

    return CliRunner().invoke(main, ["--builtin-schema", "vendor.compose-spec", *map(str, files)])


def test_the_files_are_what_the_compose_specification_allows(tmp_path: Path) -> None:
    both, broken = tmp_path / "both.yml", tmp_path / "docker-compose.yml"
    both.write_text(yaml.safe_dump(CLOUD))
    broken.write_text(COMPOSE.read_text().replace("restart:", "restarts:"))

    assert validate(COMPOSE, OVERRIDE, both).exit_code == 0
    assert "restarts" in validate(broken).stdout


@pytest.mark.parametrize("name", SETTINGS)
def test_a_service_can_be_scaled(name: str) -> None:
    assert not {"container_name", "ports"} & CONTAINERS[name].keys()
    # Replicas are distinguished by their host names: with one name they would take each other's place.
    assert "hostname" not in CONTAINERS[name]
    assert "REPLICA" not in variables(CONTAINERS[name])
    # To the topics, they are all of one kind: as many share the work as there are partitions.
    command = CONTAINERS["topics"]["command"]
    assert command[command.index("--partitions") + 1] == "6"


@pytest.mark.parametrize("name", CONTAINERS)
def test_whoever_gets_into_a_container_finds_little(name: str) -> None:
    container = CONTAINERS[name]

    assert container["cap_drop"] == ["ALL"]
    assert "cap_add" not in container
    assert container["security_opt"] == ["no-new-privileges:true"]
    assert container["read_only"] or name == "kafka"
    assert container["mem_limit"]
    assert container["pids_limit"]
    assert str(container.get("user", "")).partition(":")[0] not in ("0", "root")
    assert all(port.startswith("127.0.0.1:") for port in container.get("ports", []))
    assert "build" in container or re.search(r":v?\d[\w.-]*$", container["image"])  # never a moving `latest`


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_stop_works_before_there_is_a_handler_for_it(name: str) -> None:
    assert CONTAINERS[name].get("init", False) == ("build" in CONTAINERS[name])


@pytest.mark.parametrize("name", CONTAINERS)
def test_what_a_container_waits_for_can_come_true(name: str) -> None:
    for other, wait in CONTAINERS[name].get("depends_on", {}).items():
        assert not wait.get("required", True) or name not in IN_THE_CLOUD or other in IN_THE_CLOUD
        if wait["condition"] == "service_healthy":
            assert CONTAINERS[other]["healthcheck"]["test"]
        else:
            assert wait["condition"] == "service_completed_successfully"
            assert CONTAINERS[other].get("restart") not in ("always", "unless-stopped")


@pytest.mark.parametrize(("name", "service"), READERS)
@pytest.mark.parametrize("containers", [CONTAINERS, CLOUD["services"]], ids=["local", "cloud"])
def test_services_and_fraudctl_take_the_variables_that_compose_sets(
    containers: dict[str, Any], name: str, service: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where no secrets.env is read
    for key in FIELDS:
        monkeypatch.delenv(key, raising=False)
    for key, value in variables(containers[name]).items():
        if key not in FIELDS:
            key, value = key.removesuffix("_FILE"), "what the file says"
            assert key in FIELDS
        if value:
            monkeypatch.setenv(key, value)

    settings = load(SETTINGS[service])

    assert str(settings.client_properties) in [config["target"] for config in containers[name]["configs"]]


def test_in_the_cloud_there_are_the_services_and_what_makes_their_topics() -> None:
    assert IN_THE_CLOUD.keys() == {*SETTINGS, "topics"}
    assert not any("ports" in container for container in IN_THE_CLOUD.values())


@pytest.mark.parametrize("left_out", ["API_URL", "MLFLOW_TRACKING_URI", "SMTP_HOST", "ALERT_FROM", "ALERT_TO"])
def test_the_override_asks_for_what_only_its_user_knows(left_out: str) -> None:
    with pytest.raises(KeyError, match=left_out):
        in_the_cloud({name: GIVEN[name] for name in GIVEN.keys() - {left_out}})


def test_it_is_documented_what_the_override_does_not_take_from_secrets_env() -> None:
    services = yaml.safe_load(OVERRIDE.read_text())["services"]
    asked_for = set(re.findall(r"\$\{(\w+)", yaml.safe_dump(services)))
    (paragraph,) = (each for each in SCALING.split("\n\n") if "In a file `.env` beside" in each)

    assert {name for name in FIELDS if f"`{name}`" in paragraph} == asked_for


def test_the_folder_of_secrets_is_made_where_there_is_one_and_nothing_else_is_touched(tmp_path: Path) -> None:
    folder, other = tmp_path / "secrets", tmp_path / "client.properties"
    folder.mkdir()
    other.touch(mode=0o600)
    (folder / "sasl_password").write_text("of the trial")
    (folder / "sasl_password").chmod(0o600)

    for _ in "once", "again":
        done = subprocess.run(
            ["sh", "-c", "\n".join(typed("mkdir"))], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr) == (0, "")

    assert {path: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {folder: 0o700, other: 0o600}
    files = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert files == dict.fromkeys(CLOUD["secrets"], 0o644)
    assert (folder / "sasl_password").read_text() == "of the trial"


def test_the_documented_override_gives_a_service_its_own_key_in_place_of_the_common_one(tmp_path: Path) -> None:
    (text,) = re.findall(r"```yaml\n(services:.+?)```", SCALING, re.DOTALL)
    own = tmp_path / "own.yml"
    own.write_text(text)
    both = merged(CLOUD, yaml.safe_load(text))

    assert validate(own).exit_code == 0
    mounted = {
        place(each): both["secrets"][each["source"] if isinstance(each, dict) else each]["file"]
        for each in both["services"]["alerter"]["secrets"]
    }
    assert mounted == {
        "/run/secrets/sasl_username": "./secrets/alerter_sasl_username",
        "/run/secrets/sasl_password": "./secrets/alerter_sasl_password",
        "/run/secrets/smtp_password": "./secrets/smtp_password",
        "/run/secrets/webhook_secret": "./secrets/webhook_secret",
    }


def test_fraudctl_takes_the_url_of_another_role_from_the_folder_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where no secrets.env is read
    project, work = tmp_path / "project", tmp_path / "work"
    project.mkdir()
    work.mkdir()
    (project / "secrets.env").write_text("DATABASE_URL=postgresql://of-the-trial/fraud\n")
    written, used = typed("owner_url")
    subprocess.run(["sh", "-c", written], input="postgresql://owner@db/fraud\n", text=True, check=True)
    words = shlex.split(used)
    name, _, path = words[words.index("-e") + 1].partition("=")

    given = variables(CLOUD["services"]["fraudctl"], own=project) | {name: str(work / path)}
    for key, value in given.items():
        monkeypatch.setenv(key, value)

    assert load(DatabaseSettings).database_url.get_secret_value() == "postgresql://owner@db/fraud"
    assert (work / "owner_url").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("name", [*IN_THE_CLOUD, "fraudctl"])
def test_a_secret_is_a_file_that_git_ignores(name: str) -> None:
    container = in_the_cloud(WITH_SECRETS)["services"][name]
    read = {value for key, value in variables(container).items() if key.endswith("_FILE")}

    assert read == {f"/run/secrets/{secret}" for secret in container["secrets"]}
    for secret in container["secrets"]:
        path = CLOUD["secrets"][secret]["file"]
        assert not subprocess.run(["git", "check-ignore", "--quiet", path], cwd=ROOT, check=False).returncode


@pytest.mark.parametrize("containers", [CONTAINERS, in_the_cloud(WITH_SECRETS)["services"]], ids=["local", "cloud"])
def test_fraudctl_has_what_each_service_has_and_a_folder_that_git_ignores(containers: dict[str, Any]) -> None:
    own = containers["fraudctl"]
    [(source, target)] = (volume.split(":") for volume in own["volumes"])

    for each in (containers[name] for name in SETTINGS):
        assert each["env_file"] == own["env_file"]
        assert each["environment"].items() <= own["environment"].items()
        assert set(each.get("secrets", [])) <= set(own.get("secrets", []))
    assert own["working_dir"] == target
    assert (ROOT / source).is_dir()  # Docker would make it, as root's
    ignored = ["git", "check-ignore", "--quiet", f"{source}/validated.csv"]
    assert not subprocess.run(ignored, cwd=ROOT, check=False).returncode


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
    build, (program, *arguments) = CONTAINERS[name]["build"], started(CONTAINERS[name])
    locked = build["args"].get("REQUIREMENTS", build["args"]["SERVICE"])
    lock = ROOT / build["context"] / "services" / "requirements" / f"{locked}.txt"

    assert (ROOT / build["context"] / build["dockerfile"]).is_file()
    assert lock.is_file()
    if program == "python":
        option, module, *_ = arguments
        assert option == "-m"
        assert importlib.util.find_spec(module)
    else:
        assert f"\n{program}==" in lock.read_text()


def test_every_package_of_the_project_gets_into_the_images() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    let_through = re.findall(r"^!(\w+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)

    packages = set(project["tool"]["importlinter"]["root_packages"]) - {"benchmarks", "scripts"}
    assert sorted(let_through) == sorted(packages | {"LICENSE"})


@dataclass
class Machine:
    """Containers as processes of this machine: their own commands and variables, but its ports and folders."""

    directory: Path
    places: dict[str, object]  # in the compose file: here
    containers: dict[str, Any] = field(default_factory=lambda: CONTAINERS)
    processes: ExitStack = field(default_factory=ExitStack)
    metrics_ports: defaultdict[str, int] = field(default_factory=lambda: defaultdict(free_port))

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
            "PYTHONSAFEPATH": "1",
            "OMP_NUM_THREADS": "1",  # on a machine with other tests, more threads wait for each other
        }
        compose = variables(self.containers[name], own=self.directory)
        own = {"METRICS_HOST": "127.0.0.1", "METRICS_PORT": str(self.metrics_ports[name])}
        return image | {key: self.address(value) for key, value in compose.items()} | own

    def healthy(self, name: str) -> bool:
        healthcheck = self.containers[name]["healthcheck"]
        if healthcheck.get("disable"):
            return True
        command = [self.here(part) for part in healthcheck["test"][1:]]
        done = subprocess.run(
            command, env=self.environment(name), cwd=self.folder(name), capture_output=True, check=False
        )
        if done.returncode:
            time.sleep(1)  # each question is a process, and takes from the container what it needs to start
        return done.returncode == 0

    def folder(self, name: str) -> Path:
        """The container's working directory, in which no settings file lies."""
        return Path(self.here(self.containers[name].get("working_dir", "/app")))

    def start(self, name: str, *arguments: str) -> Process:
        process = Process(
            name,
            [self.here(part) for part in started(self.containers[name], *arguments)],
            env=self.environment(name),
            cwd=self.folder(name),
            log=self.directory / f"{name}.log",
            ready=lambda: self.healthy(name),
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
            "/run/secrets": tmp_path / "secrets",
            "/var/lib/fraud-alarm": tmp_path / "state",
            "/app": tmp_path / "app",
            "/work": tmp_path / "work",
        }
        made = Machine(tmp_path, places)
        for folder in "app", "state", "work":
            (tmp_path / folder).mkdir()
        (tmp_path / "secrets.env").write_text("POLL_INTERVAL_SECONDS=0\n")  # at one a second a fraud is a minute away
        (tmp_path / "client.properties").write_text(made.address(CLIENT_PROPERTIES.read_text()))
        with made.processes:
            yield made


def until_alarms_and_rows(database_url: str, mailbox: Mailbox) -> None:
    engine = connect(database_url)
    until(lambda: sa.inspect(engine).has_table("transactions"), what="the table")
    with engine.connect() as connection:
        rows = sa.text("SELECT count(*) FROM transactions WHERE prediction IS NOT NULL")
        until(lambda: connection.execute(rows).scalar_one(), timeout_s=60, what="a row with its prediction")
    engine.dispose()
    until(lambda: list(messages(mailbox.directory)), timeout_s=60, what="an alarm")


@pytest.mark.kafka
@pytest.mark.timeout(360)
def test_the_commands_and_variables_of_the_file_make_alarms_and_rows(machine: Machine, mailbox: Mailbox) -> None:
    machine.start("payments-api")
    machine.start("mlflow")
    registry = f"http://127.0.0.1:{machine.places['5000']}/api/2.0/mlflow/experiments/get?experiment_id=0"
    by_name = {"Host": f"mlflow:{machine.places['5000']}"}  # as the containers call it; MLflow refuses names unheard of
    assert requests.get(registry, headers=by_name, timeout=60).ok
    for name, said_again in ONE_SHOTS.items():
        for _ in "up", "up again":
            one_shot = machine.start(name)
            assert one_shot.wait(120) == 0, (machine.directory / f"{name}.log").read_text()
        assert one_shot.said(said_again)

    services = [machine.start(name) for name in SETTINGS]

    until_alarms_and_rows(machine.environment("db_sink")["DATABASE_URL"], mailbox)
    for service in services:
        assert service.stop(timeout_s=STOP_GRACE_S) == 0, service.last_line()
        assert service.said("event='stopped'")
        assert not service.said("Traceback")


@pytest.mark.kafka
@pytest.mark.timeout(360)
def test_in_the_cloud_they_make_alarms_and_rows_as_well(machine: Machine, registry: Registry, mailbox: Mailbox) -> None:
    machine.start("payments-api")
    machine.containers = CLOUD["services"]
    machine.places["5000"] = urlsplit(registry.uri).port
    database_url = machine.address(EXAMPLE["DATABASE_URL"] or "")
    (machine.directory / "secrets").mkdir()
    for secret, text in {"sasl_username": "me", "sasl_password": "local-only", "database_url": database_url}.items():
        (machine.directory / "secrets" / secret).write_text(f"{text}\n")
    assert machine.start("topics").wait(60) == 0

    services = [machine.start(name) for name in SETTINGS]

    until_alarms_and_rows(database_url, mailbox)
    for service in services:
        assert service.stop(timeout_s=STOP_GRACE_S) == 0, service.last_line()

    (machine.directory / "work" / "csv.py").write_text("raise SystemExit('a file of the user is run')")
    for command in ["doctor"], ["export", "--out", "validated.csv"]:
        assert machine.start("fraudctl", *command).wait(60) == 0, (machine.directory / "fraudctl.log").read_text()
    assert (machine.directory / "work" / "validated.csv").is_file()
