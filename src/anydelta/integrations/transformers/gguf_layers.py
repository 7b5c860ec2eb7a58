"""A decoder layer whose matrices are GGUF blocks, for a few tokens: three calls instead of some forty.

Between two mixers a layer consists of norms, sums and products with matrices. For up to MAX_ROWS tokens these run as
two chains of anydelta.ggml, one before the mixer and one after it:

    x -> norm -> the projections          y, x -> output projection -> + x -> norm -> MLP -> + -> the layer's output

Between the two, attention stays Transformers' module, and so does linear attention while anydelta is disabled. A layer
with a part that is hooked, wrapped or replaced runs its own forward.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from ...core import native
from ...ggml.torch_ops import NUMBERS, Blocks
from ...rule.torch_ops import plain, quiet
from . import layer as mixers
from .families import BY_LAYER, Family, Projected

MAX_ROWS = 8
"""The most tokens of a chain: a decode step, or a round of drafts. For more, the larger products are faster."""

TYPES = {dtype: number for number, dtype in NUMBERS.items()}
"""Types of small matrices that a file holds unpacked."""

PROJECTIONS = ("in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b")
"""The projections of the families in GGUF files, in the order of `Projected`."""

MLP = ("gate_proj", "up_proj", "down_proj")


def fused(theirs: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A decoder layer's forward. `theirs` takes the calls that ours does not."""
    known: dict[int, _Layer | None] = {}

    @functools.wraps(theirs)
    def forward(self: nn.Module, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if torch.compiler.is_compiling() or not _takes(hidden_states):
            return theirs(self, hidden_states, *args, **kwargs)
        key = id(self)
        if key not in known:
            known[key] = _known(self)
            weakref.finalize(self, known.pop, key, None).atexit = False
        layer = known[key]
        if layer is None or not layer.is_as_it_was():
            if layer is not None:
                known[key] = _known(self)  # with the new parts, from the next call on
            return theirs(self, hidden_states, *args, **kwargs)
        return layer.run(self, hidden_states, args, kwargs)

    return forward


def _takes(x: torch.Tensor) -> bool:
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


def _known(layer: Any) -> _Layer | None:
    """The chains of a layer, or None if one of its parts is not known here."""
    m = layer._modules
    norms = [m.get("input_layernorm"), m.get("post_attention_layernorm")]
    mlp, mixer = m.get("mlp"), m.get("linear_attn")
    inner = mixer if mixer is not None else m.get("self_attn")
    dense = [] if mlp is None else [mlp._modules.get(n) for n in MLP]
    if (
        inner is None
        or len(m) != 4
        or not all(map(_is_norm, norms))
        or not dense
        or not all(map(_is_matrix, dense))
        or not any(map(is_packed, dense))
        or len(mlp._modules) != len(MLP) + 1
        or not is_silu(mlp._modules.get("act_fn"))
    ):
        return None
    projections: list[Any] = []
    if mixer is not None and _kind(mixer) in BY_LAYER:
        found = [mixer._modules.get(n) for n in (*PROJECTIONS, "out_proj")]
        if all(map(_is_matrix, found)):
            projections = found
    return _Layer(layer, norms, mlp, dense, mixer if projections else None, projections)


class _Chain:
    """A chain, its buffers for a call, and the matrices that it reads."""

    def __init__(self) -> None:
        self.native = native.core.Chain()
        self.given: list[int] = []
        self.blocks: list[Blocks] = []  # kept alive

    def buffer(self, width: int, given: bool = False) -> int:
        number = self.native.buffer(width)
        if given:
            self.given.append(number)
        return number

    def norm(self, x: int, module: Any, width: int) -> int:
        out = self.buffer(width)
        self.native.norm(x, out, module.weight.data_ptr(), module.eps, 1.0)
        return out

    def matrices(self, x: int, modules: Iterable[Any], gated: bool = False, given: bool = False) -> list[int]:
        blocks = [Blocks(m.weight, TYPES.get(m.weight.dtype, getattr(m, "ggml_type", -1))) for m in modules]
        self.blocks += blocks
        outs = [self.buffer(b.rows, given) for b in (blocks[:1] if gated else blocks)]
        self.native.matrices(x, [b.native for b in blocks], outs, gated)
        return outs

    def add(self, a: int, b: int, width: int, given: bool = False) -> int:
        out = self.buffer(width, given)
        self.native.add(a, b, out)
        return out

    def run(self, rows: int, *tensors: torch.Tensor) -> None:
        self.native.run(rows, self.given, [t.data_ptr() for t in tensors], torch.get_num_threads())


class _Layer:
    """The known parts of a decoder layer, and its chains."""

    def __init__(
        self, layer: Any, norms: list[Any], mlp: Any, dense: list[Any], mixer: Any, projections: list[Any]
    ):
        parts = [*norms, mlp, *dense, mlp.act_fn, *projections]
        owners = [layer, mlp, *([] if mixer is None else [mixer])]
        self.modules = [(o._modules, name, m) for o in owners for name, m in o._modules.items()]
        self.hooks: list[Mapping[Any, Any]] = [
            h for part in parts for h in (part._forward_hooks, part._forward_pre_hooks)
        ]
        self.own = [part.__dict__ for part in parts]
        held = [part._parameters for part in parts if "weight" in part._parameters]
        self.weights = [(own, own["weight"], own["weight"].data_ptr()) for own in held]
        self.classes = [(part, type(part).forward) for part in parts]
        self.constants = [(norm, norm.eps) for norm in norms]
        self.mixer = mixer
        self.family: Family = BY_LAYER.get(_kind(mixer))  # type: ignore[assignment]
        self.D: int = norms[0].weight.shape[0]
        self.widths: list[int] = []
        self.before = self._before(norms[0], projections[:-1])
        self.before_module = self._before(norms[0], [])
        self.behind_module = self._behind(norms[1], dense, None)
        self.behind = self._behind(norms[1], dense, projections[-1]) if mixer is not None else None

    def _before(self, norm: Any, projections: list[Any]) -> _Chain:
        """x -> norm -> each projection; without projections: x -> norm."""
        chain = _Chain()
        x = chain.buffer(self.D, given=True)
        normed = chain.norm(x, norm, self.D)
        if projections:
            outs = chain.matrices(normed, projections, given=True)
            self.widths = [chain.native.width(b) for b in outs]
        else:
            chain.given.append(normed)
        return chain

    def _behind(self, norm: Any, mlp: list[Any], out: Any) -> _Chain:
        """y, x -> output projection, if given -> + x -> norm -> MLP -> + : the result."""
        chain, D = _Chain(), self.D
        if out is None:
            y = chain.buffer(D, given=True)
        else:
            order = getattr(out, "input_permutation", None)
            width = out.in_features
            y = given = chain.buffer(width, given=True)
            if order is not None and not torch.equal(order, torch.arange(width, device=order.device)):
                y = chain.buffer(width)
                chain.native.pick(given, y, order.tolist())
        x = chain.buffer(D, given=True)
        if out is not None:
            (y,) = chain.matrices(y, [out])
        added = chain.add(x, y, D)
        (hidden,) = chain.matrices(chain.norm(added, norm, D), mlp[:2], gated=True)
        (last,) = chain.matrices(hidden, mlp[2:])
        chain.add(added, last, D, given=True)
        return chain

    # ---- A call

    def is_as_it_was(self) -> bool:
        """Whether no part has been hooked, wrapped or replaced since."""
        return not (
            any(self.hooks)
            or _has_any_global_hook()
            or any("forward" in own for own in self.own)
            or any(type(part).forward is not forward for part, forward in self.classes)
            or any(norm.eps != eps for norm, eps in self.constants)
            or any(owner.get(name) is not module for owner, name, module in self.modules)
            or any(own.get("weight") is not w or w.data_ptr() != at for own, w, at in self.weights)
        )

    def run(
        self, layer: nn.Module, x: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> torch.Tensor:
        names = ("position_embeddings", "attention_mask", "position_ids", "cache")
        given = dict(zip(names, args, strict=False)) | kwargs
        rows = x.shape[0] * x.shape[1]
        result = torch.empty_like(x)
        y = None if self.mixer is None else self._mixed(x, rows, given)
        if y is not None and self.behind is not None:
            self.behind.run(rows, y, x, result)
        else:
            self.behind_module.run(rows, self._inner(layer, x, rows, given), x, result)
        return result

    def _mixed(self, x: torch.Tensor, rows: int, given: dict[str, Any]) -> torch.Tensor | None:
        """The mixer's output. None: it is off, or does not take the call."""
        mixer = self.mixer
        if mixer._forward_hooks or mixer._forward_pre_hooks:
            return None  # a hook or a tracer must see the module itself
        rest = {k: v for k, v in given.items() if k not in ("position_embeddings", "position_ids")}
        cache = rest.pop("cache", None)
        if rest.pop("attention_mask", None) is not None:
            return None

        def project(x: torch.Tensor) -> Projected:
            qkv, z, a, b = outs = [x.new_empty((*x.shape[:2], width)) for width in self.widths]
            self.before.run(rows, x, *outs)
            return Projected(qkv, z, a, b, mixer.A_log, mixer.dt_bias)

        return mixers.mixed(mixer, self.family, x, cache, rest, project)

    def _inner(self, layer: nn.Module, x: torch.Tensor, rows: int, given: dict[str, Any]) -> torch.Tensor:
        """Attention or a mixer that is not ours, called as the layer calls it."""
        normed = torch.empty_like(x)
        self.before_module.run(rows, x, normed)
        modules: dict[str, Any] = layer._modules
        y: torch.Tensor
        if "linear_attn" in modules:
            rest = {k: v for k, v in given.items() if k not in ("position_embeddings", "position_ids")}
            y = modules["linear_attn"](hidden_states=normed, **rest)
        else:
            y = modules["self_attn"](hidden_states=normed, **given)[0]
        return y if y.is_contiguous() and y.dtype == torch.float32 else y.float().contiguous()


def _kind(module: nn.Module | None) -> tuple[str, str]:
    return type(module).__module__, type(module).__name__


def is_silu(module: Any) -> bool:
    return type(module).__name__ == "SiLUActivation" and is_free(module)


def is_free(module: Any) -> bool:
    """Whether a module has no hook and no wrapper."""
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def is_plain(module: Any) -> bool:
    """Whether a matrix has no bias, no hook and no wrapper."""
    return module is not None and module._parameters.get("bias") is None and is_free(module)


def _is_norm(module: Any) -> bool:
    """Whether it is a norm of these families: one plus the weight, in float32."""
    weight = None if module is None else module._parameters.get("weight")
    return (
        type(module).__name__ in ("Qwen3_5RMSNorm", "Qwen3_5MoeRMSNorm")
        and weight is not None
        and weight.dtype == torch.float32
        and weight.device.type == "cpu"
    )


def _is_matrix(module: Any) -> bool:
    if module is None or module._parameters.get("bias") is not None:
        return False
    weight = module._parameters.get("weight")
    if weight is None or weight.device.type != "cpu" or not plain(weight):
        return False
    return is_packed(module) or (type(module) is nn.Linear and weight.dtype in TYPES)


def is_packed(module: object) -> bool:
    """Whether a matrix is held in the blocks of a file."""
    return type(module).__name__ == "GgufLinear"
