"""What a run of tokens makes of any state, and sequences over several processes: as one process, to rounding.

Four processes are started once, with gloo on the loopback, and run every case; groups of fewer are parts of them.
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
import pickle
import queue
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
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
from anydelta.core import dispatch
from anydelta.distributed import run
from anydelta.distributed.peers import entering_state
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


LONGEST = {"mild": 0.02, "long": 1e-4}


def gates(rng: np.random.Generator, shape: tuple[int, ...], decays: str) -> Any:
    """Log decays: mild ones halve a state in 70 tokens, long ones in 14 thousand, strong ones clear it in a few."""
    if decays in LONGEST:
        return -rng.uniform(0, LONGEST[decays], shape)
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
    if decays == "long":
        tokens["k"][..., K // 2 :] = 0  # which no token then overwrites
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


A_LOG = {"mild": (-5, -2), "long": (-12, -9)}


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
    decays: str = "mild",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Arrays, Arrays]:
    """(arrays with an entry per token, the other arguments) of the mixer, without its states."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal(shape)).to(dtype)

    C = 2 * H * K + HV * V
    qkv = normal(B, T, C)
    if decays == "long":
        qkv[..., H * K : 2 * H * K].unflatten(-1, (H, K))[..., K // 2 :] = 0
    tokens: Arrays = {"qkv": qkv if packed else list(qkv.split([H * K, H * K, HV * V], -1))}
    tokens["g"] = normal(B, T, HV, K) if kda else normal(B, T, HV)
    tokens["beta"] = normal(B, T, HV)
    if masked:
        tokens["mask"] = torch.from_numpy(rng.random((B, T)) < 0.3)
    shared: Arrays = {
        "conv_weight": normal(C, W), "A_log": torch.from_numpy(rng.uniform(*A_LOG[decays], HV)).float(),
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
    "backend", [name for name in dispatch.NAMES if name not in ("cpu", "triton", "metal")]
)
def test_transition_on_every_backend(backend: str) -> None:
    if no := dispatch.get_backend(backend).available():
        pytest.skip(str(no[0]))
    tokens, shared = rule_call(kda=True)
    given = {n: x for n, x in tokens.items() if n != "q"}
    S0 = state_of(1, 4, 16, 24)
    S, P = anydelta.gated_delta_transition(**given, **shared, backend=backend)
    assert nmse(P @ S0 + S, of_oracle(tokens, shared, S0, "kv").state) < EXACT


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (
            {"k": "x"},
            TypeError,
            "gated_delta_transition: k must be a torch.Tensor or a numpy.ndarray; got str",
        ),
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
    HV, V = state.shape[1], state.shape[2 if more.get("state_layout") == "vk" else 3]
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
    holders = {
        n: sorted({r for r, m in zip(rank_of, sequence_of, strict=True) if m == n}) for n in sequence_of
    }
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
    assert [windows_needed(r, held, counts, 3) for r in range(6)] == [
        [],
        [0],
        [],
        [1, 0],
        [3, 1, 0],
        [4, 3, 1],
    ]


class Threads:
    """`Peers` of one rank, whose messages go through queues to the threads of the others."""

    def __init__(self, rank: int, boxes: dict[tuple[int, int], queue.Queue[torch.Tensor]]):
        self.rank, self.boxes, self.steps, self.moved = rank, boxes, 0, 0

    def exchange(self, sends: Sequence[Any], receives: Sequence[Any]) -> None:
        self.steps += 1
        for to, x in sends:
            self.moved += x.numel()
            self.boxes[self.rank, to].put(x.clone())
        for sender, x in receives:
            x.copy_(self.boxes[sender, self.rank].get(timeout=SECONDS))


@pytest.mark.parametrize("layout", ["kv", "vk"])
@pytest.mark.parametrize(
    ("lengths", "cu"),
    [([2] * R, [0, 2 * R]) for R in (1, 2, 3, 5, 8, 9)]
    + [
        ([3, 0, 1, 2, 0, 2, 5], [0, 13]),
        ([2] * 9, [0, 3, 17, 18]),
        ([1, 4, 1, 1, 1, 1, 1, 4], [0, 3, 12, 14]),
    ],
    ids=str,
)
def test_the_scan_over_many_ranks(lengths: list[int], cu: list[int], layout: str) -> None:
    """Against one rank after the other, in float64, with as many steps and numbers as it says."""
    HV, K, V = 2, 3, 5
    rng = np.random.default_rng(0)
    held = pieces(lengths, cu)
    draw = lambda *shape: torch.from_numpy(rng.standard_normal(shape))  # noqa: E731
    shape = (1, HV, K, V) if layout == "kv" else (1, HV, V, K)
    own = [(draw(*shape), draw(1, HV, K, K) if p.inside else None) if p.after else None for p in held]
    boxes: dict[tuple[int, int], queue.Queue[torch.Tensor]] = {
        pair: queue.Queue() for pair in itertools.product(range(len(held)), repeat=2)
    }
    ranks = [Threads(rank, boxes) for rank in range(len(held))]
    with ThreadPoolExecutor(len(held)) as pool:
        jobs = [
            pool.submit(entering_state, rank, piece, mine, torch.empty(shape, dtype=torch.float64), layout)  # type: ignore[arg-type]
            for rank, piece, mine in zip(ranks, held, own, strict=True)
        ]
        found = [job.result(timeout=SECONDS) for job in jobs]
    assert all(box.empty() for box in boxes.values())
    for piece, got in zip(held, found, strict=True):
        if not piece.before:
            assert got is None
            continue
        state = torch.zeros(shape, dtype=torch.float64)
        for rank in piece.before:
            S, P = own[rank]  # type: ignore[misc]
            state = S if P is None else after(P, state, S, layout)
        assert nmse(got, state) < 1e-25
    for rank, piece in zip(ranks, held, strict=True):
        steps = math.ceil(math.log2(max(1, len(piece.before) + len(piece.after) + 1)))
        assert rank.steps <= steps
        assert rank.moved <= steps * HV * K * (K + V)


# ---- several processes

WORLD = 4
GROUPS = [(0,), (0, 1), (0, 1, 2), (1, 3), (0, 1, 2, 3)]
START = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
"""With a server of forks torch is imported once, not by every process."""
SECONDS = 90
"""The longest that a process waits for another."""


def serve(rank: int, store: str, pipe: Connection) -> None:
    """A process: runs the functions that come through the pipe, each with the group of its ranks."""
    torch.set_num_threads(1)
    timeout = timedelta(seconds=SECONDS)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD, timeout=timeout
    )
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
        context = multiprocessing.get_context(START)
        if START == "forkserver":
            context.set_forkserver_preload([__name__])
        self.pipes, self.processes = [], []
        for rank in range(WORLD):
            ours, theirs = context.Pipe()
            self.pipes.append(ours)
            process = context.Process(target=serve, args=(rank, str(folder / "store"), theirs), daemon=True)
            process.start()
            self.processes.append(process)

    def run(
        self, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], ranks: Sequence[int]
    ) -> list[Any]:
        """(whether it returned, result or error) of the function on each rank of the group."""
        for rank, own in zip(ranks, arguments, strict=True):
            self.pipes[rank].send_bytes(pickle.dumps((function, tuple(ranks), own)))
        found = []
        for rank in ranks:
            assert self.pipes[rank].poll(SECONDS + 30), f"rank {rank} does not answer"
            found.append(pickle.loads(self.pipes[rank].recv_bytes()))
        return found

    def results(
        self, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], ranks: Sequence[int]
    ) -> list[Any]:
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
    return measured(lambda: getattr(distributed, name)(**tokens, **shared, group=group))


