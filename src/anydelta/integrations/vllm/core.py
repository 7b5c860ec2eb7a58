"""The part of a vLLM layer between its projections: convolution, gates, rule and gated norm, for one step.

`run` takes the pools as vLLM keeps them, pages of any stride, and a step (step.py). Plain sequences, any mixture of
prefills and decodes, are one call of `gated_delta_mixer_`. Drafted sequences read their windows at an offset, which the
mixer does not support: torch convolves these few tokens, and `gated_delta_rule_` writes their states.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from ...mixer.op import gated_delta_mixer_
from ...rule.op import gated_delta_rule_
from .step import Drafted, Plain, Step

EPS = 1e-6
"""The eps of the norms of q and k, as in Transformers."""


@dataclass(frozen=True, slots=True)
class Parameters:
    """A layer's parameters outside its projections. H heads of q and k, HV of v, C = 2 H K + HV V channels."""

    conv_weight: torch.Tensor
    """[C, W]"""
    A_log: torch.Tensor
    """[HV]"""
    dt_bias: torch.Tensor
    """[HV], for KDA [HV * K]"""
    norm_weight: torch.Tensor
    """[V]"""
    norm_eps: float
    norm_gate: str
    conv_bias: torch.Tensor | None = None
    lower_bound: float | None = None
    allow_neg_eigval: bool = False


@dataclass(frozen=True, slots=True)
class Inputs:
    """A layer's projections, a row per token. They may be views."""

    qkv: torch.Tensor | tuple[torch.Tensor, ...]
    """[T, C], or three arrays [T, groups, heads / groups * width]"""
    g: torch.Tensor
    """[T, HV], for KDA [T, HV, K]: before its activation"""
    beta: torch.Tensor
    """[T, HV]: a logit"""
    z: torch.Tensor
    """[T, HV * V], or [T, groups, HV / groups * V]"""

    def at(self, tokens: torch.Tensor | None, total: int) -> Inputs:
        """The inputs of some tokens."""

        def some(x: torch.Tensor) -> torch.Tensor:
            return x[:total] if tokens is None else x.index_select(0, tokens)

        qkv = tuple(map(some, self.qkv)) if isinstance(self.qkv, tuple) else some(self.qkv)
        return Inputs(qkv, some(self.g), some(self.beta), some(self.z))


def run(
    step: Step, inputs: Inputs, conv: torch.Tensor, state: torch.Tensor, p: Parameters, out: torch.Tensor
) -> None:
    """One step of a layer.

    Args:
        conv: [P, C, S], S >= W - 1: the windows. Plain sequences keep theirs in the first W - 1 columns.
        state: [P, HV, K, V]. Both pools are advanced in place.
        out: [T or more, HV * V], written: zeros for padding and for sequences in the null block.
    """
    for sequences in (step.plain, step.drafted):
        if sequences is None:
            continue
        given = inputs.at(sequences.tokens, sequences.total)
        if isinstance(sequences, Plain):
            o = _plain(sequences, given, conv, state, p)
        else:
            o = _drafted(sequences, given, conv, state, p)
        out[slice(sequences.total) if sequences.tokens is None else sequences.tokens] = o
    if step.total < out.shape[0]:
        out[step.total :] = 0


def _plain(s: Plain, x: Inputs, conv: torch.Tensor, state: torch.Tensor, p: Parameters) -> torch.Tensor:
    conv = conv[..., : p.conv_weight.shape[1] - 1]
    _clear(s.fresh, conv, state)
    at = 1 if s.cu_seqlens is None else 0  # N rows of one token, or one row of all
    qkv = tuple(y.unsqueeze(at) for y in x.qkv) if isinstance(x.qkv, tuple) else x.qkv.unsqueeze(at)
    o: torch.Tensor = gated_delta_mixer_(
        qkv, conv, state,
        g=x.g.unsqueeze(at), beta=x.beta.unsqueeze(at), z=x.z.unsqueeze(at),
        A_log=p.A_log, dt_bias=p.dt_bias, lower_bound=p.lower_bound, allow_neg_eigval=p.allow_neg_eigval,
        conv_weight=p.conv_weight, conv_bias=p.conv_bias,
        norm_weight=p.norm_weight, norm_eps=p.norm_eps, norm_gate=p.norm_gate, qk_l2norm_eps=EPS,
        cu_seqlens=s.cu_seqlens, state_indices=s.rows,
    )  # fmt: skip
    return o.view(s.total, -1)


def _drafted(s: Drafted, x: Inputs, conv: torch.Tensor, state: torch.Tensor, p: Parameters) -> torch.Tensor:
    _clear(s.fresh, conv, state)
    T, (HV, K, V) = s.total, state.shape[1:]
    qkv = torch.cat([y.reshape(T, -1) for y in x.qkv], -1) if isinstance(x.qkv, tuple) else x.qkv
    q, k, v = _convolved(s, qkv, conv, p).split_with_sizes(_widths(qkv.shape[1], HV * V), -1)
    beta = x.beta.float().sigmoid()
    o: torch.Tensor = gated_delta_rule_(
        q.view(1, T, -1, K), k.view(1, T, -1, K), v.view(1, T, HV, V), state,
        g=x.g.unsqueeze(0), beta=(2 * beta if p.allow_neg_eigval else beta).unsqueeze(0),
        decay="raw", A_log=p.A_log, dt_bias=p.dt_bias, lower_bound=p.lower_bound, qk_l2norm=True, qk_l2norm_eps=EPS,
        cu_seqlens=s.cu_seqlens, state_indices=s.rows, snapshot_indices=s.written,
    )  # fmt: skip
    o = o.view(T, HV, V)
    z = x.z.reshape(T, HV, V).float()
    gate = z.sigmoid() if p.norm_gate == "sigmoid" else F.silu(z)
    o = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + p.norm_eps) * p.norm_weight.float() * gate
    return o.view(T, HV * V).to(x.z.dtype)


def _clear(rows: torch.Tensor | None, conv: torch.Tensor, state: torch.Tensor) -> None:
    if rows is not None:
        conv.index_fill_(0, rows, 0)
        state.index_fill_(0, rows, 0)


def _widths(channels: int, values: int) -> list[int]:
    keys = (channels - values) // 2
    return [keys, keys, values]


def _convolved(s: Drafted, qkv: torch.Tensor, conv: torch.Tensor, p: Parameters) -> torch.Tensor:
    """The convolution's result [T, C] in float32. Advances the windows."""
    S = conv.shape[2]
    windows = s.windows_of(p.conv_weight.shape[1], S)
    pool = conv.transpose(1, 2)  # [P, S, C]
    inputs = torch.cat([pool[s.slots], qkv[s.padded].to(conv.dtype)], 1).flatten(0, 1)
    y = (inputs[windows.taps].float() * p.conv_weight.float().T).sum(1)
    if p.conv_bias is not None:
        y += p.conv_bias.float()
    kept = inputs[windows.kept].unflatten(0, (-1, S))
    if s.live is None:
        pool[s.slots] = kept
    else:
        pool[s.slots[s.live]] = kept[s.live]
    return F.silu(y)
