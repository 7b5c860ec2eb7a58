"""A step of StatePool that fails in the middle is taken back, and copies of a pool are independent."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest
import torch

from anydelta import Checkpoint, StatePool
from anydelta.state import FORMS
from conftest import CPU_REASONS
from test_state import HV, LAYERS, C, K, Model, V, W, make
from test_state_machine import COPIES, everything, failing_at, raw

FRAMEWORKS = (None, "cpu")


class Filled:
    """A pool of three sequences with a past: 0 and 1 share what they have seen, 2 does not."""

    def __init__(self, form: str, snapshots: int = 4, capacity: int = 3, **how: Any):
        self.pool, self.model = make(form, snapshots, capacity, **how), Model(11)
        self.pool.new()
        self.pasts: list[list[int]] = [[]]
        self.run([0], [[1, 2, 3, 4, 5]])
        self.pool.fork(0)
        self.pool.new()
        self.pasts += [self.pasts[0], []]
        self.run([2], [[6, 7, 8]])

    def run(self, batch: list[int], tokens: list[list[int]], keep: int | None = None, **how: Any) -> None:
        self.model.step(self.pool, batch, tokens, [self.pasts[s] for s in batch], **how)
        if how.get("record", True):
            self.pool.commit(len(tokens[0]) if keep is None else keep, batch)
        for s, t in zip(batch, tokens, strict=True):
            self.pasts[s] = [*self.pasts[s], *t[:keep]]

    def look(self) -> Any:
        pool = self.pool
        ends = {s: pool._sequences[s].conv_end for s in pool.sequences}  # type: ignore[union-attr]
        assert pool._conv is not None
        windows = [raw(pool._conv[:, s, end - W + 1 : end]) for s, end in ends.items()]
        return [(s, pool.length(s), raw(pool.state(s))) for s in pool.sequences], windows

    def check(self) -> None:
        for s, past in enumerate(self.pasts):
            self.model.check(self.pool, s, past)

    def inputs(self, layer: int, tokens: list[list[int]]) -> dict[str, Any]:
        args = {n: getattr(self.model, n)[layer][np.array(tokens)] for n in ("q", "k", "v", "g", "beta", "x")}
        return args if self.pool.device is None else {n: torch.from_numpy(x) for n, x in args.items()}

    def layer(self, layer: int, tokens: list[list[int]]) -> None:
        args = self.inputs(layer, tokens)
        self.pool.conv_inputs(args.pop("x"), layer=layer)
        self.pool.run(**args, layer=layer)


STEPS: dict[str, dict[str, Any]] = {
    "a draft": {"tokens": [[9, 10], [11, 12]], "batch": [0, 2]},
    "as many as are recorded": {"tokens": [[9, 10, 11]], "batch": [0]},
    "a log that is full": {"tokens": [[9, 10, 11], [12, 13, 14]], "batch": [2, 1]},
    "longer than the record": {"tokens": [list(range(9, 18))] * 3, "batch": [0, 1, 2]},
    "a certain token": {"tokens": [[9]] * 3, "batch": [2, 1, 0], "record": False},
    "a prefill": {"tokens": [list(range(20, 40))], "batch": [1], "record": False},
}


@pytest.mark.parametrize("device", FRAMEWORKS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("layers", range(LAYERS + 1))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cancelled_step_never_happened(name: str, form: str, device: Any, layers: int, dtype: str) -> None:
    how = dict(STEPS[name])
    tokens, batch = how.pop("tokens"), how.pop("batch")
    it = Filled(form, device=device) if dtype == "float32" else _rounded(form, device)
    before, all_of_it = it.look(), everything(it.pool)
    recorded = [it.pool.recorded(s) for s in it.pool.sequences]
    it.pool.begin(len(tokens[0]), batch, **how)
    for layer in range(layers):
        it.layer(layer, tokens)
    assert it.pool.cancel() == []
    assert it.look() == before
    if not layers:
        assert everything(it.pool) == all_of_it
        assert [it.pool.recorded(s) for s in it.pool.sequences] == recorded
    for s in it.pool.sequences:
        n = it.pool.recorded(s)
        assert n <= recorded[s]
        it.pool.rollback(n, [s])
        it.pasts[s] = it.pasts[s][: len(it.pasts[s]) - n]
    if dtype == "float32":
        it.check()
        it.run(batch, tokens, **how)
        it.check()


def _rounded(form: str, device: Any) -> Filled:
    """The same with states of bfloat16, whose values `Model.step` would find too far off."""
    it = Filled(form, capacity=3, device=device)
    it.pool = make(form, 4, 3, dtype="bfloat16", device=device)
    for batch, tokens in (([0], [[1, 2, 3, 4, 5]]), ([1], [[6, 7, 8]])):
        it.pool.new()
        it.pool.begin(len(tokens[0]), batch)
        for layer in range(LAYERS):
            it.layer(layer, tokens)
        it.pool.commit(len(tokens[0]))
    it.pool.fork(0)
    return it


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("undo", [True, False])
def test_an_error_at_any_line_of_a_step(name: str, form: str, undo: bool) -> None:
    """Ctrl-C at each line of the pool that a step runs, from begin to commit."""
    how = dict(STEPS[name], undo=undo)
    tokens, batch = how.pop("tokens"), how.pop("batch")
    it = Filled(form)
    original = copy.deepcopy(it.pool)
    before, known = it.look(), everything(it.pool)[0]
    failed = 0
    # every line once; without undo, and in the longest step, one of three, which differs by form
    for line in range(1, 5000, 1 if undo and name != "longer than the record" else 3):
        it.pool = copy.deepcopy(original)
        try:
            with failing_at(line, KeyboardInterrupt), it.pool.step(len(tokens[0]), batch, **how):
                for layer in range(LAYERS):
                    it.layer(layer, tokens)
                if how.get("record", True):
                    it.pool.commit(len(tokens[0]))
        except KeyboardInterrupt:
            failed += 1
        else:
            break
        if it.pool.sequences != [0, 1, 2]:
            assert not undo
            continue
        if it.pool.length(batch[0]) == len(it.pasts[batch[0]]):
            assert it.look() == before
            assert it.pool._batch == known[1]
        else:  # all had been committed
            assert it.pool.length(batch[0]) == len(it.pasts[batch[0]]) + len(tokens[0])
    assert failed > 30
    it.pasts = [[*past, *tokens[batch.index(s)]] if s in batch else past for s, past in enumerate(it.pasts)]
    it.check()


@pytest.mark.parametrize("form", FORMS)
def test_a_layer_that_failed_is_run_again(form: str) -> None:
    """Ctrl-C at each line of one layer of a step that folds, or overwrites: the layer goes back, and runs."""
    for tokens in ([[9, 10, 11]], [list(range(9, 18))]):
        it = Filled(form)
        it.pool.begin(len(tokens[0]), [2])
        original = copy.deepcopy(it.pool)
        for line in range(1, 5000):
            it.pool = copy.deepcopy(original)
            step = it.pool._step
            assert step is not None
            try:
                with failing_at(line, KeyboardInterrupt):
                    it.layer(0, tokens)
            except KeyboardInterrupt:
                args = it.inputs(0, tokens)
                x = args.pop("x")
                if 0 in step.conv_todo:
                    it.pool.conv_inputs(x)
                if 0 in step.todo:
                    it.pool.run(**args)
                it.layer(1, tokens)
                it.pool.commit(len(tokens[0]))
                it.model.check(it.pool, 2, [*it.pasts[2], *tokens[0]])
            else:
                break


@pytest.mark.parametrize("form", FORMS)
def test_a_bare_rollback_after_a_cancel_is_of_the_step_before(form: str) -> None:
    it = Filled(form)
    it.run([0], [[9, 10]])
    it.pool.begin(1, [2])
    it.pool.cancel()
    it.pool.rollback(1)
    assert [it.pool.length(s) for s in range(3)] == [6, 5, 3]


@pytest.mark.parametrize("form", FORMS)
def test_a_number_given_out_again_is_another_sequence(form: str) -> None:
    it = Filled(form)
    it.run([0], [[9, 10]])
    it.pool.free(0)
    assert it.pool.fork(1) == 0
    with pytest.raises(ValueError, match="rollback: requires at least one sequence"):
        it.pool.rollback(1)
    assert it.pool.length(0) == 5


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("device", FRAMEWORKS)
def test_the_block_of_a_step(form: str, device: Any) -> None:
    it = Filled(form, device=device)
    before = it.look()

    def fails(tokens: list[int], layers: int, keep: int | None = None) -> None:
        with it.pool.step(len(tokens), [0, 2]):
            for layer in range(layers):
                it.layer(layer, [tokens] * 2)
            if keep is not None:
                it.pool.commit(keep)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails(list(range(9, 18)), 1)
    assert it.look() == before
    with it.pool.step(2, [0]) as pool:
        for layer in range(LAYERS):
            it.layer(layer, [[9, 10]])
        pool.commit(1)
    it.pasts[0] = [*it.pasts[0], 9]
    it.check()
    committed = it.look()
    with pytest.raises(ZeroDivisionError):
        fails([9], LAYERS)
    with pytest.raises(ZeroDivisionError):
        fails([9], LAYERS, 0)
    assert it.look() == committed
    it.pool.begin(1)
    with pytest.raises(ValueError, match="begin: requires that all layers have run"), it.pool.step(1):
        pass
    assert it.pool._step is not None
    it.pool.cancel()


@pytest.mark.parametrize("form", FORMS)
def test_without_undo_a_cancel_ends_what_it_cannot_put_back(form: str) -> None:
    it = Filled(form)
    state = raw(it.pool.state(1))
    it.pool.begin(9, [0, 2], undo=False)
    assert it.pool.cancel() == []
    it.pool.begin(1, [0, 2], record=False, undo=False)
    it.layer(0, [[9], [10]])
    ended = it.pool.cancel()
    # sequence 0 shares its state with 1: it wrote elsewhere
    assert ended == ([2] if form == "slots" else [0, 2])
    assert it.pool.sequences == sorted({0, 1, 2} - set(ended))
    assert raw(it.pool.state(1)) == state
    for _ in ended:
        it.pool.new()


@pytest.mark.parametrize("form", FORMS)
def test_copies_for_cancel_are_kept_as_long_as_steps_need_them(form: str) -> None:
    it, state = Filled(form, 1), LAYERS * HV * K * V * 4
    it.run([1, 2], [[9], [10]])  # one of them shares its state, and writes elsewhere
    assert it.pool.nbytes()["states"] == (3 + 1) * state
    it.run([0, 1, 2], [[9], [10], [11]])
    assert it.pool.nbytes()["states"] == (3 + 3) * state
    for _ in range(2):  # the first may be followed by another that needs them
        it.run([0, 1], [[9], [10]], undo=False)
    assert it.pool.nbytes()["states"] == 3 * state
    it.check()


@pytest.mark.parametrize("device", FRAMEWORKS)
@pytest.mark.parametrize("form", FORMS)
def test_a_place_given_out_again_keeps_nothing_of_who_had_it(form: str, device: Any) -> None:
    """The engines' common fault with recurrent states: NaN stands wherever a new sequence has written nothing."""
    it = Filled(form, device=device)
    saved = it.pool.save(2)
    for s in it.pool.sequences:
        it.pool.free(s)
    arrays = [it.pool._form.rows.states] if form == "slots" else [it.pool._form.states, *it.pool._form.arrays]
    for x in (*arrays, it.pool._conv):
        x[...] = float("nan")
    assert it.pool.new() == 0
    assert it.pool.restore(saved) == 1
    assert it.pool.fork(1) == 2
    it.pasts = [[], [6, 7, 8], [6, 7, 8]]
    for tokens in ([[1], [2], [3]], [[4, 5, 6]] * 3, [list(range(9))] * 3):
        it.run([0, 1, 2], tokens)
        it.check()


