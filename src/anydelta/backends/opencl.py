"""The OpenCL backend: any device with an OpenCL 1.2 driver, through pyopencl. The driver compiles kernels/opencl.

How a call's arrays reach the device depends on what the driver offers (`OpenclDevice.memory`):

    address   fine-grain system SVM (CPU runtimes): the kernel reads and writes the caller's memory, nothing is copied
    wrap      memory shared with the host (integrated GPUs, pocl): buffers over the caller's memory
    copy      memory of its own: inputs are packed into one pinned buffer and cross in one transfer, as do results

States and snapshots that live on a device (`anydelta.device("opencl:0")`) cross in no case. ANYDELTA_OPENCL_DEVICE
picks the device for host arrays (an index, or a part of its name), ANYDELTA_OPENCL_MEMORY forces one of the three,
ANYDELTA_OPENCL_KERNEL one of `isas()`.
"""

from __future__ import annotations

import ctypes
import math
import os
import struct
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from importlib import metadata, resources
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from ..devices import Bytes, Device, DeviceArray, DeviceError, Memory, numpy_dtype
from ..dispatch import Rejected, UnsupportedError
from ..spec import Call, CallSpec, dtype_name
from .llvm import load_triton_first
from .params import (
    ABSENT,
    ARRAYS,
    GATES,
    ITEMSIZE,
    TYPE,
    WRITTEN,
    address,
    as_bits,
    as_float32,
    pack,
    pack_params,
    skip,
    span,
)  # fmt: skip

DEVICE_ENV, MEMORY_ENV, KERNEL_ENV = (f"ANYDELTA_OPENCL_{x}" for x in ("DEVICE", "MEMORY", "KERNEL"))
MEMORIES = ("address", "wrap", "copy")
_ROWS = (16, 32, 64, 96, 128, 192, 256)
"""Head sizes K that the kernel is built for, beyond them multiples of 64; the rows between K and the next are zeros."""
# ---- drivers and devices


def intel_runtime() -> Path | None:
    """libintelocl.so of the package intel-opencl-rt, whose own .icd file points nowhere when pip has installed it."""
    try:
        files = metadata.files("intel-opencl-rt") or ()
    except metadata.PackageNotFoundError:
        return None
    return next((Path(str(f.locate())).resolve() for f in files if f.name == "libintelocl.so"), None)


@cache
def _cl() -> Any:
    """pyopencl, with its drivers found: those of the system, and intel-opencl-rt.

    The loader looks for drivers once, in one folder. Unless OCL_ICD_VENDORS names it, that is one that we fill.
    """
    load_triton_first()
    import pyopencl as cl

    library = intel_runtime()
    if library is None or os.environ.get("OCL_ICD_VENDORS"):
        return cl
    system = Path("/etc/OpenCL/vendors")
    with TemporaryDirectory() as folder:
        for icd in system.glob("*.icd") if system.is_dir() else ():
            (Path(folder) / icd.name).write_bytes(icd.read_bytes())
        (Path(folder) / "anydelta-intel.icd").write_text(f"{library}\n")
        os.environ["OCL_ICD_VENDORS"] = folder
        try:
            cl.get_platforms()
        except cl.Error:
            pass  # no driver at all: `available` says so
        finally:
            del os.environ["OCL_ICD_VENDORS"]
    return cl


@cache
def _found() -> tuple[Any, ...]:
    """Every OpenCL device, GPUs first, and Intel's runtime before other CPU drivers."""
    cl = _cl()
    try:
        platforms = cl.get_platforms()
    except cl.Error:
        return ()
    out = []
    for platform in platforms:
        try:
            out += platform.get_devices()
        except cl.Error:
            continue  # a driver without a device
    kinds = (cl.device_type.GPU, cl.device_type.ACCELERATOR, cl.device_type.CPU)

    def rank(device: Any) -> tuple[int, bool]:
        kind = next((i for i, k in enumerate(kinds) if device.type & k), len(kinds))
        return kind, "Intel" not in device.platform.name

    return tuple(sorted(out, key=rank))


