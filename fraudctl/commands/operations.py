"""Commands for a running system: status, doctor, tail, migrate and alert-test."""

import json
import sys
import time
from contextlib import suppress
from typing import Annotated

import typer

from fraudctl.call import CallError
from fraudctl.cli import Commands, console, report, say

commands = Commands()
_REFRESH_S = 2.0


@commands.add("status", "status --watch", "status --json | jq .problems")
def show_status(
    watch: Annotated[bool, typer.Option("--watch", help="Refresh every two seconds, until Ctrl+C.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show problems, consumer groups, topics, models and rows.

    Queries Kafka, MLflow and the database, but not the services. Exits with 1 if something is unhealthy.
    """
    from fraudctl import status

    if watch and as_json:
        raise CallError("use either --watch or --json, not both")
    settings = status.load_settings()
    now = status.look(settings)
    if watch:
        from rich.live import Live

        with Live(status.show(now), console=console, auto_refresh=False) as live, suppress(KeyboardInterrupt):
            while True:
                time.sleep(_REFRESH_S)
                now = status.look(settings)
                live.update(status.show(now), refresh=True)
    elif as_json:
        sys.stdout.write(json.dumps(now.report()) + "\n")
    else:
        console.print(status.show(now), soft_wrap=True)
    raise typer.Exit(int(bool(now.problems)))


@commands.add("doctor", "doctor")
def run_doctor() -> None:
    """Check everything that the services need, and show fixes.

    Checks the settings, Kafka, MLflow, the database, the mail server, the payments API and the clock.

    Exits with 1 if a check fails.
    """
    from fraudctl import doctor

    findings = doctor.examine()
    for finding in findings:
        say(str(finding))
    raise typer.Exit(int(any(finding.verdict == "failed" for finding in findings)))


@commands.add("tail", "tail topic_1 --count 3", "tail topic_2 --follow")
def show_tail(
    topic: Annotated[str, typer.Argument(metavar="TOPIC", help="Topic to read, for example topic_1.dlq.")],
    follow: Annotated[bool, typer.Option("--follow", help="Show new records as they arrive, until Ctrl+C.")] = False,
    count: Annotated[int, typer.Option(metavar="N", min=1, help="Number of newest records to show.")] = 10,
) -> None:
    """Show a topic's records.

    Card numbers and birth dates are masked.
    """
    from fraudctl import tail
    from shared.settings import ServiceSettings, kafka_properties, load

    properties = kafka_properties(load(ServiceSettings))
    with suppress(KeyboardInterrupt):
        shown = tail.follow(properties, topic, report=report) if follow else tail.last(properties, topic, count)
        for message in shown:
            say(tail.description(message))


@commands.add("migrate", "migrate")
def run_migrations() -> None:
    """Migrate the database schema to its newest version.

    DATABASE_URL must contain the login of the tables' owner.
    """
    from fraudctl.labels import engine
    from services.db_sink.table import migrate

    migrate(engine())
    console.print("the database schema is up to date")


@commands.add("alert-test", "alert-test")
def send_test_alarms() -> None:
    """Send a sample alarm through each configured channel.

    Exits with 1 if a channel does not accept the alarm.
    """
    from services.alerter.channels import configured
    from services.alerter.settings import AlerterSettings
    from shared.errors import Outage, Poison
    from shared.settings import load

    failed = False
    for channel in configured(load(AlerterSettings)):
        try:
            channel.test()
            say(f"{channel.name}: accepted")
        except (Outage, Poison) as error:
            failed = True
            say(str(error))
        channel.close()
    raise typer.Exit(int(failed))
