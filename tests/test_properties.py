"""Properties that hold for every call, on random ones: against the oracle, and of the operator against
itself."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings

import anydelta
from anydelta.conformance import Case, Target, check
from anydelta.conformance.cases import BETAS, GATES, KEYS, MASKS, STATE_STRIDES, STRIDES
from conftest import CPU_REASONS

settings.register_profile(
    "short", max_examples=60, deadline=None, database=None, print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)  # fmt: skip
settings.load_profile("short")


@st.composite
def cases(draw: Any, **fixed: Any) -> Case:
    """A valid case. Simple values stand first, so that a failure shrinks towards them."""

    def pick(*options: Any) -> Any:
        return draw(st.sampled_from(options))

    H = draw(st.integers(1, 3))
    f: dict[str, Any] = {
        "B": draw(st.integers(1, 3)), "T": draw(st.integers(0, 40)), "H": H,
        "HV": H * draw(st.integers(1, 4)), "K": draw(st.integers(1, 40)), "V": draw(st.integers(1, 40)),
        "kda": draw(st.booleans()), "dtype": pick("float32", "bfloat16", "float16"),
        "state_dtype": pick("float32", "bfloat16", "float16"), "gate_dtype": pick("float32", "bfloat16", "float16"),
        "heads": pick("interleaved", "tiled"), "layout": pick("kv", "vk"),
        "decay": pick("log", "linear", "raw"), "logit": draw(st.booleans()), "l2norm": draw(st.booleans()),
        "scale": pick(None, 1.0, -0.5), "int64": draw(st.booleans()), "mask": pick("", *MASKS),
        "snapshots": draw(st.integers(0, 9)), "strides": pick(*STRIDES), "gate": pick("one", *GATES),
        "key": pick(*(k for k in KEYS if k != "huge")), "beta": pick(*BETAS),
    }  # fmt: skip
    if f["decay"] == "raw":
        f["dt_bias"] = pick("none", "full", "flat") if f["kda"] else pick("none", "full")
        f["lower_bound"] = pick(None, -5.0, -0.1)
    if draw(st.booleans()):
        f.update(B=1, seqlens=tuple(draw(st.lists(st.integers(0, 15), max_size=5))))
    N = f["B"] if "seqlens" not in f else len(f["seqlens"])
    where = pick("rows", "pool", "fresh")
    if where == "pool":
        pool = N + draw(st.integers(0, 4))
        rows = draw(st.permutations(range(pool)))[:N]
        skip = draw(st.lists(st.booleans(), min_size=N, max_size=N))
        f.update(pool=pool, indices=tuple(-1 if s else r for r, s in zip(rows, skip, strict=True)))
    elif where == "fresh":
        f["fresh"] = True
        if not f["snapshots"]:
            f["state_dtype"] = "float32"
    f["state_strides"] = pick(*(STATE_STRIDES[:3] if f["snapshots"] else STATE_STRIDES))
    how = pick("functional", "nofinal", "inplace")
    if how == "inplace" and (where == "fresh" or f["state_strides"] == "expanded"):
        how = "functional"
    f[how] = True
    f.pop("functional", None)
    if how == "inplace" and where == "pool" and f["snapshots"] and draw(st.booleans()):
        f.update(scattered=True, pool=f["pool"] + N * f["snapshots"])
    return Case(**f | fixed)


@pytest.mark.parametrize("framework", ["numpy", "torch"])
@settings(max_examples=250)
@given(data=st.data())
def test_any_valid_call_agrees_with_the_oracle(framework: str, data: st.DataObject) -> None:
    case = data.draw(cases())
    verdict = check(case, Target("auto", framework=framework))
    assert not verdict.errors, f"{case}\n" + "\n".join(verdict.errors)


# ---- the operator against itself
# -----------------------------------------------------------------------------


@st.composite
def calls(draw: Any, **fixed: Any) -> dict[str, Any]:
    """Arrays of a plain call in float32: q, k, v, g, beta and an initial state, by argument name."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    B, T, H = draw(st.integers(1, 3)), draw(st.integers(2, 30)), draw(st.integers(1, 3))
    rep, K, V = draw(st.integers(1, 3)), draw(st.integers(1, 35)), draw(st.integers(1, 35))
    B, H, rep = (fixed.get(n, x) for n, x in (("B", B), ("H", H), ("rep", rep)))
    kda = draw(st.booleans())

    def normal(*shape: int) -> Any:
        return rng.standard_normal(shape).astype(np.float32)

    k = normal(B, T, H, K)
    g = -np.abs(normal(B, T, H * rep, K) if kda else normal(B, T, H * rep)) * np.float32(0.5)
    return {
        "q": normal(B, T, H, K), "k": k / np.linalg.norm(k, axis=-1, keepdims=True),
        "v": normal(B, T, H * rep, V), "g": g, "beta": rng.uniform(0, 1, (B, T, H * rep)).astype(np.float32),
        "initial_state": normal(B, H * rep, K, V),
    }  # fmt: skip


