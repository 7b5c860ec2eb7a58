"""The OpenCL backend: any device with an OpenCL 1.2 driver, through pyopencl. The driver compiles backends/opencl.

How a call's arrays reach the device depends on what the driver offers (`OpenclDevice.memory`):

    address   fine-grain system SVM (CPU runtimes): the kernel reads and writes the caller's memory, nothing is copied
    wrap      memory shared with the host (integrated GPUs, pocl): buffers over the caller's memory
    copy      separate memory: inputs are packed into one pinned buffer and copied in one transfer, as are results

Arrays on a device (`anydelta.device("opencl:0")`, `from_pyopencl`) are never copied. ANYDELTA_OPENCL_DEVICE chooses the
device for host arrays (an index, or a part of its name), ANYDELTA_OPENCL_MEMORY one of the three,
ANYDELTA_OPENCL_KERNEL one of `isas()`.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ...core.devices import DeviceArray, DeviceError
from ...core.dispatch import Rejected, UnsupportedError
from ...rule.arguments import Call
from ...rule.spec import CallSpec
from ..devices.cuts import CutBackend, Packing, Plan, absent
from ..devices.params import WRITTEN, address, skip, span
from ..devices.structs import ARRAYS
from .device import OpenclDevice, Variant, api, found, from_pyopencl, roster, to_pyopencl

if TYPE_CHECKING:
    import pyopencl as cl

__all__ = ["BACKEND", "forced_isa", "from_pyopencl", "isas", "open_device", "to_pyopencl"]

open_device, isas, forced_isa = roster.open, roster.isas, roster.forced_isa


class Opencl(CutBackend[OpenclDevice]):
    name = "opencl"
    title = "an OpenCL"

    def available(self) -> Sequence[Rejected]:
        try:
            api()
        except ImportError as error:
            return (
                Rejected(f"pyopencl is not installed or does not load ({error}); run: pip install pyopencl"),
            )
        if not found():
            return (
                Rejected(
                    "no OpenCL driver has a device; install that of the GPU, or a CPU runtime: "
                    "pip install intel-opencl-rt intel-cmplr-lib-rt"
                ),
            )
        try:
            roster.default()
        except (DeviceError, UnsupportedError, ValueError) as error:
            return (Rejected(str(error)),)
        return ()

    def launch(self, plan: Plan, spec: CallSpec, call: Call, cut: Variant, groups: int) -> None:
        kernel = plan.device.program(cut, "by_address" if plan.memory == "address" else "by_buffer")
        _RUNS[plan.memory](plan, spec, call, kernel, groups * cut.WG, cut.WG)


def _run_address(plan: Plan, spec: CallSpec, call: Call, kernel: cl.Kernel, size: int, group: int) -> None:
    """The kernel reads and writes every array where it is."""
    at = [address(getattr(call, name)) for name in ARRAYS]
    _launch(plan.device, kernel, plan.params(at), (), size, group)
    plan.device.queue.finish()


def _run_wrap(plan: Plan, spec: CallSpec, call: Call, kernel: cl.Kernel, size: int, group: int) -> None:
    """Run on buffers over the caller's memory. Arrays that overlap (q, k, v of one tensor) share one."""
    cl, device = api(), plan.device
    flags = cl.mem_flags.READ_WRITE | cl.mem_flags.USE_HOST_PTR
    at, buffers = _resident(call)
    spans = []
    for i, name in enumerate(ARRAYS):
        x = getattr(call, name)
        if x is not None and type(x) is not DeviceArray and math.prod(x.shape):
            spans.append((*span(x), i, name in WRITTEN))
    spans.sort()
    merged: list[list[Any]] = []
    for low, high, i, written in spans:
        if merged and low < merged[-1][1]:
            last = merged[-1]
            last[1], last[2] = max(last[1], high), last[2] or written
            last[3].append((i, low))
        else:
            merged.append([low, high, written, [(i, low)]])
    results = []
    for low, high, written, members in merged:
        host = np.ctypeslib.as_array((ctypes.c_uint8 * (high - low)).from_address(low))
        buffer = cl.Buffer(device.context, flags, hostbuf=host)
        for i, start in members:
            at[i], buffers[i] = start + skip(getattr(call, ARRAYS[i])) - low, buffer
        if written:
            results.append((buffer, high - low))
    _launch(device, kernel, plan.params(at), buffers, size, group)
    for buffer, nbytes in results:  # mapping makes the results visible to the host
        view, _ = cl.enqueue_map_buffer(
            device.queue, buffer, cl.map_flags.READ, 0, (nbytes,), np.uint8, is_blocking=False
        )
        view.base.release(device.queue)
    device.queue.finish()


def _run_copy(plan: Plan, spec: CallSpec, call: Call, kernel: cl.Kernel, size: int, group: int) -> None:
    """Copy packed inputs in one transfer, run, and copy results in one."""
    cl, device = api(), plan.device
    packing = Packing(spec, call)
    staging = device.pinned(packing.nbytes_in, packing.nbytes_out)
    at, buffers = _resident(call)
    for rows, buffer in ((packing.taken, staging.device_in), (packing.given, staging.device_out)):
        for i, _, offset, _ in rows:
            at[i], buffers[i] = offset, buffer
    crossing, kept = packing.load(staging.host_in, staging.host_out)
    device.staged.to_device += crossing
    sent = [(staging.device_in, staging.host_in[: packing.nbytes_in])]
    if kept:
        sent.append((staging.device_out, staging.host_out[: packing.nbytes_out]))
    for buffer, host in sent:
        if host.size:
            cl.enqueue_copy(device.queue, buffer, host, is_blocking=False)
    _launch(device, kernel, plan.params(at), buffers, size, group)
    if packing.nbytes_out:
        cl.enqueue_copy(
            device.queue, staging.host_out[: packing.nbytes_out], staging.device_out, is_blocking=True
        )
    else:
        device.queue.finish()
    device.staged.from_device += packing.store(staging.host_out)


def _resident(call: Call) -> tuple[list[int], list[Any]]:
    """(byte offset, buffer) of the arrays on the device, by number. The others are added later."""
    at, buffers = absent(), [None] * len(ARRAYS)
    for i, name in enumerate(ARRAYS):
        x = getattr(call, name)
        if type(x) is DeviceArray:
            at[i], buffers[i] = x.offset, x.memory.buffer  # type: ignore[attr-defined]
    return at, buffers


_RUNS = {"address": _run_address, "wrap": _run_wrap, "copy": _run_copy}


def _launch(
    device: OpenclDevice,
    kernel: cl.Kernel,
    params: bytes,
    buffers: Sequence[cl.Buffer | None],
    size: int,
    group: int,
) -> None:
    kernel.set_arg(0, params)
    if buffers:
        some = next(b for b in buffers if b is not None)
        for i, buffer in enumerate(buffers):
            kernel.set_arg(i + 1, some if buffer is None else buffer)
    api().enqueue_nd_range_kernel(device.queue, kernel, (size,), (group,))


BACKEND = Opencl(roster)
