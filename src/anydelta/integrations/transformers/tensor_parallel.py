"""Tensor parallelism of Transformers: each process has its share of the heads of linear attention.

    torchrun --nproc-per-node 2 program.py

    adt.enable()
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=2))

Transformers' own plan gathers the projections and runs the whole mixer in every process. Here a loaded layer becomes a
smaller one of the same class: the rows of its projections, the channels of its convolution, its decays and the columns
of its output projection that belong to the heads of its rank. Its input is whole in every process, its output is summed
over them. The mixer, our rule and Transformers' own functions, caches too, see a layer with fewer heads.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from ..switch import Patch, Place, guarded, warn
from . import layer as mixers
from .families import BY_LAYER, COLUMNS, QKV, SHARES, WHOLE, Family

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedConfig, PreTrainedModel


class Ranks(NamedTuple):
    """Which share of the heads."""

    rank: int
    size: int

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.size}"


_SHARE = "_anydelta_share"
"""The attribute of a layer, and of the config of its model, with what it has."""
_WHY_NOT = "_anydelta_whole"
"""The attribute of a model with the reason why its layers are whole."""
_COUNTS = ("num_v_heads", "num_k_heads", "num_heads", "key_dim", "value_dim", "qkv_dim", "conv_dim")
"""Attributes of layers and gates that a share has fewer of."""


def share_of(layer: nn.Module) -> Share | None:
    """What a layer has of its heads; None: all."""
    found = vars(layer).get(_SHARE)
    return found if isinstance(found, Share) else None


def ranks_of(config: PreTrainedConfig) -> Ranks | None:
    """Among which processes the heads of a model with this config are split; None: they are whole."""
    return getattr(getattr(config, "distributed_config", None), _SHARE, None)


def why_whole(model: nn.Module) -> str | None:
    """Why the layers of a distributed model have all heads in every process; None where that is not so."""
    if not _is_distributed(model) or any(share_of(layer) for _, layer, _ in _layers(model)):
        return None
    return getattr(model, _WHY_NOT, None) or (
        "it was loaded before enable(): enable(model), in every process, splits them"
    )


# ---- The layers of a model


def split(model: nn.Module) -> None:
    """Leave the layers of a model that Transformers distributed the heads of this rank; every process calls it.

    Where a layer does not fit, all layers stay as Transformers' plan has them, and one warning says why.
    """
    layers = [found for found in _layers(model) if share_of(found[1]) is None]
    if not layers or not _is_distributed(model):
        return
    whole: Any = model
    mesh = whole._mesh_manager.get_mesh("tp")
    ranks = Ranks(mesh.get_local_rank(), mesh.size())
    why_not = _why_not_model(whole, layers, ranks)
    if why_not is not None:
        if getattr(model, _WHY_NOT, None) != why_not and torch.distributed.get_rank() == 0:
            warn(
                f"anydelta: the heads of {type(model).__name__} stay whole in every process, as Transformers' plan "
                f"has them: {why_not}"
            )
        setattr(model, _WHY_NOT, why_not)
        return
    for _, layer, parts in layers:
        _split(layer, parts, mesh)
    distributed = copy.copy(whole.config.distributed_config)
    setattr(distributed, _SHARE, ranks)
    whole.config.distributed_config = distributed
    whole.config.get_text_config(decoder=True).distributed_config = distributed
    for module in model.modules():
        if hasattr(module, _GATHER) and any(share_of(m) for m in module.modules()):
            setattr(module, _GATHER, _gathered)
            setattr(module, _SPREAD, _refuse_distributed_checkpoint)


def _is_distributed(model: nn.Module) -> bool:
    return getattr(model, "_mesh_manager", None) is not None and (getattr(model, "_tp_size", None) or 1) > 1


def _layers(model: nn.Module) -> Iterator[tuple[str, Any, Family]]:
    for name, module in model.named_modules():
        for cls in type(module).__mro__:
            if (parts := BY_LAYER.get((cls.__module__, cls.__name__))) is not None:
                yield name, module, parts
                break


def _why_not_model(model: Any, layers: list[tuple[str, Any, Family]], ranks: Ranks) -> str | None:
    distributed = model.config.distributed_config
    for name, what in (("dp_size", "FSDP"), ("pp_size", "pipeline parallelism")):
        if getattr(distributed, name, 1) > 1:
            return f"there is {what} beside tensor parallelism"
    for name, layer, parts in layers:
        if (why_not := _why_not(layer, parts, ranks.size)) is not None:
            return f"{name}: {why_not}"
    return None


def _heads(layer: Any, parts: Family) -> tuple[int, int]:
    HV = getattr(layer, parts.heads[0])
    return getattr(layer, "num_k_heads", HV), HV


def _why_not(layer: Any, parts: Family, size: int) -> str | None:
    """The reason why a layer cannot be split, or None. It is the same in all processes, and nothing is changed."""
    H, HV = _heads(layer, parts)
    if H % size or HV % size:
        return f"{H} key and {HV} value heads do not divide by {size} processes"
    runs, held = _runs(layer, parts), {name for name, _ in _owners(layer, parts)}
    if held != parts.holds - {parts.gate}:
        return f"it has other modules or parameters than {parts.name} is known for"
    for name, owner in _owners(layer, parts):
        kind = type(owner)
        if isinstance(owner, nn.Parameter):
            params = {name: owner}
        else:
            if SHARES[name] is not WHOLE and kind not in (nn.Linear, nn.Conv1d):
                return f"its {name} is a {kind.__module__}.{kind.__name__}, whose weights are quantised or wrapped"
            if "forward" in vars(owner) and not _is_planned(owner):
                return f"its {name} has a forward of its own"
            params = dict(owner.named_parameters())
        for p in params.values():
            local = getattr(p.data, "_local_tensor", p.data)
            if type(local) not in (torch.Tensor, nn.Parameter) or not p.is_floating_point():
                return f"its {name} is of {type(local).__name__} {p.dtype}: quantised weights are not split"
            if SHARES[name] is COLUMNS and p.ndim == 1:
                return f"its {name} has a bias"
            if SHARES[name] is not WHOLE:
                length = p.shape[_axis(name, p.shape)]
                if length != sum(runs) if SHARES[name] is QKV else length % H:
                    return f"its {name} is {list(p.shape)}, which does not fit its heads"
    return None


def _owners(layer: Any, parts: Family) -> Iterator[tuple[str, nn.Module | nn.Parameter]]:
    """The modules and parameters that `Family.holds` names."""
    for module, before in ((layer, ""), (layer._modules.get(parts.gate), f"{parts.gate}.")):
        if module is not None:
            for name, x in (*module._modules.items(), *module._parameters.items()):
                if name != parts.gate:
                    yield before + name, x


def _is_planned(module: nn.Module) -> bool:
    """Whether its forward is one that Transformers' plan has put there."""
    forward = vars(module)["forward"]
    return str(getattr(forward, "__module__", "")).startswith("transformers.distributed.")


