"""The two public functions: validate, choose a backend, run.

A call's geometry (shapes, strides, dtypes, flags) is checked and planned once and cached (core/plans.py). A decode step
then pays for one look-up instead of forty checks. Index data is checked on every call.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from types import ModuleType

import numpy as np

from ..core import dispatch, plans
from ..core.arrays import Array, Arrays
from ..core.devices import DeviceArray
from ..core.plans import Plan, Rest, find
from .arguments import INPLACE, Call, Options
from .spec import CallSpec, check_call, check_values, framework_of, quick_check


def gated_delta_rule(
    q: Array,
    k: Array,
    v: Array,
    *,
    g: Array,
    beta: Array | None = None,
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
    erase: Array | None = None,
    snapshots: Array | None = None,
    output_final_state: bool = True,
    backend: str = "auto",
) -> tuple[Array, Array | None]:
    """The gated delta rule over a batch of sequences. The initial state is only read.

    Per sequence and value head, with the state S of shape [K, V]::

        S   = diag(exp(g_t)) S            decay    g_t: one number (GDA) or a vector over K (KDA)
        d_t = beta_t (v_t - S^T k_t)      delta
        S   = S + k_t d_t^T               update
        o_t = scale * S^T q_t             output

    (Gated DeltaNet, arXiv 2412.06464; Kimi Delta Attention, arXiv 2510.26692.)

    Args:
        q: [B, T, H, K] float32, bfloat16 or float16 (float64 runs on the reference only).
        k: [B, T, H, K], dtype of q.
        v: [B, T, HV, V], dtype of q; HV is a multiple of H.
        g: [B, T, HV] (GDA) or [B, T, HV, K] (KDA): the natural log of the decay, <= 0, -inf allowed;
            see `decay` for other forms.
        beta: [B, T, HV]: write strength, after the sigmoid unless `beta_is_logit`. None with `erase`.
        initial_state: [N, HV, K, V] float32, bfloat16 or float16, zeros if None; with `state_indices` a pool
            [P, HV, K, V].
        scale: factor of the output; K**-0.5 if None.
        decay: what g holds. "log"; "linear": exp(log decay), in [0, 1]; "raw": the gate before its activation,
            log decay = -exp(A_log) softplus(g + dt_bias), or with `lower_bound`
            lower_bound * sigmoid(exp(A_log) (g + dt_bias)). Both are fla's gates.
        A_log: [HV], for raw gates only. With a lower bound it may be None: exp(A_log) is then 1.
        dt_bias: [HV], for KDA [HV, K] or [HV * K]; for raw gates only.
        lower_bound: a number <= 0; for raw gates only.
        beta_is_logit: take sigmoid(beta).
        heads: the q/k head of value head hv: "interleaved" hv // (HV/H) (fla, Transformers, MLX) or
            "tiled" hv % H (ggml).
        qk_l2norm: normalise q and k over K as x * rsqrt(sum x^2 + qk_l2norm_eps), 0 for 0.
        qk_l2norm_eps: added under that root.
        state_layout: "kv" for [.., K, V] states and snapshots, "vk" for [.., V, K].
        cu_seqlens: [N+1] int32 or int64: sequence n holds tokens cu_seqlens[n] to cu_seqlens[n+1] of the only
            batch row. Empty sequences leave their state unchanged.
        state_indices: [N] int32 or int64: the pool row of each sequence; -1 skips it (output zeros). Rows may repeat:
            nothing is written to them.
        mask: [B, T] bool: a False token leaves the state alone and outputs zeros.
        erase: [B, T, H, K], with the heads of q and k, or [B, T, HV, K], dtype of q: the key that is read before k is
            written, d_t = v_t - S^T erase_t. beta is then None, and `qk_l2norm` leaves erase alone. The plain rule has
            erase = beta k and beta v for v. Gated DeltaNet 2 has erase = b * k and w * v, with gates b [K] and w [V].
        snapshots: [Ks, N, HV, K, V], written: slot 0 is the state after the last token, slot s the state s tokens
            earlier. Slots s >= T and those of skipped sequences keep what they held.
        output_final_state: False saves writing the final state when only snapshots are wanted.
        backend: "auto", or a name: that backend runs the call or raises.

    Returns:
        o [B, T, HV, V] in q's dtype, and the final state [N, HV, K, V] (zeros for skipped sequences) or None. Both are
        arrays of q's kind. The final state is on the device of the initial state, the snapshots or q.

    Raises:
        ValueError, TypeError: an invalid call; nothing was read or written.
        UnsupportedError: the named backend cannot run it.
    """
    state, o = _run(
        (q, k, v, g, beta, initial_state, snapshots, A_log, dt_bias, mask, cu_seqlens, state_indices, None, erase),
        ("gated_delta_rule", scale, decay, lower_bound, beta_is_logit, heads, qk_l2norm, qk_l2norm_eps,
         state_layout, output_final_state, backend),
    )  # fmt: skip
    return o, state


def gated_delta_rule_(
    q: Array,
    k: Array,
    v: Array,
    state: Array,
    *,
    g: Array,
    beta: Array | None = None,
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
    erase: Array | None = None,
    snapshots: Array | None = None,
    snapshot_indices: Array | None = None,
    backend: str = "auto",
) -> Array:
    """As `gated_delta_rule`, but advances `state` [N, HV, K, V] (or the named rows of a pool) in place.

    The other arguments are those of `gated_delta_rule`.

    Args:
        state: [N, HV, K, V], or with `state_indices` a pool [P, HV, K, V]; read and written.
        snapshot_indices: [Ks, N] int32 or int64, for a pool (with `state_indices`, without `snapshots`): where the
            last states go. Row snapshot_indices[s, n] of `state` receives the state of sequence n, s tokens before its
            end. No other row is written, the row that is read included, so a rollback only chooses rows and copies
            nothing. Rows that are written must be unique, and no other sequence may read them. Rows that are read may
            repeat (sequences that share a prefix). -1 writes nothing. Entries of skipped sequences, and with s >= T_n,
            are ignored. Beside `snapshots` it is [1, N]: the rows for the final states; `snapshots` take the last ones.

    Returns:
        o [B, T, HV, V]. Rows of the pool that no index names keep their bits.

    Raises:
        ValueError, TypeError: an invalid call; nothing was read or written.
        UnsupportedError: the named backend cannot run it.
    """
    return _run(
        (q, k, v, g, beta, state, snapshots, A_log, dt_bias, mask, cu_seqlens, state_indices, snapshot_indices,
         erase),
        ("gated_delta_rule_", scale, decay, lower_bound, beta_is_logit, heads, qk_l2norm, qk_l2norm_eps,
         state_layout, True, backend),
    )[1]  # fmt: skip


def explain(*args: object, backend: str = "auto", **kwargs: object) -> dispatch.Trace:
    """Which backend would run `gated_delta_rule(*args, **kwargs)`, and why the others would not. Runs nothing.

    Raises:
        ValueError, TypeError: as the call itself would.
    """
    try:
        given = inspect.signature(gated_delta_rule).bind(*args, **kwargs).arguments
    except TypeError as error:
        raise TypeError(
            f"explain: requires the arguments of gated_delta_rule; got a call with {error}"
        ) from None
    arrays = {n: given.pop(n) for n in list(given) if n in Call.__slots__}
    call = Call(**arrays, state_in=given.pop("initial_state", None))
    spec = check_call(call, Options(**given), inplace=False, grad_enabled=_grad_enabled(call.q))
    check_values(call, spec)
    return dispatch.choose(spec, backend)


def _grad_enabled(q: Array) -> bool:
    torch = sys.modules.get("torch")
    return bool(torch is not None and framework_of(q) == "torch" and torch.is_grad_enabled())


def _run(arrays: Arrays, rest: Rest) -> Arrays:
    """Return (final state or None, o). Arrays and options are in the order of their tables, the backend last."""
    torch = sys.modules.get("torch")
    tensors = torch is not None and isinstance(arrays[0], torch.Tensor)
    if tensors and (_side or _torch_side()).is_compiling():
        return _torch_side().traced(arrays, rest)  # type: ignore[no-any-return]
    found = find(arrays, rest)
    if type(found) is Plan:
        return found.call(arrays)
    if tensors and found is None:
        return _torch_side().looked_at(arrays, rest)  # type: ignore[no-any-return]
    return plan(arrays, rest, found).call(arrays)


_side: ModuleType | None = None


def _torch_side() -> ModuleType:
    """torch_ops.py, imported with the first torch call and not with anydelta."""
    global _side
    if _side is None:
        import anydelta.rule.torch_ops as found  # torch.compile follows only import statements

        _side = found
    return _side


def execute(arrays: Arrays, rest: Rest) -> Arrays:
    """`_run` on real arrays, without gradients."""
    found = find(arrays, rest)
    return (found if type(found) is Plan else plan(arrays, rest, found)).call(arrays)


def plan(arrays: Arrays, rest: Rest, key: object) -> Plan[CallSpec]:
    """A new plan, kept under `key`, for a call that is then checked in full.

    Raises:
        ValueError, TypeError: an invalid call.
        UnsupportedError: the named backend cannot run it.
    """
    if key is None and DeviceArray in map(type, arrays):
        key = plans.find_on_devices(arrays, rest)
        if type(key) is Plan:
            return key
    found = planned(Call(*arrays), Options(*rest[:-1]), rest[-1])
    plans.keep(key, rest, found)
    return found


def planned(call: Call, options: Options, backend: str) -> Plan[CallSpec]:
    """`plan` for a call as one object, without the cache."""
    inplace = options.op == INPLACE.public_name
    spec = check_call(call, options, inplace=inplace)
    check_values(call, spec)
    chosen = dispatch.pick(spec, backend)
    needs_A_log = dispatch.needs_A_log(chosen, spec, call)
    if needs_A_log:
        call.A_log = unit_A_log(call)
    check = _checking(spec, call)
    make = _results(spec, call)
    if not dispatch.takes_rows(chosen, spec):
        lowered = spec.without_rows()
        chosen = dispatch.pick(lowered, backend)

        def by_rows(call: Call) -> None:
            _by_dense_snapshots(call, spec, lowered, chosen)

        return Plan(spec, make, plans.launcher(by_rows, Call, None), check)
    native = chosen.prepare(spec, call)
    launch = chosen.direct(native) if hasattr(chosen, "direct") else None
    if launch is None:

        def run(call: Call) -> None:
            if needs_A_log:
                call.A_log = unit_A_log(call)
            chosen.run(native, spec, call)

        launch = plans.launcher(
            run, Call, _written if spec.framework == "torch" and not spec.resident else None
        )
    return Plan(spec, make, launch, check)


def _checking(spec: CallSpec, call: Call) -> Callable[[Arrays], None] | None:
    """The function that checks the index data of calls like this one."""
    if not spec.packed and not spec.pooled:
        return None

    def check(arrays: Arrays) -> None:
        check_values(Call(*arrays), spec)

    return quick_check(check, call.state_indices, Call.__match_args__.index("state_indices"), spec)


def _written(call: Call) -> list[Array]:
    """The caller's arrays that a call changes."""
    return [call.state_in if call.state_out is call.state_in else None, call.snapshots]


