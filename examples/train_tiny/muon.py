"""Muon in float32: momentum, orthogonalised by Newton-Schulz, for matrices; AdamW for everything else.

torch.optim.Muon iterates in bfloat16, which CPUs without bf16 instructions emulate slowly, and takes one
matrix at a time. Here equal shapes are stacked, so that each shape costs a few batched products a step.
"""

from __future__ import annotations

import torch
from torch import nn

# Coefficients of an odd quintic that drives singular values to about 1 in five rounds (Jordan et al. 2024).
A, B, C = 3.4445, -4.7750, 2.0315


def orthogonalise(matrices: torch.Tensor, rounds: int = 5) -> torch.Tensor:
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(rounds):
        gram = x @ x.mT
        x = A * x + (B * gram + C * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float = 0.95, decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for p in group["params"]:
                by_shape.setdefault(p.shape, []).append(p)
            for shape, params in by_shape.items():
                updates = []
                for p in params:
                    buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    buffer.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(buffer, group["momentum"]))  # Nesterov
                scale = max(1.0, shape[0] / shape[1]) ** 0.5
                for p, update in zip(params, orthogonalise(torch.stack(updates)), strict=True):
                    p.mul_(1 - group["lr"] * group["decay"]).add_(update, alpha=-group["lr"] * scale)


def optimisers(network: nn.Module, lr_matrix: float, lr_other: float) -> list[torch.optim.Optimizer]:
    """Hidden matrices to Muon; embedding, norms, convolutions and the small gate matrices to AdamW."""
    matrices, vectors = [], []
    for name, p in network.named_parameters():
        small = p.ndim != 2 or "embed_tokens" in name or "in_proj_a" in name or "in_proj_b" in name
        (vectors if small else matrices).append(p)
    return [
        Muon(matrices, lr_matrix, decay=0.1),
        torch.optim.AdamW(vectors, lr_other, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]
