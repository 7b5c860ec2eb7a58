"""The host of the native mixer kernel (backends/cpu/mixer.inl.h): hands addresses and strides to `anydelta._core`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ...core.accepts import Row, UpTo
from ...core.arguments import in_order
from ...core.arrays import Array, Arrays
from ...core.late import late
from ...core.native import core as _core
from ...core.plans import Launch
from ...mixer.arguments import MixerCall
from ...mixer.spec import NORM_GATES, MixerSpec, grouped
from ...rule.arguments import Call
from ...rule.spec import dtype_name, element_strides
from ..accepts import MIXER_CALLS, STATES
from . import host as cpu

_backward = late("anydelta.backends.cpu.gradients")  # it imports this module
_ROWS = ("qkv", "k", "v", "z")
_SMALL = (
    "conv_bias", "A_log", "dt_bias", "norm_weight", "cu_seqlens", "state_indices", "snapshot_indices",
)  # fmt: skip


arrays = in_order(MixerCall)


def describe(spec: MixerSpec, call: MixerCall) -> tuple[_core.MixerPlan, tuple[str, ...], tuple[str, ...]]:
    """The native plan, and the arrays that the kernel cannot read, and cannot write, as they are."""
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
    places: dict[str, tuple[int, ...]] = {}
    for name in _ROWS:
        x = getattr(call, name)
        if x is not None and element_strides(x)[-1] != 1 and x.shape[-1] > 1:
            copies.append(name)
            places[name] = token_places(spec, name, x, cpu.contiguous_strides(tuple(x.shape)))
        else:
            places[name] = token_places(spec, name, x)
    places["q"] = places.pop("qkv")
    if not spec.split:  # all heads of each part are one group
        places["k"], places["v"] = (*places["q"][:4], r.H), (*places["q"][:4], r.HV)
    weight = call.conv_weight
    strides = element_strides(weight)
    if "conv_weight" in copies:
        strides = cpu.contiguous_strides(tuple(weight.shape))
    conv, snaps = element_strides(call.conv_state), (0, 0, 0, 0)
    if call.conv_snapshots is not None:
        snaps = element_strides(call.conv_snapshots)  # type: ignore[assignment]
    conv_dtype = cpu.DTYPE[spec.conv_dtype]
    number, torchs = cpu.threads_of(spec.framework)
    native = _core.MixerPlan(
        rule,
        dict(
            beta_scale=2.0 if opt.allow_neg_eigval else 1.0,
            **places,
            o=token_places(spec, "o", None),
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
        None if torchs else number,
    )  # fmt: skip
    return native, tuple(copies), tuple(written)


def token_places(
    spec: MixerSpec, name: str, x: Array, strides: Sequence[int] | None = None
) -> tuple[int, ...]:
    """Where an array has its heads: (dtype, b, t, group, heads per group)."""
    r = spec.rule
    if name == "o":
        D = r.HV * r.V
        return (cpu.DTYPE[spec.dtype], *(strides[:2] if strides else (r.T * D, D)), 0, r.HV)
    if x is None:
        return (0, 0, 0, 0, 1)
    width, heads = (r.V, r.HV) if name in ("v", "z") else (r.K, r.H)
    st = strides or element_strides(x)
    _, per = grouped(x, width, heads) or (0, heads)
    return (cpu.DTYPE[spec.dtype], st[0], st[1], st[2] if len(st) == 4 else 0, per)


@dataclass(slots=True)
class _Plan:
    native: _core.MixerPlan
    threads: tuple[Callable[[], int], bool]
    """A function that returns their number, and whether they are torch's."""
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

    accepts_gradients = accepts.but(framework=("torch",))

    def prepare(self, spec: MixerSpec, call: MixerCall, backend: str) -> _Plan:
        native, copies, written = describe(spec, call)
        reads = cpu.reads_arrays(spec.framework, arrays(call))
        return _Plan(native, cpu.threads_of(spec.framework), reads, copies, written)

    def gradients(
        self, spec: MixerSpec, call: MixerCall, grads: Sequence[Array | None], wanted: Sequence[str]
    ) -> dict[str, Array | None]:
        """d loss / d input by name, at least of those wanted, given the gradients of the output and the new states."""
        found: dict[str, Array | None] = _backward.mixer_gradients(spec, call, grads, wanted)
        return found

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
