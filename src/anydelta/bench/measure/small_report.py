"""Records of `anydelta bench overhead`, `threads` and `rollback` to a table, JSON, CSV or Markdown.

A record is a dataclass whose `columns()` are its row. Nothing here measures or decides.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ... import terminal
from . import outputs
from .ops import Settings
from .report import BUSY_PCT

if TYPE_CHECKING:
    from rich.console import Group


@dataclass
class Measured:
    """Records of one kind, on what machine, and how to read them."""

    title: str
    machine: dict[str, Any]
    settings: Settings
    notes: list[str] = field(default_factory=list)
    records: list[Any] = field(default_factory=list)


def to_text(measured: Measured, form: str) -> str:
    """The records as "json", "csv" or "md"."""
    if form == "json":
        return outputs.to_json(measured)
    if form == "csv":
        return outputs.to_csv(type(measured.records[0]), measured.records)
    head, rows = _cells(measured)
    title, *header = map(terminal.one_line, (measured.title, *_header(measured)))
    lines = [f"**{title}**", "", *(f"- {line}" for line in header), ""]
    return "\n".join(lines + terminal.markdown_table(head, rows)) + "\n"


def to_table(measured: Measured) -> Group:
    """For a terminal."""
    from rich.console import Group

    head, rows = _cells(measured)
    table = terminal.Table(measured.title, head, rows, left=("contender",))
    return Group(table, terminal.lines(_header(measured), "dim"))


def _cells(measured: Measured) -> tuple[list[str], list[list[str]]]:
    rows = [r.columns() for r in measured.records]
    return list(rows[0]), [list(r.values()) for r in rows]


def _header(measured: Measured) -> list[str]:
    m = measured.machine
    lines = [
        f"{m['cpu']}, {m['cpus']} CPUs, {m['system']}; Python {m['python']}, torch {m['torch']}, "
        f"anydelta {m['anydelta']}; {m['date']}",
        f"{measured.settings.rounds} interleaved rounds",
        *measured.notes,
    ]
    busy = max((r.others_pct or 0.0 for r in measured.records), default=0.0)
    if busy >= BUSY_PCT:
        lines.append(f"other work took up to {busy:.0f} % of the CPUs, so trust the minima only")
    return lines
