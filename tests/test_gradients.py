"""The native backward pass of the CPU kernels against the float64 recurrence under torch's autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import anydelta
from anydelta.backends.cpu import gradients as native
from anydelta.backends.cpu import host
from anydelta.conformance.cases import Case
from anydelta.conformance.compare import Target
from anydelta.conformance.gradients import GRADIENT_CASES, check_gradients, every_gradient_case
from anydelta.conformance.run import run_one
from anydelta.core.native import core
from conftest import count_native, same_bits_on_threads, states_kept

if core is None:
    pytest.skip("the cpu backend is not built", allow_module_level=True)

MORE_CASES = tuple(
    Case.parse(line)
    for line in (
        "T=70 H=1 HV=2 K=32 V=48 decay=linear gate=inf",
        "T=70 H=1 HV=2 K=32 V=48 kda decay=linear gate=inf beta=ends",
        "T=70 H=1 HV=2 K=32 V=48 kda decay=linear gate=mixed",
        "T=40 H=2 HV=4 K=20 V=31 erase=H gate=mixed layout=vk",
        "T=40 H=2 HV=4 K=20 V=31 kda erase=HV l2norm gate=mixed heads=tiled",
        "B=2 T=34 H=2 HV=6 K=16 V=16 kda mask=random erase=H decay=linear",
        "T=70 H=1 HV=2 K=16 V=16 gate=-16 state=faded",
        "T=70 H=1 HV=2 K=16 V=16 kda gate=-40 state=faded",
        "T=130 H=2 HV=4 K=80 V=96 kda gate=keep strides=strided state_strides=transposed",
        "T=200 H=1 HV=3 K=48 V=33 gate=keep strides=fused gate_dtype=float64",
        "B=2 T=17 H=1 HV=1 K=16 V=16 mask=none kda",
        "T=129 H=1 HV=2 K=64 V=64 kda l2norm decay=raw dt_bias=full logit dtype=bfloat16",
        "T=300 H=1 HV=2 K=64 V=64 l2norm decay=raw dt_bias=full logit",
    )
)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes that each call of the native backward pass took."""
    return count_native(monkeypatch, native, "run_backward")


def inputs(T: int = 150, B: int = 2, **options: Any) -> dict[str, Any]:
    """Leaves of a call with two value heads for each of two q/k heads."""
    H, HV, K, V = 2, 4, 32, 64
    torch.manual_seed(7)
    kda = options.pop("kda", False)
    x = dict(
        q=torch.randn(B, T, H, K), k=torch.randn(B, T, H, K), v=torch.randn(B, T, HV, V),
        g=torch.randn(B, T, HV, *(K,) * kda), beta=torch.randn(B, T, HV), A_log=torch.randn(HV) / 4,
        dt_bias=torch.randn(HV, *(K,) * kda), initial_state=torch.randn(B, HV, K, V),
    )  # fmt: skip
    x = {n: a.requires_grad_() for n, a in x.items()}
    return x | dict(decay="raw", beta_is_logit=True, qk_l2norm=True) | options


def gradients(x: dict[str, Any]) -> dict[str, Any]:
    leaves = {n: a for n, a in x.items() if isinstance(a, torch.Tensor) and a.requires_grad}
    o, state = anydelta.gated_delta_rule(**x)
    loss = o.float().sin().sum() + state.cos().sum()
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


@pytest.mark.parametrize("case", [*GRADIENT_CASES, *MORE_CASES], ids=str)
def test_as_float64(case: Case, calls: list[int]) -> None:
    verdict = check_gradients(case, Target("cpu", framework="torch"))
    assert not verdict.errors, verdict.errors
    assert len(calls) == 1


@pytest.mark.parametrize("isa", host.isas())
def test_every_instruction_set(isa: str, calls: list[int]) -> None:
    with host.forced_isa(isa):
        for case in (*GRADIENT_CASES[2:6], *MORE_CASES[1:5]):
            verdict = check_gradients(case, Target("cpu", framework="torch"))
            assert not verdict.errors, verdict.errors
        assert core.last_isa() == isa


def test_conform(calls: list[int]) -> None:
    """The command runs native passes only, and names itself in what repeats a result."""
    line = "T=20 H=1 HV=1 K=16 V=16 kda"
    for backend, status in (("cpu", "OK"), ("reference", "NOT SUPPORTED")):
        result = run_one(Case.parse(line), Target(backend, framework="torch"), gradients=True)
        assert result.status == status
        assert "--gradients --case" in result.reproduce()
    assert len(calls) == 1
    every = [str(c) for c in every_gradient_case()]
    assert len(every) == len(set(every)) > 800
    for word in (
        "erase=HV",
        "decay=linear",
        "mask=left",
        "seqlens=",
        "layout=vk",
        "gate=inf",
        "dtype=float16",
    ):
        assert any(word in case for case in every)


@pytest.mark.parametrize("kda", [False, True])
def test_threads_and_what_memory_held_change_no_bit(kda: bool) -> None:
    x = inputs(kda=kda, mask=torch.rand(2, 150) < 0.8)
    same_bits_on_threads(lambda: gradients(x))


