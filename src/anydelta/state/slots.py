"""The slots form of `StatePool`: the last states of each sequence, each a row of the pool."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..op import gated_delta_rule_
from .rows import DeviceRows, HostRows
from .sequence import LiveSequence

if TYPE_CHECKING:
    from .pool import StatePool

Array = Any


class Slots:
    """The last states of each sequence, as rows [layers, P, HV, K, V] that are counted and shared.

    P = capacity * snapshots rows always suffice: a sequence holds at most `snapshots` of them.
    """

    def __init__(self, pool: StatePool, tail: tuple[int, ...]):
        self.pool = pool
        P = pool.capacity * pool.snapshots
        self.rows: HostRows | DeviceRows
        if pool.resident is None:
            self.rows = HostRows(pool._zeros((pool.layers, P, *tail)))
        else:
            self.rows = DeviceRows(pool.resident, pool.layers, (P, *tail), pool.dtype)
        self.refs = [0] * P
        self.unused = list(range(P - 1, -1, -1))
        self.later: list[int] = []  # rows that the running step still reads: free when it is done
        self.read: Array = None
        self.write: Array = None

    def fresh(self, place: int) -> int:
        row = self._take()
        self.rows.zero(row)
        return row

    def _take(self) -> int:
        if not self.unused:
            self._settle()
        row = self.unused.pop()
        self.refs[row] = 1
        return row

    def _settle(self) -> None:
        self.unused += self.later
        self.later = []

    def _drop(self, row: int) -> None:
        self.refs[row] -= 1
        if not self.refs[row]:
            self.unused.append(row)

    def share(self, source: int, place: int, child: LiveSequence) -> None:
        for row in child.rows:
            self.refs[row] += 1

    def release(self, place: int, s: LiveSequence) -> None:
        for row in s.rows:
            self._drop(row)

    def select(self, sources: list[int], targets: list[int], children: list[LiveSequence]) -> None:
        for child in children:
            self.share(0, 0, child)
        for target in targets:
            self.release(target, self.pool._get("select", target))

    def recorded(self, place: int, s: LiveSequence) -> int:
        return len(s.rows) - 1

    def take_back(self, place: int, s: LiveSequence, n: int) -> None:
        for row in s.rows[:n]:
            self._drop(row)
        del s.rows[:n]

    def fold(self, those: list[tuple[int, LiveSequence]]) -> None:
        pass

    def check(self, batch: list[int], found: list[LiveSequence], lengths: list[int], record: bool) -> None:
        pass

    def room(self, batch: list[int], found: list[LiveSequence], lengths: list[int], record: bool) -> None:
        pass

    def begin(self, batch: list[int], found: list[LiveSequence], lengths: list[int], keep: int) -> Any:
        """Choose the rows that this step writes: none that stays in a history, none that another sequence reads."""
        self._settle()
        undo = (list(self.refs), list(self.unused))
        heads = [s.rows[0] for s in found]
        readers: dict[int, int] = {}
        for row in heads:
            readers[row] = readers.get(row, 0) + 1
        own: list[int | None] = [None] * len(batch)  # the row it reads, if nobody else needs it
        stuck: dict[int, list[int]] = {}  # rows that only this step's readers still need, by reader
        kept = []
        for i, (s, n) in enumerate(zip(found, lengths, strict=True)):
            stay = s.rows[: keep - min(n, keep)] if n else s.rows
            kept.append(list(stay))
            for row in s.rows[len(stay) :]:
                self.refs[row] -= 1
                if self.refs[row]:
                    continue
                if readers.get(row, 0) == 0:
                    self.unused.append(row)
                elif readers[row] == 1 and row == heads[i]:
                    own[i] = row
                else:
                    stuck[row] = [j for j, head in enumerate(heads) if head == row]
        need = sum(min(n, keep) for n in lengths) - sum(row is not None for row in own)
        copy: list[tuple[int, int]] = []
        if need > len(self.unused):
            # Sequences that share their state all give it up at once, and there is no room but in that row: the last
            # of them writes there, and the others read copies that lie where they will write.
            for row, those in stuck.items():
                own[those[-1]] = row
                copy += [(i, row) for i in those[:-1]]
        else:
            self.later = list(stuck)
        copies = dict(copy)
        rows = []
        for i, (s, n) in enumerate(zip(found, lengths, strict=True)):
            fresh: list[int] = []
            if (mine := own[i]) is not None:
                self.refs[mine] = 1
                fresh.append(mine)
            fresh += [self._take() for _ in range(min(n, keep) - len(fresh))]
            if i in copies:
                self.rows.copy(fresh[0], copies[i])
                heads[i] = fresh[0]
            s.rows = fresh + kept[i]
            rows.append(fresh)
        self.read = self.pool._index(heads)
        self.write = None
        if (
            any(n and fresh != [head] for n, fresh, head in zip(lengths, rows, heads, strict=True))
            or 0 in lengths
        ):
            depth = max(map(len, rows))
            self.write = self.pool._index(
                [[fresh[i] if i < len(fresh) else -1 for fresh in rows] for i in range(depth)]
            )
        return undo

    def cancel(self, undo: Any) -> None:
        self.refs, self.unused = undo
        self.later = []

    def arguments(self, layer: int) -> dict[str, Array]:
        out = {
            "state": self.rows[layer],
            "state_indices": self.read,
            "state_layout": self.pool.state_layout,
        }
        if self.write is not None:
            out["snapshot_indices"] = self.write
        if self.pool._cu is not None:
            out["cu_seqlens"] = self.pool._cu
        return out

    def run(self, layer: int, q: Array, k: Array, v: Array, **options: Any) -> Array:
        return gated_delta_rule_(q, k, v, backend=self.pool.backend, **self.arguments(layer), **options)

    def state(self, place: int, s: LiveSequence) -> Array:
        return self.rows.read(s.rows[0])

    def put(self, place: int, s: LiveSequence, states: Array) -> None:
        self.rows.write(s.rows[0], states)

    def nbytes(self) -> Mapping[str, int]:
        return {"states": self.rows.nbytes(), "log": 0}
