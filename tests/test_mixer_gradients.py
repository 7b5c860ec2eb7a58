"""The native backward pass of the mixer on the CPU against the float64 mixer under torch's autograd."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import anydelta
from anydelta.backends.cpu import gradients as native
from anydelta.backends.cpu import host
from anydelta.conformance.compare import Target
from anydelta.conformance.gradients import check_gradients, every_gradient_case
from anydelta.conformance.mixer import MIXER_CASES, MixerCase
from anydelta.conformance.run import OK, run_one
from anydelta.core.native import core
from anydelta.mixer import torch_ops
from conftest import count_native, same_bits_on_threads, states_kept

if core is None:
    pytest.skip("the cpu backend is not built", allow_module_level=True)

CASES = tuple(c for c in every_gradient_case() if isinstance(c, MixerCase))
MORE_CASES = tuple(
    MixerCase.parse(line)
    for line in (
        "T=40 H=1 HV=2 K=16 V=24 W=32 bias inplace=False",
        "B=2 T=33 H=2 HV=4 K=20 V=31 W=5 S=9 kda dtype=bfloat16 mask=random conv_float inplace=False",
        "seqlens=1,0,70,2 H=1 HV=3 K=16 V=40 bias heads=tiled pool=6 indices=5,1,-1,0 inplace=False",
        "seqlens=33,0,70,1 H=2 HV=2 K=16 V=16 kda norm=sigmoid split=split dtype=float16 inplace=False",
        "T=20 H=1 HV=2 K=16 V=16 norm=none linear decay=log dt_bias=none logit=False inplace=False",
    )
)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes that each call of the native backward pass took."""
    return count_native(monkeypatch, native, "run_mixer_backward")


OTHERS = ("conv_state", "state", "g", "beta", "conv_weight", "A_log", "dt_bias", "z", "norm_weight")


def inputs(T: int = 150, B: int = 2, kda: bool = False, **options: Any) -> dict[str, Any]:
    """Leaves of a call with two value heads for each of two q/k heads."""
    H, HV, K, V, W = 2, 4, 16, 32, 4
    C = 2 * H * K + HV * V
    torch.manual_seed(7)
    x = dict(
        qkv=torch.randn(B, T, C), conv_state=torch.randn(B, C, W), state=torch.randn(B, HV, K, V),
        g=torch.randn(B, T, HV, *(K,) * kda), beta=torch.randn(B, T, HV), conv_weight=torch.randn(C, W) / 2,
        A_log=torch.randn(HV) / 4, dt_bias=torch.randn(HV, *(K,) * kda), z=torch.randn(B, T, HV * V),
        norm_weight=torch.rand(V) + 0.5,
    )  # fmt: skip
    return {n: a.requires_grad_() for n, a in x.items()} | options


def loss(x: dict[str, Any]) -> Any:
    x = dict(x)
    o, conv_state, state = anydelta.gated_delta_mixer(x.pop("qkv"), x.pop("conv_state"), x.pop("state"), **x)
    return o.float().sin().sum() + conv_state.cos().sum() + state.cos().sum()


def leaves(x: dict[str, Any]) -> dict[str, Any]:
    return {n: a for n, a in x.items() if isinstance(a, torch.Tensor) and a.requires_grad}


def gradients(x: dict[str, Any], run: Any = loss) -> dict[str, Any]:
    wanted = leaves(x)
    return dict(zip(wanted, torch.autograd.grad(run(x), list(wanted.values())), strict=True))


@pytest.mark.parametrize("first", range(0, len(CASES), 50))
def test_as_float64(first: int, calls: list[int]) -> None:
    cases = CASES[first : first + 50]
    for case in cases:
        verdict = check_gradients(case, Target("cpu", framework="torch"))
        assert not verdict.errors, (case, verdict.errors)
    assert len(calls) == len(cases)


