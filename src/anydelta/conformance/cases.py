"""The conformance cases: one frozen record per call, whose printed line reproduces it.

`str(case)` has the sizes and every field that is not at its default. `Case.parse` reads it back. The line is also the
seed of the values, so it is enough to repeat a failure. `CASES` is the list.
"""

from __future__ import annotations

import itertools
import math
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..rule.arguments import TOKENS
from ..rule.reference import head_map
from .gates import KINDS, model_gates
from .values import F64, round_to

T = TypeVar("T")

STRONG = (*KINDS, "-8", "-16", "-20", "-40")
"""Gates whose products within a few tokens are below float32's normal numbers."""
GATES = ("keep", "one", "twenty", "wipe", "inf", "mixed", "model", "ggml", *STRONG)
KEYS = ("unit", "alike", "tiny", "huge", "zero", "gaps", "faint")
STATES = ("normal", "faded")
NORMED_KEYS = ("vanishing", "vast")
BETAS = ("mid", "zero", "one", "ends", "weak")
MASKS = ("left", "right", "random", "none", "all")
STRIDES = ("dense", "permuted", "fused", "strided", "expanded")
DTYPES = ("float32", "bfloat16", "float16", "float64")
DECAYS = ("log", "linear", "raw")
HEADS = ("interleaved", "tiled")
STATE_STRIDES = ("dense", "padded", "transposed", "expanded")


