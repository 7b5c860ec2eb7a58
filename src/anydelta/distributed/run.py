"""How a rank runs its piece: the same for rule and mixer.

    1. sequences that begin here run at once: their states are known
    2. a sequence that passes through is summarised: what its tokens make of any state
    3. the scan gives the state in front of the sequence that enters
    4. that sequence runs, from this state
    5. every sequence's final state goes to all ranks

Only a piece inside one sequence is read twice, which is the work of three: S, P, and the outputs. Running it again is
as exact as one process is. To correct outputs from a zero state by S_0^T (P_t^T q_t) instead takes about a sixth less
time, but keeps K more numbers a token and head, has twice the error in half types, and comes too late for the norm of
the mixer (`anydelta bench pieces`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ..rule.spec import CallSpec
from ..rule.transition import CHUNK
from .checks import check_sequences
from .peers import Peers, Summary, Told, entering_state
from .pieces import Piece, pieces


class Tokens(Protocol):
    """The tokens of a piece, with the states of its sequences, which advance."""

    states: list[torch.Tensor]
    """By row: one a sequence of the piece, or one a row of the batch. The last of the list is the rule's."""

    def outputs(self, tokens: slice, rows: slice, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
        """Run tokens of the piece, whose sequences have these rows. Returns their outputs."""
        ...

    def summary(self) -> Summary:
        """What the whole piece, inside one sequence, makes of any state."""
        ...

    def empty(self) -> torch.Tensor:
        """Memory for the outputs of the piece."""
        ...


@dataclass
class Layout:
    """The sequences of a call: rows of the batch, or packed."""

    packed: bool
    cu_seqlens: list[int]
    """Of the whole; one sequence for a batch, whose rows are cut alike."""
    B: int
    device: torch.device | str
    """Where cu_seqlens are."""

    def rows(self, sequences: range) -> slice:
        """The rows of these sequences in a state [N, ...]."""
        if not self.packed:
            return slice(0, self.B if len(sequences) else 0)
        return slice(sequences.start, sequences.stop)

    def part(self, piece: Piece, rows: slice, begin: int, end: int) -> torch.Tensor | None:
        """The cu_seqlens of tokens begin to end of a piece, for these of its sequences."""
        if not self.packed:
            return None
        first = piece.sequences.start
        bounds = self.cu_seqlens[first + rows.start : first + rows.stop + 1]
        inside = [min(max(n - piece.begin, begin), end) - begin for n in bounds]
        return torch.tensor(inside, device=self.device)


def placed(
    op: str, spec: CallSpec, cu_seqlens: list[int] | None, device: torch.device, told: Sequence[Told]
) -> tuple[list[Piece], Layout]:
    """The pieces of all ranks, and the layout of the whole."""
    whole = check_sequences(op, cu_seqlens, told)
    return pieces([x.tokens for x in told], whole), Layout(spec.packed, whole, spec.B, device)


def run(peers: Peers, layout: Layout, piece: Piece, tokens: Tokens, state_layout: str) -> torch.Tensor:
    """The outputs of a piece; its states advance."""
    T, split = piece.tokens, piece.split
    both = tokens.empty() if 0 < split < T else None

    def outputs(begin: int, end: int, rows: slice) -> torch.Tensor:
        if both is None:
            return tokens.outputs(slice(begin, end), rows, layout.part(piece, rows, begin, end))
        for at in range(begin, end, CHUNK):
            to = min(at + CHUNK, end)
            both[:, at:to] = tokens.outputs(slice(at, to), rows, layout.part(piece, rows, at, to))
        return both

    o = both
    count = len(tokens.states[-1])
    if split < T:
        o = outputs(split, T, slice(1 if split else 0, count))
    state = tokens.states[-1]
    leaving = slice(0, count) if not layout.packed else slice(max(count - 1, 0), count)
    own: Summary | None = None
    if piece.after:
        own = tokens.summary() if piece.inside else (state[leaving], None)
    entering = slice(0, count) if not layout.packed else slice(0, min(count, 1))
    found = entering_state(peers, piece, own, state[entering], state_layout)
    if found is not None:
        state[entering] = found
        o = outputs(0, split, entering)
    return tokens.empty() if o is None else o


def final_states(
    peers: Peers,
    layout: Layout,
    held: Sequence[Piece],
    own: Sequence[torch.Tensor],
    begun: Sequence[torch.Tensor],
) -> list[torch.Tensor]:
    """The final states [N, ...] on every rank: `begun` where a sequence has no token, else from the rank of its last.

    `own` are the states of this rank's sequences. Each is sent once, by the rank that has it.
    """
    results = []
    for mine, final in zip(own, begun, strict=True):
        for rank, piece in enumerate(held):
            rows = layout.rows(piece.ending)
            if rank == peers.rank:
                final[rows] = mine[: rows.stop - rows.start]
            peers.share(final[rows], rank)
        results.append(final)
    return results