def _label(device: Any) -> str:
    return f"{device.name.strip()} ({device.platform.name.strip()})"


def _sentence(error: Exception) -> str:
    """The first line of a driver's error."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class _Buffer(Memory):
    """A cl.Buffer, or host memory that the device sees as it is (memory "address")."""

    def __init__(self, device: OpenclDevice, nbytes: int, buffer: Any = None, block: Bytes | None = None):
        self.device, self.nbytes, self.block = device, nbytes, block
        self._buffer = buffer
        self.address = 0 if block is None else int(block.__array_interface__["data"][0])

    @property
    def buffer(self) -> Any:
        """The memory as a cl.Buffer."""
        if self._buffer is None:
            cl = _cl()
            flags = cl.mem_flags.READ_WRITE | cl.mem_flags.USE_HOST_PTR
            self._buffer = cl.Buffer(self.device.context, flags, hostbuf=self.block)
        return self._buffer

    def write(self, offset: int, data: Bytes) -> None:
        if self.block is not None:
            self.device.finish()
            self.block[offset : offset + data.nbytes] = data
        else:
            _cl().enqueue_copy(self.device.queue, self._buffer, data, dst_offset=offset, is_blocking=True)

    def read(self, offset: int, out: Bytes) -> None:
        if self.block is not None:
            self.device.finish()
            out[:] = self.block[offset : offset + out.nbytes]
        else:
            _cl().enqueue_copy(self.device.queue, out, self._buffer, src_offset=offset, is_blocking=True)

    def zero(self, offset: int, nbytes: int) -> None:
        if self.block is not None:
            self.device.finish()
            self.block[offset : offset + nbytes] = 0
        else:
            _cl().enqueue_fill_buffer(self.device.queue, self._buffer, np.uint8(0), offset, nbytes)

    def copy_from(self, offset: int, source: Memory, source_offset: int, nbytes: int) -> None:
        assert isinstance(source, _Buffer)
        if self.block is not None and source.block is not None:
            self.device.finish()
            self.block[offset : offset + nbytes] = source.block[source_offset : source_offset + nbytes]
        else:
            _cl().enqueue_copy(
                self.device.queue, self.buffer, source.buffer, byte_count=nbytes, src_offset=source_offset,
                dst_offset=offset,
            )  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """How the kernel is cut for a device; the names are those of the macros in delta_rule.cl."""

    KP: int
    KDA: int
    VEC: int
    NVEC: int
    LANES: int
    WG: int
    BLOCK: int
    MEET: int
    SG: int
    UNROLL: int

    @property
    def columns(self) -> int:
        """Of a work-group."""
        return self.WG // self.LANES * self.VEC * self.NVEC


class OpenclDevice(Device):
    """A device, its queue, and the kernels built for it.

    Attributes:
        context, queue: pyopencl's. Arrays that are made with them can be given to `from_pyopencl`.
        memory: how host arrays reach it, one of MEMORIES.
    """

    def __init__(self, name: str, device: Any, context: Any = None, queue: Any = None):
        super().__init__(name, _label(device))
        cl = _cl()
        self.cl_device = device
        try:
            self.context = context or cl.Context([device])
            self.queue = queue or cl.CommandQueue(self.context, device)
        except cl.Error as error:
            raise DeviceError(
                f"{name} requires a driver that starts; got {_sentence(error)} from {self.description}"
            ) from None
        self.is_cpu = bool(device.type & cl.device_type.CPU)
        self.shared = bool(device.host_unified_memory)
        fine = getattr(device, "svm_capabilities", 0) & cl.device_svm_capabilities.FINE_GRAIN_SYSTEM
        self.memory = "address" if fine else "wrap" if self.shared else "copy"
        if forced := os.environ.get(MEMORY_ENV):
            if forced not in MEMORIES[0 if fine else 1 :]:
                raise UnsupportedError(
                    f"{name}: {MEMORY_ENV} must be one of {', '.join(MEMORIES[0 if fine else 1 :])} on "
                    f"{self.description}; got {forced!r}"
                )
            self.memory = forced
        self.extensions = frozenset(device.extensions.split())
        self.subgroups = (
            "cl_intel_required_subgroup_size" in self.extensions
            and bool({"cl_khr_subgroup_shuffle", "cl_intel_subgroups"} & self.extensions)
        )  # fmt: skip
        self.kernel = self.kernels()[0]
        if forced := os.environ.get(KERNEL_ENV):
            self.force(forced, KERNEL_ENV)
        self.lock = threading.Lock()
        self.programs: dict[tuple[Variant, str], Any] = {}
        self._pinned: _Pinned | None = None

    def kernels(self) -> list[str]:
        """The cuts of the kernel that this device can run; the default comes first.

        columns: a work-item owns whole columns, and nobody adds up with anybody; best where a work-item has a whole
        core and its caches. subgroups and local: 8 work-items share a column, so that a state of 128 rows fits into
        the registers of a GPU; they add up through a sub-group or through local memory.
        """
        together = ["subgroups"] * self.subgroups + ["local"]
        return ["columns", *together] if self.is_cpu else [*together, "columns"]

    def force(self, kernel: str, who: str) -> None:
        if kernel not in self.kernels():
            raise ValueError(
                f"{who} must be one of {', '.join(self.kernels())} on {self.name}; got {kernel!r}"
            )
        self.kernel = kernel

    def finish(self) -> None:
        """Wait until the device has done everything."""
        self.check()
        with _driver(self):
            self.queue.finish()

    def limits(self) -> dict[str, Any]:
        d = self.cl_device
        return {
            "driver": f"{d.platform.name.strip()} {d.driver_version.strip()}",
            "memory": f"{self.memory}, {d.global_mem_size >> 20} MiB, at most {d.max_mem_alloc_size >> 20} MiB at once",
            "local memory": f"{d.local_mem_size >> 10} KiB",
            "compute units": d.max_compute_units,
            "work-group": d.max_work_group_size,
            "kernels": self.kernels(),
        }

    def allocate(self, nbytes: int) -> Memory:
        self.check()
        cl = _cl()
        limit = self.cl_device.max_mem_alloc_size
        if nbytes > limit:
            raise DeviceError(
                f"{self.name} requires arrays of at most {limit} bytes, the driver's limit; got {nbytes}. "
                f"Split the pool"
            )
        try:
            if self.memory == "address":
                raw = np.empty(nbytes + 63, np.uint8)
                skip = -int(raw.__array_interface__["data"][0]) % 64
                return _Buffer(self, nbytes, block=raw[skip : skip + nbytes])
            return _Buffer(self, nbytes, cl.Buffer(self.context, cl.mem_flags.READ_WRITE, size=nbytes))
        except (cl.Error, MemoryError) as error:
            raise DeviceError(
                f"{self.name} requires {nbytes} bytes for an array; got {_sentence(error)}. Free some states"
            ) from None

    def variant(self, spec: CallSpec) -> Variant:
        """The cut of the kernel for a call."""
        kp = next((n for n in _ROWS if n >= spec.K), -(-spec.K // 64) * 64)
        local = self.cl_device.local_mem_size
        if self.kernel == "columns":
            if self.is_cpu:
                # One work-item is one core's thread: vectors as wide as its registers, and so many of them that a
                # broadcast k or q serves several FMAs, while the panel (at most 32 KiB) stays close.
                vec = min(max(self.cl_device.native_vector_width_float, 4), 16)
                nvec = max(1, min(4, 8192 // (kp * vec)))
                nvec = 1 if vec >= spec.V else nvec
                cut = Variant(kp, int(spec.kda), vec, nvec, 1, 1, 8, 0, 0, 2)
            else:
                cut = Variant(kp, int(spec.kda), 1, 1, 1, 64, 8, 0, 0, kp)
        else:
            # 8 work-items of 4 columns each: 64 registers of state at K = 128, and a row of 16 bytes per load.
            pinned = self.kernel == "subgroups"
            size = 16 if pinned else 0
            cut = Variant(
                kp, int(spec.kda), 4, 1, 8, 64, 8, 2 if pinned else 1, size, 2 if self.is_cpu else kp // 8
            )
        # k, q (and a) for BLOCK tokens must fit beside v and the scratch
        while cut.BLOCK > 1 and _local_bytes(cut) > min(local, 32768) - 1024:
            cut = replace(cut, BLOCK=cut.BLOCK // 2)
        return cut

    def program(self, cut: Variant, entry: str) -> Any:
        """The kernel of a cut, built once: "by_address" or "by_buffer". pyopencl keeps the driver's binary on disk."""
        built = self.programs.get((cut, entry))
        if built is None:
            cl = _cl()
            options = [f"-D{name}={value}" for name, value in vars(cut).items()]
            options.append(f"-DENTRY={int(entry == 'by_buffer')}")
            if self.is_cpu:
                options.append("-DCALLS")
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", cl.CompilerWarning)
                    built = cl.Kernel(cl.Program(self.context, _source()).build(options), entry)
            except cl.Error as error:
                raise DeviceError(
                    f"{self.name} requires a driver that compiles delta_rule.cl; got {_sentence(error)} from "
                    f"{self.description}. Report it with the output of: anydelta info"
                ) from error
            self.programs[cut, entry] = built
        return built

    def pinned(self, inputs: int, outputs: int) -> _Pinned:
        """Staging memory that holds so many bytes."""
        have = self._pinned
        if have is None or have.inputs < inputs or have.outputs < outputs:
            if have is not None:
                inputs, outputs = max(inputs, have.inputs), max(outputs, have.outputs)
            self._pinned = have = _Pinned(self, inputs, outputs)
        return have


