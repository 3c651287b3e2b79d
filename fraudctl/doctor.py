"""Everything that the services need, tried once: a line each, and the remedy where it fails."""

import email.utils
import os
import smtplib
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Literal, NamedTuple

import mlflow
import requests
import sqlalchemy as sa
from confluent_kafka import KafkaError, KafkaException, TopicCollection
from confluent_kafka.admin import AclOperation, AdminClient  # type: ignore[attr-defined]
from confluent_kafka.cimpl import NewTopic
from dotenv import dotenv_values
from pydantic_settings import BaseSettings

from fraudctl import status
from fraudctl.labels import transaction
from services.alerter.channels import configured, mailer
from services.alerter.settings import AlerterSettings
from services.db_sink.settings import SinkSettings
from services.db_sink.table import TABLE, connect, versions
from services.predictor.settings import PredictorSettings
from services.producer.api import fetch
from services.producer.settings import ProducerSettings
from shared.dead_letters import SUFFIX
from shared.errors import Outage, Poison, SettingsError
from shared.kafka import topics
from shared.kafka.clients import DENIED, admin, consumer, producer
from shared.privacy import without_credentials
from shared.records import read_split
from shared.settings import SECRETS_FILE, ServiceSettings, kafka_properties, load, unknown_variables
from shared.variables import OF_LIBRARIES
from training import aliases

_TIMEOUT_S = 8.0
_MOST_SKEW_S = 5.0  # clocks that follow NTP differ by milliseconds; ages and limits are told in seconds

_SERVICES = (ProducerSettings, PredictorSettings, AlerterSettings, SinkSettings)
_ON_TOPICS = {
    AclOperation.READ: "Read",
    AclOperation.WRITE: "Write",
    AclOperation.DESCRIBE_CONFIGS: "DescribeConfigs",
}
_TRANSACTIONAL_ID = "fraudctl-doctor"

Clocks = list[tuple[str, float]]
"""Who else told the time, and by how many seconds it was ahead of this machine's."""


class Finding(NamedTuple):
    """What became of a check."""

    verdict: Literal["ok", "failed", "skipped"]
    what: str
    text: str

    def __str__(self) -> str:
        return f"{self.verdict:8} {self.what}: {self.text}"


def examine() -> list[Finding]:
    """All checks, those of different systems at the same time."""
    loaded: dict[type[BaseSettings], Any] = {}
    problems: list[str] = []
    for kind in (ServiceSettings, *_SERVICES):
        try:
            loaded[kind] = load(kind)
            if kind is AlerterSettings:
                configured(loaded[kind])
        except SettingsError as error:
            problems += [each for each in str(error).split("; ") if each not in problems]
    clocks: Clocks = []
    areas: list[tuple[str, type[BaseSettings], Callable[[Any], Iterator[Finding]]]] = [
        ("Kafka", ServiceSettings, lambda settings: _kafka(settings, loaded)),
        ("MLflow", PredictorSettings, lambda settings: _mlflow(settings, clocks)),
        ("database", SinkSettings, lambda settings: _database(settings, clocks)),
        ("SMTP", AlerterSettings, _smtp),
        ("API contract", ProducerSettings, lambda settings: _api(settings, clocks)),
    ]

    def explore(area: tuple[str, type[BaseSettings], Callable[[Any], Iterator[Finding]]]) -> list[Finding]:
        what, kind, check = area
        return list(check(loaded[kind])) if kind in loaded else [Finding("skipped", what, "its settings come first")]

    with ThreadPoolExecutor(len(areas)) as pool:
        explored = list(pool.map(explore, areas))
    first = Finding(
        "failed" if problems else "ok",
        "settings",
        f"{'; '.join(problems)}: in secrets.env or in the environment" if problems else "those of all four services",
    )
    return [first, *_names(), *(finding for findings in explored for finding in findings), _clock(clocks)]


def _names() -> Iterator[Finding]:
    """Those of `secrets.env` and of the environment, as far as they are no settings."""
    try:
        unknown = unknown_variables()
    except SettingsError:  # which is among the settings' problems
        return
    for name, meant in unknown.items():
        hint = f": is it {meant}?" if meant else ""
        yield Finding("failed", "settings", f"nobody reads {name}, in {SECRETS_FILE} or in the environment{hint}")
    if strays := sorted({*OF_LIBRARIES} & {*dotenv_values(SECRETS_FILE)} - {*os.environ}):
        where = "read by libraries, from the environment alone: compose puts it there, a checkout does not"
        yield Finding("ok", "settings", f"{SECRETS_FILE}: {', '.join(strays)}: {where}")


