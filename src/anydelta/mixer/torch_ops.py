"""torch.ops.anydelta.gated_delta_mixer_: the in-place mixer for torch.compile and torch.export.

Eager calls skip the dispatcher, as those of the rule do (`anydelta.rule.torch_ops`). qkv is a list of one packed
tensor or of the three tensors q, k, v.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..core.arrays import Arrays
from ..core.plans import Plan, Rest, find
from ..rule.torch_ops import guard_writes, refuse_old_exporter, refuse_tangents, transformed
from ..rule.torch_ops import is_compiling as is_compiling
from ..rule.torch_ops import mark_written as mark_written
from ..rule.torch_ops import watched as watched
from . import op
from .arguments import INPLACE, MixerCall, MixerOptions
from .spec import check_mixer, unpack_qkv

_LIB = torch.library.Library("anydelta", "FRAGMENT")  # must stay alive: dropping it removes the operator
_LIB.define(INPLACE.schema())


def _bind(*args: object, **given: object) -> tuple[Arrays, Rest]:
    """The operator's arguments as those of the table."""
    (qkv, _, _, *others), rest = INPLACE.bind(*args, **given)
    return (*unpack_qkv(INPLACE.name, list(qkv)), *others), rest


def _inplace(*args: object, **given: object) -> torch.Tensor:
    arrays, rest = _bind(*args, **given)
    found = find(arrays, rest)
    if type(found) is not Plan:  # a plan is found for calls alone that nobody differentiates
        _refuse_derivatives(MixerCall(*arrays))
        found = op.plan(arrays, rest, found)
    result: torch.Tensor = found.call(arrays)[0]
    return result


def _refuse_derivatives(call: MixerCall) -> None:
    if torch.is_grad_enabled():
        op.refuse_grad(call, INPLACE.name)
    refuse_tangents(INPLACE.name, op.arrays_of(call))


def _fake(*args: object, **given: object) -> torch.Tensor:
    arrays, rest = _bind(*args, **given)
    call, options = MixerCall(*arrays), MixerOptions(*rest[:-1])
    if all(isinstance(n, int) for x in arrays if x is not None for n in x.shape):
        check_mixer(call, options)
    kv = options.state_layout == "kv"
    HV, V = call.state.shape[1], call.state.shape[3 if kv else 2]
    out: torch.Tensor = call.qkv.new_empty((call.qkv.shape[0], call.qkv.shape[1], HV * V))
    return out


def by_parts(call: MixerCall) -> tuple[MixerCall, list[str]]:
    """The functional call with the values of its lazy views, and the arrays for which it has to run as torch's
    operators around the rule: a transform or dual numbers follow them, or they are made of other tensors."""
    tensors = {n: x.resolve_neg() for n, x in op.arrays_of(call).items() if isinstance(x, torch.Tensor)}
    followed = (is_functorch_wrapped_tensor, is_traceable_wrapper_subclass, transformed)
    return replace(call, **tensors), [n for n, x in tensors.items() if any(f(x) for f in followed)]


_LIB.impl(INPLACE.name, _inplace, "CompositeExplicitAutograd")
guard_writes(_LIB, INPLACE.name)
torch.library.register_fake(f"anydelta::{INPLACE.name}", _fake, lib=_LIB)


def traced(arrays: Arrays, rest: Rest) -> torch.Tensor:
    """The call as a dispatcher operator, which tracers record."""
    call, options, backend = MixerCall(*arrays), MixerOptions(*rest[:-1]), rest[-1]
    refuse_old_exporter(options.op)
    _refuse_derivatives(
        call
    )  # here too: a tracer shows the kernel tensors that have forgotten their gradients
    flags = {name: getattr(options, name) for name in INPLACE.flags}
    qkv = [call.qkv] if call.k is None else [call.qkv, call.k, call.v]
    tensors = [getattr(call, name) for name in INPLACE.tensors if name != "qkv"]
    result: torch.Tensor = torch.ops.anydelta.gated_delta_mixer_(qkv, *tensors, **flags, backend=backend)
    return result
