"""What each kind of device must show in the same words, on the first driver of its kind that is installed."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import subprocess
import sys
from functools import cache
from typing import Any

import numpy as np
import pytest

import anydelta
import test_state
import test_state_undo
from anydelta import StatePool
from anydelta.conformance.run import unavailable
from anydelta.core.devices import KINDS
from device_checks import check_threads_take_turns, tokens


@pytest.fixture(params=KINDS)
def kind(request: Any, fresh_plans: None) -> str:
    if reasons := unavailable(request.param):
        pytest.skip("; ".join(reasons))
    return str(request.param)


@cache
def info() -> Any:
    command = [sys.executable, "-m", "anydelta.cli", "info", "--json"]
    return json.loads(subprocess.run(command, text=True, capture_output=True, check=True).stdout)["backends"]


def test_info_lists_the_limits(kind: str) -> None:
    assert ("max_array" if kind in ("vulkan", "webgpu") else "memory") in info()[kind][f"{kind}:0"]


def test_an_unknown_device_lists_those_there_are(kind: str) -> None:
    with pytest.raises(anydelta.UnsupportedError, match=rf"device {kind}:99: .* {kind}:0 .*\("):
        anydelta.device(f"{kind}:99")


def test_the_host_is_preferred_on_the_host(kind: str) -> None:
    (q, k, v), gates = tokens()
    assert anydelta.explain(q, k, v, **gates).chosen != kind
    assert anydelta.explain(q, k, v, **gates, backend=kind).chosen == kind


def test_threads_take_turns(kind: str) -> None:
    check_threads_take_turns(kind)


def test_the_states_of_a_pool_stay_on_the_device(kind: str) -> None:
    """Steps, commits, forks and rollbacks by index: no state crosses to the host."""
    test_state.soak(3, 60, "slots", device=f"{kind}:0")
    H, HV, D = test_state.H, test_state.HV, 128
    pool = StatePool(2, H=H, HV=HV, K=D, V=D, layers=2, snapshots=5, device=anydelta.device(f"{kind}:0"))
    assert pool.resident is not None
    state = 2 * HV * D * D * 4
    s = pool.new()
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 1, 4, H, D), dtype=np.float32)
    v = rng.standard_normal((1, 4, HV, D), dtype=np.float32)
    gates = rng.random((2, 1, 4, HV), dtype=np.float32)
    before = dataclasses.replace(pool.resident.staged)
    for accepted in (0, 3, 4, 1):
        pool.begin(4)
        for layer in range(2):
            pool.run(q, k, v, g=-gates[0], beta=gates[1], layer=layer)
        pool.commit(accepted)
    child = pool.fork(s)
    pool.rollback(1, [child])
    staged = pool.resident.staged
    assert staged.to_device + staged.from_device - before.to_device - before.from_device < state
    assert pool.nbytes()["states"] == 2 * 5 * state
    with pytest.raises(ValueError, match="form must be 'slots' on a device of anydelta"):
        StatePool(1, HV=1, K=4, V=4, form="log", device=f"{kind}:0")


@pytest.mark.parametrize("name", test_state_undo.STEPS)
def test_a_step_on_the_device_is_taken_back_and_copied(kind: str, name: str) -> None:
    it = test_state_undo.Filled("slots", device=f"{kind}:0")
    how = dict(test_state_undo.STEPS[name])
    tokens, batch = how.pop("tokens"), how.pop("batch")
    before = it.look()
    it.pool.begin(len(tokens[0]), batch, **how)
    it.layer(0, tokens)
    for pool in (copy.deepcopy(it.pool), pickle.loads(pickle.dumps(it.pool)), it.pool):
        it.pool = pool
        assert pool.cancel() == []
        assert it.look() == before
        it.run(batch, tokens, **how)
        assert it.look() != before
        it.pasts = [past[: len(past) - len(tokens[0]) * (s in batch)] for s, past in enumerate(it.pasts)]
