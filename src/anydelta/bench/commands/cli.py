"""`anydelta bench`: the command line. Progress goes to stderr, results to stdout or a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ...terminal import Refused, progress, refusing, say
from ..measure import cases as case_list
from ..measure import report as printers
from ..measure.contender import Contender
from ..measure.outputs import Csv, Json, Md, Output, Plot, checked, show

bench = typer.Typer(
    help="Measure the operator against other implementations and the machine's limits.", no_args_is_help=True
)


def register(app: typer.Typer) -> None:
    """Add `bench` to the command line."""
    from . import drafting_cli, model_cli, prefix_cli  # noqa: F401  they add `bench spec`, `model` and `prefix`

    app.add_typer(bench, name="bench")


@bench.command("ops")
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
    rounds: Annotated[int, typer.Option("--rounds", "-r", help="Interleaved rounds.")] = 7,
    peers: Annotated[bool, typer.Option("--peers/--no-peers", help="Measure installed peers too.")] = True,
    peer: Annotated[
        list[str] | None, typer.Option("--peer", help="Only this peer (repeat for more); it must be here.")
    ] = None,
    backend: Annotated[str, typer.Option("--backend", help="anydelta's backend.")] = "auto",
    sample_ms: Annotated[float, typer.Option("--sample-ms", help="Length of one sample.")] = 15.0,
    json: Json = False,
    csv: Csv = False,
    md: Md = False,
    output: Output = None,
    plot: Plot = None,
    list_: Annotated[bool, typer.Option("--list", help="Only list cases and contenders.")] = False,
) -> None:
    """Time the operator: decode, short blocks with snapshots, prefill.

    Every contender's result is compared with a float64 oracle before it is timed. All run in one process, in
    turns; the table shows times relative to anydelta's and the share of the machine's own limit.

    Examples:
      anydelta bench ops
      anydelta bench ops --cases decode -t 1 --no-peers
      anydelta bench ops --cases 'gda-t512-*,gda-t4-h16x32-d128-b1-s4' --peer ggml --plot ops.svg
    """
    form = checked(json, csv, md, output, plot)
    _check(rounds, sample_ms)
    if peer and not peers:
        raise Refused("--peer and --no-peers contradict each other; give one of them")
    with refusing(ValueError):
        from ...core.dispatch import get_backend
        from ..contenders import peers as contenders
        from . import ops

        if backend != "auto":
            get_backend(backend)
        chosen = case_list.presets() if list_ and not cases else case_list.select(cases or ["default"])
        chosen = case_list.with_decays(chosen, decays)
        device = contenders.tensors_on(backend)
        rivals = contenders.choose_peers(peer or [], device) if peers else []
        counts = _threads(threads, ops.available_cpus()) if device == "cpu" else [1]
    field: list[Contender] = [contenders.Anydelta(backend), *rivals]
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


@bench.command("overhead")
def overhead_command(
    rounds: Annotated[int, typer.Option("--rounds", "-r", help="Interleaved rounds.")] = 15,
    sample_ms: Annotated[float, typer.Option("--sample-ms", help="Length of one sample.")] = 15.0,
    aoti: Annotated[
        bool, typer.Option("--aoti", help="Instead, calls in code of AOTInductor (compiles for a minute).")
    ] = False,
    json: Json = False,
    csv: Csv = False,
    md: Md = False,
    output: Output = None,
) -> None:
    """Time what a call at T = 1 costs beside its kernel: torch, torch.ops and NumPy, in place and functional."""
    from ..measure.small_report import Measured
    from . import ops, overhead

    def run(tell: Callable[[str, float], None]) -> Measured:
        settings = ops.Settings(rounds, sample_ms / 1e3)
        if aoti:
            from .aoti import call_overhead

            return call_overhead(settings, tell)
        return overhead.call_overhead(settings, tell)

    _small(run, rounds, sample_ms, json, csv, md, output)


@bench.command("executorch")
def executorch_command(
    rounds: Annotated[int, typer.Option("--rounds", "-r", help="Interleaved rounds.")] = 15,
    sample_ms: Annotated[float, typer.Option("--sample-ms", help="Length of one sample.")] = 40.0,
    json: Json = False,
    csv: Csv = False,
    md: Md = False,
    output: Output = None,
) -> None:
    """Time the operator against ExecuTorch's own llama::gated_delta_rule, both in its runtime, on one thread."""
    from ..measure.small_report import Measured
    from . import executorch, ops

    def run(tell: Callable[[str, float], None]) -> Measured:
        return executorch.against_llama(ops.Settings(rounds, sample_ms / 1e3), tell)

    _small(run, rounds, sample_ms, json, csv, md, output)


