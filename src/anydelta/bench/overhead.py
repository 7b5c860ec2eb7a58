"""What a call costs beside the kernel, and whether our threads and torch's get in each other's way.

`call_overhead` is `anydelta bench overhead`, `shared_threads` is `anydelta bench threads`. As in ops.py, results are
checked before anything is timed, everything runs in one process in turns (A B C, B C A, ...), differences are taken
within a round, and the median of the rounds counts.
"""

from __future__ import annotations

import csv
import dataclasses
import gc
import io
import json
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import gated_delta_rule, gated_delta_rule_, reference
from .ops import NMSE, SETTLE_SECONDS, Others, Settings, describe_machine, nmse
from .report import time as in_words

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.table import Table

ALLOWED_US = 10.0
"""The bar for a torch call at T = 1."""

HEAD = 32
"""K = V of the one head whose call is measured: its kernel takes about 1 us, less than what is looked for."""

Progress = Callable[[str, float], None]


@dataclass
class OverheadRecord:
    """One way to call the operator at T = 1."""

    call: str
    calls: int
    rounds: int
    min_us: float
    median_us: float
    overhead_us: float
    """Over the bare kernel, median of the rounds."""
    overhead_min_us: float
    """The same from the minima, which other work on the machine disturbs least."""
    nmse: float
    others_pct: float | None = None


@dataclass
class ThreadsRecord:
    """Calls of the operator alternating with torch matmuls, per pair of one each."""

    case: str
    threads: int
    provider: str
    """Whose threads the operator ran on: openmp (torch's own) or own (a second pool)."""
    pairs: int
    rounds: int
    matmul_us: float
    """The matmul alone."""
    op_us: float
    """The operator alone."""
    both_us: float
    """One of each, in turns."""
    excess_pct: float
    """both over matmul + op, less 1: what they cost each other; median of the rounds. Caches count too, so compare
    with 1 thread, where there is nothing but caches."""
    excess_min_pct: float
    """The same from the minima."""
    nmse: float
    others_pct: float | None = None


@dataclass
class Measured:
    """Records of one kind, on what machine, and how to read them."""

    title: str
    machine: dict[str, Any]
    settings: Settings
    notes: list[str] = field(default_factory=list)
    records: list[Any] = field(default_factory=list)


# ---- call overhead
# ------------------------------------------------------------------------------------------------


def call_overhead(settings: Settings | None = None, progress: Progress = lambda text, done: None) -> Measured:
    """Every way to call one small decode step, beside the kernel that all of them run.

    Raises:
        ValueError: the extension is not built, so there is no bare kernel to compare with.
        RuntimeError: a call gave a wrong result.
    """
    import torch

    from .. import torch_op

    settings = settings or Settings()
    x = _inputs(T=1, HV=1, D=HEAD)
    want = _oracle(x)
    calls: dict[str, Callable[[], Any]] = {}
    errors: dict[str, float] = {}

    def add(name: str, call: Callable[[], Any], result: Callable[[Any], tuple[Any, Any]]) -> None:
        errors[name] = _check(name, result(call()), want)
        calls[name] = call

    with _threads(1), torch.no_grad():
        bare, o, state = _bare(_tensors(x), threads=1, share_openmp=True)
        add("bare kernel", bare, lambda _: (o, state))
        _torch_calls(add, x)
        _numpy_calls(add, x)
        samples, repeats, others = _interleave(calls, settings, progress)
    bare_us = samples["bare kernel"]
    records = [
        OverheadRecord(
            call=name,
            calls=repeats[name],
            rounds=len(us),
            min_us=min(us),
            median_us=statistics.median(us),
            overhead_us=statistics.median(a - b for a, b in zip(us, bare_us, strict=True)),
            overhead_min_us=min(us) - min(bare_us),
            nmse=errors[name],
            others_pct=others,
        )
        for name, us in samples.items()
    ]
    notes = [
        f"float32, B = T = H = HV = 1, K = V = {HEAD}, one thread, no gradients",
        "bare kernel: the extension with ready addresses; overhead: over it, median of the rounds (of the minima)",
        f"the bar for torch calls is {ALLOWED_US:g} µs",
        f"torch.ops is registered from {'C++' if torch_op.LIBRARY else f'Python ({torch_op.LIBRARY_REASON})'}",
    ]
    return Measured("Call overhead at T = 1", describe_machine(), settings, notes, records)


