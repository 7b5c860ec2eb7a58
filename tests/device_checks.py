"""What the Vulkan, WebGPU, OpenCL and SYCL backends must each show; their own tests call these with a device."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

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


def check_resident_pools_and_snapshots(dev: Any, framework: str) -> None:
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


def check_nothing_leaks(run: Callable[[int], Any], most: int) -> None:
    """10,000 calls `run(i)` after a first thousand let the process grow by less than `most` bytes."""

    def held() -> int:
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    for i in range(11_000):
        if i == 1000:
            before = held()
        run(i)
    assert held() - before < most


def check_host_calls_leak_nothing(backend: str) -> None:
    """Ten thousand calls on arrays of the host: 64 KiB of state, so that as many lost ones would be 640 MiB."""
    (q, k, v), gates = tokens(B=8, HV=4, K=32)
    state = np.zeros((8, 4, 32, 16), np.float32)
    check_nothing_leaks(
        lambda i: anydelta.gated_delta_rule_(q, k, v, state, **gates, backend=backend), most=32 << 20
    )


def check_a_large_array_is_refused(dev: Any, limit: int) -> None:
    with pytest.raises(
        anydelta.DeviceError, match=f"arrays of at most {limit} bytes, the driver's limit; got"
    ):
        dev.empty((limit // 4 + 1,))


def check_a_kernel_that_does_not_build(backend: str, dev: Any, compiler: str) -> None:
    """The caller has made the kernel's text nonsense."""
    state = np.ones((1, 4, 32, 16), np.float32)
    (q, k, v), gates = tokens(H=2, HV=4, K=32)
    with pytest.raises(anydelta.DeviceError, match=f"requires a {compiler}; got .*"):
        anydelta.gated_delta_rule_(q, k, v, state, **gates, backend=backend)
    assert (state == 1).all()
    assert not dev.lost


def check_driver_errors(
    backend: Any, dev: Any, monkeypatch: pytest.MonkeyPatch, full: Exception, gone: Exception
) -> None:
    """A launch for which the driver has no memory, and one that loses the device: the errors are the driver's."""
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


def check_threads_take_turns(backend: str) -> None:
    (q, k, v), gates = tokens(5)
    want, _ = anydelta.gated_delta_rule(q, k, v, **gates, backend=backend)
    bad = []

    def work(scale: float) -> None:
        for _ in range(50):
            o, _ = anydelta.gated_delta_rule(scale * q, k, v, **gates, backend=backend)
            if not np.allclose(o, scale * want, atol=1e-5):
                bad.append(scale)

    threads = [threading.Thread(target=work, args=(s,)) for s in (1.0, -2.0, 3.0)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not bad


def check_resident_calls_leak_nothing(dev: Any, backend: str) -> None:
    """Ten thousand calls on a state of the device, some with a state that is new each time or on the host."""
    (q, k, v), gates = tokens()
    state, host = dev.zeros((1, 2, 16, 16)), np.zeros((1, 2, 16, 16), np.float32)

    def run(i: int) -> None:
        anydelta.gated_delta_rule_(q, k, v, state, **gates)
        if i % 10 == 0:
            anydelta.gated_delta_rule(q, k, v, **gates, initial_state=state)
            anydelta.gated_delta_rule_(q, k, v, host, **gates, backend=backend)

    check_nothing_leaks(run, most=8 << 20)
    assert len(dev.launches) < 300
