"""What the code calls an array."""

from __future__ import annotations

from typing import Any

Array = Any
"""An array of some framework: a torch.Tensor, numpy.ndarray, mlx.core.array or `DeviceArray`, all of a call of one
kind. States and snapshots may be `DeviceArray`s where the others are the host's, and all of a call may where the
backend takes that (OpenCL, SYCL), but for masks and indices, which are NumPy's then. Their attributes differ too much
for one protocol."""

Arrays = tuple[Array, ...]
"""The arrays of a call in the order of its table, None where one is absent."""