@pytest.mark.parametrize("isa", host.isas())
def test_every_instruction_set(isa: str, calls: list[int]) -> None:
    with host.forced_isa(isa):
        for case in (*MORE_CASES, *CASES[:8]):
            verdict = check_gradients(case, Target("cpu", framework="torch"))
            assert not verdict.errors, (case, verdict.errors)
        assert core.last_isa() == isa
    assert len(calls) == len(MORE_CASES) + 8


def test_the_list_and_the_command(calls: list[int]) -> None:
    """As many cases as the mixer's list has without its snapshots, which have no gradient."""
    assert len(CASES) > 400
    assert {str(c) for c in CASES} <= {str(c) for c in every_gradient_case()}
    words = (
        "split=split",
        "split=grouped",
        "norm=none",
        "mask=left",
        "seqlens=",
        "W=32",
        "dtype=float16",
        "kda",
    )
    for word in words:
        assert any(word in str(case) for case in CASES), word
    result = run_one(MORE_CASES[0], Target("cpu", framework="torch"), gradients=True)
    assert (result.status, len(calls)) == (OK, 1)
    assert "--gradients --case" in result.reproduce()
    result = run_one(MORE_CASES[0], Target("reference", framework="torch"), gradients=True)
    assert result.status == "NOT SUPPORTED"
    assert not any(c in MIXER_CASES for c in MORE_CASES)


def test_the_comparison_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slip of 1e-3 in one gradient is found, and named."""
    slip = native.mixer_gradients

    def wrong(*arguments: Any) -> dict[str, Any]:
        found = slip(*arguments)
        found["conv_weight"] = found["conv_weight"] * (1 + 1e-3)
        return found

    monkeypatch.setattr(native, "mixer_gradients", wrong)
    verdict = check_gradients(CASES[0], Target("cpu", framework="torch"))
    assert [e for e in verdict.errors if e.startswith("gradient of conv_weight:")], verdict.errors
    assert len(verdict.errors) == 1


@pytest.mark.parametrize("kda", [False, True])
def test_threads_and_what_memory_held_change_no_bit(kda: bool) -> None:
    x = inputs(kda=kda, mask=torch.rand(2, 150) < 0.8)
    same_bits_on_threads(lambda: gradients(x))


@pytest.mark.parametrize("lengths", [(1000,), (960, 0, 3, 37)])
def test_memory(lengths: tuple[int, ...], calls: list[int]) -> None:
    """No more than a state per 64 tokens and head."""

    def taken(threads: int, *lengths: int) -> int:
        x = inputs(sum(lengths), B=1)
        states = {n: torch.zeros(len(lengths), *x[n].shape[1:]) for n in ("conv_state", "state")}
        torch.set_num_threads(threads)
        gradients(x | states | {"cu_seqlens": torch.tensor([0, *lengths]).cumsum(0)})
        return calls[-1]

    states_kept(taken, 16 * 32 * 4, lengths)


def test_only_what_is_wanted_is_computed(calls: list[int]) -> None:
    """Frozen parameters and states that nobody follows have no gradient, and those of the others keep their bits."""
    x = inputs(40)
    want = gradients(x)
    for names in (("qkv",), ("norm_weight", "state"), ("conv_weight", "conv_state")):
        some = {
            n: a.detach().requires_grad_(n in names) if isinstance(a, torch.Tensor) else a
            for n, a in x.items()
        }
        found = gradients(some)
        assert found.keys() == set(names)
        assert all(torch.equal(found[n], want[n]) for n in names)


def test_gradients_without_strides_and_float64_gates(calls: list[int]) -> None:
    """Such as `sum` gives: expanded numbers. The states' own may be missing."""
    x = inputs(20)

    def total(x: dict[str, Any]) -> Any:
        x = dict(x)
        return anydelta.gated_delta_mixer(x.pop("qkv"), x.pop("conv_state"), x.pop("state"), **x)[0].sum()

    found = gradients(x, total)
    again = gradients(x | {"g": x["g"].detach().double().requires_grad_()}, total)
    assert len(calls) == 2
    assert again["g"].dtype == torch.float64
    assert all(torch.equal(again[n], found[n].to(again[n].dtype)) for n in found)


