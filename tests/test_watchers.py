"""Calls that somebody follows: tracers, transforms, dual numbers, subclasses, autograd's count of versions. The fast
path reads memory and leaves no trace, so it has to know."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import CPU_REASONS, without

torch = pytest.importorskip("torch")
import torch.autograd.forward_ad as fw  # noqa: E402

import anydelta  # noqa: E402
from anydelta import StatePool, UnsupportedError, gated_delta_rule, gated_delta_rule_  # noqa: E402
from anydelta.compat import fla  # noqa: E402
from anydelta.rule import torch_ops as torch_op  # noqa: E402

T, H, K, V, W = 6, 2, 8, 8, 3
C = 2 * H * K + H * V
ops = torch.ops.anydelta
pytestmark = pytest.mark.filterwarnings(
    "ignore:gated_delta_rule. derivatives by torch.func", "ignore:.*performance drop"
)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def tokens() -> dict[str, Any]:
    q, k, v = torch.randn(3, 1, T, H, K) / 2
    return dict(q=q, k=k, v=v, g=-torch.rand(1, T, H), beta=torch.rand(1, T, H))


def layer() -> dict[str, Any]:
    return dict(
        qkv=torch.randn(1, T, C), g=torch.randn(1, T, H), beta=torch.randn(1, T, H), conv_weight=torch.randn(C, W),
        A_log=torch.randn(H), dt_bias=torch.randn(H), z=torch.randn(1, T, H * V), norm_weight=torch.rand(V),
    )  # fmt: skip


def state(n: int = 1) -> Any:
    return torch.randn(n, H, K, V)


def window(n: int = 1) -> Any:
    return torch.randn(n, C, W)


def rule(x: dict[str, Any], **more: Any) -> Any:
    return gated_delta_rule(x["q"], x["k"], x["v"], g=x["g"], beta=x["beta"], **more)


def rule_(x: dict[str, Any], S: Any, **more: Any) -> Any:
    return gated_delta_rule_(x["q"], x["k"], x["v"], S, g=x["g"], beta=x["beta"], **more)


def mixer(x: dict[str, Any], S: Any, window: Any) -> Any:
    x = dict(x)
    return anydelta.gated_delta_mixer(x.pop("qkv"), window, S, **x)


def mixer_(x: dict[str, Any], S: Any, window: Any, **more: Any) -> Any:
    x = dict(x)
    return anydelta.gated_delta_mixer_(x.pop("qkv"), window, S, **x, **more)


# ---- Arrays without memory


def test_every_argument_of_every_entry_without_memory_of_its_own() -> None:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("onlookers.py"))],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert done.returncode == 0, "\n".join(
        [*(x for x in lines if ": " in x), *lines[-2:], done.stderr[-2000:]]
    )
    assert lines[-1].endswith("cases, 0 problems")


@pytest.mark.skipif(bool(CPU_REASONS), reason="the extension is not built")
def test_the_extension_reads_this_torch() -> None:
    if torch.__version__ < "2.10":
        without("torch 2.10")
    assert torch_op.reads()
    x = torch.ones(3)
    assert torch_op.plain(x)
    assert torch_op.plain(torch.nn.Parameter(x))
    assert not torch_op.plain(torch._neg_view(x))
    assert not torch_op.plain(torch._efficientzerotensor(3))


def test_a_masked_numpy_array_is_refused() -> None:
    x = {n: a.numpy() for n, a in tokens().items()}
    x["v"] = np.ma.masked_array(x["v"], mask=x["v"] > 0)
    with pytest.raises(TypeError, match=r"v must be an array without a mask"):
        rule(x)


# ---- What a remembered plan must not forget


def twice(call: Callable[[], Any]) -> Iterator[Any]:
    """The result cold, and after a call that leaves a plan."""
    yield call()
    yield call()


def test_a_conjugated_view_has_its_own_sign() -> None:
    x = tokens()
    x["beta"] = torch.rand(1, T, 1)
    x = {n: a[:, :, :1] for n, a in x.items()}
    want = rule({**x, "beta": -x["beta"]})[0]
    rule(x)  # leaves a plan for this geometry
    z = torch.complex(torch.zeros_like(x["beta"]), x["beta"])
    for got in twice(lambda: rule({**x, "beta": z.conj().imag})[0]):
        assert torch.equal(got, want)


def test_a_leaf_that_requires_grad_is_refused_cold_and_warm() -> None:
    x, y = tokens(), layer()
    leaf = state().requires_grad_()
    with torch.no_grad():
        for _ in range(2):
            with pytest.raises(ValueError, match="state is written in place and must not require grad"):
                rule_(x, leaf)
            with pytest.raises(ValueError, match="state is written in place and must not require grad"):
                mixer_(y, leaf, window())
            rule_(x, state())
            mixer_(y, state(), window())


def test_an_inference_tensor_is_written_in_inference_mode_only() -> None:
    x = tokens()
    with torch.inference_mode():
        made = state()
    for _ in range(2):
        with pytest.raises(ValueError, match="state is written in place and must not be an inference tensor"):
            rule_(x, made)
        with torch.inference_mode():
            rule_(x, made)


def test_a_read_only_array_is_refused_cold_and_warm() -> None:
    x = {n: a.numpy() for n, a in tokens().items()}
    S, read_only = state().numpy(), state().numpy()
    read_only.flags.writeable = False
    for _ in range(2):
        with pytest.raises(ValueError, match="read-only"):
            rule_(x, read_only)
        rule_(x, S)


def test_a_foreign_byte_order_is_refused_cold_and_warm() -> None:
    x = {n: a.numpy() for n, a in tokens().items()}
    swapped = {**x, "g": x["g"].astype(x["g"].dtype.newbyteorder())}
    for _ in range(2):
        with pytest.raises(ValueError, match="byte order"):
            rule(swapped)
        rule(x)


# ---- Autograd's count of versions


def versions(call: Callable[[], Any], *arrays: Any) -> list[bool]:
    before = [x._version for x in arrays]
    call()
    return [x._version > n for x, n in zip(arrays, before, strict=True)]


def test_in_place_writes_are_counted() -> None:
    x, y = tokens(), layer()
    S, pool, Ss, w, ws = state(), state(3), state(2)[:, None], window(), window(2)[:, None]
    rows, keep = torch.tensor([1]), torch.tensor([[2]])
    flat = (x["q"], x["k"], x["v"], x["g"], x["beta"])
    for _ in range(2):
        assert versions(lambda: rule_(x, S), S, x["q"]) == [True, False]
        assert versions(lambda: rule_(x, pool, state_indices=rows), pool) == [True]
        assert versions(lambda: rule_(x, pool, state_indices=rows, snapshot_indices=keep), pool) == [True]
        assert versions(lambda: rule_(x, S, snapshots=Ss), S, Ss) == [True, True]
        assert versions(lambda: rule(x, initial_state=S, snapshots=Ss), S, Ss) == [False, True]
        assert versions(lambda: rule_(x, S, backend="reference"), S) == [True]
        assert versions(lambda: ops.gated_delta_rule_(*flat, S), S) == [True]
        assert versions(lambda: ops.gated_delta_rule_(*flat, S, Ss), S, Ss) == [True, True]
        assert versions(lambda: ops.gated_delta_rule_snapshots(*flat, Ss, S), S, Ss) == [False, True]
        assert versions(lambda: mixer_(y, S, w), S, w, y["qkv"]) == [True, True, False]
        more = dict(snapshots=Ss, conv_snapshots=ws)
        assert versions(lambda m=more: mixer_(y, S, w, **m), S, w, Ss, ws) == [True] * 4
        assert versions(lambda: mixer(y, S, w), S, w) == [False, False]


def test_autograd_refuses_a_saved_state_that_was_advanced() -> None:
    x, S = tokens(), state()
    y = (torch.randn_like(S, requires_grad=True) * S).sum()
    with torch.no_grad():
        rule_(x, S)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.parametrize("form", ["slots", "log"])
def test_a_pool_counts_its_writes(form: str) -> None:
    pool = StatePool(2, H=H, HV=H, K=K, V=V, snapshots=T + 1, form=form, device="cpu")
    pool.new()
    x = tokens()
    held = pool._form.rows.states if form == "slots" else pool._form.keys
    pool.begin(T)
    assert versions(lambda: pool.run(**x), held) == [True]


# ---- Derivatives


def loss(x: dict[str, Any], S: Any) -> Callable[[Any], Any]:
    return lambda v: rule({**x, "v": v}, initial_state=S)[0].sin().sum()


def by_backward(f: Callable[[Any], Any], v: Any) -> Any:
    v = v.clone().requires_grad_()
    (found,) = torch.autograd.grad(f(v), v)
    return found


OPERATOR: dict[str, Callable[[dict[str, Any], Any], Callable[[Any], Any]]] = {
    "rule": loss,
    "torch.ops": lambda x, S: lambda v: ops.gated_delta_rule(x["q"], x["k"], v, x["g"], x["beta"], S)[0].sin().sum(),
    "fla": lambda x, S: lambda v: fla.chunk_gated_delta_rule(
        x["q"], x["k"], v, x["g"], x["beta"], initial_state=S
    )[0].sin().sum(),
}  # fmt: skip


@pytest.mark.parametrize("entry", OPERATOR)
def test_every_transform_gives_the_derivative(entry: str) -> None:
    x, S = tokens(), state()
    f, v = OPERATOR[entry](x, S), x["v"]
    want = by_backward(f, v)
    along = torch.randn_like(v)
    close = dict(rtol=1e-4, atol=1e-5)
    assert torch.allclose(torch.func.grad(f)(v), want, **close)
    assert torch.allclose(torch.func.vjp(f, v)[1](torch.tensor(1.0))[0], want, **close)
    assert torch.allclose(torch.func.jvp(f, (v,), (along,))[1], (want * along).sum(), **close)
    assert torch.allclose(torch.func.jacrev(f)(v), want, **close)
    assert torch.allclose(torch.func.jacfwd(f)(v), want, **close)
    two = torch.stack([v, 2 * v])
    assert torch.allclose(torch.func.vmap(torch.func.grad(f))(two)[1], by_backward(f, 2 * v), **close)
    assert torch.allclose(torch.func.vmap(f)(two)[1], f(2 * v), **close)
    for grad in (True, False):
        with torch.set_grad_enabled(grad), fw.dual_level():
            tangent = fw.unpack_dual(f(fw.make_dual(v, along))).tangent
        assert torch.allclose(tangent, (want * along).sum(), **close)


def test_compiled_tangents_are_those_of_the_eager_call() -> None:
    x = tokens()
    v, along = x["v"], torch.randn_like(x["v"])

    def f(v: Any) -> Any:
        return rule({**x, "v": v})[0] + v

    for derivative in (lambda v, d: torch.func.jvp(f, (v,), (d,))[1], lambda v, _: torch.func.jacfwd(f)(v)):
        compiled = torch.compile(derivative, backend="eager")
        assert torch.allclose(compiled(v, along), derivative(v, along))


def test_a_compiled_tangent_through_a_written_state_is_refused() -> None:
    x, S = tokens(), state()
    f = torch.compile(
        lambda v: torch.func.jvp(lambda v: rule_({**x, "v": v}, S), (v,), (v,)), backend="eager"
    )
    before = S.clone()
    with pytest.raises(Exception, match="Calls that write to an argument have no derivative"):
        f(x["v"])
    assert torch.equal(S, before)


def test_batched_gradients() -> None:
    x = tokens()
    v = x["v"].requires_grad_()
    o, _ = rule(x)
    along = torch.randn(3, *o.shape)
    (got,) = torch.autograd.grad(o, v, along, is_grads_batched=True, retain_graph=True)
    want = [torch.autograd.grad(o, v, d, retain_graph=True)[0] for d in along]
    assert torch.allclose(got, torch.stack(want), atol=1e-6)

    y, S, w = layer(), state(), window()

    def mixed(qkv: Any) -> Any:
        return mixer({**y, "qkv": qkv}, S, w)[0]

    got, want = (torch.autograd.functional.jacobian(mixed, y["qkv"], vectorize=b) for b in (True, False))
    assert torch.allclose(got, want, atol=1e-5)


def test_the_hessian() -> None:
    x, S = tokens(), state()
    x = {n: a[:, :3] for n, a in x.items()}
    f = loss(x, S)
    want = torch.autograd.functional.hessian(f, x["v"])
    assert torch.allclose(torch.func.hessian(f)(x["v"]), want, atol=1e-5)


def test_transforms_of_the_mixer() -> None:
    x, S, w = layer(), state(), window()
    mask = torch.ones(1, T, dtype=torch.bool)
    mask[0, 1] = False

    def f(qkv: Any) -> Any:
        return mixer({**x, "qkv": qkv, "mask": mask}, S, w)[0].sin().sum()

    want, along = by_backward(f, x["qkv"]), torch.randn_like(x["qkv"])
    close = dict(rtol=1e-4, atol=1e-5)
    assert torch.allclose(torch.func.grad(f)(x["qkv"]), want, **close)
    assert torch.allclose(torch.func.jvp(f, (x["qkv"],), (along,))[1], (want * along).sum(), **close)
    with fw.dual_level():
        tangent = fw.unpack_dual(f(fw.make_dual(x["qkv"], along))).tangent
    assert torch.allclose(tangent, (want * along).sum(), **close)
    two = torch.stack([x["qkv"], 2 * x["qkv"]])
    assert torch.allclose(torch.func.vmap(f)(two)[1], f(two[1]), **close)
    assert torch.allclose(torch.func.vmap(torch.func.grad(f))(two)[0], want, **close)


def test_gates_states_and_weights_have_derivatives_too() -> None:
    x, S, y, w = tokens(), state(), layer(), window()
    for name in ("g", "beta", "q", "k"):

        def f(a: Any, name: str = name) -> Any:
            return rule({**x, name: a}, initial_state=S)[0].sin().sum()

        assert torch.allclose(torch.func.grad(f)(x[name]), by_backward(f, x[name]), atol=1e-5)

    def of_state(S: Any) -> Any:
        return rule(x, initial_state=S)[1].sin().sum()

    assert torch.allclose(torch.func.grad(of_state)(S), by_backward(of_state, S), atol=1e-5)
    for name in ("A_log", "dt_bias", "conv_weight", "norm_weight", "z"):

        def of_mixer(a: Any, name: str = name) -> Any:
            return mixer({**y, name: a}, S, w)[0].sin().sum()

        assert torch.allclose(torch.func.grad(of_mixer)(y[name]), by_backward(of_mixer, y[name]), atol=1e-5)


def writers() -> dict[str, Callable[[Any], Any]]:
    """Calls on v, or on qkv[..., :V] for the mixer, that write to an argument."""
    x, y, S, w = tokens(), layer(), state(), window()
    flat = lambda v: (x["q"], x["k"], v, x["g"], x["beta"])  # noqa: E731
    qkv = lambda v: [y["qkv"] * v.mean()]  # noqa: E731
    rest = {n: a for n, a in y.items() if n != "qkv"}
    return {
        "in place": lambda v: rule_({**x, "v": v}, S),
        "snapshots": lambda v: rule({**x, "v": v}, snapshots=S[None])[0],
        "torch.ops, in place": lambda v: ops.gated_delta_rule_(*flat(v), S),
        "torch.ops, snapshots": lambda v: ops.gated_delta_rule_snapshots(*flat(v), S[None])[0],
        "mixer, in place": lambda v: mixer_({**y, "qkv": qkv(v)[0]}, S, w),
        "torch.ops, mixer": lambda v: ops.gated_delta_mixer_(qkv(v), w, S, **rest),
    }


@pytest.mark.parametrize("name", writers())
def test_what_writes_to_an_argument_refuses_derivatives(name: str) -> None:
    f, v = writers()[name], tokens()["v"]
    for transform in (
        lambda: torch.func.grad(lambda v: f(v).sum())(v),
        lambda: torch.func.jvp(f, (v,), (v,)),
        lambda: torch.func.vmap(f)(torch.stack([v, v])),
    ):
        with pytest.raises(ValueError, match=r"gradient|derivative|tangent"):
            transform()
    for grad in (True, False):
        with (
            torch.set_grad_enabled(grad),
            fw.dual_level(),
            pytest.raises(ValueError, match=r"gradient|derivative|tangent"),
        ):
            f(fw.make_dual(v, v))


def test_a_transform_that_follows_none_of_the_tensors_changes_nothing() -> None:
    x, S = tokens(), state()
    want_o, want_S = rule(x, initial_state=S)
    got = []

    def f(a: Any) -> Any:
        got.append(rule_(x, S))
        return a.sin()

    torch.func.grad(f)(torch.tensor(1.0))
    assert torch.equal(got[0], want_o)
    assert torch.equal(S, want_S)


def test_a_log_refuses_what_follows_it() -> None:
    pool = StatePool(1, H=H, HV=H, K=K, V=V, snapshots=T + 1, form="log", device="cpu")
    pool.new()
    pool.begin(T)
    x = tokens()
    with fw.dual_level(), pytest.raises(UnsupportedError, match="log requires plain tensors"):
        pool.run(**{**x, "v": fw.make_dual(x["v"], x["v"])})
    assert pool.run(**x).shape == (1, T, H, V)


# ---- torch.jit.trace, and what is built on it


def test_a_trace_holds_the_operator_and_replays_it() -> None:
    x, other, S = tokens(), tokens(), state()

    def functional(q: Any, k: Any, v: Any) -> Any:
        return rule({**x, "q": q, "k": k, "v": v}, initial_state=S)

    def in_place(q: Any, k: Any, v: Any, S: Any) -> Any:
        return rule_({**x, "q": q, "k": k, "v": v}, S)

    def through_fla(q: Any, k: Any, v: Any) -> Any:
        return fla.chunk_gated_delta_rule(q, k, v, x["g"], x["beta"], output_final_state=True)

    first, again = (tuple(a[n] for n in "qkv") for a in (x, other))
    for f in (functional, through_fla):
        traced = torch.jit.trace(f, first)
        assert "anydelta::gated_delta_rule" in str(traced.graph)
        for got, want in zip(traced(*again), f(*again), strict=True):
            assert torch.equal(got, want)
    traced = torch.jit.trace(in_place, (*first, S.clone()), check_trace=False)
    ours, theirs = S.clone(), S.clone()
    assert torch.equal(traced(*again, theirs), in_place(*again, ours))
    assert torch.equal(ours, theirs)


def test_a_trace_of_the_mixer() -> None:
    x, S, w = layer(), state(), window()

    def functional(qkv: Any, z: Any) -> Any:
        return mixer({**x, "qkv": qkv, "z": z}, S, w)

    def in_place(qkv: Any, z: Any) -> Any:
        own, held = S.clone(), w.clone()
        return mixer_({**x, "qkv": qkv, "z": z}, own, held), own, held

    for f in (functional, in_place):
        traced = torch.jit.trace(f, (x["qkv"], x["z"]))
        assert "anydelta::gated_delta_mixer_" in str(traced.graph)
        other = (torch.randn_like(x["qkv"]), torch.randn_like(x["z"]))
        for got, want in zip(traced(*other), f(*other), strict=True):
            assert torch.equal(got, want)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("call", ["rule", "rule in place", "mixer"])
def test_the_old_onnx_exporter_is_refused(call: str, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    x, S, w = (layer() if call == "mixer" else tokens()), state(), window()

    class Module(torch.nn.Module):
        def forward(self, v: Any) -> Any:
            if call == "mixer":
                return mixer_({**x, "qkv": v}, S.clone(), w.clone())
            return rule({**x, "v": v})[0] if call == "rule" else rule_({**x, "v": v}, S.clone())

    with pytest.raises(UnsupportedError, match=r"torch.onnx.export requires dynamo=True .* got dynamo=False"):
        torch.onnx.export(
            Module(), (x["qkv" if call == "mixer" else "v"],), str(tmp_path / "out.onnx"), dynamo=False
        )


def test_a_function_mode_sees_the_operator() -> None:
    from torch.overrides import TorchFunctionMode

    seen = []

    class Tap(TorchFunctionMode):
        def __torch_function__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(f))
            return f(*args, **(kwargs or {}))

    x = tokens()
    want = rule(x)[0]
    with Tap():
        got = rule(x)[0]
    assert any("anydelta.gated_delta_rule" in name for name in seen)
    assert torch.equal(got, want)
