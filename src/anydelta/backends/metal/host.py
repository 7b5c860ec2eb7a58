"""Metal for PyTorch: mps tensors, without a copy, on torch's own stream. Kernels: backends/metal, which torch compiles.

`torch.mps.compile_shader` compiles one text per head size and set of types in the process, when it is first needed.
Nothing here waits for the device: the kernel itself reads what depends on data (the bounds of packed sequences, skipped
rows of a pool). Tests replace torch.mps by an emulator (`emulated`), so this file runs on Linux too.
"""

from __future__ import annotations

import os
import platform
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from statistics import median
from typing import TYPE_CHECKING, Any

from ...core import plans
from ...core.accepts import Accepts, Row, UpTo
from ...core.dispatch import Rejected
from ...rule.arguments import Call
from ...rule.spec import CallSpec, dtype_name, element_strides
from ..accepts import EITHER, RULE_CALLS, TORCH
from .launch import ARRAYS, MAX_K, Launches, chunks_fit

if TYPE_CHECKING:
    from types import ModuleType

    import torch

_INPUTS = (
    "q",
    "k",
    "v",
    "g",
    "beta",
    "A_log",
    "dt_bias",
    "mask",
    "cu_seqlens",
    "state_indices",
    "snapshot_indices",
)
_DENSE = ("q", "k", "v", "g")
"""Arrays whose last axis the kernels read in groups of four."""

CHUNK_ENV = "ANYDELTA_METAL_CHUNK"
"""1: long prompts run in chunks. 0: token by token. Unset: whichever is faster in the first call of the shape."""

_emulator: ModuleType | None = None
_libraries: dict[tuple[ModuleType, str], Any] = {}


@contextmanager
def emulated(host: ModuleType) -> Iterator[None]:
    """Inside the block, calls on CPU tensors run on `host`, an object with `compile_shader`, instead of torch.mps."""
    global _emulator
    before, _emulator = _emulator, host
    plans.forget()  # they hold compiled functions
    try:
        yield
    finally:
        _emulator = before
        plans.forget()


def _host() -> ModuleType:
    if _emulator is not None:
        return _emulator
    import torch.mps

    return torch.mps


def isas() -> list[str]:
    """The kernels that can be forced: "tokens", one by one, or "chunks", for all calls that it can run."""
    return ["tokens", "chunks"]


_forced = ""