Add = Callable[[str, Callable[[], Any], Callable[[Any], tuple[Any, Any]]], None]


def _torch_calls(add: Add, x: dict[str, Any]) -> None:
    import torch

    t = _tensors(x)
    gates = {"g": t["g"], "beta": t["beta"]}
    qkv = (t["q"], t["k"], t["v"])
    S = t["state"].clone()
    add("torch, in place", lambda: gated_delta_rule_(*qkv, S, **gates), lambda o: (o, S))
    start = t["state"].clone()
    add("torch, functional", lambda: gated_delta_rule(*qkv, **gates, initial_state=start), lambda r: r)
    pool, rows = torch.zeros(4, *S.shape[1:]), torch.tensor([2])
    pool[2] = t["state"][0]
    add(
        "torch, in place, pool",
        lambda: gated_delta_rule_(*qkv, pool, **gates, state_indices=rows),
        lambda o: (o, pool[2:3]),
    )
    in_place, functional = torch.ops.anydelta.gated_delta_rule_, torch.ops.anydelta.gated_delta_rule
    S2 = t["state"].clone()
    args = (*qkv, t["g"], t["beta"])
    add("torch.ops, in place", lambda: in_place(*args, S2), lambda o: (o, S2))
    add("torch.ops, functional", lambda: functional(*args, start), lambda r: r)


def _numpy_calls(add: Add, x: dict[str, Any]) -> None:
    gates = {"g": x["g"], "beta": x["beta"]}
    qkv = (x["q"], x["k"], x["v"])
    S, start = x["state"].copy(), x["state"].copy()
    add("NumPy, in place", lambda: gated_delta_rule_(*qkv, S, **gates), lambda o: (o, S))
    add("NumPy, functional", lambda: gated_delta_rule(*qkv, **gates, initial_state=start), lambda r: r)


# ---- shared threads
# ------------------------------------------------------------------------------------------------

SHAPES = {
    "decode, 32 heads": dict(T=1, HV=32, D=128),
    "prefill, T = 64, 16 heads": dict(T=64, HV=16, D=128),
}
MATMULS = {"decode, 32 heads": (1, 2048, 2048), "prefill, T = 64, 16 heads": (64, 1024, 1024)}
"""(rows, inner, columns) beside each: a projection of such a layer, of about the operator's time."""


def shared_threads(
    threads: Sequence[int] = (1, 2),
    settings: Settings | None = None,
    progress: Progress = lambda text, done: None,
) -> Measured:
    """The operator in turns with torch's matmuls, on torch's OpenMP threads and on a pool of its own.

    Raises:
        ValueError: the extension is not built.
        RuntimeError: a result is wrong.
    """
    import torch

    settings = settings or Settings()
    measured = Measured("The operator and torch's matmuls in turns", describe_machine(), settings)
    core = _core()
    providers = [True, False] if core.thread_provider(True) != "own" else [False]
    if len(providers) == 1:
        measured.notes.append(
            "there is no OpenMP runtime here that could be shared, so only the own pool runs"
        )
    total = len(SHAPES) * len(threads) * len(providers)
    done = 0
    for name, shape in SHAPES.items():
        x = _inputs(**shape)
        want = _oracle(x)
        rows, inner, columns = MATMULS[name]
        a, b = torch.randn(rows, inner), torch.randn(inner, columns)
        c = torch.empty(rows, columns)
        for n in threads:
            for share in providers:

                def tell(text: str, part: float, done: int = done, name: str = name, n: int = n) -> None:
                    progress(f"{name}, {n} threads: {text}", (done + part) / total)

                with _threads(n), torch.no_grad():
                    run, o, state = _bare(_tensors(x), threads=n, share_openmp=share)
                    run()
                    error = _check(name, (o, state), want)
                    record = _take_turns(partial(torch.mm, a, b, out=c), run, settings, tell)
                measured.records.append(
                    ThreadsRecord(name, n, core.thread_provider(share), nmse=error, **record)
                )
                done += 1
    measured.notes += [
        "times per call; both: one matmul and one call of the operator; excess: both over their sum, median of the "
        "rounds (of the minima)",
        "1 thread shows what the caches cost, so a fight between threads is what 2 threads add to that",
    ]
    return measured


