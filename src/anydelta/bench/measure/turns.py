"""Shared by the small measurements: inputs, the check against the oracle, the bare kernel, and interleaved timing.

overhead.py, threads.py, rollback.py and aoti.py measure with it. As in ops.py, results are checked before anything is
timed, everything runs interleaved in one process (A B C, B C A, ...), and the median of the rounds counts.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from ...core import dispatch, native
from ...core.arguments import in_order
from ...rule import reference
from ...rule.arguments import Call, Options
from ...rule.spec import check_call
from ...terminal import Failed, Refused
from .ops import NMSE, SETTLE_SECONDS, Others, Settings, nmse

if TYPE_CHECKING:
    from types import ModuleType

    import torch

    from ...conformance.values import F64
    from .cases import F32

Progress = Callable[[str, float], None]


def part_of(progress: Progress, name: str, i: int, parts: int) -> Progress:
    """The progress of part i of `parts`, under its name."""
    return lambda text, done: progress(f"{name}: {text}", (i + done) / parts)


def extension() -> ModuleType:
    if native.why_not:
        raise Refused(native.why_not)
    return native.core


def make_inputs(*, T: int, HV: int, D: int) -> dict[str, F32]:
    """Inputs with which a state converges, so that thousands of calls meet neither overflow nor subnormals."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> F32:
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


def tensors(x: Mapping[str, F32]) -> dict[str, Any]:
    import torch

    return {name: torch.from_numpy(a.copy()) for name, a in x.items()}


def oracle(x: Mapping[str, F32]) -> tuple[F64, F64 | None]:
    y: dict[str, Any] = {name: a.astype(np.float64) for name, a in x.items()}
    state = y.pop("state")
    want = reference.gated_delta_rule(**y, initial_state=state)
    return want.o, want.state


def check(name: str, got: Sequence[object], want: Sequence[ArrayLike | None]) -> float:
    error = max(nmse(np.asarray(a), np.asarray(b)) for a, b in zip(got, want, strict=True))
    if not error <= NMSE:
        raise Failed(f"{name}: NMSE must be at most {NMSE:.0e}; got {error:.1e}")
    return error


def bare_kernel(
    t: Mapping[str, torch.Tensor], *, threads: int, share_openmp: bool
) -> tuple[Callable[[], None], torch.Tensor, torch.Tensor]:
    """(call, o, state): the extension itself, in place on these tensors, with all addresses ready."""
    import torch

    extension()
    call = Call(t["q"], t["k"], t["v"], t["g"], t["beta"], t["state"])
    spec = check_call(call, Options(op="gated_delta_rule_"), inplace=True)
    native = dispatch.host("cpu").BACKEND.prepare(spec, call).native
    call.o = o = torch.empty_like(t["v"])
    call.state_out = call.state_in
    addresses = [0 if x is None else x.data_ptr() for x in in_order(Call)(call)]

    def run(keep: Call = call) -> None:  # the arrays must outlive their addresses
        native.run_at(threads, share_openmp, *addresses)

    return run, o, t["state"]


@contextmanager
def torch_threads(n: int) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def interleave(
    calls: Mapping[str, Callable[[], object]],
    settings: Settings,
    progress: Progress,
    within: Mapping[str, Callable[[], AbstractContextManager[object]]] | None = None,
) -> tuple[dict[str, list[float]], dict[str, int], float | None]:
    """(us per call by round, calls per sample, CPU share of other work). The garbage collector is off meanwhile.

    `within`: the contexts of calls, by name. Entering them is not timed.
    """
    around = dict.fromkeys(calls, nullcontext) if within is None else within
    repeats = {}
    for name, call in calls.items():
        with around[name]():
            repeats[name] = _calibrate(call, settings.sample_seconds)
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
                time.sleep(SETTLE_SECONDS)  # the previous one's threads may still spin
                with around[name]():
                    calls[name]()
                    samples[name].append(1e6 * _time(calls[name], repeats[name]) / repeats[name])
    finally:
        if collecting:
            gc.enable()
    return samples, repeats, others.percent()


def _calibrate(call: Callable[[], object], seconds: float) -> int:
    """The number of calls in a sample."""
    n = 1
    while (took := _time(call, n)) < seconds / 4 and n < 1_000_000:
        n = min(1_000_000, max(2 * n, int(n * seconds / max(took, 1e-7) / 2)))
    return max(1, round(n * seconds / took)) if took > 0 else n


def _time(call: Callable[[], object], n: int) -> float:
    start = time.perf_counter()
    for _ in range(n):
        call()
    return time.perf_counter() - start
