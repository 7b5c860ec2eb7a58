"""`anydelta tune`: the command line. Progress goes to stderr, the results to stdout, the rows to a table."""

from __future__ import annotations

import itertools
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..backends.triton import host as backend
from ..backends.triton import tables
from ..bench.measure.cases import select
from ..core.late import late
from ..terminal import Failed, Refused, Table, first_line, progress, refusing, say, show, to_json

if TYPE_CHECKING:
    from ..backends.triton import aot
    from . import compiling, problems, search
else:
    aot = late("anydelta.backends.triton.aot")
    compiling, problems, search = (
        late(f"anydelta.tune.{name}") for name in ("compiling", "problems", "search")
    )


def register(app: typer.Typer) -> None:
    """Add `tune` to the command line."""
    app.command("tune")(tune_command)


def tune_command(
    cases: Annotated[
        list[str] | None,
        typer.Option(
            "--cases",
            help="As in `anydelta bench ops`: groups, names, globs, regular expressions; commas and repeats allowed.",
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option("--dtype", help="Of q, k, v, with commas; the mixer's rule runs in float32.")
    ] = "bfloat16,float32",
    gradients: Annotated[bool, typer.Option("--gradients", help="The backward pass too.")] = False,
    device: Annotated[str | None, typer.Option("--device", help="cuda, cuda:1, xpu, ...")] = None,
    rounds: Annotated[int, typer.Option("--rounds", "-r", help="Interleaved rounds.")] = 7,
    seconds: Annotated[
        float | None, typer.Option("--seconds", help="Stop after so many seconds and keep what was found.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder of tables. Default: the user's.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only compile what would be tried, and list it.")
    ] = False,
    target: Annotated[
        str | None,
        typer.Option("--target", help="With --dry-run: compile for it, as sm_90; no GPU is needed."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON on stdout.")] = False,
) -> None:
    """Time launches of the Triton kernels on this GPU, and keep those that beat the heuristic.

    It adds rows to ARCH.json in the folder ANYDELTA_TRITON_CONFIGS, or in anydelta/triton in your cache folder.
    Processes that start later read them. -o writes to another folder, which ANYDELTA_TRITON_CONFIGS may then name.

    Examples:
      anydelta tune
      anydelta tune --cases gda-t1-h16x32-d128-b64,gda-t4096-h16x32-d128-b1 --dtype bfloat16 -o tables
      anydelta tune --dry-run --target sm_90 --cases gda-t1-h16x32-d128-b1
    """
    if target is not None and not dry_run:
        raise Refused("--target goes with --dry-run: launches are only timed on this machine's GPU")
    if rounds < 1:
        raise Refused(f"--rounds must be at least 1; got {rounds}")
    if seconds is not None and not seconds > 0:
        raise Refused(f"--seconds must be above 0; got {seconds:g}")
    reasons = [] if target is not None else [str(r) for r in backend.BACKEND.available()]
    if backend.interpreted():
        reasons = [
            f"{backend.INTERPRETER_ENV} is set, and times and compilers need Triton without its interpreter"
        ]
    if reasons:
        why = reasons[0].partition(";")[0]
        raise Refused(
            f"requires a GPU that Triton knows; got none ({why}). "
            f"Without one, --dry-run --target sm_90 compiles what would be tried"
        )
    with refusing(ValueError):
        chosen = _problems(cases, dtype, gradients)
        arch = target or _here(device)[1]
    if dry_run:
        _dry_run(chosen, arch, as_json)
    else:
        _tune(chosen, device, rounds, seconds, output, as_json)


def _problems(cases: list[str] | None, dtype: str, gradients: bool) -> list[problems.Problem]:
    dtypes = [name.strip() for name in dtype.split(",")]
    for name in dtypes:
        if name not in problems.DTYPES:
            raise ValueError(f"--dtype must name some of {', '.join(problems.DTYPES)}; got {name!r}")
    return problems.problems(select(cases or problems.DEFAULT), dtypes, gradients=gradients)


def _here(device: str | None) -> tuple[str, str]:
    """The requested (device, architecture), or the first."""
    import torch

    found = device or ("cuda" if torch.cuda.is_available() else "xpu")
    if found.partition(":")[0] not in backend.DEVICES:
        raise ValueError(f"--device must be on {' or '.join(backend.DEVICES)}; got {found!r}")
    try:
        return found, backend.machine_of(torch.device(found)).arch
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device must be a GPU that is here; got {found!r} ({error})") from None


def _dry_run(chosen: list[problems.Problem], target: str, as_json: bool) -> None:
    if target not in aot.TARGETS:
        raise Refused(f"--target must be one of {', '.join(aot.TARGETS)}; got {target!r}")
    with progress() as tell:
        trials = compiling.compile_all(chosen, target, tell)
    if as_json:
        say(to_json({"target": target, "trials": [asdict(t) for t in trials]}))
    else:
        head = ("launch", "kernels", "registers", "spilled", "shared", "s", "")
        for key, mine in itertools.groupby(trials, lambda t: t.key):
            show(Table(f"{target}: {key}", head, list(map(_cells, mine)), left=("",)))
        compiled = sum(len(t.kernels) for t in trials)
        broken, large = sum(bool(t.error) for t in trials), sum(not t.fits for t in trials)
        say(
            f"{len(trials)} launches for {len(chosen)} rows, {compiled} kernels compiled for {target}; "
            f"{broken} launches do not compile, {large} take too much shared memory"
        )
    if any(t.error for t in trials):
        raise typer.Exit(1)


def _cells(trial: compiling.Trial) -> list[str]:
    """A row of the table; numbers are the largest of its kernels."""
    most = [
        str(max((getattr(k, name) for k in trial.kernels), default=""))
        for name in ("registers", "spilled", "shared")
    ]
    why = trial.error or ("" if trial.fits else "more shared memory than there is")
    return [
        _text(trial.change), str(len(trial.kernels)), *most, f"{sum(k.seconds for k in trial.kernels):.1f}", why,
    ]  # fmt: skip


def _tune(
    chosen: list[problems.Problem],
    device: str | None,
    rounds: int,
    seconds: float | None,
    output: Path | None,
    as_json: bool,
) -> None:
    import torch

    where, arch = _here(device)
    folder = output or tables.user_folder()
    if folder is None:
        raise Refused(f"requires a folder to write to; got {tables.ENV}='' and no -o")
    path = folder / f"{arch}.json"
    # Check before tuning that the table can be read and written.
    with refusing(ValueError, OSError):
        tables.read(path)
        folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise Refused(f"requires a folder that can be written to; got {folder}")
    name = getattr(torch, torch.device(where).type).get_device_name(torch.device(where))
    start = time.monotonic()
    outcomes: list[search.Outcome] = []

    def in_time() -> bool:
        return seconds is None or time.monotonic() - start < seconds

    with progress() as tell, backend.on_device(torch.device(where)):

        def on(text: str) -> None:
            tell(text, len(outcomes) / len(chosen))

        for problem in chosen:
            if not in_time():
                break
            try:
                outcome = search.tune(
                    search.Contest(problem, where), search.gpu_times, rounds=rounds, in_time=in_time, tell=on
                )
            except RuntimeError as error:  # the device's: what was found before is in the table
                raise Failed(f"the GPU stopped with {first_line(error)}") from error
            outcomes.append(outcome)
            tables.merge(path, {outcome.key: outcome.row(name)})
    left = [p.key for p in chosen[len(outcomes) :]]
    if as_json:
        record: dict[str, object] = {"device": name, "arch": arch, "table": str(path), "left": left}
        say(to_json({**record, "rows": [asdict(o) for o in outcomes]}))
    else:
        cells = [
            (
                o.key,
                f"{o.heuristic_us:.1f}",
                f"{o.us:.1f}",
                f"{o.heuristic_us / o.us:.2f}",
                _text(o.launch) or "as it is",
            )
            for o in outcomes
        ]
        head = ("row", "heuristic us", "best us", "x", "launch")
        show(Table(f"{name}, {arch}: medians", head, cells, left=("launch",)))
        for o in outcomes:
            for t in o.trials:
                if t.wrong:
                    say(f"WRONG {o.key} {_text(t.change)}: {t.why_not}")
        if left:
            say(f"--seconds {seconds:g} were over before {len(left)} of {len(chosen)} rows")
        say(f"written to {path}")
    if any(t.wrong for o in outcomes for t in o.trials):
        raise typer.Exit(1)


def _text(change: dict[str, int]) -> str:
    return " ".join(f"{name}={value}" for name, value in change.items())
