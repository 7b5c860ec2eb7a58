"""The mixer's cases: the rule's cases (cases.py) with a convolution before and a norm after, compared as in compare.py.

Their lines begin with the word `mixer`. They run on every backend with a mixer kernel. Output, conv state, state and
each snapshot are judged separately.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

import anydelta

from ..core import dispatch
from ..core.arrays import Array
from ..mixer import reference
from ..mixer.arguments import MixerOptions
from .cases import STATE_STRIDES, STRONG, Case, Inputs, inputs, short
from .compare import Buffer, Kept, NotRunnable, Target, Verdict, dirty_memory, judge_result, refused
from .options import options_of_case
from .values import F64, round_to

T = TypeVar("T")

WORD = "mixer "
SPLITS = ("packed", "split", "grouped")
NORMS = ("silu", "sigmoid", "plain", "none")


@dataclass(frozen=True)
class MixerCase(Case):
    """One call of the mixer. Fields of the rule mean the same; `strides` are those of qkv, z, g and beta."""

    decay: str = "raw"
    dt_bias: str = "full"
    logit: bool = True
    l2norm: bool = True
    inplace: bool = True
    W: int = 4
    """Taps of the convolution."""
    S: int = 0
    """Columns of the conv state; 0: W - 1."""
    conv_float: bool = False
    """A float32 conv state, whatever the dtype."""
    bias: bool = False
    linear: bool = False
    """No activation after the convolution."""
    split: str = "packed"
    """The arrays of q, k, v and z: one of SPLITS. "grouped": views of one projection, q/k head by q/k head."""
    norm: str = "silu"
    """One of NORMS: a gate of the norm, a norm without gate, no norm."""
    neg: bool = False
    """allow_neg_eigval."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("split", SPLITS), ("norm", NORMS)):
            if getattr(self, name) not in known:
                raise ValueError(f"case: {name} must be one of {known}; got {short(getattr(self, name))}")
        if self.columns < self.W - 1:
            raise ValueError(
                f"case: the conv state has at least W - 1 = {self.W - 1} columns; got S={self.S}"
            )
        if self.fresh or self.nofinal or self.strides == "expanded" or self.state_strides == "expanded":
            raise ValueError(
                f"case: the mixer has both states, and expanded arrays go with the rule; got {self}"
            )
        if self.split == "grouped" and self.heads == "tiled":
            raise ValueError("case: grouped goes with interleaved heads")

    def _counts(self) -> Iterator[tuple[str, int, int]]:
        yield from super()._counts()
        yield from (("W", 1, self.W), ("S", 0, self.S))

    @property
    def elements(self) -> int:
        states = self.P + self.N * (1 + self.snapshots)
        return super().elements + self.C * (self.W + states * self.columns)

    def __str__(self) -> str:
        return WORD + super().__str__()

    @classmethod
    def parse(cls, line: str) -> MixerCase:
        return super().parse(line.removeprefix(WORD))  # type: ignore[return-value]

    @property
    def op(self) -> str:
        return "gated_delta_mixer_" if self.inplace else "gated_delta_mixer"

    @property
    def C(self) -> int:
        return 2 * self.H * self.K + self.HV * self.V

    @property
    def columns(self) -> int:
        return self.S or self.W - 1

    @property
    def conv_dtype(self) -> str:
        return "float32" if self.conv_float else self.dtype


@dataclass
class MixerInputs:
    """The values of a case, rounded to the dtypes that the call uses."""

    rule: Inputs
    """q, k and v here are the inputs of the convolution."""
    conv_state: F64
    conv_weight: F64
    conv_bias: F64 | None
    z: F64 | None
    norm_weight: F64 | None


def mixer_inputs(c: MixerCase) -> MixerInputs:
    """As `inputs`: tokens that must not be read hold NaN."""
    rng = np.random.default_rng(crc32(str(c).encode()) ^ 1)
    rule = inputs(c)
    z = rng.standard_normal((c.B, c.T, c.HV * c.V))
    z[np.isnan(rule.beta[..., 0])] = np.nan
    weight = rng.standard_normal((c.C, c.W)) / np.sqrt(c.W)
    return MixerInputs(
        rule=rule,
        conv_state=round_to(rng.standard_normal((c.P, c.C, c.columns)), c.conv_dtype),
        conv_weight=round_to(weight, c.dtype),
        conv_bias=round_to(rng.normal(0, 0.3, c.C), c.dtype) if c.bias else None,
        z=round_to(z, c.dtype) if c.norm in ("silu", "sigmoid") else None,
        norm_weight=round_to(rng.uniform(0.5, 1.5, c.V), c.dtype) if c.norm != "none" else None,
    )


