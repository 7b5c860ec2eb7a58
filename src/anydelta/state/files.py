"""Files of checkpoints: safetensors with the name of their format. A bad file is refused in a sentence that names
it."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from ..core.arrays import Array

if TYPE_CHECKING:
    from types import ModuleType

_PLAIN = {"float16", "bfloat16", "float32", "float64"}


class File:
    """A file that `op` reads: its metadata and arrays, and how to refuse it.

    Args:
        op: the function that reads it; messages begin with its name.
        path: of a safetensors file.
        form: the format that its metadata must name.
        framework: "numpy" or "torch"; tensors are on the CPU.

    Raises:
        ValueError: there is no such file, it cannot be read, or it is of another format.
        ImportError: safetensors is missing.
    """

    def __init__(self, op: str, path: str | os.PathLike[str], form: str, framework: str):
        self.op, self.path, self.form = op, os.fspath(path), form
        module = safetensors(op, framework)
        if not os.path.isfile(self.path):
            self.refuse("a directory" if os.path.isdir(self.path) else "no such file")
        try:
            with module.safe_open(self.path, framework="np" if framework == "numpy" else "pt") as file:
                self.metadata: dict[str, str] = dict(file.metadata() or {})
                if self.metadata.get("format") == form:
                    self.arrays = {name: file.get_tensor(name) for name in list(file.keys())}
        except Exception as error:  # from safetensors, from the system, or a dtype that the framework lacks
            self.refuse(f"a file that cannot be read: {' '.join(str(error).split()) or type(error).__name__}")
        if self.metadata.get("format") != form:
            self.refuse(f"the format {self.metadata.get('format')!r}")

    def refuse(self, got: str) -> NoReturn:
        raise ValueError(
            f"{self.op}: requires a whole file of the format {self.form!r}; got {self.path} with {got}"
        )

    def parsed(self, name: str) -> Any:
        """The JSON of an entry of the metadata."""
        try:
            return json.loads(self.metadata[name])
        except KeyError:
            self.refuse(f"no {name!r} in its metadata")
        except (ValueError, RecursionError):
            self.refuse(f"{name!r} in its metadata that is no JSON, or nested too deeply")

    def count(self, name: str, value: object) -> int:
        """A number of tokens, or a token."""
        if type(value) is not int or not 0 <= value < 2**63:
            self.refuse(f"{name} of {str(value)[:40]}, which is no whole number from 0 on")
        return value

    def tokens(self, name: str, values: object) -> tuple[int, ...]:
        if not isinstance(values, list):
            self.refuse(f"{name} that are no list")
        return tuple(self.count(name, value) for value in values)

    def check(self, name: str, ndim: int, whole: bool = False) -> Array:
        """The array of that name, with `ndim` axes: finite numbers of a floating type, or integers if `whole`."""
        if name not in self.arrays:
            self.refuse(f"no array {name!r}")
        x = self.arrays[name]
        kind = str(x.dtype).removeprefix("torch.")
        if kind not in ({"int64"} if whole else _PLAIN) or x.ndim != ndim:
            what = "int64" if whole else "a floating type"
            self.refuse(f"{name!r} of {kind} {list(x.shape)}, where it should have {ndim} axes of {what}")
        if whole:
            return x
        finite = np.isfinite(x) if isinstance(x, np.ndarray) else x.isfinite()
        if not bool(finite.all()):
            self.refuse(f"numbers in {name!r} that are not finite")
        return x

    def only(self, names: Iterable[str]) -> None:
        """Refuse a file that holds other arrays."""
        if extra := sorted(set(self.arrays) - set(names)):
            self.refuse(f"an array {extra[0]!r}, which belongs to nothing")


def safetensors(op: str, framework: str) -> ModuleType:
    """The module `safetensors.numpy` or `safetensors.torch`."""
    try:
        return importlib.import_module(f"safetensors.{framework}")
    except ImportError as error:
        raise ImportError(
            f"{op}: requires the package safetensors; got none. pip install 'anydelta[safetensors]'"
        ) from error
