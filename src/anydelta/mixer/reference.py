"""The mixer in float64, from its definition: the oracle that every implementation is compared with.

Per channel c of q, k and v, where x are the inputs of a sequence and before them the columns of its conv state:

    y_t   = silu(sum_j w[c, j] x_(t - W + 1 + j) + bias[c])      j = 0 .. W - 1; the conv state after t: the last S of x
    q, k, v = split(y)
    o     = gated_delta_rule(q, k, v, gates)                     anydelta.rule.reference
    out_t = o_t / sqrt(mean(o_t^2) + eps) * norm_weight * gate(z_t)      mean over V; gate: silu (Gated DeltaNet) or
                                                                         sigmoid (Kimi Delta Attention)

Gated DeltaNet: arXiv 2412.06464, figure 1; Kimi Delta Attention: arXiv 2510.26692, section 4. Neither state sees a
masked token. NumPy only; it shares no code with any kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ..rule.reference import F64, Expected, gated_delta_rule, sigmoid


@dataclass
class MixerExpected:
    """What a call must produce, in float64."""

    o: F64
    """[B, T, HV * V]; zeros at masked tokens and in skipped sequences."""
    conv_state: F64
    """[N, C, S]; zeros where skipped."""
    conv_snapshots: F64 | None
    """[Ks, N, C, S]; only where `rule.snapshot_written`."""
    rule: Expected
    """State and snapshots of the rule inside, and which sequences are skipped."""


def silu(x: F64) -> F64:
    return np.asarray(x * sigmoid(x))


def gated_rms_norm(o: F64, weight: F64 | None, z: F64 | None, *, eps: float, gate: str) -> F64:
    """o [..., V] normed, then gated by z [..., V]."""
    if weight is None:
        return o
    length = np.sqrt(np.mean(o * o, axis=-1, keepdims=True) + eps)
    y = o / np.where(length == 0, 1.0, length) * weight
    return np.asarray(y if z is None else y * (silu(z) if gate == "silu" else sigmoid(z)))


def gated_delta_mixer(
    q: F64,
    k: F64,
    v: F64,
    conv_state: F64,
    state: F64,
    *,
    g: F64,
    beta: F64,
    conv_weight: F64,
    conv_bias: F64 | None = None,
    A_log: F64 | None = None,
    dt_bias: F64 | None = None,
    z: F64 | None = None,
    norm_weight: F64 | None = None,
    activation: str | None = "silu",
    scale: float | None = None,
    decay: str = "raw",
    lower_bound: float | None = None,
    beta_is_logit: bool = True,
    allow_neg_eigval: bool = False,
    heads: str = "interleaved",
    qk_l2norm: bool = True,
    qk_l2norm_eps: float = 1e-6,
    norm_eps: float = 1e-6,
    norm_gate: str = "silu",
    state_layout: str = "kv",
    cu_seqlens: NDArray[np.int64] | None = None,
    state_indices: NDArray[np.int64] | None = None,
    mask: NDArray[np.bool_] | None = None,
    snapshots: int = 0,
) -> MixerExpected:
    """The contract of `anydelta.gated_delta_mixer` on float64 arrays q, k [B, T, H K], v [B, T, HV V]."""
    x = np.concatenate([q, k, v], axis=-1)
    B, T, C = x.shape
    W, S = conv_weight.shape[1], conv_state.shape[2]
    HV = state.shape[1]
    K, V = state.shape[2:] if state_layout == "kv" else state.shape[:1:-1]

    if cu_seqlens is None:
        sequences = [(b, 0, T) for b in range(B)]
    else:
        sequences = [(0, int(s), int(e)) for s, e in pairwise(cu_seqlens)]
    N = len(sequences)
    y = np.zeros((B, T, C))
    final = np.zeros((N, C, S))
    taken = np.zeros((snapshots, N, C, S))
    for n, (b, start, end) in enumerate(sequences):
        row = n if state_indices is None else int(state_indices[n])
        if row < 0:
            continue
        seen = conv_state[row]  # [C, S], then every live input after it
        for t in range(start, end):
            if mask is None or mask[b, t]:
                seen = np.concatenate([seen, x[b, t][:, None]], axis=1)
                y[b, t] = np.sum(conv_weight * seen[:, seen.shape[1] - W :], axis=1)
                if conv_bias is not None:
                    y[b, t] += conv_bias
                if activation == "silu":
                    y[b, t] = silu(y[b, t])
            if end - 1 - t < snapshots:
                taken[end - 1 - t, n] = seen[:, seen.shape[1] - S :]
        final[n] = seen[:, seen.shape[1] - S :]

    key = (C - HV * V) // 2
    strength = sigmoid(beta) if beta_is_logit else beta
    rule = gated_delta_rule(
        y[..., :key].reshape(B, T, key // K, K),
        y[..., key : 2 * key].reshape(B, T, key // K, K),
        y[..., 2 * key :].reshape(B, T, HV, V),
        g=g,
        beta=2 * strength if allow_neg_eigval else strength,
        initial_state=state,
        scale=scale,
        decay=decay,
        A_log=A_log,
        dt_bias=dt_bias,
        lower_bound=lower_bound,
        heads=heads,
        qk_l2norm=qk_l2norm,
        qk_l2norm_eps=qk_l2norm_eps,
        state_layout=state_layout,
        cu_seqlens=cu_seqlens,
        state_indices=state_indices,
        mask=mask,
        snapshots=snapshots,
    )
    out = gated_rms_norm(
        rule.o, norm_weight, None if z is None else z.reshape(rule.o.shape), eps=norm_eps, gate=norm_gate
    )
    # z of a masked or skipped token may hold anything, even NaN
    live = np.zeros((B, T), bool)
    for n, (b, start, end) in enumerate(sequences):
        if not rule.skipped[n]:
            live[b, start:end] = True if mask is None else mask[b, start:end]
    out = np.where(live[..., None, None], out, 0.0)
    return MixerExpected(out.reshape(B, T, HV * V), final, taken if snapshots else None, rule)
