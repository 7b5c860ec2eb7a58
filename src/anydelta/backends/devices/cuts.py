"""Kernel variants ("cuts") for OpenCL and SYCL, and how a call is launched.

A variant divides the kernel for a device: how many work-items share a column, how many columns each has. params.py
packs the arguments of a call.
"""

from __future__ import annotations

import math
import os
import struct
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Generic, TypeVar

from ...core.accepts import Accepts, Row
from ...core.arrays import Array
from ...core.devices import Bytes, Device, DeviceArray, DeviceError
from ...core.dispatch import UnsupportedError
from ...rule.arguments import Call
from ...rule.spec import CallSpec, dtype_name
from ...terminal import first_line
from ..accepts import RULE_CALLS
from .params import ABSENT, GATES, ITEMSIZE, WRITTEN, as_bits, as_float32, pack, params_of
from .roster import Roster
from .structs import ARRAYS, PARAMS

_OUT_OF_MEMORY = ("OUT_OF", "ALLOCATION")


class CutDevice(Device):
    """A device of one of the two backends. Its __init__ ends with `settle`.

    Attributes:
        kernel: the variant in use, one of `kernels()`.
        memory: how host arrays reach the device, one of `memories`; the first is the default.
        errors: the exceptions of the driver's functions.
    """

    kernel: str
    memory: str
    memories: Sequence[str]
    is_cpu: bool
    errors: tuple[type[Exception], ...]

    def settle(self, memories: Sequence[str]) -> None:
        """Choose kernel and memory: from the environment variables, or the first that the device offers."""
        self.lock, self.memories = threading.Lock(), memories
        env = f"ANYDELTA_{self.kind.upper()}"
        forced = os.environ.get(f"{env}_MEMORY")
        if forced and forced not in memories:
            raise UnsupportedError(
                f"{self.name}: {env}_MEMORY must be one of {', '.join(memories)} on {self.description}; got {forced!r}"
            )
        self.memory = forced or memories[0]
        self.kernel = self.kernels()[0]
        if forced := os.environ.get(f"{env}_KERNEL"):
            self.force(forced, f"{env}_KERNEL")

    @abstractmethod
    def kernels(self) -> list[str]:
        """The variants of the kernel that this device can run; the default comes first."""

    def refuses_rows(self, spec: CallSpec) -> str:
        """Why no variant of the kernel holds the call's rows of K; "" if one does."""
        return ""

    @abstractmethod
    def variant(self, spec: CallSpec) -> tuple[object, int]:
        """The variant for a call, and its number of work-groups."""

    def force(self, kernel: str, who: str) -> None:
        if kernel not in self.kernels():
            raise ValueError(
                f"{who} must be one of {', '.join(self.kernels())} on {self.name}; got {kernel!r}"
            )
        self.kernel = kernel

    @contextmanager
    def driver(self) -> Iterator[None]:
        """Turns the driver's errors into one sentence each, and remembers a lost device."""
        try:
            yield
        except DeviceError:
            raise
        except self.errors as error:
            text = first_line(error)
            if isinstance(error, MemoryError) or any(word in text for word in _OUT_OF_MEMORY):
                raise DeviceError(
                    f"{self.name} requires more memory than the driver has for this call; got {text}. A state that the "
                    f"call advances in place may be half written: restore it"
                ) from error
            self.lost = text
            self.check()


D = TypeVar("D", bound=CutDevice)