def _kafka(settings: ServiceSettings, loaded: Mapping[type[BaseSettings], Any]) -> Iterator[Finding]:
    errors: list[KafkaError] = []
    try:
        properties = kafka_properties(settings)
        client = admin(properties, on_error=errors.append)
        for make in (producer, partial(consumer, group="fraudctl")):  # which take more of the file
            make(properties)
    except SettingsError as error:
        what = "credentials" if str(error).startswith("SASL_") else "client.properties"
        yield Finding("failed", what, str(error).removeprefix("CLIENT_PROPERTIES: "))
        yield from _moot(("Kafka", "topics", "ACLs"), f"{what} come first")
        return
    yield Finding("ok", "client.properties", str(settings.client_properties))
    try:
        client.list_topics(timeout=_TIMEOUT_S)
    except KafkaException as exception:
        client.poll(0)  # which hands over what happened on the connections
        yield from _unreached(properties, exception.args[0], errors)
        yield from _moot(("topics", "ACLs"), "Kafka comes first")
        return
    yield Finding("ok", "Kafka", properties["bootstrap.servers"])
    secured = properties.get("security.protocol", "").upper().startswith("SASL")
    yield (
        Finding("ok", "credentials", "accepted")
        if secured
        else Finding("skipped", "credentials", "security.protocol asks for none")
    )
    try:
        lines = topics.check(properties, [settings.topic_1, settings.topic_2])
        lines += topics.check(properties, [settings.challenger_topic], letters=False)
    except Outage as outage:
        yield Finding("failed", "topics", str(outage))
    else:
        yield from (Finding("failed", "topics", line) for line in lines)
        if not lines:
            yield Finding("ok", "topics", "all there, with the settings they need")
    names = [name + suffix for name in (settings.topic_1, settings.topic_2) for suffix in ("", SUFFIX)]
    yield from _acls(client, properties, [*names, settings.challenger_topic], _groups(loaded))


def _unreached(properties: Mapping[str, str], error: KafkaError, errors: list[KafkaError]) -> Iterator[Finding]:
    where = properties["bootstrap.servers"]
    codes = {each.code(): each.str() for each in errors}
    if refused := codes.get(KafkaError._AUTHENTICATION):
        yield Finding("ok", "Kafka", where)
        yield Finding("failed", "credentials", f"{refused}: SASL_USERNAME, SASL_PASSWORD and sasl.mechanisms")
    else:
        reason = codes.get(KafkaError._SSL) or codes.get(KafkaError._RESOLVE) or error.str()
        remedy = "is it running, and are bootstrap.servers and security.protocol in client.properties its own?"
        yield Finding("failed", "Kafka", f"{where}: {reason}: {remedy}")
        yield from _moot(("credentials",), "Kafka comes first")


def _acls(client: AdminClient, properties: Mapping[str, str], names: list[str], groups: list[str]) -> Iterator[Finding]:
    """Whether these credentials may do what fraudctl does: docs/security.md lists it as the operator's."""
    lacking: dict[str, list[str]] = {}
    try:
        for operation, name in _lacking(client, properties, names, groups):
            lacking.setdefault(operation, []).append(name)
    except KafkaException as exception:
        yield Finding("failed", "ACLs", f"not known: {exception.args[0].str()}: once more when all brokers answer")
        return
    if lacking:
        told = "; ".join(f"{operation} on {', '.join(lacked)}" for operation, lacked in lacking.items())
        remedy = "is it the operator's? kafka-acls.sh --add --allow-principal ... as in docs/security.md"
        yield Finding("failed", "ACLs", f"this login lacks {told}: {remedy}")
    else:
        theirs = "the services' logins may be others, and what those lack is in the services' logs"
        yield Finding("ok", "ACLs", f"all that fraudctl needs; {theirs}")


def _lacking(
    client: AdminClient, properties: Mapping[str, str], names: list[str], groups: list[str]
) -> Iterator[tuple[str, str]]:
    """Each right that is missing: an operation, and on what. Raises KafkaException where that cannot be told."""
    there = []
    described = client.describe_topics(
        TopicCollection(names), include_authorized_operations=True, request_timeout=_TIMEOUT_S
    )
    for name, answer in described.items():
        error = _expected(answer.result, KafkaError.UNKNOWN_TOPIC_OR_PART, *DENIED)
        if error == KafkaError.UNKNOWN_TOPIC_OR_PART:
            continue
        there.append(name)
        allowed = [] if error else answer.result().authorized_operations
        if allowed is not None:  # a broker that does not tell
            yield from ((word, name) for operation, word in _ON_TOPICS.items() if operation not in allowed)
    # Who may create on the cluster may create a topic, too: of one that is there, nothing is created.
    present = [NewTopic(name, num_partitions=1) for name in there]
    created = client.create_topics(present, validate_only=True, request_timeout=_TIMEOUT_S) if present else {}
    for name, done in created.items():
        if _expected(done.result, KafkaError.TOPIC_ALREADY_EXISTS, *DENIED) in DENIED:
            yield "Create", name
    asked = client.describe_consumer_groups(groups) if groups else {}
    for group, answer in asked.items():
        if _expected(partial(status.answered, answer), *status.PASSING, *DENIED) in DENIED:
            yield "Describe", f"group {group}"
    client_of_its_own = producer(properties, transactional_id=_TRANSACTIONAL_ID)
    if _expected(lambda: client_of_its_own.init_transactions(status.FIRST_S), *DENIED):
        yield "Write", f"transactional id {_TRANSACTIONAL_ID}"


