"""The log form of `StatePool`: one state per sequence, and for each token since an entry (k, d, a).

With the base state S0, entries s = 0 .. n-1 and A(s, t) the product of the decays a after s up to t:

    S_n = A(-1, n) S0 + sum_s A(s, n) k_s d_s^T

An entry is 2 K + V numbers at most where a state is K V. Verifying tokens reads the base state and appends entries,
going back drops the newest ones, and committing costs nothing: when the log has no room for a step, that step folds
what is committed into the state on its way through it. The kernels are backends/cpu/log.inl.h; where they do not run,
`verify` and `fold` below compute the same in float64, and are the oracle.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from ..core import dispatch
from ..core.native import core as _core
from ..core.plans import Rest, find, keep
from ..rule import reference
from ..rule.arguments import Call, Options
from ..rule.op import _grad_enabled, _torch_side, gated_delta_rule_
from ..rule.spec import CallSpec, check_call
from .base import Pool
from .sequence import LiveSequence, Saved, Sequences, Step, nbytes

cpu = dispatch.host("cpu")  # whose kernels the log has
Array = Any
F64 = reference.F64
Fold = tuple[int, int, int, int]
"""(sequence, row of its state, row that receives the folded one, entries)"""


def fold(S: F64, k: F64, d: F64, a: F64) -> F64:
    """S [HV, K, V] after the entries k [n, HV, K], d [n, HV, V], a [n, HV, 1] or [n, HV, K], oldest first."""
    for k_t, d_t, a_t in zip(k, d, a, strict=True):
        S = a_t[:, :, None] * S + k_t[:, :, None] * d_t[:, None, :]
    return S


def verify(
    S: F64, entries: list[tuple[F64, F64, F64]], parents: list[int], q: F64, k: F64, v: F64, a: F64, beta: F64
) -> F64:
    """Tokens q, k [T, HV, K], v [T, HV, V], a [T, HV, 1] or [T, HV, K], beta [T, HV] behind the logged `entries`.

    parents[e] is the entry before entry e (-1: the base state S); entries grow by one (k, d, a) per token.

    Returns:
        o [T, HV, V] = S_t^T q_t, with q scaled already.
    """

    def state(e: int) -> F64:
        way = []
        while e >= 0:
            way.append(entries[e])
            e = parents[e]
        out = S
        for k_s, d_s, a_s in reversed(way):
            out = a_s[:, :, None] * out + k_s[:, :, None] * d_s[:, None, :]
        return out

    o = np.zeros(v.shape)
    for t in range(len(q)):
        decayed = a[t][:, :, None] * state(parents[len(entries)])
        d = beta[t][:, None] * (v[t] - np.einsum("hkv,hk->hv", decayed, k[t]))
        entries.append((k[t], d, a[t]))
        o[t] = np.einsum("hkv,hk->hv", decayed + k[t][:, :, None] * d[:, None, :], q[t])
    return o


@dataclass
class _Plan:
    straight: list[int]
    """Per sequence: how many of the first tokens run on the state itself."""
    folds: list[Fold]
    """What is folded before a layer runs: first those whose state goes to another row, which others fold in place."""
    late: list[Fold]
    """What the kernel folds on its way through the state."""
    index: tuple[Any, ...]
    """[N] each: rows of the states, sequences, entries before the step, and whether the kernel folds them."""
    after: tuple[Any, ...]
    """The same when `late` has been folded."""
    order: str | None
    """The log's before the step."""
    overwritten: list[tuple[Any, list[int]]]
    """(array, its rows) that `folds` and the straight tokens change."""
    folded: dict[int, None] = field(default_factory=dict)
    """Layers in which `late` has been folded."""


