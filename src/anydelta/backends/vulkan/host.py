"""Vulkan: any GPU with a Vulkan 1.1 driver, through the package `vulkan`. The build compiles the shaders to SPIR-V.

A call copies its inputs into a mapped buffer, submits a command buffer that the first call with these shapes and states
recorded, and waits. States on a device (`anydelta.device("vulkan:0")`) stay there. States on the host are copied there
and back.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from statistics import median
from typing import TYPE_CHECKING, Any

from ...core.accepts import Accepts
from ...core.devices import DeviceArray
from ...core.dispatch import Rejected
from ...core.late import late
from ...rule.arguments import Call
from ...rule.spec import CallSpec
from ..devices.roster import Roster
from ..devices.staging import DTYPES, WORKGROUP, HostStates, StagedBackend, flag_bits, lanes_of
from ..devices.structs import VULKAN_FLAGS

if TYPE_CHECKING:
    from . import device as driver
    from .device import VulkanDevice
else:
    driver = late("anydelta.backends.vulkan.device")

CHUNK_MIN_TOKENS = 64
"""The least tokens per sequence on average for chunks: four chunks. For fewer, the two kernels hardly differ."""
CHUNK_COLUMNS = 64
"""Columns of a workgroup of chunk.comp. Its invocations share what they compute from k and q."""
CHUNK_GROUPS = 16
"""Groups of four rows that a lane of chunk.comp holds: 64 registers."""
CPU_CHUNK_MIN_K = 64
"""Least K for chunks with KDA on a CPU: they compute its K exponentials per token once for all columns."""
CHUNK_ENV = "ANYDELTA_VULKAN_CHUNK"
"""1: long prompts run in chunks. 0: token by token. Unset: whichever is faster in the first call of the shape."""
_serials = count()


roster: Roster[VulkanDevice] = Roster(
    "vulkan",
    "Vulkan",
    labels=lambda: [f"({driver.Facts(p).name})" for p in driver.physical_devices()],
    make=lambda name, index: driver.VulkanDevice(index),
)
open_device = roster.open


class _Plan:
    """What a call needs besides its arrays."""

    def __init__(self, device: Any, spec: CallSpec, call: Call, chunk: int | None = None):
        self.serial = next(_serials)
        self.device = device
        facts = device.facts
        self.lanes, self.KP = BACKEND.rows(device, spec.K)
        self.subgroup = bool(facts.subgroup) and self.lanes > 1
        groups = self.KP // 4
        self.chunk_lanes = 1
        while self.chunk_lanes < self.lanes and groups > CHUNK_GROUPS * self.chunk_lanes:
            self.chunk_lanes *= 2
        self.chunk = _chosen_chunk(self, spec, call) if chunk is None else chunk
        self.layout = BACKEND.layout(device, spec)
        self.variant = "_half" if facts.half_storage else ""
        self.views: Any = None
        self.o_view: Any = None
        self.generation = -1
        self.host: HostStates | None = None
        self.scratch: DeviceArray | None = None


def _chosen_chunk(plan: _Plan, spec: CallSpec, call: Call) -> int:
    """Tokens per chunk, or 0 for token by token. On a GPU the first call of a shape times both, once per process."""
    device = plan.device
    tokens = _chunk(plan, spec)
    forced = os.environ.get(CHUNK_ENV)
    if not tokens or forced == "0":
        return 0
    if forced == "1":
        return tokens
    if (
        device.facts.type == "CPU"
    ):  # no trial: it would compile both; measured on lavapipe (docs/backends/vulkan.md)
        return tokens if spec.kda and spec.K >= CPU_CHUNK_MIN_K else 0
    key = (spec.K, spec.V, spec.kda, spec.dtype)
    if key not in device.best_chunk:
        times = measure_chunks(device, spec, call, tokens)
        device.best_chunk[key] = min(times, key=lambda c: median(times[c]))
    best: int = device.best_chunk[key]
    return best and tokens


def measure_chunks(
    device: Any, spec: CallSpec, call: Call, tokens: int, rounds: int = 5
) -> dict[int, list[float]]:
    """Seconds of calls token by token (0) and in chunks (`tokens`), interleaved, on separate states."""
    plain = replace(spec, resident="", pooled=False, snapshots=0, snapshot_rows=False)
    state = device.zeros((spec.N, spec.HV, spec.K, spec.V), spec.state_dtype)
    call = replace(call, state_indices=None, snapshots=None, snapshot_indices=None)
    times: dict[int, list[float]] = {0: [], tokens: []}
    plans = {c: _Plan(device, plain, call, chunk=c) for c in times}
    with device.lock:
        for _ in range(rounds + 1):
            for c, plan in plans.items():
                BACKEND.stage(plan, call)
                launch = BACKEND.launch(plan, plain, (state, state, None))
                start = time.perf_counter()
                device.submit(launch.submit, "measuring")
                times[c].append(time.perf_counter() - start)
    return {c: t[1:] for c, t in times.items()}  # the first round compiles


def _chunk(plan: _Plan, spec: CallSpec) -> int:
    """Tokens per chunk of chunk.comp, for a long prompt if k, q and gates fit into shared memory; else 0."""
    facts, invocations = plan.device.facts, CHUNK_COLUMNS * plan.chunk_lanes
    between = (
        4 * spec.N * spec.HV * spec.K * spec.V if spec.snapshots else 0
    )  # the state between the two passes
    if (
        between > facts.max_range
        or spec.T - spec.snapshots < CHUNK_MIN_TOKENS * max(spec.N if spec.packed else 1, 1)
        or invocations > facts.max_invocations
    ):
        return 0
    for tokens in (16, 8):
        rows = 4 * plan.KP * ((3 * tokens + 1) if spec.kda else 2 * tokens)
        if rows + 4 * (tokens * (2 * tokens + 2 + CHUNK_COLUMNS) + invocations) + 32 <= facts.max_shared:
            return tokens
    return 0


class Vulkan(StagedBackend):
    name = "vulkan"

    def available(self) -> Sequence[Rejected]:
        try:
            shaders = driver.shader("recurrent")
        except ImportError as error:
            return (
                Rejected(f"the package vulkan is not installed ({error}): pip install 'anydelta[vulkan]'"),
            )
        except OSError as error:
            return (Rejected(f"there is no Vulkan loader ({error}); Debian has it in libvulkan1"),)
        no = []
        if shaders is None:
            no.append(
                "this installation was built without glslang, so it has no shaders; install glslang and rebuild"
            )
        try:
            found = driver.physical_devices()
        except driver.VulkanError as error:
            no.append(f"the Vulkan loader finds no driver ({type(error).__name__})")
        else:
            if not found:
                no.append("no Vulkan driver offers a device with Vulkan 1.1")
        return tuple(Rejected(reason) for reason in no)

    @property
    def accepts(self) -> Accepts:
        declared = super().accepts
        return declared.but(limits=(*declared.limits, self.takes_halves))

    def takes_halves(self, spec: CallSpec) -> str:
        halves = {spec.dtype, spec.state_dtype} & {"bfloat16", "float16"}
        if not halves or self.device(spec).facts.half_storage:
            return ""
        return (
            "its driver has no 16-bit storage buffers (storageBuffer16BitAccess), so it takes float32 only; got "
            f"{' and '.join(sorted(halves))}"
        )

    def rows(self, device: VulkanDevice, K: int) -> tuple[int, int]:
        groups = -(-K // 4)
        lanes = lanes_of(groups, device.facts.subgroup or 32, device.facts.type == "CPU")
        return lanes, 4 * lanes * -(-groups // lanes)

    def describe(self) -> dict[str, object]:
        return {f"vulkan:{i}": driver.Facts(p).limits() for i, p in enumerate(driver.physical_devices())}

    def prepare(self, spec: CallSpec, call: Call) -> _Plan:
        device = self.device(spec)
        device.check()
        return _Plan(device, spec, call)

    def advance(
        self,
        plan: _Plan,
        spec: CallSpec,
        call: Call,
        state_in: DeviceArray,
        state_out: DeviceArray,
        snapshots: DeviceArray | None,
    ) -> None:
        """One launch on states that are on the device."""
        device, layout = plan.device, plan.layout
        if not spec.N:
            return
        self.stage(plan, call)
        launch = self.launch(plan, spec, (state_in if spec.has_state else None, state_out, snapshots))
        device.submit(launch.submit, "running the operator")
        layout.unpack(call, plan.o_view)
        device.staged.to_device += layout.nbytes_in
        device.staged.from_device += layout.nbytes_out

    def stage(self, plan: _Plan, call: Call) -> None:
        """Copy the inputs into the mapped buffer."""
        device, layout = plan.device, plan.layout
        device.reserve(layout.nbytes_in, layout.nbytes_out)
        if plan.generation != device.generation:
            plan.views = layout.views(device.inputs.mapped)
            plan.o_view = layout.o.view(device.outputs.mapped)
            plan.generation = device.generation
        layout.pack(call, plan.views)

    def launch(self, plan: _Plan, spec: CallSpec, arrays: tuple[Any, ...]) -> Any:
        """The recording for (state read, state written, snapshots)."""
        places = tuple((x.memory.serial, x.offset) if x is not None else None for x in arrays)
        return plan.device.launches.get((plan.serial, places), lambda: _record(plan, spec, arrays))


def _record(plan: _Plan, spec: CallSpec, arrays: tuple[Any, ...]) -> object:
    """Descriptor sets and command buffer of a call on these states."""
    import vulkan as vk

    device, layout = plan.device, plan.layout
    inputs = device.inputs if device.unified else device.local_inputs
    outputs = device.outputs if device.unified else device.local_outputs
    chunked = bool(plan.chunk)
    state_in, state_out, snapshots = arrays
    passes = []
    if chunked and spec.snapshots:  # the state between the two passes
        if plan.scratch is None:
            plan.scratch = device.empty((spec.N, spec.HV, spec.K, spec.V))
        passes = [("chunk", state_in, plan.scratch, None), ("recurrent", plan.scratch, state_out, snapshots)]
    else:
        passes = [("chunk" if chunked else "recurrent", state_in, state_out, snapshots)]

    base = [(inputs, 0, layout.nbytes_in), (outputs, 0, layout.nbytes_out)]
    rows, pushes, pipelines, grids = [], [], [], []
    for name, source, target, snaps in passes:
        row, first = list(base), []
        if spec.resident and spec.snapshot_rows:
            snaps = target
        for x in (source, target, snaps):
            place, element = device.bound(x) if x is not None else (base[1], 0)
            row.append(place)
            first.append(element)
        rows.append(row)
        pushes.append(_push(plan, spec, source, target, first, middle=source is plan.scratch and chunked))
        first_bf16 = source is not None and source.dtype == "bfloat16"
        halves = first_bf16 + 2 * (
            spec.state_dtype == "bfloat16" and (target is None or target is not plan.scratch)
        )
        lanes = plan.chunk_lanes if name == "chunk" else plan.lanes
        columns = CHUNK_COLUMNS if name == "chunk" else max(WORKGROUP // lanes, 1)
        constants = (
            lanes, plan.KP // 4 // lanes, int(spec.kda), DTYPES.index(spec.dtype), plan.chunk or 16, halves,
        )  # fmt: skip
        grids.append((-(-spec.V // columns), spec.HV, spec.N))
        pipelines.append(
            device.pipeline(
                f"{name}{plan.variant}{'_subgroup' if plan.subgroup else ''}",
                columns * lanes,
                plan.subgroup,
                constants,
            )
        )
    pool, sets = device.descriptors(rows)

    def write(cb: object) -> None:
        compute = vk.VK_PIPELINE_STAGE_COMPUTE_SHADER_BIT
        if not device.unified:
            region = vk.VkBufferCopy(srcOffset=0, dstOffset=0, size=layout.nbytes_in)
            vk.vkCmdCopyBuffer(cb, device.inputs.buffer, inputs.buffer, 1, [region])
        for pipeline, held, push, grid in zip(pipelines, sets, pushes, grids, strict=True):
            driver.barrier(cb, compute, vk.VK_ACCESS_SHADER_READ_BIT | vk.VK_ACCESS_SHADER_WRITE_BIT)
            vk.vkCmdBindPipeline(cb, vk.VK_PIPELINE_BIND_POINT_COMPUTE, pipeline)
            vk.vkCmdBindDescriptorSets(
                cb, vk.VK_PIPELINE_BIND_POINT_COMPUTE, device.layout, 0, 1, [held], 0, None
            )
            vk.vkCmdPushConstants(
                cb, device.layout, vk.VK_SHADER_STAGE_COMPUTE_BIT, 0, len(push), vk.ffi.from_buffer(push)
            )
            vk.vkCmdDispatch(cb, *grid)
        if not device.unified:
            driver.barrier(cb, vk.VK_PIPELINE_STAGE_TRANSFER_BIT, vk.VK_ACCESS_TRANSFER_READ_BIT)
            region = vk.VkBufferCopy(srcOffset=0, dstOffset=0, size=layout.nbytes_out)
            vk.vkCmdCopyBuffer(cb, outputs.buffer, device.outputs.buffer, 1, [region])

    serials = frozenset(x.memory.serial for x in arrays if x is not None)
    return driver.Launch(pool, device.record(write), serials)


def _push(
    plan: _Plan,
    spec: CallSpec,
    source: DeviceArray | None,
    target: DeviceArray | None,
    first: list[int],
    *,
    middle: bool,
) -> bytes:
    """The struct Call of backends/vulkan/rule.glsl. `middle`: the second of two passes."""
    resident = bool(spec.resident)
    to_scratch = bool(plan.chunk) and spec.snapshots > 0 and not middle
    to_pool = resident and spec.pooled
    flags = flag_bits(
        VULKAN_FLAGS, spec, plan.layout,
        in_indexed=to_pool and not middle,
        out_indexed=to_pool and spec.inplace and not to_scratch,
        has_state=source is not None,
        write_state=target is not None and not (resident and spec.snapshot_rows and not to_scratch),
        zero_skipped=to_pool and not spec.inplace and target is not None and not to_scratch,
        chunked=bool(plan.chunk),
        snapshot_rows=resident and spec.snapshot_rows,
    )  # fmt: skip
    s_in, s_out, snap = first
    return plan.layout.call(spec, flags=flags, s_in=s_in, s_out=s_out, snap=snap)


BACKEND = Vulkan()
