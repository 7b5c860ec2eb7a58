"""SYCL alone: sizes of sub-groups, USM and DLPack of other libraries, drivers. Shared tests: test_every_device.py."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import anydelta
from anydelta.backends.sycl import device as sycl_device
from anydelta.backends.sycl import host as sycl
from anydelta.conformance import Case
from anydelta.conformance.run import unavailable
from anydelta.core import dispatch
from anydelta.rule.arguments import Call, Options
from anydelta.rule.spec import check_call
from device_checks import check_a_call_on_the_device_stages_nothing, failures, tokens

REASONS = unavailable("sycl")
if REASONS:
    pytest.skip("; ".join(REASONS), allow_module_level=True)

pytestmark = pytest.mark.usefixtures("fresh_plans")


@pytest.mark.parametrize("size", [8, 32])
def test_any_subgroup_size(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = sycl.SyclDevice._cut
    monkeypatch.setattr(
        sycl.SyclDevice, "_cut", lambda self, spec: replace(usual(self, spec), SG=size, group=64)
    )
    assert not failures(
        "sycl", (Case(B=2, T=9, H=2, HV=4, K=32, V=24, kda=True, snapshots=3, mask="random"),), "subgroups"
    )


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


class LikeXpu:
    """Host memory, which the CPU device reaches, that says of itself what a tensor of torch.xpu does."""

    def __init__(self, x: Any):
        self.x, self.dtype = x, x.dtype

    def __dlpack_device__(self) -> tuple[int, int]:
        return 14, 0  # kDLOneAPI

    def __dlpack__(self, **how: Any) -> Any:
        return self.x.__dlpack__()


def test_dlpack_of_a_oneapi_device_is_a_state() -> None:
    (q, k, v), gates = tokens(3, B=2, H=2, HV=4, K=32)
    want = np.random.default_rng(2).standard_normal((2, 4, 32, 16), np.float32)
    theirs = want.copy()
    anydelta.gated_delta_rule_(q, k, v, want, **gates, backend="reference")
    anydelta.gated_delta_rule_(q, k, v, sycl.from_usm(LikeXpu(theirs)), **gates)
    assert np.allclose(theirs, want, atol=1e-5)
    with pytest.raises(ValueError, match="requires C-contiguous"):
        sycl.from_usm(LikeXpu(theirs.swapaxes(2, 3)))
    with pytest.raises(ValueError, match=r"a oneAPI device \(DLPack 14\); got device type 1"):
        sycl.from_usm(theirs)


def test_tensors_of_torch_xpu_are_taken_by_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """With tensors of the CPU in their place, which the CPU device also reaches by address: torch.xpu is not here."""
    waited = []
    monkeypatch.setattr(torch.xpu, "synchronize", lambda: waited.append(True))
    (q, k, v), gates = tokens(3, B=2, H=2, HV=4, K=32)
    want = np.zeros((2, 4, 32, 16), np.float32)
    state = torch.from_numpy(want.copy())
    o = torch.empty(v.shape)
    call = Call(
        *map(torch.from_numpy, (q, k, v, gates["g"], gates["beta"])), state_in=state, state_out=state, o=o
    )
    spec = replace(check_call(call, Options(), inplace=True), device="xpu")
    assert not dispatch.against(sycl.BACKEND, spec)
    monkeypatch.setattr(sycl.roster.default(), "memory", "copy")  # of no use to them
    sycl.BACKEND.run(sycl.BACKEND.prepare(spec, call), spec, call)
    assert waited
    expected = anydelta.gated_delta_rule_(q, k, v, want, **gates, backend="reference")
    assert np.allclose(o, expected, atol=1e-5)
    assert np.allclose(state, want, atol=1e-5)


# ---- what goes wrong


def test_without_the_extension_there_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    sycl_device.host.cache_clear()
    with monkeypatch.context() as m:
        m.setitem(sys.modules, "anydelta._sycl", None)
        assert "pip install intel-sycl-rt" in str(sycl.BACKEND.available()[0])
    sycl_device.host.cache_clear()
    monkeypatch.setattr(sycl, "found", lambda: ())
    assert "no SYCL device has a driver" in str(sycl.BACKEND.available()[0])
