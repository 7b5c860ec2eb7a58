"""Shared by fla's functions: checks of arguments, and the call in anydelta's terms."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F

from ...core.dispatch import UnsupportedError
from ...rule.op import gated_delta_rule

Pair = tuple[torch.Tensor, "torch.Tensor | None"]


def run(
    op: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor | None,
    *,
    scale: float | None,
    initial_state: torch.Tensor | None,
    output_final_state: bool,
    use_qk_l2norm_in_kernel: bool,
    use_gate_in_kernel: bool,
    A_log: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    lower_bound: float | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool,
    cu_seqlens: torch.Tensor | None,
    **more: Any,
) -> Pair:
    """The call in anydelta's terms; `more` are arguments of gated_delta_rule that fla's functions do not have."""
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
        flag(op, name, value)
    if use_gate_in_kernel:
        if A_log is None and lower_bound is None:
            raise ValueError(f"{op}: use_gate_in_kernel requires A_log [HV] (or a lower_bound); got None")
        # fla's kernels read both as flat memory. Kimi checkpoints hold A_log as [1, 1, HV, 1].
        A_log, dt_bias = (x.reshape(-1) if isinstance(x, torch.Tensor) else x for x in (A_log, dt_bias))
    else:
        unread(op, A_log, dt_bias)
    no_channels(op, beta)
    if allow_neg_eigval:
        if not use_beta_sigmoid_in_kernel:
            raise ValueError(f"{op}: allow_neg_eigval requires use_beta_sigmoid_in_kernel; got False")
        assert beta is not None
        beta, use_beta_sigmoid_in_kernel = 2 * wide(beta).sigmoid(), False
    if initial_state is not None:
        # This is exact, and fla's final state is float32, whatever the initial one is.
        initial_state = wide(initial_state)
    # The core takes one dtype. The widest holds all numbers.
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
        **more,
    )
    return o.to(q.dtype if ".chunk_" in op else v.dtype), state


def chunked_kda(
    op: str,
    q: torch.Tensor,
    initial_state: torch.Tensor | None,
    lower_bound: float | None,
    cu_seqlens: torch.Tensor | None,
    cu_seqlens_cpu: torch.Tensor | None,
    cp_context: object,
    **flags: bool,
) -> float | None:
    """The checks of the chunk functions with KDA's gates. Returns the effective lower bound."""
    no_context_parallel(op, cp_context)
    host_copy(op, cu_seqlens, cu_seqlens_cpu)
    for name, value in flags.items():
        flag(op, name, value)
    if flags["return_intermediate_states"]:
        raise UnsupportedError(
            f"{op}: return_intermediate_states is not available; leave it False, or use "
            "anydelta.gated_delta_rule(..., snapshots=) for the states after the last tokens"
        )
    safe_gate, use_gate_in_kernel = flags["safe_gate"], flags["use_gate_in_kernel"]
    if safe_gate and use_gate_in_kernel and (lower_bound is None or not -5 <= lower_bound < 0):
        raise ValueError(
            f"{op}: safe_gate with use_gate_in_kernel requires lower_bound in [-5, 0); got {lower_bound}"
        )
    if lower_bound is not None and not use_gate_in_kernel:
        if not safe_gate:
            raise ValueError(f"{op}: lower_bound requires use_gate_in_kernel or safe_gate; got neither")
        # fla neither clamps nor maps g here: the caller promises that g is already above the bound.
        lower_bound = None
    if initial_state is not None and initial_state.dtype != torch.float32 and q.dtype != torch.float64:
        raise ValueError(f"{op}: initial_state must be float32; got {initial_state.dtype}")
    return lower_bound


def bound_of_gate(op: str, lower_bound: float | None, use_gate_in_kernel: bool) -> float | None:
    flag(op, "use_gate_in_kernel", use_gate_in_kernel)
    if lower_bound is not None and not use_gate_in_kernel:
        raise ValueError(f"{op}: lower_bound requires use_gate_in_kernel; got use_gate_in_kernel=False")
    return lower_bound


def summed_decays(
    op: str,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None,
    gk: torch.Tensor | None,
    gv: torch.Tensor | None,
) -> torch.Tensor:
    """g [B, T, HV], gk [B, T, HV, K] or their sum, because decays multiply. With neither, nothing decays."""
    if gv is not None:
        raise UnsupportedError(
            f"{op}: gv (a decay per value channel) is not part of the gated delta rule; leave it None"
        )
    if g is not None:
        shape(op, "g", g, v.shape[:3], "[B, T, HV] (a decay per key channel goes into gk)")
    if gk is None:
        return v.new_zeros(v.shape[:3], dtype=wide_dtype(v)) if g is None else g
    shape(op, "gk", gk, (*v.shape[:3], k.shape[-1]), "[B, T, HV, K]")
    return gk if g is None else wide(g).unsqueeze(-1) + wide(gk)


