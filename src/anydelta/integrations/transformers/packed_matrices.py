"""The matrices of a model on a CPU, computed by torch's oneDNN on weights in oneDNN's own layout.

    packed = pack(model)       # on from here; a copy of every nn.Linear's weight
    with packed: ...           # on for the length of a block; packed.off(), packed.on()

A decode step is mostly one row times each weight. torch's F.linear gives float32 to MKL, which multiplies one row on
one thread; oneDNN, which torch brings along for torch.compile, takes all threads (`anydelta bench matrices`). The sums
are the same but for their order.
"""

from __future__ import annotations

import torch
from torch import nn

_DTYPES = (torch.float32, torch.bfloat16)


class PackedLinear(nn.Linear):
    """nn.Linear with a second copy of its weight; calls that need a gradient, or are traced, take the first."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self._parameters["weight"]
        if (
            torch.compiler.is_compiling()
            or torch.is_grad_enabled()
            or type(x) is not torch.Tensor
            or weight is None
            or x.dtype != weight.dtype
            or x.dtype not in _DTYPES
            or not x.is_cpu
            or x.numel() == 0
            or torch.is_autocast_enabled("cpu")
            or torch._C._len_torch_dispatch_stack() > 0
            or torch._C._functorch.maybe_current_level() is not None
        ):
            return super().forward(x)
        packed = self.__dict__.get("_packed")
        if packed is None or packed[1] != _stamp(weight):
            packed = self.__dict__["_packed"] = _packed(weight)
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            x, packed[0], self._parameters["bias"], "none", [], ""
        )
        return out

    def __getstate__(self) -> dict[str, object]:
        """Copies and files hold the weight once: the packed form has no storage that either could take."""
        return {name: value for name, value in self.__dict__.items() if name != "_packed"}


def _stamp(weight: torch.Tensor) -> tuple[int, int]:
    """Changes with every write that autograd sees, and with the memory. (Writes through `.data` are not seen.)"""
    return weight.data_ptr(), 0 if weight.is_inference() else weight._version


def _packed(weight: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
    with torch.no_grad():
        return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 1), _stamp(weight)


class Packed:
    """Which layers of a model are packed, and the switch. Their copies of the weights live as long as this."""

    def __init__(self, layers: list[nn.Linear]):
        self.layers = layers
        self._kept: dict[nn.Linear, tuple[torch.Tensor, tuple[int, int]]] = {
            layer: _packed(layer.weight) for layer in layers
        }
        self.on()

    def on(self) -> None:
        for layer in self.layers:
            layer.__dict__["_packed"] = self._kept[layer]
            layer.__class__ = PackedLinear

    def off(self) -> None:
        for layer in self.layers:
            self._kept[layer] = layer.__dict__.pop("_packed", self._kept[layer])
            layer.__class__ = nn.Linear

    def __enter__(self) -> Packed:
        self.on()
        return self

    def __exit__(self, *_: object) -> None:
        self.off()


def pack(model: nn.Module) -> Packed:
    """Pack the nn.Linear layers of a model that are on the CPU in float32 or bfloat16, and use them from now on.

    Doubles the memory of those weights, and serves any number of rows; training and torch.compile go on to use the
    weights as they were. A weight that is written or replaced is packed anew when it is next used.

    Raises:
        TypeError, ValueError: `model` is no torch.nn.Module, or has no such layer.
        RuntimeError: this torch has no oneDNN.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"pack: requires a torch.nn.Module; got {type(model).__name__}")
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        raise RuntimeError(
            f"pack: requires a torch that was built with oneDNN; got {torch.__version__} without it"
        )
    half = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    layers = [
        m
        for m in model.modules()
        if type(m) is nn.Linear
        and m.weight.is_cpu
        and (m.weight.dtype == torch.float32 or (half and m.weight.dtype == torch.bfloat16))
        and "forward" not in m.__dict__
    ]
    if not layers:
        raise ValueError(
            "pack: requires a model with nn.Linear layers in float32 or bfloat16 on the CPU; got "
            f"{type(model).__name__} without one. Load it in one of these types"
        )
    return Packed(layers)
