"""`anydelta bench devices`: whole calls on devices, by every kernel variant and kind of memory access, beside the CPU.

A tiny call (one head of 16) shows only dispatch and waiting. A decode step with its state on the device stages only q,
k, v, g, beta and o. Results are compared with the cpu backend's before anything is timed.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from ... import device, gated_delta_rule_
from ...conformance.run import unavailable
from ...core import dispatch, plans
from ...terminal import Refused
from ..measure.ops import Settings, describe_machine
from ..measure.report import time as in_words
from ..measure.small_report import Measured
from ..measure.turns import Progress, check, interleave, part_of
from .options import Csv, Json, Md, Output, Rounds, SampleMs, numbers, small

if TYPE_CHECKING:
    from ...core.arrays import Array

KINDS = ("vulkan", "webgpu", "opencl", "sycl")
SHAPES = {"tiny call": (1, 1, 1, 16), "decode step": (1, 16, 32, 128), "64 tokens": (64, 16, 32, 128)}
"""T, H, HV, and K = V, of one sequence."""


@dataclass
class DevicesRecord:
    """One call by one variant and kind of memory access."""

    call: str
    kda: bool
    way: str
    rounds: int
    median_us: float
    low_us: float
    """The quartiles."""
    high_us: float
    staged_bytes: int
    """Bytes that cross in a call."""
    nmse: float
    others_pct: float | None = None

    def columns(self) -> dict[str, str]:
        return {
            "call": f"{self.call}{', KDA' if self.kda else ''}", "way": self.way, "median": in_words(self.median_us),
            "quartiles": f"{in_words(self.low_us)} to {in_words(self.high_us)}",
            "bytes staged": str(self.staged_bytes),
        }  # fmt: skip


@dataclass(frozen=True)
class Way:
    """A device, its kernel variant and its kind of memory access. Without a device: the cpu backend."""

    name: str
    device: Any = None
    settings: tuple[tuple[str, str], ...] = ()
    """Attributes of the device."""
    chunks: str = ""
    """The value of Vulkan's variable for chunks."""
    resident: bool = False

    @contextmanager
    def active(self) -> Iterator[None]:
        """Run calls this way inside the block. Drops earlier plans."""
        for attribute, value in self.settings:
            setattr(self.device, attribute, value)
        variable = dispatch.host("vulkan").CHUNK_ENV
        before = os.environ.get(variable)
        if self.chunks:
            os.environ[variable] = self.chunks
        plans.forget()
        try:
            yield
        finally:
            os.environ.pop(variable, None)
            if before is not None:
                os.environ[variable] = before

    def state(self, K: int, HV: int) -> Array:
        shape = (1, HV, K, K)
        return self.device.zeros(shape) if self.resident else np.zeros(shape, np.float32)


def ways(kind: str, cuts: Sequence[str], prompts: bool) -> list[Way]:
    """The ways of a kind of device: every kind of memory access for the first variant, one for the others."""
    found: Any = device(kind)
    if kind in ("opencl", "sycl"):
        every = itertools.product(found.kernels(), found.memories, (False, True))
        return [
            Way(
                f"{kind} {cut} {way}{' resident' * resident}",
                found,
                (("kernel", cut), ("memory", way)),
                "",
                resident,
            )
            for cut, way, resident in every
            if (not cuts or cut in cuts)
            and (cut == found.kernels()[0] or (way == found.memories[0] and not resident))
        ]
    if kind == "vulkan" and prompts:
        return [Way(f"{kind} {name}", found, (), on, True) for name, on in (("tokens", "0"), ("chunks", "1"))]
    return [Way(f"{kind}{' resident' * resident}", found, resident=resident) for resident in (False, True)]


def _inputs(T: int, H: int, HV: int, K: int, kda: bool) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 1, T, H, K), np.float32) / K**0.5
    return {
        "q": q, "k": k, "v": rng.standard_normal((1, T, HV, K), np.float32),
        "g": -rng.random((1, T, HV, K) if kda else (1, T, HV), np.float32),
        "beta": rng.random((1, T, HV), np.float32),
    }  # fmt: skip