def run(args: dict[str, Any], **more: Any) -> tuple[Any, Any]:
    return anydelta.gated_delta_rule(**args, **more)


def tokens(args: dict[str, Any], *at: Any) -> dict[str, Any]:
    """The same call on some of its tokens."""
    return {
        n: x if n == "initial_state" else np.ascontiguousarray(x[(slice(None), *at)]) for n, x in args.items()
    }


def close(a: Any, b: Any) -> None:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    # Terms of size 1 carry rounding errors of 6e-8 (float32), and they may cancel to almost nothing: where a sum
    # is that small, an absolute error of 5e-7 per element (8 roundings) is no difference.
    assert np.sum((a - b) ** 2) <= 1e-10 * np.sum(b**2) + (5e-7) ** 2 * b.size


@given(args=calls(), data=st.data())
def test_a_sequence_may_be_cut_anywhere(args: dict[str, Any], data: st.DataObject) -> None:
    cut = data.draw(st.integers(1, args["q"].shape[1] - 1))
    o, state = run(args)
    o1, state1 = run(tokens(args, slice(0, cut)))
    o2, state2 = run(tokens(args, slice(cut, None)) | {"initial_state": state1})
    close(np.concatenate([o1, o2], 1), o)
    close(state2, state)


@given(args=calls())
def test_token_by_token_equals_all_at_once(args: dict[str, Any]) -> None:
    o, state = run(args)
    carried = args["initial_state"].copy()
    args = {n: x for n, x in args.items() if n != "initial_state"}
    outs = [
        anydelta.gated_delta_rule_(**tokens(args, slice(t, t + 1)), state=carried) for t in range(o.shape[1])
    ]
    close(np.concatenate(outs, 1), o)
    close(carried, state)


@given(args=calls(B=3))
def test_packed_equals_separate(args: dict[str, Any]) -> None:
    o, state = run(args)
    T = o.shape[1]
    packed = {n: x if n == "initial_state" else x.reshape(1, 3 * T, *x.shape[2:]) for n, x in args.items()}
    o1, state1 = run(packed, cu_seqlens=np.array([0, T, 2 * T, 3 * T], np.int32))
    close(o1.reshape(o.shape), o)
    close(state1, state)


@given(args=calls(B=3))
def test_a_sequence_does_not_depend_on_its_batch(args: dict[str, Any]) -> None:
    o, state = run(args)
    for b in range(3):
        o1, state1 = run({n: x[b : b + 1] for n, x in args.items()})
        close(o1[0], o[b])
        close(state1[0], state[b])


@given(args=calls(), data=st.data())
def test_a_nan_stays_in_its_sequence_head_and_column(args: dict[str, Any], data: st.DataObject) -> None:
    B, T, HV, V = args["v"].shape
    o, state = run(args)
    at = tuple(data.draw(st.integers(0, n - 1)) for n in (B, T, HV, V))
    args["v"][at] = np.nan
    o1, state1 = run(args)
    b, t, h, j = at
    assert np.isnan(o1[b, t:, h, j]).all()
    assert np.isnan(state1[b, h, :, j]).any()
    o1[b, t:, h, j] = o[b, t:, h, j]
    state1[b, h, :, j] = state[b, h, :, j]
    close(o1, o)
    close(state1, state)


