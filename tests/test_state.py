"""The pool of states against an oracle that recomputes every sequence from its accepted tokens, from scratch."""

from __future__ import annotations

import gc
import re
import threading
import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch

from anydelta import Checkpoints, StatePool
from anydelta.rule import reference
from anydelta.state import FORMS

H, HV, K, V, C, W = 1, 2, 8, 5, 3, 4
LAYERS = 2


class Model:
    """Random tokens by number, the layers' inputs of each, and what the pool must hold after any list of them."""

    def __init__(self, seed: int, vocabulary: int = 64, kda: bool = False):
        rng = np.random.default_rng(seed)
        f = np.float32
        n = (LAYERS, vocabulary)
        self.rng, self.vocabulary = rng, vocabulary
        self.q, self.k = (rng.standard_normal((2, *n, H, K)) / 3).astype(f)
        self.v = rng.standard_normal((*n, HV, V)).astype(f)
        self.g = -rng.exponential(0.3, (*n, HV, K) if kda else (*n, HV)).astype(f)
        self.beta = rng.random((*n, HV)).astype(f)
        self.x = rng.standard_normal((*n, C)).astype(f)

    def step(
        self, pool: StatePool, batch: list[int], tokens: list[list[int]], pasts: Any, **how: Any
    ) -> None:
        """Run tokens[i] on sequence batch[i] in every layer, and check outputs and windows."""
        equal = len({len(t) for t in tokens}) == 1
        pool.begin(len(tokens[0]) if equal else [len(t) for t in tokens], batch, **how)
        expected = [self.expected([*past, *row]) for past, row in zip(pasts, tokens, strict=True)]
        flat = np.array([t for row in tokens for t in row], np.int64)
        index = flat.reshape(len(tokens), -1) if equal else flat[None]
        for layer in range(LAYERS):
            args = {n: getattr(self, n)[layer][index] for n in ("q", "k", "v", "g", "beta", "x")}
            if pool.device is not None:
                args = {n: torch.from_numpy(a) for n, a in args.items()}
            windows = pool.conv_inputs(args.pop("x"), layer=layer)
            o = pool.run(**args, layer=layer)
            o = np.asarray(o).reshape(-1, HV, V)
            at = 0
            for i, row in enumerate(tokens):
                n = len(row)
                assert np.allclose(o[at : at + n], expected[i].o[layer][len(pasts[i]) :], atol=1e-5)
                at += n
                seen = self.x[layer][np.array([*pasts[i], *row], np.int64)]
                window = np.concatenate([np.zeros((W - 1, C), np.float32), seen])[-(W - 1 + n) :]
                assert np.array_equal(np.asarray(windows[i]), window)

    def expected(self, tokens: list[int]) -> reference.Expected:
        """All layers from scratch, as rows of a batch."""
        index = np.array(tokens, np.int64)
        a = {n: getattr(self, n)[:, index].astype(np.float64) for n in ("q", "k", "v", "g", "beta")}
        q, k, v = a.pop("q"), a.pop("k"), a.pop("v")
        return reference.gated_delta_rule(q, k, v, **a)

    def check(self, pool: StatePool, sequence: int, tokens: list[int]) -> None:
        got = np.asarray(pool.state(sequence)).astype(np.float64)
        if pool.state_layout == "vk":
            got = got.swapaxes(-1, -2)
        assert np.allclose(got, self.expected(tokens).state, atol=1e-5)
        assert pool.length(sequence) == len(tokens)

    def tokens(self, n: int) -> list[int]:
        return [int(t) for t in self.rng.integers(self.vocabulary, size=n)]


def make(form: str = "slots", snapshots: int = 4, capacity: int = 4, **how: Any) -> StatePool:
    sizes = dict(H=H, HV=HV, K=K, V=V, layers=LAYERS, conv_channels=C, conv_width=W)
    return StatePool(capacity, form=form, snapshots=snapshots, **(sizes | how))


