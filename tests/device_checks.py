"""Shared by the tests of the Vulkan, WebGPU, OpenCL and SYCL backends."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest

import anydelta
from anydelta.conformance import OK, Case, Target
from anydelta.conformance.run import run_one


def failures(
    backend: str, cases: Iterable[Case], kernel: str | None = None, framework: str = "numpy"
) -> list[str]:
    bad = [r for c in cases if (r := run_one(c, Target(backend, kernel, framework))).status != OK]
    return [f"{r.status}: {r.reproduce()}: {'; '.join(r.reasons)}" for r in bad]


def tokens(
    T: int = 1, *, B: int = 1, H: int = 1, HV: int = 2, K: int = 16, V: int = 16, seed: int = 0
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(q, k, v), and the gates by name."""
    rng = np.random.default_rng(seed)
    q, k = 0.3 * rng.standard_normal((2, B, T, H, K), np.float32)
    v = rng.standard_normal((B, T, HV, V), np.float32)
    g, beta = rng.random((2, B, T, HV), np.float32)
    return (q, k, v), {"g": -g, "beta": beta}


def check_only_tokens_are_staged(dev: Any, *, crosses: bool = True) -> None:
    """With a resident state q, k, v, g, beta go to the device and o comes back, or nothing where memory is shared."""
    (q, k, v), gates = tokens(K=64, HV=4, V=64)
    state = dev.zeros((1, 4, 64, 64))
    inputs = sum(x.nbytes for x in (q, k, v, *gates.values()))
    for _ in range(2):
        before = (dev.staged.to_device, dev.staged.from_device)
        o = anydelta.gated_delta_rule_(q, k, v, state, **gates)
        crossed = (dev.staged.to_device - before[0], dev.staged.from_device - before[1])
        assert crossed == ((inputs, o.nbytes) if crosses else (0, 0))
    assert inputs + o.nbytes < state.nbytes / 20


def check_a_call_on_the_device_stages_nothing(dev: Any, there: Callable[[Any], Any]) -> Any:
    """`there` puts a host array on the device. Returns o, there, and what it must hold."""
    qkv, gates = tokens(5, B=2, H=2, HV=4, K=32)
    host = np.random.default_rng(1).standard_normal((2, 4, 32, 16), np.float32)
    state, q_k_v = there(host), [there(x) for x in qkv]
    gates_there = {n: there(x) for n, x in gates.items()}
    before = (dev.staged.to_device, dev.staged.from_device)
    o = anydelta.gated_delta_rule_(*q_k_v, state, **gates_there)
    _, final = anydelta.gated_delta_rule(*q_k_v, **gates_there, initial_state=state)
    assert (dev.staged.to_device, dev.staged.from_device) == before
    want = anydelta.gated_delta_rule_(*qkv, host, **gates, backend="reference")
    assert np.allclose(o.numpy(), want, atol=1e-5)
    assert np.allclose(state.numpy(), host, atol=1e-5)
    _, more = anydelta.gated_delta_rule(*qkv, **gates, initial_state=host, backend="reference")
    assert np.allclose(final.numpy(), more, atol=1e-5)
    return o, want


def check_a_lost_device_voids_its_states(dev: Any, lose: Callable[[], None]) -> None:
    state = dev.zeros((1, 2, 16, 16))
    (q, k, v), gates = tokens()
    anydelta.gated_delta_rule_(q, k, v, state, **gates)
    lose()
    for _ in range(2):
        with pytest.raises(
            anydelta.DeviceError, match=r"is lost \(while running the operator\).*states are invalid"
        ):
            anydelta.gated_delta_rule_(q, k, v, state, **gates)
    with pytest.raises(anydelta.DeviceError, match="is lost"):
        state.numpy()
