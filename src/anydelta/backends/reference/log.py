"""The log in float64: the oracle of the log's kernels, and the fallback without kernels."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...core.accepts import ANY
from ...core.arrays import Array
from ...rule import reference
from ...rule.arguments import Call, write_strength
from ...state.log_spec import Fold, Index, LogArrays, LogSpec
from ..accepts import GATES, RULE_CALLS, STATES

F64 = reference.F64


def fold(S: F64, k: F64, d: F64, a: F64) -> F64:
    """S [HV, K, V] after the entries k [n, HV, K], d [n, HV, V], a [n, HV, 1] or [n, HV, K], oldest first."""
    for k_t, d_t, a_t in zip(k, d, a, strict=True):
        S = a_t[:, :, None] * S + k_t[:, :, None] * d_t[:, None, :]
    return S


def verify(
    S: F64, entries: list[tuple[F64, F64, F64]], parents: list[int], q: F64, k: F64, v: F64, a: F64, beta: F64
) -> F64:
    """Tokens q, k [T, HV, K], v [T, HV, V], a [T, HV, 1] or [T, HV, K], beta [T, HV] after the logged `entries`.

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


class ReferenceSteps:
    """One log."""

    def __init__(self, log: LogArrays):
        self.log, self.pool = log, log.rule(1)
        """The spec of a call on the states."""

    def prepare(self, spec: LogSpec, call: Call) -> None:
        return None

    def _entries(self, layer: int, place: int, n: int) -> list[tuple[F64, F64, F64]]:
        """Entries 0 to n - 1, with keys repeated for the value heads."""
        k, factors, d, a = (
            np.asarray(_host(x[layer, place, :, :n])).astype(np.float64).swapaxes(0, 1)
            for x in self.log.arrays
        )
        k = (factors[..., None] * k)[:, self._heads(self.log.order)]
        a = a if self.pool.kda else a[..., None]
        return list(zip(k, d, a, strict=True))

    def _heads(self, order: str | None) -> NDArray[np.int64]:
        return reference.head_map(self.pool.H, self.pool.HV, order or "interleaved")

    def fold(self, group: list[Fold], layer: int, out: Array | None, folded: dict[int, None] | None) -> None:
        target = self.log.states[layer] if out is None else out
        for place, row, to, n in group:
            S = self._state64(layer, row)
            for k, d, a in self._entries(layer, place, n):
                S = fold(S, k[None], d[None], a[None])
            S = S if self.pool.options.state_layout == "kv" else S.swapaxes(-1, -2)
            target[to] = self.log.like(np.ascontiguousarray(S))

    def _state64(self, layer: int, row: int) -> F64:
        S = np.asarray(_host(self.log.states[layer, row])).astype(np.float64)
        return S if self.pool.options.state_layout == "kv" else S.swapaxes(-1, -2)

    def verify(
        self, plan: object, of: LogSpec, layer: int, call: Call, index: Index, folded: dict[int, None] | None
    ) -> Array:
        spec, opt = of.rule, of.rule.options
        base, rows, used, _ = index
        names = ("q", "k", "v", "g", "beta", "A_log", "dt_bias")
        x: dict[str, Array] = {
            n: None if getattr(call, n) is None else np.asarray(_host(getattr(call, n))).astype(np.float64)
            for n in names
        }
        a = reference.decays(
            x["g"], decay=opt.decay, A_log=x["A_log"], dt_bias=x["dt_bias"], lower_bound=opt.lower_bound
        )
        a = a if spec.kda else a[..., None]
        beta = write_strength(x["beta"], opt, reference.sigmoid)
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
            parents = self.log.parents[place].tolist()
            o[here] = verify(
                self._state64(layer, row), entries, parents, q[here][:, head], keys[here][:, head], v[here], a[here],
                beta[here],
            )  # fmt: skip
            for e in range(m, m + last - first):
                decay = entries[e][2] if spec.kda else entries[e][2][:, 0]
                new = (k[b, first + e - m], factors[b, first + e - m], entries[e][1], decay)
                for array, value in zip(self.log.arrays, new, strict=True):
                    array[layer, place, :, e] = self.log.like(value)
        made = self.log.like(o)
        return made.astype(call.v.dtype) if isinstance(made, np.ndarray) else made.to(call.v.dtype)


class ReferenceLog:
    """The log of the reference backend."""

    name = "reference"
    accepts = RULE_CALLS.but(
        dtype=GATES, state_dtype=STATES, device=ANY, framework=ANY, key_dtype=ANY, entries=ANY, limits=()
    )
    folds_late = False

    def attach(self, log: LogArrays) -> ReferenceSteps:
        return ReferenceSteps(log)


LOG = ReferenceLog()


def _host(x: Array) -> Array:
    return (
        x
        if isinstance(x, np.ndarray)
        else x.detach().cpu().double().numpy()
        if x.is_floating_point()
        else x.cpu().numpy()
    )
