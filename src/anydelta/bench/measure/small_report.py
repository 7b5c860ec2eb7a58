"""Formats records of the small commands (overhead, threads, rollback, ...) as a table, JSON, CSV or Markdown.

A record is a dataclass whose `columns()` are its row. Nothing here measures.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from . import outputs
from .ops import Settings
from .report import BUSY_PCT

KIND = None
"""None: the type of a report's records is not fixed."""


@dataclass
class Measured:
    """Records of one kind, the machine, and notes on how to read them."""

    title: str
    machine: dict[str, object]
    settings: Settings
    notes: list[str] = field(default_factory=list)
    records: list[Any] = field(default_factory=list)


def tables(measured: Measured) -> Iterator[outputs.Table]:
    rows = [r.columns() for r in measured.records]
    yield outputs.Table(measured.title, list(rows[0]), [list(r.values()) for r in rows])


def header(measured: Measured) -> list[str]:
    rounds = f"{measured.settings.rounds} interleaved rounds"
    lines = [outputs.machine(measured.machine), rounds, *measured.notes]
    busy = max((r.others_pct or 0.0 for r in measured.records), default=0.0)
    if busy >= BUSY_PCT:
        lines.append(f"other work took up to {busy:.0f} % of the CPUs, so trust only the minima")
    return lines
