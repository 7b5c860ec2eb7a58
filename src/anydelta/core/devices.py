"""Devices whose memory holds states and snapshots between calls: `anydelta.device("vulkan:0")`.

    dev = anydelta.device("vulkan:0")
    state = dev.zeros((1, 32, 128, 128))
    o = anydelta.gated_delta_rule_(q, k, v, state, g=g, beta=beta)      # q ... o stay host arrays

A `DeviceArray` goes wherever the operator takes a state or snapshots. The other arrays of the call are NumPy arrays or
torch tensors on the CPU. The backend stages them, and `Device.staged` counts the bytes that cross. On OpenCL and SYCL
devices, q, k, v, g and beta (and A_log, dt_bias) may all be `DeviceArray`s too; o is then one.

A backend offers devices through a function `open_device(index)` in its module, and subclasses `Device` and `Memory`.
"""

from __future__ import annotations

import math
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from . import dispatch
from .arrays import Array

if TYPE_CHECKING:
    import torch

KINDS: tuple[str, ...] = ("vulkan", "webgpu", "opencl", "sycl")
"""Backends that offer devices; "KIND:INDEX" names one, "KIND" the first."""

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of an element, for each dtype of a device array."""

Bytes = NDArray[np.uint8]


class DeviceError(RuntimeError):
    """The driver failed: out of memory, or the device is lost. The text says whether states are still valid."""


@dataclass
class Staged:
    """Bytes that crossed between the host and a device since it was opened."""

    to_device: int = 0
    from_device: int = 0


class Memory(ABC):
    """One allocation on a device, freed when the last array in it is gone."""

    nbytes: int

    @abstractmethod
    def write(self, offset: int, data: Bytes) -> None:
        """Copy host bytes to `offset`."""

    @abstractmethod
    def read(self, offset: int, out: Bytes) -> None:
        """Copy bytes from `offset` to the host."""

    @abstractmethod
    def zero(self, offset: int, nbytes: int) -> None:
        """Set bytes to zero."""

    @abstractmethod
    def copy_from(self, offset: int, source: Memory, source_offset: int, nbytes: int) -> None:
        """Copy bytes of another allocation on the same device. The ranges do not overlap."""


class Device(ABC):
    """An opened device. Opening one twice gives the same object."""

    name: str
    """As `anydelta.device` takes it: "vulkan:0"."""
    description: str
    """The driver's name for the device."""
    most_bytes: int = sys.maxsize
    """The driver's limit for one array."""
    lost: str = ""
    """Why every array on it is invalid, if the driver has lost it; otherwise empty."""

    def __init__(self, name: str, description: str):
        self.name, self.description = name, description
        self.staged = Staged()

    @property
    def kind(self) -> str:
        """The backend that runs calls on it: "vulkan"."""
        return self.name.partition(":")[0]

    @abstractmethod
    def allocate(self, nbytes: int) -> Memory:
        """Memory with undefined contents, of at most `most_bytes`.

        Raises:
            DeviceError: there is not enough.
        """

    @abstractmethod
    def limits(self) -> dict[str, object]:
        """What the driver says about the device, for `anydelta info`."""

    def check(self) -> None:
        """
        Raises:
            DeviceError: the device is lost.
        """
        if self.lost:
            raise DeviceError(
                f"{self.name} requires a working device; got one that is lost ({self.lost}). Its states "
                f"are invalid: start a new process"
            )

    def empty(self, shape: Sequence[int], dtype: str = "float32") -> DeviceArray:
        """An array with undefined contents.

        Raises:
            ValueError: a dtype that devices do not hold.
            DeviceError: out of memory, or more than the driver takes in one array.
        """
        if dtype not in ITEMSIZE:
            raise ValueError(f"{self.name}: dtype must be one of {', '.join(ITEMSIZE)}; got {dtype!r}")
        self.check()
        dims = tuple(int(n) for n in shape)
        nbytes = max(math.prod(dims) * ITEMSIZE[dtype], 4)
        if nbytes > self.most_bytes:
            raise DeviceError(
                f"{self.name} requires arrays of at most {self.most_bytes} bytes, the driver's limit; got {nbytes}. "
                f"Split the states over several arrays"
            )
        memory = self.allocate(nbytes)
        return DeviceArray(self, memory, dims, dtype)

    def zeros(self, shape: Sequence[int], dtype: str = "float32") -> DeviceArray:
        """An array of zeros; as `empty` otherwise."""
        out = self.empty(shape, dtype)
        out.zero()
        return out

    def array(self, values: Array) -> DeviceArray:
        """A copy of a NumPy array or a torch tensor on the CPU, in its dtype."""
        out = self.empty(values.shape, _dtype_name(values))
        out.write(values)
        return out

    def __reduce__(self) -> tuple[object, ...]:
        """A copy is the same device, opened in its process."""
        return device, (self.name,)

    def __repr__(self) -> str:
        return f"<anydelta device {self.name}: {self.description}>"


