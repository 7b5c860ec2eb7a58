"""The backend that always works: NumPy arrays go to the float64 oracle, torch tensors to a torch recurrence.

The torch recurrence runs on the tensors' own device and is differentiable, so gradients use it too (autograd.py). It
computes in float32, or in float64 for float64 inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from ...core.accepts import ANY, Row
from ...core.arguments import options_of
from ...core.arrays import Array
from ...core.dispatch import Rejected
from ...rule import reference
from ...rule.arguments import TOKENS, Call, write_strength
from ...rule.spec import CallSpec
from ..accepts import GATES, RULE_CALLS, STATES

if TYPE_CHECKING:
    import torch


class Reference:
    name = "reference"
    accepts = RULE_CALLS.but(
        arrays=("erase",), dtype=GATES, state_dtype=STATES, device=ANY, framework=ANY,
        resident=Row(("",), "takes states on the host; got one on {got}"),
    )  # fmt: skip
    optional_A_log = True
    mixer = "anydelta.backends.reference.mixer"
    log = "anydelta.backends.reference.log"

    def available(self) -> Sequence[Rejected]:
        return ()

    def describe(self) -> dict[str, object]:
        return {"runs": "NumPy in float64; torch on any device, differentiable"}

    def prepare(self, spec: CallSpec, call: Call) -> None:
        return None

    def recurrence(
        self, spec: CallSpec, call: Call, *, checkpointed: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`torch_recurrence`, for gradients."""
        return torch_recurrence(spec, call, checkpointed=checkpointed)

    def run(self, plan: None, spec: CallSpec, call: Call) -> None:
        (_run_torch if spec.framework == "torch" else _run_numpy)(spec, call)


def _run_numpy(spec: CallSpec, call: Call) -> None:
    def f64(x: Array) -> Array:
        return None if x is None else np.asarray(x).astype(np.float64)

    want = reference.gated_delta_rule(
        f64(call.q), f64(call.k), f64(call.v), g=f64(call.g), beta=f64(call.beta), erase=f64(call.erase),
        initial_state=f64(call.state_in), A_log=f64(call.A_log), dt_bias=f64(call.dt_bias),
        cu_seqlens=call.cu_seqlens, state_indices=call.state_indices,
        mask=call.mask, snapshots=spec.snapshots, **options_of(spec.options, "output_final_state"),
    )  # fmt: skip
    call.o[...] = want.o
    if call.state_out is not None:
        if spec.inplace and spec.pooled:
            live = ~want.skipped
            call.state_out[call.state_indices[live]] = want.state[live].astype(call.state_out.dtype)
        else:
            call.state_out[...] = want.state
    if want.snapshots is not None and want.snapshot_written is not None:
        call.snapshots[want.snapshot_written] = want.snapshots[want.snapshot_written].astype(
            call.snapshots.dtype
        )


