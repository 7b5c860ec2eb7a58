"""`anydelta conform`: run the cases, show a summary and every failure with the line that repeats it.

`--support` runs nothing: it asks the backends what they accept.
"""

from __future__ import annotations

import importlib.util
import re
from typing import Annotated, Any

import typer

from .. import __version__
from ..core import dispatch
from ..terminal import (
    Refused,
    Table,
    csv_table,
    markdown_table,
    one_line,
    progress,
    refusing,
    say,
    show,
    to_json,
)
from .cases import CASES, Case
from .compare import Target
from .gradients import every_gradient_case
from .mixer import MIXER_CASES, MixerCase
from .run import (
    FAIL,
    FRAMEWORKS,
    NOT_SUPPORTED,
    OK,
    SKIPPED,
    STATUSES,
    Result,
    parse,
    run,
    summary,
    targets,
    unavailable,
)
from .support import support
from .token_log import LOG_CASES

MAX_LISTED = 20
"""How many failures of a target are listed without --verbose. A broken kernel fails nearly everything."""


def _option(*names_and_help: str) -> object:
    """A typer option from its names and, last, its help."""
    *names, text = names_and_help
    return typer.Option(*names, help=text)


def register(app: typer.Typer) -> None:
    """Add the command to the `anydelta` program."""

    @app.command()
    def conform(
        backend: Annotated[list[str] | None, _option("--backend", "-b", "Only this backend.")] = None,
        require: Annotated[
            list[str] | None, _option("--require", "Fail unless this backend runs and passes every case.")
        ] = None,
        pattern: Annotated[
            str, _option("--filter", "-f", "Only cases whose line has this text, or matches this regex.")
        ] = "",
        case: Annotated[
            list[str] | None,
            _option("--case", "Run this case instead of the list; a failure prints its line."),
        ] = None,
        isa: Annotated[list[str] | None, _option("--isa", "Only this instruction set of the CPU.")] = None,
        framework: Annotated[
            list[str] | None, _option("--framework", "Only numpy, only torch, or mlx.")
        ] = None,
        device: Annotated[str, _option("--device", "Device of torch's tensors: cuda, xpu, ...")] = "cpu",
        gradients: Annotated[
            bool, _option("--gradients", "Test backward passes, against the float64 recurrence.")
        ] = False,
        as_json: Annotated[bool, _option("--json", "Every result as JSON on stdout.")] = False,
        as_csv: Annotated[bool, _option("--csv", "Every result as CSV on stdout.")] = False,
        as_md: Annotated[bool, _option("--md", "The summary as a Markdown table on stdout.")] = False,
        verbose: Annotated[bool, _option("--verbose", "-v", "List every result that is not OK.")] = False,
        asks: Annotated[bool, _option("--support", "Run nothing: show what each backend accepts.")] = False,
    ) -> None:
        """Compare backends with the float64 oracle, over every case of the project.

        Examples:
          anydelta conform
          anydelta conform --backend cpu --require cpu --filter T=17
          anydelta conform --case 'B=1 T=17 H=1 HV=2 K=32 V=48 kda gate=mixed'
          anydelta conform --gradients --backend cpu
          anydelta conform --support
        """
        if asks:
            _only_beside_support(
                {
                    "--require": require, "--filter": pattern, "--case": case, "--isa": isa,
                    "--framework": framework, "--device": device != "cpu", "--csv": as_csv, "--md": as_md,
                    "--verbose": verbose, "--gradients": gradients,
                }
            )  # fmt: skip
            _print_support(support(_backends(backend or [], [])), as_json)
            return
        names = _backends(backend or [], require or [])
        _one_format(as_json, as_csv, as_md)
        for name in framework or ():
            if name not in FRAMEWORKS:
                raise Refused(f"--framework must be numpy, torch or mlx; got {name!r}")
            if importlib.util.find_spec(name) is None:
                raise Refused(f"--framework {name} requires the package {name}; got none")
        if device != "cpu" and (framework or ["torch"]) != ["torch"]:
            raise Refused(f"--device {device} goes with --framework torch; got {', '.join(framework or ())}")
        if gradients:
            if importlib.util.find_spec("torch") is None or (framework or ["torch"]) != ["torch"]:
                raise Refused("--gradients requires torch, and goes with --framework torch only")
            framework = ["torch"]
            named = {*(backend or ()), *(require or ())}
            names = [n for n in names if n in named or hasattr(dispatch.get_backend(n), "gradients")]
        with refusing(ValueError):
            chosen = _select(pattern, case or [], gradients)
            on = targets(names, isa or (), framework or (), device)

        results = _run(chosen, on, gradients)
        broken = _broken_promises(results, require or [])
        if as_json:
            _print_json(results, broken)
        elif as_csv:
            _print_csv(results)
        elif as_md:
            _print_md(results, broken)
        else:
            _print_tables(results, broken, verbose)
        if broken or any(r.status == FAIL for r in results):
            raise typer.Exit(1)


