"""The search: launches of a problem are run, compared with the heuristic's, and timed interleaved.

A launch wins if its result agrees with the heuristic's and its median is at least 2% lower. The final winner is timed
against the heuristic again, in twice as many rounds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from typing import Any, Protocol

import torch

from .. import __version__
from ..backends.triton.aot import call_of
from ..backends.triton.backward import BackwardLaunches, of_inputs, room
from ..backends.triton.config import Config, Machine, forced
from ..backends.triton.host import machine_of, on_device, strides_of
from ..backends.triton.launch import KernelCall, Launches
from ..terminal import first_line
from .problems import Change, Problem, groups

MARGIN = 0.98
"""A winner takes at most this share of the time: a smaller gain may be noise."""
AGREE = 4e-7
"""NMSE between two results in float32: each may be off by 1e-7 (docs/conventions.md), in opposite directions."""


@dataclass(frozen=True)
class Run:
    """A call with one launch. Each time it runs it advances the same state."""

    config: Config
    run: Callable[[], object]

    def __call__(self) -> Any:
        return self.run()


class Timer(Protocol):
    def __call__(self, runs: Sequence[Run], rounds: int) -> list[list[float]]:
        """Microseconds by run and round, interleaved."""


@dataclass
class Trial:
    """One launch that was tried."""

    change: Change
    us: list[float] = field(default_factory=list)
    """By round."""
    why_not: str = ""
    wrong: bool = False
    """It ran, and its result differs from the heuristic's."""


@dataclass
class Outcome:
    """What was found for one row of a table."""

    key: str
    case: str
    launch: Change
    """The fields that beat the heuristic; empty if none do."""
    us: float
    heuristic_us: float
    trials: list[Trial]

    def row(self, device: str) -> dict[str, object]:
        how = f"timed on {device}, {time.strftime('%Y-%m-%d')}, triton {version('triton')}, anydelta {__version__}"
        times = {"us": round(self.us, 2), "heuristic_us": round(self.heuristic_us, 2)}
        return {"launch": self.launch, "how": how, "case": self.case, **times}


class Contest:
    """A problem with arrays on a device."""

    def __init__(self, problem: Problem, device: str, machine: Machine | None = None):
        self.problem, self.device = problem, torch.device(device)
        self.machine = machine or machine_of(self.device)
        self.spec, self.call = call_of(problem.shape, device)
        call, random = self.call, torch.Generator(device).manual_seed(0)
        for x in (call.q, call.k, call.v, call.state_in):
            x.normal_(generator=random)
        call.g.uniform_(-0.5, -0.05, generator=random)
        call.beta.uniform_(0.1, 0.9, generator=random)
        self.first = call.state_in.clone()
        self.do = torch.empty_like(call.o).normal_(generator=random)
        self.d_state = torch.empty_like(self.first).normal_(generator=random)

    def run(self, config: Config) -> Run:
        with forced(**asdict(config)):
            strides = strides_of(self.spec, self.call)
            if self.problem.kernel != "backward":
                launches = Launches(self.spec, self.machine, strides)
                return Run(config, lambda: launches.run(self.call))
            backward = BackwardLaunches(self.spec, self.machine, strides)

        def gradients() -> object:
            found = room(self.spec, self.call)
            calls: list[KernelCall] = list(backward.calls(self.call, self.do, self.d_state, found))
            for kernel_call in calls:
                kernel_call.run()
            return found

        return Run(config, gradients)

    def results(self, run: Run) -> dict[str, torch.Tensor]:
        """The results of a run from the first state."""
        call = self.call
        call.state_in.copy_(self.first)
        for x in (call.o, call.snapshots):
            if x is not None:
                x.fill_(float("nan"))
        with on_device(self.device):
            found = run()
        if self.problem.kernel == "backward":
            grads = of_inputs(self.spec, call, found)
            return {name: x.clone() for name, x in grads.items() if x is not None}
        names = ("o", "state_out", "snapshots")
        return {name: x.clone() for name in names if (x := getattr(call, name)) is not None}