@dataclass(frozen=True)
class Case:
    """One call of the operator. Sizes as in the contract; the rest is described field by field."""

    B: int = 1
    T: int = 1
    H: int = 2
    HV: int = 2
    K: int = 64
    V: int = 64
    kda: bool = False
    dtype: str = "float32"
    state_dtype: str = "float32"
    gate_dtype: str = "float32"
    """dtype of g, beta and dt_bias."""
    heads: str = "interleaved"
    layout: str = "kv"
    decay: str = "log"
    dt_bias: str = "none"
    """For raw gates: "none", "full" [HV] or [HV, K], "flat" [HV * K]."""
    lower_bound: float | None = None
    logit: bool = False
    l2norm: bool = False
    eps: float = 1e-6
    scale: float | None = None
    fresh: bool = False
    """Without an initial state."""
    inplace: bool = False
    nofinal: bool = False
    """With output_final_state=False."""
    seqlens: tuple[int, ...] | None = None
    """Lengths of packed sequences; T follows from them."""
    pool: int = 0
    indices: tuple[int, ...] | None = None
    """Rows of a pool of `pool` states. Repeated ones must be refused."""
    int64: bool = False
    """Index arrays are int64, not int32."""
    mask: str = ""
    """One of MASKS: where padding is. "none": no token is live. "all": every token is."""
    snapshots: int = 0
    scattered: bool = False
    """The snapshots go to rows of the pool (snapshot_indices): some to the rows that their sequence reads, some are not
    written."""
    elsewhere: bool = False
    """The final states go to such rows, and the snapshots to an array."""
    noA: bool = False
    """Raw gates with a lower bound and without A_log."""
    strides: str = "dense"
    """Strides of the inputs, one of STRIDES: see compare.Buffer."""
    state_strides: str = "dense"
    """Strides of the state and the snapshots, one of STATE_STRIDES."""
    gate: str = "model"
    """Log decay: "keep" about 0, "one" about -1, "twenty" about -20, "wipe" -1e4, "inf" -inf, "mixed" all of these,
    "model" log-uniform in [-8, -1e-3], "ggml" U(-20, -1e-4), "initialised" and "trained" as in gates.py, a number: that
    decay everywhere."""
    key: str = "unit"
    """Keys: "unit" of norm 1, "alike" norm 1 and almost parallel, "tiny" 1e-3, "huge" 1e4 (64 in half types),
    "zero", "gaps": every third one zero, "faint" 1e-20 (1e-7 in float16). With the norm in the kernel, for queries too:
    "vanishing" 1e-25 and "vast" 1e25."""
    state: str = "normal"
    """Initial states: "normal", "faded": 1e-39, below float32's normal numbers."""
    beta: str = "mid"
    """Write strength: "mid" U(0, 1), "zero", "one", "ends" 0 or 1, "weak" about 1e-6."""
    erase: str = ""
    """A separate key that is read, instead of beta: "H" [B, T, H, K], "HV" [B, T, HV, K]."""

    def __post_init__(self) -> None:
        if self.seqlens is not None:
            object.__setattr__(self, "T", sum(self.seqlens))
        for name, known in (
            ("gate", GATES), ("key", (*KEYS, *NORMED_KEYS)), ("beta", BETAS), ("mask", ("", *MASKS)),
            ("strides", STRIDES), ("state_strides", STATE_STRIDES), ("dt_bias", ("none", "full", "flat")),
            ("state", STATES), ("dtype", DTYPES), ("gate_dtype", DTYPES),
            ("state_dtype", ("float32", "bfloat16", "float16", "float64")), ("decay", DECAYS), ("heads", HEADS),
            ("layout", ("kv", "vk")), ("erase", ("", "H", "HV")),
        ):  # fmt: skip
            if getattr(self, name) not in known:
                raise ValueError(f"case: {name} must be one of {known}; got {short(getattr(self, name))}")
        for name, least, value in self._counts():
            if value < least:
                raise ValueError(f"case: {name} must be at least {least}; got {value}")
        if self.elements > MOST_ELEMENTS:
            raise ValueError(
                f"case: its arrays must have at most {MOST_ELEMENTS} elements; got {self.elements}"
            )
        spare = [i for i in self.indices or () if not -1 <= i < self.pool]
        for bad, text in (
            (self.HV % self.H != 0, "HV is a multiple of H"),
            (bool(spare), f"indices are -1 or rows of the pool, not {spare[:1]}"),
            (not 0 <= self.eps < math.inf, "eps is a number from 0"),
            (not math.isfinite(self.scale or 0.0), "scale is a number"),
            (not -math.inf < (self.lower_bound or 0.0) <= 0, "lower_bound is a number up to 0"),
            (self.seqlens is not None and self.B != 1, "seqlens go with B=1"),
            (
                self.fresh and (self.inplace or self.indices is not None),
                "fresh goes with neither inplace nor indices",
            ),
            (self.indices is not None and len(self.indices) != self.N, "indices must be one per sequence"),
            (
                (self.scattered or self.elsewhere)
                and not (self.inplace and self.snapshots and self.indices is not None),
                "scattered and elsewhere go with inplace, indices and snapshots",
            ),
            (self.scattered and self._rows_left() < 0, "scattered needs a row of the pool for each snapshot"),
            (self.scattered and self.elsewhere, "scattered says where all snapshots go, elsewhere one"),
            (bool(self.erase) and (self.logit or self.beta != "mid"), "erase replaces beta"),
            (self.noA and (self.lower_bound is None or self.decay != "raw"), "noA goes with a lower bound"),
            (self.key in NORMED_KEYS and not self.l2norm, "such keys go with l2norm"),
            (self.nofinal and self.inplace, "nofinal goes with the functional op"),
            (
                self.state_strides == "expanded" and (self.inplace or self.snapshots),
                "a written state is not expanded",
            ),
            (
                self.fresh and not self.snapshots and self.state_dtype in ("bfloat16", "float16"),
                "a fresh final state is float32",
            ),
            (self.dt_bias != "none" and self.decay != "raw", "dt_bias goes with decay=raw"),
            (self.lower_bound is not None and self.decay != "raw", "lower_bound goes with decay=raw"),
        ):
            if bad:
                raise ValueError(f"case: {text}; got {self}")

    def _counts(self) -> Iterator[tuple[str, int, int]]:
        """Sizes by name, each with its minimum."""
        for name, least in (
            ("B", 0),
            ("T", 0),
            ("H", 1),
            ("HV", 1),
            ("K", 1),
            ("V", 1),
            ("pool", 0),
            ("snapshots", 0),
        ):
            yield name, least, getattr(self, name)
        for length in self.seqlens or ():
            yield "seqlens", 0, length

    def _rows_left(self) -> int:
        """Rows of the pool that stay free when every snapshot has one: see _snapshot_rows. Wrong cases need it too."""
        live = [
            (i, n)
            for i, n in zip(self.indices or (), self.seqlens or (self.T,) * self.N, strict=False)
            if i >= 0
        ]
        read = [i for i, _ in live]
        own = sum(read.count(i) == 1 and min(n, self.snapshots) > 0 for i, n in live)
        return self.pool - len(set(read)) + own - sum(min(n, self.snapshots) for _, n in live)

    @property
    def elements(self) -> int:
        """Elements of all arrays, and of what the oracle keeps."""
        tokens, states = self.B * self.T, self.P + self.N * (1 + self.snapshots)
        return (
            tokens * (self.H * self.K + self.HV * (self.K + self.V)) * 2 + states * self.HV * self.K * self.V
        )

    @property
    def N(self) -> int:
        return self.B if self.seqlens is None else len(self.seqlens)

    @property
    def P(self) -> int:
        return self.N if self.indices is None else self.pool

    @property
    def op(self) -> str:
        return "gated_delta_rule_" if self.inplace else "gated_delta_rule"

    @property
    def refused(self) -> bool:
        """True for cases that must raise ValueError: an index of a written state occurs twice."""
        if self.scattered or self.elsewhere or not self.inplace:
            return False
        used = [i for i in self.indices or () if i >= 0]
        return len(set(used)) < len(used)

    @property
    def work(self) -> int:
        """Tokens times state elements: the cost of a case."""
        return self.B * self.T * self.HV * self.K * self.V

    def __str__(self) -> str:
        words = []
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name not in _SIZES and value == f.default:
                continue
            if value is True:
                words.append(f.name)
            elif isinstance(value, tuple):
                words.append(f"{f.name}={','.join(map(str, value))}")
            else:
                words.append(f"{f.name}={value}")
        return " ".join(words)

    @classmethod
    def parse(cls, line: str) -> Case:
        """The case that prints as `line`.

        Raises:
            ValueError: an unknown field, or a value that does not fit it.
        """
        readers = {f.name: _READERS[str(f.type)] for f in fields(cls) if f.default is not MISSING}
        values: dict[str, Any] = {}
        for word in line.split():
            name, eq, text = word.partition("=")
            if name not in readers:
                raise ValueError(
                    f"case: no field is called {short(name)}; the fields are {', '.join(readers)}"
                )
            if name in values:
                raise ValueError(f"case: {name} must be given once; got it twice")
            try:
                values[name] = readers[name](text) if eq else _bare(name, readers[name])
            except ValueError:
                raise ValueError(f"case: {name} cannot be {short(text)}") from None
        if not values:
            raise ValueError("case: a line has at least one field; got none")
        case = cls(**values)
        if values.get("T", case.T) != case.T:
            raise ValueError(f"case: T must be the sum of seqlens, {case.T}, or left out; got {values['T']}")
        return case


_SIZES = ("B", "T", "H", "HV", "K", "V")
MOST_ELEMENTS = 2**26
"""512 MiB in float64; the arrays and the oracle hold a few copies. The largest case of the list has 4 million."""


def _int(text: str) -> int:
    """An integer exactly as printed: int() takes "1_0", "+1", digits of every script, and numbers of any length."""
    if not re.fullmatch("-?[0-9]{1,18}", text):
        raise ValueError(text)
    return int(text)


def _float(text: str) -> float:
    if not re.fullmatch("[-+.0-9e]{1,40}", text):
        raise ValueError(text)
    return float(text)


def _bool(text: str) -> bool:
    if text not in ("True", "False"):
        raise ValueError(text)
    return text == "True"


def short(text: object) -> str:
    text = str(text)
    return repr(text if len(text) <= 60 else text[:60] + "…")


_READERS: dict[str, Callable[[str], object]] = {
    "int": _int,
    "str": str,
    "bool": _bool,
    "float | None": lambda text: None if text == "None" else _float(text),
    "float": _float,
    "tuple[int, ...] | None": lambda text: tuple(_int(n) for n in text.split(",")) if text else (),
}


