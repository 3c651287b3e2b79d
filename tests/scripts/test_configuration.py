"""docs/configuration.md: every variable that is read stands there, as it is in the code."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from scripts import configuration
from shared.settings import Settings

ROOT = Path(__file__).parents[2]
PACKAGES = ("services", "shared", "training", "fraudctl", "sandbox", "benchmarks", "tests")
DOCUMENTED = set(re.findall(r"^\| `([A-Z0-9_]+)` \|", (ROOT / "docs" / "configuration.md").read_text(), re.MULTILINE))
OF_THE_SYSTEM = {"PATH", "HOME", "PYTEST_XDIST_WORKER"}


def subclasses(settings: type[Settings]) -> Iterator[type[Settings]]:
    for each in settings.__subclasses__():
        yield each
        yield from subclasses(each)


def read_by(source: str) -> Iterator[str]:
    """The names of environment variables that Python code reads, or gives a default."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Subscript(value=ast.Attribute(attr="environ"), slice=ast.Constant(value=name), ctx=ast.Load()):
                yield name
            case ast.Call(
                func=ast.Attribute(value=ast.Attribute(attr="environ"), attr="get" | "pop" | "setdefault"),
                args=[ast.Constant(value=name), *_],
            ):
                yield name
            case ast.Call(
                func=ast.Attribute(attr="getenv") | ast.Name(id="getenv"), args=[ast.Constant(value=name), *_]
            ):
                yield name
            case ast.Compare(left=ast.Constant(value=name), comparators=[ast.Attribute(attr="environ")]):
                yield name
            case ast.keyword(arg="envvar", value=ast.Constant(value=name)):
                yield name


def test_the_search_finds_every_way_to_read_a_variable() -> None:
    code = """
os.environ["A"]; os.environ.get("B", ""); os.getenv("C"); getenv("D"); "E" in os.environ
os.environ.setdefault("F", "1"); typer.Option(envvar="G"); os.environ["WRITTEN"] = "1"; other["X"]
"""
    assert sorted(read_by(code)) == list("ABCDEFG")


def test_what_the_code_reads_is_documented() -> None:
    sources = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]

    read = {name for path in sources if path != Path(__file__) for name in read_by(path.read_text())}

    assert "KAFKA_HOME" in read
    assert read - OF_THE_SYSTEM <= DOCUMENTED


def test_what_the_document_on_security_names_is_documented() -> None:
    named = set(re.findall(r"`([A-Z][A-Z0-9]*_[A-Z0-9_]+)[=`]", (ROOT / "docs" / "security.md").read_text()))

    assert {"SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"} <= named
    assert named <= DOCUMENTED


def test_every_setting_is_documented() -> None:
    ours = [each for each in subclasses(Settings) if each.__module__.startswith(("services.", "shared.", "fraudctl."))]

    fields = {name.upper() for each in ours for name in each.model_fields}

    assert {"METRICS_PORT", "MODEL_ALIAS", "WEBHOOK_SECRET", "DATABASE_URL"} <= fields <= DOCUMENTED


def test_what_compose_takes_from_the_shell_is_documented_as_such() -> None:
    heading = "## Read by `docker compose`"
    (section,) = re.findall(rf"^{heading}.*?(?=^## )", configuration.document(), re.MULTILINE | re.DOTALL)
    files = list(ROOT.glob("docker-compose*.yml"))
    taken = {name for file in files for name in re.findall(r"(?<!\$)\$\{(\w+)", file.read_text())}

    assert {"CLIENT_PROPERTIES", "MLFLOW_TRACKING_URI"} <= taken
    assert taken <= set(re.findall(r"`([A-Z0-9_]+)`", section))


def test_document_and_names_are_up_to_date() -> None:
    assert (ROOT / "docs" / "configuration.md").read_text() == configuration.document(), "make configuration"
    assert (ROOT / "shared" / "variables.py").read_text() == configuration.names(), "make configuration"


def test_a_row_has_type_default_and_meaning() -> None:
    rows = configuration.document().splitlines()

    meaning = "Port for /metrics, /live and /ready; 0 disables them"
    assert f"| `METRICS_PORT` | whole number from 0 to 65535 | `9100` | {meaning} |" in rows
    meaning = "URL of the database, for example postgresql://user:password@host:5432/name"
    assert f"| `DATABASE_URL` | secret | **required** | {meaning} |" in rows
    assert any(row.startswith("| `LOG_LEVEL` | `DEBUG`, `INFO`, `WARNING` or `ERROR` | `INFO` |") for row in rows)
