"""The rows of a pool's states, [layers, P, HV, K, V]: one array on the host, or one per layer on a device."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..devices import Device, DeviceArray
from .sequence import nbytes

Array = Any


class HostRows:
    """NumPy's, or a tensor of any torch device."""

    def __init__(self, states: Array):
        self.states = states

    def __getitem__(self, layer: int) -> Array:
        return self.states[layer]

    def zero(self, row: int) -> None:
        self.states[:, row] = 0

    def copy(self, to: int, source: int) -> None:
        self.states[:, to] = self.states[:, source]

    def read(self, row: int) -> Array:
        """A copy, [layers, HV, K, V]."""
        found = self.states[:, row]
        return found.clone() if hasattr(found, "clone") else found.copy()

    def write(self, row: int, states: Array) -> None:
        self.states[:, row] = states

    def nbytes(self) -> int:
        return nbytes(self.states)


class DeviceRows:
    """A DeviceArray [P, HV, K, V] per layer: devices limit the size of one. `read` and `write` alone use the host."""

    def __init__(self, device: Device, layers: int, shape: tuple[int, ...], dtype: str):
        self.layers: list[DeviceArray] = [device.zeros(shape, dtype) for _ in range(layers)]

    def __getitem__(self, layer: int) -> DeviceArray:
        return self.layers[layer]

    def zero(self, row: int) -> None:
        for x in self.layers:
            x[row].zero()

    def copy(self, to: int, source: int) -> None:
        for x in self.layers:
            x[to].write(x[source])

    def read(self, row: int) -> Array:
        """A copy on the host, [layers, HV, K, V]."""
        return np.stack([x[row].numpy() for x in self.layers])

    def write(self, row: int, states: Array) -> None:
        for x, state in zip(self.layers, states, strict=True):
            x[row].write(state)

    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.layers)
