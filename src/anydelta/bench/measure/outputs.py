"""The forms of a report: JSON, CSV, Markdown, or tables for a terminal.

The printers of a kind of report (report.py, model_report.py, ...) define the rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ... import terminal

if TYPE_CHECKING:
    from types import ModuleType

    from _typeshed import DataclassInstance
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.console import Group

FIGURE: Any = {"font.size": 9, "svg.fonttype": "none", "text.parse_math": False}
"""matplotlib's rcParams: a "$" in a name is a dollar."""


def to_json(report: DataclassInstance) -> str:
    return terminal.to_json(dataclasses.asdict(report), indent=2) + "\n"


def to_csv(kind: type[DataclassInstance], records: Iterable[object]) -> str:
    """One line per record of dataclass `kind`; facts common to all are in the JSON and Markdown forms."""
    names = [f.name for f in dataclasses.fields(kind)]
    return terminal.csv_table(names, [[getattr(r, name) for name in names] for r in records])


# ---- a report: lines, then tables
# ------------------------------------------------------------------------------------------------


class Table(NamedTuple):
    title: str
    head: Sequence[str]
    rows: Iterable[Sequence[str]]
    style: Callable[[Sequence[str]], str] = lambda cells: ""
    """The style of a row on a terminal."""


def to_text(printers: ModuleType, report: Any, form: str) -> str:
    """The report as "json", its records as "csv", or its lines and tables as "md".

    `printers` is the module of a kind of report. It has KIND (of its records), header(report) and tables(report).
    """
    if form == "json":
        return to_json(report)
    if form == "csv":
        return to_csv(printers.KIND or type(report.records[0]), report.records)
    lines = [f"- {terminal.one_line(line)}" for line in printers.header(report)]
    for title, head, rows, _ in printers.tables(report):
        lines += ["", f"**{terminal.one_line(title)}**", "", *terminal.markdown_table(head, rows)]
    return "\n".join(lines) + "\n"


def to_table(printers: ModuleType, report: object) -> Group:
    """The report for a terminal."""
    from rich.console import Group

    parts: list[terminal.Shown] = [terminal.lines(printers.header(report), "dim")]
    for title, head, rows, style in printers.tables(report):
        parts += ["", terminal.Table(title, head, list(rows), style, left=("contender",))]
    return Group(*parts)


def machine(facts: dict[str, object]) -> str:
    """The first line of every report."""
    return (
        f"{facts['cpu']}, {facts['cpus']} CPUs, {facts['system']}; Python {facts['python']}, torch {facts['torch']}, "
        f"anydelta {facts['anydelta']}; {facts['date']}"
    )


@contextmanager
def figure(
    report: Any, path: Path, size: tuple[float, float], panels: int = 1, **options: Any
) -> Iterator[tuple[Figure, Sequence[Axes]]]:
    """(a figure, its panels side by side). When the block ends, the figure gets a title and is written."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(FIGURE)
    fig, axes = plt.subplots(1, panels, figsize=size, squeeze=False, layout="constrained", **options)
    m = report.machine
    what = getattr(report, "model", f"{m['cpus']} CPUs")
    try:
        yield fig, axes[0]
        fig.suptitle(f"anydelta {m['anydelta']} on {m['cpu']}, {what}, {m['date']}", size=10)
        fig.savefig(path, dpi=150)
    finally:
        plt.close(fig)
