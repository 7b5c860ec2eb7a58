"""The cases of `anydelta bench ops`, which are fully described by their names, and their inputs.

    gda-t1-h16x32-d128-b1          one decode token, 16 q/k heads, 32 value heads, K = V = 128, batch 1
    kda-t4-h32x32-d128-b1-s4       four tokens, and the state after each of them is kept (4 snapshots)
    gda-t1-h16x32-d128-b1-cold     as the first, over so many states that each call streams one from memory
    gda-t1-h16x32-d128-b1-initialised   as the first, with the decays of untrained layers instead of mild ones
    gda-t256-h16x32-d128-b1-bf16   q, k, v, beta and outputs in bfloat16, the state in float32
    gda-t1-h16x32-d128-b8-bf16-pool64      as engines call it: raw gates, logit, norm and 8 of a pool's 64 states
    gda-t1-h16x32-d128-b8-bf16-pool64bf16  the same with bfloat16 states
    gda-t1-h16x32-d128-b8-bf16-pool256-cold   each call takes the next 8 of all 256 states, in random order

Head counts follow the models: Qwen3.5 has 16 q/k heads and 16, 32, 48 or 64 value heads; KDA (Kimi Linear)
has as many q/k heads as value heads.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ...conformance.gates import KINDS, Gates, model_gates
from ...conformance.values import round_to

F32 = NDArray[np.float32]

COLD_MIB = 384
"""Memory of a cold case's states: ten times the last-level cache of a desktop or a server slice."""

DECAYS = ("mild", *KINDS)
""""mild": 0.61 to 0.95 per token. The others are as in models: conformance/gates.py."""
MOST_BYTES = 2**38
"""More memory than a machine for this benchmark has."""

SHORT = {"float32": "", "bfloat16": "bf16"}
"""Types of tokens and of a pool's states, as in a case's name."""

_NAME = re.compile(
    r"(gda|kda)-t(\d+)-h(\d+)x(\d+)-d(\d+)-b(\d+)(?:-s(\d+))?(?:-(bf16))?(?:-pool(\d+)(bf16)?)?(-cold)?"
    rf"(?:-({'|'.join(KINDS)}))?",
    re.ASCII,
)


@dataclass(frozen=True)
class Case:
    """One measurement. K = V = D; everything is float32 except what `dtype` and `state_dtype` say.

    With `pool` (states in a pool), the call is that of an engine: row numbers, raw gates, beta as a logit, the norm
    inside.
    """

    gate: str
    T: int
    H: int
    HV: int
    D: int
    B: int = 1
    snapshots: int = 0
    cold: bool = False
    decay: str = "mild"
    """One of DECAYS."""
    dtype: str = "float32"
    """The dtype of q, k, v, beta and the outputs; with a pool also of a and dt_bias."""
    pool: int = 0
    state_dtype: str = "float32"

    def __post_init__(self) -> None:
        if min(self.T, self.H, self.HV, self.D, self.B) < 1:
            raise ValueError(f"a case needs sizes of at least 1; got {self.name}")
        if self.HV % self.H:
            raise ValueError(f"a case needs a multiple of its q/k heads as value heads; got {self.name}")
        if self.state_dtype != "float32" and not self.pool:
            raise ValueError(f"a case needs a pool for states in {self.state_dtype}; got {self.name}")
        if self.pool and (self.pool < self.B or self.snapshots):
            raise ValueError(
                f"a pool needs a state for each sequence and keeps no snapshots; got {self.name}"
            )
        states = max(self.pool, self.B * (1 + self.snapshots))
        if 4 * self.HV * self.D * (self.B * self.T + self.D * states) > MOST_BYTES:
            raise ValueError(f"a case needs at most 256 GiB of values and states; got {self.name}")
        if self.snapshots not in (0, self.T):
            raise ValueError(f"a case keeps no snapshots or one per token (s = t); got {self.name}")

    @property
    def name(self) -> str:
        tail = f"-s{self.snapshots}" if self.snapshots else ""
        tail += f"-{SHORT[self.dtype]}" if SHORT[self.dtype] else ""
        tail += f"-pool{self.pool}{SHORT[self.state_dtype]}" if self.pool else ""
        tail += "-cold" if self.cold else ""
        tail += "" if self.decay == "mild" else f"-{self.decay}"
        return f"{self.gate}-t{self.T}-h{self.H}x{self.HV}-d{self.D}-b{self.B}{tail}"

    @classmethod
    def parse(cls, name: str) -> Case | None:
        """The case of that name; None if it is not a case's name."""
        m = _NAME.fullmatch(name)
        if m is None:
            return None
        T, H, HV, D, B = (int(m[i]) for i in range(2, 7))
        kept, pool = (int(m[i] or 0) for i in (7, 9))
        dtype, state_dtype = ("bfloat16" if m[i] else "float32" for i in (8, 10))
        cold, decay = m[11] is not None, m[12] or "mild"
        return cls(m[1], T, H, HV, D, B, kept, cold, decay, dtype, pool, state_dtype)

    @property
    def kind(self) -> str:
        """decode: one token; block: the tokens that a speculative decoder verifies at once; prefill: a prompt."""
        return "decode" if self.T == 1 else "block" if self.T < 64 else "prefill"

    @property
    def state_bytes(self) -> int:
        return (4 if self.state_dtype == "float32" else 2) * self.B * self.HV * self.D * self.D

    @property
    def states(self) -> int:
        """How many states (of the whole batch) the calls cycle through."""
        if not self.cold:
            return 1
        if self.pool:
            return self.pool // self.B
        return max(2, math.ceil(COLD_MIB * 2**20 / (self.state_bytes * (1 + self.snapshots))))

    @property
    def flops(self) -> int:
        """Prediction, update and output: two flops each per state element and token."""
        return 6 * self.D * self.D * self.B * self.T * self.HV

    @property
    def moved_bytes(self) -> int:
        """The state is read once, and written once or once per snapshot (slot 0 is the final state)."""
        return self.state_bytes * (1 + max(1, self.snapshots))

    @property
    def limits(self) -> tuple[str, ...]:
        """Its limits: "copy" (memory) and/or "fma" (arithmetic). The slower one counts."""
        if self.kind == "prefill":
            return ("fma",)
        return ("copy",) if self.kind == "decode" or self.snapshots else ("copy", "fma")


