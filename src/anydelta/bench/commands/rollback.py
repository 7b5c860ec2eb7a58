"""`anydelta bench rollback`: the cost of verifying drafts and going back, with slots and with a log, relative to plain
decoding.

All linear attention layers of a model run one after the other, so that no state stays in a cache. As in ops.py, results
are checked before anything is timed, everything runs interleaved in one process, ratios are taken within a round, and
the median of the rounds counts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from ...conformance.gates import model_gates
from ...rule import reference
from ...state import StatePool
from ...terminal import Failed, Refused
from ..measure.cases import DECAYS
from ..measure.ops import NMSE, Others, Settings, describe_machine, nmse
from ..measure.report import time as in_words
from ..measure.small_report import Measured
from ..measure.turns import Progress, torch_threads
from .options import Csv, Json, Md, Output, Rounds, small

if TYPE_CHECKING:
    from ...core.arrays import Array

STEPS = 16
"""A round's time is the mean of this many steps, because a log folds only once in several steps."""


@dataclass
class RollbackRecord:
    """One way to verify tokens, or one call of commit, over all layers."""

    call: str
    rounds: int
    min_us: float
    median_us: float
    steps: float
    """How many decode steps of the rule (one token, all layers, in place) take the same time; median of the rounds."""
    steps_low: float
    steps_high: float
    """The quartiles of the rounds."""
    states: float
    """Memory of a sequence and layer, in states."""
    nmse: float
    others_pct: float | None = None

    def columns(self) -> dict[str, str]:
        return {
            "call": self.call,
            "min": in_words(self.min_us),
            "median": in_words(self.median_us),
            "decode steps": f"{self.steps:.4f} ({self.steps_low:.4f} to {self.steps_high:.4f})",
            "memory": f"{self.states:.2f} states" if self.states else "",
        }


class _Model:
    """The rule in all layers of a pool, with one set of inputs for each T."""

    def __init__(self, layers: int, H: int, HV: int, D: int, kda: bool, tokens: int, decay: str):
        import torch

        rng = np.random.default_rng(0)
        gates = (1, tokens, HV, D) if kda else (1, tokens, HV)
        self.sizes: dict[str, Any] = dict(H=H, HV=HV, K=D, V=D, layers=layers)
        self.layers, self.kda = layers, kda
        self.inputs: dict[str, Any] = {
            "q": rng.standard_normal((1, tokens, H, D)), "k": rng.standard_normal((1, tokens, H, D)),
            "v": rng.standard_normal((1, tokens, HV, D)), "beta": rng.random((1, tokens, HV)),
            "g": -rng.exponential(0.1, gates) if decay == "mild" else model_gates(decay, gates, rng).log(),
        }  # fmt: skip
        for name in ("q", "k"):
            x = self.inputs[name]
            self.inputs[name] = x / np.linalg.norm(x, axis=-1, keepdims=True)
        f32 = {n: torch.from_numpy(x.astype(np.float32)) for n, x in self.inputs.items()}
        self.first = [{n: x[:, :T] for n, x in f32.items()} for T in range(tokens + 1)]
        self.state_bytes = HV * D * D * 4

    def pool(self, form: str, snapshots: int) -> StatePool:
        pool = StatePool(1, form=form, snapshots=snapshots, kda=self.kda, device="cpu", **self.sizes)
        pool.new()
        return pool

    def step(self, pool: StatePool, T: int, *, record: bool = True) -> Array:
        pool.begin(T, record=record)
        o, args = None, self.first[T]
        for layer in range(self.layers):
            o = pool.run(**args, layer=layer)
        return o

    def check(self, pool: StatePool, T: int, accepted: int) -> float:
        """NMSE of output and state after a step of T and a commit, which change the pool."""
        o = self.step(pool, T)
        pool.commit(accepted)

        def exact(n: int) -> reference.Expected:
            a = {name: x[:, :n] for name, x in self.inputs.items()}
            q, k, v = a.pop("q"), a.pop("k"), a.pop("v")
            return reference.gated_delta_rule(q, k, v, **a)

        s = pool.sequences[0]
        worst = max(nmse(o.numpy(), exact(T).o), nmse(pool.state(s)[-1].numpy(), exact(accepted).state[0]))
        if not worst <= NMSE:
            raise Failed(f"{pool.form}: NMSE {worst:.1e} against the oracle; nothing was timed")
        return worst


