"""Runs one case on one target and compares it with the float64 oracle (anydelta.rule.reference).

Output, final state and each snapshot are judged separately:

- float32: NMSE = sum (got - exact)^2 / sum exact^2 <= 1e-7; float64: <= 1e-20.
- bfloat16, float16: rms(got - exact) <= 2 * rms(rounded - exact), where `rounded` is `exact` rounded to float32 and
  then to the half type: the best that a computation in float32 can store. If rounding is exact, got must be too.
- an absolute floor applies only if `exact` is zero everywhere, or below 1e-30 everywhere, where float32 runs out of
  normal numbers: then |got| <= 2e-30.
- nothing may be NaN or infinite.

`exact` is the oracle's answer to the values of the call, rounded to their dtypes. Every array is in memory filled with
NaN (`Buffer`). After the call, everything that must not change is compared bit for bit: inputs, the initial state of
the functional op, rows of a pool that no index names, states of sequences without a live token, snapshot slots s >=
T_n, and the gaps between strided elements.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from inspect import signature
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

import anydelta

from ..core import dispatch
from ..core.arguments import arrays as arrays_of
from ..core.late import late
from ..core.native import core as _core
from ..rule import reference
from ..rule.arguments import FUNCTIONAL, INPLACE, TOKENS, Call, Options
from .cases import Case, Inputs, inputs
from .options import options_of_case
from .values import F64, STORAGE, decode, encode, round_to

if TYPE_CHECKING:
    import mlx.core as mx
    import torch

    from .. import mlx
    from ..core.arrays import Array
else:
    mlx = late("anydelta.mlx")

MAX_NMSE = {"float32": 1e-7, "float64": 1e-20}
HALF_FACTOR = 2.0
FLOOR = 1e-30


@dataclass(frozen=True)
class Target:
    """Where a case runs: a backend ("auto" included), an ISA of it, arrays of a framework on a device."""

    backend: str
    isa: str | None = None
    framework: str = "numpy"
    device: str = "cpu"

    def __str__(self) -> str:
        return (
            "/".join(x for x in (self.backend, self.isa, self.framework, self.device) if x and x != "cpu")
            or "cpu"
        )

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Inside the block, calls run on the ISA of this target."""
        if self.isa is None:
            yield
        else:
            with dispatch.host(self.backend).forced_isa(self.isa):
                yield


@dataclass
class Verdict:
    """The result of `check`: without errors the case passed."""

    errors: list[str] = field(default_factory=list)
    scores: dict[str, float] = field(default_factory=dict)
    """Per part ("o", "state", "snapshots 0", ...): the error divided by the allowed error."""

    @property
    def worst(self) -> float:
        return max(self.scores.values(), default=0.0)


class NotRunnable(Exception):
    """The target cannot hold the arrays of the case. The text says why."""


