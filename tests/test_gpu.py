"""The Triton backend on a GPU: conformance, graph capture, torch.compile, tuning, no waiting for the device.

`TRITON_INTERPRET=1 pytest tests/test_gpu.py` goes through what needs no GPU: the calls that are captured run again in
place of the graph, and torch.compile stops before its compiler.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import anydelta
from anydelta.backends.triton.host import interpreted
from anydelta.conformance import SHORT_CASES, Target
from anydelta.conformance.run import run_one

GPU = torch.cuda.is_available()
pytestmark = pytest.mark.skipif(not (GPU or interpreted()), reason="no CUDA or ROCm GPU is here")
needs_gpu = pytest.mark.skipif(not GPU, reason="no CUDA or ROCm GPU is here")
DEVICE, D = ("cuda", 128) if GPU else ("cpu", 16)
COMPILER = "inductor" if GPU else "aot_eager"
LONG = 100 if GPU else 20


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=dtype)


def call(T: int, kda: bool = False, **kwargs: Any) -> tuple[list[torch.Tensor], dict[str, Any]]:
    q, k, v = (random(2, T, 4, D, dtype=torch.bfloat16) for _ in range(3))
    g = -torch.rand(2, T, 4, *([D] if kda else []), device=DEVICE)
    beta = torch.rand(2, T, 4, device=DEVICE)
    return [q, k, v], dict(g=g, beta=beta, qk_l2norm=True, backend="triton", **kwargs)


def mixer(T: int, kda: bool = False) -> tuple[torch.Tensor, list[torch.Tensor], dict[str, Any]]:
    """(qkv, [conv state, state], the rest) of a mixer's call with a gated norm."""
    channels = 3 * 4 * D
    states = [random(2, channels, 4, dtype=torch.bfloat16), random(2, 4, D, D)]
    options = dict(
        g=random(2, T, 4, *([D] if kda else []), dtype=torch.bfloat16), beta=random(2, T, 4, dtype=torch.bfloat16),
        conv_weight=random(channels, 4, dtype=torch.bfloat16), A_log=random(4), backend="triton",
        dt_bias=random(4, *([D] if kda else [])), z=random(2, T, 4 * D, dtype=torch.bfloat16),
        norm_weight=random(D, dtype=torch.bfloat16),
    )  # fmt: skip
    return random(2, T, channels, dtype=torch.bfloat16), states, options


def replayed(step: Callable[[], Any]) -> tuple[Callable[[], Any], Any]:
    """(what repeats the step, what it writes its results to): a captured graph; in the interpreter the step itself."""
    if not GPU:
        found = list(step())

        def again() -> None:
            for old, new in zip(found, step(), strict=True):
                old.copy_(new)

        return again, found
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = list(step())
    return graph.replay, found


def assert_replays(step: Callable[[], Any], *states: torch.Tensor) -> None:
    """The graph of a step gives the same bits as the step, from the same states, whenever it is replayed."""
    first = [x.clone() for x in states]
    want = [x.clone() for x in step()]
    want_states = [x.clone() for x in states]
    replay, found = replayed(step)
    for _ in range(2):
        for x, start in zip(states, first, strict=True):
            x.copy_(start)
        for x in found:
            x.fill_(float("nan"))
        replay()
        for got, right in zip([*found, *states], [*want, *want_states], strict=True):
            assert torch.equal(got, right)


@needs_gpu
def test_conformance() -> None:
    cases = sorted(SHORT_CASES, key=lambda c: c.work)[::20]
    bad = [r for c in cases if (r := run_one(c, Target("triton", None, "torch", "cuda"))).status != "OK"]
    assert not bad, "\n".join(f"{r.reproduce()}: {r.reasons}" for r in bad)


@needs_gpu
def test_auto_takes_triton() -> None:
    qkv, options = call(1)
    assert anydelta.explain(*qkv, **{**options, "backend": "auto"}).chosen == "triton"


@pytest.mark.parametrize("T", [1, LONG])
@pytest.mark.parametrize("kda", [False, True])
def test_a_captured_graph_gives_the_same_result(T: int, kda: bool) -> None:
    qkv, options = call(T, kda)
    state = random(2, 4, D, D)
    assert_replays(lambda: [anydelta.gated_delta_rule_(*qkv, state, **options)], state)


