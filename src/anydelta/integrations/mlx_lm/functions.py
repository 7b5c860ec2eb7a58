"""Replacements for mlx-lm's `gated_delta_update` and the calls of its linear attention layers."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from ...core.dispatch import UnsupportedError
from ...mlx import gated_delta_rule
from .cache import RollbackCache, Step

if TYPE_CHECKING:
    from mlx.nn.layers.base import Module
    from mlx_lm.models.cache import _BaseCache


Update = Callable[..., "tuple[mx.array, mx.array | Step]"]
Forward = Callable[..., "mx.array"]


def update(
    theirs: Callable[..., tuple[mx.array, mx.array]], taken: Counter[str], passed_on: Counter[str]
) -> Update:
    """gated_delta_update on anydelta, with `theirs` as the fallback."""

    @functools.wraps(theirs)
    def gated_delta_update(
        q: mx.array,  # [B, T, H, K], normalised and scaled by the layer
        k: mx.array,  # [B, T, H, K]
        v: mx.array,  # [B, T, HV, V]
        a: mx.array,  # [B, T, HV], KDA [B, T, HV, K]: the gate before its activation
        b: mx.array,  # [B, T, HV]: beta before its sigmoid
        A_log: mx.array,  # [HV], KDA [HV, 1]
        dt_bias: mx.array,  # [HV], KDA [HV, K]
        state: mx.array | Step | None = None,  # [B, HV, V, K], or a Step
        mask: mx.array | None = None,  # [B, T]
        use_kernel: bool = True,
        **options: Any,  # lower_bound, allow_neg_eigval, and additions of later releases
    ) -> tuple[mx.array, mx.array | Step]:
        step, before = (state, state.cache.cache[-1]) if isinstance(state, Step) else (None, state)
        slots = min(step.cache.depth + 1, q.shape[1]) if step else None
        lower_bound, allow_neg_eigval = options.get("lower_bound"), options.get("allow_neg_eigval", False)
        why = _why_not(q, v, before, use_kernel, options)
        if not use_kernel and step is not None:
            why = (
                why or "the model is in training mode, and its cache keeps snapshots"
            )  # snapshots have no gradient
        if not why:
            try:
                out = gated_delta_rule(
                    q, k, v,
                    g=a,
                    beta=2 * mx.sigmoid(b.astype(mx.float32)) if allow_neg_eigval else b,
                    beta_is_logit=not allow_neg_eigval,
                    initial_state=before,
                    scale=1.0,
                    decay="raw",
                    A_log=A_log.reshape(-1),
                    dt_bias=dt_bias,
                    lower_bound=lower_bound,
                    state_layout="vk",
                    mask=mask,
                    snapshots=slots,
                    output_final_state=slots is None,
                    backend="auto" if mx.default_device() == mx.cpu else "metal",
                )  # fmt: skip
            except UnsupportedError as error:
                why = str(error)
        if why:
            passed_on[why] += 1
            o, new = theirs(q, k, v, a, b, A_log, dt_bias, before, mask, use_kernel=use_kernel, **options)
            states = [new]
        else:
            taken["gated_delta_update"] += 1
            o = out[0]
            states = [out[1]] if slots is None else [out[2][i] for i in range(slots)]
        if step is None:
            return o, states[0]
        step.states, step.tokens = states, q.shape[1]
        return o, step

    return gated_delta_update


def _why_not(
    q: mx.array, v: mx.array, state: mx.array | None, use_kernel: bool, options: dict[str, Any]
) -> str | None:
    """Why mlx-lm's function runs instead."""
    for name, value in options.items():
        if name not in ("lower_bound", "allow_neg_eigval") and value is not None and value is not False:
            return f"the argument {name}"
    if not use_kernel and mx.default_device() != mx.cpu:
        return "the model is in training mode on a GPU"  # the backward pass is the CPU's
    if q.dtype != v.dtype or q.dtype not in (mx.float32, mx.bfloat16, mx.float16):
        return f"q is {q.dtype} and v is {v.dtype}"
    if state is not None and state.dtype not in (mx.float32, mx.bfloat16):
        return f"the state is {state.dtype}"
    return None


def layer(theirs: Forward, convolutions: tuple[str, ...]) -> Forward:
    """A layer's __call__ that records for a RollbackCache what a rollback needs."""

    @functools.wraps(theirs)
    def __call__(
        self: Module, x: mx.array, mask: mx.array | None = None, cache: _BaseCache | None = None
    ) -> mx.array:
        if mask is None and hasattr(self, "_decode_core"):
            # Without a mask such a layer compiles its decode step on Metal with the current functions and cache. It
            # would still run ours after disable(), and cannot take a Step.
            mask = mx.ones(x.shape[:2], mx.bool_)
        if not isinstance(cache, RollbackCache):
            return theirs(self, x, mask, cache)
        step = Step(cache)
        stand_in = _StandIn(self)
        for slot, path in enumerate(convolutions):
            *outer, name = path.split(".")
            owner = stand_in
            for part in outer:
                owner = owner.part(part)
            setattr(owner, name, _recorded(getattr(owner, name), step, slot))
        return theirs(stand_in, x, mask, step)

    return __call__


class _StandIn:
    """A module with some parts replaced, for one call. The module itself does not change."""

    def __init__(self, module: Module):
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def __call__(self, *args: object, **kwargs: object) -> Any:
        return type(self._module).__call__(self, *args, **kwargs)

    def part(self, name: str) -> _StandIn:
        if name not in self.__dict__:
            setattr(self, name, _StandIn(getattr(self._module, name)))
        return self.__dict__[name]  # type: ignore[no-any-return]


def _recorded(
    convolution: Callable[[mx.array], mx.array], step: Step, slot: int
) -> Callable[[mx.array], mx.array]:
    def run(read: mx.array) -> mx.array:
        step.inputs[slot] = read
        return convolution(read)

    return run
