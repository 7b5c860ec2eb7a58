"""The compat functions against the float64 oracle and, if it is installed, against the other project itself.

Gates are moderate (log decay -1 to -0.1) so that a state carries over many tokens. o, final states and every
snapshot are compared separately: an error in one must not hide behind the others.
"""

from __future__ import annotations

import ctypes
import importlib.util
import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import anydelta
from anydelta.rule import reference

torch = pytest.importorskip("torch")

from anydelta.compat import executorch as et_face  # noqa: E402
from anydelta.compat import fla, ggml  # noqa: E402
from conftest import without  # noqa: E402

NMSE = 1e-7


def close(got: Any, want: Any, what: str, limit: float = NMSE) -> None:
    got = got.detach().double().numpy() if isinstance(got, torch.Tensor) else np.asarray(got, np.float64)
    want = want.detach().double().numpy() if isinstance(want, torch.Tensor) else np.asarray(want, np.float64)
    assert got.shape == want.shape, what
    assert np.isfinite(got).all(), what
    error = np.mean((got - want) ** 2) / max(np.mean(want**2), 1e-30)
    assert error <= limit, f"{what}: NMSE {error:.3g}"


def f64(x: Any) -> Any:
    if x is None:
        return None
    return x.detach().double().numpy() if isinstance(x, torch.Tensor) else np.asarray(x, np.float64)


def inputs(
    B: int = 2,
    T: int = 37,
    H: int = 2,
    HV: int = 4,
    K: int = 16,
    V: int = 24,
    *,
    kda: bool = False,
    seed: int = 0,
) -> SimpleNamespace:
    """float32 tensors of one call: unit keys, log decays in [-1, -0.1], beta in (0, 1), a state of size 1."""
    rng = np.random.default_rng(seed)

    def tensor(x: Any) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(x, np.float32))

    def unit(*shape: int) -> Any:
        x = rng.normal(size=shape)
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    gate = (B, T, HV, K) if kda else (B, T, HV)
    return SimpleNamespace(
        q=tensor(unit(B, T, H, K)),
        k=tensor(unit(B, T, H, K)),
        v=tensor(rng.normal(size=(B, T, HV, V))),
        g=tensor(rng.uniform(-1, -0.1, gate)),
        beta=tensor(rng.uniform(0.05, 0.95, (B, T, HV))),
        state=tensor(rng.normal(size=(B, HV, K, V))),
        raw=tensor(rng.normal(size=gate) - 1),
        logit=tensor(rng.normal(size=(B, T, HV))),
        A_log=tensor(rng.normal(size=HV) * 0.3 - 0.5),
        dt_bias=tensor(rng.normal(size=(HV * K if kda else HV)) * 0.3),
    )


def oracle(x: SimpleNamespace, **options: Any) -> reference.Expected:
    arrays = {name: f64(value) for name, value in options.items() if isinstance(value, torch.Tensor)}
    arrays = {"g": f64(x.g), "beta": f64(x.beta), "initial_state": f64(x.state), **options, **arrays}
    if "cu_seqlens" in arrays:
        arrays["cu_seqlens"] = arrays["cu_seqlens"].astype(np.int64)
    return reference.gated_delta_rule(f64(x.q), f64(x.k), f64(x.v), **arrays)


# ---------------------------------------------------------------------------------------------------- fla

GDN = (fla.chunk_gated_delta_rule, fla.fused_recurrent_gated_delta_rule)
KDA = (fla.chunk_kda, fla.fused_recurrent_kda)
SIGNATURES = {
    "chunk_gated_delta_rule": (
        "(q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False, "
        "use_qk_l2norm_in_kernel=False, use_beta_sigmoid_in_kernel=False, allow_neg_eigval=False, "
        "state_v_first=False, cu_seqlens=None, cu_seqlens_cpu=None, cp_context=None, **kwargs)"
    ),
    "fused_recurrent_gated_delta_rule": (
        "(q, k, v, g=None, gk=None, gv=None, beta=None, scale=None, initial_state=None, "
        "output_final_state=False, use_qk_l2norm_in_kernel=False, use_gate_in_kernel=False, A_log=None, "
        "dt_bias=None, use_beta_sigmoid_in_kernel=False, allow_neg_eigval=False, state_v_first=False, "
        "cu_seqlens=None, **kwargs)"
    ),
    "chunk_kda": (
        "(q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False, "
        "use_qk_l2norm_in_kernel=False, use_gate_in_kernel=False, use_beta_sigmoid_in_kernel=False, "
        "allow_neg_eigval=False, safe_gate=False, lower_bound=None, disable_recompute=False, "
        "return_intermediate_states=False, state_v_first=False, cu_seqlens=None, cu_seqlens_cpu=None, "
        "cp_context=None, **kwargs)"
    ),
    "fused_recurrent_kda": (
        "(q, k, v, g, beta, A_log=None, dt_bias=None, scale=None, initial_state=None, "
        "output_final_state=False, use_qk_l2norm_in_kernel=False, use_gate_in_kernel=False, "
        "use_beta_sigmoid_in_kernel=False, allow_neg_eigval=False, lower_bound=None, state_v_first=False, "
        "cu_seqlens=None, **kwargs)"
    ),
}
"""Names, order and defaults as in the fla-core 0.5.2 wheel."""


