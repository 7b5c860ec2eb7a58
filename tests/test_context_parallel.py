"""What a run of tokens makes of any state, and sequences over several processes: as one process, to rounding.

Four processes are started once, with gloo on the loopback, and run every case; groups of fewer are parts of them.
"""

from __future__ import annotations

import multiprocessing
import pickle
import traceback
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from itertools import accumulate
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

import anydelta
from anydelta import distributed
from anydelta.distributed import run
from anydelta.distributed.pieces import pieces, windows_needed
from anydelta.mixer import reference as mixer_reference
from anydelta.rule import reference, transition

EXACT = 1e-10
"""NMSE between processes and one process, in float32."""
Arrays = dict[str, Any]


def nmse(got: Any, want: Any) -> float:
    got, want = (
        np.asarray(x.double() if isinstance(x, torch.Tensor) else x, np.float64) for x in (got, want)
    )
    assert got.shape == want.shape
    assert np.isfinite(got).all()
    size = float((want**2).sum())
    return float(((got - want) ** 2).sum()) / size if size else float(np.abs(got).max(initial=0))


def f64(x: Any) -> Any:
    if isinstance(x, torch.Tensor):
        return x.double().numpy() if x.is_floating_point() else x.numpy()
    return x


# ---- inputs


def gates(rng: np.random.Generator, shape: tuple[int, ...], decays: str) -> Any:
    """Log decays: mild ones leave a thousandth of a state after 64 tokens, strong ones of most states nothing."""
    if decays == "mild":
        return -rng.uniform(0, 0.02, shape)
    return np.where(rng.random(shape) < 0.3, -rng.uniform(1, 40, shape), -rng.uniform(0, 0.1, shape))


def rule_call(
    B: int = 1,
    T: int = 50,
    H: int = 2,
    HV: int = 4,
    K: int = 16,
    V: int = 24,
    *,
    kda: bool = False,
    decays: str = "mild",
    erase: bool = False,
    masked: bool = False,
    raw: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Arrays, Arrays]:
    """(arrays with an entry per token, the other arguments) of the rule."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal(shape)).to(dtype)

    tokens: Arrays = {"q": normal(B, T, H, K), "k": normal(B, T, H, K), "v": normal(B, T, HV, V)}
    tokens["g"] = torch.from_numpy(gates(rng, (B, T, HV, K) if kda else (B, T, HV), decays)).float()
    shared: Arrays = {"qk_l2norm": True}
    if raw:
        tokens["g"] = normal(B, T, HV, K).float() if kda else normal(B, T, HV).float()
        shared |= {
            "decay": "raw",
            "A_log": torch.from_numpy(rng.uniform(-5, -2, HV)).float(),
            "dt_bias": torch.zeros(HV * K if kda else HV) + 0.1,
            "lower_bound": -0.1 if kda else None,
        }
    if erase:
        tokens["erase"] = tokens["k"] / tokens["k"].float().square().sum(-1, keepdim=True).to(dtype)
        shared["qk_l2norm"] = False
        tokens["k"] = tokens["k"] / 4
    else:
        beta = torch.from_numpy(rng.uniform(-3, 3, (B, T, HV))).float()
        tokens["beta"] = beta if raw else beta.sigmoid()
        shared["beta_is_logit"] = raw
    if masked:
        tokens["mask"] = torch.from_numpy(rng.random((B, T)) < 0.6)
    return tokens, shared


def mixer_call(
    B: int = 1,
    T: int = 50,
    H: int = 2,
    HV: int = 4,
    K: int = 16,
    V: int = 24,
    W: int = 4,
    *,
    kda: bool = False,
    masked: bool = False,
    packed: bool = True,
    bias: bool = True,
    normed: bool = True,
    neg: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Arrays, Arrays]:
    """(arrays with an entry per token, the other arguments) of the mixer, without its states."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal(shape)).to(dtype)

    C = 2 * H * K + HV * V
    qkv = normal(B, T, C)
    tokens: Arrays = {"qkv": qkv if packed else list(qkv.split([H * K, H * K, HV * V], -1))}
    tokens["g"] = normal(B, T, HV, K) if kda else normal(B, T, HV)
    tokens["beta"] = normal(B, T, HV)
    if masked:
        tokens["mask"] = torch.from_numpy(rng.random((B, T)) < 0.3)
    shared: Arrays = {
        "conv_weight": normal(C, W), "A_log": torch.from_numpy(rng.uniform(-5, -2, HV)).float(),
        "dt_bias": torch.zeros(HV * K if kda else HV), "conv_bias": normal(C) if bias else None,
        "allow_neg_eigval": neg, "norm_gate": "sigmoid" if kda else "silu",
    }  # fmt: skip
    if normed:
        tokens["z"] = normal(B, T, HV * V)
        shared["norm_weight"] = 1 + normal(V) / 8
    return tokens, shared


