"""The gated delta mixer: every backend against the float64 oracle, invalid calls, laws, torch's side."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import anydelta
from anydelta.backends.reference import mixer as composed
from anydelta.conformance import MIXER_CASES, OK, MixerCase, Target
from anydelta.conformance.mixer import (
    NORMS,
    SPLITS,
    MixerPrepared,
    check_mixer_case,
    mixer_buffers,
    mixer_call,
    mixer_inputs,
    random_mixer_case,
)
from anydelta.conformance.run import parse, run_one
from anydelta.core.native import core
from anydelta.mixer import reference
from conftest import CPU_REASONS, CPU_TARGETS

needs_cpu = pytest.mark.skipif(bool(CPU_REASONS), reason="; ".join(CPU_REASONS) or "runs")
BATCH = 60
BACKENDS = ["reference"] if CPU_REASONS else ["cpu", "reference"]


@lru_cache(maxsize=BATCH)
def prepared(case: MixerCase) -> MixerPrepared:
    return MixerPrepared.of(case)


def failures(cases: tuple[MixerCase, ...], target: Target) -> list[str]:
    bad = [r for c in cases if (r := run_one(prepared(c), target)).status != OK]
    return [f"{r.status}: {r.reproduce()}: {'; '.join(r.reasons)}" for r in bad]


# ---- conformance


@needs_cpu
@pytest.mark.parametrize("first", range(0, len(MIXER_CASES), BATCH))
def test_cpu(first: int) -> None:
    for target in CPU_TARGETS:
        bad = failures(MIXER_CASES[first : first + BATCH], target)
        assert not bad, f"{len(bad)} on {target}:\n" + "\n".join(bad)


@pytest.mark.parametrize("framework", ["numpy", "torch"])
def test_reference(framework: str) -> None:
    small = tuple(c for c in MIXER_CASES if c.work <= 20_000)[::3]
    assert len(small) > 30
    bad = failures(small, Target("reference", framework=framework))
    assert not bad, "\n".join(bad)


def test_float64_runs_on_the_reference() -> None:
    case = MixerCase(B=2, T=9, H=1, HV=2, K=16, V=24, dtype="float64", state_dtype="float64", gate_dtype="float64",
                     snapshots=2)  # fmt: skip
    for framework in ("numpy", "torch"):
        assert not failures((case,), Target("reference", framework=framework))


def test_a_case_reads_back_from_its_line() -> None:
    assert len(set(MIXER_CASES)) == len(MIXER_CASES) > 250
    for case in MIXER_CASES:
        assert parse(str(case)) == case
    with pytest.raises(ValueError, match="split must be one of"):
        parse("mixer split=halves")


def test_the_list_covers_the_contract() -> None:
    def some(**fields: Any) -> bool:
        return any(all(getattr(c, k) == v for k, v in fields.items()) for c in MIXER_CASES)

    assert {c.split for c in MIXER_CASES} == set(SPLITS)
    assert {c.norm for c in MIXER_CASES} == set(NORMS)
    assert {c.dtype for c in MIXER_CASES} == {"float32", "bfloat16", "float16"}
    assert {c.W for c in MIXER_CASES} >= {1, 2, 3, 4, 5, 7, 32}
    assert {c.mask for c in MIXER_CASES} >= {"", "left", "right", "random", "none", "all"}
    assert any(c.snapshots > c.T for c in MIXER_CASES)
    assert any(0 < c.snapshots < c.T for c in MIXER_CASES)
    assert any(c.seqlens and 0 in c.seqlens for c in MIXER_CASES)
    assert any(c.refused for c in MIXER_CASES)
    assert some(neg=True)
    assert some(kda=True, norm="sigmoid")
    assert some(heads="tiled", snapshots=0)
    assert some(state_dtype="bfloat16")
    assert some(state_dtype="float16")
    assert some(inplace=False)


@pytest.mark.parametrize("part", ["o", "state", "conv_state", "snapshots 1", "conv_snapshots 0"])
def test_the_comparison_can_fail(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slip of 1e-3 in one element of one part is found, and named."""
    case = MixerCase(B=2, T=5, H=1, HV=2, K=8, V=8, snapshots=2)
    run = composed.ComposedMixer.run

    def slip(self: Any, plan: Any, spec: Any, call: Any) -> None:
        run(self, plan, spec, call)
        name, *slot = part.split()
        x = getattr(call, name)
        (x[int(slot[0])] if slot else x).reshape(-1)[0] += 1e-2 * np.abs(x).max()

    target = Target("reference")
    assert not check_mixer_case(case, target).errors
    monkeypatch.setattr(composed.ComposedMixer, "run", slip)
    errors = check_mixer_case(case, target).errors
    assert [e for e in errors if e.startswith(f"{part}:")], errors


