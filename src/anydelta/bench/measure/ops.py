"""Measure the operator: check every contender, then time all of them interleaved in one process.

A shared machine drifts by more than the differences of interest, so absolute times are not trusted. Each round runs
every contender (A B C, B C A, ...), ratios are taken within a round, and the median of the rounds counts. The machine's
own limits are measured in the same rounds.
"""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ... import __version__
from ...core import dispatch, native
from ...core.probe import available_cpus
from ...rule import reference
from ...terminal import first_line
from .cases import Case, Inputs, make_inputs, rounded, subnormals
from .contender import Contender, Result, Runner, tensors_on

NMSE = 1e-7
"""The limit for float32, as in conformance, for output, state and each snapshot separately."""

HALF_FACTOR = 4.0
"""The limit for half types: twice the error (here squared) of the oracle's answer rounded to the type."""

PEER_NMSE = 1e-3
"""A peer may compute in the half type of its tokens. Its error is shown, and only a wrong answer is refused."""

ORACLE_ELEMENTS = 5e7
"""The most state elements times tokens that the float64 oracle computes for one case (about a second)."""

COPY_MIB = 256
"""Size of each buffer of the copy measurement. A virtual machine may have a server's whole cache, 300 MiB or more."""

COPY_SAMPLES = 3
"""Rounds of a case that measure the copy too; filling its buffers costs more than a round."""

SETTLE_SECONDS = 0.015
"""Pause between contenders: thread pools spin for some milliseconds after their last call."""


@dataclass(frozen=True)
class Settings:
    """The length of a measurement."""

    rounds: int = 7
    sample_seconds: float = 0.015
    """Calls are repeated until a sample lasts about this long."""
    contender_seconds: float = 2.0
    """A contender with slow calls takes part in fewer rounds, at least two."""


@dataclass
class Record:
    """One contender on one case with one number of threads."""

    case: str
    kind: str
    threads: int
    contender: str
    version: str
    status: str = "ok"
    """ok; refused: it does not take the case; failed: it raised; wrong: its result is wrong."""
    reason: str = ""
    detail: str = ""
    states: int = 1
    working_set_mib: float | None = None
    """The states that its calls cycle through."""
    nmse_o: float | None = None
    nmse_state: float | None = None
    nmse_snapshots: float | None = None
    """The worst of the snapshots."""
    checked: str = ""
    rounds: int = 0
    calls: int = 0
    """Calls per sample."""
    min_us: float | None = None
    median_us: float | None = None
    iqr_pct: float | None = None
    """Interquartile range of the rounds / their median."""
    ratio: float | None = None
    """Time / anydelta's, median of the rounds. Above 1, anydelta is faster."""
    ratio_min: float | None = None
    """The same from the minima."""
    ratio_iqr: float | None = None
    limit: str = ""
    """copy or fma: the one that takes longer in this case."""
    limit_value: float | None = None
    limit_unit: str = ""
    limit_us: float | None = None
    limit_pct: float | None = None
    """The limit's time / the contender's minimum."""
    others_pct: float | None = None
    """CPU time that other processes (or a hypervisor) took during the rounds, of all CPUs; Linux only."""


@dataclass
class Report:
    """The measurements, the machine, and the absent contenders."""

    machine: dict[str, Any]
    settings: Settings
    absent: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)


def describe_machine(backend: str = "auto") -> dict[str, object]:
    """Facts that a reader of the numbers needs. Nothing that identifies the machine."""
    import torch

    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        named = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = named[0].split(":", 1)[1].strip() if named else cpu
    facts: dict[str, object] = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu or platform.machine(),
        "cpus": available_cpus(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "anydelta": __version__,
    }
    name = "cpu" if backend == "auto" else backend
    try:
        facts["backend"] = {name: dict(dispatch.get_backend(name).describe())}
    except Exception as error:  # a backend that cannot describe itself is still shown by `anydelta info`
        facts["backend"] = {name: f"no description: {error}"}
    return facts


class Others:
    """The share of the CPUs that other work takes. It disturbs times on several threads."""

    def __init__(self) -> None:
        self.start = self._now()

    @staticmethod
    def _now() -> tuple[float, float] | None:
        """Jiffies of all CPUs: the total, and those that are neither idle nor ours."""
        try:
            fields = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        except (OSError, ValueError):
            return None
        mine = os.times()
        own = (mine.user + mine.system) * os.sysconf("SC_CLK_TCK")
        return float(sum(fields)), sum(fields) - fields[3] - fields[4] - own  # idle, iowait

    def percent(self) -> float | None:
        end = self._now()
        if self.start is None or end is None or end[0] <= self.start[0]:
            return None
        return max(0.0, 100 * (end[1] - self.start[1]) / (end[0] - self.start[0]))


