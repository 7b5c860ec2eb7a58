"""The two public functions: validate, choose a backend, run.

A call's geometry (shapes, strides, dtypes, flags) is checked and planned once and remembered, so that a decode
step pays for one dictionary look-up and not for forty checks. Index data is checked on every call.
"""

from __future__ import annotations

import atexit
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from ..core import dispatch
from ..core.arguments import reader
from ..core.devices import DeviceArray
from ..core.native import core as _core
from .arguments import INPLACE, Array, Call, Options
from .spec import CallSpec, check_call, check_values, framework_of


@dataclass(slots=True)
class _Plan:
    spec: CallSpec
    backend: dispatch.Backend
    native: Any
    empty_like: Any
    """torch's allocator for contiguous outputs (three times as quick as by shape), or a device's; None for NumPy."""
    state_like: bool
    """Whether a new final state looks like the initial one."""
    mark: Any
    """torch's count of a tensor's versions, for autograd's errors; None where no tensor is written."""
    needs_A_log: bool
    """Whether the backend is to be given A_log = 0 where the call has none."""


_plans: dict[tuple[Any, ...], _Plan] = {}
_MAX_PLANS = 4096
atexit.register(_plans.clear)  # plans hold native objects, which must go before the extension does


def gated_delta_rule(
    q: Array,
    k: Array,
    v: Array,
    *,
    g: Array,
    beta: Array,
    initial_state: Array | None = None,
    scale: float | None = None,
    decay: str = "log",
    A_log: Array | None = None,
    dt_bias: Array | None = None,
    lower_bound: float | None = None,
    beta_is_logit: bool = False,
    heads: str = "interleaved",
    qk_l2norm: bool = False,
    qk_l2norm_eps: float = 1e-6,
    state_layout: str = "kv",
    cu_seqlens: Array | None = None,
    state_indices: Array | None = None,
    mask: Array | None = None,
    snapshots: Array | None = None,
    output_final_state: bool = True,
    backend: str = "auto",
) -> tuple[Array, Array | None]:
    """The gated delta rule over a batch of sequences; the given state is left as it is.

    Per sequence and value head, with the state S of shape [K, V]::

        S   = diag(exp(g_t)) S            decay    g_t: one number (GDA) or a vector over K (KDA)
        d_t = beta_t (v_t - S^T k_t)      delta
        S   = S + k_t d_t^T               update
        o_t = scale * S^T q_t             output

    (Gated DeltaNet, arXiv 2412.06464; Kimi Delta Attention, arXiv 2510.26692.)

    Args:
        q, k: [B, T, H, K] float32, bfloat16 or float16 (float64 runs on the reference only).
        v: [B, T, HV, V], dtype of q; HV is a multiple of H.
        g: [B, T, HV] (GDA) or [B, T, HV, K] (KDA): the natural log of the decay, <= 0, -inf allowed;
            see `decay` for other forms.
        beta: [B, T, HV]: write strength, after the sigmoid unless `beta_is_logit`.
        initial_state: [N, HV, K, V] float32 or bfloat16, zeros if None; with `state_indices` a pool [P, HV, K, V].
        scale: factor of the output; K**-0.5 if None.
        decay: what g holds. "log"; "linear": exp(log decay), in [0, 1]; "raw": the gate before its activation,
            log decay = -exp(A_log) softplus(g + dt_bias), or with `lower_bound`
            lower_bound * sigmoid(exp(A_log) (g + dt_bias)) (fla's gates).
        A_log: [HV]; dt_bias: [HV], for KDA [HV, K] or [HV * K]; for raw gates only. With a lower bound A_log may be
            None: exp(A_log) is then 1.
        lower_bound: a number <= 0; for raw gates only.
        beta_is_logit: take sigmoid(beta).
        heads: the q/k head of value head hv: "interleaved" hv // (HV/H) (fla, Transformers, MLX) or
            "tiled" hv % H (ggml).
        qk_l2norm: normalise q and k over K as x * rsqrt(sum x^2 + qk_l2norm_eps), 0 for 0.
        state_layout: "kv" for [.., K, V] states and snapshots, "vk" for [.., V, K].
        cu_seqlens: [N+1] int32 or int64: sequence n holds tokens cu_seqlens[n] to cu_seqlens[n+1] of the only
            batch row. Empty sequences leave their state unchanged.
        state_indices: [N] int32 or int64: the pool row of each sequence; -1 skips it (output zeros). Rows may repeat:
            nothing is written to them.
        mask: [B, T] bool: a False token leaves the state alone and outputs zeros.
        snapshots: [Ks, N, HV, K, V], written: slot 0 is the state after the last token, slot s that of s tokens
            earlier. Slots s >= T and those of skipped sequences keep what they held.
        output_final_state: False saves writing the final state when snapshots are all that is wanted.
        backend: "auto", or a name, which then runs or raises.

    Returns:
        o [B, T, HV, V] in q's dtype, and the final state [N, HV, K, V] (zeros for skipped sequences) or None. They are
        arrays of q's kind; a final state is where the initial one, the snapshots or q are on a device.

    Raises:
        ValueError, TypeError: an invalid call; nothing was read or written.
        UnsupportedError: the named backend cannot run it.
    """
    options = _options((
        "gated_delta_rule", scale, decay, lower_bound, beta_is_logit, heads, qk_l2norm, qk_l2norm_eps,
        state_layout, output_final_state,
    ))  # fmt: skip
    call = Call(q, k, v, g, beta, initial_state, snapshots, A_log, dt_bias, mask, cu_seqlens, state_indices)
    return _run(call, options, backend, inplace=False)


