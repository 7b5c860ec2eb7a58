"""Everything between a linear attention layer's projections in Transformers, as one call of `gated_delta_mixer_`.

`fused` wraps a layer's forward. Calls that the mixer takes run the layer's own projections and the mixer. All others
fall back to the original forward, which finds ours for the rule and the convolution (functions.py). Under
torch.compile every call does: torch.compile guards only on the functions' names, and a compiled model must notice
`disable()`.
"""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules import module as of_all_modules

from ...core import dispatch, native
from ...mixer.op import gated_delta_mixer, gated_delta_mixer_, plan_step
from ...mixer.spec import unpack_qkv
from ...rule.torch_ops import FUNCTION_MODE, onlooker, plain, quiet
from ..switch import mark
from .cache import RollbackLayer
from .classes import KEPT
from .families import Family, Projected
from .functions import (
    _CONV_OPTIONS,
    _DTYPES,
    _RULE_OPTIONS,
    TORCH_DEVICES,
    _count,
    _cu_seqlens,
    advancing,
    cache_of,
)
from .packed_matrices import PackedLinear

if TYPE_CHECKING:
    from transformers.cache_utils import Cache, LinearAttentionLayer

    from ...core.native import core
    from .families import LinearAttention

Forward = Callable[..., torch.Tensor]


MIXER_DEVICES: frozenset[str] = frozenset(
    device
    for device in TORCH_DEVICES
    for n in dispatch.PRIORITY.get(device, ())
    if n != "reference" and not dispatch.get_backend(n).available() and dispatch.mixer_of(n) is not None
)
"""Devices with a native kernel for the mixer."""
GRADIENT_DEVICES: frozenset[str] = frozenset(
    device
    for device in MIXER_DEVICES
    if any(hasattr(dispatch.mixer_of(n), "gradients") for n in dispatch.PRIORITY[device])
)
"""Devices whose backend has a backward pass of the mixer."""


def fused(
    theirs: Forward, cache_name: str, parts: Family, taken: Counter[str], passed_on: Counter[str]
) -> Forward:
    """A layer's forward that runs the mixer. `theirs` takes the calls that the mixer does not."""
    name = f"{parts.name}.mixer"
    _taken[parts.name] = taken
    stock = advancing(theirs, cache_name)

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
        if not _is_compiling():
            if hasattr(cache, "cache_allocators"):
                why_not = "gradients are wanted" if _trains(self, hidden_states) else None
                if _is_autocast_enabled(hidden_states.device.type):
                    why_not = "autocast"
                why_not = why_not or _why_not(self, parts, hidden_states, None, {}, False)
                if why_not is not None:
                    raise ValueError(f"{name}: continuous batching requires the mixer; got {why_not}")
                taken[name] += 1
                return _serve(self, parts, hidden_states, cache, kwargs)
            step = _steps.get(id(self))
            if step is not None:
                held = step.takes(hidden_states, cache, kwargs)
                if held is not None:
                    step.taken[step.name] += 1
                    if attention_mask is not None:
                        hidden_states = _without_padding(hidden_states, attention_mask)
                    return step.run(self, hidden_states, held)
            training = _trains(self, hidden_states)
            why_not = _why_not(self, parts, hidden_states, cache, kwargs, training)
            if why_not is None:
                taken[name] += 1
                cu_seqlens = _cu_seqlens(kwargs)
                if attention_mask is not None:
                    hidden_states = _without_padding(hidden_states, attention_mask)
                project = functools.partial(parts.project, self)
                if training:
                    out = _train(self, parts, hidden_states, cache, cu_seqlens, project)
                else:
                    keep = functools.partial(_keep, self, name, taken)
                    out = _mix(self, parts, hidden_states, cache, cu_seqlens, keep, project)
                result: torch.Tensor = getattr(self, parts.out)(out)
                return result
            _count(name, why_not, taken, passed_on)
        return stock(self, hidden_states, cache, attention_mask, **kwargs)

    forward.__name__ = "forward"  # for pickle; up to 5.16 Transformers' decorator changes it
    return forward


