"""The WebGPU backend: the whole list, every way through its code, its errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import anydelta
from anydelta.conformance.run import unavailable
from anydelta.core import devices
from conftest import FOR_DEVICES
from device_checks import (
    check_a_lost_device_voids_its_states,
    check_only_tokens_are_staged,
    failures,
    tokens,
)

if REASONS := unavailable("webgpu"):
    pytest.skip("; ".join(REASONS), allow_module_level=True)

from anydelta.backends.webgpu.device import WebGPUDevice, adapters, wgpu

pytestmark = pytest.mark.usefixtures("fresh_plans")
SOME = tuple(c for c in FOR_DEVICES if c.K in (32, 64) and c.work < 200_000)[::6]


@pytest.fixture
def dev() -> Any:
    return anydelta.device("webgpu:0")


@pytest.fixture
def copying(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A second webgpu:0 that goes through copies, as devices with memory of their own do."""
    device = WebGPUDevice(0, adapters()[0], copies=True)
    assert not device.unified
    monkeypatch.setattr(devices, "_open", {**devices._open, "webgpu:0": device})
    return device


def test_without_subgroups(dev: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dev, "subgroup", 0)
    assert not failures("webgpu", SOME)


def test_lanes_as_on_a_gpu(dev: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dev, "is_cpu", False)
    assert not failures("webgpu", [c for c in SOME if c.K == 32][:12])


def test_without_unified_memory(copying: Any) -> None:
    assert not failures("webgpu", SOME)
    check_only_tokens_are_staged(copying)


# ---- errors


def test_half_typed_states_stay_on_the_host(dev: Any) -> None:
    (q, k, v), gates = tokens()
    with pytest.raises(
        anydelta.UnsupportedError, match=r"keeps states in float32 on its device.*got bfloat16"
    ):
        anydelta.gated_delta_rule_(q, k, v, dev.zeros((1, 2, 16, 16), "bfloat16"), **gates)


def test_what_the_driver_refuses_is_raised(dev: Any) -> None:
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
    check_a_lost_device_voids_its_states(copying, copying.handle.destroy)
