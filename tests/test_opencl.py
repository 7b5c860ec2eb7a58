"""OpenCL alone: sizes of sub-groups, arrays of pyopencl, drivers. Shared tests: test_every_device.py."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import anydelta
from anydelta.backends.opencl import device as opencl_device
from anydelta.backends.opencl import host as opencl
from anydelta.backends.opencl.device import OpenclDevice, roster
from anydelta.conformance.run import unavailable
from conftest import FOR_DEVICES
from device_checks import check_a_call_on_the_device_stages_nothing, failures, tokens

REASONS = unavailable("opencl")
if REASONS:
    pytest.skip("; ".join(REASONS), allow_module_level=True)

pytestmark = pytest.mark.usefixtures("fresh_plans")


def label(index: int) -> str:
    return opencl_device.label_of(opencl_device.found()[index])[-30:]


@pytest.fixture(params=range(len(opencl_device.found())), ids=label)
def device(request: Any, monkeypatch: pytest.MonkeyPatch) -> OpenclDevice:
    """Each device in turn, as the one where host arrays run."""
    monkeypatch.setenv("ANYDELTA_OPENCL_DEVICE", str(request.param))
    return roster.open(request.param)


@pytest.mark.parametrize(("size", "lanes"), [(4, 4), (8, 8), (32, 8), (64, 16)])
def test_any_subgroup_size(size: int, lanes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    device = roster.default()
    if "subgroups" not in device.kernels():
        pytest.skip(f"{device.description} has no sub-groups whose size can be pinned")
    usual = OpenclDevice.variant

    def other(self: OpenclDevice, spec: Any) -> Any:
        cut = replace(usual(self, spec)[0], SG=size, LANES=lanes)
        return cut, -(-spec.V // cut.columns) * spec.HV * spec.N

    monkeypatch.setattr(OpenclDevice, "variant", other)
    rule = replace(FOR_DEVICES[0], H=2, HV=4, K=32, V=24, T=9, kda=True, snapshots=3, l2norm=True)
    assert not failures("opencl", (rule, replace(rule, mask="random", B=2, dtype="bfloat16")), "subgroups")


def test_pyopencl_arrays_are_states(device: OpenclDevice) -> None:
    cl = pytest.importorskip("pyopencl")
    from pyopencl import array

    context = cl.Context([device.cl_device])
    queue = cl.CommandQueue(context)
    host = np.random.default_rng(2).standard_normal((2, 4, 32, 16), np.float32)
    mine = array.to_device(queue, np.concatenate([np.zeros_like(host), host]))[2:]  # an offset
    (q, k, v), gates = tokens(3, B=2, H=2, HV=4, K=32)
    o = anydelta.gated_delta_rule_(q, k, v, opencl.from_pyopencl(mine), **gates)
    want = anydelta.gated_delta_rule_(q, k, v, host, **gates, backend="reference")
    assert np.allclose(o, want, atol=1e-5)
    assert np.allclose(mine.get(), host, atol=1e-5)
    _, final = anydelta.gated_delta_rule(q, k, v, initial_state=opencl.from_pyopencl(mine), **gates)
    assert np.array_equal(opencl.to_pyopencl(final).get(), final.numpy())
    assert np.array_equal(opencl.to_pyopencl(device.array(host)).get(), host)
    there = opencl.from_pyopencl(mine).device
    o, want = check_a_call_on_the_device_stages_nothing(
        there, lambda x: opencl.from_pyopencl(array.to_device(queue, x))
    )
    assert np.allclose(opencl.to_pyopencl(o).get(), want, atol=1e-5)
    with pytest.raises(ValueError, match="from_pyopencl requires a C-contiguous array"):
        opencl.from_pyopencl(mine[:, ::2])


# ---- what goes wrong


def test_without_pyopencl_or_a_driver_there_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    opencl_device.api.cache_clear()
    with monkeypatch.context() as m:
        m.setitem(sys.modules, "pyopencl", None)
        assert "pip install pyopencl" in str(opencl.BACKEND.available()[0])
    opencl_device.api.cache_clear()
    monkeypatch.setattr(opencl, "found", lambda: ())
    assert "pip install intel-opencl-rt" in str(opencl.BACKEND.available()[0])


@pytest.mark.skipif(importlib.util.find_spec("pyopencl") is None, reason="pyopencl is not installed")
def test_intels_runtime_is_found_without_an_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    library = opencl_device.intel_runtime()
    if library is None:
        pytest.skip("intel-opencl-rt is not installed")
    assert library.name.startswith("libintelocl.so")
    assert any("Intel" in d.platform.name for d in opencl_device.found())
