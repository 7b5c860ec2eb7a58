"""The log form of `StatePool`: one state per sequence, and for each token since an entry (k, d, a).

With the base state S0, entries s = 0 .. n-1 and A(s, t) the product of the decays a after s up to t:

    S_n = A(-1, n) S0 + sum_s A(s, n) k_s d_s^T

An entry is 2 K + V numbers at most where a state is K V. Verifying tokens reads the base state and appends entries,
going back drops the newest ones, and committing costs nothing: when the log has no room for a step, that step folds
what is committed into the state on its way through it. The kernels are kernels/cpu/log.inl.h; where they do not run,
`verify` and `fold` below compute the same in float64, and are the oracle.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import dispatch, reference
from ..backends import cpu
from ..op import _core, _grad_enabled, gated_delta_rule_
from ..spec import Call, CallSpec, Options, check_call
from .sequence import LiveSequence, nbytes

if TYPE_CHECKING:
    from .pool import StatePool

Array = Any
F64 = reference.F64


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


class Log:
    """What StatePool asks of its form, by a log of C = `snapshots` - 1 entries per sequence.

    Attributes:
        states: [layers, capacity, HV, K, V] base states, rows that forks share until one of them folds.
        keys: [layers, capacity, H, C, K] as the caller gave them, `key_dtype`; factors [.., H, C] of their norm.
        deltas, decays: [.., HV, C, V], and [.., HV, C] or [.., HV, C, K].
        used: entries of each sequence. parents: [capacity, C] the entry before each; a chain.
    """

    def __init__(self, pool: StatePool, tail: tuple[int, ...]):
        self.pool = pool
        self.C = C = pool.snapshots - 1
        n, N, H, HV, K, V = pool.layers, pool.capacity, pool.H, pool.HV, pool.K, pool.V
        self.states = pool._zeros((n, N, *tail))
        self.keys = pool._zeros((n, N, H, C, K), pool.key_dtype)
        self.factors = pool._zeros((n, N, H, C), "float32")
        self.deltas = pool._zeros((n, N, HV, C, V), "float32")
        self.decays = pool._zeros((n, N, HV, C, K) if pool.kda else (n, N, HV, C), "float32")
        self.arrays = (self.keys, self.factors, self.deltas, self.decays)
        self.parents = np.ascontiguousarray(np.broadcast_to(np.arange(C) - 1, (N, C)), np.int64)
        self.used = [0] * N
        self.order: str | None = None  # which q/k head serves a value head: the `heads` of the first run
        self.refs = [0] * N
        self.unused = list(range(N - 1, -1, -1))
        self.plans: dict[Any, tuple[Any, CallSpec, list[str]]] = {}
        on_cpu = pool.device is None or str(pool.device).partition(":")[0] == "cpu"
        forced = pool.backend if pool.backend != "auto" else dispatch.forced_by_env() or "cpu"
        # Addresses of each layer's arrays, which stay where they are: reading them costs more than a small head.
        self.at = [
            (
                cpu.address(self.states[i]),
                tuple(cpu.address(x[i]) for x in self.arrays),
            )
            for i in range(n if on_cpu else 0)
        ]
        self.native = _core is not None and on_cpu and forced == "cpu"

    # ---- rows

    def _take(self) -> int:
        row = self.unused.pop()
        self.refs[row] = 1
        return row

    def _drop(self, row: int) -> None:
        self.refs[row] -= 1
        if not self.refs[row]:
            self.unused.append(row)

    def fresh(self, place: int) -> int:
        row = self._take()
        self.states[:, row] = 0
        self.used[place] = 0
        return row

    def share(self, source: int, place: int, child: LiveSequence) -> None:
        self.refs[child.rows[0]] += 1
        n = self.used[place] = self.used[source]
        for x in self.arrays:
            x[:, place, :, :n] = x[:, source, :, :n]

    def release(self, place: int, s: LiveSequence) -> None:
        self._drop(s.rows[0])
        self.used[place] = 0

    def select(self, sources: list[int], targets: list[int], children: list[LiveSequence]) -> None:
        copies = [x[:, sources] for x in self.arrays]
        used = [self.used[p] for p in sources]
        for child in children:
            self.refs[child.rows[0]] += 1
        for target in targets:
            self.release(target, self.pool._get("select", target))
        for x, copied in zip(self.arrays, copies, strict=True):
            x[:, targets] = copied
        for target, n in zip(targets, used, strict=True):
            self.used[target] = n

    # ---- going back

    def recorded(self, place: int, s: LiveSequence) -> int:
        return self.used[place]

    def take_back(self, place: int, s: LiveSequence, n: int) -> None:
        self.used[place] -= n

    # ---- a step

    def check(self, batch: list[int], found: list[LiveSequence], lengths: list[int], record: bool) -> None:
        for place, s, n in zip(batch, found, lengths, strict=True):
            if s.pending and n and (not record or s.pending + n > self.C):
                self.pool._fail(
                    "begin",
                    f"requires room for {n} more tokens of sequence {place} in its log; got {s.pending} pending of "
                    f"{self.C}. Commit first",
                )

    def room(self, batch: list[int], found: list[LiveSequence], lengths: list[int], record: bool) -> None:
        """Make room by folding what is committed; the step itself does so where the kernels can. A step that does not
        fit will run on the state itself."""
        logged = self.C if record else 0
        step = list(zip(batch, found, lengths, strict=True))
        full = [(place, s) for place, s, n in step if n and (n > logged or self.used[place] + n > self.C)]
        straight = [s for _, s, n in step if n > logged]
        self.fold([(place, s) for place, s in full if self.refs[s.rows[0]] > 1], straight)
        rest = [(place, s) for place, s in full if self.used[place] > s.pending]
        self.folds = [0] * self.pool.capacity
        if self.native and not straight:
            for place, s in rest:
                self.folds[place] = int(s.pending == 0)
        self.fold([(place, s) for place, s in rest if not self.folds[place]])

    def begin(self, batch: list[int], found: list[LiveSequence], lengths: list[int], keep: int) -> Any:
        logged = 0 if self.pool._certain else self.C
        self.direct = [max(0, n - logged) for n in lengths]
        self.before = [self.used[place] for place in batch]
        folds = [self.folds[place] for place in batch]
        for place, n, straight, folded in zip(batch, lengths, self.direct, folds, strict=True):
            self.used[place] = n - straight + (0 if folded else self.used[place])
        self.index = (
            np.array([s.rows[0] for s in found], np.int64), np.array(batch, np.int64), np.array(self.before, np.int64),
            np.array(folds, np.int64),
        )  # fmt: skip
        return None

    def cancel(self, undo: Any) -> None:
        for place, n in zip(self.pool._batch, self.before, strict=True):
            self.used[place] = n

    def run(
        self, layer: int, q: Array, k: Array, v: Array, *, g: Array, beta: Array, scale: float | None = None,
        decay: str = "log", A_log: Array = None, dt_bias: Array = None, lower_bound: float | None = None,
        beta_is_logit: bool = False, heads: str = "interleaved", qk_l2norm: bool = False,
        qk_l2norm_eps: float = 1e-6, mask: Array = None,
    ) -> Array:  # fmt: skip
        pool = self.pool
        options = Options(
            "gated_delta_rule_", scale, decay, lower_bound, beta_is_logit, heads, qk_l2norm, qk_l2norm_eps,
            pool.state_layout, True,
        )  # fmt: skip
        call = Call(q, k, v, g, beta, None, A_log, dt_bias, mask, pool._cu)
        if any(self.direct):
            self._checked(layer, call, options, self.index[0])
            return self._by_parts(layer, call, options)
        return self._verify(layer, call, options, *self.index)

    def _checked(self, layer: int, call: Call, options: Options, base: Any) -> CallSpec:
        call.state_in, call.state_indices = self.states[layer], self.pool._index(base)
        spec = check_call(call, options, inplace=True, grad_enabled=_grad_enabled(call.q))
        pool = self.pool
        if self.order not in (None, options.heads):
            pool._fail(
                "run", f"requires heads={self.order!r} as in the pool's log; got heads={options.heads!r}"
            )
        self.order = options.heads
        want = (pool.H, pool.HV, pool.K, pool.V, pool.kda)
        got = (spec.H, spec.HV, spec.K, spec.V, spec.kda)
        if got != want:
            pool._fail("run", f"requires H, HV, K, V, kda = {want} as the pool's log has; got {got}")
        if pool.key_dtype not in ("float32", spec.dtype):
            pool._fail("run", f"requires k in {pool.key_dtype}, the pool's key_dtype; got {spec.dtype}")
        return spec

    def _by_parts(self, layer: int, call: Call, options: Options) -> Array:
        """Steps longer than the log, or certain ones: the first tokens run on the state, sequence by sequence."""
        pool = self.pool
        o = (
            call.v.new_empty(call.v.shape)
            if pool.device is not None
            else np.empty(call.v.shape, call.v.dtype)
        )
        flags = {n: getattr(options, n) for n in ("scale", "decay", "lower_bound", "beta_is_logit", "heads",
                                                  "qk_l2norm", "qk_l2norm_eps", "state_layout")}  # fmt: skip
        start = 0
        for i, (n, straight) in enumerate(zip(pool._lengths, self.direct, strict=True)):
            at = (slice(0, 1), start, start + n) if pool._cu is not None else (slice(i, i + 1), 0, n)
            start += n
            middle = at[1] + straight

            inputs = (call.q, call.k, call.v, call.g, call.beta, call.mask)
            rows = pool._index(self.index[0][i : i + 1])
            if straight:
                q, k, v, g, beta, mask = (None if x is None else x[at[0], at[1] : middle] for x in inputs)
                o[at[0], at[1] : middle] = gated_delta_rule_(
                    q, k, v, call.state_in, g=g, beta=beta, mask=mask, A_log=call.A_log, dt_bias=call.dt_bias,
                    state_indices=rows, backend=pool.backend, **flags,
                )  # fmt: skip
            if middle < at[2]:
                q, k, v, g, beta, mask = (None if x is None else x[at[0], middle : at[2]] for x in inputs)
                one = Call(q, k, v, g, beta, None, call.A_log, call.dt_bias, mask)
                own = tuple(x[i : i + 1] for x in self.index)
                o[at[0], middle : at[2]] = self._verify(layer, one, options, *own)
        return o

    def _verify(
        self, layer: int, call: Call, options: Options, base: Any, rows: Any, used: Any, folds: Any
    ) -> Array:
        plan, spec, copies = self._plan(layer, call, options, base)
        if plan is None:
            return self._verify_in_float64(layer, call, spec, base, rows, used, folds)
        for name in copies:
            setattr(call, name, cpu.contiguous(getattr(call, name)))
        o = (
            call.v.new_empty(call.v.shape)
            if spec.framework == "torch"
            else np.empty(call.v.shape, call.v.dtype)
        )
        self._native(
            plan, False, call.q, call.k, call.v, call.g, call.beta, o, self.at[layer][0], None, call.A_log,
            call.dt_bias, call.mask, call.cu_seqlens, base, *self.at[layer][1], self.parents, rows, used, folds, None,
        )  # fmt: skip
        return o

    def _plan(self, layer: int, call: Call, options: Options, base: Any) -> tuple[Any, CallSpec, list[str]]:
        """(native plan or None, spec, arrays to copy first), checked once per geometry."""
        arrays = (call.q, call.k, call.v, call.g, call.beta, call.A_log, call.dt_bias, call.mask)
        geometry = None if _core is None or _grad_enabled(call.q) else _core.geometry(*arrays)
        key = (geometry, options, len(base), call.cu_seqlens is None)
        found: Any = self.plans.get(key) if geometry is not None else None
        if found is None:
            spec = self._checked(layer, call, options, base)
            if not self.native or spec.dtype not in cpu.DTYPE:
                return None, spec, []
            strided = {name: cpu.input_strides(getattr(call, name)) for name in ("q", "k", "v", "g", "beta")}
            copies = [name for name, (_, copied) in strided.items() if copied]
            copies += cpu.scattered(call, ("A_log", "dt_bias"))
            fields, _, _ = cpu.rule_fields(spec, call, {name: st for name, (st, _) in strided.items()})
            found = (_core.Plan(fields), spec, copies)
            if geometry is not None:
                if len(self.plans) >= 256:
                    self.plans.clear()
                self.plans[key] = found
        return found  # type: ignore[no-any-return]

    def _native(self, plan: Any, folding: bool, *arrays: Any) -> None:
        torch = sys.modules.get("torch") if self.pool.device is not None else None
        threads = torch.get_num_threads() if torch is not None else cpu.default_threads()
        if not cpu.reads_arrays(
            "torch" if torch is not None else "numpy", (x for x in arrays if hasattr(x, "dtype"))
        ):
            arrays = tuple(cpu.address(x) if hasattr(x, "dtype") else x for x in arrays)
        _core.run_log(
            plan, threads, torch is not None, folding, self.C, cpu.DTYPE[self.pool.key_dtype], *arrays
        )

    # ---- folding

    def fold(self, those: list[tuple[int, LiveSequence]], exclusive: list[LiveSequence] = []) -> None:  # noqa: B006
        """Fold all committed entries of these sequences into their states; pending ones move to the front of the log.

        A state that is shared goes to a row of its own first: for it, the fold is the copy.
        """
        moved, own = [], []
        for place, s in those:
            n = max(0, self.used[place] - s.pending)  # pending ones may have run on the state itself
            if n == 0 and not any(s is e for e in exclusive):
                continue
            row = s.rows[0]
            if self.refs[row] > 1:
                self.refs[row] -= 1
                s.rows = [self._take()]
                moved.append((place, row, s.rows[0], n))
            elif n:
                own.append((place, row, row, n))
        for group in (moved, own):  # the second writes what the first reads
            if group:
                self._fold(group)
        for place, _, _, n in (*moved, *own):
            left = self.used[place] - n
            for x in self.arrays:
                if left:
                    x[:, place, :, :left] = self.pool._copy(x[:, place, :, n : n + left])
            self.used[place] = left

    def _fold(self, group: list[tuple[int, int, int, int]], out: Array = None) -> None:
        """(place, row of the state, row that receives it, entries) of different sequences."""
        places, rows, to, counts = (np.array(x, np.int64) for x in zip(*group, strict=True))
        if not self.native:
            return self._fold_in_float64(group, out)
        spec_key = ("fold", len(group), self.order)
        found: Any = self.plans.get(spec_key)
        if found is None:
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
            found = self.plans[spec_key] = (_core.Plan(cpu.rule_fields(spec, nothing, none)[0]), spec, [])
        for layer in range(self.pool.layers):
            states, entries = self.at[layer]
            target = states if out is None else cpu.address(out[layer])
            self._native(
                found[0], True, *[None] * 6, states, target, *[None] * 4, rows, *entries, self.parents, places, counts,
                None, to,
            )  # fmt: skip

    # ---- the same in float64

    def _entries(self, layer: int, place: int, n: int) -> list[tuple[F64, F64, F64]]:
        """Entries 0 to n - 1, keys spread over the value heads."""
        k, factors, d, a = (
            np.asarray(_host(x[layer, place, :, :n])).astype(np.float64).swapaxes(0, 1) for x in self.arrays
        )
        k = (factors[..., None] * k)[:, self._heads()]
        a = a if self.pool.kda else a[..., None]
        return list(zip(k, d, a, strict=True))

    def _heads(self) -> Any:
        return reference.head_map(self.pool.H, self.pool.HV, self.order or "interleaved")

    def _fold_in_float64(
        self, group: list[tuple[int, int, int, int]], out: Array, layer: int | None = None
    ) -> None:
        target = self.states if out is None else out
        for i in range(self.pool.layers) if layer is None else (layer,):
            for place, row, to, n in group:
                S = self._state64(i, row)
                for k, d, a in self._entries(i, place, n):
                    S = fold(S, k[None], d[None], a[None])
                self._put64(target, i, to, S)

    def _state64(self, layer: int, row: int) -> F64:
        S = np.asarray(_host(self.states[layer, row])).astype(np.float64)
        return S if self.pool.state_layout == "kv" else S.swapaxes(-1, -2)

    def _put64(self, target: Array, layer: int, row: int, S: F64) -> None:
        S = S if self.pool.state_layout == "kv" else S.swapaxes(-1, -2)
        target[layer, row] = self.pool._like(np.ascontiguousarray(S))

    def _verify_in_float64(
        self, layer: int, call: Call, spec: CallSpec, base: Any, rows: Any, used: Any, folds: Any
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
        head = self._heads()
        keys = factors[..., None] * k
        o = np.zeros(v.shape)
        cu = None if call.cu_seqlens is None else call.cu_seqlens.tolist()
        counts = (x.tolist() for x in (base, rows, used, folds))
        for n, (row, place, m, folded) in enumerate(zip(*counts, strict=True)):
            if folded:
                self._fold_in_float64([(place, row, row, m)], None, layer)
                m = 0
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
        if self.used[place]:
            self._fold([(place, s.rows[0], 0, self.used[place])], out)
        return out[:, 0]

    def put(self, place: int, s: LiveSequence, states: Array) -> None:
        self.states[:, s.rows[0]] = states

    def nbytes(self) -> Mapping[str, int]:
        return {"states": nbytes(self.states), "log": sum(map(nbytes, self.arrays))}


def _host(x: Array) -> Array:
    return (
        x
        if isinstance(x, np.ndarray)
        else x.detach().cpu().double().numpy()
        if x.is_floating_point()
        else x.cpu().numpy()
    )
