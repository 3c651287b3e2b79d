"""Writes the figures as tables, JSON and Markdown, and draws a chart of how costs grow."""

import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from confluent_kafka import libversion
from rich.console import Console
from rich.table import Table

from benchmarks import growth
from benchmarks.measure import Figure, Section
from sandbox.apache import VERSION as KAFKA_VERSION

GROWTH = ("partitions", "replicas", "backlog", "growing-table")
_PACKAGES = ("confluent-kafka", "msgspec", "numpy", "pandas", "scikit-learn", "psycopg2-binary", "sqlalchemy")


def versions() -> dict[str, str]:
    """Return the software versions and the number of cores, which the figures depend on."""
    return {
        "Python": platform.python_version(),
        "librdkafka": libversion()[0],
        "Apache Kafka": KAFKA_VERSION,
        "cores": str(os.cpu_count()),
        **{name: version(name) for name in _PACKAGES},
    }


def show(section: Section, console: Console) -> None:
    """Print a section as a table with the median and the spread of each figure."""
    table = Table("", *section.columns, title=section.title, caption=section.settings)
    for label, row in section.rows.items():
        cells = [_cell(row[name]) if name in row else "" for name in section.columns]
        table.add_row(label, *cells)
    console.print(table)
    for bar in section.bars:
        sign, verdict = ("<=" if bar.at_most else ">="), ("[green]reached" if bar.reached else "[red]not reached")
        console.print(f"  {bar.what}: {bar.seen.median:.2f} ({sign} {bar.bar:g}) {verdict}")


def save(sections: Mapping[str, Section], path: Path) -> None:
    """Write the figures of all rounds as JSON, their medians as Markdown, and the growth suites as a chart."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figures = {name: section.as_json() for name, section in sections.items()}
    path.write_text(json.dumps({"versions": versions(), "sections": figures}, indent=1) + "\n")
    path.with_suffix(".md").write_text("\n".join(map(markdown, sections.values())))
    if grown := [sections[name] for name in GROWTH if name in sections]:
        growth.draw(grown, path.with_suffix(".svg"))


def markdown(section: Section) -> str:
    """Return a section's table and bars as Markdown."""
    lines = [f"### {section.title}", "", f"{section.settings}.", ""]
    lines += ["| | " + " | ".join(section.columns) + " |", "|---|" + "---:|" * len(section.columns)]
    for label, row in section.rows.items():
        cells = [_cell(row[name]) if name in row else "" for name in section.columns]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    lines.append("")
    if section.bars:
        lines += ["| quantity | target | measured | |", "|---|---|---:|---|"]
        for bar in section.bars:
            sign, verdict = ("<=" if bar.at_most else ">="), ("" if bar.reached else "**not reached**")
            lines.append(
                f"| {bar.what} | {sign} {bar.bar:g} | {bar.seen.median:.3g} ±{bar.seen.spread:.0%} | {verdict} |"
            )
        lines.append("")
    return "\n".join(lines)


def _cell(figure: Figure) -> str:
    precise = ",.0f" if abs(figure.median) >= 100 else ".3g"
    return f"{figure.median:{precise}} ±{figure.spread:.0%}"
