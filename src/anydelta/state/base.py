"""The part of a pool that its forms use: its sizes, and arrays of its kind."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

import numpy as np

from ..core.arrays import Array
from ..core.devices import Device, numpy_dtype
from .sequence import Sequences, Step

if TYPE_CHECKING:
    import torch


class Pool:
    """The base of `StatePool`, without sequences. Arrays are NumPy's, or torch's on `device`."""

    capacity: int
    layers: int
    snapshots: int
    H: int
    HV: int
    K: int
    V: int
    kda: bool
    key_dtype: str
    dtype: str
    state_layout: str
    device: torch.device | str | None
    """A torch device, or None for NumPy arrays."""
    resident: Device | None
    """The device of anydelta that holds the states, if there is one."""
    backend: str
    _sequences: Sequences
    _step: Step | None
    """The step that `cancel` takes back."""

    def _accept(self, sequences: Sequences) -> None:
        """End a call that changes the pool. The last step cannot be cancelled any more."""
        self._sequences, self._step = sequences, None

    def _fail(self, method: str, text: str) -> NoReturn:
        raise ValueError(f"StatePool.{method}: {text}")

    def _zeros(self, shape: tuple[int, ...], dtype: str | None = None) -> Array:
        name = dtype or self.dtype
        if self.device is not None:
            import torch

            return torch.zeros(shape, dtype=getattr(torch, name), device=self.device)
        return np.zeros(shape, numpy_dtype(name))

    def _index(self, values: Array) -> Array:
        if self.device is not None:
            import torch

            return torch.tensor(values, dtype=torch.int64, device=self.device)
        return np.array(values, np.int64)

    def _copy(self, x: Array) -> Array:
        return x.clone() if self.device is not None else x.copy()

    def _stack(self, pieces: list[Array]) -> Array:
        if self.device is not None:
            import torch

            return torch.stack(pieces)
        return np.stack(pieces)

    def _join(self, before: Array, own: Array) -> Array:
        if self.device is not None:
            import torch

            return torch.cat([before.to(own.dtype), own])
        return np.concatenate([before.astype(own.dtype, copy=False), own])

    def _like(self, x: Array) -> Array:
        """x as this pool's kind of array."""
        if self.device is None:
            if isinstance(x, np.ndarray):
                return x
            x = x.detach().cpu()
            return (x.float() if str(x.dtype) == "torch.bfloat16" else x).numpy()  # NumPy has no bfloat16
        import torch

        if isinstance(x, np.ndarray) and x.dtype.name == "bfloat16":
            x = x.astype(np.float32)
        return torch.as_tensor(x, device=self.device)