def _expected(ask: Callable[[], object], *codes: int) -> int | None:
    """The code of the error, if there is one. Raises KafkaException for any but these."""
    try:
        ask()
    except KafkaException as exception:
        code: int = exception.args[0].code()
        if code not in codes:
            raise
        return code
    return None


def _groups(loaded: Mapping[type[BaseSettings], Any]) -> list[str]:
    """Those that status asks about; none before the settings are right."""
    kinds = (PredictorSettings, AlerterSettings, SinkSettings)
    if not all(kind in loaded for kind in kinds):
        return []
    return [group for _, group, _ in status.Settings(*(loaded[kind] for kind in kinds)).readers]


def _mlflow(settings: PredictorSettings, clocks: Clocks) -> Iterator[Finding]:
    settings.log_in()
    uri, name, alias = settings.mlflow_tracking_uri, settings.model_name, settings.model_alias
    try:
        version = aliases.bearer(aliases.Alias(uri, name, alias))
    except Outage as outage:
        remedy = "is it running, and are MLFLOW_TRACKING_URI, _USERNAME and _PASSWORD its own?"
        yield Finding("failed", "MLflow", f"{_line(outage)}: {remedy}")
        yield from _moot((alias,), "MLflow comes first")
        return
    yield Finding("ok", "MLflow", without_credentials(uri))
    if uri.startswith("http"):
        try:
            began = time.time()
            _note("MLflow", requests.head(uri, timeout=_TIMEOUT_S), began, clocks)
        except requests.RequestException:
            pass  # it has just answered: its clock is all that is missing
    if version is None:
        yield Finding("failed", alias, f"no version of {name} is {alias}: fraudctl train or promote, or MODEL_NAME")
        return
    try:
        mlflow.set_tracking_uri(uri)
        mlflow.artifacts.load_text(f"models:/{name}/{version}/MLmodel")
    except Exception as error:  # the client's, its transport's, or an artifact store's own
        reason = without_credentials(_line(error))
        remedy = "is the artifact store's address right, and are its credentials?"
        yield Finding("failed", alias, f"version {version} cannot be fetched: {reason}: {remedy}")
    else:
        yield Finding("ok", alias, f"{name} version {version}, and its files are there")


def _database(settings: SinkSettings, clocks: Clocks) -> Iterator[Finding]:
    try:
        engine = connect(settings.database_url.get_secret_value())
    except ValueError as error:
        yield Finding("failed", "database", f"DATABASE_URL: {error}: postgresql://user:password@host:5432/name")
        yield from _moot(("migrations", "privileges"), "database comes first")
        return
    try:
        with transaction(engine) as connection:
            began = time.time()
            told = float(connection.execute(sa.text("SELECT extract(epoch FROM clock_timestamp())")).scalar_one())
            clocks.append(("database", _ahead(told, told, began)))
    except Outage as outage:
        remedy = "is it running, and are user, password, host and name in DATABASE_URL its own?"
        yield Finding("failed", "database", f"{str(outage).removeprefix('database: ')}: {remedy}")
        yield from _moot(("migrations", "privileges"), "database comes first")
        return
    role = engine.url.username
    whose = f"is {role} the db_sink's role? deploy/grants.sql has what that may do"
    yield Finding("ok", "database", f"{engine.url.host}:{engine.url.port or 5432}/{engine.url.database}")
    try:
        present, newest = versions(engine)
        if present != newest:
            remedy = "the db_sink migrates it when it starts, with a role that may: see its log"
            yield Finding("failed", "migrations", f"the schema is {present or 'not there'}, not {newest}: {remedy}")
            yield from _moot(("privileges",), "migrations come first")
            return
        yield Finding("ok", "migrations", f"{newest} is the newest")
        with transaction(engine) as connection:
            row = connection.execute(sa.text(_PRIVILEGES), {"table": TABLE}).one()
        lacking = [name for name, granted in row._mapping.items() if not granted]
        if lacking:
            yield Finding("failed", "privileges", f"{role} lacks {', '.join(lacking)}: {whose}")
        else:
            yield Finding("ok", "privileges", f"{role} may read, write and use temporary tables")
    except Outage as outage:
        yield Finding("failed", "privileges", f"{outage}: {whose}")
    finally:
        engine.dispose()


