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

import warnings
from typing import Any

import torch
import torch.nn.functional as F

from ...core.dispatch import UnsupportedError
from ...rule.op import gated_delta_rule

__all__ = [
    "chunk_gated_delta_rule",
    "chunk_gdn",
    "chunk_kda",
    "fused_recurrent_gated_delta_rule",
    "fused_recurrent_gdn",
    "fused_recurrent_kda",
]

Pair = tuple[torch.Tensor, "torch.Tensor | None"]


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
    _qkv(op, q, k, v)
    state_v_first = _keywords(
        op,
        kwargs,
        ("use_gate_in_kernel", "A_log", "dt_bias", "chunk_size", "autotune_interval"),
        state_v_first,
    )
    _chunk_size(op, kwargs, (16, 32, 64))
    _no_context_parallel(op, cp_context)
    _host_copy(op, cu_seqlens, cu_seqlens_cpu)
    _shape(op, "g", g, v.shape[:3], "[B, T, HV] (for a decay per key channel use chunk_kda)")
    return _run(
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
    _qkv(op, q, k, v)
    state_v_first = _keywords(op, kwargs, (), state_v_first)
    if gv is not None:
        raise UnsupportedError(
            f"{op}: gv (a decay per value channel) is not part of the gated delta rule; leave it None"
        )
    _flag(op, "use_gate_in_kernel", use_gate_in_kernel)
    if g is None and use_gate_in_kernel:
        raise ValueError(f"{op}: use_gate_in_kernel requires g [B, T, HV], the raw gate; got None")
    if g is not None:
        _shape(op, "g", g, v.shape[:3], "[B, T, HV] (a decay per key channel goes into gk)")
    if gk is not None:
        _shape(op, "gk", gk, (*v.shape[:3], k.shape[-1]), "[B, T, HV, K]")
        if g is not None:
            # The decays multiply, so their logs add; a raw gate has to become a log first.
            if use_gate_in_kernel:
                g = _log_decay(op, g, A_log, dt_bias)
                use_gate_in_kernel, A_log, dt_bias = False, None, None
            gk = _wide(g).unsqueeze(-1) + _wide(gk)
        g = gk
    if g is None:
        g = v.new_zeros(v.shape[:3], dtype=_wide_dtype(v))
    if beta is None:
        beta = v.new_ones(v.shape[:3], dtype=_wide_dtype(v))
    return _run(
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
    _qkv(op, q, k, v)
    state_v_first = _keywords(op, kwargs, ("A_log", "dt_bias", "chunk_size"), state_v_first)
    _chunk_size(op, kwargs, (32, 64))
    _no_context_parallel(op, cp_context)
    _host_copy(op, cu_seqlens, cu_seqlens_cpu)
    for name, value in (
        ("use_gate_in_kernel", use_gate_in_kernel),
        ("safe_gate", safe_gate),
        ("disable_recompute", disable_recompute),
        ("return_intermediate_states", return_intermediate_states),
    ):
        _flag(op, name, value)
    if return_intermediate_states:
        raise UnsupportedError(
            f"{op}: return_intermediate_states is not available; leave it False, or use "
            "anydelta.gated_delta_rule(..., snapshots=) for the states after the last tokens"
        )
    if safe_gate and use_gate_in_kernel and (lower_bound is None or not -5 <= lower_bound < 0):
        raise ValueError(
            f"{op}: safe_gate with use_gate_in_kernel requires lower_bound in [-5, 0); got {lower_bound}"
        )
    if lower_bound is not None and not use_gate_in_kernel:
        if not safe_gate:
            raise ValueError(f"{op}: lower_bound requires use_gate_in_kernel or safe_gate; got neither")
        # fla neither clamps nor maps g here: the caller states that g already lies above the bound.
        lower_bound = None
    if initial_state is not None and initial_state.dtype != torch.float32 and q.dtype != torch.float64:
        raise ValueError(f"{op}: initial_state must be float32; got {initial_state.dtype}")
    _shape(op, "g", g, (*v.shape[:3], k.shape[-1]), "[B, T, HV, K]")
    return _run(
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
    _qkv(op, q, k, v)
    state_v_first = _keywords(op, kwargs, (), state_v_first)
    _flag(op, "use_gate_in_kernel", use_gate_in_kernel)
    if lower_bound is not None and not use_gate_in_kernel:
        raise ValueError(f"{op}: lower_bound requires use_gate_in_kernel; got use_gate_in_kernel=False")
    _shape(op, "g", g, (*v.shape[:3], k.shape[-1]), "[B, T, HV, K]")
    return _run(
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


def _run(
    op: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    scale: float | None,
    initial_state: torch.Tensor | None,
    output_final_state: bool,
    use_qk_l2norm_in_kernel: bool,
    use_gate_in_kernel: bool,
    A_log: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    lower_bound: float | None = None,
    use_beta_sigmoid_in_kernel: bool,
    allow_neg_eigval: bool,
    state_v_first: bool,
    cu_seqlens: torch.Tensor | None,
) -> Pair:
    """What the four functions share, in anydelta's terms."""
    if output_final_state is None:  # callers pass `use_cache`, which may be None
        output_final_state = False
    for name, value in (
        ("output_final_state", output_final_state),
        ("use_qk_l2norm_in_kernel", use_qk_l2norm_in_kernel),
        ("use_gate_in_kernel", use_gate_in_kernel),
        ("use_beta_sigmoid_in_kernel", use_beta_sigmoid_in_kernel),
        ("allow_neg_eigval", allow_neg_eigval),
        ("state_v_first", state_v_first),
    ):
        _flag(op, name, value)
    if use_gate_in_kernel:
        if A_log is None and lower_bound is None:
            raise ValueError(f"{op}: use_gate_in_kernel requires A_log [HV] (or a lower_bound); got None")
        # fla's kernels read both as flat memory: Kimi checkpoints hold A_log as [1, 1, HV, 1].
        A_log, dt_bias = (x.reshape(-1) if isinstance(x, torch.Tensor) else x for x in (A_log, dt_bias))
    else:
        _unread(op, A_log, dt_bias)
    if isinstance(beta, torch.Tensor) and beta.ndim == 4:
        raise UnsupportedError(
            f"{op}: beta must be [B, T, HV]; a beta per value channel, {list(beta.shape)}, is not supported"
        )
    if allow_neg_eigval:
        if not use_beta_sigmoid_in_kernel:
            raise ValueError(f"{op}: allow_neg_eigval requires use_beta_sigmoid_in_kernel; got False")
        beta, use_beta_sigmoid_in_kernel = 2 * _wide(beta).sigmoid(), False
    if initial_state is not None:
        # Exact; and fla's final state is float32, whatever the initial one is.
        initial_state = _wide(initial_state)
    # The core takes one dtype; the wider one holds the others' numbers.
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    o, state = gated_delta_rule(
        q.to(dtype),
        k.to(dtype),
        v.to(dtype),
        g=g,
        beta=beta,
        initial_state=initial_state,
        scale=scale,
        decay="raw" if use_gate_in_kernel else "log",
        A_log=A_log,
        dt_bias=dt_bias,
        lower_bound=lower_bound,
        beta_is_logit=use_beta_sigmoid_in_kernel,
        qk_l2norm=use_qk_l2norm_in_kernel,
        state_layout="vk" if state_v_first else "kv",
        cu_seqlens=cu_seqlens,
        output_final_state=output_final_state,
    )
    return o.to(q.dtype if ".chunk_" in op else v.dtype), state


def _keywords(op: str, kwargs: dict[str, Any], known: tuple[str, ...], state_v_first: bool) -> bool:
    """Refuse what is not known, and resolve the old name of state_v_first."""
    if "head_first" in kwargs:
        raise UnsupportedError(
            f"{op}: head_first was removed; inputs are [B, T, H, ...]. Transpose(1, 2) and drop it"
        )
    unknown = [name for name in kwargs if name not in (*known, "transpose_state_layout")]
    if unknown:
        raise TypeError(f"{op}: got an unexpected keyword argument {unknown[0]!r}")
    if "transpose_state_layout" not in kwargs:
        return state_v_first
    if state_v_first:
        raise ValueError(
            f"{op}: state_v_first and its old name transpose_state_layout exclude each other; drop the latter"
        )
    warnings.warn(
        f"{op}: transpose_state_layout is the old name of state_v_first", DeprecationWarning, stacklevel=3
    )
    old: bool = kwargs["transpose_state_layout"]
    _flag(op, "transpose_state_layout", old)
    return old


def _flag(op: str, name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be True or False; got {value!r}")


def _qkv(op: str, q: Any, k: Any, v: Any) -> None:
    for name, x, legend in (("q", q, "[B, T, H, K]"), ("k", k, "[B, T, H, K]"), ("v", v, "[B, T, HV, V]")):
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{op}: {name} must be a torch.Tensor; got {type(x).__name__}")
        if x.ndim != 4:
            raise ValueError(f"{op}: {name} must be {legend}; got {list(x.shape)}")


def _shape(op: str, name: str, x: Any, want: tuple[int, ...], legend: str) -> None:
    """The shape that tells the two rules apart; the core checks the rest."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor; got {type(x).__name__}")
    if tuple(x.shape) != tuple(want):
        raise ValueError(f"{op}: {name} must be {legend} = {list(want)}; got {list(x.shape)}")


def _chunk_size(op: str, kwargs: dict[str, Any], allowed: tuple[int, ...]) -> None:
    if "chunk_size" in kwargs and kwargs["chunk_size"] not in allowed:
        raise ValueError(f"{op}: chunk_size must be one of {allowed}; got {kwargs['chunk_size']!r}")


def _no_context_parallel(op: str, cp_context: Any) -> None:
    if cp_context is not None:
        raise UnsupportedError(f"{op}: cp_context (context parallelism) is not supported; leave it None")


def _host_copy(op: str, cu_seqlens: Any, cu_seqlens_cpu: Any) -> None:
    """cu_seqlens_cpu spares fla a device sync; here only a copy that contradicts matters."""
    if cu_seqlens_cpu is None:
        return
    if cu_seqlens is None:
        raise ValueError(f"{op}: cu_seqlens_cpu is the host copy of cu_seqlens and requires it; got None")
    if cu_seqlens_cpu.device.type != "cpu" or cu_seqlens_cpu.shape != cu_seqlens.shape:
        raise ValueError(
            f"{op}: cu_seqlens_cpu must be a host copy of cu_seqlens {list(cu_seqlens.shape)}; "
            f"got {list(cu_seqlens_cpu.shape)} on {cu_seqlens_cpu.device}"
        )
    if cu_seqlens.device.type == "cpu" and cu_seqlens.tolist() != cu_seqlens_cpu.tolist():
        raise ValueError(f"{op}: cu_seqlens_cpu must equal cu_seqlens; got other values")


def _unread(op: str, A_log: Any, dt_bias: Any) -> None:
    for name, value in (("A_log", A_log), ("dt_bias", dt_bias)):
        if value is not None:
            raise ValueError(
                f"{op}: {name} requires use_gate_in_kernel=True; got False, so nothing would read it"
            )


def _wide_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(_wide_dtype(x))


def _log_decay(op: str, g: torch.Tensor, A_log: Any, dt_bias: Any) -> torch.Tensor:
    """-exp(A_log) softplus(g + dt_bias), per head."""
    if A_log is None:
        raise ValueError(f"{op}: use_gate_in_kernel requires A_log [HV]; got None")
    HV = g.shape[2]
    for name, x in (("A_log", A_log), ("dt_bias", dt_bias)):
        if x is not None and x.numel() != HV:
            raise ValueError(f"{op}: {name} must be [HV] = {[HV]}; got {list(x.shape)}")
    x = _wide(g) if dt_bias is None else _wide(g) + _wide(dt_bias).reshape(-1)
    return -_wide(A_log).reshape(-1).exp() * F.softplus(x)
