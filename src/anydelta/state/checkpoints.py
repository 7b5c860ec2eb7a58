"""Checkpoints: copies of a sequence's states outside of any pool, named, searched by prefix, kept in files."""

from __future__ import annotations

import json
from collections.abc import ItemsView, Iterable, Iterator, Mapping, MutableMapping, ValuesView
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from ..core.arrays import Array
from .files import File, safetensors

if TYPE_CHECKING:
    import os

    import torch

FORMAT = "anydelta.snapshots.1"


T = TypeVar("T")


@dataclass(frozen=True)
class Checkpoint:
    """A copy of one sequence's states, outside of any pool."""

    states: Array
    """[layers, HV, K, V] or [layers, HV, V, K]"""
    conv: Array | None = None
    """[layers, W-1, C]: the last inputs of the convolution, oldest first; None without one."""
    state_layout: str = "kv"
    length: int = 0
    """Tokens that the sequence has seen."""
    tokens: tuple[int, ...] | None = None
    """The tokens, if the caller gave them; `Checkpoints.nearest` compares them."""


class Checkpoints(MutableMapping[str, Checkpoint]):
    """Named checkpoints, in memory and in a file: a shared prefix is computed once. Threads may share one.

    checkpoints["system prompt"] = pool.save(s, tokens=prompt)
    name, start = checkpoints.nearest(tokens)       # the longest checkpoint that is a prefix of these tokens
    s = pool.restore(checkpoints[name])             # go on with tokens[start:]
    """

    def __init__(self, items: Mapping[str, Checkpoint] | None = None):
        self._items: dict[str, Checkpoint] = dict(items or {})

    def __getitem__(self, name: str) -> Checkpoint:
        return self._items[name]

    def __setitem__(self, name: str, checkpoint: Checkpoint) -> None:
        if not _is_name(name):
            raise ValueError(f"Checkpoints: a name must be a string without '/'; got {name!r}")
        if not isinstance(checkpoint, Checkpoint):
            raise TypeError(
                f"Checkpoints: requires a Checkpoint, as pool.save returns; got {type(checkpoint).__name__}"
            )
        self._items[name] = checkpoint

    def __delitem__(self, name: str) -> None:
        del self._items[name]

    def __len__(self) -> int:
        return len(self._items)

    # Each of these is one operation of the dictionary, or works on a copy of it, so threads may share it.

    def __iter__(self) -> Iterator[str]:
        return iter(self._items.copy())

    def values(self) -> ValuesView[Checkpoint]:
        """The checkpoints, of a copy of the dictionary."""
        return self._items.copy().values()

    def items(self) -> ItemsView[str, Checkpoint]:
        """Names and checkpoints, of a copy of the dictionary."""
        return self._items.copy().items()

    def pop(self, name: str, *default: T) -> Checkpoint | T:
        """Remove a checkpoint and return it; without it `default`, or KeyError."""
        return self._items.pop(name, *default)

    def popitem(self) -> tuple[str, Checkpoint]:
        """Remove some checkpoint and return it with its name; KeyError if there is none."""
        for name, item in self.items():
            if self._items.pop(name, None) is not None:
                return name, item
        raise KeyError("popitem: requires a checkpoint; got none")

    def clear(self) -> None:
        """Remove all checkpoints."""
        self._items.clear()

    def nearest(self, tokens: Iterable[int]) -> tuple[str, int] | None:
        """(name, number of its tokens) of the longest checkpoint that is a prefix of `tokens`; None if there is
        none."""
        want = tuple(int(t) for t in tokens)
        best = None
        for name, item in self.items():
            seen = item.tokens
            if seen is not None and seen == want[: len(seen)] and (best is None or len(seen) > best[1]):
                best = (name, len(seen))
        return best

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all checkpoints to a safetensors file. Requires the package safetensors (`anydelta[safetensors]`).

        Raises:
            ImportError: safetensors is missing.
        """
        arrays: dict[str, Array] = {}
        about = {}
        for name, item in self.items():
            arrays[f"{name}/states"] = item.states
            if item.conv is not None:
                arrays[f"{name}/conv"] = item.conv
            about[name] = {
                "state_layout": item.state_layout, "length": item.length, "tokens": item.tokens,
                "conv": item.conv is not None,
            }  # fmt: skip
        metadata = {"format": FORMAT, "snapshots": json.dumps(about)}
        torch_ones = [not isinstance(x, np.ndarray) for x in arrays.values()]
        if any(torch_ones) and not all(torch_ones):
            raise ValueError("Checkpoints.save: requires arrays of one kind; got both NumPy's and torch's")
        module = safetensors("Checkpoints.save", "torch" if any(torch_ones) else "numpy")
        dense = {n: x.contiguous() if any(torch_ones) else np.ascontiguousarray(x) for n, x in arrays.items()}
        module.save_file(dense, str(path), metadata=metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: torch.device | str | None = None) -> Checkpoints:
        """The checkpoints of a file, as NumPy arrays or, with a device, as torch tensors.

        Raises:
            ImportError: safetensors is missing.
            ValueError: there is no such file, or it is not a complete file of `save` with finite numbers.
        """
        file = File("Checkpoints.load", path, FORMAT, "numpy" if device is None else "torch")
        about = file.parsed("snapshots")
        if not isinstance(about, dict) or not all(map(_is_name, about)):
            file.refuse("no names of checkpoints in its metadata")
        out = cls({name: _checkpoint(file, name, facts) for name, facts in about.items()})
        file.only(
            f"{n}/{part}"
            for n, x in out.items()
            for part in ("states", *(["conv"] if x.conv is not None else []))
        )
        if device is None:
            return out
        return cls({name: replace(item, **_on(device, item)) for name, item in out.items()})


def _is_name(name: object) -> bool:
    return isinstance(name, str) and bool(name) and "/" not in name


def _checkpoint(file: File, name: str, facts: object) -> Checkpoint:
    if not isinstance(facts, dict) or facts.get("state_layout") not in ("kv", "vk"):
        file.refuse(f"no state_layout of {name!r}")
    states = file.check(f"{name}/states", 4)
    with_conv = facts.get("conv", f"{name}/conv" in file.arrays)  # earlier files do not say it
    conv = file.check(f"{name}/conv", 3) if with_conv else None
    if conv is not None and conv.shape[0] != states.shape[0]:
        file.refuse(f"{states.shape[0]} layers of states and {conv.shape[0]} of convolutions in {name!r}")
    length = file.count("a length", facts.get("length"))
    tokens = facts.get("tokens")
    return Checkpoint(
        states, conv, facts["state_layout"], length, None if tokens is None else file.tokens("tokens", tokens)
    )


def _on(device: torch.device | str, item: Checkpoint) -> dict[str, Array]:
    return {
        "states": item.states.to(device),
        "conv": None if item.conv is None else item.conv.to(device),
    }
