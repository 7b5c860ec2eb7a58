"""The Triton backend on a GPU: conformance, graph capture, torch.compile, and that no call waits for the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import anydelta
from anydelta.conformance import CASES, Target
from anydelta.conformance.run import run_one

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm GPU is here")
D = 128


def call(T: int, kda: bool = False, **kwargs: Any) -> tuple[list[torch.Tensor], dict[str, Any]]:
    q, k, v = (torch.randn(2, T, 4, D, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    g = -torch.rand(2, T, 4, *([D] if kda else []), device="cuda")
    return [q, k, v], dict(g=g, beta=torch.rand(2, T, 4, device="cuda"), qk_l2norm=True, **kwargs)


def test_conformance() -> None:
    cases = sorted(CASES, key=lambda c: c.work)[::20]
    bad = [r for c in cases if (r := run_one(c, Target("triton", None, "torch", "cuda"))).status != "OK"]
    assert not bad, "\n".join(f"{r.reproduce()}: {r.reasons}" for r in bad)


def test_auto_takes_triton() -> None:
    qkv, options = call(1)
    assert anydelta.explain(*qkv, **options).chosen == "triton"


@pytest.mark.parametrize("T", [1, 100])
@pytest.mark.parametrize("kda", [False, True])
def test_a_captured_graph_gives_the_same_result(T: int, kda: bool) -> None:
    qkv, options = call(T, kda)
    first = torch.randn(2, 4, D, D, device="cuda")
    want_state = first.clone()
    want = anydelta.gated_delta_rule_(*qkv, want_state, **options)
    state = first.clone()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(2):
            anydelta.gated_delta_rule_(*qkv, state, **options)
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = anydelta.gated_delta_rule_(*qkv, state, **options)
    for _ in range(2):
        state.copy_(first)
        graph.replay()
        assert torch.equal(o, want)
        assert torch.equal(state, want_state)


@pytest.mark.parametrize("T", [1, 100])
def test_no_call_waits_for_the_device(T: int) -> None:
    indices = torch.tensor([3, -1], device="cuda")
    rows = torch.tensor([[5, 6], [7, 8]], device="cuda")
    qkv, options = call(T, state_indices=indices, snapshot_indices=rows)
    pool = torch.zeros(9, 4, D, D, device="cuda")
    anydelta.gated_delta_rule_(*qkv, pool, **options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        anydelta.gated_delta_rule_(*qkv, pool, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("T", [1, 100])
def test_compiles_as_one_graph(T: int) -> None:
    qkv, options = call(T)
    state = torch.randn(2, 4, D, D, device="cuda")

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        return anydelta.gated_delta_rule_(q * 2, k, v, state, **options) + 1

    one, other = state.clone(), state.clone()
    want = run(*qkv, one)
    got = torch.compile(run, fullgraph=True)(*qkv, other)
    assert torch.allclose(got, want, atol=2e-2)
    assert torch.allclose(one, other, atol=1e-4)
