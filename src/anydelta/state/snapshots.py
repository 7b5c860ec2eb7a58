"""Checkpoints: copies of a sequence's states outside of any pool, named, searched by prefix, kept in files."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = Any


@dataclass(frozen=True)
class Snapshot:
    """A copy of one sequence's states, outside of any pool."""

    states: Array
    """[layers, HV, K, V] or [layers, HV, V, K]"""
    conv: Array | None = None
    """[layers, W-1, C]: the last inputs of the convolution, oldest first; None without one."""
    state_layout: str = "kv"
    length: int = 0
    """Tokens that the sequence has seen."""
    tokens: tuple[int, ...] | None = None
    """Which ones, if the caller said so: `Snapshots.nearest` looks for them."""


class Snapshots(MutableMapping[str, Snapshot]):
    """Named checkpoints, in memory and in a file: a shared prefix is computed once.

    snapshots["system prompt"] = pool.save(s, tokens=prompt)
    name, start = snapshots.nearest(tokens)         # the longest checkpoint that is a prefix of these tokens
    s = pool.restore(snapshots[name])               # go on with tokens[start:]
    """

    def __init__(self, items: Mapping[str, Snapshot] | None = None):
        self._items: dict[str, Snapshot] = dict(items or {})

    def __getitem__(self, name: str) -> Snapshot:
        return self._items[name]

    def __setitem__(self, name: str, snapshot: Snapshot) -> None:
        if not isinstance(name, str) or not name or "/" in name:
            raise ValueError(f"Snapshots: a name must be a string without '/'; got {name!r}")
        if not isinstance(snapshot, Snapshot):
            raise TypeError(
                f"Snapshots: requires a Snapshot, as pool.save returns; got {type(snapshot).__name__}"
            )
        self._items[name] = snapshot

    def __delitem__(self, name: str) -> None:
        del self._items[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def nearest(self, tokens: Iterable[int]) -> tuple[str, int] | None:
        """(name, number of its tokens) of the longest checkpoint whose tokens begin `tokens`; None if none does."""
        want = tuple(int(t) for t in tokens)
        best = None
        for name, item in self._items.items():
            seen = item.tokens
            if seen is not None and seen == want[: len(seen)] and (best is None or len(seen) > best[1]):
                best = (name, len(seen))
        return best

    def save(self, path: Any) -> None:
        """Write all checkpoints to a safetensors file. Requires the package safetensors (`anydelta[safetensors]`).

        Raises:
            ImportError: safetensors is missing.
        """
        arrays: dict[str, Any] = {}
        about = {}
        for name, item in self._items.items():
            arrays[f"{name}/states"] = item.states
            if item.conv is not None:
                arrays[f"{name}/conv"] = item.conv
            about[name] = {"state_layout": item.state_layout, "length": item.length, "tokens": item.tokens}
        metadata = {"format": "anydelta.snapshots.1", "snapshots": json.dumps(about)}
        torch_ones = [not isinstance(x, np.ndarray) for x in arrays.values()]
        if any(torch_ones) and not all(torch_ones):
            raise ValueError("Snapshots.save: requires arrays of one kind; got both NumPy's and torch's")
        module = _safetensors("torch" if any(torch_ones) else "numpy")
        dense = {n: x.contiguous() if any(torch_ones) else np.ascontiguousarray(x) for n, x in arrays.items()}
        module.save_file(dense, str(path), metadata=metadata)

    @classmethod
    def load(cls, path: Any, *, device: Any = None) -> Snapshots:
        """The checkpoints of a file, as NumPy arrays or, with a device, as torch tensors.

        Raises:
            ImportError: safetensors is missing.
            ValueError: the file holds something else.
        """
        module = _safetensors("numpy" if device is None else "torch")
        with module.safe_open(str(path), framework="np" if device is None else "pt") as f:
            metadata = f.metadata() or {}
            if metadata.get("format") != "anydelta.snapshots.1":
                raise ValueError(
                    f"Snapshots.load: requires a file that Snapshots.save wrote; got format {metadata.get('format')!r}"
                )
            names = set(f.keys())
            arrays = {n: f.get_tensor(n) for n in names}
        if device is not None:
            arrays = {n: x.to(device) for n, x in arrays.items()}
        out = cls()
        for name, about in json.loads(metadata["snapshots"]).items():
            tokens = None if about["tokens"] is None else tuple(about["tokens"])
            out[name] = Snapshot(
                arrays[f"{name}/states"],
                arrays.get(f"{name}/conv"),
                about["state_layout"],
                about["length"],
                tokens,
            )
        return out


def _safetensors(framework: str) -> Any:
    try:
        return importlib.import_module(f"safetensors.{framework}")
    except ImportError as error:
        raise ImportError(
            "Snapshots: saving and loading requires the package safetensors; got none. "
            "pip install 'anydelta[safetensors]'"
        ) from error