def _bare(name: str, reader: object) -> bool:
    """Whether a word without "=" is a flag."""
    if reader is not _bool:
        raise ValueError(name)
    return True


@dataclass
class Inputs:
    """The values of a case in float64 (or bool, or int64), rounded to the dtypes that the call uses."""

    q: F64
    k: F64
    v: F64
    g: F64
    beta: Any
    """None with erase."""
    state: F64 | None
    A_log: F64 | None = None
    dt_bias: F64 | None = None
    mask: NDArray[np.bool_] | None = None
    cu_seqlens: NDArray[np.int64] | None = None
    state_indices: NDArray[np.int64] | None = None
    snapshot_indices: NDArray[np.int64] | None = None
    erase: F64 | None = None

    def live(self, case: Case) -> list[NDArray[np.bool_]]:
        """Per sequence: a mask of the tokens that the operator must process."""
        mask = np.ones((case.B, case.T), bool) if self.mask is None else self.mask
        if self.cu_seqlens is None:
            rows = list(mask)
        else:
            cu = self.cu_seqlens.tolist()
            rows = [mask[0, s:e] for s, e in itertools.pairwise(cu)]
        index = range(case.N) if case.indices is None else case.indices
        return [row & (i >= 0) for row, i in zip(rows, index, strict=True)]


def inputs(case: Case) -> Inputs:
    """The values of a case. Tokens that must not be read (masked, or of skipped sequences) hold NaN."""
    rng = np.random.default_rng(zlib.crc32(str(case).encode()))
    c = case
    k = _keys(c, rng)
    q = _unit(rng.standard_normal((c.B, c.T, c.H, c.K)))
    if c.l2norm:
        q *= rng.uniform(0.5, 8.0, (c.B, c.T, c.H, 1)) * _SIZE.get(c.key, 1.0)
    v = rng.standard_normal((c.B, c.T, c.HV, c.V))
    g, A_log, dt_bias = _gates(c, rng)
    beta = _betas(c, rng)
    state = None
    if not c.fresh:
        tail = (c.K, c.V) if c.layout == "kv" else (c.V, c.K)
        state = (0.5 if c.state == "normal" else 1e-39) * rng.standard_normal((c.P, c.HV, *tail))
    if c.strides == "expanded":  # elements that compare.Buffer stores once must be equal everywhere
        for x in (q, k, v, g, beta):
            x[:] = x[:1]
        if c.kda:
            g[:] = g[..., :1]
    if c.state_strides == "expanded" and state is not None:
        state[:] = state[:1]

    out = Inputs(
        q=round_to(q, c.dtype),
        k=round_to(k, c.dtype),
        v=round_to(v, c.dtype),
        g=round_to(g, c.gate_dtype),
        beta=None if c.erase else round_to(beta, c.gate_dtype),
        state=None if state is None else round_to(state, c.state_dtype),
        A_log=None if A_log is None else round_to(A_log, "float32"),
        dt_bias=None if dt_bias is None else round_to(dt_bias, c.gate_dtype),
        mask=_mask(c, rng),
        cu_seqlens=None if c.seqlens is None else np.cumsum([0, *c.seqlens]),
        state_indices=None if c.indices is None else np.array(c.indices, np.int64),
        snapshot_indices=_snapshot_rows(c, rng) if c.scattered or c.elsewhere else None,
        erase=round_to(_erase(c, k, rng), c.dtype) if c.erase else None,
    )
    if c.strides != "expanded":
        dead = ~_rows(c, out.live(c))
        for name in TOKENS:
            if (x := getattr(out, name)) is not None:
                x[dead] = np.nan
    return out


def _rows(c: Case, live: list[NDArray[np.bool_]]) -> NDArray[np.bool_]:
    """[B, T] from one row per sequence."""
    if not live:
        return np.zeros((c.B, c.T), bool)
    return np.stack(live) if c.seqlens is None else np.concatenate(live)[None]


def _snapshot_rows(c: Case, rng: np.random.Generator) -> NDArray[np.int64]:
    """[Ks, N] rows of the pool: a sequence's own row if no other reads it, then rows that none reads; -1 for slots that
    are not written, some of them at random. [1, N] for the final states."""
    assert c.indices is not None
    lengths = c.seqlens or (c.T,) * c.N
    used = [i for i in c.indices if i >= 0]
    spare = [int(r) for r in rng.permutation(c.P) if r not in used]
    rows = np.full((1 if c.elsewhere else c.snapshots, c.N), -1, np.int64)
    for n, (row, length) in enumerate(zip(c.indices, lengths, strict=True)):
        mine = [row] if used.count(row) == 1 else []
        for s in rng.permutation(min(length, len(rows)) if row >= 0 else 0):
            if rng.random() < 0.8:
                rows[s, n] = mine.pop() if mine and rng.random() < 0.5 else spare.pop()
    return rows


_SIZE = {"vanishing": 1e-25, "vast": 1e25}


def _unit(x: F64) -> F64:
    length: F64 = np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
    return x / length


def _keys(c: Case, rng: np.random.Generator) -> F64:
    # Norm 1 as in real models: with beta in [0, 1] the recurrence is then stable, however long it runs.
    shape = (c.B, c.T, c.H, c.K)
    k = rng.standard_normal(shape)
    if c.key == "alike":
        k = rng.standard_normal((c.B, 1, c.H, c.K)) + 0.2 * k
    k = _unit(k)
    if c.key == "gaps":
        k[:, ::3] = 0.0
    size = {
        "tiny": 1e-3, "huge": 1e4 if c.dtype in ("float32", "float64") else 64.0, "zero": 0.0,
        "faint": 1e-7 if c.dtype == "float16" else 1e-20,
    }  # fmt: skip
    k = k * size.get(c.key, _SIZE.get(c.key, 1.0))
    if c.l2norm and c.key in ("unit", "alike"):
        k *= rng.uniform(0.5, 8.0, (c.B, c.T, c.H, 1))
    return k