class CutRoster(Roster[D]):
    """The devices of a backend whose kernel has variants."""

    def isas(self) -> list[str]:
        """The variants of the kernel that the default device can run, its default last."""
        return self.default().kernels()[::-1]

    @contextmanager
    def forced_isa(self, name: str) -> Iterator[None]:
        """Run one variant of the kernel on the default device inside the block.

        Raises:
            ValueError: the device cannot run it; the text lists those it can.
        """
        device = self.default()
        before = device.kernel
        device.force(name, "forced_isa")
        try:
            yield
        finally:
            device.kernel = before

    def describe(self) -> dict[str, object]:
        """Facts for `anydelta info`."""
        default = self.default()
        out: dict[str, object] = {"default": default.name, "kernel": default.kernel}
        for index in range(len(self.labels())):
            device = self.open(index)
            limits = "; ".join(
                f"{k} {', '.join(v) if isinstance(v, list) else v}" for k, v in device.limits().items()
            )
            out[device.name] = f"{device.description}: {limits}"
        return out


class Plan:
    """What a call needs besides addresses: its Params, and the work-groups of each variant."""

    __slots__ = ("converts", "cuts", "device", "memory", "tail")

    def __init__(self, device: Any, memory: str, tail: bytes, converts: tuple[str, ...]):
        self.device, self.memory, self.tail, self.converts = device, memory, tail, converts
        self.cuts: dict[str, tuple[object, int]] = {}

    def params(self, addresses: Sequence[int]) -> bytes:
        """The arguments of a launch, with the addresses of ARRAYS."""
        return struct.pack(f"={len(ARRAYS)}Q", *addresses) + self.tail


class CutBackend(ABC, Generic[D]):
    """A backend of such devices."""

    name: str
    title: str
    also: tuple[str, ...] = ()
    """torch devices whose tensors it reads and writes directly."""

    def __init__(self, roster: CutRoster[D]):
        self.roster = roster

    @property
    def accepts(self) -> Accepts:
        said = f"takes arrays of the host or of {self.title} device; got device {{where}}"
        return RULE_CALLS.but(
            framework=("torch", "numpy", "mlx", "device"), device=Row(("cpu", self.name, *self.also), said),
            limits=(*RULE_CALLS.limits, self.takes_rows, self.takes_bytes),
        )  # fmt: skip

    def device(self, spec: CallSpec) -> D:
        """The device that runs a call."""
        return self.roster.opened[spec.resident] if spec.resident else self.roster.default()

    def takes_rows(self, spec: CallSpec) -> str:
        return self.device(spec).refuses_rows(spec)

    def takes_bytes(self, spec: CallSpec) -> str:
        device = self.device(spec)
        inputs, results = host_bytes(spec)
        if device.memory == "address" or spec.device in self.also or spec.framework == "device":
            return ""
        add = sum if device.memory == "copy" else max
        for what, sizes in (("inputs", inputs), ("results", results)):
            if (nbytes := add(sizes)) > device.most_bytes:
                return f"its driver takes {what} of up to {device.most_bytes} bytes in a call; got {nbytes}"
        return ""

    def describe(self) -> dict[str, object]:
        return self.roster.describe()

    def prepare(self, spec: CallSpec, call: Call) -> Plan:
        device = self.device(spec)
        memory = "address" if spec.device in self.also else device.memory
        converts = tuple(
            n for n in GATES if (x := getattr(call, n)) is not None and dtype_name(x) == "float64"
        )
        return Plan(device, memory, PARAMS.pack(params_of(spec, call, memory == "copy", converts)), converts)

    def run(self, plan: Plan, spec: CallSpec, call: Call) -> None:
        device = plan.device
        device.check()
        found = plan.cuts.get(device.kernel)
        if found is None:
            found = plan.cuts[device.kernel] = device.variant(spec)
        cut, groups = found
        if not groups:
            return
        if plan.converts:
            call = replace(call, **{name: as_float32(getattr(call, name)) for name in plan.converts})
        with device.lock, device.driver():
            self.launch(plan, spec, call, cut, groups)

    @abstractmethod
    def launch(self, plan: Plan, spec: CallSpec, call: Call, cut: Any, groups: int) -> None:
        """Run the variant on the call's arrays and wait."""