def test_states_that_share_memory(calls: list[int]) -> None:
    """Zeros without memory of their own, as the layers of a model begin with."""
    x = inputs(20)
    held = {n: x[n].detach() * 0 for n in ("conv_state", "state")}
    want = gradients(x | held)
    found = gradients(x | {n: torch.zeros(()).expand(a.shape) for n, a in held.items()})
    assert len(calls) == 2
    assert all(torch.equal(found[n], want[n]) for n in want)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(backend: str, calls: list[int]) -> None:
    x = inputs(40)
    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    want = gradients(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # inductor's own
        got = gradients(x, compiled)
    assert len(calls) == 2
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed(reentrant: bool, calls: list[int]) -> None:
    """By torch.utils.checkpoint, which runs the forward pass again."""
    x = inputs(40)
    names = list(leaves(x))

    def run(*tensors: Any) -> Any:
        return loss(x | dict(zip(names, tensors, strict=True)))

    grads = []
    for result in (run(*leaves(x).values()), checkpoint(run, *leaves(x).values(), use_reentrant=reentrant)):
        for leaf in leaves(x).values():
            leaf.grad = None
        result.backward()
        grads.append([leaf.grad for leaf in leaves(x).values()])
    assert len(calls) == 2
    assert all(map(torch.equal, *grads))


def test_opcheck() -> None:
    x = inputs(20)
    others = [x.get(n) for n in torch_ops._OTHERS]
    operator = torch.ops.anydelta.gated_delta_mixer.default
    torch.library.opcheck(operator, ([x["qkv"]], *others))
    q, k, v = x["qkv"].detach().split((32, 32, 128), -1)
    torch.library.opcheck(operator, ([t.requires_grad_() for t in (q, k, v)], *others))


@pytest.mark.parametrize("how", ["grad", "vjp", "operator", "compiled", "batched", "forwards"])
def test_transforms(how: str) -> None:
    """torch.func and batched gradients go through torch's own operators around the rule, and give the same."""
    x = inputs(20)
    want = gradients(x)["qkv"]
    held = {n: a.detach() if isinstance(a, torch.Tensor) else a for n, a in x.items()}

    def of_qkv(qkv: Any) -> Any:
        if how != "operator":
            return loss(held | {"qkv": qkv})
        o, c, s = torch.ops.anydelta.gated_delta_mixer([qkv], *(held.get(n) for n in torch_ops._OTHERS))
        return o.sin().sum() + c.cos().sum() + s.cos().sum()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the rule's own: slow
        if how == "vjp":
            got = torch.func.vjp(of_qkv, held["qkv"])[1](torch.ones(()))[0]
        elif how == "batched":
            leaf = held["qkv"].clone().requires_grad_()
            twice = torch.tensor([1.0, 2.0])
            got = torch.autograd.grad(of_qkv(leaf), leaf, twice, is_grads_batched=True)[0]
            torch.testing.assert_close(got[1], 2 * got[0])
            got = got[0]
        elif how == "forwards":
            along = torch.randn_like(want)
            _, tangent = torch.func.jvp(of_qkv, (held["qkv"],), (along,))
            torch.testing.assert_close(tangent, (want * along).sum(), rtol=1e-4, atol=1e-4)
            return
        else:
            grad = torch.func.grad(of_qkv)
            got = (torch.compile(grad, backend="aot_eager") if how == "compiled" else grad)(held["qkv"])
    assert float((got - want).norm()) < 1e-5 * float(want.norm())


def test_gradients_of_gradients(calls: list[int]) -> None:
    small = inputs(6)
    x = {n: a.detach().double().requires_grad_() for n, a in small.items()}
    found = []
    for each in (x, small):
        (first,) = torch.autograd.grad(loss(each), each["qkv"], create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), each["z"])[0])
    assert len(calls) <= 1  # from the output to z; the way over the gradient of qkv is torch's own
    assert float((found[1].double() - found[0]).norm()) < 1e-4 * float(found[0].norm())


