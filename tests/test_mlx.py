"""The operator on MLX arrays: against the oracle, against MLX's own op and mlx-lm's recurrence, and as MLX values."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import anydelta
from anydelta.conformance import CASES, NOT_SUPPORTED, OK, Case, Target
from anydelta.conformance.run import run_one
from anydelta.core import plans
from conftest import CPU_REASONS, without

if importlib.util.find_spec("mlx") is None:
    without("mlx is not installed")
if CPU_REASONS:
    pytest.skip("the cpu backend is not built", allow_module_level=True)

import mlx.core as mx

from anydelta import mlx as face
from anydelta.mlx import gated_delta_rule

Values = dict[str, Any]


def values(
    B: int = 2,
    T: int = 9,
    H: int = 2,
    HV: int = 4,
    K: int = 32,
    V: int = 16,
    kda: bool = False,
    seed: int = 0,
) -> Values:
    draw = np.random.default_rng(seed).standard_normal

    def normal(*shape: int) -> Any:
        return draw(shape, dtype=np.float32)

    g = normal(B, T, HV, K) if kda else normal(B, T, HV)
    return {
        "q": normal(B, T, H, K) / np.float32(K**0.5), "k": normal(B, T, H, K) / np.float32(K**0.5),
        "v": normal(B, T, HV, V), "g": -np.abs(g) * np.float32(0.3), "beta": 1 / (1 + np.exp(-normal(B, T, HV))),
        "initial_state": normal(B, HV, K, V),
    }  # fmt: skip


def arrays(x: Values) -> Values:
    return {name: mx.array(a) if isinstance(a, np.ndarray) else a for name, a in x.items()}


def close(got: mx.array, want: Any, limit: float = 1e-5) -> None:
    assert got.shape == tuple(want.shape)
    assert np.abs(np.asarray(got.astype(mx.float32)) - np.asarray(want)).max(initial=0.0) <= limit


# ---- right


def test_the_list_on_mlx_arrays() -> None:
    """Poisoned memory, strides, bfloat16, pools, packed sequences, snapshots: inputs must keep every bit."""
    cases = [c for c in CASES if not (c.inplace or c.erase) and c.work <= 300_000][::3]
    assert len(cases) > 200
    kinds = {(c.dtype, bool(c.seqlens), bool(c.indices), bool(c.snapshots), c.kda) for c in cases}
    assert len(kinds) > 15
    bad = [r for c in cases if (r := run_one(c, Target("cpu", framework="mlx"))).status != OK]
    assert not bad, "\n".join(f"{r.status}: {r.reproduce()}: {'; '.join(r.reasons)}" for r in bad)


def test_other_backends_get_numpy_arrays() -> None:
    cases = [c for c in CASES if not (c.inplace or c.erase) and c.work <= 5_000][::12]
    target = Target("reference", framework="mlx")
    bad = [r for c in cases if (r := run_one(c, target)).status not in (OK, NOT_SUPPORTED)]
    assert not bad, "\n".join(f"{r.status}: {r.reproduce()}: {'; '.join(r.reasons)}" for r in bad)


def test_float64_runs_on_the_reference() -> None:
    x = {name: a.astype(np.float64) for name, a in values().items()}
    o, state = gated_delta_rule(**{n: mx.array(a, dtype=mx.float64) for n, a in x.items()})
    want = anydelta.gated_delta_rule(**x)
    assert o.dtype == state.dtype == mx.float64
    assert np.array_equal(np.asarray(o), want[0])
    assert np.array_equal(np.asarray(state), want[1])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kda", [False, True])
def test_as_on_numpy_arrays_to_the_bit(kda: bool, dtype: str) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x = values(kda=kda)
    stored = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    x = {n: a.astype(stored) if n in "qkv" else a for n, a in x.items()}
    held = {n: mx.array(a.astype(np.float32)).astype(getattr(mx, a.dtype.name)) for n, a in x.items()}
    want, got = anydelta.gated_delta_rule(**x), gated_delta_rule(**held)
    assert got[0].dtype == getattr(mx, dtype)
    assert got[1].dtype == mx.float32
    for w, g in zip(want, got, strict=True):
        assert np.array_equal(np.asarray(g.astype(mx.float32)), w.astype(np.float32))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kda", [False, True])
def test_mlx_lms_own_recurrence_agrees(kda: bool, masked: bool) -> None:
    """Linear decays, [V, K] states, q scaled by the caller: another implementation's conventions."""
    if importlib.util.find_spec("mlx_lm") is None:
        pytest.skip("mlx-lm is not installed")
    from mlx_lm.models.gated_delta import gated_delta_ops

    x = arrays(values(kda=kda))
    mask = mx.array(np.arange(9) >= np.array([[3], [0]])) if masked else None
    state = x.pop("initial_state").swapaxes(-1, -2)
    want_o, want_state = gated_delta_ops(
        x["q"] * 32**-0.5, x["k"], x["v"], mx.exp(x["g"]), x["beta"], state, mask
    )
    o, new = gated_delta_rule(**x, initial_state=state, state_layout="vk", mask=mask)
    if mask is not None:  # where a token is masked, the outputs are nobody's business there; zeros here
        assert not np.asarray(o)[~np.asarray(mask)].any()
        want_o = mx.where(mask[..., None, None], want_o, 0)
    close(o, want_o)
    close(new, want_state)
    linear = {**x, "g": mx.exp(x["g"])}
    close(
        gated_delta_rule(**linear, decay="linear", initial_state=state, state_layout="vk", mask=mask)[0],
        want_o,
    )


