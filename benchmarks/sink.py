"""Compare the db_sink with other ways to insert rows, and with its own SQL statements run directly.

Compare the db_sink's speed on an empty table with its speed on a large table.
"""

import io
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache, partial

import pandas as pd
import sqlalchemy as sa
from psycopg2.extras import execute_values
from sqlalchemy.dialects.postgresql import insert

from benchmarks.load import Bench, backlog, memory_bar
from benchmarks.measure import Bar, Figure, Section, side_by_side
from services.db_sink import table
from services.db_sink.table import FEATURES_2, PROVENANCE, Row, connect, copy_text, migrate
from shared.kafka.messages import Record
from shared.provenance import Provenance, to_headers
from shared.records import decode_prediction, encode_prediction, encode_transaction

_BATCH = 1000
Values = Sequence[Mapping[str, object]]
_COLUMNS = (*FEATURES_2, *PROVENANCE)
_WHO = Provenance("fraud", "1", 0.01, 1_730_134_684_025, 0, 12_345)


def against_postgres(bench: Bench, *, rounds: int, rows: int) -> Section:
    """Compare the rows per second of the db_sink with those of its SQL statements run directly by the benchmark."""
    source = _predicted(bench, rows)
    found = side_by_side(
        {"COPY and upsert": lambda: _alone(bench, rows, bare=False), "db_sink": lambda: drained(bench, source, rows)},
        rounds=rounds,
    )
    return Section("The db_sink and PostgreSQL alone", _settings(rows), ("rows/s",), found, [_of_its_limit(found)])


def throughput(bench: Bench, *, rounds: int, rows: int) -> Section:
    """Compare the db_sink with common alternatives, and with its own SQL statements run directly by the benchmark."""
    source = _predicted(bench, rows)
    found = side_by_side(
        {
            "bare COPY": lambda: _alone(bench, rows, bare=True),
            "COPY and upsert": lambda: _alone(bench, rows, bare=False),
            "db_sink": lambda: drained(bench, source, rows),
            "multi-row INSERT": lambda: _timed(bench, _multi_row, rows=20_000),
            "SQLAlchemy, ON CONFLICT": lambda: _timed(bench, _on_conflict, rows=10_000),
            "pandas to_sql, one row at a time": lambda: _timed(bench, _row_by_row, rows=200),
        },
        rounds=rounds,
    )
    sink = found["db_sink"]["rows/s"]
    return Section(
        "The db_sink and other ways into PostgreSQL",
        _settings(rows),
        ("rows/s", "CPU s a million", "MB"),
        found,
        [
            _of_its_limit(found),
            Bar("db_sink / SQLAlchemy, ON CONFLICT", sink.over(found["SQLAlchemy, ON CONFLICT"]["rows/s"]), 6),
            Bar(
                "db_sink / pandas to_sql, one row at a time",
                sink.over(found["pandas to_sql, one row at a time"]["rows/s"]),
                150,
            ),
            memory_bar("db_sink", found["db_sink"]["MB"]),
        ],
    )


def full_table(bench: Bench, *, rounds: int, rows: int, there: int) -> Section:
    """Compare writing to an empty table with writing to a table that already has millions of rows."""
    with filled(bench, rows, [there]) as into:
        source = _predicted(bench, rows)
        found = side_by_side({"0": lambda: drained(bench, source, rows), f"{there:,}": into[there]}, rounds=rounds)
    seen = found[f"{there:,}"]["rows/s"].over(found["0"]["rows/s"])
    return Section(
        "The db_sink and existing rows",
        f"{_settings(rows)}. The first column is the number of rows that the table already has",
        ("rows/s", "CPU s a million", "MB"),
        found,
        [Bar(f"db_sink with {there:,} existing rows / with none", seen, 0.7)],
    )


@contextmanager
def filled(bench: Bench, rows: int, sizes: Sequence[int]) -> Iterator[Mapping[int, Callable[[], dict[str, float]]]]:
    """Yield a mapping from each size to a function that measures the db_sink on a table with this many rows.

    Each call of the function stores `rows` rows in the table.
    """
    source = _predicted(bench, rows)
    with ExitStack() as databases:
        into = {}
        for size in sizes:
            url = databases.enter_context(database(bench))
            _fill_table(url, size)
            into[size] = partial(_into, bench, url, source, rows)
        yield into


def _of_its_limit(found: Mapping[str, Mapping[str, Figure]]) -> Bar:
    seen = found["db_sink"]["rows/s"].over(found["COPY and upsert"]["rows/s"])
    return Bar("db_sink / COPY and upsert alone", seen, 0.7)


def _settings(rows: int) -> str:
    columns = len(_COLUMNS)
    return f"Conditions: {rows:,} rows of {columns} columns, PostgreSQL 18 with default settings, batches of {_BATCH:,}"


def _predicted(bench: Bench, rows: int) -> str:
    (source,) = bench.topics("predicted")
    bench.fill(topic_2_records(source, rows))
    return source


def topic_2_records(topic: str, rows: int) -> Iterator[Record]:
    """Yield the backlog's transactions as topic_2 records, in the form that the predictor writes."""
    headers = to_headers(_WHO)
    for transaction in backlog(rows):
        yield Record(topic, encode_prediction(encode_transaction(transaction), 0), transaction.key, headers)


