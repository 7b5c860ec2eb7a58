"""The WebGPU backend: the whole list, both ways of adding up, resident states, its refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import anydelta
from anydelta import op
from anydelta.conformance import CASES, OK, Case, Target
from anydelta.conformance.run import run_one, unavailable

REASONS = unavailable("webgpu")
pytestmark = pytest.mark.skipif(bool(REASONS), reason="; ".join(REASONS) or "runs")


def failures(cases: tuple[Case, ...], framework: str = "numpy") -> list[str]:
    bad = [r for c in cases if (r := run_one(c, Target("webgpu", framework=framework))).status != OK]
    return [f"{r.status}: {r.reproduce()}: {'; '.join(r.reasons)}" for r in bad]


@pytest.mark.parametrize("part", range(4))
def test_the_whole_list(part: int) -> None:
    assert not failures(CASES[part::4], "torch" if part == 3 else "numpy")


def test_without_subgroups(monkeypatch: pytest.MonkeyPatch) -> None:
    dev: Any = anydelta.device("webgpu:0")
    monkeypatch.setattr(dev, "subgroup", 0)
    monkeypatch.setattr(dev, "pipelines", {})
    op._plans.clear()
    assert not failures(tuple(c for c in CASES if c.K in (32, 64) and c.work < 200_000)[::6])
    op._plans.clear()


def tokens(T: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    rng = np.random.default_rng(T)
    q, k = 0.3 * rng.standard_normal((2, 1, T, 1, 16), np.float32)
    v = rng.standard_normal((1, T, 2, 16), np.float32)
    return (q, k, v), {"g": -rng.random((1, T, 2), np.float32), "beta": rng.random((1, T, 2), np.float32)}


def test_resident_pools_and_snapshots() -> None:
    """Against the reference on the host: functional, in place, snapshots dense and in rows of the pool."""
    dev = anydelta.device("webgpu:0")
    rng = np.random.default_rng(2)
    qkv, gates = tokens(9)
    rest = gates | {"cu_seqlens": np.array([0, 4, 4, 7, 9]), "state_indices": np.array([3, 0, -1, 5])}
    pool, snaps = rng.standard_normal((6, 2, 16, 16), np.float32), np.full((3, 4, 2, 16, 16), 7, np.float32)
    there, slots, want_pool, want_slots = dev.array(pool), dev.array(snaps), pool.copy(), snaps.copy()
    want, want_final = anydelta.gated_delta_rule(*qkv, **rest, initial_state=pool, backend="reference")
    o, final = anydelta.gated_delta_rule(*qkv, **rest, initial_state=there)
    assert np.allclose(o, want, atol=1e-5)
    assert np.allclose(final.numpy(), want_final, atol=1e-5)
    assert np.array_equal(there.numpy(), pool)
    anydelta.gated_delta_rule_(*qkv, want_pool, **rest, snapshots=want_slots, backend="reference")
    o = anydelta.gated_delta_rule_(*qkv, there, **rest, snapshots=slots)
    assert np.allclose(o, want, atol=1e-5)
    assert np.allclose(there.numpy(), want_pool, atol=1e-5)
    assert np.array_equal(there.numpy()[[1, 2, 4]], pool[[1, 2, 4]])
    assert np.allclose(slots.numpy(), want_slots, atol=1e-5)
    rows = np.array([[3, 9, 9, 5], [1, 9, 9, 2], [4, 9, 9, 9]])
    there, want_pool = dev.array(pool), pool.copy()
    anydelta.gated_delta_rule_(*qkv, want_pool, **rest, snapshot_indices=rows, backend="reference")
    anydelta.gated_delta_rule_(*qkv, there, **rest, snapshot_indices=rows)
    assert np.allclose(there.numpy(), want_pool, atol=1e-5)
    # the state in the memory of the snapshots
    one, gates = tokens(2)
    slots = dev.array(snaps[:2, :1])
    anydelta.gated_delta_rule_(*one, slots[0], **gates, snapshots=slots)
    host = snaps[:2, :1].copy()
    anydelta.gated_delta_rule_(*one, host[0], **gates, snapshots=host, backend="reference")
    assert np.allclose(slots.numpy(), host, rtol=1e-5, atol=1e-5)


def test_a_resident_decode_stages_only_its_tokens() -> None:
    dev = anydelta.device("webgpu:0")
    (q, k, v), gates = tokens(1)
    gates = {n: np.repeat(x, 2, 2) for n, x in gates.items()}
    v = np.repeat(v, 2, 2)
    state = dev.zeros((1, 4, 16, 16))
    before = (dev.staged.to_device, dev.staged.from_device)
    o = anydelta.gated_delta_rule_(q, k, v, state, **gates)
    staged = (dev.staged.to_device - before[0], dev.staged.from_device - before[1])
    assert staged == (sum(x.nbytes for x in (q, k, v, *gates.values())), o.nbytes)


def test_refusals() -> None:
    dev: Any = anydelta.device("webgpu:0")
    (q, k, v), gates = tokens(1)
    with pytest.raises(anydelta.UnsupportedError, match=r"keeps float32 states on its device.*got bfloat16"):
        anydelta.gated_delta_rule_(q, k, v, dev.zeros((1, 2, 16, 16), "bfloat16"), **gates)
    with pytest.raises(anydelta.DeviceError, match=r"webgpu:0 requires arrays of at most \d+ bytes"):
        dev.empty((dev.max_range // 4 + 1,))
    with pytest.raises(
        anydelta.UnsupportedError, match=r"device webgpu:99: the drivers here offer webgpu:0 \("
    ):
        anydelta.device("webgpu:99")
