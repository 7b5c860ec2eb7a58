"""What the scripts that write a table into a document share: they print it, put it between two marks of a file, or
compare it with what stands there."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def parser(text: str | None) -> argparse.ArgumentParser:
    """With --write FILE and --check FILE."""
    found = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = found.add_mutually_exclusive_group()
    action.add_argument("--write", type=Path, metavar="FILE")
    action.add_argument("--check", type=Path, metavar="FILE")
    return found


def replaced(path: Path, table: str, marks: tuple[str, str]) -> tuple[str, str]:
    """The text of a file, and the same with this table. Ends the program where the file has no marks."""
    begin, end = marks
    old = path.read_text(encoding="utf-8")
    head, found, rest = old.partition(begin)
    _, ended, tail = rest.partition(end)
    if not found or not ended:
        sys.exit(f"{path} must hold the lines {begin!r} and {end!r}.")
    return old, f"{head}{begin}\n{table}\n{end}{tail}"


def run(args: argparse.Namespace, table: str, marks: tuple[str, str]) -> None:
    """What the arguments ask for."""
    path: Path | None = args.write or args.check
    if path is None:
        print(table)
        return
    old, new = replaced(path, table, marks)
    if args.write:
        path.write_text(new, encoding="utf-8")
    elif new != old:
        sys.exit(f"The table in {path} is old; run: make readme.")
