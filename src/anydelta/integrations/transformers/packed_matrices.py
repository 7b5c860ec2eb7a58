"""Runs a model's matrices on a CPU through torch's oneDNN, on weights in oneDNN's layout.

    packed = pack(model)       # on from here; a copy of every nn.Linear's weight
    with packed: ...           # on until the end of the block; packed.off(), packed.on()

A decode step is mostly one row times each weight. torch's F.linear gives float32 to MKL, which multiplies one row on
one thread. oneDNN, which torch includes for torch.compile, uses all threads (`anydelta bench matrices`). The sums are
the same except for their order.

oneDNN is not faster on every CPU. With AMX, torch's own bfloat16 matrices are as fast or faster. So each shape is
measured first, for one row and for many, and a layer is packed only for the numbers of rows where that helps.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import nn

GAIN = 1.05
"""How much faster packed weights must be to justify their memory."""

ROWS = (1, 64)
"""Rows for which a shape is measured: a decode step, and a prompt."""

_DTYPES = (torch.float32, torch.bfloat16)


class PackedLinear(nn.Linear):
    """nn.Linear with a second copy of its weight. Some calls use the first copy: those that need a gradient, that are
    traced, or that have more rows than `_most_rows` (unless that is None).
    """

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
            or ((most := self.__dict__.get("_most_rows")) is not None and x.numel() > most * x.shape[-1])
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
        """Copies and files hold the weight once: the packed form has no storage to copy."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_packed", "_most_rows")}


def _stamp(weight: torch.Tensor) -> tuple[int, int]:
    """Changes with every write that autograd sees, and if the memory changes. It misses writes through `.data`."""
    return weight.data_ptr(), 0 if weight.is_inference() else weight._version


def _weight(layer: nn.Linear) -> torch.Tensor:
    """What the layer multiplies with: of a weight that is spread over processes this one's share."""
    weight: torch.Tensor = getattr(layer.weight, "_local_tensor", layer.weight)
    return weight


def _packed(weight: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
    with torch.no_grad():
        return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 1), _stamp(weight)


class Packed:
    """The packed layers of a model, and the switch. Their copies of the weights live as long as this object."""

    def __init__(self, layers: list[nn.Linear], most_rows: list[int | None]):
        self.layers, self._most_rows = layers, most_rows
        self._kept: dict[nn.Linear, tuple[torch.Tensor, tuple[int, int]]] = {
            layer: _packed(_weight(layer)) for layer in layers
        }
        self.on()

    def on(self) -> None:
        for layer, most in zip(self.layers, self._most_rows, strict=True):
            layer.__dict__["_packed"], layer.__dict__["_most_rows"] = self._kept[layer], most
            layer.__class__ = PackedLinear

    def off(self) -> None:
        for layer in self.layers:
            self._kept[layer] = layer.__dict__.pop("_packed", self._kept[layer])
            layer.__dict__.pop("_most_rows", None)
            layer.__class__ = nn.Linear

    def __enter__(self) -> Packed:
        self.on()
        return self

    def __exit__(self, *_: object) -> None:
        self.off()


def pack(model: nn.Module) -> Packed:
    """Pack the nn.Linear layers of a model that are on the CPU in float32 or bfloat16, and use them from now on.

    It packs only layers that this makes faster here, with torch's present number of threads. Each shape is measured,
    which takes some tenths of a second. Packing doubles the memory of these weights. Training and torch.compile still
    use the original weights. A weight that is written or replaced is packed again at its next use.

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
    found: dict[tuple[object, ...], tuple[bool, bool]] = {}
    chosen: list[nn.Linear] = []
    most: list[int | None] = []
    for layer in layers:
        key = (_weight(layer).shape, layer.weight.dtype)
        if key not in found:
            found[key] = (faster(layer, ROWS[0]), faster(layer, ROWS[1]))
        few, many = found[key]
        if few:
            chosen.append(layer)
            most.append(None if many else ROWS[1] // 8)
    return Packed(chosen, most)


def faster(layer: nn.Linear, rows: int) -> bool:
    """Whether `rows` rows times the weight are GAIN times as fast on a packed copy. Both are measured interleaved."""
    weight = _weight(layer).detach()
    x = torch.randn(rows, weight.shape[1]).to(weight.dtype)
    packed = _packed(weight)[0]
    ways: tuple[Callable[[], torch.Tensor], ...] = (
        lambda: torch.nn.functional.linear(x, weight),
        lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], ""),
    )
    times: list[list[float]] = [[], []]
    with torch.no_grad():
        for _ in range(6):
            for spent, way in zip(times, ways, strict=True):
                start = time.perf_counter()
                way()
                spent.append(time.perf_counter() - start)
    plain, own = (min(spent[1:]) for spent in times)
    return plain > GAIN * own
