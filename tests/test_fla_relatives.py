"""compat.fla's functions that read another key than they write, against their recurrences written out in float64.

The forms are those of fla-core 0.6.0: ops/gdn2/naive.py (naive_recurrent_gdn2), ops/comba/fused_recurrent.py
(fused_recurrent_comba_fwd_kernel; naive_recurrent_comba reads the state later, which is tested too),
ops/precond_gated_delta_rule/naive.py and ops/precond_kda/naive.py (naive_recurrent_precond_*).
"""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import anydelta  # noqa: E402
from anydelta.compat import fla  # noqa: E402

B, T, H, HV, K, V = 2, 75, 2, 4, 24, 20


def unit(x: Any) -> Any:
    return x / x.square().sum(-1, keepdim=True).add(1e-6).sqrt()


def make(seed: int = 0, *, rows: int = B, tokens: int = T, dtype: Any = torch.float32) -> dict[str, Any]:
    """Arguments of all the functions by name; gates as models have them."""
    torch.manual_seed(seed)

    def normal(*size: int) -> Any:
        return torch.randn(*size, dtype=torch.float64)

    x = dict(
        q=normal(rows, tokens, H, K), k=normal(rows, tokens, H, K), v=normal(rows, tokens, HV, V),
        p=normal(rows, tokens, H, K), b=normal(rows, tokens, HV, K).sigmoid(), w=normal(rows, tokens, HV, V).sigmoid(),
        beta=normal(rows, tokens, HV).sigmoid(), g=-normal(rows, tokens, HV).exp() * 0.1,
        gk=-normal(rows, tokens, HV, K).exp() * 0.1, g_atk=-normal(rows, tokens, H).exp() * 0.1,
        beta_atk=normal(rows, tokens, H).sigmoid(),
    )  # fmt: skip
    x = {n: t.to(dtype if n in "qkvp" else torch.float32) for n, t in x.items()}
    x["state"] = 0.3 * torch.randn(rows, HV, K, V)
    x["A"] = torch.rand(rows, H, K)
    return x


def recurrence(
    q: Any, k: Any, v: Any, decay: Any, read: Any, strength: Any, state: Any, *, before: bool = False
) -> tuple[Any, Any]:
    """One row. q, k [T, HV, K] (k is written), read [T, HV, K], v [T, HV, V], decay [T, HV, K], strength [T, HV]."""
    S = state.clone()
    o = torch.zeros_like(v)
    for t in range(len(v)):
        kept = decay[t][:, :, None] * S
        found = (S if before else kept) * read[t][:, :, None]
        d = strength[t][:, None] * (v[t] - found.sum(1))
        S = kept + k[t][:, :, None] * d[:, None, :]
        o[t] = (S * q[t][:, :, None]).sum(1) * K**-0.5
    return o, S


