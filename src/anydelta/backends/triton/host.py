"""The Triton backend (CUDA, ROCm, XPU): hands pointers, strides and launch sizes to backends/triton.

Nothing here waits for the device: plans depend on shapes, and kernels themselves read what depends on data (the bounds
of packed sequences, skipped rows of a pool). All memory comes from torch. Under TRITON_INTERPRET=1 the same kernels run
on CPU tensors in NumPy, which is slow and meant for tests.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

from ...core.accepts import Accepts, Row, UpTo
from ...core.dispatch import Rejected
from ...core.late import late
from ...rule.arguments import TOKENS, Call
from ...rule.spec import CallSpec, dtype_name, element_strides
from ..accepts import EITHER, RULE_CALLS, TORCH
from . import tables
from .config import MAX_CHUNKED_K, Machine

if TYPE_CHECKING:
    import torch

    from . import backward, interpreter, launch
else:
    backward, interpreter, launch = (
        late(f"anydelta.backends.triton.{name}") for name in ("backward", "interpreter", "launch")
    )

DEVICES = ("cuda", "xpu")
MAX_K = 4096
"""Wider keys do not fit the registers of one program: a [4096, 1] state is 16 float32 per thread at 8 warps."""
INTERPRETER_ENV = "TRITON_INTERPRET"
_INPUTS = (*TOKENS, "A_log", "dt_bias", "cu_seqlens", "state_indices", "snapshot_indices")


def interpreted() -> bool:
    """Whether Triton's interpreter is on. Triton reads the variable when it is first imported."""
    return os.environ.get(INTERPRETER_ENV, "0").lower() in ("1", "true", "on", "yes", "y")


@dataclass(frozen=True)
class _Plan:
    launches: launch.Launches
    copies: tuple[str, ...]
    """Arrays that are copied first: their last dimension is strided, they are float64, or they are on the host."""
    pooled_snapshots: bool
    """Whether the pool is copied: it may share memory with a snapshot slot; programs overwrite each other's rows."""
    device: torch.device


class Triton:
    name = "triton"
    optional_A_log = True
    mixer = "anydelta.backends.triton.mixer"

    def available(self) -> Sequence[Rejected]:
        missing = [p for p in ("torch", "triton") if importlib.util.find_spec(p) is None]
        if missing:
            return tuple(Rejected(f"the package {package} is not installed") for package in missing)
        if interpreted():
            return ()
        from triton.runtime import driver

        try:
            driver.active.get_current_target()
        except Exception as error:  # each vendor's driver raises its own
            return (
                Rejected(
                    f"Triton finds no GPU driver ({error}); {INTERPRETER_ENV}=1 runs the kernels on the CPU, slowly"
                ),
            )
        return ()

    @property
    def accepts(self) -> Accepts:
        return RULE_CALLS.but(
            arrays=("erase",), framework=TORCH, device=device_row(), K=UpTo(MAX_K), snapshot_rows=EITHER
        )

    @property
    def accepts_gradients(self) -> Accepts:
        """Other calls use the reference's backward pass. Calls that the forward pass refuses are not repeated here."""
        return RULE_CALLS.but(
            framework=TORCH,
            device=device_row(),
            K=Row(UpTo(MAX_CHUNKED_K), "takes K {allowed} for gradients; got {got}"),
            # its kernels compute d / d log(decay), which is undefined at a decay of 0
            decay=Row(("log", "raw"), "takes {allowed} gates for gradients; got decay={got!r}"),
            rules=(_norms_have_gradients, _erase_has_no_gradient),
        )

    def describe(self) -> dict[str, object]:
        facts: dict[str, object] = {"triton": importlib.metadata.version("triton")}
        if found := sorted(folder.glob("*.json")) if (folder := tables.user_folder()) else []:
            facts["tables"] = [str(path) for path in found]
        if interpreted():
            return {**facts, "devices": "none: the interpreter, on the CPU"}
        import torch

        devices = []
        for kind in DEVICES:
            module = getattr(torch, kind)
            if module.is_available():
                devices += [f"{kind}:{i} {module.get_device_name(i)}" for i in range(module.device_count())]
        return {**facts, "devices": devices}

    def prepare(self, spec: CallSpec, call: Call) -> _Plan:
        if interpreted():
            interpreter.quicken()
        copies = tuple(name for name in _INPUTS if needs_copy(name, getattr(call, name), call.q.device))
        return _Plan(
            launch.Launches(spec, machine_of(call.q.device), strides_of(spec, call, copies)),
            copies,
            spec.pooled and call.snapshots is not None,
            call.q.device,
        )

    def gradients(
        self, spec: CallSpec, call: Call, grad_o: torch.Tensor, grad_state: torch.Tensor | None
    ) -> dict[str, torch.Tensor | None]:
        """Gradients of the inputs by name, from those of o and of the final state (in the caller's layout)."""
        plan = self.prepare(spec, call)
        inner = replace(call, **{name: copied(getattr(call, name), plan.device) for name in plan.copies})
        launches = backward.BackwardLaunches(
            spec, machine_of(plan.device), strides_of(spec, call, plan.copies)
        )
        do = grad_o if grad_o.shape[-1] == 1 or grad_o.stride(-1) == 1 else grad_o.contiguous()
        found = backward.room(spec, inner)
        with on_device(plan.device):
            for kernel_call in launches.calls(inner, do, grad_state, found):
                kernel_call.run()
        return backward.of_inputs(spec, call, found)

    def run(self, plan: _Plan, spec: CallSpec, call: Call) -> None:
        if plan.copies:
            call = replace(call, **{name: copied(getattr(call, name), plan.device) for name in plan.copies})
        if plan.pooled_snapshots and share_memory(call.state_in, call.snapshots):
            call = replace(call, state_in=call.state_in.clone())
        with on_device(plan.device):
            plan.launches.run(call)


