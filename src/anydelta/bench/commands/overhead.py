"""`anydelta bench overhead`: the time that a call adds to its kernel."""

from __future__ import annotations

from typing import Annotated

import typer

from ..measure import aoti as aoti_measure
from ..measure import overhead
from .options import Csv, Json, Md, Output, Rounds, SampleMs, small


def overhead_command(
    rounds: Rounds = 15,
    sample_ms: SampleMs = 15.0,
    aoti: Annotated[
        bool, typer.Option("--aoti", help="Instead, calls in code of AOTInductor (compiles for a minute).")
    ] = False,
    json: Json = False,
    csv: Csv = False,
    md: Md = False,
    output: Output = None,
) -> None:
    """Time what a call at T = 1 adds to its kernel: torch, torch.ops and NumPy, in place and functional.

    Examples:
      anydelta bench overhead
      anydelta bench overhead --aoti -o overhead.json
    """
    measure = aoti_measure.call_overhead if aoti else overhead.call_overhead
    small(measure, rounds, sample_ms, json, csv, md, output)
