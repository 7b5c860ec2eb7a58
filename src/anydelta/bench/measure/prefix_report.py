"""Formats records of `anydelta bench prefix` as a table, JSON, CSV or Markdown. It measures nothing."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from . import outputs
from .drafting import Report
from .prefix import SITUATIONS, Record

KIND = Record
HEAD = (
    "situation",
    "tokens run",
    "first token, ms",
    "with checkpoints, ms (range)",
    "x faster",
    "checkpoint",
)


def tables(report: Report) -> Iterator[outputs.Table]:
    for title, rows in groups(report):
        yield outputs.Table(title, HEAD, rows)


def header(report: Report) -> list[str]:
    """The machine and how it was measured, as lines."""
    s = report.settings
    return [
        outputs.machine(report.machine),
        f"{report.model}, questions of {s.turn} tokens, answers of {s.tokens}, {s.threads} "
        f"thread{'s' * (s.threads > 1)}, {s.rounds} interleaved rounds",
        *(f"{name}: {meaning}" for name, meaning in SITUATIONS.items()),
        "first token: time from the prompt, median of the rounds; tokens run: of the prompt, with checkpoints",
        *(f"note: {note}" for note in report.notes),
    ]


def groups(report: Report) -> Iterator[tuple[str, list[tuple[str, ...]]]]:
    """The title and rows of each prefix length."""
    for prefix, records in groupby(report.records, key=lambda r: r.prefix):
        yield f"a shared prefix of {prefix} tokens", [row(r) for r in records]


def row(r: Record) -> tuple[str, ...]:
    """The cells of HEAD."""
    run = f"{r.run_tokens} of {r.prompt_tokens}"
    size = f"{r.checkpoint_bytes / 2**20:.2f} MiB"
    if r.plain_s is None or r.median_s is None or r.low_s is None or r.high_s is None:
        return (r.situation, run, "", f"{r.status}: {r.reason}", "", size)
    times = (f"{1e3 * x:.1f}" for x in (r.plain_s, r.median_s, r.low_s, r.high_s))
    plain, median, low, high = times
    return (r.situation, run, plain, f"{median} ({low} to {high})", f"{r.ratio:.2f}", size)
