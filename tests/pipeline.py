"""The four services on a rig, with stand-ins at their other ends: what goes in at the payments API comes out."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import requests
import sqlalchemy as sa
from conftest import Rig, until
from requests import Response

from sandbox.mailbox import Mailbox, ReceivedMail, messages
from sandbox.payments_api import PaymentsApi
from sandbox.processes import Process, free_port
from sandbox.registry import Registry
from services.catalogue import CORE

_OUTCOME = sa.text("SELECT count(*), coalesce(sum(prediction), 0) FROM transactions")


@dataclass(kw_only=True)
class Pipeline:
    """The services, started; `ports` are those of their /metrics, /live and /ready."""

    rig: Rig
    api: PaymentsApi
    mailbox: Mailbox
    engine: sa.Engine
    services: dict[str, Process]
    ports: dict[str, int]
    streamed: int = 0

    def stream(self, transactions: int) -> None:
        """Let so many more in, and wait until they are through."""
        self.let_in(transactions)
        self.wait_through()

    def let_in(self, transactions: int) -> None:
        """Let so many more in."""
        self.streamed += transactions
        self.api.limit(self.streamed)

    def wait_through(self, *, timeout_s: float = 60.0) -> None:
        """Wait until each that was let in is a row, and each fraud among them is mailed."""
        until(self._through, timeout_s=timeout_s, what=f"{self.streamed} rows and a mail for each fraud")

    def stop(self, timeout_s: float) -> dict[str, int | None]:
        """Stop all services at once. Returns their exit codes; those still running after `timeout_s` are killed."""
        with ThreadPoolExecutor(len(self.services)) as pool:
            codes = pool.map(lambda each: each.stop(timeout_s), self.services.values())
            return dict(zip(self.services, codes, strict=True))

    def start_again(self) -> None:
        """Start all services that were stopped."""
        for each in self.services.values():
            each.spawn()

    def logs(self) -> dict[str, str]:
        """What each service logged so far."""
        return {name: self.rig.log(name) for name in self.services}

    def mails(self) -> list[ReceivedMail]:
        """What was mailed so far, oldest first."""
        return list(messages(self.mailbox.directory))

    def get(self, name: str, path: str) -> Response:
        """What a service answers at one of `/metrics`, `/live` and `/ready`."""
        return requests.get(f"http://127.0.0.1:{self.ports[name]}{path}", timeout=10)

    def _through(self) -> bool:
        with self.engine.connect() as connection:
            rows, frauds = connection.execute(_OUTCOME).one()
        return bool(rows == self.streamed) and len({each for mail in self.mails() for each in mail.alarms}) == frauds


@contextmanager
def pipeline(
    rig: Rig, *, engine: sa.Engine, registry: Registry, mailbox: Mailbox, **environment: str
) -> Iterator[Pipeline]:
    """Start the services, with `environment` laid over theirs. The rig ends them."""
    rig.environment |= {
        "DATABASE_URL": engine.url.render_as_string(hide_password=False),
        "MLFLOW_TRACKING_URI": registry.uri,
        "SMTP_PORT": str(mailbox.port),
    }
    ports = {name: free_port() for name in CORE}
    options = ("--held", "--rate", "0", "--seed", "1", "--fraud-rate", "0.02")
    with PaymentsApi(*options, log=rig.directory / "logs" / "payments_api.log") as api:
        services = {
            name: rig.start(name, ready=False, API_URL=api.url, METRICS_PORT=str(port), **environment)
            for name, port in ports.items()
        }
        for each in services.values():
            each.wait_ready()
        yield Pipeline(rig=rig, api=api, mailbox=mailbox, engine=engine, services=services, ports=ports)
