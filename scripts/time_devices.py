"""What a call on a device costs beside its kernel, and chunks against token by token: the figures of docs/backends.

    python scripts/time_devices.py

Medians with quartiles, in microseconds. The chunk lengths take turns within one process (0: token by token).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import anydelta
from anydelta.backends import vulkan
from anydelta.conformance.run import unavailable
from anydelta.spec import Call, Options, check_call


def tokens(T: int, H: int, HV: int, K: int, kda: bool = False) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """q, k, v and the gates of one sequence."""
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 1, T, H, K), np.float32) / K**0.5
    v = rng.standard_normal((1, T, HV, K), np.float32)
    g = -rng.random((1, T, HV, K) if kda else (1, T, HV), np.float32)
    return (q, k, v), {"g": g, "beta": rng.random((1, T, HV), np.float32)}


def measured(run: Callable[[], Any], times: int) -> str:
    for _ in range(times // 10 + 5):
        run()
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        taken.append((time.perf_counter() - start) * 1e6)
    low, middle, high = statistics.quantiles(taken, n=4)
    return f"{middle:.1f} ({low:.1f} to {high:.1f})"


def main() -> None:
    for kind in ("vulkan", "webgpu"):
        if reasons := unavailable(kind):
            print(f"{kind}: {'; '.join(reasons)}")
            continue
        dev: Any = anydelta.device(kind)
        print(dev)
        for H, HV, K, times in ((1, 1, 16, 2000), (16, 32, 128, 40)):
            qkv, gates = tokens(1, H, HV, K)
            state = dev.zeros((1, HV, K, K))
            taken = measured(lambda q=qkv, s=state, g=gates: anydelta.gated_delta_rule_(*q, s, **g), times)  # type: ignore[misc]
            print(f"  decode H={H} HV={HV} K=V={K}, state resident: {taken} us")
    if unavailable("vulkan"):
        return
    for kda in (False, True):
        qkv, gates = tokens(256, 2, 4, 32, kda)
        (q, k, v), state = qkv, np.zeros((1, 4, 32, 32), np.float32)
        call = Call(q, k, v, gates["g"], gates["beta"], state)
        spec = check_call(call, Options(), inplace=False)
        taken_by = vulkan.measure_chunks(anydelta.device("vulkan"), spec, call, 16, rounds=9)
        print(f"prefill T=256 H=2 HV=4 K=V=32 kda={kda}, us by chunk length: "
              + ", ".join(f"{c}: {t * 1e6:.0f}" for c, t in taken_by.items()))  # fmt: skip


if __name__ == "__main__":
    main()