def _gates(c: Case, rng: np.random.Generator) -> tuple[F64, F64 | None, F64 | None]:
    """g in the form that `decay` names, A_log and dt_bias."""
    shape = (c.B, c.T, c.HV, c.K) if c.kda else (c.B, c.T, c.HV)
    if c.gate in KINDS:
        gates = model_gates(c.gate, shape, rng)
        if c.decay != "raw":
            g = gates.log()
            return np.exp(g) if c.decay == "linear" else g, None, None
        if c.dt_bias == "none":
            return gates.x + gates.dt_bias, np.log(gates.A), None
        return gates.x, np.log(gates.A), gates.dt_bias.reshape(-1) if c.dt_bias == "flat" else gates.dt_bias
    log: dict[str, Callable[[], F64]] = {
        "keep": lambda: -rng.choice([0.0, 1.0], shape) * rng.uniform(0, 1e-3, shape),
        "one": lambda: rng.uniform(-1.5, -0.5, shape),
        "twenty": lambda: rng.uniform(-22, -18, shape),
        "wipe": lambda: np.full(shape, -1e4),
        "inf": lambda: np.full(shape, -np.inf),
        "model": lambda: -np.exp(rng.uniform(np.log(1e-3), np.log(8), shape)),
        "ggml": lambda: rng.uniform(-20, -1e-4, shape),
        **{number: partial(np.full, shape, float(number)) for number in STRONG if number not in KINDS},
    }
    # A mixture mostly has long memory: a wipe at every other token would leave nothing to test.
    names = ("keep", "one", "twenty", "wipe", "inf")
    pick = rng.choice(len(names), shape, p=(0.7, 0.22, 0.02, 0.03, 0.03))
    g = log[c.gate]() if c.gate != "mixed" else np.choose(pick, [log[n]() for n in names])
    if c.decay == "log":
        return g, None, None
    if c.decay == "linear":
        return np.exp(g), None, None

    # Raw: the gate before its activation. This inverts the softplus, clipped where it has no inverse.
    A_log = np.zeros(c.HV) if c.noA else np.log(rng.uniform(0.5, 4.0, (c.HV,)))
    A = np.exp(A_log)[:, None] if c.kda else np.exp(A_log)
    x = np.clip(-g, 1e-9, 1e4) / A
    raw = np.where(x > 30, x, np.log(np.expm1(np.minimum(x, 30.0))))
    dt_bias = None
    if c.dt_bias != "none":
        dt_bias = rng.uniform(-3, 3, shape[2:])
        raw = raw - dt_bias
        if c.dt_bias == "flat":
            dt_bias = dt_bias.reshape(-1)
    return raw, None if c.noA else A_log, dt_bias


def _betas(c: Case, rng: np.random.Generator) -> F64:
    shape = (c.B, c.T, c.HV)
    if c.logit:
        ends = rng.choice([-1e4, 1e4], shape)
        table = {
            "mid": rng.normal(0, 2, shape),
            "zero": np.full(shape, -1e4),
            "one": np.full(shape, 1e4),
            "ends": ends,
        }
        return table.get(c.beta, rng.uniform(-15, -12, shape))
    ends = rng.choice([0.0, 1.0], shape)
    table = {"mid": rng.uniform(0, 1, shape), "zero": np.zeros(shape), "one": np.ones(shape), "ends": ends}
    return table.get(c.beta, rng.uniform(1e-6, 2e-6, shape))


def _erase(c: Case, k: F64, rng: np.random.Generator) -> F64:
    """Near the written keys, so that 1 - k . erase is in (0, 1): each channel times U(0, 1), and another direction."""
    k = _unit(k) if c.l2norm else k
    k = k if c.erase == "H" else k[:, :, head_map(c.H, c.HV, c.heads)]
    aside = 0.3 * np.linalg.norm(k, axis=-1, keepdims=True) * _unit(rng.standard_normal(k.shape))
    erase: F64 = rng.uniform(0, 1, k.shape) * k + aside
    if c.strides == "expanded":
        erase[:] = erase[:1]
    return erase


def _mask(c: Case, rng: np.random.Generator) -> NDArray[np.bool_] | None:
    """[B, T], True for live tokens."""
    t = np.arange(c.T)
    if not c.mask:
        return None
    if c.mask in ("left", "right"):
        pad = rng.integers(0, c.T + 1, (c.B, 1))
        return t >= pad if c.mask == "left" else t < c.T - pad
    if c.mask == "random":
        return rng.random((c.B, c.T)) < 0.6
    return np.full((c.B, c.T), c.mask == "all")


EDGES = (1, 2, 3, 5, 6, 7, 12, 13, 15, 16, 17, 31, 33, 47, 48, 49, 63, 64, 65, 100, 127, 128, 200, 256)
"""Token counts on both sides of every chunk length in use: 6 and 48 on the CPU, 16, 32, 64 and 128
elsewhere."""


def _ggml() -> Iterator[Case]:
    """ggml's GATED_DELTA_NET lists, for tests and for speed: (heads, size, T, sequences, HV/H, Ks). The short ones have
    permuted and KDA twins."""

    def case(heads: int, size: int, T: int, B: int, rep: int, Ks: int, kda: bool, strides: str) -> Case:
        return Case(
            B=B, T=T, H=heads, HV=heads * rep, K=size, V=size, kda=kda, strides=strides, snapshots=Ks,
            heads="tiled", layout="vk", gate="ggml", inplace=strides == "permuted",
        )  # fmt: skip

    for sizes in (
        (32, 128, 1, 1, 1, 1), (32, 16, 1, 1, 1, 1), (16, 64, 1, 1, 1, 1), (16, 64, 1, 2, 1, 1), (4, 64, 1, 1, 1, 1),
        (4, 64, 1, 2, 1, 1), (4, 16, 1, 2, 1, 1), (4, 32, 4, 1, 1, 1), (4, 64, 4, 1, 1, 1), (4, 64, 4, 2, 1, 1),
        (4, 16, 4, 2, 1, 1), (8, 32, 4, 2, 2, 1), (4, 64, 33, 1, 1, 1), (4, 64, 64, 1, 1, 1), (4, 64, 65, 1, 1, 1),
        (4, 64, 100, 1, 1, 1), (4, 64, 127, 1, 1, 1), (4, 64, 127, 2, 1, 1), (4, 16, 2, 1, 1, 2), (4, 32, 4, 1, 1, 4),
        (4, 64, 4, 2, 1, 4), (8, 128, 4, 1, 1, 4), (8, 32, 4, 2, 2, 4), (4, 32, 8, 1, 1, 3), (4, 64, 16, 2, 1, 4),
        (4, 16, 2, 1, 1, 5), (8, 32, 4, 2, 2, 7),
    ):  # fmt: skip
        for kda in (False, True):
            for strides in ("dense", "permuted"):
                yield case(*sizes, kda, strides)
    yield case(32, 128, 64, 1, 1, 1, True, "dense")
    for heads, size, T, B, rep in (
        (4, 64, 200, 1, 1), (4, 64, 256, 1, 1), (16, 128, 100, 1, 3), (16, 128, 128, 1, 3), (16, 128, 300, 2, 3),
        (32, 128, 2048, 1, 1), *((heads, 128, T, 1, 1) for heads in (4, 32) for T in (64, 256, 512, 1024)),
    ):  # fmt: skip
        yield case(heads, size, T, B, rep, 1, False, "dense")


