"""The mixer in torch's operators around `gated_delta_rule`: for devices without a kernel, and for gradients.

Convolution, activation and norm run in float32 (float64 for float64 inputs) on the tensors' own device. The rule is
dispatched separately, so it still gets the device's kernel. NumPy arrays go to the float64 oracle.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from ...core.accepts import ANY
from ...core.arguments import options_of
from ...core.arrays import Array
from ...mixer import reference
from ...mixer.arguments import MixerCall
from ...mixer.spec import MixerSpec, parts
from ...rule.arguments import write_strength
from ...rule.op import gated_delta_rule, gated_delta_rule_
from ..accepts import GATES, MIXER_CALLS, STATES
from .host import normalised

if TYPE_CHECKING:
    import torch


class ComposedMixer:
    """The mixer of the reference backend."""

    accepts = MIXER_CALLS.but(device=ANY, dtype=GATES, state_dtype=STATES)

    def prepare(self, spec: MixerSpec, call: MixerCall, backend: str) -> str:
        """The backend for the rule."""
        return "reference" if backend == "reference" else "auto"

    def differentiable(
        self, call: MixerCall, spec: MixerSpec, backend: str
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The functional mixer's results: output, conv state, state."""
        o, windows, state = compose(call, spec, backend, inplace=False)
        return o, final_windows(call, spec, windows), state

    def run(self, plan: str, spec: MixerSpec, call: MixerCall) -> None:
        if spec.framework == "torch":
            import torch

            with torch.no_grad():
                o, windows, _ = compose(call, spec, plan, inplace=True)
                call.o.copy_(o)
                _write_windows(call, spec, windows)
        else:
            _run_numpy(spec, call)


def _run_numpy(spec: MixerSpec, call: MixerCall) -> None:
    def f64(x: Array) -> Array:
        return None if x is None else np.asarray(x).astype(np.float64)

    q, k, v = (f64(x) for x in parts(call, spec))
    r = spec.rule
    want = reference.gated_delta_mixer(
        q, k, v, f64(call.conv_state), f64(call.state),
        g=f64(call.g), beta=f64(call.beta), conv_weight=f64(call.conv_weight), conv_bias=f64(call.conv_bias),
        A_log=f64(call.A_log), dt_bias=f64(call.dt_bias), z=f64(call.z), norm_weight=f64(call.norm_weight),
        cu_seqlens=call.cu_seqlens, state_indices=call.state_indices, mask=call.mask, snapshots=r.snapshots,
        **options_of(spec.options),
    )  # fmt: skip
    call.o[...] = want.o
    written = want.rule.snapshot_written
    if call.snapshot_indices is not None:
        assert written is not None
        named = written[: len(call.snapshot_indices)] & (call.snapshot_indices >= 0)
        for pool, states in ((call.state, want.rule.snapshots), (call.conv_state, want.conv_snapshots)):
            assert states is not None
            pool[call.snapshot_indices[named]] = states[: len(named)][named].astype(pool.dtype)
    else:
        live = ~want.rule.skipped
        rows = np.arange(r.N)[live] if call.state_indices is None else call.state_indices[live]
        call.state[rows] = want.rule.state[live].astype(call.state.dtype)
        call.conv_state[rows] = want.conv_state[live].astype(call.conv_state.dtype)
    for got, expected in ((call.snapshots, want.rule.snapshots), (call.conv_snapshots, want.conv_snapshots)):
        if got is not None and expected is not None and written is not None:
            got[written] = expected[written].astype(got.dtype)


def sequences(spec: MixerSpec, call: MixerCall) -> list[tuple[int, int, int, int]]:
    """(row of the states or -1, batch row, first token, end) of each sequence."""
    r = spec.rule
    rows = list(range(r.N)) if call.state_indices is None else call.state_indices.tolist()
    if call.cu_seqlens is None:
        return [(rows[b], b, 0, r.T) for b in range(r.B)]
    return [(row, 0, s, e) for row, (s, e) in zip(rows, pairwise(call.cu_seqlens.tolist()), strict=True)]


Windows = list[tuple[int, int, int, "torch.Tensor", "torch.Tensor | None"]]
"""For each sequence that is not skipped: (n, row, length, all inputs of its channels [S + live, C], a mask of its live
tokens [length] or None for all)."""


