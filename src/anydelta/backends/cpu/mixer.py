"""The host of the native mixer kernel (backends/cpu/mixer.inl.h): hands addresses and strides to `anydelta._core`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ...core.accepts import Row, UpTo
from ...core.arguments import in_order
from ...core.arrays import Array, Arrays
from ...core.native import core as _core
from ...core.plans import Launch
from ...mixer.arguments import MixerCall
from ...mixer.spec import NORM_GATES, MixerSpec, grouped
from ...rule.arguments import Call
from ...rule.spec import dtype_name, element_strides
from ..accepts import MIXER_CALLS, STATES
from . import host as cpu

_ROWS = ("qkv", "k", "v", "z")
_SMALL = (
    "conv_bias", "A_log", "dt_bias", "norm_weight", "cu_seqlens", "state_indices", "snapshot_indices",
)  # fmt: skip


arrays = in_order(MixerCall)


@dataclass(slots=True)
class _Plan:
    native: _core.MixerPlan
    threads: tuple[Callable[[], int], bool]
    """How many, and whether they are torch's."""
    reads: bool
    """Whether the extension reads these arrays by itself."""
    copies: tuple[str, ...]
    written: tuple[str, ...]
    """Written arrays that the kernel cannot write as they are."""


class CpuMixer:
    """The mixer of the cpu backend."""

    accepts = MIXER_CALLS.but(
        device=cpu.DEVICE,
        state_dtype=STATES,
        W=Row(
            UpTo(_core.max_taps if _core is not None else 0),
            "takes {allowed} taps of the convolution; got {got}",
        ),
    )

    def prepare(self, spec: MixerSpec, call: MixerCall, backend: str) -> _Plan:
        r, opt = spec.rule, spec.options
        copies: list[str] = []
        written: list[str] = []
        copies += cpu.scattered(call, _SMALL)
        if dtype_name(call.conv_weight) == "float64":
            copies.append("conv_weight")

        inner = Call(
            None, None, None, call.g, call.beta, call.state, call.snapshots, call.A_log, call.dt_bias, call.mask,
            call.cu_seqlens, call.state_indices, call.snapshot_indices,
        )  # fmt: skip
        rows, scattered = cpu.token_strides(inner)
        copies += scattered
        rule, state_copy, snapshots_copy = cpu.rule_fields(r, inner, rows)
        written += [n for n, copied in (("state", state_copy), ("snapshots", snapshots_copy)) if copied]

        def tokens(name: str, x: Array, width: int, heads: int) -> tuple[int, ...]:
            """(dtype, b, t, group, heads per group)"""
            if x is None:
                return (0, 0, 0, 0, 1)
            st = element_strides(x)
            if st[-1] != 1 and x.shape[-1] > 1:
                copies.append(name)
                st = cpu.contiguous_strides(tuple(x.shape))
            _, per = grouped(x, width, heads) or (0, heads)  # packed qkv: all heads of each part in one group
            return (cpu.DTYPE[spec.dtype], st[0], st[1], st[2] if len(st) == 4 else 0, per)

        q = tokens("qkv", call.qkv, r.K, r.H)
        k = tokens("k", call.k, r.K, r.H) if spec.split else (*q[:4], r.H)
        v = tokens("v", call.v, r.V, r.HV) if spec.split else (*q[:4], r.HV)
        weight = call.conv_weight
        strides = element_strides(weight)
        if "conv_weight" in copies:
            strides = cpu.contiguous_strides(tuple(weight.shape))
        conv, snaps = element_strides(call.conv_state), (0, 0, 0, 0)
        if call.conv_snapshots is not None:
            snaps = element_strides(call.conv_snapshots)  # type: ignore[assignment]
        conv_dtype = cpu.DTYPE[spec.conv_dtype]
        D = r.HV * r.V
        threads = cpu.threads_of(spec.framework)
        native = _core.MixerPlan(
            rule,
            dict(
                beta_scale=2.0 if opt.allow_neg_eigval else 1.0,
                q=q, k=k, v=v,
                z=tokens("z", call.z, r.V, r.HV),
                o=(cpu.DTYPE[spec.dtype], r.T * D, D, 0, r.HV),
                W=spec.W, S=spec.S,
                weight_dtype=cpu.small_dtype(weight), weight_c=strides[0], weight_w=strides[1],
                bias_dtype=cpu.small_dtype(call.conv_bias),
                silu=opt.activation == "silu",
                conv_state=(conv_dtype, 0, *conv),
                conv_snapshots=(conv_dtype, *snaps),
                norm=spec.normed,
                norm_dtype=cpu.small_dtype(call.norm_weight),
                gate=1 + NORM_GATES.index(opt.norm_gate) if spec.gated else 0,
                norm_eps=float(opt.norm_eps),
            ),
            None if threads[1] else threads[0],
        )  # fmt: skip
        return _Plan(
            native,
            threads,
            cpu.reads_arrays(spec.framework, arrays(call)),
            tuple(copies),
            tuple(written),
        )

    def direct(self, plan: _Plan) -> Launch | None:
        if not plan.reads or plan.copies or plan.written:
            return None
        return plan.native.run

    def step(self, plan: _Plan, spec: MixerSpec, inputs: Arrays, made: Arrays) -> _core.MixerStep | None:
        """An object of the extension that checks and runs calls like this one, or None: see `op.plan_step`."""
        r = spec.rule
        if not (plan.threads[1] and plan.reads) or plan.copies or plan.written or r.packed or r.pooled:
            return None
        return _core.MixerStep(plan.native, *inputs, *made)

    def run(self, plan: _Plan, spec: MixerSpec, call: MixerCall) -> None:
        inner = call
        if plan.copies or plan.written:
            names = (*plan.copies, *plan.written)
            inner = replace(call, **{name: cpu.contiguous(getattr(call, name)) for name in names})
        if plan.reads:
            plan.native.run(arrays(inner), ())
        else:
            number, torch = plan.threads
            plan.native.run_at(number(), torch, *map(cpu.address, arrays(inner)))
        if "state" in plan.written:
            rows: object = slice(None)
            if call.state_indices is not None:
                named = call.state_indices if call.snapshot_indices is None else call.snapshot_indices
                rows = named[(named >= 0) & (named < spec.rule.P)]
            call.state[rows] = inner.state[rows]
        if "snapshots" in plan.written:
            call.snapshots[...] = inner.snapshots


MIXER = CpuMixer()
