"""`anydelta bench gradients`: forward and backward pass of the rule beside Transformers' torch path and the reference.

The native backward pass alone is also compared with the FMA peak of the same rounds. Only flops of the 8 unavoidable
products of a token with the state count, 16 K V per token and value head: two in the repeated forward pass, six in the
backward pass. Other work (pairs of a block, products repeated to save memory) does not count.
"""

from __future__ import annotations

import ctypes
import importlib
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer

from ... import gated_delta_rule
from ...core.late import late
from ...rule.arguments import Call, Options
from ...terminal import Failed
from ..measure.contender import needs, quiet_stderr
from ..measure.ops import NMSE, Settings, describe_machine, nmse
from ..measure.report import time as in_words
from ..measure.small_report import Measured
from ..measure.turns import Progress, extension, interleave, part_of, torch_threads
from .options import Csv, Json, Md, Output, Rounds, SampleMs, Threads, numbers, numbers_of_threads, small

if TYPE_CHECKING:
    from types import ModuleType

    import torch

    from ...core.arrays import Array
    from ...rule import autograd
    from ..measure.cases import F32

    Tensors = dict[str, torch.Tensor]
    Forward = Callable[[Tensors], tuple[Array, Array]]
else:
    autograd = late("anydelta.rule.autograd")

H, HV, D = 16, 32, 128
GATES = {"mild": None, "g16": -16.0}
"""Log decays: U(-0.5, -0.05), or one number for all."""
CHECKED = 64
"""Before anything is timed, gradients of so many tokens (two value heads) are compared with the float64 recurrence."""
LEAVES = ("q", "k", "v", "g", "beta", "state_in")
PEAK_SECONDS = 0.02


@dataclass
class GradientsRecord:
    """One call, forward and backward."""

    rule: str
    decays: str
    tokens: int
    threads: int
    rounds: int
    both_us: float
    both_min_us: float
    backward_us: float
    """The backward pass alone."""
    peak_pct: float
    """The backward pass: percent of the FMA peak, median of the rounds."""
    transformers: float | None
    """Transformers' time / ours, median of the rounds."""
    transformers_min: float | None
    """The same from the minima."""
    reference: float | None
    """Time of one call of the reference / ours."""
    memory_mib: float | None
    """How much a call raises the process's peak resident memory."""
    transformers_mib: float | None
    nmse: float
    others_pct: float | None = None

    def columns(self) -> dict[str, str]:
        def times(x: float | None, least: float | None = None) -> str:
            return "" if x is None else f"{x:.2f}" + (f" ({least:.2f})" if least is not None else "")

        memory = [f"{x:.0f}" for x in (self.memory_mib, self.transformers_mib) if x is not None]
        return {
            "rule": self.rule, "decays": self.decays, "T": str(self.tokens), "threads": str(self.threads),
            "both": in_words(self.both_us), "backward": in_words(self.backward_us), "of peak": f"{self.peak_pct:.0f}%",
            "stock": times(self.transformers, self.transformers_min), "loop": times(self.reference),
            "MiB": " / ".join(memory),
        }  # fmt: skip


def _inputs(kda: bool, T: int, heads: tuple[int, int], decay: float | None, dtype: torch.dtype) -> Tensors:
    """Leaves, and the gradients of the outputs."""
    import torch

    rng = np.random.default_rng(0)
    h, hv = heads

    def normal(*shape: int) -> F32:
        return rng.standard_normal(shape, np.float32)

    gates = (1, T, hv, D) if kda else (1, T, hv)
    x = {
        "q": normal(1, T, h, D), "k": normal(1, T, h, D), "v": normal(1, T, hv, D),
        "g": rng.uniform(-0.5, -0.05, gates) if decay is None else np.full(gates, decay),
        "beta": rng.uniform(0.2, 0.8, (1, T, hv)), "state_in": normal(1, hv, D, D),
        "d_o": normal(1, T, hv, D), "d_state": normal(1, hv, D, D),
    }  # fmt: skip
    out = {name: torch.from_numpy(a).to(dtype) for name, a in x.items()}
    return {name: a.requires_grad_(name in LEAVES) for name, a in out.items()}


def _forward(x: Tensors, backend: str = "auto") -> tuple[Array, Array]:
    return gated_delta_rule(
        x["q"], x["k"], x["v"], g=x["g"], beta=x["beta"], initial_state=x["state_in"], qk_l2norm=True,
        backend=backend,
    )  # fmt: skip


def _both(x: Tensors, forward: Forward) -> tuple[torch.Tensor, ...]:
    import torch

    return torch.autograd.grad(forward(x), [x[n] for n in LEAVES], (x["d_o"], x["d_state"]))


