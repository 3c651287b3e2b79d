"""Starts the local stack, and creates a process for each service that runs on the stack."""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path

from sandbox.apache import ApacheKafka, missing
from sandbox.embedded import CLIENT_SETTINGS, EmbeddedBroker
from sandbox.mailbox import Mailbox
from sandbox.payments_api import PaymentsApi
from sandbox.postgres import Postgres
from sandbox.processes import Process, StandInError, free_port, port_open, python
from sandbox.registry import Registry
from services.catalogue import BY_NAME
from shared.kafka import topics
from shared.settings import ServiceSettings, kafka_properties

SENDER = "alarm@fraud-alarm.example"
RECIPIENT = "analyst@fraud-alarm.example"
_ANSWER_S = 1.0
_INHERITED = ("PATH", "HOME", "LANG", "TMPDIR", "LD_LIBRARY_PATH", "SSL_CERT_FILE")


@dataclass(frozen=True, kw_only=True)
class Addresses:
    """The addresses of all servers that the services use, and the delivery guarantee."""

    client_properties: Path
    api_url: str
    registry_uri: str
    database_url: str
    smtp_port: int
    delivery: str

    def environment(self) -> dict[str, str]:
        """Return the services' environment: these settings and a few system variables.

        No setting of the project is inherited from the environment of this process.
        """
        inherited = {name: os.environ[name] for name in _INHERITED if name in os.environ}
        return inherited | {
            "PYTHONUNBUFFERED": "1",
            "CLIENT_PROPERTIES": str(self.client_properties),
            "API_URL": self.api_url,
            "POLL_INTERVAL_SECONDS": "0",
            "MLFLOW_TRACKING_URI": self.registry_uri,
            "DATABASE_URL": self.database_url,
            "SMTP_HOST": "127.0.0.1",
            "SMTP_PORT": str(self.smtp_port),
            "SMTP_TLS": "none",
            "ALERT_FROM": SENDER,
            "ALERT_TO": RECIPIENT,
            "ALERT_BURST": "1000000",  # one mail for each fraud, because the ledger checks each mail
            "DELIVERY": self.delivery,
            "BACKOFF_MAX_SECONDS": "5",
            "METRICS_PORT": "0",  # `service` gives each process its own port
        }


@dataclass(frozen=True, kw_only=True)
class Stack:
    """The running parts of the stack. `broker` or `database` is None if the demo uses an existing server instead."""

    broker: ApacheKafka | EmbeddedBroker | None
    database: Postgres | None
    mailbox: Mailbox
    registry: Registry
    api: PaymentsApi
    addresses: Addresses
    properties: Mapping[str, str]


def choose_broker(wanted: str) -> tuple[str, str]:
    """Return the `broker` argument for `local_stack`, and a description of the broker.

    `wanted` is `auto`, `embedded`, `apache`, HOST:PORT or a client.properties file. Raises StandInError for anything
    else.
    """
    if wanted == "apache":
        return "apache", ApacheKafka.description
    if wanted == "embedded":
        return "embedded", EmbeddedBroker.description
    if wanted == "auto":
        if reason := missing():
            return "embedded", f"{EmbeddedBroker.description}; {reason}"
        return "apache", ApacheKafka.description
    if Path(wanted).is_file():
        return wanted, f"Kafka with the settings in {wanted}"
    if not re.fullmatch(r"\S+:\d{1,5}", wanted):
        raise StandInError(f"--broker: {wanted!r} is not auto, embedded, apache, HOST:PORT or a client.properties file")
    return wanted, f"Kafka at {wanted}"


