"""OpenCL drivers and devices, by pyopencl: memory, queues, kernel variants. host.py runs calls on them."""

from __future__ import annotations

import os
import threading
import warnings
from dataclasses import dataclass, replace
from functools import cache
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from ...core.devices import Bytes, DeviceArray, DeviceError, Memory, numpy_dtype
from ...rule.spec import CallSpec
from ...terminal import first_line
from ..devices.cuts import CutDevice, CutRoster, cpu_columns, padded
from ..devices.llvm import load_triton_first
from ..devices.params import TYPE
from ..devices.structs import PARAMS, source

if TYPE_CHECKING:
    from types import ModuleType

    import pyopencl
    import pyopencl.array as cl_array

MEMORIES = ("address", "wrap", "copy")
_ROWS = (16, 32, 64, 96, 128, 192, 256)
"""Head sizes that the kernel is built for, then multiples of 64. K is padded with zero rows to the next one."""


def intel_runtime() -> Path | None:
    """libintelocl.so of the package intel-opencl-rt, whose .icd file has a wrong path after installation by pip."""
    try:
        files = metadata.files("intel-opencl-rt") or ()
    except metadata.PackageNotFoundError:
        return None
    return next((Path(str(f.locate())).resolve() for f in files if f.name == "libintelocl.so"), None)


@cache
def api() -> ModuleType:
    """pyopencl, set up to find the system's drivers and intel-opencl-rt.

    The loader looks for drivers once, in one folder. Unless OCL_ICD_VENDORS names another, we create and fill it.
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
            pass  # there is no driver: `available` says so
        finally:
            del os.environ["OCL_ICD_VENDORS"]
    return cl


@cache
def found() -> tuple[pyopencl.Device, ...]:
    """Every OpenCL device, GPUs first, and Intel's runtime before other CPU drivers."""
    cl = api()
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

    def rank(device: pyopencl.Device) -> tuple[int, bool]:
        kind = next((i for i, k in enumerate(kinds) if device.type & k), len(kinds))
        return kind, "Intel" not in device.platform.name

    return tuple(sorted(out, key=rank))


def label_of(device: pyopencl.Device) -> str:
    return f"{device.name.strip()} ({device.platform.name.strip()})"


class _Buffer(Memory):
    """A cl.Buffer, or host memory that the device can address (memory "address")."""

    def __init__(
        self,
        device: OpenclDevice,
        nbytes: int,
        buffer: pyopencl.Buffer | None = None,
        block: Bytes | None = None,
    ):
        self.device, self.nbytes, self.block = device, nbytes, block
        self._buffer = buffer
        self.address = 0 if block is None else int(block.__array_interface__["data"][0])

    @property
    def buffer(self) -> pyopencl.Buffer:
        """The memory as a cl.Buffer."""
        if self._buffer is None:
            cl = api()
            flags = cl.mem_flags.READ_WRITE | cl.mem_flags.USE_HOST_PTR
            self._buffer = cl.Buffer(self.device.context, flags, hostbuf=self.block)
        return self._buffer

    def write(self, offset: int, data: Bytes) -> None:
        if self.block is not None:
            self.device.finish()
            self.block[offset : offset + data.nbytes] = data
        else:
            api().enqueue_copy(self.device.queue, self._buffer, data, dst_offset=offset, is_blocking=True)

    def read(self, offset: int, out: Bytes) -> None:
        if self.block is not None:
            self.device.finish()
            out[:] = self.block[offset : offset + out.nbytes]
        else:
            api().enqueue_copy(self.device.queue, out, self._buffer, src_offset=offset, is_blocking=True)

    def zero(self, offset: int, nbytes: int) -> None:
        if self.block is not None:
            self.device.finish()
            self.block[offset : offset + nbytes] = 0
        else:
            api().enqueue_fill_buffer(self.device.queue, self._buffer, np.uint8(0), offset, nbytes)

    def copy_from(self, offset: int, source: Memory, source_offset: int, nbytes: int) -> None:
        assert isinstance(source, _Buffer)
        if self.block is not None and source.block is not None:
            self.device.finish()
            self.block[offset : offset + nbytes] = source.block[source_offset : source_offset + nbytes]
        else:
            api().enqueue_copy(
                self.device.queue, self.buffer, source.buffer, byte_count=nbytes, src_offset=source_offset,
                dst_offset=offset,
            )  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """How the kernel is divided for a device. The names are those of the macros in delta_rule.cl."""

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
        """Columns of a work-group."""
        return self.WG // self.LANES * self.VEC * self.NVEC


