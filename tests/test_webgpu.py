"""The WebGPU backend: the whole list, every way through its code, its errors."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import anydelta
from anydelta.conformance import SHORT_CASES
from anydelta.conformance.run import unavailable
from anydelta.core import devices, plans
from device_checks import (
    check_only_tokens_are_staged,
    check_resident_calls_leak_nothing,
    check_resident_pools_and_snapshots,
    failures,
    tokens,
)

REASONS = unavailable("webgpu")
pytestmark = pytest.mark.skipif(bool(REASONS), reason="; ".join(REASONS) or "runs")
SOME = tuple(c for c in SHORT_CASES if c.K in (32, 64) and c.work < 200_000)[::6]


@pytest.fixture
def dev() -> Any:
    return anydelta.device("webgpu:0")


@pytest.fixture
def copying(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A second webgpu:0 that goes through copies, as devices with memory of their own do."""
    from anydelta.backends.webgpu import device as webgpu_device

    device = webgpu_device.WebGPUDevice(0, webgpu_device.adapters()[0], copies=True)
    assert not device.unified
    monkeypatch.setattr(devices, "_open", {**devices._open, "webgpu:0": device})
    plans.forget()
    yield device
    plans.forget()


@pytest.mark.parametrize("part", range(4))
def test_the_whole_list(part: int) -> None:
    assert not failures("webgpu", SHORT_CASES[part::4], framework="torch" if part == 3 else "numpy")


def test_without_subgroups(dev: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dev, "subgroup", 0)
    plans.forget()
    assert not failures("webgpu", SOME)
    plans.forget()


def test_lanes_as_on_a_gpu(dev: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dev, "is_cpu", False)
    plans.forget()
    assert not failures("webgpu", [c for c in SOME if c.K == 32][:12])
    plans.forget()


def test_without_unified_memory(copying: Any) -> None:
    assert not failures("webgpu", SOME)
    check_only_tokens_are_staged(copying)


@pytest.mark.parametrize("framework", ["numpy", "torch"])
def test_resident_pools_and_snapshots(dev: Any, framework: str) -> None:
    check_resident_pools_and_snapshots(dev, framework)


def test_a_resident_decode_stages_only_its_tokens(dev: Any) -> None:
    check_only_tokens_are_staged(dev)


def test_nothing_leaks_over_ten_thousand_calls(dev: Any) -> None:
    check_resident_calls_leak_nothing(dev, "webgpu")


# ---- errors


def test_refusals(dev: Any) -> None:
    (q, k, v), gates = tokens()
    with pytest.raises(anydelta.UnsupportedError, match=r"keeps float32 states on its device.*got bfloat16"):
        anydelta.gated_delta_rule_(q, k, v, dev.zeros((1, 2, 16, 16), "bfloat16"), **gates)
    with pytest.raises(anydelta.DeviceError, match=r"webgpu:0 requires arrays of at most \d+ bytes"):
        dev.empty((dev.most_bytes // 4 + 1,))


def test_what_the_driver_refuses_is_raised(dev: Any) -> None:
    import wgpu

    (q, k, v), gates = tokens(seed=3)
    state = dev.zeros((1, 2, 16, 16))
    want = anydelta.gated_delta_rule_(q, k, v, state, **gates)
    launch = next(reversed(dev.launches._kept.values()))
    grid, launch.grid = launch.grid, (2**31, 1, 1)
    with pytest.raises(wgpu.GPUValidationError, match="group size"):
        anydelta.gated_delta_rule_(q, k, v, state, **gates)
    launch.grid = grid
    state.zero()
    assert np.array_equal(anydelta.gated_delta_rule_(q, k, v, state, **gates), want)


def test_out_of_memory_leaves_the_states(dev: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import wgpu

    (q, k, v), gates = tokens()
    state = dev.array(np.ones((1, 2, 16, 16), np.float32))

    def full(*args: Any, **kwargs: Any) -> None:
        raise wgpu.GPUOutOfMemoryError("full")

    want = r"webgpu:0 requires more memory for .*; got an out-of-memory error.*States are as they were"
    with monkeypatch.context() as m:
        m.setattr(type(dev.handle), "create_buffer", full)
        with pytest.raises(anydelta.DeviceError, match=want):
            dev.zeros((4,))
    with monkeypatch.context() as m:
        m.setattr(type(dev._calls), "_raise", full)
        with pytest.raises(anydelta.DeviceError, match=want):
            anydelta.gated_delta_rule_(q, k, v, state, **gates)
    assert (state.numpy() == 1).all()
    anydelta.gated_delta_rule_(q, k, v, state, **gates)
    assert (state.numpy() != 1).any()


def test_a_lost_device_voids_its_states(copying: Any) -> None:
    """Lost in earnest: WebGPU has a call for it."""
    state = copying.zeros((1, 2, 16, 16))
    (q, k, v), gates = tokens()
    anydelta.gated_delta_rule_(q, k, v, state, **gates)
    copying.handle.destroy()
    for _ in range(2):
        with pytest.raises(
            anydelta.DeviceError, match=r"is lost \(while running the operator\).*states are invalid"
        ):
            anydelta.gated_delta_rule_(q, k, v, state, **gates)
    with pytest.raises(anydelta.DeviceError, match="is lost"):
        state.numpy()


def test_no_driver_is_one_reason() -> None:
    code = "import anydelta; anydelta.device('webgpu:0')"
    env = os.environ | {"VK_ICD_FILENAMES": os.devnull, "VK_DRIVER_FILES": os.devnull}
    done = subprocess.run([sys.executable, "-c", code], env=env, text=True, capture_output=True)
    assert "UnsupportedError: device webgpu:0: wgpu-native finds no driver" in done.stderr
