"""GGUF files in Transformers on a CPU: the weights stay in their packed blocks, and ggml multiplies with them.

    adt.enable()
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model-Q4_K_M.gguf")

Transformers keeps the blocks if it finds a kernel for the device. It has none for CPUs, so there it unpacks the whole
model. While anydelta is enabled, the loader finds our kernel (anydelta.ggml) and knows all types of ggml. A model that
was loaded this way keeps our products after `disable()`: nothing else can read its weights. A model that goes to an
accelerator is left to Transformers.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from types import MethodType, ModuleType
from typing import Any

import torch
from torch import nn

from ...ggml import torch_ops
from ...ggml.library import GgmlError, library
from ...rule.torch_ops import watched
from ..switch import Patch, Place, guarded, warn
from . import gguf_layers, gguf_mtp

_AT = "transformers.integrations.gguf"
_LOADER = "transformers.quantizers.quantizer_gguf"


FILE = "_anydelta_gguf_file"
"""The attribute of a decoder that names the GGUF file it was loaded from. Copies and pickles keep it."""


class Kernel:
    """The kernel that Transformers' loader asks for: ours for blocks on the CPU, theirs or none for others."""

    def __init__(self, theirs: Any):
        self.theirs = theirs
        self.gemv_types = frozenset(library().kinds)

    def supports(self, ggml_type: int) -> bool:
        return ggml_type in self.gemv_types


def patches(place: Place) -> Iterator[Patch]:
    """What `enable()` replaces; nothing if this Transformers cannot keep blocks packed."""
    if importlib.util.find_spec(_LOADER) is None or importlib.util.find_spec(f"{_AT}.kernels") is None:
        return
    loader = importlib.import_module(_LOADER)
    if not hasattr(loader, "get_gguf_kernel"):
        return
    quantizer = loader.GgufHfQuantizer
    yield Patch(loader, "get_gguf_kernel", lambda theirs: guarded(theirs, _finding(theirs), place))
    yield Patch(
        loader,
        "get_gguf_conversion_mapping",
        lambda theirs: guarded(theirs, _mapping(theirs), place),
    )
    yield Patch(
        importlib.import_module(_AT),
        "get_gguf_config",
        lambda theirs: guarded(theirs, _config(theirs), place),
    )
    made: dict[str, Callable[[Any], Any]] = {
        "update_device_map": _placing,
        "read_header": _reading,
        "_process_model_after_weight_loading": _finishing,
    }
    for name, make in made.items():
        yield Patch(quantizer, name, functools.partial(_guarded, make, name, place))


def _guarded(make: Callable[[Any], Any], name: str, place: Place, theirs: Any) -> Any:
    return guarded(theirs, make(theirs), place, name=name)


