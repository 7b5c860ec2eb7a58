"""The recurrence in float64, token by token: the oracle that every kernel is compared with.

Per sequence and value head, with the state S of shape [K, V]:

    S   = diag(exp(g_t)) S            decay    g_t: one number (GDA) or a vector over K (KDA)
    d_t = beta_t (v_t - S^T k_t)      delta    the prediction reads the decayed state
    S   = S + k_t d_t^T               update
    o_t = scale * S^T q_t             output   reads the updated state

With erase, the key that is read: d_t = v_t - S^T erase_t.
Gated DeltaNet: arXiv 2412.06464, equation 10; Kimi Delta Attention: arXiv 2510.26692, equation 1.
NumPy only, one token at a time, all heads of a token at once. It shares no code with any kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]


@dataclass
class Expected:
    """What a call must produce, in float64. Layouts are the caller's."""

    o: F64
    """[B, T, HV, V]; zeros at masked tokens and in skipped sequences."""
    state: F64
    """[N, HV, K, V] or [N, HV, V, K]; zeros where `skipped`."""
    snapshots: F64 | None
    """[Ks, N, HV, ...] as `state`; only where `snapshot_written`."""
    snapshot_written: NDArray[np.bool_] | None
    """[Ks, N]: slots with s < T_n of sequences that were not skipped."""
    skipped: NDArray[np.bool_]
    """[N]: sequences whose state index is -1."""


def head_map(H: int, HV: int, heads: str) -> NDArray[np.int64]:
    """The q/k head of each value head: hv // (HV/H) when interleaved, hv % H when tiled (ggml)."""
    hv = np.arange(HV)
    return hv // (HV // H) if heads == "interleaved" else hv % H


def decays(
    g: F64,
    *,
    decay: str,
    A_log: F64 | None = None,
    dt_bias: F64 | None = None,
    lower_bound: float | None = None,
) -> F64:
    """exp(log decay), in [0, 1], from log, linear or raw gates. g [..., HV] (GDA) or [..., HV, K] (KDA).

    raw: log decay = -exp(A_log) softplus(g + dt_bias), or with a lower bound (fla's safe gate)
    lower_bound * sigmoid(exp(A_log) (g + dt_bias)), where A_log None stands for 0.
    """
    if decay == "linear":
        return g
    if decay == "log":
        return np.exp(g)
    A: F64 = np.exp(np.zeros(g.shape[2]) if A_log is None else A_log)
    A = A if g.ndim == 3 else A[:, None]
    x = g if dt_bias is None else g + dt_bias.reshape(g.shape[2:])
    if lower_bound is None:
        return np.asarray(np.exp(-A * np.logaddexp(0.0, x)))
    return np.asarray(np.exp(lower_bound * sigmoid(A * x)))


def sigmoid(x: F64) -> F64:
    e = np.exp(-np.abs(x))  # <= 1, and no cancellation on either side
    return np.where(x >= 0, 1.0, e) / (1.0 + e)


def l2norm(x: F64, eps: float) -> F64:
    """x * rsqrt(sum x^2 + eps) over the last dimension (fla's convention); 0 for 0."""
    length = np.sqrt(np.sum(x * x, axis=-1, keepdims=True) + eps)
    return np.asarray(x / np.where(length == 0, 1.0, length))


def gated_delta_rule(
    q: F64,
    k: F64,
    v: F64,
    *,
    g: F64,
    beta: F64 | None = None,
    initial_state: F64 | None = None,
    scale: float | None = None,
    decay: str = "log",
    A_log: F64 | None = None,
    dt_bias: F64 | None = None,
    lower_bound: float | None = None,
    beta_is_logit: bool = False,
    heads: str = "interleaved",
    qk_l2norm: bool = False,
    qk_l2norm_eps: float = 1e-6,
    state_layout: str = "kv",
    cu_seqlens: NDArray[np.int64] | None = None,
    state_indices: NDArray[np.int64] | None = None,
    mask: NDArray[np.bool_] | None = None,
    erase: F64 | None = None,
    snapshots: int = 0,
) -> Expected:
    """The contract of `anydelta.gated_delta_rule` on float64 arrays; `snapshots` is the number of slots."""
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    scale = K**-0.5 if scale is None else scale
    a = decays(g, decay=decay, A_log=A_log, dt_bias=dt_bias, lower_bound=lower_bound)
    if qk_l2norm:
        q, k = l2norm(q, qk_l2norm_eps), l2norm(k, qk_l2norm_eps)
    qk_head = head_map(H, HV, heads)
    q, k = q[:, :, qk_head], k[:, :, qk_head]
    if erase is not None:
        read, strength = erase if erase.shape[2] == HV else erase[:, :, qk_head], np.ones(v.shape[:3])
    else:
        assert beta is not None
        read, strength = k, sigmoid(beta) if beta_is_logit else beta

    # A sequence is a row of the batch, or a range of the only row when packed.
    if cu_seqlens is None:
        sequences = [(b, 0, T) for b in range(B)]
    else:
        sequences = [(0, int(s), int(e)) for s, e in pairwise(cu_seqlens)]
    N = len(sequences)

    o = np.zeros((B, T, HV, V))
    final = np.zeros((N, HV, K, V))
    taken = np.zeros((snapshots, N, HV, K, V))
    written = np.zeros((snapshots, N), dtype=bool)
    skipped = np.zeros(N, dtype=bool)
    for n, (b, start, end) in enumerate(sequences):
        row = n if state_indices is None else int(state_indices[n])
        if row < 0:
            skipped[n] = True
            continue
        S = np.zeros((HV, K, V))
        if initial_state is not None:
            S[:] = initial_state[row] if state_layout == "kv" else initial_state[row].swapaxes(-1, -2)
        for t in range(start, end):
            if mask is None or mask[b, t]:
                decay_t = a[b, t][:, None, None] if a.ndim == 3 else a[b, t][:, :, None]
                S = decay_t * S
                d = strength[b, t][:, None] * (v[b, t] - np.einsum("hkv,hk->hv", S, read[b, t]))
                S = S + k[b, t][:, :, None] * d[:, None, :]
                o[b, t] = scale * np.einsum("hkv,hk->hv", S, q[b, t])
            slot = end - 1 - t
            if slot < snapshots:
                taken[slot, n] = S
                written[slot, n] = True
        final[n] = S

    if state_layout == "vk":
        final, taken = final.swapaxes(-1, -2), taken.swapaxes(-1, -2)
    return Expected(o, final, taken if snapshots else None, written if snapshots else None, skipped)