def _serve(
    self: LinearAttention, parts: Family, x: torch.Tensor, cache: Any, kwargs: Mapping[str, Any]
) -> torch.Tensor:
    """A step of Transformers' continuous batching: packed sequences whose states are in blocks of its cache."""
    allocator = cache.layer_to_allocator[self.layer_idx]
    conv_state, state = allocator.pools[self.layer_idx]
    p = parts.project(self, x)
    out: torch.Tensor | None = None
    for tokens, cu_seqlens, read, written in allocator.rounds(kwargs["write_index"][allocator.index]):
        some = p if tokens is None else _at(p, tokens)
        if cu_seqlens is None:  # one token per sequence, each a row of the batch
            some = _rows(some)
        o = _call(
            self, parts, some, conv_state, state,
            cu_seqlens=cu_seqlens, state_indices=read, snapshot_indices=written,
        ).view(1, -1, state.shape[1] * state.shape[3])  # fmt: skip
        if tokens is None:
            out = o
        else:
            out = x.new_empty((1, x.shape[1], o.shape[2])) if out is None else out
            out[:, tokens] = o
    result: torch.Tensor = getattr(self, parts.out)(out)
    return result


def _at(p: Projected, tokens: torch.Tensor) -> Projected:
    """The projections of some tokens of the only row."""
    return _each(p, lambda x: x.index_select(1, tokens))


def _rows(p: Projected) -> Projected:
    """[1, T, ...] as [T, 1, ...]."""
    return _each(p, lambda x: x.transpose(0, 1))


def _each(p: Projected, change: Callable[[torch.Tensor], torch.Tensor]) -> Projected:
    if isinstance(p.qkv, tuple):
        q, k, v = map(change, p.qkv)
        return p._replace(qkv=(q, k, v), z=change(p.z), a=change(p.a), b=change(p.b))
    return p._replace(qkv=change(p.qkv), z=change(p.z), a=change(p.a), b=change(p.b))


def _trains(layer: LinearAttention, x: torch.Tensor) -> bool:
    return _is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in layer.parameters()))