def state_of(N: int, HV: int, K: int, V: int, layout: str = "kv", seed: int = 1) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.standard_normal((N, HV, *((K, V) if layout == "kv" else (V, K))))).float()


def after(P: Any, before: Any, S: Any, layout: str) -> Any:
    """The state after the tokens of (S, P), from the one in front of them."""
    return P @ before + S if layout == "kv" else before @ P + S


# ---- the transition, in one process


@pytest.fixture
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (transition, run):
        monkeypatch.setattr(module, "CHUNK", 7)


def of_oracle(tokens: Arrays, shared: Arrays, S0: Any, layout: str, **more: Any) -> Any:
    given = {n: f64(x) for n, x in (tokens | shared).items() if n not in ("q", "k", "v")}
    return reference.gated_delta_rule(
        *(f64(tokens[n]) for n in "qkv"), initial_state=f64(S0), state_layout=layout, **given, **more
    )


CALLS = {
    "GDA": {},
    "KDA": {"kda": True},
    "strong": {"decays": "strong"},
    "strong KDA": {"kda": True, "decays": "strong"},
    "raw": {"raw": True},
    "raw KDA, lower bound": {"raw": True, "kda": True},
    "erase": {"erase": True},
    "erase KDA, masked": {"erase": True, "kda": True, "masked": True},
    "masked": {"masked": True, "B": 3},
    "one token": {"T": 1},
    "no token": {"T": 0},
    "one head": {"H": 1, "HV": 1, "K": 32, "V": 16},
    "bfloat16": {"dtype": torch.bfloat16},
}


@pytest.mark.parametrize("layout", ["kv", "vk"])
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.usefixtures("short_chunks")
def test_transition_is_the_oracles(name: str, layout: str) -> None:
    """S and P each against the oracle, and together from another state."""
    heads = "tiled" if layout == "vk" else "interleaved"
    tokens, shared = rule_call(**CALLS[name])  # type: ignore[arg-type]
    shared |= {"heads": heads}
    B, _, HV, V = tokens["v"].shape
    K = tokens["k"].shape[3]
    S0 = state_of(B, HV, K, V, layout)
    given = {n: x for n, x in (tokens | shared).items() if n != "q"}
    S, P = anydelta.gated_delta_transition(**given, state_layout=layout)
    assert S.dtype == P.dtype == torch.float32
    zero = of_oracle(tokens, shared, torch.zeros_like(S0), layout).state
    assert nmse(S, zero) < EXACT
    nothing = {**tokens, "v": torch.zeros(*tokens["v"].shape[:3], K)}
    eye = torch.eye(K).expand(B, HV, K, K)
    want = of_oracle(nothing, shared, eye, layout).state
    assert np.allclose(P, want, atol=1e-6 * max(1e-3, np.abs(want).max()), rtol=0)
    if name not in ("strong", "strong KDA"):
        assert np.abs(want).max() > 1e-4  # so that this is no test of zeros
    assert nmse(after(P, S0, S, layout), of_oracle(tokens, shared, S0, layout).state) < EXACT
    # from a state, S is the state after the tokens
    last, same = anydelta.gated_delta_transition(**given, initial_state=S0, state_layout=layout)
    assert nmse(last, of_oracle(tokens, shared, S0, layout).state) < EXACT
    assert torch.equal(same, P)


@pytest.mark.usefixtures("short_chunks")
def test_transition_of_packed_sequences_and_of_numpy_arrays() -> None:
    cu = np.array([0, 3, 3, 20, 29, 50])
    tokens, shared = rule_call(kda=True)
    given = {n: f64(x).astype(np.float32) for n, x in tokens.items() if n != "q"} | shared
    S, P = anydelta.gated_delta_transition(**given, cu_seqlens=cu)
    assert type(S) is type(P) is np.ndarray
    S0 = state_of(5, 4, 16, 24).numpy()
    want = of_oracle(tokens, shared, S0, "kv", cu_seqlens=cu).state
    assert nmse(after(P, S0, S, "kv"), want) < EXACT
    assert np.array_equal(P[1], np.broadcast_to(np.eye(16), (4, 16, 16)))  # of the empty one


