"""The overhead of a call in AOTInductor's code: `anydelta bench overhead --aoti`.

Entering a package takes longer than the operator's call. So the overhead is the difference per call between a program
with many calls and one with a single call, minus the bare kernel's time in the same round.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ... import gated_delta_rule_
from ...core.late import late
from .ops import Settings, describe_machine
from .overhead import ALLOWED_US, OverheadRecord
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
    from torch import Tensor

    from ...export import aoti
else:
    aoti = late("anydelta.export.aoti")

CALLS = 33
"""Calls in the longer program."""


def call_overhead(settings: Settings | None = None, progress: Progress = lambda text, done: None) -> Measured:
    """Measure one decode step of 32 heads of 128 x 128, in place, on one thread.

    Raises:
        Refused: the extension is not built.
        RuntimeError: anydelta_torch is not in use, or a result is wrong.
    """
    import torch

    class Repeated(torch.nn.Module):
        def __init__(self, calls: int):
            super().__init__()
            self.calls = calls

        def forward(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> Tensor:
            for _ in range(self.calls):
                o: Tensor = gated_delta_rule_(q, k, v, state, g=g, beta=beta)
            return o

    settings = settings or Settings()
    x = make_inputs(T=1, HV=32, D=128)
    want = oracle(x)
    with torch_threads(1), torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        bare, o, state = bare_kernel(tensors(x), threads=1, share_openmp=True)
        bare()
        errors = [check("bare kernel", (o, state), want)]
        calls = {"bare": bare}
        for n in (1, CALLS):
            t = tensors(x)
            inputs = tuple(t[name] for name in ("q", "k", "v", "g", "beta", "state"))
            progress(f"compiling {n} calls", 0)
            program = torch.export.export(Repeated(n), inputs)
            path = aoti.compile_and_package(program, Path(folder) / f"{n}.pt2")
            package = torch._inductor.aoti_load_package(str(path))
            result = package(*inputs)
            if n == 1:
                errors.append(check("AOTInductor", (result, t["state"]), want))
            calls[str(n)] = partial(package, *inputs)
        samples, repeats, others = interleave(calls, settings, progress)
    bare_us = samples["bare"]
    each = [(many - one) / (CALLS - 1) for many, one in zip(samples[str(CALLS)], samples["1"], strict=True)]
    records = [
        OverheadRecord.of("bare kernel", repeats["bare"], bare_us, bare_us, errors[0], others),
        OverheadRecord.of(
            "AOTInductor, in place", repeats[str(CALLS)] * (CALLS - 1), each, bare_us, errors[1], others
        ),
    ]
    notes = [
        "float32, B = T = 1, H = HV = 32, K = V = 128, one thread",
        f"AOTInductor: a program of {CALLS} calls minus a program of one call, per call",
        f"a call should take at most {ALLOWED_US:g} µs",
    ]
    return Measured(
        "Call overhead at T = 1 in compiled programs", describe_machine(), settings, notes, records
    )
