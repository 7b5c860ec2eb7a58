"""The gated delta rule for MLX arrays.

    from anydelta.mlx import gated_delta_rule

    o, state = gated_delta_rule(q, k, v, g=g, beta=beta)                     # mx.array in, mx.array out
    o, state, last = gated_delta_rule(q, k, v, g=g, beta=beta, snapshots=4)  # and the states after the last 4 tokens

The CPU's backward pass computes gradients (mx.grad, mx.vjp), also for arrays on an Apple GPU.

MLX arrays are values: arrays of the caller never change. There is no in-place form; states and snapshots are new
arrays.

If the stream runs on the CPU, the native CPU kernel reads the arrays directly (buffer protocol, no copy) and writes new
ones. It needs their values: a call evaluates its inputs and itself at once. It is refused inside mx.compile or mx.vmap,
where arrays have no values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from .core import dispatch
from .core.arguments import arrays as arrays_of
from .core.arguments import reader
from .core.arrays import Array
from .core.dispatch import UnsupportedError
from .core.plans import Key, Rest, find, keep
from .rule import op as _op
from .rule.arguments import INPLACE, Call, Options
from .rule.spec import CallSpec, check_call, check_values, dtype_name

try:
    import mlx.core as mx
except ImportError as error:
    raise ImportError("anydelta.mlx: requires mlx; got none. pip install 'anydelta[mlx]'") from error

__all__ = ["UnsupportedError", "explain", "gated_delta_rule"]

_INPUTS = tuple(n for n in arrays_of(Call) if n != "snapshot_indices")
_inputs = reader(INPLACE.arguments)


@dataclass(slots=True)
class _Chosen:
    """What is known about calls on arrays of these shapes and dtypes without their values."""

    spec: CallSpec
    backend: dispatch.Backend
    rest: Rest
    native: object = None
    """The preparation of a backend whose calls become part of MLX's graph."""


def gated_delta_rule(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    g: mx.array,
    beta: mx.array,
    initial_state: mx.array | None = None,
    scale: float | None = None,
    decay: str = "log",
    A_log: mx.array | None = None,
    dt_bias: mx.array | None = None,
    lower_bound: float | None = None,
    beta_is_logit: bool = False,
    heads: str = "interleaved",
    qk_l2norm: bool = False,
    qk_l2norm_eps: float = 1e-6,
    state_layout: str = "kv",
    cu_seqlens: mx.array | None = None,
    state_indices: mx.array | None = None,
    mask: mx.array | None = None,
    snapshots: mx.array | int | None = None,
    output_final_state: bool = True,
    backend: str = "auto",
) -> tuple[Any, ...]:
    """As `anydelta.gated_delta_rule`, which describes the arguments, for MLX arrays.

    Args:
        snapshots: how many of the last states to return (slots without a token are zeros), or an array
            [Ks, N, HV, K, V] whose unreached slots are returned unchanged. Slot 0 is the state after the last token,
            slot s the state s tokens earlier.

    Returns:
        o [B, T, HV, V] in q's dtype, and the final state [N, HV, K, V] or None. With `snapshots` also the snapshots
        [Ks, N, HV, K, V].

    Raises:
        ValueError, TypeError: an invalid call; nothing was computed.
        UnsupportedError: the named backend cannot run it, or the arrays have no values inside mx.compile or mx.vmap.
        RuntimeError: mx.jvp, a gradient of a gradient, or a gradient beside snapshots, which do not exist.
    """
    options = Options(
        "gated_delta_rule", scale, decay, lower_bound, beta_is_logit, heads, qk_l2norm, qk_l2norm_eps,
        state_layout, output_final_state,
    )  # fmt: skip
    slots = snapshots if isinstance(snapshots, int) else None
    call = Call(
        q, k, v, g, beta, initial_state, None if isinstance(snapshots, int) else snapshots, A_log, dt_bias, mask,
        cu_seqlens, state_indices,
    )  # fmt: skip
    chosen = _choose(call, options, backend, slots)
    _check_data(call, chosen.spec)
    if dispatch.needs_A_log(chosen.backend, chosen.spec, call):
        call.A_log = mx.zeros((chosen.spec.HV,))
    names = [name for name in _INPUTS if getattr(call, name) is not None]
    run = _lazily if hasattr(chosen.backend, "run_lazily") else _compute
    compute: Any = mx.custom_function(partial(run, chosen, names))
    compute.vjp(partial(_vjp, chosen, names))
    compute.jvp(partial(_no_derivative, "mx.jvp: there is a backward pass, but no forward one"))
    return _results(compute(*(getattr(call, n) for n in names)), output_final_state, snapshots is not None)


def _results(out: Sequence[Array], state: bool, snapshots: bool) -> tuple[Any, ...]:
    """(o, final state or None[, snapshots])."""
    left = iter(out)
    o, final = next(left), next(left) if state else None
    return (o, final, next(left)) if snapshots else (o, final)


