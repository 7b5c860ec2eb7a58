"""`import fla` on anydelta: the offered names, that they work, and models whose code imports them."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402

from anydelta.compat import fla as ours  # noqa: E402
from anydelta.compat.fla.convolution import (  # noqa: E402
    ShortConvolution,
    causal_conv1d_fn,
    causal_conv1d_update,
)
from anydelta.compat.fla.gate import fused_kda_gate  # noqa: E402
from anydelta.compat.fla.index import (  # noqa: E402
    get_unpad_data,
    index_first_axis,
    pad_input,
    prepare_cu_seqlens_from_mask,
    prepare_lens_from_mask,
    tensor_cache,
)
from anydelta.compat.fla.norm import FusedRMSNormGated  # noqa: E402
from anydelta.compat.fla.simple_gla import chunk_simple_gla, fused_recurrent_simple_gla  # noqa: E402
from anydelta.core.dispatch import UnsupportedError  # noqa: E402

pytestmark = pytest.mark.skipif(
    "fla" in sys.modules or importlib.util.find_spec("fla") is not None, reason="the real fla is installed"
)
NAMES = [(module, name) for module, names in ours.OFFERED.items() for name in names if name[0] != "_"]
REMOTE = Path(__file__).parent / "remote_model"


@pytest.fixture
def installed() -> Iterator[None]:
    assert ours.install()
    yield
    ours.uninstall()


def random(*shape: int, seed: int = 0, dtype: Any = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def close(got: torch.Tensor, want: torch.Tensor, nmse: float = 1e-10) -> None:
    """Numbers against float64 ones."""
    assert got.shape == want.shape
    error = (got.double() - want).square().sum() / want.square().sum().clamp(min=1e-30)
    assert error <= nmse, error


def same_gradients(run: Callable[..., Any], reference: Callable[..., Any], *inputs: torch.Tensor) -> None:
    """float64 inputs through both, a random cotangent back."""
    found = []
    for function in (run, reference):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        outputs = function(*leaves)
        outputs = [o for o in (outputs if isinstance(outputs, tuple) else (outputs,)) if o is not None]
        loss = sum((o * random(*o.shape, seed=9 + i, dtype=o.dtype)).sum() for i, o in enumerate(outputs))
        found.append(torch.autograd.grad(loss, leaves))
    for got, want in zip(*found, strict=True):
        close(got, want, 1e-20)


# ---- What is there


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(("module", "name"), NAMES, ids=[".".join(pair) for pair in NAMES])
def test_every_name_is_importable_and_says_what_it_is(module: str, name: str) -> None:
    namespace: dict[str, Any] = {}
    exec(f"from {module} import {name}", namespace)
    assert namespace[name] is ours.OFFERED[module][name]
    assert namespace[name].__doc__
    assert name in importlib.import_module(module).__all__


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("code", "missing"),
    [
        ("from fla.modules import RMSNorm", "fla.modules.RMSNorm"),
        ("from fla.ops import chunk_gla", "fla.ops.chunk_gla"),
        ("from fla.ops.gla import chunk_gla", "fla.ops.gla"),
        ("import fla.models.utils", "fla.models"),
        ("from fla.layers.utils import unpad_input", "fla.layers.utils.unpad_input"),
        (
            "from causal_conv1d import causal_conv1d_varlen_states",
            "causal_conv1d.causal_conv1d_varlen_states",
        ),
        ("import fla.ops.kda as m; m.chunk_kda_fwd", "fla.ops.kda.chunk_kda_fwd"),
    ],
)
def test_nothing_else_is_offered(code: str, missing: str) -> None:
    with pytest.raises(
        (ImportError, AttributeError), match=rf"got {missing}\. docs/fla\.md lists what is there"
    ):
        exec(code, {})


@pytest.mark.usefixtures("installed")
def test_asking_for_a_name_that_is_missing_does_not_raise() -> None:
    import fla

    assert getattr(fla, "chunk_kda", None) is None
    assert not hasattr(fla.__spec__, "nothing")
    assert importlib.util.find_spec("fla") is not None
    assert fla.__version__ == "0.5.2"


def test_inner_modules_are_attributes_and_functions_can_be_pickled() -> None:
    code = (
        "import pickle; from anydelta.compat.fla import install; install(); import fla;"
        "f = fla.ops.kda.chunk_kda; assert pickle.loads(pickle.dumps(f)) is f;"
        "assert fla.modules.ShortConvolution and fla.ops.utils.index"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_uninstall_leaves_no_trace() -> None:
    modules, finders = set(sys.modules), list(sys.meta_path)
    for _ in range(2):
        assert ours.install()
        assert ours.install()  # once more is once
        from fla.ops.kda import chunk_kda

        ours.uninstall()
        ours.uninstall()
        assert sys.meta_path == finders
        assert set(sys.modules) == modules
    with pytest.raises(ModuleNotFoundError, match="No module named 'fla'"):
        importlib.import_module("fla.ops.kda")
    q = random(1, 3, 2, 8)  # a name that was imported meanwhile goes on to work
    assert chunk_kda(q, q, q, -q.abs(), q[..., 0].sigmoid())[0].shape == q.shape


@pytest.mark.parametrize("package", ["fla", "causal_conv1d"])
def test_the_real_package_is_never_hidden(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text("real = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        assert ours.install() == (package != "fla")
        assert importlib.import_module(package).real
        if package == "fla":
            with pytest.raises(ModuleNotFoundError):
                importlib.import_module("causal_conv1d")
    finally:
        ours.uninstall()
        sys.modules.pop(package, None)


def test_a_folder_without_code_is_not_the_real_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fla").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    try:
        assert ours.install()
        from fla.ops import chunk_kda

        assert chunk_kda.__name__ == "chunk_kda"
    finally:
        ours.uninstall()


# ---- Each of them, against the same in float64


@pytest.mark.parametrize("lower_bound", [None, -5.0])
@pytest.mark.parametrize("bias", [True, False])
def test_the_gate_in_both_of_its_signatures(lower_bound: float | None, bias: bool) -> None:
    H, K = 3, 8
    g, A, b = (
        random(2, 5, H, K, dtype=torch.float64),
        random(H, seed=1).double(),
        random(H * K, seed=2).double(),
    )

    def want(g: torch.Tensor, A: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        x = g + b.view(H, K) if bias else g
        if lower_bound is not None:
            return lower_bound / (1 + torch.exp(-A.exp()[:, None] * x))
        return -A.exp()[:, None] * torch.log1p(torch.exp(x))

    dt_bias = b if bias else None
    got = fused_kda_gate(g.float(), A.float(), None if dt_bias is None else dt_bias.float(), lower_bound)
    assert got.dtype == torch.float32
    close(got, want(g, A, b))
    half = fused_kda_gate(g.bfloat16(), A, dt_bias, lower_bound, output_dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    inputs = (g, A, b) if bias else (g, A)
    same_gradients(
        lambda g, A, b=None: fused_kda_gate(g, A, b, lower_bound=lower_bound),
        lambda g, A, b=None: want(g, A, b),
        *inputs,
    )
    if lower_bound is None:  # as fla 0.4.0
        flat = g.float().flatten(-2)
        close(fused_kda_gate(flat, A.view(1, 1, H, 1), K, g_bias=dt_bias), want(g, A, b))
        close(fused_kda_gate(flat, A, K, dt_bias, 1.0, 20.0), want(g, A, b))
        close(fused_kda_gate(flat, A=A, head_k_dim=K, g_bias=dt_bias), want(g, A, b))
    else:
        close(fused_kda_gate(g, None, dt_bias, lower_bound), want(g, torch.zeros(H).double(), b))


def test_a_gate_that_does_not_fit_is_refused() -> None:
    g = random(2, 5, 3, 8)
    with pytest.raises(ValueError, match="A_log or lower_bound"):
        fused_kda_gate(g)
    with pytest.raises(ValueError, match="A_log must have 3 numbers"):
        fused_kda_gate(g, torch.ones(4))
    with pytest.raises(ValueError, match="dt_bias must have 24 numbers"):
        fused_kda_gate(g, torch.ones(3), torch.ones(8))
    with pytest.raises(ValueError, match="head_k_dim = 7"):
        fused_kda_gate(g.flatten(-2), torch.ones(3), 7)
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        fused_kda_gate(g, torch.ones(3), nothing=1)


@pytest.mark.parametrize("activation", ["swish", "silu", "sigmoid"])
@pytest.mark.parametrize("affine", [True, False])
def test_the_gated_norm(activation: str, affine: bool) -> None:
    norm = FusedRMSNormGated(8, elementwise_affine=affine, eps=1e-3, activation=activation)
    weight = random(8, seed=3).double()
    if affine:
        norm.weight.data.copy_(weight)
    x, g, r = (random(2, 5, 3, 8, seed=s, dtype=torch.float64) for s in range(3))

    def want(x: torch.Tensor, g: torch.Tensor, w: torch.Tensor | None = None) -> torch.Tensor:
        y = x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-3) * (1.0 if w is None else w)
        return y / (1 + torch.exp(-g)) * (1.0 if activation == "sigmoid" else g)

    w = weight if affine else None
    close(norm(x.float(), g.float()), want(x, g, w))
    close(norm(x.float(), g.float().flatten(-2)), want(x, g, w))
    assert norm(x.bfloat16(), g.bfloat16()).dtype == torch.bfloat16
    y, total = norm(x.float(), g.float(), residual=r, prenorm=True)
    close(y, want(x + r, g, w))
    close(total, x + r)
    assert total.dtype == torch.float64
    assert norm(x.bfloat16(), g, prenorm=True, residual_in_fp32=True)[1].dtype == torch.float32
    norm = norm.double()
    if affine:
        run = lambda x, g, w: torch.func.functional_call(norm, {"weight": w}, (x, g))  # noqa: E731
        same_gradients(run, want, x, g, weight)
    else:
        same_gradients(norm, want, x, g)
    with pytest.raises(ValueError, match="activation must be"):
        FusedRMSNormGated(8, activation="gelu")
    with pytest.raises(ValueError, match="and g of its size"):
        norm(x, g[:1])


def convolved(
    x: torch.Tensor, weight: torch.Tensor, bias: Any, before: torch.Tensor, silu: bool = True
) -> torch.Tensor:
    """One sequence [T, D] in float64, token by token; `before` [W, D] is what came before it."""
    W = weight.shape[1]
    row = torch.cat((before, x))
    y = [(row[t + 1 : t + 1 + W] * weight.t()).sum(0) + (0 if bias is None else bias) for t in range(len(x))]
    out = torch.stack(y) if y else x
    return out / (1 + torch.exp(-out)) if silu else out


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("lengths", [None, (3, 1, 0, 5), (1, 1, 1)])
@pytest.mark.parametrize("bias", [False, True])
def test_the_short_convolution(lengths: tuple[int, ...] | None, cached: bool, bias: bool) -> None:
    D, W = 6, 4
    conv = ShortConvolution(D, W, bias=bias).double()
    N, T = (2, 7) if lengths is None else (len(lengths), sum(lengths))
    x = random(N if lengths is None else 1, T, D, dtype=torch.float64)
    cache = random(N, D, W, seed=5, dtype=torch.float64) if cached else None
    cu = None if lengths is None else torch.tensor([0, *lengths]).cumsum(0)

    def want(x: torch.Tensor, weight: torch.Tensor, cache: torch.Tensor | None) -> tuple[Any, Any]:
        rows = list(x) if lengths is None else list(x[0].split(lengths))
        before = x.new_zeros(N, W, D) if cache is None else cache.transpose(1, 2)
        b = conv.bias.detach() if bias else None
        y = [convolved(r, weight[:, 0], b, s) for r, s in zip(rows, before, strict=True)]
        states = [torch.cat((s, r))[len(r) :].t() for r, s in zip(rows, before, strict=True)]
        return torch.stack(y) if lengths is None else torch.cat(y).unsqueeze(0), torch.stack(states)

    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            given = None if cache is None else cache.clone()
            y, state = conv(x, cache=given, output_final_state=True, cu_seqlens=cu)
        want_y, want_state = want(x, conv.weight.detach(), cache)
        close(y.detach(), want_y, 1e-28)
        close(state, want_state, 1e-28)
        in_place = cached and not grad and lengths == (1, 1, 1)
        assert (state is given) == in_place
        if cached and not in_place:
            assert torch.equal(given, cache)
    assert conv(x, cu_seqlens=cu)[1] is None
    single = ShortConvolution(D, W, bias=bias)
    single.load_state_dict(conv.state_dict())
    close(single(x.float(), cu_seqlens=cu)[0].detach(), want(x, conv.weight.detach(), None)[0])
    inputs = (x, conv.weight.detach(), *(() if cache is None else (cache,)))
    same_gradients(
        lambda x, w, c=None: torch.func.functional_call(
            conv, {"weight": w}, (x,), dict(cache=c, output_final_state=True, cu_seqlens=cu)
        ),
        lambda x, w, c=None: want(x, w, c),
        *inputs,
    )


def test_the_short_convolution_in_pieces_and_with_all_that_it_takes() -> None:
    conv = ShortConvolution(6, 3, activation=None, backend="cuda", use_fast_conv1d=True)
    x = random(2, 9, 6)
    whole, last = conv(x, output_final_state=True)
    with torch.no_grad():
        pieces, cache = [], None
        for begin, end in ((0, 4), (4, 5), (5, 6), (6, 9)):
            y, cache = conv(x[:, begin:end], cache=cache, output_final_state=True)
            pieces.append(y)
    close(torch.cat(pieces, 1), whole.double())
    assert torch.equal(cache, last)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, :4] = False
    y, _ = conv(x, mask=mask, residual=x)
    close(y.detach(), (conv(x * mask[..., None])[0] + x).double().detach())
    assert conv.state_size == 18
    assert list(conv.state_dict()) == ["weight"]
    assert conv.weight.shape == (6, 1, 3)
    cu = torch.tensor([0, 9])
    for call, message in (
        (lambda: conv(x[0]), "x must be"),
        (lambda: conv(x, cu_seqlens=cu), "requires B = 1; got B = 2"),
        (lambda: conv(x[:1], cu_seqlens=torch.tensor([0, 8])), "cu_seqlens must rise"),
        (lambda: conv(x[:1], mask=mask[:1], cu_seqlens=cu), "exclude each other"),
        (lambda: conv(x, cache=torch.zeros(2, 6, 2)), "cache must be"),
        (lambda: ShortConvolution(6, 3, activation="gelu"), "activation must be"),
        (lambda: ShortConvolution(6, 3, backend="none"), "backend must be"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        conv(x, nothing=1)
    with pytest.raises(UnsupportedError, match="cp_context"):
        conv(x, cp_context=object())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_causal_conv1d(bias: bool, activation: str | None) -> None:
    D, W, lengths = 6, 4, (3, 1, 5)
    x, weight = random(2, D, 9, dtype=torch.float64), random(D, W, seed=1, dtype=torch.float64)
    b = random(D, seed=2, dtype=torch.float64) if bias else None
    before = random(2, D, W - 1, seed=3, dtype=torch.float64)

    def want(x: torch.Tensor, w: torch.Tensor, state: Any = None, lengths: Any = None) -> torch.Tensor:
        rows = []
        for i, row in enumerate(x.transpose(1, 2)):
            start = row.new_zeros(W, D) if state is None else F.pad(state[i].t(), (0, 0, 1, 0))
            parts = row.split(lengths or [len(row)])
            rows.append(torch.cat([convolved(p, w, b, start, activation is not None) for p in parts]))
        return torch.stack(rows).transpose(1, 2)

    close(causal_conv1d_fn(x, weight, b, activation=activation), want(x, weight), 1e-28)
    close(causal_conv1d_fn(x.float(), weight.float(), b, activation=activation), want(x, weight))
    y, final = causal_conv1d_fn(
        x, weight, b, initial_states=before, return_final_states=True, activation=activation
    )
    close(y, want(x, weight, before), 1e-28)
    assert torch.equal(final, x[..., -W + 1 :])
    short, out = x[..., :2], torch.full_like(before, math.nan)
    _, final = causal_conv1d_fn(short, weight, b, None, before, True, out, activation)
    assert final is out
    assert torch.equal(out, torch.cat((before, short), -1)[..., -W + 1 :])
    ids = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths)).expand(2, -1)
    packed = causal_conv1d_fn(x, weight, b, seq_idx=ids, activation=activation)
    close(packed, want(x, weight, None, lengths), 1e-28)
    cu = torch.tensor([0, *lengths]).cumsum(0)
    assert torch.equal(causal_conv1d_fn(x, weight, b, cu_seq_lens_q=cu, activation=activation), packed)
    same_gradients(lambda x, w: causal_conv1d_fn(x, w, b, activation=activation), want, x, weight)

    state = random(2, D, W + 1, seed=4, dtype=torch.float64)
    row = torch.cat((state, x[..., :3]), -1)
    y = causal_conv1d_update(x[..., 0], state, weight, b, activation)
    rest = causal_conv1d_update(x[..., 1:3], state, weight, b, activation)
    close(torch.cat((y.unsqueeze(-1), rest), -1), want(row, weight)[..., W + 1 :], 1e-28)
    assert torch.equal(state, row[..., 3:])
    for call, message in (
        (lambda: causal_conv1d_fn(x, weight, activation="gelu"), "activation must be"),
        (lambda: causal_conv1d_fn(x, weight, seq_idx=ids, initial_states=before), "exclude each other"),
        (
            lambda: causal_conv1d_fn(x[:1], weight, cu_seq_lens_q=torch.tensor([0, 99])),
            "cu_seq_lens_q must rise",
        ),
        (
            lambda: causal_conv1d_fn(x[:1], weight, cu_seq_lens_q=torch.tensor([2, 3])),
            "cu_seq_lens_q must rise",
        ),
        (
            lambda: causal_conv1d_fn(x[:1], weight, cu_seq_lens_q=torch.tensor([0, 3, 2])),
            "cu_seq_lens_q must rise",
        ),
        (lambda: causal_conv1d_fn(x[:1], weight, cu_seq_lens_q=torch.tensor([])), "must be a tensor"),
        (lambda: causal_conv1d_fn(x[:1], weight, cu_seq_lens_q=[0, 3]), "must be a tensor"),
        (lambda: causal_conv1d_fn(x[:1], weight, seq_idx=ids[:1].expand(5, -1)), "seq_idx must be"),
        (lambda: causal_conv1d_fn(x, weight[:5]), "weight"),
        (lambda: causal_conv1d_fn(x, weight, initial_states=before[..., 1:]), "initial_states must be"),
        (lambda: causal_conv1d_update(x, state[..., :2], weight), "with L >= 3"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(UnsupportedError, match="cache_seqlens"):
        causal_conv1d_update(x, state, weight, cache_seqlens=torch.zeros(2))


@pytest.mark.parametrize("function", [chunk_simple_gla, fused_recurrent_simple_gla])
@pytest.mark.parametrize("gate", ["g", "strong", "g_gamma", "none"])
@pytest.mark.parametrize("lengths", [None, (70, 0, 1, 66)])
@pytest.mark.parametrize("v_first", [False, True])
def test_simple_gla(
    function: Callable[..., Any], gate: str, lengths: tuple[int, ...] | None, v_first: bool
) -> None:
    H, K, V = 2, 5, 7
    B, T, N = (2, 130, 2) if lengths is None else (1, sum(lengths), len(lengths))
    q, k = random(2, B, T, H, K, dtype=torch.float64)
    v, h0 = random(B, T, H, V, seed=1, dtype=torch.float64), random(N, H, K, V, seed=2, dtype=torch.float64)
    g = -random(B, T, H, seed=3, dtype=torch.float64).exp()
    if gate == "strong":
        g = torch.where(random(B, T, H, seed=4) > 0.5, g, -1e4 * torch.ones(()))
        g[:, 5] = -torch.inf
    cu = None if lengths is None else torch.tensor([0, *lengths]).cumsum(0)

    def want(q: Any, k: Any, v: Any, h0: Any, g: Any) -> tuple[Any, Any]:
        g = {"g_gamma": g[0, 0].expand(B, T, H), "none": torch.zeros_like(g)}.get(gate, g)
        if lengths is None:
            rows = list(zip(q, k, v, g, strict=True))
        else:
            rows = list(zip(*(x[0].split(lengths) for x in (q, k, v, g)), strict=True))
        outputs, states = [], []
        for (qr, kr, vr, gr), S in zip(rows, h0, strict=True):
            for t in range(len(qr)):
                S = gr[t].exp()[:, None, None] * S + kr[t, :, :, None] * vr[t, :, None, :]
                outputs.append((S * qr[t, :, :, None]).sum(1) * K**-0.5)
            states.append(S.transpose(1, 2) if v_first else S)
        return torch.stack(outputs).view(B, T, H, V), torch.stack(states)

    def run(q: Any, k: Any, v: Any, h0: Any, g: Any) -> tuple[Any, Any]:
        decay = {"g": {"g": g}, "strong": {"g": g}, "g_gamma": {"g_gamma": g[0, 0]}, "none": {}}[gate]
        h0 = h0.transpose(2, 3) if v_first else h0
        return function(
            q, k, v, **decay, initial_state=h0, output_final_state=True, state_v_first=v_first, cu_seqlens=cu
        )

    for got, exact in zip(run(*(x.float() for x in (q, k, v, h0, g))), want(q, k, v, h0, g), strict=True):
        assert got.dtype == torch.float32
        close(got, exact, 1e-11)
    if gate != "strong":
        inputs = (q, k, v, h0) if gate == "none" else (q, k, v, h0, g)
        same_gradients(
            lambda *x: run(*x, *(g,) * (5 - len(x))), lambda *x: want(*x, *(g,) * (5 - len(x))), *inputs
        )
    assert function(q, k, v)[1] is None


def test_simple_gla_that_does_not_fit_is_refused() -> None:
    q, g = random(1, 4, 2, 5), -random(1, 4, 2).abs()
    for call, message in (
        (lambda: chunk_simple_gla(q, q[:, :3], q), "requires q, k"),
        (lambda: chunk_simple_gla(q, q, q, g[..., :1]), "g must be"),
        (lambda: chunk_simple_gla(q, q, q, g, g[0, 0]), "exclude each other"),
        (lambda: chunk_simple_gla(q, q, q, g_gamma=torch.ones(3)), "g_gamma must be"),
        (lambda: chunk_simple_gla(q, q, q, initial_state=torch.zeros(2, 2, 5, 5)), "initial_state must be"),
        (
            lambda: chunk_simple_gla(q, q, q, cu_seqlens=torch.tensor([0, 3])),
            "cu_seqlens must rise from 0 to T",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        chunk_simple_gla(q, q, q, nothing=1)
    with pytest.raises(UnsupportedError, match="reverse"):
        fused_recurrent_simple_gla(q, q, q, reverse=True)


def test_padded_batches_to_packed_rows_and_back() -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 1]])
    indices, cu, longest = get_unpad_data(mask)
    assert indices.tolist() == [2, 3, 4, 5, 6, 7, 11]
    assert cu.tolist() == prepare_cu_seqlens_from_mask(mask).tolist() == [0, 2, 6, 7]
    assert prepare_lens_from_mask(mask.bool()).tolist() == [2, 4, 1]
    assert (cu.dtype, longest) == (torch.int32, 4)
    assert prepare_cu_seqlens_from_mask(mask, torch.int64).dtype == torch.int64
    x = random(3, 4, 2, 5, dtype=torch.float64)
    rows = index_first_axis(x.flatten(0, 1), indices)
    assert torch.equal(rows, x[mask.bool()])
    assert torch.equal(pad_input(rows, indices, 3, 4), x * mask[..., None, None])
    same_gradients(
        lambda x: pad_input(index_first_axis(x.flatten(0, 1), indices) ** 2, indices, 3, 4),
        lambda x: x**2 * mask[..., None, None],
        x,
    )
    assert get_unpad_data(torch.zeros(2, 3))[0].numel() == 0


def test_a_remembered_result_is_never_stale() -> None:
    calls = []

    @tensor_cache
    def total(x: torch.Tensor, by: float = 1.0) -> torch.Tensor:
        calls.append(by)
        return x.sum() * by

    x, y = torch.ones(3), torch.ones(4)
    assert total(x) is total(x)
    assert len(calls) == 1
    assert total(y) == 4
    assert total(x, by=2.0) == 6
    x[0] = 5  # written since
    assert total(x, by=2.0) == 14
    x.requires_grad_()
    with torch.no_grad():
        assert not total(x).requires_grad
    assert total(x).requires_grad
    with torch.inference_mode():
        z = torch.ones(2)
        assert total(z) == 2
        z += 1
        assert total(z) == 4


# ---- Models whose code comes with them


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A checkpoint of the small model: its code, and random weights."""
    transformers = pytest.importorskip("transformers")
    out = tmp_path_factory.mktemp("remote")
    home = tmp_path_factory.mktemp("modules")
    for file in REMOTE.iterdir():
        if file.is_file():
            (out / file.name).write_bytes(file.read_bytes())
    dynamic = importlib.import_module("transformers.dynamic_module_utils")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic, "HF_MODULES_CACHE", str(home))
        assert ours.install()
        try:
            config = transformers.AutoConfig.from_pretrained(out, trust_remote_code=True)
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True)
            for p in model.parameters():
                if p.ndim == 2:
                    p.data.normal_(0, 0.3)
            model.save_pretrained(out)
        finally:
            ours.uninstall()
        yield out


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    assert ours.install()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    finally:
        ours.uninstall()  # what was imported meanwhile goes on to work
    return model