_PRIVILEGES = """
SELECT has_table_privilege(:table, 'SELECT') AS "SELECT", has_table_privilege(:table, 'INSERT') AS "INSERT",
  has_table_privilege(:table, 'UPDATE') AS "UPDATE",
  has_database_privilege(current_database(), 'TEMPORARY') AS "TEMPORARY"
"""


def _smtp(settings: AlerterSettings) -> Iterator[Finding]:
    if not settings.smtp_host:
        yield Finding("skipped", "SMTP", "SMTP_HOST is not set: alarms go by webhook alone")
        return
    where = f"{settings.smtp_host}:{settings.smtp_port}"
    try:
        connection = mailer(settings.model_copy(update={"smtp_timeout_seconds": _TIMEOUT_S})).connect()
        connection.noop()
        connection.close()
    except smtplib.SMTPAuthenticationError as error:
        yield Finding("failed", "SMTP", f"{where} refuses the login ({error.smtp_code}): SMTP_USERNAME, SMTP_PASSWORD")
    except (ssl.SSLError, smtplib.SMTPNotSupportedError) as error:
        remedy = "SMTP_TLS (starttls with port 587, implicit with 465), or its certificate"
        yield Finding("failed", "SMTP", f"{where}: {_line(error)}: {remedy}")
    except (smtplib.SMTPException, OSError, UnicodeError) as error:
        yield Finding("failed", "SMTP", f"{where}: {_line(error)}: is it running, SMTP_HOST, SMTP_PORT, SMTP_TLS")
    else:
        yield Finding("ok", "SMTP", f"{where}{', login accepted' if settings.smtp_username else ''}")


def _api(settings: ProducerSettings, clocks: Clocks) -> Iterator[Finding]:
    what, url = "API contract", without_credentials(str(settings.api_url))
    session = requests.Session()
    began = time.time()
    session.hooks["response"].append(lambda answer, *_, **__: _note("payments API", answer, began, clocks))
    try:
        rows = read_split(fetch(session, str(settings.api_url), timeout_s=_TIMEOUT_S))
    except Outage as outage:
        if str(outage) == "HTTP 429":
            yield Finding("skipped", what, "it answers, and asks for fewer calls: again in a minute")
        else:
            yield Finding("failed", what, f"{url}: {outage}: is it API_URL, and does curl get an answer from it?")
    except Poison as poison:
        yield Finding("failed", what, f"{url}: {_line(poison)}: is it API_URL, and what does curl show?")
    else:
        if rows.bad:
            yield Finding("failed", what, f"{rows.bad[0].reason}: see fraudctl dead-letters list")
        else:
            yield Finding("ok", what, f"{url}: {len(rows.transactions)} transactions in one answer")
    finally:
        session.close()


def _clock(clocks: Clocks) -> Finding:
    if not clocks:
        return Finding("skipped", "clock skew", "nobody told the time")
    who, ahead_s = max(clocks, key=lambda clock: abs(clock[1]))
    if abs(ahead_s) > _MOST_SKEW_S:
        direction = "ahead of" if ahead_s > 0 else "behind"
        text = f"{who} is {abs(ahead_s):.0f} s {direction} this machine: have both follow NTP (timedatectl)"
        return Finding("failed", "clock skew", text)
    return Finding("ok", "clock skew", f"none beyond {_MOST_SKEW_S:.0f} s: {', '.join(name for name, _ in clocks)}")


def _note(who: str, answer: requests.Response, began: float, clocks: Clocks) -> None:
    """By its Date header, which leaves out what is less than a second."""
    try:
        told = email.utils.parsedate_to_datetime(answer.headers["Date"]).timestamp()
    except (KeyError, ValueError):
        return
    clocks.append((who, _ahead(told, told + 1, began)))


def _ahead(earliest: float, latest: float, began: float) -> float:
    """How far a clock that showed a time between these two, at a time between `began` and now, is ahead at least."""
    return max(0.0, earliest - time.time()) + min(0.0, latest - began)


def _moot(names: tuple[str, ...], why: str) -> Iterator[Finding]:
    yield from (Finding("skipped", name, why) for name in names)


def _line(error: Exception) -> str:
    return " ".join(f"{error or type(error).__name__}".split())[:300]
