"""Products of torch tensors with matrices in ggml's blocks, on the CPU; and unpacking of such blocks.

    y = linear(x, blocks, type)            x [..., n], blocks uint8 [rows, bytes]: y float32 [..., rows]

For few rows of x, ggml's functions convert x to 8 bits and multiply it block by block. For many rows, torch multiplies
them with a part of the unpacked matrix at a time, in bfloat16 if the CPU has instructions for it. That is closer to the
exact product than 8 bits are.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from ..core.native import core
from ..rule.torch_ops import watched
from .library import BF16, F16, F32, Kind, Library, library

FEW_ROWS = 16
"""Up to this many rows, reading packed blocks once per row is faster than unpacking them. Measured for Q4_K, 3584 x
1024, on a Zen 4: 16 rows take 1.9 ms either way. For types that unpack slowly (Q6_K, IQ4_XS) the limit would be 38."""

PART = 1 << 19
"""Numbers to unpack at a time: 1 MB of bfloat16 stays in the cache until it is multiplied."""

NUMBERS = {F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16}
"""Types of ggml that are plain numbers."""


class Blocks:
    """A matrix [rows, n] in blocks, and its products."""

    __slots__ = ("kind", "n", "native", "rows", "tensor")

    def __init__(self, tensor: torch.Tensor, type: int):
        """
        Args:
            tensor: uint8 [..., bytes of a row], on the CPU; or plain numbers, for such a type. Kept alive.
            type: ggml's number of the type.

        Raises:
            ValueError: a type or a shape that ggml does not multiply with.
        """
        kind = kind_of(type)
        tensor = tensor.detach()
        if tensor.dtype != torch.uint8:
            tensor = tensor.contiguous().view(torch.uint8)
        if tensor.device.type != "cpu" or tensor.ndim < 2 or tensor.shape[-1] % kind.bytes:
            raise ValueError(
                f"ggml: requires blocks [rows, bytes] of {kind.name} on the CPU, bytes a multiple of {kind.bytes}; got "
                f"{list(tensor.shape)} on {tensor.device}"
            )
        self.tensor = tensor.contiguous()
        self.kind, self.n = kind, tensor.shape[-1] // kind.bytes * kind.values
        self.rows = tensor.numel() // tensor.shape[-1]
        self.native = core.Blocks(type, self.tensor.data_ptr(), self.rows, self.n)

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """y [m, rows] of x [m, n], float32."""
        if x.shape[0] > FEW_ROWS:
            return self._unpacked(x)
        if x.dtype != torch.float32 or not x.is_contiguous():
            x = x.to(torch.float32).contiguous()
        y = x.new_empty((x.shape[0], self.rows), dtype=torch.float32)
        self.native.multiply(x.data_ptr(), x.shape[0], y.data_ptr(), torch.get_num_threads())
        return y

    def _unpacked(self, x: torch.Tensor) -> torch.Tensor:
        """The same in torch, a part of the rows at a time."""
        x = x.to(wide_dtype())
        y = x.new_empty((x.shape[0], self.rows), dtype=torch.float32)
        for begin, end, numbers in self.parts():
            y[:, begin:end] = x @ numbers.T
        return y

    def parts(self) -> Iterator[tuple[int, int, torch.Tensor]]:
        """The matrix in parts: first row, row after the last, and numbers that stay valid until the next part."""
        part = max(1, PART // self.n)
        numbers = self.tensor.new_empty((min(part, self.rows), self.n), dtype=wide_dtype())
        for begin in range(0, self.rows, part):
            end = min(begin + part, self.rows)
            self._unpack(numbers, begin, end - begin)
            yield begin, end, numbers[: end - begin]

    def numbers(self, dtype: torch.dtype, rows: torch.Tensor | None = None) -> torch.Tensor:
        """All rows, or those of int64 `rows`: [count, n]."""
        count = self.rows if rows is None else rows.numel()
        fast = dtype in (torch.float32, torch.bfloat16, torch.float16)
        out = self.tensor.new_empty((count, self.n), dtype=dtype if fast else torch.float32)
        picked = None if rows is None else rows.reshape(-1).to(torch.int64).contiguous()
        self._unpack(out, 0, count, 0 if picked is None else picked.data_ptr())
        return out if fast else out.to(dtype)

    def _unpack(self, out: torch.Tensor, begin: int, count: int, picked: int = 0) -> None:
        ggml = library()
        narrow = {torch.bfloat16: ggml.to_bfloat16, torch.float16: ggml.to_float16}.get(out.dtype, 0)
        self.native.unpack(picked, begin, count, narrow, out.data_ptr(), torch.get_num_threads())


def kind_of(type: int) -> Kind:
    """The type of that number.

    Raises:
        ValueError: ggml's CPU code has none.
        GgmlError: ggml is not installed.
    """
    ggml: Library = library()
    if type not in ggml.kinds:
        names = ", ".join(f"{k.name} ({k.type})" for k in ggml.kinds.values())
        raise ValueError(f"ggml: requires a type of ggml {ggml.version}: {names}; got {type}")
    return ggml.kinds[type]


def gated(x: torch.Tensor, gate: Blocks, up: Blocks, down: Blocks) -> torch.Tensor:
    """down(silu(gate x) * up x) of many rows x [m, n], float32: an MLP whose inner numbers stay in `wide_dtype()`."""
    x = x.to(wide_dtype())
    inner = x.new_empty((x.shape[0], gate.rows))
    for (begin, end, of_gate), (_, _, of_up) in zip(gate.parts(), up.parts(), strict=True):
        torch.mul(torch.nn.functional.silu(x @ of_gate.T), x @ of_up.T, out=inner[:, begin:end])
    return down.multiply(inner)


@functools.cache
def wide_dtype() -> torch.dtype:
    """The dtype of products with many rows."""
    has: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    fast = any(has.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if fast else torch.float32


def wants_gradient(x: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


# ---- Operators, for tracers and torch.compile


def _traced(*arrays: torch.Tensor | None) -> bool:
    return torch.compiler.is_compiling() or watched(*arrays)


def linear(x: torch.Tensor, weight: torch.Tensor, type: int) -> torch.Tensor:
    """x [..., n] times the blocks of a matrix [rows, n]: float32 [..., rows]; differentiable in x."""
    if wants_gradient(x):
        return x.float() @ numbers(weight, type, torch.float32).T
    if _traced(x, weight):
        out: torch.Tensor = torch.ops.anydelta.ggml_linear(x, weight, type)
        return out
    return _linear(x, weight, type)


def experts(x: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, type: int) -> torch.Tensor:
    """x [T, n] times the matrices of blocks [E, rows, bytes] that `ids` [T, k] choose: float32 [T, k, rows]."""
    if wants_gradient(x):
        return _differentiable_experts(x, weight, ids, type)
    if _traced(x, weight, ids):
        out: torch.Tensor = torch.ops.anydelta.ggml_experts(x, weight, ids, type)
        return out
    return _experts(x, weight, ids, type)


def numbers(
    weight: torch.Tensor, type: int, dtype: torch.dtype, rows: torch.Tensor | None = None
) -> torch.Tensor:
    """The unpacked rows [count, n] of blocks: all, or those of the indices `rows`."""
    if _traced(weight, rows):
        out: torch.Tensor = torch.ops.anydelta.ggml_numbers(weight, type, dtype, rows)
        return out
    return _numbers(weight, type, dtype, rows)


def _linear(x: torch.Tensor, weight: torch.Tensor, type: int) -> torch.Tensor:
    blocks = Blocks(weight, type)
    flat = x.detach().reshape(-1, x.shape[-1])
    if flat.shape[1] != blocks.n:
        raise ValueError(f"ggml: requires x [..., {blocks.n}] with these blocks; got {list(x.shape)}")
    return blocks.multiply(flat).reshape(*x.shape[:-1], blocks.rows)


def _experts(x: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, type: int) -> torch.Tensor:
    blocks = Blocks(weight, type)
    T, k = ids.shape
    rows = weight.shape[1]
    if x.shape != (T, blocks.n):
        raise ValueError(f"ggml: requires x {[T, blocks.n]} with these blocks and ids; got {list(x.shape)}")
    x = x.detach().to(torch.float32).contiguous()
    ids = ids.to(torch.int32).contiguous()
    out = x.new_empty((T, k, rows))
    if T * k <= FEW_ROWS * weight.shape[0]:
        threads = torch.get_num_threads()
        blocks.native.multiply_experts(rows, x.data_ptr(), ids.data_ptr(), T * k, k, out.data_ptr(), threads)
        return out
    flat, of = out.view(T * k, rows), ids.view(-1)  # the rows of each expert together
    for expert in of.unique().tolist():
        mine = (of == expert).nonzero().view(-1)
        flat[mine] = Blocks(weight[expert], type).multiply(x[mine // k])
    return out


def _differentiable_experts(
    x: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, type: int
) -> torch.Tensor:
    """The same by the experts' numbers, one expert at a time."""
    of, k = ids.reshape(-1), ids.shape[1]
    places, found = [], []
    for expert in of.unique().tolist():
        mine = (of == expert).nonzero().view(-1)
        places.append(mine)
        found.append(x[mine // k].float() @ numbers(weight[expert], type, torch.float32).T)
    return torch.cat(found)[torch.cat(places).argsort()].view(*ids.shape, -1)


def _numbers(
    weight: torch.Tensor, type: int, dtype: torch.dtype, rows: torch.Tensor | None = None
) -> torch.Tensor:
    return Blocks(weight, type).numbers(dtype, rows)


_LIBRARY = torch.library.Library("anydelta", "FRAGMENT")
_LIBRARY.define("ggml_linear(Tensor x, Tensor weight, int type) -> Tensor")
_LIBRARY.define("ggml_experts(Tensor x, Tensor weight, Tensor ids, int type) -> Tensor")
_LIBRARY.define("ggml_numbers(Tensor weight, int type, ScalarType dtype, Tensor? rows=None) -> Tensor")
for _name, _function in (("linear", _linear), ("experts", _experts), ("numbers", _numbers)):
    _LIBRARY.impl(f"ggml_{_name}", _function, "CPU")


def _fake_linear(x: torch.Tensor, weight: torch.Tensor, type: int) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=torch.float32)


def _fake_experts(x: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, type: int) -> torch.Tensor:
    return x.new_empty((*ids.shape, weight.shape[1]), dtype=torch.float32)


def _fake_numbers(
    weight: torch.Tensor, type: int, dtype: torch.dtype, rows: torch.Tensor | None = None
) -> torch.Tensor:
    kind = kind_of(type)
    count = weight.shape[0] if rows is None else rows.numel()
    return weight.new_empty((count, weight.shape[-1] // kind.bytes * kind.values), dtype=dtype)


for _name, _fake in (("linear", _fake_linear), ("experts", _fake_experts), ("numbers", _fake_numbers)):
    torch.library.register_fake(f"anydelta::ggml_{_name}", _fake, lib=_LIBRARY)