def torch_gates(spec: CallSpec, call: Call, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Decays in [0, 1] and beta after the sigmoid, ones with erase, in `dtype`."""
    import torch
    import torch.nn.functional as F

    opt = spec.options
    g = call.g.to(dtype)
    beta = g.new_ones(call.v.shape[:3]) if call.beta is None else call.beta.to(dtype)
    if opt.decay == "raw":
        A = g.new_ones(spec.HV) if call.A_log is None else call.A_log.to(dtype).exp()
        A = A[:, None] if spec.kda else A
        x = g if call.dt_bias is None else g + call.dt_bias.to(dtype).reshape(g.shape[2:])
        g = -A * F.softplus(x) if opt.lower_bound is None else opt.lower_bound * torch.sigmoid(A * x)
    a = g if opt.decay == "linear" else g.exp()
    return a, write_strength(beta, opt)


def _live_only(spec: CallSpec, call: Call) -> Call:
    """The call with ones in every masked token and skipped sequence. They may hold NaN, and 0 * NaN would spoil
    gradients."""
    import torch

    live = call.mask
    if call.state_indices is not None and bool((call.state_indices < 0).any()):
        read = call.state_indices.to(call.q.device) >= 0
        if call.cu_seqlens is not None:
            read = read.repeat_interleave(call.cu_seqlens.to(call.q.device).diff())[None]
        else:
            read = read[:, None].expand(spec.B, spec.T)
        live = read if live is None else live & read
    if live is None:
        return call

    def kept(x: torch.Tensor) -> torch.Tensor:
        return torch.where(live.reshape(spec.B, spec.T, *[1] * (x.ndim - 2)), x, x.new_ones(()))

    tokens = {name: getattr(call, name) for name in TOKENS}
    return replace(call, **{name: kept(x) for name, x in tokens.items() if x is not None})


def normalised(x: torch.Tensor, eps: float) -> torch.Tensor:
    """x * rsqrt(sum x^2 + eps) over the last dimension, 0 for 0, scaled so that squares stay in the type's range."""
    import torch

    unit = x.detach().abs().amax(-1, keepdim=True).clamp(min=eps**0.5)
    unit = torch.where(unit.isfinite() & (unit > 0), unit, 1.0)
    y = x / unit
    squares = (y * y).sum(-1, keepdim=True) + (eps**0.5 / unit).square()
    return y * torch.rsqrt(torch.where(squares == 0, 1.0, squares))


def torch_recurrence(
    spec: CallSpec,
    call: Call,
    *,
    snapshots: Array = None,
    checkpointed: bool = True,
    checkpoint_every: int = 64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """o [B, T, HV, V] and the final state [N, HV, K, V] (kv layout, compute dtype), differentiable.

    Under autograd only every `checkpoint_every`-th state is kept, and the tokens in between run again, so
    memory grows with T / 64 states instead of T. `checkpointed=False` keeps all: torch.func has no checkpoints.
    """
    import torch
    from torch.utils.checkpoint import checkpoint

    opt = spec.options
    dtype = torch.float64 if spec.dtype == "float64" else torch.float32
    call = _live_only(spec, call)
    a, beta = torch_gates(spec, call, dtype)
    q, k, v = (x.to(dtype) for x in (call.q, call.k, call.v))
    if opt.qk_l2norm:
        q, k = (normalised(x, opt.qk_l2norm_eps) for x in (q, k))
    head = torch.as_tensor(reference.head_map(spec.H, spec.HV, opt.heads), device=q.device)
    q, k = q[:, :, head] * spec.scale, k[:, :, head]
    read = k
    if call.erase is not None:
        read = call.erase.to(dtype)
        read = read if read.shape[2] == spec.HV else read[:, :, head]
    a = a[..., None, None] if not spec.kda else a[..., None]

    def tokens(S: torch.Tensor, b: int, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        outs = []
        for t in range(start, end):
            if call.mask is None or bool(call.mask[b, t]):
                S = a[b, t] * S
                d = beta[b, t][:, None] * (v[b, t] - torch.einsum("hkv,hk->hv", S, read[b, t]))
                S = S + k[b, t][:, :, None] * d[:, None, :]
                outs.append(torch.einsum("hkv,hk->hv", S, q[b, t]))
            else:
                outs.append(torch.zeros_like(v[b, t]))
            if snapshots is not None:
                snapshots(S, t)
        return S, torch.stack(outs)

    if call.cu_seqlens is None:
        sequences = [(b, 0, spec.T) for b in range(spec.B)]
    else:
        cu = call.cu_seqlens.tolist()
        sequences = [(0, s, e) for s, e in pairwise(cu)]
    rows = list(range(spec.N)) if call.state_indices is None else call.state_indices.tolist()

    o_rows: list[torch.Tensor] = []
    finals = []
    for n, (b, start, end) in enumerate(sequences):
        S = torch.zeros(spec.HV, spec.K, spec.V, dtype=dtype, device=q.device)
        if rows[n] < 0:
            o_rows.append(torch.zeros_like(v[b, start:end]))
            finals.append(S)
            continue
        if call.state_in is not None:
            S = call.state_in[rows[n]].to(dtype)
            S = S if opt.state_layout == "kv" else S.transpose(-1, -2)
        if snapshots is not None:
            snapshots.sequence(n, end)
        for t in range(start, end, checkpoint_every):
            stop = min(t + checkpoint_every, end)
            if checkpointed and torch.is_grad_enabled():
                S, outs = checkpoint(tokens, S, b, t, stop, use_reentrant=False)
            else:
                S, outs = tokens(S, b, t, stop)
            o_rows.append(outs)
        finals.append(S)
    o = torch.cat(o_rows) if o_rows else v.new_zeros(0, spec.HV, spec.V)
    state = torch.stack(finals) if finals else v.new_zeros(0, spec.HV, spec.K, spec.V)
    return o.reshape(spec.B, spec.T, spec.HV, spec.V), state


class _SnapshotWriter:
    """Copies the state after token t to slot end - 1 - t of sequence n."""

    def __init__(self, out: torch.Tensor, layout: str):
        self.out, self.layout = out, layout
        self.n, self.end = 0, 0

    def sequence(self, n: int, end: int) -> None:
        self.n, self.end = n, end

    def __call__(self, S: torch.Tensor, t: int) -> None:
        slot = self.end - 1 - t
        if slot < self.out.shape[0]:
            self.out[slot, self.n].copy_(S if self.layout == "kv" else S.transpose(-1, -2))


def _run_torch(spec: CallSpec, call: Call) -> None:
    import torch

    layout = spec.options.state_layout
    with torch.no_grad():
        # Snapshots may share memory with the state that is read: write them after the run.
        pending = None if call.snapshots is None else call.snapshots.clone()
        writer = None if pending is None else _SnapshotWriter(pending, layout)
        o, state = torch_recurrence(spec, call, snapshots=writer)
        call.o.copy_(o)
        if pending is not None:
            call.snapshots.copy_(pending)
        if call.state_out is None:
            return
        state = (state if layout == "kv" else state.transpose(-1, -2)).to(call.state_out.dtype)
        if spec.inplace and spec.pooled:
            live = call.state_indices >= 0
            call.state_out[call.state_indices[live].long()] = state[live.to(state.device)]
        else:
            call.state_out.copy_(state)


BACKEND = Reference()