def _select(pattern: str, lines: list[str], gradients: bool) -> list[Case]:
    """The cases to run."""
    if lines:
        if pattern:
            raise Refused("--case and --filter exclude each other")
        cases = [parse(line) for line in lines]
        if gradients and (
            others := [c for c in cases if type(c) not in (Case, MixerCase) or c.inplace or c.snapshots]
        ):
            raise Refused(f"--gradients takes functional calls without snapshots; got {others[0]}")
        return cases
    every: list[Case] = every_gradient_case() if gradients else [*CASES, *MIXER_CASES, *LOG_CASES]
    if not pattern:
        return every
    found = [c for c in every if pattern in str(c)]
    if not found:
        try:
            regex = re.compile(pattern)
        except re.error as error:
            raise Refused(
                f"--filter {pattern!r} is in no case, and as a regex it is wrong: {error}"
            ) from None
        found = [c for c in every if regex.search(str(c))]
    if not found:
        raise Refused(f"--filter {pattern!r} matches none of the {len(every)} cases")
    return found


def _backends(named: list[str], required: list[str]) -> list[str]:
    for name in (*named, *required):
        if name not in dispatch.NAMES:
            raise Refused(f"there is no backend {name!r}; the known ones are {', '.join(dispatch.NAMES)}")
    wanted = set(named or dispatch.NAMES) | set(required)
    return [name for name in dispatch.NAMES if name in wanted]


def _one_format(*flags: bool) -> None:
    if sum(flags) > 1:
        raise Refused("--json, --csv and --md exclude each other")


def _only_beside_support(others: dict[str, object]) -> None:
    given = [name for name, value in others.items() if value]
    if given:
        raise Refused(f"--support goes with --backend and --json only; got {', '.join(given)}")


def _run(cases: list[Case], on: list[Target], gradients: bool) -> list[Result]:
    results: list[Result] = []
    whole = len(cases) * sum(not unavailable(t.backend) for t in on)
    done = failed = 0
    with progress() as tell:
        for result in run(cases, on, gradients=gradients):
            results.append(result)
            failed += result.status == FAIL
            done += result.case != "*"
            tell(f"{done}/{whole}{f', {failed} failed' if failed else ''}", done / max(1, whole))
    return results


def _broken_promises(results: list[Result], required: list[str]) -> list[str]:
    """Why a required backend did not pass: one sentence each."""
    out = []
    for name in dict.fromkeys(required):
        mine = [r for r in results if r.backend == name]
        if not mine:
            out.append(f"required backend {name} ran no case")
        for status in (FAIL, NOT_SUPPORTED, SKIPPED):
            bad = [r for r in mine if r.status == status]
            if bad:
                out.append(f"required backend {name} has {len(bad)} {status}, the first: {bad[0].reasons[0]}")
    return out


def _print_json(results: list[Result], broken: list[str]) -> None:
    text = {
        "version": __version__, "summary": summary(results), "broken": broken,
        "results": [r.record() for r in results],
    }  # fmt: skip
    say(to_json(text))