def soak(seed: int, operations: int, form: str, **how: Any) -> None:
    """Random operations; pasts[s] are the tokens that sequence s must have seen."""
    model = Model(seed, kda=bool(how.get("kda")))
    rng = model.rng
    snapshots = int(rng.integers(1, 6))
    pool = make(form, snapshots, capacity=int(rng.integers(1, 5)), **how)
    pasts: dict[int, list[int]] = {}
    saved: Any = Checkpoints()
    texts: dict[str, list[int]] = {}
    for i in range(operations):
        op = rng.choice(
            ["step", "step", "step", "decode", "rollback", "new", "fork", "free", "save", "restore", "select"]
        )
        live = sorted(pasts)
        full = len(live) == pool.capacity
        if op == "new" and not full:
            pasts[pool.new()] = []
        elif op == "fork" and live and not full:
            s = int(rng.choice(live))
            pasts[pool.fork(s)] = list(pasts[s])
        elif op in ("new", "fork", "restore") and full:
            with pytest.raises(ValueError, match="free place"):
                pool.new()
        elif not live:
            continue
        elif op == "free":
            s = int(rng.choice(live))
            pool.free(s)
            del pasts[s]
        elif op == "save":
            s = int(rng.choice(live))
            name = f"at {len(saved) % 3}"
            saved[name], texts[name] = pool.save(s, pasts[s]), list(pasts[s])
        elif op == "restore" and saved:
            name = str(rng.choice(sorted(saved)))
            pasts[pool.restore(saved[name])] = list(texts[name])
        elif op == "select":
            parents = [int(p) for p in rng.choice(live, len(live))]
            pool.select(parents)
            pasts = {s: list(pasts[p]) for s, p in zip(live, parents, strict=True)}
        elif op == "rollback":
            batch = [int(s) for s in rng.permutation(live)[: int(rng.integers(1, len(live) + 1))]]
            back = [int(rng.integers(0, min(pool.recorded(s), len(pasts[s])) + 1)) for s in batch]
            pool.rollback(back, batch)
            for s, n in zip(batch, back, strict=True):
                pasts[s] = pasts[s][: len(pasts[s]) - n]
            too_far = [pool.recorded(s) + 1 for s in batch]
            with pytest.raises(ValueError, match="way back"):
                pool.rollback(too_far, batch)
        elif op in ("step", "decode"):
            batch = [int(s) for s in rng.permutation(live)[: int(rng.integers(1, len(live) + 1))]]
            n = int(rng.integers(1, 8)) if op == "step" else 1
            each = (
                [n] * len(batch)
                if rng.random() < 0.7
                else [int(x) for x in rng.integers(0, n + 1, len(batch))]
            )
            if not sum(each):
                continue
            tokens = [model.tokens(x) for x in each]
            record = op == "step"
            model.step(pool, batch, tokens, [pasts[s] for s in batch], record=record)
            kept = [len(t) for t in tokens]
            if record and min(kept):
                if form == "log" and rng.random() < 0.2 and max(kept) < snapshots // 2:
                    more = [model.tokens(1) for _ in batch]  # a second block before the first is committed
                    grown = [[*pasts[s], *t] for s, t in zip(batch, tokens, strict=True)]
                    model.step(pool, batch, more, grown)
                    tokens = [[*a, *b] for a, b in zip(tokens, more, strict=True)]
                kept = [
                    int(rng.integers(max(0, len(t) - pool.recorded(s)), len(t) + 1))
                    for s, t in zip(batch, tokens, strict=True)
                ]
                pool.commit(kept)
                with pytest.raises(ValueError, match="since the last commit"):
                    pool.commit(0)
            elif record:
                pool.rollback(0, batch)
            for s, t, x in zip(batch, tokens, kept, strict=True):
                pasts[s] = [*pasts[s], *t[:x]]
        for s in pasts:
            if len(pasts[s]) > 24:  # keeps the oracle quick
                pool.free(s)
                del pasts[s]
                break
        if i % 7 == 0:
            for s, past in pasts.items():
                model.check(pool, s, past)
        assert pool.sequences == sorted(pasts)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("device", [None, "cpu"])
def test_soak(form: str, device: str | None) -> None:
    """10,000 operations over the two forms, both frameworks and many pools."""
    for seed in range(10):
        layout = "vk" if seed % 2 else "kv"
        soak(
            seed, 10_000 // (10 * 2 * len(FORMS)), form, device=device, state_layout=layout, kda=seed % 3 == 0
        )


@pytest.mark.parametrize("form", FORMS)
def test_soak_in_eight_threads(form: str) -> None:
    """10,000 operations on eight pools."""
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            soak(100 + seed, 1250, form, device="cpu" if seed % 2 else None)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures, failures[0]


