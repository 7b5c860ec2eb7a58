"""What `anydelta tune` can tune: problems, and for each the launches that are tried."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product

from ..backends.triton import tables
from ..backends.triton.aot import Shape
from ..backends.triton.config import Config, Machine, heuristic, power_of_two
from ..bench.measure.cases import Case

DEFAULT = (
    *(f"gda-t1-h16x32-d128-b{n}" for n in (1, 8, 64, 256)),
    *(f"kda-t1-h32x32-d128-b{n}" for n in (1, 64)),
    "gda-t4-h16x32-d128-b1-s4",
    *(f"gda-t{n}-h16x32-d128-b1" for n in (512, 4096, 32768)),
    "gda-t32768-h2x4-d128-b1",
    "kda-t4096-h32x32-d128-b1",
    "gda-t2048-h16x32-d128-b16",
)
"""The calls of Qwen3-Next, Qwen3.5 and Kimi Linear that scripts/gpu.py measures."""
DTYPES = ("bfloat16", "float32", "float16")

Change = dict[str, int]


@dataclass(frozen=True)
class Problem:
    """One row of a table: a kernel, and the call it is tuned on."""

    kernel: str
    """recurrent, chunks or backward: tables.FIELDS."""
    case: str
    shape: Shape

    @property
    def key(self) -> str:
        s = self.shape
        heads = s.N * s.HV
        return tables.keys(self.kernel, tokens=s.T, heads=heads, K=s.K, V=s.V, kda=s.kda, dtype=s.dtype)[0]

    def heuristic(self, machine: Machine) -> Config:
        """The launch without a table."""
        s = self.shape
        return heuristic(machine, K=s.K, V=s.V, kda=s.kda, dtype=s.dtype, programs=s.N * s.HV)


def problems(cases: Iterable[Case], dtypes: Sequence[str], *, gradients: bool) -> list[Problem]:
    """The problems behind benchmark cases; of those with the same row in a table the first.

    Up to 16 tokens a case is one of `recurrent`, else one of chunks and, with `gradients`, of the backward pass.
    """
    found: dict[str, Problem] = {}
    for case, dtype in product(cases, dtypes):
        shape = Shape(
            T=case.T, N=case.B, H=case.H, HV=case.HV, K=case.D, V=case.D, kda=case.gate == "kda", dtype=dtype,
            snapshots=case.snapshots,
        )  # fmt: skip
        short = case.T - case.snapshots <= Config.short
        kernels = ("recurrent",) if short else ("chunks", "backward") if gradients else ("chunks",)
        for kernel in kernels:
            call = Shape(
                **{**asdict(shape), "backward": kernel == "backward", "inplace": kernel != "backward"}
            )
            problem = Problem(kernel, case.name, call)
            found.setdefault(problem.key, problem)
    return list(found.values())


def groups(problem: Problem, machine: Machine) -> Iterator[list[Change]]:
    """The launches to try, in groups: the winner of a group is kept while the next group is tried."""
    s, base = problem.shape, problem.heuristic(machine)
    BK, VV = power_of_two(s.K, 16), power_of_two(s.V, 16)
    if problem.kernel == "recurrent":
        # 4 to 64 float32 of the state a thread, of 255 registers; columns of at least 32 bytes.
        yield [
            dict(BV=BV, warps=warps)
            for BV, warps in product((8, 16, 32, 64), (1, 2, 4, 8))
            if BV <= VV and 4 <= BK * BV // (warps * machine.warp) <= 64
        ]
    elif problem.kernel == "chunks":
        yield [
            dict(chunk=chunk, scan_BV=BV, scan_warps=warps, scan_stages=stages)
            for chunk, BV, warps, stages in product((32, 64), (16, 32, 64), (4, 8), (1, 2))
            # Chunks that run ahead take shared memory: 64 KB have no room for them.
            if BV <= VV and (stages == 1 or machine.shared > 64 * 1024)
        ]
        yield [dict(prepare_warps=warps) for warps in (2, 4, 8)]
        if s.kda:
            yield [dict(scores_warps=warps) for warps in (1, 2, 4)]
        heads, chunks = s.N * s.HV, s.T // base.chunk
        if 2 * heads <= machine.processors and chunks >= 32:
            yield [dict(segments=pieces) for pieces in (1, 4, 8, 16)]
    else:
        yield [dict(backward_chunk=chunk, back_warps=warps) for chunk, warps in product((32, 64), (4, 8))]
        yield [dict(pairs_warps=warps) for warps in (2, 4, 8)]
        yield [
            dict(gradients_BV=BV, gradients_slice=slice_, gradients_warps=warps)
            for BV, slice_, warps in product((16, 32), (16, 32), (4, 8))
            if slice_ <= BK
        ]