def test_snapshots_have_no_gradient() -> None:
    x = inputs(5)
    snapshots = torch.empty(2, *x["state"].shape)
    with pytest.raises(ValueError, match="snapshots have no gradient"):
        anydelta.gated_delta_mixer(
            x.pop("qkv"), x.pop("conv_state"), x.pop("state"), snapshots=snapshots, **x
        )


def test_what_was_changed_meanwhile_is_noticed() -> None:
    x = inputs(5)
    held = x["z"].detach().clone().requires_grad_()
    gate = held * 1
    result = loss(x | {"z": gate})
    with torch.no_grad():
        gate.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.backward()


# ---- What public reports say of other implementations


def parts_of(x: dict[str, Any], first: int, end: int) -> dict[str, Any]:
    return x | {n: x[n][:, first:end] for n in ("qkv", "g", "beta", "z")}


def run(x: dict[str, Any]) -> tuple[Any, Any, Any]:
    x = dict(x)
    return anydelta.gated_delta_mixer(x.pop("qkv"), x.pop("conv_state"), x.pop("state"), **x)


@pytest.mark.parametrize("cuts", [(1, 2), (1, 3, 4), (7, 8), (2, 20)])
def test_chunks_shorter_than_the_window(cuts: tuple[int, ...], calls: list[int]) -> None:
    """A conv state's gradients go on through chunks that do not replace all of it (flash-linear-attention#1140)."""
    x = inputs(24)

    def chunked(x: dict[str, Any]) -> Any:
        outputs, at = [], 0
        states = {n: x[n] for n in ("conv_state", "state")}
        for end in (*cuts, 24):
            o, conv_state, state = run(parts_of(x, at, end) | states)
            states, at = dict(conv_state=conv_state, state=state), end
            outputs.append(o)
        return (
            torch.cat(outputs, 1).sin().sum() + states["conv_state"].cos().sum() + states["state"].cos().sum()
        )

    want, got = gradients(x), gradients(x, chunked)
    assert len(calls) == 2 + len(cuts)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-5)


