"""States on a device: what every backend's device shares, tested on one that is made of host memory."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import anydelta
from anydelta.backends.reference.host import Reference
from anydelta.core import devices, dispatch, plans
from anydelta.core.accepts import Row
from anydelta.core.devices import Device, DeviceArray, Memory
from anydelta.rule.arguments import Call
from anydelta.rule.spec import CallSpec


class ToyMemory(Memory):
    def __init__(self, nbytes: int):
        self.nbytes, self.bytes = nbytes, np.full(nbytes, 0xFF, np.uint8)

    def write(self, offset: int, data: Any) -> None:
        self.bytes[offset : offset + data.size] = data

    def read(self, offset: int, out: Any) -> None:
        out[...] = self.bytes[offset : offset + out.size]

    def zero(self, offset: int, nbytes: int) -> None:
        self.bytes[offset : offset + nbytes] = 0

    def copy_from(self, offset: int, source: Memory, source_offset: int, nbytes: int) -> None:
        assert isinstance(source, ToyMemory)
        self.write(offset, source.bytes[source_offset : source_offset + nbytes])


class ToyDevice(Device):
    def allocate(self, nbytes: int) -> ToyMemory:
        return ToyMemory(nbytes)

    def limits(self) -> dict[str, Any]:
        return {}


class Toy(Reference):
    """Runs the reference on copies of the device's arrays."""

    name = "toy"

    def available(self) -> Sequence[dispatch.Rejected]:
        return ()

    accepts = Reference.accepts.but(resident=Row(("toy:0", "toy:1"), "takes states on a toy"))

    def run(self, plan: None, spec: CallSpec, call: Any) -> None:
        held = {n: x for n in Call.__slots__ if type(x := getattr(call, n)) is DeviceArray}
        host = {n: x.torch() if spec.framework == "torch" else x.numpy() for n, x in held.items()}
        if spec.inplace:
            host["state_out"] = host["state_in"]
        super().run(plan, spec, replace(call, **host))
        for name in ("o", "state_out", "snapshots"):
            if name in held:
                held[name].write(host[name])


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    module = types.ModuleType("anydelta.backends.toy.host")
    module.BACKEND = Toy()  # type: ignore[attr-defined]
    module.open_device = lambda index: ToyDevice(f"toy:{index}", "host memory")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(dispatch, "NAMES", (*dispatch.NAMES, "toy"))
    monkeypatch.setattr(dispatch, "PRIORITY", {**dispatch.PRIORITY, "toy": ("toy", "reference")})
    monkeypatch.setattr(devices, "KINDS", (*devices.KINDS, "toy"))
    monkeypatch.setattr(devices, "_open", {})
    plans.forget()
    yield anydelta.device("toy:0")
    dispatch.get_backend.cache_clear()
    plans.forget()