def rollback(
    *,
    layers: int = 36,
    heads: tuple[int, int] = (16, 32),
    size: int = 128,
    kda: bool = False,
    decay: str = "mild",
    tokens: int = 4,
    snapshots: int = 16,
    threads: int = 1,
    settings: Settings | None = None,
    progress: Progress = lambda text, done: None,
) -> Measured:
    """Verify `tokens` tokens and commit every number of them, in every form.

    Args:
        snapshots: K of the log, which holds K - 1 entries. Slots get `tokens` + 1 states, the fewest that can take all
            tokens back.
        decay: "mild", exponential of mean 0.1, or a kind of conformance/gates.py.

    Raises:
        Failed: a wrong result.
    """
    import torch

    settings = settings or Settings()
    model = _Model(layers, *heads, size, kda, tokens, decay)
    samples: dict[str, list[float]] = {}
    errors: dict[str, float] = {}
    memory: dict[str, float] = {}
    calls: dict[str, Callable[[], None]] = {}

    def keep(name: str, seconds: float) -> None:
        samples.setdefault(name, []).append(seconds * 1e6)

    def states(pool: StatePool) -> float:
        return pool.nbytes()["per_sequence"] / layers / model.state_bytes

    def add(form: str, pool: StatePool, accepted: int, fold: bool = False) -> None:
        what = f"{form}: verify {tokens}, commit {accepted}" + (", fold every time" if fold else "")
        going_back = f"{form}: commit {accepted} of {tokens} alone"
        errors[what] = errors[going_back] = worst[form]
        memory[what], memory[going_back] = states(pool), 0.0

        def cycle() -> None:
            start = time.perf_counter()
            model.step(pool, tokens)
            before = time.perf_counter()
            pool.commit(accepted)
            after = time.perf_counter()
            if fold:
                pool.fold()
            keep(what, time.perf_counter() - start)
            if not fold:
                keep(going_back, after - before)

        calls[what] = cycle

    with torch_threads(threads), torch.no_grad():
        worst = {
            form: model.check(model.pool(form, tokens + 1), tokens, tokens // 2) for form in ("slots", "log")
        }
        plain = model.pool("slots", 1)
        slots = model.pool("slots", tokens + 1)

        def unrecorded(name: str, T: int) -> None:
            def step() -> None:
                start = time.perf_counter()
                model.step(plain, T, record=False)
                keep(name, time.perf_counter() - start)

            calls[name], errors[name], memory[name] = step, worst["slots"], states(plain)

        unrecorded("decode step", 1)
        unrecorded(f"no way back: {tokens} tokens", tokens)
        for n in range(1, tokens + 1):
            add("slots", slots, n)
        for n in range(tokens + 1):
            add("log", model.pool("log", snapshots), n)  # one pool each, so that each pays for its own folds
        add("log", model.pool("log", snapshots), tokens, fold=True)

        for call in calls.values():
            call()
        samples.clear()
        others = Others()
        names = list(calls)
        for i in range(settings.rounds):
            progress(f"round {i + 1} of {settings.rounds}", i / settings.rounds)
            for j in range(len(names)):
                name = names[(i + j) % len(names)]
                for _ in range(STEPS):
                    calls[name]()
        others_pct = others.percent()

    def rounds(us: list[float]) -> list[float]:
        return [statistics.fmean(us[i : i + STEPS]) for i in range(0, len(us), STEPS)]

    base = rounds(samples["decode step"])
    records = []
    for name, us in samples.items():
        each = rounds(us)
        low, middle, high = _quartiles([x / b for x, b in zip(each, base, strict=True)])
        records.append(
            RollbackRecord(
                name,
                len(each),
                min(each),
                statistics.median(each),
                middle,
                low,
                high,
                memory[name],
                errors[name],
                others_pct,
            )
        )
    records.sort(key=lambda r: ("alone" in r.call, r.call != "decode step"))
    gate = "KDA" if kda else "GDA"
    total = layers * model.state_bytes / 2**20
    return Measured(
        title=f"Rollback: {layers} layers of {heads[0]}x{heads[1]} heads, {size}x{size}, {gate}, {decay} decays, "
        f"{threads} thread{'s' * (threads > 1)}",
        machine=describe_machine(),
        settings=settings,
        notes=[
            f"one sequence; {total:.0f} MiB of states, read in turn; each time is that of all layers, with the calls "
            f"from Python; mean of {STEPS} steps per round",
            "decode steps: median of the rounds, with its quartiles; one decode step is the rule over one token in all "
            "layers, in place",
            "commit alone: the call that goes back, after the verification; a log folds at a later step",
        ],
        records=records,
    )


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def rollback_command(
    layers: Annotated[int, typer.Option("--layers", help="Linear attention layers of the model.")] = 36,
    tokens: Annotated[int, typer.Option("--tokens", "-T", help="Tokens of a verification.")] = 4,
    snapshots: Annotated[
        int, typer.Option("--snapshots", "-K", help="How many states a log can go back to.")
    ] = 16,
    kda: Annotated[bool, typer.Option("--kda", help="Gates per key channel (KDA).")] = False,
    decay: Annotated[str, typer.Option("--decay", help="mild, initialised or trained.")] = "mild",
    threads: Annotated[int, typer.Option("--threads", "-t", help="Number of threads.")] = 1,
    rounds: Rounds = 15,
    json: Json = False,
    csv: Csv = False,
    md: Md = False,
    output: Output = None,
) -> None:
    """Time verifying drafted tokens and going back, with slots and with a log, in decode steps of the rule.

    Examples:
      anydelta bench rollback
      anydelta bench rollback --kda --layers 8 -T 8
    """
    for name, value in (("--layers", layers), ("-T", tokens), ("-K", snapshots), ("-t", threads)):
        if not 1 <= value <= 1024:
            raise Refused(f"{name} must be from 1 to 1024; got {value}")
    if decay not in DECAYS:
        raise Refused(f"--decay must be one of {', '.join(DECAYS)}; got {decay!r}")
    if snapshots < tokens:
        raise Refused(f"-K must be at least -T = {tokens}; got {snapshots}")

    measure = partial(
        rollback, layers=layers, tokens=tokens, snapshots=snapshots, kda=kda, decay=decay, threads=threads
    )
    small(measure, rounds, 15.0, json, csv, md, output)
