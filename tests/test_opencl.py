"""The OpenCL backend on every driver that is installed: each way to cut the kernel, each way to reach memory."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import anydelta
from anydelta.backends.opencl import device as opencl_device
from anydelta.backends.opencl import host as opencl
from anydelta.backends.opencl.device import MEMORIES, OpenclDevice, roster
from anydelta.conformance import SHORT_CASES
from anydelta.conformance.run import unavailable
from device_checks import (
    check_a_call_on_the_device_stages_nothing,
    check_a_kernel_that_does_not_build,
    check_a_large_array_is_refused,
    check_driver_errors,
    check_host_calls_leak_nothing,
    check_only_tokens_are_staged,
    check_resident_pools_and_snapshots,
    failures,
    tokens,
)

REASONS = unavailable("opencl")
if REASONS:
    pytest.skip("; ".join(REASONS), allow_module_level=True)

pytestmark = pytest.mark.usefixtures("fresh_plans")
DEVICES = range(len(opencl_device.found()))
WAYS = [(i, memory) for i in DEVICES for memory in roster.open(i).memories]
BATCH = 110


def label(index: int) -> str:
    return opencl_device.label_of(opencl_device.found()[index])[-30:]


@pytest.fixture(params=DEVICES, ids=label)
def device(request: Any, monkeypatch: pytest.MonkeyPatch) -> OpenclDevice:
    """Each device in turn, as the one where host arrays run."""
    monkeypatch.setenv("ANYDELTA_OPENCL_DEVICE", str(request.param))
    return roster.open(request.param)


@pytest.mark.parametrize("start", range(0, len(SHORT_CASES), BATCH))
def test_every_case(start: int) -> None:
    assert not failures("opencl", SHORT_CASES[start : start + BATCH])


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
    rule = replace(SHORT_CASES[0], H=2, HV=4, K=32, V=24, T=9, kda=True, snapshots=3, l2norm=True)
    assert not failures("opencl", (rule, replace(rule, mask="random", B=2, dtype="bfloat16")), "subgroups")


@pytest.fixture(params=WAYS, ids=lambda way: f"{label(way[0])} {way[1]}")
def way(request: Any, monkeypatch: pytest.MonkeyPatch) -> OpenclDevice:
    """Each way to reach the memory of each device."""
    index, memory = request.param
    monkeypatch.setenv("ANYDELTA_OPENCL_DEVICE", str(index))
    monkeypatch.setattr(roster.open(index), "memory", memory)
    return roster.open(index)


def test_every_cut_and_memory(way: OpenclDevice) -> None:
    few = [c for c in SHORT_CASES if 9 <= c.K <= 32 and c.V <= 32]  # one or two builds per cut
    for i, kernel in enumerate(way.kernels()):
        cases = few[3 * i + MEMORIES.index(way.memory) :: 40]
        assert not failures("opencl", cases, kernel, "torch" if i % 2 else "numpy")


@pytest.mark.parametrize("framework", ["numpy", "torch"])
def test_resident_pools_and_snapshots(way: OpenclDevice, framework: str) -> None:
    check_resident_pools_and_snapshots(way, framework)


def test_a_resident_state_stages_the_token_only(way: OpenclDevice) -> None:
    check_only_tokens_are_staged(way, crosses=way.memory == "copy")


@pytest.mark.parametrize("memory", roster.open(0).memories)
def test_ten_thousand_calls_leak_nothing(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roster.default(), "memory", memory)
    check_host_calls_leak_nothing("opencl")


def test_a_call_on_the_device_stages_nothing(way: OpenclDevice) -> None:
    check_a_call_on_the_device_stages_nothing(way, way.array)


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


def test_an_unknown_default_lists_those_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANYDELTA_OPENCL_DEVICE", "abacus")
    (q, k, v), gates = tokens(H=2, HV=4, K=32)
    with pytest.raises(anydelta.UnsupportedError, match=r"ANYDELTA_OPENCL_DEVICE must be .*; got 'abacus'"):
        anydelta.gated_delta_rule(q, k, v, **gates, backend="opencl")


def test_without_pyopencl_or_a_driver_there_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    opencl_device.api.cache_clear()
    with monkeypatch.context() as m:
        m.setitem(sys.modules, "pyopencl", None)
        assert "pip install pyopencl" in str(opencl.BACKEND.available()[0])
    opencl_device.api.cache_clear()
    monkeypatch.setattr(opencl, "found", lambda: ())
    assert "pip install intel-opencl-rt" in str(opencl.BACKEND.available()[0])


def test_memory_beyond_the_limit_is_one_sentence(device: OpenclDevice) -> None:
    check_a_large_array_is_refused(device, device.cl_device.max_mem_alloc_size)


def test_a_kernel_that_does_not_build_is_one_sentence(
    device: OpenclDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opencl_device, "source", lambda *_: "kernel void by_address(nonsense x) {}")
    monkeypatch.setattr(device, "programs", {})
    check_a_kernel_that_does_not_build("opencl", device, "driver that compiles delta_rule.cl")


def test_what_the_driver_reports_is_one_sentence(
    device: OpenclDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    cl = opencl_device.api()
    full = cl.MemoryError("clEnqueueNDRangeKernel failed: OUT_OF_RESOURCES")
    gone = cl.RuntimeError("clEnqueueNDRangeKernel failed: INVALID_COMMAND_QUEUE")
    check_driver_errors(opencl.BACKEND, device, monkeypatch, full, gone)


def test_float64_is_refused_with_the_reason() -> None:
    (q, k, v), gates = tokens(H=2, HV=4, K=32)
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    with pytest.raises(anydelta.UnsupportedError, match="takes float32, bfloat16 and float16; got float64"):
        anydelta.gated_delta_rule(q, k, v, **gates, backend="opencl")
    o, _ = anydelta.gated_delta_rule(*(torch.from_numpy(x).float() for x in (q, k, v)), backend="opencl",
                                     **{n: torch.from_numpy(x).double() for n, x in gates.items()})  # fmt: skip
    assert torch.isfinite(o).all()


@pytest.mark.skipif(importlib.util.find_spec("pyopencl") is None, reason="pyopencl is not installed")
def test_intels_runtime_is_found_without_an_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    library = opencl_device.intel_runtime()
    if library is None:
        pytest.skip("intel-opencl-rt is not installed")
    assert library.name.startswith("libintelocl.so")
    assert any("Intel" in d.platform.name for d in opencl_device.found())
