"""How the programs print and end: text from data is printed literally, and a wrong input gives one sentence.

A command raises `Refused` for what its user can correct, and `Failed` for a result that is wrong or missing. `run`
alone turns these, and whatever else ends a program, into a line on stderr and an exit status:

    0 success   1 failed   2 refused   70 a bug of anydelta   130 interrupted   141 stdout was closed
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TextIO

if TYPE_CHECKING:
    from typing import TypeAlias

    import typer
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.text import Text

    Shown: TypeAlias = RenderableType

FAULT, INTERRUPTED, CLOSED = 70, 130, 141

_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters except tab and newline; they begin ANSI escapes
    "\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069"  # characters that end a line or change its direction
    "\ud800-\udfff]"  # bytes of a file name that are not UTF-8
)


class Refused(Exception):
    """Bad input, or a missing package. The text is one sentence."""

    status = 2


class Failed(Refused):
    """The work began, and its result is wrong or missing. The text is one sentence."""

    status = 1


@contextmanager
def refusing(*kinds: type[Exception]) -> Iterator[None]:
    """Turn errors of these kinds, which are about the user's input, into Refused with their text."""
    try:
        yield
    except kinds as error:
        raise Refused(str(error) or type(error).__name__) from error


# ---- Text


def literal(text: object) -> str:
    """The text with control characters as escapes, so that it cannot move the cursor or change colours or direction."""
    return _UNSEEN.sub(lambda m: m[0].encode("unicode_escape").decode(), str(text))


def one_line(text: object) -> str:
    """`literal`, with one space for each run of white space."""
    return " ".join(literal(str(text).replace("\r\n", "\n")).split())


