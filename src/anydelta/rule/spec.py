"""The contract of one call: shapes, dtypes, strides and flags, checked before anything is touched.

`check_call` turns the arguments of `gated_delta_rule` / `gated_delta_rule_` into a `CallSpec`, or raises the
ValueError or TypeError that says what is wrong. Every such error lives in this file. Backends never see an
invalid call: they read a `CallSpec` and answer whether they can run it (dispatch.py).

Only attributes that NumPy arrays, torch tensors and MLX arrays share are used, so neither torch nor MLX is imported
here.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import ClassVar, NamedTuple, TypeVar

from ..core.arguments import fields, given, problem
from ..core.arrays import Array, Arrays
from ..core.devices import DeviceArray
from ..core.dispatch import MLX_GPU
from ..core.native import core
from .arguments import TRACKED, Call, Options

DTYPES = ("float32", "bfloat16", "float16", "float64")
STATE_DTYPES = ("float32", "bfloat16", "float16", "float64")
DECAYS = ("log", "linear", "raw")
"""In the order of the enum in backends/cpu/problem.h."""
INDEX_DTYPES = ("int32", "int64")
KINDS = {"torch": "a torch.Tensor", "numpy": "a numpy.ndarray", "mlx": "an mlx.core.array"}
"""What the arrays of each framework are called."""
MAX_NUMBERS = 1 << 48
"""Elements of one array: more than memory holds, and few enough that products of sizes fit 64 bits."""


@dataclass(frozen=True)
class CallSpec:
    """A valid call, without its data: what a backend needs to say yes or no."""

    B: int
    T: int
    H: int
    HV: int
    K: int
    V: int
    N: int
    P: int
    """Rows of the state array: the pool's size, or N."""
    kda: bool
    dtype: str
    state_dtype: str
    g_dtype: str
    beta_dtype: str
    scale: float
    packed: bool
    pooled: bool
    masked: bool
    has_state: bool
    snapshots: int
    inplace: bool
    requires_grad: bool
    framework: str
    """"torch" or "numpy", or "device" where q, k, v, g, beta and o are `DeviceArray`s too."""
    device: str
    """Where the call runs, a key of dispatch.PRIORITY: the device type of q, or the kind of `resident`."""
    options: Options = field(default_factory=Options)
    resident: str = ""
    """The device ("vulkan:0") that holds the state and the snapshots; with q on it, all arrays of the call."""
    snapshot_rows: bool = False
    """Whether the snapshots go to rows of the state pool (`snapshot_indices`). Only backends that take `snapshot_rows`
    see such a spec; for others op.py moves dense snapshots to the rows."""
    final_rows: bool = False
    """Whether `snapshot_indices` name the rows for the final states, beside dense snapshots. Only backends that take
    `final_rows` see such a spec; for others op.py copies slot 0 to the rows."""
    given: tuple[str, ...] = ()
    """The arrays that the call has, by their names in the table."""

    part: ClassVar[str] = ""

    def without_rows(self) -> CallSpec:
        """The call without `snapshot_indices` that op.py makes for other backends: functional, dense snapshots."""
        options = self.options._replace(output_final_state=False)
        return replace(self, snapshot_rows=False, final_rows=False, inplace=False, options=options)

    def shape_line(self) -> str:
        """The call in one line, in the names of the contract."""
        gate = "KDA" if self.kda else "GDA"
        extra = [
            name
            for name, on in (
                ("packed", self.packed),
                ("pooled", self.pooled),
                ("masked", self.masked),
                (f"snapshots={self.snapshots}", self.snapshots),
                ("erase", "erase" in self.given),
                ("grad", self.requires_grad),
            )
            if on
        ]
        head = f"{gate} B={self.B} T={self.T} H={self.H} HV={self.HV} K={self.K} V={self.V} N={self.N}"
        return " ".join(
            [
                head,
                f"{self.dtype} state={self.state_dtype}/{self.options.state_layout} on {self.resident or self.device}",
                *extra,
            ]
        )


