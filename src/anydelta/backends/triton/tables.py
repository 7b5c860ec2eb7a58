"""Tables of launches by architecture: their format, their places, reading and writing.

    {"version": 1, "arch": "sm_90", "rows": {
    "recurrent T<=1 heads<=512 K=128 V=128 gda bfloat16": {"launch": {"BV": 16, "warps": 2}, "how": "..."}
    }}

A row applies to the calls of its class: up to so many tokens per sequence and value heads in all sequences together,
and more than the next smaller class. A row without T and heads applies to classes without their own row. `launch` has
fields of config.Config, and the heuristic decides the others. `how` says where the row comes from.

Shipped tables are in configs/ beside this file; the user's rows, which `anydelta tune` writes, override them. A
process reads its tables once, so a shape keeps its launch.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from ...core.json_file import read_json

VERSION = 1
ENV = "ANYDELTA_TRITON_CONFIGS"
"""The user's folder of tables. Empty: no folder."""
SHIPPED = Path(__file__).parent / "configs"

_WARPS = (1, 2, 4, 8, 16)
FIELDS: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "recurrent": {"BV": (1, 2, 4, 8, 16, 32, 64, 128, 256), "warps": _WARPS},
    "chunks": {
        "chunk": (16, 32, 64), "scan_BV": (16, 32, 64, 128), "scan_warps": _WARPS, "scan_stages": (1, 2, 3, 4),
        "prepare_warps": _WARPS, "scores_warps": _WARPS, "segments": tuple(range(65)),
    },
    "backward": {
        "backward_chunk": (16, 32, 64), "back_prepare_warps": _WARPS, "back_warps": _WARPS, "pairs_warps": _WARPS,
        "gradients_warps": _WARPS, "gradients_BV": (16, 32, 64), "gradients_slice": (16, 32, 64),
    },
}  # fmt: skip
"""By kernel, the fields that a row may set and their values."""

_NAME = re.compile(
    rf"({'|'.join(FIELDS)})( T<=[0-9]+ heads<=[0-9]+)? K=[0-9]+ V=[0-9]+ (gda|kda) (bfloat16|float16|float32)"
)
Row = Mapping[str, Any]


def keys(kernel: str, *, tokens: float, heads: int, K: int, V: int, kda: bool, dtype: str) -> tuple[str, str]:
    """The names of the rows for a call with `tokens` per sequence (on average) and `heads` value heads in all sequences
    together: the row of its class, and the row of all classes.

    `recurrent` has classes of one token and of several, chunks of 128, 1024, 8192, ... tokens. Heads: 2, 8, 32, ...
    """
    if kernel == "recurrent":
        at_most = 1 if tokens <= 1 else 16
    else:
        at_most = 128
        while at_most < tokens:
            at_most *= 8
    most_heads = 2
    while most_heads < heads:
        most_heads *= 4
    problem = f"K={K} V={V} {'kda' if kda else 'gda'} {dtype}"
    return f"{kernel} T<={at_most} heads<={most_heads} {problem}", f"{kernel} {problem}"


def user_folder() -> Path | None:
    """Where `anydelta tune` writes and calls read: ANYDELTA_TRITON_CONFIGS, or anydelta/triton in the user's cache."""
    asked = os.environ.get(ENV)
    if asked is not None:
        return Path(asked) if asked else None
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "anydelta" / "triton"


def read(path: Path) -> dict[str, Row]:
    """The rows of a file; none if it does not exist.

    Raises:
        ValueError: it is not a table for the architecture in its name. The text names the file.
    """

    def require(right: bool, what: str, got: object) -> None:
        if not right:
            raise ValueError(
                f"triton: the table {path} must {what}; got {str(got)[:80]!r}. "
                "Remove the file, or write another with anydelta tune"
            )

    if not path.is_file():
        return {}
    try:
        table = read_json(path)
    except ValueError as error:
        table = error
    require(isinstance(table, dict) and isinstance(table.get("rows"), dict), "be JSON with rows", table)
    require(table.get("version") == VERSION, f"have version {VERSION}", table.get("version"))
    require(table.get("arch") == path.stem, f"be for {path.stem}", table.get("arch"))
    rows: dict[str, Row] = table["rows"]
    for name, row in rows.items():
        named = _NAME.fullmatch(name)
        require(
            named is not None,
            "have rows named like 'chunks T<=8192 heads<=32 K=128 V=128 gda bfloat16'",
            name,
        )
        known = FIELDS[name.partition(" ")[0]]
        launch = row.get("launch") if isinstance(row, dict) else None
        require(isinstance(launch, dict), f"have a launch in {name!r}", row)
        for field, value in (launch or {}).items():
            allowed = known.get(field, ())
            require(bool(allowed), f"set {', '.join(known)} in {name!r}", field)
            good = type(value) is int and value in allowed
            require(good, f"have a valid {field} in {name!r}", value)
    return rows


@cache
def rows(arch: str) -> Mapping[str, Row]:
    """The rows for an architecture: the shipped ones, overridden by the user's.

    Raises:
        ValueError: as `read`.
    """
    user = user_folder()
    found = read(SHIPPED / f"{arch}.json")
    return found if user is None else {**found, **read(user / f"{arch}.json")}


def merge(path: Path, new: Mapping[str, Row]) -> None:
    """Write rows to the file of an architecture: replace those of the same name, keep the others.

    Raises:
        ValueError: the existing file is not a table.
        OSError: it cannot be written.
    """
    merged = {**read(path), **new}
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(merged[name])}" for name in sorted(merged))
    text = f'{{"version": {VERSION}, "arch": "{path.stem}", "rows": {{\n{lines}\n}}}}\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    # A reader sees the old file or the new one.
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
        file.write(text)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)
    rows.cache_clear()
