"""Run the Python examples of Markdown files, so that no document promises what does not work.

    python scripts/run_examples.py README.md docs/conventions.md

The blocks marked "python" of one file run in order and share their names. A failure names file and line.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any


def blocks(path: Path) -> list[tuple[int, str]]:
    """(number of its first line, source) of every block marked "python"."""
    found: list[tuple[int, str]] = []
    lines: list[str] | None = None
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if lines is None:
            if line.strip() == "```python":
                lines, first = [], number + 1
        elif line.strip() == "```":
            found.append((first, "\n".join(lines) + "\n"))
            lines = None
        else:
            lines.append(line)
    if lines is not None:
        raise ValueError(f"{path}: the block that starts at line {first} has no end")
    return found


def run(path: Path) -> int:
    """Run a file's examples and return their number."""
    names: dict[str, Any] = {"__name__": "example"}
    found = blocks(path)
    for first, source in found:
        # Newlines in front: line numbers in a traceback are then those of the file.
        exec(compile("\n" * (first - 1) + source, str(path), "exec"), names)
    return len(found)


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit("run_examples: give one or more Markdown files.")
    for name in sys.argv[1:]:
        n = run(Path(name))
        if n == 0:
            sys.exit(f"run_examples: {name} has no Python example.")
        print(f"{name}: {n} example{'s' * (n > 1)} ran")


if __name__ == "__main__":
    main()