def on_devices(
    kinds: Sequence[str] = KINDS,
    prompts: Sequence[int] = (),
    cuts: Sequence[str] = (),
    kda: bool = False,
    settings: Settings | None = None,
    progress: Progress = lambda text, done: None,
) -> Measured:
    """Measure the calls of SHAPES, or prompts of these lengths at K = V = 64 and 128, with H = 2 and HV = 4.

    Raises:
        Failed: a result is wrong.
        UnsupportedError: this machine lacks a device.
    """
    settings = settings or Settings()
    measured = Measured("Calls on devices", describe_machine(), settings)
    calls = {f"prompt of {T}, K = V = {K}": (T, 2, 4, K) for T in prompts for K in (64, 128)} or SHAPES
    field = [Way("cpu"), *(way for kind in kinds for way in ways(kind, cuts, bool(prompts)))]
    for i, (label, (T, H, HV, K)) in enumerate(calls.items()):
        x = _inputs(T, H, HV, K, kda)
        runs: dict[str, Callable[[], object]] = {}
        found: dict[str, tuple[float, int]] = {}
        want: Any = None
        for way in field:
            backend = "cpu" if way.device is None else way.device.kind
            with way.active():
                state = way.state(K, HV)  # in memory of the kind that the way needs
                runs[way.name] = run = partial(gated_delta_rule_, **x, state=state, backend=backend)
                count = way.device.staged if way.device else None
                before = count.to_device + count.from_device if count else 0
                o = run()
                staged = count.to_device + count.from_device - before if count else 0
            got = (o, state.numpy() if way.resident else state.copy())
            want = got if want is None else want
            found[way.name] = (check(f"{label}, {way.name}", got, want), staged)
        tell = part_of(progress, label, i, len(calls))
        samples, _, others = interleave(runs, settings, tell, {way.name: way.active for way in field})
        for name, us in samples.items():
            low, middle, high = (float(np.percentile(us, p)) for p in (25, 50, 75))
            error, staged = found[name]
            measured.records.append(
                DevicesRecord(label, kda, name, len(us), middle, low, high, staged, error, others)
            )
    measured.notes.append(
        "float32, one sequence, in place; H = 16, HV = 32, K = V = 128, except for the tiny call"
    )
    return measured


def devices_command(
    kinds: Annotated[list[str], typer.Argument(help=f"The devices to measure: {', '.join(KINDS)}.")],
    prompts: Annotated[
        str | None, typer.Option("--prompts", help="Lengths, as 512,4096, instead of the three calls.")
    ] = None,
    cuts: Annotated[
        str, typer.Option("--cuts", help="Only these variants of OpenCL and SYCL, as chunks,columns.")
    ] = "",
    kda: Annotated[bool, typer.Option("--kda", help="Gates that are vectors over K.")] = False,
    rounds: Rounds = 50,
    sample_ms: SampleMs = 5.0,
    json: Json = False,
    csv: Csv = False,
    md: Md = False,
    output: Output = None,
) -> None:
    """Time calls on devices: every kernel variant and kind of memory access, states on the host and on the device.

    Examples:
      anydelta bench devices vulkan webgpu
      anydelta bench devices opencl sycl
      anydelta bench devices sycl --prompts 512,4096 --cuts chunks,columns --kda
      anydelta bench devices vulkan --prompts 512,1024,4096
    """
    for kind in kinds:
        if kind not in KINDS:
            raise Refused(f"a kind must be one of {', '.join(KINDS)}; got {kind!r}")
        if reasons := unavailable(kind):
            raise Refused(f"{kind} does not run here: {'; '.join(map(str, reasons))}")
    lengths = numbers("--prompts", prompts, 65536) if prompts else []
    names = [cut for cut in cuts.split(",") if cut]
    small(partial(on_devices, kinds, lengths, names, kda), rounds, sample_ms, json, csv, md, output)
