"""The SYCL backend on the CPU device of intel-opencl-rt: each cut of the kernel, each way to reach memory."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import anydelta
from anydelta import op
from anydelta.backends import params, sycl, sycl_device
from anydelta.conformance import CASES, Case
from anydelta.conformance.run import unavailable
from device_checks import (
    check_a_call_on_the_device_stages_nothing,
    check_nothing_leaks,
    check_only_tokens_are_staged,
    check_resident_pools_and_snapshots,
    check_threads_take_turns,
    failures,
    tokens,
)

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


@pytest.fixture(params=sycl_device.MEMORIES)
def memory(request: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(sycl.roster.default(), "memory", request.param)
    return str(request.param)


@pytest.mark.parametrize("start", range(0, len(CASES), BATCH))
def test_every_case(start: int) -> None:
    assert not failures("sycl", CASES[start : start + BATCH])


def test_every_cut_and_memory(memory: str) -> None:
    few = [c for c in CASES if c.K <= 32]  # one build per cut, for GDA and for KDA
    for i, kernel in enumerate(sycl.roster.default().kernels()):
        cases = tuple(few[3 * i + len(memory) :: 30])
        assert not failures("sycl", cases, kernel, "torch" if i % 2 else "numpy")


@pytest.mark.parametrize("size", [8, 32])
def test_any_subgroup_size(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = sycl.SyclDevice._cut
    monkeypatch.setattr(
        sycl.SyclDevice, "_cut", lambda self, spec: replace(usual(self, spec), SG=size, group=64)
    )
    assert not failures(
        "sycl", (Case(B=2, T=9, H=2, HV=4, K=32, V=24, kda=True, snapshots=3, mask="random"),), "subgroups"
    )


def test_the_record_is_the_kernels() -> None:
    text = sycl_device._text("params.hpp")
    assert f"sizeof(Params) == {params._PARAMS.size + 8 * len(params.ARRAYS)}" in text


@pytest.mark.parametrize("framework", ["numpy", "torch"])
def test_resident_pools_and_snapshots(memory: str, framework: str) -> None:
    check_resident_pools_and_snapshots(anydelta.device("sycl:0"), framework)


def test_a_resident_state_stages_the_token_only(memory: str) -> None:
    check_only_tokens_are_staged(anydelta.device("sycl:0"), crosses=memory == "copy")


def test_ten_thousand_calls_leak_nothing(memory: str) -> None:
    (q, k, v), gates = tokens(B=8, HV=4, K=32)
    state = np.zeros((8, 4, 32, 16), np.float32)  # 64 KiB: 10,000 lost ones would be 640 MiB
    check_nothing_leaks(
        lambda i: anydelta.gated_delta_rule_(q, k, v, state, **gates, backend="sycl"), most=32 << 20
    )


def test_a_call_on_the_device_stages_nothing(memory: str) -> None:
    there = anydelta.device("sycl:0")
    check_a_call_on_the_device_stages_nothing(there, there.array)


def test_threads_take_turns() -> None:
    check_threads_take_turns("sycl")


def test_usm_of_another_library_is_a_state() -> None:
    memory = pytest.importorskip("dpctl.memory")
    dpctl = pytest.importorskip("dpctl")
    queue = dpctl.SyclQueue(next(d for d in dpctl.get_devices() if "pthread" not in d.name))
    host = np.random.default_rng(2).standard_normal((2, 4, 32, 16), np.float32)
    theirs = memory.MemoryUSMDevice(host.nbytes, queue=queue)
    theirs.copy_from_host(host.reshape(-1).view(np.uint8))
    (q, k, v), gates = tokens(3, B=2, H=2, HV=4, K=32)
    o = anydelta.gated_delta_rule_(q, k, v, sycl.from_usm(theirs, host.shape, "float32"), **gates)
    want = anydelta.gated_delta_rule_(q, k, v, host, **gates, backend="reference")
    assert np.allclose(o, want, atol=1e-5)
    got = np.empty(host.nbytes, np.uint8)
    theirs.copy_to_host(got)
    assert np.allclose(got.view(np.float32).reshape(host.shape), host, atol=1e-5)
    kept = []

    def there(x: Any) -> Any:
        usm = memory.MemoryUSMDevice(x.nbytes, queue=queue)
        usm.copy_from_host(np.ascontiguousarray(x).reshape(-1).view(np.uint8))
        kept.append(usm)
        return sycl.from_usm(usm, x.shape, "float32")

    o, want = check_a_call_on_the_device_stages_nothing(anydelta.device("sycl:0"), there)
    got = np.empty(want.nbytes, np.uint8)
    memory.as_usm_memory(sycl.to_usm(o)).copy_to_host(got)
    assert np.allclose(got.view(np.float32).reshape(want.shape), want, atol=1e-5)
    with pytest.raises(ValueError, match="to_usm requires a float32 or float16 array on a SYCL device"):
        sycl.to_usm(anydelta.device("sycl:0").zeros((2,), "bfloat16"))
    for bad in (host, object()):
        with pytest.raises(ValueError, match="from_usm requires"):
            sycl.from_usm(bad)
    with pytest.raises(ValueError, match=r"from_usm requires C-contiguous .* bytes of float32"):
        sycl.from_usm(theirs, (3, 4, 32, 16), "float32")


def test_dlpack_is_read_without_being_consumed() -> None:
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert sycl_device._dlpack(x[1:].__dlpack__()) == (x[1:].__array_interface__["data"][0], (1, 3), True, 4)
    assert not sycl_device._dlpack(x.T.__dlpack__())[2]


# ---- what goes wrong


def test_a_missing_device_lists_those_that_exist() -> None:
    with pytest.raises(anydelta.UnsupportedError, match="no such SYCL device; there are sycl:0 "):
        anydelta.device("sycl:99")


def test_without_the_extension_there_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    sycl_device.host.cache_clear()
    with monkeypatch.context() as m:
        m.setitem(sys.modules, "anydelta._sycl", None)
        assert "pip install intel-sycl-rt" in str(sycl.BACKEND.available()[0])
    sycl_device.host.cache_clear()
    monkeypatch.setattr(sycl, "found", lambda: ())
    assert "no SYCL device has a driver" in str(sycl.BACKEND.available()[0])


def test_memory_beyond_the_limit_is_one_sentence() -> None:
    device = sycl.roster.default()
    limit = device.facts["allocation"]
    with pytest.raises(
        anydelta.DeviceError, match=f"arrays of at most {limit} bytes, the driver's limit; got"
    ):
        device.empty((limit // 4 + 1,))


def test_a_kernel_that_does_not_build_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    device = sycl.roster.default()
    monkeypatch.setattr(sycl_device, "_text", lambda name: "nonsense")
    monkeypatch.setattr(device, "built", set())
    state = np.ones((1, 4, 32, 16), np.float32)
    (q, k, v), gates = tokens(H=2, HV=4, K=32)
    with pytest.raises(
        anydelta.DeviceError, match=r"requires a run-time compiler that builds delta_rule.hpp; got"
    ):
        anydelta.gated_delta_rule_(q, k, v, state, **gates, backend="sycl")
    assert (state == 1).all()
    assert not device.lost


def test_the_host_is_preferred_on_the_host() -> None:
    (q, k, v), gates = tokens(H=2, HV=4, K=32)
    assert anydelta.explain(q, k, v, **gates).chosen != "sycl"
    assert anydelta.explain(q, k, v, **gates, backend="sycl").chosen == "sycl"
