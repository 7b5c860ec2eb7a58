"""Print the licences of libraries that are linked into the extension, from the installed packages.

python scripts/third_party_notices.py FOLDER_OF_NANOBIND
"""

from __future__ import annotations

import sys
from pathlib import Path


def nanobind(package: Path) -> str:
    """Its LICENSE: beside its sources, or in what pip wrote beside the package."""
    places = [package / "LICENSE", *sorted(package.parent.glob("nanobind-*.dist-info/**/LICENSE*"))]
    found = next((path for path in places if path.exists()), None)
    return (
        found.read_text("utf-8").strip()
        if found
        else "Its licence lies where its package was installed from."
    )


def robin_map(package: Path) -> str:
    """The comment at the top of the hash map's header, which nanobind comes with."""
    found = next(package.glob("ext/robin_map/**/robin_map.h"), None)
    if found is None:
        return "Its licence lies where its package was installed from."
    header = found.read_text("utf-8")
    comment = header[header.index("/**") + 3 : header.index("*/")]
    return "\n".join(line.strip().removeprefix("*").strip() for line in comment.splitlines()).strip()


def main() -> None:
    package = Path(sys.argv[1]).resolve()
    print("The extension anydelta._core contains compiled parts of these projects.\n")
    for name, text in (("nanobind", nanobind(package)), ("tsl::robin_map", robin_map(package))):
        print(f"{name}\n{'=' * len(name)}\n\n{text}\n")


if __name__ == "__main__":
    main()
