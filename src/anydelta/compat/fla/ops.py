"""flash-linear-attention 0.5.2's four functions of the gated delta rule, for torch tensors on any device.

Same names, argument order, defaults and conventions, so they can stand where those of fla.ops stood.

    q, k [B, T, H, K]; v [B, T, HV, V]; value head hv reads q/k head hv // (HV/H)
    g [B, T, HV] (gated delta rule) or [B, T, HV, K] (KDA), the natural log of the decay; beta [B, T, HV]
    states [N, HV, K, V], final states in float32
    q, k and v may differ in dtype; o has q's in the chunk functions and v's in the recurrent ones

Where this differs from fla, it is stricter or does more:
- all four functions have gradients; in fla the recurrent ones have none;
- K is not limited to 256, q k v may be float32, and `beta=None` is ones for every *value* head;
- an unknown keyword raises TypeError, where fla drops it; so does a flag that is not True or False;
- A_log, dt_bias or lower_bound that nothing would read raise ValueError;
- cp_context, return_intermediate_states, gv, a beta per value channel and head_first raise UnsupportedError.

Hints that choose fla's kernels and cannot change a result are checked and then unused: chunk_size,
cu_seqlens_cpu, autotune_interval (of a fork of fla), disable_recompute, and safe_gate (with the gate computed outside
the call, it is a promise about g that anydelta does not need).
"""

from __future__ import annotations

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
    no_context_parallel,
    qkv,
    run,
    shape,
    summed_decays,
    wide_dtype,
)

__all__ = [
    "chunk_gated_delta_rule",
    "chunk_gdn",
    "chunk_kda",
    "fused_recurrent_gated_delta_rule",
    "fused_recurrent_gdn",
    "fused_recurrent_kda",
]


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
    cp_context: Any = None,
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
    **kwargs: Any,
) -> Pair:
    """Gated DeltaNet token by token: (o [B, T, HV, V], final state or None).

    g [B, T, HV] and gk [B, T, HV, K] are log decays and add up; with neither, nothing decays. Without beta
    every token writes with strength 1 (before the sigmoid, if use_beta_sigmoid_in_kernel).

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
    cp_context: Any = None,
    **kwargs: Any,
) -> Pair:
    """Kimi Delta Attention over whole sequences: (o [B, T, HV, V], final state or None).

    With use_gate_in_kernel, g is the gate before its activation and the log decay is
    -exp(A_log) softplus(g + dt_bias), or, as soon as lower_bound is given,
    lower_bound * sigmoid(exp(A_log) (g + dt_bias)), where A_log may be left out and counts as 0. initial_state must be
    float32.

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
    **kwargs: Any,
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
