"""One step of vLLM: its sequences, their rows in the pools, and the places of their tokens.

A batch has two kinds of sequences. A plain one (prefill, decode) continues from its row or starts new. A drafted one
has the last token and its drafts. It continues from the row after the accepted tokens, and the state after each of its
tokens goes to a separate row. All of this is read once from vLLM's metadata and kept there for all layers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

NULL_BLOCK = 0
"""vLLM's block for sequences without a block. Nothing is read from it or written to it."""


NEW = "anydelta_new"
"""The attribute that we add to metadata: which drafted sequences are new (layers.py)."""


class Plain(NamedTuple):
    """N sequences whose rows are read and written."""

    tokens: torch.Tensor | None
    """The places of their tokens in the batch. None: its first `total` rows."""
    total: int
    cu_seqlens: torch.Tensor | None
    """[N + 1] int32. None: one token each."""
    rows: torch.Tensor
    """[N] int32, -1 for the null block."""
    fresh: torch.Tensor | None
    """int64: the rows that start new, whatever they hold."""


class Windows(NamedTuple):
    """Where the convolution of drafted sequences reads. The inputs of sequence n: its S columns, then its tokens."""

    taps: torch.Tensor
    """[T, W]: the inputs of a token, as rows of [N * (S + longest), C]."""
    kept: torch.Tensor
    """[N, S]: the inputs that become the new columns."""


class Drafted(NamedTuple):
    """N sequences of a token and its drafts."""

    tokens: torch.Tensor | None
    total: int
    cu_seqlens: torch.Tensor
    rows: torch.Tensor
    """[N] int32: the row after the last accepted token."""
    written: torch.Tensor
    """[longest, N] int32: `snapshot_indices`, the rows of the states after each token."""
    offsets: torch.Tensor
    """[N]: the first column of a window, the number of accepted drafts."""
    slots: torch.Tensor
    """[N] int64: the rows of the windows."""
    live: torch.Tensor | None
    """The sequences that have a row of windows. None: all."""
    fresh: torch.Tensor | None
    """int64: the rows that start new. vLLM treats a prompt of one token as drafted, without drafts."""
    padded: torch.Tensor
    """[N, longest]: the tokens of each sequence, padded with its last one."""
    windows: dict[tuple[int, int], Windows]

    def windows_of(self, taps: int, columns: int) -> Windows:
        """For a convolution of W taps over pools of S columns."""
        found = self.windows.get((taps, columns))
        if found is None:
            found = self.windows[taps, columns] = self._windows(taps, columns)
        return found

    def _windows(self, W: int, S: int) -> Windows:
        N, longest = self.padded.shape
        lengths = self.cu_seqlens.diff().long()
        base = torch.arange(N) * (S + longest)
        offsets = self.offsets[:, None]
        # Token t of a sequence reads inputs t .. t + W - 1 of [its window, its tokens].
        reach = torch.arange(longest)[:, None] + torch.arange(W)
        inputs = torch.where(reach < W - 1, offsets[:, :, None] + reach, S + reach - (W - 1))
        inputs += base[:, None, None]
        mask = torch.arange(longest) < lengths[:, None]
        # The next window begins at the column of the number of accepted drafts, however many tokens there are. The new
        # tokens follow W - 2 columns later. Columns after them are not read.
        column = torch.arange(S)
        new = column - (W - 2)
        kept = torch.where(
            new < 0, offsets + 1 + column, torch.where(new < lengths[:, None], S + new, column)
        )
        return Windows(inputs[mask], (kept + base[:, None]).flatten())


class Step(NamedTuple):
    total: int
    """Tokens of the batch. Later rows of the arrays are padding."""
    plain: Plain | None
    drafted: Drafted | None


def step_of(metadata: Any) -> Step:
    """The step that a GDNAttentionMetadata of vLLM describes."""
    found: Step | None = metadata.__dict__.get("anydelta")
    if found is None:
        found = metadata.anydelta = _read(metadata)
    return found


def _read(m: Any) -> Step:
    N = m.num_decodes + m.num_prefills
    if m.spec_sequence_masks is None:
        return Step(m.num_actual_tokens, _plain(m, N, None) if N else None, None)
    alone = N == 0
    return Step(
        m.num_actual_tokens,
        None if alone else _plain(m, N, m.non_spec_token_indx),
        _drafted(m, None if alone else m.spec_token_indx),
    )


def _plain(m: Any, N: int, tokens: torch.Tensor | None) -> Plain:
    rows = _rows(m.non_spec_state_indices_tensor[:N])
    cu_seqlens = m.non_spec_query_start_loc[: N + 1].int().contiguous()
    fresh = None
    if m.num_prefills:
        fresh = rows[~m.has_initial_state[:N]]
        fresh = fresh[fresh >= 0].long()
    total = int(cu_seqlens[-1])
    single = m.num_prefills == 0 and total == N
    return Plain(
        None if tokens is None else tokens[:total].long(),
        total,
        None if single else cu_seqlens,
        rows,
        fresh if fresh is not None and fresh.numel() else None,
    )


def _drafted(m: Any, tokens: torch.Tensor | None) -> Drafted:
    N = m.num_spec_decodes
    blocks = m.spec_state_indices_tensor[:N]
    cu_seqlens = m.spec_query_start_loc[: N + 1].int().contiguous()
    lengths = cu_seqlens.diff().long()
    offsets = (m.num_accepted_tokens[:N].long() - 1).clamp_(min=0)
    longest = max(1, int(lengths.max()))
    total = int(cu_seqlens[-1])
    # Slot s of the snapshots is the state s tokens before the last one; block t takes the state after token t.
    slot = torch.arange(longest)[:, None]
    block = (lengths - 1 - slot).clamp_(min=0)
    written = _rows(blocks.long().gather(1, block.T).T)
    slots = blocks[:, 0].long()
    live = slots != NULL_BLOCK
    new = m.__dict__.get(NEW)
    fresh = None if new is None else slots[new[:N] & live]
    padded = torch.minimum(torch.arange(longest), (lengths - 1).clamp(min=0)[:, None])
    return Drafted(
        None if tokens is None else tokens[:total].long(),
        total,
        cu_seqlens,
        _rows(blocks.long().gather(1, offsets[:, None])[:, 0]),
        written,
        offsets,
        slots,
        None if bool(live.all()) else live.nonzero()[:, 0],
        fresh if fresh is not None and fresh.numel() else None,
        (cu_seqlens[:-1, None] + padded).clamp_(max=max(0, total - 1)),
        {},
    )


def _rows(blocks: torch.Tensor) -> torch.Tensor:
    """Blocks as rows of a pool."""
    return torch.where(blocks == NULL_BLOCK, -1, blocks).int().contiguous()
