"""The OpenCL backend on every driver that is installed: each way to cut the kernel, each way to reach memory."""

from __future__ import annotations

import gc
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import anydelta
from anydelta import op
from anydelta.backends import opencl
from anydelta.conformance import CASES, OK, Case, Target
from anydelta.conformance.run import run_one, unavailable

REASONS = unavailable("opencl")
if REASONS:
    pytest.skip("; ".join(REASONS), allow_module_level=True)

DEVICES = range(len(opencl._found()))
BATCH = 110


@pytest.fixture(autouse=True)
def fresh_plans() -> Iterator[None]:
    """Plans remember the device and the cut."""
    op._plans.clear()
    yield
    op._plans.clear()


@pytest.fixture(params=DEVICES, ids=lambda i: opencl._label(opencl._found()[i])[-30:])
def device(request: Any, monkeypatch: pytest.MonkeyPatch) -> opencl.OpenclDevice:
    """Each device in turn, as the one where host arrays run."""
    monkeypatch.setenv(opencl.DEVICE_ENV, str(request.param))
    return opencl.open_device(request.param)


def failures(cases: tuple[Case, ...], kernel: str | None = None, framework: str = "numpy") -> str:
    results = [run_one(c, Target("opencl", kernel, framework)) for c in cases]
    return "\n".join(f"{r.status}: {r.case}: {'; '.join(r.reasons)}" for r in results if r.status != OK)


@pytest.mark.parametrize("start", range(0, len(CASES), BATCH))
def test_every_case(start: int) -> None:
    assert not failures(CASES[start : start + BATCH])