class _Pinned:
    """Staging: host memory that stays mapped, and a buffer of the device, for inputs and for results."""

    def __init__(self, device: OpenclDevice, inputs: int, outputs: int):
        cl = _cl()
        self.inputs, self.outputs = (1 << max(n - 1, 65535).bit_length() for n in (inputs, outputs))
        flags, context, queue = cl.mem_flags, device.context, device.queue
        self.keep = []
        views = []
        for size, mode in ((self.inputs, cl.map_flags.WRITE), (self.outputs, cl.map_flags.READ)):
            host = cl.Buffer(context, flags.READ_WRITE | flags.ALLOC_HOST_PTR, size=size)
            view, _ = cl.enqueue_map_buffer(queue, host, mode, 0, (size,), np.uint8, is_blocking=True)
            self.keep.append(host)
            views.append(view)
        self.host_in, self.host_out = views
        self.device_in = cl.Buffer(context, flags.READ_ONLY, size=self.inputs)
        self.device_out = cl.Buffer(context, flags.READ_WRITE, size=self.outputs)


def _local_bytes(cut: Variant) -> int:
    scratch = 2 * cut.WG * cut.VEC if cut.MEET == 1 else cut.VEC
    return 4 * (cut.BLOCK * ((2 + cut.KDA) * cut.KP + cut.columns + 6) + scratch)


