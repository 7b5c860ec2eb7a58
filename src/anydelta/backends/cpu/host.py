"""The native CPU backend: hands addresses and strides to the C++ kernels (backends/cpu, `anydelta._core`).

The instruction set is chosen at run time; ANYDELTA_CPU_ISA forces one of `isas()`. Thread counts follow
`torch.set_num_threads` for torch tensors and OMP_NUM_THREADS for NumPy and MLX arrays.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from ...core.accepts import Row
from ...core.arguments import in_order
from ...core.arrays import Array
from ...core.dispatch import MLX_GPU, Rejected
from ...core.late import late
from ...core.native import core as _core
from ...core.native import why_not
from ...core.plans import Launch
from ...rule.arguments import PLAIN, TOKENS, Call
from ...rule.spec import DECAYS, CallSpec, dtype_name, element_strides, framework_of
from ..accepts import EITHER, RULE_CALLS, STATES

if TYPE_CHECKING:
    from ...mixer.arguments import MixerCall

_backward = late("anydelta.backends.cpu.gradients")  # it imports this module

ISA_ENV = "ANYDELTA_CPU_ISA"
_arrays = in_order(Call)
DTYPE = {"float32": 0, "bfloat16": 1, "float16": 2}


def isas() -> list[str]:
    """The builds of the kernels that this CPU can run, slowest first."""
    return list(_core.isas()) if _core is not None else []


def isa() -> str:
    """The build that runs now."""
    return str(_core.isa())


@contextmanager
def forced_isa(name: str) -> Iterator[None]:
    """Run one build of the kernels inside the block.

    Raises:
        ValueError: this CPU cannot run it; the text lists those it can.
    """
    before = isa()
    _set_isa(name, "forced_isa")
    try:
        yield
    finally:
        _core.set_isa(before)


def _set_isa(name: str, who: str) -> None:
    if name not in isas():
        raise ValueError(f"{who} must be one of {', '.join(isas())} on this CPU; got {name!r}")
    _core.set_isa(name)


@cache
def default_threads() -> int:
    """The threads for NumPy and MLX arrays: OMP_NUM_THREADS, or the CPUs that this process may use."""
    text = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if text.isdigit() and int(text) > 0:
        return int(text)
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else (os.cpu_count() or 1)


def address(x: Array) -> int:
    if x is None:
        return 0
    return int(x.data_ptr() if framework_of(x) == "torch" else x.__array_interface__["data"][0])


@dataclass(slots=True)
class _Plan:
    """The native plan, and which arrays must be copied to be contiguous."""

    native: _core.Plan
    reads: bool
    """Whether the extension reads these arrays by itself."""
    threads: tuple[Callable[[], int], bool]
    """A function that returns their number, and whether they are torch's."""
    copies: tuple[str, ...] = ()
    state_copy: bool = False
    snapshots_copy: bool = False


GRADIENTS = Row(("torch", "mlx"), "has gradients for torch tensors and MLX arrays; got {got} arrays")
DEVICE = Row(("cpu", MLX_GPU), "takes tensors on the CPU; got device {where}")
"""Apple's GPUs share the CPU's memory."""


