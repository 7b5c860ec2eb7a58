"""Metal for MLX: arrays whose stream runs on an Apple GPU, through mx.fast.metal_kernel. Kernels: backends/metal.

A call becomes part of MLX's graph and runs when MLX does. mx.fast.metal_kernel writes the kernel's signature and makes
its inputs contiguous. This file adds the body, which calls `run` of the .metal files, and allocates the outputs. Tests
replace mx.fast by an emulator (`emulated`), so this file runs on Linux too.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ...core.accepts import ANY, Accepts, Row, UpTo
from ...core.dispatch import MLX_GPU, Rejected
from ...rule.arguments import Call
from ...rule.spec import CallSpec
from ..accepts import FLOATS, RULE_CALLS
from . import host as metal
from .launch import ARRAYS, MAX_K, Launch, Launches, chunks_fit, text

if TYPE_CHECKING:
    from types import ModuleType

    import mlx.core as mx

_OUTPUTS = ("o", "state_out", "snapshots")
_MIN_DEVICE = 8
"""MLX passes arrays with fewer elements in constant memory, which the kernels cannot read."""

_emulator: ModuleType | None = None
_kernels: dict[tuple[object, ...], object] = {}


@contextmanager
def emulated(host: ModuleType) -> Iterator[None]:
    """Inside the block, calls on CPU arrays run on `host`, an object with `metal_kernel`, instead of mx.fast."""
    global _emulator
    before, _emulator = _emulator, host
    try:
        yield
    finally:
        _emulator = before


@dataclass
class _Plan:
    launch: Launch
    kernel: Any
    params: mx.array
    inputs: tuple[str, ...]
    """The arrays that the call has."""
    outputs: tuple[str, ...]


class MetalForMlx:
    """The metal backend's host for MLX arrays. `run_lazily` replaces `run`: see anydelta.mlx."""

    name = "metal"
    mlx = True

    def available(self) -> Sequence[Rejected]:
        if _emulator is not None:
            return ()
        import mlx.core as mx

        if mx.metal.is_available():
            return ()
        return (Rejected("needs an Apple GPU through MLX; mx.metal.is_available() is False"),)

    @property
    def accepts(self) -> Accepts:
        on = (MLX_GPU,) if _emulator is None else ANY
        return RULE_CALLS.but(
            framework=("mlx",), g_dtype=FLOATS, beta_dtype=FLOATS, K=UpTo(MAX_K), rules=(_has_tokens,), limits=(),
            device=Row(on, "takes MLX arrays on a stream of the GPU; the stream runs on the CPU"),
        )  # fmt: skip

    def prepare(self, spec: CallSpec, call: Call) -> dict[bool, _Plan]:
        return {}  # by "runs in chunks"; filled when first needed

    def run_lazily(self, plans: dict[bool, _Plan], spec: CallSpec, call: Call) -> list[mx.array]:
        """o, then the final state and the snapshots if the call has them, not yet computed.

        Unwritten slots keep the values of `call.snapshots`.
        """
        import mlx.core as mx

        chunked = _chunked(spec)
        if chunked not in plans:
            plans[chunked] = _plan(spec, call, chunked)
        plan = plans[chunked]
        dims = (spec.K, spec.V) if spec.options.state_layout == "kv" else (spec.V, spec.K)
        state = (spec.N, spec.HV, *dims)
        shapes = {"o": call.v.shape, "state_out": state, "snapshots": (spec.snapshots, *state)}
        kinds = {"o": call.v.dtype} | dict.fromkeys(("state_out", "snapshots"), getattr(mx, spec.state_dtype))
        out = plan.kernel(
            inputs=[plan.params, *(_in_device_memory(getattr(call, n)) for n in plan.inputs)],
            grid=plan.launch.threads,
            threadgroup=plan.launch.group_size,
            output_shapes=[shapes[n] for n in plan.outputs],
            output_dtypes=[kinds[n] for n in plan.outputs],
        )
        if spec.snapshots:
            out[-1] = _written(spec, call, out[-1])
        return list(out)