class DeviceArray:
    """A C-contiguous array on a device; `x[i]` and `x[i:j]` are views along the first axis.

    Attributes:
        device: where it is.
        shape: its sizes.
        dtype: "float32", "bfloat16" or "float16".
        nbytes: its size in bytes.
        memory: the allocation that holds it.
        offset: the byte of the allocation where it begins.
    """

    __slots__ = ("__weakref__", "device", "dtype", "memory", "nbytes", "offset", "shape")
    requires_grad = False

    def __init__(self, device: Device, memory: Memory, shape: tuple[int, ...], dtype: str, offset: int = 0):
        self.device, self.memory, self.shape, self.dtype, self.offset = device, memory, shape, dtype, offset
        self.nbytes = math.prod(shape) * ITEMSIZE[dtype]

    @property
    def ndim(self) -> int:
        """The number of dimensions."""
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int | slice) -> DeviceArray:
        """A view: one entry of the first axis, or a run of them."""
        rows = range(self.shape[0])[index]
        first, shape = (
            (rows, self.shape[1:]) if isinstance(rows, int) else (rows.start, (len(rows), *self.shape[1:]))
        )
        if not isinstance(rows, int) and rows.step != 1:
            raise ValueError(f"a device array is sliced with step 1; got step {rows.step}")
        row = math.prod(self.shape[1:]) * ITEMSIZE[self.dtype]
        return DeviceArray(self.device, self.memory, shape, self.dtype, self.offset + first * row)

    def zero(self) -> None:
        """Set every element to zero."""
        self.device.check()
        if self.nbytes:
            self.memory.zero(self.offset, self.nbytes)

    def write(self, values: Array) -> None:
        """Copy values in: a host array, or an array of the same device that does not overlap this one.

        Raises:
            ValueError: another shape, dtype or device.
        """
        self.device.check()
        if tuple(values.shape) != self.shape or _dtype_name(values) != self.dtype:
            raise ValueError(
                f"{self.device.name}: write takes {list(self.shape)} {self.dtype}; got {list(values.shape)} "
                f"{_dtype_name(values)}"
            )
        if isinstance(values, DeviceArray):
            if values.device is not self.device:
                raise ValueError(
                    f"{self.device.name}: write takes an array of the same device; got one on {values.device.name}"
                )
            if self.nbytes:
                self.memory.copy_from(self.offset, values.memory, values.offset, self.nbytes)
        elif self.nbytes:
            self.memory.write(self.offset, host_bytes(values))
            self.device.staged.to_device += self.nbytes

    def copy(self) -> DeviceArray:
        """A copy on the device."""
        out = self.device.empty(self.shape, self.dtype)
        out.write(self)
        return out

    def numpy(self) -> NDArray[Any]:
        """A copy on the host; bfloat16 as `ml_dtypes.bfloat16`."""
        out = np.empty(self.shape, numpy_dtype(self.dtype))
        self._read(host_bytes(out))
        return out

    def __reduce__(self) -> tuple[object, ...]:
        """A copy (`copy.deepcopy`, `pickle`) goes through the host to the same device."""
        return _on, (self.device, self.numpy())

    def torch(self) -> torch.Tensor:
        """A copy as a torch tensor on the CPU."""
        import torch

        out = torch.empty(self.shape, dtype=getattr(torch, self.dtype))
        self._read(host_bytes(out))
        return out

    def _read(self, out: Bytes) -> None:
        self.device.check()
        if self.nbytes:
            self.memory.read(self.offset, out)
            self.device.staged.from_device += self.nbytes

    def __repr__(self) -> str:
        return f"<anydelta array {list(self.shape)} {self.dtype} on {self.device.name}>"


def _on(device: Device, values: NDArray[np.generic]) -> DeviceArray:
    return device.array(values)


def _dtype_name(x: Array) -> str:
    return getattr(x.dtype, "name", None) or str(x.dtype).rsplit(".", 1)[-1]


def numpy_dtype(name: str) -> np.dtype[np.generic]:
    """The NumPy dtype of that name; bfloat16 needs the package ml_dtypes."""
    if name != "bfloat16":
        return np.dtype(name)
    import ml_dtypes

    bfloat16: np.dtype[np.generic] = np.dtype(ml_dtypes.bfloat16)
    return bfloat16


def host_bytes(x: Array) -> Bytes:
    """The bytes of a host array, C-contiguous: a view if it is contiguous already, otherwise a copy."""
    if isinstance(x, np.ndarray):
        return np.ascontiguousarray(x).reshape(-1).view(np.uint8)
    import torch

    flat = x.detach().contiguous().reshape(-1)
    out: Bytes = flat.view(torch.uint8).numpy()
    return out


_open: dict[str, Device] = {}
_opening = threading.Lock()


def device(name: str) -> Device:
    """Open a device by name, "KIND:INDEX" such as "vulkan:0"; a kind alone means its first device.

    Raises:
        ValueError: the name has another form; the text lists the kinds.
        UnsupportedError: its runtime or driver is missing, or there is no such device; with the reasons.
    """
    kind, _, number = name.partition(":") if isinstance(name, str) else ("", "", "")
    if kind not in KINDS or not (number or "0").isdigit():
        raise ValueError(
            f"device must be KIND or KIND:INDEX with KIND one of {', '.join(KINDS)}; got {name!r}"
        )
    index = int(number or 0)
    full = f"{kind}:{index}"
    with _opening:
        if full not in _open:
            if reasons := dispatch.get_backend(kind).available():
                raise dispatch.UnsupportedError(f"device {full}: {'; '.join(map(str, reasons))}")
            _open[full] = dispatch.host(kind).open_device(index)
        return _open[full]
