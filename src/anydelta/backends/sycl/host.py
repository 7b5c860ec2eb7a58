"""The SYCL backend: Intel's GPUs and CPUs through intel-sycl-rt, whose run-time compiler builds backends/sycl.

The host code is the extension anydelta._sycl, which CMake builds if it finds intel-sycl-rt. A kernel is compiled when a
head size is first used, and cached on disk (SYCL_CACHE_PERSISTENT, on by default here).

On devices that see the host's memory (CPUs, GPUs with system USM) kernels work on the caller's arrays. Elsewhere inputs
are packed into one piece of host USM and copied in one transfer, as are results. Devices that share memory with the
host use that piece directly. Arrays on a device (`anydelta.device("sycl:0")`, `from_usm`) are never copied.
ANYDELTA_SYCL_DEVICE chooses the device for host arrays (an index, or a part of its name), ANYDELTA_SYCL_MEMORY=copy
forces the transfer, ANYDELTA_SYCL_KERNEL chooses one of `isas()`.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...core.devices import DeviceArray
from ...core.dispatch import Rejected
from ...rule.arguments import Call
from ...rule.spec import CallSpec
from ...terminal import first_line
from ..devices.cuts import CutBackend, Packing, Plan, absent
from ..devices.params import address
from ..devices.structs import ARRAYS
from .device import SyclDevice, Variant, found, from_usm, host, roster, to_usm

__all__ = ["BACKEND", "forced_isa", "from_usm", "isas", "open_device", "to_usm"]

open_device, isas, forced_isa = roster.open, roster.isas, roster.forced_isa


class Sycl(CutBackend[SyclDevice]):
    name = "sycl"
    title = "a SYCL"
    also = ("xpu",)

    def available(self) -> Sequence[Rejected]:
        try:
            host()
        except ImportError as error:
            return (
                Rejected(
                    f"the extension anydelta._sycl is not built or does not load ({error}); run: pip install "
                    f"intel-sycl-rt==2026.2.0 intel-opencl-rt==2026.2.0, and then build anydelta with pip's "
                    f"--no-build-isolation"
                ),
            )
        try:
            if not found():
                return (
                    Rejected(
                        "no SYCL device has a driver that runs here; install that of the GPU, or a CPU "
                        "runtime: pip install intel-opencl-rt"
                    ),
                )
            roster.default()
        except (RuntimeError, ValueError) as error:
            return (Rejected(first_line(error)),)
        return ()

    def launch(self, plan: Plan, spec: CallSpec, call: Call, cut: Variant, groups: int) -> None:
        device = plan.device
        if spec.device == "xpu":  # torch uses another queue
            import torch

            torch.xpu.synchronize()
        device.build(cut)
        if plan.memory == "copy":
            _run_copy(plan, spec, call, cut, groups)
            return
        at = [address(getattr(call, name)) for name in ARRAYS]
        device.queue.run(cut.symbol, plan.params(at), groups, cut.group)
        device.queue.wait()


def _run_copy(plan: Plan, spec: CallSpec, call: Call, cut: Variant, groups: int) -> None:
    """Copy packed inputs in one transfer, run, and copy results in one."""
    device = plan.device
    packing = Packing(spec, call)
    here, there = device.staging(packing.nbytes_in, packing.nbytes_out)
    view, behind = here.view(), packing.nbytes_in
    results = view[behind:]
    at = absent()
    for i, name in enumerate(ARRAYS):
        x = getattr(call, name)
        if type(x) is DeviceArray:
            at[i] = address(x)
    for i, _, offset, _ in packing.taken:
        at[i] = there.address + offset
    for i, _, offset, _ in packing.given:
        at[i] = there.address + behind + offset
    crossing, kept = packing.load(view, results)
    device.staged.to_device += crossing
    sent = behind + packing.nbytes_out if kept else behind
    if there is not here and sent:
        device.queue.copy(there.address, here.address, sent)
    device.queue.run(cut.symbol, plan.params(at), groups, cut.group)
    if there is not here and packing.nbytes_out:
        device.queue.copy(here.address + behind, there.address + behind, packing.nbytes_out)
    device.queue.wait()
    device.staged.from_device += packing.store(results)


BACKEND = Sycl(roster)
