"""A decoder layer whose matrices are blocks of a GGUF file, for a few tokens: three calls in place of some forty.

Between its mixer and the next one a layer is norms, sums and products with matrices. For up to MAX_ROWS tokens these
are two chains of anydelta.ggml's, one before the mixer and one behind:

    x -> norm -> the projections          y, x -> output projection -> + x -> norm -> MLP -> + -> the layer's output

Attention, and linear attention while anydelta is disabled, stay Transformers' modules between the two. Whoever hooks,
wraps or replaces a part of the layer gets the layer's own forward.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from ...core.native import core
from ...ggml.torch_ops import Blocks
from ...rule.torch_ops import plain, quiet
from . import layer as mixers
from .families import BY_LAYER, Projected

if TYPE_CHECKING:
    from .families import Family

MAX_ROWS = 8
"""Tokens of a chain: those of a decode step, or of a round of drafts. More are left to larger products."""

TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}
"""Numbers as ggml numbers them: small matrices that a file holds as they are."""


def fused(theirs: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A decoder layer's forward; `theirs` takes what ours does not."""
    known: dict[int, _Layer | None] = {}

    @functools.wraps(theirs)
    def forward(self: nn.Module, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return theirs(self, hidden_states, *args, **kwargs)
        key = id(self)
        if key not in known:
            known[key] = _Layer.of(self)
            weakref.finalize(self, known.pop, key, None).atexit = False
        layer = known[key]
        if layer is None or not layer.takes(hidden_states):
            return theirs(self, hidden_states, *args, **kwargs)
        if not layer.is_as_it_was(self):
            del known[key]  # to be looked at again
            return theirs(self, hidden_states, *args, **kwargs)
        return layer.run(self, hidden_states, args, kwargs)

    return forward


class _Layer:
    """What is known of a decoder layer, and its chains."""

    def __init__(self, modules: Iterable[nn.Module], layer: nn.Module):
        self.parts = [layer, *modules]
        self.modules: list[tuple[Mapping[str, Any], str, nn.Module]] = []
        self.weights: list[tuple[Mapping[str, Any], torch.Tensor, int]] = []
        self.hooks: list[Mapping[Any, Any]] = []
        self.forwards: list[Mapping[str, Any]] = []
        for owner in self.parts:
            self.modules += [(owner._modules, name, m) for name, m in owner._modules.items() if m is not None]
        for module in self.parts[1:]:
            self.hooks += [module._forward_hooks, module._forward_pre_hooks]
            self.forwards.append(module.__dict__)
            weight = module._parameters.get("weight")
            if weight is not None:
                self.weights.append((module._parameters, weight, weight.data_ptr()))
        self.blocks: list[Blocks] = []  # kept alive for the chains
        self.linear: tuple[nn.Module, Family] | None = None

    @classmethod
    def of(cls, layer: nn.Module) -> _Layer | None:
        """The chains of this layer, or None where one of its parts is not what is known."""
        m = layer._modules
        first, second, mlp = m.get("input_layernorm"), m.get("post_attention_layernorm"), m.get("mlp")
        attention, mixer = m.get("self_attn"), m.get("linear_attn")
        inner = mixer if mixer is not None else attention
        if first is None or second is None or mlp is None or inner is None:
            return None
        dense = [mlp._modules.get(n) for n in ("gate_proj", "up_proj", "down_proj")]
        if (
            set(m) - {"input_layernorm", "post_attention_layernorm", "mlp", "self_attn", "linear_attn"}
            or not all(_is_norm(n) for n in (first, second))
            or any(x is None or not _is_matrix(x) for x in dense)
            or type(mlp._modules.get("act_fn")).__name__ not in ("SiLUActivation", "SiLU")
            or len(mlp._modules) != 4
        ):
            return None
        family = BY_LAYER.get((type(inner).__module__, _class_name(inner))) if mixer is not None else None
        fuse = (
            family is not None
            and family.name in ("qwen3_5", "qwen3_5_moe")
            and all(
                _is_matrix(inner._modules[n])
                for n in ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj")
            )
        )
        projections = (
            [inner._modules[n] for n in ("in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b")]
            if fuse
            else []
        )
        out = [inner._modules["out_proj"]] if fuse else []
        made = cls([first, second, mlp, *dense, *projections, *out], layer)  # type: ignore[list-item]
        if fuse and family is not None:
            made.linear = (inner, family)
        D = first.weight.shape[0]
        made.before = made._before(D, first, projections)
        made.norm_only = made._before(D, first, [])
        made.behind = made._behind(D, second, dense, None)
        made.behind_mixer = made._behind(D, second, dense, out[0]) if fuse else None
        return made

    # ---- Chains

    def _matrix(self, module: nn.Module) -> core.Blocks:
        weight = module.weight
        type_ = TYPES.get(weight.dtype, getattr(module, "ggml_type", -1))
        self.blocks.append(Blocks(weight, type_))
        return self.blocks[-1].native

    def _before(self, D: int, norm: nn.Module, projections: list[nn.Module]) -> tuple[core.Chain, list[int], list[int]]:
        """x -> norm -> each projection, or the norm alone: the chain, its buffers, and the widths of its outputs."""
        chain = core.Chain()
        x, normed = chain.buffer(D), chain.buffer(D)
        chain.norm(x, normed, norm.weight.data_ptr(), norm.eps, 1.0)
        if not projections:
            return chain, [x, normed], [D]
        matrices = [self._matrix(p) for p in projections]
        widths = [self.blocks[-len(matrices) + i].rows for i in range(len(matrices))]
        outs = [chain.buffer(w) for w in widths]
        chain.matrices(normed, matrices, outs, False)
        return chain, [x, *outs], widths

    def _behind(
        self, D: int, norm: nn.Module, mlp: list[Any], out: nn.Module | None
    ) -> tuple[core.Chain, list[int]]:
        """y, x -> [output projection] -> + x -> norm -> MLP -> + : the chain, and its buffers y, x and result."""
        chain = core.Chain()
        width = D if out is None else out.weight.shape[-1]
        matrix = None if out is None else self._matrix(out)
        if matrix is not None:
            width = self.blocks[-1].n
        y, x, added = chain.buffer(width), chain.buffer(D), chain.buffer(D)
        inner = y
        if matrix is not None:
            order = getattr(out, "input_permutation", None)
            if order is not None and not torch.equal(order, torch.arange(width)):
                inner = chain.buffer(width)
                chain.pick(y, inner, order.tolist())
            projected = chain.buffer(D)
            chain.matrices(inner, [matrix], [projected], False)
            inner = projected
        chain.add(x, inner, added)
        normed, result = chain.buffer(D), chain.buffer(D)
        chain.norm(added, normed, norm.weight.data_ptr(), norm.eps, 1.0)
        gate, up, down = (self._matrix(m) for m in mlp)
        hidden, last = chain.buffer(self.blocks[-1].n), chain.buffer(D)
        chain.matrices(normed, [gate, up], [hidden], True)
        chain.matrices(hidden, [down], [last], False)
        chain.add(added, last, result)
        return chain, [y, x, result]

    # ---- A call

    def takes(self, x: torch.Tensor) -> bool:
        return (
            type(x) is torch.Tensor
            and x.ndim == 3
            and 0 < x.shape[0] * x.shape[1] <= MAX_ROWS
            and x.dtype is torch.float32
            and x.device.type == "cpu"
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
            and quiet()
            and plain(x)
            and x.is_contiguous()
        )

    def is_as_it_was(self, layer: nn.Module) -> bool:
        """Whether nobody has hooked, wrapped or replaced a part since."""
        return not (
            any(self.hooks)
            or _has_any_global_hook()
            or any("forward" in own for own in self.forwards)
            or any(owner.get(name) is not module for owner, name, module in self.modules)
            or any(own.get("weight") is not w or w.data_ptr() != at for own, w, at in self.weights)
        )

    def run(self, layer: nn.Module, x: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        m, threads = x.shape[0] * x.shape[1], torch.get_num_threads()
        names = ("position_embeddings", "attention_mask", "position_ids", "cache")
        given = dict(zip(names, args, strict=False)) | kwargs
        y = None
        if self.linear is not None:
            y = self._mixed(x, m, threads, given)
        chain, buffers = self.behind if y is None else self.behind_mixer  # type: ignore[misc]
        if y is None:
            y = self._inner(layer, x, m, threads, given)
        result = torch.empty_like(x)
        chain.run(m, buffers, [y.data_ptr(), x.data_ptr(), result.data_ptr()], threads)
        return result

    def _mixed(self, x: torch.Tensor, m: int, threads: int, given: dict[str, Any]) -> torch.Tensor | None:
        """The mixer's output for a step that goes on from the last one; None: another call."""
        assert self.linear is not None
        mixer, _ = self.linear
        cache = given.get("cache", given.get("past_key_values"))
        rest = {k: v for k, v in given.items() if k not in ("cache", "past_key_values", "position_embeddings")}
        if rest.pop("attention_mask", None) is not None:
            return None
        found = mixers.next_step(mixer, x, cache, rest)
        if found is None:
            return None
        step, held = found
        chain, buffers, widths = self.before
        outs = [torch.empty((*x.shape[:2], w)) for w in widths]
        chain.run(m, buffers, [x.data_ptr(), *(o.data_ptr() for o in outs)], threads)
        qkv, z, a, b = outs
        p = Projected(qkv, z, a, b, mixer.A_log, mixer.dt_bias)
        return step.advance(mixer, p, held)

    def _inner(
        self, layer: nn.Module, x: torch.Tensor, m: int, threads: int, given: dict[str, Any]
    ) -> torch.Tensor:
        """Attention, or a mixer that is not ours, as the layer calls it."""
        normed = torch.empty_like(x)
        chain, buffers, _ = self.norm_only
        chain.run(m, buffers, [x.data_ptr(), normed.data_ptr()], threads)
        y: torch.Tensor
        if "linear_attn" in layer._modules:
            given = {k: v for k, v in given.items() if k not in ("position_embeddings", "position_ids")}
            y = layer._modules["linear_attn"](hidden_states=normed, **given)
        else:
            y = layer._modules["self_attn"](hidden_states=normed, **given)[0]
        return y if y.is_contiguous() and y.dtype == torch.float32 else y.float().contiguous()


def _class_name(module: nn.Module) -> str:
    return type(module).__name__


def _is_norm(module: nn.Module) -> bool:
    """Of these families: one plus the weight, in float32."""
    weight = module._parameters.get("weight")
    return (
        type(module).__name__ in ("Qwen3_5RMSNorm", "Qwen3_5MoeRMSNorm")
        and weight is not None
        and weight.dtype == torch.float32
    )


def _is_matrix(module: nn.Module) -> bool:
    if module._parameters.get("bias") is not None:
        return False
    if type(module).__name__ == "GgufLinear":
        return module.weight.device.type == "cpu"
    return type(module) is nn.Linear and module.weight.dtype in TYPES and module.weight.device.type == "cpu"