@pytest.mark.parametrize("memory", opencl.MEMORIES)
def test_every_cut_and_memory(
    device: opencl.OpenclDevice, memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if memory == "address" and device.memory != "address":
        pytest.skip(f"{device.description} does not see the host's memory as it is")
    monkeypatch.setattr(device, "memory", memory)
    few = [c for c in CASES if 9 <= c.K <= 32 and c.V <= 32]  # one or two builds per cut
    for i, kernel in enumerate(device.kernels()):
        cases = tuple(few[3 * i + opencl.MEMORIES.index(memory) :: 40])
        assert not failures(cases, kernel, "torch" if i % 2 else "numpy")


@pytest.mark.parametrize(("size", "lanes"), [(4, 4), (8, 8), (32, 8), (64, 16)])
def test_any_subgroup_size(size: int, lanes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    device = opencl.default_device()
    if "subgroups" not in device.kernels():
        pytest.skip(f"{device.description} has no sub-groups whose size can be pinned")
    usual = opencl.OpenclDevice.variant
    monkeypatch.setattr(
        opencl.OpenclDevice, "variant", lambda self, spec: replace(usual(self, spec), SG=size, LANES=lanes)
    )
    rule = replace(CASES[0], H=2, HV=4, K=32, V=24, T=9, kda=True, snapshots=3, l2norm=True)
    assert not failures((rule, replace(rule, mask="random", B=2, dtype="bfloat16")), "subgroups")


def tokens(T: int, seed: int = 0, B: int = 1, H: int = 2, HV: int = 4, K: int = 32, V: int = 16) -> Any:
    rng = np.random.default_rng(seed)
    q, k = 0.2 * rng.standard_normal((2, B, T, H, K), np.float32)
    v = rng.standard_normal((B, T, HV, V), np.float32)
    g, beta = rng.random((2, B, T, HV), np.float32)
    return (q, k, v), {"g": -g, "beta": beta}


@pytest.mark.parametrize("memory", opencl.MEMORIES)
def test_a_resident_state_stages_the_token_only(
    device: opencl.OpenclDevice, memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if memory == "address" and device.memory != "address":
        pytest.skip(f"{device.description} does not see the host's memory as it is")
    monkeypatch.setattr(device, "memory", memory)
    there = anydelta.device(device.name)
    assert there is device
    rng = np.random.default_rng(1)
    host = rng.standard_normal((5, 4, 32, 16), np.float32)
    state, snapshots = there.array(host), there.zeros((2, 1, 4, 32, 16))
    indices = np.array([3], np.int32)
    before = replace(there.staged)
    for step in range(3):
        (q, k, v), gates = tokens(1 + step, step)
        o = anydelta.gated_delta_rule_(q, k, v, state, **gates, state_indices=indices, snapshots=snapshots)
        want = anydelta.gated_delta_rule_(q, k, v, host, **gates, state_indices=indices, backend="reference")
        assert np.allclose(o, want, atol=1e-5)
        crossed = there.staged.to_device - before.to_device, there.staged.from_device - before.from_device
        inputs = sum(x.nbytes for x in (q, k, v, gates["g"], gates["beta"], indices))
        assert crossed == ((inputs, o.nbytes) if memory == "copy" else (0, 0))
        before = replace(there.staged)
    assert np.allclose(state.numpy(), host, atol=1e-5)
    assert np.allclose(snapshots[0].numpy()[0], host[3], atol=1e-5)
    assert np.allclose(there.empty((2, 3)).copy().shape, (2, 3))


@pytest.mark.parametrize("memory", opencl.MEMORIES)
def test_ten_thousand_calls_leak_nothing(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device = opencl.default_device()
    if memory == "address" and device.memory != "address":
        pytest.skip(f"{device.description} does not see the host's memory as it is")
    monkeypatch.setattr(device, "memory", memory)
    (q, k, v), gates = tokens(
        1, B=8
    )  # 64 KiB of state and more of the rest: 10,000 lost ones would be 640 MiB
    state = np.zeros((8, 4, 32, 16), np.float32)

    def resident() -> int:
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    for call in range(11_000):
        if call == 1_000:
            before = resident()
        anydelta.gated_delta_rule_(q, k, v, state, **gates, backend="opencl")
    assert resident() - before < 32 << 20


def test_pyopencl_arrays_are_states(device: opencl.OpenclDevice) -> None:
    cl = pytest.importorskip("pyopencl")
    from pyopencl import array

    context = cl.Context([device.cl_device])
    queue = cl.CommandQueue(context)
    host = np.random.default_rng(2).standard_normal((2, 4, 32, 16), np.float32)
    mine = array.to_device(queue, np.concatenate([np.zeros_like(host), host]))[2:]  # an offset
    (q, k, v), gates = tokens(3, B=2)
    o = anydelta.gated_delta_rule_(q, k, v, opencl.from_pyopencl(mine), **gates)
    want = anydelta.gated_delta_rule_(q, k, v, host, **gates, backend="reference")
    assert np.allclose(o, want, atol=1e-5)
    assert np.allclose(mine.get(), host, atol=1e-5)
    _, final = anydelta.gated_delta_rule(q, k, v, initial_state=opencl.from_pyopencl(mine), **gates)
    assert np.array_equal(opencl.to_pyopencl(final).get(), final.numpy())
    assert np.array_equal(opencl.to_pyopencl(device.array(host)).get(), host)
    with pytest.raises(ValueError, match="from_pyopencl requires a C-contiguous array"):
        opencl.from_pyopencl(mine[:, ::2])


# ---- what goes wrong


def test_a_missing_device_lists_those_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(anydelta.UnsupportedError, match="no such OpenCL device; there are opencl:0 "):
        anydelta.device("opencl:99")
    monkeypatch.setenv(opencl.DEVICE_ENV, "abacus")
    (q, k, v), gates = tokens(1)
    with pytest.raises(anydelta.UnsupportedError, match=r"ANYDELTA_OPENCL_DEVICE must be .*; got 'abacus'"):
        anydelta.gated_delta_rule(q, k, v, **gates, backend="opencl")


def test_without_pyopencl_or_a_driver_there_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    opencl._cl.cache_clear()
    with monkeypatch.context() as m:
        m.setitem(sys.modules, "pyopencl", None)
        assert "pip install pyopencl" in str(opencl.BACKEND.available()[0])
    opencl._cl.cache_clear()
    monkeypatch.setattr(opencl, "_found", lambda: ())
    assert "pip install intel-opencl-rt" in str(opencl.BACKEND.available()[0])


def test_memory_beyond_the_limit_is_one_sentence(device: opencl.OpenclDevice) -> None:
    limit = device.cl_device.max_mem_alloc_size
    with pytest.raises(
        anydelta.DeviceError, match=f"arrays of at most {limit} bytes, the driver's limit; got"
    ):
        device.empty((limit // 4 + 1,))


def test_a_kernel_that_does_not_build_is_one_sentence(
    device: opencl.OpenclDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opencl, "_source", lambda: "kernel void by_address(nonsense x) {}")
    monkeypatch.setattr(device, "programs", {})
    state = np.ones((1, 4, 32, 16), np.float32)
    (q, k, v), gates = tokens(1)
    with pytest.raises(
        anydelta.DeviceError, match=r"requires a driver that compiles delta_rule.cl; got .*BUILD"
    ):
        anydelta.gated_delta_rule_(q, k, v, state, **gates, backend="opencl")
    assert (state == 1).all()


def test_a_lost_device_refuses_from_then_on(
    device: opencl.OpenclDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    cl = opencl._cl()

    def dies(*args: Any) -> None:
        raise cl.RuntimeError("clEnqueueNDRangeKernel", cl.status_code.INVALID_COMMAND_QUEUE, "gone")

    monkeypatch.setattr(opencl, "_launch", dies)
    (q, k, v), gates = tokens(1)
    try:
        for _ in range(2):
            with pytest.raises(
                anydelta.DeviceError, match=r"got one that is lost \(.*\)\. Its states are invalid"
            ):
                anydelta.gated_delta_rule(q, k, v, **gates, backend="opencl")
    finally:
        device.lost = ""


def test_the_host_is_preferred_on_the_host() -> None:
    (q, k, v), gates = tokens(1)
    assert anydelta.explain(q, k, v, **gates).chosen != "opencl"
    assert anydelta.explain(q, k, v, **gates, backend="opencl").chosen == "opencl"


def test_float64_is_refused_with_the_reason() -> None:
    (q, k, v), gates = tokens(1)
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    with pytest.raises(anydelta.UnsupportedError, match="takes float32, bfloat16 and float16; got float64"):
        anydelta.gated_delta_rule(q, k, v, **gates, backend="opencl")
    o, _ = anydelta.gated_delta_rule(*(torch.from_numpy(x).float() for x in (q, k, v)), backend="opencl",
                                     **{n: torch.from_numpy(x).double() for n, x in gates.items()})  # fmt: skip
    assert torch.isfinite(o).all()


@pytest.mark.skipif(importlib.util.find_spec("pyopencl") is None, reason="pyopencl is not installed")
def test_intels_runtime_is_found_without_an_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    library = opencl.intel_runtime()
    if library is None:
        pytest.skip("intel-opencl-rt is not installed")
    assert library.name.startswith("libintelocl.so")
    assert any("Intel" in d.platform.name for d in opencl._found())
