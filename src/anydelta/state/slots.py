"""The slots form of `StatePool`: the last states of each sequence, each a row of the pool."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice, takewhile
from typing import Any

from ..core.arrays import Array
from ..core.dispatch import UnsupportedError
from ..rule.op import gated_delta_rule_
from .base import Pool
from .rows import DeviceRows, HostRows
from .sequence import LiveSequence, Saved, Sequences, Step, put


@dataclass
class _Plan:
    read: Array
    """[N] the rows that the step reads."""
    write: Array
    """[n, N] the rows that it writes, newest first, -1 for none; None if it writes the rows that it reads."""
    written: set[int]
    overwritten: list[int]
    """Rows that are written and that `cancel` must restore."""
    copies: list[tuple[int, int]]
    """(row, the row that is copied to it before the step)."""


class Slots:
    """The last states of each sequence, as rows [layers, P, HV, K, V], which forks share.

    P = capacity * snapshots rows always suffice: a sequence holds at most `snapshots` of them.
    """

    arrays = ()

    def __init__(self, pool: Pool, tail: tuple[int, ...]):
        self.pool = pool
        self.P = P = pool.capacity * pool.snapshots
        self.rows: HostRows | DeviceRows
        if pool.resident is None:
            self.rows = HostRows(pool._zeros((pool.layers, P, *tail)))
        else:
            self.rows = DeviceRows(pool.resident, pool.layers, (P, *tail), pool.dtype)
        self.saved = Saved()

    def connect(self) -> None:
        pass

    def write(self, row: int, states: Array) -> None:
        self.rows.write(row, states)

    def recorded(self, s: LiveSequence) -> int:
        return len(s.rows) - 1

    def take_back(self, s: LiveSequence, n: int) -> tuple[tuple[int, ...], int]:
        return s.rows[n:], 0

    def fold(self, sequences: Sequences, batch: list[int]) -> None:
        self.pool._accept(sequences)

    def begin(self, step: Step, sequences: Sequences) -> None:
        """Choose the rows that this step writes: none that stays in a history, and none that another sequence
        reads."""
        keep = self.pool.snapshots if step.record else 1
        found = [s for place in step.batch if (s := sequences[place]) is not None]
        heads = [s.rows[0] for s in found]
        counts = [min(n, keep) for n in step.lengths]
        kept = [s.rows[: keep - n] if n else s.rows for s, n in zip(found, counts, strict=True)]

        others = {row for i, s in enumerate(sequences) if s and i not in step.batch for row in s.rows}
        busy = others.union(*kept)
        past = {row for s in found for row in s.rows}
        spare = [row for row in range(self.P) if row not in busy and row not in past]
        spare += sorted(past - busy - set(heads))  # rows that cancel would restore go last
        given_up: dict[
            int, list[int]
        ] = {}  # states that only this step reads and no history keeps: by row, the sequences that read them
        for i, head in enumerate(heads):
            if head not in busy:
                given_up.setdefault(head, []).append(i)
        own = {readers[0]: row for row, readers in given_up.items() if len(readers) == 1}
        missing = max(0, sum(counts) - len(spare))
        mine = (
            dict(list(own.items())[:missing]) if step.undo else own
        )  # in place is faster, elsewhere can be undone
        copies = []
        for row, readers in given_up.items():
            # Sequences that share a state all leave it at once, and only that row is free: the last sequence writes
            # there, and the others read copies in the rows that they will write.
            if len(readers) > 1 and missing > len(mine):
                mine[readers[-1]] = row
                copies += [(i, row) for i in readers[:-1]]

        rows, take = [], iter(spare)
        for i, n in enumerate(counts):
            fresh = [mine[i]] if i in mine else []
            rows.append(fresh + list(islice(take, n - len(fresh))))
        for i, _ in copies:
            heads[i] = rows[i][0]
        for i, (place, s) in enumerate(zip(step.batch, found, strict=True)):
            sequences[place] = s._replace(rows=(*rows[i], *kept[i]))

        write = None
        if (
            any(n and fresh != [head] for n, fresh, head in zip(counts, rows, heads, strict=True))
            or 0 in counts
        ):
            depth = max(map(len, rows))
            write = self.pool._index(
                [[fresh[i] if i < len(fresh) else -1 for fresh in rows] for i in range(depth)]
            )
        step.plan = _Plan(
            self.pool._index(heads), write, {row for fresh in rows for row in fresh}, list(mine.values()),
            [(rows[i][0], row) for i, row in copies],
        )  # fmt: skip
        step.plan.overwritten += [to for to, _ in step.plan.copies]
        if not (step.undo and step.plan.overwritten):
            self.saved.not_needed()

    def cancel(self, step: Step, sequences: Sequences) -> list[int]:
        """Put the states back; `sequences` are those before the step. Returns those that are lost."""
        for layer in step.saved:
            self._put_back(step, layer)
        lost = []
        for place in step.batch if step.touched else []:
            s = sequences[place]
            assert s is not None
            if not step.undo and s.rows[0] in step.plan.written:
                lost.append(place)
            older = takewhile(lambda row: row not in step.plan.written, s.rows[1:])
            sequences[place] = s._replace(rows=(s.rows[0], *older))
        return lost

    def _overwritten(self, step: Step) -> list[tuple[Array, list[int]]]:
        return [(self.rows, step.plan.overwritten)]

    def _put_back(self, step: Step, layer: int) -> None:
        self.saved.restore(layer, self._overwritten(step))

    def arguments(self, step: Step, layer: int) -> dict[str, Array]:
        """After this call the layer may write its rows."""
        plan = step.plan
        if plan.overwritten and step.undo:
            if layer in step.saved:  # a second attempt
                self._put_back(step, layer)
            else:
                self.saved.save(layer, self._overwritten(step))
                step.saved.add(layer)
        step.touched.add(layer)
        for to, source in plan.copies:
            put(self.rows[layer], to, self.rows[layer][source])
        out = {"state": self.rows[layer], "state_indices": plan.read, "state_layout": self.pool.state_layout}
        if plan.write is not None:
            out["snapshot_indices"] = plan.write
        if step.cu is not None:
            out["cu_seqlens"] = step.cu
        return out

    def run(self, step: Step, layer: int, q: Array, k: Array, v: Array, **options: Any) -> Array:
        try:
            return gated_delta_rule_(
                q, k, v, backend=self.pool.backend, **self.arguments(step, layer), **options
            )
        except BaseException as error:
            if layer in step.saved:
                self._put_back(step, layer)
            if isinstance(error, (ValueError, TypeError, UnsupportedError)):  # refused: nothing was written
                step.touched.discard(layer)
            raise

    def state(self, place: int, s: LiveSequence) -> Array:
        return self.rows.read(s.rows[0])

    def nbytes(self) -> Mapping[str, int]:
        return {"states": self.rows.nbytes() + self.saved.nbytes(), "log": 0}
