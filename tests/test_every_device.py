"""What each kind of device must show in the same words: on the first driver of its kind that is installed (`kind`), or
on every driver, by every way that reaches its memory (`dev`)."""

from __future__ import annotations

import copy
import dataclasses
import gc
import json
import os
import pickle
import re
import subprocess
import sys
import threading
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import anydelta
import test_state
import test_state_undo
from anydelta import StatePool
from anydelta.conformance.run import unavailable
from anydelta.core import dispatch
from anydelta.core.devices import KINDS
from conftest import FOR_DEVICES
from device_checks import (
    check_a_call_on_the_device_stages_nothing,
    check_only_tokens_are_staged,
    failures,
    tokens,
)

CUT = ("opencl", "sycl")
"""Their kernel comes in cuts, and calls whose arrays are all on the device run there."""


@pytest.fixture(params=KINDS)
def kind(request: Any, fresh_plans: None) -> str:
    if reasons := unavailable(request.param):
        pytest.skip("; ".join(reasons))
    return str(request.param)


def ways(kind: str) -> list[Any]:
    """(kind, number of the device, how host arrays reach its memory)"""
    if unavailable(kind):
        return []
    if kind not in CUT:
        return [pytest.param((kind, 0, ""), id=kind)]
    roster = dispatch.host(kind).roster
    found = [(kind, i, memory) for i in range(len(roster.labels())) for memory in roster.open(i).memories]
    return [pytest.param(way, id=f"{kind} {roster.labels()[way[1]][-30:]} {way[2]}") for way in found]


WAYS = [way for kind in KINDS for way in ways(kind)]
CUT_WAYS = [way for kind in CUT for way in ways(kind)]


@pytest.fixture(params=WAYS)
def dev(request: Any, monkeypatch: pytest.MonkeyPatch, fresh_plans: None) -> Any:
    """Each device, as the one where host arrays run, and each way to its memory."""
    kind, index, memory = request.param
    monkeypatch.setenv(f"ANYDELTA_{kind.upper()}_DEVICE", str(index))
    found: Any = anydelta.device(f"{kind}:{index}")
    if memory:
        monkeypatch.setattr(found, "memory", memory)
    return found


@pytest.fixture
def backend(dev: Any) -> Any:
    """Of the device, where the kernel comes in cuts."""
    return dispatch.get_backend(dev.kind)


cut = pytest.mark.parametrize("dev", CUT_WAYS, indirect=True)
PARTS = 8


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("name", ["webgpu", *CUT])
def test_every_case(name: str, part: int, fresh_plans: None) -> None:
    """Those of Vulkan run in test_vulkan.py, under the validation layers."""
    if reasons := unavailable(name):
        pytest.skip("; ".join(reasons))
    assert not failures(name, FOR_DEVICES[part::PARTS], framework="torch" if part == PARTS - 1 else "numpy")