def _chunks() -> Iterator[Case]:
    """Every chunk edge, at long memory and at the usual mixture."""
    for i, T in enumerate(EDGES):
        for kda in (False, True):
            yield Case(T=T, K=64, V=64, H=1, HV=2, kda=kda, gate="keep", key="alike")
            yield Case(T=T, K=32, V=48, H=2, HV=2, kda=kda, inplace=i % 2 == 0, gate="mixed", layout="vk")
        yield Case(T=T, K=64, V=32, H=1, HV=1, kda=i % 2 == 0, dtype="bfloat16", gate="keep", l2norm=True)
        yield Case(B=3, T=T, K=16, V=32, H=1, HV=2, kda=i % 2 == 1, mask="left", gate="one")
    for kda in (False, True):
        for gate in ("keep", "mixed"):
            yield Case(T=1000, K=64, V=64, H=1, HV=2, kda=kda, gate=gate)
    yield Case(T=64, K=128, V=128, H=16, HV=32, gate="model", dtype="bfloat16", l2norm=True)
    yield Case(T=64, K=128, V=128, H=32, HV=32, kda=True, gate="keep")
    yield Case(B=4, T=1, K=128, V=128, H=16, HV=32, inplace=True, dtype="bfloat16")
    yield Case(T=128, K=256, V=256, H=1, HV=2, gate="keep", key="alike", beta="one")


def _sizes() -> Iterator[Case]:
    """Head sizes: the usual ones, those that peers refuse (80, 96, 192), odd ones, K != V."""
    sizes = (1, 7, 8, 15, 16, 17, 24, 31, 32, 33, 48, 64, 65, 80, 96, 100, 112, 128, 160, 192, 256)
    for i, size in enumerate(sizes):
        for T in (1, 20):
            kda = (i + T) % 2 == 0
            yield Case(T=T, H=1, HV=2, K=size, V=size, kda=kda, gate="one", inplace=T == 1)
            yield Case(T=T, H=1, HV=1, K=size, V=size, kda=not kda, layout="vk", inplace=T == 20, gate="keep")
    pairs = (
        (64, 128), (128, 64), (192, 256), (7, 33), (16, 256), (256, 16), (96, 80), (1, 33), (33, 1), (80, 96),
        (257, 16), (520, 24), (16, 300),
    )  # fmt: skip
    for i, (K, V) in enumerate(pairs):
        for T in (1, 4, 19):
            for layout in ("kv", "vk"):
                yield Case(
                    B=2, T=T, H=1, HV=2, K=K, V=V, layout=layout, kda=(i + T) % 2 == 0, inplace=i % 2 == 0,
                    snapshots=2 if T == 4 else 0, dtype="bfloat16" if T == 19 and i % 3 == 0 else "float32",
                )  # fmt: skip


def _heads() -> Iterator[Case]:
    for H in (1, 2, 3):
        for rep in (1, 2, 3, 4):
            for heads in ("interleaved", "tiled"):
                for T in (1, 18):
                    yield Case(
                        B=2, T=T, H=H, HV=H * rep, K=32, V=16, heads=heads, kda=(H + T) % 2 == 0,
                        inplace=rep % 2 == 0, l2norm=T == 1,
                    )  # fmt: skip


def _dtypes() -> Iterator[Case]:
    for dtype in ("float32", "bfloat16", "float16"):
        for state_dtype in ("float32", "bfloat16", "float16"):
            for gate_dtype in ("float32", "bfloat16", "float16"):
                for T in (1, 7, 70):
                    yield Case(
                        B=2 if T < 70 else 1, T=T, HV=4, K=32, V=32, dtype=dtype, state_dtype=state_dtype,
                        gate_dtype=gate_dtype, kda=T == 7, inplace=T != 7, snapshots=2 if T == 7 else 0,
                        layout="vk" if gate_dtype == "bfloat16" else "kv",
                    )  # fmt: skip
    for dtype in ("float32", "bfloat16", "float16"):
        for state_dtype in ("bfloat16", "float16"):
            yield Case(
                T=33, K=128, V=128, dtype=dtype, state_dtype=state_dtype, gate="keep", fresh=True, snapshots=3
            )
    for T in (1, 2, 6):  # wide enough for the CPU's registers, and with a remainder
        for state_dtype in ("float32", "bfloat16", "float16"):
            yield Case(
                B=2, T=T, HV=2, K=128, V=160, state_dtype=state_dtype, inplace=True, pool=4, indices=(3, 1)
            )