def listing(function: Any) -> str:
    """A signature without its annotations."""
    bare = [p.replace(annotation=p.empty) for p in inspect.signature(function).parameters.values()]
    return str(inspect.Signature(bare))


@pytest.mark.parametrize("name", SIGNATURES)
def test_fla_signature(name: str) -> None:
    assert listing(getattr(fla, name)) == SIGNATURES[name]


@pytest.mark.parametrize("name", SIGNATURES)
def test_fla_signature_is_the_installed_one(name: str) -> None:
    pytest.importorskip("triton", reason="fla-core needs triton")
    pytest.importorskip("fla", reason="fla-core is not installed")
    from fla.ops import gated_delta_rule, kda

    peer = getattr(gated_delta_rule, name, None) or getattr(kda, name)
    assert listing(getattr(fla, name)) == listing(peer)


def test_fla_short_names() -> None:
    assert fla.chunk_gdn is fla.chunk_gated_delta_rule
    assert fla.fused_recurrent_gdn is fla.fused_recurrent_gated_delta_rule


def both(x: SimpleNamespace, function: Any, expected: reference.Expected, **kwargs: Any) -> None:
    """A face's o and final state against the oracle."""
    arguments = {"g": x.g, "beta": x.beta, "initial_state": x.state, "output_final_state": True, **kwargs}
    o, state = function(x.q, x.k, x.v, **arguments)
    close(o, expected.o, "o")
    close(state, expected.state, "state")
    assert o.dtype == x.q.dtype
    assert state.dtype == torch.float32


@pytest.mark.parametrize("function", GDN + KDA)
def test_fla_defaults(function: Any) -> None:
    x = inputs(kda=function in KDA)
    both(x, function, oracle(x))
    o, state = function(x.q, x.k, x.v, g=x.g, beta=x.beta)
    assert state is None  # output_final_state defaults to False, and there is no initial state
    close(o, oracle(x, initial_state=None).o, "o from an empty state")


@pytest.mark.parametrize("function", GDN + KDA)
def test_fla_scale_l2norm_and_v_first(function: Any) -> None:
    x = inputs(kda=function in KDA)
    x.q, x.k = 3 * x.q, 0.5 * x.k
    vk = x.state.transpose(-1, -2).contiguous()
    expected = oracle(x, scale=0.7, qk_l2norm=True, state_layout="vk", initial_state=vk)
    options = {"scale": 0.7, "use_qk_l2norm_in_kernel": True, "initial_state": vk}
    both(x, function, expected, state_v_first=True, **options)
    with pytest.warns(DeprecationWarning, match="state_v_first"):
        both(x, function, expected, transpose_state_layout=True, **options)
    with pytest.raises(ValueError, match="transpose_state_layout"):
        function(x.q, x.k, x.v, g=x.g, beta=x.beta, state_v_first=True, transpose_state_layout=True)


@pytest.mark.parametrize("function", GDN + KDA)
@pytest.mark.parametrize("bias", [True, False])
def test_fla_gate_in_kernel(function: Any, bias: bool) -> None:
    x = inputs(kda=function in KDA)
    dt_bias = x.dt_bias if bias else None
    expected = oracle(x, g=x.raw, decay="raw", A_log=x.A_log, dt_bias=dt_bias)
    both(x, function, expected, g=x.raw, use_gate_in_kernel=True, A_log=x.A_log, dt_bias=dt_bias)
    # Kimi checkpoints hold A_log as [1, 1, HV, 1]; fla's kernels read flat memory.
    wide = x.A_log.view(1, 1, -1, 1)
    both(x, function, expected, g=x.raw, use_gate_in_kernel=True, A_log=wide, dt_bias=dt_bias)


@pytest.mark.parametrize("function", KDA)
def test_fla_lower_bound(function: Any) -> None:
    x = inputs(kda=True)
    gate = {
        "g": x.raw,
        "use_gate_in_kernel": True,
        "A_log": x.A_log,
        "dt_bias": x.dt_bias,
        "lower_bound": -2.0,
    }
    expected = oracle(x, g=x.raw, decay="raw", A_log=x.A_log, dt_bias=x.dt_bias, lower_bound=-2.0)
    both(x, function, expected, **gate)
    if function is fla.chunk_kda:
        both(x, function, expected, safe_gate=True, **gate)


@pytest.mark.parametrize("function", KDA)
def test_fla_lower_bound_without_A_log(function: Any) -> None:
    x = inputs(kda=True)
    expected = oracle(
        x, g=x.raw, decay="raw", A_log=torch.zeros_like(x.A_log), dt_bias=x.dt_bias, lower_bound=-2.0
    )
    both(x, function, expected, g=x.raw, use_gate_in_kernel=True, dt_bias=x.dt_bias, lower_bound=-2.0)