# ---- laws


def tensors(case: MixerCase, framework: str = "torch") -> tuple[Any, Any, Any, dict[str, Any]]:
    """(qkv, conv_state, state, the other arrays) of a case with packed qkv."""
    held = mixer_buffers(case, mixer_inputs(case), Target("auto", framework=framework))
    arrays = {name: b.array for name, b in held.items()}
    if framework == "torch":
        arrays = {n: x.clone() for n, x in arrays.items()}
    return arrays.pop("qkv"), arrays.pop("conv_state"), arrays.pop("state"), arrays


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_any_call_agrees_with_the_oracle(seed: int) -> None:
    case = random_mixer_case(np.random.default_rng(seed))
    for backend in BACKENDS:
        bad = failures((case,), Target(backend, framework="torch"))
        assert not bad, bad


@needs_cpu
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_threads_do_not_change_a_bit(seed: int) -> None:
    rng = np.random.default_rng(seed)
    case = replace(random_mixer_case(rng), H=4, HV=8, split="packed", snapshots=2, inplace=True)
    if case.refused:
        return
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        held = mixer_buffers(case, mixer_inputs(case), Target("cpu", framework="torch"))
        try:
            o, *_ = mixer_call(case, held, "cpu")
        finally:
            torch.set_num_threads(before)
        results.append(
            [o.view(torch.int16), *(torch.from_numpy(b._after().copy().view(np.int8)) for b in held.values())]
        )
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pieces_equal_the_whole(backend: str, dtype: str) -> None:
    """A sequence in one call, and cut anywhere with the states carried over."""
    case = MixerCase(B=2, T=60, H=2, HV=4, K=16, V=16, dtype=dtype, gate="keep")
    qkv, conv_state, state, rest = tensors(case)
    whole = [conv_state.clone(), state.clone()]
    want = anydelta.gated_delta_mixer_(qkv, *whole, **rest, backend=backend)
    for cuts in ((0, 1, 2, 3, 30, 60), (0, 49, 60), tuple(range(61))):
        parts = [conv_state.clone(), state.clone()]
        got = []
        for a, b in itertools.pairwise(cuts):
            sliced = {n: x[:, a:b] if n in ("g", "beta", "z") else x for n, x in rest.items()}
            got.append(anydelta.gated_delta_mixer_(qkv[:, a:b], *parts, **sliced, backend=backend))
        limit = 1e-5 if dtype == "float32" else 0.02
        assert float((torch.cat(got, 1) - want).abs().max()) <= limit * float(want.abs().max())
        assert torch.equal(parts[0], whole[0])
        # bfloat16: a whole chunk may go through a matrix unit, whose factors have 16 bits
        assert torch.allclose(parts[1], whole[1], atol=1e-5 if dtype == "float32" else 1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_is_as_if_it_were_not_there(backend: str) -> None:
    """A row alone, and the same row with padding left, right and in the middle: the same outputs and states."""
    case = MixerCase(T=12, H=1, HV=2, K=8, V=8)
    qkv, conv_state, state, rest = tensors(case)
    alone = [conv_state.clone(), state.clone()]
    want = anydelta.gated_delta_mixer_(qkv, *alone, **rest, backend=backend)
    at = torch.tensor([1, 2, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14])
    spread = {n: torch.full((1, 17, *x.shape[2:]), float("nan")).index_copy(1, at, x) if n in ("g", "beta", "z") else x
              for n, x in rest.items()}  # fmt: skip
    wide = torch.full((1, 17, case.C), float("nan")).index_copy(1, at, qkv)
    mask = torch.zeros(1, 17, dtype=torch.bool).index_fill(1, at, True)
    got = anydelta.gated_delta_mixer_(wide, conv_state, state, **spread, mask=mask, backend=backend)
    assert torch.allclose(got[:, at], want, atol=1e-6)
    assert torch.equal(conv_state, alone[0])
    assert torch.allclose(state, alone[1], atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_wide_conv_state_goes_back(backend: str) -> None:
    """conv_state[..., :-s] is the conv state of s tokens earlier, and so is snapshot slot s."""
    case = MixerCase(T=9, H=1, HV=1, K=8, V=8, S=3 + 4, snapshots=5)
    qkv, conv_state, state, rest = tensors(case)
    before = conv_state.clone()
    anydelta.gated_delta_mixer_(qkv, conv_state, state, **rest, backend=backend)
    everything = torch.cat([before, qkv.transpose(1, 2)], -1)
    assert torch.equal(conv_state, everything[..., -7:])
    for s in range(5):
        assert torch.equal(
            rest["conv_snapshots"][s], everything[..., everything.shape[-1] - 7 - s :][..., :7]
        )
        assert torch.equal(conv_state[..., : 7 - s], rest["conv_snapshots"][s][..., s:])


def test_the_functional_op_leaves_the_states_alone() -> None:
    case = MixerCase(B=2, T=5, H=1, HV=2, K=8, V=8)
    qkv, conv_state, state, rest = tensors(case)
    kept = conv_state.clone(), state.clone()
    o, new_conv, new_state = anydelta.gated_delta_mixer(qkv, conv_state, state, **rest)
    assert torch.equal(conv_state, kept[0])
    assert torch.equal(state, kept[1])
    assert torch.equal(anydelta.gated_delta_mixer_(qkv, conv_state, state, **rest), o)
    assert torch.equal(new_conv, conv_state)
    assert torch.equal(new_state, state)


def test_the_oracle_by_hand() -> None:
    """One head of size 1, two tokens, no norm: every number written out."""
    ones = np.ones((1, 2, 1))
    got = reference.gated_delta_mixer(
        2 * ones, 3 * ones, np.array([[[1.0], [5.0]]]), np.array([[[7.0], [0.0], [4.0]]]), np.full((1, 1, 1, 1), 0.5),
        g=np.log(0.5) * ones, beta=0.25 * ones, conv_weight=np.array([[10.0, 1.0], [0.0, 1.0], [1.0, 1.0]]),
        decay="log", beta_is_logit=False, activation=None, qk_l2norm=False, scale=1.0,
    )  # fmt: skip
    # q: 70 + 2, 20 + 2; k: 3, 3; v: 4 + 1, 1 + 5
    s0 = 0.5 * 0.5
    s1 = s0 + 3 * 0.25 * (5 - 3 * s0)
    s2 = 0.5 * s1 + 3 * 0.25 * (6 - 3 * 0.5 * s1)
    assert np.allclose(got.o.ravel(), [72 * s1, 22 * s2])
    assert np.allclose(got.rule.state.ravel(), s2)
    assert got.conv_state.ravel().tolist() == [2.0, 3.0, 5.0]


# ---- invalid calls


def valid() -> dict[str, Any]:
    case = MixerCase(B=2, T=3, H=1, HV=2, K=8, V=4)
    qkv, conv_state, state, rest = tensors(case)
    return dict(qkv=qkv, conv_state=conv_state, state=state, **rest)


INVALID: list[tuple[str, Callable[[dict[str, Any]], dict[str, Any]], type[Exception], str]] = [
    ("width", lambda a: dict(qkv=a["qkv"][..., :-1]), ValueError, r"qkv must be \[B, T, 2 H K \+ HV V\]"),
    ("two arrays", lambda a: dict(qkv=(a["qkv"], a["qkv"])), TypeError, "qkv must be one packed array or the three"),
    ("no array", lambda a: dict(qkv=3), TypeError, "qkv must be a torch.Tensor or a numpy.ndarray; got int"),
    ("k's width", lambda a: dict(qkv=(a["qkv"][..., :8], a["qkv"][..., :7], a["qkv"][..., :8])), ValueError,
     "k must be"),
    ("v's dtype", lambda a: dict(qkv=(a["qkv"][..., :8], a["qkv"][..., :8], a["qkv"][..., :8].half())), ValueError,
     "q, k and v must share a dtype"),
    ("no state", lambda a: dict(state=None), TypeError, "state must be an array"),
    ("state rank", lambda a: dict(state=a["state"][0]), ValueError, r"state must be \[N, HV, K, V\]"),
    ("state rows", lambda a: dict(state=a["state"][:1]), ValueError, "state must have N = 2 rows"),
    ("state dtype", lambda a: dict(state=a["state"].int()), ValueError, "state must have dtype"),
    ("conv rows", lambda a: dict(conv_state=a["conv_state"][:1]), ValueError, "conv_state must have as many rows"),
    ("conv columns", lambda a: dict(conv_state=a["conv_state"][..., :2]), ValueError, r"S >= W - 1 = 3"),
    ("conv dtype", lambda a: dict(conv_state=a["conv_state"].half()), ValueError, "conv_state must have dtype float32"),
    ("conv None", lambda a: dict(conv_state=None), TypeError, "conv_state must be an array"),
    ("conv shared", lambda a: dict(conv_state=a["conv_state"][:1].expand(2, -1, -1)), ValueError, "share memory"),
    ("weight", lambda a: dict(conv_weight=a["conv_weight"][1:]), ValueError, r"conv_weight must be \[C, W\]"),
    ("weight rank", lambda a: dict(conv_weight=a["conv_weight"][:, None]), ValueError, r"conv_weight must be \[C, W\]"),
    ("bias", lambda a: dict(conv_bias=a["conv_weight"][1:, 0]), ValueError, r"conv_bias must be \[C\]"),
    ("activation", lambda a: dict(activation="gelu"), ValueError, "activation must be 'silu' or None; got 'gelu'"),
    ("gate", lambda a: dict(norm_gate="tanh"), ValueError, "norm_gate must be one of 'silu', 'sigmoid'"),
    ("eps", lambda a: dict(norm_eps=-1.0), ValueError, "norm_eps must be >= 0"),
    ("neg", lambda a: dict(allow_neg_eigval=1), TypeError, "allow_neg_eigval must be True or False"),
    ("z", lambda a: dict(z=a["z"][..., 1:]), ValueError, "z must be"),
    ("z alone", lambda a: dict(norm_weight=None), ValueError, "requires norm_weight"),
    ("norm", lambda a: dict(norm_weight=a["norm_weight"][1:]), ValueError, r"norm_weight must be \[V\]"),
    ("g", lambda a: dict(g=a["g"][..., 1:]), ValueError, "gated_delta_mixer_: g must be"),
    ("A_log", lambda a: dict(A_log=None), ValueError, "requires A_log"),
    ("layout", lambda a: dict(state_layout="ab"), ValueError, "state_layout must be one of"),
    ("heads", lambda a: dict(heads="none"), ValueError, "heads must be one of"),
    ("mask", lambda a: dict(mask=torch.ones(2, 3)), ValueError, "mask must have dtype bool"),
    ("cu", lambda a: dict(cu_seqlens=torch.tensor([0, 3])), ValueError, "requires B = 1"),
    ("conv snapshots alone", lambda a: dict(conv_snapshots=a["conv_state"][None].clone()), ValueError,
     "conv_snapshots go with snapshots"),
    ("indices", lambda a: dict(state_indices=torch.tensor([0, 0])), ValueError, "unique"),
    ("backend", lambda a: dict(backend="cuda"), ValueError, "backend must be 'auto' or one of"),
    ("numpy", lambda a: dict(z=a["z"].numpy()), TypeError, "z must be a torch array as qkv is; got numpy"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "text"), [i[1:] for i in INVALID], ids=[i[0] for i in INVALID])
@pytest.mark.parametrize("inplace", [True, False], ids=["in place", "functional"])
def test_invalid_calls(change: Any, error: type[Exception], text: str, inplace: bool) -> None:
    arrays = valid()
    changed = {**arrays, **change(arrays)}
    if not inplace and ("share memory" in text or text == "unique"):
        pytest.skip("the functional op only reads the states")
    before = {n: x.clone() for n, x in arrays.items()}
    op = anydelta.gated_delta_mixer_ if inplace else anydelta.gated_delta_mixer
    with pytest.raises(error, match=text if inplace else text.replace("mixer_", "mixer")) as raised:
        op(**changed)
    assert str(raised.value).startswith("gated_delta_mixer")
    assert all(torch.equal(x, before[n]) for n, x in arrays.items())


def test_unknown_and_missing_arguments() -> None:
    arrays = valid()
    with pytest.raises(TypeError, match="unexpected keyword argument 'chunk'"):
        anydelta.gated_delta_mixer(**arrays, chunk=3)
    del arrays["g"]
    with pytest.raises(TypeError, match="missing required keyword-only argument 'g'"):
        anydelta.gated_delta_mixer(**arrays)


def test_explain_says_what_runs() -> None:
    arrays = valid()
    trace = anydelta.explain_mixer(**arrays)
    assert trace.chosen == BACKENDS[0]
    assert str(trace).startswith("gated_delta_mixer_ GDA B=2 T=3 H=1 HV=2 K=8 V=4")
    double = {n: x.double() if x.is_floating_point() else x for n, x in arrays.items()}
    trace = anydelta.explain_mixer(**double)
    assert trace.chosen == "reference"
    assert any("float64" in str(r) for r in trace.rejected.get("cpu", ())) or CPU_REASONS


@needs_cpu
def test_too_many_taps_are_refused_by_name_and_fall_back() -> None:
    case = MixerCase(T=3, H=1, HV=1, K=8, V=8, W=33)
    qkv, conv_state, state, rest = tensors(case)
    with pytest.raises(anydelta.UnsupportedError, match="takes up to 32 taps of the convolution; got 33"):
        anydelta.gated_delta_mixer_(qkv, conv_state, state, **rest, backend="cpu")
    assert not failures((case,), Target("auto", framework="torch"))


@needs_cpu
def test_a_backend_without_a_mixer_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from anydelta.core import dispatch

    monkeypatch.setattr(dispatch.get_backend("cpu"), "mixer", None)
    arrays = valid()
    with pytest.raises(anydelta.UnsupportedError, match="has no kernel for the mixer"):
        anydelta.gated_delta_mixer_(**arrays, norm_eps=2e-6, backend="cpu")
    assert anydelta.explain_mixer(**arrays).chosen == "reference"


@needs_cpu
def test_the_kernel_is_what_runs() -> None:
    assert core is not None
    before = core.calls()
    anydelta.gated_delta_mixer_(**valid())
    assert core.calls() == before + 1


# ---- torch's side


def arguments(case: MixerCase) -> tuple[list[Any], dict[str, Any]]:
    """The operator's positional arguments and the rest."""
    qkv, conv_state, state, rest = tensors(case)
    args = [[qkv], conv_state, state, rest.pop("g"), rest.pop("beta"), rest.pop("conv_weight")]
    return args, rest


@pytest.mark.parametrize("kda", [False, True])
def test_opcheck(kda: bool) -> None:
    args, rest = arguments(MixerCase(B=2, T=3, H=1, HV=2, K=8, V=8, kda=kda, snapshots=2, bias=True))
    torch.library.opcheck(torch.ops.anydelta.gated_delta_mixer_.default, tuple(args), rest)


@pytest.mark.parametrize("split", [False, True], ids=["packed", "split"])
def test_compiles_in_one_graph(split: bool) -> None:
    qkv, conv_state, state, rest = tensors(MixerCase(B=2, T=3, H=1, HV=2, K=8, V=8))

    def f(x: Any, conv: Any, s: Any) -> Any:
        y = tuple(x.split((8, 8, 16), -1)) if split else x
        return anydelta.gated_delta_mixer_(y, conv, s, **rest) * 2

    ours = [conv_state.clone(), state.clone()]
    want = f(qkv, *ours)
    torch._dynamo.reset()
    for backend in ("eager", "aot_eager"):
        theirs = [conv_state.clone(), state.clone()]
        got = torch.compile(f, fullgraph=True, backend=backend)(qkv, *theirs)
        assert torch.equal(got, want)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    torch._dynamo.reset()


def test_exports() -> None:
    qkv, conv_state, state, rest = tensors(MixerCase(B=2, T=3, H=1, HV=2, K=8, V=8))

    class Layer(torch.nn.Module):
        def forward(self, x: Any, conv: Any, s: Any, rest: dict[str, Any]) -> Any:
            return anydelta.gated_delta_mixer_(x, conv, s, **rest)

    program = torch.export.export(Layer(), (qkv, conv_state.clone(), state.clone(), rest))
    assert "gated_delta_mixer_" in str(program.graph)
    ours, theirs = [conv_state.clone(), state.clone()], [conv_state.clone(), state.clone()]
    assert torch.equal(program.module()(qkv, *theirs, rest), anydelta.gated_delta_mixer_(qkv, *ours, **rest))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_the_fake_kernel_checks_and_shapes() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    arrays = valid()
    with FakeTensorMode() as mode:
        fake = {n: mode.from_tensor(x) for n, x in arrays.items()}
        assert anydelta.gated_delta_mixer_(**fake).shape == (2, 3, 8)
        with pytest.raises(ValueError, match="conv_weight must be"):
            anydelta.gated_delta_mixer_(**{**fake, "conv_weight": fake["conv_weight"][1:]})


def test_in_place_has_no_gradient_and_says_so() -> None:
    arrays = valid()
    arrays["z"].requires_grad_()
    with pytest.raises(ValueError, match="the in-place op has no gradient, but z requires grad"):
        anydelta.gated_delta_mixer_(**arrays)


@pytest.mark.parametrize("fill", [1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("neg", [False, True])
def test_dead_tokens_leave_no_trace_in_gradients(fill: float, neg: bool) -> None:
    """Masked tokens, a skipped sequence, and rows of both pools that nobody reads. Two sequences share a row."""
    case = MixerCase(B=3, T=5, H=1, HV=2, K=6, V=4, W=3, bias=True, mask="random", pool=4, indices=(2, -1, 2), neg=neg,
                     inplace=False)  # fmt: skip
    qkv, conv_state, state, rest = tensors(case)
    live = rest["mask"] & torch.tensor([[True], [False], [True]])
    assert 3 < live.sum() < 10
    fixed = {n: rest.pop(n) for n in ("mask", "state_indices")}
    names = ("qkv", "conv_state", "state", *rest)

    def gradients(dirt: float) -> dict[str, torch.Tensor]:
        arrays = [torch.nan_to_num(x) for x in (qkv, conv_state, state, *rest.values())]
        leaves = {}
        for n, x in zip(names, arrays, strict=True):
            if n in ("qkv", "z", "g", "beta"):
                x = torch.where(live.reshape(3, 5, *[1] * (x.ndim - 2)), x, dirt)
            elif n in ("conv_state", "state"):
                x = x.clone()
                x[[0, 1, 3]] = dirt
            leaves[n] = x.detach().requires_grad_()
        o, conv, final = anydelta.gated_delta_mixer(**leaves, **fixed, allow_neg_eigval=neg)
        sum(y.square().sum() for y in (o, conv, final)).backward()
        return {n: x.grad for n, x in leaves.items()}

    want, got = gradients(0.5), gradients(fill)
    for n, grad in got.items():
        assert torch.equal(grad, want[n]), n
        assert grad.any(), n
    for n in ("qkv", "z", "g", "beta"):
        assert not got[n][~live].any(), n


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("size", "eps"), [(1e-22, 0.0), (1e22, 0.0), (1e22, 1e-6)])
def test_norms_of_vectors_whose_squares_leave_the_range(backend: str, size: float, eps: float) -> None:
    """With hardly an eps both norms forget the length of what they norm, and a row of zeros stays one."""
    case = MixerCase(T=7, H=1, HV=2, K=16, V=20, norm="plain", linear=True)
    values = mixer_inputs(case)
    outs = []
    for factor, least in ((1.0, 0.0), (size, eps)):
        held = mixer_buffers(case, values, Target(backend, framework="torch"))
        arrays = {n: b.array for n, b in held.items()}
        arrays["qkv"][:, 3] = 0
        arrays["conv_state"][:] = 0
        arrays["state"][:] = 0
        arrays["qkv"] *= factor
        out = anydelta.gated_delta_mixer_(
            arrays.pop("qkv"), arrays.pop("conv_state"), arrays.pop("state"), **arrays, activation=None,
            qk_l2norm_eps=least, norm_eps=least, backend=backend,
        )  # fmt: skip
        outs.append(out)
    assert outs[0].any()
    torch.testing.assert_close(outs[1], outs[0], rtol=1e-5, atol=1e-5)


def test_gradients_of_the_functional_op() -> None:
    case = MixerCase(B=2, T=4, H=1, HV=2, K=3, V=2, W=3, dtype="float64", state_dtype="float64", gate_dtype="float64",
                     mask="left", bias=True)  # fmt: skip
    qkv, conv_state, state, rest = tensors(case)
    mask = rest.pop("mask")
    names = list(rest)
    leaves = [torch.nan_to_num(x).double().requires_grad_() for x in (qkv, conv_state, state, *rest.values())]

    def f(qkv: Any, conv: Any, s: Any, *others: Any) -> Any:
        return anydelta.gated_delta_mixer(qkv, conv, s, mask=mask, **dict(zip(names, others, strict=True)))

    assert torch.autograd.gradcheck(f, leaves)