def test_gradients_that_are_views_of_a_larger_one(calls: list[int]) -> None:
    """As `cat`, `stack` and `transpose` hand them back (pytorch#194719)."""
    x = inputs(20)
    wanted = list(leaves(x).values())
    weights = [torch.randn(2, 4 * s.numel() // 2) for s in run(x)]

    def grads(dense: bool) -> Any:
        results = run(x)
        total = 0
        for each, weight in zip(results, weights, strict=True):
            wide = torch.cat([each.transpose(1, 2), each.transpose(1, 2)], -1).flatten(1)
            total = total + (wide * weight[:, : wide.shape[1]]).sum()
        given = torch.autograd.grad(total, results, retain_graph=True)
        assert any(not g.is_contiguous() for g in given)
        if not dense:
            return torch.autograd.grad(total, wanted)
        return torch.autograd.grad(results, wanted, [g.contiguous() for g in given])

    assert all(map(torch.equal, grads(False), grads(True)))


@pytest.mark.parametrize("norm_eps", [1e-6, 0.0])
def test_rows_of_zeros(norm_eps: float, calls: list[int]) -> None:
    """Padding of zeros has keys and outputs of length 0, where a norm has no slope of its own (maxtext#5295)."""
    x = inputs(20, norm_eps=norm_eps)
    zeros = {n: torch.zeros_like(x[n]).requires_grad_() for n in ("qkv", "conv_state", "state")}
    for name, grad in gradients(x | zeros).items():
        assert grad.isfinite().all(), name
    left = x["qkv"].detach().clone()
    left[:, :6] = 0
    for name, grad in gradients(x | zeros | {"qkv": left.requires_grad_()}).items():
        assert grad.isfinite().all(), name
    assert len(calls) == 2


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_an_overflow_is_seen(value: float, calls: list[int]) -> None:
    """By who scales losses and looks for it in every gradient (flash-linear-attention#77); rows beside it keep
    theirs."""
    x = inputs(40)
    wanted = leaves(x)
    o = run(x)[0]
    given = torch.randn_like(o)
    want = torch.autograd.grad(o, list(wanted.values()), given, retain_graph=True)
    given[1, 30, 5] = value
    got = torch.autograd.grad(o, list(wanted.values()), given)
    assert len(calls) == 2
    for name, a, b in zip(wanted, got, want, strict=True):
        assert not a.isfinite().all(), name
        if len(a) == 2:
            assert torch.equal(a[0], b[0]), name


@pytest.mark.parametrize("kda", [False, True])
def test_gates_that_forget_all(kda: bool, calls: list[int]) -> None:
    """No gradient is divided by a decay (mlx-lm#1389): decays that float32 cannot hold have slopes of 0."""
    x = inputs(40, kda=kda)
    for gate in (40.0, 1e4, -1e4):
        found = gradients(x | {"g": torch.full_like(x["g"], gate).requires_grad_()})
        assert all(grad.isfinite().all() for grad in found.values())
        if gate == 40.0:  # exp(-40) can be held: slopes of that size are right
            assert float(found["g"].abs().max()) < 1e-10
        else:
            assert not found["g"].any()
    assert len(calls) == 3


def test_a_state_that_already_predicts_the_value(calls: list[int]) -> None:
    """What is left of v - S k is small beside both (attention-gym#465): half types hold v alone."""
    K = 16
    key = torch.zeros(1, 1, 1, K, dtype=torch.bfloat16)
    key[..., 0] = 1
    v = torch.full((1, 1, 1, K), 4096.0, dtype=torch.bfloat16)
    beta = torch.full((1, 1, 1), 0.5, requires_grad=True)
    state = torch.zeros(1, 1, K, K)
    state[..., 0, :] = 4098
    o, _ = anydelta.gated_delta_rule(
        key, key, v, g=torch.zeros(1, 1, 1), beta=beta, initial_state=state, scale=1.0
    )
    o.float().sum().backward()
    assert float(beta.grad) == -2.0 * K


def test_a_learned_initial_state(calls: list[int]) -> None:
    """One state for all rows of a batch, as in state tuning (flash-linear-attention#19)."""
    x = inputs(20)
    learned = {n: torch.randn(x[n].shape[1:], requires_grad=True) for n in ("conv_state", "state")}
    expanded = {n: a.expand(x[n].shape) for n, a in learned.items()}
    got = torch.autograd.grad(loss(x | expanded), list(learned.values()))
    apart = {n: a.detach().repeat(2, *(1,) * a.ndim).requires_grad_() for n, a in learned.items()}
    want = gradients(x | apart)
    for name, grad in zip(learned, got, strict=True):
        torch.testing.assert_close(grad, want[name].sum(0), rtol=1e-5, atol=1e-6)


def test_packed_rows_are_the_rows_alone(calls: list[int]) -> None:
    """Their gradients too, those of parameters added up (unsloth#4160)."""
    lengths = (1, 40, 2, 17)
    x = inputs(sum(lengths), B=1)
    rows = {
        n: torch.randn(len(lengths), *x[n].shape[1:], requires_grad=True) for n in ("conv_state", "state")
    }
    cu = torch.tensor([0, *lengths]).cumsum(0)
    got = gradients(x | rows | {"cu_seqlens": cu})

    def alone(x: dict[str, Any]) -> Any:
        return sum(
            loss(parts_of(x, int(cu[i]), int(cu[i + 1])) | {n: x[n][i : i + 1] for n in rows})
            for i in range(len(lengths))
        )

    want = gradients(x | rows, alone)
    assert len(calls) == 1 + len(lengths)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-5)