def test_transition_in_float64_is_exact() -> None:
    tokens, shared = rule_call(dtype=torch.float64)
    given = {n: x.double() for n, x in tokens.items() if n != "q"}
    S, P = anydelta.gated_delta_transition(**given, **shared)
    S0 = state_of(1, 4, 16, 24).double()
    want = of_oracle({**tokens, **given}, shared, S0, "kv").state
    assert S.dtype == torch.float64
    assert nmse(P @ S0 + S, want) < 1e-25


def test_transitions_of_two_pieces_are_one_of_both() -> None:
    """What an engine does: P = P_2 P_1, S = P_2 S_1 + S_2."""
    tokens, shared = rule_call(T=64)
    given = {n: x for n, x in tokens.items() if n != "q"}
    S, P = anydelta.gated_delta_transition(**given, **shared)
    (S1, P1), (S2, P2) = (
        anydelta.gated_delta_transition(**{n: x[:, part] for n, x in given.items()}, **shared)
        for part in (slice(0, 41), slice(41, 64))
    )
    assert nmse(P2 @ S1 + S2, S) < EXACT
    assert nmse(P2 @ P1, P) < EXACT


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_transition_on_every_instruction_set(isa: str) -> None:
    host = pytest.importorskip("anydelta.backends.cpu.host")
    if isa not in host.isas():
        pytest.skip(f"this CPU has no {isa}")
    tokens, shared = rule_call(kda=True)
    given = {n: x for n, x in tokens.items() if n != "q"}
    S0 = state_of(1, 4, 16, 24)
    with host.forced_isa(isa):
        S, P = anydelta.gated_delta_transition(**given, **shared, backend="cpu")
    assert nmse(P @ S0 + S, of_oracle(tokens, shared, S0, "kv").state) < EXACT


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"k": "x"}, TypeError, "gated_delta_transition: k must be a torch.Tensor or a numpy.ndarray; got str"),
        ({"k": torch.zeros(1, 4, 8)}, ValueError, r"k must be \[B, T, H, K\]; got \[1, 4, 8\]"),
        ({"k": torch.zeros(1, 4, 2, 16, dtype=torch.int32)}, ValueError, "k must have dtype float32"),
        ({"beta": torch.zeros(1, 4, 3)}, ValueError, r"beta must be \[B, T, HV\]"),
        ({"state_layout": "kk"}, ValueError, "state_layout must be one of"),
        ({"backend": "cpp"}, ValueError, "backend must be 'auto' or one of"),
        ({"cu_seqlens": torch.tensor([0, 9])}, ValueError, "cu_seqlens must start at 0 and end at T = 4"),
        (
            {"k": torch.zeros(1, 4, 2, 16, requires_grad=True)},
            ValueError,
            r"has no gradient, but k requires grad\. Use torch\.no_grad\(\)",
        ),
    ],
)
def test_invalid_calls_of_the_transition(change: Arrays, error: type[Exception], text: str) -> None:
    tokens, shared = rule_call(T=4)
    given = {n: x for n, x in tokens.items() if n != "q"} | shared | change
    with pytest.raises(error, match=text):
        anydelta.gated_delta_transition(**given)


MIXERS = {
    "GDA": {},
    "KDA": {"kda": True},
    "three arrays": {"packed": False},
    "masked": {"masked": True, "B": 2},
    "beta to 2, no bias": {"neg": True, "bias": False},
    "one tap, no norm": {"W": 1, "normed": False},
    "bfloat16": {"dtype": torch.bfloat16},
    "one token": {"T": 1},
}


def mixer_oracle(tokens: Arrays, shared: Arrays, window: Any, state: Any, **more: Any) -> Any:
    qkv = tokens["qkv"]
    qkv = qkv if isinstance(qkv, torch.Tensor) else torch.cat(qkv, -1)
    HV, K, V = state.shape[1:] if more.get("state_layout") != "vk" else (state.shape[1], *state.shape[:1:-1])
    key = (qkv.shape[-1] - HV * V) // 2
    given = {n: f64(x) for n, x in (tokens | shared).items() if n != "qkv"}
    q, k, v = (f64(x) for x in qkv.split([key, key, HV * V], -1))
    return mixer_reference.gated_delta_mixer(q, k, v, f64(window), f64(state), **given, **more)