T = TypeVar("T")


class AroundRule:
    """The fields for dispatch of a call that contains one of the rule: the mixer's, and a log's step."""

    rule: CallSpec
    snapshot_rows: ClassVar[bool] = False  # they write their snapshots by themselves
    final_rows: ClassVar[bool] = False

    @property
    def device(self) -> str:
        return self.rule.device

    @property
    def dtype(self) -> str:
        return self.rule.dtype

    @property
    def framework(self) -> str:
        return self.rule.framework

    def without_rows(self: T) -> T:
        return self


def framework_of(x: Array) -> str | None:
    """ "torch", "numpy", "mlx", "device" for an anydelta.device's array, or None for anything else."""
    if type(x) is DeviceArray:
        return "device"
    for cls in type(x).__mro__:
        module = cls.__module__
        if cls.__name__ == "Tensor" and module == "torch":
            return "torch"
        if cls.__name__ == "ndarray" and module == "numpy":
            return "numpy"
        if cls.__name__ == "array" and module == "mlx.core":
            return "mlx"
    return None


def dtype_name(x: Array) -> str:
    """The dtype of an array without the name of its framework, for instance "bfloat16"."""
    dtype = x.dtype
    return getattr(dtype, "name", None) or str(dtype).rsplit(".", 1)[-1]