def gated_delta_rule_(
    q: Array,
    k: Array,
    v: Array,
    state: Array,
    *,
    g: Array,
    beta: Array,
    scale: float | None = None,
    decay: str = "log",
    A_log: Array | None = None,
    dt_bias: Array | None = None,
    lower_bound: float | None = None,
    beta_is_logit: bool = False,
    heads: str = "interleaved",
    qk_l2norm: bool = False,
    qk_l2norm_eps: float = 1e-6,
    state_layout: str = "kv",
    cu_seqlens: Array | None = None,
    state_indices: Array | None = None,
    mask: Array | None = None,
    snapshots: Array | None = None,
    snapshot_indices: Array | None = None,
    backend: str = "auto",
) -> Array:
    """As `gated_delta_rule`, but advances `state` [N, HV, K, V] (or the named rows of a pool) in place.

    Args:
        snapshot_indices: [Ks, N] int32 or int64, for a pool (with `state_indices`, without `snapshots`): where the
            last states go. Row snapshot_indices[0, n] of `state` receives the state of sequence n after its last
            token, snapshot_indices[s, n] that of s tokens earlier. No other row is written, not even the one that is
            read, unless it is named: so a rollback is a choice of rows, and copies nothing. Rows that are
            written must be unique and not be read by another sequence; rows that are read may then repeat
            (sequences that share a prefix). -1 writes nothing. Entries of skipped sequences, and with s >= T_n, are
            ignored. Beside `snapshots` it is [1, N]: the rows for the final states; `snapshots` take the last ones.

    Returns:
        o [B, T, HV, V]. Rows of the pool that no index names keep their bits.

    Raises:
        ValueError, TypeError: an invalid call; nothing was read or written.
        UnsupportedError: the named backend cannot run it.
    """
    options = _options((
        "gated_delta_rule_", scale, decay, lower_bound, beta_is_logit, heads, qk_l2norm, qk_l2norm_eps,
        state_layout, True,
    ))  # fmt: skip
    call = Call(
        q, k, v, g, beta, state, snapshots, A_log, dt_bias, mask, cu_seqlens, state_indices, snapshot_indices
    )
    return _run(call, options, backend, inplace=True)[0]


