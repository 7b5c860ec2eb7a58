"""The short convolutions of fla (`ShortConvolution`) and of the package causal_conv1d, on anydelta.mixer.convolution.

fla's cache holds the last W inputs of each sequence, [N, D, W], where W is the width of the kernel. causal_conv1d's
state holds the last W - 1 or more, [B, D, L]. Sums are in float32 (float64 for float64), results in x's dtype.
"""

from __future__ import annotations

import torch
from torch import nn

from ...core.dispatch import UnsupportedError
from ...mixer.convolution import convolve, sequence_ids
from .common import sequences

_SILU = ("silu", "swish")


class ShortConvolution(nn.Conv1d):
    """A causal depthwise convolution with an activation and a cache; `weight` is [D, 1, W].

    `backend` ("triton", "cuda") and `use_fast_conv1d` choose kernels of fla. They have no effect here.

    Raises:
        ValueError: an activation other than SiLU or none, or another backend.
        TypeError: an argument that fla's does not have.
    """

    def __init__(
        self,
        hidden_size: int,
        kernel_size: int,
        bias: bool = False,
        activation: str | None = "silu",
        backend: str | None = "triton",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: object,
    ):
        op = "fla.ShortConvolution"
        _unknown(op, kwargs, ("use_fast_conv1d",))
        _check_activation(op, activation)
        if backend not in ("triton", "cuda"):
            raise ValueError(f"{op}: backend must be triton or cuda; got {backend!r}. Leave it out")
        super().__init__(
            hidden_size, hidden_size, kernel_size, padding=kernel_size - 1, groups=hidden_size, bias=bias,
            device=device, dtype=dtype,
        )  # fmt: skip
        self.hidden_size = hidden_size
        self.activation = activation
        self.backend = backend

    def forward(  # type: ignore[override]
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        cache: torch.Tensor | None = None,
        output_final_state: bool = False,
        cu_seqlens: torch.Tensor | None = None,
        chunk_indices: object = None,
        **kwargs: object,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x [B, T, D] to (y [B, T, D], cache [N, D, W] or None).

        Packed sequences: B = 1 and `cu_seqlens` [N + 1]; `cache` [N, D, W] holds the inputs before each of them. A call
        with one token per sequence and without autograd overwrites the given cache with the new one, as fla's does.
        `mask` [B, T] zeroes inputs. `residual` is added to y. `chunk_indices` is a hint of fla's and is not read.

        Raises:
            ValueError: shapes that do not fit, or `mask` with `cu_seqlens`.
        """
        op = "fla.ShortConvolution"
        _unknown(op, kwargs, ("seq_idx", "cu_seqlens_cpu", "cp_context"))
        given = [name for name, value in kwargs.items() if value is not None and name != "cu_seqlens_cpu"]
        if given:
            raise UnsupportedError(
                f"{op}: {given[0]} is not supported; leave it None. Packed rows: cu_seqlens"
            )
        if x.ndim != 3 or x.shape[2] != self.hidden_size:
            raise ValueError(f"{op}: x must be [B, T, D = {self.hidden_size}]; got {list(x.shape)}")
        if mask is not None:
            if cu_seqlens is not None:
                raise ValueError(f"{op}: mask and cu_seqlens exclude each other; got both")
            x = x * mask.unsqueeze(-1)
        weight, width = self.weight.squeeze(1), self.weight.shape[2]
        if cu_seqlens is not None:
            sequences(op, "cu_seqlens", cu_seqlens, x.shape[0], x.shape[1])
        N = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
        if cache is not None and cache.shape != (N, self.hidden_size, width):
            raise ValueError(
                f"{op}: cache must be [N, D, W] = {[N, self.hidden_size, width]}; got {list(cache.shape)}"
            )
        before = (
            x.new_zeros(N, width, self.hidden_size) if cache is None else cache.transpose(1, 2).to(x.dtype)
        )
        if cu_seqlens is None:
            row = torch.cat((before, x), 1)  # [B, W + T, D]
            y = convolve(row, weight, self.bias, self.activation)[:, width:]
            state = row[:, row.shape[1] - width :]
        else:
            # Earlier inputs of each sequence go in front of it, so that no sequence reads another.
            ends = cu_seqlens.to(x.device).long()
            tokens = torch.arange(x.shape[1], device=x.device)
            tokens = tokens + width * torch.bucketize(tokens, ends[1:], right=True) + width
            starts = ends[:-1] + width * torch.arange(N, device=x.device)
            windows = (starts.unsqueeze(1) + torch.arange(width, device=x.device)).flatten()
            row = x.new_zeros(x.shape[1] + N * width, self.hidden_size)
            row = row.index_copy(0, tokens, x[0]).index_copy(0, windows, before.flatten(0, 1)).unsqueeze(0)
            y = convolve(row, weight, self.bias, self.activation).index_select(1, tokens)
            last = (windows.view(N, width) + ends.diff().unsqueeze(1)).flatten()
            state = row[0].index_select(0, last).view(N, width, self.hidden_size)
        if residual is not None:
            y = y + residual
        new = None
        if cache is not None and not torch.is_grad_enabled() and _one_token_each(x, cu_seqlens):
            cache.copy_(state.transpose(1, 2))
            new = cache
        elif output_final_state:
            new = state.transpose(1, 2).contiguous()
        return y, new if output_final_state else None

    @property
    def state_size(self) -> int:
        """How many numbers the cache of a sequence has."""
        return int(self.hidden_size * self.weight.shape[2])


def causal_conv1d_fn(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: torch.Tensor | None = None,
    activation: str | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """x [B, D, T], weight [D, W] to y [B, D, T]; with return_final_states (y, the last W - 1 inputs [B, D, W - 1]).

    Packed rows: `seq_idx` [B, T] numbers them. `cu_seq_lens_q` [N + 1] is an addition with the same meaning, because
    Transformers passes it to every function that has it.

    Raises:
        ValueError: an activation other than SiLU or none, shapes that do not fit, packed rows with states.
    """
    op = "causal_conv1d_fn"
    _check_activation(op, activation)
    packed = seq_idx is not None or cu_seq_lens_q is not None
    if packed and (initial_states is not None or return_final_states):
        raise ValueError(f"{op}: packed rows and states exclude each other; got both")
    if x.ndim != 3 or weight.shape[:-1] != (x.shape[1],):
        raise ValueError(
            f"{op}: x must be [B, D, T] and weight [D, W]; got {list(x.shape)}, {list(weight.shape)}"
        )
    row, T, width = x.transpose(1, 2), x.shape[2], weight.shape[1]
    if seq_idx is not None:
        if (
            seq_idx.ndim != 2
            or seq_idx.shape[0] not in (1, x.shape[0])
            or not 0 < seq_idx.shape[1] <= max(T, 1)
        ):
            raise ValueError(f"{op}: seq_idx must be [B, T] = {[x.shape[0], T]}; got {list(seq_idx.shape)}")
    elif cu_seq_lens_q is not None:  # for both: earlier columns, which have no number, come from a cache
        sequences(op, "cu_seq_lens_q", cu_seq_lens_q, 1, T, least=0)  # all rows are packed alike
    ids = sequence_ids(T, seq_idx, cu_seq_lens_q, x.device) if packed else None
    if initial_states is not None:
        if initial_states.shape != (x.shape[0], x.shape[1], width - 1):
            raise ValueError(f"{op}: initial_states must be [B, D, W - 1]; got {list(initial_states.shape)}")
        row = torch.cat((initial_states.transpose(1, 2).to(x.dtype), row), 1)
    y = convolve(row, weight, bias, activation, ids)[:, row.shape[1] - T :].transpose(1, 2)
    if not return_final_states:
        return y
    final = nn.functional.pad(row, (0, 0, max(0, width - 1 - row.shape[1]), 0))
    final = final[:, final.shape[1] - (width - 1) :].transpose(1, 2)
    return y, final if final_states_out is None else final_states_out.copy_(final)


def causal_conv1d_update(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: object = None,
    conv_state_indices: object = None,
) -> torch.Tensor:
    """The next tokens x [B, D] or [B, D, T]; conv_state [B, D, L], L >= W - 1, is advanced in place.

    Raises:
        ValueError: an activation other than SiLU or none, shapes that do not fit.
        UnsupportedError: cache_seqlens, conv_state_indices.
    """
    op = "causal_conv1d_update"
    _check_activation(op, activation)
    for name, value in (("cache_seqlens", cache_seqlens), ("conv_state_indices", conv_state_indices)):
        if value is not None:
            raise UnsupportedError(f"{op}: {name} is not supported; leave it None")
    tokens = x.unsqueeze(-1) if x.ndim == 2 else x
    width, length = weight.shape[1], conv_state.shape[-1]
    if tokens.ndim != 3 or conv_state.shape[:2] != tokens.shape[:2] or length < width - 1:
        raise ValueError(
            f"{op}: x must be [B, D] or [B, D, T] and conv_state [B, D, L] with L >= {width - 1}; got "
            f"{list(x.shape)}, {list(conv_state.shape)}"
        )
    row = torch.cat((conv_state.to(x.dtype), tokens), -1)
    conv_state.copy_(row[..., row.shape[-1] - length :])
    y = convolve(row.transpose(1, 2), weight, bias, activation)[:, length:].transpose(1, 2)
    return y.squeeze(-1) if x.ndim == 2 else y


def _one_token_each(x: torch.Tensor, cu_seqlens: torch.Tensor | None) -> bool:
    return x.shape[1] == 1 if cu_seqlens is None else bool((cu_seqlens.diff() == 1).all())


def _check_activation(op: str, activation: object) -> None:
    if activation is not None and activation not in _SILU:
        raise ValueError(f"{op}: activation must be silu, swish or None; got {activation!r}")


def _unknown(op: str, kwargs: dict[str, object], known: tuple[str, ...]) -> None:
    unknown = [name for name in kwargs if name not in known]
    if unknown:
        raise TypeError(f"{op}: got an unexpected keyword argument {unknown[0]!r}")
