"""The functions that replace Transformers' own, with the same parameters and results.

Each maker takes the original function and returns ours. Ours calls the original if anydelta does not take a call:
gradients are wanted and no backend has a backward pass (outside torch.compile the convolution has none), the device has
no native backend, torch.export traces, or an argument asks for something else. Our functions differ from Transformers'
in one point: packed rows (`cu_seqlens`, `seq_idx`) are kept apart. Without fla, Transformers refuses them, or in
kimi_linear ignores them.
"""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from ...compat import fla
from ...core import dispatch
from ...mixer.convolution import blocked, sequence_ids, shifted
from ...rule.op import explain, gated_delta_rule, gated_delta_rule_
from ...rule.torch_ops import DUAL_NUMBERS, TRACER, TRANSFORM, onlooker
from .cache import CACHES, RollbackLayer

if TYPE_CHECKING:
    from transformers.cache_utils import Cache, CacheLayerMixin

    from .families import LinearAttention

Rule = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]
Conv = Callable[..., torch.Tensor]

ADVANCE = "anydelta_advance_state"
"""The keyword with which a layer's forward allows the rule to advance the cached state in place."""
RECORD = "anydelta_record_states"
"""The keyword with which it gives the rule the RollbackLayer that wants the state after each token."""

_is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # new in torch 2.7
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_KNOWN = {
    *("q", "k", "v", "g", "beta", "initial_state", "output_final_state", "use_qk_l2norm_in_kernel"),
    *("cu_seqlens", "cu_seqlens_cpu", "chunk_size", "kwargs"),
}
_RULE_OPTIONS = frozenset(
    name
    for f in (
        fla.chunk_gated_delta_rule,
        fla.fused_recurrent_gated_delta_rule,
        fla.chunk_kda,
        fla.fused_recurrent_kda,
    )
    for name in inspect.signature(f).parameters
    if name not in _KNOWN
)
"""Keywords that would change the result if we replace fla instead of Transformers' torch code."""
_CONV_OPTIONS = frozenset(("initial_states", "return_final_states", "final_states_out"))

_NEVER = ("gradients are wanted", "torch.export", TRANSFORM, DUAL_NUMBERS)
"""Reasons for which the rule falls back to Transformers even if states should be recorded."""
_MAX_DECISIONS = 4096
_decisions: dict[tuple[object, ...], str | None] = {}
TORCH_DEVICES = ("cpu", *((d.type,) if (d := torch.accelerator.current_accelerator()) is not None else ()))
"""Devices on which this torch has tensors. Backends of other devices are not asked whether they can run."""
NATIVE_DEVICES: frozenset[str] = frozenset(
    device
    for device in TORCH_DEVICES
    if any(
        n != "reference" and not dispatch.get_backend(n).available()
        for n in dispatch.PRIORITY.get(device, ())
    )
)
"""Devices with a native backend. Code under torch.compile can look them up."""
GRADIENT_DEVICES: frozenset[str] = frozenset(
    device
    for device in NATIVE_DEVICES
    if any(hasattr(dispatch.get_backend(n), "gradients") for n in dispatch.PRIORITY[device])
)
"""Devices whose native backend has a backward pass."""


# ---- The rule