def explain(*args: Any, backend: str = "auto", **kwargs: Any) -> dispatch.Trace:
    """Which backend would run `gated_delta_rule(*args, **kwargs)`, and why the others would not. Runs nothing.

    Raises:
        ValueError, TypeError: as the call itself would.
    """
    names = ("q", "k", "v")
    if len(args) > len(names):
        raise TypeError(f"explain: takes q, k, v by position; got {len(args)} positional arguments")
    arrays = dict(zip(names, args, strict=False))
    arrays["state_in"] = kwargs.pop("initial_state", None)
    known = {*Call.__slots__} - {"state_in", "state_out", "o"}
    arrays.update({n: kwargs.pop(n) for n in list(kwargs) if n in known})
    call = Call(**arrays)
    spec = check_call(call, Options(**kwargs), inplace=False, grad_enabled=_grad_enabled(call.q))
    check_values(call, spec)
    return dispatch.choose(spec, backend)


def _grad_enabled(q: Array) -> bool:
    torch = sys.modules.get("torch")
    return bool(torch is not None and framework_of(q) == "torch" and torch.is_grad_enabled())


_options: Callable[[tuple[Any, ...]], Options] = partial(tuple.__new__, Options)  # in 0.1 us instead of 0.4
_inputs = reader(INPLACE.arguments)


def geometry_of(call: Call) -> Any:
    """What a plan depends on in the arrays of a call, and in the environment; None if it must not be remembered.

    The extension answers in a microsecond; this code stands in where it is not built or cannot read an array.
    """
    arrays, resident = _inputs(call), None
    if DeviceArray in (type(call.q), type(call.state_in), type(call.snapshots)):
        resident = tuple(
            (x.device.name, x.shape, x.dtype) if type(x) is DeviceArray else x is None for x in arrays
        )
        arrays = tuple(None if type(x) is DeviceArray else x for x in arrays)
    geometry = None if _core is None else _core.geometry(*arrays)
    return geometry if resident is None or geometry is None else (geometry, resident)


def _run(call: Call, options: Options, backend: str, *, inplace: bool) -> tuple[Array, Array | None]:
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(call.q, torch.Tensor):
        return execute(call, options, backend, inplace, geometry_of(call))
    side = _side or _torch_side()
    if side.is_compiling():
        return side.traced(call, options, backend, inplace)  # type: ignore[no-any-return]
    geometry = geometry_of(call)
    if geometry is None:
        return side.looked_at(call, options, backend, inplace)  # type: ignore[no-any-return]
    return execute(call, options, backend, inplace, geometry)


_side: Any = None


def _torch_side() -> Any:
    """torch_ops.py, imported with the first torch call and not with anydelta."""
    global _side
    if _side is None:
        _side = importlib.import_module("anydelta.rule.torch_ops")
    return _side


def execute(
    call: Call, options: Options, backend: str, inplace: bool, geometry: Any
) -> tuple[Array, Array | None]:
    """Run a call on real arrays, without gradients. `geometry` is that of `geometry_of`."""
    key = (geometry, options, backend)
    try:
        plan = None if geometry is None else _plans.get(key)
    except TypeError:  # an unhashable option: check_call says which
        plan = geometry = None
    if plan is None:
        spec = check_call(call, options, inplace=inplace)
        check_values(call, spec)
        chosen = dispatch.pick(spec, backend)
        needs_A_log = dispatch.needs_A_log(chosen, spec, call)
        if needs_A_log:
            call.A_log = unit_A_log(call)
        if not dispatch.takes_rows(chosen, spec):
            return _by_dense_snapshots(call, spec, options, backend)
        mark = None
        if spec.framework == "torch" and not spec.resident and (inplace or spec.snapshots):
            mark = _torch_side().mark_written
        plan = _Plan(spec, chosen, chosen.prepare(spec, call), *_allocation(spec, call), mark, needs_A_log)
        if geometry is not None:
            if len(_plans) >= _MAX_PLANS:
                _plans.clear()
            _plans[key] = plan
    elif plan.spec.packed or plan.spec.pooled:
        check_values(call, plan.spec)
    if plan.needs_A_log:
        call.A_log = unit_A_log(call)
    spec = plan.spec

    call.o = plan.empty_like(call.v) if plan.empty_like else np.empty(call.v.shape, call.v.dtype)
    if inplace:
        call.state_out = call.state_in
    elif spec.options.output_final_state:
        if plan.state_like and plan.empty_like:
            call.state_out = plan.empty_like(call.state_in)
        else:
            call.state_out = _new_state(call, spec)
    if plan.mark is not None:
        state, snapshots = call.state_in, call.snapshots
        plan.mark((state,) if snapshots is None else (state, snapshots) if inplace else (snapshots,))
    plan.backend.run(plan.native, spec, call)
    return call.o, call.state_out