class Buffer:
    """An array of a call inside poisoned memory, with the strides of a mode.

    dense: contiguous. permuted: axes 1 and 2 swapped in memory. fused: a slice of wider rows at an odd offset, as in a
    fused qkv projection. strided: every other element. padded: gaps after each axis. transposed: the last two axes
    swapped in memory. expanded: axis 0 (and the last one of a KDA gate) has stride 0; read-only in NumPy.
    """

    def __init__(
        self,
        values: NDArray[np.generic] | None,
        shape: tuple[int, ...],
        dtype: str,
        mode: str,
        target: Target,
    ):
        self.shape, self.dtype = shape, dtype
        # A KDA gate may also be one number per head, spread over K.
        spread = mode == "expanded" and values is not None and bool(np.all(values == values[..., :1]))
        strides, span, offset = _layout(shape, mode, spread_last=spread and len(shape) == 4)
        guard = 64 // STORAGE[dtype]().itemsize
        poison = np.nan if dtype.startswith(("float", "bfloat")) else 1 if dtype == "bool" else 0
        self.base = encode(np.full(span + offset + 2 * guard, poison), dtype)
        self.offset, self.strides = guard + offset, strides
        if values is not None:
            self._view(self.base)[...] = encode(values, dtype)
        self.before = self.base.copy()
        self._torch_base: torch.Tensor | None = None
        self._mlx_base: mx.array | None = None
        if target.framework == "torch":
            self.array: Array = self._torch(target.device)
        elif target.framework == "mlx":
            self.array = self._mlx()
        else:
            self.array = self._numpy(mode == "expanded")

    def _view(
        self, base: NDArray[np.generic], dtype: np.dtype[np.generic] | None = None
    ) -> NDArray[np.generic]:
        """The array inside `base`, which has one entry per element of memory."""
        size = base.itemsize
        view: NDArray[np.generic] = np.ndarray(
            self.shape, dtype or base.dtype, base, self.offset * size, [s * size for s in self.strides]
        )
        return view

    def _numpy(self, readonly: bool) -> NDArray[np.generic]:
        dtype = None
        if self.dtype == "bfloat16":
            try:
                import ml_dtypes
            except ImportError:
                raise NotRunnable("NumPy has bfloat16 only with the package ml_dtypes") from None
            dtype = np.dtype(ml_dtypes.bfloat16)
        view = self._view(self.base, dtype)
        view.flags.writeable = not readonly
        return view

    def _torch(self, device: str) -> torch.Tensor:
        import torch

        base = torch.from_numpy(self.base).to(device)  # on the CPU this shares memory with self.base
        self._torch_base = base
        return base.view(getattr(torch, self.dtype)).as_strided(self.shape, self.strides, self.offset)

    def _mlx(self) -> mx.array:
        import mlx.core as mx

        self._mlx_base = mx.array(self.base)  # a copy: MLX arrays are values
        typed = self._mlx_base.view(mx.bfloat16) if self.dtype == "bfloat16" else self._mlx_base
        return mx.as_strided(typed, self.shape, self.strides, self.offset)

    def take(self, array: mx.array) -> None:
        """Check that this MLX array has not changed, and replace it by the result of the call."""
        import mlx.core as mx

        if stray := self.stray():
            raise AssertionError(f"{stray}, in an array that was given")
        before, self.array = self._after().copy(), array
        self._view(before)[...] = np.asarray(array.view(mx.uint16) if self.dtype == "bfloat16" else array)
        self._mlx_base = mx.array(before)

    def _after(self) -> NDArray[np.generic]:
        if self._mlx_base is not None:
            self.base[...] = np.asarray(self._mlx_base)
        if self._torch_base is not None and self._torch_base.device.type != "cpu":
            self.base[...] = self._torch_base.cpu().numpy()
        return self.base

    def values(self) -> F64:
        """The current values of the array."""
        return decode(np.ascontiguousarray(self._view(self._after())), self.dtype)

    def stray(self, allowed: NDArray[np.bool_] | None = None) -> str | None:
        """Where memory changed outside of the elements marked in `allowed` (broadcast from the left axes), or None."""
        after = self._after()
        bits = f"u{after.itemsize}"  # compared as integers: NaN differs from NaN
        changed = after.view(bits) != self.before.view(bits)
        if allowed is not None:
            spread = allowed.reshape(*allowed.shape, *[1] * (len(self.shape) - allowed.ndim))
            self._view(changed)[np.broadcast_to(spread, self.shape)] = False
        count = int(changed.sum())
        if not count:
            return None
        first = np.argwhere(self._view(changed))
        where = f"first at {first[0].tolist()}" if len(first) else "in the gaps between its elements"
        return f"{count} elements changed that must not, {where}"


def _layout(shape: tuple[int, ...], mode: str, spread_last: bool) -> tuple[list[int], int, int]:
    """Strides in elements, how many elements they span, and the offset of the first."""
    rank = len(shape)
    order = list(range(rank))  # axes from the outermost in memory
    if mode == "permuted" and rank >= 2:
        i = min(1, rank - 2)
        order[i], order[i + 1] = order[i + 1], order[i]
    if mode == "transposed" and rank >= 2:
        order[-2], order[-1] = order[-1], order[-2]
    gaps = dict.fromkeys(range(rank), 0)
    if mode == "fused" and rank >= 2:
        gaps[min(2, rank - 1)] = 7
    if mode == "padded":
        gaps.update({axis: 2 * axis + 1 for axis in range(1, rank)})
    strides, step = [0] * rank, 2 if mode == "strided" else 1
    for axis in reversed(order):
        strides[axis] = step
        step = step * max(shape[axis], 1) + gaps[axis]
    if mode == "expanded" and rank:
        strides[0] = 0
        if spread_last:
            strides[-1] = 0
    return strides, max(step, 1), 3 if mode == "fused" else 0


