"""The SYCL backend: Intel's GPUs and CPUs through intel-sycl-rt, whose run-time compiler builds kernels/sycl.

The host code is the extension anydelta._sycl, which CMake builds where it finds intel-sycl-rt. A kernel is compiled
when a head size is first used, and kept on disk (SYCL_CACHE_PERSISTENT, which is switched on unless it is set).

On devices that see the host's memory (CPUs, GPUs with system USM) kernels work on the caller's arrays; elsewhere
inputs are packed into one piece of host USM and cross in one transfer, as do results; devices that share memory with
the host read and write that piece itself. ANYDELTA_SYCL_DEVICE picks the device for host arrays,
ANYDELTA_SYCL_MEMORY=copy forces the transfer, ANYDELTA_SYCL_KERNEL one of `isas()`.
"""

from __future__ import annotations

import ctypes
import importlib
import math
import os
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from typing import Any

import numpy as np

from ..devices import Bytes, Device, DeviceArray, DeviceError, Memory
from ..dispatch import Rejected, UnsupportedError
from ..spec import Call, CallSpec, dtype_name
from .opencl import intel_runtime
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
    dense_strides,
    pack,
    pack_params,
)  # fmt: skip

DEVICE_ENV, MEMORY_ENV, KERNEL_ENV = (f"ANYDELTA_SYCL_{x}" for x in ("DEVICE", "MEMORY", "KERNEL"))
MEMORIES = ("address", "copy")
_ROWS = (32, 64, 128, 256)
"""Head sizes K that the kernel is built for, beyond them multiples of 64; the rows between K and the next are zeros."""
_OPTIONS = ["-O3", "-DANYDELTA_FREE_FUNCTIONS"]


# ---- devices


@cache
def _host() -> Any:
    """anydelta._sycl. The environment must be complete before the runtime is loaded."""
    if library := intel_runtime():  # or the runtime finds whatever OpenCL driver the system has
        os.environ.setdefault("OCL_ICD_FILENAMES", str(library))
    os.environ.setdefault("SYCL_CACHE_PERSISTENT", "1")
    return importlib.import_module("anydelta._sycl")


@cache
def _found() -> tuple[tuple[int, dict[str, Any]], ...]:
    """(number in the runtime's list, facts) of the devices that can run, GPUs first."""
    devices = [(i, d) for i, d in enumerate(_host().devices()) if d["compiles"] and not _refusal(d)]
    return tuple(sorted(devices, key=lambda item: not item[1]["gpu"]))


def _refusal(facts: dict[str, Any]) -> str:
    """Why a device that claims to compile cannot be used."""
    if facts["platform"].startswith("Portable Computing Language"):
        return "pocl 3.1 does not take the SPIR-V of the run-time compiler"
    return ""


def _label(facts: dict[str, Any]) -> str:
    return f"{facts['name'].strip()} ({facts['platform'].strip()})"


