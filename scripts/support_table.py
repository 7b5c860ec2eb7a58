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
    """Backends across, as Markdown: their devices, and what some refuse. Below: what all accept, and the reasons."""
    backends = found["backends"]
    rows = [
        "| | " + " | ".join(f"`{name}`" for name in backends) + " |",
        "|---|" + "---|" * len(backends),
        "| devices | " + " | ".join(_devices(name, b["devices"]) for name, b in backends.items()) + " |",
    ]
    everywhere, reasons = [], []
    for feature in found["cases"]:
        answers = {name: b["features"][feature] for name, b in backends.items()}
        if not any(answers.values()):
            everywhere.append(feature)
            continue
        rows.append(f"| {feature} | " + " | ".join("no" if why else "yes" for why in answers.values()) + " |")
        said: dict[str, list[str]] = {}
        for name, why in answers.items():
            if why:
                said.setdefault("; ".join(why), []).append(f"`{name}`")
        reasons += [f"- {feature}: {', '.join(names)}: {why}." for why, names in said.items()]
    if everywhere:
        reasons = [f"All backends accept {'; '.join(everywhere)}.", *([""] if reasons else []), *reasons]
    lines = [line for text in reasons for line in _wrapped(text)]
    return "\n".join([*rows, *([""] if lines else []), *lines])


def _wrapped(text: str) -> list[str]:
    indent = "  " if text.startswith("- ") else ""
    return wrap(text, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False) or [""]


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
