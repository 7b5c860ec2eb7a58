"""`anydelta bench matrices`: the matrices of a decode step, one row times a weight, in GB/s of weights read.

Each way reads the same matrices of a qwen3.5-0.8b layer, more than the caches hold. The limit is a sum over the same
bytes.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from ...terminal import Failed, first_line
from ..measure.ops import Settings, describe_machine
from ..measure.small_report import Measured
from ..measure.turns import Progress, interleave, part_of, torch_threads
from .options import Csv, Json, Md, Output, Rounds, Threads, numbers_of_threads, small

if TYPE_CHECKING:
    import torch

SHAPES = ((6144, 1024), (2048, 1024), (1024, 2048), (3584, 1024), (3584, 1024), (1024, 3584))
"""[out, in] of the matrices: q k v, z, out; gate, up, down."""
LAYERS = 6
"""340 MiB in float32. Half types get twice as many layers."""
ERROR = {"float32": 1e-5, "bfloat16": 1e-2}


@dataclass
class MatricesRecord:
    """One way to multiply, over all matrices."""

    dtype: str
    threads: int
    way: str
    rounds: int
    gb_per_s: float
    """Median of the rounds; then the slowest and the fastest."""
    low: float
    high: float
    error: float
    """Relative to float64. 0 for the sum, which multiplies nothing."""
    others_pct: float | None = None

    def columns(self) -> dict[str, str]:
        rate = f"{self.gb_per_s:.1f} ({self.low:.1f} to {self.high:.1f})"
        return {"dtype": self.dtype, "threads": str(self.threads), "way": self.way, "GB/s": rate}


def _ways(
    weights: list[torch.Tensor], rows: list[torch.Tensor], notes: list[str]
) -> dict[str, Callable[[], list[torch.Tensor]]]:
    import torch
    import torch.nn.functional as F

    pairs = list(zip(weights, rows, strict=True))
    ways: dict[str, Callable[[], list[torch.Tensor]]] = {
        "F.linear": lambda: [F.linear(x, w) for w, x in pairs],
        "torch.mv": lambda: [torch.mv(w, x[0]) for w, x in pairs],
        "read (sum)": lambda: [w.view(torch.int32).sum(dtype=torch.int32) for w in weights],
    }
    try:
        packed = [(torch.ops.mkldnn._reorder_linear_weight(w, 1), x) for w, x in pairs]
    except RuntimeError as error:
        notes.append(f"without oneDNN: {first_line(error)}")
        return ways
    linear = torch.ops.mkldnn._linear_pointwise
    ways["oneDNN, packed"] = lambda: [linear(x, w, None, "none", [], "") for w, x in packed]
    return ways


def matrices(
    threads: Sequence[int] = (1, 2),
    settings: Settings | None = None,
    progress: Progress = lambda text, done: None,
) -> Measured:
    """Measure every way in float32 and bfloat16.

    Raises:
        Failed: a result is wrong.
    """
    import torch

    settings = settings or Settings()
    measured = Measured("A decode step's matrices, one row each", describe_machine(), settings)
    for dtype, most in ERROR.items():
        torch.manual_seed(0)
        shapes = SHAPES * (LAYERS if dtype == "float32" else 2 * LAYERS)
        weights = [torch.randn(shape).to(getattr(torch, dtype)) for shape in shapes]
        rows = [torch.randn(1, w.shape[1]).to(w.dtype) for w in weights]
        size = sum(w.numel() * w.element_size() for w in weights)
        want = [w.double() @ x[0].double() for w, x in zip(weights, rows, strict=True)]
        for n in threads:
            with torch_threads(n), torch.no_grad():
                ways = _ways(weights, rows, measured.notes if n == threads[0] else [])
                errors = dict.fromkeys(ways, 0.0)
                for name in ways.keys() - {"read (sum)"}:
                    errors[name] = max(
                        float((got.double().view(-1) - w).norm() / w.norm())
                        for got, w in zip(ways[name](), want, strict=True)
                    )
                    if not errors[name] <= most:
                        raise Failed(
                            f"{name}, {dtype}: the error must be at most {most}; got {errors[name]:.1e}"
                        )
                samples, _, others = interleave(
                    ways, settings, part_of(progress, f"{dtype}, {n} thread{'s' * (n > 1)}", 0, 1)
                )
            for name, us in samples.items():
                rates = sorted(size / t / 1e3 for t in us)
                measured.records.append(
                    MatricesRecord(
                        dtype,
                        n,
                        name,
                        len(us),
                        statistics.median(rates),
                        rates[0],
                        rates[-1],
                        errors[name],
                        others,
                    )
                )
    measured.notes.append("median of the rounds (slowest to fastest); the sum shows what reading alone takes")
    return measured


def matrices_command(
    threads: Threads = "1,2",
    rounds: Rounds = 7,
    json: Json = False,
    csv: Csv = False,
    md: Md = False,
    output: Output = None,
) -> None:
    """Time the matrices of a decode step: torch, oneDNN on packed weights, and a plain read of the weights.

    Examples:
      anydelta bench matrices
      anydelta bench matrices -t 1 -r 3
    """
    small(partial(matrices, numbers_of_threads(threads, 1)), rounds, 15.0, json, csv, md, output)