def _forms() -> Iterator[Case]:
    """Decays and betas in every form, the norm in the kernel, the scale."""
    for kda in (False, True):
        for gate in ("keep", "one", "twenty", "wipe", "inf", "mixed", "model"):
            for decay in ("linear", "raw"):
                T = 21 if gate in ("keep", "mixed") else 5
                yield Case(T=T, H=1, HV=2, K=32, V=32, kda=kda, decay=decay, gate=gate, logit=gate == "one")
        for dt_bias in ("none", "full", "flat"):
            if dt_bias == "flat" and not kda:
                continue
            for lower_bound in (None, -5.0, -0.5, 0.0):
                for T, gate_dtype in ((1, "bfloat16"), (18, "float32")):
                    yield Case(
                        B=2, T=T, HV=4, K=16, V=32, kda=kda, decay="raw", dt_bias=dt_bias,
                        lower_bound=lower_bound, gate_dtype=gate_dtype, logit=True, inplace=T == 1,
                        dtype=gate_dtype,
                    )  # fmt: skip
        for beta in BETAS:
            for logit in (False, True):
                yield Case(T=9, K=32, V=16, kda=kda, beta=beta, logit=logit, fresh=beta == "weak")
                yield Case(T=65, K=32, V=16, kda=kda, beta=beta, logit=logit, gate="keep")
    for key in KEYS:
        for eps in (1e-6, 1e-3, 0.0):
            for T in (1, 24):
                yield Case(T=T, K=32, V=32, key=key, l2norm=True, eps=eps, fresh=key == "tiny", kda=T == 24)
    for T in (1, 7, 24):
        for key in NORMED_KEYS:
            for dtype in ("float32", "bfloat16"):
                yield Case(
                    T=T, K=40 if T == 7 else 32, V=32, key=key, l2norm=True, eps=0.0, dtype=dtype, kda=T == 7
                )
        yield Case(T=T, K=32, V=32, key="faint", l2norm=True, layout="vk")
        for kda in (False, True):
            yield Case(
                T=T, H=1, HV=2, K=16, V=16, kda=kda, decay="raw", lower_bound=-5.0, noA=True, dt_bias="full"
            )
    for scale in (1.0, 0.25, 0.0, -2.0):
        yield Case(T=5, K=16, V=16, scale=scale, kda=scale == 1.0)
        yield Case(T=40, K=16, V=16, scale=scale, kda=scale == 1.0)


def _regimes() -> Iterator[Case]:
    """Gates x keys x strengths, at one token, inside a chunk and beyond one."""
    for gate in (gate for gate in GATES if gate not in STRONG):
        for key in (key for key in KEYS if key != "faint"):
            for T in (1, 17, 67):
                # With unnormalised huge keys the recurrence explodes within a few tokens.
                steps = min(T, 3) if key == "huge" else T
                beta = BETAS[(GATES.index(gate) + KEYS.index(key)) % 4]
                kda = (GATES.index(gate) + T) % 2 == 0
                yield Case(
                    T=steps, H=1, HV=2, K=32, V=24, kda=kda, gate=gate, key=key, beta=beta, inplace=T == 17,
                    dtype="bfloat16" if T == 67 and gate == "one" else "float32",
                    fresh=key == "tiny" and T == 67,
                )  # fmt: skip


def _subnormal() -> Iterator[Case]:
    """Decays as in models and stronger, faded states, faint keys: products below float32's normal numbers."""
    for kda in (False, True):
        for T in (1, 2, 4, 6, 16, 64):
            base = Case(
                T=T, H=1, HV=2, K=32, V=32, kda=kda, layout="vk" if T in (2, 16) else "kv", inplace=T != 6
            )
            for gate in STRONG:
                yield replace(base, gate=gate, l2norm=T % 4 != 0, snapshots=T if T == 4 else 0)
                if gate in KINDS:
                    yield replace(base, gate=gate, decay="raw", dt_bias="full", logit=True, l2norm=True)
            for state_dtype in ("float32", "bfloat16"):
                faded = replace(base, state="faded", state_dtype=state_dtype, inplace=T < 6)
                yield replace(faded, gate="keep")
                yield replace(faded, gate="one", beta="zero")
            yield replace(base, key="faint", gate="one", l2norm=T == 4)
            yield replace(base, key="faint", gate="-16", dtype="bfloat16" if T == 6 else "float32")
        for gate in ("initialised", "trained", "-16"):
            yield Case(T=1024, H=1, HV=2, K=32, V=32, kda=kda, gate=gate)
        yield Case(T=48, H=4, HV=8, K=128, V=128, kda=kda, gate="initialised", l2norm=True)


def _strides() -> Iterator[Case]:
    for strides in STRIDES:
        for state_strides in STATE_STRIDES:
            for layout in ("kv", "vk"):
                for T in (1, 19):
                    inplace = state_strides != "expanded" and (T == 1) == (layout == "kv")
                    yield Case(
                        B=2, T=T, HV=4, K=32, V=16, strides=strides, state_strides=state_strides,
                        layout=layout, inplace=inplace, kda=T == 19, mask="random" if layout == "vk" else "",
                        dtype="bfloat16" if strides == "fused" else "float32",
                        state_dtype="bfloat16" if state_strides == "padded" and layout == "vk" else "float32",
                        snapshots=0 if state_strides == "expanded" or T == 1 else 2,
                    )  # fmt: skip
    for strides in ("permuted", "fused", "strided"):
        for kda in (False, True):
            yield Case(
                T=6, HV=4, K=33, V=7, strides=strides, kda=kda, decay="raw",
                dt_bias="flat" if kda else "full", logit=True, l2norm=True,
            )  # fmt: skip
            yield Case(
                seqlens=(5, 0, 18), HV=4, K=16, V=16, strides=strides, kda=kda, pool=6, indices=(3, 5, 0),
                state_strides="padded", inplace=kda, int64=kda,
            )  # fmt: skip


def _packed() -> Iterator[Case]:
    for i, seqlens in enumerate((
        (1,), (0,), (), (3, 0, 5), (0, 0, 4), (4, 0, 0), (0, 0), (1, 1, 1, 1, 1), (16, 17, 1), (64, 1, 65),
        (130, 3, 7), (2, 3, 5, 7, 11, 13), (33, 0, 31, 64),
    )):  # fmt: skip
        for kda in (False, True):
            yield Case(seqlens=seqlens, HV=4, K=16, V=32, kda=kda, int64=kda, inplace=i % 2 == 0, gate="keep")
            yield Case(
                seqlens=seqlens, K=32, V=16, kda=not kda, mask=MASKS[i % len(MASKS)], snapshots=1 + i % 4,
                layout="vk", dtype="bfloat16" if kda else "float32",
                state_dtype="bfloat16" if i % 2 else "float32",
            )  # fmt: skip
        yield Case(seqlens=seqlens, K=16, V=16, fresh=True)
    for T in (0, 1, 5):
        yield Case(B=0, T=T, K=16, V=16)
    for B in (1, 3):
        yield Case(B=B, T=0, K=16, V=16, snapshots=2)
        yield Case(B=B, T=0, K=16, V=16, kda=True, inplace=True, layout="vk")