@pytest.mark.parametrize("function", GDN + KDA)
def test_fla_dtypes_that_differ(function: Any) -> None:
    x = inputs(kda=function in KDA)
    x.v = x.v.half()
    expected = oracle(x)
    v = x.v.requires_grad_()
    o, state = function(x.q, x.k, v, g=x.g, beta=x.beta, initial_state=x.state, output_final_state=True)
    assert o.dtype == (torch.float32 if "chunk" in function.__name__ else torch.float16)
    close(o.detach(), expected.o, "o", limit=1e-6)
    close(state.detach(), expected.state, "state")
    o.float().sum().backward()
    assert v.grad.dtype == torch.float16
    assert v.grad.any()


def test_fla_safe_gate_outside_the_kernel_is_a_promise() -> None:
    x = inputs(kda=True)
    both(x, fla.chunk_kda, oracle(x), safe_gate=True, lower_bound=-5.0)
    both(x, fla.chunk_kda, oracle(x), safe_gate=True)
    for bound in (None, 0.0, -5.1):
        with pytest.raises(ValueError, match="lower_bound"):
            fla.chunk_kda(
                x.q, x.k, x.v, x.raw, x.beta, use_gate_in_kernel=True, A_log=x.A_log, safe_gate=True,
                lower_bound=bound,
            )  # fmt: skip


@pytest.mark.parametrize("function", GDN + KDA)
def test_fla_beta_logit_and_negative_eigenvalues(function: Any) -> None:
    x = inputs(kda=function in KDA)
    once = oracle(x, beta=x.logit, beta_is_logit=True)
    both(x, function, once, beta=x.logit, use_beta_sigmoid_in_kernel=True)
    twice = 2 * reference.sigmoid(f64(x.logit))
    assert twice.max() > 1.5
    options = {"beta": x.logit, "use_beta_sigmoid_in_kernel": True, "allow_neg_eigval": True}
    both(x, function, oracle(x, beta=twice), **options)
    with pytest.raises(ValueError, match="allow_neg_eigval requires use_beta_sigmoid_in_kernel"):
        function(x.q, x.k, x.v, g=x.g, beta=x.beta, allow_neg_eigval=True)


def test_fla_default_gates_and_beta_of_the_recurrent_function() -> None:
    function = fla.fused_recurrent_gated_delta_rule
    x, y = inputs(), inputs(kda=True, seed=1)
    ones, zeros = np.ones(x.beta.shape), np.zeros(x.g.shape)
    both(x, function, oracle(x, beta=ones), beta=None)  # for every value head, H < HV included
    both(x, function, oracle(x, g=zeros), g=None)
    both(x, function, oracle(x, g=f64(y.g)), g=None, gk=y.g)
    both(x, function, oracle(x, g=f64(x.g)[..., None] + f64(y.g)), gk=y.g)
    gate = np.log(reference.decays(f64(x.raw), decay="raw", A_log=f64(x.A_log), dt_bias=f64(x.dt_bias)))
    raw = {"g": x.raw, "use_gate_in_kernel": True, "A_log": x.A_log, "dt_bias": x.dt_bias}
    both(x, function, oracle(x, g=gate[..., None] + f64(y.g)), gk=y.g, **raw)
    both(x, function, oracle(x, beta=reference.sigmoid(ones)), beta=None, use_beta_sigmoid_in_kernel=True)


@pytest.mark.parametrize("function", GDN + KDA)
def test_fla_packed_sequences(function: Any) -> None:
    x = inputs(B=1, T=40, kda=function in KDA)
    cu = torch.tensor([0, 7, 7, 40])
    x.state = inputs(B=3).state
    hints = {}
    if function in (fla.chunk_gated_delta_rule, fla.chunk_kda):
        hints = {"cu_seqlens_cpu": cu.clone(), "chunk_size": 32}
    both(x, function, oracle(x, cu_seqlens=cu), cu_seqlens=cu, **hints)


@pytest.mark.parametrize("function", GDN + KDA)
def test_fla_state_dtypes(function: Any) -> None:
    x = inputs(kda=function in KDA)
    x.state = x.state.bfloat16()
    if function is fla.chunk_kda:
        with pytest.raises(ValueError, match="initial_state must be float32"):
            both(x, function, oracle(x))
    else:
        both(x, function, oracle(x))  # float32 out, as in fla