def oracle(case: Case, values: Inputs) -> reference.Expected:
    """The exact answer for the values of the call."""
    with np.errstate(all="ignore"):  # NaN in tokens that must not be read
        arrays = {n: getattr(values, n) for n in FUNCTIONAL.tensors if n != "state_in"}
        q, k, v = (arrays.pop(n) for n in ("q", "k", "v"))
        return reference.gated_delta_rule(
            q, k, v, **arrays, initial_state=values.state, snapshots=case.snapshots, **options_of_case(case, Options),
        )  # fmt: skip


@dataclass
class Prepared:
    """A case with its values and its exact answer, to be run on several targets."""

    case: Case
    values: Inputs
    exact: reference.Expected | None

    @classmethod
    def of(cls, case: Case) -> Prepared:
        values = inputs(case)
        return cls(case, values, None if case.refused else oracle(case, values))


def buffers(case: Case, values: Inputs, target: Target) -> dict[str, Buffer]:
    """The arrays of the call by argument name."""
    index_dtype = "int64" if case.int64 else "int32"
    dtypes = {
        "token": case.dtype, "gate": case.gate_dtype, "weight": case.gate_dtype, "flag": "bool", "index": index_dtype,
    }  # fmt: skip
    out = {}
    for name in arrays_of(Call, *dtypes):
        x = getattr(values, name)
        if x is not None:
            dtype = "float32" if name == "A_log" else dtypes[INPLACE.row(name).kind]
            # Only arrays with a batch axis can be expanded along it; the last axis only for g [B, T, HV, K].
            mode = case.strides if name in TOKENS or case.strides != "expanded" else "dense"
            # Index data on a GPU is not checked, so cases that must be refused keep it on the host.
            host = case.refused and name == "state_indices"
            out[name] = Buffer(x, x.shape, dtype, mode, replace(target, device="cpu") if host else target)
    if values.state is not None:
        stored = values.state.copy()
        if case.indices is not None and case.state_strides != "expanded":
            named = np.isin(np.arange(case.P), case.indices)
            stored[~named] = np.nan  # these rows must not be read
        out["state"] = Buffer(stored, stored.shape, case.state_dtype, case.state_strides, target)
    if case.snapshots and not case.scattered:
        tail = (case.K, case.V) if case.layout == "kv" else (case.V, case.K)
        shape = (case.snapshots, case.N, case.HV, *tail)
        out["snapshots"] = Buffer(None, shape, case.state_dtype, case.state_strides, target)
    return out


def call(case: Case, arrays: dict[str, Any], backend: str) -> tuple[Array, Array]:
    """Run the operator; returns (o, final state or None)."""
    arrays = dict(arrays)
    q, k, v = (arrays.pop(n) for n in ("q", "k", "v"))
    state = arrays.pop("state", None)
    options = {**options_of_case(case, Options), "backend": backend}
    if case.inplace:
        return anydelta.gated_delta_rule_(q, k, v, state, **arrays, **options), state
    return anydelta.gated_delta_rule(
        q, k, v, initial_state=state, output_final_state=not case.nofinal, **arrays, **options
    )


def _call(case: Case, held: dict[str, Buffer], target: Target) -> tuple[Array, Array]:
    """The same, on the target's kind of arrays."""
    arrays = {name: b.array for name, b in held.items()}
    if target.framework != "mlx":
        return call(case, arrays, target.backend)
    if case.inplace:
        raise NotRunnable("MLX arrays are values: the operator has no in-place form on them")
    if missing := sorted({*arrays} - {*signature(mlx.gated_delta_rule).parameters, "state"}):
        raise NotRunnable(f"anydelta.mlx has no argument {missing[0]}")
    arrays["initial_state"] = arrays.pop("state", None)
    out = mlx.gated_delta_rule(
        **arrays, output_final_state=not case.nofinal, backend=target.backend, **options_of_case(case, Options),
    )  # fmt: skip
    if "snapshots" in held:
        held["snapshots"].take(out[2])
    return out[0], out[1]


def check(case: Case | Prepared, target: Target) -> Verdict:
    """Run the case on the target and compare.

    Raises:
        NotRunnable: the target cannot hold the arrays.
        anydelta.UnsupportedError: the backend does not take the case.
    """
    prepared = Prepared.of(case) if isinstance(case, Case) else case
    case, values, exact = prepared.case, prepared.values, prepared.exact
    with target.active(), np.errstate(all="ignore"):
        held = buffers(case, values, target)
        verdict = Verdict()
        if exact is None:
            refused(verdict, lambda: _call(case, held, target), held)
            return verdict
        with dirty_memory(case, target):
            try:
                o, state = _call(case, held, target)
            except (dispatch.UnsupportedError, NotRunnable):
                raise
            except Exception as error:  # a backend that took the case must run it
                verdict.errors.append(f"raised {type(error).__name__}: {error}")
                return verdict
        kept = Kept(
            "state",
            "snapshots",
            case.state_dtype,
            exact.state,
            exact.snapshots,
            state,
            wanted=not case.nofinal,
        )
        judge_result(verdict, case, values, (o, exact.o), [kept], exact, held, target)
    return verdict


