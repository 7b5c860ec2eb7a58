"""The SYCL backend on the CPU device of intel-opencl-rt: each cut of the kernel, each way to reach memory."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import anydelta
from anydelta import op
from anydelta.backends import params, sycl
from anydelta.conformance import CASES, OK, Case, Target
from anydelta.conformance.run import run_one, unavailable

REASONS = unavailable("sycl")
if REASONS:
    pytest.skip("; ".join(REASONS), allow_module_level=True)

BATCH = 110


@pytest.fixture(autouse=True)
def fresh_plans() -> Iterator[None]:
    """Plans remember the device and the cut."""
    op._plans.clear()
    yield
    op._plans.clear()


@pytest.fixture(params=sycl.MEMORIES)
def memory(request: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(sycl.default_device(), "memory", request.param)
    return str(request.param)


def failures(cases: tuple[Case, ...], kernel: str | None = None, framework: str = "numpy") -> str:
    results = [run_one(c, Target("sycl", kernel, framework)) for c in cases]
    return "\n".join(f"{r.status}: {r.case}: {'; '.join(r.reasons)}" for r in results if r.status != OK)


@pytest.mark.parametrize("start", range(0, len(CASES), BATCH))
def test_every_case(start: int) -> None:
    assert not failures(CASES[start : start + BATCH])


def test_every_cut_and_memory(memory: str) -> None:
    few = [c for c in CASES if c.K <= 32]  # one build per cut, for GDA and for KDA
    for i, kernel in enumerate(sycl.default_device().kernels()):
        cases = tuple(few[3 * i + len(memory) :: 30])
        assert not failures(cases, kernel, "torch" if i % 2 else "numpy")


@pytest.mark.parametrize("size", [8, 32])
def test_any_subgroup_size(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = sycl.SyclDevice.variant
    monkeypatch.setattr(
        sycl.SyclDevice, "variant", lambda self, spec: replace(usual(self, spec), SG=size, group=64)
    )
    assert not failures(
        (Case(B=2, T=9, H=2, HV=4, K=32, V=24, kda=True, snapshots=3, mask="random"),), "subgroups"
    )


def test_the_record_is_the_kernels() -> None:
    text = sycl._text("params.hpp")
    assert f"sizeof(Params) == {params._PARAMS.size + 8 * len(params.ARRAYS)}" in text


def tokens(T: int, seed: int = 0, B: int = 1, H: int = 2, HV: int = 4, K: int = 32, V: int = 16) -> Any:
    rng = np.random.default_rng(seed)
    q, k = 0.2 * rng.standard_normal((2, B, T, H, K), np.float32)
    v = rng.standard_normal((B, T, HV, V), np.float32)
    g, beta = rng.random((2, B, T, HV), np.float32)
    return (q, k, v), {"g": -g, "beta": beta}


def test_a_resident_state_stages_the_token_only(memory: str) -> None:
    there = anydelta.device("sycl:0")
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


def test_ten_thousand_calls_leak_nothing(memory: str) -> None:
    (q, k, v), gates = tokens(1, B=8)  # 64 KiB of state: 10,000 lost ones would be 640 MiB
    state = np.zeros((8, 4, 32, 16), np.float32)

    def resident() -> int:
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    for call in range(11_000):
        if call == 1_000:
            before = resident()
        anydelta.gated_delta_rule_(q, k, v, state, **gates, backend="sycl")
    assert resident() - before < 32 << 20


def test_usm_of_another_library_is_a_state() -> None:
    memory = pytest.importorskip("dpctl.memory")
    dpctl = pytest.importorskip("dpctl")
    queue = dpctl.SyclQueue(next(d for d in dpctl.get_devices() if "pthread" not in d.name))
    host = np.random.default_rng(2).standard_normal((2, 4, 32, 16), np.float32)
    theirs = memory.MemoryUSMDevice(host.nbytes, queue=queue)
    theirs.copy_from_host(host.reshape(-1).view(np.uint8))
    (q, k, v), gates = tokens(3, B=2)
    o = anydelta.gated_delta_rule_(q, k, v, sycl.from_usm(theirs, host.shape, "float32"), **gates)
    want = anydelta.gated_delta_rule_(q, k, v, host, **gates, backend="reference")
    assert np.allclose(o, want, atol=1e-5)
    got = np.empty(host.nbytes, np.uint8)
    theirs.copy_to_host(got)
    assert np.allclose(got.view(np.float32).reshape(host.shape), host, atol=1e-5)
    for bad in (host, object()):
        with pytest.raises(ValueError, match="from_usm requires"):
            sycl.from_usm(bad)
    with pytest.raises(ValueError, match=r"from_usm requires C-contiguous .* bytes of float32"):
        sycl.from_usm(theirs, (3, 4, 32, 16), "float32")


def test_dlpack_is_read_without_being_consumed() -> None:
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert sycl._dlpack(x[1:].__dlpack__()) == (x[1:].__array_interface__["data"][0], (1, 3), True, 4)
    assert not sycl._dlpack(x.T.__dlpack__())[2]


# ---- what goes wrong


def test_a_missing_device_lists_those_that_exist() -> None:
    with pytest.raises(anydelta.UnsupportedError, match="no such SYCL device; there are sycl:0 "):
        anydelta.device("sycl:99")


def test_without_the_extension_there_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    sycl._host.cache_clear()
    with monkeypatch.context() as m:
        m.setitem(sys.modules, "anydelta._sycl", None)
        assert "pip install intel-sycl-rt" in str(sycl.BACKEND.available()[0])
    sycl._host.cache_clear()
    monkeypatch.setattr(sycl, "_found", lambda: ())
    assert "no SYCL device has a driver" in str(sycl.BACKEND.available()[0])


def test_memory_beyond_the_limit_is_one_sentence() -> None:
    device = sycl.default_device()
    limit = device.facts["allocation"]
    with pytest.raises(
        anydelta.DeviceError, match=f"arrays of at most {limit} bytes, the driver's limit; got"
    ):
        device.empty((limit // 4 + 1,))


def test_a_kernel_that_does_not_build_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    device = sycl.default_device()
    monkeypatch.setattr(sycl, "_text", lambda name: "nonsense")
    monkeypatch.setattr(device, "built", set())
    state = np.ones((1, 4, 32, 16), np.float32)
    (q, k, v), gates = tokens(1)
    with pytest.raises(
        anydelta.DeviceError, match=r"requires a run-time compiler that builds delta_rule.hpp; got"
    ):
        anydelta.gated_delta_rule_(q, k, v, state, **gates, backend="sycl")
    assert (state == 1).all()
    assert not device.lost


def test_the_host_is_preferred_on_the_host() -> None:
    (q, k, v), gates = tokens(1)
    assert anydelta.explain(q, k, v, **gates).chosen != "sycl"
    assert anydelta.explain(q, k, v, **gates, backend="sycl").chosen == "sycl"
