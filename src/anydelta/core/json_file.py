"""Read a JSON file from elsewhere: its value, or one sentence that says what is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

MOST_BYTES = 64 * 2**20
"""Larger than any configuration, index or table."""
MOST_DEPTH = 64
"""Deeper than any of them, and far from the limit of Python's stack."""


def read_json(path: Path, *, infinities: bool = False) -> Any:
    """The value of a file. NaN and Infinity are not JSON; `infinities` allows them, as Transformers writes them.

    Raises:
        ValueError: there is no such file, or it is not JSON in UTF-8. The text is one line without the file's name.
    """

    def refuse(text: str) -> NoReturn:
        raise ValueError(f"it holds {text}, which is no JSON")

    try:
        if not path.is_file():  # reading a pipe or a device could block, or never end
            raise ValueError("there is no such file")
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"it is larger than {MOST_BYTES // 2**20} MiB")
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=None if infinities else refuse)
        if _depth(value) <= MOST_DEPTH:
            return value
        why = "it is nested too deeply"
    except RecursionError:
        why = "it is nested too deeply"
    except (ValueError, OSError) as error:
        why = " ".join(str(error).split())
    raise ValueError(why)


def _depth(value: object) -> int:
    """The depth of nested lists and objects, counted up to one more than is allowed."""
    depth, level = 0, [value]
    while depth <= MOST_DEPTH and (level := [x for x in level if isinstance(x, (dict, list))]):
        level = [y for x in level for y in (x.values() if isinstance(x, dict) else x)]
        depth += 1
    return depth