def mixer_options(c: MixerCase) -> dict[str, Any]:
    return {
        **options_of_case(c, MixerOptions),
        "activation": None if c.linear else "silu",
        "norm_gate": "sigmoid" if c.norm == "sigmoid" else "silu",
    }


def flat(c: MixerCase, r: Inputs) -> tuple[F64, F64, F64]:
    """q, k [B, T, H K] and v [B, T, HV V]."""
    key = (c.B, c.T, c.H * c.K)
    return r.q.reshape(key), r.k.reshape(key), r.v.reshape(c.B, c.T, c.HV * c.V)


def mixer_oracle(c: MixerCase, x: MixerInputs) -> reference.MixerExpected:
    """The exact answer for the values of the call."""
    r = x.rule
    assert r.state is not None
    q, k, v = flat(c, r)
    with np.errstate(all="ignore"):  # NaN in tokens that must not be read
        return reference.gated_delta_mixer(
            q, k, v, x.conv_state, r.state,
            g=r.g, beta=r.beta, conv_weight=x.conv_weight, conv_bias=x.conv_bias, A_log=r.A_log, dt_bias=r.dt_bias,
            z=x.z, norm_weight=x.norm_weight, cu_seqlens=r.cu_seqlens, state_indices=r.state_indices, mask=r.mask,
            snapshots=c.snapshots, **mixer_options(c),
        )  # fmt: skip


@dataclass
class MixerPrepared:
    """A case with its values and its exact answer, to be run on several targets."""

    case: MixerCase
    values: MixerInputs
    exact: reference.MixerExpected | None

    @classmethod
    def of(cls, case: MixerCase) -> MixerPrepared:
        values = mixer_inputs(case)
        return cls(case, values, None if case.refused else mixer_oracle(case, values))


