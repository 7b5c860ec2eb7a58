"""torch.ops.anydelta.gated_delta_mixer_: the in-place mixer for torch.compile and torch.export.

Eager calls skip the dispatcher, as those of the rule do (`anydelta.rule.torch_ops`). qkv is a list of one packed tensor or of
the three tensors q, k, v.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..rule.torch_ops import guard_writes, refuse_tangents, transformed
from ..rule.torch_ops import is_compiling as is_compiling
from ..rule.torch_ops import mark_written as mark_written
from ..rule.torch_ops import watched as watched
from . import op
from .spec import MixerCall, MixerOptions, check_mixer, unpack_qkv

_LIB = torch.library.Library("anydelta", "FRAGMENT")  # must stay alive: dropping it removes the operator
_LIB.define(
    "gated_delta_mixer_(Tensor[] qkv, Tensor(a!) conv_state, Tensor(b!) state, Tensor g, Tensor beta, "
    "Tensor conv_weight, Tensor(c!)? snapshots=None, Tensor(d!)? conv_snapshots=None, Tensor? conv_bias=None, "
    "Tensor? A_log=None, Tensor? dt_bias=None, Tensor? z=None, Tensor? norm_weight=None, Tensor? mask=None, "
    "Tensor? cu_seqlens=None, Tensor? state_indices=None, Tensor? snapshot_indices=None, *, "
    'str? activation="silu", float? scale=None, '
    'str decay="raw", float? lower_bound=None, bool beta_is_logit=True, bool allow_neg_eigval=False, '
    'str heads="interleaved", bool qk_l2norm=True, float qk_l2norm_eps=1e-6, float norm_eps=1e-6, '
    'str norm_gate="silu", str state_layout="kv", str backend="auto") -> Tensor'
)
_NAME = "gated_delta_mixer_"
_ARRAYS = (
    "conv_state", "state", "g", "beta", "conv_weight", "snapshots", "conv_snapshots", "conv_bias", "A_log",
    "dt_bias", "z", "norm_weight", "mask", "cu_seqlens", "state_indices", "snapshot_indices",
)  # fmt: skip
"""The operator's tensors after qkv, in the order of its schema."""


@cache
def _options(*flags: tuple[str, Any]) -> tuple[Any, ...]:
    return tuple(vars(MixerOptions(op=_NAME, **dict(flags))).values())


def _call(
    qkv: list[torch.Tensor], arrays: tuple[Any, ...], given: dict[str, Any]
) -> tuple[MixerCall, dict[str, Any]]:
    """The call, and those keywords that are flags. Tensors come by position or by name."""
    tensors = dict(zip(_ARRAYS, arrays, strict=False))
    tensors.update({n: given[n] for n in given if n in _ARRAYS})
    flags = {n: x for n, x in given.items() if n not in _ARRAYS}
    return MixerCall(*unpack_qkv(_NAME, list(qkv)), **tensors), flags


def _inplace(qkv: list[torch.Tensor], *arrays: Any, **given: Any) -> torch.Tensor:
    call, flags = _call(qkv, arrays, given)
    backend = flags.pop("backend", "auto")
    _refuse_derivatives(call)
    result: torch.Tensor = op.execute(call, _options(*flags.items()), backend, op.geometry_of(call))
    return result


def _refuse_derivatives(call: MixerCall) -> None:
    if torch.is_grad_enabled():
        op.refuse_grad(call, _NAME)
    refuse_tangents(_NAME, op.arrays_of(call))


def _fake(qkv: list[torch.Tensor], *arrays: Any, **given: Any) -> torch.Tensor:
    call, flags = _call(qkv, arrays, given)
    flags.pop("backend", None)
    tensors = (getattr(call, n) for n in MixerCall.__slots__)
    if all(isinstance(n, int) for x in tensors if x is not None for n in x.shape):
        check_mixer(call, MixerOptions(op=_NAME, **flags))
    kv = flags.get("state_layout", "kv") == "kv"
    HV, V = call.state.shape[1], call.state.shape[3 if kv else 2]
    out: torch.Tensor = call.qkv.new_empty((call.qkv.shape[0], call.qkv.shape[1], HV * V))
    return out


def by_parts(call: MixerCall) -> tuple[MixerCall, list[str]]:
    """The functional call with the values of its lazy views, and the arrays for which it has to run as torch's
    operators around the rule: a transform or dual numbers follow them, or they are made of other tensors."""
    tensors = {n: x.resolve_neg() for n, x in op.arrays_of(call).items() if isinstance(x, torch.Tensor)}
    followed = (is_functorch_wrapped_tensor, is_traceable_wrapper_subclass, transformed)
    return replace(call, **tensors), [n for n, x in tensors.items() if any(f(x) for f in followed)]


_LIB.impl(_NAME, _inplace, "CompositeExplicitAutograd")
guard_writes(_LIB, _NAME)
torch.library.register_fake(f"anydelta::{_NAME}", _fake, lib=_LIB)


def traced(call: MixerCall, options: tuple[Any, ...], backend: str) -> torch.Tensor:
    """The call as a dispatcher operator, which tracers record."""
    _refuse_derivatives(
        call
    )  # here too: a tracer shows the kernel tensors that have forgotten their gradients
    flags = dict(zip(MixerOptions.__dataclass_fields__, options, strict=True))
    del flags["op"]
    qkv = [call.qkv] if call.k is None else [call.qkv, call.k, call.v]
    arrays = [getattr(call, n) for n in _ARRAYS]
    result: torch.Tensor = torch.ops.anydelta.gated_delta_mixer_(qkv, *arrays, **flags, backend=backend)
    return result
