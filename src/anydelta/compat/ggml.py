"""ggml's GGML_OP_GATED_DELTA_NET on row-major arrays: shapes, head order and packed output as in ggml.h.

A ggml tensor with ne [D, H, T, B] is a row-major array [B, T, H, D], so a buffer can be used as either without
changes. As in ggml, S is the head size (of both keys and values) and K the number of state snapshots:

    q, k   [Bq, T, H, S]    Bq divides B; sequence b reads row b // (B / Bq)
    v      [B, T, HV, S]    HV a multiple of H; value head hv reads q/k head hv % H
    g      [B, T, HV, 1] or [B, T, HV, S] (KDA), natural log
    beta   [B, T, HV, 1]    after the sigmoid
    state  [B, HV, S, S]    the state before the first token; the key channel is the contiguous one
    result [(T + K * S) * B, S * HV]: o [B, T, HV, S], then the snapshots [K, B, HV, S, S], newest first

The scale is 1/sqrt(S). q and k must be normalised. Everything is float32. There is no gradient.
"""

from __future__ import annotations

import numpy as np

from ..core.arrays import Array
from ..rule.op import gated_delta_rule
from ..rule.spec import dtype_name, framework_of

"""A torch.Tensor or a numpy.ndarray; all arrays of a call are of one kind."""

OP = "ggml.gated_delta_net"


def gated_delta_net(
    q: Array,
    k: Array,
    v: Array,
    g: Array,
    beta: Array,
    state: Array,
    K: int,
    *,
    out: Array | None = None,
) -> Array:
    """o and the last K states, packed as by ggml_gated_delta_net. `unpack` separates them.

    Args:
        q: [Bq, T, H, S]; Bq divides B. All inputs may have any strides with a contiguous last dimension.
        k: [Bq, T, H, S].
        v: [B, T, HV, S].
        g: [B, T, HV, 1] or [B, T, HV, S] (KDA), natural log.
        beta: [B, T, HV, 1], after the sigmoid.
        state: [B, HV, S, S], the state before the first token; the key channel is the contiguous one.
        K: snapshots to keep, >= 1. Slot 0 is the final state, slot s the state s tokens earlier.
        out: written and returned: contiguous, float32, of the result's shape, without memory shared with an input.
            If T < K, the slots s >= T keep their contents (as in ggml, where the caller owns the memory). Without
            `out` these slots are zeros.

    Raises:
        ValueError, TypeError: an invalid call.
    """
    if isinstance(K, bool) or not isinstance(K, (int, np.integer)):
        raise TypeError(f"{OP}: K must be an int, the number of snapshots; got {type(K).__name__}")
    if K < 1:
        raise ValueError(f"{OP}: K must be at least 1; got {K}")
    inputs = {"q": q, "k": k, "v": v, "g": g, "beta": beta, "state": state}
    for name, x in inputs.items():
        _float32(name, x)
        if len(x.shape) != 4:
            raise ValueError(f"{OP}: {name} must have 4 dimensions, ggml's ne reversed; got {list(x.shape)}")
    B, T, HV, S = v.shape
    H = q.shape[2]
    if T < 1:
        raise ValueError(f"{OP}: v must have at least one token; got T = 0")
    if S < 1 or H < 1 or HV % H:
        raise ValueError(f"{OP}: v must have a multiple of q's heads; got HV={HV}, H={H}")
    for name, x in (("q", q), ("k", k)):
        _shape(name, x, (x.shape[0], T, H, S), "[Bq, T, H, S] with v's T and S")
        if x.shape[0] < 1 or B % x.shape[0]:
            raise ValueError(f"{OP}: {name} must have a divisor of v's {B} sequences; got {x.shape[0]}")
    if tuple(g.shape) not in ((B, T, HV, 1), (B, T, HV, S)):
        raise ValueError(
            f"{OP}: g must be [B, T, HV, 1] or [B, T, HV, S] = {[B, T, HV, S]}; got {list(g.shape)}"
        )
    _shape("beta", beta, (B, T, HV, 1), "[B, T, HV, 1]")
    _shape("state", state, (B, HV, S, S), "[B, HV, S, S]")

    shape = ((T + K * S) * B, S * HV)
    if out is None:
        out = _empty(v, shape, zeros=T < K)
    else:
        _check_out(out, shape, v, inputs)
    o, snapshots = unpack(out, B, T, HV, S, K)
    o[...] = gated_delta_rule(
        _rows(q, B),
        _rows(k, B),
        v,
        g=g[..., 0] if g.shape[3] == 1 else g,
        beta=beta[..., 0],
        initial_state=state,
        heads="tiled",
        state_layout="vk",
        snapshots=snapshots,
        output_final_state=False,
    )[0]
    return out


def unpack(packed: Array, B: int, T: int, HV: int, S: int, K: int) -> tuple[Array, Array]:
    """Views of a packed result: o [B, T, HV, S] and the snapshots [K, B, HV, S, S], newest first."""
    flat = packed.reshape(-1)
    n = B * T * HV * S
    return flat[:n].reshape(B, T, HV, S), flat[n:].reshape(K, B, HV, S, S)


def _float32(name: str, x: Array) -> None:
    if framework_of(x) is None:
        raise TypeError(f"{OP}: {name} must be a torch.Tensor or a numpy.ndarray; got {type(x).__name__}")
    if dtype_name(x) != "float32":
        raise ValueError(f"{OP}: {name} must be float32, as in ggml; got {dtype_name(x)}")


def _shape(name: str, x: Array, want: tuple[int, ...], legend: str) -> None:
    if tuple(x.shape) != want:
        raise ValueError(f"{OP}: {name} must be {legend} = {list(want)}; got {list(x.shape)}")


def _rows(x: Array, B: int) -> Array:
    """[Bq, ...] to [B, ...]: ggml gives each row of q and k to B / Bq neighbouring sequences."""
    if x.shape[0] == B:
        return x
    each = B // x.shape[0]
    return x[[b // each for b in range(B)]]


def _empty(like: Array, shape: tuple[int, int], *, zeros: bool) -> Array:
    if framework_of(like) == "torch":
        return like.new_zeros(shape) if zeros else like.new_empty(shape)
    return np.zeros(shape, np.float32) if zeros else np.empty(shape, np.float32)


def _check_out(out: Array, shape: tuple[int, int], v: Array, inputs: dict[str, Array]) -> None:
    _float32("out", out)
    if framework_of(out) != framework_of(v) or getattr(out, "device", None) != getattr(v, "device", None):
        raise ValueError(f"{OP}: out must be an array of v's kind and device; got {type(out).__name__}")
    _shape("out", out, shape, "[(T + K * S) * B, S * HV]")
    contiguous = out.is_contiguous() if framework_of(out) == "torch" else out.flags.c_contiguous
    if not contiguous:
        raise ValueError(f"{OP}: out must be contiguous; got a strided view")
    for name, x in inputs.items():
        if _overlap(out, x):
            raise ValueError(f"{OP}: out must not share memory with {name}; copy one of them first")


def _overlap(a: Array, b: Array) -> bool:
    """Whether the address ranges of two arrays of one kind overlap."""
    if framework_of(a) == "numpy":
        return bool(np.may_share_memory(a, b))
    (a0, a1), (b0, b1) = _span(a), _span(b)
    return a0 < b1 and b0 < a1


def _span(x: Array) -> tuple[int, int]:
    """First byte and one past the last byte of a tensor."""
    last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    begin = int(x.data_ptr())
    return begin, begin + int((last + 1) * x.element_size()) if x.numel() else begin
