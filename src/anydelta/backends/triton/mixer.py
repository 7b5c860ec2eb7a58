"""The host of the mixer's Triton kernels (mixer_kernels.py) around those of the rule.

Up to 16 tokens per sequence: `convolve` and `recurrent`, which norms its own output. More tokens: the convolution, its
states, the rule's chunks, the norm. Nothing waits for the device, even with masks and packed sequences.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ...core.accepts import Accepts, Row, UpTo
from ...core.late import late
from ...mixer.arguments import MixerCall
from ...mixer.spec import MixerSpec, grouped
from ...rule.arguments import Call, write_strength
from ...rule.spec import CallSpec, dtype_name
from ..accepts import MIXER_CALLS, TORCH
from . import host as backend
from .config import power_of_two

if TYPE_CHECKING:
    import torch

    from . import interpreter, launch
    from . import mixer_kernels as mixer
    from .config import Machine
else:
    interpreter, launch, mixer = (
        late(f"anydelta.backends.triton.{name}") for name in ("interpreter", "launch", "mixer_kernels")
    )

_SMALL = (
    "g", "beta", "A_log", "dt_bias", "cu_seqlens", "state_indices", "snapshot_indices", "conv_bias", "norm_weight",
)  # fmt: skip
TILE = 16
"""Tokens of one program of the convolution and the norm."""
CHANNELS = 128
"""Channels of one program of the convolution: 512 bytes of a row in float32, 4 for each thread of a warp."""


@dataclass(frozen=True)
class _Plan:
    copies: tuple[str, ...]
    device: torch.device


class TritonMixer:
    """The mixer of the triton backend."""

    @property
    def accepts(self) -> Accepts:
        return MIXER_CALLS.but(
            framework=TORCH, device=backend.device_row(), K=UpTo(backend.MAX_K),
            final_rows=Row((False,), "takes snapshot_indices without dense snapshots; got both"),
        )  # fmt: skip

    def prepare(self, spec: MixerSpec, call: MixerCall, asked: str) -> _Plan:
        if backend.interpreted():
            interpreter.quicken()
        device = call.qkv.device
        copies = [n for n in _SMALL if backend.needs_copy(n, getattr(call, n), device)]
        copies += [
            n for n in ("qkv", "k", "v", "z") if (x := getattr(call, n)) is not None and x.stride(-1) != 1
        ]
        if dtype_name(call.conv_weight) == "float64":
            copies.append("conv_weight")
        return _Plan(tuple(copies), device)

    def run(self, plan: _Plan, spec: MixerSpec, call: MixerCall) -> None:
        r = spec.rule
        call = replace(call, **{n: backend.copied(getattr(call, n), plan.device) for n in plan.copies})
        state_in = call.state
        if r.pooled and call.snapshots is not None and backend.share_memory(call.state, call.snapshots):
            state_in = call.state.clone()
        with backend.on_device(plan.device):
            for kernel_call in calls(spec, call, state_in, backend.machine_of(plan.device)):
                kernel_call.run()


def calls(
    spec: MixerSpec, call: MixerCall, state_in: torch.Tensor, machine: Machine
) -> Iterator[launch.KernelCall]:
    """The launches in order."""
    import torch

    r, opt = spec.rule, spec.options
    new = call.qkv.new_empty
    key = r.H * r.K
    y = new((r.B, r.T, spec.C), dtype=torch.float32)
    beta, strength = call.beta, {"DOUBLE": opt.allow_neg_eigval}
    inner = Call(
        y[..., :key].unflatten(-1, (r.H, r.K)), y[..., key : 2 * key].unflatten(-1, (r.H, r.K)),
        y[..., 2 * key :].unflatten(-1, (r.HV, r.V)), call.g, beta, state_in, call.snapshots, call.A_log, call.dt_bias,
        call.mask, call.cu_seqlens, call.state_indices, call.snapshot_indices, state_out=call.state,
        o=call.o.view(r.B, r.T, r.HV, r.V),
    )  # fmt: skip
    rule = replace(r, dtype="float32")
    launches = launch.Launches(rule, machine, backend.strides_of(rule, inner))
    z, z_strides, z_group = _heads(call.z, r.V, r.HV)
    z_named = dict(zip(("z_b", "z_t", "z_g"), z_strides, strict=True))
    columns = -(-r.V // launches.config.BV)
    fused = not launches.chunked
    arrivals = plain = None
    if fused and spec.normed and columns > 1:
        arrivals = new((r.N, r.HV), dtype=torch.int32)
        plain = new((r.B, r.T, r.HV, r.V), dtype=torch.float32)

    yield from _convolutions(spec, call, y, arrivals, walk=fused)
    if fused:
        norm = dict(
            z=z, norm_weight=call.norm_weight, plain=plain, arrivals=arrivals, norm_eps=float(opt.norm_eps), **z_named,
            **strength, GATE=opt.norm_gate if spec.gated else "", Z_GROUP=z_group,
        )  # fmt: skip
        yield launches.recurrent(inner, state_in, tail=False, norm=norm)
        return

    if opt.allow_neg_eigval:
        beta = beta.float()
        inner.beta = 2 * write_strength(beta, opt)
        rule = replace(rule, options=opt.of_rule(weighted=True))
        launches = launch.Launches(rule, machine, backend.strides_of(rule, inner))
    inner.o = new((r.B, r.T, r.HV, r.V), dtype=torch.float32) if spec.normed else inner.o
    yield from launches.calls(inner)
    if spec.normed:
        slots = _slots(r, TILE)
        args = dict(
            o=inner.o, z=z, norm_weight=call.norm_weight, out=call.o, N=r.N, T=r.T, norm_eps=float(opt.norm_eps),
            mask=None if call.mask is None else call.mask.view(torch.uint8), cu_seqlens=call.cu_seqlens,
            state_indices=call.state_indices, **z_named, mask_b=launches.inputs["mask_b"],
            mask_t=launches.inputs["mask_t"], HV=r.HV, V=r.V, BV=power_of_two(r.V), BT=TILE, Z_GROUP=z_group,
            GATE=opt.norm_gate if spec.gated else "",
        )  # fmt: skip
        yield launch.KernelCall(mixer.gated_norm, slots * r.HV, args, 4)


def _convolutions(
    spec: MixerSpec, call: MixerCall, y: torch.Tensor, arrivals: torch.Tensor | None, *, walk: bool
) -> Iterator[launch.KernelCall]:
    r = spec.rule
    key, values = r.H * r.K, r.HV * r.V
    parts: tuple[tuple[torch.Tensor, int, int], ...]
    if spec.split:
        parts = ((call.qkv, r.K, r.H), (call.k, r.K, r.H), (call.v, r.V, r.HV))
    else:
        ends = (0, key, 2 * key, spec.C)
        parts = tuple(
            (call.qkv[..., ends[i] : ends[i + 1]], width, heads)
            for i, (width, heads) in enumerate(((r.K, r.H), (r.K, r.H), (r.V, r.HV)))
        )
    args: dict[str, object] = {}
    for name, (x, width, heads) in zip("qkv", parts, strict=True):
        args[name], strides, group = _heads(x, width, heads)
        args |= dict(zip((f"{name}_b", f"{name}_t", f"{name}_g"), strides, strict=True))
        args[f"{name.upper()}_GROUP"] = group * width
    rank, order = _live_tokens(call) if call.mask is not None else (None, None)
    blocks = 2 * -(-key // CHANNELS) + -(-values // CHANNELS)
    snapshots = call.conv_snapshots
    args |= dict(
        conv_state=call.conv_state, conv_snapshots=snapshots, weight=call.conv_weight, bias=call.conv_bias, rank=rank,
        order=order, cu_seqlens=call.cu_seqlens, state_indices=call.state_indices,
        snapshot_indices=call.snapshot_indices, N=r.N, T=r.T, Ks=r.snapshots,
        **dict(zip(("c_n", "c_c", "c_s"), call.conv_state.stride(), strict=True)),
        **dict(zip(("n_s", "n_n", "n_c", "n_w"), (0,) * 4 if snapshots is None else snapshots.stride(), strict=True)),
        w_c=call.conv_weight.stride(0), w_w=call.conv_weight.stride(1), HV=r.HV, BH=power_of_two(r.HV), KEYS=key,
        VALUES=values, W=spec.W, S=spec.S, BS=power_of_two(spec.S), BC=CHANNELS, SILU=spec.options.activation == "silu",
    )  # fmt: skip
    if walk:
        tile = power_of_two(min(TILE, max(1, r.T)))
        more = dict(y=y, arrivals=arrivals, BT=tile, WALK=True)
        yield launch.KernelCall(mixer.convolve, r.N * blocks, {**args, **more}, 4)
        return
    args |= dict(arrivals=None, BT=TILE)
    yield launch.KernelCall(mixer.convolve, _slots(r, TILE) * blocks, {**args, "y": y, "WALK": False}, 4)
    # After all blocks of tokens have read the old states.
    yield launch.KernelCall(mixer.convolve, r.N * blocks, {**args, "y": None, "WALK": True}, 4)


def _slots(r: CallSpec, tile: int) -> int:
    return r.T // tile + r.N if r.packed else r.N * -(-r.T // tile)


def _heads(x: torch.Tensor, width: int, heads: int) -> tuple[torch.Tensor, tuple[int, int, int], int]:
    """(x, strides of batch, token and group, heads of a group)."""
    if x is None:
        return None, (0, 0, 0), 1
    strides = tuple(x.stride())
    _, each = grouped(x, width, heads) or (1, heads)
    return x, (strides[0], strides[1], strides[2] if x.dim() == 4 else 0), each


def _live_tokens(call: MixerCall) -> tuple[torch.Tensor, torch.Tensor]:
    """rank and order [B, T] int32 of mixer_kernels.py, computed on the device."""
    import torch

    mask = call.mask
    B, T = mask.shape
    at = torch.arange(T, device=mask.device)
    count = mask.cumsum(1)
    if call.cu_seqlens is None:
        start = torch.zeros_like(at)
        before = torch.zeros_like(count)
    else:
        cu = call.cu_seqlens.long()
        start = cu[torch.bucketize(at, cu[1:], right=True).clamp_max(cu.shape[0] - 1)]
        before = torch.nn.functional.pad(count, (1, 0))[:, start]
    rank = count - before - 1
    # The position of live token r of a sequence is stored at start + r, those of masked tokens in an unused column.
    order = torch.zeros(B, T + 1, dtype=torch.int64, device=mask.device)
    order.scatter_(1, torch.where(mask, start + rank, T), at.expand(B, T))
    return rank.int(), order[:, :T].int().contiguous()


MIXER = TritonMixer()
