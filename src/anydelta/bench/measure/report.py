"""Formats records as a table, JSON, CSV, Markdown or a figure. It measures nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

from . import outputs
from .ops import Record, Report

KIND = Record
HEAD = ("contender", "min", "median", "spread", "x anydelta", "limit", "NMSE of o", "of states")
BUSY_PCT = 10
"""Other work above this gets a warning."""
COLOURS = {
    "anydelta": "#1b6ca8",
    "vllm": "#7b4b94",
    "onnxruntime": "#3c6e71",
    "ggml": "#d1495b",
    "llama.cpp": "#d1495b",
    "executorch": "#edae49",
    "mlx": "#66a182",
    "transformers": "#8d6a9f",
}


def tables(report: Report) -> Iterator[outputs.Table]:
    def style(cells: Sequence[str]) -> str:
        return "bold" if cells[0].partition(" (")[0] == "anydelta" else "" if cells[2] else "dim"

    for title, records in groups(report):
        yield outputs.Table(title, HEAD, map(row, _folded(records)), style)


def _folded(records: Sequence[Record]) -> Iterator[Record]:
    """One row for contenders that refuse a case for the same reason."""
    refused: dict[str, list[str]] = {}
    for r in records:
        if r.status == "refused":
            refused.setdefault(r.reason, []).append(r.contender)
        else:
            yield r
    for why, names in refused.items():
        yield replace(next(r for r in records if r.reason == why), contender=", ".join(names))


def header(report: Report) -> list[str]:
    """Lines about the machine, the method, absent contenders and notes."""
    lines = [outputs.machine(report.machine)]
    for name, facts in report.machine["backend"].items():
        shown = facts if isinstance(facts, str) else ", ".join(f"{k} {_plain(v)}" for k, v in facts.items())
        lines.append(f"backend {name}: {shown}")
    versions = {r.contender: r.version for r in report.records if r.contender != "anydelta"}
    if versions:
        lines.append("peers: " + "; ".join(f"{name} {version}" for name, version in versions.items()))
    lines += [f"absent: {name}: {why}" for name, why in report.absent.items()]
    lines.append(f"{report.settings.rounds} interleaved rounds; times per call")
    lines.append(
        "x anydelta: time / anydelta's (above 1: anydelta is faster), median of the rounds (of the minima)"
    )
    lines.append("limit: share of the limit measured in the same run, at the minimum")
    lines.append("NMSE: against the float64 oracle; for states: the worst of the last one and the snapshots")
    return lines + [f"note: {note}" for note in report.notes]


def _plain(value: object) -> str:
    return "+".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def groups(report: Report) -> Iterator[tuple[str, list[Record]]]:
    """Records of one case and number of threads, under a title with their common limit."""
    for (case, threads), records in groupby(report.records, key=lambda r: (r.case, r.threads)):
        found = list(records)
        title = f"{case}, {threads} thread{'s' * (threads > 1)}"
        if found[0].states > 1:
            sets = [r.working_set_mib for r in found if r.working_set_mib is not None]
            title += f", {found[0].states} alternating states ({min(sets, default=0):.0f} MiB or more)"
        if (bound := next((r for r in found if r.limit), None)) is not None:
            title += f"; limit {time(bound.limit_us)}"
            title += f" ({bound.limit} {bound.limit_value:.4g} {bound.limit_unit})"
        busy = next((r.others_pct for r in found if r.others_pct is not None), 0.0)
        if busy >= BUSY_PCT:
            title += f"; other work took {busy:.0f} % of the CPUs, so trust only the minima"
        yield title, found


def row(r: Record) -> tuple[str, ...]:
    """The cells of HEAD."""
    name = f"{r.contender} ({r.detail})" if r.detail else r.contender
    states = [e for e in (r.nmse_state, r.nmse_snapshots) if e is not None]
    if r.status != "ok":
        return (name, f"{r.status}: {r.reason}", *[""] * (len(HEAD) - 2))
    return (
        name,
        time(r.min_us),
        time(r.median_us),
        "" if r.iqr_pct is None else f"{r.iqr_pct:.0f} %",
        "" if r.ratio is None or r.ratio_min is None else f"{r.ratio:.2f} ({r.ratio_min:.2f})",
        "" if r.limit_pct is None else f"{r.limit_pct:.0f} %",
        "" if r.nmse_o is None else f"{r.nmse_o:.1e}",
        f"{max(states):.1e}" if states else "",
    )


def time(us: float | None) -> str:
    if us is None:
        return ""
    for unit, size in (("s", 1e6), ("ms", 1e3)):
        if us >= size:
            return f"{us / size:.3g} {unit}"
    return f"{us:.3g} µs"


def plot(report: Report, path: Path) -> None:
    """Draw two panels: the others' time relative to anydelta's, and the reached share of the limit.

    Raises:
        ValueError: nothing was timed, or matplotlib cannot write that kind of file.
    """
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    timed = [r for r in report.records if r.status == "ok" and r.median_us is not None]
    if not timed:
        raise ValueError("nothing was timed, so there is nothing to plot")
    several = len({r.threads for r in timed}) > 1

    def label(r: Record) -> str:
        return f"{r.case}, {r.threads} thread{'s' * (r.threads > 1)}" if several else r.case

    cases = list(dict.fromkeys(label(r) for r in timed))
    names = list(dict.fromkeys(r.contender for r in timed))
    spare = colormaps["tab10"]
    colours = {n: COLOURS.get(n, spare(i % 10)) for i, n in enumerate(names)}
    bar = 0.8 / len(names)
    beside: dict[str, Any] = {"xytext": (3, 0), "textcoords": "offset points", "va": "center", "size": 7}
    height = 1.6 + 0.14 * len(names) * len(cases) + 0.12 * len(cases)
    shape: dict[str, object] = dict(sharey=True, gridspec_kw={"width_ratios": (3, 2)})
    with outputs.figure(report, path, (11, height), 2, **shape) as (fig, (left, right)):
        for r in timed:
            y = cases.index(label(r)) + (names.index(r.contender) - (len(names) - 1) / 2) * bar
            size, colour = bar * 0.9, colours[r.contender]
            if r.ratio is not None and r.contender != names[0]:
                left.barh(y, r.ratio - 1, left=1, height=size, color=colour)
                side = {} if r.ratio >= 1 else {"xytext": (-3, 0), "ha": "right"}
                left.annotate(f"{r.ratio:.3g}", (r.ratio, y), **(beside | side))
            if r.limit_pct is not None:
                right.barh(y, r.limit_pct, height=size, color=colour)
                text = f"{r.limit_pct:.2g}" if r.limit_pct < 10 else f"{r.limit_pct:.0f}"
                right.annotate(text, (r.limit_pct, y), **beside)
        left.set_yticks(range(len(cases)), cases)
        left.set_ylim(len(cases) - 0.5, -0.5)
        left.axvline(1, color="black", lw=0.8)
        ratios = [r.ratio for r in timed if r.ratio]
        if ratios:
            left.set_xscale("log")
            left.set_xlim(min(ratios) * 0.6 if min(ratios) < 1 else 0.9, max(2.0, max(ratios) * 1.7))
            left.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        left.set_xlabel(f"time / {names[0]}'s, median of the rounds\n(right of 1: slower than {names[0]})")
        shares = [r.limit_pct for r in timed if r.limit_pct is not None]
        if shares:
            right.set_xlim(0, max(100.0, max(shares)) * 1.12)
            right.axvline(100, color="black", lw=0.8, ls=":")
            right.set_xlabel("% of the limit measured in the same run\n(above 100: the state stays in cache)")
        else:
            right.text(
                0.5, 0.5, "no limits were measured", transform=right.transAxes, ha="center", color="grey"
            )
            right.set_xticks([])
        for axis in (left, right):
            axis.spines[["top", "right"]].set_visible(False)
            axis.tick_params(axis="y", length=0)
            axis.grid(axis="x", lw=0.4, alpha=0.5)
            axis.set_axisbelow(True)
            for y in range(1, len(cases)):
                axis.axhline(y - 0.5, color="0.85", lw=0.6)
        handles = [Rectangle((0, 0), 1, 1, color=colours[n]) for n in names]
        fig.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
