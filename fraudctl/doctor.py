"""Checks everything that the services need. If a check fails, its finding says how to fix the problem."""

import email.utils
import os
import smtplib
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Literal, NamedTuple

from confluent_kafka import KafkaError, KafkaException, TopicCollection
from confluent_kafka.admin import AclOperation, AdminClient  # type: ignore[attr-defined]
from confluent_kafka.cimpl import NewTopic
from dotenv import dotenv_values
from pydantic_settings import BaseSettings

from fraudctl import database, registry, status
from services import catalogue
from services.alerter.channels import configured, mailer
from services.alerter.settings import AlerterSettings
from services.db_sink.settings import DatabaseSettings
from services.producer.api import fetch
from services.producer.settings import ProducerSettings
from shared.dead_letters import SUFFIX
from shared.errors import Outage, Poison, SettingsError
from shared.http import Answer, Client
from shared.kafka import topics
from shared.kafka.clients import DENIED, admin, consumer, producer
from shared.network import why_unreachable
from shared.privacy import without_credentials, without_digits
from shared.records import read_split
from shared.settings import (
    SECRETS_FILE,
    RegistrySettings,
    ServiceSettings,
    kafka_properties,
    load,
    unknown_variables,
)
from shared.text import one_line
from shared.variables import OF_LIBRARIES

_TIMEOUT_S = 8.0
_MAX_SKEW_S = 5.0  # NTP keeps clocks within milliseconds of each other; ages and limits are in seconds
_TABLE = "transactions"

_ON_TOPICS = {
    AclOperation.READ: "Read",
    AclOperation.WRITE: "Write",
    AclOperation.DESCRIBE_CONFIGS: "DescribeConfigs",
}
_TRANSACTIONAL_ID = "fraudctl-doctor"

Clocks = list[tuple[str, float]]
"""The systems that reported their time, each with the seconds by which its clock is ahead of this machine's clock."""


class Finding(NamedTuple):
    """The result of a check."""

    verdict: Literal["ok", "failed", "skipped"]
    what: str
    text: str

    def __str__(self) -> str:
        return f"{self.verdict:8} {self.what}: {self.text}"


class Area(NamedTuple):
    """The checks of one system.

    `settings` is the settings class of a service that needs the system. The checks run only if these settings are
    valid.
    """

    name: str
    settings: type[BaseSettings]
    check: Callable[[Any], Iterator[Finding]]


def examine() -> list[Finding]:
    """Run all checks, and return their findings. Different systems are checked in parallel."""
    loaded: dict[type[BaseSettings], Any] = {}
    problems: list[str] = []
    kinds: list[type[ServiceSettings]] = [ServiceSettings, *(service.settings for service in catalogue.SERVICES)]
    for kind in kinds:
        try:
            loaded[kind] = load(kind)
            if kind is AlerterSettings:
                configured(loaded[kind])
        except SettingsError as error:
            problems += [each for each in str(error).split("; ") if each not in problems]
    clocks: Clocks = []

    def explore(area: Area) -> list[Finding]:
        if area.settings in loaded:
            return list(area.check(loaded[area.settings]))
        return [Finding("skipped", area.name, "its settings must be fixed first")]

    areas = [Area("Kafka", ServiceSettings, lambda settings: _kafka(settings, loaded)), *_areas(clocks)]
    with ThreadPoolExecutor(len(areas)) as pool:
        explored = list(pool.map(explore, areas))
    first = Finding(
        "failed" if problems else "ok",
        "settings",
        f"{'; '.join(problems)}. Fix these settings in {SECRETS_FILE} or in the environment."
        if problems
        else f"the settings of all {len(catalogue.SERVICES)} services are valid",
    )
    return [first, *_names(), *(finding for findings in explored for finding in findings), _clock(clocks)]


def _areas(clocks: Clocks) -> Iterator[Area]:
    """Yield one area for each system that the services need, except for Kafka."""
    names_and_checks: dict[catalogue.Need, tuple[str, Callable[[Any], Iterator[Finding]]]] = {
        "registry": ("MLflow", lambda settings: _mlflow(settings, clocks)),
        "database": ("database", lambda settings: _database(settings, clocks)),
        "mail server": ("SMTP", _smtp),
        "payments API": ("API contract", lambda settings: _api(settings, clocks)),
    }
    for need, (name, check) in names_and_checks.items():
        settings = next(service.settings for service in catalogue.SERVICES if need in service.needs)
        yield Area(name, settings, check)