def _print_csv(results: list[Result]) -> None:
    head = ("backend", "isa", "framework", "status", "worst", "seconds", "case", "reasons")
    rows = [
        (
            r.backend,
            r.isa,
            r.framework,
            r.status,
            f"{r.worst:.4g}",
            f"{r.seconds:.6f}",
            r.case,
            "; ".join(r.reasons),
        )
        for r in results
    ]
    say(csv_table(head, rows), end="")


def _print_md(results: list[Result], broken: list[str]) -> None:
    rows = [
        (row["backend"], row["isa"] or "", _arrays(row), *(row[s] for s in STATUSES), f"{row['worst']:.2f}")
        for row in summary(results)
    ]
    lines = markdown_table(("backend", "ISA", "arrays", *STATUSES, "worst error / allowed"), rows, left=3)
    bad = [r for r in results if r.status == FAIL]
    lines += [""] * bool(bad or broken) + [f"- {one_line(text)}" for text in broken]
    lines += [f"- FAIL `{r.reproduce()}`: {one_line('; '.join(r.reasons))}" for r in bad]
    say("\n".join(lines))


def _arrays(row: dict[str, Any]) -> str:
    """The kind of a target's arrays: "numpy", "torch", "torch cuda"."""
    return " ".join(name for name in (row["framework"], row["device"]) if name != "cpu")


def _print_tables(results: list[Result], broken: list[str], verbose: bool) -> None:
    head = (
        "backend",
        "ISA",
        "arrays",
        "OK",
        "FAIL",
        "NOT S.",
        "SKIP",
        "worst",
        "s",
    )  # short, to fit 80 columns
    rows = [
        (row["backend"], row["isa"] or "", _arrays(row), *(row[s] for s in STATUSES), f"{row['worst']:.2f}",
         f"{row['seconds']:.1f}")
        for row in summary(results)
    ]  # fmt: skip
    title = f"anydelta {__version__}: conformance"
    style = lambda cells: "red" if cells[4] else "yellow" if not cells[3] else ""  # noqa: E731
    show(Table(title, head, rows, style, left=("ISA", "arrays"), boxed=True))

    shown = [r for r in results if r.status == FAIL or (verbose and r.status != OK) or r.case == "*"]
    listed: dict[tuple[str, str | None, str, str], int] = {}
    for r in shown:
        listed[r.target] = listed.get(r.target, 0) + 1
        if listed[r.target] > MAX_LISTED and not verbose:
            continue
        # Lines for copying: they are neither wrapped nor coloured.
        if r.case == "*":
            say(f"{r.status} {r.backend}: {'; '.join(r.reasons)}")
            continue
        say(f"{r.status} {r.reproduce()}")
        for reason in r.reasons:
            say(f"     {reason}")
    for target, n in listed.items():
        if n > MAX_LISTED and not verbose:
            say(f"... and {n - MAX_LISTED} more on {' '.join(filter(None, target))}; --verbose lists all")
    for text in broken:
        say(f"FAIL {text}")


def _print_support(found: dict[str, Any], as_json: bool) -> None:
    """The answers of the backends: JSON, or a table with the reasons below it."""
    if as_json:
        say(to_json(found))
        return
    backends = found["backends"]
    every = set(dispatch.PRIORITY)
    on = ("any" if set(b["devices"]) == every else "\n".join(b["devices"]) for b in backends.values())
    rows = [("devices", *on)]
    refusals: dict[str, list[str]] = {}
    for feature in found["cases"]:
        answers = {name: b["features"][feature] for name, b in backends.items()}
        rows.append((feature, *("no" if reasons else "yes" for reasons in answers.values())))
        for name, reasons in answers.items():
            if reasons:
                refusals.setdefault(f"{feature}: {'; '.join(reasons)}", []).append(name)
    show(
        Table(
            f"anydelta {__version__}: what the backends accept",
            ("feature", *backends),
            rows,
            left=tuple(backends),
        )
    )
    for text, names in refusals.items():
        say(f"no ({', '.join(names)}): {text}")
