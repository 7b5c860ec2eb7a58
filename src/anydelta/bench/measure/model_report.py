"""Formats records of `anydelta bench model` as a table, JSON, CSV, Markdown or a figure. It measures nothing."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import outputs
from .model import FILE, Record, Report
from .profile import MIXER_TOTAL, ORDER, Part
from .report import BUSY_PCT, COLOURS

if TYPE_CHECKING:
    from collections.abc import Callable

    from matplotlib.axes import Axes

KIND = Record
HEAD = ("test", "contender", "tokens/s", "x transformers", "same tokens", "logit error")


FILE_HEAD = ("model", "size", "params", "backend", "threads", "test", "t/s", "x llama.cpp", "logit error")
"""For files, as in llama-bench."""


def tables(report: Report) -> Iterator[outputs.Table]:
    files = [r for r in report.records if r.dtype.startswith(FILE)]
    if files:
        rows = [file_row(r) for r in files]
        yield outputs.Table("", FILE_HEAD, rows, lambda cells: "bold" if "anydelta" in cells else "")
    for title, records in groups(report):
        rows = [row(r) for r in records]
        yield outputs.Table(title, HEAD, rows, lambda cells: "bold" if "anydelta" in cells else "")
    for title, head, parts in part_tables(report):
        yield outputs.Table(title, head, parts, lambda cells: "bold" if "total" in cells else "")


def header(report: Report) -> list[str]:
    """Lines about the machine, the method, absent contenders and notes."""
    lines = [
        outputs.machine(report.machine),
        "contenders: " + "; ".join(dict.fromkeys(f"{r.contender} {r.version}" for r in report.records)),
        *(f"absent: {name}: {why}" for name, why in report.absent.items()),
        f"{report.settings.rounds} interleaved rounds; tokens/s: their median ± standard deviation",
        "x transformers: its time / the contender's (above 1: faster), median of the rounds (quartiles)",
        "logit error: float32: largest difference from Transformers'; half types: RMS difference from float32's",
    ]
    if any(r.dtype.startswith(FILE) for r in report.records):
        lines[-2:] = [
            "x llama.cpp: its time (faster form) / the contender's in the same round; median (quartiles)",
            "logit error: RMS difference from the unpacked weights' logits in float32, relative to their RMS",
        ]
    busy = max((r.others_pct or 0.0 for r in report.records), default=0.0)
    if busy >= BUSY_PCT:
        lines.append(f"other work took up to {busy:.0f} % of the CPUs: do not trust absolute speeds")
    return lines + [f"note: {note}" for note in report.notes]


def groups(report: Report) -> Iterator[tuple[str, list[Record]]]:
    """Records of one model, dtype and number of threads, under a title."""
    others = (r for r in report.records if not r.dtype.startswith(FILE))
    for _, found in groupby(others, key=lambda r: (r.model, r.dtype, r.threads)):
        records = list(found)
        first = records[0]
        title = (
            f"{first.model}{f' ({first.cut})' if first.cut else ''}, {_count(first.params)} parameters, "
            f"{first.size_mib / 1024:.2f} GiB, {first.dtype}, {first.threads} thread{'s' * (first.threads > 1)}"
        )
        yield title, records


def _count(n: int) -> str:
    return f"{n / 1e9:.2f} B" if n >= 1e9 else f"{n / 1e6:.1f} M"


def row(r: Record) -> tuple[str, ...]:
    """The cells of HEAD."""
    if r.median_tps is None:
        return (r.test, r.contender, f"{r.status}: {r.reason}", "", r.same_tokens, _error(r))
    digits = 2 if r.median_tps < 100 else 1
    return (
        r.test,
        r.contender,
        f"{r.median_tps:.{digits}f} ± {r.std_tps or 0.0:.{digits}f}",
        "" if r.ratio is None else f"{r.ratio:.2f} ({r.ratio_low:.2f} to {r.ratio_high:.2f})",
        r.same_tokens,
        _error(r),
    )


def file_row(r: Record) -> tuple[str, ...]:
    """The cells of FILE_HEAD."""
    name = f"{r.model} {r.dtype.removeprefix(FILE)}"
    first = (name, f"{r.size_mib:.2f} MiB", _count(r.params), r.contender, str(r.threads), r.test)
    if r.median_tps is None:
        return (*first, f"{r.status}: {r.reason}", "", _error(r))
    over = r.over_llama
    times = "" if over is None else f"{over:.2f} ({r.over_llama_low:.2f} to {r.over_llama_high:.2f})"
    return (*first, f"{r.median_tps:.2f} ± {r.std_tps or 0.0:.2f}", times, _error(r))


def _error(r: Record) -> str:
    return "" if r.logit_error is None else f"{r.logit_error:.1e}"


def part_tables(report: Report) -> Iterator[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
    """Where the time goes: title, head and rows of each test."""
    for (model, dtype, threads, test, unit), found in groupby(
        report.parts, key=lambda p: (p.model, p.dtype, p.threads, p.test, p.unit)
    ):
        parts = list(found)
        names = list(parts[0].ms)
        totals = {name: next(p.ms[name] for p in parts if p.part == "total") for name in names}
        rows = []
        for p in parts:
            cells = [f"{p.ms[n]:.4g} ({100 * p.ms[n] / totals[n]:.0f} %)" for n in names]
            rows.append((p.part, *cells, "" if p.ratio is None else f"{p.ratio:.2f}"))
        title = f"{model}, {dtype}, {threads} thread{'s' * (threads > 1)}, {test}: {unit} in each part"
        yield title, ("part", *names, "ratio"), rows


BELOW: Any = {
    "frameon": False, "fontsize": 7, "loc": "upper center", "bbox_to_anchor": (0.5, 0.0), "borderaxespad": 6.0,
}  # fmt: skip
"""The place of a legend: under the axis and its label, which take some five lines."""


def plot(report: Report, path: Path) -> None:
    """Draw the speed relative to Transformers' for every test and, if it was measured, the time of each part.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: nothing was timed, or matplotlib cannot write that kind of file.
    """
    timed = [r for r in report.records if r.ratio is not None]
    if not timed:
        raise ValueError("nothing was timed, so there is nothing to plot")
    several = len({(r.dtype, r.threads) for r in timed}) > 1

    def label(r: Record | Part) -> str:
        return f"{r.model} {r.test}" + (
            f"\n{r.dtype}, {r.threads} thread{'s' * (r.threads > 1)}" if several else ""
        )

    tests = list(dict.fromkeys(label(r) for r in timed))
    names = list(dict.fromkeys(r.contender for r in timed))
    panels = 2 if report.parts else 1
    size = (5.5 * panels + 1, 1.6 + 0.24 * len(names) * len(tests))
    with outputs.figure(report, path, size, panels) as (_, axes):
        _plot_speed(axes[0], timed, tests, names, label)
        if report.parts:
            _plot_parts(axes[1], report.parts, tests, label)


def _plot_speed(
    axis: Axes, timed: list[Record], tests: list[str], names: list[str], label: Callable[[Record], str]
) -> None:
    bar = 0.8 / len(names)
    for name in names:
        mine = [r for r in timed if r.contender == name]
        at = [tests.index(label(r)) + (names.index(name) - (len(names) - 1) / 2) * bar for r in mine]
        axis.barh(
            at, [r.ratio or 0.0 for r in mine], height=0.9 * bar, color=COLOURS.get(name, "grey"), label=name
        )
        for y, r in zip(at, mine, strict=True):
            text = f" {r.ratio:.2f}x, {r.median_tps:.3g} tokens/s"
            axis.annotate(text, (r.ratio, y), va="center", size=7)
    axis.set_xlim(0, 1.6 * max(r.ratio or 0.0 for r in timed))
    axis.axvline(1, color="black", lw=0.8)
    axis.set_xlabel("speed / Transformers', median of the rounds")
    axis.legend(ncols=2, **BELOW)
    _tidy(axis, tests)


def _plot_parts(axis: Axes, parts: list[Part], tests: list[str], label: Callable[[Part], str]) -> None:
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    shown = [p for p in ORDER if p not in (MIXER_TOTAL, "total") and any(q.part == p for q in parts)]
    colours = {part: colormaps["tab20"](i) for i, part in enumerate(shown)}
    names = list(parts[0].ms)
    bar = 0.8 / len(names)
    for test in tests:
        mine = {p.part: p for p in parts if label(p) == test}
        if not mine:
            continue
        whole = mine["total"].ms[names[0]]
        for i, name in enumerate(names):
            left, y = 0.0, tests.index(test) + (i - (len(names) - 1) / 2) * bar
            for part in shown:
                width = 100 * mine[part].ms[name] / whole if part in mine else 0.0
                axis.barh(y, width, left=left, height=0.9 * bar, color=colours[part])
                left += width
            axis.annotate(f" {name}", (left, y), va="center", size=7)
    handles = [Rectangle((0, 0), 1, 1, color=colours[p]) for p in shown]
    axis.legend(handles, shown, ncols=3, **BELOW)
    axis.set_xlim(0, 125)
    axis.set_xlabel("time by part, % of Transformers' time")
    _tidy(axis, tests)
    axis.set_yticks(range(len(tests)), [""] * len(tests))


def _tidy(axis: Axes, tests: list[str]) -> None:
    axis.set_yticks(range(len(tests)), tests)
    axis.set_ylim(len(tests) - 0.5, -0.5)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", lw=0.4, alpha=0.5)
    axis.set_axisbelow(True)
