"""fla's helpers for padded batches: masks to packed rows and back, and the decorator that caches their results."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def tensor_cache(function: Callable[P, R]) -> Callable[P, R]:
    """The same function, which returns its last result again for the same arguments (the same objects).

    It recomputes if a tensor was written since then, and always while autograd records or a compiler traces.
    """
    last: tuple[list[object], tuple[object, ...], list[int], R] | None = None

    @functools.wraps(function)
    def remembering(*args: P.args, **kwargs: P.kwargs) -> R:
        nonlocal last
        given = [*args, *kwargs.values()]
        tensors = [x for x in given if isinstance(x, torch.Tensor)]
        if (
            torch.compiler.is_compiling()
            or any(type(x) is not torch.Tensor or x.is_inference() for x in tensors)
            or (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))
        ):
            return function(*args, **kwargs)
        versions = [x._version for x in tensors]
        found = last
        if found is not None:
            before, names, seen, result = found
            if (
                names == (len(args), *kwargs)
                and len(before) == len(given)
                and all(a is b for a, b in zip(before, given, strict=True))
                and seen == versions
            ):
                return result
        result = function(*args, **kwargs)
        last = given, (len(args), *kwargs), versions, result
        return result

    return remembering


@tensor_cache
def prepare_lens_from_mask(mask: torch.Tensor) -> torch.Tensor:
    """How many tokens each row of a mask [B, T] has: [B], int32."""
    return mask.sum(-1, dtype=torch.int32)


@tensor_cache
def prepare_cu_seqlens_from_mask(mask: torch.Tensor, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    """The starts [B + 1] of a mask's rows [B, T] when their tokens are packed."""
    lengths = prepare_lens_from_mask(mask)
    return torch.cat((lengths.new_zeros(1, dtype=dtype), lengths.cumsum(0, dtype=dtype)))


@tensor_cache
def get_unpad_data(attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """For a mask [B, T]: the indices of its tokens in B * T, the starts of rows [B + 1], the greatest length."""
    indices = attention_mask.flatten().nonzero().flatten()
    longest = int(prepare_lens_from_mask(attention_mask).max()) if len(attention_mask) else 0
    return indices, prepare_cu_seqlens_from_mask(attention_mask), longest


def index_first_axis(x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """x [R, ...] and indices [n] to x[indices]."""
    return x.index_select(0, indices)


def pad_input(
    hidden_states: torch.Tensor, indices: torch.Tensor, batch_size: int, seq_len: int
) -> torch.Tensor:
    """[n, ...] to [batch_size, seq_len, ...]: row i goes to place indices[i]; other places are zeros."""
    out = hidden_states.new_zeros(batch_size * seq_len, *hidden_states.shape[1:])
    out = out.index_copy(0, indices, hidden_states)
    return out.view(batch_size, seq_len, *hidden_states.shape[1:])