@cache
def _source() -> str:
    return (resources.files("anydelta") / "kernels" / "opencl" / "delta_rule.cl").read_text(encoding="utf-8")


@contextmanager
def _driver(device: OpenclDevice) -> Iterator[None]:
    """Turns the driver's errors into one sentence, and remembers a lost device."""
    cl = _cl()
    try:
        yield
    except (cl.Error, MemoryError) as error:
        text = _sentence(error)
        if any(word in text for word in ("OUT_OF_RESOURCES", "OUT_OF_HOST_MEMORY", "ALLOCATION_FAILURE")):
            raise DeviceError(
                f"{device.name} requires more memory than the driver has for this call; got {text}. A state that the "
                f"call advances in place may be half written: restore it"
            ) from error
        device.lost = text
        device.check()


_devices: dict[int, OpenclDevice] = {}
_opening = threading.Lock()


def open_device(index: int) -> OpenclDevice:
    """The device of that index; see `anydelta.device`.

    Raises:
        UnsupportedError: there is no such device; the text lists those that there are.
    """
    found = _found()
    if not 0 <= index < len(found):
        names = "; ".join(f"opencl:{i} {_label(d)}" for i, d in enumerate(found))
        raise UnsupportedError(f"device opencl:{index}: there is no such OpenCL device; there are {names}")
    with _opening:
        if index not in _devices:
            _devices[index] = OpenclDevice(f"opencl:{index}", found[index])
        return _devices[index]