def tokens(T: int = 3, framework: str = "numpy", **sizes: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """q, k, v and the gates of a small call."""
    n = {"B": 1, "H": 1, "HV": 2, "K": 8, "V": 4} | sizes
    rng = np.random.default_rng(T)
    q, k = 0.3 * rng.standard_normal((2, n["B"], T, n["H"], n["K"]), np.float32)
    v = rng.standard_normal((n["B"], T, n["HV"], n["V"]), np.float32)
    g = -rng.random((n["B"], T, n["HV"]), np.float32)
    beta = rng.random((n["B"], T, n["HV"]), np.float32)
    if framework == "torch":
        q, k, v, g, beta = map(torch.from_numpy, (q, k, v, g, beta))
    return (q, k, v), {"g": g, "beta": beta}


def test_a_device_is_opened_once_by_name(toy: Device) -> None:
    assert anydelta.device("toy") is anydelta.device("toy:0") is toy
    assert anydelta.device("toy:1") is not toy
    assert (toy.name, toy.kind) == ("toy:0", "toy")
    for bad in ("", "cuda:0", "toy:x", "toy:-1", "reference:0", None):
        with pytest.raises(ValueError, match=r"device must be KIND or KIND:INDEX.*toy"):
            anydelta.device(bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_arrays_go_there_and_back(toy: Device, dtype: str) -> None:
    host = torch.randn(3, 2, 4).to(getattr(torch, dtype))
    there = toy.array(host)
    assert isinstance(there, DeviceArray)
    assert (there.shape, there.dtype, there.nbytes, len(there)) == ((3, 2, 4), dtype, host.nbytes, 3)
    assert torch.equal(there.torch(), host)
    assert np.array_equal(there.numpy().astype(np.float64), host.double().numpy())
    assert torch.equal(there[1].torch(), host[1])
    assert torch.equal(there[1:3][-1].torch(), host[2])
    there[1].zero()
    assert not there[1].torch().any()
    assert torch.equal(there[2].torch(), host[2])
    there[0].write(there[2])
    assert torch.equal(there[0].torch(), host[2])
    twin = there.copy()
    there.zero()
    assert torch.equal(twin[2].torch(), host[2])


def test_a_wrong_write_is_refused(toy: Device) -> None:
    there = toy.zeros((2, 3))
    other = anydelta.device("toy:1").zeros((2, 3))
    for bad, text in (
        (np.zeros((3, 2), np.float32), r"takes \[2, 3\] float32; got \[3, 2\]"),
        (np.zeros((2, 3), np.float16), "got .* float16"),
        (other, "same device; got one on toy:1"),
    ):
        with pytest.raises(ValueError, match=text):
            there.write(bad)
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, float16; got 'int8'"):
        toy.zeros((2,), "int8")
    with pytest.raises(ValueError, match="step 1"):
        there[::-1]
    with pytest.raises(IndexError):
        there[2]


@pytest.mark.parametrize("framework", ["numpy", "torch"])
def test_a_resident_state_is_advanced_where_it_lies(toy: Device, framework: str) -> None:
    state = toy.zeros((1, 2, 8, 4))
    snapshots = toy.zeros((2, 1, 2, 8, 4))
    qkv, gates = tokens(framework=framework)
    assert anydelta.explain(*qkv, **gates, initial_state=state).chosen == "toy"
    want, final = anydelta.gated_delta_rule(*qkv, **gates, backend="reference")
    got, final_there = anydelta.gated_delta_rule(*qkv, **gates, initial_state=state)
    assert type(got) is type(qkv[2])
    assert isinstance(final_there, DeviceArray)
    assert not state.numpy().any()
    for _ in range(2):  # the second time by the remembered plan
        state.zero()
        got = anydelta.gated_delta_rule_(*qkv, state, **gates, snapshots=snapshots)
        for a, b in (
            (got, want), (state.numpy(), final), (final_there.numpy(), final), (snapshots[0].numpy(), final)
        ):  # fmt: skip
            assert np.allclose(np.asarray(a), np.asarray(b), atol=1e-6)
    _, fresh = anydelta.gated_delta_rule(*qkv, **gates, snapshots=snapshots)
    assert isinstance(fresh, DeviceArray)


def test_all_of_a_call_may_be_on_the_device(toy: Device) -> None:
    qkv, gates = tokens()
    there, gates_there = [toy.array(x) for x in qkv], {n: toy.array(x) for n, x in gates.items()}
    want, final = anydelta.gated_delta_rule(*qkv, **gates, backend="reference")
    assert anydelta.explain(*there, **gates_there).chosen == "toy"
    state = toy.zeros((1, 2, 8, 4))
    for _ in range(2):  # the second time by the remembered plan
        o, s = anydelta.gated_delta_rule(*there, **gates_there)
        state.zero()
        o_ = anydelta.gated_delta_rule_(*there, state, **gates_there)
        for a, b in ((o, want), (s, final), (o_, want), (state, final)):
            assert isinstance(a, DeviceArray)
            assert np.allclose(a.numpy(), b, atol=1e-6)
    assert plans.count() >= 2
    mask = np.array([[True, False, True]])
    o = anydelta.gated_delta_rule_(*there, state, **gates_there, mask=mask)
    assert not o.numpy()[0, 1].any()


def test_a_call_on_a_device_is_on_one_device(toy: Device) -> None:
    (q, k, v), gates = tokens()
    there, other = toy.array, anydelta.device("toy:1").array
    gates_there = {n: there(x) for n, x in gates.items()}
    run = anydelta.gated_delta_rule
    with pytest.raises(TypeError, match="k must be on toy:0 as q is; got ndarray on the host"):
        run(there(q), k, there(v), **gates_there)
    with pytest.raises(TypeError, match="v must be on toy:0 as q is; got an array on toy:1"):
        run(there(q), there(k), other(v), **gates_there)
    with pytest.raises(TypeError, match="initial_state must be on toy:0 as q is; got ndarray on the host"):
        run(there(q), there(k), there(v), **gates_there, initial_state=np.zeros((1, 2, 8, 4), np.float32))
    with pytest.raises(TypeError, match=r"mask must be a numpy.ndarray where q is on toy:0; got Tensor"):
        run(there(q), there(k), there(v), **gates_there, mask=torch.ones(1, 3, dtype=torch.bool))
    with pytest.raises(anydelta.UnsupportedError, match="cpu"):
        run(there(q), there(k), there(v), **gates_there, backend="cpu")


def test_a_resident_state_is_checked_like_any_other(toy: Device) -> None:
    qkv, gates = tokens()
    state, host = toy.zeros((1, 2, 8, 4)), np.zeros((1, 2, 8, 4), np.float32)
    snapshots = toy.zeros((2, 1, 2, 8, 4))
    run = anydelta.gated_delta_rule_
    with pytest.raises(ValueError, match=r"state must be \[N, HV, K, V\]"):
        run(*qkv, toy.zeros((1, 2, 4, 8)), **gates)
    with pytest.raises(ValueError, match="snapshots must have state's dtype float32; got float16"):
        run(*qkv, state, **gates, snapshots=toy.zeros(snapshots.shape, "float16"))
    with pytest.raises(ValueError, match="snapshots must be where state is, on the host; got toy:0"):
        run(*qkv, host, **gates, snapshots=snapshots)
    with pytest.raises(ValueError, match="snapshots must be where state is, toy:0; got the host"):
        run(*qkv, state, **gates, snapshots=np.zeros(snapshots.shape, np.float32))
    with pytest.raises(TypeError, match="v must be on the host as q is; got an array on toy:0"):
        run(*qkv[:2], toy.array(qkv[2]), state, **gates)
    with pytest.raises(anydelta.UnsupportedError, match=r"cpu.*got device toy:0"):
        run(*qkv, state, **gates, backend="cpu")
    with pytest.raises(anydelta.UnsupportedError, match="states on the host; got one on toy:0"):
        run(*qkv, state, **gates, backend="reference")
    (q, k, v), gates = tokens(framework="torch")
    with pytest.raises(ValueError, match="a state on toy:0 has no gradient, but q requires grad"):
        anydelta.gated_delta_rule(q.requires_grad_(), k, v, **gates, initial_state=state)
    with (
        FlopCounterMode(display=False),
        pytest.raises(anydelta.UnsupportedError, match="tracer cannot follow a state on toy:0"),
    ):
        run(q.detach(), k, v, state, **gates)


def test_staged_bytes_are_counted(toy: Device) -> None:
    there = toy.array(np.zeros((2, 3), np.float32))
    assert (toy.staged.to_device, toy.staged.from_device) == (24, 0)
    there[0].numpy()
    there.copy().write(there)
    assert (toy.staged.to_device, toy.staged.from_device) == (24, 12)


def test_a_lost_device_says_so(toy: Device) -> None:
    there = toy.zeros((2,))
    toy.lost = "the driver reset"
    for use in (there.numpy, there.zero, lambda: toy.zeros((2,)), lambda: there.write(there.copy())):
        with pytest.raises(
            anydelta.DeviceError, match=r"toy:0 .* is lost \(the driver reset\).*states are invalid"
        ):
            use()