@pytest.mark.parametrize("T", [1, LONG])
@pytest.mark.parametrize("kda", [False, True])
def test_a_captured_graph_of_the_mixer_gives_the_same_result(T: int, kda: bool) -> None:
    qkv, (conv_state, state), options = mixer(T, kda)
    assert_replays(
        lambda: [anydelta.gated_delta_mixer_(qkv, conv_state, state, **options)], conv_state, state
    )


@pytest.mark.parametrize("kda", [False, True])
def test_a_captured_graph_of_forward_and_backward_gives_the_same_result(kda: bool) -> None:
    qkv, options = call(LONG, kda)
    state = random(2, 4, D, D)
    leaves = [x.requires_grad_() for x in (*qkv, options["g"], options["beta"], state)]
    do, d_state = random(2, LONG, 4, D, dtype=torch.bfloat16), random(2, 4, D, D)

    def step() -> Any:
        o, final = anydelta.gated_delta_rule(*qkv, initial_state=state, output_final_state=True, **options)
        return torch.autograd.grad([o, final], leaves, [do, d_state])

    assert_replays(step)


@needs_gpu
@pytest.mark.parametrize("T", [1, LONG])
def test_no_call_waits_for_the_device(T: int) -> None:
    indices = torch.tensor([3, -1], device="cuda")
    rows = torch.tensor([[5, 6], [7, 8]], device="cuda")
    qkv, options = call(T, state_indices=indices, snapshot_indices=rows)
    pool = torch.zeros(9, 4, D, D, device="cuda")
    mixed, states, more = mixer(T)
    more["mask"] = torch.rand(2, T, device="cuda") < 0.5

    def step() -> None:
        anydelta.gated_delta_rule_(*qkv, pool, **options)
        anydelta.gated_delta_mixer_(mixed, *states, **more)

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("T", [1, LONG])
def test_compiles_as_one_graph(T: int) -> None:
    qkv, options = call(T)
    state = random(2, 4, D, D)

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        return anydelta.gated_delta_rule_(q * 2, k, v, state, **options) + 1

    one, other = state.clone(), state.clone()
    want = run(*qkv, one)
    got = torch.compile(run, fullgraph=True, backend=COMPILER)(*qkv, other)
    assert torch.allclose(got, want, atol=2e-2)
    assert torch.allclose(one, other, atol=1e-4)


@pytest.mark.parametrize("T", [1, LONG])
def test_the_mixer_compiles_as_one_graph(T: int) -> None:
    qkv, states, options = mixer(T)

    def run(qkv: torch.Tensor, conv_state: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        return anydelta.gated_delta_mixer_(qkv * 2, conv_state, state, **options) + 1

    mine, theirs = ([x.clone() for x in states] for _ in range(2))
    want = run(qkv, *mine)
    got = torch.compile(run, fullgraph=True, backend=COMPILER)(qkv, *theirs)
    assert torch.allclose(got, want, atol=2e-2, rtol=1e-2)
    assert torch.equal(mine[0], theirs[0])
    assert torch.allclose(mine[1], theirs[1], atol=1e-4)


def test_forward_and_backward_compile_as_one_graph() -> None:
    qkv, options = call(LONG)
    leaves = [x.requires_grad_() for x in qkv]

    def loss(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        o, _ = anydelta.gated_delta_rule(q, k, v, **options)
        return o.float().square().sum()

    want = torch.autograd.grad(loss(*leaves), leaves)
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend=COMPILER)(*leaves), leaves)
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a, b, atol=2e-2, rtol=2e-2)


@needs_gpu
def test_tuning_keeps_a_row_that_calls_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from anydelta.backends.triton import config, tables
    from anydelta.backends.triton.host import machine_of
    from anydelta.bench.measure.cases import select
    from anydelta.tune.problems import problems
    from anydelta.tune.search import Contest, gpu_times, tune

    monkeypatch.setenv(tables.ENV, str(tmp_path))
    (problem,) = problems(select(["gda-t1-h2x4-d64-b2"]), ["bfloat16"], gradients=False)
    outcome = tune(Contest(problem, "cuda"), gpu_times, rounds=2, tell=lambda text: None)
    assert outcome.us > 0
    assert not [t for t in outcome.trials if t.wrong]
    machine = machine_of(torch.device("cuda"))
    tables.merge(tmp_path / f"{machine.arch}.json", {outcome.key: outcome.row("a test")})
    chosen = config.choose(machine, K=64, V=64, kda=False, dtype="bfloat16", programs=8)
    tables.rows.cache_clear()
    assert {name: getattr(chosen, name) for name in outcome.launch} == outcome.launch
