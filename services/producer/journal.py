"""The journal: what was fetched is on disk before it goes anywhere, and stays there until it lies on its topic.

So a producer that is killed has lost nothing of what it received, and its successor knows what it has seen.
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
  record BLOB -- until it lies on its topic
);
CREATE INDEX IF NOT EXISTS waiting ON fetched (number) WHERE record IS NOT NULL;
"""

_COUNT = "SELECT count(*) FROM fetched WHERE record IS NOT NULL"

_encode = msgspec.msgpack.Encoder().encode


class Entry(NamedTuple):
    """A record that may not have been written yet."""

    number: int
    fetched_ms: int  # epoch
    record: Record


class Journal:
    """A file with the records that wait and the identities seen last; one process at a time has it."""

    def __init__(self, path: Path, *, remembered: int) -> None:
        """Open or make the file. Raises sqlite3.Error; its code is SQLITE_BUSY if another process has it."""
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
            ((self.id,),) = self._file.execute("SELECT id FROM journal")  # who takes the file over goes by it too
            self._waiting = 0
            ((self._waiting,),) = self._file.execute(_COUNT)
        except BaseException:
            self._file.close()
            raise

    def add(self, records: Iterable[tuple[bytes, Record]]) -> int:
        """Keep the records whose identity was not seen lately; returns how many. Raises Outage if the disk does not."""
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
            raise Outage(f"journal: {error}") from None

    def waiting(self, most: int = -1) -> list[Entry]:
        """The oldest records that wait, in the order they were fetched. Raises Outage."""
        rows = self._read(
            "SELECT number, fetched_ms, record FROM fetched WHERE record IS NOT NULL ORDER BY number LIMIT ?", most
        )
        return [Entry(number, fetched_ms, _decode(record)) for number, fetched_ms, record in rows]

    def count(self) -> int:
        """How many records wait; while the disk does not answer, how many did when it last did."""
        with suppress(Outage):
            ((self._waiting,),) = self._read(_COUNT)
        return self._waiting

    def written(self, entries: Sequence[Entry]) -> None:
        """Note that these lie on their topics. Raises Outage."""
        try:
            with self._lock, self._file:
                self._file.executemany(
                    "UPDATE fetched SET record = NULL WHERE number = ?", ((entry.number,) for entry in entries)
                )
        except sqlite3.Error as error:
            raise Outage(f"journal: {error}") from None

    def _read(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        try:
            with self._lock:
                return self._file.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise Outage(f"journal: {error}") from None

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()


def _decode(encoded: bytes) -> Record:
    topic, value, key, headers = msgspec.msgpack.decode(encoded)
    return Record(topic, value, key, [(name, content) for name, content in headers])


def open_journals(directory: Path, *, remembered: int) -> list[Journal]:
    """A journal that no other process has, and those that are left behind: free, with records that wait.

    Each replica needs one of its own; one that is not started again leaves its own behind. Raises SettingsError.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        present = sorted(directory.glob("producer-*.sqlite"))
    except OSError as error:
        raise SettingsError(f"JOURNAL_DIRECTORY: {directory}: {error.strerror}") from None
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
    try:
        path.touch(mode=0o600)  # card numbers and birth dates wait in it
        return Journal(path, remembered=remembered)
    except (sqlite3.Error, OSError) as error:
        if isinstance(error, sqlite3.Error) and error.sqlite_errorcode == sqlite3.SQLITE_BUSY:
            return None
        raise SettingsError(f"JOURNAL_DIRECTORY: {path}: {error}") from None