@bench.command("threads")
def threads_command(
    threads: Annotated[str, typer.Option("--threads", "-t", help="Numbers of threads, as 1,2.")] = "1,2",
    rounds: Annotated[int, typer.Option("--rounds", "-r", help="Interleaved rounds.")] = 15,
    sample_ms: Annotated[float, typer.Option("--sample-ms", help="Length of one sample.")] = 40.0,
    json: Json = False,
    csv: Csv = False,
    md: Md = False,
    output: Output = None,
) -> None:
    """Time the operator in turns with torch's matmuls: do their threads cost each other anything?"""
    from ..measure.small_report import Measured
    from . import ops
    from . import threads as pairs

    counts = _threads(threads, 1)

    def run(tell: Callable[[str, float], None]) -> Measured:
        return pairs.shared_threads(counts, ops.Settings(rounds, sample_ms / 1e3), tell)

    _small(run, rounds, sample_ms, json, csv, md, output)


@bench.command("decays")
def decays_command(
    tokens: Annotated[
        str, typer.Option("--tokens", "-T", help="Tokens of a call, as 1,4,64.")
    ] = "1,2,4,6,16,64,1024",
    threads: Annotated[str, typer.Option("--threads", "-t", help="Numbers of threads, as 1,2.")] = "1,2",
    rounds: Annotated[int, typer.Option("--rounds", "-r", help="Interleaved rounds.")] = 15,
    sample_ms: Annotated[float, typer.Option("--sample-ms", help="Length of one sample.")] = 15.0,
    json: Json = False,
    csv: Csv = False,
    md: Md = False,
    output: Output = None,
) -> None:
    """Time strong decays and faded states against mild ones: rule and mixer, GDA and KDA."""
    from ..measure.small_report import Measured
    from . import decays, ops

    def run(tell: Callable[[str, float], None]) -> Measured:
        settings = ops.Settings(rounds, sample_ms / 1e3)
        return decays.strong_decays(_numbers("-T", tokens, 65536), _threads(threads, 1), settings, tell)

    _small(run, rounds, sample_ms, json, csv, md, output)


@bench.command("rollback")
def rollback_command(
    layers: Annotated[int, typer.Option("--layers", help="Linear attention layers of the model.")] = 36,
    tokens: Annotated[int, typer.Option("--tokens", "-T", help="Tokens of a verification.")] = 4,
    snapshots: Annotated[
        int, typer.Option("--snapshots", "-K", help="States that a log may go back among.")
    ] = 16,
    kda: Annotated[bool, typer.Option("--kda", help="Gates that are vectors over K.")] = False,
    decay: Annotated[str, typer.Option("--decay", help="mild, initialised or trained.")] = "mild",
    threads: Annotated[int, typer.Option("--threads", "-t", help="Number of threads.")] = 1,
    rounds: Annotated[int, typer.Option("--rounds", "-r", help="Interleaved rounds.")] = 15,
    json: Json = False,
    csv: Csv = False,
    md: Md = False,
    output: Output = None,
) -> None:
    """Time verifying drafted tokens and going back, in slots and with a log, in decode steps of the rule."""
    from ..measure.small_report import Measured
    from . import ops, rollback

    for name, value in (("--layers", layers), ("-T", tokens), ("-K", snapshots), ("-t", threads)):
        if not 1 <= value <= 1024:
            raise Refused(f"{name} must be from 1 to 1024; got {value}")
    if decay not in case_list.DECAYS:
        raise Refused(f"--decay must be one of {', '.join(case_list.DECAYS)}; got {decay!r}")
    if snapshots < tokens:
        raise Refused(f"-K must be at least -T = {tokens}; got {snapshots}")

    def run(tell: Callable[[str, float], None]) -> Measured:
        return rollback.rollback(
            layers=layers, tokens=tokens, snapshots=snapshots, kda=kda, decay=decay, threads=threads,
            settings=ops.Settings(rounds), progress=tell,
        )  # fmt: skip

    _small(run, rounds, 15.0, json, csv, md, output)


def _small(
    run: Callable[[Any], Any],
    rounds: int,
    sample_ms: float,
    json: bool,
    csv: bool,
    md: bool,
    output: Path | None,
) -> None:
    """Run one of the small measurements and show it."""
    from ..measure import small_report

    form = checked(json, csv, md, output)
    _check(rounds, sample_ms)
    with progress() as tell:
        measured = run(tell)
    show(small_report, measured, form, output)


def _check(rounds: int, sample_ms: float) -> None:
    if rounds < 1:
        raise Refused(f"--rounds must be at least 1; got {rounds}")
    if not 0 < sample_ms <= 10000:
        raise Refused(f"--sample-ms must be above 0 and at most 10000; got {sample_ms:g}")


def _threads(text: str | None, available: int) -> list[int]:
    return [available] if text is None else _numbers("-t", text, 1024)


def _numbers(option: str, text: str, most: int) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = [0]
    if min(counts) < 1 or max(counts) > most:
        raise Refused(f"{option} must be numbers from 1 to {most} such as 1,2; got {text!r}")
    return list(dict.fromkeys(counts))
