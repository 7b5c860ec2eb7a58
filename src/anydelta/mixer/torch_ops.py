"""torch.ops.anydelta.gated_delta_mixer and gated_delta_mixer_: the mixer for torch.compile, torch.export and autograd.

Eager calls without gradients skip the dispatcher, as the rule's do (`anydelta.rule.torch_ops`). qkv is a list of
one packed tensor or of the three tensors q, k, v. A third operator, gated_delta_mixer_backward, is the backward pass.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..core import dispatch
from ..core.arguments import Operator
from ..core.arrays import Arrays
from ..core.plans import Plan, Rest, find
from ..rule.torch_ops import (
    BELOW,
    apart,
    autograd_below,
    batched,
    guard_writes,
    refuse_nested,
    refuse_old_exporter,
    refuse_tangents,
    transformed,
)
from ..rule.torch_ops import is_compiling as is_compiling
from ..rule.torch_ops import mark_written as mark_written
from ..rule.torch_ops import watched as watched
from . import op
from .arguments import FUNCTIONAL, INPLACE, MixerCall, MixerOptions
from .autograd import gradients
from .spec import check_mixer, unpack_qkv

_LIB = torch.library.Library("anydelta", "FRAGMENT")  # must stay alive: dropping it removes the operators
_LIB.define(INPLACE.schema())
_LIB.define(FUNCTIONAL.schema())
_TENSORS, _, _FLAGS = FUNCTIONAL.schema().partition("(")[2].partition(") ->")[0].partition(", *, ")
_LIB.define(
    f"gated_delta_mixer_backward({_TENSORS.replace('=None', '')}, Tensor? grad_o, Tensor? grad_conv_state, "
    f"Tensor? grad_state, int[] wanted, *, {_FLAGS}) -> Tensor[]"
)


def _bind(operator: Operator, *args: object, **given: object) -> tuple[Arrays, Rest]:
    """The operator's arguments as those of the table."""
    (qkv, _, _, *others), rest = operator.bind(*args, **given)
    return (*unpack_qkv(operator.name, list(qkv)), *others), rest


def _inplace(*args: object, **given: object) -> torch.Tensor:
    arrays, rest = _bind(INPLACE, *args, **given)
    found = find(arrays, rest)
    if type(found) is not Plan:  # plans are cached only for calls without gradients
        _refuse_derivatives(MixerCall(*arrays))
        found = op.plan(arrays, rest, found)
    result: torch.Tensor = found.call(arrays)[0]
    return result


def _refuse_derivatives(call: MixerCall) -> None:
    if torch.is_grad_enabled():
        op.refuse_grad(call, INPLACE.name)
    refuse_tangents(INPLACE.name, op.arrays_of(call))


def _functional(*args: object, **given: object) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    arrays, rest = _bind(FUNCTIONAL, *args, **given)
    with torch.no_grad():
        found: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
        found = op.on_copies(MixerCall(*arrays), MixerOptions(*rest[:-1]), rest[-1])
    return found


def _fake(operator: Operator, *args: object, **given: object) -> Any:
    arrays, rest = _bind(operator, *args, **given)
    call, options = MixerCall(*arrays), MixerOptions(*rest[:-1])
    if all(isinstance(n, int) for x in arrays if x is not None for n in x.shape):
        check_mixer(call if operator.inplace else op.writable(call), options)
    kv = options.state_layout == "kv"
    HV, V = call.state.shape[1], call.state.shape[3 if kv else 2]
    out: torch.Tensor = call.qkv.new_empty((call.qkv.shape[0], call.qkv.shape[1], HV * V))
    if operator.inplace:
        return out
    rows = call.state.shape[0] if call.state_indices is None else call.state_indices.shape[0]
    return out, *(x.new_empty((rows, *x.shape[1:])) for x in (call.conv_state, call.state))


_LIB.impl(INPLACE.name, _inplace, "CompositeExplicitAutograd")
_LIB.impl(FUNCTIONAL.name, _functional, "CompositeExplicitAutograd")
guard_writes(_LIB, INPLACE.name)
for _operator in (INPLACE, FUNCTIONAL):
    torch.library.register_fake(f"anydelta::{_operator.name}", partial(_fake, _operator), lib=_LIB)


# ---- gradients

_OTHERS = FUNCTIONAL.tensors[1:]
"""The functional operator's tensors without qkv, in the order of its schema."""


def _names(parts: int) -> tuple[str, ...]:
    """The names of all its tensors, if qkv has so many parts."""
    return (*("qkv", "k", "v")[:parts], *_OTHERS)