@pytest.mark.parametrize("layout", ["kv", "vk"])
@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.usefixtures("short_chunks")
def test_transition_of_the_mixer_is_the_oracles(name: str, layout: str) -> None:
    tokens, shared = mixer_call(**MIXERS[name])  # type: ignore[arg-type]
    B, HV, K, V = tokens["beta"].shape[0], 4, 16, 24
    S0 = state_of(B, HV, K, V, layout)
    C, W = shared["conv_weight"].shape
    window = torch.from_numpy(np.random.default_rng(2).standard_normal((B, C, W)))
    window = window.to(shared["conv_weight"].dtype)
    kept = window.clone()
    given = {n: x for n, x in (tokens | shared).items() if n not in ("z", "norm_weight")}
    conv, S, P = anydelta.gated_delta_mixer_transition(
        conv_state=window, state=torch.zeros_like(S0), state_layout=layout, **given
    )
    want = mixer_oracle(tokens, shared, window, S0, state_layout=layout)
    limit = EXACT if window.dtype == torch.float32 else 1e-9
    assert nmse(after(P, S0, S, layout), want.rule.state) < limit
    assert torch.equal(conv.double(), torch.from_numpy(want.conv_state))
    assert torch.equal(window, kept)
    # an argument too many
    with pytest.raises(TypeError, match="without state_indices"):
        anydelta.gated_delta_mixer_transition(
            conv_state=window, state=S0, state_indices=torch.zeros(B, dtype=torch.long), **given
        )


# ---- who holds what


@st.composite
def holdings(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    lengths = draw(st.lists(st.integers(0, 6), min_size=1, max_size=6))
    total = sum(lengths)
    cuts = sorted(draw(st.lists(st.integers(0, total), max_size=5)))
    return lengths, [0, *cuts, total]


@given(holdings())
@settings(max_examples=300, deadline=None, derandomize=True)
def test_pieces(both: tuple[list[int], list[int]]) -> None:
    """Against the rank and the sequence of each token."""
    lengths, cu = both
    rank_of = [r for r, n in enumerate(lengths) for _ in range(n)]
    sequence_of = [n for n in range(len(cu) - 1) for _ in range(cu[n], cu[n + 1])]
    found = pieces(lengths, cu)
    holders = {n: sorted({r for r, m in zip(rank_of, sequence_of, strict=True) if m == n}) for n in sequence_of}
    ending = []
    for rank, piece in enumerate(found):
        here = [n for r, n in zip(rank_of, sequence_of, strict=True) if r == rank]
        assert piece.tokens == len(here)
        if not here:
            assert not piece.sequences
            assert not piece.before + piece.after
            continue
        assert piece.sequences == range(here[0], here[-1] + 1)
        assert piece.before == tuple(r for r in holders[here[0]] if r < rank)
        assert piece.after == tuple(r for r in holders[here[-1]] if r > rank)
        assert piece.split == (here.count(here[0]) if piece.before else 0)
        assert piece.inside == bool(piece.before and piece.after and len(set(here)) == 1)
        ending += [n for n in piece.ending if n in holders]
    assert ending == sorted(holders)  # each sequence ends on one rank


def test_windows_come_from_as_many_ranks_as_it_takes() -> None:
    held = pieces([5, 1, 0, 1, 1, 4], [0, 12])
    counts = [[3], [1], [3], [1], [1], [3]]
    assert [windows_needed(r, held, counts, 3) for r in range(6)] == [[], [0], [], [1, 0], [3, 1, 0], [4, 3, 1]]


# ---- several processes

WORLD = 4
GROUPS = [(0,), (0, 1), (0, 1, 2), (1, 3), (0, 1, 2, 3)]
SECONDS = 90
"""The longest that a process waits for another."""


def serve(rank: int, store: str, pipe: Connection) -> None:
    """A process: runs the functions that come through the pipe, each with the group of its ranks."""
    torch.set_num_threads(1)
    timeout = timedelta(seconds=SECONDS)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD, timeout=timeout)
    groups = {ranks: dist.new_group(list(ranks), timeout=timeout) for ranks in GROUPS}
    while (task := pickle.loads(pipe.recv_bytes())) is not None:
        function, ranks, arguments = task
        try:
            found = True, function(groups[ranks], *arguments)
        except Exception as error:
            found = False, (type(error).__name__, str(error), traceback.format_exc())
        pipe.send_bytes(pickle.dumps(found))
    dist.destroy_process_group()


