"""Every cut of the OpenCL and SYCL kernels, and every way to memory, against each other on this machine.

    python scripts/compare_cuts.py opencl sycl
    python scripts/compare_cuts.py sycl --prompts 512 4096 --cuts chunks columns    # each prompt at K = V = 64 and 128

Calls take turns within one process; the figures are medians in us, with the quartiles. A tiny call (one head of 16) is
dispatch and waiting alone; a decode step with the state on the device stages q, k, v, g, beta and o only.
"""

from __future__ import annotations

import argparse
import itertools
import time
from typing import Any

import numpy as np

import anydelta
from anydelta.core import dispatch, plans

SHAPES = {  # B, T, H, HV, K and V
    "tiny call": (1, 1, 1, 1, 16),
    "decode step": (1, 1, 16, 32, 128),
    "64 tokens": (1, 64, 16, 32, 128),
}


def tokens(B: int, T: int, H: int, HV: int, K: int, kda: bool) -> tuple[list[Any], dict[str, Any]]:
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, B, T, H, K), np.float32) / K**0.5
    v = rng.standard_normal((B, T, HV, K), np.float32)
    g = rng.random((B, T, HV, K) if kda else (B, T, HV), np.float32)
    return [q, k, v], {"g": -g, "beta": rng.random((B, T, HV), np.float32)}


def contenders(backend: str, cuts: list[str]) -> dict[str, tuple[Any, str, str, bool]]:
    """name -> (device, cut, way to memory, whether the state is resident)."""
    device = dispatch.host(backend).roster.default()
    return {
        f"{backend} {cut} {way}{' resident' * resident}": (device, cut, way, resident)
        for cut, way, resident in itertools.product(device.kernels(), device.memories, (False, True))
        if cut in cuts or not cuts
        if cut == device.kernels()[0] or (way == device.memory and not resident)
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("backends", nargs="+", choices=("opencl", "sycl"))
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--kda", action="store_true")
    parser.add_argument("--cuts", nargs="+", default=[])
    parser.add_argument(
        "--prompts", nargs="+", type=int, default=[], help="lengths, instead of the three calls"
    )
    args = parser.parse_args()
    if args.rounds < 20:
        parser.error(f"--rounds must be at least 20; got {args.rounds}")
    prompts = {f"prompt of {T}, {K}": (1, T, 2, 4, K) for T in args.prompts for K in (64, 128)}
    for label, (B, T, H, HV, K) in (prompts or SHAPES).items():
        (q, k, v), gates = tokens(B, T, H, HV, K, args.kda)
        runs: dict[str, Any] = {}
        for name, (device, cut, way, resident) in {
            n: c for b in args.backends for n, c in contenders(b, args.cuts).items()
        }.items():
            state = device.zeros((B, HV, K, K)) if resident else np.zeros((B, HV, K, K), np.float32)
            runs[name] = (device, cut, way, state)
        runs["cpu"] = (None, "", "", np.zeros((B, HV, K, K), np.float32))
        times: dict[str, list[float]] = {name: [] for name in runs}
        staged: dict[str, int] = {}
        for turn in range(args.rounds // min(T, 4 if T < 100 else 10) + 2):
            for name, (device, cut, way, state) in runs.items():
                if device is not None:
                    device.kernel, device.memory = cut, way
                backend = "cpu" if device is None else device.kind
                plans.forget()  # those that were made for another way to memory
                anydelta.gated_delta_rule_(q, k, v, state, **gates, backend=backend)
                if device is not None:
                    before = device.staged.to_device + device.staged.from_device
                start = time.perf_counter()
                anydelta.gated_delta_rule_(q, k, v, state, **gates, backend=backend)
                if turn > 1:
                    times[name].append(time.perf_counter() - start)
                if device is not None:
                    staged[name] = device.staged.to_device + device.staged.from_device - before
        shape = f"{label.partition(',')[0]}: T={T} H={H} HV={HV} K=V={K} {'KDA' if args.kda else 'GDA'}"
        print(f"\n| {shape} | us | quartiles | bytes staged |\n|---|---|---|---|")
        for name, seconds in times.items():
            low, mid, high = (1e6 * float(np.percentile(seconds, p)) for p in (25, 50, 75))
            print(f"| {name} | {mid:.0f} | {low:.0f} to {high:.0f} | {staged.get(name, 0)} |")


if __name__ == "__main__":
    main()