@contextmanager
def forced_isa(name: str) -> Iterator[None]:
    """Run one of the kernels inside the block, however long the prompts.

    Raises:
        ValueError: there is no such kernel.
    """
    global _forced
    if name not in isas():
        raise ValueError(f"forced_isa must be one of {', '.join(isas())}; got {name!r}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


class _Kernels:
    """The compiled launches of a plan, with one of the two kernels."""

    def __init__(self, spec: CallSpec, call: Call, copies: tuple[str, ...], chunked: bool):
        launches = Launches(spec, call, copies, chunked=chunked)
        self.carries = launches.carries
        self.all = []
        host = _host()
        for launch in launches.all:
            key = (host, launch.source)
            if key not in _libraries:
                _libraries[key] = host.compile_shader(launch.source).gated_delta_rule
            self.all.append((_libraries[key], launch))


class _Plan:
    """What a call needs besides its arrays."""

    __slots__ = ("copies", "device", "kernels", "pooled_snapshots")

    def __init__(self, spec: CallSpec, call: Call):
        self.device = call.q.device
        self.copies = tuple(n for n in _INPUTS if _needs_copy(n, getattr(call, n), self.device))
        self.pooled_snapshots = spec.pooled and call.snapshots is not None
        self.kernels: dict[str, _Kernels] = {}

    def using(self, spec: CallSpec, call: Call) -> _Kernels:
        """The forced kernels, or those that were faster in the first call."""
        found = self.kernels.get(_forced)
        if found is None:
            chunked = chunks_fit(spec, 1) if _forced == "chunks" else not _forced and _chosen(spec, call)
            found = self.kernels[_forced] = _Kernels(spec, call, self.copies, chunked)
        return found


_best: dict[tuple[object, ...], bool] = {}


def _chosen(spec: CallSpec, call: Call) -> bool:
    """Whether a prompt runs in chunks. The first call of a shape times both ways, once per process."""
    wanted = os.environ.get(CHUNK_ENV)
    if not chunks_fit(spec) or wanted == "0":
        return False
    if wanted == "1":
        return True
    if _emulator is not None:
        return False  # times in the emulator mean nothing
    key = (call.q.device, spec.K, spec.V, spec.kda, spec.dtype)
    if key not in _best:
        try:
            times = measure_chunks(spec, call)
            _best[key] = times[True] < times[False]
        except (RuntimeError, SyntaxError) as error:  # from Metal's compiler
            _best[key] = False
            reason = str(error).strip().partition("\n")[0]
            warnings.warn(
                f"anydelta: Metal: the kernel for long prompts does not run on this device, so prompts go token by "
                f"token: {reason}",
                RuntimeWarning,
                stacklevel=2,
            )
    return _best[key]


def measure_chunks(spec: CallSpec, call: Call, rounds: int = 5) -> dict[bool, float]:
    """Median seconds of a call token by token (False) and in chunks (True), interleaved, on separate arrays."""
    import torch

    plain = replace(
        spec, has_state=False, inplace=False, pooled=False, snapshots=0, snapshot_rows=False,
        options=spec.options._replace(output_final_state=True),
    )  # fmt: skip
    state = torch.empty((spec.N, spec.HV, spec.K, spec.V), device=call.q.device)
    out = torch.empty(call.v.shape, dtype=call.v.dtype, device=call.q.device)
    call = replace(
        call, state_in=None, state_indices=None, snapshots=None, snapshot_indices=None, state_out=state, o=out
    )
    plan = _Plan(plain, call)
    times: dict[bool, list[float]] = {False: [], True: []}
    host = _host()
    for _ in range(rounds + 1):
        for chunked, name in enumerate(isas()):
            with forced_isa(name):
                host.synchronize()
                start = time.perf_counter()
                BACKEND.run(plan, plain, call)
                host.synchronize()
                times[bool(chunked)].append(time.perf_counter() - start)
    return {chunked: median(t[1:]) for chunked, t in times.items()}  # the first round compiles


class Metal:
    name = "metal"
    mlx_host = "anydelta.backends.metal.mlx_host"

    def available(self) -> Sequence[Rejected]:
        if find_spec("torch") is None:
            return (Rejected("the package torch is not installed"),)
        if _emulator is not None:
            return ()
        if platform.system() != "Darwin":
            return (Rejected(f"needs an Apple GPU through torch.mps; this is {platform.system()}"),)
        import torch

        no = []
        if not torch.backends.mps.is_available():
            no.append("torch finds no Apple GPU (torch.backends.mps.is_available() is False)")
        if not hasattr(torch.mps, "compile_shader"):
            no.append(f"needs torch.mps.compile_shader, which torch {torch.__version__} does not have")
        return tuple(Rejected(reason) for reason in no)

    @property
    def accepts(self) -> Accepts:
        on = ("mps",) if _emulator is None else ("mps", "cpu")
        device = Row(on, "takes tensors on mps; got device {where}")
        return RULE_CALLS.but(framework=TORCH, device=device, K=UpTo(MAX_K), snapshot_rows=EITHER)

    def describe(self) -> dict[str, object]:
        if _emulator is not None:
            return {"devices": "none: an emulator, on the CPU"}
        import torch

        facts: dict[str, object] = {"torch": torch.__version__, "macOS": platform.mac_ver()[0]}
        if name := getattr(torch.backends.mps, "get_name", None):
            facts["device"] = name()
        return facts

    @property
    def tensors_on(self) -> str:
        """The device whose tensors `anydelta conform` gives to this backend."""
        return "cpu" if _emulator is not None else "mps"

    def prepare(self, spec: CallSpec, call: Call) -> _Plan:
        return _Plan(spec, call)

    def run(self, plan: _Plan, spec: CallSpec, call: Call) -> None:
        if plan.copies:
            call = replace(call, **{name: _copied(getattr(call, name), plan.device) for name in plan.copies})
        if plan.pooled_snapshots and _share_memory(call.state_in, call.snapshots):
            # slots of other sequences are rows that a lane still reads
            call = replace(call, state_in=call.state_in.clone())
        some = next((x for n in ARRAYS if (x := getattr(call, n)) is not None and x.numel()), None)
        if some is None:
            return
        kernels = plan.using(spec, call)
        carry = (
            some.new_empty((spec.N, spec.HV, spec.K, spec.V), dtype=_float32()) if kernels.carries else None
        )
        for kernel, launch in kernels.all:
            arrays = []
            for name in launch.arrays:
                x = carry if name == "carry" else getattr(call, name) if name else some
                # an absent array is bound but not touched
                arrays.append(some if x is None or not x.numel() else x)
            kernel(list(launch.params), *arrays, threads=launch.threads, group_size=launch.group_size)


def _needs_copy(name: str, x: torch.Tensor, device: torch.device) -> bool:
    if x is None:
        return False
    if x.device != device or dtype_name(x) == "float64":
        return True
    return name in _DENSE and len(x.shape) == 4 and x.shape[3] > 1 and element_strides(x)[3] != 1


def _copied(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Contiguous, on the device, float64 as float32. From the host without waiting for the device."""
    import torch

    dtype = torch.float32 if x.dtype == torch.float64 else x.dtype
    return x.to(dtype).to(device, non_blocking=True).contiguous()


def _float32() -> torch.dtype:
    import torch

    return torch.float32


def _share_memory(x: torch.Tensor, y: torch.Tensor) -> bool:
    return bool(x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr())


BACKEND = Metal()