def mixer_buffers(c: MixerCase, x: MixerInputs, target: Target) -> dict[str, Buffer]:
    """The arrays of the call. q, k, v (and z, if grouped) are one buffer "qkv", which `_arrays` separates."""
    r = x.rule
    index = "int64" if c.int64 else "int32"
    out: dict[str, Buffer] = {}

    def hold(name: str, values: NDArray[np.generic] | None, dtype: str, mode: str = "dense") -> None:
        if values is not None:
            out[name] = Buffer(values, values.shape, dtype, mode, target)

    q, k, v = flat(c, r)
    if c.split == "packed":
        hold("qkv", np.concatenate([q, k, v], -1), c.dtype, c.strides)
    elif c.split == "split":
        for name, part in (("q", q), ("k", k), ("v", v)):
            hold(name, part, c.dtype, c.strides)
    else:
        both = [q, k, v] if x.z is None else [q, k, v, x.z]
        grouped = [part.reshape(c.B, c.T, c.H, part.shape[2] // c.H) for part in both]
        hold("qkv", np.concatenate(grouped, -1), c.dtype, c.strides)
    if c.split != "grouped":
        hold("z", x.z, c.dtype, c.strides)
    hold("g", r.g, c.gate_dtype, c.strides)
    hold("beta", r.beta, c.gate_dtype, c.strides)
    for name in ("conv_weight", "conv_bias", "norm_weight"):
        hold(name, getattr(x, name), c.dtype, "transposed" if c.strides == "permuted" else c.strides)
    hold("A_log", r.A_log, "float32")
    hold("dt_bias", r.dt_bias, c.gate_dtype)
    hold("mask", r.mask, "bool")
    hold("cu_seqlens", r.cu_seqlens, index)
    hold("state_indices", r.state_indices, index)
    hold("snapshot_indices", r.snapshot_indices, index)
    for name, values, dtype in (
        ("state", r.state, c.state_dtype),
        ("conv_state", x.conv_state, c.conv_dtype),
    ):
        assert values is not None
        stored = values.copy()
        if c.indices is not None:
            stored[~np.isin(np.arange(c.P), c.indices)] = np.nan  # these rows must not be read
        hold(name, stored, dtype, c.state_strides)
    if c.snapshots and not c.scattered:
        tail = (c.K, c.V) if c.layout == "kv" else (c.V, c.K)
        for name, shape, dtype in (
            ("snapshots", (c.HV, *tail), c.state_dtype), ("conv_snapshots", (c.C, c.columns), c.conv_dtype),
        ):  # fmt: skip
            out[name] = Buffer(None, (c.snapshots, c.N, *shape), dtype, c.state_strides, target)
    return out


def mixer_call(c: MixerCase, held: dict[str, Buffer], backend: str) -> tuple[Array, Array, Array]:
    """Run the operator; returns (o, conv state, state)."""
    return mixer_call_on(c, {name: b.array for name, b in held.items()}, backend)


def mixer_call_on(c: MixerCase, arrays: dict[str, Array], backend: str) -> tuple[Array, Array, Array]:
    qkv, arrays = mixer_qkv(c, arrays)
    conv_state, state = arrays.pop("conv_state"), arrays.pop("state")
    options = mixer_options(c)
    if c.inplace:
        o = anydelta.gated_delta_mixer_(qkv, conv_state, state, **arrays, **options, backend=backend)
        return o, conv_state, state
    return anydelta.gated_delta_mixer(qkv, conv_state, state, **arrays, **options, backend=backend)


def mixer_qkv(c: MixerCase, arrays: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
    """qkv of a call, or (q, k, v), and its other arrays."""
    arrays = dict(arrays)
    if c.split == "split":
        return tuple(arrays.pop(n) for n in ("q", "k", "v")), arrays
    qkv: Array = arrays.pop("qkv")
    if c.split == "packed":
        return qkv, arrays
    V = c.HV // c.H * c.V
    at = np.cumsum([0, c.K, c.K, V, V])
    q, k, v, z = (qkv[..., at[i] : at[i + 1]] for i in range(4))
    if c.norm in ("silu", "sigmoid"):
        arrays["z"] = z
    return (q, k, v), arrays


def check_mixer_case(case: MixerCase | MixerPrepared, target: Target) -> Verdict:
    """Run the case on the target and compare.

    Raises:
        NotRunnable: the target cannot hold the arrays.
        anydelta.UnsupportedError: the backend does not take the case.
    """
    prepared = MixerPrepared.of(case) if isinstance(case, MixerCase) else case
    c, values, exact = prepared.case, prepared.values, prepared.exact
    v = Verdict()
    with target.active(), np.errstate(all="ignore"):
        held = mixer_buffers(c, values, target)
        if exact is None:
            refused(v, lambda: mixer_call(c, held, target.backend), held)
            return v
        with dirty_memory(c, target):
            try:
                o, conv_state, state = mixer_call(c, held, target.backend)
            except (dispatch.UnsupportedError, NotRunnable):
                raise
            except Exception as error:  # a backend that took the case must run it
                v.errors.append(f"raised {type(error).__name__}: {error}")
                return v
        rule = exact.rule
        kept = (
            Kept("state", "snapshots", c.state_dtype, rule.state, rule.snapshots, state),
            Kept(
                "conv_state",
                "conv_snapshots",
                c.conv_dtype,
                exact.conv_state,
                exact.conv_snapshots,
                conv_state,
            ),
        )
        judge_result(v, c, values.rule, (o, exact.o), kept, rule, held, target)
    return v


# ---- the list

EDGES = (1, 2, 3, 4, 5, 6, 7, 12, 47, 48, 49, 65, 96, 97, 150)
"""Token counts on both sides of the window and of every chunk length in use."""


def _models() -> Iterator[MixerCase]:
    """The shapes of the five families, small in tokens: decode and prefill."""
    for T in (1, 5, 50):
        for dtype in ("float32", "bfloat16"):
            yield MixerCase(T=T, H=4, HV=4, K=128, V=128, S=4, dtype=dtype)  # qwen3_5
            yield MixerCase(T=T, H=2, HV=4, K=128, V=128, S=4, dtype=dtype, split="grouped")  # qwen3_next
            yield MixerCase(T=T, H=2, HV=2, K=128, V=128, S=4, kda=True, dt_bias="flat", norm="sigmoid",
                            split="split", dtype=dtype)  # fmt: skip  # kimi_linear
            yield MixerCase(
                T=T, H=3, HV=3, K=96, V=192, S=4, neg=True, split="split", dtype=dtype
            )  # olmo_hybrid


def _lengths() -> Iterator[MixerCase]:
    for i, T in enumerate(EDGES):
        kda = i % 2 == 0
        yield MixerCase(B=2, T=T, H=2, HV=4, K=16, V=32, kda=kda, gate="keep")
        yield MixerCase(T=T, H=1, HV=2, K=32, V=16, kda=not kda, snapshots=3, W=(2, 3, 5, 1)[i % 4], bias=kda)
        yield MixerCase(
            B=3, T=T, H=1, HV=2, K=16, V=24, mask="random", snapshots=2 if kda else 0, layout="vk"
        )
        yield MixerCase(B=2, T=T, H=2, HV=2, K=16, V=16, mask=("left", "right", "none", "all")[i % 4], S=6)


def _forms() -> Iterator[MixerCase]:
    for T in (1, 9, 60):
        for split in SPLITS:
            for strides in ("dense", "permuted", "fused", "strided"):
                yield MixerCase(B=2, T=T, H=2, HV=4, K=16, V=32, split=split, strides=strides, kda=T == 9)
        for norm in NORMS:
            yield MixerCase(
                B=2, T=T, H=2, HV=2, K=24, V=40, norm=norm, linear=norm == "plain", inplace=T != 9
            )
        for W in (1, 2, 3, 4, 7, 32):
            yield MixerCase(T=T, H=1, HV=1, K=20, V=12, W=W, S=max(W - 1, 1), bias=True)
            yield MixerCase(T=T, H=1, HV=2, K=16, V=16, W=W, S=W + 3, dtype="float16", conv_float=W == 4)
        for state_strides in STATE_STRIDES[:3]:
            yield MixerCase(B=2, T=T, H=1, HV=2, K=16, V=24, state_strides=state_strides, snapshots=2)
        for dtype in ("bfloat16", "float16"):
            for state_dtype in ("float32", "bfloat16", "float16"):
                yield MixerCase(B=2, T=T, H=2, HV=4, K=32, V=32, dtype=dtype, state_dtype=state_dtype,
                                conv_float=state_dtype == "float32", gate_dtype=dtype, snapshots=2)  # fmt: skip
        for heads in ("interleaved", "tiled"):
            for H, HV in ((1, 3), (2, 4), (3, 9), (2, 20), (1, 9), (5, 5)):
                yield MixerCase(T=T, H=H, HV=HV, K=16, V=8, heads=heads, kda=T == 60)
        yield MixerCase(T=T, H=2, HV=2, K=16, V=16, kda=True, lower_bound=-5.0)
        yield MixerCase(
            T=T, H=2, HV=2, K=16, V=16, decay="log", dt_bias="none", logit=False, l2norm=False, scale=1.0
        )
        yield MixerCase(T=T, H=2, HV=2, K=16, V=16, decay="linear", dt_bias="none", gate="mixed", neg=True)
        yield MixerCase(T=T, H=1, HV=1, K=300, V=520, l2norm=False)


def _subnormal() -> Iterator[MixerCase]:
    """As the rule's in cases.py."""
    for kda in (False, True):
        for T in (1, 2, 4, 6, 16, 64):
            base = MixerCase(T=T, H=1, HV=2, K=32, V=32, kda=kda, layout="vk" if T == 2 else "kv")
            for gate in STRONG:
                yield replace(base, gate=gate, snapshots=T if T == 4 else 0)
            yield replace(base, gate="keep", state="faded")
            yield replace(base, gate="one", state="faded", beta="zero", state_dtype="bfloat16")
            yield replace(base, gate="one", key="faint")
        for gate in ("initialised", "trained", "-16"):
            yield MixerCase(T=1024, H=1, HV=2, K=32, V=32, kda=kda, gate=gate)


def _sequences() -> Iterator[MixerCase]:
    for seqlens in ((5,), (0, 3, 0, 50, 1), (1, 1, 1, 1), (48, 49, 2), ()):
        for kda in (False, True):
            n = len(seqlens)
            yield MixerCase(seqlens=seqlens, H=1, HV=2, K=16, V=16, kda=kda, snapshots=4)
            yield MixerCase(seqlens=seqlens, H=2, HV=2, K=16, V=24, pool=n + 3, indices=tuple(range(n, 0, -1)),
                            int64=kda, mask="random" if kda else "", inplace=not kda)  # fmt: skip
    for T in (1, 20):
        yield MixerCase(B=3, T=T, H=2, HV=2, K=16, V=16, pool=6, indices=(4, -1, 0), snapshots=2)
        yield MixerCase(
            B=3, T=T, H=2, HV=2, K=16, V=16, pool=6, indices=(-1, 5, -1), inplace=False, int64=True
        )
        yield MixerCase(B=3, T=T, H=2, HV=2, K=16, V=16, pool=6, indices=(4, 4, 0))  # refused


def _scattered() -> Iterator[MixerCase]:
    """Snapshots in rows of both pools: own rows and fresh ones, rows that several sequences read, skipped sequences."""
    for Ks in (1, 3, 7):
        for T in (1, 3, 7, 50):
            for i, indices in enumerate(((5,), (0, 3, 1), (2, -1, 2, 6))):
                yield MixerCase(
                    B=len(indices), T=T, H=1, HV=2, K=16, V=32, pool=32, indices=indices, snapshots=Ks, W=(4, 1, 3)[i],
                    S=4, scattered=True, kda=(T + i) % 2 == 0, layout="vk" if i == 1 else "kv", int64=i == 2,
                    dtype="bfloat16" if (Ks + T) % 3 == 0 else "float32", mask="random" if T == 7 else "",
                    state_strides=STATE_STRIDES[Ks % 3],
                )  # fmt: skip
    yield MixerCase(
        seqlens=(2, 0, 5, 1),
        H=1,
        HV=1,
        K=20,
        V=13,
        pool=30,
        indices=(7, 1, 7, -1),
        snapshots=3,
        scattered=True,
    )


def random_mixer_case(rng: np.random.Generator) -> MixerCase:
    """A call of small size with any combination of options."""

    def pick(*values: T) -> T:
        return values[int(rng.integers(len(values)))]

    def chance(p: float) -> bool:
        return bool(rng.random() < p)

    H, kda, W = int(rng.integers(1, 4)), chance(0.5), int(rng.integers(1, 7))
    heads = pick("interleaved", "tiled")
    c = MixerCase(
        B=int(rng.integers(1, 4)), T=int(rng.choice([1, 2, 3, 7, 20, 50, 70])), H=H, HV=H * int(rng.integers(1, 4)),
        K=pick(8, 16, 19, 32), V=pick(8, 16, 21, 32), kda=kda, dtype=pick("float32", "bfloat16", "float16"),
        state_dtype=pick("float32", "float32", "bfloat16"), gate_dtype=pick("float32", "bfloat16"), heads=heads,
        layout=pick("kv", "vk"), dt_bias=pick("none", "full", "flat") if kda else pick("none", "full"),
        lower_bound=pick(None, None, -5.0), mask=pick("", "", "left", "right", "random"), snapshots=pick(0, 0, 1, 3),
        strides=pick("dense", "permuted", "fused", "strided"), state_strides=pick("dense", *STATE_STRIDES[:3]),
        gate=pick("keep", "one", "mixed", "model"), beta=pick("mid", "mid", "ends"), W=W,
        S=W - 1 + int(rng.integers(0, 3)),
        conv_float=chance(0.3), bias=chance(0.5), linear=chance(0.2), norm=pick(*NORMS), neg=chance(0.2),
        split=pick("packed", "split") if heads == "tiled" else pick(*SPLITS), inplace=chance(0.8),
    )  # fmt: skip
    if chance(0.3):
        c = replace(c, B=1, seqlens=tuple(int(n) for n in rng.integers(0, 20, int(rng.integers(1, 5)))))
    if chance(0.3):
        pool = c.N + int(rng.integers(0, 4))
        rows = rng.permutation(pool)[: c.N]
        rows[rng.random(c.N) < 0.2] = -1
        c = replace(c, pool=pool, indices=tuple(int(r) for r in rows))
        if c.inplace and c.snapshots and chance(0.5):
            c = replace(c, pool=pool + c.snapshots * c.N, scattered=True)
    return c


def _random(count: int) -> Iterator[MixerCase]:
    rng = np.random.default_rng(20262)
    for _ in range(count):
        yield random_mixer_case(rng)


def _all() -> Iterator[MixerCase]:
    for group in (
        _models(), _lengths(), _forms(), _subnormal(), _sequences(), _scattered(), _random(60)
    ):  # fmt: skip
        yield from group


MIXER_CASES: tuple[MixerCase, ...] = tuple(dict.fromkeys(_all()))
"""Every mixer case that a backend with a mixer must pass."""
