"""The contract of one mixer call, checked before anything is touched. It uses the checks of `anydelta.rule.spec`.

`check_mixer` turns the arguments of `gated_delta_mixer` / `gated_delta_mixer_` into a `MixerSpec`, or raises the
ValueError or TypeError that says what is wrong.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from ..core.arguments import given
from ..core.arrays import Array
from ..rule.arguments import Call
from ..rule.spec import (
    DTYPES,
    STATE_DTYPES,
    AroundRule,
    CallSpec,
    _Checker,
    check_call,
    check_values,
    dtype_name,
    framework_of,
    shape_of,
)
from .arguments import TRACKED, MixerCall, MixerOptions

NORM_GATES = ("silu", "sigmoid")


@dataclass(frozen=True)
class MixerSpec(AroundRule):
    """A valid call, without its data: what a backend needs to say yes or no."""

    rule: CallSpec
    """The rule inside, as an in-place call on q, k and v after the convolution."""
    C: int
    """Channels of the convolution: 2 H K + HV V."""
    W: int
    """Taps of the convolution."""
    S: int
    """Columns of the conv state, W - 1 or more."""
    split: bool
    """q, k and v are three arrays."""
    conv_dtype: str
    weight_dtype: str
    normed: bool
    gated: bool
    conv_snapshots: bool
    options: MixerOptions = field(default_factory=MixerOptions)
    given: tuple[str, ...] = ()
    """The arrays that the call has, by their names in the table."""

    part: ClassVar[str] = "mixer"

    def shape_line(self) -> str:
        """The call in one line, in the names of the contract."""
        norm = f"{self.options.norm_gate} norm" if self.gated else "norm" if self.normed else "no norm"
        return f"{self.rule.shape_line()} W={self.W} {norm}"


def grouped(x: Array, width: int, heads: int) -> tuple[int, int] | None:
    """(groups, heads per group) of an array [B, T, groups, heads per group * width] or [B, T, heads * width]."""
    shape = shape_of(x)
    groups = 1 if len(shape) == 3 else shape[2] if len(shape) == 4 else 0
    if groups < 1 or heads % groups or shape[-1] * groups != heads * width:
        return None
    return groups, heads // groups


def parts(call: MixerCall, spec: MixerSpec) -> tuple[Array, Array, Array]:
    """q [B, T, H K], k [B, T, H K], v [B, T, HV V] of a valid call; views where the arrays allow it."""
    r = spec.rule
    key = r.H * r.K
    if spec.split:
        widths = (key, key, r.HV * r.V)
        return tuple(x.reshape(r.B, r.T, n) for x, n in zip((call.qkv, call.k, call.v), widths, strict=True))
    return call.qkv[..., :key], call.qkv[..., key : 2 * key], call.qkv[..., 2 * key :]


def unpack_qkv(op: str, qkv: Array) -> tuple[Array, Array, Array]:
    """(qkv, None, None) for a packed array or a sequence of one, (q, k, v) for a sequence of three.

    Raises:
        TypeError: a sequence of another length.
    """
    if not isinstance(qkv, (tuple, list)):
        return qkv, None, None
    if len(qkv) == 1:
        return qkv[0], None, None
    if len(qkv) != 3:
        raise TypeError(
            f"{op}: qkv must be one packed array or the three arrays q, k, v; got {len(qkv)} of them"
        )
    return qkv[0], qkv[1], qkv[2]


def check_mixer(call: MixerCall, options: MixerOptions) -> MixerSpec:
    """The checks that need no data: types, shapes, dtypes, devices, flags.

    Raises:
        TypeError: an argument of the wrong kind (not an array, not a number, mixed frameworks).
        ValueError: a wrong shape, dtype, device, stride, choice or combination; names the argument.
    """
    c = _Checker(options.op, first="qkv")
    c.options(options)

    here = c.array("qkv", call.qkv, None)
    H, HV, K, V = _heads(c, call, options, here)
    dtype, split = _check_qkv(c, call, here, H=H, HV=HV, K=K, V=V)
    B, T = shape_of(call.qkv)[:2]
    C = 2 * H * K + HV * V

    # conv_weight [C, W], conv_bias [C]
    c.array("conv_weight", call.conv_weight, here)
    weight_dtype = c.dtype("conv_weight", call.conv_weight, DTYPES)
    got = shape_of(call.conv_weight)
    if len(got) != 2 or got[0] != C or got[1] < 1:
        c.fail(f"conv_weight must be [C, W] with C = 2 H K + HV V = {C} and W >= 1; got {list(got)}")
    W = got[1]
    if call.conv_bias is not None:
        c.array("conv_bias", call.conv_bias, here)
        c.dtype("conv_bias", call.conv_bias, DTYPES)
        c.shape("conv_bias", call.conv_bias, (C,), "[C]")

    c.sizes(qkv=(B, T, C), conv_weight=got)
    rule = _check_rule(call, options, B=B, T=T, H=H, HV=HV, K=K, V=V)
    S, conv_dtype = _check_conv_state(c, call, here, rule, dtype=dtype, C=C, W=W)

    # z [B, T, HV V] and norm_weight [V]
    if call.z is not None:
        c.array("z", call.z, here)
        c.dtype("z", call.z, (dtype,))
        if shape_of(call.z)[:2] != (B, T) or grouped(call.z, V, HV) is None:
            c.fail(
                f"z must be [B, T, HV * V] or [B, T, groups, HV / groups * V] with HV * V = {HV * V}; "
                f"got {list(shape_of(call.z))}"
            )
        if call.norm_weight is None:
            c.fail("z is the gate of the norm and requires norm_weight [V]; got None")
    if call.norm_weight is not None:
        c.array("norm_weight", call.norm_weight, here)
        c.dtype("norm_weight", call.norm_weight, DTYPES)
        c.shape("norm_weight", call.norm_weight, (V,), "[V]")

    return MixerSpec(
        rule=rule, C=C, W=W, S=S, split=split,
        conv_dtype=conv_dtype,
        weight_dtype=weight_dtype,
        normed=call.norm_weight is not None,
        gated=call.z is not None,
        conv_snapshots=call.conv_snapshots is not None,
        options=options,
        given=given(call),
    )  # fmt: skip


def _heads(
    c: _Checker, call: MixerCall, options: MixerOptions, here: tuple[str, str]
) -> tuple[int, int, int, int]:
    """(H, HV, K, V): the state says HV, K and V, and the width of qkv then H."""
    layout = "K, V" if options.state_layout == "kv" else "V, K"
    if call.state is None:
        raise TypeError(f"{c.op}: state must be an array [N, HV, {layout}]; got None")
    if framework_of(call.state) == "device":
        raise TypeError(
            f"{c.op}: state must be an array on the host; got one on {call.state.device.name}. "
            "gated_delta_rule_ takes states on a device"
        )
    c.array("state", call.state, here)
    c.dtype("state", call.state, STATE_DTYPES)
    shape = shape_of(call.state)
    if len(shape) != 4 or min(shape[1:]) < 1:
        c.fail(f"state must be [N, HV, {layout}]; got {list(shape)}")
    HV, K, V = shape[1:] if options.state_layout == "kv" else (shape[1], shape[3], shape[2])
    got = shape_of(call.qkv)
    if call.k is not None:
        # q [B, T, H K] or [B, T, groups, H / groups K]
        width = got[2] * got[3] if len(got) == 4 else got[2] if len(got) == 3 else 0
        if width % K or not width:
            c.fail(
                f"q must be [B, T, H * K] or [B, T, groups, H / groups * K] with K = {K} as in state; got {list(got)}"
            )
        H = width // K
    else:
        width = got[2] if len(got) == 3 else 0
        H, rest = divmod(width - HV * V, 2 * K)
        if rest or H < 1:
            c.fail(
                f"qkv must be [B, T, 2 H K + HV V] with HV = {HV}, K = {K}, V = {V} as in state; got {list(got)}"
            )
    if HV % H:
        c.fail(f"state must have a multiple of q's heads (HV a multiple of H); got HV={HV}, H={H}")
    return H, HV, K, V


def _check_qkv(
    c: _Checker, call: MixerCall, here: tuple[str, str], *, H: int, HV: int, K: int, V: int
) -> tuple[str, bool]:
    """q, k, v: dtypes and shapes. Returns (dtype, whether they are three arrays)."""
    dtype = c.dtype("qkv" if call.k is None else "q", call.qkv, DTYPES)
    if call.k is None:
        return dtype, False
    B, T = shape_of(call.qkv)[:2]
    for name, x, width, heads, legend in (
        ("q", call.qkv, K, H, "H * K"), ("k", call.k, K, H, "H * K"), ("v", call.v, V, HV, "HV * V"),
    ):  # fmt: skip
        c.array(name, x, here)
        if c.dtype(name, x, DTYPES) != dtype:
            c.fail(f"q, k and v must share a dtype; got {dtype} for q and {dtype_name(x)} for {name}")
        if shape_of(x)[:2] != (B, T) or grouped(x, width, heads) is None:
            c.fail(
                f"{name} must be [B, T, {legend}] or [B, T, groups, {legend} / groups] with B = {B}, T = {T} and "
                f"{legend} = {heads * width}; got {list(shape_of(x))}"
            )
    return dtype, True


def _check_rule(
    call: MixerCall, options: MixerOptions, *, B: int, T: int, H: int, HV: int, K: int, V: int
) -> CallSpec:
    """The rule's own checks, on arrays that look as q, k and v will after the convolution."""
    inner = Call(
        _like(call.qkv, (B, T, H, K)), _like(call.qkv, (B, T, H, K)), _like(call.qkv, (B, T, HV, V)),
        call.g, call.beta, call.state, call.snapshots, call.A_log, call.dt_bias, call.mask, call.cu_seqlens,
        call.state_indices, call.snapshot_indices,
    )  # fmt: skip
    return check_call(inner, options.of_rule(), inplace=True)


