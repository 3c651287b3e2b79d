"""topic_2 to PostgreSQL."""

from pathlib import Path

import pytest
import sqlalchemy as sa
from confluent_kafka import Producer
from conftest import Rig, dead_letter_topic, make_transactions, until

from rehearsal.stack import service
from sandbox.postgres import Postgres
from services.db_sink.table import Row, connect, copy_text, migrate, upsert
from shared.errors import Outage, Poison
from shared.provenance import Provenance, from_headers, to_headers
from shared.records import FEATURES, Prediction, Transaction, encode_prediction, encode_transaction

PROVENANCE = Provenance("fraud", "3", 0.25, 1730134684025, 4, 1234)


@pytest.fixture
def sink_rig(rig: Rig, engine: sa.Engine) -> Rig:
    rig.environment["DATABASE_URL"] = engine.url.render_as_string(hide_password=False)
    return rig


def put_predictions(rig: Rig, batch: list[Transaction], label: int = 0) -> None:
    producer = Producer({**rig.properties, "log_level": 0})
    for each in batch:
        value = encode_prediction(encode_transaction(each), label)
        producer.produce(rig.topic_2, value=value, key=each.key, headers=to_headers(PROVENANCE))
    assert producer.flush(20) == 0


def query(engine: sa.Engine, sql: str) -> list[tuple[object, ...]]:
    with engine.connect() as connection:
        return [tuple(row) for row in connection.execute(sa.text(sql))]


def count(engine: sa.Engine) -> int:
    if not sa.inspect(engine).has_table("transactions"):
        return 0
    return int(str(query(engine, "SELECT count(*) FROM transactions")[0][0]))


def row(transaction: Transaction, label: int = 0, **changes: object) -> Row:
    values = {name: getattr(transaction, name) for name in FEATURES} | changes
    return Row(Prediction(**values, prediction=label), PROVENANCE)


def test_every_row_is_stored_digit_for_digit_with_its_provenance(sink_rig: Rig, engine: sa.Engine) -> None:
    batch = make_transactions(1200)
    batch[0].cc_num = 9_999_999_999_999_999_999
    put_predictions(sink_rig, batch)
    sink_rig.start("db_sink")
    until(lambda: count(engine) == 1200, what="1,200 rows")

    columns = ", ".join(f'"{name}"' for name in FEATURES if name not in ("trans_date_trans_time", "dob", "cc_num"))
    rows = query(
        engine, f"SELECT trans_date_trans_time::text, dob::text, cc_num::text, {columns}, prediction FROM transactions"
    )
    names = [name for name in FEATURES if name not in ("trans_date_trans_time", "dob", "cc_num")]
    wanted = {
        (each.trans_date_trans_time, each.dob, str(each.cc_num), *(getattr(each, name) for name in names), 0)
        for each in batch
    }
    assert set(rows) == wanted
    (provenance,) = query(
        engine,
        "SELECT DISTINCT model_name, model_version, probability, extract(epoch FROM predicted_at)::text,"
        " source_partition, source_offset, validated_at, validated_by, ingested_at > now() - interval '1 minute'"
        " FROM transactions",
    )
    assert provenance == ("fraud", "3", 0.25, "1730134684.025000", 4, 1234, None, None, True)


def test_repeats_change_nothing_and_newer_predictions_win(engine: sa.Engine) -> None:
    migrate(engine)
    first, second = make_transactions(2)

    upsert(engine, copy_text([row(first), row(second)]))
    upsert(engine, copy_text([row(first), row(first, 1), row(first, 1)]))

    assert query(engine, "SELECT trans_num, prediction FROM transactions ORDER BY prediction") == [
        (second.trans_num, 0),
        (first.trans_num, 1),
    ]


def test_the_same_trans_num_at_another_time_is_another_transaction(engine: sa.Engine) -> None:
    migrate(engine)
    (transaction,) = make_transactions(1)

    upsert(engine, copy_text([row(transaction), row(transaction, unix_time=transaction.unix_time + 3600)]))

    assert count(engine) == 2


