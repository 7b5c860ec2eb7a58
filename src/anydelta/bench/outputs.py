"""What every `anydelta bench` command does with what it measured: the options, their checks, the forms.

A command declares `json: Json = False` and so on, calls `checked` before it measures and `show` after it. The printers
of a kind of report (report.py, model_report.py, spec_report.py, overhead.py) say what stands in a row.
"""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import io
import json as json_lib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, NoReturn

import typer

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table as RichTable

FORMATS = {"json": ".json", "csv": ".csv", "md": ".md"}
PLOTS = (".svg", ".png", ".pdf")

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Csv = Annotated[bool, typer.Option("--csv", help="Print CSV.")]
Md = Annotated[bool, typer.Option("--md", help="Print Markdown.")]
Output = Annotated[Path | None, typer.Option("-o", "--output", help="Write there: .json, .csv or .md.")]
Plot = Annotated[Path | None, typer.Option("--plot", help="Draw a figure: .svg, .png or .pdf.")]

Fail = Callable[[str], NoReturn]
"""Says one sentence and ends the command."""


# ---- options
# ------------------------------------------------------------------------------------------------


def checked(
    fail: Fail, json: bool, csv: bool, md: bool, output: Path | None, plot: Path | None = None
) -> str | None:
    """The form asked for ("json", "csv", "md"), None for a table; fails on what could not be written afterwards."""
    for path in (output, plot):
        if path is not None and not path.parent.is_dir():
            fail(f"requires a folder that exists; got {path}, whose folder does not exist")
    if plot is not None:
        if plot.suffix not in PLOTS:
            fail(f"requires --plot to end in {', '.join(PLOTS)}; got {plot.name!r}")
        if importlib.util.find_spec("matplotlib") is None:
            fail("requires matplotlib for --plot; got none. Run: pip install 'anydelta[plot]'")
    asked = [name for name, on in (("json", json), ("csv", csv), ("md", md)) if on]
    if len(asked) > 1:
        fail(f"one output form at a time; got {' and '.join('--' + a for a in asked)}")
    if asked or output is None:
        return asked[0] if asked else None
    for name, suffix in FORMATS.items():
        if output.suffix == suffix:
            return name
    fail(f"-o must end in {', '.join(FORMATS.values())}, or give --json, --csv or --md; got {output.name!r}")


def show(
    printers: Any, report: Any, form: str | None, output: Path | None, fail: Fail, plot: Path | None = None
) -> None:
    """Print the report, or write it and print the table; then draw it."""
    from rich.console import Console

    if form is not None:
        text = printers.to_text(report, form)
        if output is None:
            typer.echo(text, nl=False)
        else:
            output.write_text(text, encoding="utf-8")
    if form is None or output is not None:
        Console().print(printers.to_table(report))
    if plot is not None:
        try:
            printers.plot(report, plot)
        except ValueError as error:  # nothing was timed
            fail(f"no figure: {error}")


@contextmanager
def progress() -> Iterator[Callable[[str, float], None]]:
    """A bar on stderr that is redrawn between measurements only: a drawing thread would disturb them."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    bar = Progress(
        BarColumn(20), TextColumn("{task.description}"), TimeElapsedColumn(),
        console=console, transient=True, auto_refresh=False, disable=not console.is_terminal,
    )  # fmt: skip
    with bar:
        task = bar.add_task("starting", total=1.0)

        def tell(text: str, done: float) -> None:
            bar.update(task, description=text, completed=done)
            bar.refresh()

        yield tell


# ---- forms
# ------------------------------------------------------------------------------------------------


def to_json(report: Any) -> str:
    return json_lib.dumps(dataclasses.asdict(report), indent=2) + "\n"


def to_csv(kind: Any, records: Iterable[Any]) -> str:
    """One line per record of dataclass `kind`; what is common to all stands in the JSON and Markdown forms."""
    out = io.StringIO()
    writer = csv.DictWriter(out, [f.name for f in dataclasses.fields(kind)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(dataclasses.asdict(r) for r in records)
    return out.getvalue()


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    return lines + ["| " + " | ".join(cells) + " |" for cells in rows]


def rich_table(
    title: str, head: Sequence[str], rows: Iterable[Sequence[str]], style: Callable[[Sequence[str]], str]
) -> RichTable:
    """For a terminal; style(cells) of a row."""
    from rich.table import Table as RichTable
    from rich.text import Text

    table = RichTable(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for i, name in enumerate(head):
        table.add_column(name, justify="left" if i == 0 or name == "contender" else "right")
    for cells in rows:
        table.add_row(*map(Text, cells), style=style(cells))
    return table


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
    lines = [f"- {line}" for line in header]
    for table in tables:
        lines += ["", f"**{table.title}**", "", *markdown_table(table.head, table.rows)]
    return "\n".join(lines) + "\n"


def to_table(header: Iterable[str], tables: Iterable[Table]) -> Group:
    """For a terminal."""
    from rich.console import Group
    from rich.text import Text

    parts: list[Any] = [Text(line, style="dim") for line in header]
    for table in tables:
        parts += [Text(""), rich_table(*table)]
    return Group(*parts)