def measured(function: Callable[[], Any]) -> tuple[Any, int]:
    """(what it returns, the most memory of tensors that it holds beside that)."""
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        results = function()
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


PACKED = {
    "through three ranks": [0, 5, 5, 45, 50],
    "cut at the ends of sequences": [0, 13, 13, 26, 38, 50],
    "many on each": [0, 3, 3, 11, 12, 14, 20, 27, 30, 39, 41, 50],
    "one": [0, 50],
    "empty ones around": [0, 0, 0, 50, 50],
    "leaves each": [0, 12, 25, 37, 50],
}


@pytest.mark.parametrize("lengths", [[13, 13, 12, 12], [2, 40, 0, 8]], ids=str)
@pytest.mark.parametrize("cu", PACKED.values(), ids=PACKED)
def test_rule_of_packed_sequences(processes: Ranks, cu: list[int], lengths: list[int]) -> None:
    tokens, shared = rule_call(kda=True)
    shared |= {
        "cu_seqlens": torch.tensor(cu, dtype=torch.int32),
        "initial_state": state_of(len(cu) - 1, 4, 16, 24),
    }
    (o, states), _ = over(processes, "gated_delta_rule", lengths, tokens, shared, chunk=7)
    want = anydelta.gated_delta_rule(**tokens, **shared)
    assert nmse(o, want[0]) < EXACT
    assert nmse(same_everywhere(states)[0], want[1]) < EXACT


