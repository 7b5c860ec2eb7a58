"""The table of families in docs/transformers.md, from the table of the plug.

python scripts/families_table.py                               print it
python scripts/families_table.py --write docs/transformers.md  put it between the marks in that file
python scripts/families_table.py --check docs/transformers.md  exit 1 if the file holds an old one
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from anydelta.integrations.transformers import FAMILIES
from anydelta.integrations.transformers.families import Family

BEGIN = "<!-- families: written by `make readme` -->"
END = "<!-- end of the families -->"
MAKEFILE = Path(__file__).parent.parent / "Makefile"


def table() -> str:
    """Families down, what they have across, as Markdown."""
    rows = [
        "| family | layer | from | rule | mixer | rollback | MTP | sees images | tested on |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for f in FAMILIES:
        cells = (
            f.name, f"`{f.layer}`", f.since, f.rule, "yes", "yes", "yes" if f.mtp else "-",
            f"`{f.multimodal}`" if f.multimodal else "-", ", ".join(tested(f)),
        )  # fmt: skip
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def tested(family: Family) -> list[str]:
    """The releases of Transformers of `make test-transformers` that have the family."""
    line = re.search(r"^TRANSFORMERS := (.*)$", MAKEFILE.read_text(encoding="utf-8"), re.MULTILINE)
    assert line is not None
    releases = [version.rpartition(".")[0] for version in line[1].split()]
    return [release for release in releases if _number(release) >= _number(family.since)]


def _number(release: str) -> tuple[int, ...]:
    return tuple(int(part) for part in release.split("."))


def replaced(text: str, path: Path) -> str:
    """The text of a file with the table of today."""
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        sys.exit(f"families_table: {path} must hold the lines {BEGIN!r} and {END!r}.")
    return f"{head}{BEGIN}\n{table()}\n{END}{tail}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--write", type=Path, metavar="FILE")
    action.add_argument("--check", type=Path, metavar="FILE")
    args = parser.parse_args()
    path = args.write or args.check
    if path is None:
        print(table())
        return
    old = path.read_text(encoding="utf-8")
    new = replaced(old, path)
    if args.write:
        path.write_text(new, encoding="utf-8")
    elif new != old:
        sys.exit(f"families_table: the table in {path} is old; run: make readme.")


if __name__ == "__main__":
    main()
