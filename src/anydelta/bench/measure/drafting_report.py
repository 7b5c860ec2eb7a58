"""Formats records of `anydelta bench spec` as a table, JSON, CSV, Markdown or a figure. It measures nothing."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from . import outputs
from .drafting import FLAG, Record, Report

KIND = Record
HEAD = ("prompt", "accepted", "tokens per verification", "tokens/s (range)", "x plain", "flagged")
COLOURS = {
    "mtp": "#1b6ca8",
    "mtp+lookup": "#d1495b",
    "lookup": "#66a182",
    "assistant": "#edae49",
    "plain": "#8d6a9f",
}


def tables(report: Report) -> Iterator[outputs.Table]:
    for title, rows in groups(report):
        yield outputs.Table(title, HEAD, rows, lambda cells: "bold" if cells[0] == "median" else "")


def header(report: Report) -> list[str]:
    """The machine and how it was measured, as lines."""
    s = report.settings
    return [
        outputs.machine(report.machine),
        f"{report.model}, {s.tokens} new tokens per prompt, greedy, {s.threads} thread{'s' * (s.threads > 1)}, "
        f"{s.rounds} interleaved rounds",
        "tokens/s: of the whole call, median of the rounds; x plain: plain decoding's time / the mode's, likewise",
        f"flagged: rounds more than {FLAG:.0%} from the median of their prompt and mode",
        *(f"note: {note}" for note in report.notes),
    ]


def groups(report: Report) -> Iterator[tuple[str, list[tuple[str, ...]]]]:
    """For each mode its title and rows; the last row holds the medians over the prompts."""
    by_mode = sorted(report.records, key=lambda r: r.mode != "plain")  # stable: plain first, then as measured
    order = {name: i for i, name in enumerate(dict.fromkeys(r.mode for r in by_mode))}
    for mode, found in groupby(sorted(by_mode, key=lambda r: order[r.mode]), key=lambda r: r.mode):
        records = list(found)
        rows = [row(r) for r in records]
        timed = [r for r in records if r.ratio is not None]
        if len(timed) > 1:
            shares = [r.accepted_share for r in timed if r.accepted_share is not None]
            rows.append((
                "median",
                f"{statistics.median(shares):.0%}" if shares else "",
                f"{statistics.median([r.tokens_per_verification or 1.0 for r in timed]):.2f}",
                f"{statistics.median([r.median_tps or 0.0 for r in timed]):.0f}",
                f"{statistics.median([r.ratio or 0.0 for r in timed]):.2f}",
                f"{sum(r.flagged for r in timed)} of {sum(r.rounds for r in timed)}",
            ))  # fmt: skip
        detail = records[0].detail
        yield f"{mode}{f': {detail}' if detail else ''}", rows


def row(r: Record) -> tuple[str, ...]:
    """The cells of HEAD."""
    if r.median_tps is None:
        return (r.prompt, "", "", f"{r.status}: {r.reason}", "", "")
    return (
        r.prompt,
        "" if r.accepted_share is None else f"{r.accepted_share:.0%} of {r.drafted}",
        f"{r.tokens_per_verification:.2f}",
        f"{r.median_tps:.0f} ({r.low_tps:.0f} to {r.high_tps:.0f})",
        f"{r.ratio:.2f}",
        f"{r.flagged} of {r.rounds}" if r.flagged else "",
    )


def plot(report: Report, path: Path) -> None:
    """Draw the speed relative to plain decoding against the accepted share, one mark per prompt and mode.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: nothing was timed, or matplotlib cannot write that kind of file.
    """
    timed = [r for r in report.records if r.ratio is not None and r.accepted_share is not None]
    if not timed:
        raise ValueError("no drafts were timed, so there is nothing to plot")
    with outputs.figure(report, path, (6.5, 4.5)) as (fig, (axis,)):
        for mode in dict.fromkeys(r.mode for r in timed):
            mine = [r for r in timed if r.mode == mode]
            x, y = [100 * (r.accepted_share or 0.0) for r in mine], [r.ratio or 0.0 for r in mine]
            axis.scatter(x, y, s=22, color=COLOURS.get(mode, "grey"), label=f"{mode}: {mine[0].detail}")
            for r, at in zip(mine, zip(x, y, strict=True), strict=True):
                axis.annotate(r.prompt, at, xytext=(4, 2), textcoords="offset points", size=6, color="0.35")
        axis.axhline(1, color="black", lw=0.8)
        axis.set_xlim(0, 100)
        axis.set_ylim(0, None)
        axis.set_xlabel("accepted drafts, %")
        axis.set_ylabel("speed / plain decoding's, median of the rounds")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(lw=0.4, alpha=0.5)
        fig.legend(frameon=False, fontsize=7, loc="outside lower center", ncols=2)
