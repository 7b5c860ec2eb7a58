"""flash-linear-attention's functions of the gated delta rule and of its relatives, for torch tensors on any device.

Same names, argument order, defaults and conventions, so they can replace those of fla.ops.

    q, k [B, T, H, K]; v [B, T, HV, V]; value head hv reads q/k head hv // (HV/H)
    g [B, T, HV] (gated delta rule) or [B, T, HV, K] (KDA), the natural log of the decay; beta [B, T, HV]
    states [N, HV, K, V], final states in float32
    q, k and v may differ in dtype; o has q's in the chunk functions and v's in the recurrent ones

The relatives read another key than they write (`erase` of anydelta.gated_delta_rule). S is the state after its decay,
except in Comba, whose kernels read it before:

    gdn2      d = w * v - S^T (b * k)       S += k d^T          gates b [K], w [V]     naive_recurrent_gdn2
    comba     d = beta (v - S_(t-1)^T p)    S += k d^T                                 fused_recurrent_comba_fwd_kernel
    precond   d = beta (v - S^T k)          S += (M * k) d^T                           naive_recurrent_precond_*
              A = exp(g_atk) A + beta_atk k^2, r = log(A + eps) - log_atk_scale, M = x^(-r / (1 + |r|)), all [H, K]

fla's naive_recurrent_comba reads the state after its decay, unlike its kernels and naive_chunk_comba. That form is
gated_delta_rule(q, k, beta v, g=g, erase=beta p). The products of the relatives are computed here, in float32, before
the call.

The first four functions are fla 0.5.2's, the relatives 0.6.0's. Differences, all stricter or more general:
- all functions have gradients; in fla the recurrent ones have none;
- K is not limited to 256, q k v may be float32, and `beta=None` is ones for every *value* head;
- an unknown keyword raises TypeError (fla drops it), and so does a flag that is not True or False;
- A_log, dt_bias or lower_bound raise ValueError if nothing would read them;
- cp_context, return_intermediate_states, gv, a beta per value channel and head_first raise UnsupportedError;
- chunk_gdn2 and chunk_precond_kda take more value heads than key heads.

Some hints choose fla's kernels and cannot change a result. They are checked and have no effect: chunk_size,
cu_seqlens_cpu, autotune_interval (of a fork of fla), chunk_indices, solve_tril_precision, disable_recompute, and
safe_gate (if the gate is computed outside the call, it is a promise about g that anydelta does not need).
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch

from .common import (
    Pair,
    bound_of_gate,
    chunk_size,
    chunked_kda,
    flag,
    host_copy,
    keywords,
    log_decay,
    no_channels,
    no_context_parallel,
    qkv,
    run,
    sequences,
    shape,
    summed_decays,
    wide,
    wide_dtype,
)

__all__ = [
    "chunk_comba",
    "chunk_gated_delta_rule",
    "chunk_gdn",
    "chunk_gdn2",
    "chunk_kda",
    "chunk_precond_gated_delta_rule",
    "chunk_precond_kda",
    "fused_recurrent_comba",
    "fused_recurrent_gated_delta_rule",
    "fused_recurrent_gdn",
    "fused_recurrent_gdn2",
    "fused_recurrent_kda",
    "fused_recurrent_precond_gated_delta_rule",
    "fused_recurrent_precond_kda",
]

Triple = tuple[torch.Tensor, "torch.Tensor | None", "torch.Tensor | None"]


def chunk_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    cu_seqlens_cpu: torch.Tensor | None = None,
    cp_context: object = None,
    **kwargs: Any,
) -> Pair:
    """Gated DeltaNet over whole sequences: (o [B, T, HV, V], final state or None).

    Keywords: use_gate_in_kernel with A_log [HV] and dt_bias [HV] (g is then the gate before its activation),
    chunk_size (16, 32 or 64; a hint), transpose_state_layout (deprecated name of state_v_first).

    Raises:
        ValueError, TypeError: an invalid call.
        UnsupportedError: cp_context, head_first.
    """
    op = "fla.chunk_gated_delta_rule"
    qkv(op, q, k, v)
    state_v_first = keywords(
        op,
        kwargs,
        ("use_gate_in_kernel", "A_log", "dt_bias", "chunk_size", "autotune_interval"),
        state_v_first,
    )
    chunk_size(op, kwargs, (16, 32, 64))
    no_context_parallel(op, cp_context)
    host_copy(op, cu_seqlens, cu_seqlens_cpu)
    shape(op, "g", g, v.shape[:3], "[B, T, HV] (for a decay per key channel use chunk_kda)")
    return run(
        op, q, k, v, g, beta,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        use_gate_in_kernel=kwargs.get("use_gate_in_kernel", False),
        A_log=kwargs.get("A_log"),
        dt_bias=kwargs.get("dt_bias"),
        use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel,
        allow_neg_eigval=allow_neg_eigval,
        state_v_first=state_v_first,
        cu_seqlens=cu_seqlens,
    )  # fmt: skip


def fused_recurrent_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None = None,
    gk: torch.Tensor | None = None,
    gv: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    **kwargs: object,
) -> Pair:
    """Gated DeltaNet token by token: (o [B, T, HV, V], final state or None).

    g [B, T, HV] and gk [B, T, HV, K] are log decays and add up. With neither, nothing decays. Without beta every token
    writes with strength 1 (before the sigmoid, if use_beta_sigmoid_in_kernel).

    Raises:
        ValueError, TypeError: an invalid call.
        UnsupportedError: gv, a beta per value channel, head_first.
    """
    op = "fla.fused_recurrent_gated_delta_rule"
    qkv(op, q, k, v)
    state_v_first = keywords(op, kwargs, (), state_v_first)
    flag(op, "use_gate_in_kernel", use_gate_in_kernel)
    if g is None and use_gate_in_kernel:
        raise ValueError(f"{op}: use_gate_in_kernel requires g [B, T, HV], the raw gate; got None")
    if g is not None and gk is not None and use_gate_in_kernel:  # a raw gate has to become a log first
        shape(op, "g", g, v.shape[:3], "[B, T, HV] (a decay per key channel goes into gk)")
        g = log_decay(op, g, A_log, dt_bias)
        use_gate_in_kernel, A_log, dt_bias = False, None, None
    g = summed_decays(op, k, v, g, gk, gv)
    if beta is None:
        beta = v.new_ones(v.shape[:3], dtype=wide_dtype(v))
    return run(
        op, q, k, v, g, beta,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        use_gate_in_kernel=use_gate_in_kernel,
        A_log=A_log,
        dt_bias=dt_bias,
        use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel,
        allow_neg_eigval=allow_neg_eigval,
        state_v_first=state_v_first,
        cu_seqlens=cu_seqlens,
    )  # fmt: skip


def chunk_kda(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    safe_gate: bool = False,
    lower_bound: float | None = None,
    disable_recompute: bool = False,
    return_intermediate_states: bool = False,
    state_v_first: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    cu_seqlens_cpu: torch.Tensor | None = None,
    cp_context: object = None,
    **kwargs: Any,
) -> Pair:
    """Kimi Delta Attention over whole sequences: (o [B, T, HV, V], final state or None).

    With use_gate_in_kernel, g is the gate before its activation. The log decay is then
    -exp(A_log) softplus(g + dt_bias), or with lower_bound lower_bound * sigmoid(exp(A_log) (g + dt_bias)), where A_log
    may be left out and counts as 0. initial_state must be float32.

    Keywords: A_log [HV], dt_bias [HV * K], chunk_size (32 or 64; a hint), transpose_state_layout (deprecated
    name of state_v_first).

    Raises:
        ValueError, TypeError: an invalid call.
        UnsupportedError: cp_context, return_intermediate_states, head_first.
    """
    op = "fla.chunk_kda"
    qkv(op, q, k, v)
    state_v_first = keywords(op, kwargs, ("A_log", "dt_bias", "chunk_size"), state_v_first)
    chunk_size(op, kwargs, (32, 64))
    lower_bound = chunked_kda(
        op, q, initial_state, lower_bound, cu_seqlens, cu_seqlens_cpu, cp_context,
        use_gate_in_kernel=use_gate_in_kernel,
        safe_gate=safe_gate,
        disable_recompute=disable_recompute,
        return_intermediate_states=return_intermediate_states,
    )  # fmt: skip
    shape(op, "g", g, (*v.shape[:3], k.shape[-1]), "[B, T, HV, K]")
    return run(
        op, q, k, v, g, beta,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        use_gate_in_kernel=use_gate_in_kernel,
        A_log=kwargs.get("A_log"),
        dt_bias=kwargs.get("dt_bias"),
        lower_bound=lower_bound,
        use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel,
        allow_neg_eigval=allow_neg_eigval,
        state_v_first=state_v_first,
        cu_seqlens=cu_seqlens,
    )  # fmt: skip


def fused_recurrent_kda(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    lower_bound: float | None = None,
    state_v_first: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    **kwargs: object,
) -> Pair:
    """Kimi Delta Attention token by token: (o [B, T, HV, V], final state or None).

    The gates are those of chunk_kda. An empty sequence keeps its initial state.

    Raises:
        ValueError, TypeError: an invalid call.
        UnsupportedError: a beta per value channel, head_first.
    """
    op = "fla.fused_recurrent_kda"
    qkv(op, q, k, v)
    state_v_first = keywords(op, kwargs, (), state_v_first)
    flag(op, "use_gate_in_kernel", use_gate_in_kernel)
    lower_bound = bound_of_gate(op, lower_bound, use_gate_in_kernel)
    shape(op, "g", g, (*v.shape[:3], k.shape[-1]), "[B, T, HV, K]")
    return run(
        op, q, k, v, g, beta,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        use_gate_in_kernel=use_gate_in_kernel,
        A_log=A_log,
        dt_bias=dt_bias,
        lower_bound=lower_bound,
        use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel,
        allow_neg_eigval=allow_neg_eigval,
        state_v_first=state_v_first,
        cu_seqlens=cu_seqlens,
    )  # fmt: skip


chunk_gdn = chunk_gated_delta_rule
fused_recurrent_gdn = fused_recurrent_gated_delta_rule


# ---- Relatives, which read another key than they write


def chunk_gdn2(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    b: torch.Tensor,
    w: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    cu_seqlens_cpu: torch.Tensor | None = None,
    safe_gate: bool = False,
    lower_bound: float | None = None,
    disable_recompute: bool = False,
    return_intermediate_states: bool = False,
    state_v_first: bool = False,
    cp_context: object = None,
    **kwargs: object,
) -> Pair:
    """Gated DeltaNet 2 over whole sequences: (o [B, T, HV, V], final state or None).

    b [B, T, HV, K] gates what is erased, w [B, T, HV, V] what is written; g and its keywords are those of chunk_kda,
    except that chunk_size is 64.

    Raises:
        ValueError, TypeError: an invalid call.
        UnsupportedError: cp_context, return_intermediate_states, head_first.
    """
    op = "fla.chunk_gdn2"
    qkv(op, q, k, v)
    state_v_first = keywords(op, kwargs, ("A_log", "dt_bias", "chunk_size"), state_v_first)
    chunk_size(op, kwargs, (64,))
    lower_bound = chunked_kda(
        op, q, initial_state, lower_bound, cu_seqlens, cu_seqlens_cpu, cp_context,
        use_gate_in_kernel=use_gate_in_kernel,
        safe_gate=safe_gate,
        disable_recompute=disable_recompute,
        return_intermediate_states=return_intermediate_states,
    )  # fmt: skip
    return _gdn2(
        op, q, k, v, g, b, w,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        use_gate_in_kernel=use_gate_in_kernel,
        A_log=kwargs.get("A_log"),
        dt_bias=kwargs.get("dt_bias"),
        lower_bound=lower_bound,
        state_v_first=state_v_first,
        cu_seqlens=cu_seqlens,
    )  # fmt: skip


def fused_recurrent_gdn2(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    b: torch.Tensor,
    w: torch.Tensor,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    lower_bound: float | None = None,
    state_v_first: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    **kwargs: object,
) -> Pair:
    """Gated DeltaNet 2 token by token: (o [B, T, HV, V], final state or None). The gates are those of chunk_gdn2.

    Raises:
        ValueError, TypeError: an invalid call.
        UnsupportedError: head_first.
    """
    op = "fla.fused_recurrent_gdn2"
    qkv(op, q, k, v)
    return _gdn2(
        op, q, k, v, g, b, w,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        use_gate_in_kernel=use_gate_in_kernel,
        A_log=A_log,
        dt_bias=dt_bias,
        lower_bound=bound_of_gate(op, lower_bound, use_gate_in_kernel),
        state_v_first=keywords(op, kwargs, (), state_v_first),
        cu_seqlens=cu_seqlens,
    )  # fmt: skip


def chunk_comba(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    p: torch.Tensor | None,
    g: torch.Tensor,
    beta: torch.Tensor | None = None,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    cu_seqlens_cpu: torch.Tensor | None = None,
) -> Pair:
    """Comba over whole sequences: (o [B, T, HV, V], final state or None).

    p [B, T, H, K] is the key that is read, k if None; use_qk_l2norm_in_kernel norms it too. beta [B, T, HV] is ones if
    None. As in fla's kernels the state is read before its decay.

    Raises:
        ValueError, TypeError: an invalid call.
        UnsupportedError: a beta per value channel.
    """
    op = "fla.chunk_comba"
    qkv(op, q, k, v)
    host_copy(op, cu_seqlens, cu_seqlens_cpu)
    return _comba(
        op, q, k, v, p, g, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, cu_seqlens
    )


def fused_recurrent_comba(
    q: torch.Tensor,
    k: torch.Tensor,
    p: torch.Tensor | None,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor | None = None,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: torch.Tensor | None = None,
) -> Pair:
    """chunk_comba token by token. p comes before v, as in fla.

    Raises:
        ValueError, TypeError: an invalid call.
        UnsupportedError: a beta per value channel.
    """
    op = "fla.fused_recurrent_comba"
    qkv(op, q, k, v)
    return _comba(
        op, q, k, v, p, g, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, cu_seqlens
    )


def chunk_precond_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g_atk: torch.Tensor,
    g: torch.Tensor,
    beta_atk: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    initial_A_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = True,
    cu_seqlens: torch.Tensor | None = None,
    cu_seqlens_cpu: torch.Tensor | None = None,
    cp_context: object = None,
    transpose_state_layout: bool = False,
    x: float = 1.5,
    eps: float = 1e-6,
    log_atk_scale: torch.Tensor | None = None,
) -> Triple:
    """The preconditioned gated delta rule over whole sequences: (o, final state or None, A [N, H, K] or None).

    g_atk, beta_atk [B, T, H]: log decay and weight of the squared keys in A; log_atk_scale [H], -0.2 if None: the
    centre of log A. x > 0, eps >= 0: numbers. transpose_state_layout: states [N, HV, V, K].

    Raises:
        ValueError, TypeError: an invalid call.
        UnsupportedError: cp_context, a beta per value channel.
    """
    op = "fla.chunk_precond_gated_delta_rule"
    qkv(op, q, k, v)
    no_context_parallel(op, cp_context)
    host_copy(op, cu_seqlens, cu_seqlens_cpu)
    shape(op, "g", g, v.shape[:3], "[B, T, HV]")
    return _preconditioned(
        op, q, k, v, g, beta, g_atk, beta_atk, initial_A_state, x, eps, log_atk_scale,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        state_v_first=transpose_state_layout,
        cu_seqlens=cu_seqlens,
    )  # fmt: skip


def fused_recurrent_precond_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None = None,
    gk: torch.Tensor | None = None,
    gv: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
    g_atk: torch.Tensor | None = None,
    beta_atk: torch.Tensor | None = None,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    initial_A_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = True,
    cu_seqlens: torch.Tensor | None = None,
    transpose_state_layout: bool = False,
    x: float = 1.5,
    eps: float = 1e-6,
    log_atk_scale: torch.Tensor | None = None,
) -> Triple:
    """chunk_precond_gated_delta_rule token by token. The decays are those of fused_recurrent_gated_delta_rule.

    Raises:
        ValueError, TypeError: an invalid call.
        UnsupportedError: gv, a beta per value channel.
    """
    op = "fla.fused_recurrent_precond_gated_delta_rule"
    qkv(op, q, k, v)
    g = summed_decays(op, k, v, g, gk, gv)
    return _preconditioned(
        op, q, k, v, g, beta, g_atk, beta_atk, initial_A_state, x, eps, log_atk_scale,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        state_v_first=transpose_state_layout,
        cu_seqlens=cu_seqlens,
    )  # fmt: skip


def chunk_precond_kda(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    g_atk: torch.Tensor,
    beta_atk: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    initial_A_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_gate_in_kernel: bool = False,
    safe_gate: bool = False,
    lower_bound: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    cu_seqlens_cpu: torch.Tensor | None = None,
    chunk_indices: torch.Tensor | None = None,
    cp_context: object = None,
    transpose_state_layout: bool = False,
    x: float = 1.5,
    eps: float = 1e-6,
    log_atk_scale: torch.Tensor | None = None,
    solve_tril_precision: str | None = None,
    disable_recompute: bool = False,
    return_intermediate_states: bool = False,
    **kwargs: object,
) -> Triple:
    """The preconditioned KDA over whole sequences: (o, final state or None, A [N, H, K] or None). q and k are normed.

    The gates are those of chunk_kda. A is computed as in chunk_precond_gated_delta_rule.

    Raises:
        ValueError, TypeError: an invalid call.
        UnsupportedError: cp_context, return_intermediate_states, a beta per value channel, head_first.
    """
    op = "fla.chunk_precond_kda"
    qkv(op, q, k, v)
    keywords(op, kwargs, ("A_log", "dt_bias"), False)
    lower_bound = chunked_kda(
        op, q, initial_state, lower_bound, cu_seqlens, cu_seqlens_cpu, cp_context,
        use_gate_in_kernel=use_gate_in_kernel,
        safe_gate=safe_gate,
        disable_recompute=disable_recompute,
        return_intermediate_states=return_intermediate_states,
    )  # fmt: skip
    shape(op, "g", g, (*v.shape[:3], k.shape[-1]), "[B, T, HV, K]")
    return _preconditioned(
        op, q, k, v, g, beta, g_atk, beta_atk, initial_A_state, x, eps, log_atk_scale,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=True,
        use_gate_in_kernel=use_gate_in_kernel,
        A_log=kwargs.get("A_log"),
        dt_bias=kwargs.get("dt_bias"),
        lower_bound=lower_bound,
        state_v_first=transpose_state_layout,
        cu_seqlens=cu_seqlens,
    )  # fmt: skip


def fused_recurrent_precond_kda(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    g_atk: torch.Tensor,
    beta_atk: torch.Tensor,
    beta: torch.Tensor,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    initial_A_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = True,
    use_gate_in_kernel: bool = False,
    lower_bound: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    transpose_state_layout: bool = False,
    x: float = 1.5,
    eps: float = 1e-6,
    log_atk_scale: torch.Tensor | None = None,
    **kwargs: object,
) -> Triple:
    """chunk_precond_kda token by token. The norm of q and k is optional.

    Raises:
        ValueError, TypeError: an invalid call.
        UnsupportedError: a beta per value channel, head_first.
    """
    op = "fla.fused_recurrent_precond_kda"
    qkv(op, q, k, v)
    keywords(op, kwargs, (), False)
    shape(op, "g", g, (*v.shape[:3], k.shape[-1]), "[B, T, HV, K]")
    return _preconditioned(
        op, q, k, v, g, beta, g_atk, beta_atk, initial_A_state, x, eps, log_atk_scale,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        use_gate_in_kernel=use_gate_in_kernel,
        A_log=A_log,
        dt_bias=dt_bias,
        lower_bound=bound_of_gate(op, lower_bound, use_gate_in_kernel),
        state_v_first=transpose_state_layout,
        cu_seqlens=cu_seqlens,
    )  # fmt: skip


def _gdn2(
    op: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    b: torch.Tensor,
    w: torch.Tensor,
    **rest: object,
) -> Pair:
    """d = w * v - S^T (b * k)."""
    each = (*v.shape[:3], k.shape[-1])
    for name, x in (("g", g), ("b", b)):
        shape(op, name, x, each, "[B, T, HV, K]")
    shape(op, "w", w, v.shape, "[B, T, HV, V]")
    q_n, k_n = _keys(op, rest, q, k)
    erase = wide(b) * _per_value_head(op, k_n, v)
    return _erasing(op, q.dtype, v.dtype, q_n, k_n, wide(w) * wide(v), g, erase, rest)


FADED = -40.0
"""A log decay with a finite inverse, which leaves less of a state than float64 can add to new values."""


def _comba(
    op: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    p: torch.Tensor | None,
    g: torch.Tensor,
    beta: torch.Tensor | None,
    scale: float | None,
    initial_state: torch.Tensor | None,
    output_final_state: bool,
    norm: bool,
    cu_seqlens: torch.Tensor | None,
) -> Pair:
    """d = beta (v - S_(t-1)^T p), written as a rule that reads exp(g) S_(t-1): with erase = beta exp(-g) p."""
    p = k if p is None else p
    shape(op, "p", p, k.shape, "[B, T, H, K] as k")
    shape(op, "g", g, v.shape[:3], "[B, T, HV]")
    rest: dict[str, object] = dict(
        scale=scale, initial_state=initial_state, output_final_state=output_final_state, use_qk_l2norm_in_kernel=norm,
        state_v_first=False, cu_seqlens=cu_seqlens,
    )  # fmt: skip
    q_n, k_n, p_n = _keys(op, rest, q, k, p)
    strength = _strength(op, beta, v)
    decay = wide(g).clamp(min=FADED)
    erase = (strength * (-decay).exp()).unsqueeze(-1) * _per_value_head(op, p_n, v)
    return _erasing(op, q.dtype, v.dtype, q_n, k_n, strength.unsqueeze(-1) * wide(v), decay, erase, rest)


def _preconditioned(
    op: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor | None,
    g_atk: torch.Tensor | None,
    beta_atk: torch.Tensor | None,
    initial_A_state: torch.Tensor | None,
    x: float,
    eps: float,
    log_atk_scale: torch.Tensor | None,
    **rest: Any,
) -> Triple:
    """The rule writes the key M * k and reads the key beta k."""
    B, _, H, K = k.shape
    for name, gate in (("g_atk", g_atk), ("beta_atk", beta_atk)):
        shape(op, name, gate, k.shape[:3], "[B, T, H]")
    assert g_atk is not None
    assert beta_atk is not None
    if log_atk_scale is not None:
        shape(op, "log_atk_scale", log_atk_scale, (H,), "[H]")
    for name, number, least in (("x", x, 0.0), ("eps", eps, -math.ulp(0.0))):
        if not isinstance(number, (int, float)) or isinstance(number, bool):
            raise TypeError(f"{op}: {name} must be a number; got {type(number).__name__}")
        if not least < number < math.inf:
            raise ValueError(f"{op}: {name} must be {'> 0' if name == 'x' else '>= 0'}; got {number}")
    q_n, k_n = _keys(op, rest, q, k)
    cu_seqlens = rest["cu_seqlens"]
    if cu_seqlens is not None:
        sequences(op, "cu_seqlens", cu_seqlens, B, k.shape[1])
    N = B if cu_seqlens is None else len(cu_seqlens) - 1
    if initial_A_state is None:
        A = k_n.new_zeros(N, H, K)
    else:
        shape(op, "initial_A_state", initial_A_state, (N, H, K), "[N, H, K]")
        A = wide(initial_A_state)
    weighted = wide(beta_atk).unsqueeze(-1) * k_n.square()
    if cu_seqlens is None:
        sums, last = _faded_sums(weighted, wide(g_atk), A)
    else:
        parts = [
            _faded_sums(weighted[:, a:b], wide(g_atk)[:, a:b], A[n : n + 1])
            for n, (a, b) in enumerate(pairwise(cu_seqlens.tolist()))
        ]
        sums = torch.cat([s for s, _ in parts], 1) if parts else weighted
        last = torch.cat([a for _, a in parts]) if parts else A
    centre = -0.2 if log_atk_scale is None else wide(log_atk_scale).unsqueeze(-1)
    r = (sums + eps).log() - centre
    M = (-math.log(x) * r / (1.0 + r.abs())).exp()
    strength = _strength(op, beta, v).unsqueeze(-1)
    erase = strength * _per_value_head(op, k_n, v)
    o, state = _erasing(op, q.dtype, v.dtype, q_n, M * k_n, strength * wide(v), g, erase, rest)
    return o, state, None if state is None else last


def _faded_sums(x: torch.Tensor, g: torch.Tensor, start: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A_t = exp(g_t) A_(t-1) + x_t over T, and the last one; x [B, T, H, K], g [B, T, H], A_0 = start [B, H, K].

    In blocks of 64 tokens, as products with exp(g_(j+1) + ... + g_i): sums of terms, because -inf - -inf is NaN.
    """
    out, A = [x[:, :0]], start
    for x_b, g_b in zip(x.split(64, 1), g.split(64, 1), strict=True):
        if not g_b.shape[1]:
            continue
        ones = torch.ones(g_b.shape[1], g_b.shape[1], dtype=torch.bool, device=g.device).tril()
        terms = g_b.transpose(1, 2).unsqueeze(-1).where(ones.tril(-1), g.new_zeros(()))  # [B, H, i, j]
        decay = terms.cumsum(-2).exp().where(ones, g.new_zeros(()))
        sums = torch.einsum("bhij,bjhk->bihk", decay, x_b) + g_b.cumsum(1).exp().unsqueeze(-1) * A.unsqueeze(
            1
        )
        out.append(sums)
        A = sums[:, -1]
    return torch.cat(out, 1), A


