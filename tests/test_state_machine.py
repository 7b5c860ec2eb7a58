"""StatePool as hypothesis drives it: any calls in any order, failures anywhere, against lists of tokens.

The model of a sequence is the tokens that it must have seen; float64 says what state that is. What a call must leave
alone is compared bit for bit. ANYDELTA_STATE_MACHINE=2000 runs so many examples, of other seeds each time.
"""

from __future__ import annotations

import contextlib
import copy
import io
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from anydelta import Checkpoint, StatePool, state
from anydelta.rule import reference
from test_state import HV, LAYERS, C, H, K, Model, V, W, make

EXAMPLES = int(os.environ.get("ANYDELTA_STATE_MACHINE", "0"))
LIMIT = {"float32": 1e-7, "bfloat16": 1e-4}
"""NMSE of states and outputs; one token too many or too few is above 1e-3."""
LENGTHS = (1, 1, 2, 2, 3, 3, 4, 5, 7, 10)
HERE = os.path.dirname(str(state.__file__))


@contextlib.contextmanager
def failing_at(line: int, error: type[BaseException]) -> Iterator[None]:
    """Raise at the n-th line that runs of the pool's own code: Ctrl-C, or no memory left, at any place."""
    left = line

    def in_pool(frame: Any, event: str, arg: Any) -> Any:
        nonlocal left
        if event == "line":
            left -= 1
            if left == 0:
                raise error("from the test")
        return in_pool

    def any_call(frame: Any, event: str, arg: Any) -> Any:
        return in_pool if frame.f_code.co_filename.startswith(HERE) else None

    before = sys.gettrace()
    sys.settrace(any_call)
    try:
        yield
    finally:
        sys.settrace(before)


