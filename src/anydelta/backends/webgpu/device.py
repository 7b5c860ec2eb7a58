"""WebGPU devices: adapter, buffers, pipelines, launches. host.py runs calls on them.

Objects are made through the package wgpu, which checks each call. The steps of an operator's call use wgpu-native's C
functions, which wgpu exposes. wgpu's own wrapper takes 5 to 10 us for each of the thirty functions and waits in another
thread, which costs more than everything else. Errors come through WebGPU's error scopes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import count
from typing import Any

import numpy as np
import wgpu
from wgpu.backends.wgpu_native import ffi, lib

from ...core.devices import Bytes, Device, DeviceArray, DeviceError, Memory
from ..devices.llvm import load_triton_first
from ..devices.staging import WORKGROUP, Launches
from ..devices.structs import CALL, WEBGPU_FLAGS, bits, source

_USAGE = wgpu.BufferUsage.STORAGE | wgpu.BufferUsage.COPY_SRC | wgpu.BufferUsage.COPY_DST
_SCOPES = (lib.WGPUErrorFilter_OutOfMemory, lib.WGPUErrorFilter_Validation)
"""wgpu-native has no other kind. Other errors show when the result is mapped."""
_MAPPABLE = "mappable-primary-buffers"
_ERRORS = {
    lib.WGPUErrorType_OutOfMemory: wgpu.GPUOutOfMemoryError,
    lib.WGPUErrorType_Validation: wgpu.GPUValidationError,
}
_serials = count()


@cache
def adapters() -> list[wgpu.GPUAdapter]:
    """The adapters, GPUs before CPU drivers. OpenGL is left out: the same hardware again, with fewer features."""
    load_triton_first()
    order = ("DiscreteGPU", "IntegratedGPU", "Unknown", "CPU")
    found = [
        a for a in wgpu.gpu.enumerate_adapters_sync() if a.info["backend_type"] not in ("OpenGL", "OpenGLES")
    ]
    rank = {kind: i for i, kind in enumerate(order)}
    return sorted(found, key=lambda a: rank.get(a.info["adapter_type"], 2))


def limits_of(adapter: wgpu.GPUAdapter) -> dict[str, object]:
    info, limits = adapter.info, adapter.limits
    return {
        "name": info["device"], "type": info["adapter_type"], "driver": info["backend_type"],
        "max_array": limits["max-storage-buffer-binding-size"],
        "shared_memory": limits["max-compute-workgroup-storage-size"], "subgroups": "subgroup" in adapter.features,
    }  # fmt: skip


class WebGPUMemory(Memory):
    """A storage buffer."""

    def __init__(self, device: WebGPUDevice, nbytes: int, usage: int = _USAGE):
        self.device, self.nbytes, self.serial = device, nbytes, next(_serials)
        with device.guarded(f"an array of {nbytes} bytes"):
            self.buffer = device.handle.create_buffer(size=nbytes, usage=usage)

    @property
    def native(self) -> object:
        """wgpu-native's handle."""
        return self.buffer._internal

    def write(self, offset: int, data: Bytes) -> None:
        with self.device.lock, self.device.guarded("copying"):
            self.device.handle.queue.write_buffer(self.buffer, offset, np.ascontiguousarray(data))

    def read(self, offset: int, out: Bytes) -> None:
        with self.device.lock, self.device.guarded("copying"):
            got = self.device.handle.queue.read_buffer(self.buffer, offset, out.size)
        out[...] = np.frombuffer(got, np.uint8)

    def zero(self, offset: int, nbytes: int) -> None:
        self.device.encoded(lambda e: e.clear_buffer(self.buffer, offset, nbytes))

    def copy_from(self, offset: int, source: Memory, source_offset: int, nbytes: int) -> None:
        assert isinstance(source, WebGPUMemory)
        if source is self:  # WebGPU only copies between different buffers
            between = WebGPUMemory(self.device, nbytes)
            between.copy_from(0, source, source_offset, nbytes)
            source, source_offset = between, 0
        self.device.encoded(
            lambda e: e.copy_buffer_to_buffer(source.buffer, source_offset, self.buffer, offset, nbytes)
        )

    def __del__(self) -> None:
        self.device.forget(self.serial)


class Launch:
    """The prepared parts of a call: pipeline, bind group, grid. WebGPU encodes commands anew for each call."""

    __slots__ = ("grid", "group", "pipeline", "serials", "uniforms")

    def __init__(
        self,
        pipeline: wgpu.GPUComputePipeline,
        group: wgpu.GPUBindGroup,
        grid: tuple[int, int, int],
        serials: frozenset[int],
        uniforms: Bytes,
    ):
        self.pipeline, self.group, self.grid = pipeline, group, grid
        self.serials, self.uniforms = serials, uniforms