class Limits:
    """The machine's FMA peak and copy bandwidth, from the extension module; the best sample counts."""

    units = {"fma": "GFLOP/s", "copy": "GB/s"}  # noqa: RUF012

    def __init__(self, kinds: Sequence[str], threads: int):
        self.best: dict[str, float] = {}
        self.why_not = ""
        self._measure: dict[str, Callable[[], float]] = {}
        if native.why_not:
            self.why_not = f"no limits: {native.why_not}"
            return
        _core = native.core
        if not hasattr(_core, "fma_peak") or not hasattr(_core, "copy_bandwidth"):
            self.why_not = "no limits: this anydelta._core has no fma_peak and copy_bandwidth; build it again"
            return
        every = {
            "fma": lambda: _core.fma_peak(threads, 0.02),
            "copy": lambda: _core.copy_bandwidth(threads, COPY_MIB),
        }
        self._measure = {kind: every[kind] for kind in kinds}

    def sample(self, *, copy: bool = True) -> None:
        for kind, measure in self._measure.items():
            if copy or kind != "copy":
                self.best[kind] = max(self.best.get(kind, 0.0), measure())

    def of(self, case: Case) -> tuple[str, float, float] | None:
        """(kind, its value, least seconds of one call) of the case's limit; None if unmeasured."""
        work = {"fma": case.flops, "copy": case.moved_bytes}
        found = [(kind, value, work[kind] / (value * 1e9)) for kind, value in self.best.items() if value > 0]
        return max(found, key=lambda f: f[2], default=None)


