"""Subnormal numbers count as zero inside a kernel, in every thread of it, and nowhere else.

A state of 1e-39 that no token changes shows it: every value that a kernel multiplies comes out as zero. That no operand
is ever subnormal, and that each thread's control register is restored, is seen from inside by tests/cpp/test_core.cpp.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

import anydelta
from anydelta import StatePool
from anydelta.backends.cpu import host as cpu
from anydelta.conformance.run import unavailable
from conftest import CPU_REASONS

needs_cpu = pytest.mark.skipif(bool(CPU_REASONS), reason="; ".join(map(str, CPU_REASONS)) or "runs")
FADED = 1e-39
H, HV, D = 8, 16, 128
"""Enough heads for two threads at one token."""


def computes_subnormals() -> bool:
    """Whether this thread does."""
    return bool(np.float32(FADED) * np.float32(0.5) > 0)


@pytest.fixture(autouse=True)
def untouched() -> Iterator[None]:
    """Around each test, the register of the calling thread and of torch's stay as they are."""
    assert computes_subnormals()
    yield
    assert computes_subnormals()
    many = torch.full((1 << 20,), FADED)
    assert (many * 0.5).min() > 0


@pytest.fixture(params=[1, 2])
def threads(request: Any) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def tokens(T: int, kda: bool) -> dict[str, torch.Tensor]:
    """A call that leaves the state to its decay of 1."""
    g = torch.full((1, T, HV, D) if kda else (1, T, HV), -1e-7)
    q, k = torch.full((2, 1, T, H, D), 0.1)
    return {"q": q, "k": k, "v": torch.ones(1, T, HV, D), "g": g, "beta": torch.zeros(1, T, HV)}


def faded(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full((1, HV, D, D), FADED).to(dtype)


def in_place(x: dict[str, torch.Tensor], S: torch.Tensor) -> torch.Tensor:
    anydelta.gated_delta_rule_(**x, state=S)
    return S


def functional(x: dict[str, torch.Tensor], S: torch.Tensor) -> torch.Tensor:
    return anydelta.gated_delta_rule(**x, initial_state=S)[1]  # type: ignore[no-any-return]


def numpy(x: dict[str, torch.Tensor], S: torch.Tensor) -> torch.Tensor:
    arrays = {name: a.numpy() for name, a in x.items()}
    return torch.from_numpy(anydelta.gated_delta_rule(**arrays, initial_state=S.numpy())[1])


def operator(x: dict[str, torch.Tensor], S: torch.Tensor) -> torch.Tensor:
    torch.ops.anydelta.gated_delta_rule_(*x.values(), S)
    return S


def mixer(x: dict[str, torch.Tensor], S: torch.Tensor) -> torch.Tensor:
    T, C = x["q"].shape[1], 2 * H * D + HV * D
    anydelta.gated_delta_mixer_(
        torch.randn(1, T, C), torch.zeros(1, C, 3), S, g=x["g"], beta=x["beta"], conv_weight=torch.ones(C, 4),
        decay="log", beta_is_logit=False,
    )  # fmt: skip
    return S


def log(x: dict[str, torch.Tensor], S: torch.Tensor) -> torch.Tensor:
    T, kda = x["q"].shape[1], x["g"].ndim == 4
    pool = StatePool(
        1, H=H, HV=HV, K=D, V=D, snapshots=T + 1, kda=kda, form="log", device="cpu",
        dtype=str(S.dtype).removeprefix("torch."),
    )  # fmt: skip
    pool.restore(anydelta.Checkpoint(S, None, "kv"))
    pool.begin(T)
    pool.run(**x)
    pool.commit(T)
    pool.fold()
    return pool.state(pool.sequences[0])


CALLS: list[Callable[..., torch.Tensor]] = [in_place, functional, numpy, operator, mixer, log]


@needs_cpu
@pytest.mark.parametrize("kda", [False, True])
@pytest.mark.parametrize("T", [1, 4, 13])
@pytest.mark.parametrize("call", CALLS)
def test_every_thread_flushes(call: Callable[..., torch.Tensor], T: int, kda: bool, threads: int) -> None:
    for isa in cpu.isas():
        with cpu.forced_isa(isa):
            for dtype in (torch.float32, torch.bfloat16):
                if call is numpy and dtype == torch.bfloat16:
                    continue
                assert not call(tokens(T, kda), faded(dtype)).any().item()


@needs_cpu
def test_what_no_kernel_multiplies_keeps_its_bits() -> None:
    S, x = faded(), tokens(4, kda=False)
    masked = anydelta.gated_delta_rule(**x, initial_state=S, mask=torch.zeros(1, 4, dtype=torch.bool))[1]
    assert torch.equal(masked, S)
    anydelta.gated_delta_rule_(**x, state=S, state_indices=torch.tensor([-1]))
    assert torch.equal(S, faded())


@needs_cpu
def test_a_refused_call_changes_nothing() -> None:
    S, x = faded(), tokens(1, kda=False)
    with pytest.raises(ValueError, match="state"):
        anydelta.gated_delta_rule_(**x, state=S[:, :-1])
    assert torch.equal(S, faded())


@needs_cpu
def test_a_caller_that_flushes_goes_on_flushing() -> None:
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU computes subnormal numbers only")
    try:
        in_place(tokens(1, kda=False), faded())
        assert not computes_subnormals()
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("backend", ["opencl", "sycl"])
def test_cpu_drivers_flush(backend: str) -> None:
    if reasons := unavailable(backend):
        pytest.skip("; ".join(reasons))
    for kda in (False, True):
        for T in (1, 4, 80):
            x = {name: a.numpy() for name, a in tokens(T, kda).items()}
            state = anydelta.gated_delta_rule(**x, initial_state=faded().numpy(), backend=backend)[1]
            assert not state.any()
