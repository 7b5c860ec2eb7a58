"""The log form of `StatePool`: one state per sequence, and for each token since an entry (k, d, a).

With the base state S0, entries s = 0 .. n-1 and A(s, t) the product of the decays a after s up to t:

    S_n = A(-1, n) S0 + sum_s A(s, n) k_s d_s^T

An entry is at most 2 K + V numbers; a state is K V. Verifying tokens reads the base state and appends entries. Going
back drops the newest entries. Committing costs nothing: a step that finds the log full folds committed entries into the
state while it reads it. Backends run tokens and folds (backends/NAME/log.py); this file does the book-keeping.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ..core import dispatch
from ..core.arguments import options_of
from ..core.arrays import Array
from ..core.plans import Rest, find, keep
from ..rule.arguments import Call, Options
from ..rule.op import _grad_enabled, _torch_side, gated_delta_rule_
from ..rule.spec import CallSpec, check_call, device_name, framework_of
from .base import Pool
from .log_spec import Fold, Index, LogBackend, LogSpec, LogSteps
from .sequence import LiveSequence, Saved, Sequences, Step, nbytes


class _Prepared(NamedTuple):
    """A call that the log takes."""

    backend: LogBackend
    plan: object
    spec: LogSpec


@dataclass
class _Plan:
    straight: list[int]
    """Per sequence: how many of the first tokens run on the state itself."""
    folds: list[Fold]
    """What is folded before a layer runs: first sequences whose state goes to another row, which others fold in
    place."""
    late: list[Fold]
    """What the kernel folds while it reads the state."""
    index: tuple[Array, ...]
    """[N] each: rows of the states, sequences, entries before the step, and whether the kernel folds them."""
    after: Index
    """The same after `late` was folded."""
    order: str | None
    """The log's `order` before the step."""
    overwritten: list[tuple[Array, list[int]]]
    """(array, its rows) that `folds` and the straight tokens change."""
    folded: dict[int, None] = field(default_factory=dict)
    """Layers in which `late` has been folded."""