def _is_dtensor(x: object) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(x, DTensor)


def _split(layer: Any, parts: Family, mesh: DeviceMesh) -> None:
    size = mesh.size()
    share = Share(Ranks(mesh.get_local_rank(), size), mesh.get_group(), _heads(layer, parts)[1])
    runs = _runs(layer, parts)
    for name, owner in list(_owners(layer, parts)):
        path = tuple(name.split("."))
        if isinstance(owner, nn.Parameter):
            path, names = path[:-1], [path[-1]]
        else:
            vars(owner).pop("forward", None)
            names = [n for n, p in owner._parameters.items() if p is not None]
        holder = _at(layer, path)
        for n in names:
            holder._parameters[n] = _shared(holder._parameters[n], name, runs, mesh)
            if SHARES[name] is WHOLE:
                share.whole.append((path, n))
            else:
                share.spread.append((path, n, type(holder)))
        if isinstance(owner, nn.Conv1d):
            owner.in_channels = owner.out_channels = owner.groups = owner.groups // size
        elif SHARES[name] is COLUMNS:
            owner.in_features //= size  # type: ignore[union-attr, operator]
        elif isinstance(owner, nn.Linear) and SHARES[name] is not WHOLE:
            owner.out_features //= size
    for module in (layer, layer._modules.get(parts.gate)):
        for name in _COUNTS:
            if module is not None and name in vars(module):
                setattr(module, name, vars(module)[name] // size)
    setattr(layer, _SHARE, share)
    layer.register_forward_pre_hook(share.enter, with_kwargs=True)
    layer.register_forward_hook(share.leave, prepend=True, always_call=True)
    mixers.forget(layer)


def _runs(layer: Any, parts: Family) -> tuple[int, int, int]:
    """The channels of q, k and v side by side."""
    H, HV = _heads(layer, parts)
    K, V = (getattr(layer, name) for name in parts.heads[1:])
    return H * K, H * K, HV * V


def _axis(name: str, shape: torch.Size) -> int:
    """The axis of a parameter along which its heads lie."""
    if SHARES[name] is COLUMNS:
        return 1
    # Kimi-Linear has A_log as [1, 1, HV, 1].
    return 0 if len(shape) < 4 else max(range(len(shape)), key=shape.__getitem__)


@torch.no_grad()
def _shared(p: Any, name: str, runs: tuple[int, ...], mesh: DeviceMesh) -> nn.Parameter:
    """A rank's share of a parameter that is whole, or that Transformers' plan has spread.

    It stays a DTensor, from which optimisers, norms of gradients and files know that it is a share.
    """
    from torch.distributed.tensor import DTensor, Shard

    whole = (p.full_tensor() if _is_dtensor(p) else p).detach()
    if SHARES[name] is WHOLE:
        return p if not _is_dtensor(p) else nn.Parameter(whole, requires_grad=p.requires_grad)
    axis = _axis(name, whole.shape)
    pieces = whole.split(runs if SHARES[name] is QKV else whole.shape[axis], axis)
    mine = torch.cat([piece.chunk(mesh.size(), axis)[mesh.get_local_rank()] for piece in pieces], axis)
    shared = DTensor.from_local(mine.contiguous(), mesh, [Shard(axis)], run_check=False)
    return nn.Parameter(shared, requires_grad=p.requires_grad)


# ---- A call of a layer


class Share:
    """What a layer has of its heads, and its hooks.

    During a call the layer's parameters are plain tensors. Its output, and the gradient of its input, are sums over the
    ranks.
    """

    def __init__(self, ranks: Ranks, group: ProcessGroup, HV: int):
        self.ranks, self.group = ranks, group
        self.HV = HV
        """Value heads of the whole layer."""
        self.spread: list[tuple[tuple[str, ...], str, type[nn.Module]]] = []
        """The parameters of which the layer has a part: their modules, by name and class."""
        self.whole: list[tuple[tuple[str, ...], str]] = []
        """Those that it has whole, and uses on its own heads."""
        self._held: list[tuple[nn.Module, str, nn.Parameter]] = []

    def __str__(self) -> str:
        part = self.HV // self.ranks.size
        first = self.ranks.rank * part
        some = f"value head {first}" if part == 1 else f"value heads {first} to {first + part - 1}"
        return f"{some} of {self.HV} ({self.ranks})"

    def __deepcopy__(self, memo: dict[int, object]) -> Share:
        memo[id(self)] = out = Share(self.ranks, self.group, self.HV)
        out.spread, out.whole = self.spread, self.whole
        return out

    def enter(
        self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self._put_back()  # what an interrupt has left
        gradients = torch.is_grad_enabled()
        for path, name, kind in self.spread:
            module = _at(layer, path)
            if path and not (isinstance(module, kind) and name in module._parameters):
                raise ValueError(
                    f"tensor parallelism: requires the layer's own {'.'.join(path)} to run split heads; got a "
                    f"{type(module).__module__}.{type(module).__name__}. Load the model under disable()"
                )
            p: Any = module._parameters[name]
            self._held.append((module, name, p))
            module._parameters[name] = p.to_local() if gradients else p._local_tensor
        if not gradients:
            return None
        for path, name in self.whole:
            self._sum_gradients(_at(layer, path)._parameters[name])
        if args:
            return (self._entered(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self._entered(kwargs["hidden_states"])}

    def leave(self, layer: nn.Module, args: object, out: torch.Tensor | None) -> torch.Tensor | None:
        self._put_back()
        if out is None:  # the call has failed
            return None
        if torch.is_grad_enabled() and out.requires_grad:
            summed: torch.Tensor = _Leave.apply(out, self.group)  # type: ignore[no-untyped-call]
            return summed
        torch.distributed.all_reduce(out, group=self.group)
        return out

    def _entered(self, x: torch.Tensor) -> torch.Tensor:
        entered: torch.Tensor = _Enter.apply(x, self.group)  # type: ignore[no-untyped-call]
        return entered

    def _put_back(self) -> None:
        for module, name, p in self._held:
            module._parameters[name] = p
        self._held.clear()

    def _sum_gradients(self, p: Any) -> None:
        if p.requires_grad and not getattr(p, _SHARE, False):
            p.register_hook(self._sum)
            setattr(p, _SHARE, True)

    def _sum(self, gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(gradient, group=self.group)
        return gradient


def _at(layer: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        layer = layer._modules[name]
    return layer


class _Enter(torch.autograd.Function):
    """The same in all ranks, with the sum of their gradients."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(gradient, group=ctx.group)
        return gradient, None


class _Leave(torch.autograd.Function):
    """The sum over the ranks, whose gradient is the same in each."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


# ---- Files


_GATHER, _SPREAD = "gather_sharded_state_dict_for_save", "save_distributed_checkpoint"


def _gathered(model_to_save: Any, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
    """What `save_pretrained` writes: whole layers. Every process calls it, as Transformers demands."""
    method = getattr(type(model_to_save), _GATHER)
    state_dict: dict[str, torch.Tensor] = method(model_to_save, model_to_save, *args, **kwargs)
    for before, layer, parts in _layers(model_to_save):
        share = share_of(layer)
        for path, name, _ in () if share is None else share.spread:
            key = ".".join((*([before] if before else ()), *path, name))
            if share is not None and SHARES.get(".".join(path)) is QKV and key in state_dict:
                state_dict[key] = _in_order(state_dict[key], _runs(layer, parts), share.ranks.size)
    return state_dict


def _in_order(x: torch.Tensor, runs: tuple[int, ...], size: int) -> torch.Tensor:
    """From q, k and v of one rank after another to q, k and v of all; `runs` are those of a rank."""
    pieces = [rank.split(runs) for rank in x.chunk(size)]
    return torch.cat([x for run in zip(*pieces, strict=True) for x in run])


def _refuse_distributed_checkpoint(model_to_save: object, *args: object, **kwargs: object) -> None:
    raise ValueError(
        "save_pretrained: requires distributed_checkpoint=False for a model whose heads anydelta has split; got True. "
        "Leave it out: the file then has whole layers"
    )


# ---- What is put into Transformers


def patches(place: Place) -> Iterator[Patch]:
    """What `enable()` puts in place: models that are loaded with tensor parallelism are split.

    Raises:
        ImportError: this Transformers distributes models in another way.
    """
    from transformers.distributed.mixin import DistributedMixin
    from transformers.modeling_utils import PreTrainedModel

    if hasattr(DistributedMixin, "_mesh_manager") and hasattr(PreTrainedModel, _LOADED):
        yield Patch(PreTrainedModel, _LOADED, lambda theirs: _loading(theirs, place))


_LOADED = "_finalize_model_loading"


def _loading(theirs: staticmethod[..., Any], place: Place) -> staticmethod[..., Any]:
    function = theirs.__func__

    def ours(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        result = function(model, *args, **kwargs)
        split(model)
        return result

    return staticmethod(guarded(function, ours, place, name=_LOADED))
