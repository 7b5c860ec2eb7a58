"""What a report is written as: JSON, CSV, Markdown, or tables for a terminal.

The printers of a kind of report (report.py, model_report.py, ...) say what stands in a row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ... import terminal

if TYPE_CHECKING:
    from rich.console import Group

FIGURE: Any = {"font.size": 9, "svg.fonttype": "none", "text.parse_math": False}
"""matplotlib's rcParams: a "$" in a name is a dollar."""


def to_json(report: Any) -> str:
    return terminal.to_json(dataclasses.asdict(report), indent=2) + "\n"


def to_csv(kind: Any, records: Iterable[Any]) -> str:
    """One line per record of dataclass `kind`; what is common to all stands in the JSON and Markdown forms."""
    names = [f.name for f in dataclasses.fields(kind)]
    return terminal.csv_table(names, [[getattr(r, name) for name in names] for r in records])


# ---- a report: lines, then tables
# ------------------------------------------------------------------------------------------------


class Table(NamedTuple):
    title: str
    head: Sequence[str]
    rows: Iterable[Sequence[str]]
    style: Callable[[Sequence[str]], str] = lambda cells: ""
    """Of a row on a terminal."""


def to_text(report: Any, form: str, kind: Any, header: Iterable[str], tables: Iterable[Table]) -> str:
    """The report as "json", its records, of dataclass `kind`, as "csv", or what it shows as "md"."""
    if form == "json":
        return to_json(report)
    if form == "csv":
        return to_csv(kind, report.records)
    lines = [f"- {terminal.one_line(line)}" for line in header]
    for table in tables:
        lines += [
            "",
            f"**{terminal.one_line(table.title)}**",
            "",
            *terminal.markdown_table(table.head, table.rows),
        ]
    return "\n".join(lines) + "\n"


def to_table(header: Iterable[str], tables: Iterable[Table]) -> Group:
    """For a terminal."""
    from rich.console import Group

    parts: list[Any] = [terminal.lines(header, "dim")]
    for title, head, rows, style in tables:
        parts += ["", terminal.Table(title, head, list(rows), style, left=("contender",))]
    return Group(*parts)
