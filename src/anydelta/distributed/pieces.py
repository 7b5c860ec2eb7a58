"""Which rank holds what of the sequences. Plain numbers: every rank computes the same from the lengths of all."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True)
class Piece:
    """The tokens begin to end, of all ranks' together, that one rank holds."""

    begin: int
    end: int
    sequences: range
    """Those that have tokens here, and empty ones between them."""
    before: tuple[int, ...]
    """The ranks that hold earlier tokens of the first sequence, in order."""
    after: tuple[int, ...]
    """The ranks that hold later tokens of the last sequence, in order."""
    split: int
    """How many tokens belong to a sequence that began on an earlier rank."""

    @property
    def tokens(self) -> int:
        return self.end - self.begin

    @property
    def inside(self) -> bool:
        """Whether all tokens are of one sequence that neither begins nor ends here."""
        return bool(self.before and self.after) and len(self.sequences) == 1

    @property
    def ending(self) -> range:
        """The sequences whose last token is here."""
        return self.sequences[: len(self.sequences) - bool(self.after)]


def pieces(lengths: Sequence[int], cu_seqlens: Sequence[int]) -> list[Piece]:
    """The piece of every rank, given how many tokens each holds. Empty pieces hold no sequence."""
    ends = list(accumulate(lengths))
    held = []
    for tokens, end in zip(lengths, ends, strict=True):
        first = bisect_right(cu_seqlens, end - tokens) - 1
        last = bisect_right(cu_seqlens, end - 1) - 1
        held.append(range(first, last + 1) if tokens else range(0))
    holders: dict[int, list[int]] = {}
    for rank, sequences in enumerate(held):
        for n in {*sequences[:1], *sequences[-1:]}:
            holders.setdefault(n, []).append(rank)
    found = []
    for rank, (tokens, end, sequences) in enumerate(zip(lengths, ends, held, strict=True)):
        before = tuple(r for n in sequences[:1] for r in holders[n] if r < rank)
        after = tuple(r for n in sequences[-1:] for r in holders[n] if r > rank)
        split = min(cu_seqlens[sequences[0] + 1], end) - (end - tokens) if before else 0
        found.append(Piece(end - tokens, end, sequences, before, after, split))
    return found


def windows_needed(
    rank: int, held: Sequence[Piece], counts: Sequence[Sequence[int]], width: int
) -> list[int]:
    """The ranks whose last inputs make the convolution window in front of a rank's piece, the nearest first.

    counts[r][b]: how many of the last `width` inputs, row by row, rank r knows of the sequence that leaves it.
    """
    needed: list[int] = []
    have: list[int] = []
    for earlier in reversed(held[rank].before):
        needed.append(earlier)
        have = [a + b for a, b in zip(have or [0] * len(counts[earlier]), counts[earlier], strict=True)]
        if min(have) >= width:
            break
    return needed
