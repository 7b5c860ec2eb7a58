"""The types that the code calls arrays."""

from __future__ import annotations

from typing import Any

Array = Any
"""A torch.Tensor, numpy.ndarray, mlx.core.array or `DeviceArray`; all arrays of a call are of one kind. States and
snapshots may be `DeviceArray`s beside arrays on the host. On OpenCL and SYCL all arrays may be, except masks and
indices, which are then NumPy's. Their attributes differ too much for one protocol."""

Arrays = tuple[Array, ...]
"""The arrays of a call in the order of its table, None where one is absent."""