def _pools() -> Iterator[Case]:
    for i, (pool, indices) in enumerate((
        (1, (0,)), (4, (3,)), (4, (-1,)), (5, (4, 0)), (5, (-1, 2)), (7, (6, -1, 0)), (8, (1, 3, 5, 7)),
        (9, (-1, -1, 8, -1)), (3, (2, 1, 0)), (64, (63, 5, 17)),
    )):  # fmt: skip
        for T in (1, 3, 20):
            yield Case(
                B=len(indices), T=T, HV=4, K=16, V=24, pool=pool, indices=indices, inplace=(i + T) % 2 == 0,
                kda=T == 3, int64=i % 2 == 0, layout="vk" if i % 3 == 0 else "kv",
                snapshots=2 if T == 3 else 0, state_dtype="bfloat16" if i % 4 == 3 else "float32",
                mask="left" if i % 3 == 1 else "",
            )  # fmt: skip
        yield Case(
            seqlens=tuple(range(len(indices))), K=16, V=16, pool=pool, indices=indices, inplace=i % 2 == 0,
            snapshots=1,
        )  # fmt: skip
    for inplace in (False, True):
        yield Case(B=2, T=2, K=16, V=16, pool=4, indices=(1, 1), inplace=inplace)
        yield Case(
            B=4, T=1, K=16, V=16, pool=4, indices=(-1, 2, -1, 2), inplace=inplace, int64=True, snapshots=1
        )


def _scattered() -> Iterator[Case]:
    """Snapshots in rows of the pool: own rows and fresh ones, rows read by several sequences, skipped sequences."""
    for Ks in (1, 2, 4, 7):
        for T in (1, 3, 4, 9, 50):
            for i, indices in enumerate(((5,), (0, 3, 1), (2, -1, 2, 6))):
                yield Case(
                    B=len(indices), T=T, H=1, HV=2, K=16, V=32, pool=32, indices=indices, snapshots=Ks,
                    scattered=True, inplace=True, kda=(T + i) % 2 == 0, layout="vk" if i == 1 else "kv",
                    state_dtype="bfloat16" if (Ks + T) % 3 == 0 else "float32", int64=i == 2,
                    mask="random" if T == 9 else "", state_strides=STATE_STRIDES[Ks % 3],
                )  # fmt: skip
        for elsewhere in (False, True):
            for T in (1, 9):
                yield Case(
                    B=3, T=T, H=1, HV=2, K=16, V=24, pool=9, indices=(2, -1, 2), snapshots=Ks, mask="random",
                    elsewhere=True, inplace=True, layout="vk" if elsewhere else "kv", kda=T == 9,
                )  # fmt: skip
            yield Case(
                seqlens=(2, 0, 5, 1), H=1, HV=1, K=20, V=13, pool=30, indices=(7, 1, 7, -1), snapshots=Ks,
                scattered=not elsewhere, elsewhere=elsewhere, inplace=True,
            )  # fmt: skip


def _masks() -> Iterator[Case]:
    for mask in MASKS:
        for T in (1, 5, 18, 70):
            for kda in (False, True):
                yield Case(
                    B=3, T=T, HV=4, K=16, V=16, mask=mask, kda=kda, inplace=(T + kda) % 2 == 0,
                    dtype="bfloat16" if T == 18 else "float32", gate="mixed" if kda else "keep",
                    l2norm=T == 5, logit=T == 5,
                )  # fmt: skip


