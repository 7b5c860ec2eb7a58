"""What every `anydelta bench` command does with what it measured: the options, their checks, the forms.

A command declares `json: Json = False` and so on, calls `checked` before it measures and `show` after it. The printers
of a kind of report (report.py, model_report.py, spec_report.py, overhead.py) say what stands in a row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from ... import terminal
from ...terminal import Failed, Refused, refusing
from .contender import needs

if TYPE_CHECKING:
    from rich.console import Group

FORMATS = {"json": ".json", "csv": ".csv", "md": ".md"}
PLOTS = (".svg", ".png", ".pdf")
FIGURE: Any = {"font.size": 9, "svg.fonttype": "none", "text.parse_math": False}
"""matplotlib's rcParams: a "$" in a name is a dollar."""

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Csv = Annotated[bool, typer.Option("--csv", help="Print CSV.")]
Md = Annotated[bool, typer.Option("--md", help="Print Markdown.")]
Output = Annotated[Path | None, typer.Option("-o", "--output", help="Write there: .json, .csv or .md.")]
Plot = Annotated[Path | None, typer.Option("--plot", help="Draw a figure: .svg, .png or .pdf.")]


# ---- options
# ------------------------------------------------------------------------------------------------


def checked(json: bool, csv: bool, md: bool, output: Path | None, plot: Path | None = None) -> str | None:
    """The form asked for ("json", "csv", "md"), None for a table.

    Raises:
        Refused: what could not be written afterwards.
    """
    for path in (output, plot):
        if path is not None:
            check_writable(path)
    if plot is not None:
        if plot.suffix not in PLOTS:
            raise Refused(f"requires --plot to end in {', '.join(PLOTS)}; got {plot.name!r}")
        if why := needs("matplotlib", "matplotlib"):
            raise Refused(f"requires matplotlib for --plot; got: {why}")
    asked = [name for name, on in (("json", json), ("csv", csv), ("md", md)) if on]
    if len(asked) > 1:
        raise Refused(f"one output form at a time; got {' and '.join('--' + a for a in asked)}")
    if asked or output is None:
        return asked[0] if asked else None
    for name, suffix in FORMATS.items():
        if output.suffix == suffix:
            return name
    raise Refused(
        f"-o must end in {', '.join(FORMATS.values())}, or give --json, --csv or --md; got {output.name!r}"
    )


def check_writable(path: Path) -> None:
    """Check, before the minutes that it takes to measure, that the file can be written. It stays as it is.

    Raises:
        Refused: it cannot.
    """
    with refusing(OSError, ValueError):  # a name too long, a NUL in it
        if not path.parent.is_dir():
            raise Refused(f"requires a folder that exists; got {path}, whose folder does not exist")
        if path.is_dir():
            raise Refused(f"requires a file to write; got the folder {path}")
        existed = path.exists()
        with path.open("ab"):  # the only sure way to know
            pass
        if not existed:
            path.unlink()


def show(printers: Any, report: Any, form: str | None, output: Path | None, plot: Path | None = None) -> None:
    """Print the report, or write it and print the table; then draw it.

    Raises:
        Failed: a file cannot be written, or nothing was timed that could be drawn.
    """
    if form is not None:
        text = printers.to_text(report, form)
        if output is None:
            terminal.say(text, end="")
        else:
            output.write_text(text, encoding="utf-8")
    if form is None or output is not None:
        terminal.show(printers.to_table(report))
    if plot is not None:
        try:
            printers.plot(report, plot)
        except ValueError as error:  # nothing was timed
            raise Failed(f"no figure: {error}") from error


# ---- forms
# ------------------------------------------------------------------------------------------------


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
