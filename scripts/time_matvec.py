"""What a decode step's matrices cost: one row times a weight, in GB/s of weights read.

    python scripts/time_matvec.py --rounds 7 --threads 1 2

Every contender reads the same matrices of a qwen3.5-0.8b layer in turn, more of them than the caches hold, in
interleaved rounds of one process: torch's F.linear, torch.mv, oneDNN's linear on a weight packed for it, and as a limit
a sum over the same bytes. Results are compared first. Medians of the rounds, with the smallest and the largest.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

SHAPES = ((6144, 1024), (2048, 1024), (1024, 2048), (3584, 1024), (3584, 1024), (1024, 3584))
"""[out, in] of the matrices: q k v, z, out; gate, up, down."""
LAYERS = 6
"""340 MiB in float32."""


def contenders(
    weights: list[torch.Tensor], rows: list[torch.Tensor]
) -> dict[str, Callable[[], list[torch.Tensor]]]:
    packed = []
    for w, x in zip(weights, rows, strict=True):
        try:
            packed.append(torch.ops.mkldnn._reorder_linear_weight(w, x.shape[0]))
        except RuntimeError as error:
            print(f"oneDNN: left out: {str(error).splitlines()[0]}")
            break
    found: dict[str, Callable[[], list[torch.Tensor]]] = {
        "F.linear": lambda: [F.linear(x, w) for w, x in zip(weights, rows, strict=True)],
        "torch.mv": lambda: [torch.mv(w, x[0]) for w, x in zip(weights, rows, strict=True)],
        "read (sum)": lambda: [w.view(torch.int32).sum(dtype=torch.int32) for w in weights],
    }
    if len(packed) == len(weights):
        op = torch.ops.mkldnn._linear_pointwise
        found["oneDNN, packed"] = lambda: [
            op(x, w, None, "none", [], "") for w, x in zip(packed, rows, strict=True)
        ]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    options = parser.parse_args()
    torch.manual_seed(0)
    for name in options.dtype:
        dtype = getattr(torch, name)
        layers = 1 if dtype == torch.float32 else 2
        weights = [torch.randn(s).to(dtype) for _ in range(LAYERS * layers) for s in SHAPES]
        rows = [torch.randn(1, w.shape[1]).to(dtype) for w in weights]
        size = sum(w.numel() * w.element_size() for w in weights)
        with torch.no_grad():
            for threads in options.threads:
                torch.set_num_threads(threads)
                runs = contenders(weights, rows)
                want = [F.linear(x.double(), w.double()) for w, x in zip(weights, rows, strict=True)]
                for label, run in runs.items():
                    if label.startswith("read"):
                        continue
                    worst = max(
                        float((got.double().view(-1) - w.view(-1)).norm() / w.norm())
                        for got, w in zip(run(), want, strict=True)
                    )
                    assert worst < (1e-5 if dtype == torch.float32 else 1e-2), (label, worst)
                times: dict[str, list[float]] = {label: [] for label in runs}
                for i in range(options.rounds):
                    for label in sorted(runs, reverse=bool(i % 2)):
                        start = time.perf_counter()
                        runs[label]()
                        times[label].append(time.perf_counter() - start)
                for label, seconds in times.items():
                    rates = sorted(size / s / 1e9 for s in seconds)
                    print(
                        f"{name:9} {threads} threads  {label:15} {statistics.median(rates):5.1f} GB/s "
                        f"({rates[0]:.1f} to {rates[-1]:.1f})"
                    )


if __name__ == "__main__":
    main()
