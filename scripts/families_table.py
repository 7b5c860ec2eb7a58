"""The table of families in docs/transformers.md, from the table of the integration.

python scripts/families_table.py                               print it
python scripts/families_table.py --write docs/transformers.md  put it between the marks in that file
python scripts/families_table.py --check docs/transformers.md  exit 1 if the file holds an old one
"""

from __future__ import annotations

import re
from pathlib import Path
from textwrap import wrap

from table_between_marks import parser, run

from anydelta.integrations.transformers import FAMILIES
from anydelta.integrations.transformers.families import Family

MARKS = ("<!-- families: written by `make readme` -->", "<!-- end of the families -->")
MAKEFILE = Path(__file__).parent.parent / "Makefile"


def table() -> str:
    """Families down, what they have across, as Markdown; below, what all have and the classes that see images."""
    rows = ["| family | layer | from | rule | MTP | images | tested on |", "|---|---|---|---|---|---|---|"]
    for f in FAMILIES:
        cells = (
            f.name, f"`{f.layer}`", f.since, f.rule, "yes" if f.mtp else "-", "yes" if f.multimodal else "-",
            ", ".join(tested(f)),
        )  # fmt: skip
        rows.append(f"| {' | '.join(cells)} |")
    seeing = ", ".join(f"`{f.multimodal}`" for f in FAMILIES if f.multimodal)
    text = f"All have the mixer and rollback. The classes that see images are {seeing}."
    return "\n".join([*rows, "", *wrap(text, 120, break_long_words=False)])


def tested(family: Family) -> list[str]:
    """The releases of Transformers of `make test-transformers` that have the family."""
    line = re.search(r"^TRANSFORMERS := (.*)$", MAKEFILE.read_text(encoding="utf-8"), re.MULTILINE)
    assert line is not None
    releases = [version.rpartition(".")[0] for version in line[1].split()]
    return [release for release in releases if _number(release) >= _number(family.since)]


def _number(release: str) -> tuple[int, ...]:
    return tuple(int(part) for part in release.split("."))


def main() -> None:
    run(parser(__doc__).parse_args(), table(), MARKS)


if __name__ == "__main__":
    main()
