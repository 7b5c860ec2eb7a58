"""The rows of a pool's states, [layers, P, HV, K, V]: one array on the host, or one per layer on a device."""

from __future__ import annotations

import numpy as np

from ..core.arrays import Array
from ..core.devices import Device, DeviceArray
from .sequence import nbytes


class HostRows:
    """Rows in a NumPy array, or in a tensor on any torch device."""

    def __init__(self, states: Array):
        self.states = states

    def __getitem__(self, layer: int) -> Array:
        return self.states[layer]

    def read(self, row: int) -> Array:
        """A copy, [layers, HV, K, V]."""
        found = self.states[:, row]
        return found.clone() if hasattr(found, "clone") else found.copy()

    def write(self, row: int, states: Array) -> None:
        """States of that shape, or 0."""
        self.states[:, row] = states

    def nbytes(self) -> int:
        return nbytes(self.states)


class DeviceRows:
    """A DeviceArray [P, HV, K, V] per layer: devices limit the size of one. `read` and `write` alone use the host."""

    def __init__(self, device: Device, layers: int, shape: tuple[int, ...], dtype: str):
        self.layers: list[DeviceArray] = [device.zeros(shape, dtype) for _ in range(layers)]

    def __getitem__(self, layer: int) -> DeviceArray:
        return self.layers[layer]

    def read(self, row: int) -> Array:
        """A copy on the host, [layers, HV, K, V]."""
        return np.stack([x[row].numpy() for x in self.layers])

    def write(self, row: int, states: Array) -> None:
        """Host states of that shape, or 0."""
        for i, x in enumerate(self.layers):
            if isinstance(states, int):
                x[row].zero()
            else:
                x[row].write(states[i])

    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.layers)