def exact(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """The logits [T, vocabulary] of one row of tokens, in float64, written once more and token by token."""
    weights = {name: p.detach().double() for name, p in model.state_dict().items()}
    config = model.config
    x = weights["embed_tokens.weight"][tokens]
    for i, kind in enumerate(config.layers):
        own = {n.removeprefix(f"layers.{i}."): w for n, w in weights.items() if n.startswith(f"layers.{i}.")}
        h = (
            x
            / torch.sqrt((x * x).mean(-1, keepdim=True) + config.rms_norm_eps)
            * weights[f"norms.{i}.weight"]
        )
        q, k, v = (h @ own[f"{n}_proj.weight"].t() for n in "qkv")
        q, k, v = (
            convolved(y, own[f"{n}_conv1d.weight"][:, 0], None, y.new_zeros(config.conv_size, y.shape[1]))
            for n, y in zip("qkv", (q, k, v), strict=True)
        )
        q, k, v = (y.unflatten(-1, (-1, config.head_dim)) for y in (q, k, v))
        HV, K = v.shape[1], config.head_dim
        beta = torch.sigmoid(h @ own["b_proj.weight"].t())
        raw = h @ own["f_proj.weight"].t() + own["dt_bias"]
        A = own["A_log"].flatten().exp()
        if kind == "gdn":
            decay = torch.exp(-A * torch.log1p(raw.exp()))[..., None].expand(-1, -1, K)
        elif kind == "kimi":
            decay = torch.exp(-A[:, None] * torch.log1p(raw.exp()).unflatten(-1, (-1, K)))
        elif kind == "ling":
            decay = torch.exp(config.lower_bound * torch.sigmoid(A[:, None] * raw.unflatten(-1, (-1, K))))
        else:
            decay = torch.exp(-(2.0 ** -torch.arange(1, HV + 1).double()))[:, None].expand(len(x), HV, K)
        if kind != "lightning":
            q, k = (y / torch.sqrt((y * y).sum(-1, keepdim=True) + 1e-6) for y in (q, k))
        q, k = (y.repeat_interleave(HV // y.shape[1], 1) for y in (q, k))
        S, outputs = x.new_zeros(HV, K, v.shape[2]), []
        for t in range(len(x)):
            S = decay[t, :, :, None] * S
            d = v[t] if kind == "lightning" else beta[t, :, None] * (v[t] - (S * k[t, :, :, None]).sum(1))
            S = S + k[t, :, :, None] * d[:, None, :]
            outputs.append((S * q[t, :, :, None]).sum(1) * K**-0.5)
        o = torch.stack(outputs)
        z = (h @ own["g_proj.weight"].t()).unflatten(-1, (HV, -1))
        o = o / torch.sqrt((o * o).mean(-1, keepdim=True) + config.rms_norm_eps) * own["o_norm.weight"]
        o = o * torch.sigmoid(z) * (z if kind == "gdn" else 1.0)
        x = x + o.flatten(1) @ own["o_proj.weight"].t()
    return x @ weights["lm_head.weight"].t()


def prompts(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(64, (n,), generator=generator) for n in lengths]


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 9, 70, 130])
def test_a_checkpoint_with_code_of_its_own(model: Any, length: int) -> None:
    (tokens,) = prompts(length)
    got = model(tokens[None]).logits[0]
    want = exact(model, tokens)
    assert (got.double() - want).abs().max() < 1e-4
    assert model(tokens[None]).logits.shape == (1, length, 64)


@torch.no_grad()
def test_a_checkpoint_with_code_in_pieces_padded_and_packed(model: Any) -> None:
    rows = prompts(9, 4, 1)
    want = [exact(model, row) for row in rows]
    states, pieces = None, []
    for begin, end in ((0, 3), (3, 4), (4, 9)):
        out = model(rows[0][None, begin:end], past_key_values=states, use_cache=True)
        states = out.past_key_values
        pieces.append(out.logits[0])
    assert (torch.cat(pieces).double() - want[0]).abs().max() < 1e-4

    ids = torch.stack([F.pad(row, (9 - len(row), 0)) for row in rows])
    mask = torch.stack([F.pad(torch.ones_like(row), (9 - len(row), 0)) for row in rows])
    out = model(ids, attention_mask=mask, use_cache=True)
    for got, exactly in zip(out.logits, want, strict=True):
        assert (got[-len(exactly) :].double() - exactly).abs().max() < 1e-4
    next_ids = torch.tensor([[3], [4], [5]])
    out = model(
        next_ids,
        attention_mask=F.pad(mask, (0, 1), value=1),
        past_key_values=out.past_key_values,
        use_cache=True,
    )
    for got, row, more in zip(out.logits, rows, next_ids, strict=True):
        assert (got[-1].double() - exact(model, torch.cat((row, more)))[-1]).abs().max() < 1e-4

    packed = model(torch.cat(rows)[None], cu_seqlens=torch.tensor([0, 9, 13, 14])).logits[0]
    assert (packed.double() - torch.cat(want)).abs().max() < 1e-4


@torch.no_grad()
def test_a_checkpoint_with_code_writes_text(model: Any) -> None:
    (tokens,) = prompts(5)
    want = tokens.tolist()
    for _ in range(12):
        want.append(int(exact(model, torch.tensor(want))[-1].argmax()))
    got = model.generate(tokens[None], max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert got[0].tolist() == want


def test_a_checkpoint_with_code_learns(model: Any) -> None:
    """The gradients in float64 are the slopes."""
    (tokens,) = prompts(70)
    model = importlib.import_module("copy").deepcopy(model).double().train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def loss() -> torch.Tensor:
        return model(tokens[None], labels=tokens[None]).loss

    loss().backward()
    for name, p in model.named_parameters():
        if p.grad is None:
            assert name.split(".")[-1] in ("A_log", "dt_bias", "weight")  # lightning reads none of its gates
            assert name.startswith("layers.3.")
            continue
        direction = torch.zeros_like(p)
        direction.view(-1)[p.grad.abs().argmax()] = 1.0
        sides = []
        with torch.no_grad():
            for step in (1e-5, -1e-5):
                p.copy_(before[name] + step * direction)
                sides.append(loss())
            p.copy_(before[name])
        slope = (sides[0] - sides[1]) / 2e-5
        assert slope.item() == pytest.approx((p.grad * direction).sum().item(), rel=1e-4, abs=1e-9)


def test_generate_with_code_of_its_own(folder: Path, tmp_path: Path) -> None:
    """`anydelta generate --fla`, and what it refuses."""
    from anydelta.generate.checkpoint import REPOSITORY_MODEL
    from conftest import run_program

    if not REPOSITORY_MODEL.is_dir():
        pytest.skip("the repository's model is not here")
    transformers = pytest.importorskip("transformers")
    for file in REMOTE.glob("*.py"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    for file in REPOSITORY_MODEL.glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    size = len(transformers.AutoTokenizer.from_pretrained(tmp_path))
    config = json.loads((REMOTE / "config.json").read_text()) | {"vocab_size": size}
    (tmp_path / "config.json").write_text(json.dumps(config))
    try:
        assert ours.install()
        loaded = transformers.AutoConfig.from_pretrained(tmp_path, trust_remote_code=True)
        transformers.AutoModelForCausalLM.from_config(loaded, trust_remote_code=True).save_pretrained(
            tmp_path
        )
        ours.uninstall()
        model = ("-m", str(tmp_path))
        code, out, err = run_program(
            "generate", *model, "--trust-remote-code", "--fla", "-n", "4", "--json", "In the"
        )
        assert code == 0, err
        assert json.loads(out)["way"] == "anydelta, fla"
        assert len(json.loads(out)["tokens"]) == 4
    finally:
        ours.uninstall()
    code, _, err = run_program("generate", *model, "--fla", "In the")
    assert code == 2
    assert "requires --trust-remote-code for" in err
    for option in ("--plain", "--compare", "--mtp"):
        code, _, err = run_program("generate", *model, "--fla", option, "In the")
        assert code == 2
        assert "requires --fla without --plain, --compare and drafts" in err
    ours.uninstall()


def test_without_install_the_code_does_not_even_import(folder: Path, tmp_path: Path) -> None:
    code = f"""
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True)
except ImportError as error:
    assert "fla" in str(error), error
else:
    raise SystemExit("it did")
"""
    run_alone(code, HF_HOME=str(tmp_path))


def run_alone(code: str, **environment: str) -> str:
    """In a process of its own, in which Transformers has imported nothing yet."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment}
    ran = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=500)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout + ran.stderr


# ---- Transformers, which looks for fla when a modelling module is imported


@pytest.mark.parametrize(
    "scenario", ["functions", "alone", "then_enable", "enable_first", "late", "training", "graphs"]
)
def test_transformers_takes_what_is_offered(scenario: str) -> None:
    """In a process of its own: see fla_scenarios.py."""
    pytest.importorskip("transformers")
    run_alone(
        f"import sys; sys.path.insert(0, {str(REMOTE.parent)!r}); import fla_scenarios; fla_scenarios.{scenario}()"
    )
