"""The journal: an SQLite file with fetched records that are not on their topics yet, and identities of recent records.

If a producer is killed, no fetched record is lost, and the next producer still recognises repeated records.
"""

import sqlite3
import time
import uuid
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import msgspec

from shared.errors import Outage, SettingsError
from shared.kafka.messages import Record

_SCHEMA = """
CREATE TABLE IF NOT EXISTS journal (id TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS fetched (
  number INTEGER PRIMARY KEY,
  identity BLOB NOT NULL UNIQUE,
  fetched_ms INTEGER NOT NULL,
  record BLOB -- null once the record is on its topic
);
CREATE INDEX IF NOT EXISTS waiting ON fetched (number) WHERE record IS NOT NULL;
"""

_COUNT = "SELECT count(*) FROM fetched WHERE record IS NOT NULL"

_encode = msgspec.msgpack.Encoder().encode


class Entry(NamedTuple):
    """A record that waits to be written.

    After a delivery with an unknown result, the record may already be on its topic.
    """

    number: int
    fetched_ms: int  # epoch milliseconds
    record: Record


class Journal:
    """A file with the waiting records, and with the identities of recent records.

    Several threads may use a journal at once, but only one process can open its file.
    """

    def __init__(self, path: Path, *, remembered: int) -> None:
        """Open or create the file. The file keeps the identities of the last `remembered` records.

        Raises sqlite3.Error on failure. The error's code is SQLITE_BUSY if another process has the file open.
        """
        self._path = path
        self._remembered = remembered
        self._lock = Lock()
        self._file = sqlite3.connect(path, timeout=0, check_same_thread=False)
        try:
            self._file.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._file.execute("PRAGMA journal_mode = WAL")
            self._file.execute("PRAGMA synchronous = FULL")
            self._file.executescript(_SCHEMA)
            with self._file:
                self._file.execute(
                    "INSERT INTO journal SELECT ? WHERE NOT EXISTS (SELECT * FROM journal)", (uuid.uuid4().hex,)
                )
            # The journal's ID stays the same when another process takes over the file.
            ((self.id,),) = self._file.execute("SELECT id FROM journal")
            self._waiting = 0
            ((self._waiting,),) = self._file.execute(_COUNT)
        except BaseException:
            self._file.close()
            raise

    def add(self, records: Iterable[tuple[bytes, Record]]) -> int:
        """Save each (identity, record) whose identity is new. Returns the number of saved records.

        Raises Outage if the disk is full or fails.
        """
        now_ms = time.time_ns() // 1_000_000
        try:
            with self._lock, self._file:
                before = self._file.total_changes
                self._file.executemany(
                    "INSERT OR IGNORE INTO fetched (identity, fetched_ms, record) VALUES (?, ?, ?)",
                    ((identity, now_ms, _encode(record)) for identity, record in records),
                )
                added = self._file.total_changes - before
                self._file.execute(
                    "DELETE FROM fetched WHERE number <= (SELECT max(number) FROM fetched) - ? AND record IS NULL",
                    (self._remembered,),
                )
                return added
        except sqlite3.Error as error:
            raise self._outage(error) from None

    def waiting(self, most: int = -1) -> list[Entry]:
        """Return at most `most` waiting records (default: all), oldest first. Raises Outage if the disk fails."""
        rows = self._read(
            "SELECT number, fetched_ms, record FROM fetched WHERE record IS NOT NULL ORDER BY number LIMIT ?", most
        )
        return [Entry(number, fetched_ms, _decode(record)) for number, fetched_ms, record in rows]

    def count(self) -> int:
        """Return the number of waiting records, or the last known number if the file cannot be read."""
        with suppress(Outage):
            ((self._waiting,),) = self._read(_COUNT)
        return self._waiting

    def written(self, entries: Sequence[Entry]) -> None:
        """Mark entries as written, and keep only their identities. Raises Outage if the disk is full or fails."""
        try:
            with self._lock, self._file:
                self._file.executemany(
                    "UPDATE fetched SET record = NULL WHERE number = ?", ((entry.number,) for entry in entries)
                )
        except sqlite3.Error as error:
            raise self._outage(error) from None

    def _read(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        try:
            with self._lock:
                return self._file.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise self._outage(error) from None

    def _outage(self, error: sqlite3.Error) -> Outage:
        return Outage(f"journal {self._path}: {error}")

    def close(self) -> None:
        """Close the file, so that another process can open it."""
        self._file.close()


def _decode(encoded: bytes) -> Record:
    topic, value, key, headers = msgspec.msgpack.decode(encoded)
    return Record(topic, value, key, [(name, content) for name, content in headers])


def open_journals(directory: Path, *, remembered: int) -> list[Journal]:
    """Return this process's own journal, followed by the unused journals in which records are still waiting.

    Each replica has its own journal. A replica that is not started again leaves its journal behind. Raises
    SettingsError if `directory` or a journal in it cannot be used.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        present = sorted(directory.glob("producer-*.sqlite"))
    except OSError as error:
        raise SettingsError(f"JOURNAL_DIRECTORY: cannot use {directory}: {str(error.strerror).lower()}") from None
    free = [journal for path in present if (journal := _open(path, remembered=remembered)) is not None]
    if not free:
        new = _open(directory / f"producer-{uuid.uuid4().hex}.sqlite", remembered=remembered)
        return [] if new is None else [new]
    left_behind = [journal for journal in free[1:] if journal.count()]
    for journal in free[1:]:
        if journal not in left_behind:
            journal.close()
    return [free[0], *left_behind]


def _open(path: Path, *, remembered: int) -> Journal | None:
    """Open a journal. Returns None if another process has the file open. Raises SettingsError if opening fails."""
    try:
        path.touch(mode=0o600)  # the file contains card numbers and birth dates
        return Journal(path, remembered=remembered)
    except (sqlite3.Error, OSError) as error:
        if isinstance(error, sqlite3.Error) and error.sqlite_errorcode == sqlite3.SQLITE_BUSY:
            return None
        reason = str(error.strerror).lower() if isinstance(error, OSError) else error
        raise SettingsError(f"JOURNAL_DIRECTORY: cannot open {path}: {reason}") from None
