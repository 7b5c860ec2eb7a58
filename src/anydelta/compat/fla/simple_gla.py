"""fla's simple gated linear attention (lightning attention, with `g_gamma`), in torch's operators, with gradients.

    S_t = exp(g_t) S_{t-1} + k_t v_t^T        o_t = scale S_t^T q_t

    q, k [B, T, H, K]; v [B, T, H, V]; g [B, T, H] log decays; state [N, H, K, V]

It has no delta, so it is not this package's operator. The code of some checkpoints with Kimi Delta Attention imports
it. Computed in chunks, in float32 (float64 for float64).
"""

from __future__ import annotations

from itertools import pairwise

import torch

from ...core.dispatch import UnsupportedError
from ...mixer.convolution import wide
from .common import sequences

_CHUNK = 64
Pair = tuple[torch.Tensor, "torch.Tensor | None"]


def chunk_simple_gla(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None = None,
    g_gamma: torch.Tensor | None = None,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    **kwargs: object,
) -> Pair:
    """(o [B, T, H, V] in v's dtype, final state [N, H, K, V] in float32 or None).

    g [B, T, H], or g_gamma [H], one decay for all tokens. With neither, nothing decays. `scale` is K^-0.5 by default.
    `state_v_first`: states are [N, H, V, K]. `chunk_size` and `cu_seqlens_cpu` are hints of fla's and are not read.

    Raises:
        ValueError: shapes that do not fit, or g with g_gamma.
        TypeError: another argument.
    """
    return _simple_gla(
        "fla.chunk_simple_gla", q, k, v, g, g_gamma, scale, initial_state, output_final_state, state_v_first,
        cu_seqlens, kwargs,
    )  # fmt: skip


def fused_recurrent_simple_gla(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None = None,
    g_gamma: torch.Tensor | None = None,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    **kwargs: object,
) -> Pair:
    """As chunk_simple_gla.

    Raises:
        UnsupportedError: reverse.
        ValueError, TypeError: as chunk_simple_gla.
    """
    op = "fla.fused_recurrent_simple_gla"
    if reverse:
        raise UnsupportedError(f"{op}: reverse is not supported; leave it False, or flip the inputs and o")
    return _simple_gla(
        op, q, k, v, g, g_gamma, scale, initial_state, output_final_state, state_v_first, cu_seqlens, kwargs
    )


def _simple_gla(
    op: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None,
    g_gamma: torch.Tensor | None,
    scale: float | None,
    state: torch.Tensor | None,
    final: bool,
    v_first: bool,
    cu_seqlens: torch.Tensor | None,
    kwargs: dict[str, object],
) -> Pair:
    unknown = [name for name in kwargs if name not in ("chunk_size", "cu_seqlens_cpu")]
    if unknown:
        raise TypeError(f"{op}: got an unexpected keyword argument {unknown[0]!r}")
    if q.ndim != 4 or k.shape != q.shape or v.ndim != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(
            f"{op}: requires q, k [B, T, H, K] and v [B, T, H, V]; got "
            f"{list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        )
    B, T, H, K = q.shape
    V = v.shape[3]
    if g is not None and g_gamma is not None:
        raise ValueError(f"{op}: g and g_gamma exclude each other; got both")
    if g is not None and g.shape != (B, T, H):
        raise ValueError(f"{op}: g must be [B, T, H] = {[B, T, H]}; got {list(g.shape)}")
    if g_gamma is not None and g_gamma.numel() != H:
        raise ValueError(f"{op}: g_gamma must be [H] = {[H]}; got {list(g_gamma.shape)}")
    if cu_seqlens is not None:
        sequences(op, "cu_seqlens", cu_seqlens, B, T)
    bounds = None if cu_seqlens is None else cu_seqlens.tolist()
    N = B if bounds is None else len(bounds) - 1
    want = (N, H, V, K) if v_first else (N, H, K, V)
    if state is not None and state.shape != want:
        raise ValueError(f"{op}: initial_state must be {list(want)}; got {list(state.shape)}")

    dtype = v.dtype
    q, k, v = wide(q) * (K**-0.5 if scale is None else scale), wide(k), wide(v)
    # Sums of log decays in float64, so that small ones keep their digits beside strong ones. Below -1e4 all are zero.
    if g is None:
        g = q.new_zeros(H) if g_gamma is None else g_gamma.reshape(H)
    g = g.double().clamp(min=-1e4).expand(B, T, H)
    S = q.new_zeros(N, H, K, V) if state is None else wide(state.transpose(-1, -2) if v_first else state)
    if bounds is None:
        o, S = _sequences(q, k, v, g, S)
    else:
        parts = [
            _sequences(q[:, i:j], k[:, i:j], v[:, i:j], g[:, i:j], S[n : n + 1])
            for n, (i, j) in enumerate(pairwise(bounds))
        ]
        o, S = torch.cat([p[0] for p in parts], 1), torch.cat([p[1] for p in parts])
    return o.to(dtype), (S.transpose(-1, -2) if v_first else S).contiguous() if final else None


def _sequences(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, S: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences of one length: o [B, T, H, V] and the state after them."""
    outputs = []
    for begin in range(0, q.shape[1], _CHUNK):
        # [B, H, C, ...]: a chunk of all heads.
        q_c, k_c, v_c, g_c = (x[:, begin : begin + _CHUNK].transpose(1, 2) for x in (q, k, v, g))
        since = g_c.cumsum(-1)  # the log decay from before the chunk to token i
        between = since.unsqueeze(-1) - since.unsqueeze(
            -2
        )  # from token j to i; above the diagonal it would overflow
        later = torch.ones(between.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        decay = between.masked_fill(later, -torch.inf).exp().to(q.dtype)
        seen = q_c @ k_c.transpose(-1, -2) * decay
        outputs.append(seen @ v_c + q_c * since.exp().to(q.dtype).unsqueeze(-1) @ S)
        left = (since[..., -1:] - since).exp().to(q.dtype)  # how much of token i remains at the end
        S = (
            since[..., -1].exp().to(q.dtype)[..., None, None] * S
            + (k_c * left.unsqueeze(-1)).transpose(-1, -2) @ v_c
        )
    return (torch.cat(outputs, 2).transpose(1, 2) if outputs else v), S
