"""Shared by Vulkan and WebGPU: the layout of a host call for a device, and the steps around a launch.

A call has one buffer of inputs and one of outputs, dense and aligned. Inputs are copied straight into the first one,
whatever their strides: q and k with K zero-padded to KP, v with an even number of columns (so that 16-bit values fill
words in pairs), gates in float32, the mask and the indices as 32-bit integers. Small metadata (cu_seqlens, indices) is
copied with each call.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from ...core import devices
from ...core.accepts import Accepts, Row, UpTo
from ...core.arrays import Array
from ...core.devices import Device, DeviceArray
from ...rule.arguments import Call
from ...rule.spec import CallSpec, dtype_name, framework_of
from ..accepts import EITHER, RULE_CALLS
from .structs import CALL, OF_OPTIONS, flags

ALIGN = 16
"""Alignment of a field in bytes, that of a vec4."""
WORKGROUP = 64
"""Invocations of a workgroup: two subgroups of 32, or one of 64. More would divide the work less evenly."""
MAX_K = 4096
"""32 lanes, each with 128 rows in registers."""
MAX_LAUNCHES = 256
"""Prepared launches that a device keeps; a decode loop needs one per layer."""
DTYPES = ("float32", "bfloat16", "float16")
"""Dtypes by their number in the shaders (DTYPE)."""
_OFFSETS = {"cu_seqlens": "cu", "state_indices": "indices", "snapshot_indices": "rows"}
"""Members of Call that hold the offsets of these inputs. Other inputs' members have the inputs' names."""

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Field:
    """One array in a staging buffer."""

    name: str
    offset: int
    """Bytes from the start of the buffer."""
    shape: tuple[int, ...]
    dtype: type[np.generic]
    used: int
    """Entries of the last axis that hold data; the rest is padding that must be zero."""

    def view(self, buffer: Bytes) -> NDArray[np.generic]:
        view: NDArray[np.generic] = np.ndarray(self.shape, self.dtype, buffer, self.offset)
        return view


def lanes_of(groups: int, subgroup: int, cpu: bool) -> int:
    """Invocations that share a column of S, for `groups` groups of four rows and subgroups of size `subgroup`.

    A lane of a GPU holds 16 rows, so a head of K = 128 keeps its state in 16 registers of 8 V invocations. The float4
    loads of a subgroup then cover 128 bytes of k. On a CPU driver a subgroup is one SIMD register, each lane's load is
    scalar, and unrolled code compiles slowly (on lavapipe, K = 128 with one lane per column takes over a minute, with
    eight below a second). So there all lanes share a column.
    """
    most = min(subgroup, 32)
    if cpu:
        return most
    lanes = 1
    while lanes < most and groups > 4 * lanes:
        lanes *= 2
    return lanes


class Layout:
    """The places of a call's inputs and output. `wide_output`: o is float32 on the device and rounded here.

    Attributes:
        offsets: of each input, in bytes; 0 for absent inputs.
        nbytes_in, nbytes_out: sizes of the two buffers.
    """

    def __init__(self, spec: CallSpec, KP: int, *, wide_output: bool = False):
        B, T, H, HV, K, V = spec.B, spec.T, spec.H, spec.HV, spec.K, spec.V
        VP = V + V % 2
        f32, i32 = np.float32, np.int32
        data = f32 if spec.dtype == "float32" else np.uint16
        out = f32 if wide_output else data
        self.widen = out is not data
        g = (B, T, HV, KP) if spec.kda else (B, T, HV)
        bias = (HV, KP) if spec.kda else (HV,)
        wanted: list[tuple[str, tuple[int, ...], type[np.generic], int]] = [
            ("q", (B, T, H, KP), data, K), ("k", (B, T, H, KP), data, K), ("v", (B, T, HV, VP), data, V),
            ("g", g, f32, K if spec.kda else HV), ("beta", (B, T, HV), f32, HV),
        ]  # fmt: skip
        if spec.options.decay == "raw":
            wanted.append(("A_log", (HV,), f32, HV))
        if "dt_bias" in spec.given:
            wanted.append(("dt_bias", bias, f32, K if spec.kda else HV))
        if spec.masked:
            wanted.append(("mask", (B, T), i32, T))
        if spec.packed:
            wanted.append(("cu_seqlens", (spec.N + 1,), i32, spec.N + 1))
        if spec.pooled:
            wanted.append(("state_indices", (spec.N,), i32, spec.N))
        if spec.snapshot_rows:
            wanted.append(("snapshot_indices", (spec.snapshots, spec.N), i32, spec.N))
        self.fields, at = [], 0
        for name, shape, dtype, used in wanted:
            self.fields.append(Field(name, at, shape, dtype, used))
            nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
            at += -(-nbytes // ALIGN) * ALIGN
        self.offsets = {f.name: f.offset for f in self.fields}
        self.nbytes_in = max(at, ALIGN)
        self.o = Field("o", 0, (B, T, HV, V), out, V)
        self.nbytes_out = -(-int(np.prod(self.o.shape)) * np.dtype(out).itemsize // ALIGN) * ALIGN or ALIGN

    def call(self, spec: CallSpec, **own: int) -> bytes:
        """The struct Call of the shaders; `own` are the flags and the first elements of states and snapshots."""
        return CALL.pack(dict(
            T=spec.T, H=spec.H, HV=spec.HV, K=spec.K, V=spec.V, N=spec.N, Ks=spec.snapshots, scale=spec.scale,
            eps=spec.options.qk_l2norm_eps, lower_bound=spec.options.lower_bound or 0.0,
            **{_OFFSETS.get(name, name): at // 4 for name, at in self.offsets.items()}, **own,
        ))  # fmt: skip

    def views(self, inputs: Bytes) -> list[tuple[str, NDArray[np.generic], NDArray[np.generic] | None]]:
        """(name, view of its values, view of its padding) per field of a buffer, made once per buffer."""
        out = []
        for f in self.fields:
            view = f.view(inputs)
            padded = f.used < f.shape[-1]
            out.append(
                (f.name, view[..., : f.used] if padded else view, view[..., f.used :] if padded else None)
            )
        return out

    def pack(
        self, call: Call, views: list[tuple[str, NDArray[np.generic], NDArray[np.generic] | None]]
    ) -> None:
        """Copy the inputs of a call into a buffer."""
        for name, view, padding in views:
            x = as_numpy(getattr(call, name), bits=view.dtype == np.uint16)
            view[...] = x if x.shape == view.shape else x.reshape(view.shape)
            if padding is not None:
                padding[...] = 0

    def unpack(self, call: Call, view: NDArray[np.generic]) -> None:
        """Copy the output out of a buffer."""
        if self.widen and framework_of(call.o) == "torch":
            import torch

            call.o.copy_(torch.from_numpy(view))
        else:
            np.copyto(
                as_numpy(call.o, bits=view.dtype == np.uint16), view, casting="unsafe" if self.widen else "no"
            )


def as_numpy(x: Array, *, bits: bool = False) -> NDArray[np.generic]:
    """A host array as NumPy, without a copy. `bits`: a half type as uint16. NumPy lacks bfloat16: if it must be
    converted, the result is float32."""
    if framework_of(x) == "numpy":
        out: NDArray[np.generic] = x.view(np.uint16) if bits else x
        return out
    import torch

    x = x.detach()
    if bits:
        out = x.view(torch.int16).numpy().view(np.uint16)
        return out
    out = (x.float() if x.dtype == torch.bfloat16 else x).numpy()
    return out


class HostStates:
    """Dense device copies of a call's host states, made once per geometry.

    The call then runs in place on `state` [N, ...], whose row n belongs to sequence n.
    """

    def __init__(self, device: Device, spec: CallSpec, dtype: str = ""):
        dtype = dtype or spec.state_dtype
        dims = (spec.K, spec.V) if spec.options.state_layout == "kv" else (spec.V, spec.K)
        tail = (spec.N, spec.HV, *dims)
        self.state: DeviceArray = device.empty(tail, dtype)
        self.snapshots = device.empty((spec.snapshots, *tail), dtype) if spec.snapshots else None

    def upload(self, spec: CallSpec, call: Call) -> None:
        """Copy the rows that the call names."""
        if spec.has_state and spec.N and spec.P:
            rows = call.state_in
            if spec.pooled:  # a row of a skipped sequence is copied and not used
                rows = rows[call.state_indices.clip(0)]
            if dtype_name(rows) != self.state.dtype:
                rows = rows.float() if spec.framework == "torch" else rows.astype(self.state.dtype)
            self.state.write(rows)

    def download(self, spec: CallSpec, call: Call) -> None:
        """Copy back the arrays that the call changes."""
        if not spec.N:
            return
        live = np.asarray(call.state_indices) >= 0 if spec.pooled else np.ones(spec.N, bool)
        torch = spec.framework == "torch"

        def fetched(x: DeviceArray, like: Array) -> Array:
            if torch:
                return x.torch().to(like.dtype)
            return x.numpy().astype(like.dtype, copy=False)

        if call.state_out is not None and not spec.snapshot_rows:
            got = fetched(self.state, call.state_out)
            where = _index(live, torch)
            if not spec.inplace:
                call.state_out[...] = got
                call.state_out[_index(~live, torch)] = 0
            elif spec.pooled:
                call.state_out[call.state_indices[where]] = got[where]
            else:
                call.state_out[...] = got
        if self.snapshots is not None:
            cu = np.asarray(call.cu_seqlens) if spec.packed else np.arange(spec.N + 1) * spec.T
            written = (np.arange(spec.snapshots)[:, None] < np.diff(cu)) & live
            if spec.snapshot_rows:
                written &= np.asarray(call.snapshot_indices) >= 0
            got = fetched(self.snapshots, call.state_out if spec.snapshot_rows else call.snapshots)
            where = _index(written, torch)
            if spec.snapshot_rows:
                call.state_out[call.snapshot_indices[where]] = got[where]
            else:
                call.snapshots[where] = got[where]


def _index(mask: NDArray[np.bool_], torch: bool) -> Array:
    if not torch:
        return mask
    from torch import from_numpy

    return from_numpy(mask)


def flag_bits(names: Sequence[str], spec: CallSpec, layout: Layout, **own: bool) -> int:
    """The shader's flags: bit i is names[i] of the call. `own` are flags of one backend."""
    opt = spec.options
    on = {
        "packed": spec.packed,
        "masked": spec.masked,
        "tiled": opt.heads == "tiled",
        "vk": opt.state_layout == "vk",
        "linear": opt.decay == "linear",
        "raw": opt.decay == "raw",
        "lower": opt.lower_bound is not None,
        "dt_bias": "dt_bias" in layout.offsets,
        **{flag: getattr(opt, name) for flag, name in OF_OPTIONS.items()},
        "skips": spec.pooled,
        **own,
    }
    assert set(on) == set(names)
    return flags(names, on)


