"""fla's `fused_kda_gate`: the log decay of Kimi Delta Attention from the gate before its activation."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ...mixer.convolution import wide


def fused_kda_gate(
    g: torch.Tensor,
    A_log: torch.Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> torch.Tensor:
    """-exp(A_log) softplus(g + dt_bias), or with a lower bound lower_bound * sigmoid(exp(A_log) (g + dt_bias)).

    g [..., H, K]; A_log of any shape with H numbers, None counts as 0 and requires lower_bound; dt_bias [H * K].
    Two forms of call: fused_kda_gate(g, A_log, dt_bias=None, lower_bound=None, output_dtype=torch.float32), and that of
    fla 0.4.0, which the code of Kimi-Linear's checkpoints uses:
    fused_kda_gate(g [..., H * K], A, head_k_dim, g_bias=None, beta=1.0, threshold=20.0). beta and threshold are
    softplus's.

    Raises:
        ValueError: shapes that do not fit, or neither A_log nor lower_bound.
        TypeError: other arguments.
    """
    if "A" in kwargs or "head_k_dim" in kwargs or (args and isinstance(args[0], int)):
        return _as_in_0_4(g, kwargs.pop("A", A_log), *args, **kwargs)
    return _gate(g, A_log, *args, **kwargs)


def _gate(
    g: torch.Tensor,
    A_log: torch.Tensor | None,
    dt_bias: torch.Tensor | None = None,
    lower_bound: float | None = None,
    output_dtype: torch.dtype = torch.float32,
    *,
    beta: float = 1.0,
    threshold: float = 20.0,
) -> torch.Tensor:
    op = "fla.fused_kda_gate"
    if g.ndim < 2 or (A_log is None and lower_bound is None):
        raise ValueError(
            f"{op}: requires g [..., H, K] and A_log or lower_bound; got g {list(g.shape)}, A_log "
            f"{'None' if A_log is None else list(A_log.shape)}, lower_bound {lower_bound}"
        )
    H, K = g.shape[-2:]
    for name, x, size in (("A_log", A_log, H), ("dt_bias", dt_bias, H * K)):
        if x is not None and x.numel() != size:
            raise ValueError(
                f"{op}: {name} must have {size} numbers for g {list(g.shape)}; got {list(x.shape)}"
            )
    x = wide(g) if dt_bias is None else wide(g) + wide(dt_bias).reshape(H, K)
    rate = None if A_log is None else wide(A_log).reshape(H, 1).exp()
    if lower_bound is not None:
        y = lower_bound * torch.sigmoid(x if rate is None else rate * x)
    else:
        assert rate is not None
        y = -rate * F.softplus(x, beta, threshold)
    return y.to(torch.promote_types(y.dtype, output_dtype) if g.dtype == torch.float64 else output_dtype)


def _as_in_0_4(
    g: torch.Tensor,
    A: torch.Tensor,
    head_k_dim: int,
    g_bias: torch.Tensor | None = None,
    beta: float = 1.0,
    threshold: float = 20.0,
) -> torch.Tensor:
    if g.shape[-1] % head_k_dim:
        raise ValueError(
            f"fla.fused_kda_gate: g must be [..., H * head_k_dim = {head_k_dim}]; got {list(g.shape)}"
        )
    g = g.reshape(*g.shape[:-1], -1, head_k_dim)
    return _gate(g, A, g_bias, beta=beta, threshold=threshold)
