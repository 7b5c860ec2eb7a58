"""`anydelta bench ops`: the operator against other implementations and the machine's limits."""

from __future__ import annotations

from typing import Annotated

import typer

from ...core.dispatch import get_backend
from ...core.probe import available_cpus
from ...terminal import Refused, progress, refusing, say
from ..contenders import packages
from ..measure import cases as case_list
from ..measure import ops
from ..measure import report as printers
from ..measure.contender import Contender, tensors_on
from .options import (
    Csv,
    Json,
    Md,
    Output,
    Plot,
    Rounds,
    SampleMs,
    check_rounds,
    checked,
    numbers_of_threads,
    show,
)


def ops_command(
    cases: Annotated[
        list[str] | None,
        typer.Option(
            "--cases", help="Groups, names, globs, regular expressions; commas and repeats allowed."
        ),
    ] = None,
    decays: Annotated[
        str, typer.Option("--decays", help="Measure each case with these: mild, initialised, trained.")
    ] = "mild,initialised",
    threads: Annotated[
        str | None, typer.Option("--threads", "-t", help="Numbers of threads, as 1,2. Default: all CPUs.")
    ] = None,
    rounds: Rounds = 7,
    peers: Annotated[bool, typer.Option("--peers/--no-peers", help="Measure installed peers too.")] = True,
    peer: Annotated[
        list[str] | None,
        typer.Option("--peer", help="Only this peer (repeat for more); it must be installed."),
    ] = None,
    backend: Annotated[str, typer.Option("--backend", help="anydelta's backend.")] = "auto",
    sample_ms: SampleMs = 15.0,
    json: Json = False,
    csv: Csv = False,
    md: Md = False,
    output: Output = None,
    plot: Plot = None,
    list_: Annotated[bool, typer.Option("--list", help="Only list cases and packages.")] = False,
) -> None:
    """Time the operator: decode, short blocks with snapshots, prefill.

    Every contender's result is compared with a float64 oracle before it is timed. All run interleaved in one process.
    The table shows times relative to anydelta's and the share of the machine's limit.

    Examples:
      anydelta bench ops
      anydelta bench ops --cases decode -t 1 --no-peers
      anydelta bench ops --cases 'gda-t512-*,gda-t4-h16x32-d128-b1-s4' --peer ggml --plot ops.svg
    """
    form = checked(json, csv, md, output, plot)
    check_rounds(rounds, sample_ms)
    if peer and not peers:
        raise Refused("--peer and --no-peers contradict each other; give one of them")
    with refusing(ValueError):
        if backend != "auto":
            get_backend(backend)
        chosen = case_list.presets() if list_ and not cases else case_list.select(cases or ["default"])
        chosen = case_list.with_decays(chosen, decays)
        device = tensors_on(backend)
        rivals = packages.choose_peers(peer or [], device) if peers else []
        counts = numbers_of_threads(threads, available_cpus()) if device == "cpu" else [1]
    field: list[Contender] = [packages.Anydelta(backend), *rivals]
    if list_:
        for c in chosen:
            say(c.name)
        for one in field:
            say(f"{one.name}: {one.missing() or one.version()}")
        return
    if why := field[0].missing():
        raise Refused(why)
    if device != "cpu" and (reasons := get_backend(backend).available()):
        raise Refused("; ".join(map(str, reasons)))

    with progress() as tell:
        settings = ops.Settings(rounds=rounds, sample_seconds=sample_ms / 1e3)
        report = ops.measure(chosen, field, threads=counts, settings=settings, backend=backend, progress=tell)

    show(printers, report, form, output, plot)
    if any(r.contender == "anydelta" and r.status in ("wrong", "failed") for r in report.records):
        raise typer.Exit(1)