# ---- refused calls


@pytest.mark.parametrize("device", FRAMEWORKS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("change", [
    {"heads": "tiled", "k": 3}, {"heads": "sorted"}, {"heads": "tiled", "beta": 0}, {"scale": "much"},
    {"decay": "raw"}, {"A_log": "none"}, {"mask": 3}, {"q": None}, {"state_layout": "vk"}, {"backend": "cuda"},
    {"state_indices": [0]}, {"made_up": 1},
])  # fmt: skip
def test_a_refused_run_changes_nothing(change: dict[str, Any], form: str, device: Any) -> None:
    for tokens in ([[9, 10, 11]], [list(range(9, 18))]):
        it = Filled(form, 4, 3, device=device)
        it.pool.begin(len(tokens[0]), [2])
        args: dict[str, Any] = it.inputs(0, tokens)
        del args["x"]
        args |= change
        if "k" in change:
            args["k"] = it.inputs(0, tokens)["k"][..., : change["k"]]
        if "beta" in change:
            args["beta"] = it.inputs(0, tokens)["beta"][:, :, :0]
        before = everything(it.pool)
        with pytest.raises((ValueError, TypeError)):
            it.pool.run(**args)
        assert everything(it.pool) == before
        it.pool.cancel()
        it.pool.begin(len(tokens[0]), [2])
        for layer in range(LAYERS):
            it.layer(layer, tokens)
        it.pool.commit(len(tokens[0]))
        it.model.check(it.pool, 2, [*it.pasts[2], *tokens[0]])


def test_heads_of_a_cancelled_step_bind_nobody() -> None:
    pool = StatePool(1, H=1, HV=2, K=4, V=4, snapshots=5, form="log")
    pool.new()
    x, g = np.ones((1, 2, 2, 4), np.float32), np.zeros((1, 2, 2), np.float32)
    pool.begin(2)
    pool.run(x[:, :, :1], x[:, :, :1], x, g=g, beta=g, heads="tiled")
    pool.cancel()
    pool.begin(2)
    pool.run(x[:, :, :1], x[:, :, :1], x, g=g, beta=g)
    pool.begin(1)
    with pytest.raises(ValueError, match="heads='interleaved' as in the pool's log"):
        pool.run(x[:, :1, :1], x[:, :1, :1], x[:, :1], g=g[:, :1], beta=g[:, :1], heads="tiled")


@pytest.mark.parametrize("device", FRAMEWORKS)
@pytest.mark.parametrize("form", FORMS)
def test_a_failed_restore_leaks_no_place(form: str, device: Any) -> None:
    it = Filled(form, device=device)
    good = it.pool.save(2)
    it.pool.free(2)
    before = everything(it.pool)
    texts = np.full(good.states.shape, "a")
    for bad in (
        Checkpoint(texts, good.conv, "kv", 3), Checkpoint(good.states, texts, "kv", 3),
        Checkpoint(good.states, None, "kv", 3), Checkpoint(good.states, good.conv, "vk", 3),
        Checkpoint(good.states, good.conv, "kv", -1), Checkpoint(good.states > 0, good.conv, "kv", 3),
        Checkpoint(good.states, good.conv, "kv", None), None, Checkpoint(None, good.conv, "kv", 3),
    ):  # fmt: skip
        with pytest.raises((ValueError, TypeError), match=r"StatePool.restore: requires"):
            it.pool.restore(bad)  # type: ignore[arg-type]
        assert everything(it.pool) == before
    assert it.pool.restore(good) == 2
    it.check()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_checkpoints_go_between_numpy_and_torch(form: str, dtype: str) -> None:
    for source, target in ((None, "cpu"), ("cpu", None)):
        pools = [make(form, dtype=dtype, conv_dtype=dtype, device=d) for d in (source, target)]
        pools[0].new()
        ones = np.full((1, LAYERS, HV, K, V), 0.3, np.float32)
        saved = pools[0].save(0)
        saved = Checkpoint(saved.states + pools[0]._like(ones[0]).astype(saved.states.dtype)
                         if source is None else saved.states + torch.from_numpy(ones[0]).to(saved.states.dtype),
                         saved.conv, "kv", 3)  # fmt: skip
        s = pools[1].restore(saved)
        got, want = (np.asarray(x.float() if isinstance(x, torch.Tensor) else x).astype(np.float32)
                     for x in (pools[1].state(s), saved.states))  # fmt: skip
        assert np.array_equal(got, want)
        assert want.any()


@pytest.mark.parametrize("form", FORMS)
def test_what_is_recorded_has_no_gradient(form: str) -> None:
    it = Filled(form, device="cpu")
    x = torch.ones(1, 1, C, requires_grad=True)
    it.pool.begin(1, [0])
    window = it.pool.conv_inputs(x)
    assert it.pool._conv is not None
    assert not it.pool._conv.requires_grad
    window.sum().backward()
    assert x.grad is not None
    with pytest.raises(TypeError, match="conv_inputs: x must be a tensor"):
        it.pool.conv_inputs(np.ones((1, 1, C), np.float32), layer=1)
    it.pool.cancel()


# ---- copies


@pytest.mark.skipif(bool(CPU_REASONS), reason="; ".join(map(str, CPU_REASONS)))
@pytest.mark.parametrize("device", FRAMEWORKS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_copy_shares_nothing(how: str, form: str, device: Any, dtype: str) -> None:
    """Before the first step, between steps, and within one."""
    it = Filled(form, device=device) if dtype == "float32" else _rounded(form, device)
    pool = it.pool
    pools = [make(form, device=device, dtype=dtype), pool, copy.deepcopy(pool)]
    pools[0].new()
    pools[2].begin(9, [1])
    tokens = [list(range(9, 18))]
    it.pool = pools[2]
    it.layer(0, tokens)
    for one in pools:
        other = COPIES[how](one)
        before = everything(one)
        assert everything(other) == before
        it.pool = other
        if one is pools[2]:
            it.layer(1, tokens)
            back = COPIES[how](one)
            assert back.cancel() == []
            assert everything(back)[2] != everything(other)[2]
            other.commit(7)
        other.begin(1)
        for layer in range(LAYERS):
            it.layer(layer, [[9]] * len(other.sequences))
        other.fold()
        for s in other.sequences:
            other.free(s)
        assert everything(one) == before
        assert everything(other)[2] != before[2]


def test_pickles_go_on_in_another_process(tmp_path: Any) -> None:
    """From within a step, in both forms and both frameworks."""
    pools, tokens = [Filled(form, device=device) for form in FORMS for device in FRAMEWORKS], [[9, 10, 11]]
    for it in pools:
        it.pool.begin(3, [2])
        it.layer(0, tokens)
    (tmp_path / "pools").write_bytes(pickle.dumps([(it.pool, it.inputs(1, tokens)) for it in pools]))
    code = """
import pickle, sys, numpy as np
for pool, args in pickle.loads(open(sys.argv[1], "rb").read()):
    pool.conv_inputs(args.pop("x"), layer=1)
    pool.run(**args, layer=1)
    pool.commit(2)
    sys.stdout.buffer.write(np.asarray(pool.state(2)).tobytes())
"""
    found = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "pools"], capture_output=True, check=True
    ).stdout
    for it in pools:
        it.layer(1, tokens)
        it.pool.commit(2)
    assert found == b"".join(raw(it.pool.state(2)) for it in pools)


@pytest.mark.parametrize("form", FORMS)
def test_copies_are_used_by_threads_at_once(form: str) -> None:
    it = Filled(form, device="cpu")
    pools = [copy.deepcopy(it.pool) for _ in range(4)]
    states: list[bytes] = []

    def work(pool: StatePool) -> None:
        mine = copy.copy(it)
        mine.pool = pool
        for token in range(10):
            with pool.step(2, [0, 2]):
                for layer in range(LAYERS):
                    mine.layer(layer, [[token, 5], [3, token]])
                pool.commit([1, 2])
        states.append(raw(pool.state(0)) + raw(pool.state(2)))

    threads = [threading.Thread(target=work, args=(p,)) for p in pools]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(states) == 4
    assert len(set(states)) == 1