@pytest.mark.parametrize("form", FORMS)
def test_memory_does_not_grow(form: str) -> None:
    pool, model = make(form), Model(5)
    a = pool.new()

    def rounds(n: int) -> None:
        for _ in range(n):
            b = pool.fork(a)
            pool.begin(3)
            for layer in range(LAYERS):
                args = {
                    x: getattr(model, x)[layer][np.arange(6).reshape(2, 3)]
                    for x in ("q", "k", "v", "g", "beta", "x")
                }
                pool.conv_inputs(args.pop("x"), layer=layer)
                pool.run(**args, layer=layer)
            pool.commit([1, 3])
            pool.restore(pool.save(b))
            for s in pool.sequences[1:]:
                pool.free(s)

    rounds(20)
    tracemalloc.start()
    try:
        grown = []
        for _ in range(3):  # a leak grows in each; a table of the interpreter that gets larger does so in one
            rounds(5)
            gc.collect()  # reading a NumPy array's address makes a cycle
            before = tracemalloc.get_traced_memory()[0]
            rounds(400)
            gc.collect()
            grown.append(tracemalloc.get_traced_memory()[0] - before)
    finally:
        tracemalloc.stop()
    assert min(grown) < 400 * 20, grown  # one object lost per round would be 50 bytes each at least


def ready(form: str = "slots") -> tuple[StatePool, Model]:
    """A pool with a committed sequence 0 of 3 tokens, and 4 pending ones."""
    pool, model = make(form, snapshots=6, capacity=2), Model(1)
    pool.new()
    model.step(pool, [0], [[1, 2, 3]], [[]])
    pool.commit(3)
    model.step(pool, [0], [[4, 5, 6, 7]], [[1, 2, 3]])
    return pool, model


MISUSE = {
    "too many accepted": (lambda p: p.commit(5), r"commit: accepted must be in \[0, 4\]"),
    "negative": (lambda p: p.commit(-1), r"commit: accepted must be in \[0, 4\]"),
    "too far back": (lambda p: p.rollback(9), r"rollback: requires a way back of 9 tokens"),
    "negative rollback": (lambda p: p.rollback(-1), r"rollback: tokens must be >= 0"),
    "twice": (lambda p: (p.commit(4), p.commit(0)), r"commit: requires tokens run since the last commit"),
    "two counts for one": (lambda p: p.commit([1, 2]), r"commit: accepted must be an int or one per sequence"),
    "a fraction": (lambda p: p.commit([1.5]), r"commit: accepted must be an int or one per sequence"),
    "unknown sequence": (lambda p: p.free(1), r"free: requires a living sequence; got 1"),
    "freed": (lambda p: (p.new(), p.free(1), p.fork(1)), r"fork: requires a living sequence; got 1"),
    "full": (lambda p: (p.fork(0), p.fork(0)), r"fork: requires a free place; got a pool whose 2 sequences all live"),
    "no begin": (lambda p: p.run(*[None] * 3, g=None, beta=None), r"run: requires begin"),
    "layer": (lambda p: (p.begin(1), p.conv_inputs(np.zeros((1, 1, C)), layer=2)), r"conv_inputs: layer must be in"),
    "shape": (lambda p: (p.begin(1), p.conv_inputs(np.zeros((1, 2, C)))), r"conv_inputs: x must be \[N, T, C\]"),
    "half a step": (lambda p: (p.begin(1), p.commit(1)), r"commit: requires that all layers have run"),
    "begin twice": (lambda p: (p.begin(1), p.begin(1)), r"begin: requires that all layers have run"),
    "no tokens": (lambda p: p.begin(0), r"begin: tokens must be >= 1"),
    "nobody": (lambda p: p.begin(1, []), r"begin: requires at least one sequence"),
    "named twice": (lambda p: p.begin(1, [0, 0]), r"begin: requires at least one sequence, each once"),
    "nothing to cancel": (lambda p: (p.commit(2), p.cancel()), r"cancel: requires a begin that no commit or other"),
    "pending save": (lambda p: p.save(0), r"save: requires a committed sequence; 4 tokens of 0 are pending"),
    "parents": (lambda p: p.select([0, 0]), r"select: requires one parent for each of 1"),
    "other pool": (lambda p: p.restore(_foreign()), r"restore: requires states, layout"),
}  # fmt: skip


def _foreign() -> Any:
    pool = make(K=4)
    return pool.save(pool.new())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("how", MISUSE)