def unit_A_log(call: Call) -> Array:
    """Zeros [HV], whose exponential is the 1 that a call without A_log means."""
    HV = call.v.shape[2]
    if type(call.v) is DeviceArray:
        return call.v.device.zeros((HV,))
    if framework_of(call.v) == "torch":
        return call.v.new_zeros(HV, dtype=sys.modules["torch"].float32)
    return np.zeros(HV, np.float32)


def _by_dense_snapshots(
    call: Call, spec: CallSpec, options: Options, backend: str
) -> tuple[Array, Array | None]:
    """`snapshot_indices` for a backend that knows dense snapshots only: run on those, then move them to their rows."""
    pool, rows = call.state_in, call.snapshot_indices
    dense = replace(call, snapshot_indices=None)
    shape = (spec.snapshots, spec.N, *pool.shape[1:])
    if spec.final_rows:
        pass  # the caller's own snapshots: slot 0 is the final state
    elif type(pool) is DeviceArray:
        dense.snapshots = pool.device.empty(shape, pool.dtype)
    else:
        dense.snapshots = pool.new_empty(shape) if spec.framework == "torch" else np.empty(shape, pool.dtype)
    lowered = spec.without_rows()
    chosen = dispatch.pick(lowered, backend)
    empty_like, _ = _allocation(spec, call)
    dense.o = empty_like(call.v) if empty_like else np.empty(call.v.shape, call.v.dtype)
    chosen.run(chosen.prepare(lowered, dense), lowered, dense)
    lengths = [spec.T] * spec.N
    if call.cu_seqlens is not None:
        lengths = [b - a for a, b in pairwise(call.cu_seqlens.tolist())]
    live = [
        length if row >= 0 else 0 for row, length in zip(call.state_indices.tolist(), lengths, strict=True)
    ]
    for slot, named in enumerate(rows.tolist()):
        for n, row in enumerate(named):
            if slot >= live[n] or row < 0:
                continue
            if type(pool) is DeviceArray:
                pool[row].write(dense.snapshots[slot][n])
            else:
                pool[row] = dense.snapshots[slot, n]
    return dense.o, pool


def _allocation(spec: CallSpec, call: Call) -> tuple[Any, bool]:
    """(empty_like, state_like) of a plan."""
    if spec.framework == "device":
        return _empty_like_on_device, False
    if spec.framework != "torch":
        return None, False
    import torch

    same = call.state_in is not None and not (spec.pooled or spec.resident) and call.state_in.is_contiguous()
    if call.v.is_contiguous():
        return torch.empty_like, same
    return partial(torch.empty_like, memory_format=torch.contiguous_format), same


def _empty_like_on_device(x: DeviceArray) -> DeviceArray:
    return x.device.empty(x.shape, x.dtype)


def _new_state(call: Call, spec: CallSpec) -> Array:
    dims = (spec.K, spec.V) if spec.options.state_layout == "kv" else (spec.V, spec.K)
    shape = (spec.N, spec.HV, *dims)
    like = call.state_in if call.state_in is not None else call.snapshots
    if spec.framework == "device" or type(like) is DeviceArray:
        there = call.q.device if like is None else like.device
        return there.empty(shape, spec.state_dtype)
    if spec.framework == "torch":
        import torch

        dtype = like.dtype if like is not None else getattr(torch, spec.state_dtype)
        return call.q.new_empty(shape, dtype=dtype)
    return np.empty(shape, like.dtype if like is not None else spec.state_dtype)
