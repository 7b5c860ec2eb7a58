"""SYCL devices through intel-sycl-rt: memory, queues, kernel variants. host.py runs calls on them."""

from __future__ import annotations

import ctypes
import importlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

from ...core.devices import Bytes, DeviceArray, DeviceError, Memory, numpy_dtype
from ...rule.spec import CallSpec, dtype_name
from ...terminal import first_line
from ..devices.cuts import CutDevice, CutRoster, cpu_columns, padded
from ..devices.params import ITEMSIZE, TYPE, dense_strides
from ..devices.structs import PARAMS, source
from ..opencl.device import intel_runtime

if TYPE_CHECKING:
    from types import ModuleType

MEMORIES = ("address", "copy")
_ROWS = (32, 64, 128, 256)
"""Head sizes that the kernel is built for, then multiples of 64. K is padded with zero rows to the next one."""
_OPTIONS = ["-O3", "-DANYDELTA_FREE_FUNCTIONS"]
_FLUSH = ["-Xs", "-cl-denorms-are-zero"]
"""Subnormal numbers are slow on a CPU, not on a GPU."""


@cache
def host() -> ModuleType:
    """anydelta._sycl. The environment must be complete before the runtime is loaded."""
    if library := intel_runtime():  # otherwise the runtime uses any OpenCL driver of the system
        os.environ.setdefault("OCL_ICD_FILENAMES", str(library))
    os.environ.setdefault("SYCL_CACHE_PERSISTENT", "1")
    return importlib.import_module("anydelta._sycl")


class Facts(TypedDict):
    """Facts about a device from the extension (module.cpp)."""

    name: str
    platform: str
    driver: str
    memory: int
    units: int
    group: int
    cpu: bool
    gpu: bool
    compiles: bool
    system_usm: bool
    unified: bool
    allocation: int
    vector: int
    subgroups: list[int]


@cache
def found() -> tuple[tuple[int, Facts], ...]:
    """(number in the runtime's list, facts) of the devices that can run, GPUs first."""
    devices = [(i, d) for i, d in enumerate(host().devices()) if d["compiles"] and not _refusal(d)]
    return tuple(sorted(devices, key=lambda item: not item[1]["gpu"]))


def _refusal(facts: Facts) -> str:
    """Why a device that claims to compile cannot be used."""
    if facts["platform"].startswith("Portable Computing Language"):
        return "pocl 3.1 does not take the SPIR-V of the run-time compiler"
    return ""


def label_of(facts: Facts) -> str:
    return f"{facts['name'].strip()} ({facts['platform'].strip()})"


class _Usm(Memory):
    """An allocation of unified shared memory. Kernels get its address."""

    def __init__(self, device: SyclDevice, nbytes: int, host: bool = False):
        self.device, self.nbytes = device, nbytes
        self.address = device.queue.allocate(nbytes, host)
        if not self.address:
            raise DeviceError(
                f"{device.name} requires {nbytes} bytes for an array; the driver has no such memory left. "
                f"Free some states"
            )

    def __del__(self) -> None:
        if address := getattr(self, "address", 0):
            self.device.queue.release(address)

    def write(self, offset: int, data: Bytes) -> None:
        self._copy(self.address + offset, data.__array_interface__["data"][0], data.nbytes)

    def read(self, offset: int, out: Bytes) -> None:
        self._copy(out.__array_interface__["data"][0], self.address + offset, out.nbytes)

    def _copy(self, to: int, source: int, nbytes: int) -> None:
        with self.device.driver():
            self.device.queue.copy(to, source, nbytes)
            self.device.queue.wait()

    def zero(self, offset: int, nbytes: int) -> None:
        with self.device.driver():
            self.device.queue.fill(self.address + offset, nbytes)

    def copy_from(self, offset: int, source: Memory, source_offset: int, nbytes: int) -> None:
        assert isinstance(source, _Usm)
        with self.device.driver():
            self.device.queue.copy(self.address + offset, source.address + source_offset, nbytes)

    def view(self) -> Bytes:
        """Host USM as an array."""
        return np.ctypeslib.as_array((ctypes.c_uint8 * self.nbytes).from_address(self.address))


@dataclass(frozen=True)
class Variant:
    """How the kernel is divided for a device. The names are the template's in delta_rule.hpp."""

    KP: int
    KDA: bool
    LANES: int
    VEC: int
    NVEC: int
    C: int
    SG: int
    """The sub-group size, 0 for work-items that work alone."""
    group: int
    """Work-items per group."""

    @property
    def columns(self) -> int:
        return self.VEC * self.NVEC

    @property
    def symbol(self) -> str:
        """The instance's name for the run-time compiler."""
        numbers = f"{self.KP}, {str(self.KDA).lower()}, {self.LANES}, {self.VEC}, {self.NVEC}, {self.C}"
        return (
            f"anydelta::rule_pinned<{numbers}, {self.SG}>" if self.SG else f"anydelta::rule_alone<{numbers}>"
        )