def _like(x: Array, shape: tuple[int, ...]) -> Array:
    """An array of x's kind, dtype and device with another shape. It takes no memory."""
    if framework_of(x) == "torch":
        return x.new_empty((1,)).expand(shape)
    import numpy as np

    return np.broadcast_to(np.empty((1,), x.dtype), shape)


def _check_conv_state(
    c: _Checker, call: MixerCall, here: tuple[str, str], rule: CallSpec, *, dtype: str, C: int, W: int
) -> tuple[int, str]:
    """conv_state [N or P, C, S], conv_snapshots [Ks, N, C, S]. Returns (S, dtype)."""
    if call.conv_state is None:
        raise TypeError(f"{c.op}: conv_state must be an array [N, C, W - 1]; got None")
    c.array("conv_state", call.conv_state, here)
    allowed = ("float64",) if dtype == "float64" else tuple(dict.fromkeys((dtype, "float32")))
    conv_dtype = c.dtype("conv_state", call.conv_state, allowed)
    got = shape_of(call.conv_state)
    if len(got) != 3 or got[1] != C or got[2] < W - 1:
        c.fail(f"conv_state must be [N, C, S] with C = {C} and S >= W - 1 = {W - 1}; got {list(got)}")
    if got[0] != rule.P:
        c.fail(f"conv_state must have as many rows as state, {rule.P}; got {got[0]}")
    S = got[2]
    c.sizes(conv_state=got)
    c.writable("conv_state", call.conv_state)
    if call.conv_snapshots is not None:
        if call.snapshots is None:
            c.fail("conv_snapshots go with snapshots; got None for snapshots")
        c.array("conv_snapshots", call.conv_snapshots, here)
        c.dtype("conv_snapshots", call.conv_snapshots, (conv_dtype,))
        c.shape("conv_snapshots", call.conv_snapshots, (rule.snapshots, rule.N, C, S), "[Ks, N, C, S]")
        c.sizes(conv_snapshots=(rule.snapshots, rule.N, C, S))
        c.writable("conv_snapshots", call.conv_snapshots)
    return S, conv_dtype


def check_mixer_values(call: MixerCall, spec: MixerSpec, *, inplace: bool = True) -> None:
    """The checks that read index data, as `anydelta.rule.spec.check_values`."""
    indices = dict(
        cu_seqlens=call.cu_seqlens, state_indices=call.state_indices, snapshot_indices=call.snapshot_indices
    )
    rule = spec.rule if inplace else replace(spec.rule, inplace=False)
    check_values(Call(None, None, None, None, None, **indices), rule)


def requiring_grad(call: MixerCall) -> list[str]:
    """The names of the tensors that require grad."""
    return [n for n in TRACKED if (x := getattr(call, n)) is not None and getattr(x, "requires_grad", False)]
