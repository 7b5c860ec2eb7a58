"""Options that the commands of `anydelta bench` share, their checks, and the output of a report.

A command declares `json: Json = False` and so on. It calls `checked` before it measures and `show` after it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ... import terminal
from ...terminal import Failed, Refused, check_writable, progress
from ..measure import outputs, small_report
from ..measure.contender import needs
from ..measure.ops import Settings

if TYPE_CHECKING:
    from types import ModuleType

FORMATS = {"json": ".json", "csv": ".csv", "md": ".md"}
PLOTS = (".svg", ".png", ".pdf")

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Csv = Annotated[bool, typer.Option("--csv", help="Print CSV.")]
Md = Annotated[bool, typer.Option("--md", help="Print Markdown.")]
Output = Annotated[
    Path | None, typer.Option("-o", "--output", help="Write the report to this file: .json, .csv or .md.")
]
Rounds = Annotated[int, typer.Option("--rounds", "-r", help="Interleaved rounds.")]
SampleMs = Annotated[float, typer.Option("--sample-ms", help="Length of one sample.")]
Threads = Annotated[str, typer.Option("--threads", "-t", help="Numbers of threads, as 1,2.")]
Plot = Annotated[Path | None, typer.Option("--plot", help="Draw a figure: .svg, .png or .pdf.")]


def checked(json: bool, csv: bool, md: bool, output: Path | None, plot: Path | None = None) -> str | None:
    """The requested form ("json", "csv", "md"), None for a table.

    Raises:
        Refused: the output could not be written afterwards.
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


def show(
    printers: ModuleType, report: object, form: str | None, output: Path | None, plot: Path | None = None
) -> None:
    """Print the report, or write it and print the table; then draw it.

    Raises:
        Failed: a file cannot be written, or there are no times to draw.
    """
    if form is not None:
        text = outputs.to_text(printers, report, form)
        if output is None:
            terminal.say(text, end="")
        else:
            output.write_text(text, encoding="utf-8")
    if form is None or output is not None:
        terminal.show(outputs.to_table(printers, report))
    if plot is not None:
        try:
            printers.plot(report, plot)
        except ValueError as error:  # nothing was timed
            raise Failed(f"no figure: {error}") from error


def small(
    measure: Callable[..., small_report.Measured],
    rounds: int,
    sample_ms: float,
    json: bool,
    csv: bool,
    md: bool,
    output: Path | None,
) -> None:
    """Run one of the small measurements, measure(settings=, progress=), and show it."""
    form = checked(json, csv, md, output)
    check_rounds(rounds, sample_ms)
    with progress() as tell:
        measured = measure(settings=Settings(rounds, sample_ms / 1e3), progress=tell)
    show(small_report, measured, form, output)


def check_rounds(rounds: int, sample_ms: float) -> None:
    if rounds < 1:
        raise Refused(f"--rounds must be at least 1; got {rounds}")
    if not 0 < sample_ms <= 10000:
        raise Refused(f"--sample-ms must be above 0 and at most 10000; got {sample_ms:g}")


def numbers_of_threads(text: str | None, available: int) -> list[int]:
    return [available] if text is None else numbers("-t", text, 1024)


def numbers(option: str, text: str, most: int) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = [0]
    if min(counts) < 1 or max(counts) > most:
        raise Refused(f"{option} must be numbers from 1 to {most} such as 1,2; got {text!r}")
    return list(dict.fromkeys(counts))