@contextmanager
def database(bench: Bench) -> Iterator[str]:
    """Create an empty database, yield its URL, and drop the database at the end."""
    name = f"bench_{uuid.uuid4().hex}"
    owner = sa.create_engine(bench.stack.addresses.database_url, isolation_level="AUTOCOMMIT")
    with owner.connect() as connection:
        connection.execute(sa.text(f"CREATE DATABASE {name}"))
    url = sa.make_url(bench.stack.addresses.database_url).set(database=name)
    yield url.render_as_string(hide_password=False)
    with owner.connect() as connection:
        connection.execute(sa.text(f"DROP DATABASE {name} WITH (FORCE)"))
    owner.dispose()


def drained(bench: Bench, source: str, rows: int) -> dict[str, float]:
    """Measure a db_sink while it stores the records of the topic `source` in an empty database."""
    with database(bench) as url:
        return _into(bench, url, source, rows)


def _into(bench: Bench, url: str, source: str, rows: int) -> dict[str, float]:
    with _engine(url) as engine, engine.begin() as connection:
        if sa.inspect(connection).has_table(table.TABLE):  # delete the rows of an earlier round
            connection.execute(sa.text(f"DELETE FROM {table.TABLE} WHERE source_offset = {_WHO.source_offset}"))
    group = f"sink-{uuid.uuid4().hex[:8]}"
    process = bench.service("db_sink", {"TOPIC_2": source, "DB_SINK_GROUP": group, "DATABASE_URL": url})
    return bench.drain([process], group=group, topic=source, rows=rows).quantities()


def _alone(bench: Bench, rows: int, *, bare: bool) -> dict[str, float]:
    """Measure the rate of the db_sink's SQL statements. If `bare`, measure COPY into a table without an index instead.

    The input of COPY is prepared before the measurement starts.
    """
    batches = [copy_text(batch) for batch in _batches(rows)]
    with database(bench) as url, _engine(url) as engine:
        migrate(engine)
        with engine.begin() as connection:
            connection.execute(sa.text(f"CREATE TABLE bare (LIKE {table.TABLE} INCLUDING DEFAULTS)"))
        began = time.monotonic()
        for text in batches:
            if bare:
                with engine.begin() as connection:
                    copy = table.COPY.replace("pg_temp.staging", "bare")
                    connection.connection.cursor().copy_expert(copy, io.BytesIO(text), size=len(text))
            else:
                table.upsert(engine, text)
        return _rate(rows, began)


def _timed(bench: Bench, work: Callable[[sa.Engine, Values], None], *, rows: int) -> dict[str, float]:
    values = [dict(zip(_COLUMNS, table.stored(row), strict=True)) for batch in _batches(rows) for row in batch]
    with database(bench) as url, _engine(url) as engine:
        migrate(engine)
        began = time.monotonic()
        work(engine, values)
        return _rate(rows, began)


def _multi_row(engine: sa.Engine, values: Values) -> None:
    names = ", ".join(f'"{name}"' for name in _COLUMNS)
    statement = f"INSERT INTO {table.TABLE} ({names}) VALUES %s ON CONFLICT DO NOTHING"
    for start in range(0, len(values), _BATCH):
        with engine.begin() as connection:
            rows = [tuple(row.values()) for row in values[start : start + _BATCH]]
            execute_values(connection.connection.cursor(), statement, rows, page_size=_BATCH)


def _on_conflict(engine: sa.Engine, values: Values) -> None:
    target = sa.Table(table.TABLE, sa.MetaData(), autoload_with=engine)
    statement = insert(target)
    key = ("trans_num", "unix_time")
    changed = {name: statement.excluded[name] for name in _COLUMNS if name not in key}
    statement = statement.on_conflict_do_update(index_elements=key, set_=changed)
    for start in range(0, len(values), _BATCH):
        with engine.begin() as connection:
            connection.execute(statement, values[start : start + _BATCH])


def _row_by_row(engine: sa.Engine, values: Values) -> None:
    as_it_comes = sa.create_engine(engine.url)
    for row in values:
        # cc_num may be too large for integers in pandas.
        frame = pd.DataFrame([{**row, "cc_num": str(row["cc_num"])}])
        frame.to_sql(table.TABLE, as_it_comes, if_exists="append", index=False)
    as_it_comes.dispose()


def _fill_table(url: str, rows: int) -> None:
    """Make PostgreSQL generate rows like the backlog's rows, with random transaction numbers and earlier times."""
    first = next(iter(_batches(1)))[0]
    with _engine(url) as engine:
        migrate(engine)
        table.upsert(engine, copy_text([first]))
        with engine.begin() as connection:
            cursor = connection.connection.cursor()
            made = ("trans_num", "unix_time", "source_offset")
            kept = ", ".join(f'"{name}"' for name in _COLUMNS if name not in made)
            cursor.execute(
                f"INSERT INTO {table.TABLE} ({', '.join(made)}, {kept}) "
                f"SELECT md5(number::text), unix_time - {rows} + number - 1, number, {kept} "
                f"FROM {table.TABLE}, generate_series(1, {rows}) AS number"
            )
            cursor.execute(f"DELETE FROM {table.TABLE} WHERE source_offset = {_WHO.source_offset}")
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(sa.text("VACUUM ANALYZE"))
            connection.execute(sa.text("CHECKPOINT"))


@contextmanager
def _engine(url: str) -> Iterator[sa.Engine]:
    engine = connect(url)
    yield engine
    engine.dispose()


@cache
def _batches(rows: int) -> list[list[Row]]:
    found = [
        Row(decode_prediction(encode_prediction(encode_transaction(transaction), 0)), _WHO)
        for transaction in backlog(rows)
    ]
    return [found[start : start + _BATCH] for start in range(0, rows, _BATCH)]


def _rate(rows: int, began: float) -> dict[str, float]:
    seconds = time.monotonic() - began
    return {"rows/s": rows / seconds}
