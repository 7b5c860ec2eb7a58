"""`anydelta bench executorch`: the operator against ExecuTorch's own llama::gated_delta_rule, both in its runtime.

Entering a program takes longer than one call in it. So a program with one call is subtracted from one with several.
Each call continues from the state of the last one. One thread, one process, interleaved.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from ... import gated_delta_rule, gated_delta_rule_
from ...core.late import late
from ...terminal import Refused, refusing
from ..measure.contender import needs
from ..measure.ops import Settings, describe_machine
from ..measure.report import time as in_words
from ..measure.small_report import Measured
from ..measure.turns import Progress, bare_kernel, check, interleave, make_inputs, oracle, tensors
from .options import Csv, Json, Md, Output, Rounds, SampleMs, small

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch
    from numpy.typing import ArrayLike
    from torch import Tensor

    from ...export import executorch
    from ..measure.cases import F32
else:
    executorch = late("anydelta.export.executorch")

HEADS, HEAD = 32, 128
CALLS = {1: 33, 512: 2}
"""T: calls in the longer program."""

GOAL = 3.0
"""How many times as fast as llama::gated_delta_rule the operator must be."""


@dataclass
class ExecuTorchRecord:
    """One operator at one length, per call."""

    case: str
    call: str
    rounds: int
    min_us: float
    median_us: float
    times: float
    """llama::gated_delta_rule's time / this one's, median of the rounds."""
    times_low: float
    times_high: float
    """The lowest and the highest of the rounds."""
    nmse: float
    others_pct: float | None = None

    def columns(self) -> dict[str, str]:
        return {
            "case": self.case,
            "call": self.call,
            "min": in_words(self.min_us),
            "median": in_words(self.median_us),
            "llama's time over it": f"{self.times:.2f} ({self.times_low:.2f} to {self.times_high:.2f})",
        }


def against_llama(settings: Settings | None = None, progress: Progress = lambda text, done: None) -> Measured:
    """Measure decode and prefill of 32 heads of 128 x 128 in float32.

    Raises:
        Refused: there is no ExecuTorch, or no anydelta_executorch for it.
        Failed: a result is wrong.
    """
    import torch

    if why := needs("executorch", "executorch"):
        raise Refused(why)
    from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401  (defines llama::)
    from executorch.runtime import Runtime

    settings = settings or Settings()
    with refusing(RuntimeError):
        executorch.load()
    records: list[ExecuTorchRecord] = []
    with torch.no_grad(), _one_thread():
        for T, longer in CALLS.items():
            case = f"T = {T}"
            x = make_inputs(T=T, HV=HEADS, D=HEAD)
            want = oracle(x)
            again = oracle({**x, "state": np.asarray(want[1], np.float32)})[0]
            programs, inputs = _programs(x, (1, longer))
            progress(f"{case}: lowering {len(programs)} programs", 0)
            loaded = Runtime.get().load_program(executorch.lower(programs).buffer)
            methods = {name: loaded.load_method(name) for name in programs}
            errors = {}
            for name in NAMES:
                got = methods[f"{name}_1"].execute(inputs[name])
                if name == "in_place":  # the state stays in the program: the next call shows it
                    then = methods[f"{name}_1"].execute(inputs[name])[0]
                    errors[name] = check(f"{case}, {name}", (got[0], then), (want[0], again))
                else:
                    o = got[0].transpose(1, 2) if name == "llama" else got[0]
                    errors[name] = check(f"{case}, {name}", (o, got[1]), want)
            calls: dict[str, Callable[[], object]] = {
                name: partial(methods[name].execute, inputs[name.rpartition("_")[0]]) for name in programs
            }
            errors |= _add_bare(calls, x, want)
            samples, _, others = interleave(calls, settings, progress)
            each = {name: samples[name] for name in BARE} | {
                name: [
                    (many - one) / (longer - 1)
                    for many, one in zip(samples[f"{name}_{longer}"], samples[f"{name}_1"], strict=True)
                ]
                for name in NAMES
            }
            for name, label in (NAMES | BARE).items():
                times = [a / b for a, b in zip(each["llama"], each[name], strict=True)]
                records.append(
                    ExecuTorchRecord(
                        case=case,
                        call=label,
                        rounds=len(times),
                        min_us=min(each[name]),
                        median_us=statistics.median(each[name]),
                        times=statistics.median(times),
                        times_low=min(times),
                        times_high=max(times),
                        nmse=errors[name],
                        others_pct=others,
                    )
                )
    notes = [
        f"float32, B = 1, H = HV = {HEADS}, K = V = {HEAD}, one thread; ExecuTorch {_version()}",
        f"a program of {' and '.join(map(str, CALLS.values()))} calls minus a program of one call, per call",
        f"the goal is {GOAL:g} times as fast as llama::gated_delta_rule",
    ]
    return Measured("In ExecuTorch's runtime", describe_machine(), settings, notes, records)


NAMES = {
    "in_place": "anydelta, in place",
    "functional": "anydelta, functional",
    "llama": "llama::gated_delta_rule",
}
BARE = {"bare_0": "bare kernel, aligned state", "bare_16": "bare kernel, state 16 bytes on"}
"""Without a runtime. ExecuTorch's memory begins 16 bytes after a multiple of 64, as malloc returns it. In a state that
begins there, each AVX-512 vector is in two cache lines. `export.executorch.lower` avoids this."""


def _add_bare(
    calls: dict[str, Callable[[], object]], x: Mapping[str, F32], want: Sequence[ArrayLike | None]
) -> dict[str, float]:
    """Add the bare kernel, in place, on states at both alignments; returns their errors."""
    import torch

    errors = {}
    for name in BARE:
        t = tensors(x)
        state = t["state"]
        memory = torch.empty(state.numel() + 32)
        start = (-memory.data_ptr() % 64 + int(name.partition("_")[2])) // memory.element_size()
        t["state"] = memory[start : start + state.numel()].view(state.shape).copy_(state)
        calls[name], o, advanced = bare_kernel(t, threads=1, share_openmp=True)
        calls[name]()
        errors[name] = check(BARE[name], (o, advanced), want)
    return errors


def _programs(
    x: Mapping[str, F32], counts: tuple[int, ...]
) -> tuple[dict[str, torch.export.ExportedProgram], dict[str, list[torch.Tensor]]]:
    """Programs of every operator with each number of calls, NAME_COUNT, and the inputs of each operator."""
    import torch

    class InPlace(torch.nn.Module):
        def __init__(self, calls: int):
            super().__init__()
            self.calls = calls
            self.register_buffer("state", torch.from_numpy(x["state"].copy()))

        def forward(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
            for _ in range(self.calls):
                o: Tensor = gated_delta_rule_(q, k, v, self.state, g=g, beta=beta)
            return o

    class Functional(torch.nn.Module):
        def __init__(self, calls: int):
            super().__init__()
            self.calls = calls

        def forward(
            self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None
        ) -> tuple[Tensor, Tensor | None]:
            for _ in range(self.calls):
                o, state = gated_delta_rule(q, k, v, g=g, beta=beta, initial_state=state)
            return o, state

    class Llama(Functional):
        def forward(
            self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None
        ) -> tuple[Tensor, Tensor | None]:
            for _ in range(self.calls):
                o, state = torch.ops.llama.gated_delta_rule(q, k, v, g, beta, state)
            return o, state

    t = tensors(x)
    ours = [t[name] for name in ("q", "k", "v", "g", "beta")]
    # llama's: heads before tokens, the decay itself, no scale
    theirs = [(t["q"] * HEAD**-0.5), t["k"], t["v"], t["g"].exp(), t["beta"]]
    inputs = {
        "in_place": ours,
        "functional": [*ours, t["state"]],
        "llama": [
            *(a.transpose(1, 2).clone(memory_format=torch.contiguous_format) for a in theirs),
            t["state"],
        ],
    }
    kinds = {"in_place": InPlace, "functional": Functional, "llama": Llama}
    programs = {
        f"{name}_{n}": torch.export.export(kind(n), tuple(inputs[name]))
        for name, kind in kinds.items()
        for n in counts
    }
    return programs, inputs


@contextmanager
def _one_thread() -> Iterator[None]:
    """One ExecuTorch thread inside the block."""
    from executorch.extension.pybindings import portable_lib

    before = portable_lib._threadpool_get_thread_count()
    portable_lib._unsafe_reset_threadpool(1)
    try:
        yield
    finally:
        portable_lib._unsafe_reset_threadpool(before)


def _version() -> str:
    from importlib.metadata import version

    return version("executorch")


def executorch_command(
    rounds: Rounds = 15,
    sample_ms: SampleMs = 40.0,
    json: Json = False,
    csv: Csv = False,
    md: Md = False,
    output: Output = None,
) -> None:
    """Time the operator against ExecuTorch's own llama::gated_delta_rule, both in its runtime, on one thread.

    Examples:
      anydelta bench executorch
      anydelta bench executorch -r 5 --json
    """
    small(against_llama, rounds, sample_ms, json, csv, md, output)