def _names() -> Iterator[Finding]:
    """Yield findings about variables that are not settings, in `secrets.env` and in the environment."""
    try:
        unknown = unknown_variables()
    except SettingsError:  # already reported with the settings
        return
    for name, meant in unknown.items():
        hint = f" Rename it to {meant}, or remove it." if meant else " Remove it."
        where = f"in {SECRETS_FILE} or in the environment"
        yield Finding("failed", "settings", f"{name}, {where}, is not a setting.{hint}")
    if strays := sorted({*OF_LIBRARIES} & {*dotenv_values(SECRETS_FILE)} - {*os.environ}):
        remedy = "Compose puts them there. In a checkout, export them."
        where = f"libraries read these variables from the environment only. {remedy}"
        yield Finding("ok", "settings", f"{SECRETS_FILE}: {', '.join(strays)}: {where}")


def _kafka(settings: ServiceSettings, loaded: Mapping[type[BaseSettings], Any]) -> Iterator[Finding]:
    errors: list[KafkaError] = []
    try:
        properties = kafka_properties(settings)
        client = admin(properties, on_error=errors.append)
        # Producers and consumers check properties that the admin client ignores.
        for make in (producer, partial(consumer, group="fraudctl")):
            make(properties)
    except SettingsError as error:
        what = "credentials" if str(error).startswith("SASL_") else "client.properties"
        yield Finding("failed", what, str(error).removeprefix("CLIENT_PROPERTIES: "))
        yield from _skipped(("Kafka", "topics", "ACLs"), f"{what} must be fixed first")
        return
    yield Finding("ok", "client.properties", str(settings.client_properties))
    try:
        client.list_topics(timeout=_TIMEOUT_S)
    except KafkaException as exception:
        client.poll(0)  # calls on_error with the errors of the connections
        yield from _unreached(properties, exception.args[0], errors)
        yield from _skipped(("topics", "ACLs"), "Kafka must be reachable first")
        return
    yield Finding("ok", "Kafka", properties["bootstrap.servers"])
    secured = properties.get("security.protocol", "").upper().startswith("SASL")
    yield (
        Finding("ok", "credentials", "accepted")
        if secured
        else Finding("skipped", "credentials", "not needed with this security.protocol")
    )
    try:
        lines = topics.check(properties, [settings.topic_1, settings.topic_2])
        lines += topics.check(properties, [settings.challenger_topic], letters=False)
    except Outage as outage:
        yield Finding("failed", "topics", str(outage))
    else:
        yield from (Finding("failed", "topics", line) for line in lines)
        if not lines:
            yield Finding("ok", "topics", "all topics exist and have the right settings")
    names = [name + suffix for name in (settings.topic_1, settings.topic_2) for suffix in ("", SUFFIX)]
    yield from _acls(client, properties, [*names, settings.challenger_topic], _groups(loaded))


def _unreached(properties: Mapping[str, str], error: KafkaError, errors: list[KafkaError]) -> Iterator[Finding]:
    where = properties["bootstrap.servers"]
    codes = {each.code(): each.str() for each in errors}
    if refused := codes.get(KafkaError._AUTHENTICATION):
        yield Finding("ok", "Kafka", where)
        yield Finding(
            "failed",
            "credentials",
            f"{where} refuses the login: {refused}. Check SASL_USERNAME, SASL_PASSWORD and sasl.mechanisms.",
        )
    else:
        reason = codes.get(KafkaError._SSL) or codes.get(KafkaError._RESOLVE) or error.str()
        remedy = "Check that it runs, and check bootstrap.servers and security.protocol in client.properties."
        yield Finding("failed", "Kafka", f"cannot reach {where}: {reason}. {remedy}")
        yield from _skipped(("credentials",), "Kafka must be reachable first")


def _acls(client: AdminClient, properties: Mapping[str, str], names: list[str], groups: list[str]) -> Iterator[Finding]:
    """Check that this login has the operator's permissions, which docs/security.md lists."""
    lacking: dict[str, list[str]] = {}
    try:
        for operation, name in _lacking(client, properties, names, groups):
            lacking.setdefault(operation, []).append(name)
    except KafkaException as exception:
        yield Finding(
            "failed", "ACLs", f"cannot be checked: {exception.args[0].str()}. Run this again when all brokers are up."
        )
        return
    if lacking:
        missing = "; ".join(f"{operation} on {', '.join(names)}" for operation, names in lacking.items())
        remedy = "Use the operator's login, or grant the permissions with kafka-acls.sh --add, as in docs/security.md."
        yield Finding("failed", "ACLs", f"this login lacks {missing}. {remedy}")
    else:
        others = "a service that uses another login reports its missing permissions in its own log"
        yield Finding("ok", "ACLs", f"this login has every permission that fraudctl needs; {others}")