def default_device() -> OpenclDevice:
    """Where calls with host arrays run: ANYDELTA_OPENCL_DEVICE, or the first device."""
    wanted = os.environ.get(DEVICE_ENV, "0")
    if wanted.isdigit():
        return open_device(int(wanted))
    for index, device in enumerate(_found()):
        if wanted.lower() in _label(device).lower():
            return open_device(index)
    names = "; ".join(f"{i} {_label(d)}" for i, d in enumerate(_found()))
    raise UnsupportedError(f"{DEVICE_ENV} must be an index or a part of a name of {names}; got {wanted!r}")


_shared: dict[int, OpenclDevice] = {}


def from_pyopencl(x: Any) -> DeviceArray:
    """A pyopencl array as a state or snapshots, without a copy: what the operator writes, `x` shows.

    Args:
        x: a C-contiguous pyopencl.array.Array of float32 or float16 (bfloat16 as ml_dtypes.bfloat16), in any context.

    Raises:
        ValueError: it is not contiguous, has no queue, or has another dtype.
    """
    name = str(x.dtype)
    if not x.flags.c_contiguous or x.queue is None or name not in TYPE:
        got = "one without a queue" if x.queue is None else f"strides {x.strides} of {list(x.shape)} {name}"
        raise ValueError(
            f"from_pyopencl requires a C-contiguous array of {', '.join(TYPE)} with a queue; got {got}"
        )
    with _opening:
        key = int(x.context.int_ptr)
        device = _shared.get(key)
        if device is None:
            device = OpenclDevice(f"opencl:context{len(_shared)}", x.queue.device, x.context, x.queue)
            device.memory = (
                "wrap" if device.memory == "address" else device.memory
            )  # x is a buffer, not an address
            _shared[key] = device
    x.finish()
    memory = _Buffer(device, x.base_data.size, x.base_data)
    return DeviceArray(device, memory, tuple(x.shape), name, x.offset)


def to_pyopencl(x: DeviceArray) -> Any:
    """A device array as a pyopencl array on the device's queue, without a copy.

    Raises:
        ValueError: the array is on a device of another kind.
    """
    if not isinstance(x.device, OpenclDevice):
        raise ValueError(f"to_pyopencl requires an array on an OpenCL device; got one on {x.device.name}")
    from pyopencl.array import Array

    assert isinstance(x.memory, _Buffer)
    return Array(x.device.queue, x.shape, numpy_dtype(x.dtype), data=x.memory.buffer, offset=x.offset)


def isas() -> list[str]:
    """The cuts of the kernel that the default device can run, its default last."""
    return default_device().kernels()[::-1]


@contextmanager
def forced_isa(name: str) -> Iterator[None]:
    """Run one cut of the kernel on the default device inside the block.

    Raises:
        ValueError: the device cannot run it; the text lists those it can.
    """
    device = default_device()
    before = device.kernel
    device.force(name, "forced_isa")
    try:
        yield
    finally:
        device.kernel = before


# ---- calls


