"""The log's kernels against the float64 log, on every build. test_state.py tests the pool that uses it."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

import anydelta
from anydelta import StatePool
from anydelta.backends.cpu import host as cpu
from anydelta.conformance import LOG_CASES, OK, LogCase, run, targets
from anydelta.conformance.run import parse
from anydelta.core import dispatch
from conftest import CPU_REASONS

pytestmark = pytest.mark.skipif(bool(CPU_REASONS), reason="; ".join(map(str, CPU_REASONS)))


@st.composite
def calls(draw: Any) -> dict[str, Any]:
    """Sizes and options of a pool and of its steps."""

    def pick(*options: Any) -> Any:
        return draw(st.sampled_from(options))

    H, kda = draw(st.integers(1, 3)), draw(st.booleans())
    decay = pick("log", "linear", "raw")
    return {
        "H": H, "HV": H * draw(st.integers(1, 3)), "K": pick(4, 16, 20, 64, 140), "V": pick(3, 16, 64, 70),
        "kda": kda, "N": draw(st.integers(1, 3)), "C": draw(st.integers(1, 17)), "seed": draw(st.integers(0, 999)),
        "layout": pick("kv", "vk"), "dtype": pick("float32", "bfloat16", "float16"),
        "heads": pick("interleaved", "tiled"),
        "decay": decay, "bias": decay == "raw" and draw(st.booleans()), "l2norm": draw(st.booleans()),
        "bound": pick(None, -5.0) if decay == "raw" else None, "logit": draw(st.booleans()),
        "masked": draw(st.booleans()), "isa": pick(*cpu.isas()), "packed": draw(st.booleans()),
        "inputs": pick("float32", "bfloat16", "float16"),
    }  # fmt: skip


def steps(c: dict[str, Any], backend: str, threads: int = 1) -> list[np.ndarray]:
    """Outputs and states of some random steps, commits and folds."""
    rng = np.random.default_rng(c["seed"])
    pool = StatePool(
        c["N"], H=c["H"], HV=c["HV"], K=c["K"], V=c["V"], kda=c["kda"], snapshots=c["C"] + 1, form="log",
        dtype=c["dtype"], state_layout=c["layout"], device="cpu", backend=backend, key_dtype=c["inputs"],
    )  # fmt: skip
    for _ in range(c["N"]):
        pool.new()
    pool._form.states[...] = torch.from_numpy(rng.standard_normal(pool._form.states.shape)) / 2
    out = []
    for step in range(3):
        each = [int(n) for n in rng.integers(0 if c["packed"] else 1, c["C"] + 1, c["N"])]
        each = each if c["packed"] and sum(each) else [max(1, *each)] * c["N"]
        packed = c["packed"] and len(set(each)) > 1
        lead = (1, sum(each)) if packed else (c["N"], each[0])

        def f32(*shape: int, lead: tuple[int, int] = lead) -> torch.Tensor:
            return torch.from_numpy(rng.standard_normal((*lead, *shape)).astype(np.float32))

        gate = (c["HV"], c["K"]) if c["kda"] else (c["HV"],)
        g = -f32(*gate).abs()
        args: dict[str, Any] = {"g": g.exp() if c["decay"] == "linear" else g, "beta": f32(c["HV"])}
        if not c["logit"]:
            args["beta"] = args["beta"].sigmoid()
        if c["decay"] == "raw":
            args |= {"A_log": torch.from_numpy(rng.standard_normal(c["HV"]).astype(np.float32)) / 2}
            args |= {"dt_bias": f32(*gate)[0, 0]} if c["bias"] and lead[1] else {}
        if c["masked"]:
            args["mask"] = torch.from_numpy(rng.random(lead) < 0.7)
        k = f32(c["H"], c["K"]) / c["K"] ** 0.5
        q, k, v = (x.to(getattr(torch, c["inputs"])) for x in (f32(c["H"], c["K"]), k, f32(c["HV"], c["V"])))
        pool.begin(each if packed else each[0])
        out.append(
            pool.run(
                q, k, v, **args, heads=c["heads"], decay=c["decay"],
                lower_bound=c["bound"], qk_l2norm=c["l2norm"], beta_is_logit=c["logit"],
            )
        )  # fmt: skip
        out += [pool.state(s) for s in pool.sequences]
        if step < 2:
            for s, n in zip(pool.sequences, each, strict=True):
                if n:
                    pool.commit(int(rng.integers(0, n + 1)), [s])
                    out.append(pool.state(s))
    return [x.double().numpy() for x in out]


@settings(max_examples=80, deadline=None, database=None)
@given(c=calls())
def test_the_kernels_agree_with_float64(c: dict[str, Any]) -> None:
    with cpu.forced_isa(c["isa"]):
        got = steps(c, "cpu")
    want = steps(c, "reference")
    for x, y in zip(got, want, strict=True):
        assert x.shape == y.shape
        # a bfloat16 state is rounded at each fold, and outputs of a half type at the end, by both, and not always to
        # the same side
        limit = 4e-4 if c["dtype"] != "float32" else 1e-10 if c["inputs"] == "float32" else 1e-5
        assert np.sum((x - y) ** 2) <= limit * np.sum(y**2) + 1e-30


@pytest.mark.parametrize("layout", ["kv", "vk"])
def test_threads_do_not_change_a_bit(layout: str) -> None:
    c = {
        "H": 1, "HV": 2, "K": 128, "V": 256, "kda": True, "N": 2, "C": 12, "seed": 3, "layout": layout,
        "dtype": "float32", "heads": "interleaved", "decay": "log", "bias": False, "l2norm": True, "bound": None,
        "logit": False, "masked": False, "packed": False, "inputs": "float32",
    }  # fmt: skip
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(steps(c, "cpu"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(np.array_equal(x, y) for x, y in zip(results[0], other, strict=True))


def test_keys_keep_the_type_they_are_given_in() -> None:
    pool = StatePool(1, HV=2, K=4, V=4, snapshots=4, form="log", key_dtype="bfloat16", device="cpu")
    pool.new()
    pool.begin(1)
    x, g = torch.ones(1, 1, 2, 4), torch.zeros(1, 1, 2)
    with pytest.raises(ValueError, match="run: requires k in bfloat16, the pool's key_dtype; got float32"):
        pool.run(x, x, x, g=g, beta=g)
    half = x.bfloat16()
    pool.run(half, half, half, g=g, beta=g + 1, qk_l2norm=True)
    assert bool((pool._form.keys[0, 0, :, 0] == 1).all())
    pool.commit(1)


def test_memory_of_sixteen_states() -> None:
    """K = 16 of D = 128 in states, per sequence and layer; docs/rollback.md says why 1.35 cannot be less."""

    def cost(**how: Any) -> float:
        sizes: dict[str, Any] = dict(H=4, HV=4, K=128, V=128, snapshots=16, form="log") | how
        return StatePool(1, **sizes).nbytes()["per_sequence"] / (4 * 128 * 128 * 4)

    assert cost() < 1.24
    assert cost(H=2) < 1.18
    assert cost(kda=True, H=2) < 1.3
    assert cost(kda=True, key_dtype="bfloat16", device="cpu") < 1.3
    assert 1.35 < cost(kda=True) < 1.36


def test_folding_while_more_is_pending_than_the_log_holds() -> None:
    rng = np.random.default_rng(0)
    pools = [StatePool(1, HV=1, K=4, V=4, snapshots=3, form=form) for form in ("log", "slots")]
    x = rng.standard_normal((4, 1, 6, 1, 4)).astype(np.float32)
    gates = rng.random((2, 1, 6, 1)).astype(np.float32)
    for pool in pools:
        pool.new()
        pool.begin(6)
        pool.run(*x[:3], g=-gates[0], beta=gates[1])
        pool.fold()
        assert pool.recorded(0) == 2
        pool.commit(5)
    assert np.allclose(pools[0].state(0), pools[1].state(0), atol=1e-6)


def test_a_log_keeps_its_kind() -> None:
    pool = StatePool(1, HV=2, K=4, V=4, snapshots=5, form="log")
    pool.new()
    x = np.zeros((1, 2, 2, 4), np.float32)
    g = np.zeros((1, 2, 2), np.float32)
    pool.begin(2)
    with pytest.raises(ValueError, match="run: requires H, HV, K, V, kda"):
        pool.run(x, x, x, g=np.zeros((1, 2, 2, 4), np.float32), beta=g)
    pool.run(x, x, x, g=g, beta=g)
    pool.begin(2)
    with pytest.raises(ValueError, match="begin: requires that all layers have run"):
        pool.begin(1)
    with pytest.raises(ValueError, match="arguments: requires slots"):
        pool.arguments()
    with pytest.raises(ValueError, match="heads='interleaved' as in the pool's log"):
        pool.run(x, x, x, g=g, beta=g, heads="tiled")
    pool.run(x, x, x, g=g, beta=g)
    with pytest.raises(ValueError, match="begin: requires room for 1 more tokens"):
        pool.begin(1)
    pool.commit(3)
    pool.begin(4)


def test_sixteen_tokens_back_cost_less_than_a_third_of_a_state() -> None:
    sizes = dict(H=16, HV=32, K=128, V=128, snapshots=16)
    log, slots = (StatePool(1, form=form, **sizes).nbytes() for form in ("log", "slots"))
    state = 32 * 128 * 128 * 4
    assert log["per_sequence"] <= 1.3 * state
    assert slots["per_sequence"] == 16 * state


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_list_of_cases(backend: str) -> None:
    """On NumPy arrays; `anydelta conform` runs them on tensors too."""
    results = list(run(LOG_CASES, targets((backend,), (), ("numpy",))))
    bad = [f"{r.status} {r.reproduce()}: {r.reasons}" for r in results if r.status != OK]
    assert results
    assert not bad, bad[:3]


def test_a_backend_without_a_log_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: dict[str, Any] = dict(HV=2, K=4, V=4, snapshots=4)
    with monkeypatch.context() as patch:
        patch.setattr(dispatch.get_backend("triton"), "available", list)
        with pytest.raises(anydelta.UnsupportedError, match=r"backend='triton' .* no kernel for the log"):
            StatePool(1, **sizes, form="log", backend="triton")
        patch.setenv(dispatch.ENV, "triton")
        with pytest.raises(anydelta.UnsupportedError, match="ANYDELTA_BACKEND=triton cannot run"):
            StatePool(1, **sizes, form="log")
    trace = StatePool(1, **sizes, form="log", backend="reference").explain()
    assert (trace.chosen, trace.forced) == ("reference", "backend='reference'")
    assert "log of 3 entries, keys in float32" in str(trace)
    with pytest.raises(ValueError, match='explain: requires form="log"; got "slots"'):
        StatePool(1, **sizes).explain()


def test_a_pool_takes_to_the_next_backend_for_its_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(type(dispatch.get_backend("cpu")), "log")
    monkeypatch.setattr(dispatch, "_warned", False)
    with pytest.warns(RuntimeWarning, match="cpu: has no kernel for the log"):
        pool = StatePool(1, HV=2, K=4, V=4, snapshots=4, form="log")
    assert pool.explain().chosen == "reference"


def test_a_line_of_the_list_is_its_case() -> None:
    assert len(set(LOG_CASES)) == len(LOG_CASES)
    assert all(parse(str(c)) == c for c in LOG_CASES)
    with pytest.raises(ValueError, match="a log has states of its own"):
        LogCase(snapshots=2)


def test_a_wrong_fold_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from anydelta.backends.reference import log

    monkeypatch.setattr(log, "fold", lambda S, k, d, a: a[0][:, :, None] * S)
    on = targets(("reference",), (), ("numpy",))
    assert [r.status for r in run([LogCase(B=2, T=12, K=8, V=8, entries=4)], on)] == ["FAIL"]