def unit_A_log(call: Call) -> Array:
    """Zeros [HV], whose exponential is the 1 that a call without A_log means."""
    HV = call.v.shape[2]
    if type(call.v) is DeviceArray:
        return call.v.device.zeros((HV,))
    if framework_of(call.v) == "torch":
        return call.v.new_zeros(HV, dtype=sys.modules["torch"].float32)
    return np.zeros(HV, np.float32)


def _by_dense_snapshots(call: Call, spec: CallSpec, lowered: CallSpec, chosen: dispatch.Backend) -> None:
    """`snapshot_indices` for a backend with dense snapshots only: run with those, then move them to their rows."""
    pool, rows = call.state_in, call.snapshot_indices
    dense = replace(call, snapshot_indices=None, state_out=None)
    shape = (spec.snapshots, spec.N, *pool.shape[1:])
    if spec.final_rows:
        pass  # the caller's own snapshots: slot 0 is the final state
    elif type(pool) is DeviceArray:
        dense.snapshots = pool.device.empty(shape, pool.dtype)
    else:
        dense.snapshots = pool.new_empty(shape) if spec.framework == "torch" else np.empty(shape, pool.dtype)
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


def _results(spec: CallSpec, call: Call) -> Callable[[Arrays], Arrays]:
    """The function that makes (state_out, o) for the arrays of a call. torch's empty_like is three times as quick as by
    shape."""
    empty_like: Callable[[Array], Array] = _empty_like
    same = False
    if spec.framework == "device":
        empty_like = _empty_like_on_device
    elif spec.framework == "torch":
        import torch

        same = (
            call.state_in is not None and not (spec.pooled or spec.resident) and call.state_in.is_contiguous()
        )
        empty_like = torch.empty_like
        if not call.v.is_contiguous():
            empty_like = partial(torch.empty_like, memory_format=torch.contiguous_format)
    v, state = Call.__match_args__.index("v"), Call.__match_args__.index("state_in")
    if spec.inplace:
        return lambda arrays: (arrays[state], empty_like(arrays[v]))
    if not spec.options.output_final_state:
        return lambda arrays: (None, empty_like(arrays[v]))
    if same:
        return lambda arrays: (empty_like(arrays[state]), empty_like(arrays[v]))
    return lambda arrays: (_new_state(Call(*arrays), spec), empty_like(arrays[v]))


def _empty_like(x: Array) -> Array:
    return np.empty(x.shape, x.dtype)


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