def chunk_rule(theirs: Rule, name: str, taken: Counter[str], passed_on: Counter[str]) -> Rule:
    """The rule over a whole sequence: q, k [B, T, H, K], v [B, T, HV, V], g [B, T, HV] or [B, T, HV, K]."""

    @functools.wraps(theirs, updated=())
    def ours(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        chunk_size: int = 64,
        initial_state: torch.Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return _rule(
            theirs, name, taken, passed_on, query, key, value, g, beta, initial_state, output_final_state,
            use_qk_l2norm_in_kernel, kwargs, chunk_size=chunk_size,
        )  # fmt: skip

    return ours


def recurrent_rule(theirs: Rule, name: str, taken: Counter[str], passed_on: Counter[str]) -> Rule:
    """The rule token by token, as `chunk_rule` but without a chunk size."""

    @functools.wraps(theirs, updated=())
    def ours(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        initial_state: torch.Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return _rule(
            theirs, name, taken, passed_on, query, key, value, g, beta, initial_state, output_final_state,
            use_qk_l2norm_in_kernel, kwargs,
        )  # fmt: skip

    return ours


def _rule(
    theirs: Rule,
    name: str,
    taken: Counter[str],
    passed_on: Counter[str],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor | None,
    final: bool,
    l2norm: bool,
    kwargs: dict[str, Any],
    **own: int,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run a call, or fall back to `theirs`. Only `theirs` takes `own`."""
    advance: bool = kwargs.pop(ADVANCE, False)
    record: RollbackLayer | None = kwargs.pop(RECORD, None)
    wanted = _gradients_are_wanted(q, k, v, g, beta, state)
    why_not = _why_not_rule(q, k, v, g, beta, state, kwargs, wanted)
    if wanted and record is not None:
        why_not = _NEVER[0]  # what is written into an array has no gradient
    if record is not None and why_not not in _NEVER:
        why_not = None  # only anydelta writes snapshots, so it runs even if it is slow
    _count(name, why_not, taken, passed_on)
    if why_not is not None:
        return theirs(
            q, k, v, g, beta,
            initial_state=state, output_final_state=final, use_qk_l2norm_in_kernel=l2norm, **own, **kwargs,
        )  # fmt: skip
    advance = advance and not wanted
    cu_seqlens = _cu_seqlens(kwargs)
    if state is not None and state.dtype != torch.float32:  # Transformers computes and returns float32 states
        state, advance = state.float(), False
    if torch.compiler.is_compiling():
        o, new = torch.ops.anydelta.gated_delta_rule(
            q, k, v, g, beta, state, None, None, None, cu_seqlens, None,
            qk_l2norm=bool(l2norm), output_final_state=bool(final),
        )  # fmt: skip
        return o, new if final else None
    if record is not None and cu_seqlens is None and record.can_record():
        states = record.snapshots((v.shape[0], v.shape[2], k.shape[3], v.shape[3]), v, v.shape[1])
        o, _ = gated_delta_rule(
            q, k, v, g=g, beta=beta, initial_state=state, qk_l2norm=bool(l2norm), snapshots=states,
            output_final_state=False,
        )  # fmt: skip
        return o, states[0]
    if advance and final and state is not None and cu_seqlens is None:
        return gated_delta_rule_(q, k, v, state, g=g, beta=beta, qk_l2norm=bool(l2norm)), state
    return gated_delta_rule(
        q, k, v, g=g, beta=beta, initial_state=state, qk_l2norm=bool(l2norm), cu_seqlens=cu_seqlens,
        output_final_state=bool(final),
    )  # fmt: skip


def _cu_seqlens(kwargs: dict[str, Any]) -> torch.Tensor | None:
    """Where packed sequences begin. kimi_linear leaves them under the name that the attention layers use."""
    cu = kwargs.get("cu_seqlens")
    return kwargs.get("cu_seq_lens_q") if cu is None else cu


def _gradients_are_wanted(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor | None,
) -> bool:
    return torch.is_grad_enabled() and (
        q.requires_grad
        or k.requires_grad
        or v.requires_grad
        or g.requires_grad
        or beta.requires_grad
        or (state is not None and state.requires_grad)
    )


def _why_not_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor | None,
    kwargs: dict[str, object],
    gradients: bool,
) -> str | None:
    """The reason why a call falls back to Transformers, or None. Gradients may be wanted."""
    for name in kwargs:
        if name in _RULE_OPTIONS and kwargs[name] is not None and kwargs[name] is not False:
            return f"the argument {name}"
    cu = _cu_seqlens(kwargs)
    if cu is None and kwargs.get("seq_idx") is not None:
        return "seq_idx without cu_seq_lens_q"
    if torch.compiler.is_compiling():
        if _is_exporting():
            return _NEVER[1]
        if gradients and q.device.type not in GRADIENT_DEVICES:
            return _NEVER[0]
        return (
            None
            if q.device.type in NATIVE_DEVICES and q.dtype in _DTYPES
            else f"device {q.device.type} or {q.dtype}"
        )
    if (who := onlooker()) in _NEVER:  # these need torch's own operators; other tracers record ours
        return who
    if type(q) is not torch.Tensor:
        return f"the tensor type {type(q).__name__}"
    shape = (
        q.device.type, q.dtype, k.dtype, v.dtype, g.dtype, beta.dtype, q.shape, v.shape, g.shape,
        None if state is None else (state.dtype, state.shape), None if cu is None else cu.shape,
        dispatch.forced_by_env(), gradients,
    )  # fmt: skip
    try:
        return _decisions[shape]
    except KeyError:
        pass
    why_not: str | None = None
    try:
        trace = explain(q, k, v, g=g, beta=beta, initial_state=state, cu_seqlens=cu)
    except (TypeError, ValueError) as error:
        if cu is not None:  # no fallback: Transformers refuses packed rows, or ignores that they are packed
            raise
        why_not = str(error)
    else:
        if trace.chosen is None or (trace.chosen == "reference" and trace.forced is None):
            reasons = "; ".join(str(r) for rs in trace.rejected.values() for r in rs)
            why_not = reasons or f"there is no native backend for device {q.device.type}"
        elif gradients and dispatch.with_gradients(trace.spec, warn=False) is None:
            why_not = _NEVER[0]
    if len(_decisions) >= _MAX_DECISIONS:
        _decisions.clear()
    _decisions[shape] = why_not
    return why_not


def _count(name: str, why_not: str | None, taken: Counter[str], passed_on: Counter[str]) -> None:
    if torch.compiler.is_compiling():
        return
    if why_not is None:
        taken[name] += 1
    else:
        passed_on[f"{name}: {why_not}"] += 1


# ---- The causal convolution: depthwise, k taps, y[t] = sum_j w[j] x[t - (k - 1) + j]
#
# The result keeps its channels together, so that the rule reads q, k and v without a copy.


def conv(theirs: Conv, name: str, taken: Counter[str], passed_on: Counter[str]) -> Conv:
    """The causal convolution over a sequence: hidden_states [B, C, T], weight [C, k]."""

    @functools.wraps(theirs, updated=())
    def ours(
        hidden_states: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        activation: str | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        kwargs.pop(ADVANCE, None)
        kwargs.pop(RECORD, None)
        packed = kwargs.get("seq_idx") is not None or _cu_seqlens(kwargs) is not None
        why_not = _why_not_conv(hidden_states, weight, bias, activation, kwargs, packed)
        _count(name, why_not, taken, passed_on)
        if why_not is not None:
            return theirs(hidden_states, weight, bias, activation=activation, **kwargs)
        x = hidden_states.transpose(1, 2)
        if packed or torch.compiler.is_compiling():
            ids = (
                sequence_ids(x.shape[1], kwargs.get("seq_idx"), _cu_seqlens(kwargs), x.device)
                if packed
                else None
            )
            y = shifted(x, weight, bias, activation, ids)
        else:
            y = blocked(x, weight, bias, activation)
        return y.transpose(1, 2)

    return ours


def conv_update(theirs: Conv, name: str, taken: Counter[str], passed_on: Counter[str]) -> Conv:
    """The causal convolution of the next token; conv_state [B, C, >= k] is advanced in place."""

    @functools.wraps(theirs, updated=())
    def ours(
        hidden_states: torch.Tensor,
        conv_state: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        activation: str | None = None,
    ) -> torch.Tensor:
        why_not = _why_not_conv(hidden_states, weight, bias, activation, {}, False)
        if why_not is None and (hidden_states.shape[-1] != 1 or conv_state.shape[-1] < weight.shape[-1]):
            why_not = "more than one token, or a state shorter than the kernel"
        if why_not is None and conv_state.dtype != hidden_states.dtype:
            why_not = f"a state of dtype {conv_state.dtype} for inputs of {hidden_states.dtype}"
        _count(name, why_not, taken, passed_on)
        if why_not is not None:
            return theirs(hidden_states, conv_state, weight, bias, activation)
        window = torch.cat((conv_state[..., 1:], hidden_states), -1)
        conv_state.copy_(window)
        terms = window[..., -weight.shape[-1] :].float() * weight.float()  # [B, C, k]
        y = terms.sum(-1, keepdim=True)
        if bias is not None:
            y = y + bias.float().unsqueeze(-1)
        if activation is not None:
            y = F.silu(y)
        return y.to(hidden_states.dtype)

    return ours


def _why_not_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    kwargs: dict[str, object],
    packed: bool,
) -> str | None:
    compiling = torch.compiler.is_compiling()  # it fuses whole passes, and those of their gradients
    if (
        not compiling
        and torch.is_grad_enabled()
        and any(t is not None and t.requires_grad for t in (x, weight, bias))
    ):
        return "gradients are wanted"
    if any(kwargs.get(name) is not None and kwargs.get(name) is not False for name in _CONV_OPTIONS):
        return "initial or final states"
    if activation not in (None, "silu", "swish"):
        return f"the activation {activation}"
    if x.dtype not in _DTYPES or weight.dtype != x.dtype or weight.ndim != 2:
        return f"inputs of {x.dtype} with weights of {weight.dtype}"
    if compiling:
        if _is_exporting():
            return "torch.export"
    elif type(x) is not torch.Tensor:
        return f"the tensor type {type(x).__name__}"
    elif (who := onlooker()) in (TRANSFORM, DUAL_NUMBERS, TRACER):
        return who
    if (
        x.device.type != "cpu" and not packed
    ):  # other devices have a fast convolution, but not for packed rows
        return f"device {x.device.type}"
    return None


# ---- The layer


def cache_of(kwargs: dict[str, Any]) -> Cache | None:
    """Take the cache out of a layer's keywords, whatever its name there, and return it."""
    found = None
    for name in CACHES:
        if name in kwargs:
            given = kwargs.pop(name)
            found = given if found is None else found
    return found


def advancing(theirs: Callable[..., torch.Tensor], cache_name: str) -> Callable[..., torch.Tensor]:
    """A layer's forward that tells the rule what it may do with the cached state.

    A cache that records the past gets the state after each token. Otherwise the rule may advance the state in place if
    nobody can see the difference: Transformers computes a new state and copies it over the cached one, and doing both
    at once halves the memory traffic of a decode step. This is allowed only for cache classes whose update is known to
    be that copy.
    """

    @functools.wraps(theirs)
    def forward(
        self: LinearAttention,
        hidden_states: torch.Tensor,
        cache: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: object,
    ) -> torch.Tensor:
        if cache is None and kwargs:
            cache = cache_of(kwargs)
        if cache is not None and not torch.compiler.is_compiling():
            layers = getattr(cache, "layers", ())
            layer = layers[self.layer_idx] if self.layer_idx < len(layers) else None
            if isinstance(layer, RollbackLayer) and layer.record_past:
                layer.begin()
                kwargs[RECORD] = layer
            elif hidden_states.shape[1] == 1 and _copies_states(cache, layer):
                kwargs[ADVANCE] = True
        kwargs[cache_name] = cache
        return theirs(self, hidden_states, attention_mask=attention_mask, **kwargs)

    forward.__name__ = "forward"  # for pickle; up to 5.16 Transformers' decorator changes it
    return forward


def _copies_states(cache: Cache, layer: CacheLayerMixin) -> bool:
    """Whether the cache ends a step by copying the new state over the old one, and does nothing else with either."""
    from transformers.cache_utils import Cache, LinearAttentionLayer

    return (
        type(cache).update_recurrent_state is Cache.update_recurrent_state
        and getattr(type(layer), "update_recurrent_state", None)
        in (LinearAttentionLayer.update_recurrent_state, RollbackLayer.update_recurrent_state)
        and not layer.record_past
    )