class _Launch(Protocol):
    serials: frozenset[int]
    """The allocations that the launch uses."""


L = TypeVar("L", bound=_Launch)


class Launches(Generic[L]):
    """Prepared launches (recorded, bound), by everything they depend on. The oldest are dropped first."""

    def __init__(self, drop: Callable[[L], None]):
        self._drop = drop
        self._kept: dict[object, L] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: object, make: Callable[[], L]) -> L:
        found = self._kept.pop(key, None) or make()
        self._kept[key] = found  # the most recently used is last
        if len(self._kept) > MAX_LAUNCHES:
            self._drop(self._kept.pop(next(iter(self._kept))))
        return found

    def forget(self, serial: int) -> None:
        """Drop the launches that use an allocation, which is freed."""
        for key in tuple(self._kept):  # a copy: a finaliser may call this during the loop
            if (launch := self._kept.get(key)) is not None and serial in launch.serials:
                self._drop(self._kept.pop(key))

    def clear(self) -> None:
        while self._kept:
            self._drop(self._kept.popitem()[1])


class StagedBackend(ABC):
    """A backend whose calls are staged, and whose shaders take any K up to MAX_K.

    Its devices give the driver's limits: `most_bytes` of a buffer, `max_groups` workgroups along each axis.
    """

    name: str
    header = 0
    """Bytes before the inputs, in their buffer."""
    held_dtype = ""
    """Dtype of host states while they are on the device; empty: unchanged."""

    @property
    def accepts(self) -> Accepts:
        said = f"takes host arrays, and states on the host or on {self.name}; got {{where}}"
        host = "takes q, k, v, g and beta on the host and stages them; got them on the device"
        return RULE_CALLS.but(
            framework=Row(("torch", "numpy", "mlx"), host), device=Row(("cpu", self.name), said), K=UpTo(MAX_K),
            snapshot_rows=EITHER, limits=(*RULE_CALLS.limits, self.takes_grid, self.takes_bytes),
        )  # fmt: skip

    def device(self, spec: CallSpec) -> Any:
        """Where a call runs."""
        return devices.device(spec.resident or f"{self.name}:0")

    @abstractmethod
    def rows(self, device: Any, K: int) -> tuple[int, int]:
        """(lanes that share a column of S, K padded to the rows that they hold)."""

    def layout(self, device: object, spec: CallSpec) -> Layout:
        """Of the call's inputs and its output."""
        return Layout(spec, self.rows(device, spec.K)[1], wide_output=self.held_dtype == "float32")

    def takes_grid(self, spec: CallSpec) -> str:
        device = self.device(spec)
        columns, heads, sequences = device.max_groups
        columns *= max(WORKGROUP // self.rows(device, spec.K)[0], 1)
        for n, most, what in (
            (spec.V, columns, "columns of V"), (spec.HV, heads, "value heads"), (spec.N, sequences, "sequences"),
        ):  # fmt: skip
            if n > most:
                return f"its driver takes up to {most} {what} in a call; got {n}"
        return ""

    def takes_bytes(self, spec: CallSpec) -> str:
        device = self.device(spec)
        layout = self.layout(device, spec)
        state = spec.N * spec.HV * spec.K * spec.V * devices.ITEMSIZE[self.held_dtype or spec.state_dtype]
        for what, nbytes in (
            ("inputs", self.header + layout.nbytes_in), ("outputs", layout.nbytes_out), ("states", state),
            ("snapshots", spec.snapshots * state),
        ):  # fmt: skip
            if nbytes > device.most_bytes:
                return f"its driver takes {what} of up to {device.most_bytes} bytes in a call; got {nbytes}"
        return ""

    def run(self, plan: Any, spec: CallSpec, call: Call) -> None:
        device = plan.device
        device.check()
        with device.lock:
            if spec.resident:
                self.advance(plan, spec, call, call.state_in, call.state_out, call.snapshots)
                return
            if plan.host is None:
                plan.host = HostStates(device, spec, self.held_dtype)
            held = plan.host
            held.upload(spec, call)
            self.advance(plan, spec, call, held.state, held.state, held.snapshots)
            held.download(spec, call)

    @abstractmethod
    def advance(
        self,
        plan: Any,
        spec: CallSpec,
        call: Call,
        state_in: DeviceArray,
        state_out: DeviceArray,
        snapshots: DeviceArray | None,
    ) -> None:
        """Stage the inputs, launch on states that are on the device, copy o out."""