def _keys(op: str, rest: dict[str, object], *keys: torch.Tensor) -> list[torch.Tensor]:
    """The keys in float32, normed if `rest` has use_qk_l2norm_in_kernel: products with them come after the norm."""
    norm = rest.pop("use_qk_l2norm_in_kernel")
    flag(op, "use_qk_l2norm_in_kernel", norm)
    plain = [wide(x) for x in keys]
    return [x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in plain] if norm else plain


def _per_value_head(op: str, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """[B, T, H, K] as [B, T, HV, K]."""
    H, HV = k.shape[2], v.shape[2]
    if not H or HV % H:
        raise ValueError(f"{op}: v must have a multiple of k's heads; got HV={HV}, H={H}")
    return k if H == HV else k.repeat_interleave(HV // H, 2)


def _strength(op: str, beta: torch.Tensor | None, v: torch.Tensor) -> torch.Tensor:
    """beta [B, T, HV] in float32, ones for None."""
    if beta is None:
        return v.new_ones(v.shape[:3], dtype=wide_dtype(v))
    no_channels(op, beta)
    shape(op, "beta", beta, v.shape[:3], "[B, T, HV]")
    return wide(beta)


def _erasing(
    op: str,
    q_dtype: torch.dtype,
    v_dtype: torch.dtype,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    erase: torch.Tensor,
    rest: dict[str, Any],
) -> Pair:
    """The call with a separate key to read. o has the dtype that fla gives it."""
    gates = dict(use_gate_in_kernel=False, A_log=None, dt_bias=None, lower_bound=None)
    o, state = run(op, q, k, v, g, None, erase=erase, use_qk_l2norm_in_kernel=False, **{**gates, **rest})
    return o.to(q_dtype if ".chunk_" in op else v_dtype), state