def _snapshots() -> Iterator[Case]:
    """Every Ks from 1 to 17 with T > Ks, T = Ks, T < Ks, and combinations that tend to fail."""
    for Ks in range(1, 18):
        for T in (1, Ks - 1, Ks, Ks + 1, 2 * Ks + 3):
            yield Case(
                T=T, K=16, V=16, snapshots=Ks, kda=(Ks + T) % 2 == 0, inplace=Ks % 2 == 0,
                layout="vk" if T % 3 == 0 else "kv", state_dtype="bfloat16" if T % 4 == 1 else "float32",
            )  # fmt: skip
        yield Case(seqlens=(Ks, 0, 2 * Ks, 1), K=16, V=16, snapshots=Ks, mask="random", inplace=Ks % 3 == 0)
        yield Case(
            B=3, T=Ks + 2, K=16, V=8, snapshots=Ks, mask="left", pool=5, indices=(4, -1, 0), layout="vk",
            kda=True, inplace=Ks % 2 == 1, state_dtype="bfloat16" if Ks % 2 else "float32",
            state_strides="padded",
        )  # fmt: skip
        yield Case(T=30, H=1, HV=1, K=32, V=32, snapshots=Ks, nofinal=True, fresh=Ks % 2 == 0, gate="mixed")
    for T in (63, 64, 65, 130):
        # 4 MiB of snapshots or more: on the CPU they bypass the caches
        yield Case(T=T // 8, H=8, HV=16, K=128, V=128, snapshots=5, kda=T == 65, inplace=T == 65, gate="keep")
        for Ks in (1, 8, 17, 60):
            yield Case(T=T, H=1, HV=2, K=64, V=32, snapshots=Ks, kda=T == 65, gate="keep", dtype="bfloat16")


def random_case(rng: np.random.Generator) -> Case:
    """A valid case that crosses features. Sizes stay small enough for the reference."""

    def pick(*options: T) -> T:
        return options[int(rng.integers(len(options)))]

    def chance(p: float) -> bool:
        return bool(rng.random() < p)

    H = pick(1, 2, 3)
    c = Case(
        B=pick(1, 2, 3), T=pick(1, 2, 3, 5, 8, 16, 17, 34, 66), H=H, HV=H * pick(1, 2, 3),
        K=pick(8, 16, 20, 33, 64), V=pick(8, 12, 16, 31, 64), kda=chance(0.5),
        dtype=pick("float32", "float32", "bfloat16", "float16"),
        state_dtype=pick("float32", "float32", "bfloat16"),
        gate_dtype=pick("float32", "float32", "bfloat16", "float16"), heads=pick("interleaved", "tiled"),
        layout=pick("kv", "vk"), decay=pick("log", "log", "linear", "raw"), logit=chance(0.4),
        l2norm=chance(0.5), scale=pick(None, None, 1.0), strides=pick("dense", *STRIDES),
        mask=pick("", "", *MASKS), snapshots=pick(0, 0, 1, 2, 3, 5, 9), gate=pick(*GATES),
        key=pick("unit", "unit", "alike", "gaps", "zero", "tiny"),
        beta=pick("mid", "mid", "ends", "one", "zero"), int64=chance(0.5),
    )  # fmt: skip
    if c.decay == "raw":
        dt_bias = pick("none", "full", "flat") if c.kda else pick("none", "full")
        c = replace(c, dt_bias=dt_bias, lower_bound=pick(None, None, -5.0))
    if chance(0.35):
        c = replace(c, B=1, seqlens=tuple(int(n) for n in rng.integers(0, 20, int(rng.integers(1, 6)))))
    if chance(0.4):
        pool = c.N + int(rng.integers(0, 5))
        rows = rng.permutation(pool)[: c.N]
        rows[rng.random(c.N) < 0.2] = -1
        c = replace(c, pool=pool, indices=tuple(int(r) for r in rows))
    elif chance(0.2):
        c = replace(c, fresh=True, state_dtype=c.state_dtype if c.snapshots else "float32")
    strides = STATE_STRIDES[:3] if c.snapshots else STATE_STRIDES
    c = replace(c, state_strides=pick("dense", *strides))
    if not c.fresh and c.state_strides != "expanded" and chance(0.5):
        return replace(c, inplace=True)
    return replace(c, nofinal=c.snapshots > 0 and chance(0.2))


def _erases() -> Iterator[Case]:
    """A separate key to read: heads, chunk edges, decays, types, layouts and strides, as for the plain rule."""
    for kda in (False, True):
        for erase in ("H", "HV"):
            for T in (1, 2, 3, 4, 5, 6, 7, 13, 16, 17, 48, 49, 64, 65, 100, 200):
                yield Case(T=T, H=1, HV=2, K=32, V=48, kda=kda, erase=erase, gate="mixed", inplace=T % 2 == 0)
            for T in (1, 4, 70):
                base = Case(B=2, T=T, H=2, HV=4, K=40, V=64, kda=kda, erase=erase)
                for layout in ("kv", "vk"):
                    for dtype in ("bfloat16", "float16"):
                        yield replace(base, layout=layout, dtype=dtype, state_dtype="bfloat16", l2norm=True)
                    yield replace(base, layout=layout, heads="tiled", snapshots=3, inplace=T == 4)
                    yield replace(base, layout=layout, mask="random", snapshots=2, gate="one")
                yield replace(base, K=33, V=31, strides="strided", state_strides="padded", decay="linear")
                yield replace(
                    base, strides="fused", dtype="bfloat16", decay="raw", dt_bias="full", gate="trained"
                )
                yield replace(base, strides="expanded", key="gaps", gate="keep")
                for gate in ("keep", "twenty", "wipe", "inf", "-16", "initialised"):
                    yield replace(base, gate=gate, key="alike", fresh=gate == "keep")
            base = Case(H=2, HV=4, K=32, V=32, kda=kda, erase=erase, l2norm=True)
            yield replace(base, seqlens=(0, 3, 1, 17, 70), snapshots=2, gate="keep", layout="vk")
            yield replace(
                base, seqlens=(5, 1, 33), pool=6, indices=(4, -1, 0), inplace=True, dtype="bfloat16"
            )
            yield replace(
                base, B=3, T=4, pool=12, indices=(7, 2, 5), inplace=True, snapshots=3, scattered=True
            )
            yield replace(base, B=3, T=9, mask="left", fresh=True, gate="one")
        yield Case(T=64, K=128, V=128, H=16, HV=32, kda=kda, erase="HV", dtype="bfloat16")
        yield Case(B=2, T=4, K=128, V=128, H=4, HV=8, kda=kda, erase="H", inplace=True, snapshots=4)
        yield Case(T=1000, H=1, HV=2, K=64, V=64, kda=kda, erase="HV", gate="keep")
        yield Case(T=20, H=1, HV=1, K=300, V=16, kda=kda, erase="H")
    rng = np.random.default_rng(20262)
    for i in range(60):
        c = random_case(rng)
        if c.key != "huge":
            yield replace(c, erase=("H", "HV")[i % 2], beta="mid", logit=False)


def _random(count: int) -> Iterator[Case]:
    rng = np.random.default_rng(20261)
    for _ in range(count):
        yield random_case(rng)


def _all() -> Iterator[Case]:
    for group in (
        _ggml(), _chunks(), _sizes(), _heads(), _dtypes(), _forms(), _regimes(), _subnormal(), _strides(),
        _packed(), _pools(), _scattered(), _masks(), _snapshots(), _random(150), _erases(),
    ):  # fmt: skip
        yield from group


CASES: tuple[Case, ...] = tuple(dict.fromkeys(_all()))
"""Every case that a backend must pass."""

SHORT_CASES = tuple(c for c in CASES if c.work <= 20e6)
"""All cases except those that take seconds on a slow device: most tests run these."""

FLOAT64_CASES: tuple[Case, ...] = tuple(
    Case(
        B=2, T=T, H=1, HV=2, K=16, V=24, kda=kda, dtype="float64", state_dtype="float64",
        gate_dtype="float64", snapshots=2, inplace=inplace, l2norm=True,
    )
    for T in (1, 18)
    for kda in (False, True)
    for inplace in (False, True)
)  # fmt: skip
"""float64 is for gradient checks and runs only on the reference. No native backend has to take it."""