def test_misuse_raises_and_changes_nothing(how: str, form: str) -> None:
    pool, model = ready(form)
    change, text = MISUSE[how]
    with pytest.raises(ValueError, match="^StatePool." + text) as caught:
        change(pool)
    assert re.match(r"[^\n]+$", str(caught.value))
    if pool._step is not None and pool._step.todo:
        pool.cancel()
    if how == "nothing to cancel":
        model.check(pool, 0, [1, 2, 3, 4, 5])
    elif how != "twice":
        pool.commit(2)
        model.check(pool, 0, [1, 2, 3, 4, 5])
    else:
        model.check(pool, 0, [1, 2, 3, 4, 5, 6, 7])


@pytest.mark.parametrize("form", FORMS)
def test_an_invalid_call_can_be_repeated(form: str) -> None:
    pool, model = make(form), Model(3)
    s = pool.new()
    pool.begin(2)
    args = {n: getattr(model, n)[0][np.array([[1, 2]])] for n in ("q", "k", "v", "g", "beta")}
    with pytest.raises(ValueError, match="beta must be"):
        pool.run(**args | {"beta": args["beta"][:, :1]})
    with pytest.raises(ValueError, match="q must be"):
        pool.run(**args | {"q": args["q"][:, :1]})
    pool.cancel()
    model.step(pool, [s], [[1, 2]], [[]])
    pool.commit(1)
    model.check(pool, s, [1])


def test_slots_touch_no_state_to_go_back() -> None:
    pool, _ = ready()
    before = pool._form.rows.states.copy()
    pool.commit(1)
    pool.rollback(1)
    child = pool.fork(0)
    pool.free(child)
    assert np.array_equal(before, pool._form.rows.states)


@pytest.mark.parametrize("capacity", [2, 3])
@pytest.mark.parametrize("snapshots", [1, 2, 4])
def test_forks_share_rows_even_in_a_full_pool(snapshots: int, capacity: int) -> None:
    """All sequences share one state and give it up in the same step, with and without room to spare."""
    pool, model = make(snapshots=snapshots, capacity=capacity), Model(7)
    root = pool.new()
    model.step(pool, [root], [[1, 2, 3, 4, 5]], [[]])
    pool.commit(5)
    pasts = [[1, 2, 3, 4, 5]] * capacity
    batch = [root, *(pool.fork(root) for _ in range(capacity - 1))]
    for T in (1, 4, 6):
        tokens = [model.tokens(T) for _ in batch]
        model.step(pool, batch, tokens, pasts)
        pool.commit(T)
        pasts = [[*a, *b] for a, b in zip(pasts, tokens, strict=True)]
        for s, past in zip(batch, pasts, strict=True):
            model.check(pool, s, past)
        pool.select([batch[0]] * capacity)
        pasts = [pasts[0]] * capacity


@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_checkpoints_survive_a_file(tmp_path: Any, device: str | None, dtype: str) -> None:
    pytest.importorskip("safetensors")
    pool, model = make(device=device, dtype=dtype), Model(2)
    a, b = pool.new(), pool.new()
    if dtype == "float32":
        model.step(pool, [a, b], [[1, 2, 3], [4, 5, 6]], [[], []])
        pool.commit([3, 1])
    saved = Checkpoints()
    saved["a"], saved["b"] = pool.save(a, [1, 2, 3]), pool.save(b, [4])
    saved.save(tmp_path / "states.safetensors")
    again = Checkpoints.load(tmp_path / "states.safetensors", device=device)
    assert sorted(again) == ["a", "b"]
    assert again.nearest([1, 2, 3, 9]) == ("a", 3)
    assert again.nearest([4, 4]) == ("b", 1)
    assert again.nearest([1, 2]) is None
    c = pool.restore(again["a"])
    assert bool((pool.state(c) == pool.state(a)).all())
    if dtype == "float32":
        model.step(pool, [c], [[7, 8]], [[1, 2, 3]])
        pool.commit(2)
        model.check(pool, c, [1, 2, 3, 7, 8])
    with pytest.raises(ValueError, match="without '/'"):
        again["a/b"] = again["a"]
    with pytest.raises(TypeError, match="requires a Checkpoint"):
        again["c"] = 3  # type: ignore[assignment]


def test_memory_is_stated() -> None:
    state, conv = LAYERS * HV * K * V * 4, LAYERS * (2 * (W - 1 + 4) + 1) * C * 4
    assert make().nbytes() == {
        "states": 4 * 4 * state, "log": 0, "conv": 4 * conv, "per_sequence": 4 * state + conv,
    }  # fmt: skip