class Log:
    """What StatePool asks of its form, by a log of C = `snapshots` - 1 entries per sequence.

    Attributes:
        states: [layers, capacity, HV, K, V] base states, rows that forks share until one of them folds.
        keys: [layers, capacity, H, C, K] as the caller gave them, `key_dtype`; factors [.., H, C] of their norm.
        deltas, decays: [.., HV, C, V], and [.., HV, C] or [.., HV, C, K].
        parents: [capacity, C] the entry before each; a chain.
    """

    def __init__(self, pool: Pool, tail: tuple[int, ...]):
        self.pool = pool
        self.C = C = pool.snapshots - 1
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
        """What belongs to this process and to these arrays, which stay where they are; a copy has its own."""
        pool = self.pool
        on_cpu = pool.device is None or str(pool.device).partition(":")[0] == "cpu"
        forced = pool.backend if pool.backend != "auto" else dispatch.forced_by_env() or "cpu"
        # Addresses of each layer's arrays: reading them costs more than a small head.
        self.at = [
            (cpu.address(self.states[i]), tuple(cpu.address(x[i]) for x in self.arrays))
            for i in range(pool.layers if on_cpu else 0)
        ]
        self.native = _core is not None and on_cpu and forced == "cpu"
        self.facts: Rest = (
            pool.H, pool.HV, pool.K, pool.V, pool.kda, pool.dtype, pool.key_dtype, pool.state_layout, self.native,
            str(pool.device),
        )  # fmt: skip

    def __getstate__(self) -> dict[str, Any]:
        return {name: x for name, x in self.__dict__.items() if name not in ("facts", "at", "native")}

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
        """Decide where the step finds room: by folding what is committed, or on the state itself if it is longer than
        the log or certain. The layers do so as they run; here no array is touched."""
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
        # The kernel folds on its way where all of the log is committed and the state is this sequence's alone.
        late: list[Fold] = []
        if folds and self.native and not alone:
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
        """How to fold all committed entries of these sequences. A state that is shared goes to a row of its own first:
        for it, the fold is the copy. Those in `alone` need a row of their own even with nothing to fold."""
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
        return moved + own  # the second write what the first read

    def cancel(self, step: Step, sequences: Sequences) -> list[int]:
        """Put states and logs back; `sequences` are those before the step. Returns those that are lost.

        Layers in which the kernel has folded stay folded, and the others follow: no token is lost, but the way back."""
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
                if plan.late and prepared[0] is None:
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

    def _checked(self, layer: int, call: Call, options: Options, base: Any) -> CallSpec:
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
        """Steps longer than the log, or certain ones: the first tokens run on the state, sequence by sequence."""
        pool, plan = self.pool, step.plan
        o = _like_v(call)
        flags = {n: getattr(options, n) for n in ("scale", "decay", "lower_bound", "beta_is_logit", "heads",
                                                  "qk_l2norm", "qk_l2norm_eps", "state_layout")}  # fmt: skip
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
        self, layer: int, call: Call, prepared: tuple[Any, CallSpec, list[str]], index: Any,
        folded: dict[int, None] | None = None,
    ) -> Array:  # fmt: skip
        """Run tokens that the log takes; `folded` learns of the layer if entries are folded on the way."""
        plan, spec, copies = prepared
        base, rows, used, folds = index
        if plan is None:
            return self._verify_in_float64(layer, call, spec, base, rows, used)
        for name in copies:
            setattr(call, name, cpu.contiguous(getattr(call, name)))
        o = _like_v(call)
        self._native(
            plan, False, layer, folded, call.q, call.k, call.v, call.g, call.beta, o, self.at[layer][0], None,
            call.A_log, call.dt_bias, call.mask, call.cu_seqlens, base, *self.at[layer][1], self.parents, rows, used,
            folds, None,
        )  # fmt: skip
        return o

    def _plan(self, layer: int, call: Call, options: Options, base: Any) -> tuple[Any, CallSpec, list[str]]:
        """(native plan or None, spec, arrays to copy first), checked once per geometry."""
        arrays = (call.q, call.k, call.v, call.g, call.beta, call.A_log, call.dt_bias, call.mask)
        rest: Rest = (*options, "StatePool.run", len(base), call.cu_seqlens is None, *self.facts)
        found: Any = find(arrays, rest)
        if type(found) is not tuple:
            spec = self._checked(layer, call, options, base)
            if not self.native or spec.dtype not in cpu.DTYPE:
                return None, spec, []
            strided = {name: cpu.input_strides(getattr(call, name)) for name in ("q", "k", "v", "g", "beta")}
            copies = [name for name, (_, copied) in strided.items() if copied]
            copies += cpu.scattered(call, ("A_log", "dt_bias"))
            fields, _, _ = cpu.rule_fields(spec, call, {name: st for name, (st, _) in strided.items()})
            key, found = found, (self._native_plan(fields), spec, copies)
            keep(key, rest, found)
        return found  # type: ignore[no-any-return]

    def _native_plan(self, fields: dict[str, Any]) -> Any:
        number, torch = cpu.threads_of("numpy" if self.pool.device is None else "torch")
        return _core.Plan(fields, None if torch else number)

    def _native(
        self, plan: Any, folding: bool, layer: int, folded: dict[int, None] | None, *arrays: Any
    ) -> None:
        torch = sys.modules.get("torch") if self.pool.device is not None else None
        if torch is not None:
            _torch_side().mark_written((self.states, *self.arrays))
        if not cpu.reads_arrays(
            "torch" if torch is not None else "numpy", (x for x in arrays if hasattr(x, "dtype"))
        ):
            arrays = tuple(cpu.address(x) if hasattr(x, "dtype") else x for x in arrays)
        head = (plan, folding, self.C, cpu.DTYPE[self.pool.key_dtype])
        if folded is None:
            _core.run_log(*head, *arrays)
        else:  # the call and its mark without a step of the interpreter between them, where Ctrl-C would come
            call = partial(_core.run_log, *head, *arrays[:-1])
            folded.update(zip((layer,), map(call, arrays[-1:]), strict=True))

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
        """Folds of different sequences in one layer, into `out` if it is given; `folded` learns of the layer."""
        if not self.native:
            return self._fold_in_float64(group, layer, out)
        places, rows, to, counts = (np.array(x, np.int64) for x in zip(*group, strict=True))
        rest: Rest = ("StatePool.fold", len(group), self.order, *self.facts)
        found: Any = find((), rest)
        if type(found) is not _core.Plan:
            pool = self.pool
            options = Options(state_layout=pool.state_layout, heads=self.order or "interleaved")
            spec = CallSpec(
                B=len(group), T=0, H=pool.H, HV=pool.HV, K=pool.K, V=pool.V, N=len(group), P=pool.capacity,
                kda=pool.kda, dtype="float32", state_dtype=pool.dtype, g_dtype="float32", beta_dtype="float32",
                scale=1.0, packed=False, pooled=False, masked=False, has_state=True, snapshots=0, inplace=True,
                requires_grad=False, framework="", device="cpu", options=options,
            )  # fmt: skip
            nothing = Call(None, None, None, None, None, self.states[0])
            none: dict[str, tuple[int, ...]] = dict.fromkeys(("q", "k", "v", "g", "beta"), (0, 0, 0, 0))
            key, found = found, self._native_plan(cpu.rule_fields(spec, nothing, none)[0])
            keep(key, rest, found)
        states, entries = self.at[layer]
        target = states if out is None else cpu.address(out)
        self._native(
            found, True, layer, folded, *[None] * 6, states, target, *[None] * 4, rows, *entries, self.parents,
            places, counts, None, to,
        )  # fmt: skip

    # ---- the same in float64

    def _entries(self, layer: int, place: int, n: int) -> list[tuple[F64, F64, F64]]:
        """Entries 0 to n - 1, keys spread over the value heads."""
        k, factors, d, a = (
            np.asarray(_host(x[layer, place, :, :n])).astype(np.float64).swapaxes(0, 1) for x in self.arrays
        )
        k = (factors[..., None] * k)[:, self._heads(self.order)]
        a = a if self.pool.kda else a[..., None]
        return list(zip(k, d, a, strict=True))

    def _heads(self, order: str | None) -> Any:
        return reference.head_map(self.pool.H, self.pool.HV, order or "interleaved")

    def _fold_in_float64(self, group: list[Fold], layer: int, out: Array) -> None:
        target = self.states[layer] if out is None else out
        for place, row, to, n in group:
            S = self._state64(layer, row)
            for k, d, a in self._entries(layer, place, n):
                S = fold(S, k[None], d[None], a[None])
            S = S if self.pool.state_layout == "kv" else S.swapaxes(-1, -2)
            target[to] = self.pool._like(np.ascontiguousarray(S))

    def _state64(self, layer: int, row: int) -> F64:
        S = np.asarray(_host(self.states[layer, row])).astype(np.float64)
        return S if self.pool.state_layout == "kv" else S.swapaxes(-1, -2)

    def _verify_in_float64(
        self, layer: int, call: Call, spec: CallSpec, base: Any, rows: Any, used: Any
    ) -> Array:
        opt = spec.options
        names = ("q", "k", "v", "g", "beta", "A_log", "dt_bias")
        x: dict[str, Any] = {
            n: None if getattr(call, n) is None else np.asarray(_host(getattr(call, n))).astype(np.float64)
            for n in names
        }
        a = reference.decays(
            x["g"], decay=opt.decay, A_log=x["A_log"], dt_bias=x["dt_bias"], lower_bound=opt.lower_bound
        )
        a = a if spec.kda else a[..., None]
        beta = reference.sigmoid(x["beta"]) if opt.beta_is_logit else x["beta"]
        q, k, v = x["q"], x["k"], x["v"]
        factors = np.ones(k.shape[:3])
        if opt.qk_l2norm:
            q = reference.l2norm(q, opt.qk_l2norm_eps)
            factors = 1 / np.sqrt((k**2).sum(-1) + opt.qk_l2norm_eps)
        live = np.ones(q.shape[:2], bool) if call.mask is None else np.asarray(_host(call.mask))
        q = np.where(live[..., None, None], q, 0.0) * spec.scale
        k = np.where(live[..., None, None], k, 0.0)
        v = np.where(live[..., None, None], v, 0.0)
        a = np.where(live[..., None, None], a, 1.0)
        beta = np.where(live[..., None], beta, 0.0)
        head = self._heads(opt.heads)
        keys = factors[..., None] * k
        o = np.zeros(v.shape)
        cu = None if call.cu_seqlens is None else call.cu_seqlens.tolist()
        counts = (x.tolist() for x in (base, rows, used))
        for n, (row, place, m) in enumerate(zip(*counts, strict=True)):
            b, first, last = (n, 0, spec.T) if cu is None else (0, cu[n], cu[n + 1])
            here = (b, slice(first, last))
            entries = self._entries(layer, place, m)
            o[here] = verify(
                self._state64(layer, row), entries, self.parents[place].tolist(), q[here][:, head], keys[here][:, head],
                v[here], a[here], beta[here],
            )  # fmt: skip
            for e in range(m, m + last - first):
                decay = entries[e][2] if spec.kda else entries[e][2][:, 0]
                new = (k[b, first + e - m], factors[b, first + e - m], entries[e][1], decay)
                for array, value in zip(self.arrays, new, strict=True):
                    array[layer, place, :, e] = self.pool._like(value)
        if self.pool.device is not None:
            return self.pool._like(o).to(call.v.dtype)
        return o.astype(call.v.dtype)

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
    """Room for o."""
    v = call.v
    return np.empty(v.shape, v.dtype) if isinstance(v, np.ndarray) else v.new_empty(v.shape)


def _host(x: Array) -> Array:
    return (
        x
        if isinstance(x, np.ndarray)
        else x.detach().cpu().double().numpy()
        if x.is_floating_point()
        else x.cpu().numpy()
    )
