"""Writes docs/configuration.md and shared/variables.py from the settings classes: `python -m scripts.configuration`."""

import re
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from services.catalogue import SERVICES
from shared.settings import Settings

ROOT = Path(__file__).parents[1]
READERS: dict[str, type[Settings]] = {service.name: service.settings for service in SERVICES}


class Variable(NamedTuple):
    """The documentation of an environment variable."""

    name: str
    type: str
    default: str
    meaning: str


_BY_LIBRARIES = "Read by libraries, from the environment only"
_BY_COMPOSE = "Read by `docker compose`, from the shell or `.env`"
_AROUND = {
    _BY_LIBRARIES: (
        Variable("OMP_NUM_THREADS", "whole number", "`1`", "Predictor: number of threads for scikit-learn and numpy"),
        Variable(
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES",
            "whole number",
            "`0`, but `2` for `fraudctl train`, `promote` and `rollback`",
            "Number of retries of a failed call to the registry",
        ),
        Variable(
            "MLFLOW_HTTP_REQUEST_TIMEOUT",
            "seconds",
            "`5`, but `120` for `fraudctl train`, `promote` and `rollback`",
            "Timeout of a call to the registry",
        ),
        Variable("MLFLOW_TRACKING_TOKEN", "secret", "", "Token for the registry, instead of a user name and password"),
        Variable("MLFLOW_DISABLE_TELEMETRY", "true or false", "`true`", "Disables MLflow's telemetry"),
        Variable("ORT_DISABLE_TELEMETRY", "true or false", "`true`", "Disables ONNX Runtime's telemetry"),
        Variable(
            "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT",
            "true or false",
            "`true`",
            "Stops fraudctl from printing the URLs of MLflow runs",
        ),
        Variable(
            "AWS_ACCESS_KEY_ID",
            "text",
            "",
            "S3 access key for `fraudctl export`, `fraudctl train` and models in S3",
        ),
        Variable("AWS_SECRET_ACCESS_KEY", "secret", "", "S3 secret key"),
        Variable("AWS_SESSION_TOKEN", "secret", "", "S3 session token, for temporary credentials"),
        Variable("AWS_DEFAULT_REGION", "text", "", "S3 region"),
        Variable("AWS_ENDPOINT_URL", "URL", "", "Endpoint of an S3 provider other than AWS"),
        Variable("MLFLOW_S3_ENDPOINT_URL", "URL", "", "S3 endpoint for MLflow"),
        Variable(
            "REQUESTS_CA_BUNDLE",
            "path",
            "",
            "CA certificates for `https://` connections to the API, the webhook and MLflow",
        ),
        Variable("SSL_CERT_FILE", "path", "the system's", "CA certificates for the alerter's mail server"),
    ),
    _BY_COMPOSE: (
        Variable(
            "CLIENT_PROPERTIES",
            "path",
            "`./client.properties.example`, but `./client.properties` with `docker-compose.cloud.yml`",
            "Host path of the file that compose mounts into the containers",
        ),
        Variable("EXTRA_PACKAGES", "text", "", "Python packages that your own models need, such as `lightgbm==4.6.0`"),
        Variable(
            "EXTRA_DEBIAN_PACKAGES",
            "text",
            "",
            "Debian packages that the packages in `EXTRA_PACKAGES` need, such as `libgomp1`",
        ),
        Variable(
            "MODEL_REQUIREMENTS",
            "text",
            "",
            "Packages for an environment in which models run that need other versions, such as `scikit-learn==1.5.2`",
        ),
    ),
    "Read by the local stack, the tests and the benchmarks": (
        Variable("KAFKA_HOME", "path", "", "Folder of an installed Apache Kafka; if not set, Kafka is downloaded once"),
        Variable("XDG_CACHE_HOME", "path", "`~/.cache`", "Folder in which the downloaded Kafka is cached"),
        Variable(
            "FRAUD_ALARM_SAMPLE", "path", "", "CSV file with real labelled rows, for the tests that need such rows"
        ),
        Variable(
            "FRAUD_ALARM_EFFORT", "whole number", "`1`", "How many times as many examples and kills some tests try"
        ),
        Variable(
            "CI", "text", "", "If set, tests that need Apache Kafka fail where it is missing, instead of being skipped"
        ),
    ),
}

