"""The mixer's two public functions: validate, choose a backend, run. Plans are cached as in `anydelta.rule.op`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core import dispatch, plans
from ..core.arguments import reader
from ..core.arrays import Array, Arrays
from ..core.plans import Plan, Rest, find
from ..rule.spec import _Checker, framework_of, quick_check
from .arguments import INPLACE, MixerCall, MixerOptions
from .spec import (
    MixerSpec,
    check_mixer,
    check_mixer_values,
    requiring_grad,
    unpack_qkv,
)

if TYPE_CHECKING:
    from ..core.native import core


def gated_delta_mixer_(
    qkv: Array,
    conv_state: Array,
    state: Array,
    *,
    g: Array,
    beta: Array,
    conv_weight: Array,
    conv_bias: Array | None = None,
    activation: str | None = "silu",
    scale: float | None = None,
    decay: str = "raw",
    A_log: Array | None = None,
    dt_bias: Array | None = None,
    lower_bound: float | None = None,
    beta_is_logit: bool = True,
    allow_neg_eigval: bool = False,
    heads: str = "interleaved",
    qk_l2norm: bool = True,
    qk_l2norm_eps: float = 1e-6,
    z: Array | None = None,
    norm_weight: Array | None = None,
    norm_eps: float = 1e-6,
    norm_gate: str = "silu",
    state_layout: str = "kv",
    cu_seqlens: Array | None = None,
    state_indices: Array | None = None,
    mask: Array | None = None,
    snapshots: Array | None = None,
    conv_snapshots: Array | None = None,
    snapshot_indices: Array | None = None,
    backend: str = "auto",
) -> Array:
    """Everything between the projections of a linear attention layer in one pass; both states advance in place.

    Per channel c of q, k and v, where x are the inputs of a sequence and before them the columns of its conv state::

        y_t     = silu(sum_j conv_weight[c, j] x_(t - W + 1 + j) + conv_bias[c])
        q, k, v = split(y)
        o       = gated_delta_rule_(q, k, v, state, gates)
        out_t   = o_t / sqrt(mean(o_t^2) + norm_eps) * norm_weight * gate(z_t)

    (Gated DeltaNet, arXiv 2412.06464; Kimi Delta Attention, arXiv 2510.26692.) `state` gives HV, K and V, the width of
    q gives H. Everything between the inputs and the output is float32. No gradient.

    Args:
        qkv: [B, T, 2 H K + HV V] float32, bfloat16 or float16: the projections' output before the convolution, channels
            in the order q, k, v, each head by head. Or (q, k, v), each [B, T, heads * width], or [B, T, groups,
            heads / groups * width] with any strides between groups (views of a wider projection need no copy).
        conv_state: [N, C, S] of qkv's dtype or float32, C = 2 H K + HV V, S >= W - 1: the last S inputs, the newest
            last (Transformers keeps S = W). Zeros for a new sequence. With `state_indices`: a pool [P, C, S].
        state: [N, HV, K, V] float32, bfloat16 or float16, or a pool [P, HV, K, V].
        g: the gate, raw by default. As in `gated_delta_rule`, as are `decay`, `A_log`, `dt_bias` and `lower_bound`.
        beta: [B, T, HV], a logit by default (`beta_is_logit`).
        conv_weight: [C, W].
        conv_bias: [C] or None.
        activation: of the convolution, "silu" or None.
        allow_neg_eigval: beta = 2 sigmoid(logit), in [0, 2] (fla's name; olmo_hybrid).
        z: the gate of the norm, [B, T, HV * V] or grouped as v, qkv's dtype. None: a norm without a gate.
        norm_weight: [V]; None: no norm.
        norm_gate: "silu" (Gated DeltaNet) or "sigmoid" (Kimi Delta Attention).
        mask: [B, T] bool: neither state sees a False token, and its output is zero.
        snapshots: [Ks, N, HV, K, V], written: the state after the last token, and s tokens earlier, as in
            `gated_delta_rule`.
        conv_snapshots: [Ks, N, C, S], written: the conv states of the same tokens.
        snapshot_indices: [Ks, N], for pools (with `state_indices`): the rows of both pools that receive the last
            states. No other row is written. Beside `snapshots` it is [1, N], for the final states. As in
            `gated_delta_rule_`.
        scale: as in `gated_delta_rule`, as are `heads`, `qk_l2norm`, `qk_l2norm_eps`, `state_layout`, `cu_seqlens`,
            `state_indices` and `backend`.

    Returns:
        [B, T, HV * V] in qkv's dtype, the input of the output projection.

    Raises:
        ValueError, TypeError: an invalid call; nothing was read or written.
        UnsupportedError: the named backend cannot run it.
    """
    q, k, v = (qkv, None, None) if type(qkv) not in (tuple, list) else unpack_qkv("gated_delta_mixer_", qkv)
    arrays = (
        q, k, v, conv_state, state, g, beta, conv_weight, snapshots, conv_snapshots, conv_bias, A_log, dt_bias, z,
        norm_weight, mask, cu_seqlens, state_indices, snapshot_indices,
    )  # fmt: skip
    rest: Rest = (
        "gated_delta_mixer_", activation, scale, decay, lower_bound, beta_is_logit, allow_neg_eigval, heads,
        qk_l2norm, qk_l2norm_eps, norm_eps, norm_gate, state_layout, backend,
    )  # fmt: skip
    torch = sys.modules.get("torch")
    tensors = torch is not None and isinstance(q, torch.Tensor)
    if tensors and (_side or _torch_side()).is_compiling():
        return _torch_side().traced(arrays, rest)
    found = find(arrays, rest)
    if type(found) is not Plan:
        if tensors and found is None:  # not plain memory, the call is watched, or gradients are wanted
            if _torch_side().watched(*arrays):
                return _torch_side().traced(arrays, rest)
            if torch is not None and torch.is_grad_enabled():
                refuse_grad(MixerCall(*arrays), INPLACE.public_name)
        found = plan(arrays, rest, found)
    return found.call(arrays)[0]


def gated_delta_mixer(
    qkv: Array,
    conv_state: Array,
    state: Array,
    *,
    snapshots: Array | None = None,
    conv_snapshots: Array | None = None,
    backend: str = "auto",
    **arguments: Any,
) -> tuple[Array, Array, Array]:
    """As `gated_delta_mixer_`, with all of its arguments, but it leaves the given states unchanged. Differentiable.

    On the CPU the backward pass is one native call, and only the inputs are kept for it. Elsewhere, for float64, for
    gradients of gradients and for torch.func, gradients go through torch's own convolution and norm around
    `gated_delta_rule`.

    Returns:
        The output [B, T, HV * V], the new conv state [N, C, S] and the new state [N, HV, K, V] (zeros for skipped
        sequences).

    Raises:
        ValueError, TypeError: an invalid call; nothing was read or written.
        UnsupportedError: the named backend cannot run it.
    """
    call, options, backend = parse(qkv, conv_state, state, snapshots, conv_snapshots, arguments, backend)
    if call.snapshot_indices is not None:
        raise ValueError(
            f"{options.op}: snapshot_indices name rows of a pool that is written, and go with gated_delta_mixer_ only"
        )
    torch = sys.modules.get("torch")
    tensors = torch is not None and isinstance(call.qkv, torch.Tensor)
    if tensors and torch is not None:
        compiling = torch.compiler.is_compiling()
        if compiling and call.snapshots is None and not _torch_side().dual_numbers():
            return _torch_side().functional(call, options, backend)  # type: ignore[no-any-return]
        tracked: list[str] = []
        if not compiling:
            call, tracked = _torch_side().by_parts(call)
            call = replace(
                call, snapshots=snapshots, conv_snapshots=conv_snapshots
            )  # written, so they must not be copied
        wanted = tracked or (requiring_grad(call) if torch.is_grad_enabled() else [])
        if wanted:
            return _differentiable(call, check(call, options), backend, wanted, composed=bool(tracked))
    return on_copies(call, options, backend)


def check(call: MixerCall, options: MixerOptions) -> MixerSpec:
    """The checks of a functional call."""
    checker = _Checker(options.op, first="qkv")
    for name in ("conv_state", "state"):
        if getattr(call, name) is not None:
            checker.array(name, getattr(call, name), None)
    spec = check_mixer(writable(call), options)
    check_mixer_values(call, spec, inplace=False)
    return spec


def on_copies(call: MixerCall, options: MixerOptions, backend: str) -> tuple[Array, Array, Array]:
    """The functional call without gradients: the in-place call on copies of the states."""
    spec = check(call, options)
    conv_state, state, rows = call.conv_state, call.state, call.state_indices
    if spec.rule.pooled:
        conv_state, state, rows = _gather(call, spec)
    else:
        conv_state, state = (
            x.clone() if spec.framework == "torch" else x.copy() for x in (conv_state, state)
        )
    inside = replace(call, conv_state=conv_state, state=state, state_indices=rows)
    arguments = {n: getattr(inside, n) for n in _ARRAYS}
    flags = {n: getattr(options, n) for n in _FLAGS}
    o = gated_delta_mixer_(
        call.qkv if call.k is None else (call.qkv, call.k, call.v),
        conv_state,
        state,
        snapshots=call.snapshots,
        conv_snapshots=call.conv_snapshots,
        backend=backend,
        **arguments,
        **flags,
    )
    return o, conv_state, state


def _gather(call: MixerCall, spec: MixerSpec) -> tuple[Array, Array, Array]:
    """Copies of the pool rows that the call names, in its order, zeros for -1, and state_indices into these copies."""
    rows: Array = call.state_indices
    index: Array
    if spec.framework == "torch":
        import torch

        rows = rows.to(call.state.device).long()
        index = torch.where(rows < 0, rows, torch.arange(spec.rule.N, device=rows.device))
    else:
        index = np.where(rows < 0, rows, np.arange(spec.rule.N))
    conv_state, state = (x[rows] for x in (call.conv_state, call.state))
    conv_state[index < 0] = 0
    state[index < 0] = 0
    return conv_state, state, index


def explain_mixer(
    qkv: Array, conv_state: Array, state: Array, *, backend: str = "auto", **arguments: object
) -> dispatch.Trace:
    """Which backend would run `gated_delta_mixer_(...)`, and why the others would not. Runs nothing.

    Raises:
        ValueError, TypeError: as the call itself would.
    """
    call, options, backend = parse(
        qkv, conv_state, state, arguments.pop("snapshots", None), arguments.pop("conv_snapshots", None), arguments,
        backend, op="gated_delta_mixer_",
    )  # fmt: skip
    spec = check_mixer(call, options)
    check_mixer_values(call, spec)
    return dispatch.choose(spec, backend)


def parse(
    qkv: Array, conv_state: Array, state: Array, snapshots: Array, conv_snapshots: Array, arguments: dict[str, Any],
    backend: str, op: str = "gated_delta_mixer",
) -> tuple[MixerCall, MixerOptions, str]:  # fmt: skip
    """Keyword arguments as a call and its options.

    Raises:
        TypeError: an argument that the mixer does not have, or one that is missing.
    """
    arrays = {n: arguments[n] for n in arguments if n in _ARRAYS}
    flags = {n: arguments[n] for n in arguments if n in _FLAGS}
    for n in arguments:
        if n not in arrays and n not in flags:
            raise TypeError(f"{op}() got an unexpected keyword argument {n!r}")
    for n in ("g", "beta", "conv_weight"):
        if n not in arrays:
            raise TypeError(f"{op}() missing required keyword-only argument {n!r}")
    q, k, v = unpack_qkv(op, qkv)
    call = MixerCall(q, k, v, conv_state, state, snapshots=snapshots, conv_snapshots=conv_snapshots, **arrays)
    return call, MixerOptions(op=op, **flags), backend


_ARRAYS = frozenset(MixerCall.__slots__) - {
    "qkv", "k", "v", "conv_state", "state", "snapshots", "conv_snapshots", "o",
}  # fmt: skip
_FLAGS = frozenset(MixerOptions._fields) - {"op"}


def writable(call: MixerCall) -> MixerCall:
    """The call as it will run, on new states. The given ones may be read-only or share memory."""

    def fresh(x: Array) -> Array:
        kind = framework_of(x)
        if kind == "torch":
            return x.new_empty(x.shape)
        return np.empty(x.shape, x.dtype) if kind == "numpy" else x

    return replace(call, conv_state=fresh(call.conv_state), state=fresh(call.state))


def _differentiable(
    call: MixerCall, spec: MixerSpec, backend: str, tracked: list[str], *, composed: bool
) -> tuple[Array, Array, Array]:
    if call.snapshots is not None:
        raise ValueError(
            f"{spec.options.op}: snapshots have no gradient, but {', '.join(tracked)} requires grad, carries a tangent "
            "or is made of other tensors. Use torch.no_grad(), or leave snapshots out"
        )
    found: tuple[Array, Array, Array]
    if composed or dispatch.with_gradients(spec, backend, warn=False) is None:
        found = dispatch.mixer_of("reference").differentiable(call, spec, backend)
    else:
        found = _torch_side().functional(call, spec.options, backend)
    return found


def refuse_grad(call: MixerCall, op: str) -> None:
    """Refuse gradients of the in-place op, instead of returning a constant."""
    if tracked := requiring_grad(call):
        raise ValueError(
            f"{op}: the in-place op has no gradient, but {', '.join(tracked)} requires grad. "
            "Use gated_delta_mixer, or torch.no_grad()"
        )


_side: ModuleType | None = None


def _torch_side() -> ModuleType:
    """torch_ops.py, imported with the first torch call and not with anydelta."""
    global _side
    if _side is None:
        import anydelta.mixer.torch_ops as found  # torch.compile follows only import statements

        _side = found
    return _side


def plan_step(
    o: Array, qkv: Array, conv_state: Array, state: Array, **arguments: Any
) -> core.MixerStep | None:
    """Prepare a call on torch tensors that a loop repeats: an object of the extension, or None.

    Its `run(*arrays)` takes the arrays in the order of the table, then `o`. conv_weight may be the [C, 1, W] of a torch
    Conv1d. If dtypes, shapes, strides or ANYDELTA_BACKEND differ from those of this call, it returns False and does
    nothing. It does not repeat the other checks of a call.
    """
    call, options, backend = parse(
        qkv, conv_state, state, arguments.pop("snapshots", None), arguments.pop("conv_snapshots", None), arguments,
        arguments.pop("backend", "auto"), op="gated_delta_mixer_",
    )  # fmt: skip
    given = _inputs(call)
    weight = call.conv_weight
    call.conv_weight = weight.squeeze(1) if len(weight.shape) == 3 else weight
    arrays, rest = _inputs(call), (*options, backend)
    found = find(arrays, rest)
    if found is None:
        return None
    planned = found if type(found) is Plan else plan(arrays, rest, found)
    return None if planned.step is None else planned.step(given, (o,))


_inputs = reader(INPLACE.arguments)


def arrays_of(call: MixerCall) -> dict[str, Array]:
    """The arrays of a call by name, absent ones None."""
    return dict(zip(INPLACE.arguments, _inputs(call), strict=True))


def plan(arrays: Arrays, rest: Rest, key: object) -> Plan[MixerSpec]:
    """A new plan, kept under `key`, for a call that is then checked in full.

    Raises:
        ValueError, TypeError: an invalid call.
        UnsupportedError: the named backend cannot run it.
    """
    call, options, backend = MixerCall(*arrays), MixerOptions(*rest[:-1]), rest[-1]
    spec = check_mixer(call, options)
    check_mixer_values(call, spec)
    chosen = dispatch.pick(spec, backend)
    native = chosen.prepare(spec, call, backend)
    launch = chosen.direct(native) if hasattr(chosen, "direct") else None
    if launch is None:

        def run(call: MixerCall) -> None:
            chosen.run(native, spec, call)

        launch = plans.launcher(run, MixerCall, _written if spec.framework == "torch" else None)
    check = None
    if spec.rule.packed or spec.rule.pooled:
        at = INPLACE.arguments.index("state_indices")
        check = quick_check(partial(_check, spec), call.state_indices, at, spec.rule)
    step = partial(chosen.step, native, spec) if hasattr(chosen, "step") else None
    found = Plan(spec, _results(spec, call), launch, check, step)
    plans.keep(key, rest, found)
    return found


def _check(spec: MixerSpec, arrays: Arrays) -> None:
    check_mixer_values(MixerCall(*arrays), spec)


def _written(call: MixerCall) -> list[Array]:
    """The caller's arrays that a call changes."""
    return [call.conv_state, call.state, call.conv_snapshots, call.snapshots]


def _results(spec: MixerSpec, call: MixerCall) -> Callable[[Arrays], Arrays]:
    """The function that makes (o,) for the arrays of a call."""
    r = spec.rule
    shape = (r.B, r.T, r.HV * r.V)
    if spec.framework != "torch":
        return lambda arrays: (np.empty(shape, arrays[0].dtype),)
    if call.z is not None and tuple(call.z.shape) == shape and call.z.is_contiguous():
        import torch

        empty_like, z = torch.empty_like, INPLACE.arguments.index("z")
        return lambda arrays: (empty_like(arrays[z]),)
    return lambda arrays: (arrays[0].new_empty(shape),)