def _lazily(chosen: _Chosen, names: Sequence[str], *arrays: mx.array) -> list[mx.array]:
    """A call that becomes part of MLX's graph."""
    spec, call = chosen.spec, _call_of(names, arrays)
    if spec.snapshots and call.snapshots is None:
        dims = (spec.K, spec.V) if spec.options.state_layout == "kv" else (spec.V, spec.K)
        call.snapshots = mx.zeros((spec.snapshots, spec.N, spec.HV, *dims), getattr(mx, spec.state_dtype))
    if chosen.native is None:
        chosen.native = chosen.backend.prepare(spec, call)
    return chosen.backend.run_lazily(chosen.native, spec, call)  # type: ignore[attr-defined, no-any-return]


def explain(*args: object, backend: str = "auto", **kwargs: Any) -> dispatch.Trace:
    """Which backend would run `gated_delta_rule(*args, **kwargs)`, and why the others would not. Runs nothing.

    Raises:
        ValueError, TypeError: as the call itself would.
    """
    if len(args) > 3:
        raise TypeError(f"explain: takes q, k, v by position; got {len(args)} positional arguments")
    arrays = dict(zip(("q", "k", "v"), args, strict=False))
    arrays["state_in"] = kwargs.pop("initial_state", None)
    snapshots = kwargs.pop("snapshots", None)
    slots = snapshots if isinstance(snapshots, int) else None
    arrays["snapshots"] = None if slots is not None else snapshots
    arrays.update({n: kwargs.pop(n) for n in list(kwargs) if n in _INPUTS})
    spec = _check(Call(**arrays), Options(**kwargs), slots)
    _check_data(Call(**arrays), spec)
    return dispatch.choose(spec, backend)


