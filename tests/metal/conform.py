"""The conformance cases on the emulated Metal kernels: the shipped host code and .metal files, on CPU tensors.

    python tests/metal/conform.py                       the whole list, token by token
    python tests/metal/conform.py --chunks              the whole list, every prompt that fits in chunks
    python tests/metal/conform.py --mode check          every access checked for bounds and races
    python tests/metal/conform.py --mode asan           under AddressSanitizer
    python tests/metal/conform.py --case 'T=40 K=32 V=16 kda'
    python tests/metal/conform.py --mode check --every 20    a part of the list, always the same

Prints every case that is not OK, and a count. The exit code is 1 where a case fails. --jobs processes share the work.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from typing import Any

from emulator import MODES, Emulator, asan_environment

from anydelta.backends.metal import host as metal
from anydelta.backends.metal import launch
from anydelta.conformance import SHORT_CASES, Case
from anydelta.conformance.compare import Target
from anydelta.conformance.run import FAIL, OK, Result, run_one

Change = tuple[str, str]
"""Of the kernels' text: this for that, to plant an error. What is not there is an error too."""


class Run:
    """Runs cases; with `chunks` in delta_chunk.metal wherever it takes them, however short the prompt."""

    def __init__(self, mode: str = "fast", chunks: bool = False, change: Change | None = None):
        def changed(source: str) -> str:
            if change is None:
                return source
            assert change[0] in source, change[0]
            return source.replace(*change)

        self.emulator = Emulator(mode, changed)
        self.target = Target("metal", metal.isas()[chunks], "torch")

    def __call__(self, case: Case) -> Result:
        with metal.emulated(self.emulator):
            return run_one(case, self.target)

    def compile(self, cases: Sequence[Case]) -> None:
        """Everything that the cases need, on all cores: the texts are found by running without a compiler."""

        class Listing:
            def __init__(self) -> None:
                self.sources: dict[str, None] = {}

            def compile_shader(self, source: str) -> Any:
                self.sources[source] = None
                raise NotImplementedError

        listing = Listing()
        with metal.emulated(listing):
            for shape in dict.fromkeys(_shape(c) for c in cases if c.K <= launch.MAX_K and not c.refused):
                run_one(shape, self.target)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(self.emulator.compile_shader, listing.sources))


_run: Run
"""Of a process that `conform` started."""


def _start(*how: Any) -> None:
    global _run
    _run = Run(*how)


def _one(case: Case) -> Result:
    return _run(case)


def conform(
    cases: Sequence[Case], mode: str = "fast", *, chunks: bool = False, change: Change | None = None, jobs: int = 1
) -> list[Result]:  # fmt: skip
    """Run cases, in this process or in `jobs` others. The results are in the order of the cases."""
    run = Run(mode, chunks, change)
    run.compile(cases)
    if jobs == 1:
        return [run(case) for case in cases]
    order = sorted(range(len(cases)), key=lambda i: -cases[i].work)  # the long ones first
    with ProcessPoolExecutor(jobs, get_context("spawn"), _start, (mode, chunks, change)) as pool:
        done = dict(zip(order, pool.map(_one, [cases[i] for i in order], chunksize=4), strict=True))
    return [done[i] for i in range(len(cases))]


def _shape(case: Case) -> Case:
    """A small case that needs the first of the same kernels."""
    return Case(
        T=case.T, H=1, HV=1, K=case.K, V=1, kda=case.kda, dtype=case.dtype, state_dtype=case.state_dtype,
        gate_dtype=case.gate_dtype, inplace=True,
    )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mode", choices=MODES, default="fast")
    parser.add_argument("--chunks", action="store_true")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="every N-th case of the list")
    parser.add_argument("--offset", type=int, default=0, metavar="N", help="beginning with this one")
    parser.add_argument("--case", action="append", help="this line instead of the list")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes")
    parser.add_argument(
        "--change", nargs=2, metavar=("OLD", "NEW"), help="change the kernels' text, to plant an error"
    )
    args = parser.parse_args()
    cases = [Case.parse(line) for line in args.case or ()] or list(SHORT_CASES)[args.offset :: args.every]
    if args.mode == "asan" and "libasan" not in os.environ.get("LD_PRELOAD", ""):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **asan_environment()})
    start = time.perf_counter()
    change = tuple(args.change) if args.change else None
    results = conform(cases, args.mode, chunks=args.chunks, change=change, jobs=args.jobs)
    for r in results:
        if r.status != OK:
            print(f"{r.status} {r.case}\n     {'; '.join(r.reasons)}")
    count = Counter(r.status for r in results)
    print(
        f"{', '.join(f'{n} {s}' for s, n in count.items())}; {time.perf_counter() - start:.0f} s, {args.mode}"
    )
    return count[FAIL] > 0


if __name__ == "__main__":
    sys.exit(main())