def _without_padding(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Set padding to zero, as Transformers does. It still counts as a token."""
    return (x * mask[:, :, None]).to(x.dtype)


def _mix(
    self: LinearAttention,
    parts: Family,
    x: torch.Tensor,
    cache: Cache | None,
    cu_seqlens: torch.Tensor | None,
    keep: Callable[[_Step], None],
    project: Callable[[torch.Tensor], Projected],
) -> torch.Tensor:
    """The mixer's output, before the layer's last projection."""
    held = None if cache is None else cache.layers[self.layer_idx]
    read = written = None
    recording: RollbackLayer | None = held if held is not None and held.record_past else None
    if recording is not None:
        B, HV, K, V = x.shape[0], *(getattr(self, n) for n in parts.heads)
        conv_state, state, read, written = recording.pools(
            (B, HV, K, V), (B, self.conv_dim, self.conv_kernel_size), x, x.shape[1]
        )
    else:
        conv_state, state = _states(self, parts, x, held, cu_seqlens)
    p = project(x)
    out = None
    if held is not None and recording is None and quiet() and not _is_autocast_enabled(x.device.type):
        step = _Step(self, parts, cache)
        out = step.mix(self, p, conv_state, state)
        if out is not None and x.shape[1] == 1:
            keep(step)
    if out is None:
        out = _call(
            self,
            parts,
            p,
            conv_state,
            state,
            cu_seqlens=cu_seqlens,
            state_indices=read,
            snapshot_indices=written,
        )
    if recording is not None:
        recording.adopt()
    elif held is not None:
        held.has_previous_state[0] = True
    return out


def _train(
    self: LinearAttention,
    parts: Family,
    x: torch.Tensor,
    cache: Cache | None,
    cu_seqlens: torch.Tensor | None,
    project: Callable[[torch.Tensor], Projected],
) -> torch.Tensor:
    """As `_mix`, with gradients: the states are new tensors, kept as Transformers keeps them."""
    held = None if cache is None else cache.layers[self.layer_idx]
    if held is not None and held.has_previous_state[0]:
        # copies, because the end of this step overwrites what the backward pass reads
        conv_state, state = held.conv_states[0].clone(), held.recurrent_states[0].clone()
    else:
        B = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        HV, K, V = (getattr(self, n) for n in parts.heads)
        zero = x.new_zeros(())
        columns = self.conv_kernel_size - (held is None)
        conv_state = zero.to(_dtype(x)).expand(B, self.conv_dim, columns)
        state = zero.float().expand(B, HV, K, V)
    p = project(x)
    arguments = _arguments(self, parts, p)
    arguments["conv_weight"] = arguments["conv_weight"].squeeze(1)
    out: torch.Tensor
    out, conv_state, state = gated_delta_mixer(p.qkv, conv_state, state, cu_seqlens=cu_seqlens, **arguments)
    if held is not None:
        if not held.is_conv_states_initialized[0]:
            held.lazy_initialization(
                conv_states=conv_state, state_idx=0, conv_kernel_size=self.conv_kernel_size
            )
        held.conv_states[0].copy_(conv_state)
        held.update_recurrent_state(state)
        held.has_previous_state[0] = True
    return out


def _dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype of the projections of x."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if _is_autocast_enabled(device) else x.dtype


def _call(
    self: LinearAttention,
    parts: Family,
    p: Projected,
    conv_state: torch.Tensor,
    state: torch.Tensor,
    **more: Any,
) -> torch.Tensor:
    arguments = _arguments(self, parts, p)
    arguments["conv_weight"] = arguments["conv_weight"].squeeze(1)
    out: torch.Tensor = gated_delta_mixer_(p.qkv, conv_state, state, **arguments, **more)
    return out


def _arguments(self: LinearAttention, parts: Family, p: Projected) -> dict[str, Any]:
    """The mixer's arguments; conv_weight is still [C, 1, W]."""
    conv, norm = self.conv1d, getattr(self, parts.norm)
    return dict(
        g=p.a, beta=p.b, A_log=p.A_log, dt_bias=p.dt_bias, z=p.z, conv_weight=conv.weight, conv_bias=conv.bias,
        norm_weight=norm.weight, norm_eps=norm.variance_epsilon, norm_gate=norm.activation,
        allow_neg_eigval=getattr(self, "allow_neg_eigval", False), lower_bound=p.lower_bound,
    )  # fmt: skip


class _Step:
    """One call of a layer's mixer, and the same call again in a decode loop with as little Python as possible.

    Between two mixers the layer's weights go through the caches. A step then finds objects that the checks of a call
    touch outside the caches, and would spend most of its time on them. So this looks only at what may have changed
    since the last step; the extension compares dtypes, shapes and strides.
    """

    def __init__(self, layer: LinearAttention, parts: Family, cache: Cache):
        self.parts, self.layer_idx = parts, layer.layer_idx
        self.modules, self.conv, self.norm = layer._modules, layer.conv1d, layer._modules[parts.norm]
        self.gate = layer._modules.get(parts.gate)
        self.hooks: tuple[Mapping[int, Callable[..., object]], ...] = tuple(
            h
            for m in (self.conv, self.norm, self.gate)
            if m is not None
            for h in (m._forward_hooks, m._forward_pre_hooks)
        )
        self.hooks += (of_all_modules._global_forward_hooks, of_all_modules._global_forward_pre_hooks)
        self.constants = (type(self.conv), type(self.norm), self.norm.variance_epsilon, self.norm.activation)
        self.kinds = (type(cache), type(cache.layers[self.layer_idx]))
        # The output reuses the memory of z if nobody else holds it, which saves the 20 us of a new tensor between two
        # layers. torch's own linear layer, and pack()'s, return a new z for each call.
        self.z = layer._modules.get(parts.z)
        self.in_place = type(self.z) in (torch.nn.Linear, PackedLinear)

        self.native: core.MixerStep | None = None
        self.lower_bound: float | None = None
        self.name, self.taken = "", Counter[str]()
        """The family's name and the counter of its calls."""

    def mix(
        self, layer: LinearAttention, p: Projected, conv_state: torch.Tensor, state: torch.Tensor
    ) -> torch.Tensor | None:
        """Run the mixer with the native plan, or with a new one. None: the backend has no native plans."""
        q, k, v = (p.qkv, None, None) if type(p.qkv) is _Tensor else unpack_qkv("", p.qkv)
        weights, conv = self.norm._parameters, self.conv._parameters
        known = self.native if p.lower_bound == self.lower_bound else None
        for step in (known, None):
            native = step or self._plan(layer, p, conv_state, state)
            if native is None:
                return None
            out = p.z if self.in_place and _alone(p, _Z) else p.z.new_empty(self.shape)
            if native.run(
                q, k, v, conv_state, state, p.a, p.b, conv.get("weight"), None, None,
                conv.get("bias"), p.A_log, p.dt_bias, p.z, weights.get("weight"), None, None, None, None, out,
            ):  # fmt: skip
                return out
        return None

    def _plan(
        self, layer: LinearAttention, p: Projected, conv_state: torch.Tensor, state: torch.Tensor
    ) -> core.MixerStep | None:
        HV, _, V = (getattr(layer, n) for n in self.parts.heads)
        self.device, self.shape = p.z.device.type, torch.Size((*p.b.shape[:2], HV * V))
        self.in_place = self.in_place and p.z.shape == self.shape and p.z.is_contiguous()
        out = p.z.new_empty(self.shape)
        self.lower_bound = p.lower_bound
        self.native = plan_step(out, p.qkv, conv_state, state, **_arguments(layer, self.parts, p))
        return self.native

    def takes(
        self, x: torch.Tensor, cache: Cache | None, kwargs: dict[str, object]
    ) -> LinearAttentionLayer | None:
        """The cache's layer if the call is one more step. None: it is not, or this is unclear."""
        if (
            type(x) is not _Tensor
            or _is_grad_enabled()
            or _is_autocast_enabled(self.device)
            or not quiet()
            or not _OPTIONS.isdisjoint(kwargs)
        ):
            return None
        norm, conv, modules = self.norm, self.conv, self.modules
        if (
            modules[self.parts.norm] is not norm
            or modules["conv1d"] is not conv
            or any(self.hooks)
            or modules.get(self.parts.z) is not self.z
            or modules.get(self.parts.gate) is not self.gate
            or (self.gate is not None and "forward" in self.gate.__dict__)
            or "forward" in norm.__dict__
            or "forward" in conv.__dict__
            or (type(conv), type(norm), norm.variance_epsilon, norm.activation) != self.constants
            or cache is None
        ):
            return None
        held = cache.layers[self.layer_idx]
        if (type(cache), type(held)) != self.kinds or held.record_past or not held.has_previous_state[0]:
            return None
        return held

    def run(self, layer: LinearAttention, x: torch.Tensor, held: LinearAttentionLayer) -> torch.Tensor:
        out = self.advance(layer, self.parts.project(layer, x), held)
        result: torch.Tensor = self.modules[self.parts.out](out)
        return result

    def advance(self, layer: LinearAttention, p: Projected, held: LinearAttentionLayer) -> torch.Tensor:
        """The mixer's output for these projections; the cache's states advance."""
        conv_state, state = held.conv_states[0], held.recurrent_states[0]
        out = self.mix(layer, p, conv_state, state)
        return _call(layer, self.parts, p, conv_state, state) if out is None else out


_steps: dict[int, _Step] = {}
"""By the identity of layers."""


def _keep(layer: LinearAttention, name: str, taken: Counter[str], step: _Step) -> None:
    key = id(layer)
    if key not in _steps:
        weakref.finalize(layer, _steps.pop, key, None).atexit = False
    step.name, step.taken = name, taken
    _steps[key] = step


def forget(layer: LinearAttention) -> None:
    """The layer has other heads from now on."""
    _steps.pop(id(layer), None)


def mixed(
    layer: LinearAttention,
    parts: Family,
    x: torch.Tensor,
    cache: Cache | None,
    kwargs: dict[str, object],
    project: Callable[[torch.Tensor], Projected],
) -> torch.Tensor | None:
    """The mixer's output for code that computes a layer's projections itself. None: ours is off, or refuses the call.

    `project` takes what the layer's own projections take.
    """
    if cache is None or not _is_on(layer):
        return None
    step = _steps.get(id(layer))
    held = None if step is None else step.takes(x, cache, kwargs)
    if step is not None and held is not None:
        step.taken[step.name] += 1
        return step.advance(layer, project(x), held)
    if _trains(layer, x) or _is_autocast_enabled(x.device.type):
        return None  # the layer's own forward takes these
    if _why_not(layer, parts, x, cache, kwargs, False) is not None:
        return None  # counted when the layer's own forward finds the reason again
    name, taken = f"{parts.name}.mixer", _taken[parts.name]
    taken[name] += 1
    keep = functools.partial(_keep, layer, name, taken)
    return _mix(layer, parts, x, cache, _cu_seqlens(kwargs), keep, project)


_taken: dict[str, Counter[str]] = {}
"""Counters of calls, by the names of families."""


def _is_on(layer: nn.Module) -> bool:
    """Whether a call of the layer reaches our forward, without other code around it."""
    own = layer.__dict__
    found = mark(type(layer).forward)
    return found is not None and found.is_on(layer) and "forward" not in own and KEPT not in own


_Z = Projected._fields.index("z")
_alone: Callable[[Projected, int], bool] = (lambda p, i: False) if native.core is None else native.core.alone
"""Whether only `p` holds its tensor `i`, and no other tensor shares its memory. A hook, a function mode or a replaced
function between the layer and torch may have kept it: in Python, in C++, or as a view."""
_Tensor = torch.Tensor
_is_compiling = torch.compiler.is_compiling
_is_grad_enabled, _is_autocast_enabled = torch.is_grad_enabled, torch.is_autocast_enabled
_OPTIONS = _RULE_OPTIONS | _CONV_OPTIONS | {"cu_seqlens", "cu_seq_lens_q", "seq_idx"}
"""Keywords that a plain step does not have."""


def _states(
    self: LinearAttention,
    parts: Family,
    x: torch.Tensor,
    held: LinearAttentionLayer | None,
    cu_seqlens: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The layer's cached states, made if this is its first call. Without a cache: zeros that are not kept."""
    if held is not None and held.has_previous_state[0]:
        return held.conv_states[0], held.recurrent_states[0]
    B = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    HV, K, V = (getattr(self, n) for n in parts.heads)
    W = self.conv_kernel_size
    if held is None:
        conv_state = x.new_zeros((B, self.conv_dim, W - 1), dtype=_dtype(x))
        return conv_state, x.new_zeros((B, HV, K, V), dtype=torch.float32)
    if held.is_conv_states_initialized[0]:
        held.conv_states[0].zero_()
    else:
        held.lazy_initialization(
            conv_states=x.new_empty((B, self.conv_dim, 0), dtype=_dtype(x)), state_idx=0, conv_kernel_size=W
        )
    if held.is_recurrent_states_initialized[0]:
        held.recurrent_states[0].zero_()
    else:
        held.lazy_initialization(
            recurrent_states=x.new_empty((B, HV, K, V), dtype=torch.float32), state_idx=0
        )
    return held.conv_states[0], held.recurrent_states[0]


def _why_not(
    self: LinearAttention,
    parts: Family,
    x: torch.Tensor,
    cache: Cache | None,
    kwargs: dict[str, object],
    training: bool,
) -> str | None:
    """The reason why a call falls back to the layer's own forward, or None. Gradients may be wanted."""
    who = None if quiet() else onlooker()
    if who not in (None, FUNCTION_MODE):  # a function mode sees the mixer as one operator
        return f"{who} looks on"
    if not plain(x):
        return f"the tensor type {type(x).__name__}, or a lazy view"
    own = self.__dict__
    holds = own["_modules"].keys() | own["_parameters"].keys()
    gate = own["_modules"].get(parts.gate)
    if gate is not None:
        holds |= {
            f"{parts.gate}.{name}" for kind in ("_modules", "_parameters") for name in gate.__dict__[kind]
        }
    if holds != parts.holds:
        return f"other modules or parameters than {parts.name} is known for: {', '.join(sorted(holds ^ parts.holds))}"
    conv, norm = self.conv1d, getattr(self, parts.norm)
    if type(conv) is not torch.nn.Conv1d or conv._parameters.get("weight") is None:
        return f"its conv1d is a {type(conv).__name__}, which may compute its weight"
    if gate is not None and type(gate).__module__ != type(self).__module__:
        return f"its {parts.gate} is a {type(gate).__name__}"
    if not _is_norm(norm, type(self)):
        return f"its norm is a {type(norm).__name__}"
    if x.dtype not in _DTYPES or conv.weight.dtype not in (x.dtype, torch.float32):
        return f"inputs of {x.dtype} with weights of {conv.weight.dtype}"
    if _dtype(x) not in _DTYPES:
        return f"autocast to {_dtype(x)}"
    forced = dispatch.forced_by_env()
    if training and (x.device.type not in GRADIENT_DEVICES if forced is None else forced != "cpu"):
        return "gradients are wanted"
    if x.device.type not in MIXER_DEVICES if forced is None else forced not in ("cpu", "reference"):
        return (
            f"there is no native mixer for device {x.device.type}"
            if forced is None
            else f"{forced} has no mixer"
        )
    if self.activation not in ("silu", "swish"):
        return f"the activation {self.activation}"
    for module in (conv, norm) if gate is None else (conv, norm, gate):
        own = module.__dict__
        if _wrapped(module, x) or any(own[hooks] for hooks in _HOOKS):
            return f"hooks on its {type(module).__name__}"
    if of_all_modules._has_any_global_hook():  # its norm would not be called
        return "hooks on all modules"
    if norm.activation not in ("silu", "sigmoid"):
        return f"the norm's activation {norm.activation}"
    packed = _cu_seqlens(kwargs) is not None
    for name in kwargs:
        if (
            (name in _RULE_OPTIONS or name in _CONV_OPTIONS)
            and kwargs[name] is not None
            and kwargs[name] is not False
        ):
            return f"the argument {name}"
    if not packed and kwargs.get("seq_idx") is not None:
        return "seq_idx without cu_seq_lens_q"
    if cache is None:
        return None
    if packed:
        return "packed rows with a cache"
    return _why_not_cache(self, parts, x, cache, training)


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""Those that a call of a module runs, or sets up for the backward pass."""


def _wrapped(module: nn.Module, x: torch.Tensor) -> bool:
    """Whether other code runs around the forward of its class. A hook of accelerate does nothing if the module has its
    weights on x's device."""
    own = module.__dict__
    if "forward" not in own:
        return False
    hook = own.get("_hf_hook")
    return (
        getattr(getattr(own["forward"], "func", None), "__module__", None) != "accelerate.hooks"
        or f"{type(hook).__module__}.{type(hook).__name__}" not in _IDLE_HOOKS
        or getattr(hook, "offload", False)
        or getattr(own.get("_old_forward"), "__func__", None) is not type(module).forward
        or any(p.device != x.device for p in module.parameters())
    )


_IDLE_HOOKS = ("accelerate.hooks.ModelHook", "accelerate.hooks.AlignDevicesHook")


def _is_norm(norm: nn.Module, layer: type) -> bool:
    """Whether it is the family's own norm, neither wrapped nor with a computed weight."""
    kind = type(norm)
    return (
        kind.__module__ == layer.__module__
        and kind.__name__.endswith("RMSNormGated")
        and norm._parameters.get("weight") is not None
    )


@functools.cache
def _known_caches() -> tuple[type[Cache], type[LinearAttentionLayer]]:
    from transformers.cache_utils import Cache, LinearAttentionLayer

    return Cache, LinearAttentionLayer


def _why_not_cache(
    self: LinearAttention, parts: Family, x: torch.Tensor, cache: Cache, training: bool
) -> str | None:
    """The reason not to use the cache, or None: it only copies new states over old ones at the end of a step."""
    Cache, Known = _known_caches()
    layers = getattr(cache, "layers", None)
    if layers is None or self.layer_idx >= len(layers):
        return f"the cache {type(cache).__name__}"
    held, kind = layers[self.layer_idx], type(cache)
    if (
        kind.update_recurrent_state is not Cache.update_recurrent_state
        or kind.update_conv_state is not Cache.update_conv_state
        or getattr(type(held), "update_recurrent_state", None)
        not in (Known.update_recurrent_state, RollbackLayer.update_recurrent_state)
        or type(held).update_conv_state not in (Known.update_conv_state, RollbackLayer.update_conv_state)
    ):
        return f"the cache {kind.__name__} of {type(held).__name__}"
    if held.record_past and (training or not isinstance(held, RollbackLayer)):
        return "gradients are wanted" if training else "the cache records its past"
    if held.is_conv_states_initialized[0]:
        conv, state = held.conv_states[0], held.recurrent_states[0]
        if state is None:
            return "a cache with only a conv state" if held.has_previous_state[0] else None
        if conv.dtype != _dtype(x) or state.dtype not in (torch.float32, torch.bfloat16):
            return f"cached states of {conv.dtype} and {state.dtype}"
        if conv.shape[1] != self.conv_dim:
            raise ValueError(
                f"{parts.name}.mixer: requires a cache with windows of {self.conv_dim} channels; got {conv.shape[1]}, "
                "those of other heads. Make a new cache"
            )
        if conv.shape[0] != x.shape[0] or conv.shape[2] < self.conv_kernel_size - 1:
            return f"a conv state of {list(conv.shape)}"
        if conv.device != x.device or state.device != x.device:
            return "cached states on another device"
    return None
