"""What moves between the ranks of a group: who agrees on a call, the scan of the states, the final states."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist

from .pieces import Piece

Summary = tuple[torch.Tensor, "torch.Tensor | None"]
"""What a run of tokens makes of any state: (S, P), or (its state, None) where it begins the sequence."""


@dataclass
class Told:
    """What a rank says about its piece before any state moves."""

    error: str = ""
    tokens: int = 0
    masked: bool = False
    same: Mapping[str, object] = field(default_factory=dict)
    """What must be the same on every rank, by the name of the argument."""


class Checked(Protocol):
    """A call that a rank has checked."""

    def told(self) -> Told: ...


C = TypeVar("C", bound=Checked)


class Peers:
    """The ranks of a group, numbered from 0 in it."""

    def __init__(self, op: str, group: dist.ProcessGroup | None):
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError(
                f"{op}: requires the processes of torch.distributed; got none. Call "
                "torch.distributed.init_process_group first, and start the program with torchrun"
            )
        self.op, self.group = op, group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError(
                f"{op}: requires a process of the group; got one outside. Call it on the ranks of the group"
            )

    def __global(self, rank: int) -> int:
        return rank if self.group is None else dist.get_global_rank(self.group, rank)

    def all(self, mine: object) -> list[object]:
        """A small object of every rank."""
        if self.size == 1:
            return [mine]
        found: list[object] = [None] * self.size
        dist.all_gather_object(found, mine, group=self.group)
        return found

    def agree(self, check: Callable[[], C]) -> tuple[C, list[Told]]:
        """This rank's checked call, and what all ranks say of theirs. If one of them is invalid, or two differ, all
        raise, and nobody waits.

        Raises:
            ValueError: on every rank; the rank whose own check failed raises its own error.
        """
        try:
            checked = check()
            mine = checked.told()
        except Exception as error:
            self.all(Told(error=f"{type(error).__name__}: {error}"))
            raise
        told = [x for x in self.all(mine) if isinstance(x, Told)]
        for rank, other in enumerate(told):
            if other.error:
                raise ValueError(f"{self.op}: rank {rank} of the group refused its piece. {other.error}")
        for rank, other in enumerate(told):
            for name, value in told[0].same.items():
                got = other.same.get(name)
                if got != value:
                    raise ValueError(
                        f"{self.op}: {name} must be the same on every rank; got {value} on rank 0 and {got} on "
                        f"rank {rank}"
                    )
        return checked, told

    def exchange(
        self, sends: Sequence[tuple[int, torch.Tensor]], receives: Sequence[tuple[int, torch.Tensor]]
    ) -> None:
        """Send and receive tensors of known shapes; returns when all have moved."""
        todo = [dist.P2POp(dist.isend, x, self.__global(rank), self.group) for rank, x in sends]
        todo += [dist.P2POp(dist.irecv, x, self.__global(rank), self.group) for rank, x in receives]
        if todo:
            for work in dist.batch_isend_irecv(todo):
                work.wait()

    def share(self, x: torch.Tensor, rank: int) -> None:
        """Give every rank what one of them has in x."""
        if self.size > 1 and x.numel():
            dist.broadcast(x, self.__global(rank), group=self.group)


def joined(later: Summary, earlier: Summary, layout: str) -> Summary:
    """Two runs, one after the other: P = P_2 P_1, S = P_2 S_1 + S_2. With "vk" all are transposed."""
    S, P = later
    if P is None:
        return later
    before, transition = earlier
    if layout == "kv":
        return P @ before + S, None if transition is None else P @ transition
    return before @ P + S, None if transition is None else transition @ P


def entering_state(
    peers: Peers, piece: Piece, own: Summary | None, like: torch.Tensor, layout: str
) -> torch.Tensor | None:
    """The state in front of a rank's first token, where a sequence enters: the exclusive scan over those that hold it.

    `own` is the summary of the sequence that leaves this rank; `like` has the shape of a state.

    Recursive doubling: in step d = 1, 2, 4, ... the p-th rank of a sequence sends to rank p + d what its last d pieces
    make of a state. A message is K (K + V) numbers a head, or K V from where the sequence began: each of R ranks moves
    log2(R) of them and keeps two. One all_gather would bring every rank R - 1 of them, and keep them all, which is more
    than a piece when R is large. From rank to rank in a row only K V would move, but R - 1 times one after the other.
    """
    at = len(piece.before)
    if piece.inside:
        start, holders = at, (*piece.before, peers.rank, *piece.after)
    else:
        start, holders = 0, (peers.rank, *piece.after)
    square = (*like.shape[:2], *2 * (like.shape[2 if layout == "kv" else 3],))
    known: Summary | None = None
    mine, d = own, 1
    while d <= at or start + d < len(holders):
        sends, receives = [], []
        if start + d < len(holders):
            assert mine is not None
            sends.append((holders[start + d], torch.cat([x.reshape(-1) for x in mine if x is not None])))
        if d <= at:
            whole = at - d < d  # what comes reaches back to where the sequence began
            sizes = [like.numel(), 0 if whole else math.prod(square)]
            receives.append((piece.before[at - d], like.new_empty(sum(sizes))))
        peers.exchange(sends, receives)
        if receives:
            S, P = receives[0][1].split(sizes)
            earlier = S.view(like.shape), None if whole else P.view(square)
            known = earlier if known is None else joined(known, earlier, layout)
            if piece.inside:
                assert own is not None
                mine = joined(own, known, layout)
        d *= 2
    return None if known is None else known[0]
