"""What a call on a device costs beside its kernel, and chunks against token by token: the figures of docs/backends.

    python scripts/time_devices.py            # both
    python scripts/time_devices.py calls      # Vulkan and WebGPU, whole calls with a resident state
    python scripts/time_devices.py chunks     # Vulkan's prefill, token by token and in chunks

Medians with quartiles, in microseconds. What is compared takes turns within one process: rounds of a few calls for the
decode steps (a lone call finds the caches full of another's), single calls for the prefill. The smallest call
(one head of 16) is nearly all dispatch; `staging` is the part of a call that copies inputs and o.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import anydelta
from anydelta.backends.devices import staging
from anydelta.backends.vulkan import host as vulkan
from anydelta.conformance.run import unavailable
from anydelta.rule.arguments import Call, Options
from anydelta.rule.spec import check_call

CALLS = 25
"""Per round."""


def tokens(T: int, H: int, HV: int, K: int, kda: bool = False) -> tuple[tuple[Any, Any, Any], dict[str, Any]]:
    """q, k, v and the gates of one sequence."""
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 1, T, H, K), np.float32) / K**0.5
    v = rng.standard_normal((1, T, HV, K), np.float32)
    g = -rng.random((1, T, HV, K) if kda else (1, T, HV), np.float32)
    return (q, k, v), {"g": g, "beta": rng.random((1, T, HV), np.float32)}


class Staging:
    """Sums the time in Layout.pack and Layout.unpack."""

    def __init__(self) -> None:
        self.seconds = 0.0
        for name in ("pack", "unpack"):
            self._watch(name, getattr(staging.Layout, name))

    def _watch(self, name: str, run: Callable[..., None]) -> None:
        def timed(*args: Any) -> None:
            start = time.perf_counter()
            run(*args)
            self.seconds += time.perf_counter() - start

        setattr(staging.Layout, name, timed)


def quartiles(us: list[float]) -> str:
    low, middle, high = statistics.quantiles(us, n=4)
    return f"{middle:.0f} us ({low:.0f} to {high:.0f})"


def calls(rounds: int = 60) -> None:
    """Decode steps on each device, in turns."""
    kinds = [k for k in ("vulkan", "webgpu") if not unavailable(k)]
    clock = Staging()
    for H, HV, K, some in ((1, 1, 16, CALLS), (16, 32, 128, 1)):
        qkv, gates = tokens(1, H, HV, K)
        whole: dict[str, list[float]] = {k: [] for k in kinds}
        staged: dict[str, list[float]] = {k: [] for k in kinds}
        crossed: dict[str, int] = {}
        states = {k: anydelta.device(k).zeros((1, HV, K, K)) for k in kinds}
        for turn in range(rounds):
            for kind, state in states.items():
                counted = state.device.staged
                before = counted.to_device + counted.from_device
                for _ in range(some):
                    clock.seconds, start = 0.0, time.perf_counter()
                    anydelta.gated_delta_rule_(*qkv, state, **gates)
                    if turn > 2:
                        whole[kind].append((time.perf_counter() - start) * 1e6)
                        staged[kind].append(clock.seconds * 1e6)
                crossed[kind] = (counted.to_device + counted.from_device - before) // some
        for kind in kinds:
            print(
                f"{kind}: decode H={H} HV={HV} K=V={K}, state resident: {quartiles(whole[kind])}, "
                f"of which staging {statistics.median(staged[kind]):.0f} us; {crossed[kind]} bytes staged"
            )


def chunks() -> None:
    print("| Vulkan, H=1 HV=2, K = V | T | gates | token by token, us | chunks, us | ratio of the medians |")
    print("|---|---|---|---|---|---|")
    for K, T, kda in itertools.product((64, 128), (512, 1024, 4096), (False, True)):
        qkv, gates = tokens(T, 1, 2, K, kda)
        call = Call(*qkv, gates["g"], gates["beta"], np.zeros((1, 2, K, K), np.float32))
        spec = check_call(call, Options(), inplace=False)
        taken = vulkan.measure_chunks(anydelta.device("vulkan"), spec, call, 16, rounds=5)
        each = [statistics.quantiles([1e6 * x for x in times], n=4) for times in taken.values()]
        cells = " | ".join(f"{mid:.0f} ({low:.0f} to {high:.0f})" for low, mid, high in each)
        print(
            f"| {K} | {T} | {'KDA' if kda else 'GDA'} | {cells} | {each[0][1] / each[1][1]:.2f} |", flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", nargs="?", choices=("calls", "chunks"))
    part = parser.parse_args().part
    for kind in ("vulkan", "webgpu"):
        if reasons := unavailable(kind):
            print(f"{kind}: {'; '.join(reasons)}")
        else:
            print(anydelta.device(kind))
    if part != "chunks":
        calls()
    if part != "calls" and not unavailable("vulkan"):
        chunks()


if __name__ == "__main__":
    main()