_INTRODUCTION = """\
# Configuration

Generated from the settings classes by `make configuration`. A test fails if this page is out of date.

A service reads its settings from the environment and from the file `secrets.env` in its working directory. The
environment takes precedence. With Docker, compose reads `secrets.example.env` and then `secrets.env`, and passes the
values to the containers as environment variables. An empty value counts as not set. If a required setting is missing
or a value is invalid, the service prints one line that names the setting, and exits with code 2.

**Secrets in files.** Each setting can also be read from a UTF-8 text file that contains only the value. To do this,
append `_FILE` to the setting's name, and set this variable to the path of the file. A newline at the end of the file is
ignored. For example, `DATABASE_URL_FILE=/run/secrets/database_url` keeps the database login out of the environment.
Everybody who is allowed to inspect the container can read the environment. Set either `DATABASE_URL_FILE` or
`DATABASE_URL`, but not both. An empty `DATABASE_URL=` in `secrets.env` cancels the value in `secrets.example.env`. The
file is read once, when the service starts.

**Unknown names.** A variable in `secrets.env` that no service and no library reads is ignored. A service that reads
`secrets.env` logs a warning about the variable when the service starts. The warning has the variable's name and the
setting that was probably meant, but never the value. Most environment variables belong to other programs. Therefore, a
service warns about an environment variable only if its name has more than ten letters and differs from a setting's name
by about one letter. With Docker, this limit also applies to the variables in `secrets.env`, because compose passes them
on as environment variables. To find all unknown names, run `fraudctl doctor` in the folder of `secrets.env`.

`fraudctl` reads the same settings as the services. `train`, `promote` and `rollback` read the predictor's registry
settings, and the options of these commands override the settings. `labels`, `export` and `migrate` read only the
database settings, and `alert-test` reads the alerter's settings. Every command that uses Kafka reads the settings that
all services read.

Secrets never appear in logs, errors or the `repr` of the settings. Logins in URLs (`https://user:password@host/`) are
also removed from logs and errors.
"""


def document() -> str:
    """Return the text of docs/configuration.md."""
    parts = [_INTRODUCTION]
    for readers, variables in _by_readers().items():
        of_all = len(readers) == len(READERS)
        parts.append(f"## Read by {'every service' if of_all else _listed(readers)}\n\n{_table(variables)}")
    for title, around in _AROUND.items():
        parts.append(f"## {title}\n\n{_table(around)}")
        if title == _BY_COMPOSE:
            parts.append(_with_cloud(around))
    return "\n".join(parts)


def names() -> str:
    """Return the text of shared/variables.py."""
    settings = {field.upper() for settings in READERS.values() for field in settings.model_fields}
    of_libraries = {variable.name for variable in _AROUND[_BY_LIBRARIES]}
    listed = [
        f"{name} = (\n" + "".join(f'    "{each}",\n' for each in sorted(found)) + ")\n"
        for name, found in (("NAMES", settings), ("OF_LIBRARIES", of_libraries))
    ]
    made = '"""The environment variables that fraud-alarm and its libraries read.\n\n'
    made += 'Generated by `python -m scripts.configuration`.\n"""\n\n'
    return made + "\n".join(listed)


def _with_cloud(others: tuple[Variable, ...]) -> str:
    text = (ROOT / "docker-compose.cloud.yml").read_text()
    taken = dict.fromkeys(re.findall(r"(?<!\$)\$\{(\w+)", text))  # in the order of the file
    listed = _listed([f"`{name}`" for name in taken if name not in {each.name for each in others}])
    lead = "With `docker-compose.cloud.yml`, compose also reads these variables, which override `secrets.env`"
    return "\n".join(textwrap.wrap(f"{lead}: {listed}.", 120, break_on_hyphens=False)) + "\n"


def _by_readers() -> Mapping[tuple[str, ...], list[Variable]]:
    """Return the variables, grouped by the services that read them. Groups with the most services come first.

    A variable whose documentation differs between services is in several groups.
    """
    readers: dict[Variable, list[str]] = {}
    for service, settings in READERS.items():
        for variable in _variables(settings):
            readers.setdefault(variable, []).append(service)
    found: dict[tuple[str, ...], list[Variable]] = {}
    for variable, services in sorted(readers.items(), key=lambda item: -len(item[1])):
        found.setdefault(tuple(services), []).append(variable)
    return found


def _variables(settings: type[Settings]) -> Iterator[Variable]:
    schema = settings.model_json_schema()
    for name, field in schema["properties"].items():
        of_machine = settings.model_fields[name].default_factory is not None
        default = "**required**" if name in schema.get("required", ()) else "the host's name" if of_machine else ""
        if (value := field.get("default")) not in (None, []):
            default = f"`{_plain(value)}`"
        yield Variable(name.upper(), _type(field), default, field["description"])


def _type(field: Mapping[str, Any]) -> str:
    """Describe the type of a field of a JSON schema in words, for example `whole number from 1`."""
    form = next((each for each in field.get("anyOf", ()) if each["type"] != "null"), field)
    if "enum" in form:
        return _listed([f"`{each}`" for each in form["enum"]], "or")
    formats = {"password": "secret", "path": "path", "uri": "URL"}
    if form.get("format") in formats:
        return formats[form["format"]]
    kinds = {"integer": "whole number", "number": "number", "boolean": "true or false", "array": "list"}
    signs = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to"}
    limits = [f"{sign} {form[limit]:g}" for limit, sign in signs.items() if limit in form]
    return " ".join([kinds.get(form["type"], "text"), *limits])


def _plain(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def _listed(parts: list[str] | tuple[str, ...], word: str = "and") -> str:
    return f" {word} ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))


def _table(variables: list[Variable] | tuple[Variable, ...]) -> str:
    rows = "".join(f"| `{each.name}` | {each.type} | {each.default} | {each.meaning} |\n" for each in variables)
    return f"| variable | type | default | meaning |\n|---|---|---|---|\n{rows}"


if __name__ == "__main__":
    (ROOT / "docs" / "configuration.md").write_text(document())
    (ROOT / "shared" / "variables.py").write_text(names())
