"""The support table of README.md, from `anydelta conform --support --json`.

    python scripts/support_table.py                       print it
    python scripts/support_table.py --write README.md     put it between the marks in that file
    python scripts/support_table.py --check README.md     exit 1 if the file holds an old one

`--from FILE` reads what that command printed (`-` is stdin); without it the script asks the backends as the
command does.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from textwrap import wrap
from typing import Any

from table_between_marks import parser, run

from anydelta.conformance.support import support

MARKS = ("<!-- support table: written by `make readme` -->", "<!-- end of the support table -->")


def table(found: dict[str, Any]) -> str:
    """Backends across, as Markdown: their devices, and what some refuse. Below: what all accept."""
    backends = found["backends"]
    rows = [
        "| | " + " | ".join(f"`{name}`" for name in backends) + " |",
        "|---|" + "---|" * len(backends),
        "| devices | " + " | ".join(_devices(name, b["devices"]) for name, b in backends.items()) + " |",
    ]
    everywhere = []
    for feature in found["cases"]:
        answers = {name: b["features"][feature] for name, b in backends.items()}
        if not any(answers.values()):
            everywhere.append(feature)
            continue
        rows.append(f"| {feature} | " + " | ".join("no" if why else "yes" for why in answers.values()) + " |")
    if everywhere:
        rows += [
            "",
            *wrap(
                f"All accept {'; '.join(everywhere)}.", 120, break_long_words=False, break_on_hyphens=False
            ),
        ]
    return "\n".join(rows)


def _devices(backend: str, devices: list[str]) -> str:
    return "any" if backend == "reference" else ", ".join(devices)


def read(source: str | None) -> dict[str, Any]:
    """What the command printed into a file or stdin ("-"), or what it would print now."""
    if source is None:
        return support()
    text = sys.stdin.read() if source == "-" else Path(source).read_text(encoding="utf-8")
    try:
        found: dict[str, Any] = json.loads(text)
        table(found)
    except (ValueError, TypeError, KeyError, AttributeError):
        sys.exit(
            f"support_table: --from requires the output of `anydelta conform --support --json`; got {text[:40]!r}."
        )
    return found


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--from", dest="source", metavar="FILE")
    args = options.parse_args()
    run(args, table(read(args.source)), MARKS)


if __name__ == "__main__":
    main()