def first_line(error: BaseException) -> str:
    """The first line of an error's text; the error's type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def say(text: object = "", end: str = "\n") -> None:
    """Print text on stdout: `literal` on a terminal, unchanged into a file or a pipe."""
    print(literal(text) if sys.stdout.isatty() else text, end=end, flush=not end)


def tell(text: object) -> None:
    """Print a line on stderr."""
    print(literal(text), file=sys.stderr)


def to_json(value: object, indent: int | None = 1) -> str:
    """The value as JSON. NaN and infinity, which JSON lacks, become null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {name: _finite(x) for name, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def csv_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """The text of a CSV file. Control characters become escapes, because some readers break a cell at them."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(
        [literal(cell) if isinstance(cell, str) else cell for cell in cells] for cells in (head, *rows)
    )
    return out.getvalue()


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[object]], left: int = 1) -> list[str]:
    """Lines of a Markdown table: `left` columns of text, the others of numbers."""
    rule = "|" + "---|" * left + "---:|" * (len(head) - left)
    top, *others = (f"| {' | '.join(map(_cell, cells))} |" for cells in (head, *rows))
    return [top, rule, *others]


def _cell(text: object) -> str:
    """The text, with characters escaped that would end the cell or begin a tag."""
    return one_line(text).replace("|", "\\|").replace("<", "&lt;")


def console(*, err: bool = False) -> Console:
    """A rich console that prints strings as they are: no markup, no emoji codes, no colours."""
    from rich.console import Console

    class Literal(Console):
        def on_broken_pipe(self) -> None:
            raise  # rich would end the program with status 1; `run` decides the status

    return Literal(stderr=err, markup=False, emoji=False, highlight=False)


def show(*shown: object) -> None:
    """Print tables and the like on stdout."""
    console().print(*shown, sep="\n")


@dataclass(frozen=True)
class Table:
    """For `show`: columns are right-aligned, except the first and those of `left`; style(cells) styles a row.

    Nothing is cut off: if a word does not fit its column, each row is printed as lines `heading: cell`.
    """

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[object]]
    style: Callable[[Sequence[object]], str] = lambda cells: ""
    left: Sequence[str] = ()
    boxed: bool = False

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Shown]:
        from rich.measure import Measurement
        from rich.table import Table
        from rich.text import Text

        title = Text(literal(self.title), style="bold") if self.title else None
        look: dict[str, Any] = {} if self.boxed else {"box": None, "pad_edge": False}
        found = Table(title=title, title_justify="left", show_header=any(self.head), **look)
        for i, name in enumerate(self.head):
            side: Literal["left", "right"] = "left" if i == 0 or name in self.left else "right"
            found.add_column(Text(literal(name)), justify=side, overflow="fold")
        for cells in self.rows:
            found.add_row(*(Text(literal(cell)) for cell in cells), style=self.style(cells))
        needed = Measurement.get(console, options.update(max_width=10**6), found).minimum
        if needed <= options.max_width:
            yield found
            return
        if title is not None:
            yield title
        for cells in self.rows:
            named = [(name, cell) for name, cell in zip(self.head, cells, strict=True) if cell != ""]
            if any(self.head):
                yield lines((*(f"{name}: {cell}" for name, cell in named), ""), self.style(cells))
            else:
                yield lines([": ".join(str(cell) for _, cell in named)], self.style(cells))


def lines(texts: Iterable[object], style: str = "") -> Text:
    """For `show`: one line or more of each text."""
    from rich.text import Text

    return Text("\n".join(map(literal, texts)), style=style, overflow="fold")


@contextmanager
def progress() -> Iterator[Callable[[str, float], None]]:
    """tell(text, share done): a bar on stderr, or without a terminal a line every `LINE_SECONDS`.

    Only `tell` draws, at most ten times a second: a thread that draws would disturb measurements.
    """
    where = console(err=True)
    if not sys.stderr.isatty() or where.is_dumb_terminal:  # FORCE_COLOR makes rich take a file for a terminal
        yield _lines_of_progress()
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    bar = Progress(
        BarColumn(20), TextColumn("{task.description}", markup=False), TimeElapsedColumn(),
        console=where, transient=True, auto_refresh=False,
    )  # fmt: skip
    with bar:
        task, drawn = bar.add_task("starting", total=1.0), 0.0

        def tell(text: str, done: float) -> None:
            nonlocal drawn
            if time.monotonic() - drawn >= 0.1:
                bar.update(task, description=literal(text), completed=done)
                bar.refresh()
                drawn = time.monotonic()

        yield tell


LINE_SECONDS = 15.0
"""Seconds between two lines of progress in a log."""


def _lines_of_progress() -> Callable[[str, float], None]:
    began = told = time.monotonic()

    def line(text: str, done: float) -> None:
        nonlocal told
        now = time.monotonic()
        if now - told >= LINE_SECONDS:
            tell(f"{done:4.0%} after {now - began:.0f} s: {one_line(text)}")
            told = now

    return line


# ---- Files


def check_writable(path: Path) -> None:
    """Check before the work that the file can be written, without changing it.

    Raises:
        Refused: it cannot.
    """
    with refusing(OSError, ValueError):  # the name is too long, or has a NUL
        if not path.parent.is_dir():
            raise Refused(f"requires a folder that exists; got {path}, whose folder does not exist")
        if path.is_dir():
            raise Refused(f"requires a file to write; got the folder {path}")
        existed = path.exists()
        with path.open("ab"):  # the only sure way to know
            pass
        if not existed:
            path.unlink()


# ---- The end


def run(build: Callable[[], typer.Typer], args: list[str] | None) -> NoReturn:
    """Run the program that `build` makes and exit as the list at the top of this file says."""
    _open_streams()
    args = list(sys.argv[1:] if args is None else args)
    name = "anydelta"
    if {"--show-completion", "--install-completion"} & set(args[:-1]):  # with the name of a shell
        os.environ["_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION"] = "1"
    try:
        import typer.main

        command = typer.main.get_command(build())
        reflow(command)
        where = console()
        if where.width < HELP_COLUMNS or where.is_dumb_terminal:
            without_boxes(command)
        if "_ANYDELTA_COMPLETE" in os.environ:  # a shell asks for completions
            command.main(args, prog_name=name)
        name = _called(command, args)
        raise SystemExit(_invoke(command, args))
    except Refused as error:
        _end(name, error, error.status)
    except KeyboardInterrupt:
        _end(name, "interrupted", INTERRUPTED)
    except BrokenPipeError:
        _leave_stdout()
        raise SystemExit(CLOSED) from None
    except SystemExit as stop:
        if isinstance(stop.__context__, BrokenPipeError):  # rich ends the program while it prints help
            _leave_stdout()
            raise SystemExit(CLOSED) from None
        raise
    except OSError as error:
        _end(name, f"requires a file that can be read or written; got {error}", 1)
    except MemoryError as error:
        _end(name, f"requires more memory than there is; got {str(error) or 'no more'}", 1)
    except Exception as error:
        if not hasattr(error, "format_message"):
            traceback.print_exc()
            said = f"{type(error).__name__}: {error}"
            _end(name, f"this is a bug of anydelta, please report it with the lines above: {said}", FAULT)
        message = error.format_message()  # typer's: a wrong option or command
        if type(error).__name__ == "NoArgsIsHelpError":  # its help, or "" if typer has printed it
            say(message)
            raise SystemExit(2) from None
        _end(name, f"{message.rstrip('.')}. See {name} --help", 2)


def reflow(command: Any) -> None:
    """Join the lines of each paragraph in the help of a command and its subcommands, so that it fits any width.

    Indented lines (examples) are not joined.
    """
    if command.help:
        blocks = command.help.split("\n\n")
        joined = (b if re.search(r"^ ", b, re.MULTILINE) else " ".join(b.split()) for b in blocks)
        command.help = "\n\n".join(joined)
    for inner in getattr(command, "commands", {}).values():
        reflow(inner)


HELP_COLUMNS = 72
"""In a narrower terminal rich would cut off words of the help."""


def without_boxes(command: Any) -> None:
    """Print the help of a command and its subcommands as plain lines, which fold and are never cut off."""
    command.rich_markup_mode = None
    if command.help:
        command.help = command.help.replace("\nExamples:\n", "\n\b\nExamples:\n")  # keeps their lines
    for inner in getattr(command, "commands", {}).values():
        without_boxes(inner)


def _invoke(command: Any, args: list[str]) -> int:
    """The exit status, after all output has been written."""
    import typer

    status = 0
    try:
        with command.make_context("anydelta", args) as context:
            command.invoke(context)
    except typer.Exit as stop:
        status = stop.exit_code
    sys.stdout.flush()
    return status


def _end(name: str, sentence: object, status: int) -> NoReturn:
    """Print one sentence on one line, and exit."""
    try:
        sys.stdout.flush()
    except OSError:
        _leave_stdout()
    said = one_line(sentence).rstrip(".:")
    tell(f"{name}: {said}{'' if said.endswith('?') else '.'}")
    raise SystemExit(status)


def _called(command: object, args: Sequence[str]) -> str:
    """The words that name a command, as "anydelta bench ops"."""
    words = ["anydelta"]
    for word in args:
        command = getattr(command, "commands", {}).get(word)
        if command is None:
            break
        words.append(word)
    return " ".join(words)


def _open_streams() -> None:
    """Write characters that a stream's encoding lacks as escapes; replace a closed stream by the null device."""
    for name in ("stdout", "stderr"):
        stream: TextIO | None = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  as long as the process
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _leave_stdout() -> None:
    """Discard all further output, including what Python flushes when it ends."""
    with suppress(OSError, ValueError):  # a stream that is not a file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
