"""The commands `dead-letters list`, `show` and `replay`."""

from pathlib import Path
from typing import Annotated

import typer

from fraudctl.call import CallError
from fraudctl.cli import Commands, console, say

commands = Commands(help="List, show and replay records that a service rejected.")

OfTopic = Annotated[str | None, typer.Option("--topic", metavar="TOPIC", help="Only dead letters of this topic.")]
OfReason = Annotated[
    str,
    typer.Option("--reason", metavar="TEXT", show_default=False, help="Only dead letters whose reason contains TEXT."),
]
Since = Annotated[
    str | None,
    typer.Option(
        metavar="TIME",
        help="Only dead letters since this UTC time (2026-01-31T21:30), or newer than this age (90m, 2h, 3d).",
    ),
]
Limit = Annotated[int | None, typer.Option(metavar="N", min=1, help="At most N dead letters, oldest first.")]


@commands.add("list", "dead-letters list --since 1h", "dead-letters list --topic topic_1 --reason zip")
def show_list(topic: OfTopic = None, reason: OfReason = "", since: Since = None, limit: Limit = None) -> None:
    """List dead letters, oldest first, and count them by reason."""
    from fraudctl import letters
    from shared.settings import ServiceSettings, kafka_properties, load

    settings = load(ServiceSettings)
    properties = kafka_properties(settings)
    selection = letters.select(settings, topic=topic, reason=reason, since=since)
    found = letters.read(properties, selection)[:limit]
    if found:
        console.print(letters.overview(found))
    for line in letters.totals(found):
        say(line)


@commands.add("show", "dead-letters show topic_1.dlq:3:17", "dead-letters show topic_1.dlq:3:17 --save value.json")
def show_one(
    letter_id: Annotated[
        str, typer.Argument(metavar="ID", help="ID of the dead letter, for example topic_1.dlq:3:17.")
    ],
    save: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Save the value to a new file, byte for byte and unmasked.")
    ] = None,
) -> None:
    """Show one dead letter, with card number and birth date masked."""
    from fraudctl import letters
    from shared.settings import ServiceSettings, kafka_properties, load

    settings = load(ServiceSettings)
    (letter,) = letters.read(kafka_properties(settings), letters.select(settings, ids=[letter_id]))
    if save:
        letters.save(letter, save)
    say(letters.description(letter))


@commands.add(
    "replay",
    "dead-letters replay --reason zip",
    "dead-letters replay topic_1.dlq:3:17 --value value.json",
)
def replay(
    letter_ids: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="ID",
            help="IDs to replay, for example topic_1.dlq:3:17. Default: every letter that matches the filters.",
        ),
    ] = None,
    topic: OfTopic = None,
    reason: OfReason = "",
    since: Since = None,
    limit: Limit = None,
    yes: Annotated[bool, typer.Option("--yes", help="Allow replaying more than 1,000 dead letters.")] = False,
    value: Annotated[
        Path | None, typer.Option(metavar="FILE", help="File with a corrected value. Requires exactly one ID.")
    ] = None,
) -> None:
    """Put dead letters back on their topics, each exactly once.

    Dead letters that were already replayed are skipped.
    """
    from fraudctl import letters
    from shared.settings import ServiceSettings, kafka_properties, load

    if letter_ids and (topic or reason or since or limit):
        raise CallError("give either IDs or filters, not both")
    if value and len(letter_ids or []) != 1:
        raise CallError("--value needs exactly one ID")
    corrected = value.read_bytes() if value else None
    settings = load(ServiceSettings)
    properties = kafka_properties(settings)
    selection = letters.select(settings, ids=letter_ids or [], topic=topic, reason=reason, since=since)
    done = letters.replay(properties, selection, limit=limit, confirmed=yes, corrected=corrected)
    skipped = f"; skipped: {done.skipped:,} already replayed" if done.skipped else ""
    say(f"replayed: {letters.counted(done.replayed)}{skipped}")
