"""A stand-in for mx.fast.metal_kernel: writes the signature that MLX writes, and runs the kernel in the emulator.

As MLX does (mlx/backend/common/metal_kernel.cpp): an input of fewer than 8 elements lies in the constant address space,
others in device; the thread attributes that the source names become parameters; template arguments are types, ints and
bools; inputs are made contiguous; outputs are new.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import torch
from emulator import Emulator

_ATTRIBUTES = {
    "thread_index_in_simdgroup": "uint", "simdgroup_index_in_threadgroup": "uint",
    "thread_position_in_threadgroup": "uint3", "thread_position_in_grid": "uint3",
    "threadgroup_position_in_grid": "uint3",
}  # fmt: skip
_TYPES = {
    mx.float32: "float", mx.float16: "half", mx.bfloat16: "bfloat16_t", mx.int32: "int", mx.int64: "long",
    mx.bool_: "bool", mx.uint8: "uchar",
}  # fmt: skip

_BFLOAT = "struct bfloat16_t { ushort bits; };\n"
"""Memory only: the emulator has no arithmetic for it."""


class MetalKernels:
    """`metal_kernel` as mx.fast has it, on an emulator."""

    def __init__(self, emulator: Emulator):
        self.emulator = emulator
        self.made: dict[str, Any] = {}

    def metal_kernel(
        self, name: str, input_names: Sequence[str], output_names: Sequence[str], source: str, header: str = "",
        ensure_row_contiguous: bool = True, atomic_outputs: bool = False,
    ) -> Any:  # fmt: skip
        def call(
            *, inputs: Sequence[Any], grid: Sequence[int], threadgroup: Sequence[int],
            output_shapes: Sequence[Sequence[int]], output_dtypes: Sequence[Any], template: Any = (),
            init_value: float | None = None, stream: Any = None,
        ) -> list[mx.array]:  # fmt: skip
            arrays = [x if isinstance(x, mx.array) else mx.array(x) for x in inputs]
            parameters, values, outputs = [], [], []
            for x, n in zip(arrays, input_names, strict=True):
                place = "constant" if x.size < 8 else "device const"
                sign = "&" if x.ndim == 0 else "*"
                parameters.append(f"{place} {_TYPES[x.dtype]}{sign} {n}")
                values.append(_host(x))
            for shape, dtype, n in zip(output_shapes, output_dtypes, output_names, strict=True):
                parameters.append(f"device {_TYPES[dtype]}* {n}")
                outputs.append(_new(shape, dtype, init_value))
            text = _source(name, parameters, source, header, template)
            function = getattr(self.emulator.compile_shader(text), name)
            group = [min(a, b) for a, b in zip(grid, threadgroup, strict=True)]
            function.launch([*values, *outputs], threads=grid, group_size=group)
            return [_array(x, dtype) for x, dtype in zip(outputs, output_dtypes, strict=True)]

        self.made[name] = call
        return call


def _source(name: str, parameters: list[str], body: str, header: str, template: Any) -> str:
    numbered = [f"{p} [[buffer({i})]]" for i, p in enumerate(parameters)]
    numbered += [f"{kind} {a} [[{a}]]" for a, kind in _ATTRIBUTES.items() if re.search(rf"\b{a}\b", body)]
    fixed = ""
    for key, value in template or ():
        if isinstance(value, (bool, int)):
            fixed += f"constant constexpr int {key} = {int(value)};\n"
        else:
            fixed += f"typedef {_TYPES[value]} {key};\n"
    return (
        f"#include <metal_stdlib>\nusing namespace metal;\n{_BFLOAT}{header}\n{fixed}"
        f"kernel void {name}({', '.join(numbered)}) {{\n{body}\n}}\n"
    )


def _host(x: mx.array) -> torch.Tensor:
    """The values as a tensor whose memory the emulator reads."""
    mx.eval(x)
    bits = x.view(mx.uint16) if x.dtype == mx.bfloat16 else x
    return torch.from_numpy(np.array(bits).view(np.int16) if x.dtype == mx.bfloat16 else np.array(bits))


def _new(shape: Sequence[int], dtype: Any, value: float | None) -> torch.Tensor:
    size = tuple(int(n) for n in shape)
    plain = {mx.float32: torch.float32, mx.float16: torch.float16, mx.bfloat16: torch.bfloat16}[dtype]
    return torch.full(size, float("nan") if value is None else value, dtype=plain)


def _array(x: torch.Tensor, dtype: Any) -> mx.array:
    if dtype == mx.bfloat16:
        return mx.array(x.view(torch.int16).numpy().view(np.uint16)).view(mx.bfloat16)
    return mx.array(x.numpy())
