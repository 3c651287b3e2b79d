"""Exports confirmed transactions to a file that has a training file's header, column order and formats."""

import csv
import sqlite3
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from decimal import Decimal
from pathlib import Path
from typing import IO, Any

import psycopg2
import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

from fraudctl.call import CallError
from services.db_sink.table import TABLE, reason
from shared.errors import Outage
from shared.records import FEATURES

HEADER = ("", *FEATURES)  # the first column is the row number, which is left empty
_S3 = "s3://"
_AT_A_TIME = 5000  # rows
_BOUNDS = (("since", ">="), ("until", "<"))
_TRANS_NUM, _UNIX_TIME = HEADER.index("trans_num"), HEADER.index("unix_time")

Row = Sequence[Any]
Progress = Callable[[int, int], None]
"""A function that is called with the number of rows written so far, and the total number of rows."""


def export(
    engine: sa.Engine, out: str, *, since: int | None, until: int | None, append: bool, progress: Progress
) -> int:
    """Write the confirmed rows with since <= unix_time < until (epoch seconds), sorted by time.

    Returns the number of rows in the new file.

    With `append`, the rows that are already in the file are kept. If a transaction is in both the file and the
    database, the database's row is written. The new file has a temporary name until it is complete.

    Raises CallError if the existing file is not a training file, or if the folder is missing. Raises Outage if the
    database or S3 does not respond, and OSError if a file cannot be read or written.
    """
    with (
        _target(out) as (earlier, partial),
        _confirmed(engine, since=since, until=until) as (total, rows),
        _private(partial) as file,
    ):
        counted = _counted(rows, total, progress)
        if append and earlier.exists():
            counted = _merged(_read(earlier, out), counted, directory=partial.parent)
        writer = csv.writer(file, lineterminator="\n")
        careful = csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_ALL)  # Python 3.11 does not quote \r
        writer.writerow(HEADER)
        written = 0
        for row in counted:
            (careful if any("\r" in value for value in row if isinstance(value, str)) else writer).writerow(row)
            written += 1
    return written


@contextmanager
def _confirmed(engine: sa.Engine, *, since: int | None, until: int | None) -> Iterator[tuple[int, Iterator[Row]]]:
    columns = ", ".join(f'"{name}"' for name in FEATURES)
    bounds = {"since": since, "until": until}
    where = " AND ".join(
        [
            "validated_at IS NOT NULL AND is_fraud IS NOT NULL",
            *(f"unix_time {sign} :{name}" for name, sign in _BOUNDS if bounds[name] is not None),
        ]
    )
    given = {name: bound for name, bound in bounds.items() if bound is not None}
    query = f'SELECT {columns} FROM {TABLE} WHERE {where} ORDER BY unix_time, trans_num COLLATE "C"'  # noqa: S608
    count = f"SELECT count(*) FROM {TABLE} WHERE {where}"  # noqa: S608
    try:
        with engine.connect() as connection:
            connection.execute(sa.text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY"))
            total = connection.execute(sa.text(count), given).scalar_one()
            found = connection.execution_options(yield_per=_AT_A_TIME).execute(sa.text(query), given)
            yield total, map(_row, found)
    except (SQLAlchemyError, psycopg2.Error) as error:
        raise Outage(f"database: {reason(error)}") from None


def _row(found: Iterable[Any]) -> Row:
    return ["", *(int(value) if isinstance(value, Decimal) else value for value in found)]


def _counted(rows: Iterable[Row], total: int, progress: Progress) -> Iterator[Row]:
    for number, row in enumerate(rows):
        if number % _AT_A_TIME == 0:
            progress(number, total)
        yield row
    progress(total, total)


def _read(path: Path, name: str) -> Iterator[Row]:
    with _open(path, "r") as file:
        rows = csv.reader(file)
        header = next(rows, [])
        if tuple(header) != HEADER:
            there, expected = ",".join(header), ",".join(HEADER)
            raise CallError(f"{name} has a different header\n  found:    {there}\n  expected: {expected}")
        for row in rows:
            if len(row) != len(HEADER):
                raise CallError(f"{name}, line {rows.line_num}: {len(row)} values, not {len(HEADER)}")
            if not row[_UNIX_TIME].isdecimal():
                raise CallError(f"{name}, line {rows.line_num}: unix_time is not a number of seconds")
            yield row


def _merged(earlier: Iterable[Row], later: Iterable[Row], *, directory: Path) -> Iterator[Row]:
    """Yield the rows of both sources, sorted by time. If a transaction is in both sources, the row of `later` is used.

    SQLite sorts the rows, because they may not fit into memory.
    """
    with _sorting(directory) as rows:
        columns = ", ".join(f"c{number}" for number in range(len(HEADER)))
        rows.execute(f"CREATE TABLE rows ({columns}, at INTEGER, PRIMARY KEY (at, c{_TRANS_NUM})) WITHOUT ROWID")
        put = f"INSERT OR REPLACE INTO rows VALUES ({', '.join('?' * (len(HEADER) + 1))})"  # noqa: S608 - constants only
        for source in (earlier, later):
            rows.executemany(put, ([*map(str, row), int(row[_UNIX_TIME])] for row in source))
        yield from rows.execute(f"SELECT {columns} FROM rows ORDER BY at, c{_TRANS_NUM}")  # noqa: S608 - constants only


@contextmanager
def _sorting(directory: Path) -> Iterator[sqlite3.Connection]:
    try:
        with tempfile.TemporaryDirectory(dir=directory) as scratch, closing(sqlite3.connect(f"{scratch}/rows")) as rows:
            rows.execute("PRAGMA journal_mode = OFF")
            rows.execute("PRAGMA synchronous = OFF")
            yield rows
    except sqlite3.Error as error:  # usually because the disk is full
        raise OSError(f"cannot sort in {directory}: {error}") from None


@contextmanager
def _target(out: str) -> Iterator[tuple[Path, Path]]:
    """Yield two paths: the path of the earlier file, which may not exist, and the path at which to write the new file.

    At the end, the new file replaces the earlier file.
    """
    if not out.startswith(_S3):
        path = Path(out)
        if not path.parent.is_dir():
            raise CallError(f"cannot write {out}: the folder {path.parent} does not exist")
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch:
            partial = Path(scratch) / "partial"
            yield path, partial
            partial.replace(path)
        return
    try:
        import s3fs
    except ImportError:
        raise CallError(f"cannot write {out}: s3fs is not installed. Run: pip install 'fraud-alarm[s3]'") from None
    with tempfile.TemporaryDirectory() as scratch:
        earlier, partial = Path(scratch) / "earlier", Path(scratch) / "partial"
        with _reached(out):
            bucket = s3fs.S3FileSystem()
            if bucket.exists(out):
                bucket.get_file(out, str(earlier))
        yield earlier, partial
        with _reached(out):
            bucket.put_file(str(partial), out)  # S3 shows an object only once it is complete


@contextmanager
def _reached(out: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # botocore raises many types of errors
        raise Outage(f"cannot reach {out}: {type(error).__name__}: {error}") from None


def _private(path: Path) -> IO[str]:
    """Open a new file, which only the current user can read, because it will contain card numbers and birth dates."""
    path.touch(mode=0o600, exist_ok=False)
    return _open(path, "w")


def _open(path: Path, mode: str) -> IO[str]:
    return path.open(mode, encoding="utf-8", newline="")