@given(args=calls())
def test_tiled_is_interleaved_with_the_value_heads_permuted(args: dict[str, Any]) -> None:
    H, HV = args["q"].shape[2], args["v"].shape[2]
    # interleaved value head h * rep + r becomes tiled value head r * H + h
    order = np.arange(HV).reshape(H, HV // H).T.reshape(-1)
    moved = {
        n: x if n in "qk" else x[:, order] if n == "initial_state" else x[:, :, order]
        for n, x in args.items()
    }
    o, state = run(args)
    o1, state1 = run(moved, heads="tiled")
    close(o1, o[:, :, order])
    close(state1, state[:, order])


@given(args=calls())
def test_vk_is_kv_transposed(args: dict[str, Any]) -> None:
    B, HV, K, V = args["initial_state"].shape
    kv, vk = np.zeros((3, B, HV, K, V), np.float32), np.zeros((3, B, HV, V, K), np.float32)
    o, state = run(args, snapshots=kv)
    turned = args | {"initial_state": np.ascontiguousarray(args["initial_state"].swapaxes(-1, -2))}
    o1, state1 = run(turned, state_layout="vk", snapshots=vk)
    close(o1, o)
    close(state1.swapaxes(-1, -2), state)
    close(vk.swapaxes(-1, -2), kv)


@given(args=calls(B=1), data=st.data())
def test_a_mask_removes_tokens(args: dict[str, Any], data: st.DataObject) -> None:
    T = args["q"].shape[1]
    live = np.array(data.draw(st.lists(st.booleans(), min_size=T, max_size=T)), bool)
    o, state = run(args, mask=live[None])
    assert not o[0, ~live].any()
    o1, state1 = run(tokens(args, live))
    close(o[:, live], o1)
    close(state, state1)


@given(args=calls(), data=st.data())
def test_a_snapshot_is_the_state_of_a_shorter_call(args: dict[str, Any], data: st.DataObject) -> None:
    T = args["q"].shape[1]
    snapshots = np.full((data.draw(st.integers(1, 12)), *args["initial_state"].shape), 7, np.float32)
    _, state = run(args, snapshots=snapshots)
    assert np.array_equal(snapshots[0], state)
    for slot in range(1, len(snapshots)):
        if slot < T:
            close(snapshots[slot], run(tokens(args, slice(0, T - slot)))[1])
        else:
            assert (snapshots[slot] == 7).all()


@given(args=calls())
def test_in_place_equals_functional_bit_for_bit(args: dict[str, Any]) -> None:
    o, state = run(args)
    carried = args.pop("initial_state").copy()
    assert np.array_equal(anydelta.gated_delta_rule_(**args, state=carried), o)
    assert np.array_equal(carried, state)


@given(args=calls(), data=st.data())
def test_a_pool_equals_dense_states(args: dict[str, Any], data: st.DataObject) -> None:
    o, state = run(args)
    dense = args.pop("initial_state")
    pool = np.full((len(dense) + 3, *dense.shape[1:]), np.nan, np.float32)
    rows = np.array(data.draw(st.permutations(range(len(pool))))[: len(dense)], np.int64)
    pool[rows] = dense
    o1, state1 = run(args, initial_state=pool, state_indices=rows)
    assert np.array_equal(o1, o)
    assert np.array_equal(state1, state)
    anydelta.gated_delta_rule_(**args, state=pool, state_indices=rows)
    assert np.array_equal(pool[rows], state)
    assert np.isnan(np.delete(pool, rows, 0)).all()


@given(args=calls())
def test_no_state_is_a_state_of_zeros(args: dict[str, Any]) -> None:
    o, state = run(args | {"initial_state": np.zeros_like(args["initial_state"])})
    o1, state1 = run(args | {"initial_state": None})
    assert np.array_equal(o1, o)
    assert np.array_equal(state1, state)


@given(args=calls())
def test_a_gate_repeated_over_k_is_a_scalar_gate(args: dict[str, Any]) -> None:
    K = args["q"].shape[3]
    g = args["g"] if args["g"].ndim == 3 else args["g"][..., 0]
    o, state = run(args | {"g": np.ascontiguousarray(g)})
    spread = np.broadcast_to(g[..., None], (*g.shape, K))  # read-only, stride 0
    o1, state1 = run(args | {"g": spread})
    close(o1, o)
    close(state1, state)


@given(args=calls())
def test_the_forms_of_decay_and_beta_agree(args: dict[str, Any]) -> None:
    o, state = run(args)
    beta = np.clip(args["beta"].astype(np.float64), 1e-3, 1 - 1e-3)
    o1, state1 = run(args | {"g": np.exp(args["g"])}, decay="linear")
    close(o1, o)
    close(state1, state)
    o, state = run(args | {"beta": beta.astype(np.float32)})
    o1, state1 = run(args | {"beta": np.log(beta / (1 - beta)).astype(np.float32)}, beta_is_logit=True)
    close(o1, o)
    close(state1, state)


@given(args=calls())
def test_the_output_is_linear_in_values_and_state(args: dict[str, Any]) -> None:
    o, state = run(args)
    twice = args | {"v": 2 * args["v"], "initial_state": 2 * args["initial_state"]}
    o1, state1 = run(twice)  # a power of two: exact
    assert np.array_equal(o1, 2 * o)
    assert np.array_equal(state1, 2 * state)


@given(args=calls())
def test_torch_and_numpy_agree(args: dict[str, Any]) -> None:
    o, state = run(args)
    o1, state1 = run({n: torch.from_numpy(x) for n, x in args.items()})
    close(o1.numpy(), o)
    close(state1.numpy(), state)


@given(args=calls())
def test_arrays_may_run_backwards(args: dict[str, Any]) -> None:
    """Negative strides, which NumPy has and torch has not."""
    o, state = run(args)
    back = {n: np.ascontiguousarray(x[::-1])[::-1] if n == "initial_state" else
            np.ascontiguousarray(x[:, ::-1, ::-1])[:, ::-1, ::-1] for n, x in args.items()}  # fmt: skip
    o1, state1 = run(back)
    assert np.array_equal(o1, o)
    assert np.array_equal(state1, state)
    last = {n: np.ascontiguousarray(x[..., ::-1])[..., ::-1] for n, x in args.items()}
    o1, state1 = run(last)
    close(o1, o)
    close(state1, state)
    carried = last.pop("initial_state")
    anydelta.gated_delta_rule_(**last, state=carried)
    close(carried, state)


@given(args=calls(), slot=st.integers(0, 3))
def test_the_initial_state_may_be_one_of_the_snapshots(args: dict[str, Any], slot: int) -> None:
    """Speculative decoding rolls back by starting from an older slot of the buffer that is then written
    again."""
    first = args.pop("initial_state")
    want = np.zeros((4, *first.shape), np.float32)
    want[slot] = first
    held = want.copy()
    o, state = run(args, initial_state=first, snapshots=want)
    o1, state1 = run(args, initial_state=held[slot], snapshots=held)
    close(o1, o)
    close(state1, state)
    close(held, want)


@pytest.mark.skipif(bool(CPU_REASONS), reason="; ".join(CPU_REASONS) or "runs")
@settings(max_examples=30)
@given(case=cases(dtype="float32"))
def test_threads_do_not_change_a_bit(case: Case) -> None:
    from anydelta.conformance.cases import inputs
    from anydelta.conformance.compare import buffers, call

    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            held = buffers(case, inputs(case), Target("cpu", framework="torch"))
            o, _ = call(case, {n: b.array for n, b in held.items()}, "cpu")
            results.append(o.numpy().tobytes())
    finally:
        torch.set_num_threads(before)
    assert len(set(results)) == 1