def refused(v: Verdict, call: Callable[[], object], held: dict[str, Buffer]) -> None:
    """The call names a row twice: it must raise, and change no bit."""
    try:
        call()
    except ValueError as error:
        if "state_indices" not in str(error):
            v.errors.append(f"refused, but not for its state_indices: {error}")
    else:
        v.errors.append("ran, although an index is named twice")
    for name, b in held.items():
        if stray := b.stray():
            v.errors.append(f"{name}: {stray}, in a refused call")


@dataclass
class Kept:
    """A state that a call advances, and its expected value afterwards."""

    name: str
    snapshots_name: str
    dtype: str
    state: F64
    """[N, ...] of each sequence."""
    snapshots: F64 | None
    """[Ks, N, ...]."""
    returned: Array
    """Returned by the functional op; None if it must return none."""
    wanted: bool = True
    """Whether it must be returned."""


def judge_result(
    v: Verdict, case: Case, values: Inputs, o: tuple[Array, F64], kept: Sequence[Kept], exact: reference.Expected,
    held: dict[str, Buffer], target: Target,
) -> None:  # fmt: skip
    """Judge the output (`o`: got and exact), the states and their snapshots. Everything else must keep its bits."""
    live = values.live(case)
    got_o = fetch(v, "o", o[0], o[1].shape, case.dtype, target)
    if got_o is not None:
        judge(v, "o", got_o, o[1], case.dtype)
        dead = np.ones(o[1].shape[:2], bool)
        if live:
            dead = ~(np.stack(live) if case.seqlens is None else np.concatenate(live)[None])
        if np.any(got_o[dead] != 0):
            v.errors.append("o: not zero at masked tokens or in skipped sequences")

    moved = np.array([bool(row.any()) for row in live], bool)  # sequences whose state changes at all
    checked = set()
    for part in kept:
        if case.scattered or case.elsewhere:
            _judge_rows(v, case, values, exact, part, held[part.name])
        elif case.inplace:
            index = np.arange(case.N) if values.state_indices is None else values.state_indices
            now = held[part.name].values()[index[~exact.skipped]]
            judge(v, part.name, now, part.state[~exact.skipped], part.dtype)
            allowed = np.zeros(case.P, bool)
            allowed[index[moved]] = True
            if stray := held[part.name].stray(allowed):
                v.errors.append(f"{part.name}: {stray}")
        elif not part.wanted:
            if part.returned is not None:
                v.errors.append(f"{part.name}: returned, although output_final_state=False")
        else:
            got = fetch(v, part.name, part.returned, part.state.shape, part.dtype, target)
            if got is not None:
                judge(v, part.name, got, part.state, part.dtype)
                if np.any(got[~moved] != part.state[~moved]):
                    v.errors.append(f"{part.name}: not the initial one in a sequence without live tokens")
        if case.inplace:
            checked.add(part.name)
        if part.snapshots_name in held:
            _judge_snapshots(v, exact, part, held[part.snapshots_name])
            checked.add(part.snapshots_name)
    for name, b in held.items():
        if name not in checked and (stray := b.stray()):
            v.errors.append(f"{name}: {stray}; it is an input")


def _judge_snapshots(v: Verdict, exact: reference.Expected, part: Kept, dense: Buffer) -> None:
    assert part.snapshots is not None
    assert exact.snapshot_written is not None
    got = dense.values()
    for slot, rows in enumerate(exact.snapshot_written):
        if rows.any():
            judge(v, f"{part.snapshots_name} {slot}", got[slot][rows], part.snapshots[slot][rows], part.dtype)
    if stray := dense.stray(exact.snapshot_written):
        v.errors.append(f"{part.snapshots_name}: {stray}")