@dataclass(frozen=True)
class Inputs:
    """The arrays of a case, in anydelta's convention."""

    q: F32
    k: F32
    """[B, T, H, D]"""
    v: F32
    """[B, T, HV, D]"""
    g: F32
    """[B, T, HV] or [B, T, HV, D]"""
    beta: F32
    """[B, T, HV]"""
    state: F32
    """[B, HV, D, D] (kv), or a pool [P, HV, D, D]"""
    A_log: F32 | None = None
    """[HV], with a pool; then g is a projection, and beta a logit."""
    dt_bias: F32 | None = None
    """[HV] or [HV, D]"""
    rows: NDArray[np.int32] | None = None
    """[states, B]: the pool's rows that the calls cycle through."""

    def arrays(self) -> dict[str, F32]:
        """q, k, v, g, beta and state, and A_log and dt_bias if they are there."""
        return {n: x for n, x in vars(self).items() if x is not None and n != "rows"}


def rounded(x: NDArray[np.floating], dtype: str) -> F32:
    """The nearest values of a type, as float32."""
    return np.asarray(x if dtype == "float32" else round_to(x, dtype), np.float32)


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    """Unit keys, beta in (0.1, 0.9), the case's decays. With a pool, gates are as an engine's projections give them.

    Mild decays keep old state normal. Strong ones make it subnormal, which is slow for contenders that compute such
    numbers. All values are numbers of the case's type.
    """
    r = np.random.default_rng(seed)

    def unit(*shape: int) -> F32:
        x = r.standard_normal(shape, dtype=np.float32)
        return np.asarray(x if case.pool else x / np.linalg.norm(x, axis=-1, keepdims=True), np.float32)

    B, T, H, HV, D = case.B, case.T, case.H, case.HV, case.D
    g_shape = (B, T, HV) if case.gate == "gda" else (B, T, HV, D)
    q, k = unit(B, T, H, D), unit(B, T, H, D)
    v = r.standard_normal((B, T, HV, D), dtype=np.float32)
    gates = _gates(case, g_shape, r)
    strength = r.uniform(0.1, 0.9, (B, T, HV))
    if case.pool:
        strength = np.log(strength / (1 - strength))
    state = r.standard_normal((case.pool or B, HV, D, D), dtype=np.float32)
    q, k, v, beta = (rounded(x, case.dtype) for x in (q, k, v, strength))
    if not case.pool:
        return Inputs(q, k, v, gates.log().astype(np.float32), beta, state)
    rows = r.permutation(case.pool)[: case.states * B].reshape(case.states, B)
    return Inputs(
        q,
        k,
        v,
        rounded(gates.x, case.dtype),
        beta,
        rounded(state, case.state_dtype),
        A_log=np.log(gates.A).astype(np.float32),
        dt_bias=rounded(gates.dt_bias, case.dtype),
        rows=rows.astype(np.int32),
    )


def _gates(case: Case, shape: tuple[int, ...], r: np.random.Generator) -> Gates:
    if case.decay != "mild":
        return model_gates(case.decay, shape, r)
    return Gates(np.log(np.expm1(-r.uniform(-0.5, -0.05, shape))), np.ones(shape[2]), np.zeros(shape[2:]))


