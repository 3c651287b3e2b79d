"""Everything that the services need, tried once: a line each, and the remedy where it fails."""

import email.utils
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
from pydantic_settings import BaseSettings

from fraudctl import topics
from fraudctl.labels import transaction
from services.alerter.__main__ import AlerterSettings, channels, mailer
from services.db_sink.__main__ import SinkSettings
from services.db_sink.table import TABLE, connect, versions
from services.predictor.__main__ import PredictorSettings
from services.producer.__main__ import ProducerSettings
from services.producer.api import fetch
from shared.dead_letters import SUFFIX
from shared.errors import Outage, Poison, SettingsError, without_credentials
from shared.kafka import admin, consumer, producer
from shared.records import read_split
from shared.settings import SECRETS_FILE, ServiceSettings, kafka_properties, load, unknown_variables
from training import aliases

_TIMEOUT_S = 8.0
_FIRST_S = 20.0  # a new broker makes its topics of groups and transactions when it is first asked for any
_MOST_SKEW_S = 5.0  # clocks that follow NTP differ by milliseconds; ages and limits are told in seconds

_SERVICES = (ProducerSettings, PredictorSettings, AlerterSettings, SinkSettings)
_READ_AND_WRITE = {AclOperation.READ, AclOperation.WRITE}

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
                channels(loaded[kind])
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
    strange = [
        Finding("failed", "settings", f"{SECRETS_FILE}: nobody reads {name}{f': is it {meant}?' if meant else ''}")
        for name, meant in unknown_variables().items()
    ]
    return [first, *strange, *(finding for findings in explored for finding in findings), _clock(clocks)]


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
    yield from _acls(client, properties, settings, loaded)


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


def _acls(
    client: AdminClient,
    properties: Mapping[str, str],
    settings: ServiceSettings,
    loaded: Mapping[type[BaseSettings], Any],
) -> Iterator[Finding]:
    """What these credentials may do; those of the services may be others."""
    own = (settings.topic_1, settings.topic_2)
    wanted = {name: _READ_AND_WRITE for topic in own for name in (topic, topic + SUFFIX)}
    groups = ["fraudctl", *_groups(loaded)]
    lacking = []
    try:
        known = client.list_topics(timeout=_TIMEOUT_S).topics
        there = [name for name in wanted if name in known]
        asked = client.describe_topics(
            TopicCollection(there), include_authorized_operations=True, request_timeout=_TIMEOUT_S
        )
        for name, answer in asked.items():
            lacking += _lacking("topic", name, wanted[name], answer.result().authorized_operations)
        described = client.describe_consumer_groups(
            groups, include_authorized_operations=True, request_timeout=_FIRST_S
        )
        for name, answer in described.items():
            lacking += _lacking("group", name, {AclOperation.READ}, answer.result().authorized_operations)
    except KafkaException as exception:
        lacking.append(exception.args[0].str())
    predictor = loaded.get(PredictorSettings)
    if predictor and predictor.delivery == "exactly_once":
        for prefix in ("producer", predictor.predictor_group):
            try:
                producer(properties, transactional_id=f"{prefix}-doctor").init_transactions(_FIRST_S)
            except KafkaException as exception:
                lacking.append(f"transactional ids {prefix}-*: {exception.args[0].str()}")
    if lacking:
        yield Finding("failed", "ACLs", f"{'; '.join(lacking)}: kafka-acls.sh --add --allow-principal ...")
    else:
        yield Finding("ok", "ACLs", f"{', '.join([*there, *(f'group {group}' for group in groups)])}")


def _lacking(kind: str, name: str, wanted: set[AclOperation], allowed: list[AclOperation] | None) -> list[str]:
    """In words; of a broker that does not tell, nothing is known to be lacking."""
    missing = wanted - set(allowed) if allowed else set()
    return [f"{kind} {name} lacks {operation.name}" for operation in sorted(missing, key=str)]


def _groups(loaded: Mapping[type[BaseSettings], Any]) -> list[str]:
    names = ["predictor_group", "alerter_group", "db_sink_group"]
    names += ["webhook_group"] if getattr(loaded.get(AlerterSettings), "webhook_url", None) else []
    return [getattr(settings, name) for settings in loaded.values() for name in names if hasattr(settings, name)]


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
        role = engine.url.username
        if lacking:
            yield Finding("failed", "privileges", f"{role} lacks {', '.join(lacking)}: GRANT ... TO {role}")
        else:
            yield Finding("ok", "privileges", f"{role} may read, write and use temporary tables")
    except Outage as outage:
        yield Finding("failed", "privileges", f"{outage}: GRANT what is missing")
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