def _lacking(
    client: AdminClient, properties: Mapping[str, str], names: list[str], groups: list[str]
) -> Iterator[tuple[str, str]]:
    """Yield each missing permission as an operation and a resource.

    Raises KafkaException if the permissions cannot be checked.
    """
    existing = []
    described = client.describe_topics(
        TopicCollection(names), include_authorized_operations=True, request_timeout=_TIMEOUT_S
    )
    for name, answer in described.items():
        error = _expected(answer.result, KafkaError.UNKNOWN_TOPIC_OR_PART, *DENIED)
        if error == KafkaError.UNKNOWN_TOPIC_OR_PART:
            continue
        existing.append(name)
        allowed = [] if error else answer.result().authorized_operations
        if allowed is not None:  # None if the broker does not report permissions
            yield from ((word, name) for operation, word in _ON_TOPICS.items() if operation not in allowed)
    # Create may be granted on the cluster or on a topic. Trying to create an existing topic changes nothing, and shows
    # whether this login has the permission.
    tried = [NewTopic(name, num_partitions=1) for name in existing]
    created = client.create_topics(tried, validate_only=True, request_timeout=_TIMEOUT_S) if tried else {}
    for name, done in created.items():
        if _expected(done.result, KafkaError.TOPIC_ALREADY_EXISTS, *DENIED) in DENIED:
            yield "Create", name
    asked = client.describe_consumer_groups(groups) if groups else {}
    for group, answer in asked.items():
        if _expected(partial(status.answered, answer), *status.PASSING, *DENIED) in DENIED:
            yield "Describe", f"group {group}"
    transactional = producer(properties, transactional_id=_TRANSACTIONAL_ID)
    if _expected(lambda: transactional.init_transactions(status.COORDINATOR_S), *DENIED):
        yield "Write", f"transactional id {_TRANSACTIONAL_ID}"


def _expected(ask: Callable[[], object], *codes: int) -> int | None:
    """Call `ask`, and return the code of its error, or None. Raises KafkaException if the code is not in `codes`."""
    try:
        ask()
    except KafkaException as exception:
        code: int = exception.args[0].code()
        if code not in codes:
            raise
        return code
    return None


def _groups(loaded: Mapping[type[BaseSettings], Any]) -> list[str]:
    """Return the consumer groups that `status` queries, except the groups of services whose settings are invalid."""
    services = {service.name: loaded[service.settings] for service in catalogue.SERVICES if service.settings in loaded}
    return [each.group for each in status.configured_groups(services)]


def _mlflow(settings: RegistrySettings, clocks: Clocks) -> Iterator[Finding]:
    uri, name, alias = settings.mlflow_tracking_uri, settings.model_name, settings.model_alias
    try:
        version = registry.version_with_alias(settings, alias)
    except Outage as outage:
        yield Finding("failed", "MLflow", without_credentials(_line(outage)))
        yield from _skipped((alias,), "MLflow must be reachable first")
        return
    yield Finding("ok", "MLflow", without_credentials(uri))
    if uri.startswith("http"):
        try:
            began = time.time()
            with Client() as client:
                answer = client.send("HEAD", uri, timeout_s=_TIMEOUT_S, most_bytes=0)
            _note("MLflow", answer, began, clocks)
        except Outage:
            pass  # MLflow responded a moment ago, so only its clock remains unknown
    if version is None:
        remedy = "Run `fraudctl train` or `fraudctl promote VERSION`, or change MODEL_NAME."
        yield Finding("failed", alias, f"no version of {name} has the alias {alias}. {remedy}")
        return
    try:
        _read_artifact(settings, f"models:/{name}/{version}/MLmodel")
    except Exception as error:  # an error of MLflow's client, its transport or the artifact store
        reason = without_credentials(_line(error))
        remedy = "Check the artifact store's address and credentials."
        yield Finding("failed", alias, f"the files of version {version} cannot be read: {reason}. {remedy}")
    else:
        yield Finding("ok", alias, f"{name} version {version}; its files can be read")