class Exact:
    """All layers' states and outputs after any list of tokens, in float64."""

    def __init__(self, model: Model):
        self.model = model
        self.known: dict[tuple[int, ...], tuple[np.ndarray, np.ndarray]] = {
            (): (np.zeros((LAYERS, HV, K, V)), np.zeros((LAYERS, HV, V)))
        }

    def __call__(self, tokens: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """State [LAYERS, HV, K, V] after these tokens, and the output [LAYERS, HV, V] of the last."""
        key = tuple(tokens)
        if key not in self.known:
            before, _ = self(tokens[:-1])
            a = {
                n: getattr(self.model, n)[:, tokens[-1:]].astype(np.float64)
                for n in ("q", "k", "v", "g", "beta")
            }
            q, k, v = a.pop("q"), a.pop("k"), a.pop("v")
            out = reference.gated_delta_rule(q, k, v, **a, initial_state=before)
            self.known[key] = out.state, out.o[:, 0]
        return self.known[key]


def close(got: Any, want: np.ndarray, limit: float, size: float | None = None) -> bool:
    """Whether the error is within the limit of `size`, or of what is wanted: sums of squares."""
    got = np.asarray(got.float() if isinstance(got, torch.Tensor) else got).astype(np.float64)
    size = float(np.sum(want**2)) if size is None else size
    return got.shape == want.shape and bool(np.sum((got - want) ** 2) <= limit * size + 1e-30)


def raw(x: Any) -> bytes:
    x = x.contiguous().view(torch.uint8).numpy() if isinstance(x, torch.Tensor) else x
    return bytes(np.ascontiguousarray(x).tobytes())


def books(pool: StatePool) -> Any:
    return [
        (tuple(s.rows), s.pending, s.length, s.conv_end) if s else None for s in pool._sequences
    ], pool._batch


def everything(pool: StatePool) -> Any:
    """What the pool knows and every byte that it holds."""
    form = pool._form
    arrays = [form.rows.states] if pool.form == "slots" else [form.states, *form.arrays]
    step = getattr(pool, "_step", None)
    running = None if step is None else (sorted(step.todo), sorted(step.conv_todo))
    return books(pool), running, [raw(x) for x in (*arrays, pool._conv)], getattr(form, "order", None)


def through_torch(pool: StatePool) -> Any:
    file = io.BytesIO()
    torch.save(pool, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


COPIES: dict[str, Callable[[StatePool], Any]] = {
    "deepcopy": copy.deepcopy, "copy": copy.copy, "pickle": lambda p: pickle.loads(pickle.dumps(p)),
    "torch.save": through_torch,
}  # fmt: skip


class Pools(RuleBasedStateMachine):
    """The pool, the tokens of each sequence, and the step that runs."""

    @initialize(
        form=st.sampled_from(state.FORMS), dtype=st.sampled_from(["float32", "bfloat16"]),
        device=st.sampled_from([None, "cpu"]), layout=st.sampled_from(["kv", "vk"]), kda=st.booleans(),
        snapshots=st.sampled_from([4, 6, 5, 3, 2, 1]), capacity=st.integers(1, 4),
        backend=st.sampled_from(["auto", "auto", "reference"]), seed=st.integers(0, 9),
    )  # fmt: skip
    def start(self, form: str, dtype: str, device: Any, layout: str, kda: bool, snapshots: int, capacity: int,
              backend: str, seed: int) -> None:  # fmt: skip
        self.model = Model(seed, kda=kda)
        self.exact = Exact(self.model)
        self.limit = LIMIT[dtype]
        self.pool = make(
            form,
            snapshots,
            capacity,
            dtype=dtype,
            device=device,
            state_layout=layout,
            kda=kda,
            backend=backend,
        )
        self.past: dict[int, list[int]] = {self.pool.new(): []}
        self.pending: dict[int, int] = {0: 0}
        self.saved: list[tuple[Checkpoint, list[int]]] = []
        self.step: dict[str, Any] | None = None
        self.copies = 0

    # ---- looking

    def look(self, s: int) -> tuple[Any, ...]:
        """A sequence of a pool that is at rest: how far it is, its state, and the window of its convolution."""
        pool = self.pool
        end = pool._sequences[s].conv_end  # type: ignore[union-attr]
        assert pool._conv is not None
        return pool.length(s), raw(pool.state(s)), raw(pool._conv[:, s, end - W + 1 : end])

    def idle(self) -> bool:
        return self.step is None

    def running(self) -> bool:
        return self.step is not None

    def some(self) -> bool:
        return self.step is None and bool(self.past)

    def one(self, data: Any, of: Any = None) -> int:
        return int(data.draw(st.sampled_from(sorted(self.past if of is None else of)), label="sequence"))

    def batch(self, data: Any) -> list[int]:
        return [int(s) for s in data.draw(st.permutations(sorted(self.past)))][: data.draw(st.integers(1, 4))]

    @invariant()
    def all_is_where_it_should_be(self) -> None:
        if self.step is not None or not hasattr(self, "pool"):
            return
        assert self.pool.sequences == sorted(self.past)
        for s, tokens in self.past.items():
            self.check(self.pool, s, tokens)

    def check(self, pool: StatePool, s: int, tokens: list[int]) -> None:
        got = pool.state(s)
        want, _ = self.exact(tokens)
        assert close(got, want if pool.state_layout == "kv" else want.swapaxes(-1, -2), self.limit)
        assert pool.length(s) == len(tokens)
        assert 0 <= pool.recorded(s) <= min(pool.snapshots - 1, len(tokens))
        end = pool._sequences[s].conv_end  # type: ignore[union-attr]
        assert pool._conv is not None
        seen = np.concatenate([np.zeros((LAYERS, W - 1, C), np.float32), self.model.x[:, tokens]], 1)[
            :, -(W - 1) :
        ]
        assert np.array_equal(np.asarray(pool._conv[:, s, end - W + 1 : end]), seen)

    # ---- between steps; each is tried with an error at some line first

    def change(self, data: Any, call: Callable[[], Any]) -> Any:
        """Run the call, which an error may end first: then all is as it was, or done."""
        if data.draw(st.integers(0, 3), label="with an error") == 3:
            before, known = {s: self.look(s) for s in self.past}, everything(self.pool)[0]
            line = data.draw(st.integers(1, 120), label="at line")
            error = data.draw(st.sampled_from([KeyboardInterrupt, MemoryError]))
            try:
                with failing_at(line, error):
                    return call()
            except (KeyboardInterrupt, MemoryError):
                if everything(self.pool)[0] != known:
                    return None  # the caller looks at what has become
                assert {s: self.look(s) for s in self.past} == before
        return call()

    @precondition(idle)
    @rule(data=st.data())
    def new(self, data: Any) -> None:
        if len(self.past) == self.pool.capacity:
            self.refused(lambda: self.pool.new(), "free place")
            return
        self.change(data, self.pool.new)
        (s,) = set(self.pool.sequences) - set(self.past)
        self.past[s], self.pending[s] = [], 0

    @precondition(some)
    @rule(data=st.data())
    def fork(self, data: Any) -> None:
        parent = self.one(data)
        if len(self.past) == self.pool.capacity:
            self.refused(lambda: self.pool.fork(parent), "free place")
            return
        self.change(data, lambda: self.pool.fork(parent))
        (s,) = set(self.pool.sequences) - set(self.past)
        self.past[s], self.pending[s] = list(self.past[parent]), self.pending[parent]
        assert self.look(s) == self.look(parent)
        assert self.pool.recorded(s) == self.pool.recorded(parent)

    @precondition(some)
    @rule(data=st.data())
    def free(self, data: Any) -> None:
        s = self.one(data)
        self.change(data, lambda: self.pool.free(s))
        del self.past[s], self.pending[s]

    @precondition(some)
    @rule(data=st.data())
    def select(self, data: Any) -> None:
        targets = self.batch(data)
        parents = [self.one(data) for _ in targets]
        looked = [self.look(p) for p in parents]
        self.change(data, lambda: self.pool.select(parents, targets))
        for mine in (self.past, self.pending):
            mine |= dict(zip(targets, [copy.copy(mine[p]) for p in parents], strict=True))  # type: ignore[attr-defined]
        assert [self.look(t) for t in targets] == looked

    @precondition(some)
    @rule(data=st.data())
    def save(self, data: Any) -> None:
        s = self.one(data)
        if self.pending[s]:
            self.refused(lambda: self.pool.save(s), "committed sequence")
        else:
            self.saved.append((self.pool.save(s), list(self.past[s])))

    @precondition(lambda self: self.idle() and self.saved)
    @rule(data=st.data())
    def restore(self, data: Any) -> None:
        snapshot, tokens = data.draw(st.sampled_from(self.saved), label="snapshot")
        if len(self.past) == self.pool.capacity:
            self.refused(lambda: self.pool.restore(snapshot), "free place")
            return
        self.change(data, lambda: self.pool.restore(snapshot))
        (s,) = set(self.pool.sequences) - set(self.past)
        self.past[s], self.pending[s] = list(tokens), 0
        assert raw(self.pool.state(s)) == raw(snapshot.states)

    @precondition(some)
    @rule(data=st.data())
    def fold(self, data: Any) -> None:
        batch = self.batch(data)
        looked = [self.look(s) for s in batch]
        self.change(data, lambda: self.pool.fold(batch))
        assert [self.look(s)[0] for s in batch] == [was[0] for was in looked]
        if not any(self.pending.values()):
            assert [self.look(s) for s in batch] == looked

    @precondition(some)
    @rule(data=st.data())
    def rollback(self, data: Any) -> None:
        batch = self.batch(data)
        if data.draw(st.integers(0, 3)) == 0:
            too_far = [self.pool.recorded(s) + 1 for s in batch]
            self.refused(lambda: self.pool.rollback(too_far, batch), "way back")
            return
        back = [data.draw(st.integers(0, self.pool.recorded(s)), label="back") for s in batch]
        self.change(data, lambda: self.pool.rollback(back, batch))
        for s, n in zip(batch, back, strict=True):
            self.past[s] = self.past[s][: len(self.past[s]) - n]
            self.pending[s] = 0

    @precondition(lambda self: self.idle() and any(self.pending.values()))
    @rule(data=st.data())
    def commit(self, data: Any) -> None:
        batch = [s for s, n in self.pending.items() if n]
        least = [max(0, self.pending[s] - self.pool.recorded(s)) for s in batch]
        kept = [
            data.draw(st.integers(n, self.pending[s]), label="kept")
            for n, s in zip(least, batch, strict=True)
        ]
        self.change(data, lambda: self.pool.commit(kept, batch))
        for s, n in zip(batch, kept, strict=True):
            self.past[s] = self.past[s][: len(self.past[s]) - self.pending[s] + n]
            self.pending[s] = 0
        self.refused(lambda: self.pool.commit(0, batch), "since the last commit")

    # ---- a step

    @precondition(some)
    @rule(data=st.data())
    def begin(self, data: Any) -> None:
        batch = [s for s in self.batch(data) if len(self.past[s]) < 40]
        if not batch:
            return
        n = data.draw(st.sampled_from(LENGTHS), label="tokens")
        equal = data.draw(st.integers(0, 2), label="all alike") > 0
        each = [n] * len(batch) if equal else [data.draw(st.integers(0, n)) for _ in batch]
        if not any(each):
            return
        how: dict[str, Any] = {"record": data.draw(st.integers(0, 3), label="record") < 3}
        if data.draw(st.integers(0, 3), label="undo") == 3:
            how["undo"] = False
        tokens = [
            data.draw(st.lists(st.integers(0, 63), min_size=n, max_size=n), label="which") for n in each
        ]
        before = {s: (self.look(s), self.pool.recorded(s)) for s in self.past}
        known = everything(self.pool)

        def start() -> None:
            self.pool.begin(n if equal else each, batch, **how)

        room = self.pool.snapshots - 1
        if self.pool.form == "log" and any(
            self.pending[s] and t and (not how["record"] or self.pending[s] + t > room)
            for s, t in zip(batch, each, strict=True)
        ):
            self.refused(start, "Commit first")
            return
        self.change_or_cancel(data, start)
        assert everything(self.pool)[2] == known[2]  # no array is touched until a layer runs
        self.step = {
            "batch": batch, "tokens": tokens, "equal": equal, "before": before, "known": known,
            "conv": set(range(LAYERS)), "run": set(range(LAYERS)), "touched": set(),
        } | how  # fmt: skip
        for _ in range(data.draw(st.sampled_from([0, 1, 2, 3, 4]), label="calls")):
            if self.step is not None:
                self.layer(data)
        then = data.draw(st.sampled_from(["commit", "finish", "cancel", "leave"]), label="then")
        if self.step is None or then == "leave":
            return
        if then == "cancel":
            self.cancel()
            return
        self.finish()
        if then == "commit" and any(self.pending.values()):
            self.commit(data)

    def change_or_cancel(self, data: Any, start: Callable[[], None]) -> None:
        known = everything(self.pool)
        if data.draw(st.integers(0, 3), label="with an error") == 3:
            try:
                with failing_at(data.draw(st.integers(1, 120), label="at line"), KeyboardInterrupt):
                    start()
            except KeyboardInterrupt:
                pass
            if everything(self.pool)[0] != known[0]:
                self.pool.cancel()
            assert everything(self.pool)[2:] == known[2:]
            assert books(self.pool) == known[0]
        start()

    def inputs(self, layer: int, names: tuple[str, ...]) -> dict[str, Any]:
        assert self.step is not None
        index = np.array([t for row in self.step["tokens"] for t in row], np.int64)
        index = index.reshape(len(self.step["tokens"]), -1) if self.step["equal"] else index[None]
        args = {n: getattr(self.model, n)[layer][index] for n in names}
        return args if self.pool.device is None else {n: torch.from_numpy(a) for n, a in args.items()}

    def convolve(self, layer: int) -> None:
        assert self.step is not None
        windows = self.pool.conv_inputs(**self.inputs(layer, ("x",)), layer=layer)
        for i, (s, tokens) in enumerate(zip(self.step["batch"], self.step["tokens"], strict=True)):
            seen = np.concatenate(
                [np.zeros((W - 1, C), np.float32), self.model.x[layer][[*self.past[s], *tokens]]]
            )
            assert np.array_equal(np.asarray(windows[i]), seen[len(self.past[s]) :])

    def rule_of(self, layer: int) -> None:
        assert self.step is not None
        o = self.pool.run(**self.inputs(layer, ("q", "k", "v", "g", "beta")), layer=layer)
        rows, at = o.reshape(-1, HV, V), 0
        for s, tokens in zip(self.step["batch"], self.step["tokens"], strict=True):
            for t in range(len(tokens)):
                S, want = self.exact([*self.past[s], *tokens[: t + 1]])
                q = self.model.q[
                    layer, tokens[t]
                ]  # o = S^T q: what cancels in the sum is rounded all the same
                assert close(
                    rows[at], want[layer], self.limit, float(np.sum(S[layer] ** 2) * np.sum(q**2) / K)
                )
                at += 1

    @precondition(running)
    @rule(data=st.data())
    def layer(self, data: Any) -> None:
        """One call of a layer that has not run, which an error may end."""
        assert self.step is not None
        left = [("conv", i) for i in sorted(self.step["conv"])] + [
            ("run", i) for i in sorted(self.step["run"])
        ]
        if not left:
            return
        what, layer = data.draw(st.sampled_from(left), label="call")
        self.step["touched"].add(layer)
        call = self.convolve if what == "conv" else self.rule_of
        if data.draw(st.integers(0, 2), label="with an error") == 2:
            line = data.draw(st.integers(1, 200), label="at line")
            error = data.draw(st.sampled_from([KeyboardInterrupt, MemoryError]))
            try:
                with failing_at(line, error):
                    call(layer)
            except (KeyboardInterrupt, MemoryError):
                if self.step.get("undo", True) is False or data.draw(st.booleans(), label="then cancel"):
                    self.cancel()
                    return
                step = self.pool._step
                assert step is not None
                if layer in (step.conv_todo if what == "conv" else step.todo):
                    call(layer)
        else:
            call(layer)
        self.step[what].discard(layer)

    @precondition(running)
    @rule()
    def finish(self) -> None:
        assert self.step is not None
        for layer in sorted(self.step["conv"]):
            self.convolve(layer)
        for layer in sorted(self.step["run"]):
            self.rule_of(layer)
        for s, tokens in zip(self.step["batch"], self.step["tokens"], strict=True):
            self.past[s] = [*self.past[s], *tokens]
            if tokens:
                self.pending[s] = self.pending[s] + len(tokens) if self.step["record"] else 0
        for s in self.past.keys() - set(self.step["batch"]):
            assert (self.look(s), self.pool.recorded(s)) == self.step["before"][s]
        self.step = None

    @precondition(running)
    @rule()
    def cancel(self) -> None:
        assert self.step is not None
        step, self.step = self.step, None
        lost = self.pool.cancel()
        if step.get("undo", True) or not step["touched"]:
            assert lost == []
        for s in lost:
            assert s in step["batch"]
            del self.past[s], self.pending[s]
        for s in self.past:
            looked, recorded = step["before"][s]
            assert self.look(s) == looked
            assert self.pool.recorded(s) <= recorded
            if s not in step["batch"] or not step["touched"]:
                assert self.pool.recorded(s) == recorded
        if not step["touched"]:
            assert everything(self.pool)[2:] == step["known"][2:]
        assert self.pool._batch == (step["known"][0][1] if not lost else self.pool._batch)
        self.refused(self.pool.cancel, "requires a begin")

    # ---- refused calls, copies

    def refused(self, call: Callable[[], Any], why: str) -> None:
        before = everything(self.pool)
        with pytest.raises((ValueError, TypeError), match=why or None):
            call()
        assert everything(self.pool) == before

    @rule(data=st.data())
    def nonsense(self, data: Any) -> None:
        """Calls that no pool takes, at any time."""
        pool = self.pool
        layer = data.draw(st.integers(-1, LAYERS))
        x = np.zeros((1, 1, C))
        calls: dict[str, Callable[[], Any]] = {
            "free": lambda: pool.free(99), "fork": lambda: pool.fork(-1), "state": lambda: pool.state("a"),  # type: ignore[arg-type]
            "no batch": lambda: pool.begin(1, []), "no number": lambda: pool.begin(1.5),  # type: ignore[arg-type]
            "a fraction": lambda: pool.begin(1, [0.5]), "negative": lambda: pool.begin(-1),  # type: ignore[list-item]
            "rollback": lambda: pool.rollback(-1), "commit": lambda: pool.commit([1.5]),  # type: ignore[list-item]
            "run": lambda: pool.run(None, None, None, g=None, beta=None, layer=layer),
            "list": lambda: pool.conv_inputs([[1.0]], layer=layer), "x": lambda: pool.conv_inputs(x[0], layer=layer),
            "no snapshot": lambda: pool.restore(3),  # type: ignore[arg-type]
            "states": lambda: pool.restore(Checkpoint(x, None, "kv", 1)),
            "parents": lambda: pool.select([0, 0, 0, 0, 0]),
        }  # fmt: skip
        self.refused(calls[data.draw(st.sampled_from(sorted(calls)), label="nonsense")], r"^StatePool\.\w+: ")

    @precondition(running)
    @rule(data=st.data())
    def refused_in_a_step(self, data: Any) -> None:
        assert self.step is not None
        pool, layers = self.pool, sorted(self.step["run"])
        calls: list[Callable[[], Any]] = [
            c for c, ready in ((pool.new, True), (lambda: pool.commit(0), True), (lambda: pool.begin(1), True))
            if ready and (layers or self.step["conv"])
        ]  # fmt: skip
        if layers:
            layer = data.draw(st.sampled_from(layers))
            args = self.inputs(layer, ("q", "k", "v", "g", "beta"))
            calls += [
                lambda: pool.run(**args | {"beta": args["beta"][:, :, :1]}, layer=layer),
                lambda: pool.run(**args | {"k": args["k"][..., :3]}, layer=layer),
                lambda: pool.run(**args, layer=layer, heads="sorted"),
                lambda: pool.run(**args, layer=layer, scale="much"),
                lambda: pool.run(**args, layer=layer, decay="raw"),
            ]
            if pool.form == "log":
                calls.append(lambda: pool.run(**args | {"k": args["k"][..., :3]}, layer=layer, heads="tiled"))
        if calls:
            self.refused(data.draw(st.sampled_from(calls)), "")

    @precondition(lambda self: self.copies < 6)
    @rule(how=st.sampled_from(sorted(COPIES)), keep=st.booleans(), data=st.data())
    def copied(self, how: str, keep: bool, data: Any) -> None:
        """Go on with a copy, or spoil it; the other does not notice."""
        self.copies += 1
        other = COPIES[how](self.pool)
        assert everything(other) == everything(self.pool)
        left, self.pool = (other, self.pool) if keep else (self.pool, other)
        before = everything(self.pool)
        self.spoil(left)
        assert everything(self.pool) == before

    def spoil(self, pool: StatePool) -> None:
        """Use everything that a pool has: all the way back, every place, another step."""
        lost = pool.cancel() if self.step is not None else []
        for s in pool.sequences:
            n = pool.recorded(s)
            pool.rollback(n, [s])
            if self.step is None or s not in self.step["batch"]:
                self.check(pool, s, self.past[s][: len(self.past[s]) - n])
        assert set(lost) <= set(self.past)
        for _ in range(pool.capacity - len(pool.sequences)):
            pool.new()
        with pytest.raises(ValueError, match="free place"):
            pool.new()
        pool.begin(10)
        rows = np.ones((pool.capacity, 10, H, K), np.float32)
        args: dict[str, Any] = {"q": rows, "k": rows, "v": np.ones((pool.capacity, 10, HV, V), np.float32)}
        args["g"] = -np.ones((pool.capacity, 10, HV, K) if pool.kda else (pool.capacity, 10, HV), np.float32)
        args |= {"beta": np.ones((pool.capacity, 10, HV), np.float32), "x": rows[..., 0, :C]}
        if pool.device is not None:
            args = {n: torch.from_numpy(np.ascontiguousarray(a)) for n, a in args.items()}
        for layer in range(LAYERS):
            pool.conv_inputs(args["x"], layer=layer)
            pool.run(**{n: a for n, a in args.items() if n != "x"}, layer=layer)


def test_any_calls_in_any_order() -> None:
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        Pools,
        settings=settings(
            max_examples=EXAMPLES or 150, stateful_step_count=40, deadline=None, database=None,
            derandomize=not EXAMPLES, suppress_health_check=list(HealthCheck), phases=[Phase.generate, Phase.shrink],
        ),
    )  # fmt: skip