@pytest.mark.parametrize("function", GDN + KDA)
def test_fla_half_inputs(function: Any) -> None:
    x = inputs(kda=function in KDA)
    x.q, x.k, x.v, x.beta = (t.bfloat16() for t in (x.q, x.k, x.v, x.beta))
    expected = oracle(x)
    o, state = function(x.q, x.k, x.v, g=x.g, beta=x.beta, initial_state=x.state, output_final_state=True)
    assert (o.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    close(o, expected.o, "o", limit=1e-5)  # one rounding to 8 bits
    close(state, expected.state, "state", limit=1e-5)


@pytest.mark.parametrize("function", GDN + KDA)
def test_fla_gradients(function: Any) -> None:
    x = inputs(B=1, T=3, H=1, HV=2, K=3, V=2, kda=function in KDA)
    names = ("q", "k", "v", "raw", "logit", "state", "A_log", "dt_bias")
    leaves = [getattr(x, name).double().requires_grad_() for name in names]

    def call(q: Any, k: Any, v: Any, raw: Any, logit: Any, state: Any, A_log: Any, dt_bias: Any) -> Any:
        return function(
            q, k, v, g=raw, beta=logit, initial_state=state, output_final_state=True, use_gate_in_kernel=True,
            A_log=A_log, dt_bias=dt_bias, use_beta_sigmoid_in_kernel=True, allow_neg_eigval=True,
        )  # fmt: skip

    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


def test_fla_gradients_of_gk() -> None:
    x = inputs(B=1, T=3, H=1, HV=2, K=3, V=2)
    gk = inputs(B=1, T=3, H=1, HV=2, K=3, V=2, kda=True).g
    leaves = [t.double().requires_grad_() for t in (x.q, x.k, x.v, x.raw, gk, x.A_log)]

    def call(q: Any, k: Any, v: Any, g: Any, gk: Any, A_log: Any) -> Any:
        return fla.fused_recurrent_gated_delta_rule(q, k, v, g, gk, use_gate_in_kernel=True, A_log=A_log)[0]

    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize("function", GDN + KDA)
def test_fla_refuses_what_nothing_would_read(function: Any) -> None:
    x = inputs(kda=function in KDA)
    arrays = {"q": x.q, "k": x.k, "v": x.v, "g": x.g, "beta": x.beta}

    def call(**kwargs: Any) -> Any:
        return function(**{**arrays, **kwargs})

    with pytest.raises(TypeError, match="unexpected keyword argument 'scael'"):
        call(scael=1.0)
    with pytest.raises(anydelta.UnsupportedError, match="head_first"):
        call(head_first=False)
    with pytest.raises(anydelta.UnsupportedError, match="beta"):
        call(beta=x.beta[..., None].expand(*x.v.shape))
    for name in ("A_log", "dt_bias"):
        with pytest.raises(ValueError, match=f"{name} requires use_gate_in_kernel"):
            call(**{name: getattr(x, name)})
    with pytest.raises(ValueError, match="use_gate_in_kernel requires A_log"):
        call(use_gate_in_kernel=True)
    for name in ("use_gate_in_kernel", "use_qk_l2norm_in_kernel", "output_final_state", "state_v_first"):
        with pytest.raises(TypeError, match=f"{name} must be True or False"):
            call(**{name: 1})
    with pytest.raises(ValueError, match="g must be"):
        call(g=inputs(kda=function not in KDA).g)
    with pytest.raises(TypeError, match="q must be a torch"):
        call(q=x.q.numpy())
    with pytest.raises(ValueError, match="v must be"):
        call(v=x.v[0])
    with pytest.raises(ValueError, match="cu_seqlens"):
        call(cu_seqlens=torch.tensor([0, 37]))  # B = 2


@pytest.mark.parametrize("function", [fla.chunk_gated_delta_rule, fla.chunk_kda])
def test_fla_chunk_hints_are_checked(function: Any) -> None:
    kda = function in KDA
    x = inputs(B=1, kda=kda)
    cu = torch.tensor([0, 10, 37])
    arrays = {"q": x.q, "k": x.k, "v": x.v, "g": x.g, "beta": x.beta}
    plain = function(**arrays)[0]
    assert torch.equal(function(**arrays, chunk_size=32)[0], plain)
    with pytest.raises(ValueError, match="chunk_size"):
        function(**arrays, chunk_size=16 if kda else 128)
    with pytest.raises(anydelta.UnsupportedError, match="cp_context"):
        function(**arrays, cp_context=object())
    with pytest.raises(ValueError, match="cu_seqlens_cpu"):
        function(**arrays, cu_seqlens_cpu=cu)
    for wrong in (cu[1:], torch.tensor([0, 11, 37])):
        with pytest.raises(ValueError, match="cu_seqlens_cpu"):
            function(**arrays, cu_seqlens=cu, cu_seqlens_cpu=wrong)


def test_fla_kda_and_recurrent_refusals() -> None:
    x = inputs(kda=True)
    arrays = {"q": x.q, "k": x.k, "v": x.v, "g": x.g, "beta": x.beta}
    assert torch.equal(fla.chunk_kda(**arrays, disable_recompute=True)[0], fla.chunk_kda(**arrays)[0])
    with pytest.raises(TypeError, match="disable_recompute"):
        fla.chunk_kda(**arrays, disable_recompute=None)
    with pytest.raises(anydelta.UnsupportedError, match="return_intermediate_states"):
        fla.chunk_kda(**arrays, return_intermediate_states=True)
    for function in KDA:
        with pytest.raises(ValueError, match="lower_bound requires"):
            function(**arrays, lower_bound=-5.0)
    y = inputs()
    with pytest.raises(anydelta.UnsupportedError, match="gv"):
        fla.fused_recurrent_gated_delta_rule(y.q, y.k, y.v, gv=y.v)
    with pytest.raises(ValueError, match="use_gate_in_kernel requires g"):
        fla.fused_recurrent_gated_delta_rule(y.q, y.k, y.v, use_gate_in_kernel=True, A_log=y.A_log)
    with pytest.raises(ValueError, match="gk must be"):
        fla.fused_recurrent_gated_delta_rule(y.q, y.k, y.v, gk=y.g)
    with pytest.raises(ValueError, match="A_log must be"):
        fla.fused_recurrent_gated_delta_rule(
            y.q, y.k, y.v, y.g, x.g, use_gate_in_kernel=True, A_log=y.A_log[:1]
        )


@pytest.mark.parametrize("l2norm", [False, True])
def test_fla_face_is_what_transformers_computes(l2norm: bool) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers.models.qwen3_next import modeling_qwen3_next as peer

    x = inputs(T=70)
    x.q, x.k = 2 * x.q, (2 if l2norm else 1) * x.k
    options = {
        "g": x.g,
        "beta": x.beta,
        "initial_state": x.state,
        "output_final_state": True,
        "use_qk_l2norm_in_kernel": l2norm,
    }
    for face, theirs in (
        (fla.chunk_gated_delta_rule, peer.torch_chunk_gated_delta_rule),
        (fla.fused_recurrent_gated_delta_rule, peer.torch_recurrent_gated_delta_rule),
    ):
        o, state = face(x.q, x.k, x.v, **options)
        want_o, want_state = theirs(x.q, x.k, x.v, **options)
        close(o, want_o, "o", limit=1e-10)
        close(state, want_state, "state", limit=1e-10)


# --------------------------------------------------------------------------------------------------- ggml


def ggml_inputs(
    B: int = 2, T: int = 9, H: int = 2, HV: int = 4, S: int = 16, *, kda: bool = False, Bq: int = 0
) -> Any:
    """NumPy arrays in ggml's shapes."""
    x = inputs(B, T, H, HV, S, S, kda=kda)
    qk = inputs(Bq or B, T, H, HV, S, S, seed=2)
    g = x.g if kda else x.g[..., None]
    arrays = (qk.q, qk.k, x.v, g, x.beta[..., None], x.state.transpose(-1, -2).contiguous())
    return [t.numpy() for t in arrays]


def ggml_oracle(arrays: list[Any], K: int) -> reference.Expected:
    q, k, v, g, beta, state = (f64(a) for a in arrays)
    each = v.shape[0] // q.shape[0]
    return reference.gated_delta_rule(
        q.repeat(each, 0), k.repeat(each, 0), v, g=g if g.shape[3] > 1 else g[..., 0], beta=beta[..., 0],
        initial_state=state, heads="tiled", state_layout="vk", snapshots=K,
    )  # fmt: skip


GGML_CASES = [
    {"K": 1}, {"K": 1, "kda": True}, {"K": 4}, {"K": 9, "kda": True}, {"K": 3, "T": 1},
    {"K": 5, "T": 2, "kda": True},
    {"K": 2, "B": 4, "Bq": 2}, {"K": 2, "B": 3, "Bq": 1, "kda": True}, {"K": 2, "H": 4, "HV": 4},
]  # fmt: skip


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("case", GGML_CASES, ids=str)
def test_ggml_face(case: dict[str, Any], kind: str) -> None:
    case = dict(case)
    K = case.pop("K")
    arrays = ggml_inputs(**case)
    B, T, HV, S = arrays[2].shape
    given = [torch.from_numpy(a) for a in arrays] if kind == "torch" else arrays
    expected = ggml_oracle(arrays, K)
    packed = ggml.gated_delta_net(*given, K)
    assert isinstance(packed, torch.Tensor if kind == "torch" else np.ndarray)
    assert tuple(packed.shape) == ((T + K * S) * B, S * HV)
    o, snapshots = ggml.unpack(packed, B, T, HV, S, K)
    close(o, expected.o, "o")
    for slot in range(min(K, T)):
        close(snapshots[slot], expected.snapshots[slot], f"snapshot {slot}")
    assert not f64(snapshots)[T:].any()  # without out, the slots that T tokens cannot fill are zeros
    close(f64(snapshots)[0], expected.state, "final state")

    out = packed * 0 + 42
    assert ggml.gated_delta_net(*given, K, out=out) is out
    again_o, again = ggml.unpack(out, B, T, HV, S, K)
    close(again_o, o, "o in out", limit=0)
    close(again[:T], snapshots[:T], "snapshots in out", limit=0)
    assert (f64(again)[T:] == 42).all()  # ... and with out they keep what the caller had there


def test_ggml_refusals() -> None:
    q, k, v, g, beta, state = ggml_inputs()
    B, T, HV, S = v.shape

    def call(**kwargs: Any) -> Any:
        return ggml.gated_delta_net(
            **{**{"q": q, "k": k, "v": v, "g": g, "beta": beta, "state": state, "K": 1}, **kwargs}
        )

    for wrong, error, match in (
        ({"K": 0}, ValueError, "K must be at least 1"),
        ({"K": True}, TypeError, "K must be an int"),
        ({"K": 1.0}, TypeError, "K must be an int"),
        ({"q": q.astype(np.float64)}, ValueError, "q must be float32"),
        ({"v": v.tolist()}, TypeError, "v must be a torch.Tensor or a numpy.ndarray"),
        ({"g": g[..., 0]}, ValueError, "g must have 4 dimensions"),
        ({"g": np.zeros((B, T, HV, 2), np.float32)}, ValueError, "g must be"),
        ({"beta": np.zeros((B, T, HV, S), np.float32)}, ValueError, "beta must be"),
        ({"state": state[:, :, :8]}, ValueError, "state must be"),
        ({"q": q[..., :8]}, ValueError, "q must be"),
        ({"k": np.concatenate([k, k[:1]])}, ValueError, "k must have a divisor"),
        ({"q": q.repeat(2, 2)[:, :, :3], "k": k.repeat(2, 2)[:, :, :3]}, ValueError, "multiple of q's heads"),
        ({"v": v[:, :0]}, ValueError, "T = 0"),
        ({"k": torch.from_numpy(k)}, TypeError, "k must be a numpy array"),
        ({"out": np.zeros((3, 3), np.float32)}, ValueError, "out must be"),
        ({"out": torch.zeros(((T + S) * B, S * HV))}, ValueError, "out must be an array of v's kind"),
        ({"out": np.zeros((S * HV, (T + S) * B), np.float32).T}, ValueError, "out must be contiguous"),
    ):  # fmt: skip
        with pytest.raises(error, match=match):
            call(**wrong)
    for kind in (np.asarray, torch.from_numpy):
        given = [kind(a.copy()) for a in (q, k, v, g, beta, state)]
        packed = ggml.gated_delta_net(*given, 1)
        given[5] = ggml.unpack(packed, B, T, HV, S, 1)[1][0]
        with pytest.raises(ValueError, match="out must not share memory with state"):
            ggml.gated_delta_net(*given, 1, out=packed)


def ggml_library() -> Any:
    """ggml's own graph functions, from the shared libraries that llama-cpp-python builds."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(
            "llama-cpp-python is not installed; it builds for 15 minutes, so only whoever wants it has it"
        )
    folder = Path(next(iter(spec.submodule_search_locations))) / "lib"
    if not (folder / "libggml-base.so").exists() or not (folder / "libggml-cpu.so").exists():
        pytest.skip("this llama-cpp-python has no shared ggml libraries")
    base = ctypes.CDLL(str(folder / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
    cpu = ctypes.CDLL(str(folder / "libggml-cpu.so"), mode=ctypes.RTLD_GLOBAL)
    if not hasattr(base, "ggml_gated_delta_net"):
        pytest.skip("this ggml has no gated_delta_net")

    class Parameters(ctypes.Structure):
        _fields_ = [("size", ctypes.c_size_t), ("buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]

    pointer, i64 = ctypes.c_void_p, ctypes.c_int64
    for library, name, result, arguments in (
        (base, "ggml_init", pointer, [Parameters]),
        (base, "ggml_free", None, [pointer]),
        (base, "ggml_new_tensor", pointer, [pointer, ctypes.c_int, ctypes.c_int, ctypes.POINTER(i64)]),
        (base, "ggml_get_data", pointer, [pointer]),
        (base, "ggml_nbytes", ctypes.c_size_t, [pointer]),
        (base, "ggml_gated_delta_net", pointer, [pointer] * 7 + [i64]),
        (base, "ggml_new_graph", pointer, [pointer]),
        (base, "ggml_build_forward_expand", None, [pointer, pointer]),
        (cpu, "ggml_graph_compute_with_ctx", ctypes.c_int, [pointer, pointer, ctypes.c_int]),
    ):  # fmt: skip
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return base, cpu, Parameters


def ggml_run(arrays: list[Any], K: int) -> Any:
    """The packed result as ggml's CPU backend computes it; slots that it does not write hold 42."""
    base, cpu, Parameters = ggml_library()
    context = base.ggml_init(Parameters(1 << 24, None, False))
    try:
        tensors = []
        for a in arrays:
            ne = (ctypes.c_int64 * 4)(*reversed(a.shape))
            tensor = base.ggml_new_tensor(context, 0, 4, ne)  # type 0 is GGML_TYPE_F32
            ctypes.memmove(base.ggml_get_data(tensor), np.ascontiguousarray(a).ctypes.data, a.nbytes)
            tensors.append(tensor)
        result = base.ggml_gated_delta_net(context, *tensors, K)
        size = base.ggml_nbytes(result) // 4
        memory = (ctypes.c_float * size).from_address(base.ggml_get_data(result))
        view = np.frombuffer(memory, np.float32)
        view[:] = 42
        graph = base.ggml_new_graph(context)
        base.ggml_build_forward_expand(graph, result)
        assert cpu.ggml_graph_compute_with_ctx(context, graph, 1) == 0
        return view.copy()
    finally:
        base.ggml_free(context)


@pytest.mark.parametrize("case", GGML_CASES, ids=str)
def test_ggml_face_is_what_ggml_computes(case: dict[str, Any]) -> None:
    case = dict(case)
    K = case.pop("K")
    arrays = ggml_inputs(**case)
    B, T, HV, S = arrays[2].shape
    theirs = ggml_run(arrays, K).reshape((T + K * S) * B, S * HV)
    ours = ggml.gated_delta_net(*arrays, K, out=np.full_like(theirs, 42))
    o, snapshots = ggml.unpack(ours, B, T, HV, S, K)
    want_o, want_snapshots = ggml.unpack(theirs, B, T, HV, S, K)
    close(o, want_o, "o", limit=1e-10)
    for slot in range(min(K, T)):
        close(snapshots[slot], want_snapshots[slot], f"snapshot {slot}", limit=1e-10)
    assert (snapshots[T:] == 42).all()
    assert (want_snapshots[T:] == 42).all()


# --------------------------------------------------------------------------------------------- executorch


def metal_inputs(**shape: int) -> SimpleNamespace:
    x = inputs(**shape)
    x.decay = x.g.exp()
    x.vk = x.state.transpose(-1, -2).contiguous()
    return x


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("H", [2, 4])
def test_metal_face(H: int, dtype: str) -> None:
    x = metal_inputs(H=H)
    x.vk = x.vk.to(getattr(torch, dtype))
    options = {"g": x.decay, "decay": "linear", "scale": 1.0, "state_layout": "vk", "initial_state": x.vk}
    expected = oracle(x, **options)
    state = x.vk.clone()
    o = et_face.gated_delta_rule(x.q, x.k, x.v, x.decay, x.beta, state)
    close(o, expected.o, "o")
    close(state, expected.state, "state", limit=NMSE if dtype == "float32" else 1e-5)
    again = x.vk.clone()
    assert torch.equal(et_face.gated_delta_rule(x.q, x.k, x.v, x.decay, x.beta, again, False), o)
    assert torch.equal(again, state)


def test_metal_face_signature_and_refusals() -> None:
    x = metal_inputs()
    assert listing(et_face.gated_delta_rule) == "(q, k, v, g, beta, state, use_custom_kernel=True)"
    with pytest.raises(TypeError, match="use_custom_kernel"):
        et_face.gated_delta_rule(x.q, x.k, x.v, x.decay, x.beta, x.vk, use_custom_kernel=1)
    with pytest.raises(ValueError, match="g must be"):
        et_face.gated_delta_rule(x.q, x.k, x.v, x.decay[..., None], x.beta, x.vk)
    with pytest.raises(TypeError, match="g must be"):
        et_face.gated_delta_rule(x.q, x.k, x.v, None, x.beta, x.vk)
    with pytest.raises(ValueError, match="state must be"):
        et_face.gated_delta_rule(x.q, x.k, x.v, x.decay, x.beta, x.state)
    with pytest.raises(TypeError, match="state must be"):
        et_face.gated_delta_rule(x.q, x.k, x.v, x.decay, x.beta, None)


@pytest.mark.parametrize("H", [2, 4])
def test_metal_face_is_what_executorch_computes(H: int) -> None:
    module = "executorch.backends.apple.metal.ops.gated_delta_rule"
    pytest.importorskip(module, reason="executorch is not installed")
    x = metal_inputs(H=H)
    ours, theirs = x.vk.clone(), x.vk.clone()
    o = et_face.gated_delta_rule(x.q, x.k, x.v, x.decay, x.beta, ours)
    want = torch.ops.metal.gated_delta_rule(x.q, x.k, x.v, x.decay, x.beta, theirs)
    close(o, want, "o", limit=1e-10)
    close(ours, theirs, "state", limit=1e-10)


@pytest.mark.parametrize(("T", "H", "HV", "D"), [(9, 2, 4, 32), (37, 16, 32, 128)])
def test_metal_face_is_what_mlx_computes(T: int, H: int, HV: int, D: int) -> None:
    if importlib.util.find_spec("mlx") is None:
        without("mlx is not installed")
    import mlx.core as mx

    if not hasattr(mx.fast, "gated_delta_update"):
        without("this mlx has no gated_delta_update: it needs 0.32.3 or newer")
    x = metal_inputs(B=1, T=T, H=H, HV=HV, K=D, V=D)
    state = x.vk.clone()
    o = et_face.gated_delta_rule(x.q, x.k, x.v, x.decay, x.beta, state)
    arrays = [mx.array(t.numpy()) for t in (x.q, x.k, x.v, x.decay, x.beta, x.vk)]
    want_o, want_state = (np.array(a) for a in mx.fast.gated_delta_update(*arrays, stream=mx.cpu))
    close(o, want_o, "o", limit=1e-10)
    close(state, want_state, "state", limit=1e-10)


def llama_inputs(H: int, Hkv: int, T: int, kda: bool) -> list[torch.Tensor]:
    """query [B, H, T, K]; key, value, decay, beta, initial_state with Hkv heads."""
    many = inputs(T=T, H=H, HV=H, K=16, V=24, seed=3)
    x = inputs(T=T, H=Hkv, HV=Hkv, K=16, V=24, kda=kda)
    arrays = (many.q, x.k, x.v, x.g.exp(), x.beta)
    return [*(t.transpose(1, 2).contiguous() for t in arrays), x.state]


LLAMA_CASES = [(4, 4, 9, False), (4, 2, 9, True), (6, 2, 70, False), (3, 1, 1, True), (4, 4, 70, True)]


@pytest.mark.parametrize(("H", "Hkv", "T", "kda"), LLAMA_CASES)
def test_llama_face(H: int, Hkv: int, T: int, kda: bool) -> None:
    arrays = llama_inputs(H, Hkv, T, kda)
    query, key, value, decay, beta, state = arrays
    before = state.clone()
    for given in (arrays, [a.numpy() for a in arrays]):
        o, final = et_face.llama_gated_delta_rule(*given)
        assert tuple(o.shape) == (*query.shape[:3], value.shape[3])
        assert tuple(final.shape) == tuple(state.shape)
        for h in range(H):  # one oracle call per query head, with the state head that serves it
            s = slice(h // (H // Hkv), h // (H // Hkv) + 1)
            rows = [a.double().numpy()[:, i].swapaxes(1, 2) for a, i in (
                (query, slice(h, h + 1)), (key, s), (value, s), (decay, s), (beta, s))]  # fmt: skip
            expected = reference.gated_delta_rule(
                *rows[:3], g=rows[3], beta=rows[4], initial_state=f64(state[:, s]), decay="linear", scale=1.0
            )
            close(o[:, h], expected.o[:, :, 0], f"output of head {h}")
            close(final[:, s], expected.state, f"state of head {h}")
    assert torch.equal(state, before)


def test_llama_face_gradients() -> None:
    x = llama_inputs(4, 2, 3, True)
    leaves = [t[:1, :, :, :3].double().clone() if t.ndim == 4 else t[:1].double().clone() for t in x]
    leaves[5] = leaves[5][:, :, :3]

    def call(*arrays: torch.Tensor) -> Any:
        return et_face.llama_gated_delta_rule(*(a.float() for a in arrays))

    # The face is float32 only, so no gradcheck: compare with autograd through the plain recurrence.
    wanted = [t.clone().requires_grad_() for t in leaves]
    o, final = call(*wanted)
    (o.sum() + (final * final).sum()).backward()
    q, k, v, a, b, S = (t.clone().requires_grad_() for t in leaves)
    out, state = 0.0, S
    for t in range(3):
        state = state * a[:, :, t, :, None]
        d = b[:, :, t, None] * (v[:, :, t] - (state * k[:, :, t, :, None]).sum(-2))
        state = state + k[:, :, t, :, None] * d[:, :, None]
        out = out + (state.repeat_interleave(2, 1) * q[:, :, t, :, None]).sum()
    (out + (state * state).sum()).backward()
    for name, got, want in zip(
        ("q", "k", "v", "decay", "beta", "S"), wanted, (q, k, v, a, b, S), strict=True
    ):
        close(got.grad, want.grad, f"gradient of {name}")


def test_llama_face_signature_and_refusals() -> None:
    names = ["query", "key", "value", "decay", "beta", "initial_state"]
    assert listing(et_face.llama_gated_delta_rule) == f"({', '.join(names)})"
    arrays = llama_inputs(4, 2, 5, False)

    def call(**wrong: Any) -> Any:
        return et_face.llama_gated_delta_rule(**{**dict(zip(names, arrays, strict=True)), **wrong})

    for i, name in enumerate(names):
        with pytest.raises(TypeError, match=f"{name} must be a torch"):
            call(**{name: None})
        with pytest.raises(ValueError, match=f"{name} must be float32"):
            call(**{name: arrays[i].double()})
        with pytest.raises(ValueError, match=f"{name} must be"):
            call(**{name: arrays[i][..., 1:][None]})
    with pytest.raises(ValueError, match="query must have a multiple of key's heads"):
        call(query=arrays[0][:, :3])
    with pytest.raises(ValueError, match="decay must be"):
        call(decay=arrays[3][..., :4])
    with pytest.raises(ValueError, match="initial_state must be"):
        call(initial_state=arrays[5].transpose(-1, -2))


@pytest.mark.parametrize(("H", "Hkv", "T", "kda"), LLAMA_CASES)
def test_llama_face_is_what_executorch_computes(H: int, Hkv: int, T: int, kda: bool) -> None:
    spec = importlib.util.find_spec("executorch")
    if spec is None or not spec.submodule_search_locations:
        without("executorch is not installed")
    root = Path(next(iter(spec.submodule_search_locations)))
    library = root / "extension" / "llm" / "custom_ops" / "libcustom_ops_aot_lib.so"
    if not library.exists():
        without("this executorch has no libcustom_ops_aot_lib.so")
    torch.ops.load_library(str(library))  # without executorch's Python module, whose import takes seconds
    arrays = llama_inputs(H, Hkv, T, kda)
    o, state = et_face.llama_gated_delta_rule(*arrays)
    want_o, want_state = torch.ops.llama.gated_delta_rule(*arrays)
    close(o, want_o, "output", limit=1e-9)
    close(state, want_state, "state", limit=1e-9)
