"""The small call that the tests of exported programs lower."""

from __future__ import annotations

import torch
from torch import Tensor

B, T, H, HV, K, V = 2, 5, 2, 4, 8, 16


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def call(kda: bool = False, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    gates = (B, T, HV, K) if kda else (B, T, HV)
    return dict(
        q=randn(B, T, H, K).to(dtype),
        k=(randn(B, T, H, K) / 3).to(dtype),
        v=randn(B, T, HV, V).to(dtype),
        g=-randn(*gates).abs(),
        beta=randn(B, T, HV).sigmoid(),
    )