def _has_tokens(spec: CallSpec) -> str:
    if min(spec.B, spec.T, spec.N) < 1:
        return f"takes at least one token and one sequence; got B={spec.B} T={spec.T} N={spec.N}"
    return ""


def _chunked(spec: CallSpec) -> bool:
    """Chunks run only if forced. With snapshots, they would need a second launch, and its outputs merging."""
    if spec.snapshots:
        return False
    if metal._forced:
        return metal._forced == "chunks" and chunks_fit(spec, 1)
    return os.environ.get(metal.CHUNK_ENV) == "1" and chunks_fit(spec)


def _plan(spec: CallSpec, call: Call, chunked: bool) -> _Plan:
    import mlx.core as mx

    (launch,) = Launches(spec, call, ARRAYS, dense=True, chunked=chunked).all
    present = dict(zip(ARRAYS, launch.arrays, strict=True))
    inputs = tuple(n for n in ARRAYS if n not in _OUTPUTS and present[n])
    outputs = tuple(n for n in _OUTPUTS if present[n])
    host = mx.fast if _emulator is None else _emulator
    key = (host, launch.source, inputs, outputs)
    if key not in _kernels:
        _kernels[key] = _kernel(host, launch.source, inputs, outputs)
    return _Plan(launch, _kernels[key], mx.array(np.array(launch.params, np.int64)), inputs, outputs)


def _kernel(host: ModuleType, source: str, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> object:
    """The kernel that mx.fast.metal_kernel makes from a launch's text."""
    lines = source.removesuffix(text("entry")).splitlines()
    includes = [line for line in lines if line.startswith("#include")]
    rest = "\n".join(line for line in lines if not line.startswith("#include"))
    header = "\n".join(includes) + f"\nnamespace anydelta {{\n{rest}\n}}\n"  # beside MLX's own helpers
    header += "typedef anydelta::Scratch anydelta_scratch;\n"

    def pointer(name: str) -> str:
        if name in outputs:
            return f"(device uchar*)out_{name}"
        if name in _OUTPUTS:
            return f"(device uchar*)out_{outputs[0]}"  # bound but not touched
        return f"(device const uchar*)in_{name if name in inputs else 'params'}"

    body = f"""
    threadgroup anydelta_scratch scratch;
    const anydelta::Arrays a = {{{", ".join(map(pointer, ARRAYS))}}};
    anydelta::run<device const anydelta::Params&>(*(device const anydelta::Params*)in_params, a, scratch,
        threadgroup_position_in_grid, simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
"""
    digest = hashlib.sha256((header + body).encode()).hexdigest()[:16]
    return host.metal_kernel(
        name=f"anydelta_{digest}",
        input_names=["in_params", *(f"in_{n}" for n in inputs)],
        output_names=[f"out_{n}" for n in outputs],
        source=body,
        header=header,
    )


def _in_device_memory(x: mx.array) -> mx.array:
    import mlx.core as mx

    if x.size >= _MIN_DEVICE:
        return x
    return mx.concatenate([x.reshape(-1), mx.zeros(_MIN_DEVICE - x.size, x.dtype)])


def _written(spec: CallSpec, call: Call, new: mx.array) -> mx.array:
    """Restore the old values of slots that the kernel does not write."""
    import mlx.core as mx

    if not (spec.packed or spec.pooled):
        n = min(spec.T, spec.snapshots)
        return mx.concatenate([new[:n], call.snapshots[n:]])
    lengths = call.cu_seqlens[1:] - call.cu_seqlens[:-1] if spec.packed else mx.full(spec.N, spec.T)
    written = mx.arange(spec.snapshots)[:, None] < lengths
    if spec.pooled:
        written = written & (call.state_indices >= 0)
    return mx.where(written[..., None, None, None], new, call.snapshots)


HOST = MetalForMlx()