class Cpu:
    name = "cpu"
    accepts = RULE_CALLS.but(
        arrays=("erase",),
        device=DEVICE,
        state_dtype=STATES,
        snapshot_rows=EITHER,
        final_rows=EITHER,
        limits=(),
    )
    accepts_gradients = RULE_CALLS.but(arrays=("erase",), device=DEVICE, framework=GRADIENTS, limits=())
    optional_A_log = True
    mixer = "anydelta.backends.cpu.mixer"
    log = "anydelta.backends.cpu.log"
    mlx = True
    """It reads MLX arrays directly; other backends get NumPy arrays (anydelta.mlx)."""

    def available(self) -> Sequence[Rejected]:
        return (Rejected(why_not),) if why_not else ()

    def describe(self) -> dict[str, object]:
        return {
            "isa": isa(),
            "isas": isas(),
            "features": list(_core.cpu_features()),
            "threads": default_threads(),
            "thread_provider": _core.thread_provider(True),
        }

    def prepare(self, spec: CallSpec, call: Call) -> _Plan:
        strides, copies = token_strides(call)
        copies += scattered(call, ("A_log", "dt_bias", "cu_seqlens", "state_indices", "snapshot_indices"))
        fields, state_copy, snapshots_copy = rule_fields(spec, call, strides)
        threads = threads_of(spec.framework)
        native = _core.Plan(fields, None if threads[1] else threads[0])
        reads = reads_arrays(spec.framework, _arrays(call))
        return _Plan(native, reads, threads, tuple(copies), state_copy, snapshots_copy)

    def direct(self, plan: _Plan) -> Launch | None:
        if not plan.reads or plan.copies or plan.state_copy or plan.snapshots_copy:
            return None
        return plan.native.run

    def gradients(
        self, spec: CallSpec, call: Call, grad_o: Array, grad_state: Array | None
    ) -> dict[str, Array | None]:
        """d loss / d input by name, given d loss / d o and d loss / d final state (in the caller's layout)."""
        found: dict[str, Array | None] = _backward.gradients(spec, call, grad_o, grad_state)
        return found

    def run(self, plan: _Plan, spec: CallSpec, call: Call) -> None:
        if plan.copies or plan.state_copy or plan.snapshots_copy:
            return _run_with_copies(plan, spec, call)
        if plan.reads:
            plan.native.run(_arrays(call), ())
        else:
            number, torch = plan.threads
            plan.native.run_at(number(), torch, *map(address, _arrays(call)))


def token_strides(call: Call) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """What _core.Plan needs of each array of tokens in the call, and which of them are copied first."""
    strides, copies = {}, []
    for name in TOKENS:
        x = getattr(call, name)
        if x is None:
            continue
        st = element_strides(x)
        if (len(st) == 4 and st[3] != 1 and x.shape[3] > 1) or dtype_name(x) == "float64":
            copies.append(name)
            st = contiguous_strides(tuple(x.shape))
        dtype = dtype_name(x) if dtype_name(x) != "float64" else "float32"
        strides[name] = (DTYPE[dtype], *st[:3], x.shape[2])
    return strides, copies


def scattered(call: Call | MixerCall, names: Sequence[str]) -> list[str]:
    """The small arrays of the call that the kernels cannot read as they are."""
    arrays = ((name, getattr(call, name)) for name in names)
    return [
        name
        for name, x in arrays
        if x is not None
        and (element_strides(x) != contiguous_strides(tuple(x.shape)) or dtype_name(x) == "float64")
    ]


def rule_fields(
    spec: CallSpec, call: Call, strides: dict[str, tuple[int, ...]]
) -> tuple[dict[str, object], bool, bool]:
    """(what _core.Plan needs, whether the state, whether the snapshots are copied first). `strides` as from
    token_strides, for the arrays that exist."""
    opt = spec.options
    B, T, HV, V = spec.B, spec.T, spec.HV, spec.V
    dims = (spec.K, V) if opt.state_layout == "kv" else (V, spec.K)
    dense = (0, HV * dims[0] * dims[1], dims[0] * dims[1], dims[1])
    state_in, state_copy = _state_strides(call.state_in, dense)
    snapshots: tuple[int, ...] = dense
    snapshots_copy = False
    if call.snapshots is not None:
        st = element_strides(call.snapshots)
        snapshots_copy = st[4] != 1 and call.snapshots.shape[4] > 1
        snapshots = contiguous_strides(tuple(call.snapshots.shape))[:4] if snapshots_copy else st[:4]
    elif spec.snapshot_rows:
        snapshots = state_in
    mask = element_strides(call.mask) if call.mask is not None else (0, 0)
    fields = dict(
        B=B, T=T, H=spec.H, HV=HV, K=spec.K, V=V, N=spec.N,
        kda=spec.kda,
        tiled=opt.heads == "tiled",
        vk=opt.state_layout == "vk",
        **{name: getattr(opt, name) for name in PLAIN},
        has_lower_bound=opt.lower_bound is not None,
        lower_bound=float(opt.lower_bound or 0.0),
        decay=DECAYS.index(opt.decay),
        scale=spec.scale,
        **{name: strides.get(name, (0, 0, 0, 0, 0)) for name in TOKENS},
        o=(DTYPE[spec.dtype], T * HV * V, HV * V, V, HV),
        A_log_dtype=small_dtype(call.A_log),
        dt_bias_dtype=small_dtype(call.dt_bias),
        mask_b=mask[0],
        mask_t=mask[1],
        state_dtype=DTYPE[spec.state_dtype],
        state_in=state_in,
        state_out=state_in if spec.inplace else dense,
        snapshots=snapshots,
        out_dense=not spec.inplace,
        Ks=spec.snapshots,
        cu_is_int32=spec.packed and dtype_name(call.cu_seqlens) == "int32",
        indices_are_int32=spec.pooled and dtype_name(call.state_indices) == "int32",
        rows_are_int32=call.snapshot_indices is not None and dtype_name(call.snapshot_indices) == "int32",
    )  # fmt: skip
    return fields, state_copy, snapshots_copy