@cut
def test_every_cut_and_memory(dev: Any) -> None:
    few = [c for c in FOR_DEVICES if 9 <= c.K <= 32 and c.V <= 32]  # one or two builds per cut
    for i, kernel in enumerate(dev.kernels()):
        cases = few[3 * i + dev.memories.index(dev.memory) :: 40]
        assert not failures(dev.kind, cases, kernel, "torch" if i % 2 else "numpy")


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
    (q, k, v), gates = tokens(5)
    want, _ = anydelta.gated_delta_rule(q, k, v, **gates, backend=kind)
    bad = []

    def work(scale: float) -> None:
        for _ in range(50):
            o, _ = anydelta.gated_delta_rule(scale * q, k, v, **gates, backend=kind)
            if not np.allclose(o, scale * want, atol=1e-5):
                bad.append(scale)

    threads = [threading.Thread(target=work, args=(s,)) for s in (1.0, -2.0, 3.0)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not bad


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


@pytest.mark.parametrize("framework", ["numpy", "torch"])
def test_resident_pools_and_snapshots(dev: Any, framework: str) -> None:
    """Against the reference on the host: named rows advance, others keep their bits, skipped ones give zeros."""
    rng = np.random.default_rng(2)
    (q, k, v), gates = tokens(9)
    cu, index = np.array([0, 4, 4, 7, 9]), np.array([3, 0, -1, 5])
    pool, snaps = rng.standard_normal((6, 2, 16, 16), np.float32), np.full((3, 4, 2, 16, 16), 7, np.float32)
    same: Any = torch.from_numpy if framework == "torch" else lambda x: x
    qkv, gates_there = [same(x) for x in (q, k, v)], {n: same(x) for n, x in gates.items()}
    here = gates | {"cu_seqlens": cu, "state_indices": index}
    there = {n: same(x) for n, x in here.items()}

    def close(a: Any, b: Any) -> None:
        assert np.allclose(a, b, rtol=1e-5, atol=1e-5)

    for layout in ("kv", "vk"):
        ref: Any = {"state_layout": layout, "backend": "reference"}
        held, slots = dev.array(pool), dev.array(snaps)
        want_pool, want_slots = pool.copy(), snaps.copy()
        want, want_final = anydelta.gated_delta_rule(q, k, v, **here, initial_state=pool, **ref)
        o, final = anydelta.gated_delta_rule(*qkv, **there, initial_state=held, state_layout=layout)
        close(o, want)
        close(final.numpy(), want_final)
        assert np.array_equal(held.numpy(), pool)
        anydelta.gated_delta_rule_(q, k, v, want_pool, **here, snapshots=want_slots, **ref)
        o = anydelta.gated_delta_rule_(*qkv, held, **there, snapshots=slots, state_layout=layout)
        close(o, want)
        close(held.numpy(), want_pool)
        assert np.array_equal(held.numpy()[[1, 2, 4]], pool[[1, 2, 4]])
        close(slots.numpy(), want_slots)
        # the same states to rows of the pool, and nothing else
        rows = np.array([[3, 9, 9, -1], [-1, 9, 9, 2], [4, 9, 9, 9]])
        held, want_pool = dev.array(pool), pool.copy()
        anydelta.gated_delta_rule_(q, k, v, want_pool, **here, snapshot_indices=rows, **ref)
        anydelta.gated_delta_rule_(*qkv, held, **there, snapshot_indices=same(rows), state_layout=layout)
        close(held.numpy(), want_pool)
        assert np.array_equal(held.numpy()[[0, 1, 5]], pool[[0, 1, 5]])
        # and the final states alone there, beside dense snapshots
        held, want_pool, slots, want_slots = dev.array(pool), pool.copy(), dev.array(snaps), snaps.copy()
        both = {"snapshot_indices": np.array([[1, 9, 9, -1]])}
        anydelta.gated_delta_rule_(q, k, v, want_pool, **here, **both, snapshots=want_slots, **ref)
        both["snapshot_indices"] = same(both["snapshot_indices"])
        anydelta.gated_delta_rule_(*qkv, held, **there, **both, snapshots=slots, state_layout=layout)
        close(held.numpy(), want_pool)
        close(slots.numpy(), want_slots)
        assert not np.array_equal(held.numpy()[1], pool[1])
        assert np.array_equal(held.numpy()[[0, 2, 3, 4, 5]], pool[[0, 2, 3, 4, 5]])
        # a slot of the snapshots as the state of the next call, at an offset of its own
        o, _ = anydelta.gated_delta_rule(*qkv, **gates_there, initial_state=slots[1][:1], state_layout=layout)
        close(o, anydelta.gated_delta_rule(q, k, v, **gates, initial_state=want_slots[1][:1], **ref)[0])
    # the state in the memory of the snapshots
    (q, k, v), gates = tokens(2)
    host = snaps[:2, :1].copy()
    slots = dev.array(host)
    anydelta.gated_delta_rule_(q, k, v, slots[0], **gates, snapshots=slots)
    anydelta.gated_delta_rule_(q, k, v, host[0], **gates, snapshots=host, backend="reference")
    close(slots.numpy(), host)


def test_a_resident_state_stages_the_token_only(dev: Any) -> None:
    check_only_tokens_are_staged(dev, crosses=getattr(dev, "memory", "copy") == "copy")


@cut
def test_a_call_on_the_device_stages_nothing(dev: Any) -> None:
    check_a_call_on_the_device_stages_nothing(dev, dev.array)


def test_ten_thousand_calls_leak_nothing(dev: Any) -> None:
    """10,000 calls after a first thousand, some with a state that is new each time or on the host: 64 KiB of state, so
    that as many lost ones would be 64 MiB or more."""
    (q, k, v), gates = tokens(B=8, HV=4, K=32)
    host = np.zeros((8, 4, 32, 16), np.float32)
    state = dev.array(host)
    every = 1 if dev.kind in CUT else 10

    def held() -> int:
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    for i in range(11_000):
        if i == 1000:
            before = held()
        if i % every == 0:
            anydelta.gated_delta_rule_(q, k, v, host, **gates, backend=dev.kind)
        if i % 10 == 0:
            anydelta.gated_delta_rule(q, k, v, **gates, initial_state=state)
        if i % every:
            anydelta.gated_delta_rule_(q, k, v, state, **gates)
    assert held() - before < (32 << 20 if dev.kind in CUT else 8 << 20)
    assert len(getattr(dev, "launches", ())) < 300


# ---- what goes wrong


def test_an_array_beyond_the_limit_is_one_sentence(dev: Any) -> None:
    limit = dev.most_bytes
    with pytest.raises(
        anydelta.DeviceError, match=f"arrays of at most {limit} bytes, the driver's limit; got"
    ):
        dev.empty((limit // 4 + 1,))


def test_a_call_beyond_the_limit_is_refused_with_the_reason(
    dev: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dev, "most_bytes", 1 << 12)
    (q, k, v), gates = tokens(40)
    state = np.ones((1, 2, 16, 16), np.float32)
    if getattr(dev, "memory", "copy") == "address":  # nothing is allocated for a call
        anydelta.gated_delta_rule_(q, k, v, state, **gates, backend=dev.kind)
        return
    reason = r"its driver takes (inputs|outputs|results) of up to 4096 bytes in a call; got \d+"
    trace = anydelta.explain(q, k, v, **gates, backend=dev.kind)
    assert re.search(f"{dev.kind}: no: {reason}", str(trace))
    with pytest.raises(anydelta.UnsupportedError, match=f"cannot run this call: {reason}"):
        anydelta.gated_delta_rule_(q, k, v, state, **gates, backend=dev.kind)
    assert (state == 1).all()


def test_float64_is_refused_with_the_reason(kind: str) -> None:
    (q, k, v), gates = tokens(H=2, HV=4, K=32)
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    with pytest.raises(anydelta.UnsupportedError, match="takes float32, bfloat16 and float16; got float64"):
        anydelta.gated_delta_rule(q, k, v, **gates, backend=kind)
    doubles = {n: torch.from_numpy(x).double() for n, x in gates.items()}
    o, _ = anydelta.gated_delta_rule(
        *(torch.from_numpy(x).float() for x in (q, k, v)), backend=kind, **doubles
    )
    assert torch.isfinite(o).all()


@pytest.mark.parametrize("name", ["vulkan", "webgpu"])
def test_no_driver_is_one_reason(name: str) -> None:
    if reasons := unavailable(name):
        pytest.skip("; ".join(reasons))
    code = f"import anydelta; anydelta.device('{name}:0')"
    env = os.environ | {"VK_ICD_FILENAMES": os.devnull, "VK_DRIVER_FILES": os.devnull}
    done = subprocess.run([sys.executable, "-c", code], env=env, text=True, capture_output=True)
    assert f"UnsupportedError: device {name}:0: " in done.stderr
    assert "finds no driver" in done.stderr.splitlines()[-1]


@cut
def test_an_unknown_default_lists_those_that_exist(dev: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    env = f"ANYDELTA_{dev.kind.upper()}_DEVICE"
    monkeypatch.setenv(env, "abacus")
    (q, k, v), gates = tokens(H=2, HV=4, K=32)
    with pytest.raises(anydelta.UnsupportedError, match=rf"{env} must be .*; got 'abacus'"):
        anydelta.gated_delta_rule(q, k, v, **gates, backend=dev.kind)


@cut
def test_a_kernel_that_does_not_build_is_one_sentence(dev: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"anydelta.backends.{dev.kind}.device.source", lambda *_: "nonsense")
    built = "programs" if dev.kind == "opencl" else "built"
    monkeypatch.setattr(dev, built, type(getattr(dev, built))())
    state = np.ones((1, 4, 32, 16), np.float32)
    (q, k, v), gates = tokens(H=2, HV=4, K=32)
    with pytest.raises(anydelta.DeviceError, match=r"requires a .*(compiles|builds) delta_rule\.\w+; got .*"):
        anydelta.gated_delta_rule_(q, k, v, state, **gates, backend=dev.kind)
    assert (state == 1).all()
    assert not dev.lost


@cut
def test_what_the_driver_reports_is_one_sentence(
    dev: Any, backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launch for which the driver has no memory, and one that loses the device: the errors are the driver's."""
    full, gone = (dev.errors[0](f"launch failed: {what}") for what in ("OUT_OF_RESOURCES", "DEVICE_LOST"))
    (q, k, v), gates = tokens(H=2, HV=4, K=32)

    def run() -> Any:
        return anydelta.gated_delta_rule(q, k, v, **gates, backend=backend.name)[0]

    def fail(error: Exception) -> Any:
        def launch(*args: Any) -> None:
            raise error

        return launch

    with monkeypatch.context() as m:
        m.setattr(backend, "launch", fail(full))
        with pytest.raises(anydelta.DeviceError, match=r"requires more memory than the driver has .*restore"):
            run()
    assert np.isfinite(run()).all()
    held = dev.zeros((4,))
    try:
        with monkeypatch.context() as m:
            m.setattr(backend, "launch", fail(gone))
            for _ in range(2):
                with pytest.raises(anydelta.DeviceError, match=r"lost \(.*\)\. Its states are invalid"):
                    run()
        with pytest.raises(anydelta.DeviceError, match="is lost"):
            held.numpy()
    finally:
        dev.lost = ""