class OpenclDevice(CutDevice):
    """A device, its queue, and the kernels built for it.

    Attributes:
        context, queue: pyopencl's. Arrays that are made with them can be given to `from_pyopencl`.
        memory: how host arrays reach the device, one of MEMORIES.
    """

    def __init__(
        self,
        name: str,
        device: pyopencl.Device,
        context: pyopencl.Context | None = None,
        queue: pyopencl.CommandQueue | None = None,
    ):
        super().__init__(name, label_of(device))
        cl = api()
        self.cl_device = device
        try:
            self.context = context or cl.Context([device])
            self.queue = queue or cl.CommandQueue(self.context, device)
        except cl.Error as error:
            raise DeviceError(
                f"{name} requires a driver that starts; got {first_line(error)} from {self.description}"
            ) from None
        self.errors = (cl.Error, MemoryError)
        self.is_cpu = bool(device.type & cl.device_type.CPU)
        self.most_bytes = int(device.max_mem_alloc_size)
        self.shared = bool(device.host_unified_memory)
        fine = getattr(device, "svm_capabilities", 0) & cl.device_svm_capabilities.FINE_GRAIN_SYSTEM
        ways = MEMORIES if fine else MEMORIES[1:] if self.shared else ("copy", "wrap")
        self.extensions = frozenset(device.extensions.split())
        self.subgroups = (
            "cl_intel_required_subgroup_size" in self.extensions
            and bool({"cl_khr_subgroup_shuffle", "cl_intel_subgroups"} & self.extensions)
        )  # fmt: skip
        self.settle(ways)
        self.programs: dict[tuple[Variant, str], pyopencl.Kernel] = {}
        self._pinned: _Pinned | None = None

    def kernels(self) -> list[str]:
        """The variants of the kernel that this device can run; the default comes first.

        columns: a work-item owns whole columns and shares no sums; best if a work-item has a whole core with its
        caches. subgroups and local: 8 work-items share a column, so that a state of 128 rows fits into the registers of
        a GPU. They add up through a sub-group, or through local memory.
        """
        together = ["subgroups"] * self.subgroups + ["local"]
        return ["columns", *together] if self.is_cpu else [*together, "columns"]

    def finish(self) -> None:
        """Wait until the device has done everything."""
        self.check()
        with self.driver():
            self.queue.finish()

    def limits(self) -> dict[str, object]:
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
        cl = api()
        try:
            if self.memory == "address":
                raw = np.empty(nbytes + 63, np.uint8)
                skip = -int(raw.__array_interface__["data"][0]) % 64
                return _Buffer(self, nbytes, block=raw[skip : skip + nbytes])
            return _Buffer(self, nbytes, cl.Buffer(self.context, cl.mem_flags.READ_WRITE, size=nbytes))
        except (cl.Error, MemoryError) as error:
            raise DeviceError(
                f"{self.name} requires {nbytes} bytes for an array; got {first_line(error)}. Free some states"
            ) from None

    def variant(self, spec: CallSpec) -> tuple[Variant, int]:
        kp = padded(spec.K, _ROWS)
        local = self.cl_device.local_mem_size
        if self.kernel == "columns":
            if self.is_cpu:
                vec, nvec = cpu_columns(self.cl_device.native_vector_width_float, kp)
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
        return cut, -(-spec.V // cut.columns) * spec.HV * spec.N

    def refuses_rows(self, spec: CallSpec) -> str:
        need, local = _local_bytes(self.variant(spec)[0]), int(self.cl_device.local_mem_size)
        if need <= local:
            return ""
        return f"takes rows that fit into its driver's {local} bytes of local memory; got {need} for K = {spec.K}"

    def program(self, cut: Variant, entry: str) -> pyopencl.Kernel:
        """The kernel of a variant, built once: "by_address" or "by_buffer". pyopencl caches the driver's binary."""
        built = self.programs.get((cut, entry))
        if built is None:
            cl = api()
            text = source("opencl", "delta_rule.cl").replace("  PARAMS\n", PARAMS.text("opencl"), 1)
            options = [f"-D{name}={value}" for name, value in vars(cut).items()]
            options.append(f"-DENTRY={int(entry == 'by_buffer')}")
            if self.is_cpu:
                options += [
                    "-DCALLS",
                    "-cl-denorms-are-zero",
                ]  # subnormal numbers are slow on a CPU, not on a GPU
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", cl.CompilerWarning)
                    built = cl.Kernel(cl.Program(self.context, text).build(options), entry)
            except cl.Error as error:
                raise DeviceError(
                    f"{self.name} requires a driver that compiles delta_rule.cl; got {first_line(error)} from "
                    f"{self.description}. Report it with the output of: anydelta info"
                ) from error
            self.programs[cut, entry] = built
        return built

    def pinned(self, inputs: int, outputs: int) -> _Pinned:
        """Staging memory of at least these sizes."""
        have = self._pinned
        if have is None or have.inputs < inputs or have.outputs < outputs:
            if have is not None:
                inputs, outputs = max(inputs, have.inputs), max(outputs, have.outputs)
            self._pinned = have = _Pinned(self, inputs, outputs)
        return have


class _Pinned:
    """Staging memory: mapped host memory and a device buffer, for inputs and for results."""

    def __init__(self, device: OpenclDevice, inputs: int, outputs: int):
        cl = api()
        self.inputs, self.outputs = (
            max(n, min(1 << max(n - 1, 65535).bit_length(), device.most_bytes)) for n in (inputs, outputs)
        )
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


_shared: dict[int, OpenclDevice] = {}
_sharing = threading.Lock()


def from_pyopencl(x: Any) -> DeviceArray:
    """Take a pyopencl array as an array of a call (q ... beta, states, snapshots), without a copy; writes show in x.

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
    with _sharing:
        key = int(x.context.int_ptr)
        device = _shared.get(key)
        if device is None:
            device = OpenclDevice(f"opencl:context{len(_shared)}", x.queue.device, x.context, x.queue)
            device.memory = (
                "wrap" if device.memory == "address" else device.memory
            )  # x is a buffer, not an address
            _shared[key] = roster.opened[device.name] = device
    x.finish()
    memory = _Buffer(device, x.base_data.size, x.base_data)
    return DeviceArray(device, memory, tuple(x.shape), name, x.offset)


def to_pyopencl(x: DeviceArray) -> cl_array.Array:
    """A device array as a pyopencl array on the device's queue, without a copy.

    Raises:
        ValueError: the array is on a device of another kind.
    """
    if not isinstance(x.device, OpenclDevice):
        raise ValueError(f"to_pyopencl requires an array on an OpenCL device; got one on {x.device.name}")
    from pyopencl.array import Array

    assert isinstance(x.memory, _Buffer)
    return Array(x.device.queue, x.shape, numpy_dtype(x.dtype), data=x.memory.buffer, offset=x.offset)


roster = CutRoster(
    "opencl",
    "OpenCL",
    labels=lambda: [label_of(d) for d in found()],
    make=lambda name, index: OpenclDevice(name, found()[index]),
)
