"""WebGPU: any GPU that wgpu-native drives (Vulkan, Metal, D3D12), through the package `wgpu`. WGSL: kernels/webgpu.

As vulkan.py, with what WebGPU lacks done here: mapped buffers cannot be used by shaders, so inputs are written through
the queue and o is read from a buffer that is mapped for each call; there are no 16-bit integers in storage, so o and
states are float32 on the device (half-typed inputs travel as they are, and are widened in the shader).
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Sequence
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

import anydelta

from .. import devices
from ..devices import Bytes, Device, DeviceArray, DeviceError, Memory
from ..dispatch import Rejected, UnsupportedError
from ..spec import Call, CallSpec
from .staging import HostStates, Layout

MAX_K = 4096
WORKGROUP = 64
DTYPES = ("float32", "bfloat16", "float16")
FLAGS = (
    "packed", "indexed", "masked", "has_state", "tiled", "vk", "linear", "raw", "lower", "dt_bias", "logit", "l2norm",
    "skips", "snapshot_rows",
)  # fmt: skip
"""Bits of Call.flags in kernels/webgpu/recurrent.wgsl, from the lowest."""

_serials = count()


def source(name: str) -> str:
    for folder in anydelta.__path__:
        path = Path(folder, "kernels", "webgpu", f"{name}.wgsl")
        if path.is_file():
            return path.read_text(encoding="utf-8")
    raise FileNotFoundError(name)


@cache
def adapters() -> list[Any]:
    """GPUs before CPU drivers; OpenGL, which shows the same hardware again with fewer features, is left out."""
    import wgpu

    order = ("DiscreteGPU", "IntegratedGPU", "Unknown", "CPU")
    found = [
        a for a in wgpu.gpu.enumerate_adapters_sync() if a.info["backend_type"] not in ("OpenGL", "OpenGLES")
    ]
    rank = {kind: i for i, kind in enumerate(order)}
    return sorted(found, key=lambda a: rank.get(a.info["adapter_type"], 2))


def open_device(index: int) -> Device:
    """The device "webgpu:INDEX".

    Raises:
        UnsupportedError: there is no such device; the text lists those there are.
    """
    found = adapters()
    if index >= len(found):
        names = ", ".join(f"webgpu:{i} ({a.info['device']})" for i, a in enumerate(found))
        raise UnsupportedError(f"device webgpu:{index}: the drivers here offer {names}")
    return WebGPUDevice(index, found[index])


class WebGPUMemory(Memory):
    """A storage buffer."""

    def __init__(self, device: WebGPUDevice, nbytes: int):
        import wgpu

        self.device, self.nbytes, self.serial = device, nbytes, next(_serials)
        usage = wgpu.BufferUsage.STORAGE | wgpu.BufferUsage.COPY_SRC | wgpu.BufferUsage.COPY_DST
        self.buffer = device.guarded(
            f"an array of {nbytes} bytes", lambda: device.handle.create_buffer(size=nbytes, usage=usage)
        )

    def write(self, offset: int, data: Bytes) -> None:
        with self.device.lock:
            self.device.queue.write_buffer(self.buffer, offset, np.ascontiguousarray(data))

    def read(self, offset: int, out: Bytes) -> None:
        with self.device.lock:
            got = self.device.guarded(
                "copying", lambda: self.device.queue.read_buffer(self.buffer, offset, out.size)
            )
            out[...] = np.frombuffer(got, np.uint8)

    def zero(self, offset: int, nbytes: int) -> None:
        self.device.encoded(lambda e: e.clear_buffer(self.buffer, offset, nbytes))

    def copy_from(self, offset: int, source: Memory, source_offset: int, nbytes: int) -> None:
        assert isinstance(source, WebGPUMemory)
        if source is self:  # WebGPU copies between different buffers only
            between = WebGPUMemory(self.device, nbytes)
            between.copy_from(0, source, source_offset, nbytes)
            source, source_offset = between, 0
        self.device.encoded(
            lambda e: e.copy_buffer_to_buffer(source.buffer, source_offset, self.buffer, offset, nbytes)
        )


class WebGPUDevice(Device):
    """One adapter's device and queue."""

    def __init__(self, index: int, adapter: Any):
        info = adapter.info
        super().__init__(
            f"webgpu:{index}", f"{info['device']} ({info['adapter_type']}, {info['backend_type']})"
        )
        self.adapter, self.lock = adapter, threading.RLock()
        self.max_range = int(adapter.limits["max-storage-buffer-binding-size"])
        smallest = int(info.get("subgroup_min_size") or info.get("stackgroup_min_size") or 0)
        self.subgroup = smallest if "subgroup" in adapter.features else 0
        wanted = ("max-storage-buffer-binding-size", "max-buffer-size", "min-storage-buffer-offset-alignment")
        self.handle = adapter.request_device_sync(
            required_features=["subgroup"] if self.subgroup else [],
            required_limits={name: adapter.limits[name] for name in wanted},
        )
        self.queue = self.handle.queue
        self.alignment = int(self.handle.limits["min-storage-buffer-offset-alignment"])
        self.groups = int(self.handle.limits["max-compute-workgroups-per-dimension"])
        self.pipelines: dict[Any, Any] = {}
        self.inputs: WebGPUMemory | None = None
        self.outputs: WebGPUMemory | None = None
        self.readback: Any = None

    def limits(self) -> dict[str, Any]:
        return limits_of(self.adapter)

    def guarded(self, what: str, run: Any) -> Any:
        """Run, and turn wgpu's errors into one sentence."""
        import wgpu

        self.check()
        try:
            return run()
        except wgpu.GPUOutOfMemoryError:
            raise DeviceError(
                f"{self.name} requires more memory for {what}; got an out-of-memory error from the driver. States are "
                f"as they were: free some arrays and call again"
            ) from None
        except (wgpu.GPUInternalError, RuntimeError) as error:
            if "lost" not in str(error).lower():
                raise
            self.lost = f"while {what}"
            self.check()

    def allocate(self, nbytes: int) -> WebGPUMemory:
        if nbytes > self.max_range:
            raise DeviceError(
                f"{self.name} requires arrays of at most {self.max_range} bytes (max-storage-buffer-binding-size); got "
                f"{nbytes}. Split the states over several arrays"
            )
        with self.lock:
            return WebGPUMemory(self, -(-nbytes // 4) * 4)

    def encoded(self, write: Any) -> None:
        """Submit what `write` encodes."""
        with self.lock:
            encoder = self.handle.create_command_encoder()
            write(encoder)
            self.guarded("running commands", lambda: self.queue.submit([encoder.finish()]))

    def reserve(self, nbytes_in: int, nbytes_out: int) -> None:
        """Make the staging buffers at least this large."""
        import wgpu

        for need in (nbytes_in, nbytes_out):
            if need > self.max_range:
                raise DeviceError(
                    f"{self.name} requires calls of at most {self.max_range} bytes; got {need}. States are as they "
                    f"were: call it on fewer tokens"
                )

        def size(n: int) -> int:
            return min(1 << max(n - 1, 65535).bit_length(), self.max_range)

        if self.inputs is None or self.inputs.nbytes < nbytes_in:
            self.inputs = WebGPUMemory(self, size(nbytes_in))
        if self.outputs is None or self.outputs.nbytes < nbytes_out:
            self.outputs = WebGPUMemory(self, size(nbytes_out))
            usage = wgpu.BufferUsage.MAP_READ | wgpu.BufferUsage.COPY_DST
            self.readback = self.handle.create_buffer(size=self.outputs.nbytes, usage=usage)

    def pipeline(self, lanes: int, rows4: int, kda: bool, dtype: int) -> Any:
        subgroup = 1 < lanes <= self.subgroup
        key = (lanes, rows4, kda, dtype)
        if key not in self.pipelines:
            head = (
                f"const WORKGROUP = {WORKGROUP}u;\nconst LANES = {lanes}u;\nconst ROWS4 = {rows4}u;\n"
                f"const KDA = {str(kda).lower()};\nconst DTYPE = {dtype}u;\n"
            )
            body = source("recurrent")
            builtins = ", @builtin(subgroup_id) sg: u32, @builtin(subgroup_size) sgs: u32, " \
                       "@builtin(subgroup_invocation_id) sgi: u32"  # fmt: skip
            body = body.replace(" SUBGROUP_BUILTINS\n", f"{builtins if subgroup else ''}\n", 1)
            body = body.replace("= INVOCATION;", "= sg * sgs + sgi;" if subgroup else "= local;", 1)
            code = head + source("lanes_subgroup" if subgroup else "lanes_shared") + body
            module = self.handle.create_shader_module(code=code)
            self.pipelines[key] = self.handle.create_compute_pipeline(
                layout="auto", compute={"module": module, "entry_point": "main"}
            )
        return self.pipelines[key]

    def bound(self, array: DeviceArray) -> tuple[dict[str, Any], int]:
        """(a binding of the array, its first element behind the binding's offset)."""
        memory = array.memory
        assert isinstance(memory, WebGPUMemory)
        rest = array.offset % self.alignment
        start = array.offset - rest
        nbytes = min(max(rest + array.nbytes, 4), memory.nbytes - start)
        return {"buffer": memory.buffer, "offset": start, "size": nbytes}, rest // 4


def limits_of(adapter: Any) -> dict[str, Any]:
    info, limits = adapter.info, adapter.limits
    return {
        "name": info["device"], "type": info["adapter_type"], "driver": info["backend_type"],
        "max_array": limits["max-storage-buffer-binding-size"],
        "shared_memory": limits["max-compute-workgroup-storage-size"], "subgroups": "subgroup" in adapter.features,
    }  # fmt: skip


class _Plan:
    """What a call needs besides its arrays."""

    def __init__(self, device: WebGPUDevice, spec: CallSpec, call: Call):
        groups = -(-spec.K // 4)
        self.device, self.lanes = device, 1
        while self.lanes < (device.subgroup or 8) and groups > 4 * self.lanes:
            self.lanes *= 2
        while self.lanes < 32 and groups > 32 * self.lanes:
            self.lanes *= 2
        self.rows4 = -(-groups // self.lanes)
        self.layout = Layout(spec, call, 4 * self.lanes * self.rows4, wide_output=True)
        self.stage = np.zeros(self.layout.nbytes_in, np.uint8)
        self.views = self.layout.views(self.stage)
        self.host: HostStates | None = None


class WebGPU:
    name = "webgpu"
    snapshot_rows = True

    def available(self) -> Sequence[Rejected]:
        try:
            found = adapters()
        except ImportError as error:
            return (Rejected(f"the package wgpu is not installed ({error}): pip install 'anydelta[webgpu]'"),)
        except (OSError, RuntimeError) as error:
            return (Rejected(f"wgpu-native does not start ({error})"),)
        return () if found else (Rejected("wgpu-native finds no driver (Vulkan, Metal or D3D12)"),)

    def supports(self, spec: CallSpec) -> Sequence[Rejected]:
        no = []
        if spec.device not in ("cpu", "webgpu"):
            no.append(
                f"takes host arrays, and states on the host or on webgpu; got {spec.resident or spec.device}"
            )
        if spec.dtype == "float64":
            no.append("takes float32, bfloat16 and float16; got float64")
        if spec.K > MAX_K:
            no.append(f"takes K up to {MAX_K}; got {spec.K}")
        if spec.resident and spec.state_dtype != "float32":
            no.append(
                f"keeps float32 states on its device, WebGPU having no 16-bit storage; got {spec.state_dtype}"
            )
        return tuple(Rejected(reason) for reason in no)

    def describe(self) -> dict[str, Any]:
        return {f"webgpu:{i}": limits_of(a) for i, a in enumerate(adapters())}

    def prepare(self, spec: CallSpec, call: Call) -> _Plan:
        device: Any = devices.device(spec.resident or "webgpu:0")
        device.check()
        if max(spec.HV, spec.N) > device.groups:
            raise UnsupportedError(
                f"{spec.options.op}: {device.name} cannot run this call: its driver takes up to {device.groups} value "
                f"heads and sequences; got {spec.HV} and {spec.N}"
            )
        return _Plan(device, spec, call)

    def run(self, plan: _Plan, spec: CallSpec, call: Call) -> None:
        device = plan.device
        device.check()
        with device.lock:
            if spec.resident:
                self._resident(plan, spec, call)
                return
            if plan.host is None:
                plan.host = HostStates(device, spec, "float32")
            held = plan.host
            held.upload(spec, call)
            self._run(plan, spec, call, held.state, held.snapshots, indexed=False)
            held.download(spec, call)

    def _resident(self, plan: _Plan, spec: CallSpec, call: Call) -> None:
        """The kernel advances a state in place, for a buffer cannot be bound for reading and for writing at once."""
        state, device = call.state_in, plan.device
        shared = call.snapshots is not None and state is not None and call.snapshots.memory is state.memory
        if spec.inplace and not shared:
            self._run(plan, spec, call, state, call.snapshots, indexed=spec.pooled)
            return
        dims = (spec.K, spec.V) if spec.options.state_layout == "kv" else (spec.V, spec.K)
        out = call.state_out if not spec.inplace and call.state_out is not None else None
        work = out if out is not None else device.empty((spec.N, spec.HV, *dims))
        rows = list(range(spec.N)) if not spec.pooled else np.asarray(call.state_indices).tolist()
        for n, row in enumerate(rows):
            if row < 0:
                work[n].zero()
            elif state is not None:
                work[n].write(state[row])
        self._run(plan, spec, call, work, call.snapshots, indexed=False)
        if spec.inplace:
            for n, row in enumerate(rows):
                if row >= 0:
                    state[row].write(work[n])

    def _run(
        self,
        plan: _Plan,
        spec: CallSpec,
        call: Call,
        state: DeviceArray,
        snapshots: DeviceArray | None,
        *,
        indexed: bool,
    ) -> None:
        import wgpu

        device, layout = plan.device, plan.layout
        if not spec.N:
            return
        layout.pack(call, plan.views)
        device.reserve(layout.nbytes_in, layout.nbytes_out)
        assert device.inputs is not None
        assert device.outputs is not None
        to_rows = indexed and spec.snapshot_rows
        state_at, first = device.bound(state)
        snaps_at, first_snap = device.bound(snapshots) if snapshots is not None else (None, 0)
        if to_rows:
            first_snap = first
        push = _uniforms(plan, spec, first, first_snap, indexed)
        queue = device.queue
        queue.write_buffer(device.inputs.buffer, 0, plan.stage)
        uniform = device.handle.create_buffer_with_data(data=push, usage=wgpu.BufferUsage.UNIFORM)
        spare = device.handle.create_buffer(size=16, usage=wgpu.BufferUsage.STORAGE)
        inputs = {"buffer": device.inputs.buffer, "offset": 0, "size": layout.nbytes_in}
        pipeline = device.pipeline(plan.lanes, plan.rows4, spec.kda, DTYPES.index(spec.dtype))
        group = device.handle.create_bind_group(
            layout=pipeline.get_bind_group_layout(0),
            entries=[
                {"binding": i, "resource": r}
                for i, r in enumerate(
                    (
                        inputs, inputs, {"buffer": device.outputs.buffer, "offset": 0, "size": layout.nbytes_out},
                        state_at, snaps_at or {"buffer": spare, "offset": 0, "size": 16},
                        {"buffer": uniform, "offset": 0, "size": len(push)},
                    )
                )
            ],
        )  # fmt: skip
        encoder = device.handle.create_command_encoder()
        work = encoder.begin_compute_pass()
        work.set_pipeline(pipeline)
        work.set_bind_group(0, group)
        work.dispatch_workgroups(-(-spec.V // (WORKGROUP // plan.lanes)), spec.HV, spec.N)
        work.end()
        encoder.copy_buffer_to_buffer(device.outputs.buffer, 0, device.readback, 0, layout.nbytes_out)

        def go() -> None:
            queue.submit([encoder.finish()])
            device.readback.map_sync(wgpu.MapMode.READ, 0, layout.nbytes_out)
            mapped = np.frombuffer(device.readback.read_mapped(0, layout.nbytes_out, copy=True), np.uint8)
            device.readback.unmap()
            layout.unpack(call, layout.o.view(mapped))

        device.guarded("running the operator", go)
        device.staged.to_device += layout.nbytes_in
        device.staged.from_device += layout.nbytes_out


def _uniforms(plan: _Plan, spec: CallSpec, first: int, first_snap: int, indexed: bool) -> bytes:
    """The struct Call of kernels/webgpu/recurrent.wgsl."""
    opt, offsets = spec.options, plan.layout.offsets
    on = {
        "packed": spec.packed,
        "indexed": indexed,
        "masked": spec.masked,
        "has_state": spec.has_state,
        "tiled": opt.heads == "tiled",
        "vk": opt.state_layout == "vk",
        "linear": opt.decay == "linear",
        "raw": opt.decay == "raw",
        "lower": opt.lower_bound is not None,
        "dt_bias": "dt_bias" in offsets,
        "logit": opt.beta_is_logit,
        "l2norm": opt.qk_l2norm,
        "skips": spec.pooled,
        "snapshot_rows": indexed and spec.snapshot_rows,
    }
    assert tuple(on) == FLAGS
    flags = sum(1 << i for i, name in enumerate(FLAGS) if on[name])
    at = (offsets.get(name, 0) // 4 for name in
          ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "mask", "cu_seqlens", "state_indices",
           "snapshot_indices"))  # fmt: skip
    return struct.pack(
        "8I3f13I", spec.T, spec.H, spec.HV, spec.K, spec.V, spec.N, spec.snapshots, flags,
        spec.scale, opt.qk_l2norm_eps, opt.lower_bound or 0.0, *at, first, first_snap,
    )  # fmt: skip


BACKEND = WebGPU()