def reads_arrays(framework: str, arrays: Iterable[Array]) -> bool:
    """Whether the extension reads these arrays by itself."""
    if framework == "torch":
        return bool(_core.reads_torch())
    if framework == "mlx":
        return True
    # NumPy has no bfloat16: ml_dtypes' arrays have no buffer format
    return not any(dtype_name(x) == "bfloat16" for x in arrays if x is not None)


def threads_of(framework: str) -> tuple[Callable[[], int], bool]:
    """(how many threads run calls on such arrays, whether they are torch's)"""
    if framework != "torch":
        return default_threads, False
    import torch

    return torch.get_num_threads, True


def small_dtype(x: Array) -> int:
    return 0 if x is None else DTYPE.get(dtype_name(x), 0)


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides = [1]
    for n in reversed(shape[1:]):
        strides.append(strides[-1] * int(n))
    return tuple(reversed(strides))


def _state_strides(state: Array, dense: tuple[int, ...]) -> tuple[tuple[int, ...], bool]:
    """((slot, n, h, row) strides, whether the state must be copied because its last dimension is strided)."""
    if state is None:
        return dense, False
    st = element_strides(state)
    if st[3] != 1 and state.shape[3] > 1:
        return dense, True
    return (0, *st[:3]), False


def contiguous(x: Array) -> Array:
    """A C-contiguous copy; float64 gates become float32, the type they are computed in."""
    if framework_of(x) == "torch":
        import torch

        return (x.float() if x.dtype == torch.float64 else x).contiguous()
    if framework_of(x) == "mlx":
        import mlx.core as mx

        return mx.contiguous(x.astype(mx.float32, stream=mx.cpu) if x.dtype == mx.float64 else x)
    return np.ascontiguousarray(x, dtype=np.float32 if x.dtype == np.float64 else None)


def _run_with_copies(plan: _Plan, spec: CallSpec, call: Call) -> None:
    """The slow path for arrays whose last dimension is strided: run on contiguous copies, then copy results back."""
    inner = replace(call, **{name: contiguous(getattr(call, name)) for name in plan.copies})
    if plan.state_copy:
        inner.state_in = contiguous(call.state_in)
        if spec.inplace:
            inner.state_out = inner.state_in
    if plan.snapshots_copy:
        inner.snapshots = contiguous(call.snapshots)
    BACKEND.run(_Plan(plan.native, plan.reads, plan.threads), spec, inner)
    if plan.state_copy and spec.inplace:
        rows = slice(None)
        if call.state_indices is not None:
            named = call.state_indices if call.snapshot_indices is None else call.snapshot_indices
            rows = named[(named >= 0) & (named < spec.P)]
        call.state_out[rows] = inner.state_out[rows]
    if plan.snapshots_copy:
        call.snapshots[...] = inner.snapshots


BACKEND = Cpu()

if _core is not None and os.environ.get(ISA_ENV):
    _set_isa(os.environ[ISA_ENV], f"anydelta: {ISA_ENV}")