@contextmanager
def local_stack(
    directory: Path,
    *,
    broker: str,
    api_options: tuple[str, ...] = (),
    database_url: str | None = None,
) -> Iterator[Stack]:
    """Start all servers that the services need, train a champion, and stop the servers at the end.

    Files are kept in `directory`. `broker` is `embedded` or `apache` to start a broker. To use a broker that is already
    running, `broker` is its HOST:PORT or the path of a client.properties file. With `database_url`, no database is
    started. A champion from an earlier run in `directory` is kept. Raises StandInError if a server does not start or
    training fails. Raises Outage if the running broker does not respond, and SettingsError if the client.properties
    file is invalid.
    """
    directory = directory.resolve()
    given = Path(broker).resolve() if Path(broker).is_file() else None
    properties = {"bootstrap.servers": broker}
    if given:
        properties = kafka_properties(ServiceSettings.model_validate({"client_properties": given}))
    own: ApacheKafka | EmbeddedBroker | None = None
    if broker not in ("apache", "embedded"):
        topics.create(properties, ())  # raises Outage before anything is started
    else:
        kafka_directory = directory / "kafka"
        shutil.rmtree(kafka_directory, ignore_errors=True)
        own = ApacheKafka(kafka_directory) if broker == "apache" else EmbeddedBroker(kafka_directory)
    database = None if database_url else Postgres(directory / "database")
    mailbox = Mailbox(directory / "mail")
    registry = Registry(directory / "registry")
    api = PaymentsApi(*api_options, log=directory / "logs" / "payments_api.log")
    training = _training(directory, registry)
    with ExitStack() as stack:
        parts: list[Process] = [part for part in (registry, own, database, mailbox, api) if part]
        for part in (*parts, training):
            stack.callback(part.stop)
            part.spawn()
        for part in parts:
            part.wait_ready()
        if training.wait():
            raise StandInError(f"training failed: {training.last_line()}")
        if own:
            properties = {"bootstrap.servers": own.bootstrap}
            properties |= CLIENT_SETTINGS if isinstance(own, EmbeddedBroker) else {}
        path = given or directory / "client.properties"
        if not given:
            path.write_text("".join(f"{name}={value}\n" for name, value in properties.items()))
        addresses = Addresses(
            client_properties=path,
            api_url=api.url,
            registry_uri=registry.uri,
            database_url=database.url if database else str(database_url),
            smtp_port=mailbox.port,
            delivery="at_least_once" if isinstance(own, EmbeddedBroker) else "exactly_once",
        )
        yield Stack(
            broker=own,
            database=database,
            mailbox=mailbox,
            registry=registry,
            api=api,
            addresses=addresses,
            properties=properties,
        )


def _training(directory: Path, registry: Registry) -> Process:
    """Create a process that trains a model on generated transactions and registers it as the champion.

    If there is a champion already, the process does not train. The process is started together with the registry, and
    waits until the registry responds.
    """
    # One thread, because scikit-learn's threads wait minutes for each other while other processes keep the cores busy.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment |= {"MLFLOW_TRACKING_URI": registry.uri, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "7"}
    log = directory / "logs" / "train.log"
    command = python("fraudctl", "train", "--seed", "1", "--if-absent")
    return Process("training", command, env=environment, log=log, cwd=directory)


def service(name: str, directory: Path, environment: Mapping[str, str], *, replica: int = 1) -> Process:
    """Create a process that runs this service and logs to `logs/<name>.log`.

    A replica number above 1 is appended to the process's name and to the value of REPLICA.

    A service that reads a topic counts as ready once /ready has succeeded, because the service has then joined its
    group. A later outage does not change this. The producer joins no group and starts even if its API is down.
    Therefore, the producer counts as ready once it listens on METRICS_PORT.
    """
    directory = directory.resolve()
    full_name = name if replica == 1 else f"{name}-{replica}"
    own = dict(environment)
    port = int(own["METRICS_PORT"]) or free_port()
    own["METRICS_PORT"] = str(port)
    if replica > 1:
        own["REPLICA"] = f"{environment['REPLICA']}-{replica}"
    joins = bool(BY_NAME[name].groups)
    return Process(
        full_name,
        python(BY_NAME[name].module),
        env=own,
        log=directory / "logs" / f"{full_name}.log",
        cwd=directory,
        ready=lambda: _was_ready(port) if joins else port_open(port),
    )


def _was_ready(port: int) -> bool:
    """Whether the service on this port has been ready at least once since it started."""
    if not port_open(port):
        return False
    # This function is called often, and the package requests would cost ten times as much as http.client.
    connection = HTTPConnection("127.0.0.1", port, timeout=_ANSWER_S)
    try:
        connection.request("GET", "/ready")
        return bool(json.load(connection.getresponse())["was_ready"])
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()