OPTIONS = {
    "vk, tiled, masked": ({"masked": True, "decays": "strong"}, {"state_layout": "vk", "heads": "tiled"}),
    "raw": ({"raw": True}, {"scale": 0.5}),
    "raw KDA": ({"raw": True, "kda": True}, {"state_layout": "vk"}),
    "erase": ({"erase": True}, {}),
    "no initial state": ({}, {"initial_state": None}),
    "no final state": ({}, {"output_final_state": False}),
    "by name": ({}, {"backend": "cpu"}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_the_rule(processes: Ranks, name: str) -> None:
    call, options = OPTIONS[name]
    tokens, shared = rule_call(B=2, **call)  # type: ignore[arg-type]
    layout = str(options.get("state_layout", "kv"))
    shared |= {"initial_state": state_of(2, 4, 16, 24, layout)} | options
    (o, states), _ = over(processes, "gated_delta_rule", [13, 13, 12, 12], tokens, shared, chunk=7)
    want = anydelta.gated_delta_rule(**tokens, **shared)
    assert nmse(o, want[0]) < EXACT
    if want[1] is None:
        assert states == [(None,)] * WORLD
    else:
        assert nmse(same_everywhere(states)[0], want[1]) < EXACT


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(processes: Ranks, dtype: torch.dtype) -> None:
    """Half types have the error of one process, also where the state is of a half type; float64 is exact."""
    tokens, shared = rule_call(dtype=dtype)
    exact = dtype == torch.float64
    shared["initial_state"] = state_of(1, 4, 16, 24).to(dtype if exact else torch.bfloat16)
    (o, states), _ = over(processes, "gated_delta_rule", [13, 13, 12, 12], tokens, shared)
    final = same_everywhere(states)[0]
    o_one, final_one = anydelta.gated_delta_rule(**tokens, **shared)
    assert o.dtype == o_one.dtype
    assert final.dtype == final_one.dtype
    given = {n: x for n, x in shared.items() if n != "initial_state"}
    want = of_oracle(tokens, given, shared["initial_state"], "kv")
    for got, one, expected in ((o, o_one, want.o), (final, final_one, want.state)):
        assert nmse(got, expected) <= max(1.1 * nmse(one, expected), 1e-25)


def test_states_of_other_ranks_and_masked_tokens_are_not_read(processes: Ranks) -> None:
    """NaN in what a rank must not look at: states of sequences that began before, tokens that are masked."""
    for make, name in ((rule_call, "gated_delta_rule"), (mixer_call, "gated_delta_mixer")):
        tokens, shared = make(B=2, masked=True)
        states = (
            mixed_states(2, shared, 3)
            if "conv_weight" in shared
            else {"initial_state": state_of(2, 4, 16, 24)}
        )
        want = getattr(anydelta, name)(**tokens, **shared, **states)
        for n, x in tokens.items():
            if n != "mask":
                x[~tokens["mask"]] = float("nan")
        arguments = []
        for rank in range(WORLD):
            part = {n: cut(x, 12 * rank, 12 * rank + (14 if rank == 3 else 12)) for n, x in tokens.items()}
            own = states if rank == 0 else {n: torch.full_like(x, float("nan")) for n, x in states.items()}
            arguments.append((name, part, shared | own, 5))
        found = [results for results, _ in processes.results(on_rank, arguments, range(WORLD))]
        assert nmse(torch.cat([x[0] for x in found], 1), want[0]) < EXACT
        assert nmse(found[2][-1], want[-1]) < EXACT


def in_inference_mode(group: Any, tokens: Arrays, shared: Arrays) -> Any:
    with torch.inference_mode():
        results = distributed.gated_delta_mixer(
            **{n: x + 0 for n, x in tokens.items()}, **shared, group=group
        )
    return [x.clone() for x in results]


def test_inference_mode(processes: Ranks) -> None:
    tokens, shared = mixer_call(T=40)
    shared |= mixed_states(1, shared, 3)
    arguments = [({n: cut(x, 10 * r, 10 * r + 10) for n, x in tokens.items()}, shared) for r in range(WORLD)]
    found = processes.results(in_inference_mode, arguments, range(WORLD))
    want = anydelta.gated_delta_mixer(**tokens, **shared)
    assert nmse(torch.cat([x[0] for x in found], 1), want[0]) < EXACT


def test_from_a_contiguous_and_from_a_strided_state(processes: Ranks) -> None:
    tokens, shared = rule_call(B=2)
    tokens = {n: x.transpose(1, 2).contiguous().transpose(1, 2) for n, x in tokens.items()}
    shared["initial_state"] = state_of(2, 4, 24, 16).transpose(-1, -2)
    (o, states), _ = over(processes, "gated_delta_rule", [20, 10, 10, 10], tokens, shared)
    want = anydelta.gated_delta_rule(**tokens, **shared)
    assert nmse(o, want[0]) < EXACT
    assert nmse(same_everywhere(states)[0], want[1]) < EXACT


def mixed_states(N: int, shared: Arrays, S: int, layout: str = "kv") -> Arrays:
    C = shared["conv_weight"].shape[0]
    window = torch.from_numpy(np.random.default_rng(3).standard_normal((N, C, S)))
    return {"conv_state": window.to(shared["conv_weight"].dtype), "state": state_of(N, 4, 16, 24, layout)}


def check_mixer(
    processes: Ranks, lengths: list[int], tokens: Arrays, shared: Arrays, chunk: int | None = None
) -> None:
    want = anydelta.gated_delta_mixer(**tokens, **shared)
    (o, states), _ = over(processes, "gated_delta_mixer", lengths, tokens, shared, chunk=chunk)
    conv, final = same_everywhere(states)
    assert torch.equal(conv, want[1])
    assert nmse(final, want[2]) < EXACT
    # half types: the same but for a last bit here and there
    assert nmse(o, want[0]) < (EXACT if o.dtype == torch.float32 else 1e-6)


@pytest.mark.parametrize("kda", [False, True], ids=["GDA", "KDA"])
@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES)
def test_mixer_of_batches(processes: Ranks, lengths: list[int], kda: bool) -> None:
    tokens, shared = mixer_call(B=2, kda=kda)
    check_mixer(processes, lengths, tokens, shared | mixed_states(2, shared, 3))


@pytest.mark.parametrize("lengths", [[13, 13, 12, 12], [2, 40, 0, 8], [48, 1, 1, 0]], ids=str)
@pytest.mark.parametrize("cu", PACKED.values(), ids=PACKED)
def test_mixer_of_packed_sequences(processes: Ranks, cu: list[int], lengths: list[int]) -> None:
    tokens, shared = mixer_call(packed=False)
    shared |= mixed_states(len(cu) - 1, shared, 4) | {"cu_seqlens": torch.tensor(cu)}
    check_mixer(processes, lengths, tokens, shared, chunk=7)


@pytest.mark.parametrize("lengths", [[13, 13, 12, 12], [40, 3, 4, 3], [1, 2, 46, 1]], ids=str)
def test_mixer_windows_of_masked_tokens(processes: Ranks, lengths: list[int]) -> None:
    """A third of the tokens exist: a window reaches over several ranks, other ones in each row."""
    tokens, shared = mixer_call(B=3, masked=True)
    check_mixer(processes, lengths, tokens, shared | mixed_states(3, shared, 6))


def test_mixer_with_a_mask_on_some_ranks_only(processes: Ranks) -> None:
    tokens, shared = mixer_call(B=2, T=16)
    shared |= mixed_states(2, shared, 3)
    mask = torch.ones(2, 16, dtype=torch.bool)
    mask[:, 5:8] = False
    want = anydelta.gated_delta_mixer(**tokens, **shared, mask=mask)
    arguments = []
    for rank in range(WORLD):
        part = {n: cut(x, 4 * rank, 4 * rank + 4) for n, x in tokens.items()}
        part |= {"mask": mask[:, 4:8].clone()} if rank == 1 else {}
        arguments.append(("gated_delta_mixer", part, shared, None))
    found = [results for results, _ in processes.results(on_rank, arguments, range(WORLD))]
    assert nmse(torch.cat([x[0] for x in found], 1), want[0]) < EXACT
    assert torch.equal(found[0][1], want[1])


MIXER_OPTIONS = {
    "vk": ({}, {"state_layout": "vk"}, 3),
    "one tap": ({"W": 1}, {}, 0),
    "one tap, two columns": ({"W": 1}, {}, 2),
    "beta to 2, no norm": ({"neg": True, "normed": False, "bias": False}, {"activation": None}, 5),
    "bfloat16": ({"dtype": torch.bfloat16}, {}, 4),
    "long window": ({"W": 9}, {}, 12),
}


@pytest.mark.parametrize("name", MIXER_OPTIONS)
def test_options_of_the_mixer(processes: Ranks, name: str) -> None:
    call, options, S = MIXER_OPTIONS[name]
    tokens, shared = mixer_call(**call)  # type: ignore[arg-type]
    shared |= mixed_states(1, shared, S, str(options.get("state_layout", "kv"))) | options
    check_mixer(processes, [20, 5, 6, 19], tokens, shared, chunk=7)


STATE = {"gated_delta_rule": "initial_state", "gated_delta_mixer": "state"}


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("kda", [False, True], ids=["GDA", "KDA"])
@pytest.mark.parametrize("name", ["gated_delta_rule", "gated_delta_mixer"])
def test_16k_tokens(processes: Ranks, name: str, kda: bool, world: int) -> None:
    """As one process, and no rank holds more than its share: beside arguments and results a few states.

    While a piece is summarised there are no outputs yet, so that memory does not add to theirs.
    """
    sizes = dict(T=16384, H=1, HV=2, K=64, V=64, kda=kda, decays="long")
    if name == "gated_delta_rule":
        tokens, shared = rule_call(**sizes)  # type: ignore[arg-type]
        shared["initial_state"] = state_of(1, 2, 64, 64)
    else:
        tokens, shared = mixer_call(**sizes, bias=False)  # type: ignore[arg-type]
        shared |= {"conv_state": torch.zeros(1, 256, 3), "state": state_of(1, 2, 64, 64)}
    (o, states), memory = over(processes, name, [16384 // world] * world, tokens, shared)
    want = getattr(anydelta, name)(**tokens, **shared)
    assert nmse(o, want[0]) < EXACT
    assert nmse(same_everywhere(states)[-1], want[-1]) < EXACT
    from_zeros = getattr(anydelta, name)(**tokens, **shared | {STATE[name]: torch.zeros(1, 2, 64, 64)})
    assert (
        nmse(from_zeros[0][:, -100:], want[0][:, -100:]) > 1e-3
    )  # the last piece reads what came through all
    state = 4 * 2 * 64 * 64
    assert min(memory) >= state, memory  # what moves is seen
    assert max(memory) <= 8 * state, memory


def test_a_summary_holds_a_chunk() -> None:
    tokens, shared = rule_call(T=8 * transition.CHUNK, H=1, HV=1, K=16, V=64)
    given = {n: x for n, x in tokens.items() if n != "q"}
    results, memory = measured(lambda: anydelta.gated_delta_transition(**given, **shared))
    outputs = 4 * transition.CHUNK * 64
    assert outputs <= memory <= 1.25 * outputs
    assert len(results) == 2


# ---- invalid calls


def refused(processes: Ranks, name: str, arguments: list[tuple[Any, ...]]) -> list[tuple[str, str]]:
    """(type, text) of the error of every rank."""
    found = processes.run(on_rank, arguments, range(WORLD))
    assert not any(good for good, _ in found)
    return [(kind, text) for _, (kind, text, _) in found]


def on_each(
    name: str, change: Callable[[int, Arrays], Any], make: Callable[..., Any] = rule_call
) -> list[tuple[Any, ...]]:
    """A valid call of 4 tokens a rank, each changed."""
    arguments = []
    for rank in range(WORLD):
        tokens, shared = make(T=4, seed=rank)
        if name == "gated_delta_mixer":
            shared |= mixed_states(1, shared, 3)
        given = tokens | shared
        change(rank, given)
        arguments.append((name, given, {}, None))
    return arguments


def only(rank: int, **change: Any) -> Callable[[int, Arrays], None]:
    return lambda r, given: given.update(change) if r == rank else None


ON_ONE_RANK = {
    "a shape": (
        {"beta": torch.zeros(1, 4, 3)},
        "ValueError",
        r"beta must be [B, T, HV] = [1, 4, 4]; got [1, 4, 3]",
    ),
    "a type": ({"q": np.zeros((1, 4, 2, 16), np.float32)}, "TypeError", "q must be a torch.Tensor; got"),
    "an argument": ({"gain": 1.0}, "TypeError", "unexpected keyword argument 'gain'"),
    "a pool": (
        {"state_indices": torch.tensor([0])},
        "TypeError",
        "takes neither state_indices nor snapshots",
    ),
    "a gradient": (
        {"beta": torch.zeros(1, 4, 4, requires_grad=True)},
        "ValueError",
        "has no gradient, but beta",
    ),
    "a backend": ({"backend": "metal"}, "UnsupportedError", "cannot run this call"),
}


@pytest.mark.parametrize("name", ON_ONE_RANK)
def test_an_invalid_call_on_one_rank_is_an_error_on_all(processes: Ranks, name: str) -> None:
    change, kind, text = ON_ONE_RANK[name]
    errors = refused(processes, "gated_delta_rule", on_each("gated_delta_rule", only(2, **change)))
    assert errors[2][0] == kind
    assert text in errors[2][1]
    for rank in (0, 1, 3):
        assert errors[rank][0] == "ValueError"
        assert "distributed.gated_delta_rule: rank 2 of the group refused its piece" in errors[rank][1]
        assert text in errors[rank][1]


DIFFERENT = {
    "HV": lambda r, x: x.update(rule_call(T=4, HV=2 if r == 1 else 4)[0]),
    "the number of g's dimensions": lambda r, x: x.update(rule_call(T=4, kda=r == 1)[0]),
    "whether initial_state is given": only(1, initial_state=torch.zeros(1, 4, 16, 24)),
    "state_layout": only(1, state_layout="vk"),
    "qk_l2norm": only(1, qk_l2norm=False),
    "output_final_state": only(1, output_final_state=False),
    "cu_seqlens": lambda r, x: x.update(cu_seqlens=torch.tensor([0, 8 if r == 1 else 9, 16])),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_calls_that_differ_between_ranks_are_refused_on_all(processes: Ranks, name: str) -> None:
    errors = refused(processes, "gated_delta_rule", on_each("gated_delta_rule", DIFFERENT[name]))
    assert len(set(errors)) == 1
    assert f"distributed.gated_delta_rule: {name} must be the same on every rank; got" in errors[0][1]
    assert errors[0][1].endswith("on rank 1")


@pytest.mark.parametrize(
    ("cu", "text"),
    [
        ([0, 4], "cu_seqlens must start at 0 and end at the tokens of all ranks together, 16; got 0 and 4"),
        ([0, 9, 7, 16], "cu_seqlens must not decrease; got [0, 9, 7, 16]"),
    ],
)
def test_wrong_cu_seqlens(processes: Ranks, cu: list[int], text: str) -> None:
    for name, make in (("gated_delta_rule", rule_call), ("gated_delta_mixer", mixer_call)):

        def several(rank: int, given: Arrays, name: str = name) -> None:
            given.update(cu_seqlens=torch.tensor(cu))
            if name == "gated_delta_mixer":
                given.update(mixed_states(len(cu) - 1, given, 3))

        errors = refused(processes, name, on_each(name, several, make))
        assert set(errors) == {("ValueError", f"distributed.{name}: {text}")}


def test_invalid_calls_of_the_mixer(processes: Ranks) -> None:
    change = only(3, conv_state=torch.zeros(1, 160, 2))
    errors = refused(processes, "gated_delta_mixer", on_each("gated_delta_mixer", change, mixer_call))
    assert "conv_state must be [N, C, S] with C = 160 and S >= W - 1 = 3" in errors[3][1]
    assert all("rank 3 of the group refused its piece" in errors[r][1] for r in (0, 1, 2))
    # and the processes go on
    tokens, shared = mixer_call(T=8)
    check_mixer(processes, [2, 2, 2, 2], tokens, shared | mixed_states(1, shared, 3))


def of_two_functions(group: Any, rank: int) -> None:
    tokens, shared = rule_call(T=4)
    if rank == 1:
        tokens, shared = mixer_call(T=4)
        shared |= mixed_states(1, shared, 3)
        distributed.gated_delta_mixer(**tokens, **shared, group=group)
    else:
        distributed.gated_delta_rule(**tokens, **shared, group=group)


def test_two_functions_at_once(processes: Ranks) -> None:
    found = processes.run(of_two_functions, [(0,), (1,)], (0, 1))
    for good, (kind, text, _) in found:
        assert not good
        assert kind == "ValueError"
        assert "the function must be the same on every rank" in text


def on_wrong_group(group: Any, rank: int) -> str:
    tokens, shared = rule_call(T=4)
    others = dist.distributed_c10d.GroupMember.NON_GROUP_MEMBER
    with pytest.raises(ValueError, match="requires a process of the group; got one outside"):
        distributed.gated_delta_rule(**tokens, **shared, group=others)
    return "refused"


def test_a_process_outside_of_the_group(processes: Ranks) -> None:
    assert processes.results(on_wrong_group, [(0,)], (0,)) == ["refused"]


def test_without_processes() -> None:
    tokens, shared = rule_call(T=4)
    with pytest.raises(ValueError, match=r"requires the processes of torch\.distributed; got none"):
        distributed.gated_delta_rule(**tokens, **shared)


def test_the_example() -> None:
    example = Path(__file__).parents[1] / "examples" / "context_parallel.py"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(example),
        "999",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    assert sorted(line.partition(";")[0] for line in done.stdout.splitlines()) == [
        "rank 0: tokens 0 to 499", "rank 1: tokens 499 to 999",
    ]  # fmt: skip


def under_autocast(group: Any, tokens: Arrays, shared: Arrays) -> Any:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return distributed.gated_delta_rule(**tokens, **shared, group=group)


def test_autocast_does_not_reach_the_scan(processes: Ranks) -> None:
    tokens, shared = rule_call(T=40)
    arguments = [({n: cut(x, 10 * r, 10 * r + 10) for n, x in tokens.items()}, shared) for r in range(WORLD)]
    found = processes.results(under_autocast, arguments, range(WORLD))
    want = anydelta.gated_delta_rule(**tokens, **shared)
    assert nmse(torch.cat([x[0] for x in found], 1), want[0]) < EXACT
    assert nmse(found[0][1], want[1]) < EXACT
