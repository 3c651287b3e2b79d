"""The command line as a whole: help, version, completion, what it imports, and how it ends."""

import json
import os
import pkgutil
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from itertools import chain
from pathlib import Path

import pytest
import typer
from typer.main import get_command
from typer.testing import CliRunner

from fraudctl import status
from fraudctl.__main__ import app
from fraudctl.commands import topics as topic_commands
from shared.errors import Outage, SettingsError
from shared.kafka import topics

# Packages whose modules change no environment variable and no other state of the process when they are imported.
QUIET_PACKAGES = ("fraudctl",)
# Variables that scikit-learn and MLflow set for themselves when they are imported.
SET_BY_LIBRARIES = ("KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK", "_MLFLOW_TELEMETRY_SESSION_ID")
HEAVY = ("sklearn", "mlflow", "pandas", "matplotlib")


def commands(group: object, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every command and group, by the words that call it."""
    yield path
    for name, each in getattr(group, "commands", {}).items():
        yield from commands(each, (*path, name))


COMMANDS = list(commands(get_command(app)))
LEAVES = [path for path in COMMANDS if not any(other[:-1] == path for other in COMMANDS if other)]


def fraudctl(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fraudctl", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={"PATH": os.environ["PATH"], **environment},
        timeout=120,
        check=False,
    )


def lines_of_help(*path: str) -> list[str]:
    shown = CliRunner().invoke(app, [*path, "--help"], env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"})
    assert shown.exit_code == 0
    return shown.stdout.splitlines()


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_help_fits_80_columns_and_names_values(path: tuple[str, ...]) -> None:
    lines = lines_of_help(*path)

    assert max(map(len, lines)) <= 80
    assert not re.search(r"<\w+", "\n".join(lines))
    assert any("--help" in line and "-h" in line for line in lines)
    assert (
        CliRunner().invoke(app, [*path, "-h"]).stdout.split()
        == CliRunner().invoke(app, [*path, "--help"]).stdout.split()
    )


@pytest.mark.parametrize("path", LEAVES, ids=" ".join)
def test_every_command_has_an_example_that_calls_it(path: tuple[str, ...]) -> None:
    lines = [line.strip() for line in lines_of_help(*path)]

    start = next(number for number, line in enumerate(lines) if line in ("Example:", "Examples:"))
    assert lines[start + 1].startswith(" ".join(("$ fraudctl", *path)))
    assert all(line.startswith(("$ fraudctl", "--")) for line in lines[start + 1 :] if line)  # none was broken


def test_each_command_has_one_line_in_the_overview() -> None:
    rows = [line for line in lines_of_help() if re.match(r"│ {15}\w", line)]

    assert rows == []  # no description goes on in a second line


def test_the_version_is_that_of_the_package() -> None:
    assert CliRunner().invoke(app, ["--version"]).stdout == f"fraudctl {version('fraud-alarm')}\n"


def test_the_shell_completes_commands(tmp_path: Path) -> None:
    done = fraudctl(
        cwd=tmp_path, _FRAUDCTL_COMPLETE="complete_bash", COMP_WORDS="fraudctl dead-letters ", COMP_CWORD="2"
    )

    assert done.stdout.split() == ["list", "show", "replay"]


def test_new_topics_have_as_many_partitions_as_topics_elsewhere() -> None:
    for command in (topic_commands.create, topic_commands.check):
        assert command.__defaults__ is not None
        assert command.__defaults__[0] == topics.PARTITIONS


PRINTS_MODULES = """
import json, sys
from fraudctl.__main__ import main

imported = {}
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["fraudctl", *arguments]
    try:
        main()
    except SystemExit:
        pass
    imported[" ".join(arguments)] = sorted(name for name in sys.modules if "." not in name)
print(json.dumps(imported), file=sys.stderr)
"""


def imports(calls: list[list[str]], *, cwd: Path, **environment: str) -> dict[str, list[str]]:
    """What has been imported after each of these calls, one after the other in one process."""
    done = subprocess.run(
        [sys.executable, "-c", PRINTS_MODULES, json.dumps(calls)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={"PATH": os.environ["PATH"], **environment},
        timeout=170,
        check=True,
    )
    return dict(json.loads(done.stderr.splitlines()[-1]))


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    calls = [[*path, "--help"] for path in COMMANDS]

    for call, modules in imports(calls, cwd=tmp_path).items():
        assert not {*HEAVY, "sqlalchemy", "confluent_kafka", "pydantic_settings"} & {*modules}, call


def test_operators_commands_import_no_more_than_they_use(tmp_path: Path) -> None:
    away = {
        "CLIENT_PROPERTIES": str(tmp_path / "client.properties"),
        "MLFLOW_TRACKING_URI": "http://127.0.0.1:9",
        "DATABASE_URL": "postgresql://fraud@127.0.0.1:9/fraud",
        "API_URL": "http://127.0.0.1:9",
        "SMTP_HOST": "127.0.0.1",
        "SMTP_PORT": "9",
        "ALERT_FROM": "alarm@example.org",
        "ALERT_TO": "ana@example.org",
    }
    (tmp_path / "client.properties").write_text("bootstrap.servers=127.0.0.1:9\n")
    database_only = [["labels", "list"], ["labels", "stats"], ["export"], ["migrate"]]
    calls = [["status"]], [["doctor"]], [["tail", "topic_1"], *database_only]
    with ThreadPoolExecutor(len(calls)) as pool:  # each waits for servers that do not answer
        answers = pool.map(lambda each: imports(each, cwd=tmp_path, **away), calls)
        found = dict(chain.from_iterable(each.items() for each in answers))

    for call, modules in found.items():
        assert not {*HEAVY} & {*modules}, call
    assert "sqlalchemy" not in found["status"]


PRINTS_CHANGES = """
import gc, importlib, json, logging, os, signal, sys

def state():
    handlers = {int(number): repr(signal.getsignal(number)) for number in signal.valid_signals()}
    root = logging.getLogger()
    return {
        "environment": {name: value for name, value in os.environ.items() if name not in sys.argv[2:]},
        "switch interval": sys.getswitchinterval(), "gc": [gc.get_threshold(), gc.isenabled()],
        "signals": handlers, "root logger": [root.level, list(map(repr, root.handlers))],
        "excepthook": repr(sys.excepthook), "recursion limit": sys.getrecursionlimit(),
    }

before = state()
changed = {}
for module in json.loads(sys.argv[1]):
    importlib.import_module(module)
    after = state()
    if different := [name for name in before if before[name] != after[name]]:
        changed[module] = different
    before = after
print(json.dumps(changed))
"""


def test_importing_a_module_changes_nothing_in_the_process(tmp_path: Path) -> None:
    modules = [
        name
        for package in QUIET_PACKAGES
        for path in (pkgutil.resolve_name(package).__path__,)
        for name in (package, *(each.name for each in pkgutil.walk_packages(path, f"{package}.")))
    ]
    done = subprocess.run(
        [sys.executable, "-c", PRINTS_CHANGES, json.dumps(modules), *SET_BY_LIBRARIES],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"]},
        timeout=170,
        check=True,
    )

    assert f"{QUIET_PACKAGES[0]}.__main__" in modules
    assert json.loads(done.stdout.splitlines()[-1]) == {}


SECRET = "hunter2"


@pytest.mark.parametrize(
    ("error", "exit_code", "line"),
    [
        (SettingsError("DATABASE_URL: missing"), 2, "DATABASE_URL: missing"),
        (Outage(f"no answer from http://ana:{SECRET}@host/x?key={SECRET}"), 2, "no answer from http://host/x"),
        (FileNotFoundError(2, "No such file or directory", "a.csv"), 2, "a.csv: No such file or directory"),
        (
            KeyError(f"4497913965512794052 of http://ana:{SECRET}@host"),
            1,
            "unexpected error, please report it: KeyError in",
        ),
        (typer.BadParameter("too short"), 2, None),
    ],
)
def test_an_error_is_one_line_without_secrets_and_an_exit_code(
    monkeypatch: pytest.MonkeyPatch, error: Exception, exit_code: int, line: str | None
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(status, "load_settings", fail)

    done = CliRunner().invoke(app, ["status"])

    assert done.exit_code == exit_code
    assert SECRET not in done.output
    assert "44979" not in done.output
    assert "Traceback" not in done.output
    if line:
        assert done.stderr.startswith(f"fraudctl: {line}")
        assert done.stderr.count("\n") == 1


def test_ctrl_c_ends_a_command_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "client.properties").write_text("bootstrap.servers=127.0.0.1:9\n")
    command = [sys.executable, "-m", "fraudctl", "topics", "check"]
    environment = {"PATH": os.environ["PATH"]}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as process:
        time.sleep(3)  # in which it has begun to wait for the broker, ten seconds long
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)

    assert (process.returncode, err) == (130, "")


def test_a_reader_that_has_seen_enough_ends_a_command_quietly(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        done = subprocess.run(
            [sys.executable, "-m", "fraudctl", "--version"],
            stdout=closed,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            timeout=60,
            check=False,
        )

    assert (done.returncode, done.stderr) == (1, "")
