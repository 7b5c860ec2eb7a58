"""fla's `FusedRMSNormGated`: the RMS norm of x times weight, times an activation of a gate."""

from __future__ import annotations

import torch
from torch import nn

from ...mixer.convolution import wide

_ACTIVATIONS = ("swish", "silu", "sigmoid")


class FusedRMSNormGated(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight * activation(g), over the last dimension; `bias` is None, as in fla.

    Computed in float32 (float64 for float64), returned in x's dtype. `autotune_interval` is a hint of some of fla's
    forks and is not read.

    Raises:
        ValueError: an activation other than swish, silu or sigmoid.
    """

    weight: nn.Parameter | None

    def __init__(
        self,
        hidden_size: int,
        elementwise_affine: bool = True,
        eps: float = 1e-5,
        activation: str = "swish",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        autotune_interval: object = None,
    ):
        super().__init__()
        if activation not in _ACTIVATIONS:
            raise ValueError(
                f"fla.FusedRMSNormGated: activation must be swish, silu or sigmoid; got {activation!r}"
            )
        self.hidden_size, self.elementwise_affine, self.eps = hidden_size, elementwise_affine, eps
        self.activation = activation
        weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("weight", weight if elementwise_affine else None)
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.weight is not None:
            nn.init.ones_(self.weight)

    def extra_repr(self) -> str:
        return (
            f"{self.hidden_size}, elementwise_affine={self.elementwise_affine}, eps={self.eps}, "
            f"activation={self.activation}"
        )

    def forward(
        self,
        x: torch.Tensor,
        g: torch.Tensor,
        residual: torch.Tensor | None = None,
        prenorm: bool = False,
        residual_in_fp32: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """x [..., hidden_size], g with as many numbers. `residual` is added to x first. With `prenorm` that sum is the
        second result: in residual's dtype, or without a residual in float32 if `residual_in_fp32`, else in x's.

        Raises:
            ValueError: shapes that do not fit.
        """
        if x.shape[-1] != self.hidden_size or g.numel() != x.numel():
            raise ValueError(
                f"fla.FusedRMSNormGated: x must be [..., {self.hidden_size}] and g of its size; got "
                f"{list(x.shape)}, {list(g.shape)}"
            )
        total = wide(x) if residual is None else wide(x) + wide(residual).reshape(x.shape)
        y = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + self.eps)
        if self.weight is not None:
            y = y * wide(self.weight)
        gate = torch.sigmoid(wide(g).reshape(x.shape))
        if self.activation != "sigmoid":
            gate = gate * wide(g).reshape(x.shape)
        y = (y * gate).to(x.dtype)
        if not prenorm:
            return y
        kept = residual.dtype if residual is not None else torch.float32 if residual_in_fp32 else x.dtype
        return y, total.to(kept)