def _transformers() -> Forward | None:
    """Its chunked torch path, or None if it is not installed."""
    if needs("transformers", "transformers"):
        return None
    with quiet_stderr():
        m = importlib.import_module("transformers.models.qwen3_next.modeling_qwen3_next")
    theirs = m.torch_chunk_gated_delta_rule

    def forward(x: Tensors) -> tuple[Array, Array]:
        q, k = (x[n].repeat_interleave(HV // H, 2) for n in "qk")
        out: tuple[Array, Array] = theirs(
            q, k, x["v"], g=x["g"], beta=x["beta"], initial_state=x["state_in"], output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )  # fmt: skip
        return out

    return forward


def _check(kda: bool, decay: float | None) -> float:
    """The largest error of a gradient, against the recurrence in float64."""
    import torch

    x, exact = (_inputs(kda, CHECKED, (1, 2), decay, dtype) for dtype in (torch.float32, torch.float64))
    call = Call(*(exact[n] for n in ("q", "k", "v", "g", "beta", "state_in")))
    want = autograd.gradients(
        call, Options(qk_l2norm=True), list(LEAVES), exact["d_o"], exact["d_state"], backend="reference"
    )
    error = max(
        nmse(got.numpy(), np.asarray(want[name]))
        for name, got in zip(LEAVES, _both(x, _forward), strict=True)
    )
    if not error <= NMSE:
        raise Failed(f"gradients: NMSE must be at most {NMSE:.0e}; got {error:.1e}")
    return error


def _peak(core: ModuleType, threads: int, found: list[float]) -> None:
    found.append(core.fma_peak(threads, PEAK_SECONDS))


def _memory(call: Callable[[], object]) -> float | None:
    """MiB by which a call raises the peak resident memory; None if the system does not report it."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def read(name: str) -> float:
        (line,) = (x for x in status.read_text().splitlines() if x.startswith(name))
        return float(line.split()[1]) / 1024

    try:
        ctypes.CDLL(None).malloc_trim(0)  # freed memory must not be reused
        before = read("VmRSS:")
        reset.write_text("5")
        call()
        return read("VmHWM:") - before
    except (OSError, ValueError, AttributeError, TypeError):
        return None


def gradients(
    tokens: Sequence[int] = (512, 2048),
    threads: Sequence[int] = (1, 2),
    slow_tokens: int = 512,
    settings: Settings | None = None,
    progress: Progress = lambda text, done: None,
) -> Measured:
    """Measure GDA and KDA, with mild and strong decays.

    Raises:
        Failed: a gradient is wrong.
    """
    import torch

    core, settings = extension(), settings or Settings()
    measured = Measured(
        f"Forward and backward: {H} heads of q and k, {HV} of v, {D}x{D}, float32", describe_machine(), settings,
        [
            "both: forward and backward; backward: the backward pass alone, and its share of the FMA peak of the same "
            "rounds at 16 K V flops per token and value head",
            "stock: time of Transformers' chunked torch path / time of both, median of the rounds (of the minima); "
            "loop: one call of the reference / both",
            "MiB: how much a call raises the peak resident memory, ours / Transformers'",
        ],
    )  # fmt: skip
    theirs = _transformers()
    groups = [
        (kda, decays, T, n) for kda in (False, True) for decays in GATES for T in tokens for n in threads
    ]
    for i, (kda, decays, T, n) in enumerate(groups):
        name = "KDA" if kda else "GDA"
        tell = part_of(progress, f"{name}, {decays}, {T} tokens, {n} thread{'s' * (n > 1)}", i, len(groups))
        peaks: list[float] = []
        with torch_threads(n):
            error = _check(kda, GATES[decays])
            x = _inputs(kda, T, (H, HV), GATES[decays], torch.float32)
            ours = partial(_both, x, _forward)
            outputs = _forward(x)
            leaves = [x[name] for name in LEAVES]
            back = partial(torch.autograd.grad, outputs, leaves, (x["d_o"], x["d_state"]), retain_graph=True)
            calls: dict[str, Callable[[], object]] = {
                "both": ours, "backward": back, "peak": partial(_peak, core, n, peaks),
            }  # fmt: skip
            ours_mib, stock_mib = _memory(ours), None
            if theirs and not kda:  # its KDA stores the pairs of a chunk with all their channels
                calls["transformers"] = partial(_both, x, theirs)
                with quiet_stderr():  # it warns once that this path is slow
                    calls["transformers"]()
                stock_mib = _memory(calls["transformers"])
            samples, repeats, others = interleave(calls, settings, tell)
            slow = None
            if slow_tokens >= T:
                start = time.perf_counter()
                _both(x, partial(_forward, backend="reference"))
                slow = 1e6 * (time.perf_counter() - start) / statistics.median(samples["both"])
        rounds, per_round = len(samples["both"]), 1 + repeats["peak"]
        limits = [max(peaks[-per_round * (r + 1) :][:per_round]) for r in reversed(range(rounds))]
        flops = 16.0 * D * D * T * HV
        shares = [flops / us / 1e3 / peak for us, peak in zip(samples["backward"], limits, strict=True)]
        stock = samples.get("transformers")
        measured.records.append(
            GradientsRecord(
                name, decays, T, n, rounds, statistics.median(samples["both"]), min(samples["both"]),
                statistics.median(samples["backward"]), 100 * statistics.median(shares),
                statistics.median(a / b for a, b in zip(stock, samples["both"], strict=True)) if stock else None,
                min(stock) / min(samples["both"]) if stock else None,
                slow, ours_mib, stock_mib, error, others,
            )
        )  # fmt: skip
    return measured


def gradients_command(
    tokens: Annotated[
        str, typer.Option("--tokens", "-T", help="Tokens of a call, as 512,2048.")
    ] = "512,2048",
    threads: Threads = "1,2",
    slow_tokens: Annotated[
        int, typer.Option("--reference", help="Run the slow reference too, once, for up to this many tokens.")
    ] = 0,
    rounds: Rounds = 7,
    sample_ms: SampleMs = 15.0,
    json: Json = False,
    csv: Csv = False,
    md: Md = False,
    output: Output = None,
) -> None:
    """Time forward and backward pass against Transformers' torch path, the reference and the FMA peak.

    Examples:
      anydelta bench gradients
      anydelta bench gradients -T 512 -t 1 --reference 512
    """
    measure = partial(gradients, numbers("-T", tokens, 65536), numbers_of_threads(threads, 1), slow_tokens)
    small(measure, rounds, sample_ms, json, csv, md, output)
