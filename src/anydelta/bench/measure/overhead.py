"""`anydelta bench overhead`: the time that a call at T = 1 adds to its kernel.

Differences are taken within a round of turns.py, and the median of the rounds counts.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ... import gated_delta_rule, gated_delta_rule_
from ...core.late import late
from .ops import Settings, describe_machine
from .report import time as in_words
from .small_report import Measured
from .turns import (
    Progress,
    bare_kernel,
    check,
    interleave,
    make_inputs,
    oracle,
    tensors,
    torch_threads,
)

if TYPE_CHECKING:
    from ...rule import torch_ops as torch_op
    from .cases import F32
else:
    torch_op = late("anydelta.rule.torch_ops")

ALLOWED_US = 10.0
"""The most that a torch call at T = 1 should take."""

HEAD = 32
"""K = V of the only head: its kernel takes about 1 us, less than the overhead."""


@dataclass
class OverheadRecord:
    """One way to call the operator at T = 1."""

    call: str
    calls: int
    rounds: int
    min_us: float
    median_us: float
    overhead_us: float
    """Time minus the bare kernel's, median of the rounds."""
    overhead_min_us: float
    """The same from the minima, which other work on the machine disturbs least."""
    nmse: float
    others_pct: float | None = None

    @classmethod
    def of(
        cls, call: str, calls: int, us: list[float], bare: list[float], nmse: float, others: float | None
    ) -> OverheadRecord:
        """The record of a call's and the bare kernel's times by round."""
        over = statistics.median(a - b for a, b in zip(us, bare, strict=True))
        return cls(
            call, calls, len(us), min(us), statistics.median(us), over, min(us) - min(bare), nmse, others
        )

    def columns(self) -> dict[str, str]:
        return {
            "call": self.call,
            "min": in_words(self.min_us),
            "median": in_words(self.median_us),
            "overhead": f"{self.overhead_us:.1f} ({self.overhead_min_us:.1f}) µs",
        }


def call_overhead(settings: Settings | None = None, progress: Progress = lambda text, done: None) -> Measured:
    """Measure every way to call one small decode step, and the bare kernel that all of them run.

    Raises:
        Refused: the extension is not built, so there is no bare kernel to compare with.
        RuntimeError: a call gave a wrong result.
    """
    import torch

    settings = settings or Settings()
    x = make_inputs(T=1, HV=1, D=HEAD)
    want = oracle(x)
    calls: dict[str, Callable[[], object]] = {}
    errors: dict[str, float] = {}

    def add(name: str, call: Callable[[], object], result: Callable[[object], tuple[object, object]]) -> None:
        errors[name] = check(name, result(call()), want)
        calls[name] = call

    with torch_threads(1), torch.no_grad():
        bare, o, state = bare_kernel(tensors(x), threads=1, share_openmp=True)
        add("bare kernel", bare, lambda _: (o, state))
        _torch_calls(add, x)
        _numpy_calls(add, x)
        samples, repeats, others = interleave(calls, settings, progress)
    bare_us = samples["bare kernel"]
    records = [
        OverheadRecord.of(name, repeats[name], us, bare_us, errors[name], others)
        for name, us in samples.items()
    ]
    notes = [
        f"float32, B = T = H = HV = 1, K = V = {HEAD}, one thread, no gradients",
        "bare kernel: the extension with ready addresses; overhead: time minus that, median of the rounds (of the "
        "minima)",
        f"torch calls should take at most {ALLOWED_US:g} µs",
        f"torch.ops is registered from {'C++' if torch_op.LIBRARY else f'Python ({torch_op.LIBRARY_REASON})'}",
    ]
    return Measured("Call overhead at T = 1", describe_machine(), settings, notes, records)


Add = Callable[[str, Callable[[], object], Callable[[Any], tuple[object, object]]], None]


def _torch_calls(add: Add, x: dict[str, F32]) -> None:
    import torch

    t = tensors(x)
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


def _numpy_calls(add: Add, x: dict[str, F32]) -> None:
    gates: dict[str, Any] = {"g": x["g"], "beta": x["beta"]}
    qkv = (x["q"], x["k"], x["v"])
    S, start = x["state"].copy(), x["state"].copy()
    add("NumPy, in place", lambda: gated_delta_rule_(*qkv, S, **gates), lambda o: (o, S))
    add("NumPy, functional", lambda: gated_delta_rule(*qkv, **gates, initial_state=start), lambda r: r)