class WebGPUDevice(Device):
    """One adapter's device and queue, used by one thread at a time. `copies`: act as if memory were not unified
    (tests)."""

    def __init__(self, index: int, adapter: wgpu.GPUAdapter, *, copies: bool = False):
        info = adapter.info
        super().__init__(
            f"webgpu:{index}", f"{info['device']} ({info['adapter_type']}, {info['backend_type']})"
        )
        self.adapter, self.lock = adapter, threading.RLock()
        self.launches: Launches[Launch] = Launches(lambda launch: None)
        self.most_bytes = int(adapter.limits["max-storage-buffer-binding-size"])
        smallest = int(info.get("subgroup_min_size") or info.get("stackgroup_min_size") or 0)
        self.subgroup = smallest if "subgroup" in adapter.features else 0
        wanted = ("max-storage-buffer-binding-size", "max-buffer-size", "min-storage-buffer-offset-alignment")
        self.is_cpu = info["adapter_type"] == "CPU"
        shared = self.is_cpu or info["adapter_type"] == "IntegratedGPU"
        self.unified = shared and _MAPPABLE in adapter.features and not copies
        """Whether shaders use mapped memory, so that inputs and o are copied once instead of twice."""
        self.handle = adapter.request_device_sync(
            required_features=["subgroup"] * bool(self.subgroup) + [_MAPPABLE] * self.unified,
            required_limits={name: adapter.limits[name] for name in wanted},
        )
        self.alignment = int(self.handle.limits["min-storage-buffer-offset-alignment"])
        self.max_groups = (int(self.handle.limits["max-compute-workgroups-per-dimension"]),) * 3
        self._pipelines: dict[object, object] = {}
        self.inputs: WebGPUMemory | None = None
        self.outputs: WebGPUMemory | None = None
        self.readback: WebGPUMemory | None = None
        self.spare = WebGPUMemory(self, 16)
        """Bound if a call has no snapshots."""
        self._calls = _Calls(self.handle, self.unified)

    def limits(self) -> dict[str, object]:
        return limits_of(self.adapter)

    @contextmanager
    def guarded(self, what: str) -> Iterator[None]:
        """Turn wgpu's errors into one sentence each."""
        self.check()
        try:
            yield
        except wgpu.GPUOutOfMemoryError:
            raise DeviceError(
                f"{self.name} requires more memory for {what}; got an out-of-memory error from the driver. States are "
                f"as they were: free some arrays and call again"
            ) from None
        except (wgpu.GPUError, RuntimeError) as error:
            if "lost" not in str(error).lower():
                raise
            self.lost = f"while {what}"
            self.check()

    def allocate(self, nbytes: int) -> WebGPUMemory:
        with self.lock:
            return WebGPUMemory(self, -(-nbytes // 4) * 4)

    def forget(self, serial: int) -> None:
        """Drop bind groups that use a buffer, which is freed: they would keep its memory."""
        with self.lock:
            self.launches.forget(serial)

    def encoded(self, write: Callable[[wgpu.GPUCommandEncoder], None]) -> None:
        """Submit what `write` encodes."""
        with self.lock, self.guarded("running commands"):
            encoder = self.handle.create_command_encoder()
            write(encoder)
            self.handle.queue.submit([encoder.finish()])

    def reserve(self, nbytes_in: int, nbytes_out: int) -> None:
        """Make the staging buffers at least this large."""

        def size(n: int) -> int:
            return min(1 << max(n - 1, 65535).bit_length(), self.most_bytes)

        old, usage = (self.inputs, self.outputs), wgpu.BufferUsage
        if self.inputs is None or self.inputs.nbytes < nbytes_in:
            how = usage.MAP_WRITE if self.unified else usage.COPY_DST
            self.inputs = WebGPUMemory(self, size(nbytes_in), usage.STORAGE | usage.UNIFORM | how)
        if self.outputs is None or self.outputs.nbytes < nbytes_out:
            how = usage.MAP_READ if self.unified else usage.COPY_SRC
            self.outputs = self.readback = WebGPUMemory(self, size(nbytes_out), usage.STORAGE | how)
            if not self.unified:
                self.readback = WebGPUMemory(self, self.outputs.nbytes, usage.MAP_READ | usage.COPY_DST)
        if old != (self.inputs, self.outputs):
            assert self.readback is not None
            self.launches.clear()
            with self.guarded("mapping a call's inputs"):
                self._calls.use(self.inputs, self.outputs, self.readback)

    def pipeline(self, lanes: int, rows4: int, kda: bool, dtype: int) -> wgpu.GPUComputePipeline:
        subgroup = 1 < lanes <= self.subgroup
        key = (lanes, rows4, kda, dtype, subgroup)
        if key not in self._pipelines:
            head = (
                f"const WORKGROUP = {WORKGROUP}u;\nconst LANES = {lanes}u;\nconst ROWS4 = {rows4}u;\n"
                f"const KDA = {str(kda).lower()};\nconst DTYPE = {dtype}u;\n"
            )
            head += f"struct Call {{\n{CALL.text('wgsl')}}}\n" + bits(
                WEBGPU_FLAGS, "const {name} = {value}u;"
            )
            body = source("webgpu", "recurrent.wgsl")
            builtins = ", @builtin(subgroup_id) sg: u32, @builtin(subgroup_size) sgs: u32, " \
                       "@builtin(subgroup_invocation_id) sgi: u32"  # fmt: skip
            body = body.replace(" SUBGROUP_BUILTINS\n", f"{builtins if subgroup else ''}\n", 1)
            body = body.replace("= INVOCATION;", "= sg * sgs + sgi;" if subgroup else "= local;", 1)
            lanes_file = f"lanes_{'one' if lanes == 1 else 'subgroup' if subgroup else 'shared'}.wgsl"
            code = head + source("webgpu", lanes_file) + body
            with self.guarded("compiling"):
                module = self.handle.create_shader_module(code=code)
                self._pipelines[key] = self.handle.create_compute_pipeline(
                    layout="auto", compute={"module": module, "entry_point": "main"}
                )
        return self._pipelines[key]

    def bound(self, array: DeviceArray) -> tuple[dict[str, object], int]:
        """(a binding of the array, its first element after the binding's offset)."""
        memory = array.memory
        assert isinstance(memory, WebGPUMemory)
        rest = array.offset % self.alignment
        start = array.offset - rest
        nbytes = min(max(rest + array.nbytes, 4), memory.nbytes - start)
        return {"buffer": memory.buffer, "offset": start, "size": nbytes}, rest // 4

    def bind(
        self, pipeline: wgpu.GPUComputePipeline, resources: Sequence[dict[str, object]]
    ) -> wgpu.GPUBindGroup:
        entries = [{"binding": i, "resource": r} for i, r in enumerate(resources)]
        with self.guarded("binding a call's arrays"):
            return self.handle.create_bind_group(layout=pipeline.get_bind_group_layout(0), entries=entries)

    def run(self, launch: Launch, stage: Bytes, nbytes_out: int, take: Callable[[Bytes], None]) -> None:
        """Write `stage` to the inputs, dispatch, and pass the output's bytes to `take`, mapped until it returns."""
        with self.guarded("running the operator"):
            try:
                self._calls.dispatch(launch, stage, nbytes_out)
                take(self._calls.result(nbytes_out))
            except BaseException:  # it is unknown what is mapped now
                self.inputs = self.outputs = self.readback = self._calls.inputs = None
                self.launches.clear()
                raise
            lib.wgpuBufferUnmap(self._calls.readback)


class _Calls:
    """One call through wgpu-native's functions (webgpu.h), whose descriptors are made once.

    On unified memory the inputs stay mapped between calls, and o is mapped where the shader wrote it. Elsewhere inputs
    go through the queue, and o is copied to `readback`.
    """

    def __init__(self, handle: wgpu.GPUDevice, unified: bool):
        self.device, self.queue, self.unified = handle._internal, handle.queue._internal, unified
        self.inputs: wgpu.GPUBuffer | None = None
        self.inputs_size = 0
        self.outputs: wgpu.GPUBuffer | None = None
        self.readback: wgpu.GPUBuffer | None = None
        self.encoder = ffi.new("WGPUCommandEncoderDescriptor *")
        self.compute = ffi.new("WGPUComputePassDescriptor *")
        self.finish = ffi.new("WGPUCommandBufferDescriptor *")
        self.commands = ffi.new("WGPUCommandBuffer[1]")
        self.errors: list[Exception] = []
        self.pending = 0

        @ffi.callback("WGPUBufferMapCallback")  # type: ignore[untyped-decorator]
        def mapped(status: int, message: object, _first: object, _second: object) -> None:
            self.pending -= 1
            if status != lib.WGPUMapAsyncStatus_Success:
                self.errors.append(wgpu.GPUInternalError(_text(message)))

        @ffi.callback("WGPUPopErrorScopeCallback")  # type: ignore[untyped-decorator]
        def popped(_status: int, kind: int, message: object, _first: object, _second: object) -> None:
            if kind != lib.WGPUErrorType_NoError:
                self.errors.append(_ERRORS.get(kind, wgpu.GPUInternalError)(_text(message)))

        self._map = ffi.new("WGPUBufferMapCallbackInfo *")
        self._pop = ffi.new("WGPUPopErrorScopeCallbackInfo *")
        self._map.mode = self._pop.mode = lib.WGPUCallbackMode_AllowProcessEvents
        self._map.callback, self._pop.callback = mapped, popped
        self._keep = (handle, mapped, popped)

    def use(self, inputs: WebGPUMemory, outputs: WebGPUMemory, readback: WebGPUMemory) -> None:
        """Set the staging buffers; `inputs` is mapped on unified memory, unless it is already."""
        before, self.inputs, self.inputs_size = self.inputs, inputs.native, inputs.nbytes
        self.outputs, self.readback = outputs.native, readback.native
        if self.unified and before != self.inputs:
            self._start()
            self._map_async(self.inputs, lib.WGPUMapMode_Write, self.inputs_size)
            self._raise()
            self._wait()

    def dispatch(self, launch: Launch, stage: Bytes, nbytes_out: int) -> None:
        """Inputs in, dispatch, and wait until o can be read.

        Raises:
            wgpu.GPUError: with the driver's message.
        """
        self._start()
        if self.unified:
            start = lib.wgpuBufferGetMappedRange(self.inputs, 0, stage.size)
            ffi.memmove(start, ffi.from_buffer(stage), stage.size)
            lib.wgpuBufferUnmap(self.inputs)
        else:
            lib.wgpuQueueWriteBuffer(self.queue, self.inputs, 0, ffi.from_buffer(stage), stage.size)
        encoder = lib.wgpuDeviceCreateCommandEncoder(self.device, self.encoder)
        work = lib.wgpuCommandEncoderBeginComputePass(encoder, self.compute)
        lib.wgpuComputePassEncoderSetPipeline(work, launch.pipeline._internal)
        lib.wgpuComputePassEncoderSetBindGroup(work, 0, launch.group._internal, 0, ffi.NULL)
        lib.wgpuComputePassEncoderDispatchWorkgroups(work, *launch.grid)
        lib.wgpuComputePassEncoderEnd(work)
        lib.wgpuComputePassEncoderRelease(work)
        if not self.unified:
            lib.wgpuCommandEncoderCopyBufferToBuffer(encoder, self.outputs, 0, self.readback, 0, nbytes_out)
        commands = self.commands[0] = lib.wgpuCommandEncoderFinish(encoder, self.finish)
        lib.wgpuCommandEncoderRelease(encoder)
        try:
            self._raise()  # wgpu-native aborts the process if refused commands are submitted
            lib.wgpuQueueSubmit(self.queue, 1, self.commands)
        finally:
            lib.wgpuCommandBufferRelease(commands)
        self._map_async(self.readback, lib.WGPUMapMode_Read, nbytes_out)
        if self.unified:
            self._map_async(self.inputs, lib.WGPUMapMode_Write, self.inputs_size)
        self._wait()

    def result(self, nbytes: int) -> Bytes:
        """The first bytes of o, until `readback` is unmapped."""
        start = lib.wgpuBufferGetConstMappedRange(self.readback, 0, nbytes)
        return np.frombuffer(ffi.buffer(start, nbytes), np.uint8)

    def _map_async(self, buffer: wgpu.GPUBuffer, mode: int, nbytes: int) -> None:
        self.pending += 1
        lib.wgpuBufferMapAsync(buffer, mode, 0, nbytes, self._map[0])

    def _start(self) -> None:
        self.errors.clear()
        self.pending = 0
        for kind in _SCOPES:
            lib.wgpuDevicePushErrorScope(self.device, kind)

    def _raise(self) -> None:
        for _ in _SCOPES:
            lib.wgpuDevicePopErrorScope(self.device, self._pop[0])
        if self.errors:
            raise self.errors[0]

    def _wait(self) -> None:
        """Wait until the mapping succeeds or fails."""
        while self.pending > 0:
            lib.wgpuDevicePoll(self.device, True, ffi.NULL)
        if self.errors:
            raise self.errors[0]


def _text(view: Any) -> str:
    """A WGPUStringView."""
    if view.data == ffi.NULL:
        return ""
    whole = view.length == lib.WGPU_STRLEN
    text: bytes = ffi.string(view.data) if whole else ffi.string(view.data, view.length)
    return text.decode(errors="replace")
