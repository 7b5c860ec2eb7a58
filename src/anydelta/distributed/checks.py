"""What rule and mixer check alike before anything is sent, and how they run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch
import torch.distributed as dist

from ..rule.spec import CallSpec
from .peers import Told


def check_device(op: str, group: dist.ProcessGroup | None, x: torch.Tensor) -> None:
    """The group must move tensors of x's device."""
    moves = str(dist.get_backend_config(group))
    if f"{x.device.type}:" not in moves:
        raise ValueError(
            f"{op}: requires a group that moves tensors on {x.device.type}; got one of {moves}. Move the tensors, or "
            'give init_process_group a backend for both, as "cpu:gloo,cuda:nccl"'
        )


OF_GATES = {"A_log": "A_log", "dt_bias": "dt_bias"}


def sizes(spec: CallSpec) -> dict[str, object]:
    """What the ranks of a call share of its sizes and dtypes, in words."""
    found: dict[str, object] = {n: getattr(spec, n) for n in ("B", "H", "HV", "K", "V")}
    return found | {
        "the number of sequences": spec.N,
        "the number of g's dimensions": 4 if spec.kda else 3,
        "q's dtype": spec.dtype,
        "the state's dtype": spec.state_dtype,
    }


def whether_given(given: Sequence[str], names: Mapping[str, str]) -> dict[str, object]:
    """Which of the optional arrays a call has, by their public names and those of the table."""
    return {f"whether {name} is given": field in given for name, field in names.items()}


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
