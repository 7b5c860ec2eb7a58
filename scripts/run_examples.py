"""Run the Python examples of Markdown files, so that every documented example works.

    python scripts/run_examples.py README.md docs/conventions.md
    python scripts/run_examples.py --allow-missing README.md        skip blocks whose packages are not installed

The blocks marked "python" of one file run in order and share their names. A failure names file and line. The line
`<!-- needs: torch transformers -->` above a block names the packages that it needs beside NumPy.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any


def blocks(path: Path) -> list[tuple[int, str, list[str]]]:
    """(number of its first line, source, packages that it needs) of every block marked "python"."""
    found: list[tuple[int, str, list[str]]] = []
    lines: list[str] | None = None
    needs: list[str] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if lines is None:
            if line.strip() == "```python":
                lines, first = [], number + 1
            elif (named := re.fullmatch(r"<!-- needs: (.*) -->", line.strip())) is not None:
                needs = named[1].split()
        elif line.strip() == "```":
            found.append((first, "\n".join(lines) + "\n", needs))
            lines, needs = None, []
        else:
            lines.append(line)
    if lines is not None:
        raise ValueError(f"{path}: the block that starts at line {first} has no end")
    return found


def run(path: Path, allow_missing: bool = False) -> int:
    """Run a file's examples and return how many ran."""
    names: dict[str, Any] = {"__name__": "example"}
    ran = 0
    for first, source, needs in blocks(path):
        if allow_missing and any(importlib.util.find_spec(name) is None for name in needs):
            continue
        # Newlines in front: line numbers in a traceback are then those of the file.
        exec(compile("\n" * (first - 1) + source, str(path), "exec"), names)
        ran += 1
    return ran


def main() -> None:
    names = [name for name in sys.argv[1:] if name != "--allow-missing"]
    if not names:
        sys.exit("run_examples: give one or more Markdown files.")
    for name in names:
        n = run(Path(name), "--allow-missing" in sys.argv)
        if n == 0:
            sys.exit(f"run_examples: {name} has no Python example.")
        print(f"{name}: {n} example{'s' * (n > 1)} ran")


if __name__ == "__main__":
    main()
