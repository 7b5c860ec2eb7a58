"""torch's side: the registered operators, compile, export, fake tensors and gradients."""

from __future__ import annotations

import copy
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

import anydelta
from anydelta.conformance import gradients as conformance
from anydelta.conformance.cases import Case
from anydelta.conformance.compare import Target
from anydelta.core import dispatch
from anydelta.rule import torch_ops as torch_op  # noqa: F401  (registers the operators)

OPS = torch.ops.anydelta  # there from the import of anydelta.rule.torch_ops or the first torch call on
DIFFERENTIABLE = ("q", "k", "v", "g", "beta", "initial_state", "A_log", "dt_bias", "erase")
POSITIONAL = ("q", "k", "v", "g", "beta")


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    """A fallback to the reference, or a gradient that torch had to make up, would be a warning."""
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*anydelta.*")
        yield


def make(
    *,
    T: int = 5,
    B: int = 2,
    H: int = 1,
    HV: int = 2,
    K: int = 4,
    V: int = 3,
    kda: bool = False,
    decay: str = "log",
    lower_bound: float | None = None,
    logit: bool = False,
    state: bool = True,
    layout: str = "kv",
    lengths: tuple[int, ...] | None = None,
    rows: tuple[int, ...] | None = None,
    P: int | None = None,
    mask: bool = False,
    erase: int = 0,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> dict[str, Any]:
    """Arguments of a valid functional call."""
    random = torch.Generator().manual_seed(T * 31 + K)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    if lengths is not None:
        B, T = 1, sum(lengths)
    N = B if lengths is None else len(lengths)
    gate = (B, T, HV, K) if kda else (B, T, HV)
    x: dict[str, Any] = dict(q=normal(B, T, H, K), k=normal(B, T, H, K) / K**0.5, v=normal(B, T, HV, V))
    g, beta = normal(*gate), normal(B, T, HV)
    x["g"] = g if decay == "raw" else -0.3 * g.abs() if decay == "log" else g.sigmoid()
    x["beta"] = beta if logit else beta.sigmoid()
    if erase:
        del x["beta"]
        x["erase"] = 0.3 * normal(B, T, erase, K)
    if decay == "raw":
        x |= dict(A_log=0.3 * normal(HV), dt_bias=normal(HV, K) if kda else normal(HV))
    if state:
        x["initial_state"] = normal(P or N, HV, *((K, V) if layout == "kv" else (V, K)))
    x = {name: a.to(dtype) for name, a in x.items()}
    if state and dtype == torch.bfloat16:
        x["initial_state"] = x["initial_state"].float()
    if lengths is not None:
        x["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0)
    if rows is not None:
        x["state_indices"] = torch.tensor(rows)
    if mask:
        x["mask"] = torch.rand(B, T, generator=random) < 0.7
    defaults = dict(decay="log", lower_bound=None, state_layout="kv", beta_is_logit=False)
    given = dict(decay=decay, lower_bound=lower_bound, state_layout=layout, beta_is_logit=logit)
    return x | {n: v for n, v in given.items() if v != defaults[n]} | options


CALLS: dict[str, dict[str, Any]] = {
    "gda": make(),
    "kda": make(kda=True, T=4),
    "no state": make(state=False, T=1),
    "raw": make(decay="raw", logit=True, qk_l2norm=True, scale=0.7),
    "raw kda, bounded": make(decay="raw", kda=True, lower_bound=-2.0),
    "linear, tiled, vk": make(decay="linear", H=2, HV=4, heads="tiled", layout="vk"),
    "masked": make(mask=True),
    "packed": make(lengths=(3, 0, 4)),
    "pool": make(rows=(3, -1), P=5),
    "packed pool": make(lengths=(2, 3, 1), rows=(0, 4, 2), P=5, layout="vk", kda=True),
    "bfloat16": make(dtype=torch.bfloat16),
    "no tokens": make(T=0),
    "erase": make(erase=1, mask=True),
    "erase, kda": make(erase=4, kda=True, H=2, HV=4, layout="vk", lengths=(3, 0, 4)),
}
calls = pytest.mark.parametrize("name", CALLS)


def clone(x: dict[str, Any]) -> dict[str, Any]:
    return {n: a.clone() if isinstance(a, Tensor) else a for n, a in x.items()}


def with_grad(x: dict[str, Any], *names: str) -> dict[str, Any]:
    """A copy whose named inputs (all that can, by default) require grad."""
    names = names or DIFFERENTIABLE
    return {
        n: a.detach().clone().requires_grad_(n in names) if n in DIFFERENTIABLE else a for n, a in x.items()
    }


def snapshots_for(x: dict[str, Any], Ks: int = 3) -> Tensor:
    N = x["q"].shape[0] if "cu_seqlens" not in x else len(x["cu_seqlens"]) - 1
    K, V = x["q"].shape[3], x["v"].shape[3]
    tail = (K, V) if x.get("state_layout", "kv") == "kv" else (V, K)
    like = x.get("initial_state")
    return torch.full(
        (Ks, N, x["v"].shape[2], *tail), 42.0, dtype=like.dtype if like is not None else torch.float32
    )


def positional(x: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return tuple(x.get(n) for n in POSITIONAL), {n: a for n, a in x.items() if n not in POSITIONAL}


def inplace(x: dict[str, Any]) -> dict[str, Any]:
    """The same call for the operators that advance `state`."""
    x = clone(x)
    x["state"] = x.pop("initial_state") if "initial_state" in x else snapshots_for(x, 1)[0].zero_()
    return x


# ---- registration
# ------------------------------------------------------------------------------------------------


few = pytest.mark.parametrize("name", ["gda", "raw kda, bounded", "packed pool", "no tokens", "erase, kda"])


@few
def test_opcheck_functional(name: str) -> None:
    args, kwargs = positional(CALLS[name])
    torch.library.opcheck(OPS.gated_delta_rule.default, args, kwargs)


def test_opcheck_without_final_state() -> None:
    args, kwargs = positional(CALLS["masked"])
    torch.library.opcheck(OPS.gated_delta_rule.default, args, kwargs | {"output_final_state": False})


@calls
def test_opcheck_with_gradients(name: str) -> None:
    args, kwargs = positional(with_grad(CALLS[name]))
    torch.library.opcheck(OPS.gated_delta_rule.default, args, kwargs)


@few
def test_opcheck_backward(name: str) -> None:
    x = CALLS[name]
    o, state = anydelta.gated_delta_rule(**x)
    arrays = [x.get(n) for n in (*POSITIONAL, "initial_state", "A_log", "dt_bias")]
    arrays += [x.get(n) for n in ("mask", "cu_seqlens", "state_indices", "erase")]
    wanted = [i for i, a in enumerate(arrays) if a is not None and a.is_floating_point()]
    flags = {n: a for n, a in x.items() if not isinstance(a, Tensor)}
    args = (*arrays, torch.ones_like(o), torch.ones_like(state), wanted)
    torch.library.opcheck(OPS.gated_delta_rule_backward.default, args, flags)


@few
def test_opcheck_snapshots(name: str) -> None:
    x = CALLS[name]
    args, kwargs = positional(x)
    torch.library.opcheck(OPS.gated_delta_rule_snapshots.default, (*args, snapshots_for(x)), kwargs)


@few
@pytest.mark.parametrize("Ks", [0, 2])
def test_opcheck_in_place(name: str, Ks: int) -> None:
    x = inplace(CALLS[name])
    if Ks:
        x["snapshots"] = snapshots_for(CALLS[name], Ks)
    state = x.pop("state")
    args, kwargs = positional(x)
    torch.library.opcheck(OPS.gated_delta_rule_.default, (*args, state), kwargs)


def test_schemas_say_what_is_written() -> None:
    written = {
        name: [a.name for a in getattr(OPS, name).default._schema.arguments if a.is_write]
        for name in ("gated_delta_rule", "gated_delta_rule_snapshots", "gated_delta_rule_")
    }
    assert written == {
        "gated_delta_rule": [],
        "gated_delta_rule_snapshots": ["snapshots"],
        "gated_delta_rule_": ["state", "snapshots"],
    }


@calls
def test_operators_and_public_functions_agree(name: str) -> None:
    x = CALLS[name]
    args, kwargs = positional(x)
    assert_same(OPS.gated_delta_rule(*args, **kwargs), anydelta.gated_delta_rule(**x))
    one, two = snapshots_for(x), snapshots_for(x)
    assert_same(
        OPS.gated_delta_rule_snapshots(*args, one, **kwargs), anydelta.gated_delta_rule(**x, snapshots=two)
    )
    assert_same(one, two)
    one, two = inplace(x), inplace(x)
    args, kwargs = positional(one)
    assert_same(OPS.gated_delta_rule_(*args, **kwargs), anydelta.gated_delta_rule_(**two))
    assert_same(one["state"], two["state"])


def test_no_final_state_is_none_or_empty() -> None:
    x = CALLS["gda"] | {"output_final_state": False}
    args, kwargs = positional(x)
    assert anydelta.gated_delta_rule(**x)[1] is None
    assert OPS.gated_delta_rule(*args, **kwargs)[1].numel() == 0


BAD: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "shape": (lambda x: x | {"beta": x["beta"][:, :1]}, r"beta must be \[B, T, HV\]"),
    "dtype": (lambda x: x | {"k": x["k"].double()}, "q, k and v must share a dtype"),
    "decay": (lambda x: x | {"decay": "sqrt"}, "decay must be one of"),
    "backend": (lambda x: x | {"backend": "cuda"}, "backend must be 'auto' or one of"),
    "index": (lambda x: x | {"state_indices": torch.tensor([0, 0])}, "state_indices must be unique"),
    "range": (lambda x: x | {"state_indices": torch.tensor([0, 9])}, "state_indices must be -1"),
    "scale": (lambda x: x | {"scale": float("nan")}, "scale must be finite"),
    "state": (lambda x: x | {"state": x["state"][..., :2]}, r"state must be \[N, HV, K, V\]"),
    "snapshots": (lambda x: x | {"snapshots": x["snapshots"][0]}, "snapshots must be"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_raises_and_changes_nothing(kind: str) -> None:
    bend, text = BAD[kind]
    x = inplace(make())
    x["snapshots"] = snapshots_for(CALLS["gda"])
    state, snapshots = x["state"].clone(), x["snapshots"].clone()
    args, kwargs = positional(bend(x))
    with pytest.raises(ValueError, match=text):
        OPS.gated_delta_rule_(*args, **kwargs)
    kwargs["initial_state"] = kwargs.pop("state")
    if kind != "index":  # a row may be read twice where none is written
        with pytest.raises(ValueError, match=text):
            OPS.gated_delta_rule_snapshots(*args, **kwargs)
        if kind != "snapshots":
            del kwargs["snapshots"]
            with pytest.raises(ValueError, match=text):
                OPS.gated_delta_rule(*args, **kwargs)
    assert torch.equal(x["state"], state)
    assert torch.equal(x["snapshots"], snapshots)


def assert_same(got: Any, want: Any) -> None:
    """Bit for bit: the same kernel ran."""
    assert_close(got, want, rtol=0, atol=0, equal_nan=True)


# ---- torch.compile
# ------------------------------------------------------------------------------------------------


def compiled(f: Callable[..., Any], backend: str = "aot_eager", **kwargs: Any) -> Callable[..., Any]:
    return torch.compile(f, fullgraph=True, backend=backend, **kwargs)  # type: ignore[no-any-return]


def functional(x: dict[str, Any]) -> Any:
    o, state = anydelta.gated_delta_rule(**x)
    return o * 2, state


def advancing(x: dict[str, Any]) -> Any:
    """Two calls: the second must see the state that the first left."""
    first = anydelta.gated_delta_rule_(**x)
    return first + anydelta.gated_delta_rule_(**x), x["state"] + 1


@calls
def test_compiled_functional(name: str) -> None:
    x = CALLS[name]
    assert_same(compiled(functional)(x), functional(x))


@calls
def test_compiled_in_place(name: str) -> None:
    got, want = inplace(CALLS[name]), inplace(CALLS[name])
    assert_same(compiled(advancing)(got), advancing(want))
    assert_same(got["state"], want["state"])


@pytest.mark.parametrize("name", ["gda", "packed pool", "masked"])
def test_compiled_with_snapshots(name: str) -> None:
    def f(x: dict[str, Any]) -> Any:
        return functional(x), x["snapshots"].sum()

    got, want = (clone(CALLS[name]) | {"snapshots": snapshots_for(CALLS[name])} for _ in range(2))
    assert_same(compiled(f)(got), f(want))
    assert_same(got["snapshots"], want["snapshots"])
    got, want = (inplace(CALLS[name]) | {"snapshots": snapshots_for(CALLS[name])} for _ in range(2))
    assert_same(compiled(advancing)(got), advancing(want))
    assert_same(got["snapshots"], want["snapshots"])
    assert_same(got["state"], want["state"])


def test_compiled_without_final_state() -> None:
    def f(x: dict[str, Any]) -> Any:
        o, state = anydelta.gated_delta_rule(**x, output_final_state=False)
        assert state is None
        return o

    assert_same(compiled(f)(CALLS["gda"]), f(CALLS["gda"]))


@pytest.mark.parametrize("form", ["functional", "in place", "packed"])
def test_compiled_once_for_every_length(form: str) -> None:
    """T is dynamic: one graph serves all lengths."""
    graphs = []

    def count(graph: torch.fx.GraphModule, example: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def f(x: dict[str, Any]) -> Any:
        return functional(x) if form != "in place" else (anydelta.gated_delta_rule_(**x), x["state"])

    run = torch.compile(f, fullgraph=True, backend=count)
    for T in (2, 3, 7, 16):
        x = make(lengths=(2, T), T=T) if form == "packed" else make(T=T)
        got, want = (inplace(x), inplace(x)) if form == "in place" else (x, x)
        for name in POSITIONAL:
            torch._dynamo.mark_dynamic(got[name], 1)
        assert_same(run(got), f(want))
    assert len(graphs) == 1


@pytest.mark.parametrize("kind", ["shape", "dtype", "decay", "scale"])
def test_compiling_a_bad_call_names_the_argument(kind: str) -> None:
    bend, text = BAD[kind]
    x = bend(inplace(make()))
    before = x["state"].clone()
    with pytest.raises(Exception, match=text):
        compiled(lambda x: anydelta.gated_delta_rule_(**x))(x)
    assert torch.equal(x["state"], before)


def test_a_compiled_call_checks_its_indices() -> None:
    f = compiled(lambda x: anydelta.gated_delta_rule_(**x))
    x = inplace(make(rows=(1, 2), P=4))
    f(x)
    before = x["state"].clone()
    x["state_indices"] = torch.tensor([3, 3])
    with pytest.raises(ValueError, match="state_indices must be unique"):
        f(x)
    assert torch.equal(x["state"], before)


@pytest.mark.parametrize("name", ["gda", "raw kda, bounded", "masked", "packed pool", "erase"])
def test_compiled_training(name: str) -> None:
    def loss(x: dict[str, Any]) -> Tensor:
        o, state = anydelta.gated_delta_rule(**x)
        return o.square().sum() + state.sin().sum()

    got, want = with_grad(CALLS[name]), with_grad(CALLS[name])
    compiled(loss)(got).backward()
    loss(want).backward()
    for n in DIFFERENTIABLE:
        if n in want:
            assert_same(got[n].grad, want[n].grad)


class Functional(torch.nn.Module):
    """A layer that keeps no state."""

    def __init__(self) -> None:
        super().__init__()
        self.project = torch.nn.Linear(8, 3 * 8 + 2, dtype=torch.float32)
        self.A_log = torch.nn.Parameter(torch.tensor([0.1, -0.3]))

    def gates(self, x: Tensor) -> dict[str, Any]:
        q, k, v, b, a = self.project(x).split([8, 8, 8, 1, 1], -1)
        q, k, v = (y.reshape(1, -1, 2, 4) for y in (q, k, v))  # strided: slices of one projection
        g, beta = a.expand(-1, -1, 2), b.expand(-1, -1, 2)
        return dict(
            q=q, k=k, v=v, g=g, beta=beta, A_log=self.A_log, decay="raw", beta_is_logit=True, qk_l2norm=True
        )

    def forward(self, x: Tensor) -> Tensor:
        return anydelta.gated_delta_rule(**self.gates(x), output_final_state=False)[0].flatten(2)


class WithBuffer(Functional):
    """The recurrent state is a buffer, as a decoder keeps it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("state", torch.zeros(1, 2, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return anydelta.gated_delta_rule_(state=self.state, **self.gates(x)).flatten(2)


class WithInput(Functional):
    """The recurrent state is the caller's."""

    def forward(self, x: Tensor, state: Tensor) -> Tensor:  # type: ignore[override]
        return anydelta.gated_delta_rule_(state=state, **self.gates(x)).flatten(2)


def layers(kind: type[Functional]) -> tuple[Any, Any]:
    torch.manual_seed(0)
    layer = kind()
    return layer, copy.deepcopy(layer)


def tokens(T: int) -> Tensor:
    return torch.randn(1, T, 8, generator=torch.Generator().manual_seed(T))


def test_inductor() -> None:
    """The default compiler, end to end; compiles C++ and may take a minute."""
    got, want = layers(WithBuffer)
    run = compiled(got, "inductor")
    with torch.no_grad():
        for T in (4, 4):
            assert_close(run(tokens(T)), want(tokens(T)))
            assert_close(got.state, want.state)
    assert got.state.abs().sum() > 0


# ---- torch.export
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed", "dynamic T"])
@pytest.mark.parametrize("kind", [Functional, WithBuffer, WithInput])
@pytest.mark.parametrize("decomposed", [False, True], ids=["as exported", "decomposed"])
def test_export(kind: type[Functional], strict: bool, dynamic: bool, decomposed: bool) -> None:
    layer, want = layers(kind)

    def states() -> tuple[Tensor, ...]:
        return (torch.ones(1, 2, 4, 4),) if kind is WithInput else ()

    shapes = ({1: torch.export.Dim("T", min=2, max=512)}, *(None for _ in states())) if dynamic else None
    with torch.no_grad():
        program = torch.export.export(layer, (tokens(6), *states()), dynamic_shapes=shapes, strict=strict)
        assert any("anydelta" in str(n.target) for n in program.graph.nodes)
        run = (program.run_decompositions({}) if decomposed else program).module()
        for T in (6, 6, 31, 2) if dynamic else (6, 6):
            one, two = states(), states()
            assert_same(run(tokens(T), *one), want(tokens(T), *two))
            assert_same(one, two)
    if kind is WithBuffer:
        assert_same(run.state, want.state)
        assert want.state.abs().sum() > 0


def test_an_exported_program_survives_a_file(tmp_path: Any) -> None:
    layer, want = layers(WithBuffer)
    with torch.no_grad():
        torch.export.save(torch.export.export(layer, (tokens(3),)), tmp_path / "layer.pt2")
        run = torch.export.load(tmp_path / "layer.pt2").module()
        assert_same(run(tokens(3)), want(tokens(3)))


# ---- fake and meta tensors, functionalisation
# ------------------------------------------------------------------------------------------------


def shape_of(x: Any) -> Any:
    if isinstance(x, (tuple, list)):
        return [shape_of(a) for a in x]
    return None if x is None else (tuple(x.shape), tuple(x.stride()), x.dtype)


@calls
def test_fake_tensors_have_the_real_shapes(name: str) -> None:
    x, advanced, snapshots = CALLS[name], inplace(CALLS[name]), snapshots_for(CALLS[name])
    with FakeTensorMode() as mode:
        fake = {n: mode.from_tensor(a) if isinstance(a, Tensor) else a for n, a in x.items()}
        got = anydelta.gated_delta_rule(**fake)
        with_snapshots = anydelta.gated_delta_rule(**fake, snapshots=mode.from_tensor(snapshots))
        moving = {n: mode.from_tensor(a) if isinstance(a, Tensor) else a for n, a in advanced.items()}
        o = anydelta.gated_delta_rule_(**moving)
    want = anydelta.gated_delta_rule(**x)
    assert shape_of(got) == shape_of(with_snapshots) == shape_of(want)
    assert shape_of(o) == shape_of(want[0])


@calls
def test_meta_tensors_have_the_real_shapes(name: str) -> None:
    def meta(x: dict[str, Any]) -> dict[str, Any]:
        return {n: a.to("meta") if isinstance(a, Tensor) else a for n, a in x.items()}

    x = CALLS[name]
    want = anydelta.gated_delta_rule(**x)
    got = anydelta.gated_delta_rule(**meta(x))
    assert shape_of(got) == shape_of(want)
    assert all(a.is_meta for a in got)
    args, kwargs = positional(meta(x))
    assert shape_of(OPS.gated_delta_rule(*args, **kwargs)) == shape_of(list(want))
    assert shape_of(anydelta.gated_delta_rule_(**meta(inplace(x)))) == shape_of(want[0])
    with pytest.raises(ValueError, match="beta must be"):
        anydelta.gated_delta_rule(**meta(x) | {"beta": torch.empty(1, device="meta")})


def test_functionalised() -> None:
    from torch.func import functionalize

    x = CALLS["pool"]
    assert_same(functionalize(lambda x: anydelta.gated_delta_rule(**x))(x), anydelta.gated_delta_rule(**x))
    moving = inplace(x)
    # torch.compile and torch.export functionalise such operators (above); torch.func does not, and says so.
    with pytest.raises(ValueError, match=r"transform of torch\.func"):
        functionalize(lambda x: anydelta.gated_delta_rule_(**x))(moving)
    assert_same(moving["state"], x["initial_state"])


def test_modes_and_transforms_see_the_operator() -> None:
    """The short way past the dispatcher is for calls that nobody watches."""
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(f))
            return f(*args, **(kwargs or {}))

    x = CALLS["gda"]
    with Watch():
        got = anydelta.gated_delta_rule(**x)
    assert seen == ["anydelta.gated_delta_rule.default"]
    assert_same(got, anydelta.gated_delta_rule(**x))

    graph = make_fx(lambda v: anydelta.gated_delta_rule(**x | {"v": v})[0])(x["v"])
    assert_same(graph(2 * x["v"]), anydelta.gated_delta_rule(**x | {"v": 2 * x["v"]})[0])
    two = torch.stack([x["v"], 2 * x["v"]])
    got = torch.func.vmap(lambda v: anydelta.gated_delta_rule(**x | {"v": v})[0])(two)
    assert_same(got, torch.stack([anydelta.gated_delta_rule(**x | {"v": v})[0] for v in two]))


# ---- gradients
# ------------------------------------------------------------------------------------------------


def check_gradients(
    x: dict[str, Any], *names: str, outputs: str = "both", second: bool = False, fast: bool = True
) -> None:
    """gradcheck of the named inputs (by default of all that can)."""
    names = names or tuple(n for n in DIFFERENTIABLE if n in x)
    x = {n: a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for n, a in x.items()}
    leaves = tuple(x[n].detach().clone().requires_grad_() for n in names)

    def f(*leaves: Tensor) -> Any:
        o, state = anydelta.gated_delta_rule(**x | dict(zip(names, leaves, strict=True)))
        return {"both": (o, state), "o": o, "state": state}[outputs]

    assert torch.autograd.gradcheck(f, leaves, fast_mode=fast)
    if second:
        assert torch.autograd.gradgradcheck(f, leaves, fast_mode=True)


def small(**options: Any) -> dict[str, Any]:
    return make(**dict(T=3, B=1, K=3, V=2) | options)


GRADIENTS: dict[str, dict[str, Any]] = {
    "gda": small(B=2),
    "kda": small(kda=True),
    "no state": small(state=False),
    "linear": small(decay="linear"),
    "linear kda": small(decay="linear", kda=True),
    "raw": small(decay="raw"),
    "raw kda": small(decay="raw", kda=True),
    "raw, bounded": small(decay="raw", lower_bound=-3.0),
    "raw kda, bounded": small(decay="raw", kda=True, lower_bound=-3.0),
    "logit": small(logit=True),
    "l2 norm": small(qk_l2norm=True, scale=0.4),
    "tiled": small(H=2, HV=4, heads="tiled", K=2),
    "vk": small(layout="vk"),
    "masked": small(mask=True, B=2),
    "packed": small(lengths=(2, 0, 1)),
    "pool": small(B=2, rows=(3, 1), P=4),
    "pool with a gap": small(B=2, rows=(-1, 1), P=2),
    "pool with a shared row": small(B=2, rows=(1, 1), P=2),
    "all at once": small(
        decay="raw", kda=True, lower_bound=-3.0, logit=True, qk_l2norm=True, layout="vk", lengths=(2, 1),
        rows=(1, 0), P=2, mask=True,
    ),
    "blocks of tokens": make(T=66, B=1, HV=1, K=1, V=1, state=False),
}  # fmt: skip


@pytest.mark.parametrize("fill", [1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("kda", [False, True])
@pytest.mark.parametrize("bound", [None, -3.0])
def test_dead_tokens_leave_no_trace_in_gradients(fill: float, kda: bool, bound: float | None) -> None:
    """Masked tokens, skipped sequences, rows of the pool that nobody reads: zeros there, elsewhere the same bits."""
    x = make(
        B=3, T=5, kda=kda, decay="raw", lower_bound=bound, logit=True, qk_l2norm=True, rows=(2, -1, 2), P=4
    )
    x["mask"] = torch.tensor([[False, True, True, False, True]] * 3)
    dead = ~x["mask"] | torch.tensor([[False], [True], [False]])
    unread = torch.tensor([True, True, False, True])

    def gradients(dirt: float) -> dict[str, Tensor]:
        held = clone(x)
        for n in ("q", "k", "v", "g", "beta"):
            held[n][dead] = dirt
        held["initial_state"][unread] = dirt
        held = with_grad(held)
        o, state = anydelta.gated_delta_rule(**held)
        (o.square().sum() + state.square().sum()).backward()
        return {n: held[n].grad for n in held if n in DIFFERENTIABLE}

    want, got = gradients(0.5), gradients(fill)
    for n, grad in got.items():
        assert torch.equal(grad, want[n]), n
        where = unread if n == "initial_state" else dead if n in ("q", "k", "v", "g", "beta") else None
        assert where is None or not grad[where].any(), n
        assert grad.any(), n


@pytest.mark.parametrize(
    "case", [c for c in conformance.GRADIENT_CASES if c.mask or c.indices or c.key == "vanishing"], ids=str
)
def test_gradients_where_tokens_hold_nan(case: Case) -> None:
    verdict = conformance.check_gradients(case, Target("cpu", framework="torch"))
    assert not verdict.errors, verdict.errors


def test_gradients_of_vectors_whose_squares_leave_the_range() -> None:
    """The norm makes a call indifferent to the length of its keys, and their gradients inverse to it."""
    x = make(B=1, T=4, qk_l2norm=True, qk_l2norm_eps=0.0)
    found = []
    for size in (1.0, 1e-25, 1e25):
        leaves = with_grad(x | {n: x[n] * size for n in ("q", "k")})
        o, _ = anydelta.gated_delta_rule(**leaves)
        o.square().sum().backward()
        found.append(
            {n: leaves[n].grad * (size if n in "qk" else 1) for n in ("q", "k", "v", "g", "initial_state")}
        )
    for other in found[1:]:
        for n, grad in other.items():
            torch.testing.assert_close(grad, found[0][n], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradcheck(name: str) -> None:
    check_gradients(GRADIENTS[name], fast=name not in ("raw kda", "packed"))


@pytest.mark.parametrize("name", ["raw kda, bounded", "pool with a gap"])
def test_gradients_of_gradients(name: str) -> None:
    check_gradients(GRADIENTS[name], second=True)


@pytest.mark.parametrize("outputs", ["o", "state"])
@pytest.mark.parametrize(
    "names", [("q",), ("k",), ("v",), ("g",), ("beta",), ("initial_state",), ("A_log", "v")]
)
def test_only_some_inputs_and_outputs(names: tuple[str, ...], outputs: str) -> None:
    x = small(decay="raw") if "A_log" in names else small()
    check_gradients(x, *names, outputs=outputs)


@pytest.mark.parametrize(
    "x",
    [
        small(T=0),
        small(T=0, state=False),
        small() | {"mask": torch.zeros(1, 3, dtype=torch.bool)},
        small(rows=(-1,), P=2),
        small(lengths=(0, 0)),
        small(lengths=()) | {"cu_seqlens": torch.tensor([0])},
    ],
    ids=["T=0", "T=0 without a state", "nothing but padding", "skipped", "empty sequences", "no sequences"],
)
def test_outputs_that_do_not_depend_on_an_input(x: dict[str, Any]) -> None:
    names = [n for n in DIFFERENTIABLE if n in x]
    for wanted in (names, ["q"], ["v"]):
        leaves = with_grad(x, *wanted)
        o, state = anydelta.gated_delta_rule(**leaves)
        (o.sum() + 3 * state.sum()).backward()
        for n in wanted:
            reached = n == "initial_state" and "state_indices" not in x and x["initial_state"].numel()
            assert_same(leaves[n].grad, torch.full_like(x[n], 3.0 if reached else 0.0))


def gradients(x: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    x = {n: a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for n, a in x.items()}
    x = with_grad(x)
    o, state = anydelta.gated_delta_rule(**x)
    (o.sin().sum() + state.cos().sum()).backward()
    return {n: x[n].grad for n in DIFFERENTIABLE if n in x}


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(kda=True, decay="raw", lower_bound=-5.0),
        dict(decay="raw", qk_l2norm=True, logit=True),
        dict(lengths=(30, 1, 70), mask=True),
    ],
    ids=["gda", "raw kda, bounded", "raw", "packed"],
)
def test_float32_gradients_agree_with_float64(options: dict[str, Any]) -> None:
    x = make(**dict(T=100, B=2, H=2, HV=4, K=16, V=24) | options)
    want = gradients(x, torch.float64)
    for name, got in gradients(x, torch.float32).items():
        assert got.dtype == torch.float32
        error = (got.double() - want[name]).square().sum() / want[name].square().sum()
        assert error < 1e-9, (name, error)


def test_bfloat16_gradients() -> None:
    x = with_grad(make(dtype=torch.bfloat16, T=20))
    o, state = anydelta.gated_delta_rule(**x)
    (o.float().sin().sum() + state.cos().sum()).backward()
    like = {n: a.detach().double() if isinstance(a, Tensor) else a for n, a in x.items()}
    for name, want in gradients(like, torch.float64).items():
        assert x[name].grad.dtype == x[name].dtype
        assert (x[name].grad.double() - want).norm() < 0.02 * want.norm(), name


def test_the_forward_pass_of_training_is_native() -> None:
    if dispatch.reasons_against("cpu", anydelta.explain(**CALLS["gda"]).spec):
        pytest.skip("the cpu backend does not run here")
    x = CALLS["gda"]
    assert_same(anydelta.gated_delta_rule(**with_grad(x))[0].detach(), anydelta.gated_delta_rule(**x)[0])


def test_training_reduces_a_loss() -> None:
    layer, _ = layers(Functional)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.3)
    x, want = tokens(10), torch.ones(1, 10, 8)
    losses = []
    for _ in range(10):
        loss = (layer(x) - want).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert layer.A_log.grad is not None
    assert layer.A_log.grad.abs().sum() > 0
    assert losses[-1] < 0.9 * losses[0]


def test_an_input_changed_before_backward_is_noticed() -> None:
    x = with_grad(CALLS["gda"], "v")
    o, _ = anydelta.gated_delta_rule(**x | {"k": (k := x["k"].clone())})
    k.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        o.sum().backward()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_nothing_is_recorded(mode: Any) -> None:
    x = with_grad(CALLS["gda"])
    with mode():
        o, state = anydelta.gated_delta_rule(**x)
        moving = inplace({n: a.detach() if n == "initial_state" else a for n, a in x.items()})
        in_place = anydelta.gated_delta_rule_(**moving)
    want = anydelta.gated_delta_rule(**CALLS["gda"])
    assert not o.requires_grad
    assert not state.requires_grad
    assert not in_place.requires_grad
    assert_same((o, state), want)
    assert_same((in_place, moving["state"]), want)


@pytest.mark.parametrize("name", ["q", "k", "v", "g", "beta", "state", "A_log", "dt_bias"])
def test_ops_that_write_refuse_gradients(name: str) -> None:
    x = inplace(make(decay="raw"))
    x[name] = x[name].requires_grad_() if name != "state" else (x[name].requires_grad_() * 1)
    before = x["state"].detach().clone()
    args, kwargs = positional(x)
    for run in (
        lambda: anydelta.gated_delta_rule_(**x),
        lambda: OPS.gated_delta_rule_(*args, **kwargs),
        lambda: compiled(lambda x: anydelta.gated_delta_rule_(**x))(x),
    ):
        with pytest.raises(Exception, match=f"the in-place op has no gradient, but {name} requires grad"):
            run()
    assert torch.equal(x["state"], before)
    x["initial_state"] = x.pop("state")
    x["snapshots"] = snapshots_for(x)
    args, kwargs = positional(x)
    name = "initial_state" if name == "state" else name
    for run in (
        lambda: anydelta.gated_delta_rule(**x),
        lambda: OPS.gated_delta_rule_snapshots(*args, **kwargs),
        lambda: compiled(lambda x: anydelta.gated_delta_rule(**x))(x),
    ):
        with pytest.raises(Exception, match=f"snapshots have no gradient, but {name} requires grad"):
            run()
    assert (x["snapshots"] == 42).all()


def test_parameters_and_their_copies() -> None:
    x = {n: torch.nn.Parameter(a) if n in DIFFERENTIABLE else a for n, a in make().items()}
    twin = copy.deepcopy(x)
    want = anydelta.gated_delta_rule(**make())
    assert_same([a.detach() for a in anydelta.gated_delta_rule(**x)], list(want))
    anydelta.gated_delta_rule(**twin)[0].sum().backward()
    assert all(p.grad is None for p in x.values())
    assert twin["v"].grad is not None
    with torch.no_grad():
        assert_same(anydelta.gated_delta_rule(**x), want)


def test_backward_from_several_threads() -> None:
    want = gradients(CALLS["gda"], torch.float32)
    results: list[dict[str, Tensor]] = []
    workers = [
        threading.Thread(target=lambda: results.append(gradients(CALLS["gda"], torch.float32)))
        for _ in range(4)
    ]
    for w in workers:
        w.start()
    for w in workers:
        w.join(60)
    assert len(results) == 4
    for got in results:
        assert_same(got, want)


def test_the_first_call_of_a_process_can_be_compiled() -> None:
    """Nothing of torch's side is imported before."""
    code = """
import torch
from anydelta import gated_delta_rule

def run(q, g, beta):
    return gated_delta_rule(q, q, q, g=g, beta=beta)[0]

q, g, beta = torch.randn(1, 4, 2, 8), -torch.rand(1, 4, 2), torch.rand(1, 4, 2)
compiled = torch.compile(run, backend="eager", fullgraph=True)(q, g, beta)
assert torch.equal(compiled, run(q, g, beta))
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