def no_channels(op: str, beta: object) -> None:
    if isinstance(beta, torch.Tensor) and beta.ndim == 4:
        raise UnsupportedError(
            f"{op}: beta must be [B, T, HV]; a beta per value channel, {list(beta.shape)}, is not supported"
        )


def keywords(op: str, kwargs: dict[str, Any], known: tuple[str, ...], state_v_first: bool) -> bool:
    """Refuse unknown arguments, and resolve the old name of state_v_first."""
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
    flag(op, "transpose_state_layout", old)
    return old


def flag(op: str, name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be True or False; got {value!r}")


def qkv(op: str, q: object, k: object, v: object) -> None:
    for name, x, legend in (("q", q, "[B, T, H, K]"), ("k", k, "[B, T, H, K]"), ("v", v, "[B, T, HV, V]")):
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{op}: {name} must be a torch.Tensor; got {type(x).__name__}")
        if x.ndim != 4:
            raise ValueError(f"{op}: {name} must be {legend}; got {list(x.shape)}")


def shape(op: str, name: str, x: object, want: tuple[int, ...], legend: str) -> None:
    """Check the shape that tells the two rules apart. The core checks the rest."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor; got {type(x).__name__}")
    if tuple(x.shape) != tuple(want):
        raise ValueError(f"{op}: {name} must be {legend} = {list(want)}; got {list(x.shape)}")


def chunk_size(op: str, kwargs: dict[str, object], allowed: tuple[int, ...]) -> None:
    if "chunk_size" in kwargs and kwargs["chunk_size"] not in allowed:
        raise ValueError(f"{op}: chunk_size must be one of {allowed}; got {kwargs['chunk_size']!r}")


def no_context_parallel(op: str, cp_context: object) -> None:
    if cp_context is not None:
        raise UnsupportedError(f"{op}: cp_context (context parallelism) is not supported; leave it None")


def sequences(op: str, name: str, bounds: object, B: int, T: int, least: int | None = None) -> None:
    """Check packed sequences: B = 1, integers that rise from 0 to T, or to at least `least`. The values are only read
    on the host, and not under torch.compile."""
    if (
        not isinstance(bounds, torch.Tensor)
        or bounds.ndim != 1
        or not len(bounds)
        or bounds.dtype not in _INTEGERS
    ):
        what = (
            f"{bounds.dtype} {list(bounds.shape)}"
            if isinstance(bounds, torch.Tensor)
            else type(bounds).__name__
        )
        raise ValueError(f"{op}: {name} must be a tensor [N+1] of int32 or int64; got {what}")
    if B != 1:
        raise ValueError(f"{op}: {name} packs all sequences into one row and requires B = 1; got B = {B}")
    if bounds.device.type != "cpu" or torch.compiler.is_compiling():
        return
    found = bounds.tolist()
    if found[0] != 0 or not (T if least is None else least) <= found[-1] <= T or sorted(found) != found:
        raise ValueError(
            f"{op}: {name} must rise from 0 to T = {T}; got {found if len(found) <= 16 else '...'}"
        )


_INTEGERS = (torch.int32, torch.int64)


def host_copy(op: str, cu_seqlens: torch.Tensor | None, cu_seqlens_cpu: torch.Tensor | None) -> None:
    """fla uses cu_seqlens_cpu to avoid a device sync. Here it is only checked for contradictions."""
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


def unread(op: str, A_log: object, dt_bias: object) -> None:
    for name, value in (("A_log", A_log), ("dt_bias", dt_bias)):
        if value is not None:
            raise ValueError(
                f"{op}: {name} requires use_gate_in_kernel=True; got False, so nothing would read it"
            )


def wide_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(wide_dtype(x))


def log_decay(
    op: str, g: torch.Tensor, A_log: torch.Tensor | None, dt_bias: torch.Tensor | None
) -> torch.Tensor:
    """-exp(A_log) softplus(g + dt_bias), per head."""
    if A_log is None:
        raise ValueError(f"{op}: use_gate_in_kernel requires A_log [HV]; got None")
    HV = g.shape[2]
    for name, x in (("A_log", A_log), ("dt_bias", dt_bias)):
        if x is not None and x.numel() != HV:
            raise ValueError(f"{op}: {name} must be [HV] = {[HV]}; got {list(x.shape)}")
    x = wide(g) if dt_bias is None else wide(g) + wide(dt_bias).reshape(-1)
    return -wide(A_log).reshape(-1).exp() * F.softplus(x)