class _Differentiable(torch.autograd.Function):
    """The functional operator with a gradient. Tensors: q, k and v, or qkv; then the others, None if absent."""

    @staticmethod
    def forward(
        ctx: Any,
        keys: torch._C.DispatchKeySet,
        parts: int,
        flags: dict[str, object],
        *tensors: torch.Tensor | None,
    ) -> Any:
        ctx.save_for_backward(*tensors)
        ctx.parts, ctx.flags = parts, flags
        ctx.set_materialize_grads(False)  # the states are large, and losses seldom use them
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.anydelta.gated_delta_mixer.default.redispatch(
                keys & BELOW, list(tensors[:parts]), *tensors[parts:], **flags
            )

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        tensors, parts, flags = ctx.saved_tensors, ctx.parts, ctx.flags
        wanted = [i for i, need in enumerate(ctx.needs_input_grad[3:]) if need]
        found: list[torch.Tensor | None] = [None] * len(tensors)
        if all(g is None for g in grads):
            return (None, None, None, *found)
        # as in the rule: gradients of gradients, and vmapped ones
        if torch.is_grad_enabled() or any(g is not None and batched(g) for g in grads):
            names = _names(parts)
            call = MixerCall(**{"k": None, "v": None, **dict(zip(names, tensors, strict=True))})
            options = MixerOptions(**{n: x for n, x in flags.items() if n != "backend"})
            with torch.enable_grad():
                by_name = gradients(call, options, [names[i] for i in wanted], grads, create_graph=True)
            return (None, None, None, *(by_name.get(n) for n in names))
        results = torch.ops.anydelta.gated_delta_mixer_backward(
            list(tensors[:parts]), *tensors[parts:], *grads, wanted, **flags
        )
        for i, grad in zip(wanted, results, strict=True):
            found[i] = grad
        return (None, None, None, *found)


def _differentiable(
    keys: torch._C.DispatchKeySet, qkv: list[torch.Tensor], *others: torch.Tensor | None, **flags: Any
) -> Any:
    """The functional operator at the Autograd key."""
    tensors = (*qkv, *others, *(None,) * (len(_OTHERS) - len(others)))
    if (forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()) and transformed(
        *tensors
    ):
        return _composed(qkv, *others, **flags)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        return _Differentiable.apply(keys, len(qkv), flags, *tensors)  # type: ignore[no-untyped-call]
    return torch.ops.anydelta.gated_delta_mixer.default.redispatch(keys & BELOW, qkv, *others, **flags)


def _composed(*args: object, **given: object) -> Any:
    """The functional operator as torch's own operators around the rule, which every transform supports."""
    arrays, rest = _bind(FUNCTIONAL, *args, **given)
    call = MixerCall(*arrays)
    return dispatch.mixer_of("reference").differentiable(
        call, op.check(call, MixerOptions(*rest[:-1])), rest[-1]
    )


def _backward_op(*arguments: Any, **flags: Any) -> list[torch.Tensor]:
    qkv, *others, grad_o, grad_conv_state, grad_state, wanted = arguments
    tensors, grads = (*qkv, *others), (grad_o, grad_conv_state, grad_state)
    by_name = dict(zip(_names(len(qkv)), tensors, strict=True))
    names = [_names(len(qkv))[i] for i in wanted]
    backend = flags.pop("backend", "auto")
    call = MixerCall(**{"k": None, "v": None, **by_name})
    with autograd_below():
        found = gradients(call, MixerOptions(**flags), names, grads, backend=backend)
    return apart([(found[n], by_name[n]) for n in names], (*tensors, *grads))


def _fake_backward(qkv: list[torch.Tensor], *arguments: Any, **flags: object) -> list[torch.Tensor]:
    tensors = (*qkv, *arguments)
    return [tensors[i].new_empty(tensors[i].shape) for i in arguments[-1]]


_LIB.impl(FUNCTIONAL.name, _differentiable, "Autograd", with_keyset=True)
_LIB.impl("gated_delta_mixer_backward", _backward_op, "CompositeExplicitAutograd")
torch.library.register_fake("anydelta::gated_delta_mixer_backward", _fake_backward, lib=_LIB)


# ---- Calls from op.py


def by_parts(call: MixerCall) -> tuple[MixerCall, list[str]]:
    """The functional call with its lazy views resolved, and the names of arrays that a transform or dual numbers
    follow, or that wrap other tensors. Such a call runs as torch's operators around the rule."""
    tensors = {n: x.resolve_neg() for n, x in op.arrays_of(call).items() if isinstance(x, torch.Tensor)}
    followed = (is_functorch_wrapped_tensor, is_traceable_wrapper_subclass, transformed)
    return replace(call, **tensors), [n for n, x in tensors.items() if any(f(x) for f in followed)]


def dual_numbers() -> bool:
    """Whether a level of dual numbers is entered, for use under torch.compile: the operator would not see it."""
    return forward_ad._current_level >= 0


def functional(
    call: MixerCall, options: MixerOptions, backend: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The functional call as a dispatcher operator, which tracers record and which has a gradient."""
    flags = {name: getattr(options, name) for name in FUNCTIONAL.flags}
    found: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = torch.ops.anydelta.gated_delta_mixer(
        _qkv(call), *(getattr(call, name) for name in _OTHERS), **flags, backend=backend
    )
    return found


def _qkv(call: MixerCall) -> list[torch.Tensor]:
    return [call.qkv] if call.k is None else [call.qkv, call.k, call.v]


def traced(arrays: Arrays, rest: Rest) -> torch.Tensor:
    """The call in place as a dispatcher operator, which tracers record."""
    call, options, backend = MixerCall(*arrays), MixerOptions(*rest[:-1]), rest[-1]
    refuse_old_exporter(options.op)
    if not is_compiling():
        refuse_nested(options.op, op.arrays_of(call))
    _refuse_derivatives(call)  # here too: under a tracer the kernel sees tensors without their gradients
    flags = {name: getattr(options, name) for name in INPLACE.flags}
    tensors = [getattr(call, name) for name in INPLACE.tensors if name != "qkv"]
    result: torch.Tensor = torch.ops.anydelta.gated_delta_mixer_(
        _qkv(call), *tensors, **flags, backend=backend
    )
    return result