class Log:
    """The form of StatePool with a log of C = `snapshots` - 1 entries per sequence.

    Attributes:
        states: [layers, capacity, HV, K, V] base states, rows that forks share until one of them folds.
        keys: [layers, capacity, H, C, K] as the caller gave them, in `key_dtype`; factors [.., H, C] of their norm.
        deltas, decays: [.., HV, C, V], and [.., HV, C] or [.., HV, C, K].
        parents: [capacity, C] the entry before each; a chain.
    """

    def __init__(self, pool: Pool, tail: tuple[int, ...]):
        self.pool = pool
        self.C = C = pool.snapshots - 1
        self.layers, self.key_dtype = pool.layers, pool.key_dtype
        self.P = pool.capacity
        n, N, H, HV, K, V = pool.layers, pool.capacity, pool.H, pool.HV, pool.K, pool.V
        self.states = pool._zeros((n, N, *tail))
        self.keys = pool._zeros((n, N, H, C, K), pool.key_dtype)
        self.factors = pool._zeros((n, N, H, C), "float32")
        self.deltas = pool._zeros((n, N, HV, C, V), "float32")
        self.decays = pool._zeros((n, N, HV, C, K) if pool.kda else (n, N, HV, C), "float32")
        self.arrays = (self.keys, self.factors, self.deltas, self.decays)
        self.parents = np.ascontiguousarray(np.broadcast_to(np.arange(C) - 1, (N, C)), np.int64)
        self.order: str | None = None  # which q/k head serves a value head: the `heads` of the first run
        self.saved = Saved()
        self.connect()

    def connect(self) -> None:
        """Set up what belongs to this process and these arrays, which must not move; a copy does this anew."""
        self.steps: dict[str, LogSteps] = {}
        chosen = dispatch.pick(LogSpec(self.rule(1), self.C, self.key_dtype), self.pool.backend)
        self.folds_late = chosen.folds_late
        self.folding = self._on(chosen)

    def _on(self, chosen: LogBackend) -> LogSteps:
        """This log on a backend."""
        found = self.steps.get(chosen.name)
        if found is None:
            found = self.steps[chosen.name] = chosen.attach(self)
        return found

    def rule(self, sequences: int) -> CallSpec:
        """A call in float32 without tokens, on the states of `sequences` sequences."""
        pool = self.pool
        dtype = "float64" if pool.dtype == "float64" else "float32"
        return CallSpec(
            B=sequences, T=0, H=pool.H, HV=pool.HV, K=pool.K, V=pool.V, N=sequences, P=pool.capacity, kda=pool.kda,
            dtype=dtype, state_dtype=pool.dtype, g_dtype=dtype, beta_dtype=dtype, scale=1.0, packed=False,
            pooled=False, masked=False, has_state=True, snapshots=0, inplace=True, requires_grad=False,
            framework=framework_of(self.states) or "", device=device_name(self.states),
            options=Options(state_layout=pool.state_layout, heads=self.order or "interleaved"),
        )  # fmt: skip

    def like(self, x: Array) -> Array:
        """A NumPy array as the pool's kind of array."""
        return self.pool._like(x)

    def explain(self) -> dispatch.Trace:
        """Which backend runs the steps of this log in float32, and why the others do not."""
        return dispatch.choose(LogSpec(self.rule(1), self.C, self.key_dtype), self.pool.backend)

    def __getstate__(self) -> dict[str, object]:
        return {
            name: x for name, x in self.__dict__.items() if name not in ("steps", "folds_late", "folding")
        }

    # ---- rows

    def write(self, row: int, states: Array) -> None:
        self.states[:, row] = states

    # ---- going back

    def recorded(self, s: LiveSequence) -> int:
        return s.used

    def take_back(self, s: LiveSequence, n: int) -> tuple[tuple[int, ...], int]:
        return s.rows, s.used - n

    # ---- a step

    def begin(self, step: Step, sequences: Sequences) -> None:
        """Decide where the step finds room: by folding committed entries, or on the state itself if its tokens are
        certain or more than the log holds. The layers carry it out; no array is touched here."""
        logged = self.C if step.record else 0
        straight = [max(0, n - logged) for n in step.lengths]
        full = []
        for place, n in zip(step.batch, step.lengths, strict=True):
            s = _get(sequences, place)
            if n and s.pending and (not step.record or s.pending + n > self.C):
                self.pool._fail(
                    "begin",
                    f"requires room for {n} more tokens of sequence {place} in its log; got {s.pending} pending of "
                    f"{self.C}. Commit first",
                )
            full.append(bool(n and (n > logged or s.used + n > self.C)))
        wanted = [place for place, yes in zip(step.batch, full, strict=True) if yes]
        alone = [place for place, n in zip(step.batch, straight, strict=True) if n]
        folds = self._folds(sequences, wanted, alone) if wanted else []
        # The kernel folds while it reads the state if the whole log is committed and no other sequence shares the
        # state.
        late: list[Fold] = []
        if folds and self.folds_late and not alone:
            holders = Counter(s.rows[0] for s in step.before if s)
            late = [f for f in folds if holders[f[1]] == 1 and not _get(sequences, f[0]).pending]
            folds = [f for f in folds if f not in late]
        folded = {place: n for place, _, _, n in folds}
        later = {place for place, *_ in late}
        rows, used, left = [], [], []
        for place, n, direct in zip(step.batch, step.lengths, straight, strict=True):
            s = _get(sequences, place)
            rows.append(s.rows[0])
            used.append(s.used - folded.get(place, 0))
            left.append(0 if place in later else used[-1])
            sequences[place] = s._replace(used=left[-1] + n - direct)
        flags = [int(place in later) for place in step.batch]
        index = tuple(np.array(x, np.int64) for x in (rows, step.batch, used, flags))
        after = (*index[:2], np.array(left, np.int64), np.zeros_like(index[3])) if late else index

        changed = list(dict.fromkeys([*folded, *alone]))
        moved = {place for place, row, to, _ in folds if row != to}
        states = [_get(sequences, place).rows[0] for place in changed if place not in moved]
        logs = [place for place in changed if _get(step.before, place).used]
        overwritten = [(self.states, states)] if states else []
        overwritten += [(x, logs) for x in self.arrays if logs]
        step.plan = _Plan(straight, folds, late, index, after, self.order, overwritten)
        if not (step.undo and overwritten):
            self.saved.not_needed()

    def _folds(self, sequences: Sequences, places: list[int], alone: list[int]) -> list[Fold]:
        """How to fold all committed entries of these sequences. A shared state moves to a new row, and its fold is the
        copy. Sequences in `alone` get their own row even if there is nothing to fold."""
        holders = Counter(s.rows[0] for s in sequences if s)
        unused = [row for row in range(self.P) if row not in holders]
        moved, own = [], []
        for place in places:
            s = _get(sequences, place)
            n = max(0, s.used - s.pending)  # pending ones may have run on the state itself
            row = s.rows[0]
            if holders[row] > 1 and (n or place in alone):
                holders[row] -= 1
                sequences[place] = s._replace(rows=(unused.pop(),))
                moved.append((place, row, _get(sequences, place).rows[0], n))
            elif n:
                own.append((place, row, row, n))
        return moved + own  # `own` writes rows that `moved` reads

    def cancel(self, step: Step, sequences: Sequences) -> list[int]:
        """Put states and logs back; `sequences` are those before the step. Returns those that are lost.

        Layers in which the kernel has folded stay folded, and the others follow: no token is lost, only the history."""
        plan: _Plan = step.plan
        for layer in step.saved:
            self.saved.restore(layer, plan.overwritten)
        self.order = plan.order
        for layer in range(self.pool.layers if plan.folded else 0):
            self._fold_late(plan, layer)
        for place, *_ in plan.late if plan.folded else []:
            sequences[place] = _get(sequences, place)._replace(used=0)
        if step.undo or not step.touched:
            return []
        return [
            p for p, n in zip(step.batch, plan.straight, strict=True) if n or p in [f[0] for f in plan.folds]
        ]

    def run(
        self, step: Step, layer: int, q: Array, k: Array, v: Array, *, g: Array, beta: Array,
        scale: float | None = None, decay: str = "log", A_log: Array = None, dt_bias: Array = None,
        lower_bound: float | None = None, beta_is_logit: bool = False, heads: str = "interleaved",
        qk_l2norm: bool = False, qk_l2norm_eps: float = 1e-6, mask: Array = None,
    ) -> Array:  # fmt: skip
        pool, plan = self.pool, step.plan
        options = Options(
            "gated_delta_rule_", scale, decay, lower_bound, beta_is_logit, heads, qk_l2norm, qk_l2norm_eps,
            pool.state_layout, True,
        )  # fmt: skip
        call = Call(q, k, v, g, beta, A_log=A_log, dt_bias=dt_bias, mask=mask, cu_seqlens=step.cu)
        if self.order not in (None, heads):
            pool._fail("run", f"requires heads={self.order!r} as in the pool's log; got heads={heads!r}")
        straight = any(plan.straight)
        if straight:
            self._checked(layer, call, options, plan.index[0])
        else:
            prepared = self._plan(layer, call, options, plan.index[0])
        step.touched.add(layer)
        try:
            if plan.folds or plan.overwritten:
                self._make_room(step, layer)
            if straight:
                o = self._by_parts(step, layer, call, options)
            else:
                if plan.late and not prepared[0].folds_late:
                    self._fold_late(plan, layer)
                folded = layer in plan.folded
                index, folding = (
                    (plan.after, None) if folded else (plan.index, plan.folded if plan.late else None)
                )
                o = self._verify(layer, call, prepared, index, folding)
        except BaseException:
            if layer in step.saved:
                self.saved.restore(layer, plan.overwritten)
            raise
        self.order = heads
        return o

    def _make_room(self, step: Step, layer: int) -> None:
        if layer in step.saved:  # a second attempt
            self.saved.restore(layer, step.plan.overwritten)
        elif step.undo:
            self.saved.save(layer, step.plan.overwritten)
            step.saved.add(layer)
        self._fold_and_move(step.plan.folds, layer, step.before)

    def _checked(self, layer: int, call: Call, options: Options, base: Array) -> CallSpec:
        call.state_in, call.state_indices = self.states[layer], self.pool._index(base)
        spec = check_call(call, options, inplace=True, grad_enabled=_grad_enabled(call.q))
        pool = self.pool
        if spec.framework == "torch" and _torch_side().watched(*(getattr(call, n) for n in Call.__slots__)):
            raise dispatch.UnsupportedError(
                "StatePool.run: a log requires plain tensors that no tracer, mode or transform follows; got others. "
                'form="slots" takes them'
            )
        want = (pool.H, pool.HV, pool.K, pool.V, pool.kda)
        got = (spec.H, spec.HV, spec.K, spec.V, spec.kda)
        if got != want:
            pool._fail("run", f"requires H, HV, K, V, kda = {want} as the pool's log has; got {got}")
        if pool.key_dtype not in ("float32", spec.dtype):
            pool._fail("run", f"requires k in {pool.key_dtype}, the pool's key_dtype; got {spec.dtype}")
        return spec

    def _by_parts(self, step: Step, layer: int, call: Call, options: Options) -> Array:
        """Steps of certain tokens, or longer than the log: the first tokens run on the state, sequence by sequence."""
        pool, plan = self.pool, step.plan
        o = _like_v(call)
        flags = options_of(options, "output_final_state")
        start = 0
        for i, (n, straight) in enumerate(zip(step.lengths, plan.straight, strict=True)):
            at = (slice(0, 1), start, start + n) if step.cu is not None else (slice(i, i + 1), 0, n)
            start += n
            middle = at[1] + straight

            inputs = (call.q, call.k, call.v, call.g, call.beta, call.mask)
            if straight:
                q, k, v, g, beta, mask = (None if x is None else x[at[0], at[1] : middle] for x in inputs)
                o[at[0], at[1] : middle] = gated_delta_rule_(
                    q, k, v, call.state_in, g=g, beta=beta, mask=mask, A_log=call.A_log, dt_bias=call.dt_bias,
                    state_indices=pool._index(plan.index[0][i : i + 1]), backend=pool.backend, **flags,
                )  # fmt: skip
            if middle < at[2]:
                q, k, v, g, beta, mask = (None if x is None else x[at[0], middle : at[2]] for x in inputs)
                one = Call(q, k, v, g, beta, A_log=call.A_log, dt_bias=call.dt_bias, mask=mask)
                own = tuple(x[i : i + 1] for x in plan.index)
                o[at[0], middle : at[2]] = self._verify(
                    layer, one, self._plan(layer, one, options, own[0]), own
                )
        return o

    def _verify(
        self, layer: int, call: Call, prepared: _Prepared, index: Index, folded: dict[int, None] | None = None
    ) -> Array:
        """Run tokens and append them to the log; the layer is added to `folded` if entries are folded."""
        chosen, plan, spec = prepared
        return self._on(chosen).verify(plan, spec, layer, call, index, folded)

    def _plan(self, layer: int, call: Call, options: Options, base: Array) -> _Prepared:
        """The backend of a call, checked and planned once per geometry."""
        pool = self.pool
        arrays = (call.q, call.k, call.v, call.g, call.beta, call.A_log, call.dt_bias, call.mask)
        rest: Rest = (
            "StatePool.run", *options[1:], pool.backend, len(base), call.cu_seqlens is None, pool.H, pool.HV, pool.K,
            pool.V, pool.kda, self.C, pool.capacity, pool.dtype, pool.key_dtype, str(pool.device),
        )  # fmt: skip
        found = find(arrays, rest)
        if type(found) is _Prepared:
            return found
        spec = LogSpec(self._checked(layer, call, options, base), self.C, pool.key_dtype)
        chosen = dispatch.pick(spec, pool.backend)
        prepared = _Prepared(chosen, self._on(chosen).prepare(spec, call), spec)
        keep(found, rest, prepared)
        return prepared

    # ---- folding

    def fold(self, sequences: Sequences, batch: list[int]) -> None:
        """Fold all committed entries of these sequences into their states; pending ones move to the log's front."""
        before = list(sequences)
        folds = self._folds(sequences, batch, [])
        places = [place for place, *_ in folds]
        overwritten = [(self.states, [row for _, row, to, _ in folds if row == to])]
        overwritten += [(x, places) for x in self.arrays if any(_get(before, p).pending for p in places)]
        for place, _, _, n in folds:
            s = _get(sequences, place)
            sequences[place] = s._replace(used=s.used - n)
        done: list[int] = []
        try:
            for layer in range(self.pool.layers if folds else 0):
                self.saved.save(layer, overwritten)
                done.append(layer)
                self._fold_and_move(folds, layer, before)
            self.pool._sequences, self.pool._step = sequences, None
        except BaseException:
            for layer in done:
                self.saved.restore(layer, overwritten)
            raise

    def _fold_and_move(self, folds: list[Fold], layer: int, before: Sequences) -> None:
        moved = [f for f in folds if f[1] != f[2]]
        for group in (moved, [f for f in folds if f[1] == f[2]]):  # the second writes what the first reads
            if group:
                self._fold(group, layer)
        for place, _, _, n in folds:
            for x in self.arrays if (left := _get(before, place).used - n) else ():
                x[layer, place, :, :left] = self.pool._copy(x[layer, place, :, n : n + left])

    def _fold_late(self, plan: _Plan, layer: int) -> None:
        if layer not in plan.folded:
            self._fold(plan.late, layer, folded=plan.folded)

    def _fold(
        self, group: list[Fold], layer: int, out: Array = None, folded: dict[int, None] | None = None
    ) -> None:
        """Fold entries of different sequences in one layer, into `out` if given; the layer is added to `folded`."""
        self.folding.fold(group, layer, out, folded)

    # ---- copies

    def state(self, place: int, s: LiveSequence) -> Array:
        out = self.pool._copy(self.states[:, s.rows[0] : s.rows[0] + 1])
        for layer in range(self.pool.layers if s.used else 0):
            self._fold([(place, s.rows[0], 0, s.used)], layer, out[layer])
        return out[:, 0]

    def nbytes(self) -> Mapping[str, int]:
        return {"states": nbytes(self.states) + self.saved.nbytes(), "log": sum(map(nbytes, self.arrays))}


def _get(sequences: Sequences, place: int) -> LiveSequence:
    found = sequences[place]
    assert found is not None
    return found


def _like_v(call: Call) -> Array:
    """An empty o."""
    v = call.v
    return np.empty(v.shape, v.dtype) if isinstance(v, np.ndarray) else v.new_empty(v.shape)
