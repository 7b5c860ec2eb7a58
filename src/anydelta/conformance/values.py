"""Numbers in the four float types, in plain NumPy: rounding, and the bits of a stored array.

NumPy has no bfloat16, and the checks compare memory bit by bit. So arrays are kept as `storage`: bfloat16 as int16,
others in their own type.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]

STORAGE: dict[str, type[np.generic]] = {
    "float64": np.float64, "float32": np.float32, "float16": np.float16, "bfloat16": np.int16,
    "int32": np.int32, "int64": np.int64, "bool": np.bool_,
}  # fmt: skip


def encode(x: NDArray[np.generic], dtype: str) -> NDArray[np.generic]:
    """x as storage of that dtype, rounded to nearest, ties to even (by way of float32 for the half types)."""
    if dtype in ("float64", "int32", "int64", "bool"):
        return np.asarray(x).astype(STORAGE[dtype])
    with np.errstate(over="ignore"):
        f32 = np.asarray(x).astype(np.float32)
        if dtype != "bfloat16":
            return f32.astype(STORAGE[dtype])
    bits: NDArray[np.integer] = f32.view(np.uint32).astype(np.uint64)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    bits = np.where(np.isnan(f32), 0x7FC0, bits)
    return bits.astype(np.uint16).view(np.int16)


def decode(x: NDArray[np.generic], dtype: str) -> F64:
    """Storage of that dtype as float64."""
    if dtype == "bfloat16":
        x = (x.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return x.astype(np.float64)


def round_to(x: NDArray[np.generic], dtype: str) -> F64:
    """The nearest values that the dtype holds, in float64."""
    return decode(encode(x, dtype), dtype)