@pytest.mark.parametrize("lengths", [(1000,), (960, 0, 3, 37)])
def test_memory(lengths: tuple[int, ...], calls: list[int]) -> None:
    """No more than a state per 64 tokens and head."""

    def taken(threads: int, *lengths: int) -> int:
        x = {n: a for n, a in inputs(sum(lengths), B=1).items() if n != "initial_state"}
        torch.set_num_threads(threads)
        gradients(x | {"cu_seqlens": torch.tensor([0, *lengths]).cumsum(0)})
        return calls[-1]

    states_kept(taken, 32 * 64 * 4, lengths)


@pytest.mark.parametrize("layout", ["kv", "vk"])
@pytest.mark.parametrize("kda", [False, True])
@pytest.mark.parametrize("lengths", [(2100,), (1100, 0, 700, 1030)])
def test_few_heads_on_many_threads(
    lengths: tuple[int, ...], kda: bool, layout: str, calls: list[int]
) -> None:
    """Then segments of a sequence are tasks, in three passes: the same bits, and no more memory for states."""
    torch.manual_seed(3)
    T, N = sum(lengths), len(lengths)
    x = inputs(T, B=1, kda=kda, state_layout=layout, cu_seqlens=torch.tensor([0, *lengths]).cumsum(0))
    x |= {n: x[n][:, :, :1].detach().requires_grad_() for n in "qk"}
    shape = (N, 4, 32, 64) if layout == "kv" else (N, 4, 64, 32)
    x |= dict(initial_state=torch.randn(shape).requires_grad_(), mask=torch.rand(1, T) < 0.9)
    before, state = torch.get_num_threads(), 32 * 64 * 4
    try:
        torch.set_num_threads(1)
        want = gradients(x)
        scratch = calls[-1] - max(-(-t // 64) for t in lengths) * 4 * state  # of one thread
        for threads in (2, 3, 16):
            torch.set_num_threads(threads)
            core.fill_scratch(0xFF)
            for name, grad in gradients(x).items():
                assert torch.equal(grad, want[name]), (threads, name)
            assert calls[-1] - threads * scratch <= sum(-(-t // 64) for t in lengths) * 4 * state
    finally:
        core.fill_scratch(-1)
        torch.set_num_threads(before)


def test_gradients_without_strides_and_float64_gates(calls: list[int]) -> None:
    """Such as `sum` gives: expanded numbers."""
    x = inputs(20)
    leaves = [x[n] for n in ("q", "v", "g")]

    def of(x: dict[str, Any], leaves: list[Any]) -> Any:
        o, state = anydelta.gated_delta_rule(**x)
        return torch.autograd.grad(o.sum() + state.sum(), leaves)

    found = of(x, leaves)
    assert len(calls) == 1
    x["g"] = x["g"].detach().double().requires_grad_()
    again = of(x, [x[n] for n in ("q", "v", "g")])
    assert len(calls) == 2
    assert again[2].dtype == torch.float64
    for got, want in zip(again, found, strict=True):
        assert torch.equal(got, want.to(got.dtype))


def test_compiled(calls: list[int]) -> None:
    x = inputs(40)
    options = {n: a for n, a in x.items() if not isinstance(a, torch.Tensor)}
    leaves = {n: a for n, a in x.items() if isinstance(a, torch.Tensor)}

    def loss(leaves: dict[str, Any]) -> Any:
        o, state = anydelta.gated_delta_rule(**leaves, **options)
        return o.sin().sum() + state.cos().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    want = torch.autograd.grad(loss(leaves), list(leaves.values()))
    got = torch.autograd.grad(compiled(leaves), list(leaves.values()))
    assert len(calls) == 2
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed(reentrant: bool, calls: list[int]) -> None:
    """By torch.utils.checkpoint, which runs the forward pass again."""
    from torch.utils.checkpoint import checkpoint

    x = inputs(40)
    leaves = [x[n] for n in ("q", "k", "v", "g", "beta")]

    def rule(q: Any, k: Any, v: Any, g: Any, beta: Any) -> Any:
        return anydelta.gated_delta_rule(**x | dict(q=q, k=k, v=v, g=g, beta=beta))[0]

    grads = []
    for o in (rule(*leaves), checkpoint(rule, *leaves, use_reentrant=reentrant)):
        for leaf in leaves:
            leaf.grad = None
        o.sin().sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    assert len(calls) == 2
    assert all(map(torch.equal, *grads))


def test_gradients_of_gradients_are_the_recurrences(calls: list[int]) -> None:
    x = {
        n: a.double().detach().requires_grad_()
        for n, a in inputs(6).items()
        if n in ("q", "k", "v", "g", "beta")
    }
    small = {n: a.float().detach().requires_grad_() for n, a in x.items()}
    found = []
    for leaves in (x, small):
        o, _ = anydelta.gated_delta_rule(**{n: -a.abs() if n == "g" else a for n, a in leaves.items()})
        (first,) = torch.autograd.grad(o.sin().sum(), leaves["k"], create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), leaves["v"])[0])
    assert len(calls) <= 1  # from the output to v; the way over the gradient of k is the recurrence's
    assert (found[1].double() - found[0]).norm() < 1e-4 * found[0].norm()
