"""`anydelta bench threads`: whether our threads and torch's disturb each other.

One matmul and one call of the operator, interleaved, and each alone, within a round of turns.py.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..measure.ops import Settings, describe_machine
from ..measure.report import time as in_words
from ..measure.small_report import Measured
from ..measure.turns import (
    Progress,
    bare_kernel,
    check,
    extension,
    interleave,
    make_inputs,
    oracle,
    part_of,
    tensors,
    torch_threads,
)
from .options import Csv, Json, Md, Output, Rounds, SampleMs, Threads, numbers_of_threads, small


@dataclass
class ThreadsRecord:
    """Calls of the operator that alternate with torch matmuls; times per pair."""

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
    """One of each, interleaved."""
    excess_pct: float
    """both / (matmul + op) - 1: the cost of running both; median of the rounds. It includes cache misses, so compare
    with 1 thread, which has only those."""
    excess_min_pct: float
    """The same from the minima."""
    nmse: float
    others_pct: float | None = None

    def columns(self) -> dict[str, str]:
        return {
            "case": self.case,
            "threads": str(self.threads),
            "op's threads": self.provider,
            "matmul": in_words(self.matmul_us),
            "op": in_words(self.op_us),
            "both": in_words(self.both_us),
            "excess": f"{self.excess_pct:+.0f} ({self.excess_min_pct:+.0f}) %",
        }


SHAPES = {
    "decode, 32 heads": dict(T=1, HV=32, D=128),
    "prefill, T = 64, 16 heads": dict(T=64, HV=16, D=128),
}
MATMULS = {"decode, 32 heads": (1, 2048, 2048), "prefill, T = 64, 16 heads": (64, 1024, 1024)}
"""(rows, inner, columns) of the matmul for each: a projection of such a layer, about as long as the operator."""


def shared_threads(
    threads: Sequence[int] = (1, 2),
    settings: Settings | None = None,
    progress: Progress = lambda text, done: None,
) -> Measured:
    """Measure the operator interleaved with torch's matmuls, on torch's OpenMP threads and on a separate pool.

    Raises:
        Refused: the extension is not built.
        RuntimeError: a result is wrong.
    """
    import torch

    settings = settings or Settings()
    measured = Measured("The operator and torch's matmuls interleaved", describe_machine(), settings)
    core = extension()
    providers = [True, False] if core.thread_provider(True) != "own" else [False]
    if len(providers) == 1:
        measured.notes.append("there is no OpenMP runtime to share, so only the separate pool runs")
    total = len(SHAPES) * len(threads) * len(providers)
    done = 0
    for name, shape in SHAPES.items():
        x = make_inputs(**shape)
        want = oracle(x)
        rows, inner, columns = MATMULS[name]
        a, b = torch.randn(rows, inner), torch.randn(inner, columns)
        c = torch.empty(rows, columns)
        for n in threads:
            for share in providers:
                tell = part_of(progress, f"{name}, {n} thread{'s' * (n > 1)}", done, total)
                with torch_threads(n), torch.no_grad():
                    run, o, state = bare_kernel(tensors(x), threads=n, share_openmp=share)
                    run()
                    error = check(name, (o, state), want)
                    record = _take_turns(partial(torch.mm, a, b, out=c), run, settings, tell)
                measured.records.append(
                    ThreadsRecord(name, n, core.thread_provider(share), nmse=error, **record)
                )
                done += 1
    measured.notes += [
        "times per call; both: one matmul and one call of the operator; excess: both / their sum - 1, median of the "
        "rounds (of the minima)",
        "1 thread shows the cost of the caches; whatever 2 threads add is the cost of competing threads",
    ]
    return measured


def _take_turns(
    matmul: Callable[[], object], op: Callable[[], object], settings: Settings, progress: Progress
) -> dict[str, Any]:
    def both() -> None:
        matmul()
        op()

    calls = {"matmul": matmul, "op": op, "both": both}
    samples, repeats, others = interleave(calls, settings, progress)
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


def threads_command(
    threads: Threads = "1,2",
    rounds: Rounds = 15,
    sample_ms: SampleMs = 40.0,
    json: Json = False,
    csv: Csv = False,
    md: Md = False,
    output: Output = None,
) -> None:
    """Time the operator interleaved with torch's matmuls: do their threads disturb each other?

    Examples:
      anydelta bench threads
      anydelta bench threads -t 1 -r 5
    """
    counts = numbers_of_threads(threads, 1)
    small(partial(shared_threads, counts), rounds, sample_ms, json, csv, md, output)
