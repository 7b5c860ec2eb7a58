"""What a pool and its form know of one living sequence."""

from __future__ import annotations

from typing import Any

import numpy as np


class LiveSequence:
    __slots__ = ("conv_end", "length", "pending", "rows")

    def __init__(self, rows: list[int]):
        self.rows = rows  # slots: newest first. log: the one row of the base state
        self.pending = 0  # tokens run since the last commit
        self.length = 0
        self.conv_end = 0  # where the convolution's last input ends in its buffer

    def copy(self) -> LiveSequence:
        other = LiveSequence(list(self.rows))
        other.pending, other.length, other.conv_end = self.pending, self.length, self.conv_end
        return other


def nbytes(x: Any) -> int:
    return int(x.nbytes) if isinstance(x, np.ndarray) else x.element_size() * x.numel()