class Ranks:
    def __init__(self, folder: Path):
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(WORLD):
            ours, theirs = context.Pipe()
            self.pipes.append(ours)
            process = context.Process(target=serve, args=(rank, str(folder / "store"), theirs), daemon=True)
            process.start()
            self.processes.append(process)

    def run(self, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], ranks: Sequence[int]) -> list[Any]:
        """(whether it returned, result or error) of the function on each rank of the group."""
        for rank, given in zip(ranks, arguments, strict=True):
            self.pipes[rank].send_bytes(pickle.dumps((function, tuple(ranks), given)))
        found = []
        for rank in ranks:
            assert self.pipes[rank].poll(SECONDS + 30), f"rank {rank} does not answer"
            found.append(pickle.loads(self.pipes[rank].recv_bytes()))
        return found

    def results(self, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], ranks: Sequence[int]) -> list[Any]:
        found = self.run(function, arguments, ranks)
        for good, result in found:
            assert good, result[2]
        return [result for _, result in found]

    def stop(self) -> None:
        for pipe in self.pipes:
            pipe.send_bytes(pickle.dumps(None))
        for process in self.processes:
            process.join(30)
            assert process.exitcode == 0


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    found = Ranks(tmp_path_factory.mktemp("ranks"))
    yield found
    found.stop()


def on_rank(group: Any, name: str, tokens: Arrays, shared: Arrays, chunk: int | None) -> tuple[Any, int]:
    """(what the call returns, the most memory that it holds beyond its arguments and results)."""
    for module in (transition, run):
        module.CHUNK = chunk or 1024  # type: ignore[attr-defined]
    function = getattr(distributed, name)
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        results = function(**tokens, **shared, group=group)
    held = peak = 0
    events = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return results, peak - sum(x.nbytes for x in results if x is not None)


def cut(x: Any, begin: int, end: int) -> Any:
    return [part[:, begin:end].clone() for part in x] if isinstance(x, list) else x[:, begin:end].clone()


def over(
    processes: Ranks, name: str, lengths: Sequence[int], tokens: Arrays, shared: Arrays,
    *, ranks: Sequence[int] | None = None, chunk: int | None = None,
) -> tuple[list[Any], list[int]]:  # fmt: skip
    """The outputs of all pieces joined, the other results of every rank, and the memory of each."""
    ends = list(accumulate(lengths))
    arguments = [
        (name, {n: cut(x, end - length, end) for n, x in tokens.items()}, shared, chunk)
        for length, end in zip(lengths, ends, strict=True)
    ]
    found = processes.results(on_rank, arguments, ranks or range(len(lengths)))
    o = torch.cat([results[0] for results, _ in found], 1)
    return [o, [results[1:] for results, _ in found]], [memory for _, memory in found]


def same_everywhere(states: list[tuple[Any, ...]]) -> tuple[Any, ...]:
    """The states that every rank has, the same to the bit."""
    for other in states[1:]:
        assert all(torch.equal(a, b) for a, b in zip(states[0], other, strict=True))
    return states[0]


BATCHES = {
    "even": [13, 13, 12, 12],
    "uneven": [1, 30, 2, 17],
    "empty": [20, 0, 0, 30],
    "the first empty": [0, 25, 25, 0],
    "all on one": [0, 0, 50, 0],
    "single tokens": [47, 1, 1, 1],
}


@pytest.mark.parametrize("kda", [False, True], ids=["GDA", "KDA"])
@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES)
def test_rule_of_batches(processes: Ranks, lengths: list[int], kda: bool) -> None:
    tokens, shared = rule_call(B=2, kda=kda)
    shared["initial_state"] = state_of(2, 4, 16, 24)
    (o, states), _ = over(processes, "gated_delta_rule", lengths, tokens, shared)
    want = anydelta.gated_delta_rule(**tokens, **shared)
    assert nmse(o, want[0]) < EXACT
    assert nmse(same_everywhere(states)[0], want[1]) < EXACT


@pytest.mark.parametrize("ranks", GROUPS, ids=str)
def test_rule_over_groups(processes: Ranks, ranks: tuple[int, ...]) -> None:
    """One rank, and ranks of the group that are others of the world, in another order."""
    tokens, shared = rule_call(T=60, decays="strong")
    lengths = [60 // len(ranks)] * len(ranks)
    # torch numbers the ranks of a group by their place in the world, whatever the order they are named in
    (o, states), _ = over(processes, "gated_delta_rule", lengths, tokens, shared, ranks=sorted(ranks))
    want = anydelta.gated_delta_rule(**tokens, **shared)
    assert nmse(o, want[0]) < EXACT
    assert nmse(same_everywhere(states)[0], want[1]) < EXACT