class _Plan:
    """What a call needs besides addresses: its Params, and the kernels per cut."""

    __slots__ = ("converts", "cuts", "device", "memory", "present", "tail", "torch")

    def __init__(
        self, device: OpenclDevice, memory: str, tail: bytes, converts: tuple[str, ...], torch: bool
    ):
        self.device, self.memory, self.tail, self.converts, self.torch = device, memory, tail, converts, torch
        self.cuts: dict[str, tuple[Variant, int]] = {}
        self.present: tuple[tuple[int, str], ...] = ()


class Opencl:
    name = "opencl"

    def available(self) -> Sequence[Rejected]:
        try:
            _cl()
        except ImportError as error:
            return (
                Rejected(f"pyopencl is not installed or does not load ({error}); run: pip install pyopencl"),
            )
        if not _found():
            return (
                Rejected(
                    "no OpenCL driver has a device; install that of the GPU, or a CPU runtime: "
                    "pip install intel-opencl-rt intel-cmplr-lib-rt"
                ),
            )
        try:
            default_device()
        except (DeviceError, UnsupportedError, ValueError) as error:
            return (Rejected(str(error)),)
        return ()

    def supports(self, spec: CallSpec) -> Sequence[Rejected]:
        no = []
        if spec.device not in ("cpu", "opencl"):
            no.append(
                f"takes arrays of the host or of an OpenCL device; got device {spec.resident or spec.device}"
            )
        if spec.dtype not in TYPE:
            no.append(f"takes float32, bfloat16 and float16; got {spec.dtype}")
        return tuple(Rejected(reason) for reason in no)

    def describe(self) -> dict[str, Any]:
        out: dict[str, Any] = {"default": default_device().name, "kernel": default_device().kernel}
        for index in range(len(_found())):
            device = open_device(index)
            limits = "; ".join(
                f"{k} {', '.join(v) if isinstance(v, list) else v}" for k, v in device.limits().items()
            )
            out[device.name] = f"{device.description}: {limits}"
        return out

    def prepare(self, spec: CallSpec, call: Call) -> _Plan:
        if isinstance(call.state_in, DeviceArray) or isinstance(call.snapshots, DeviceArray):
            held = call.state_in if call.state_in is not None else call.snapshots
            device = held.device
        else:
            device = default_device()
        memory = device.memory
        converts = tuple(
            n for n in GATES if (x := getattr(call, n)) is not None and dtype_name(x) == "float64"
        )
        return _Plan(
            device,
            memory,
            pack_params(spec, call, memory == "copy", converts),
            converts,
            spec.framework == "torch",
        )

    def run(self, plan: _Plan, spec: CallSpec, call: Call) -> None:
        device = plan.device
        device.check()
        found = plan.cuts.get(device.kernel)
        if found is None:
            cut = device.variant(spec)
            groups = -(-spec.V // cut.columns) * spec.HV * spec.N
            found = plan.cuts[device.kernel] = (cut, groups)
        cut, groups = found
        if not groups:
            return
        if plan.converts:
            call = replace(call, **{name: as_float32(getattr(call, name)) for name in plan.converts})
        with device.lock:
            kernel = device.program(cut, "by_address" if plan.memory == "address" else "by_buffer")
            with _driver(device):
                _RUNS[plan.memory](plan, spec, call, kernel, groups * cut.WG, cut.WG)


def _run_address(plan: _Plan, spec: CallSpec, call: Call, kernel: Any, size: int, group: int) -> None:
    """The kernel reads and writes every array where it is."""
    at = [address(getattr(call, name)) for name in ARRAYS]
    _launch(plan.device, kernel, struct.pack("=14Q", *at) + plan.tail, (), size, group)
    plan.device.queue.finish()


def _run_wrap(plan: _Plan, spec: CallSpec, call: Call, kernel: Any, size: int, group: int) -> None:
    """Buffers over the caller's memory; arrays that overlap (q, k, v of one tensor) share one."""
    cl, device = _cl(), plan.device
    flags = cl.mem_flags.READ_WRITE | cl.mem_flags.USE_HOST_PTR
    at, buffers = [ABSENT] * len(ARRAYS), [None] * len(ARRAYS)
    spans = []
    for i, name in enumerate(ARRAYS):
        x = getattr(call, name)
        if type(x) is DeviceArray:
            at[i], buffers[i] = x.offset, x.memory.buffer  # type: ignore[attr-defined]
        elif x is not None and math.prod(x.shape):
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
    _launch(device, kernel, struct.pack("=14Q", *at) + plan.tail, buffers, size, group)
    for buffer, nbytes in results:  # mapping is what makes the results the host's
        view, _ = cl.enqueue_map_buffer(
            device.queue, buffer, cl.map_flags.READ, 0, (nbytes,), np.uint8, is_blocking=False
        )
        view.base.release(device.queue)
    device.queue.finish()


def _run_copy(plan: _Plan, spec: CallSpec, call: Call, kernel: Any, size: int, group: int) -> None:
    """Inputs cross in one transfer, packed, and so do results."""
    cl, device = _cl(), plan.device
    at, buffers = [ABSENT] * len(ARRAYS), [None] * len(ARRAYS)
    taken, given = [], []  # (host array, offset, bytes) of inputs and results
    used_in = used_out = 0
    for i, name in enumerate(ARRAYS):
        x = getattr(call, name)
        if x is None:
            continue
        if type(x) is DeviceArray:
            at[i], buffers[i] = x.offset, x.memory.buffer  # type: ignore[attr-defined]
            continue
        nbytes = math.prod(x.shape) * ITEMSIZE[dtype_name(x)]
        if name in WRITTEN:
            at[i] = used_out
            given.append((i, x, used_out, nbytes))
            used_out += -(-nbytes // 64) * 64
        else:
            at[i] = used_in
            taken.append((i, x, used_in, nbytes))
            used_in += -(-nbytes // 64) * 64
    staging = device.pinned(used_in, used_out)
    for i, x, offset, nbytes in taken:
        buffers[i] = staging.device_in
        pack(staging.host_in, offset, nbytes, x)
        device.staged.to_device += nbytes
    for i, x, offset, nbytes in given:
        buffers[i] = staging.device_out
        name = ARRAYS[i]
        if name == "snapshots" or (name == "state_out" and spec.inplace and spec.pooled):
            # what the call leaves alone must come back as it was
            pack(staging.host_out, offset, nbytes, x)
            cl.enqueue_copy(
                device.queue, staging.device_out, staging.host_out[offset : offset + nbytes], dst_offset=offset,
                is_blocking=False,
            )  # fmt: skip
            device.staged.to_device += nbytes
    if used_in:
        cl.enqueue_copy(device.queue, staging.device_in, staging.host_in[:used_in], is_blocking=False)
    _launch(device, kernel, struct.pack("=14Q", *at) + plan.tail, buffers, size, group)
    if used_out:
        cl.enqueue_copy(device.queue, staging.host_out[:used_out], staging.device_out, is_blocking=True)
    else:
        device.queue.finish()
    for _, x, offset, nbytes in given:
        bits = as_bits(x)
        bits[...] = staging.host_out[offset : offset + nbytes].view(bits.dtype).reshape(bits.shape)
        device.staged.from_device += nbytes


_RUNS = {"address": _run_address, "wrap": _run_wrap, "copy": _run_copy}


def _launch(
    device: OpenclDevice, kernel: Any, params: bytes, buffers: Sequence[Any], size: int, group: int
) -> None:
    kernel.set_arg(0, params)
    if buffers:
        some = next(b for b in buffers if b is not None)
        for i, buffer in enumerate(buffers):
            kernel.set_arg(i + 1, some if buffer is None else buffer)
    _cl().enqueue_nd_range_kernel(device.queue, kernel, (size,), (group,))


BACKEND = Opencl()