def host_bytes(spec: CallSpec) -> tuple[list[int], list[int]]:
    """Bytes of the host arrays of a call, inputs and results, each rounded up to 64; small arrays as one sum."""
    B, T, HV = spec.B, spec.T, spec.HV
    item = ITEMSIZE[spec.dtype]
    gates = B * T * HV * (spec.K if spec.kda else 1)
    states = 0 if spec.resident else HV * spec.K * spec.V * ITEMSIZE[spec.state_dtype]
    small = 4 * HV * (1 + spec.K) + B * T + 8 * (2 * spec.N + 1)
    inputs = [B * T * spec.H * spec.K * item] * 2 + [
        B * T * HV * spec.V * item,
        4 * gates,
        4 * B * T * HV,
        small,
    ]
    results = [B * T * HV * spec.V * item, spec.N * states, spec.snapshots * spec.N * states]
    inputs.append(spec.P * states if spec.has_state else 0)
    if spec.inplace:
        results[1] = spec.P * states
    return tuple([-(-n // 64) * 64 for n in sizes] for sizes in (inputs, results))  # type: ignore[return-value]


def padded(K: int, sizes: Sequence[int]) -> int:
    """The head size of the kernel that holds K rows: the next of `sizes`, or beyond them the next multiple of 64."""
    return next((n for n in sizes if n >= K), -(-K // 64) * 64)


def cpu_columns(width: int, rows: int) -> tuple[int, int]:
    """(floats of a vector, vectors) of a work-item that is one core's thread. Vectors are as wide as its registers, and
    numerous enough for a broadcast k or q to serve several FMAs. The panel has at most 32 KiB, so it stays in L1."""
    vec = min(max(width, 4), 16)
    return vec, max(1, min(4, 8192 // (rows * vec)))


class Packing:
    """The places of a call's host arrays in two pieces of staging memory, inputs and results, each 64-byte aligned.

    Attributes:
        taken, given: (number in ARRAYS, host array, offset, bytes) of inputs and of results.
        nbytes_in, nbytes_out: sizes of the two pieces.
    """

    def __init__(self, spec: CallSpec, call: Call):
        self.taken: list[tuple[int, Array, int, int]] = []
        self.given: list[tuple[int, Array, int, int]] = []
        self.nbytes_in = self.nbytes_out = 0
        self._spec = spec
        for i, name in enumerate(ARRAYS):
            x = getattr(call, name)
            if x is None or type(x) is DeviceArray:
                continue
            nbytes = math.prod(x.shape) * ITEMSIZE[dtype_name(x)]
            if name in WRITTEN:
                self.given.append((i, x, self.nbytes_out, nbytes))
                self.nbytes_out += -(-nbytes // 64) * 64
            else:
                self.taken.append((i, x, self.nbytes_in, nbytes))
                self.nbytes_in += -(-nbytes // 64) * 64

    def load(self, inputs: Bytes, results: Bytes) -> tuple[int, bool]:
        """Pack the inputs, and results that the call writes only in part: the rest must not change.

        Returns (bytes copied to the device, whether some of them are results).
        """
        spec, crossing, kept = self._spec, 0, False
        for _, x, offset, nbytes in self.taken:
            pack(inputs, offset, nbytes, x)
            crossing += nbytes
        for i, x, offset, nbytes in self.given:
            if ARRAYS[i] == "snapshots" or (ARRAYS[i] == "state_out" and spec.inplace and spec.pooled):
                pack(results, offset, nbytes, x)
                crossing += nbytes
                kept = True
        return crossing, kept

    def store(self, results: Bytes) -> int:
        """Copy the results to the host arrays. Returns the number of bytes."""
        crossing = 0
        for _, x, offset, nbytes in self.given:
            bits = as_bits(x)
            bits[...] = results[offset : offset + nbytes].view(bits.dtype).reshape(bits.shape)
            crossing += nbytes
        return crossing


def absent() -> list[int]:
    """Null addresses for arrays that a call does not have."""
    return [ABSENT] * len(ARRAYS)