def compose(
    call: MixerCall, spec: MixerSpec, backend: str, *, inplace: bool
) -> tuple[torch.Tensor, Windows, torch.Tensor | None]:
    """o [B, T, HV * V], the data for the conv states, and without `inplace` the final state [N, HV, K, V].
    Differentiable without `inplace`; with it, `state` and `snapshots` are advanced."""
    import torch
    import torch.nn.functional as F

    r, opt = spec.rule, spec.options
    dtype = torch.float64 if spec.dtype == "float64" else torch.float32
    x = torch.cat(parts(call, spec), -1).to(dtype)
    taps = call.conv_weight.to(dtype)
    y = list(x.new_zeros(x.shape))  # rows are replaced, not written, as torch.func requires
    live_tokens = torch.zeros(r.B, r.T, dtype=torch.bool, device=x.device)
    windows: Windows = []
    for n, (row, b, start, end) in enumerate(sequences(spec, call)):
        if row < 0:
            continue
        live = None if call.mask is None else call.mask[b, start:end]
        tokens = x[b, start:end] if live is None else x[b, start:end][live]
        seen = torch.cat((call.conv_state[row].to(dtype).t(), tokens))
        first, count = spec.S - spec.W + 1, tokens.shape[0]
        out = sum(seen[first + w : first + w + count] * taps[:, w] for w in range(spec.W))
        assert isinstance(out, torch.Tensor)
        if call.conv_bias is not None:
            out = out + call.conv_bias.to(dtype)
        if opt.activation == "silu":
            out = F.silu(out)
        where = (
            torch.arange(start, end, device=x.device)
            if live is None
            else torch.nonzero(live).squeeze(1) + start
        )
        y[b] = y[b].index_copy(0, where, out)
        live_tokens[b, where] = True
        windows.append((n, row, end - start, seen, live))

    key = r.H * r.K
    convolved = torch.stack(y) if y else x
    q, k, v = (
        part.unflatten(-1, (-1, size))
        for part, size in zip(convolved.split((key, key, r.HV * r.V), -1), (r.K, r.K, r.V), strict=True)
    )
    # values of a token that no state sees, such as NaN, must not reach a gradient either
    counted = live_tokens[..., None]
    beta = torch.where(counted, call.beta.to(dtype), 0.0)
    beta = write_strength(beta, opt)
    options: dict[str, Any] = dict(
        g=call.g, beta=2 * beta if opt.allow_neg_eigval else beta, A_log=call.A_log, dt_bias=call.dt_bias,
        cu_seqlens=call.cu_seqlens, state_indices=call.state_indices, mask=call.mask, snapshots=call.snapshots,
        backend=backend, **options_of(opt.of_rule(weighted=True), "output_final_state"),
    )  # fmt: skip
    final = None
    if inplace:
        o = gated_delta_rule_(q, k, v, call.state, snapshot_indices=call.snapshot_indices, **options)
    else:
        o, final = gated_delta_rule(q, k, v, initial_state=call.state, **options)
    if call.norm_weight is not None:
        # sqrt(V) x / |x|: the norm of q and k, with V eps
        o = normalised(o, r.V * opt.norm_eps) * (r.V**0.5 * call.norm_weight.to(dtype))
    if call.z is not None:
        z = torch.where(counted, call.z.to(dtype).flatten(2), 0.0).reshape(o.shape)
        o = o * (F.silu(z) if opt.norm_gate == "silu" else z.sigmoid())
    return torch.where(counted, o.flatten(-2), 0.0).to(call.qkv.dtype), windows, final


def _write_windows(call: MixerCall, spec: MixerSpec, windows: Windows) -> None:
    S = spec.S
    for n, row, length, seen, live in windows:
        end = seen.shape[0]
        rows = None if call.snapshot_indices is None else call.snapshot_indices[:, n].tolist()
        targets = (
            []
            if call.conv_snapshots is None
            else [(slot, x[n]) for slot, x in enumerate(call.conv_snapshots)]
        )
        targets += [(slot, call.conv_state[to]) for slot, to in enumerate(rows or ()) if to >= 0]
        for slot, to in targets:
            if slot < length:
                later = slot if live is None else int(live[length - slot :].sum())
                to.copy_(seen[end - later - S : end - later].t())
        if end > S and rows is None:
            call.conv_state[row].copy_(seen[end - S :].t())


def final_windows(call: MixerCall, spec: MixerSpec, windows: Windows) -> torch.Tensor:
    """The conv states [N, C, S] after the call; zeros for skipped sequences. Differentiable."""
    import torch

    out = [call.conv_state.new_zeros((spec.C, spec.S)) for _ in range(spec.rule.N)]
    for n, _, _, seen, _ in windows:
        out[n] = seen[seen.shape[0] - spec.S :].t().to(call.conv_state.dtype)
    return torch.stack(out) if out else call.conv_state.new_empty((0, spec.C, spec.S))


MIXER = ComposedMixer()
