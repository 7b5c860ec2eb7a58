"""The arguments of a call for OpenCL, SYCL and Metal kernels: the numbers of structs.PARAMS, and addresses."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ...core.arrays import Array
from ...core.devices import Bytes, DeviceArray
from ...rule.arguments import Call
from ...rule.spec import DECAYS, CallSpec, dtype_name, element_strides, framework_of
from .structs import OF_OPTIONS

TYPE = {"float32": 0, "bfloat16": 1, "float16": 2}
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2, "bool": 1, "int32": 4, "int64": 8}
ABSENT = 2**64 - 1
WRITTEN = ("o", "state_out", "snapshots")
GATES = ("g", "beta", "A_log", "dt_bias")


def params_of(spec: CallSpec, call: Call, dense: bool, converts: tuple[str, ...]) -> dict[str, Any]:
    """The members of structs.PARAMS. `dense`: host arrays will be packed, so their own strides do not matter."""
    opt = spec.options

    def strides(x: Array, rank: int, keep: bool = False) -> tuple[int, ...]:
        if x is None:
            return (0,) * rank
        shape = tuple(x.shape)
        packed = (
            dense_strides(shape) if (dense and not isinstance(x, DeviceArray)) or keep else element_strides(x)
        )
        return (*packed, *[0] * (rank - len(packed)))

    def state(x: Array, lead: int) -> tuple[int, ...]:
        """Strides [.., h, K, V], whatever the layout."""
        st = strides(x, lead + 3)
        return st if opt.state_layout == "kv" else (*st[:-2], st[-1], st[-2])

    B, T, HV, V = spec.B, spec.T, spec.HV, spec.V
    dims = (spec.K, V) if opt.state_layout == "kv" else (V, spec.K)
    fresh = dense_strides((spec.N, HV, *dims))  # a new final state
    fresh = fresh if opt.state_layout == "kv" else (*fresh[:-2], fresh[-1], fresh[-2])
    st = {name: strides(getattr(call, name), 4, name in converts) for name in ("q", "k", "v", "g", "beta")}
    dt_bias = call.dt_bias
    dt: tuple[int, ...] = (0, 0)
    if dt_bias is not None:
        dt = strides(dt_bias, 2, "dt_bias" in converts)
        if spec.kda and len(dt_bias.shape) == 1:  # [HV * K]
            dt = (dt[0] * spec.K, dt[0])
    state_in = state(call.state_in, 1)
    return dict(
        q=st["q"], k=st["k"], v=st["v"], g=st["g"], beta=st["beta"][:3], o=dense_strides((B, T, HV, V)),
        state_in=state_in, state_out=state_in if spec.inplace else fresh, snapshots=state(call.snapshots, 2),
        mask=strides(call.mask, 2), a_log=strides(call.A_log, 1, "A_log" in converts), dt_bias=dt,
        cu=strides(call.cu_seqlens, 1), indices=strides(call.state_indices, 1),
        T=T, H=spec.H, HV=HV, k_rows=spec.K, V=V, N=spec.N, Ks=spec.snapshots,
        qkv_type=TYPE[spec.dtype], g_type=_small_type(call.g), beta_type=_small_type(call.beta),
        a_log_type=_small_type(call.A_log), dt_bias_type=_small_type(call.dt_bias), state_type=TYPE[spec.state_dtype],
        tiled=opt.heads == "tiled", decay=DECAYS.index(opt.decay), has_lower_bound=opt.lower_bound is not None,
        **{member: getattr(opt, name) for member, name in OF_OPTIONS.items()},
        cu64=spec.packed and dtype_name(call.cu_seqlens) == "int64",
        indices64=spec.pooled and dtype_name(call.state_indices) == "int64", out_dense=not spec.inplace,
        scale=spec.scale, eps=opt.qk_l2norm_eps, lower_bound=opt.lower_bound or 0.0,
    )  # fmt: skip


def dense_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """C-contiguous strides in elements."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _small_type(x: Array) -> int:
    return 0 if x is None else TYPE.get(dtype_name(x), 0)


def as_float32(x: Array) -> Array:
    """float64 gates as float32, the type they are computed in, C-contiguous."""
    if framework_of(x) == "torch":
        return x.float().contiguous()
    return np.ascontiguousarray(x, np.float32)


def address(x: Array) -> int:
    if x is None:
        return ABSENT
    if type(x) is DeviceArray:
        return int(x.memory.address) + x.offset  # type: ignore[attr-defined]
    return int(x.data_ptr() if framework_of(x) == "torch" else x.__array_interface__["data"][0])


def as_bits(x: Array) -> Array:
    """A host array as NumPy integers or floats of its element size, sharing its memory."""
    if framework_of(x) == "torch":
        import torch

        x = x.detach()
        return (x.view(torch.int16) if x.element_size() == 2 else x).numpy()
    return x.view(np.int16) if x.itemsize == 2 else x


def pack(into: Bytes, offset: int, nbytes: int, x: Array) -> None:
    bits = as_bits(x)
    into[offset : offset + nbytes].view(bits.dtype).reshape(bits.shape)[...] = bits


def span(x: Array) -> tuple[int, int]:
    """First byte, and one past the last, of a host array that is not empty."""
    size = ITEMSIZE[dtype_name(x)]
    reach = [(n - 1) * s * size for n, s in zip(x.shape, element_strides(x), strict=True)]
    first = address(x)
    return first + sum(r for r in reach if r < 0), first + sum(r for r in reach if r > 0) + size


def skip(x: Array) -> int:
    """The distance of the first element from the first byte."""
    return address(x) - span(x)[0]