def element_strides(x: Array) -> tuple[int, ...]:
    """Strides in elements, for any framework."""
    if type(x) is DeviceArray:
        return tuple(math.prod(x.shape[axis + 1 :]) for axis in range(x.ndim))
    if framework_of(x) == "torch":
        return tuple(x.stride())
    held = memoryview(x) if framework_of(x) == "mlx" else x  # computes the array, where that is not done yet
    return tuple(s // held.itemsize for s in held.strides or ())


def device_name(x: Array) -> str:
    """CPU and GPU share the memory of MLX's arrays: the device is where their stream runs."""
    framework = framework_of(x)
    if framework == "mlx":
        mx = sys.modules["mlx.core"]
        return "cpu" if mx.default_device() == mx.cpu else MLX_GPU
    return str(x.device.type) if framework == "torch" else "cpu"


def shape_of(x: Array) -> tuple[int, ...]:
    return tuple(int(n) for n in x.shape)


def torch_inference_mode() -> bool:
    return bool(sys.modules["torch"].is_inference_mode_enabled())


def without_memory(x: Array) -> bool:
    """Whether a torch tensor has elements but no memory, such as one whose storage was freed.

    False for tensors of subclasses, on a meta device or inside torch.func, whose memory is unknown.
    """
    if type(x).__name__ not in ("Tensor", "Parameter") or x.is_meta or 0 in x.shape:
        return False
    try:
        held = x.untyped_storage().nbytes()
    except (NotImplementedError, RuntimeError):
        return False
    last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    return bool(held < (x.storage_offset() + last + 1) * x.element_size())


def overlaps(x: Array) -> bool:
    """Whether elements of x may share memory: each axis must step over all that the finer axes span."""
    if 0 in shape_of(x):
        return False
    reach = 0
    axes = zip(element_strides(x), shape_of(x), strict=True)
    for stride, n in sorted((abs(stride), n) for stride, n in axes if n > 1):
        if stride <= reach:
            return True
        reach += stride * (n - 1)
    return False


class _Checker:
    """Raises errors of one form: `[op] NAME must be X; got Y`."""

    def __init__(
        self, op: str, first: str = "q", kinds: Sequence[str] = ("torch", "numpy"), *, devices: bool = False
    ):
        self.op = op
        self.first = first
        self.kinds = kinds
        """The frameworks whose arrays are taken."""
        self.devices = devices
        """Whether `first`, and then all other arrays, may be a `DeviceArray`."""

    def fail(self, text: str) -> None:
        raise ValueError(f"{self.op}: {text}")

    def array(self, name: str, x: Array, like: tuple[str, str] | None) -> tuple[str, str]:
        framework = framework_of(x)
        if framework == "device":
            if like is None and not (self.devices and name == self.first):
                raise TypeError(f"{self.op}: {name} must be an array on the host; got one on {x.device.name}")
            if like is not None and like != (framework, x.device.name):
                where = like[1] if like[0] == "device" else "the host"
                raise TypeError(
                    f"{self.op}: {name} must be on {where} as {self.first} is; got an array on {x.device.name}"
                )
            return framework, x.device.name
        if like is not None and like[0] == "device":
            raise TypeError(
                f"{self.op}: {name} must be on {like[1]} as {self.first} is; got {type(x).__name__} on the host"
            )
        if framework is None or framework not in self.kinds:
            hint = ". For MLX arrays there is anydelta.mlx.gated_delta_rule" if framework == "mlx" else ""
            raise TypeError(
                f"{self.op}: {name} must be {' or '.join(KINDS[k] for k in self.kinds)}; "
                f"got {KINDS.get(framework or '', type(x).__name__)}{hint}"
            )
        if framework == "torch":
            if x.layout.__str__() != "torch.strided" or x.is_quantized or x.is_nested:
                kind = "quantized" if x.is_quantized else "nested" if x.is_nested else f"layout {x.layout}"
                self.fail(f"{name} must be a dense strided tensor; got {kind}")
            if x.is_neg():  # a lazy view: the memory holds -x
                self.fail(f"{name} must hold its own values; got a negated view. Call resolve_neg() first")
            if without_memory(x):
                raise TypeError(
                    f"{self.op}: {name} must have memory; got a tensor {list(shape_of(x))} whose storage holds "
                    f"{x.untyped_storage().nbytes()} bytes, as after resize_(0). Allocate it again first"
                )
        elif framework == "mlx":
            pass  # always dense memory of this machine's byte order, aligned
        elif not x.dtype.isnative:
            self.fail(f"{name} must have the byte order of this machine; got {x.dtype.str}. Convert it first")
        elif isinstance(x, sys.modules["numpy"].ma.MaskedArray):
            raise TypeError(
                f"{self.op}: {name} must be an array without a mask of its own; got a numpy.ma.MaskedArray. Fill it "
                "first, and give the tokens to leave out as mask"
            )
        elif not x.flags.aligned:
            self.fail(f"{name} must be aligned to its elements; got a misaligned array. Copy it first")
        here = (framework, str(x.device) if framework == "torch" else "cpu")
        if like is not None and framework != like[0]:
            raise TypeError(
                f"{self.op}: {name} must be a {like[0]} array as {self.first} is; got {framework}"
            )
        if like is not None and here[1] != like[1]:
            self.fail(f"{name} must be on {self.first}'s device {like[1]}; got {here[1]}")
        return here

    def held(self, name: str, x: Array, here: tuple[str, str]) -> str:
        """Check a state or snapshots. Returns the name of its device, or "" for an array of q's kind."""
        if type(x) is not DeviceArray or here[0] == "device":
            self.array(name, x, here)
            return here[1] if here[0] == "device" else ""
        if here[1] != "cpu":
            self.fail(f"q must be on the CPU when {name} is on {x.device.name}; got {here[1]}")
        return x.device.name

    def host(self, name: str, x: Array, here: tuple[str, str]) -> None:
        """Small arrays beside arrays on a device are NumPy's."""
        if here[0] == "device" and framework_of(x) != "numpy":
            raise TypeError(
                f"{self.op}: {name} must be a numpy.ndarray where q is on {here[1]}; got {type(x).__name__}"
            )

    def dtype(self, name: str, x: Array, allowed: Sequence[str]) -> str:
        got = dtype_name(x)
        if got not in allowed:
            self.fail(f"{name} must have dtype {' or '.join(allowed)}; got {got}")
        return got

    def options(self, options: NamedTuple) -> None:
        """Each option of a table against its row."""
        table: type = type(options)
        for name, row in fields(table).items():
            if error := problem(row, getattr(options, name)):
                raise type(error)(f"{self.op}: {error}")

    def index(self, name: str, x: Array, here: tuple[str, str]) -> None:
        """Check the device of an index array: the host is always allowed, and required if q is a `DeviceArray`."""
        self.host(name, x, here)
        framework, device = self.array(name, x, None)
        if here[0] != "device" and framework != here[0]:
            raise TypeError(f"{self.op}: {name} must be a {here[0]} array as q is; got {framework}")
        if device not in (here[1], "cpu"):
            self.fail(f"{name} must be on the CPU or on q's device {here[1]}; got {device}")
        self.dtype(name, x, INDEX_DTYPES)

    def sizes(self, **arrays: tuple[int, ...]) -> None:
        """Check the sizes of arrays that exist or that a call implies. A size of 0 counts as 1, because the sizes of
        one head are used even without a sequence."""
        for name, dims in arrays.items():
            if math.prod(max(n, 1) for n in dims) > MAX_NUMBERS:
                self.fail(
                    f"{name} must have at most 2^48 numbers (a size of 0 counts as 1); got {list(dims)}"
                )

    def shape(self, name: str, x: Array, want: tuple[int, ...], legend: str) -> None:
        if shape_of(x) != want:
            self.fail(f"{name} must be {legend} = {list(want)}; got {list(shape_of(x))}")

    def writable(self, name: str, x: Array) -> None:
        """Check arrays that are written: each element has memory of its own, which may be written."""
        if overlaps(x):
            self.fail(
                f"{name} is written and must not be a view whose elements share memory; "
                f"got strides {list(element_strides(x))} for {list(shape_of(x))}. Copy it first"
            )
        if framework_of(x) == "numpy":
            if not x.flags.writeable:
                self.fail(
                    f"{name} is written in place and must not be read-only; got a read-only array. Copy it first"
                )
        elif framework_of(x) == "torch" and x.is_leaf and x.requires_grad:
            self.fail(
                f"{name} is written in place and must not require grad; got a leaf that does. Detach it first"
            )
        elif framework_of(x) == "torch" and x.is_inference() and not torch_inference_mode():
            self.fail(
                f"{name} is written in place and must not be an inference tensor outside torch.inference_mode(); "
                "got one. Clone it first"
            )


def check_call(
    call: Call,
    options: Options,
    *,
    inplace: bool,
    grad_enabled: bool = False,
    kinds: Sequence[str] = ("torch", "numpy"),
) -> CallSpec:
    """The checks that need no data: types, shapes, dtypes, devices, flags. `kinds`: the frameworks that are taken.

    Raises:
        TypeError: an argument of the wrong kind (not an array, not a number, mixed frameworks).
        ValueError: a wrong shape, dtype, device, stride, choice or combination; names the argument.
    """
    c = _Checker(options.op, kinds=kinds, devices="numpy" in kinds)
    c.options(options)
    if options.lower_bound is not None and options.decay != "raw":
        c.fail(f'lower_bound goes with decay="raw" only; got decay={options.decay!r}')

    here = c.array("q", call.q, None)
    for name in ("k", "v", "g", "beta" if call.erase is None else "erase"):
        c.array(name, getattr(call, name), here)
    if call.erase is not None and (call.beta is not None or options.beta_is_logit):
        c.fail(
            "beta must be None with erase, and beta_is_logit False: d = v - S^T erase has no other write strength; "
            f"got {'beta' if call.beta is not None else 'beta_is_logit=True'}. Multiply v and erase by it"
        )

    # q, k [B, T, H, K]; v [B, T, HV, V]
    dtype = c.dtype("q", call.q, DTYPES)
    for name in ("q", "k", "v"):
        x = getattr(call, name)
        if len(x.shape) != 4:
            dims = "[B, T, HV, V]" if name == "v" else "[B, T, H, K]"
            c.fail(f"{name} must be {dims}; got {list(shape_of(x))}")
        if c.dtype(name, x, DTYPES) != dtype:
            c.fail(f"q, k and v must share a dtype; got {dtype} for q and {dtype_name(x)} for {name}")
    B, T, H, K = shape_of(call.q)
    HV, V = shape_of(call.v)[2:]
    if min(H, K, HV, V) < 1:
        c.fail(f"q and v must have at least one head and one channel; got H={H} K={K} HV={HV} V={V}")
    c.shape("k", call.k, (B, T, H, K), "[B, T, H, K] as q")
    c.shape("v", call.v, (B, T, HV, V), "[B, T, HV, V] with q's B and T")
    if HV % H:
        c.fail(f"v must have a multiple of q's heads (HV a multiple of H); got HV={HV}, H={H}")

    # g [B, T, HV] (GDA) or [B, T, HV, K] (KDA); beta [B, T, HV] or erase [B, T, H or HV, K]
    if shape_of(call.g) not in ((B, T, HV), (B, T, HV, K)):
        c.fail(
            f"g must be [B, T, HV] or [B, T, HV, K]; got {shape_of(call.g)} with B = {B}, T = {T}, HV = {HV}, K = {K}"
        )
    kda = len(call.g.shape) == 4
    if call.erase is None:
        c.shape("beta", call.beta, (B, T, HV), "[B, T, HV]")
    elif shape_of(call.erase) not in ((B, T, H, K), (B, T, HV, K)):
        c.fail(
            f"erase must be [B, T, H, K] or [B, T, HV, K]; got {shape_of(call.erase)} with B = {B}, T = {T}, H = {H}, "
            f"HV = {HV}, K = {K}"
        )
    g_dtype = beta_dtype = c.dtype("g", call.g, DTYPES)
    if call.erase is None:
        beta_dtype = c.dtype("beta", call.beta, DTYPES)
    else:
        c.dtype("erase", call.erase, (dtype,))

    c.sizes(q=(B, T, H, K), v=(B, T, HV, V), g=(B, T, HV, K) if kda else (B, T, HV))
    if call.erase is not None:
        c.sizes(erase=shape_of(call.erase))
    _check_raw(c, call, options, here, kda=kda, HV=HV, K=K)
    N = _check_sequences(c, call, here, B=B, T=T)
    c.sizes(**{"the state [N, HV, K, V]": (N, HV, K, V)})
    P, state_dtype, resident = _check_state(
        c, call, options, here, dtype=dtype, inplace=inplace, N=N, HV=HV, K=K, V=V
    )
    Ks = 0 if call.snapshots is None else shape_of(call.snapshots)[0]
    final_rows = call.snapshot_indices is not None and call.snapshots is not None
    if call.snapshot_indices is not None:
        named = _check_snapshot_indices(c, call, here, inplace=inplace, N=N)
        Ks = Ks or named

    if call.mask is not None:
        c.host("mask", call.mask, here)
        c.array("mask", call.mask, here if here[0] != "device" else None)
        c.dtype("mask", call.mask, ("bool",))
        c.shape("mask", call.mask, (B, T), "[B, T]")

    tracked = check_gradients(call, options.op, inplace) if grad_enabled and here[0] == "torch" else []
    if tracked and resident:
        c.fail(
            f"a state on {resident} has no gradient, but {', '.join(tracked)} requires grad. Use torch.no_grad()"
        )

    return CallSpec(
        B=B, T=T, H=H, HV=HV, K=K, V=V, N=N, P=P,
        kda=kda,
        dtype=dtype,
        state_dtype=state_dtype,
        g_dtype=g_dtype,
        beta_dtype=beta_dtype,
        scale=K**-0.5 if options.scale is None else float(options.scale),
        packed=call.cu_seqlens is not None,
        pooled=call.state_indices is not None,
        masked=call.mask is not None,
        has_state=call.state_in is not None,
        snapshots=Ks,
        inplace=inplace,
        requires_grad=bool(tracked),
        framework=here[0],
        device=resident.partition(":")[0] or device_name(call.q),
        options=options,
        resident=resident,
        snapshot_rows=call.snapshot_indices is not None and not final_rows,
        final_rows=final_rows,
        given=given(call),
    )  # fmt: skip


def check_transition(call: Call, options: Options) -> CallSpec:
    """The checks of a call without q, in whose place k is, and without gradients."""
    c = _Checker(options.op, first="k")
    c.array("k", call.k, None)
    c.dtype("k", call.k, DTYPES)
    if len(call.k.shape) != 4:
        c.fail(f"k must be [B, T, H, K]; got {list(shape_of(call.k))}")
    spec = check_call(call, options, inplace=False)
    refuse_gradients(options.op, spec.framework, {n: getattr(call, n) for n in TRACKED if n != "q"})
    return spec


def refuse_gradients(op: str, framework: str, arrays: Mapping[str, Array]) -> None:
    """Refuse tensors that require grad, where gradients are on, for a call that has none.

    Raises:
        ValueError: names them.
    """
    if framework != "torch" or not sys.modules["torch"].is_grad_enabled():
        return
    if tracked := [n for n, x in arrays.items() if x is not None and x.requires_grad]:
        raise ValueError(
            f"{op}: has no gradient, but {', '.join(tracked)} requires grad. Use torch.no_grad()"
        )


def check_gradients(call: Call, op: str, inplace: bool) -> list[str]:
    """The names of the tensors that require grad, which no call that writes to an argument may have.

    Raises:
        ValueError: the call is in place or takes snapshots, and an input requires grad.
    """
    tracked = []
    for name in TRACKED:
        x = getattr(call, name)
        if x is not None and x.requires_grad:
            tracked.append(("state" if inplace else "initial_state") if name == "state_in" else name)
    if tracked and inplace:
        raise ValueError(
            f"{op}: the in-place op has no gradient, but {', '.join(tracked)} requires grad. "
            "Use gated_delta_rule, or torch.no_grad()"
        )
    if tracked and call.snapshots is not None:
        raise ValueError(
            f"{op}: snapshots have no gradient, but {', '.join(tracked)} requires grad. "
            "Use torch.no_grad(), or leave snapshots out"
        )
    return tracked


def _check_raw(
    c: _Checker, call: Call, options: Options, here: tuple[str, str], *, kda: bool, HV: int, K: int
) -> None:
    """A_log [HV] and dt_bias [HV], or [HV, K] / [HV*K] for KDA, belong to raw gates and only there."""
    if options.decay != "raw":
        for name in ("A_log", "dt_bias"):
            if getattr(call, name) is not None:
                c.fail(f'{name} goes with decay="raw" only; got decay={options.decay!r}')
        return
    if call.A_log is None and options.lower_bound is None:
        c.fail('decay="raw" requires A_log [HV], or a lower_bound; got None')
    if call.A_log is not None:
        c.array("A_log", call.A_log, here)
        c.dtype("A_log", call.A_log, DTYPES)
        c.shape("A_log", call.A_log, (HV,), "[HV]")
    if call.dt_bias is not None:
        c.array("dt_bias", call.dt_bias, here)
        c.dtype("dt_bias", call.dt_bias, DTYPES)
        wanted = ((HV, K), (HV * K,)) if kda else ((HV,),)
        if shape_of(call.dt_bias) not in wanted:
            legend = "[HV, K] or [HV * K]" if kda else "[HV]"
            c.fail(f"dt_bias must be {legend}; got {list(shape_of(call.dt_bias))} with HV = {HV}, K = {K}")


def _check_sequences(c: _Checker, call: Call, here: tuple[str, str], *, B: int, T: int) -> int:
    """cu_seqlens [N+1] of integers with B = 1. Returns N."""
    if call.cu_seqlens is None:
        return B
    c.index("cu_seqlens", call.cu_seqlens, here)
    if len(call.cu_seqlens.shape) != 1 or call.cu_seqlens.shape[0] < 1:
        c.fail(f"cu_seqlens must be [N+1]; got {list(shape_of(call.cu_seqlens))}")
    if B != 1:
        c.fail(f"cu_seqlens packs all sequences into one row and requires B = 1; got B = {B}")
    return int(call.cu_seqlens.shape[0]) - 1


def _check_state(
    c: _Checker,
    call: Call,
    options: Options,
    here: tuple[str, str],
    *,
    dtype: str,
    inplace: bool,
    N: int,
    HV: int,
    K: int,
    V: int,
) -> tuple[int, str, str]:
    """state [N or P, HV, K, V], state_indices [N], snapshots [Ks, N, HV, K, V].

    Returns (P, state dtype, the device that holds them or "").
    """
    resident = here[1] if here[0] == "device" else ""
    layout = "K, V" if options.state_layout == "kv" else "V, K"
    tail = (HV, K, V) if options.state_layout == "kv" else (HV, V, K)
    name = "state" if inplace else "initial_state"
    P, state_dtype = N, "float64" if dtype == "float64" else "float32"
    allowed = ("float64",) if dtype == "float64" else ("float32", "bfloat16", "float16")

    if call.state_indices is not None:
        if call.state_in is None:
            c.fail(f"state_indices point into a state pool and require {name}; got None")
        c.index("state_indices", call.state_indices, here)
        c.shape("state_indices", call.state_indices, (N,), "[N]")
    if call.state_in is None:
        if inplace:
            raise TypeError(f"{c.op}: state must be an array that the op advances in place; got None")
    else:
        resident = c.held(name, call.state_in, here)
        got = shape_of(call.state_in)
        if len(got) != 4 or got[1:] != tail:
            c.fail(f"{name} must be [N, HV, {layout}] with [HV, {layout}] = {list(tail)}; got {list(got)}")
        if call.state_indices is None and got[0] != N:
            c.fail(
                f"{name} must have N = {N} rows, one per sequence; got {got[0]}. For a pool give state_indices"
            )
        P = got[0]
        c.sizes(**{name: got})
        state_dtype = c.dtype(name, call.state_in, allowed)
        if inplace:
            c.writable(name, call.state_in)
    if call.snapshots is not None:
        where = c.held("snapshots", call.snapshots, here)
        if call.state_in is not None and where != resident:
            c.fail(
                f"snapshots must be where {name} is, {resident or 'on the host'}; got {where or 'the host'}"
            )
        resident = where
        got = shape_of(call.snapshots)
        if len(got) != 5 or got[1:] != (N, *tail) or got[0] < 1:
            c.fail(
                f"snapshots must be [Ks, N, HV, {layout}] with Ks >= 1 and [N, HV, {layout}] = {[N, *tail]}; "
                f"got {list(got)}"
            )
        c.sizes(snapshots=got)
        snap_dtype = c.dtype("snapshots", call.snapshots, allowed)
        if call.state_in is not None and snap_dtype != state_dtype:
            c.fail(f"snapshots must have {name}'s dtype {state_dtype}; got {snap_dtype}")
        state_dtype = snap_dtype
        if here[0] != "mlx":  # MLX arrays are values: the caller gets a new one
            c.writable("snapshots", call.snapshots)
    return P, state_dtype, resident


def _check_snapshot_indices(c: _Checker, call: Call, here: tuple[str, str], *, inplace: bool, N: int) -> int:
    """snapshot_indices [Ks, N] into the rows of the in-place op's pool; [1, N] beside dense snapshots. Returns Ks."""
    if not inplace:
        c.fail("snapshot_indices name rows of a pool that is written and go with gated_delta_rule_ only")
    if call.state_indices is None:
        c.fail("snapshot_indices name rows of a pool and require state_indices; got None")
    c.index("snapshot_indices", call.snapshot_indices, here)
    got = shape_of(call.snapshot_indices)
    if len(got) != 2 or got[0] < 1 or got[1] != N:
        c.fail(f"snapshot_indices must be [Ks, N] with Ks >= 1 and N = {N}; got {list(got)}")
    if call.snapshots is not None and got[0] != 1:
        c.fail(
            "snapshot_indices must be [1, N], rows for the final states, where snapshots take the others; "
            f"got {list(got)}"
        )
    return got[0]


def check_values(call: Call, spec: CallSpec) -> None:
    """The checks that read index data: cu_seqlens, state_indices and snapshot_indices.

    On a GPU they would force a device sync, so they run only for index arrays that live on the host
    (always on the CPU backend).
    """
    c = _Checker(spec.options.op)
    numpy = spec.framework != "torch"  # or MLX, whose index arrays are on the host already
    if call.cu_seqlens is not None and (numpy or call.cu_seqlens.device.type == "cpu"):
        cu = call.cu_seqlens.tolist()
        if cu[0] != 0 or cu[-1] != spec.T:
            c.fail(f"cu_seqlens must start at 0 and end at T = {spec.T}; got {cu[0]} and {cu[-1]}")
        if any(b < a for a, b in pairwise(cu)):
            c.fail(f"cu_seqlens must not decrease; got {cu if len(cu) <= 16 else '...'}")
    if call.state_indices is not None and (numpy or call.state_indices.device.type == "cpu"):
        used = [r for r in call.state_indices.tolist() if r != -1]
        if used and (min(used) < 0 or max(used) >= spec.P):
            bad = min(used) if min(used) < 0 else max(used)
            c.fail(f"state_indices must be -1 (skip) or in [0, P) with P = {spec.P}; got {bad}")
        if call.snapshot_indices is not None:
            _check_snapshot_rows(c, call, spec, numpy)
        elif spec.inplace and len(set(used)) != len(used):
            twice = next(r for r in used if used.count(r) > 1)
            c.fail(f"state_indices must be unique apart from -1; got {twice} more than once")


def quick_check(
    check: Callable[[Arrays], None], rows: Array, at: int, spec: CallSpec
) -> Callable[[Arrays], None]:
    """`check` for calls like this one, whose `state_indices` are argument number `at`; the extension checks first."""
    if (
        core is None
        or spec.packed
        or spec.snapshot_rows
        or spec.framework not in ("torch", "numpy")
        or (spec.framework == "torch" and (rows.device.type != "cpu" or not core.reads_torch()))
        or element_strides(rows) != (1,)
    ):
        return check
    fit, given = core.rows_fit, (dtype_name(rows) == "int32", spec.N, spec.P, spec.inplace)

    def check_rows(arrays: Arrays) -> None:
        if not fit(arrays[at], *given):
            check(arrays)  # which says what is wrong

    return check_rows


def _check_snapshot_rows(c: _Checker, call: Call, spec: CallSpec, numpy: bool) -> None:
    """No row may be written twice, nor written for one sequence and read by another. Rows that are read may repeat."""
    if not (numpy or call.snapshot_indices.device.type == "cpu"):
        return
    lengths = [spec.T] * spec.N
    if call.cu_seqlens is not None:
        if not (numpy or call.cu_seqlens.device.type == "cpu"):
            return
        lengths = [b - a for a, b in pairwise(call.cu_seqlens.tolist())]
    read = call.state_indices.tolist()
    readers: dict[int, set[int]] = {}
    for n, row in enumerate(read):
        readers.setdefault(row, set()).add(n)
    written: set[int] = set()
    for s, rows in enumerate(call.snapshot_indices.tolist()):
        for n, row in enumerate(rows):
            if row == -1 or read[n] == -1 or s >= lengths[n]:
                continue  # nothing is written there
            if not 0 <= row < spec.P:
                c.fail(
                    f"snapshot_indices must be -1 (write nothing) or in [0, P) with P = {spec.P}; got {row}"
                )
            if row in written:
                c.fail(f"snapshot_indices must be unique; got {row} more than once")
            if readers.get(row, {n}) != {n}:
                c.fail(f"snapshot_indices must not name a row that another sequence reads; got {row}")
            written.add(row)