def _take_turns(
    matmul: Callable[[], Any], op: Callable[[], Any], settings: Settings, progress: Progress
) -> dict[str, Any]:
    def both() -> None:
        matmul()
        op()

    calls = {"matmul": matmul, "op": op, "both": both}
    samples, repeats, others = _interleave(calls, settings, progress)
    rounds = list(zip(samples["matmul"], samples["op"], samples["both"], strict=True))
    low = {name: min(us) for name, us in samples.items()}
    return dict(
        pairs=repeats["both"],
        rounds=len(rounds),
        matmul_us=statistics.median(samples["matmul"]),
        op_us=statistics.median(samples["op"]),
        both_us=statistics.median(samples["both"]),
        excess_pct=100 * (statistics.median(c / (a + b) for a, b, c in rounds) - 1),
        excess_min_pct=100 * (low["both"] / (low["matmul"] + low["op"]) - 1),
        others_pct=others,
    )


# ---- measuring
# ------------------------------------------------------------------------------------------------


def _core() -> Any:
    try:
        from .. import _core
    except ImportError as error:
        raise ValueError(f"the extension anydelta._core is not built or does not load ({error})") from None
    return _core


def _inputs(*, T: int, HV: int, D: int) -> dict[str, Any]:
    """Inputs on which a state settles, so that thousands of calls meet neither overflow nor subnormals."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> Any:
        return rng.standard_normal(shape, np.float32)

    k = normal(1, T, HV, D)
    return dict(
        q=normal(1, T, HV, D),
        k=k / np.linalg.norm(k, axis=-1, keepdims=True),
        v=normal(1, T, HV, D),
        g=-rng.uniform(0.05, 0.5, (1, T, HV)).astype(np.float32),
        beta=rng.uniform(0.2, 0.8, (1, T, HV)).astype(np.float32),
        state=normal(1, HV, D, D),
    )


def _tensors(x: dict[str, Any]) -> dict[str, Any]:
    import torch

    return {name: torch.from_numpy(a.copy()) for name, a in x.items()}


def _oracle(x: dict[str, Any]) -> tuple[Any, Any]:
    y = {name: a.astype(np.float64) for name, a in x.items()}
    state = y.pop("state")
    want = reference.gated_delta_rule(**y, initial_state=state)
    return want.o, want.state


def _check(name: str, got: tuple[Any, Any], want: tuple[Any, Any]) -> float:
    error = max(nmse(np.asarray(a), b) for a, b in zip(got, want, strict=True))
    if not error <= NMSE:
        raise RuntimeError(f"{name}: NMSE must be at most {NMSE:.0e}; got {error:.1e}")
    return error


def _bare(t: dict[str, Any], *, threads: int, share_openmp: bool) -> tuple[Callable[[], None], Any, Any]:
    """(call, o, state): the extension itself on these tensors in place, every address ready."""
    import torch

    from ..backends.cpu import BACKEND
    from ..spec import Call, Options, check_call

    core = _core()
    call = Call(t["q"], t["k"], t["v"], t["g"], t["beta"], t["state"])
    spec = check_call(call, Options(op="gated_delta_rule_"), inplace=True)
    native = BACKEND.prepare(spec, call).native
    o = torch.empty_like(t["v"])
    arrays = (t["q"], t["k"], t["v"], t["g"], t["beta"], o, t["state"], t["state"])
    addresses = (*(x.data_ptr() for x in arrays), 0, 0, 0, 0, 0, 0, 0)

    def run(keep: Any = arrays) -> None:  # the arrays must outlive their addresses
        core.run(native, threads, share_openmp, *addresses)

    return run, o, t["state"]


@contextmanager
def _threads(n: int) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _interleave(
    calls: dict[str, Callable[[], Any]], settings: Settings, progress: Progress
) -> tuple[dict[str, list[float]], dict[str, int], float | None]:
    """(us per call by round, calls per sample, CPU share of other work); the garbage collector rests meanwhile."""
    repeats = {name: _calibrate(call, settings.sample_seconds) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    others = Others()
    collecting = gc.isenabled()
    gc.disable()
    try:
        for i in range(settings.rounds):
            progress(f"round {i + 1}", i / settings.rounds)
            turn = i % len(names)
            for name in names[turn:] + names[:turn]:
                time.sleep(SETTLE_SECONDS)  # the last one's threads may still spin
                calls[name]()
                samples[name].append(1e6 * _time(calls[name], repeats[name]) / repeats[name])
    finally:
        if collecting:
            gc.enable()
    return samples, repeats, others.percent()


def _calibrate(call: Callable[[], Any], seconds: float) -> int:
    """How many calls make a sample."""
    n = 1
    while (took := _time(call, n)) < seconds / 4 and n < 1_000_000:
        n = min(1_000_000, max(2 * n, int(n * seconds / max(took, 1e-7) / 2)))
    return max(1, round(n * seconds / took)) if took > 0 else n


def _time(call: Callable[[], Any], n: int) -> float:
    start = time.perf_counter()
    for _ in range(n):
        call()
    return time.perf_counter() - start


# ---- printing
# ------------------------------------------------------------------------------------------------


def to_text(measured: Measured, form: str) -> str:
    """The records as "json", "csv" or "md"."""
    if form == "json":
        return json.dumps(dataclasses.asdict(measured), indent=2) + "\n"
    if form == "csv":
        out = io.StringIO()
        writer = csv.DictWriter(out, list(dataclasses.asdict(measured.records[0])), lineterminator="\n")
        writer.writeheader()
        writer.writerows(dataclasses.asdict(r) for r in measured.records)
        return out.getvalue()
    head = _columns(measured.records[0])
    lines = [f"**{measured.title}**", "", *(f"- {line}" for line in _header(measured)), ""]
    lines += ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    lines += ["| " + " | ".join(_columns(r).values()) + " |" for r in measured.records]
    return "\n".join(lines) + "\n"


def to_table(measured: Measured) -> Table:
    """For a terminal."""
    from rich.table import Table
    from rich.text import Text

    caption = "\n".join(_header(measured))
    table = Table(
        title=measured.title, title_justify="left", title_style="bold", caption=Text(caption),
        caption_justify="left", box=None, pad_edge=False,
    )  # fmt: skip
    for i, name in enumerate(_columns(measured.records[0])):
        table.add_column(name, justify="left" if i == 0 else "right")
    for record in measured.records:
        table.add_row(*map(Text, _columns(record).values()))
    return table


def _header(measured: Measured) -> list[str]:
    m = measured.machine
    lines = [
        f"{m['cpu']}, {m['cpus']} CPUs, {m['system']}; Python {m['python']}, torch {m['torch']}, "
        f"anydelta {m['anydelta']}; {m['date']}",
        f"{measured.settings.rounds} interleaved rounds",
        *measured.notes,
    ]
    busy = max((r.others_pct or 0.0 for r in measured.records), default=0.0)
    if busy >= 10:
        lines.append(f"other work took up to {busy:.0f} % of the CPUs, so trust the minima only")
    return lines


def _columns(record: Any) -> dict[str, str]:
    if not isinstance(record, (OverheadRecord, ThreadsRecord)):
        return record.columns()  # type: ignore[no-any-return]
    if isinstance(record, OverheadRecord):
        return {
            "call": record.call,
            "min": in_words(record.min_us),
            "median": in_words(record.median_us),
            "overhead": f"{record.overhead_us:.1f} ({record.overhead_min_us:.1f}) µs",
        }
    return {
        "case": record.case,
        "threads": str(record.threads),
        "op's threads": record.provider,
        "matmul": in_words(record.matmul_us),
        "op": in_words(record.op_us),
        "both": in_words(record.both_us),
        "excess": f"{record.excess_pct:+.0f} ({record.excess_min_pct:+.0f}) %",
    }