def test_a_confirmed_label_is_never_overwritten(engine: sa.Engine) -> None:
    migrate(engine)
    confirmed, open_ = make_transactions(2)
    upsert(engine, copy_text([row(confirmed, is_fraud=0), row(open_, is_fraud=0)]))
    with engine.begin() as connection:
        connection.execute(
            sa.text(
                "UPDATE transactions SET is_fraud = 1, validated_at = now(), validated_by = 'ada' WHERE trans_num = :n"
            ),
            {"n": confirmed.trans_num},
        )

    upsert(engine, copy_text([row(confirmed, 1, is_fraud=0), row(open_, 1, is_fraud=None)]))

    assert set(query(engine, "SELECT trans_num, is_fraud, prediction, validated_by FROM transactions")) == {
        (confirmed.trans_num, 1, 1, "ada"),
        (open_.trans_num, None, 1, None),
    }


@pytest.mark.parametrize(
    "text", ["", "\\N", "\\.", 'a"b', "tab\tnew\nline\r", "back\\slash", "naïve 🦊", "'; DROP TABLE x"]
)
def test_any_text_is_stored_as_it_is(engine: sa.Engine, text: str) -> None:
    migrate(engine)
    (transaction,) = make_transactions(1)

    upsert(engine, copy_text([row(transaction, merchant=text, is_fraud=None)]))

    assert query(engine, "SELECT merchant, is_fraud FROM transactions") == [(text, None)]


@pytest.mark.parametrize(
    "changes", [{"merchant": "nul \0"}, {"dob": "1955-13-45"}, {"trans_date_trans_time": "2024-02-30 12:00:00"}]
)
def test_what_postgresql_rejects_is_poison_and_quotes_no_value(engine: sa.Engine, changes: dict[str, object]) -> None:
    migrate(engine)
    (transaction,) = make_transactions(1)

    with pytest.raises(Poison) as poison:
        upsert(engine, copy_text([row(transaction, **changes)]))

    assert not any(character.isdigit() for character in str(poison.value))
    assert count(engine) == 0


def test_a_poisonous_row_is_a_dead_letter_and_its_neighbours_are_stored(sink_rig: Rig, engine: sa.Engine) -> None:
    batch = make_transactions(100)
    batch[42].dob = "1955-13-45"
    put_predictions(sink_rig, batch)
    sink_rig.put(sink_rig.topic_2, [b"rubbish"])
    sink_rig.start("db_sink")
    until(lambda: count(engine) == 99, what="99 rows")

    dead = sink_rig.read(dead_letter_topic(sink_rig.topic_2), 2)

    assert {message.value() for message in dead} == {encode_prediction(encode_transaction(batch[42]), 0), b"rubbish"}


def refuse(engine: sa.Engine, condition: str, sqlstate: str) -> None:
    """Have PostgreSQL itself refuse the rows that the condition holds for."""
    with engine.begin() as connection:
        connection.execute(
            sa.text(f"""
                CREATE OR REPLACE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
                BEGIN
                  IF {condition} THEN RAISE EXCEPTION 'refused' USING ERRCODE = '{sqlstate}'; END IF;
                  RETURN NEW;
                END $$;
                CREATE OR REPLACE TRIGGER refuse BEFORE INSERT ON transactions FOR EACH ROW EXECUTE FUNCTION refuse()
            """)
        )


@pytest.mark.parametrize("sqlstate", ["P0001", "23514", "22003", "44000"])
def test_a_row_that_a_rule_of_the_database_refuses_is_poison(engine: sa.Engine, sqlstate: str) -> None:
    migrate(engine)
    refuse(engine, "NEW.amt > 1e6", sqlstate)
    (transaction,) = make_transactions(1)

    with pytest.raises(Poison, match="refused"):
        upsert(engine, copy_text([row(transaction, amt=2e6)]))


@pytest.mark.parametrize("sqlstate", ["53100", "53200", "55P03", "57014", "40P01", "57P03", "42501", "XX000"])
def test_what_is_no_row_s_fault_is_an_outage(engine: sa.Engine, sqlstate: str) -> None:
    migrate(engine)
    refuse(engine, "true", sqlstate)
    (transaction,) = make_transactions(1)

    with pytest.raises(Outage, match="refused"):
        upsert(engine, copy_text([row(transaction)]))


