"""WebGPU: any GPU that wgpu-native drives (Vulkan, Metal, D3D12), through the package `wgpu`. WGSL: backends/webgpu.

Like Vulkan's, with workarounds for WebGPU's limits. Shaders cannot use mapped buffers, so inputs are written through
the queue, and o is read from a buffer that is mapped for each call. Storage has no 16-bit integers, so o and states are
float32 on the device. The shader widens inputs in half types.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np

from ...core.accepts import Accepts
from ...core.dispatch import Rejected
from ...core.late import late
from ...rule.arguments import Call
from ...rule.spec import CallSpec
from ..devices.roster import Roster
from ..devices.staging import DTYPES, WORKGROUP, HostStates, StagedBackend, flag_bits, lanes_of
from ..devices.structs import WEBGPU_FLAGS

if TYPE_CHECKING:
    from . import device as driver
    from .device import Launch, WebGPUDevice
else:
    driver = late("anydelta.backends.webgpu.device")

_serials = count()


roster: Roster[WebGPUDevice] = Roster(
    "webgpu",
    "WebGPU",
    labels=lambda: [f"({a.info['device']})" for a in driver.adapters()],
    make=lambda name, index: driver.WebGPUDevice(index, driver.adapters()[index]),
)
open_device = roster.open
HEADER = 256
"""Bytes before the inputs in their buffer, for the struct Call of recurrent.wgsl. Drivers need no larger alignment."""


class _Plan:
    """What a call needs besides its arrays."""

    def __init__(self, device: Any, spec: CallSpec):
        self.serial, self.device = next(_serials), device
        self.lanes, KP = BACKEND.rows(device, spec.K)
        self.rows4 = KP // 4 // self.lanes
        self.layout = BACKEND.layout(device, spec)
        self.stage = np.zeros(HEADER + self.layout.nbytes_in, np.uint8)
        """The struct Call, and the inputs."""
        self.views = self.layout.views(self.stage[HEADER:])
        self.host: HostStates | None = None


def _held_in_float32(spec: CallSpec) -> str:
    if spec.resident and spec.state_dtype != "float32":
        return f"keeps states in float32 on its device, because WebGPU has no 16-bit storage; got {spec.state_dtype}"
    return ""


class WebGPU(StagedBackend):
    name = "webgpu"
    held_dtype = "float32"
    header = HEADER

    def available(self) -> Sequence[Rejected]:
        try:
            found = driver.adapters()
        except ImportError as error:
            return (Rejected(f"the package wgpu is not installed ({error}): pip install 'anydelta[webgpu]'"),)
        except (OSError, RuntimeError) as error:
            return (Rejected(f"wgpu-native does not start ({error})"),)
        return () if found else (Rejected("wgpu-native finds no driver (Vulkan, Metal or D3D12)"),)

    @property
    def accepts(self) -> Accepts:
        return super().accepts.but(rules=(_held_in_float32,))

    def rows(self, device: WebGPUDevice, K: int) -> tuple[int, int]:
        groups = -(-K // 4)
        lanes = lanes_of(groups, device.subgroup or 8, device.is_cpu)
        while lanes < 32 and groups > 32 * lanes:  # larger than a subgroup: sums go through workgroup memory
            lanes *= 2
        return lanes, 4 * lanes * -(-groups // lanes)

    def describe(self) -> dict[str, object]:
        return {f"webgpu:{i}": driver.limits_of(a) for i, a in enumerate(driver.adapters())}

    def prepare(self, spec: CallSpec, call: Call) -> _Plan:
        device = self.device(spec)
        device.check()
        return _Plan(device, spec)

    def advance(
        self, plan: _Plan, spec: CallSpec, call: Call, state_in: Any, state_out: object, snapshots: Any
    ) -> None:
        """The kernel advances a state in place, because a buffer cannot be bound for reading and writing at once."""
        if not spec.resident:
            self._launch(plan, spec, call, state_in, snapshots, indexed=False)
            return
        shared = snapshots is not None and state_in is not None and snapshots.memory is state_in.memory
        if spec.inplace and not shared:
            self._launch(plan, spec, call, state_in, snapshots, indexed=spec.pooled)
            return
        if spec.inplace or state_out is None:
            dims = (spec.K, spec.V) if spec.options.state_layout == "kv" else (spec.V, spec.K)
            work = plan.device.empty((spec.N, spec.HV, *dims))
        else:
            work = state_out
        rows = np.asarray(call.state_indices).tolist() if spec.pooled else []
        if state_in is not None and not spec.pooled:
            work.write(state_in)
        for n, row in enumerate(rows):
            if row < 0:
                work[n].zero()
            else:
                work[n].write(state_in[row])
        self._launch(plan, spec, call, work, snapshots, indexed=False)
        if spec.inplace and not spec.pooled:
            state_in.write(work)
        for n, row in enumerate(rows if spec.inplace else ()):
            if row >= 0:
                state_in[row].write(work[n])

    def _launch(
        self, plan: _Plan, spec: CallSpec, call: Call, state: Any, snapshots: Any, *, indexed: bool
    ) -> None:
        device, layout = plan.device, plan.layout
        if not spec.N:
            return
        device.reserve(plan.stage.size, layout.nbytes_out)
        places = (
            (state.memory.serial, state.offset),
            None if snapshots is None else (snapshots.memory.serial, snapshots.offset),
        )
        launch = device.launches.get(
            (plan.serial, places, indexed), lambda: _bind(plan, spec, state, snapshots, indexed)
        )
        plan.stage[: launch.uniforms.size] = launch.uniforms
        layout.pack(call, plan.views)
        device.run(launch, plan.stage, layout.nbytes_out, lambda o: layout.unpack(call, layout.o.view(o)))
        device.staged.to_device += layout.nbytes_in
        device.staged.from_device += layout.nbytes_out


def _bind(plan: _Plan, spec: CallSpec, state: Any, snapshots: Any, indexed: bool) -> Launch:
    """Pipeline and bind group of a call on these states."""
    device, layout = plan.device, plan.layout
    state_at, first = device.bound(state)
    snaps_at, first_snap = {"buffer": device.spare.buffer, "offset": 0, "size": device.spare.nbytes}, 0
    if snapshots is not None:
        snaps_at, first_snap = device.bound(snapshots)
    rows = indexed and spec.snapshot_rows
    flags = flag_bits(
        WEBGPU_FLAGS, spec, layout, indexed=indexed, has_state=spec.has_state, snapshot_rows=rows
    )
    uniforms = layout.call(spec, flags=flags, s_in=first, snap=first if rows else first_snap)
    pipeline = device.pipeline(plan.lanes, plan.rows4, spec.kda, DTYPES.index(spec.dtype))
    inputs = {"buffer": device.inputs.buffer, "offset": HEADER, "size": layout.nbytes_in}
    outputs = {"buffer": device.outputs.buffer, "offset": 0, "size": layout.nbytes_out}
    params = {"buffer": device.inputs.buffer, "offset": 0, "size": len(uniforms)}
    group = device.bind(pipeline, (inputs, inputs, outputs, state_at, snaps_at, params))
    grid = (-(-spec.V // (WORKGROUP // plan.lanes)), spec.HV, spec.N)
    serials = frozenset(x.memory.serial for x in (state, snapshots) if x is not None)
    return driver.Launch(pipeline, group, grid, serials, np.frombuffer(uniforms, np.uint8))


BACKEND = WebGPU()
