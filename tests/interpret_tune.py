"""Tunes tiny problems in Triton's interpreter by an invented clock; tests/test_tune.py starts it.

A process of its own, since Triton reads TRITON_INTERPRET when it is imported. Standard input holds a JSON list of
[name of a case, dtype, kernel, launch that the clock likes, field = value whose result is spoiled or null]. Standard
output gets one JSON line per problem: the row's name and what `tune` found.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from anydelta.backends.triton.host import interpreted
from anydelta.bench.measure.cases import select
from anydelta.tune.problems import problems
from anydelta.tune.search import Contest, Run, tune


def main() -> None:
    assert interpreted()
    for case, dtype, kernel, liked, spoiled in json.load(sys.stdin):
        rows = problems(select([case]), [dtype], gradients=True)
        contest = Contest(next(p for p in rows if p.kernel == kernel), "cpu")
        if spoiled:
            original = contest.results

            def results(
                run: Run, spoiled: Any = spoiled, original: Any = original
            ) -> dict[str, torch.Tensor]:
                name, value, how = spoiled
                found: dict[str, torch.Tensor] = original(run)
                if getattr(run.config, name) == value:
                    if how == "raise":
                        raise RuntimeError("out of resource: shared memory\nand more")
                    found["o"][..., -1] *= 1.01
                return found

            contest.results = results  # type: ignore[method-assign]

        def clock(runs: Sequence[Run], rounds: int, liked: dict[str, int] = liked) -> list[list[float]]:
            """10 us for each field that is not as liked; some noise by round."""
            off = [sum(asdict(run.config)[n] != x for n, x in liked.items()) for run in runs]
            return [[10.0 * (1 + misses) + turn / 100 for turn in range(rounds)] for misses in off]

        outcome = tune(contest, clock, rounds=3, tell=lambda text: None)
        print(json.dumps({**asdict(outcome), "row": outcome.row("a test")}), flush=True)


if __name__ == "__main__":
    main()
