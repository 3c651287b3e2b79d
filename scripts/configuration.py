"""docs/configuration.md and shared/variables.py, from the settings classes: `python -m scripts.configuration`."""

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
    """An environment variable, as it is documented."""

    name: str
    type: str
    default: str
    meaning: str


_BY_LIBRARIES = "By libraries, in the environment alone"
_BY_COMPOSE = "By `docker compose`, in the shell or in `.env`"
_AROUND = {
    _BY_LIBRARIES: (
        Variable("OMP_NUM_THREADS", "whole number", "`1`", "predictor: threads of scikit-learn and numpy"),
        Variable(
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES",
            "whole number",
            "`0`; `fraudctl train`, `promote`, `rollback`: `2`",
            "Of a call to the registry",
        ),
        Variable(
            "MLFLOW_HTTP_REQUEST_TIMEOUT",
            "seconds",
            "`5`; `fraudctl train`, `promote`, `rollback`: `120`",
            "Of a call to the registry",
        ),
        Variable("MLFLOW_DISABLE_TELEMETRY", "true or false", "`true`", "Whether MLflow keeps its use to itself"),
        Variable("ORT_DISABLE_TELEMETRY", "true or false", "`true`", "Whether ONNX Runtime keeps its use to itself"),
        Variable(
            "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT",
            "true or false",
            "`true`",
            "fraudctl: whether MLflow keeps the addresses of runs to itself",
        ),
        Variable("AWS_ACCESS_KEY_ID", "text", "", "S3: `fraudctl export`, `fraudctl train`, and models that lie there"),
        Variable("AWS_SECRET_ACCESS_KEY", "secret", "", "Its secret"),
        Variable("AWS_SESSION_TOKEN", "secret", "", "The third, of credentials that end"),
        Variable("AWS_DEFAULT_REGION", "text", "", "Its region"),
        Variable("AWS_ENDPOINT_URL", "URL", "", "S3 of another provider"),
        Variable("MLFLOW_S3_ENDPOINT_URL", "URL", "", "The same, for MLflow"),
        Variable("REQUESTS_CA_BUNDLE", "path", "", "Whom to trust for `https://`: the API, the webhook and MLflow"),
        Variable("SSL_CERT_FILE", "path", "the system's", "Whom the alerter trusts for its mail server"),
    ),
    _BY_COMPOSE: (
        Variable(
            "CLIENT_PROPERTIES",
            "path",
            "`./client.properties.example`, of docker-compose.cloud.yml `./client.properties`",
            "On the host: what compose mounts",
        ),
        Variable("EXTRA_PACKAGES", "text", "", "What models of your own need on top, such as `lightgbm==4.6.0`"),
        Variable("EXTRA_DEBIAN_PACKAGES", "text", "", "The libraries that those need, such as `libgomp1`"),
    ),
    "By the local stack, the tests and the benchmarks": (
        Variable("KAFKA_HOME", "path", "", "An Apache Kafka that is installed; without it, its jars are fetched once"),
        Variable("XDG_CACHE_HOME", "path", "`~/.cache`", "Where those jars are kept"),
        Variable("FRAUD_ALARM_SAMPLE", "path", "", "Rows of the real training file, for the tests that need them"),
        Variable("CI", "text", "", "Tests that would be skipped for want of a broker fail"),
    ),
}

_INTRODUCTION = """\
# Configuration

Made from the settings classes by `python -m scripts.configuration`; a test fails while it is out of date.

A service reads its settings from the environment and from a file `secrets.env` in its working directory; the
environment wins. With Docker, compose passes `secrets.example.env` and then `secrets.env` as the environment. An empty
value counts as not set. A missing or wrong one stops the start with one line that names it, and exit code 2.

**Secrets in files.** Each of these settings may also be given as its name and `_FILE`: the path of a UTF-8 text file
that holds the value, less the end of its last line. So `DATABASE_URL_FILE=/run/secrets/database_url` keeps the login
out of the environment, where whoever may inspect the container reads it. Of the two, only one may be set: an empty
`DATABASE_URL=` takes back the one of `secrets.example.env`. A file is read once, at the start.

**Unknown names.** What `secrets.env` sets and nobody reads is ignored, with a warning at the start that names it, and
the setting that was meant if one is much like it; never its value. What another service or a library reads is known. In
the environment, where compose puts the file's, most belongs to somebody else: of that, a warning names what has more
than ten letters and is a setting's name but for one or so. `fraudctl doctor`, run beside the file, finds the others.

`fraudctl` reads the same settings, each command those of the service whose part it deals with: `train`, `promote` and
`rollback` the registry's of the predictor, which its options override, `labels`, `export` and `migrate` the database's
alone, `alert-test` the alerter's, and all that deals with Kafka what every service reads.

No secret is ever shown: not by a log, not by an error, not by the `repr` of the settings. A login in a URL
(`https://user:password@host/`) is left out of logs and errors as well.
"""


def document() -> str:
    """docs/configuration.md."""
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
    """shared/variables.py."""
    settings = {field.upper() for settings in READERS.values() for field in settings.model_fields}
    of_libraries = {variable.name for variable in _AROUND[_BY_LIBRARIES]}
    listed = [
        f"{name} = (\n" + "".join(f'    "{each}",\n' for each in sorted(found)) + ")\n"
        for name, found in (("NAMES", settings), ("OF_LIBRARIES", of_libraries))
    ]
    made = '"""What is read from the environment, written by `python -m scripts.configuration`."""\n\n'
    return made + "\n".join(listed)


def _with_cloud(others: tuple[Variable, ...]) -> str:
    text = (ROOT / "docker-compose.cloud.yml").read_text()
    taken = dict.fromkeys(re.findall(r"(?<!\$)\$\{(\w+)", text))  # in its order
    listed = _listed([f"`{name}`" for name in taken if name not in {each.name for each in others}])
    lead = "With `docker-compose.cloud.yml` these come from there as well, whatever `secrets.env` says of them"
    return "\n".join(textwrap.wrap(f"{lead}: {listed}.", 120, break_on_hyphens=False)) + "\n"


def _by_readers() -> Mapping[tuple[str, ...], list[Variable]]:
    """Those with the most readers first; a setting that differs between services stands there once for each."""
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
    """A JSON schema's type in words."""
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
