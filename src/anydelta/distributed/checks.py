"""What rule and mixer check alike before anything is sent, and how they run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch
import torch.distributed as dist

from .peers import Told


def check_device(op: str, group: dist.ProcessGroup | None, x: torch.Tensor) -> None:
    """The group must move tensors of x's device."""
    moves = str(dist.get_backend_config(group))
    if f"{x.device.type}:" not in moves:
        raise ValueError(
            f"{op}: requires a group that moves tensors on {x.device.type}; got one of {moves}. Move the tensors, or "
            'give init_process_group a backend for both, as "cpu:gloo,cuda:nccl"'
        )


def digest(cu_seqlens: Sequence[int] | None) -> str:
    """A short text that is the same for the same numbers."""
    if cu_seqlens is None:
        return "none"
    text = ",".join(map(str, cu_seqlens))
    return (
        text
        if len(text) <= 64
        else f"{len(cu_seqlens)} numbers {hashlib.sha256(text.encode()).hexdigest()[:16]}"
    )


def check_sequences(op: str, cu_seqlens: list[int] | None, told: Sequence[Told]) -> list[int]:
    """The cu_seqlens of the whole; of a batch, whose rows are all cut alike, one sequence.

    Raises:
        ValueError: the same on every rank, which all have the same numbers.
    """
    total = sum(x.tokens for x in told)
    if cu_seqlens is None:
        return [0, total]
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != total:
        raise ValueError(
            f"{op}: cu_seqlens must start at 0 and end at the tokens of all ranks together, {total}; got "
            f"{cu_seqlens[0]} and {cu_seqlens[-1]}"
        )
    if any(b < a for a, b in pairwise(cu_seqlens)):
        raise ValueError(
            f"{op}: cu_seqlens must not decrease; got {cu_seqlens if len(cu_seqlens) <= 16 else '...'}"
        )
    return cu_seqlens


@contextmanager
def quiet(x: torch.Tensor) -> Iterator[None]:
    """Neither gradients nor a lower precision of products (autocast)."""
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        yield
