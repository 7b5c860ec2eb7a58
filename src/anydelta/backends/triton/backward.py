"""Gradients of a call: the launches of chunk_backward.py, and the way from their results to gradients of the inputs.

Only the inputs are kept from the forward pass. Scratch memory grows with the number of tokens: two states per
chunk and head, and rows of q, k and v in float32 for each value head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from ...rule.arguments import Call
from ...rule.spec import CallSpec
from . import chunk, chunk_backward
from .config import Machine
from .launch import KernelCall, Launches, Scratch, _named, _shared


@dataclass
class Found:
    """Float32 gradients of the kernels' inputs: q and k after the norm, log decays, beta after the sigmoid."""

    q: torch.Tensor
    """[B, T, HV, K]; k has the same shape."""
    k: torch.Tensor
    v: torch.Tensor
    """[B, T, HV, V]"""
    g: torch.Tensor
    """[B, T, HV(, K)]"""
    beta: torch.Tensor
    """[B, T, HV]"""
    state: torch.Tensor | None
    """[N, HV, K, V] in the initial state's layout: sequences may share a row of a pool."""


class BackwardLaunches:
    """The launches for the gradients of calls of one geometry."""

    def __init__(self, spec: CallSpec, machine: Machine, strides: Mapping[str, tuple[int, ...]]):
        self.spec = spec
        self.forward = Launches(spec, machine, strides)
        config = self.forward.config
        self.config = self.forward.config = replace(
            config, chunk=config.backward_chunk, prepare_warps=config.back_prepare_warps
        )

    def calls(
        self, call: Call, do: torch.Tensor, d_state: torch.Tensor | None, found: Found
    ) -> Iterator[KernelCall]:
        """The launches in order. `do` [B, T, HV, V] and `d_state` [N, HV, K, V] may have any strides; the last axis of
        `do` is contiguous."""
        spec, config, forward, opt = self.spec, self.config, self.forward, self.spec.options
        scratch = Scratch(spec, call, config.chunk)
        yield from forward.prepare(call, scratch, backward=True)
        columns = -(-spec.V // config.scan_BV)
        programs = spec.N * spec.HV * columns
        new = call.q.new_empty
        states, d_states = (
            new((scratch.slots, spec.HV, spec.K, spec.V), dtype=torch.float32) for _ in range(2)
        )
        deltas = new((spec.B, spec.T, spec.HV, spec.V), dtype=torch.float32)
        args = forward.scan_args(replace(call, o=deltas), scratch)
        more = dict(
            state_out=None, pieces=None, states=states, POOL_OUT=False, SEGMENTS=1, TRANSITIONS=False,
            **_named("u", "nhkv", (0, 0, 0, 0)),
        )  # fmt: skip
        yield KernelCall(chunk.scan, programs, {**args, **more}, config.scan_warps)

        none = (0, 0, 0, 0)
        vk = opt.state_layout == "vk"
        strides = {n: s for n, s in forward.inputs.items() if n[:2] in ("q_", "k_", "ma")}
        strides |= _named("do", "bth", tuple(do.stride()[:3]))
        args = dict(
            q=call.q, k=call.k, do=do, solved=scratch.solved, factors=scratch.factors, ready=scratch.ready,
            ready_last=scratch.ready_last, d_state=d_state, d_initial=found.state, d_states=d_states, dv=found.v,
            mask=_shared(call)["mask"], cu_seqlens=call.cu_seqlens, state_indices=call.state_indices,
            N=spec.N, T=spec.T, **strides,
            **_named("s", "nhvk" if vk else "nhkv", none if d_state is None else tuple(d_state.stride())),
            **_named("u", "nhvk" if vk else "nhkv", none if found.state is None else tuple(found.state.stride())),
            **forward.sizes, V=spec.V, BV=config.scan_BV, C=scratch.C, TILED=opt.heads == "tiled",
            EXACT=scratch.exact, EXACT_O=do.dtype == torch.bfloat16,
        )  # fmt: skip
        yield KernelCall(chunk_backward.back, programs, args, config.back_warps)

        args = dict(
            g=call.g, do=do, **_shared(call), found=scratch.found, factors=scratch.factors, deltas=deltas, dv=found.v,
            dg=found.g, dbeta=found.beta, columns=spec.V,
            **{n: x for n, x in forward.numbers.items() if n not in ("Ks", "eps")},
            **{n: s for n, s in {**forward.inputs, **strides}.items() if n[:2] in ("g_", "do", "ma")},
            HV=spec.HV, K=spec.K, V=spec.V, BV=config.gradients_BV, C=scratch.C, KDA=spec.kda, **forward.gates,
            EXACT_O=do.dtype == torch.bfloat16,
        )  # fmt: skip
        grid = scratch.slots * spec.HV
        yield KernelCall(chunk_backward.pairs, grid, args, config.pairs_warps)
        args |= dict(
            q=call.q, k=call.k, states=states, d_states=d_states, dq=found.q, dk=found.k,
            eps=forward.numbers["eps"], channels=spec.K, **strides, **forward.sizes, L2NORM=opt.qk_l2norm,
            TILED=opt.heads == "tiled", SLICE=min(config.gradients_slice, forward.sizes["BK"]),
        )  # fmt: skip
        yield KernelCall(chunk_backward.gradients, grid, args, config.gradients_warps)


def room(spec: CallSpec, call: Call) -> Found:
    """Memory for the kernels' results: zeros if they may skip a sequence."""
    new = call.q.new_zeros if spec.pooled else call.q.new_empty
    rows = (spec.B, spec.T, spec.HV)
    state = None
    if call.state_in is not None:
        state = new((spec.N, *call.state_in.shape[1:]), dtype=torch.float32)
    return Found(
        q=new((*rows, spec.K), dtype=torch.float32),
        k=new((*rows, spec.K), dtype=torch.float32),
        v=new((*rows, spec.V), dtype=torch.float32),
        g=new((*rows, spec.K) if spec.kda else rows, dtype=torch.float32),
        beta=new(rows, dtype=torch.float32),
        state=state,
    )


def of_inputs(spec: CallSpec, call: Call, found: Found) -> dict[str, torch.Tensor | None]:
    """The gradients of the call's arrays, in their dtypes.

    Inputs with zero gradients (masked tokens, skipped sequences) may be NaN.
    """
    opt = spec.options
    state = found.state
    if state is not None and call.state_indices is not None:
        rows = call.state_indices.to(state.device).long()
        pool = state.new_zeros(tuple(call.state_in.shape))
        state = pool.index_add_(0, rows.clamp(min=0), state)  # zeros for a skipped sequence
    out: dict[str, torch.Tensor | None] = {"v": found.v, "state_in": state}
    for name in ("q", "k"):
        dy = _per_qk_head(spec, getattr(found, name))
        out[name] = _through_norm(getattr(call, name), dy, opt.qk_l2norm_eps) if opt.qk_l2norm else dy
    out["beta"] = found.beta
    if opt.beta_is_logit:
        s = call.beta.float().sigmoid()
        out["beta"] = torch.where(found.beta != 0, found.beta * s * (1 - s), 0.0)
    out["g"] = found.g
    if opt.decay == "raw":
        out |= _through_gate(spec, call, found.g)
    return {name: None if grad is None else grad.to(getattr(call, name).dtype) for name, grad in out.items()}


def _per_qk_head(spec: CallSpec, x: torch.Tensor) -> torch.Tensor:
    """[B, T, H, K]: the sum over the value heads of each q/k head."""
    if spec.H == spec.HV:
        return x
    each = spec.HV // spec.H
    tiled = spec.options.heads == "tiled"
    y: torch.Tensor = x.unflatten(2, (each, spec.H) if tiled else (spec.H, each))
    return y.sum(2 if tiled else 3)


def _through_norm(x: torch.Tensor, dy: torch.Tensor, eps: float) -> torch.Tensor:
    """y = r x with r = rsqrt(sum x^2 + eps): dx = r (dy - y <y, dy>). Scaled so that squares stay in float32's
    range."""
    x = torch.where((dy != 0).any(-1, keepdim=True), x.float(), 1.0)
    unit = x.abs().amax(-1, keepdim=True).clamp(min=eps**0.5)
    unit = torch.where(unit > 0, unit, 1.0)
    x = x / unit
    squares = (x * x).sum(-1, keepdim=True) + (eps**0.5 / unit).square()
    r = torch.rsqrt(torch.where(squares == 0, 1.0, squares))
    y = x * r
    return r / unit * (dy - y * (y * dy).sum(-1, keepdim=True))


def _through_gate(spec: CallSpec, call: Call, dg: torch.Tensor) -> dict[str, torch.Tensor | None]:
    """Gradients of gates x = g + dt_bias: log decay = -A softplus(x) or lower_bound sigmoid(A x); A = exp(A_log)."""
    A = dg.new_ones(spec.HV) if call.A_log is None else call.A_log.float().exp()
    A = A[:, None] if spec.kda else A
    x = call.g.float()
    if call.dt_bias is not None:
        x = x + call.dt_bias.float().reshape(x.shape[2:])
    x = torch.where(dg != 0, x, 0.0)
    bound = spec.options.lower_bound
    if bound is None:
        dx = -dg * A * x.sigmoid()
        d_log = -dg * A * torch.nn.functional.softplus(x)
    else:
        s = (A * x).sigmoid()
        dx = dg * (bound * s * (1 - s)) * A
        d_log = dx * x
    out: dict[str, torch.Tensor | None] = {"g": dx}
    if call.A_log is not None:
        out["A_log"] = d_log.sum((0, 1, 3) if spec.kda else (0, 1))
    if call.dt_bias is not None:
        out["dt_bias"] = dx.sum((0, 1)).reshape(call.dt_bias.shape)
    return out