def __getattr__(name: str) -> NoReturn:
    if name == "gated_delta_rule_":
        raise AttributeError(
            "anydelta.mlx has no gated_delta_rule_: MLX arrays are values and cannot be advanced in place. "
            "gated_delta_rule returns the new state"
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _choose(call: Call, options: Options, backend: str, slots: int | None) -> _Chosen:
    """The backend that runs calls with arrays of these shapes and dtypes, checked once. For arrays that MLX has not
    computed yet, shapes are known and memory is not."""
    rest: Rest = (*options, backend, "mlx", slots)
    try:
        arrays = (getattr(call, name) for name in _INPUTS)
        text = "|".join("-" if x is None else f"{x.shape} {x.dtype}" for x in arrays)
        found = find((), rest, f"{mx.default_device()} {text}")
    except AttributeError:  # not an array: the check says which
        found = None
    if type(found) is _Chosen:
        return found
    spec = _check(call, options, slots)
    chosen = _Chosen(spec, dispatch.pick(spec, backend), rest)
    keep(found, rest, chosen)
    return chosen


def _check(call: Call, options: Options, slots: int | None) -> CallSpec:
    """check_call, for MLX's kind of snapshots."""
    spec = check_call(call, options, inplace=False, kinds=("mlx",))
    if slots is None:
        return spec
    if isinstance(slots, bool) or slots < 1:
        raise ValueError(
            f"{options.op}: snapshots must be an array [Ks, N, HV, K, V] or a number of slots >= 1; got {slots}"
        )
    return replace(spec, snapshots=slots)


def _check_data(call: Call, spec: CallSpec) -> None:
    if spec.packed or spec.pooled:
        _values(spec, *(x for x in (call.cu_seqlens, call.state_indices) if x is not None))
        check_values(call, spec)


def _values(spec: CallSpec, *arrays: mx.array) -> None:
    """Make MLX compute these arrays."""
    try:
        mx.eval(*arrays)
    except ValueError as error:
        if "transformation" not in str(error):
            raise
        raise UnsupportedError(
            f"{spec.options.op}: requires arrays that have values, for the CPU or to check indices; got arrays inside "
            f"mx.compile or mx.vmap. Leave this call out of the compiled function"
        ) from error


# ---- Gradients: the CPU's backward pass, also for arrays of a GPU's stream, because both share their memory.


def _vjp(
    chosen: _Chosen, names: Sequence[str], arrays: Sequence[mx.array], grads: Sequence[mx.array], _: object
) -> list[mx.array]:
    """d loss / d of each array, given d loss / d of each result."""
    spec = chosen.spec
    if spec.snapshots:
        _no_derivative("mx.grad or mx.vjp beside snapshots, which have none")
    native = dispatch.with_gradients(spec, "cpu", warn=False)
    if native is None:
        _no_derivative("mx.grad or mx.vjp, and no backward pass takes this call")
    back: Any = mx.custom_function(partial(_gradients, spec, native, names))
    back.vjp(partial(_no_derivative, "a gradient of a gradient"))
    back.jvp(partial(_no_derivative, "mx.jvp of a gradient"))
    return back(*arrays, *grads)  # type: ignore[no-any-return]


def _gradients(spec: CallSpec, native: Any, names: Sequence[str], *given: mx.array) -> list[mx.array]:
    _values(spec, *given)
    arrays, grads = given[: len(names)], given[len(names) :]
    grad_o, grad_state = (*grads, None)[:2]
    found = native.gradients(spec, _call_of(names, arrays), grad_o, grad_state)
    found = {name: found.get(name) for name in names}  # masks and indices have none
    return [mx.zeros_like(x) if found[n] is None else found[n] for n, x in zip(names, arrays, strict=True)]


def _no_derivative(what: str, *_: object) -> NoReturn:
    raise RuntimeError(
        f"gated_delta_rule: requires no derivative of this kind; got {what}. Use mx.stop_gradient, mlx-lm's own "
        "recurrence, or torch tensors"
    )


def _call_of(names: Sequence[str], arrays: Sequence[mx.array]) -> Call:
    return Call(**{**dict.fromkeys(("q", "k", "v", "g", "beta")), **dict(zip(names, arrays, strict=True))})


def _compute(chosen: _Chosen, names: Sequence[str], *arrays: mx.array) -> list[mx.array]:
    """o, then the final state and the snapshots if they are wanted. All are new arrays."""
    spec = chosen.spec
    _values(spec, *arrays)
    call = _call_of(names, arrays)
    if not getattr(chosen.backend, "mlx", False):
        return _through_numpy(chosen, call)
    found = find(_inputs(call), chosen.rest)  # before the snapshots, which are ours and contiguous
    dims = (spec.K, spec.V) if spec.options.state_layout == "kv" else (spec.V, spec.K)
    state = (spec.N, spec.HV, *dims)
    call.o = _empty(call.v.shape, spec.dtype)
    if spec.options.output_final_state:
        call.state_out = _empty(state, spec.state_dtype)
    if spec.snapshots:
        call.snapshots = _slots(call, spec, state)
    native = found
    if native is None or type(native) is Key:
        native = chosen.backend.prepare(spec, call)
        keep(found, chosen.rest, native)
    chosen.backend.run(native, spec, call)
    results = ((call.o, spec.dtype), (call.state_out, spec.state_dtype), (call.snapshots, spec.state_dtype))
    return [_as(x, dtype) for x, dtype in results if x is not None]


# ---- MLX's memory. NumPy has no bfloat16, so such memory is uint16 here.


def _empty(shape: Sequence[int], dtype: str) -> mx.array:
    """A new array, to be written."""
    return mx.array(np.empty(tuple(shape), np.uint16 if dtype == "bfloat16" else dtype))


def _bits(x: mx.array) -> NDArray[np.generic]:
    """The array's memory as a NumPy array, without a copy."""
    return np.asarray(x.view(mx.uint16, stream=mx.cpu) if x.dtype == mx.bfloat16 else x)


def _as(x: mx.array, dtype: str) -> mx.array:
    return x.view(mx.bfloat16, stream=mx.cpu) if dtype == "bfloat16" else x


def _slots(call: Call, spec: CallSpec, state: tuple[int, ...]) -> mx.array:
    """The new snapshots: a copy of those given, or zeros."""
    if call.snapshots is not None:
        return mx.array(_bits(call.snapshots))
    return mx.array(
        np.zeros((spec.snapshots, *state), np.uint16 if spec.state_dtype == "bfloat16" else spec.state_dtype)
    )


def _through_numpy(chosen: _Chosen, call: Call) -> list[mx.array]:
    """Run a backend that does not read MLX arrays: it gets their memory as NumPy arrays."""
    spec, name = chosen.spec, chosen.backend.name
    bfloat16: Any = None
    if "bfloat16" in (spec.dtype, spec.state_dtype, spec.g_dtype, spec.beta_dtype):
        import ml_dtypes  # installed, or dispatch would have refused the call

        bfloat16 = np.dtype(ml_dtypes.bfloat16)

    def view(x: Array) -> NDArray[np.generic] | None:
        return None if x is None else _bits(x).view(bfloat16) if dtype_name(x) == "bfloat16" else _bits(x)

    held = Call(**{name: view(getattr(call, name)) for name in _INPUTS})
    if spec.snapshots:
        if held.snapshots is not None:
            held.snapshots = held.snapshots.copy()
        else:
            dims = (spec.K, spec.V) if spec.options.state_layout == "kv" else (spec.V, spec.K)
            dtype = bfloat16 if spec.state_dtype == "bfloat16" else spec.state_dtype
            held.snapshots = np.zeros((spec.snapshots, spec.N, spec.HV, *dims), dtype)
    state, o = _op.execute(_inputs(held), (*spec.options, name))

    def back(x: Array) -> mx.array:
        if bfloat16 is not None and x.dtype == bfloat16:  # np.float64 equals None
            return _as(mx.array(x.view(np.uint16)), "bfloat16")
        return mx.array(x, dtype=mx.float64 if x.dtype == np.float64 else None)

    return [back(x) for x in (o, state, held.snapshots if spec.snapshots else None) if x is not None]