class Oracle:
    """The expected result of a case: float64 on as many heads as affordable; anydelta's on all heads once it passed."""

    def __init__(self, case: Case, x: Inputs):
        self.case = case
        per_head = case.T * case.D * case.D
        rows, heads = list(range(case.B)), list(range(case.HV))
        self.full = per_head * case.B * case.HV <= ORACLE_ELEMENTS
        if not self.full:
            rows = sorted({0, case.B - 1})
            heads = sorted({0, case.HV // 2, case.HV - 1})
        self.rows, self.heads = np.array(rows)[:, None], np.array(heads)
        qk = self.heads // (case.HV // case.H)

        def pick(a: NDArray[np.floating], heads: NDArray[np.integer] | slice) -> NDArray[np.float64]:
            picked: NDArray[np.float64] = a[self.rows[:, 0]][:, :, heads].astype(np.float64)
            return picked

        start = x.state if x.rows is None else x.state[x.rows[0]]
        self.want = reference.gated_delta_rule(
            pick(x.q, qk),
            pick(x.k, qk),
            pick(x.v, self.heads),
            g=pick(x.g, self.heads),
            beta=pick(x.beta, self.heads),
            initial_state=start[self.rows, self.heads].astype(np.float64),
            snapshots=case.snapshots,
            **raw_options(x, self.heads),
        )
        self.standard: Result | None = None
        """anydelta's result, once it passed."""

    def check(self, got: Result, record: Record) -> str:
        """Fill in the errors. Returns the reason why the result is wrong, or an empty string."""
        c = self.case
        shapes: dict[str, tuple[int, ...]] = {"o": (c.B, c.T, c.HV, c.D), "state": (c.B, c.HV, c.D, c.D)}
        if c.snapshots:
            shapes["snapshots"] = (c.snapshots, c.B, c.HV, c.D, c.D)
        for name, shape in shapes.items():
            array = getattr(got, name)
            if array is None or array.shape != shape:
                got_shape = None if array is None else list(array.shape)
                return f"{name} must have shape {list(shape)}; got {got_shape}"
        errors = {
            "o": nmse(np.swapaxes(got.o, 1, 2)[self.rows, self.heads], np.swapaxes(self.want.o, 1, 2)),
            "state": nmse(got.state[self.rows, self.heads], self.want.state),
        }
        if got.snapshots is not None and self.want.snapshots is not None:
            pairs = zip(got.snapshots, self.want.snapshots, strict=True)
            errors["snapshots"] = _worst([nmse(s[self.rows, self.heads], w) for s, w in pairs])
        bounds = dict.fromkeys(errors, NMSE)
        if c.dtype != "float32":
            bounds = dict.fromkeys(errors, PEER_NMSE) if record.contender != "anydelta" else self._bounds()
        record.checked = "float64 oracle" if self.full else f"float64 oracle on {len(self.heads)} heads"
        if not self.full and self.standard is not None:
            record.checked += ", all heads against anydelta"
            for name in errors:
                errors[name] = _worst([errors[name], nmse(getattr(got, name), getattr(self.standard, name))])
        for name, error in errors.items():
            setattr(record, f"nmse_{name}", error)
        bad = [
            f"at most {bounds[name]:.0e}; got {name} {error:.1e}"
            for name, error in errors.items()
            if not error <= bounds[name]
        ]
        return f"NMSE must be {', '.join(bad)}" if bad else ""

    def _bounds(self) -> dict[str, float]:
        """The contract's limits for the types of the case."""

        def bound(want: NDArray[np.float64], dtype: str) -> float:
            return NMSE if dtype == "float32" else HALF_FACTOR * nmse(rounded(want, dtype), want)

        bounds = {
            "o": bound(self.want.o, self.case.dtype),
            "state": bound(self.want.state, self.case.state_dtype),
        }
        if self.want.snapshots is not None:
            bounds["snapshots"] = max(bound(s, self.case.state_dtype) for s in self.want.snapshots)
        return bounds


def nmse(got: ArrayLike, want: ArrayLike) -> float:
    """mean (got - want)^2 / mean want^2; NaN if either has a NaN."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    power = float(np.mean(want * want))
    return float(np.mean((got - want) ** 2)) / (power or 1.0)


def raw_options(x: Inputs, heads: NDArray[np.integer] | slice = slice(None)) -> dict[str, Any]:
    """The reference's arguments for the gates of a call through a pool; empty for other calls."""
    if x.A_log is None or x.dt_bias is None:
        return {}
    weights = {"A_log": x.A_log[heads].astype(np.float64), "dt_bias": x.dt_bias[heads].astype(np.float64)}
    return {**weights, "decay": "raw", "beta_is_logit": True, "qk_l2norm": True}


def _worst(errors: Sequence[float]) -> float:
    return float(np.max(errors))  # np.max keeps NaN, which max() may drop


@dataclass
class _Entry:
    record: Record
    runner: Runner
    rounds: int
    seconds: dict[int, float] = field(default_factory=dict)
    """Seconds per call, by round."""


def measure(
    cases: Sequence[Case],
    contenders: Sequence[Contender],
    *,
    threads: Sequence[int],
    settings: Settings | None = None,
    backend: str = "auto",
    progress: Callable[[str, float], None] = lambda text, done: None,
) -> Report:
    """Measure every case with every contender that is installed. Others are compared with the first one.

    `progress` is called with the current step and the finished share.
    """
    import torch

    settings = settings or Settings()
    report = Report(describe_machine(backend), settings)
    present = []
    for c in contenders:
        if why := c.missing():
            report.absent[c.name] = why
        else:
            present.append(c)
    before = torch.get_num_threads()
    total = len(cases) * len(threads)
    try:
        for i, case in enumerate(cases):
            inputs = make_inputs(case)
            progress(f"{case.name}: the float64 oracle", i / len(cases))
            oracle = Oracle(case, inputs)
            for j, n in enumerate(threads):
                torch.set_num_threads(n)
                done = (i * len(threads) + j) / total

                def tell(text: str, case: Case = case, n: int = n, done: float = done) -> None:
                    progress(f"{case.name} on {n} thread{'s' * (n > 1)}: {text}", done)

                report.records += _measure_case(
                    case, inputs, oracle, present, n, settings, report.notes, tell, tensors_on(backend)
                )
    finally:
        torch.set_num_threads(before)
    progress("done", 1.0)
    return report


def _measure_case(
    case: Case,
    inputs: Inputs,
    oracle: Oracle,
    contenders: Sequence[Contender],
    threads: int,
    settings: Settings,
    notes: list[str],
    tell: Callable[[str], None],
    on: str,
) -> list[Record]:
    entries: list[_Entry] = []
    records: list[Record] = []
    try:
        for contender in contenders:
            tell(f"checking {contender.name}")
            record = Record(
                case.name, case.kind, threads, contender.name, contender.version(), states=case.states
            )
            records.append(record)
            runner = _prepare(contender, case, inputs, threads, oracle, record)
            if runner is not None:
                entries.append(_calibrate(runner, record, settings))
        limits = Limits(case.limits if on == "cpu" else (), threads)
        if on != "cpu":
            limits.why_not = f"no limits: only the CPU's are measured, and the calls run on {on}"
        if limits.why_not and limits.why_not not in notes:
            notes.append(limits.why_not)
        others = Others()
        if entries:
            _rounds(entries, limits, settings, tell)
        disturbed = others.percent()
        for entry in entries:
            if lost := subnormals(entry.runner.result().state):
                notes.append(f"{case.name}: {entry.record.contender} computed with {lost} subnormal numbers")
    finally:
        for entry in entries:
            entry.runner.close()
    base = entries[0] if entries and entries[0].record is records[0] else None
    for entry in entries:
        _fill(entry, base, limits, case)
        entry.record.others_pct = disturbed
    return records


def _prepare(
    contender: Contender, case: Case, inputs: Inputs, threads: int, oracle: Oracle, record: Record
) -> Runner | None:
    """A runner with a right result, or None and the reason in the record."""
    if why := contender.refuses(case):
        record.status, record.reason = "refused", why
        return None
    runner = None
    try:
        runner = contender.prepare(case, inputs, threads)
        record.detail = runner.detail
        record.working_set_mib = runner.working_set / 2**20
        got = runner.result()
    except dispatch.UnsupportedError as error:
        record.status, record.reason = "refused", str(error)
    except (
        Exception,
        SystemExit,
    ) as error:  # a peer's failure becomes a row of the result and must not end the run
        record.status, record.reason = "failed", f"{type(error).__name__}: {first_line(error)}"
    else:
        why = oracle.check(got, record)
        if not why:
            if contender.name == "anydelta":
                oracle.standard = got
            return runner
        record.status, record.reason = "wrong", why
    if runner is not None:
        runner.close()
    return None


def _calibrate(runner: Runner, record: Record, settings: Settings) -> _Entry:
    """The number of calls in a sample. The second of two probes counts: the first warms up."""
    runner.reset()
    start = time.perf_counter()
    for _ in range(
        record.states
    ):  # touch every buffer once, or page faults of the first writes would be timed
        runner.run(1)
        if time.perf_counter() - start > max(settings.contender_seconds, 1.0):
            break
    calls, seconds = 1, _time(runner, 1)
    if seconds < settings.sample_seconds:
        seconds = _time(runner, 1)
        calls = max(1, min(10000, round(settings.sample_seconds / max(seconds, 1e-7))))
        seconds = _time(runner, calls) / calls
        calls = max(1, min(10000, round(settings.sample_seconds / max(seconds, 1e-7))))
    fit = int(settings.contender_seconds / max(seconds * calls, 1e-9))
    record.calls = calls
    return _Entry(record, runner, max(min(2, settings.rounds), min(settings.rounds, fit)))


def _time(runner: Runner, calls: int) -> float:
    start = time.perf_counter()
    runner.run(calls)
    return time.perf_counter() - start


def _rounds(entries: list[_Entry], limits: Limits, settings: Settings, tell: Callable[[str], None]) -> None:
    every = -(-settings.rounds // COPY_SAMPLES)
    for r in range(settings.rounds):
        tell(f"round {r + 1} of {settings.rounds}")
        limits.sample(copy=r % every == 0)
        first = r % len(entries)  # so that no contender always runs after the same one
        for entry in entries[first:] + entries[:first]:
            if r >= entry.rounds:
                continue
            time.sleep(SETTLE_SECONDS)
            entry.runner.reset()
            calls = entry.record.calls
            if calls > 1:
                entry.runner.run(1)
            entry.seconds[r] = _time(entry.runner, calls) / calls


def _fill(entry: _Entry, base: _Entry | None, limits: Limits, case: Case) -> None:
    record, times = entry.record, list(entry.seconds.values())
    record.rounds = len(times)
    record.min_us, record.median_us = min(times) * 1e6, statistics.median(times) * 1e6
    record.iqr_pct = 100e6 * _iqr(times) / record.median_us
    if base is not None:
        ratios = [t / base.seconds[r] for r, t in entry.seconds.items() if r in base.seconds]
        if ratios:
            record.ratio, record.ratio_iqr = statistics.median(ratios), _iqr(ratios)
        record.ratio_min = min(times) / min(base.seconds.values())
    if (bound := limits.of(case)) is not None:
        record.limit, record.limit_value, seconds = bound
        record.limit_unit = limits.units[record.limit]
        record.limit_us, record.limit_pct = seconds * 1e6, 100 * seconds / min(times)


def _iqr(values: Sequence[float]) -> float:
    low, high = np.percentile(values, [25, 75])
    return float(high - low)