def agree(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> str:
    """Empty if they agree; otherwise the first that does not, and by how much."""
    for name, right in want.items():
        exact, other = right.double(), got[name].double()
        # Rounding to a half type leaves about eps^2 / 22; either result may have twice that error.
        allowed = AGREE if right.dtype == torch.float32 else 16 / 22 * torch.finfo(right.dtype).eps ** 2
        nmse = float((other - exact).square().sum() / exact.square().sum().clamp_min(1e-30))
        if not nmse <= allowed:  # NaN is a no
            return f"{name} differs from the heuristic's by NMSE {nmse:.1e}, more than {allowed:.1e}"
    return ""


def tune(
    contest: Contest,
    timer: Timer,
    *,
    rounds: int,
    tell: Callable[[str], None],
    in_time: Callable[[], bool] = lambda: True,
) -> Outcome:
    """Search one problem. When `in_time` turns false, the best launch so far is timed against the heuristic and kept.

    Raises:
        RuntimeError: the heuristic's own launch fails, or the device does.
    """
    problem, trials = contest.problem, list[Trial]()
    base = problem.heuristic(contest.machine)
    plain = contest.run(base)
    want = contest.results(plain)
    best: Change = {}
    for group in groups(problem, contest.machine):
        present = replace(base, **best)
        runs, entered = [contest.run(present)], [Trial(best)]
        for change in group:
            config = replace(present, **change)
            if config == present or not in_time():
                continue
            tell(f"{problem.key} {' '.join(f'{n}={x}' for n, x in change.items())}")
            trial = Trial({**best, **change})
            trials.append(trial)
            run = contest.run(config)
            try:
                trial.why_not = agree(contest.results(run), want)
                trial.wrong = bool(trial.why_not)
            except (
                Exception
            ) as error:  # the compiler's or the driver's: too many registers, too little shared memory
                trial.why_not = first_line(error)
            if not trial.why_not:
                runs.append(run)
                entered.append(trial)
        if len(runs) == 1:
            continue
        for trial, turns in zip(entered, timer(runs, rounds), strict=True):
            trial.us = turns
        medians = [statistics.median(trial.us) for trial in entered]
        first = min(range(len(runs)), key=medians.__getitem__)
        if medians[first] <= MARGIN * medians[0]:
            best = entered[first].change
    duel = [plain] + ([contest.run(replace(base, **best))] if best else [])
    tell(f"{problem.key}: once more against the heuristic")
    times = timer(duel, 2 * rounds)
    heuristic_us, us = statistics.median(times[0]), statistics.median(times[-1])
    if best and statistics.median(b / a for a, b in zip(*times, strict=True)) > MARGIN:
        best, us = {}, heuristic_us
    return Outcome(problem.key, problem.case, best, us, heuristic_us, trials)


def gpu_times(runs: Sequence[Run], rounds: int) -> list[list[float]]:
    """Times by triton.testing.do_bench, which empties the caches before each call. On CUDA and ROCm the launches of a
    call are replayed as one graph, so that Python's time does not count."""
    from triton.testing import do_bench

    ready: list[Callable[[], object]] = list(runs)
    if torch.cuda.is_available():
        pool = torch.cuda.graph_pool_handle()  # one for all: no two replays run at once
        ready = [_captured(run, pool) for run in runs]
    times: list[list[float]] = [[] for _ in runs]
    for turn in range(rounds):
        for i in range(len(runs)):
            at = (turn + i) % len(runs)
            times[at].append(1e3 * do_bench(ready[at], warmup=2, rep=10, return_mode="median"))
    return times


def _captured(run: Run, pool: torch.cuda._POOL_HANDLE) -> Callable[[], object]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        run()
    replay: Callable[[], object] = graph.replay
    return replay
