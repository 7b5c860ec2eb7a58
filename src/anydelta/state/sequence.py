"""The records of a pool: a living sequence, and the step that runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ..core.arrays import Array
from ..core.devices import DeviceArray


class LiveSequence(NamedTuple):
    """One sequence. Never changed in place: a successful call ends by replacing the pool's list of sequences."""

    rows: tuple[int, ...]
    """Rows of the states. Slots: newest first. Log: the one row of the base state."""
    used: int = 0
    """Entries in the log."""
    pending: int = 0
    """Tokens run since the last commit."""
    length: int = 0
    conv_end: int = 0
    """Where the convolution's last input ends in its buffer."""


Sequences = list[LiveSequence | None]


@dataclass
class Step:
    """A step, from `begin` to the next call that changes the pool. `cancel` needs all of it."""

    batch: list[int]
    lengths: list[int]
    record: bool
    undo: bool
    """Whether `saved` keeps what the layers overwrite."""
    before: Sequences
    """The pool's sequences before `begin`."""
    batch_before: list[int] | None
    cu: Array
    todo: set[int]
    """Layers whose rule has yet to run."""
    conv_todo: set[int]
    conv: list[tuple[int, int, int]] = field(default_factory=list)
    """Per sequence: the range (from, to) of the surviving inputs in the buffer, and the start of this step's inputs.
    The start is `to`; or less, if the survivors move to the front first; or -1, which overwrites them."""
    conv_saved: dict[int, list[Array]] = field(default_factory=dict)
    """By layer: the inputs that the step moved or overwrote, None where it did not."""
    touched: set[int] = field(default_factory=set)
    """Layers whose rule has run, or began to."""
    saved: set[int] = field(default_factory=set)
    """Layers whose overwritten data `Saved` holds."""
    plan: Any = None
    """The form's plan for the step."""


class Saved:
    """Copies of what the running step overwrites, layer by layer. The next step reuses the memory."""

    def __init__(self) -> None:
        self.copies: dict[int, list[Array]] = {}
        self.fresh = False

    def not_needed(self) -> None:
        """A step that saves nothing begins. The second such step in a row frees the memory."""
        if not self.fresh:
            self.copies = {}
        self.fresh = False

    def save(self, layer: int, what: list[tuple[Array, list[int]]]) -> None:
        """Copy the rows x[layer][i] of each (x, rows i)."""
        self.fresh = True
        copies = self.copies.get(layer, [])
        if [len(c) for c in copies] != [len(rows) for _, rows in what]:
            copies = [_empty(x[layer], len(rows)) for x, rows in what]
        for copy, (x, rows) in zip(copies, what, strict=True):
            for i, row in enumerate(rows):
                put(copy, i, x[layer][row])
        self.copies[layer] = copies

    def restore(self, layer: int, what: list[tuple[Array, list[int]]]) -> None:
        for copy, (x, rows) in zip(self.copies[layer], what, strict=True):
            for i, row in enumerate(rows):
                put(x[layer], row, copy[i])

    def nbytes(self) -> int:
        return sum(nbytes(copy) for copies in self.copies.values() for copy in copies)


def put(x: Array, row: int, value: Array) -> None:
    """x[row] = value, on a device of anydelta too."""
    if isinstance(x, DeviceArray):
        x[row].write(value)
    else:
        x[row] = value


def _empty(x: Array, rows: int) -> Array:
    shape = (rows, *x.shape[1:])
    if isinstance(x, DeviceArray):
        return x.device.empty(shape, x.dtype)
    return np.empty(shape, x.dtype) if isinstance(x, np.ndarray) else x.new_empty(shape)


def nbytes(x: Array) -> int:
    return int(x.nbytes) if isinstance(x, (np.ndarray, DeviceArray)) else x.element_size() * x.numel()