def spread(x: Any) -> Any:
    """[T, H, ...] as [T, HV, ...]."""
    return x.repeat_interleave(HV // H, 1)


def squashed(k: Any, g: Any, beta: Any, A: Any, *, x: float, eps: float, centre: Any) -> tuple[Any, Any]:
    """(M [T, H, K], the last A) of one row."""
    out = []
    for t in range(len(k)):
        A = A * g[t].exp()[:, None] + beta[t][:, None] * k[t] * k[t]
        r = torch.log(A + eps) - centre
        out.append(torch.exp(-torch.log(torch.tensor(x, dtype=torch.float64)) * r / (1 + abs(r))))
    return torch.stack(out), A


def expected(kind: str, given: dict[str, Any], /, *, norm: bool, **squash: Any) -> tuple[Any, Any, Any]:
    """(o, state, A), all rows."""
    f = {n: t.double() for n, t in given.items()}
    q, k, p = (unit(f[n]) if norm else f[n] for n in ("q", "k", "p"))
    rows = []
    for i in range(len(q)):
        decay = (
            f["gk"][i].exp()
            if kind in ("gdn2", "precond_kda")
            else f["g"][i].exp()[..., None].expand(-1, -1, K)
        )
        q_i, k_i, v_i, beta, A = spread(q[i]), spread(k[i]), f["v"][i], f["beta"][i], f["A"][i]
        read, strength = k_i, beta
        if kind == "gdn2":
            read, v_i, strength = f["b"][i] * k_i, f["w"][i] * v_i, torch.ones_like(beta)
        elif kind.startswith("comba"):
            read = spread(p[i])
        else:
            M, A = squashed(k[i], f["g_atk"][i], f["beta_atk"][i], A, **squash)
            k_i = spread(M) * k_i
        o, S = recurrence(q_i, k_i, v_i, decay, read, strength, f["state"][i], before=kind == "comba")
        rows.append((o, S, A))
    o, S, A = (torch.stack(parts) for parts in zip(*rows, strict=True))
    return o, S, A


def close(got: Any, want: Any, *, nmse: float = 1e-10) -> None:
    error = (got.double() - want).square().sum() / want.square().sum()
    assert error < nmse, error


GDN2 = ("q", "k", "v", "gk", "b", "w")
PRECOND = ("q", "k", "v", "g_atk", "g", "beta_atk", "beta")
PRECOND_KDA = ("q", "k", "v", "gk", "g_atk", "beta_atk", "beta")


def call(name: str, kind: str, given: dict[str, Any], /, **more: Any) -> Any:
    order = {
        "gdn2": GDN2,
        "comba": ("q", "k", "v", "p", "g", "beta")
        if name.startswith("chunk")
        else ("q", "k", "p", "v", "g", "beta"),
        "precond_gated_delta_rule": PRECOND if name.startswith("chunk") else ("q", "k", "v", "g"),
        "precond_kda": PRECOND_KDA,
    }[kind]
    if kind == "precond_gated_delta_rule" and not name.startswith("chunk"):
        more = {"beta": given["beta"], "g_atk": given["g_atk"], "beta_atk": given["beta_atk"], **more}
    if kind.startswith("precond"):
        more = {"initial_A_state": given["A"], **more}
    function = getattr(fla, f"{name}_{kind}")
    return function(*(given[n] for n in order), initial_state=given["state"], output_final_state=True, **more)


KINDS = ("gdn2", "comba", "precond_gated_delta_rule", "precond_kda")
SQUASH = dict(x=1.5, eps=1e-6, centre=-0.2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["chunk", "fused_recurrent"])
def test_against_the_recurrence(kind: str, name: str) -> None:
    x = make()
    norm = {} if (name, kind) == ("chunk", "precond_kda") else {"use_qk_l2norm_in_kernel": True}
    got = call(name, kind, x, **norm)
    want = expected(kind, x, norm=True, **SQUASH)
    close(got[0], want[0])
    close(got[1], want[1])
    if kind.startswith("precond"):
        close(got[2], want[2])
    assert got[0].dtype == torch.float32
    assert tuple(got[1].shape) == (B, HV, K, V)


@pytest.mark.parametrize("kind", KINDS)
def test_half_types_round_no_product(kind: str) -> None:
    x = make(1, tokens=9, dtype=torch.bfloat16)
    got = call("fused_recurrent", kind, x, use_qk_l2norm_in_kernel=True)
    o, S, _ = expected(kind, x, norm=True, **SQUASH)
    assert got[0].dtype == torch.bfloat16
    close(got[0], o, nmse=1e-4)
    close(got[1], S)  # float32


@pytest.mark.parametrize("kind", KINDS[2:])
@pytest.mark.parametrize("cu", [[0, 2], [0, 2, 1, 3], [], [0.0, 3.0]], ids=str)
def test_packed_sequences_that_are_none_are_refused(kind: str, cu: list[float]) -> None:
    x = make(2, rows=1, tokens=3)
    with pytest.raises(ValueError, match=r"^fla\.\w+: cu_seqlens must"):
        call("chunk", kind, x, cu_seqlens=torch.tensor(cu))


@pytest.mark.parametrize("kind", KINDS)
def test_packed_sequences(kind: str) -> None:
    x = make(2, rows=1, tokens=90)
    x["k"], x["p"] = unit(x["k"]), unit(x["p"])
    cu = torch.tensor([0, 70, 70, 73, 90])
    x["state"], x["A"] = 0.3 * torch.randn(4, HV, K, V), torch.rand(4, H, K)
    got = call("chunk", kind, x, cu_seqlens=cu, cu_seqlens_cpu=cu)
    for n, (a, b) in enumerate(zip(cu.tolist(), cu.tolist()[1:], strict=False)):
        alone = {m: t[:, a:b] if m not in ("state", "A") else t[n : n + 1] for m, t in x.items()}
        want = call("chunk", kind, alone)
        torch.testing.assert_close(got[0][:, a:b], want[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got[1][n : n + 1], want[1], rtol=1e-4, atol=1e-5)
        if kind.startswith("precond"):
            torch.testing.assert_close(got[2][n : n + 1], want[2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("decay", [-30.0, -39.0, -41.0, -90.0, -1e4, -float("inf")])
def test_comba_reads_before_any_decay(decay: float) -> None:
    x = make(3, tokens=20)
    x["p"], x["k"] = unit(x["p"]), unit(x["k"])
    x["g"][:, ::3] = decay
    o, S = fla.fused_recurrent_comba(
        x["q"], x["k"], x["p"], x["v"], x["g"], x["beta"], initial_state=x["state"], output_final_state=True
    )
    want, state, _ = expected("comba", x, norm=False)
    close(o, want)
    close(S, state)


def test_comba_that_reads_after_the_decay_is_a_call_with_erase() -> None:
    x = make(4)
    p, k, beta = unit(x["p"]), unit(x["k"]), x["beta"][..., None]
    erase = beta * p.repeat_interleave(HV // H, 2)
    o, S = anydelta.gated_delta_rule(
        x["q"], k, beta * x["v"], g=x["g"], erase=erase, initial_state=x["state"]
    )
    want, state, _ = expected("comba_after", {**x, "k": k, "p": p}, norm=False)
    close(o, want)
    close(S, state)


def test_equal_gates_are_the_plain_rule() -> None:
    x = make(5)
    beta = x["beta"][..., None]
    got = fla.chunk_gdn2(
        x["q"], x["k"], x["v"], x["gk"], beta.expand_as(x["b"]), beta.expand_as(x["w"]),
        output_final_state=True, use_qk_l2norm_in_kernel=True,
    )  # fmt: skip
    want = fla.chunk_kda(
        x["q"], x["k"], x["v"], x["gk"], x["beta"], output_final_state=True, use_qk_l2norm_in_kernel=True
    )
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    got = fla.chunk_comba(x["q"], unit(x["k"]), x["v"], None, 0 * x["g"], x["beta"], output_final_state=True)
    want = fla.chunk_gated_delta_rule(
        x["q"], unit(x["k"]), x["v"], 0 * x["g"], x["beta"], output_final_state=True
    )
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_preconditioner_takes_its_numbers() -> None:
    x = make(6, tokens=70)
    x["g_atk"][:, 5] = -float("inf")  # forgets all
    centre = torch.tensor([0.3, -1.0])
    got = call(
        "chunk",
        "precond_gated_delta_rule",
        x,
        x=3.0,
        eps=1e-3,
        log_atk_scale=centre,
        transpose_state_layout=False,
    )
    want = expected(
        "precond_gated_delta_rule", x, norm=True, x=3.0, eps=1e-3, centre=centre.double()[:, None]
    )
    for a, b in zip(got, want, strict=True):
        close(a, b)


def test_raw_gates_and_a_transposed_state() -> None:
    x = make(7)
    x["k"] = unit(x["k"])
    A_log, dt_bias = torch.randn(HV), torch.randn(HV * K)
    raw = {**x, "gk": torch.randn(B, T, HV, K), "state": x["state"].transpose(-1, -2).contiguous()}
    log = -A_log.exp()[:, None] * torch.nn.functional.softplus(raw["gk"] + dt_bias.view(HV, K))
    plain = {**x, "gk": log}
    for name, kind in itertools.product(("chunk", "fused_recurrent"), ("gdn2", "precond_kda")):
        layout = {"state_v_first" if kind == "gdn2" else "transpose_state_layout": True}
        got = call(name, kind, raw, use_gate_in_kernel=True, A_log=A_log, dt_bias=dt_bias, **layout)
        want = call(name, kind, plain)
        torch.testing.assert_close(got[0], want[0], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(got[1].transpose(-1, -2), want[1], rtol=1e-3, atol=1e-4)


def test_gradients_reach_every_input() -> None:
    x = make(8, rows=1, tokens=5)
    for kind, names in (
        ("gdn2", GDN2),
        ("comba", ("q", "k", "v", "p", "g", "beta")),
        ("precond_kda", PRECOND_KDA),
    ):
        double = {n: t.double().requires_grad_() for n, t in x.items()}
        norm = {} if kind == "precond_kda" else {"use_qk_l2norm_in_kernel": True}
        o = call("chunk", kind, double, **norm)[0]
        got = torch.autograd.grad(o.square().sum(), [double[n] for n in (*names, "state")])
        want = torch.autograd.grad(
            expected(kind, double, norm=True, **SQUASH)[0].square().sum(),
            [double[n] for n in (*names, "state")],
        )
        for name, a, b in zip((*names, "state"), got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8, msg=f"{kind}: {name}")


def test_no_final_state() -> None:
    x = make(9, tokens=3)
    assert fla.chunk_gdn2(*(x[n] for n in GDN2))[1] is None
    assert fla.chunk_precond_kda(*(x[n] for n in PRECOND_KDA))[1:] == (None, None)


def test_what_is_refused() -> None:
    x = make(10, tokens=3)
    gdn2 = [x[n] for n in GDN2]
    with pytest.raises(ValueError, match=r"fla.chunk_gdn2: b must be \[B, T, HV, K\]"):
        fla.chunk_gdn2(*gdn2[:4], x["beta"], x["w"])
    with pytest.raises(ValueError, match=r"fla.fused_recurrent_gdn2: w must be \[B, T, HV, V\]"):
        fla.fused_recurrent_gdn2(*gdn2[:4], x["b"], x["b"])
    with pytest.raises(ValueError, match="chunk_size must be one of"):
        fla.chunk_gdn2(*gdn2, chunk_size=32)
    with pytest.raises(TypeError, match="unexpected keyword argument 'nothing'"):
        fla.fused_recurrent_gdn2(*gdn2, nothing=1)
    with pytest.raises(anydelta.UnsupportedError, match="a beta per value channel"):
        fla.chunk_comba(x["q"], x["k"], x["v"], None, x["g"], x["w"])
    with pytest.raises(ValueError, match=r"fla.chunk_comba: p must be \[B, T, H, K\] as k"):
        fla.chunk_comba(x["q"], x["k"], x["v"], x["b"], x["g"])
    with pytest.raises(ValueError, match="x must be > 0; got 0"):
        fla.chunk_precond_kda(*(x[n] for n in PRECOND_KDA), x=0.0)
    with pytest.raises(anydelta.UnsupportedError, match="cp_context"):
        fla.chunk_precond_kda(*(x[n] for n in PRECOND_KDA), cp_context=object())
    with pytest.raises(TypeError, match=r"g_atk must be a torch\.Tensor; got NoneType"):
        fla.fused_recurrent_precond_gated_delta_rule(x["q"], x["k"], x["v"], x["g"])
    with pytest.raises(ValueError, match=r"initial_A_state must be \[N, H, K\]"):
        fla.chunk_precond_kda(*(x[n] for n in PRECOND_KDA), initial_A_state=x["state"])


def test_the_names_are_fla_s() -> None:
    for kind in KINDS:
        for name in ("chunk", "fused_recurrent"):
            function = getattr(fla, f"{name}_{kind}")
            assert function.__name__ in fla.__all__
            assert list(inspect.signature(function).parameters)[:2] == ["q", "k"]
