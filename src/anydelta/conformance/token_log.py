"""The log form of StatePool: the rule's cases (cases.py) in steps of a few tokens, some of which are taken back.

Their lines begin with the word `log`. Each sequence runs its T tokens in steps. After round r, sequence i keeps
(r + i) mod (n + 1) of the n tokens that it ran, and continues after them. So every count from 0 to n occurs, and the
counts in a batch differ. Each output (also of rejected tokens) and each state must equal that of a single pass of the
oracle. An idle sequence and a fork that shares its state must keep their bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from ..core import dispatch
from ..core.arrays import Array
from ..rule.arguments import Options
from ..state import Checkpoint, StatePool
from .cases import STRONG, Case, Inputs
from .compare import Buffer, Prepared, Target, Verdict, fetch, judge
from .options import options_of_case
from .values import F64

WORD = "log "


@dataclass(frozen=True)
class LogCase(Case):
    """A case of the log. Fields of the rule mean the same."""

    entries: int = 8
    """The log's capacity: snapshots - 1."""
    step: int = 4
    """Tokens that a sequence runs at once."""
    blocks: int = 1
    """Steps between two commits."""
    halfkeys: bool = False
    """key_dtype is the inputs' dtype, not float32."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fresh or self.seqlens is not None or self.indices is not None or self.snapshots:
            raise ValueError(f"case: a log has states of its own; got {self}")
        if self.blocks > 1 and self.blocks * self.step > self.entries:
            raise ValueError(f"case: steps between two commits must fit into the log; got {self}")

    def _counts(self) -> Iterator[tuple[str, int, int]]:
        yield from super()._counts()
        yield from (("entries", 1, self.entries), ("step", 1, self.step), ("blocks", 1, self.blocks))

    @property
    def elements(self) -> int:
        rows = (self.B + 2) * (self.entries + 1)
        return super().elements + rows * self.HV * (2 * self.K + self.V)

    def __str__(self) -> str:
        return WORD + super().__str__()

    @classmethod
    def parse(cls, line: str) -> LogCase:
        return super().parse(line.removeprefix(WORD))  # type: ignore[return-value]


def check_log_case(prepared: Prepared, target: Target) -> Verdict:
    """Run the case on the target and compare.

    Raises:
        NotRunnable: the target cannot hold the arrays.
    """
    v = Verdict()
    with target.active(), np.errstate(all="ignore"):
        try:
            _run(v, prepared, target)
        except (AssertionError, RuntimeError, ValueError, TypeError, IndexError) as error:
            v.errors.append(f"raised {type(error).__name__}: {error}")
    return v


def _run(v: Verdict, prepared: Prepared, target: Target) -> None:
    c, x, exact = prepared.case, prepared.values, prepared.exact
    assert isinstance(c, LogCase)
    assert exact is not None
    assert x.state is not None
    device = None if target.framework == "numpy" else "cpu"
    pool = StatePool(
        c.B + 2, H=c.H, HV=c.HV, K=c.K, V=c.V, kda=c.kda, snapshots=c.entries + 1, form="log", dtype=c.state_dtype,
        key_dtype=c.dtype if c.halfkeys else "float32", state_layout=c.layout, device=device,
        backend="auto" if target.backend == "auto" else target.backend,
    )  # fmt: skip
    states = Buffer(x.state, x.state.shape, c.state_dtype, "dense", target).array
    mine = [pool.restore(Checkpoint(states[i : i + 1], None, c.layout)) for i in range(c.B)]
    still = [pool.restore(Checkpoint(states[:1], None, c.layout)), pool.fork(mine[-1])]
    before = [pool.state(s) for s in still]

    at = [0] * c.B  # tokens kept
    r = 0
    while min(at) < c.T:
        ran = [0] * c.B
        for _ in range(c.blocks):
            _step(v, c, x, exact.o, pool, mine, at, ran, target)
        batch = [i for i in range(c.B) if ran[i]]
        kept = [(r + i) % (ran[i] + 1) for i in batch]
        # a step longer than the log can only be taken back as far as the log goes
        kept = [max(n, ran[i] - c.entries) for n, i in zip(kept, batch, strict=True)]
        pool.commit(kept, [mine[i] for i in batch])
        for i, n in zip(batch, kept, strict=True):
            at[i] += n
        r += 1
    got = [fetch(v, "state", pool.state(s), (1, *x.state.shape[1:]), c.state_dtype, target) for s in mine]
    if all(one is not None for one in got):
        judge(v, "state", np.concatenate([one for one in got if one is not None]), exact.state, c.state_dtype)
    if not all(bool((pool.state(s) == b).all()) for s, b in zip(still, before, strict=True)):
        v.errors.append("state: a sequence changed that did not run")


def _step(
    v: Verdict, c: LogCase, x: Inputs, exact: F64, pool: StatePool, mine: list[int], at: list[int], ran: list[int],
    target: Target,
) -> None:  # fmt: skip
    """One begin and run from the place of each sequence. `ran` grows by its tokens."""
    first = [a + n for a, n in zip(at, ran, strict=True)]
    counts = [min(c.step, c.T - a) for a in first]
    batch = [i for i in range(c.B) if counts[i]]
    if not batch:
        return
    packed = len({counts[i] for i in batch}) > 1
    spans = [(i, slice(first[i], first[i] + counts[i])) for i in batch]

    def part(values: F64) -> F64:
        rows = [values[i, span] for i, span in spans]
        return np.concatenate(rows)[None] if packed else np.stack(rows)

    def array(name: str, dtype: str) -> Array:
        values = getattr(x, name)
        if values is None:
            return None
        values = part(values) if name not in ("A_log", "dt_bias") else values
        return Buffer(values, values.shape, dtype, c.strides, target).array

    pool.begin([counts[i] for i in batch] if packed else counts[batch[0]], [mine[i] for i in batch])
    o = pool.run(
        array("q", c.dtype), array("k", c.dtype), array("v", c.dtype), g=array("g", c.gate_dtype),
        beta=array("beta", c.gate_dtype), A_log=array("A_log", "float32"), dt_bias=array("dt_bias", c.gate_dtype),
        mask=array("mask", "bool"), **options_of_case(c, Options, "state_layout"),
    )  # fmt: skip
    want = part(exact)
    got = fetch(v, "o", o, want.shape, c.dtype, target)
    if got is not None:
        judge(v, "o", got, want, c.dtype)
    for i in batch:
        ran[i] += counts[i]


def runs_the_log(backend: str) -> bool:
    """Whether the backend runs these cases."""
    return backend == "auto" or dispatch.part_of(backend, "log") is not None


# ---- the list


def _cases() -> Iterator[LogCase]:
    for kda in (False, True):
        yield LogCase(B=1, T=24, H=2, HV=4, K=128, V=128, kda=kda)
        yield LogCase(B=3, T=24, H=2, HV=2, K=64, V=32, kda=kda, l2norm=True, entries=4, layout="vk")
        for mask in ("left", "right", "random", "none"):
            yield LogCase(B=3, T=18, H=1, HV=3, K=16, V=24, kda=kda, mask=mask, heads="tiled", entries=6)
        for step in (1, 2, 3, 5, 6, 7, 13):  # both sides of a block of the kernels
            yield LogCase(B=2, T=30, H=1, HV=2, K=20, V=13, kda=kda, step=step, entries=15)
        yield LogCase(B=2, T=40, H=1, HV=2, K=16, V=16, kda=kda, step=9, entries=5)  # longer than the log
        yield LogCase(B=2, T=40, H=2, HV=2, K=16, V=16, kda=kda, step=2, blocks=3, entries=7)
        yield LogCase(
            B=2, T=20, H=2, HV=4, K=32, V=32, kda=kda, decay="raw", dt_bias="full", logit=True, l2norm=True
        )
        yield LogCase(
            B=2, T=20, H=2, HV=2, K=32, V=32, kda=kda, decay="linear", gate="mixed", strides="permuted"
        )
        for gate in ("keep", "wipe", "inf"):
            yield LogCase(B=1, T=16, H=1, HV=2, K=140, V=70, kda=kda, gate=gate, entries=5)
        for step in (1, 2, 4, 6, 16):  # like the rule's strong decays in cases.py
            strong = LogCase(B=1, T=20, H=1, HV=2, K=32, V=32, kda=kda, step=step, entries=16, l2norm=True)
            for gate in STRONG:
                yield replace(strong, gate=gate, layout="vk" if step == 2 else "kv")
            yield replace(strong, gate="keep", state="faded")
            yield replace(strong, gate="one", state="faded", beta="zero", state_dtype="bfloat16")
            yield replace(strong, gate="one", key="faint", l2norm=False)
        for dtype in ("bfloat16", "float16"):
            base = LogCase(
                B=2, T=20, H=2, HV=4, K=32, V=32, kda=kda, dtype=dtype, gate_dtype=dtype, l2norm=True
            )
            yield base
            yield replace(base, halfkeys=True, layout="vk")
            yield replace(base, state_dtype=dtype)


LOG_CASES: tuple[LogCase, ...] = tuple(_cases())
