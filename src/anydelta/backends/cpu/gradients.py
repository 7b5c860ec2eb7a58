"""Gradients by the native kernels (backends/cpu/backward.inl.h). Only the inputs of the forward pass are kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from ...core.arguments import in_order
from ...core.arrays import Array
from ...core.native import core as _core
from ...rule.arguments import TOKENS, Call
from ...rule.spec import CallSpec, dtype_name, element_strides
from . import host, mixer

if TYPE_CHECKING:
    import torch

    from ...mixer.arguments import MixerCall
    from ...mixer.spec import MixerSpec

_arrays = in_order(Call)
_SMALL = ("A_log", "dt_bias", "cu_seqlens", "state_indices")


def gradients(spec: CallSpec, call: Call, grad_o: Array, grad_state: Array | None) -> dict[str, Array | None]:
    """d loss / d input by name, given d loss / d o and d loss / d final state (in the caller's layout)."""
    new, finished = _MEMORY[spec.framework]()
    strides, copies = host.token_strides(call)
    copies += host.scattered(call, _SMALL)
    fields, state_copy, _ = host.rule_fields(spec, call, strides)
    inner = replace(call, **{name: host.contiguous(getattr(call, name)) for name in copies})
    if state_copy:
        inner.state_in = host.contiguous(call.state_in)
    channels = (spec.K,) if spec.kda else ()
    sizes = {name: x.shape for name in TOKENS if (x := getattr(inner, name)) is not None}
    kinds = {name: dtype_name(getattr(inner, name)) for name in sizes}
    if call.state_in is not None:
        sizes["state_in"] = (spec.N, *call.state_in.shape[1:])
    if call.A_log is not None:
        sizes["A_log"] = (spec.N, spec.HV)
    if call.dt_bias is not None:
        sizes["dt_bias"] = (spec.N, spec.HV, *channels)
    kinds = {name: kinds.get(name, "float32") for name in sizes}
    written = {name: new(shape, kinds[name]) for name, shape in sizes.items()}
    grad_o, grad_state = _dense_rows(grad_o), None if grad_state is None else _dense_rows(grad_state)
    told = {
        name: _tokens(written[name], kinds[name]) if name in written else (0, 0, 0, 0, 0) for name in TOKENS
    }
    told["o"] = _tokens(grad_o, dtype_name(grad_o))
    told["state"] = (0, 0, 0, 0) if grad_state is None else (0, *element_strides(grad_state)[:3])
    number, torchs = host.threads_of(spec.framework)
    plan = _core.Plan(fields, None if torchs else number)
    outs = tuple(
        written.get(n) for n in ("q", "k", "v", "g", "beta", "erase", "state_in", "A_log", "dt_bias")
    )
    given = (*_arrays(inner), grad_o, grad_state)
    if not host.reads_arrays(spec.framework, ()):
        outs, given = tuple(map(host.address, outs)), tuple(map(host.address, given))
    _core.run_backward(plan, told, given[:-2], (*outs, *given[-2:]))
    if call.A_log is not None:
        written["A_log"] = written["A_log"].sum(0)
    if call.dt_bias is not None:
        written["dt_bias"] = written["dt_bias"].sum(0).reshape(call.dt_bias.shape)
    found = {n: finished(x, kinds[n], getattr(call, n)) for n, x in written.items() if n != "state_in"}
    if call.state_in is not None:
        found["state_in"] = finished(
            _of_rows(call, written["state_in"], call.state_in), "float32", call.state_in
        )
    return {**dict.fromkeys(("q", "k", "v", "g", "beta", "erase", "state_in", "A_log", "dt_bias")), **found}


def mixer_gradients(
    spec: MixerSpec, call: MixerCall, grads: Sequence[torch.Tensor | None], wanted: Sequence[str]
) -> dict[str, torch.Tensor | None]:
    """The same for the mixer, given d loss / d output, d new conv state and d new state; None for zeros."""
    r = spec.rule
    new, finished = _of_torch()
    native, copies, written = mixer.describe(spec, call)
    inner = replace(call, **{n: host.contiguous(getattr(call, n)) for n in (*copies, *written)})
    sizes = {
        n: (tuple(x.shape), dtype_name(x)) for n in _MIXER_TOKENS if (x := getattr(inner, n)) is not None
    }
    states = dict(conv_state=(spec.C, spec.S), state=tuple(call.state.shape[1:]))
    each = {n: (r.N, *shape) for n, shape in states.items() if n in wanted}
    each["conv_weight"] = (r.N, spec.C, spec.W)
    more = dict(conv_bias=(spec.C,), A_log=(r.HV,), dt_bias=(r.HV, *(r.K,) * r.kda), norm_weight=(r.HV, r.V))
    each.update({n: (r.N, *shape) for n, shape in more.items() if getattr(call, n) is not None})
    sizes.update({n: (shape, "float32") for n, shape in each.items()})
    out = {name: new(shape, dtype) for name, (shape, dtype) in sizes.items()}
    grad_o, grad_conv, grad_state = grads
    if grad_o is None:
        grad_o = call.qkv.new_zeros((r.B, r.T, r.HV * r.V))
    grad_o, grad_state = _dense_rows(grad_o), None if grad_state is None else _dense_rows(grad_state)
    places = {n: mixer.token_places(spec, n, out.get(n)) for n in ("qkv", "k", "v", "z")}
    q = places.pop("qkv")
    if not spec.split:
        places.update(k=(*q[:4], r.H), v=(*q[:4], r.HV))
    fields = dict(
        **places,
        q=q,
        o=mixer.token_places(spec, "o", grad_o, element_strides(grad_o)),
        g=_tokens(out["g"], sizes["g"][1]),
        beta=_tokens(out["beta"], sizes["beta"][1]),
        conv_state=(0, 0, 0, 0, 0)
        if grad_conv is None
        else (host.DTYPE[dtype_name(grad_conv)], 0, *element_strides(grad_conv)),
        state=(0, 0, 0, 0) if grad_state is None else (0, *element_strides(grad_state)[:3]),
    )
    given = mixer.arrays(inner)
    told = dict.fromkeys((*_MIXER_TOKENS, *_MIXER_NUMBERS)) | out
    told.update(d_o=grad_o, d_conv_state=grad_conv, d_state=grad_state)
    if not host.reads_arrays("torch", ()):
        given, told = tuple(map(host.address, given)), {n: host.address(x) for n, x in told.items()}
    _core.run_mixer_backward(native, fields, given, told)
    for name in ("conv_weight", "conv_bias", "A_log", "dt_bias"):
        if name in out:
            out[name] = out[name].sum(0).reshape(getattr(call, name).shape)
    if "norm_weight" in out:
        out["norm_weight"] = out["norm_weight"].sum((0, 1))
    for name in ("conv_state", "state"):
        if name in out and call.state_indices is not None:
            out[name] = _of_rows(call, out[name], getattr(call, name))
    return {n: finished(x, "", getattr(call, n)) for n, x in out.items()}


_MIXER_TOKENS = ("qkv", "k", "v", "z", "g", "beta")
_MIXER_NUMBERS = ("conv_state", "state", "conv_weight", "conv_bias", "A_log", "dt_bias", "norm_weight")


def _of_rows(call: Call | MixerCall, initial: Array, pool: Array) -> Array:
    """The gradient of a pool, given those of the rows that the sequences began with; zeros for a skipped sequence."""
    if call.state_indices is None:
        return initial
    if not hasattr(initial, "index_add_"):  # MLX
        import mlx.core as mx

        return mx.zeros(pool.shape).at[mx.maximum(call.state_indices, 0)].add(initial)
    rows = call.state_indices.long().clamp(min=0)
    return initial.new_zeros(tuple(pool.shape)).index_add_(0, rows, initial)


# ---- Memory: how a framework makes an array of one dtype for the kernels to write, and returns it in another array's
# dtype.

New = Callable[[Sequence[int], str], Array]
Finished = Callable[[Array, str, Array], Array]


def _of_torch() -> tuple[New, Finished]:
    import torch

    def new(shape: Sequence[int], dtype: str) -> torch.Tensor:
        return torch.empty(tuple(shape), dtype=getattr(torch, dtype))

    return new, lambda x, dtype, like: x.to(like.dtype)


def _of_mlx() -> tuple[New, Finished]:
    import mlx.core as mx

    def new(shape: Sequence[int], dtype: str) -> Array:
        return mx.array(np.empty(tuple(shape), "uint16" if dtype == "bfloat16" else dtype))

    def finished(x: Array, dtype: str, like: Array) -> Array:
        x = x.view(mx.bfloat16, stream=mx.cpu) if dtype == "bfloat16" else x
        return x.astype(like.dtype, stream=mx.cpu)

    return new, finished


_MEMORY: dict[str, Callable[[], tuple[New, Finished]]] = {"torch": _of_torch, "mlx": _of_mlx}


def _dense_rows(x: Array) -> Array:
    """x with a contiguous last dimension."""
    return x if x.shape[-1] == 1 or element_strides(x)[-1] == 1 else host.contiguous(x)


def _tokens(x: Array, dtype: str) -> tuple[int, ...]:
    return (host.DTYPE[dtype], *element_strides(x)[:3], x.shape[2])