def with_decays(cases: Sequence[Case], kinds: str) -> list[Case]:
    """Each case with each kind of decays, in that order. A case that names its kind keeps it.

    Raises:
        ValueError: a kind that is not one of DECAYS.
    """
    wanted = list(dict.fromkeys(kind.strip() for kind in kinds.split(",")))
    for kind in wanted:
        if kind not in DECAYS:
            raise ValueError(f"--decays must be of {', '.join(DECAYS)}; got {kind!r}")
    found = [c if c.decay != "mild" else replace(c, decay=kind) for c in cases for kind in wanted]
    return list(dict.fromkeys(found))


def subnormals(x: F32) -> int:
    """How many elements are too small for a normal float32."""
    tiny = np.finfo(np.float32).tiny
    return int(np.count_nonzero((x != 0) & (np.abs(x) < tiny)))


GDA_HEADS = ((4, 4), (16, 16), (16, 32), (16, 48), (16, 64))
KDA_HEADS = ((4, 4), (16, 16), (32, 32), (48, 48), (64, 64))
DEFAULT = (
    "gda-t1-h16x32-d128-b1",
    "kda-t1-h32x32-d128-b1",
    "gda-t1-h16x32-d128-b8",
    "gda-t1-h16x32-d128-b1-cold",
    "gda-t4-h16x32-d128-b1",
    "gda-t4-h16x32-d128-b1-s4",
    "gda-t64-h16x32-d128-b1",
    "gda-t512-h16x32-d128-b1",
    "kda-t256-h32x32-d128-b1",
)
ENGINE = (
    *(f"gda-t{T}-h16x32-d128-b1-bf16" for T in (64, 256, 1024, 4096)),
    "gda-t1024-h16x32-d128-b1",
    *(f"gda-t1-h16x32-d128-b{B}-bf16-pool64{states}" for states in ("", "bf16") for B in (1, 8)),
    *(f"gda-t1-h16x32-d128-b{B}-bf16-pool512{states}-cold" for states in ("", "bf16") for B in (1, 8)),
)
"""The calls of engines on a CPU, for comparison with vLLM's kernels."""
GROUPS = ("default", "engine", "decode", "block", "prefill", "cold", "all")


def presets() -> list[Case]:
    """Every preset, in a fixed order. Other names work too: `Case.parse` takes any."""
    found = [c for n in DEFAULT if (c := Case.parse(n))]
    engine = [c for n in ENGINE if (c := Case.parse(n))]
    return list(dict.fromkeys([*found, *_grid(), *engine]))


def _grid() -> Iterator[Case]:
    for gate, heads in (("gda", GDA_HEADS), ("kda", KDA_HEADS)):
        for H, HV in heads:
            for D in (64, 128):
                for B in (1, 8):
                    yield Case(gate, 1, H, HV, D, B)
        H, HV = heads[2]
        for D in (64, 128):
            yield Case(gate, 1, H, HV, D, cold=True)
            for B in (1, 8):
                for T in (2, 4, 8, 16):
                    yield Case(gate, T, H, HV, D, B)
                    yield Case(gate, T, H, HV, D, B, snapshots=T)
            for T in (64, 256, 512, 1024, 4096):
                yield Case(gate, T, H, HV, D)
        yield Case(gate, 4, H, HV, 128, snapshots=4, cold=True)
        for H, HV in heads:
            yield Case(gate, 512, H, HV, 128)
        yield Case(gate, 256, *heads[2], 128, 8)


def select(patterns: Sequence[str]) -> list[Case]:
    """Cases by group, name, glob or regular expression, commas allowed; in the given order.

    Raises:
        ValueError: a pattern that matches nothing.
    """
    every = presets()
    chosen: list[Case] = []
    for pattern in (p.strip() for item in patterns for p in item.split(",")):
        if not pattern:
            continue
        if pattern == "default":
            found = every[: len(DEFAULT)]
        elif pattern == "engine":
            found = [c for n in ENGINE if (c := Case.parse(n))]
        elif pattern in GROUPS:
            found = [c for c in every if pattern in ("all", c.kind) or (pattern == "cold" and c.cold)]
        elif (one := Case.parse(pattern)) is not None:
            found = [one]
        else:
            found = [c for c in every if fnmatch.fnmatchcase(c.name, pattern)]
            if not found:
                try:
                    found = [c for c in every if re.search(pattern, c.name)]
                except re.error:
                    found = []
        if not found:
            raise ValueError(
                f"no case matches {pattern!r}; give a group ({', '.join(GROUPS)}), a glob, a regular "
                f"expression or a name such as {DEFAULT[0]}"
            )
        chosen += found
    if not chosen:
        raise ValueError("no case was named; leave --cases out for the default selection")
    return list(dict.fromkeys(chosen))