@pytest.mark.parametrize("T", [1, 9])
def test_mlxs_own_op_agrees(T: int) -> None:
    update = getattr(mx.fast, "gated_delta_update", None)
    if update is None:
        pytest.skip("this mlx has no gated_delta_update: it needs 0.32.3 or newer")
    x = arrays(values(B=1, T=T, H=16, HV=16, K=128, V=128))
    state = x.pop("initial_state").swapaxes(-1, -2)
    want = update(x["q"] * 128**-0.5, x["k"], x["v"], mx.exp(x["g"]), x["beta"], state, stream=mx.cpu)
    got = gated_delta_rule(**x, initial_state=state, state_layout="vk")
    for w, g in zip(want, got, strict=True):
        close(g, w)


# ---- on a Mac's GPU, emulated

METAL = (
    "B=2 T=5 K=32 V=16 kda gate=mixed",
    "B=2 T=34 H=1 HV=1 K=32 V=16 mask=left snapshots=3 state_dtype=bfloat16",
    "T=34 H=1 HV=2 K=32 V=16 kda l2norm decay=raw dt_bias=flat lower_bound=-5.0 logit dtype=bfloat16",
    "seqlens=33,0,70,1 K=32 V=16 snapshots=2 pool=6 indices=5,1,-1,0 strides=fused",
    "B=2 T=2 K=32 V=16 snapshots=5 dtype=float16 layout=vk strides=strided",
    "B=2 T=70 H=1 HV=2 K=32 V=16 heads=tiled mask=random",
)


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """mx.fast on the emulator of Metal."""
    if sys.platform != "linux":
        pytest.skip("the emulator is for Linux; a Mac runs: anydelta conform --backend metal --framework mlx")
    pytest.importorskip("torch")
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "metal"))
    import emulator
    import mlx_host

    from anydelta.backends.metal import mlx_host as metal_mlx

    if emulator.compiler() is None:
        without("there is no C++ compiler for the emulator of Metal")
    out = mlx_host.MetalKernels(emulator.Emulator("check"))
    plans.forget()
    with metal_mlx.emulated(out):
        yield out
    plans.forget()


