"""A picture of the program in a terminal: runs its commands here and turns their output into an SVG.

    python scripts/recording.py docs/images/terminal.svg 'anydelta doctor' 'anydelta generate -n 24 "Psalm 1"'

Each command runs in a terminal of 80 columns. A command that fails ends the recording.
"""

from __future__ import annotations

import io
import os
import pty
import re
import shlex
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

COLUMNS = 80


def in_terminal(command: str) -> str:
    """What a command prints to a terminal, with its colours, and then its lines on stderr, without the progress."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(COLUMNS), "LINES": "40", "TERM": "xterm-256color"}
    words = shlex.split(command)
    beside = Path(sys.executable).parent / words[0]
    words[0] = str(beside) if beside.exists() else words[0]
    run = subprocess.Popen(
        words, stdout=theirs, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, env=environment
    )
    os.close(theirs)
    printed = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # Linux's end of a terminal
            break
        if not part:
            break
        printed += part
    errors = run.communicate()[1].decode(errors="replace")
    os.close(ours)
    if run.returncode:
        sys.exit(f"recording: {command!r} failed: {errors.strip()}")
    told = [line for line in errors.splitlines() if not re.match(r" *\d+% after ", line)]
    return "\n".join([printed.decode().replace("\r\n", "\n").rstrip(), *told])


def recorded(commands: list[str]) -> str:
    """The commands and what they print, as an SVG."""
    console = Console(
        record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor"
    )
    for command in commands:
        console.print(Text.assemble(("$ ", "bold green"), (command, "bold")), soft_wrap=True)
        console.print(Text.from_ansi(in_terminal(command).rstrip()))
        console.print()
    # rich's template loads a font from elsewhere; any monospaced one will do.
    svg = console.export_svg(title="anydelta", unique_id="anydelta")
    head, _, rest = svg.partition("<style>")
    style, _, tail = rest.partition("</style>")
    style = "".join(block + "}" for block in style.split("}")[:-1] if "@font-face" not in block)
    return f"{head}<style>{style}</style>{tail}".replace("Fira Code, monospace", "monospace")


def main() -> None:
    if len(sys.argv) < 3:
        sys.exit("recording: give a file to write and one or more commands.")
    Path(sys.argv[1]).write_text(recorded(sys.argv[2:]), encoding="utf-8")


if __name__ == "__main__":
    main()