def _judge_rows(
    v: Verdict, case: Case, values: Inputs, exact: reference.Expected, part: Kept, pool: Buffer
) -> None:
    """Judge the snapshots in their rows of the pool. Every other row must keep its bits."""
    assert part.snapshots is not None
    assert exact.snapshot_written is not None
    assert values.snapshot_indices is not None
    got = pool.values()
    allowed = np.zeros(case.P, bool)
    for slot, rows in enumerate(values.snapshot_indices):
        written = exact.snapshot_written[slot] & (rows >= 0)
        if written.any():
            name = f"{part.snapshots_name} {slot}"
            judge(v, name, got[rows[written]], part.snapshots[slot][written], part.dtype)
        allowed[rows[written]] = True
    if stray := pool.stray(allowed):
        v.errors.append(f"{part.name}: {stray}")


def judge(v: Verdict, name: str, got: F64, exact: F64, dtype: str) -> None:
    """Compare one part, by the rule at the top of this file."""
    if not exact.size:
        return
    if not np.isfinite(got).all():
        bad = np.argwhere(~np.isfinite(got))
        v.scores[name] = math.inf
        v.errors.append(
            f"{name}: {len(bad)} of {got.size} elements are not finite, first at {bad[0].tolist()}"
        )
        return
    size = float(np.abs(exact).max())
    error = float(np.sum((got - exact) ** 2))
    if size <= FLOOR:
        score, rule = float(np.abs(got).max()) / (2 * FLOOR), "the exact value is zero"
    elif dtype in MAX_NMSE:
        score = error / float(np.sum(exact**2)) / MAX_NMSE[dtype]
        rule = f"NMSE {score * MAX_NMSE[dtype]:.2e} > {MAX_NMSE[dtype]:.0e}"
    else:
        best = float(np.sum((round_to(exact, dtype) - exact) ** 2))
        score = 0.0 if error == 0 else math.inf if best == 0 else math.sqrt(error / best) / HALF_FACTOR
        rule = f"error is {score * HALF_FACTOR:.2f} times that of rounding to {dtype}"
    v.scores[name] = score
    if score > 1:
        at = np.unravel_index(int(np.abs(got - exact).argmax()), exact.shape)
        where = f"got {got[at]:.6g}, exact {exact[at]:.6g} at {[int(i) for i in at]}"
        v.errors.append(f"{name}: {rule}; worst element: {where}")


def fetch(v: Verdict, name: str, x: Array, shape: tuple[int, ...], dtype: str, target: Target) -> F64 | None:
    """A returned array as float64, if its type, shape and dtype are right."""
    module = type(x).__module__.partition(".")[0]
    if module != target.framework:
        v.errors.append(f"{name}: is a {type(x).__name__}, not a {target.framework} array")
        return None
    got = getattr(x.dtype, "name", None) or str(x.dtype).rsplit(".", 1)[-1]
    if tuple(x.shape) != shape or got != dtype:
        v.errors.append(f"{name}: is {list(x.shape)} {got}, not {list(shape)} {dtype}")
        return None
    if target.framework == "torch":
        x = x.detach().cpu().double().numpy()
    elif target.framework == "mlx":
        import mlx.core as mx

        x = np.asarray(x.astype(mx.float64, stream=mx.cpu))
    array: F64 = x.astype(np.float64)
    return array


@contextlib.contextmanager
def dirty_memory(case: Case, target: Target) -> Iterator[None]:
    """Fill what the op allocates, and the scratch memory of the CPU kernels, with NaN, so that elements that are never
    written show.

    torch fills new memory with NaN in deterministic mode. For NumPy, blocks of the right size are filled and freed:
    malloc returns the last one first. Large blocks are zeroed, which shows as well.
    """
    with contextlib.ExitStack() as stack:
        if _core is not None:
            _core.fill_scratch(0xFF)
            stack.callback(_core.fill_scratch, -1)
        if target.framework == "torch":
            import torch

            stack.callback(torch.set_deterministic_debug_mode, torch.get_deterministic_debug_mode())
            torch.set_deterministic_debug_mode("warn")
        else:
            _dirty_numpy(case)
        yield


def _dirty_numpy(case: Case) -> None:
    for shape, dtype in (
        ((case.N, case.HV, case.K, case.V), case.state_dtype),
        ((case.B, case.T, case.HV, case.V), case.dtype),
    ):  # fmt: skip
        blocks = [np.empty(shape, STORAGE[dtype]) for _ in range(2)]
        for block in blocks:
            block.fill(0x7FC0 if dtype == "bfloat16" else np.nan)
        del blocks