@pytest.mark.parametrize("chunks", ["0", "1"])
def test_metal_through_mlx(host: Any, chunks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels' text inside the function that MLX writes; every access is checked."""
    monkeypatch.setenv("ANYDELTA_METAL_CHUNK", chunks)
    cases = [Case.parse(line) for line in (METAL if chunks == "0" else METAL[-1:])]
    bad = [r for c in cases if (r := run_one(c, Target("metal", framework="mlx"))).status != OK]
    assert not bad, "\n".join(f"{r.status}: {r.case}: {r.reasons}" for r in bad)
    assert len(host.emulator.launches) == len(cases)


def test_conform_forces_both_kernels_through_mlx(host: Any) -> None:
    from anydelta.backends.metal import host as metal

    for number, isa in enumerate(metal.isas(), 1):
        assert run_one(Case.parse("T=20 H=1 HV=1 K=32 V=16"), Target("metal", isa, "mlx")).status == OK
        assert len(host.made) == number


def test_metal_says_why_not() -> None:
    x = arrays(values())
    if not mx.metal.is_available():
        with pytest.raises(
            face.UnsupportedError, match=r"needs an Apple GPU through MLX; mx\.metal\.is_available"
        ):
            gated_delta_rule(**x, backend="metal")
        return
    with mx.stream(mx.cpu), pytest.raises(face.UnsupportedError, match="the stream runs on the CPU"):
        gated_delta_rule(**x, backend="metal")


def test_what_metal_does_not_take_runs_on_the_cpu(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anydelta.rule.spec.device_name", lambda x: "mlx")
    assert face.explain(**arrays(values())).chosen == "metal"
    x = values(K=288)
    trace = face.explain(**arrays(x))
    assert trace.chosen == "cpu"
    assert "takes K up to 256; got 288" in str(trace)
    close(gated_delta_rule(**arrays(x))[0], anydelta.gated_delta_rule(**x)[0])


def test_gradients_of_calls_on_metal_are_the_cpus(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anydelta.rule.spec.device_name", lambda x: "mlx")
    for name, (got, want) in gradients_of_both(values(), {}, {}).items():
        assert nmse(got, want) < 1e-7, name
    assert host.emulator.launches


# ---- values, lazily computed


def test_nothing_that_the_caller_holds_changes() -> None:
    """Arrays that share memory with others and with each other, and results that are used again."""
    x = arrays(values())
    before = {n: np.array(a) for n, a in x.items()}
    shared = x["initial_state"]
    window = shared[1:]
    o, first = gated_delta_rule(**x)
    again, second = gated_delta_rule(**{**x, "initial_state": first})
    held = np.array(first)
    _, _, last = gated_delta_rule(**{**x, "initial_state": first}, snapshots=3)
    kept = np.array(last)
    _, _, other = gated_delta_rule(**{**x, "initial_state": second}, snapshots=last)
    for n, a in x.items():
        assert np.array_equal(np.asarray(a), before[n]), n
    assert np.array_equal(np.asarray(window), before["initial_state"][1:])
    assert np.array_equal(np.asarray(first), held)
    assert np.array_equal(np.asarray(last), kept)
    assert not np.array_equal(np.asarray(other), kept)
    assert not np.array_equal(np.asarray(again), np.asarray(o))


def test_lazy_arrays_views_and_constants() -> None:
    x = values()
    want = anydelta.gated_delta_rule(**x)
    lazy = {n: mx.array(a) * 2 - mx.array(a) for n, a in x.items()}
    lazy["k"] = mx.array(x["k"].swapaxes(-1, -2).copy()).swapaxes(-1, -2)  # not computed, strided
    lazy["v"] = mx.concatenate([lazy["v"], lazy["v"]], axis=2)[:, :, :4]
    for w, g in zip(want, gated_delta_rule(**lazy), strict=True):
        close(g, w)
    ones = {**arrays(x), "beta": mx.broadcast_to(mx.array(np.float32(0.5)), (2, 9, 4))}
    want = anydelta.gated_delta_rule(**{**x, "beta": np.full((2, 9, 4), 0.5, np.float32)})
    close(gated_delta_rule(**ones)[0], want[0])
    with mx.stream(mx.new_stream(mx.cpu)):  # as in mlx-lm's generation
        close(gated_delta_rule(**arrays(x))[0] * 1, anydelta.gated_delta_rule(**x)[0])


def test_snapshots_are_returned() -> None:
    x = values()
    want = np.full((12, 2, 4, 32, 16), 7, np.float32)
    anydelta.gated_delta_rule(**x, snapshots=want)
    _, state, got = gated_delta_rule(**arrays(x), snapshots=mx.full(want.shape, 7.0))
    assert np.array_equal(np.asarray(got), want)  # slots 9 to 11: as they were
    assert mx.array_equal(got[0], state)
    _, none, got = gated_delta_rule(**arrays(x), snapshots=12, output_final_state=False)
    assert none is None
    assert np.array_equal(np.asarray(got)[:9], want[:9])
    assert not np.asarray(got)[9:].any()


def test_a_compiled_function_is_refused() -> None:
    x = arrays(values())
    q = x.pop("q")
    with pytest.raises(face.UnsupportedError, match=r"inside mx\.compile or mx\.vmap\. Leave this call out"):
        mx.compile(lambda q: gated_delta_rule(q, **x)[0])(q)
    with pytest.raises(face.UnsupportedError, match=r"inside mx\.compile"):
        mx.vmap(lambda q: gated_delta_rule(q, **x)[0])(q[None])
    one = {n: a[:1] for n, a in x.items()}
    packed = mx.compile(lambda cu: gated_delta_rule(q[:1], **one, cu_seqlens=cu)[0])
    with pytest.raises(face.UnsupportedError, match=r"inside mx\.compile"):  # its data would be checked
        packed(mx.array([0, 9]))
    assert gated_delta_rule(q, **x)[0].shape == (2, 9, 4, 16)


def gradients_of_both(x: Values, rest: Values, options: dict[str, Any], dtype: mx.Dtype = mx.float32) -> Any:
    """(gradients on MLX arrays, on float64 torch tensors by the reference) of every array of x, by name."""
    torch = pytest.importorskip("torch")
    names = list(x)
    rng = np.random.default_rng(1)
    weights: list[Any] = []

    def loss(outputs: Any, of: Any) -> Any:
        if not weights:
            weights.extend(rng.standard_normal(out.shape) for out in outputs)
        return sum((out * of(w)).sum() for out, w in zip(outputs, weights, strict=True))

    def on_mlx(*given: mx.array) -> mx.array:
        held = dict(zip(names, given, strict=True))
        q, k, v = (held.pop(n).astype(dtype) for n in "qkv")
        out = gated_delta_rule(q, k, v, **held, **arrays(rest), **options)
        return loss([o.astype(mx.float32) for o in out], lambda w: mx.array(w, dtype=mx.float32))

    got = mx.grad(on_mlx, argnums=list(range(len(names))))(*(mx.array(x[n]) for n in names))
    held = {n: torch.tensor(a, dtype=torch.float64, requires_grad=True) for n, a in x.items()}
    others = {n: torch.tensor(a) for n, a in rest.items()}
    out = anydelta.gated_delta_rule(
        held["q"], held["k"], held["v"], backend="reference", **options, **others,
        **{n: a for n, a in held.items() if n not in ("q", "k", "v")},
    )  # fmt: skip
    loss(out, torch.tensor).backward()
    return {n: (a, held[n].grad.numpy()) for n, a in zip(names, got, strict=True)}


def nmse(got: mx.array, want: Any) -> float:
    assert got.shape == want.shape
    return float(np.square(np.asarray(got.astype(mx.float32)) - want).sum() / np.square(want).sum())


@pytest.mark.parametrize("what", ["gda", "kda, raw", "packed", "pool", "bfloat16"])
def test_gradients(what: str) -> None:
    x, rest, options = values(kda=what == "kda, raw"), {}, {}
    draw = np.random.default_rng(2)
    if what == "kda, raw":
        x["initial_state"] = np.ascontiguousarray(x["initial_state"].swapaxes(2, 3))
        x |= {
            "A_log": draw.standard_normal(4).astype("f4"),
            "dt_bias": draw.standard_normal((4, 32)).astype("f4"),
        }
        rest["mask"] = draw.random((2, 9)) > 0.3
        options = {"decay": "raw", "beta_is_logit": True, "qk_l2norm": True, "state_layout": "vk"}
    elif what == "packed":
        state = x["initial_state"]
        x = {**{n: a[:1] for n, a in x.items()}, "initial_state": np.concatenate([state, state[:1]])}
        rest["cu_seqlens"] = np.array([0, 2, 2, 9], np.int32)
    elif what == "pool":
        x["initial_state"] = draw.standard_normal((5, *x["initial_state"].shape[1:]), dtype=np.float32)
        rest["state_indices"] = np.array([3, -1], np.int32)
    limit = 1e-4 if what == "bfloat16" else 1e-7
    for name, (got, want) in gradients_of_both(
        x, rest, options, mx.bfloat16 if limit > 1e-5 else mx.float32
    ).items():
        assert nmse(got, want) < limit, name


def test_which_derivatives_are_refused_and_not_zero() -> None:
    x = arrays(values())
    q = x.pop("q")

    def loss(q: mx.array, **more: Any) -> mx.array:
        return gated_delta_rule(q, **x, **more)[0].sum()

    with pytest.raises(RuntimeError, match=r"requires no derivative of this kind; got mx\.jvp"):
        mx.jvp(loss, [q], [q])
    with pytest.raises(RuntimeError, match="got a gradient of a gradient"):
        mx.grad(lambda q: mx.grad(loss)(q).sum())(q)
    with pytest.raises(RuntimeError, match="beside snapshots"):
        mx.grad(lambda q: loss(q, snapshots=2))(q)
    with pytest.raises(face.UnsupportedError, match=r"inside mx\.compile"):
        mx.compile(mx.grad(loss))(q)
    stopped = mx.grad(lambda q: (mx.stop_gradient(gated_delta_rule(q, **x)[0]) * q.sum()).sum())(q)
    assert stopped.shape == q.shape


# ---- refused


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"q": np.zeros((2, 9, 2, 32), np.float32)}, TypeError, "q must be an mlx.core.array; got a numpy.ndarray"),
        ({"mask": [[1]]}, TypeError, "mask must be an mlx.core.array; got list"),
        ({"k": mx.zeros((2, 9, 2, 31))}, ValueError, r"k must be \[B, T, H, K\] as q = \[2, 9, 2, 32\]"),
        ({"v": mx.zeros((2, 9, 4, 16), mx.float16)}, ValueError, "q, k and v must share a dtype"),
        ({"initial_state": mx.zeros((2, 4, 32, 16), mx.int32)}, ValueError, "initial_state must have dtype"),
        ({"decay": "square"}, ValueError, "decay must be one of"),
        ({"snapshots": 0}, ValueError, r"snapshots must be an array .* or a number of slots >= 1; got 0"),
        ({"snapshots": True}, ValueError, "snapshots must be an array"),
        ({"snapshots": mx.zeros((2, 2))}, ValueError, r"snapshots must be \[Ks, N, HV, K, V\]"),
            ({"state_indices": mx.array([0, 5])}, ValueError, r"state_indices must be -1 \(skip\) or in \[0, P\)"),
        ({"cu_seqlens": mx.array([0, 9])}, ValueError, "cu_seqlens packs all .* requires B = 1"),
        ({"backend": "cuda"}, ValueError, "backend must be 'auto' or one of"),
    ],
)  # fmt: skip
def test_invalid_calls(change: Values, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=f"gated_delta_rule: {text}"):
        gated_delta_rule(**{**arrays(values()), **change})


def test_the_other_face_says_where_mlx_arrays_go() -> None:
    x = values()
    anydelta.gated_delta_rule(**x)  # its plan must not serve arrays that only look the same
    with pytest.raises(TypeError, match=r"got an mlx.core.array\. For MLX arrays there is anydelta\.mlx"):
        anydelta.gated_delta_rule(**arrays(x))
    with pytest.raises(AttributeError, match="MLX arrays are values and cannot be advanced in place"):
        _ = face.gated_delta_rule_


def test_explain_and_forced_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    x = arrays(values())
    assert face.explain(**x, snapshots=2).chosen == "cpu"
    assert str(face.explain(**x, backend="reference").chosen) == "reference"
    with pytest.raises(TypeError, match="q must be an mlx"):
        face.explain(**values())
    monkeypatch.setenv("ANYDELTA_BACKEND", "triton")
    with pytest.raises(face.UnsupportedError, match="ANYDELTA_BACKEND=triton cannot run this call"):
        gated_delta_rule(**x)
