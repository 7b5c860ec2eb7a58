"""The protocol of contenders: a contender takes a case and runs it on its own buffers.

Before the clock starts, each translates the case into its own convention. It keeps buffers and graphs between calls, so
that only its kernel and call path are timed. `result` undoes the translation.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ...core.dispatch import get_backend
from ...core.probe import fails
from .cases import F32, Case, Inputs

if TYPE_CHECKING:
    import torch


@dataclass
class Result:
    """One call from the initial state, in anydelta's convention."""

    o: F32
    """[B, T, HV, D]"""
    state: F32
    """[B, HV, D, D] (kv)"""
    snapshots: F32 | None = None
    """[Ks, B, HV, D, D] (kv), slot 0 newest."""


class Runner(Protocol):
    """A contender with one case's buffers in its own layout."""

    detail: str
    """How it runs: the backend, the algorithm or the instruction set."""
    working_set: int
    """Bytes of the states that its calls cycle through."""

    def run(self, calls: int) -> None:
        """Run this many calls back to back; only this is timed. A cold case takes the next state on every call."""
        ...

    def reset(self) -> None:
        """Return to the initial state. Not timed."""
        ...

    def result(self) -> Result:
        """Reset, run one call, and return its results."""
        ...

    def close(self) -> None: ...


class Contender(Protocol):
    name: str

    def missing(self) -> str | None:
        """Why it cannot run here at all, or None."""
        ...

    def version(self) -> str: ...

    def refuses(self, case: Case) -> str | None:
        """Why it cannot run this case, or None."""
        ...

    def prepare(self, case: Case, inputs: Inputs, threads: int) -> Runner: ...


class RunnerBase:
    """Cycles through `case.states` states: `call(i)` advances the i-th."""

    detail = ""

    def __init__(self, case: Case, call: Callable[[int], Any], *, in_place: bool = False):
        self.case, self.call, self._next = case, call, 0
        buffers = max(1, case.snapshots) + (0 if in_place and not case.snapshots else 1)
        self.working_set = case.states * case.state_bytes * buffers

    def run(self, calls: int) -> None:
        call, i, n = self.call, self._next, self.case.states
        for _ in range(calls):
            call(i)
            i += 1
            if i == n:
                i = 0
        self._next = i

    def reset(self) -> None:
        """Nothing to do for contenders that write their result elsewhere: they always start from the initial state."""

    def close(self) -> None:
        del self.call


def faster(options: dict[str, Callable[[int], object]]) -> str:
    """The fastest of a peer's options, from a few calls each."""

    def best(call: Callable[[int], object]) -> float:
        times: list[float] = []
        while len(times) < 3 and sum(times) < 0.5:
            start = time.perf_counter()
            call(0)
            times.append(time.perf_counter() - start)
        return min(times)

    return min(options, key=lambda name: best(options[name])) if len(options) > 1 else next(iter(options))


def only_plain(case: Case) -> str | None:
    """Why a contender of float32 arrays without a pool refuses the case, or None."""
    if case.pool:
        return "it takes no pool of states"
    return None if case.dtype == "float32" else "it takes float32 alone"


def tensors(case: Case, inputs: Inputs) -> dict[str, torch.Tensor]:
    """The inputs in the case's types; log decays g and A_log are always float32."""
    import torch

    dtypes = dict.fromkeys(("q", "k", "v", "beta", "dt_bias"), getattr(torch, case.dtype))
    dtypes["state"] = getattr(torch, case.state_dtype)
    if case.pool:
        dtypes["g"] = getattr(torch, case.dtype)
    return {n: torch.from_numpy(x).to(dtypes.get(n, torch.float32)) for n, x in inputs.arrays().items()}


def rows_of(pool: F32, start: F32, rows: NDArray[np.integer]) -> F32:
    """The states of those rows.

    Raises:
        RuntimeError: another row is not what it was at the start.
    """
    others = np.ones(len(pool), bool)
    others[rows] = False
    if changed := [int(i) for i in np.flatnonzero(others) if not np.array_equal(pool[i], start[i])]:
        raise RuntimeError(f"it changed rows {changed} of the pool, which the call does not name")
    chosen: F32 = pool[rows]
    return chosen


def needs(module: str, package: str) -> str | None:
    """Why a module is missing or does not import, without importing it here."""
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        return f"{package.strip(chr(39))} is not installed (pip install {package})"
    if module in sys.modules or (why := fails(f"import {module}")) is None:
        return None
    return f"{module} is installed and does not import: {why}"


@contextmanager
def quiet_stderr() -> Iterator[None]:
    """Discard writes to file descriptor 2, so that a peer's log is neither shown nor timed."""
    sys.stderr.flush()
    keep, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(keep, 2)
        os.close(keep)
        os.close(null)


def tensors_on(backend: str) -> str:
    """The device of a backend's tensors: "cpu", or "mps"."""
    return "cpu" if backend == "auto" else str(getattr(get_backend(backend), "tensors_on", "cpu"))