def _config(theirs: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """get_gguf_config, with the MTP layers of the file."""

    @functools.wraps(theirs)
    def get_gguf_config(metadata: dict[str, Any], tensor_names: tuple[str, ...]) -> dict[str, Any]:
        found = theirs(metadata, tensor_names)
        if n := gguf_mtp.count(metadata):
            found |= {"num_mtp_layers": n, "mtp_layer_types": ["full_attention"] * n}
        return found

    return get_gguf_config


def _mapping(theirs: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """get_gguf_conversion_mapping, which also keeps MTP layers after the first out of the model."""

    @functools.wraps(theirs)
    def get_gguf_conversion_mapping(architecture: str, config: Any) -> list[Any]:
        renaming = importlib.import_module("transformers.core_model_loading").WeightRenaming
        text = config.get_text_config()
        last = text.num_hidden_layers
        more = range(last + 1, last + (getattr(text, "num_mtp_layers", None) or 0))
        return [*(renaming(rf"^blk\.{i}\.", "mtp.") for i in more), *theirs(architecture, config)]

    return get_gguf_conversion_mapping


def _finding(theirs: Callable[[], Any]) -> Callable[[], Any]:
    """get_gguf_kernel: our kernel around the one that is there."""

    def get_gguf_kernel() -> Any:
        found = theirs()
        if not found and not _on_cpu.get():
            return found
        try:
            library()
        except GgmlError as error:
            warn(f"anydelta: Transformers unpacks the GGUF weights: {error}")
            return found
        _serve()
        return Kernel(found)

    return get_gguf_kernel


_on_cpu: ContextVar[bool] = ContextVar(
    "whether the model that is being loaded will run on the CPU", default=True
)
_PLACES = "_anydelta_device_map"


def _placing(theirs: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """update_device_map, which the loader calls first. Ours remembers where the model goes."""

    @functools.wraps(theirs)
    def update_device_map(self: Any, device_map: Any) -> Any:
        self.__dict__[_PLACES] = device_map
        return theirs(self, device_map)

    return update_device_map


def runs_on_cpu(device_map: Any) -> bool:
    """Whether a model with this device map runs on the CPU. Without a map, callers may move it to an accelerator."""
    if device_map is None or device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        return not torch.accelerator.is_available()
    places = device_map.values() if isinstance(device_map, Mapping) else [device_map]
    return all(str(place) in ("cpu", "disk") for place in places)


def _reading(theirs: Callable[..., None]) -> Callable[..., None]:
    """read_header, with the sizes of all types of ggml. Transformers knows only some."""

    @functools.wraps(theirs)
    def read_header(self: Any, gguf_file: str) -> None:
        learn_types()
        token = _on_cpu.set(runs_on_cpu(vars(self).get(_PLACES)))
        try:
            theirs(self, gguf_file)
        finally:
            _on_cpu.reset(token)

    return read_header


def learn_types() -> None:
    """Let Transformers read all types of ggml, if ggml is installed."""
    try:
        kinds = library().kinds.values()
    except GgmlError:
        return
    dequant = importlib.import_module(f"{_AT}.dequant")
    for kind in kinds:
        if kind.quantised:
            dequant.GGML_BLOCK.setdefault(kind.type, (kind.values, kind.bytes))
            dequant.GGML_NAME.setdefault(kind.type, kind.name)
            dequant._DEQUANT.setdefault(kind.type, functools.partial(_unpack, kind.type))


def _unpack(type: int, blocks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch_ops.numbers(blocks.cpu(), type, dtype).to(blocks.device)


def _finishing(theirs: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """The end of loading, without the search for an attention kernel on the hub, which has none for CPUs."""

    @functools.wraps(theirs)
    def finish(self: Any, model: nn.Module, **kwargs: object) -> nn.Module:
        if isinstance(self.kernel, Kernel) and not self.kernel.theirs:
            self.attn_requested = True
        if self.header is not None:
            decoder: Any = model.get_decoder()  # type: ignore[operator]
            decoder.__dict__[FILE] = os.path.abspath(self.header.path)
        return theirs(self, model, **kwargs)

    return finish


# ---- Products of loaded models


@functools.cache
def _serve() -> None:
    """From now on, modules that hold blocks on the CPU find our kernel."""
    kernels, utils = (importlib.import_module(f"{_AT}.{name}") for name in ("kernels", "utils"))

    def on_cpu(module: ModuleType, name: str, ours: Callable[..., torch.Tensor]) -> None:
        theirs = getattr(module, name)

        @functools.wraps(theirs)
        def either(weight: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if weight.device.type == "cpu":
                return ours(weight, *args, **kwargs)
            if not kernels._gguf_kernel:
                raise RuntimeError(
                    f"{name}: requires blocks of a GGUF file on the CPU, where the model was loaded; got them on "
                    f"{weight.device}. Load the file with device_map={weight.device.type!r}, which unpacks them"
                )
            result: torch.Tensor = theirs(weight, *args, **kwargs)
            return result

        setattr(module, name, either)

    for kind, make in _served(utils):
        ours = make(kind.forward)
        checkpointed = hasattr(kind, "gradient_checkpointing")
        kind.forward = _OnInstances(kind.forward, ours) if checkpointed else ours
    on_cpu(utils, "mul_mat_vec", _mul_mat_vec)
    on_cpu(utils, "mul_mat_id", _mul_mat_id)
    on_cpu(utils, "dequantize_blocks", _dequantize_blocks)
    on_cpu(kernels, "dequantize_blocks", _dequantize_blocks)
    on_cpu(importlib.import_module(f"{_AT}.gguf_conversion_mapping"), "dequantize_blocks", _dequantize_blocks)


class _OnInstances:
    """A forward that a layer has, and its class has not: Transformers checkpoints a layer only if the forward of its
    class is the one that it wrapped."""

    def __init__(self, theirs: Callable[..., Any], ours: Callable[..., Any]):
        self.theirs, self.ours = theirs, ours

    def __get__(self, layer: Any, kind: type) -> Callable[..., Any]:
        return self.theirs if layer is None else MethodType(self.ours, layer)


def _served(utils: ModuleType) -> Iterator[tuple[Any, Callable[[Any], Any]]]:
    """Classes whose forward ours replaces, each with the maker of ours."""
    yield utils.GgufLinear, _linear
    for family in ("qwen3_5", "qwen3_5_moe"):
        module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        for kind in vars(module).values():
            if isinstance(kind, type) and kind.__name__.endswith("DecoderLayer"):
                yield kind, gguf_layers.fused
            elif isinstance(kind, type) and kind.__name__ in ("Qwen3_5MLP", "Qwen3_5MoeMLP"):
                yield kind, _mlp


class _Held:
    """The blocks of a module. They are checked once, and again if its weight was replaced."""

    def __init__(self, module: Any):
        self.weight, self.at = module._parameters["weight"], module._parameters["weight"].data_ptr()
        order = module.input_permutation
        self.order = (
            None
            if order is None or torch.equal(order, torch.arange(len(order), device=order.device))
            else order
        )
        self.blocks = torch_ops.Blocks(self.weight, module.ggml_type)


_held: dict[int, _Held] = {}
"""By the id of a module."""


def _blocks(module: Any) -> _Held | None:
    """The blocks of a GgufLinear; None if its weight is not on the CPU."""
    weight, held = module._parameters["weight"], _held.get(id(module))
    if held is None or held.weight is not weight or held.at != weight.data_ptr():
        if weight.device.type != "cpu":
            return None
        if held is None:
            weakref.finalize(module, _held.pop, id(module), None).atexit = False
        held = _held[id(module)] = _Held(module)
    return held


def _linear(theirs: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """GgufLinear's forward."""

    @functools.wraps(theirs)
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        if (
            torch.compiler.is_compiling()
            or watched(x, self._parameters["weight"])
            or torch_ops.wants_gradient(x)
            or (held := _blocks(self)) is None
        ):
            return theirs(self, x)
        flat = x.reshape(-1, x.shape[-1])
        if held.order is not None:
            flat = flat.index_select(1, held.order)
        y = held.blocks.multiply(flat).view(*x.shape[:-1], held.blocks.rows)
        if self.bias is not None:
            y = y + self.bias
        return y.to(_out_dtype(x))

    return forward


def _out_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype that F.linear would return."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


def _mlp(theirs: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The forward of an MLP with packed matrices, for many rows."""

    @functools.wraps(theirs)
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling() or x.numel() <= torch_ops.FEW_ROWS * x.shape[-1]:
            return theirs(self, x)
        parts = [self._modules.get(name) for name in gguf_layers.MLP]
        if (
            not all(gguf_layers.is_plain(part) and gguf_layers.is_packed(part) for part in parts)
            or not gguf_layers.is_silu(self._modules.get("act_fn"))
            or torch_ops.wants_gradient(x)
            or watched(x, *(part._parameters["weight"] for part in parts))
        ):
            return theirs(self, x)
        gate, up, down = (_blocks(part) for part in parts)
        if gate is None or up is None or down is None or gate.blocks.rows != up.blocks.rows:
            return theirs(self, x)
        y = torch_ops.gated(x.reshape(-1, x.shape[-1]), gate.blocks, up.blocks, down.blocks)
        return y.view(*x.shape[:-1], down.blocks.rows).to(_out_dtype(x))

    return forward


def _mul_mat_vec(weight: torch.Tensor, x: torch.Tensor, type: int, rows: int) -> torch.Tensor:
    return torch_ops.linear(x, weight, type)


def _mul_mat_id(
    blocks: torch.Tensor, x: torch.Tensor, ids: torch.Tensor, type: int, rows: int
) -> torch.Tensor:
    return torch_ops.experts(x, blocks, ids, type)


def _dequantize_blocks(
    weight: torch.Tensor,
    type: int,
    rows: int,
    cols: int,
    dtype: torch.dtype,
    indices: torch.Tensor | None = None,
) -> torch.Tensor:
    return torch_ops.numbers(weight, type, dtype, indices)