class SyclDevice(CutDevice):
    """A device, its in-order queue, and the kernels built for it.

    Attributes:
        facts: what the runtime says about the device.
        memory: how host arrays reach the device, one of MEMORIES.
    """

    def __init__(self, name: str, index: int, facts: Facts):
        super().__init__(name, label_of(facts))
        self.facts = facts
        self.queue = host().Queue(index)
        self.errors = (RuntimeError,)
        self.is_cpu = bool(facts["cpu"])
        self.most_bytes = int(facts["allocation"])
        self.settle(MEMORIES if facts["system_usm"] else MEMORIES[1:])
        self.built: set[Variant] = set()
        self._staging: tuple[_Usm, _Usm] | None = None

    def kernels(self) -> list[str]:
        """The variants of the kernel that this device can run; the default comes first.

        columns: a work-item owns whole columns; best if it has a core with its caches. subgroups: 8 work-items share a
        column, so that a state of 128 rows fits into the registers of a GPU. chunks: columns, two tokens at a time.
        """
        return ["chunks", "columns", "subgroups"] if self.is_cpu else ["subgroups", "columns"]

    def limits(self) -> dict[str, object]:
        f = self.facts
        return {
            "driver": f["driver"],
            "memory": f"{self.memory}, {f['memory'] >> 20} MiB, at most {f['allocation'] >> 20} MiB at once",
            "compute units": f["units"],
            "work-group": f["group"],
            "sub-groups": ", ".join(map(str, f["subgroups"])),
            "kernels": self.kernels(),
        }

    def allocate(self, nbytes: int) -> Memory:
        self.check()
        return _Usm(self, nbytes)

    def variant(self, spec: CallSpec) -> tuple[Variant, int]:
        cut = self._cut(spec)
        items = -(-spec.V // cut.columns) * spec.HV * spec.N * cut.LANES
        return cut, -(-items // cut.group)

    def _cut(self, spec: CallSpec) -> Variant:
        kp = padded(spec.K, _ROWS)
        if self.kernel == "subgroups":
            # 4 columns: a row of 16 bytes per load, and 64 registers of state at K = 128
            sizes = self.facts["subgroups"]
            size = next((n for n in (16, 32, 8, 64) if n in sizes), sizes[-1])
            return Variant(kp, spec.kda, 8, 4, 1, 1, size, max(64, size))
        if not self.is_cpu:
            return Variant(kp, spec.kda, 1, 1, 1, 1, 0, 64)
        vec, nvec = cpu_columns(self.facts["vector"], kp)
        # Two tokens at a time are faster than one if T > 1: docs/backends/sycl.md.
        return Variant(kp, spec.kda, 1, vec, nvec, 2 if self.kernel == "chunks" and spec.T > 1 else 1, 0, 1)

    def build(self, cut: Variant) -> None:
        """Compile a variant, once."""
        if cut in self.built:
            return
        headers = [(name, source("sycl", name)) for name in ("params.hpp", "delta_rule.hpp")]
        headers.append(("params_members.hpp", PARAMS.text("c++")))
        try:
            options = _OPTIONS + _FLUSH if self.is_cpu else _OPTIONS
            self.queue.build('#include "delta_rule.hpp"\n', headers, [cut.symbol], options)
        except RuntimeError as error:
            raise DeviceError(
                f"{self.name} requires a run-time compiler that builds delta_rule.hpp; got {first_line(error)} from "
                f"{self.description}. Report it with the output of: anydelta info"
            ) from error
        self.built.add(cut)

    def staging(self, inputs: int, outputs: int) -> tuple[_Usm, _Usm]:
        """(host, device) memory for the bytes of inputs, followed by those of results."""
        need = inputs + outputs
        if self._staging is None or self._staging[0].nbytes < need:
            size = 1 << max(need - 1, 65535).bit_length()
            host = _Usm(self, size, host=True)
            self._staging = (host, host if self.facts["unified"] and not self.is_cpu else _Usm(self, size))
        return self._staging


class _Foreign(Memory):
    """USM of another owner, kept alive."""

    write, read, _copy, zero, copy_from = _Usm.write, _Usm.read, _Usm._copy, _Usm.zero, _Usm.copy_from

    def __init__(self, device: SyclDevice, pointer: int, nbytes: int, owner: object):
        self.device, self.address, self.nbytes, self.owner = device, pointer, nbytes, owner


def from_usm(
    x: Any, shape: Sequence[int] | None = None, dtype: str | None = None, device: str = "sycl:0"
) -> DeviceArray:
    """Take USM of another library as an array of a call (q, k, v, g, beta, states, snapshots), without a copy.

    Args:
        x: C-contiguous; anything with `__sycl_usm_array_interface__` (dpctl memory, dpnp arrays), or with DLPack on a
            oneAPI device (torch.xpu tensors).
        shape: of the array, if x is only bytes.
        dtype: of the array, if x is only bytes.
        device: the SYCL device that x is on. Work on x in another queue must have finished.

    Raises:
        ValueError: x is not contiguous, has another dtype, or is not USM.
    """
    there = roster.open(int(device.partition(":")[2] or 0))
    face = getattr(x, "__sycl_usm_array_interface__", None)
    if face is not None:
        pointer, dims, strides = face["data"][0], tuple(face["shape"]), face.get("strides")
        size = np.dtype(face["typestr"]).itemsize
        dense = strides is None or tuple(strides) == dense_strides(dims)
        name = dtype or np.dtype(face["typestr"]).name
    elif hasattr(x, "__dlpack__"):
        kind = x.__dlpack_device__()[0]
        if kind != 14:  # kDLOneAPI
            raise ValueError(
                f"from_usm requires memory on a oneAPI device (DLPack 14); got device type {int(kind)}"
            )
        pointer, dims, dense, size = _dlpack(x.__dlpack__())
        name = dtype or dtype_name(x)
    else:
        raise ValueError(
            f"from_usm requires USM (__sycl_usm_array_interface__ or DLPack); got {type(x).__name__}"
        )
    nbytes = math.prod(dims) * size
    dims = tuple(shape) if shape is not None else dims
    if not dense or name not in TYPE or math.prod(dims) * ITEMSIZE[name] > nbytes:
        raise ValueError(
            f"from_usm requires C-contiguous {', '.join(TYPE)} of {list(dims)}; got {nbytes} bytes of {name}"
            f"{'' if dense else ' with strides'}"
        )
    return DeviceArray(there, _Foreign(there, pointer, nbytes, x), dims, name)


class UsmView:
    """A device array in the form that other libraries take: `dpctl.memory.as_usm_memory(view)`,
    `dpctl.tensor.asarray(view)`."""

    def __init__(self, x: DeviceArray):
        self.array = x

    @property
    def __sycl_usm_array_interface__(self) -> dict[str, object]:
        x = self.array
        assert isinstance(x.device, SyclDevice)
        return {
            "data": (x.memory.address + x.offset, False),  # type: ignore[attr-defined]
            "shape": x.shape, "strides": None, "typestr": numpy_dtype(x.dtype).str, "version": 1, "offset": 0,
            "syclobj": x.device.queue.capsule(),
        }  # fmt: skip


def to_usm(x: DeviceArray) -> UsmView:
    """A device array for libraries that know `__sycl_usm_array_interface__` (dpctl, dpnp), without a copy.

    Raises:
        ValueError: the array is on a device of another kind, or bfloat16, which that interface does not know.
    """
    if not isinstance(x.device, SyclDevice) or x.dtype == "bfloat16":
        raise ValueError(
            f"to_usm requires a float32 or float16 array on a SYCL device; got {x.dtype} on {x.device.name}"
        )
    return UsmView(x)


class _DLTensor(ctypes.Structure):
    """The head of DLPack's DLManagedTensor."""

    _fields_ = (
        ("data", ctypes.c_void_p), ("device", ctypes.c_int32 * 2), ("ndim", ctypes.c_int32), ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16), ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)), ("byte_offset", ctypes.c_uint64),
    )  # fmt: skip


def _dlpack(capsule: object) -> tuple[int, tuple[int, ...], bool, int]:
    """(address, shape, whether C-contiguous, bytes of an element). The capsule is not consumed: x owns the memory."""
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    tensor = _DLTensor.from_address(get(capsule, b"dltensor"))
    shape = tuple(tensor.shape[i] for i in range(tensor.ndim))
    dense = not tensor.strides or tuple(tensor.strides[i] for i in range(tensor.ndim)) == dense_strides(shape)
    return (tensor.data or 0) + tensor.byte_offset, shape, dense, tensor.bits // 8


roster = CutRoster(
    "sycl",
    "SYCL",
    labels=lambda: [label_of(facts) for _, facts in found()],
    make=lambda name, index: SyclDevice(name, *found()[index]),
)