def _read_artifact(settings: RegistrySettings, uri: str) -> None:
    """Read a file of a model. Raises any exception of MLflow, its transport or the artifact store."""
    registry.limit_mlflow()
    settings.set_up_mlflow()

    import mlflow

    mlflow.set_tracking_uri(settings.mlflow_tracking_uri)
    mlflow.artifacts.load_text(uri)


def _database(settings: DatabaseSettings, clocks: Clocks) -> Iterator[Finding]:
    try:
        address = database.Address(settings.database_url.get_secret_value())
    except SettingsError as error:
        yield Finding("failed", "database", f"{error}. Write the URL as postgresql://user:password@host:5432/name.")
        yield from _skipped(("migrations", "privileges"), "the database must be reachable first")
        return
    try:
        with database.transaction(address) as first:
            began = time.time()
            now = float(first("SELECT extract(epoch FROM clock_timestamp()) AS now").now)
            clocks.append(("database", _ahead(now, now, began)))
            schema = database.schema(first)
    except Outage as outage:
        yield Finding("failed", "database", str(outage))
        yield from _skipped(("migrations", "privileges"), "the database must be reachable first")
        return
    yield Finding("ok", "database", str(address))
    newest = database.newest_schema()
    if schema != newest:
        remedy = (
            "Run `fraudctl migrate` as the tables' owner, or restart the db_sink if its role is allowed to migrate."
        )
        yield Finding("failed", "migrations", f"the schema version is {schema or 'none'}, not {newest}. {remedy}")
        yield from _skipped(("privileges",), "the schema must be migrated first")
        return
    yield Finding("ok", "migrations", f"the schema has the newest version, {newest}")
    remedy = f"If {address.user} is the db_sink's role, grant it the privileges in deploy/grants.sql."
    try:
        with database.transaction(address) as first:
            row = first(_PRIVILEGES, {"table": _TABLE})
    except Outage as outage:
        yield Finding("failed", "privileges", str(outage))
        return
    if lacking := [name for name, granted in zip(_PRIVILEGE_NAMES, row, strict=True) if not granted]:
        yield Finding("failed", "privileges", f"{address.user} lacks {', '.join(lacking)}. {remedy}")
    else:
        yield Finding("ok", "privileges", f"{address.user} may read and write the table, and use temporary tables")


_PRIVILEGE_NAMES = ("SELECT", "INSERT", "UPDATE", "TEMPORARY")
_PRIVILEGES = """
SELECT has_table_privilege(%(table)s, 'SELECT') AS may_select, has_table_privilege(%(table)s, 'INSERT') AS may_insert,
  has_table_privilege(%(table)s, 'UPDATE') AS may_update,
  has_database_privilege(current_database(), 'TEMPORARY') AS may_create_temporary
"""


def _smtp(settings: AlerterSettings) -> Iterator[Finding]:
    if not settings.smtp_host:
        yield Finding("skipped", "SMTP", "SMTP_HOST is not set, so alarms are sent by webhook only")
        return
    where = f"the mail server {settings.smtp_host}:{settings.smtp_port}"
    try:
        connection = mailer(settings.model_copy(update={"smtp_timeout_seconds": _TIMEOUT_S})).connect()
        connection.noop()
        connection.close()
    except smtplib.SMTPAuthenticationError as error:
        remedy = "Check SMTP_USERNAME and SMTP_PASSWORD."
        yield Finding("failed", "SMTP", f"{where} refuses the login ({error.smtp_code}). {remedy}")
    except smtplib.SMTPNotSupportedError:
        yield Finding("failed", "SMTP", f"{where} does not offer STARTTLS or a login. {_SMTP_TLS_REMEDY}")
    except ssl.SSLError as error:
        reason = f"TLS failed ({error.reason or type(error).__name__})"
        yield Finding("failed", "SMTP", f"{where}: {reason}. {_SMTP_TLS_REMEDY} Check the server's certificate, too.")
    except smtplib.SMTPResponseException as error:
        reply = error.smtp_error.decode(errors="replace") if isinstance(error.smtp_error, bytes) else error.smtp_error
        yield Finding("failed", "SMTP", f"{where} answered {error.smtp_code} {without_digits(reply)}")
    except smtplib.SMTPServerDisconnected as error:
        reason = why_unreachable(error, default="connection closed by the server")
        yield Finding("failed", "SMTP", f"cannot reach {where}: {reason}. {_SMTP_REMEDY}")
    except smtplib.SMTPException as error:
        yield Finding("failed", "SMTP", f"{where}: {_line(error)}. {_SMTP_REMEDY}")
    except (OSError, UnicodeError) as error:
        yield Finding("failed", "SMTP", f"cannot reach {where}: {_connection_reason(error)}. {_SMTP_REMEDY}")
    else:
        login = ", login accepted" if settings.smtp_username else ""
        yield Finding("ok", "SMTP", f"{settings.smtp_host}:{settings.smtp_port}{login}")