def device_row() -> Row:
    """The devices whose tensors are currently taken."""
    also = ("cpu",) if interpreted() else ()
    return Row((*DEVICES, *also), f"takes tensors on {' or '.join(DEVICES)}; got device {{where}}")


def _norms_have_gradients(spec: CallSpec) -> str:
    eps = spec.options.qk_l2norm_eps
    return "" if launch.products_fit(spec) else f"takes qk_l2norm_eps from 1e-27 on for gradients; got {eps}"


def _erase_has_no_gradient(spec: CallSpec) -> str:
    return "takes beta for gradients; got erase" if "erase" in spec.given else ""


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Make this the current device, on which Triton launches."""
    if device.type == "cpu":
        return nullcontext()
    import torch

    current: AbstractContextManager[object] = getattr(torch, device.type).device(device)
    return current


def needs_copy(name: str, x: torch.Tensor | None, device: torch.device) -> bool:
    if x is None:
        return False
    if name in TOKENS:
        strides = element_strides(x)
        spread = len(strides) == 4 and strides[3] != 1 and x.shape[3] > 1
        return spread or dtype_name(x) == "float64"
    return bool(not x.is_contiguous() or x.device != device or dtype_name(x) == "float64")


def copied(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Contiguous, on the device, float64 as float32. From the host without waiting for the device."""
    import torch

    dtype = torch.float32 if x.dtype == torch.float64 else x.dtype
    return x.to(device, dtype, non_blocking=True).contiguous()


def share_memory(x: torch.Tensor, y: torch.Tensor) -> bool:
    return bool(x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr())


def strides_of(spec: CallSpec, call: Call, copies: Sequence[str] = ()) -> dict[str, tuple[int, ...]]:
    """Strides in elements by argument. Those of states are by axis (.., K, V), whatever the layout."""
    out = {}
    for name in TOKENS:
        x = getattr(call, name)
        out[name] = (
            (0, 0, 0) if x is None else (_dense(tuple(x.shape)) if name in copies else element_strides(x))[:3]
        )
    out["mask"] = (0, 0) if call.mask is None else element_strides(call.mask)
    vk = spec.options.state_layout == "vk"
    rows, columns = (spec.V, spec.K) if vk else (spec.K, spec.V)
    dense = _dense((spec.N, spec.HV, rows, columns))

    def by_axis(strides: tuple[int, ...]) -> tuple[int, ...]:
        return (*strides[:-2], strides[-1], strides[-2]) if vk else strides

    out["state"] = by_axis(dense if call.state_in is None else element_strides(call.state_in))
    out["state_out"] = out["state"] if spec.inplace else by_axis(dense)
    if spec.snapshot_rows:
        out["snapshots"] = (0, *out["state"])
    else:
        out["snapshots"] = by_axis((0, *dense) if call.snapshots is None else element_strides(call.snapshots))
    return out


def _dense(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides = [1]
    for n in reversed(shape[1:]):
        strides.append(strides[-1] * int(n))
    return tuple(reversed(strides))


@cache
def machine_of(device: torch.device) -> Machine:
    """The properties of a device that decide launches. The interpreter counts as a small machine, so that loops are
    short."""
    import torch

    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        if torch.version.hip:
            arch, shared = gpu.gcnArchName.split(":")[0], 64 * 1024
        else:
            arch = f"sm_{gpu.major}{gpu.minor}"
            shared = getattr(gpu, "shared_memory_per_block_optin", 96 * 1024)
        return Machine(arch, gpu.multi_processor_count, gpu.warp_size, shared)
    if device.type == "xpu":
        xpu = torch.xpu.get_device_properties(device)
        return Machine("xpu", xpu.gpu_subslice_count, 16, 128 * 1024)
    return Machine("interpreter", 1)


BACKEND = Triton()