def test_a_lock_is_waited_for_and_said(sink_rig: Rig, engine: sa.Engine) -> None:
    migrate(engine)
    sink_rig.start("db_sink", BACKOFF_MAX_SECONDS="0.5")
    with engine.begin() as connection:
        connection.execute(sa.text("LOCK TABLE transactions IN ACCESS EXCLUSIVE MODE"))
        put_predictions(sink_rig, make_transactions(20))
        until(lambda: "lock timeout" in sink_rig.log("db_sink"), what="the lock in the log")

    until(lambda: count(engine) == 20, what="20 rows")
    until(lambda: "dead_letters=0" in sink_rig.log("db_sink"), what="the line on the batch")


def test_connections_cut_by_the_server_cost_nothing(sink_rig: Rig, engine: sa.Engine) -> None:
    sink_rig.start("db_sink", MAX_BATCH_SIZE="20", BACKOFF_MAX_SECONDS="0.2")
    cut = (
        "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    for number in range(5):
        put_predictions(sink_rig, make_transactions(500)[100 * number : 100 * number + 100])
        query(engine, cut)

    until(lambda: count(engine) == 500, what="500 rows")
    assert "event='dead_letters'" not in sink_rig.log("db_sink")


def test_when_every_row_is_refused_it_is_the_table(sink_rig: Rig, engine: sa.Engine) -> None:
    migrate(engine)
    refuse(engine, "true", "23514")
    put_predictions(sink_rig, make_transactions(100))
    process = sink_rig.start("db_sink", BACKOFF_MAX_SECONDS="0.2", MAX_BATCH_WAIT_MS="1000")
    until(lambda: process.said("100 of 100 rows refused, too many for bad rows"), what="the refusal in the log")

    with engine.begin() as connection:
        connection.execute(sa.text("DROP TRIGGER refuse ON transactions"))

    until(lambda: count(engine) == 100, what="100 rows")
    assert not process.said("event='dead_letters'")


def test_a_row_that_the_table_refuses_again_and_again_stops_nothing(sink_rig: Rig, engine: sa.Engine) -> None:
    """A hundred in succession are refused, but a good row is not, so they are the cause."""
    migrate(engine)
    batch = make_transactions(150)
    refuse(engine, "NEW.trans_num LIKE 'refused%'", "23514")
    for number, each in enumerate(batch[:100]):
        each.trans_num = f"refused{number}"
    put_predictions(sink_rig, batch)
    sink_rig.start("db_sink")

    until(lambda: count(engine) == 50, what="the other rows")
    letters = sink_rig.read(dead_letter_topic(sink_rig.topic_2), 100)

    assert len(letters) == 100
    assert "event='many_rows_refused'" in sink_rig.log("db_sink")


def test_a_connection_that_became_read_only_is_replaced(engine: sa.Engine) -> None:
    """After a failover, the address may belong to another server while the connection is still to the old one."""
    ours = connect(engine.url.render_as_string(hide_password=False))
    migrate(ours)

    def migrate_from_nothing() -> None:
        with engine.begin() as connection:
            connection.execute(sa.text("DROP SCHEMA public CASCADE"))
            connection.execute(sa.text("CREATE SCHEMA public"))
        migrate(ours)

    for use in (lambda: upsert(ours, copy_text([row(make_transactions(1)[0])])), migrate_from_nothing):
        with ours.connect() as connection:
            connection.execute(sa.text("SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY"))
            connection.commit()
        with pytest.raises(Outage, match="read-only"):
            use()
        use()
    ours.dispose()


def test_what_an_administrator_has_set_or_made_changes_nothing(engine: sa.Engine) -> None:
    url = engine.url
    migrate(engine)
    with engine.begin() as connection:
        for setting in (
            "standard_conforming_strings = off",
            "DateStyle = 'SQL, DMY'",
            "search_path = public, pg_temp",
            "backslash_quote = off",
            "intervalstyle = iso_8601",
            "client_encoding = 'LATIN1'",
            "default_transaction_isolation = 'serializable'",
        ):
            connection.execute(sa.text(f'ALTER DATABASE "{url.database}" SET {setting}'))
        connection.execute(sa.text("CREATE TABLE public.staging (LIKE transactions)"))
    transaction = make_transactions(1)[0]
    transaction.merchant = "back\\slash 'quote' \"double\" \u00fc\u4e2d"
    ours = connect(url.render_as_string(hide_password=False))

    upsert(ours, copy_text([row(transaction)]))
    upsert(ours, copy_text([row(transaction, 1)]))

    ours.dispose()
    assert query(engine, "SELECT merchant, prediction, dob::text FROM transactions") == [
        (transaction.merchant, 1, transaction.dob)
    ]
    assert query(engine, "SELECT count(*) FROM public.staging") == [(0,)]


def test_several_may_start_at_once_on_an_empty_database(sink_rig: Rig, engine: sa.Engine) -> None:
    processes = [service("db_sink", sink_rig.directory, sink_rig.environment, replica=number) for number in (1, 2, 3)]
    sink_rig.processes += processes
    for process in processes:
        process.spawn()
    for process in processes:
        process.wait_ready()

    put_predictions(sink_rig, make_transactions(200))

    until(lambda: count(engine) == 200, what="200 rows")


def test_while_the_database_is_away_nothing_is_lost_or_dead(rig: Rig, tmp_path: Path) -> None:
    with Postgres(tmp_path / "own") as database:
        engine = connect(database.url)
        process = rig.start("db_sink", DATABASE_URL=database.url, BACKOFF_MAX_SECONDS="0.5")
        put_predictions(rig, make_transactions(50))
        until(lambda: count(engine) == 50, what="50 rows")
        database.kill()
        put_predictions(rig, make_transactions(100)[50:])
        until(lambda: "event='outage'" in rig.log("db_sink"), what="the outage in the log")
        assert process.running

        database.start()

        engine.dispose()
        until(lambda: count(engine) == 100, what="100 rows")
        assert process.stop() == 0
        assert "dead_letters=0" in rig.log("db_sink")
        assert "event='dead_letters'" not in rig.log("db_sink")
        engine.dispose()


def test_it_may_start_before_the_database(rig: Rig, tmp_path: Path) -> None:
    database = Postgres(tmp_path / "own")
    process = rig.start("db_sink", ready=False, DATABASE_URL=database.url, BACKOFF_MAX_SECONDS="0.5")
    put_predictions(rig, make_transactions(10))
    until(lambda: "event='outage'" in rig.log("db_sink"), what="the outage in the log")
    assert process.running

    with database:
        engine = connect(database.url)
        until(lambda: count(engine) == 10, what="10 rows")
        process.stop()
        engine.dispose()


@pytest.mark.parametrize("url", ["nonsense", "mysql://root@localhost/x"])
def test_a_wrong_url_is_named_and_not_shown(rig: Rig, url: str) -> None:
    process = service("db_sink", rig.directory, rig.environment | {"DATABASE_URL": url})
    process.spawn()

    assert process.wait(90) == 2
    assert rig.log("db_sink").splitlines()[-1].startswith("db_sink: DATABASE_URL: not a")
    assert url not in rig.log("db_sink")


@pytest.mark.parametrize("url", ["postgresql://fraud:hunter2", "postgresql://fraud:p@hunter2:word@host/db", "hunter2"])
def test_a_wrong_url_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(ValueError, match="not a database URL") as refusal:
        connect(url)
    assert "hunter2" not in str(refusal.value)


def test_headers_that_cannot_be_are_not_there() -> None:
    beyond = to_headers(Provenance("fraud", "3", 1.5, 1730134684025000000, 2**31, -1))

    assert from_headers(beyond) == from_headers([("provenance", b"[" * 9999)]) == from_headers([]) == Provenance()
    assert from_headers(to_headers(PROVENANCE)) == PROVENANCE