def _sentence(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class _Usm(Memory):
    """An allocation of unified shared memory. Its address is what kernels get."""

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
        with _driver(self.device):
            self.device.queue.copy(to, source, nbytes)
            self.device.queue.wait()

    def zero(self, offset: int, nbytes: int) -> None:
        with _driver(self.device):
            self.device.queue.fill(self.address + offset, nbytes)

    def copy_from(self, offset: int, source: Memory, source_offset: int, nbytes: int) -> None:
        assert isinstance(source, _Usm)
        with _driver(self.device):
            self.device.queue.copy(self.address + offset, source.address + source_offset, nbytes)

    def view(self) -> Bytes:
        """Host USM as an array."""
        return np.ctypeslib.as_array((ctypes.c_uint8 * self.nbytes).from_address(self.address))


@dataclass(frozen=True)
class Variant:
    """How the kernel is cut for a device; the names are the template's in kernels/sycl/delta_rule.hpp."""

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
        """The instance's name, as the run-time compiler takes it."""
        numbers = f"{self.KP}, {str(self.KDA).lower()}, {self.LANES}, {self.VEC}, {self.NVEC}, {self.C}"
        return (
            f"anydelta::rule_pinned<{numbers}, {self.SG}>" if self.SG else f"anydelta::rule_alone<{numbers}>"
        )


class SyclDevice(Device):
    """A device, its in-order queue, and the kernels built for it.

    Attributes:
        facts: what the runtime says about it.
        memory: how host arrays reach it, one of MEMORIES.
    """

    def __init__(self, name: str, index: int, facts: dict[str, Any]):
        super().__init__(name, _label(facts))
        self.facts = facts
        self.queue = _host().Queue(index)
        self.is_cpu = bool(facts["cpu"])
        forced = os.environ.get(MEMORY_ENV)
        allowed = MEMORIES if facts["system_usm"] else MEMORIES[1:]
        if forced and forced not in allowed:
            raise UnsupportedError(
                f"{name}: {MEMORY_ENV} must be one of {', '.join(allowed)}; got {forced!r}"
            )
        self.memory = forced or allowed[0]
        self.kernel = self.kernels()[0]
        if forced := os.environ.get(KERNEL_ENV):
            self.force(forced, KERNEL_ENV)
        self.lock = threading.Lock()
        self.built: set[Variant] = set()
        self._staging: tuple[_Usm, _Usm] | None = None

    def kernels(self) -> list[str]:
        """The cuts of the kernel that this device can run; the default comes first.

        columns: a work-item owns whole columns, best where it has a core and its caches. subgroups: 8 work-items share
        a column, so that a state of 128 rows fits into the registers of a GPU. chunks: columns, two tokens at a time.
        """
        return ["chunks", "columns", "subgroups"] if self.is_cpu else ["subgroups", "columns"]

    def force(self, kernel: str, who: str) -> None:
        if kernel not in self.kernels():
            raise ValueError(
                f"{who} must be one of {', '.join(self.kernels())} on {self.name}; got {kernel!r}"
            )
        self.kernel = kernel

    def limits(self) -> dict[str, Any]:
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
        if nbytes > self.facts["allocation"]:
            raise DeviceError(
                f"{self.name} requires arrays of at most {self.facts['allocation']} bytes, the driver's limit; got "
                f"{nbytes}. Split the pool"
            )
        return _Usm(self, nbytes)

    def variant(self, spec: CallSpec) -> Variant:
        """The cut of the kernel for a call."""
        kp = next((n for n in _ROWS if n >= spec.K), -(-spec.K // 64) * 64)
        if self.kernel == "subgroups":
            # 4 columns: a row of 16 bytes per load, and 64 registers of state at K = 128
            sizes = self.facts["subgroups"]
            size = next((n for n in (16, 32, 8, 64) if n in sizes), sizes[-1])
            return Variant(kp, spec.kda, 8, 4, 1, 1, size, max(64, size))
        if not self.is_cpu:
            return Variant(kp, spec.kda, 1, 1, 1, 1, 0, 64)
        vec = min(max(self.facts["vector"], 4), 16)
        # On a CPU: vectors as wide as its registers, and so many that a k or q serves several FMAs, while the panel (at
        # most 32 KiB) stays close. Of 1, 2, 4 tokens at a time two were the fastest (docs/backends/sycl.md).
        nvec = max(1, min(4, 8192 // (kp * vec)))
        return Variant(kp, spec.kda, 1, vec, nvec, 2 if self.kernel == "chunks" and spec.T > 1 else 1, 0, 1)

    def build(self, cut: Variant) -> None:
        """Compile a cut, once."""
        if cut in self.built:
            return
        headers = [(name, _text(name)) for name in ("params.hpp", "delta_rule.hpp")]
        try:
            self.queue.build('#include "delta_rule.hpp"\n', headers, [cut.symbol], _OPTIONS)
        except RuntimeError as error:
            raise DeviceError(
                f"{self.name} requires a run-time compiler that builds delta_rule.hpp; got {_sentence(error)} from "
                f"{self.description}. Report it with the output of: anydelta info"
            ) from error
        self.built.add(cut)

    def staging(self, inputs: int, outputs: int) -> tuple[_Usm, _Usm]:
        """(host, device) memory for so many bytes of inputs, and behind them so many of results."""
        need = inputs + outputs
        if self._staging is None or self._staging[0].nbytes < need:
            size = 1 << max(need - 1, 65535).bit_length()
            host = _Usm(self, size, host=True)
            self._staging = (host, host if self.facts["unified"] and not self.is_cpu else _Usm(self, size))
        return self._staging


@cache
def _text(name: str) -> str:
    return (resources.files("anydelta") / "kernels" / "sycl" / name).read_text(encoding="utf-8")


@contextmanager
def _driver(device: SyclDevice) -> Iterator[None]:
    """Turns the runtime's errors into one sentence, and remembers a lost device."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, DeviceError):
            raise
        text = _sentence(error)
        if any(word in text for word in ("OUT_OF", "ALLOCATION")):
            raise DeviceError(
                f"{device.name} requires more memory than the driver has for this call; got {text}. A state that the "
                f"call advances in place may be half written: restore it"
            ) from error
        device.lost = text
        device.check()


_devices: dict[int, SyclDevice] = {}
_opening = threading.Lock()


def open_device(index: int) -> SyclDevice:
    """The device of that index; see `anydelta.device`.

    Raises:
        UnsupportedError: there is no such device; the text lists those that there are.
    """
    found = _found()
    if not 0 <= index < len(found):
        names = "; ".join(f"sycl:{i} {_label(d)}" for i, (_, d) in enumerate(found))
        raise UnsupportedError(f"device sycl:{index}: there is no such SYCL device; there are {names}")
    with _opening:
        if index not in _devices:
            _devices[index] = SyclDevice(f"sycl:{index}", *found[index])
        return _devices[index]


def default_device() -> SyclDevice:
    """Where calls with host arrays run: ANYDELTA_SYCL_DEVICE, or the first device."""
    wanted = os.environ.get(DEVICE_ENV, "0")
    if not wanted.isdigit():
        raise UnsupportedError(f"{DEVICE_ENV} must be the index of a device; got {wanted!r}")
    return open_device(int(wanted))


class _Foreign(Memory):
    """USM that belongs to somebody else, who is kept alive."""

    write, read, _copy, zero, copy_from = _Usm.write, _Usm.read, _Usm._copy, _Usm.zero, _Usm.copy_from

    def __init__(self, device: SyclDevice, pointer: int, nbytes: int, owner: Any):
        self.device, self.address, self.nbytes, self.owner = device, pointer, nbytes, owner


def from_usm(
    x: Any, shape: Sequence[int] | None = None, dtype: str | None = None, device: str = "sycl:0"
) -> DeviceArray:
    """USM of another library as a state or snapshots, without a copy.

    Args:
        x: C-contiguous; anything with `__sycl_usm_array_interface__` (dpctl memory, dpnp arrays), or with DLPack on a
            oneAPI device (torch.xpu tensors).
        shape, dtype: of the array, where x is only bytes.
        device: the SYCL device that x is on. Whoever works on x in another queue must have finished.

    Raises:
        ValueError: x is not contiguous, has another dtype, or is no USM.
    """
    there = open_device(int(device.partition(":")[2] or 0))
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


class _DLTensor(ctypes.Structure):
    """The head of DLPack's DLManagedTensor."""

    _fields_ = (
        ("data", ctypes.c_void_p), ("device", ctypes.c_int32 * 2), ("ndim", ctypes.c_int32), ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16), ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)), ("byte_offset", ctypes.c_uint64),
    )  # fmt: skip


def _dlpack(capsule: Any) -> tuple[int, tuple[int, ...], bool, int]:
    """(address, shape, whether C-contiguous, bytes of an element). The capsule is not consumed: x owns the memory."""
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    tensor = _DLTensor.from_address(get(capsule, b"dltensor"))
    shape = tuple(tensor.shape[i] for i in range(tensor.ndim))
    dense = not tensor.strides or tuple(tensor.strides[i] for i in range(tensor.ndim)) == dense_strides(shape)
    return (tensor.data or 0) + tensor.byte_offset, shape, dense, tensor.bits // 8


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
    """What a call needs besides addresses."""

    __slots__ = ("converts", "cuts", "device", "memory", "tail")

    def __init__(self, device: SyclDevice, memory: str, tail: bytes, converts: tuple[str, ...]):
        self.device, self.memory, self.tail, self.converts = device, memory, tail, converts
        self.cuts: dict[str, tuple[Variant, int]] = {}  # by name: the cut, and how many work-groups it takes


class Sycl:
    name = "sycl"

    def available(self) -> Sequence[Rejected]:
        try:
            _host()
        except ImportError as error:
            return (
                Rejected(
                    f"the extension anydelta._sycl is not built or does not load ({error}); run: pip install "
                    f"intel-sycl-rt==2026.2.0 intel-opencl-rt==2026.2.0, and then build anydelta with pip's "
                    f"--no-build-isolation"
                ),
            )
        try:
            if not _found():
                return (
                    Rejected(
                        "no SYCL device has a driver that runs here; install that of the GPU, or a CPU "
                        "runtime: pip install intel-opencl-rt"
                    ),
                )
            default_device()
        except (RuntimeError, ValueError) as error:
            return (Rejected(_sentence(error)),)
        return ()

    def supports(self, spec: CallSpec) -> Sequence[Rejected]:
        no = []
        if spec.device not in ("cpu", "sycl", "xpu"):
            no.append(
                f"takes arrays of the host or of a SYCL device; got device {spec.resident or spec.device}"
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
        held = call.state_in if call.state_in is not None else call.snapshots
        device = default_device()
        if type(held) is DeviceArray:
            assert isinstance(held.device, SyclDevice)
            device = held.device
        memory = "address" if spec.device == "xpu" else device.memory
        converts = tuple(
            n for n in GATES if (x := getattr(call, n)) is not None and dtype_name(x) == "float64"
        )
        return _Plan(device, memory, pack_params(spec, call, memory == "copy", converts), converts)

    def run(self, plan: _Plan, spec: CallSpec, call: Call) -> None:
        device = plan.device
        device.check()
        found = plan.cuts.get(device.kernel)
        if found is None:
            cut = device.variant(spec)
            items = -(-spec.V // cut.columns) * spec.HV * spec.N * cut.LANES
            found = plan.cuts[device.kernel] = (cut, -(-items // cut.group))
        cut, groups = found
        if not groups:
            return
        if spec.device == "xpu":  # torch's queue is another one
            import torch

            torch.xpu.synchronize()
        if plan.converts:
            call = replace(call, **{name: as_float32(getattr(call, name)) for name in plan.converts})
        with device.lock, _driver(device):
            device.build(cut)
            if plan.memory == "copy":
                _run_copy(plan, spec, call, cut, groups)
                return
            at = [address(getattr(call, name)) for name in ARRAYS]
            device.queue.run(cut.symbol, struct.pack("=14Q", *at) + plan.tail, groups, cut.group)
            device.queue.wait()


def _run_copy(plan: _Plan, spec: CallSpec, call: Call, cut: Variant, groups: int) -> None:
    """Inputs cross in one transfer, packed, and so do results."""
    device = plan.device
    at = [ABSENT] * len(ARRAYS)
    taken: list[tuple[int, Any, int, int]] = []  # (which, host array, offset, bytes) of inputs
    given: list[tuple[int, Any, int, int]] = []  # and of results
    sizes = [0, 0]
    for i, name in enumerate(ARRAYS):
        x = getattr(call, name)
        if type(x) is DeviceArray:
            at[i] = address(x)
        elif x is not None:
            nbytes = math.prod(x.shape) * ITEMSIZE[dtype_name(x)]
            out = name in WRITTEN
            (given if out else taken).append((i, x, sizes[out], nbytes))
            sizes[out] += -(-nbytes // 64) * 64
    host, there = device.staging(*sizes)
    view, behind = host.view(), sizes[0]
    crossing = behind
    for i, x, offset, nbytes in taken:
        at[i] = there.address + offset
        pack(view, offset, nbytes, x)
        device.staged.to_device += nbytes
    for i, x, offset, nbytes in given:
        at[i] = there.address + behind + offset
        name = ARRAYS[i]
        if name == "snapshots" or (name == "state_out" and spec.inplace and spec.pooled):
            pack(view, behind + offset, nbytes, x)  # what the call leaves alone must come back as it was
            device.staged.to_device += nbytes
            crossing = behind + sizes[1]
    if there is not host and crossing:
        device.queue.copy(there.address, host.address, crossing)
    device.queue.run(cut.symbol, struct.pack("=14Q", *at) + plan.tail, groups, cut.group)
    if there is not host and sizes[1]:
        device.queue.copy(host.address + behind, there.address + behind, sizes[1])
    device.queue.wait()
    for _, x, offset, nbytes in given:
        bits = as_bits(x)
        bits[...] = view[behind + offset : behind + offset + nbytes].view(bits.dtype).reshape(bits.shape)
        device.staged.from_device += nbytes


BACKEND = Sycl()