_SMTP_REMEDY = "Check that it runs, and check SMTP_HOST, SMTP_PORT and SMTP_TLS."
_SMTP_TLS_REMEDY = "Set SMTP_TLS to what the server offers: starttls (port 587), implicit (port 465) or none."


def _connection_reason(error: Exception) -> str:
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    if isinstance(error, TimeoutError):
        return f"no response within {_TIMEOUT_S:.0f} s"
    if isinstance(error, socket.gaierror | UnicodeError):
        return "its host name is unknown"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return _line(error)


def _api(settings: ProducerSettings, clocks: Clocks) -> Iterator[Finding]:
    what, url = "API contract", without_credentials(str(settings.api_url))
    client = Client()
    began = time.time()
    try:
        answer = fetch(client, str(settings.api_url), timeout_s=_TIMEOUT_S, most_bytes=settings.api_max_bytes)
        _note("payments API", answer, began, clocks)
        rows = read_split(answer.body)
    except Outage as outage:
        if str(outage) == "HTTP 429":
            yield Finding(
                "skipped", what, "the API limits the rate of calls (HTTP 429). Wait a minute, and run this again."
            )
        else:
            remedy = f"Check API_URL, and the output of `curl {url}`."
            yield Finding("failed", what, f"cannot fetch transactions from {url}: {outage}. {remedy}")
    except Poison as poison:
        remedy = f"Check API_URL, and the output of `curl {url}`."
        yield Finding("failed", what, f"the response from {url} has no transactions: {_line(poison)}. {remedy}")
    else:
        if rows.bad:
            remedy = "List such records with `fraudctl dead-letters list`."
            yield Finding("failed", what, f"{url} returned an invalid transaction: {rows.bad[0].reason}. {remedy}")
        else:
            yield Finding("ok", what, f"{url}: {len(rows.transactions)} transactions in one response")
    finally:
        client.close()


def _clock(clocks: Clocks) -> Finding:
    if not clocks:
        return Finding("skipped", "clock skew", "no other system reported its time")
    who, ahead_s = max(clocks, key=lambda clock: abs(clock[1]))
    if abs(ahead_s) > _MAX_SKEW_S:
        direction = "ahead of" if ahead_s > 0 else "behind"
        text = f"{who} is {abs(ahead_s):.0f} s {direction} this machine. Set up NTP on both (timedatectl)."
        return Finding("failed", "clock skew", text)
    systems = ", ".join(name for name, _ in clocks)
    text = f"this machine's clock differs by at most {_MAX_SKEW_S:.0f} s from the clocks of: {systems}"
    return Finding("ok", "clock skew", text)


def _note(who: str, answer: Answer, began: float, clocks: Clocks) -> None:
    """Append the server's clock skew to `clocks`. The server's time is the response's Date header, in whole seconds."""
    try:
        date = email.utils.parsedate_to_datetime(answer.headers["Date"]).timestamp()
    except (KeyError, ValueError):
        return
    clocks.append((who, _ahead(date, date + 1, began)))


def _ahead(earliest: float, latest: float, began: float) -> float:
    """Return the smallest possible difference between another clock and this machine's clock, in seconds.

    The difference is positive if the other clock is ahead, and negative if it is behind. At some moment between `began`
    and now, the other clock showed a time between `earliest` and `latest`.
    """
    return max(0.0, earliest - time.time()) + min(0.0, latest - began)


def _skipped(names: tuple[str, ...], why: str) -> Iterator[Finding]:
    yield from (Finding("skipped", name, why) for name in names)


def _line(error: Exception) -> str:
    return one_line(f"{error or type(error).__name__}", limit=300).removesuffix(".")
