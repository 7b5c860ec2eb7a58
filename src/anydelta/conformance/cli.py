"""`anydelta conform`: run the cases, show a summary and every failure with the line that repeats it.

`--support` runs nothing: it asks the backends what they accept.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import re
import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .. import __version__, dispatch
from .cases import CASES, Case
from .log import LOG_CASES
from .mixer import MIXER_CASES
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

MAX_LISTED = 20
"""Failures of one target that are listed without --verbose: a broken kernel fails nearly everything."""


class Usage(Exception):
    """Bad input. The text is one sentence; the exit code is 2."""


def _option(*names_and_help: str) -> Any:
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
            str, _option("--filter", "-f", "Only cases whose line has this text, or matches it as a regex.")
        ] = "",
        case: Annotated[
            list[str] | None, _option("--case", "Run this line instead of the list; failures print theirs.")
        ] = None,
        isa: Annotated[list[str] | None, _option("--isa", "Only this instruction set of the CPU.")] = None,
        framework: Annotated[
            list[str] | None, _option("--framework", "Only numpy, only torch, or mlx.")
        ] = None,
        device: Annotated[str, _option("--device", "Where torch's tensors lie: cuda, xpu, ...")] = "cpu",
        as_json: Annotated[bool, _option("--json", "Every result as JSON on stdout.")] = False,
        as_csv: Annotated[bool, _option("--csv", "Every result as CSV on stdout.")] = False,
        as_md: Annotated[bool, _option("--md", "The summary as a Markdown table on stdout.")] = False,
        verbose: Annotated[bool, _option("--verbose", "-v", "List every result that is not OK.")] = False,
        asks: Annotated[
            bool, _option("--support", "Run nothing: show what each backend says it accepts.")
        ] = False,
    ) -> None:
        """Compare backends with the float64 oracle, over every case that the project knows."""
        try:
            if asks:
                _only_beside_support(
                    {
                        "--require": require, "--filter": pattern, "--case": case, "--isa": isa,
                        "--framework": framework, "--device": device != "cpu", "--csv": as_csv, "--md": as_md,
                        "--verbose": verbose,
                    }
                )  # fmt: skip
                _print_support(support(_backends(backend or [], [])), as_json)
                return
            chosen = _select(pattern, case or [])
            names = _backends(backend or [], require or [])
            _one_format(as_json, as_csv, as_md)
            for name in framework or ():
                if name not in FRAMEWORKS:
                    raise Usage(f"--framework must be numpy, torch or mlx; got {name!r}")
                if importlib.util.find_spec(name) is None:
                    raise Usage(f"--framework {name} requires the package {name}; got none")
            if device != "cpu" and (framework or ["torch"]) != ["torch"]:
                raise Usage(
                    f"--device {device} goes with --framework torch; got {', '.join(framework or ())}"
                )
            on = targets(names, isa or (), framework or (), device)
        except (Usage, ValueError) as error:
            print(f"anydelta conform: {error}.", file=sys.stderr)
            raise typer.Exit(2) from None

        results = _run(chosen, on)
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


def _select(pattern: str, lines: list[str]) -> list[Case]:
    """The cases to run."""
    if lines:
        if pattern:
            raise Usage("--case and --filter exclude each other")
        return [parse(line) for line in lines]
    every: list[Case] = [*CASES, *MIXER_CASES, *LOG_CASES]
    if not pattern:
        return every
    found = [c for c in every if pattern in str(c)]
    if not found:
        try:
            regex = re.compile(pattern)
        except re.error as error:
            raise Usage(f"--filter {pattern!r} is in no case, and as a regex it is wrong: {error}") from None
        found = [c for c in every if regex.search(str(c))]
    if not found:
        raise Usage(f"--filter {pattern!r} matches none of the {len(every)} cases")
    return found


def _backends(named: list[str], required: list[str]) -> list[str]:
    for name in (*named, *required):
        if name not in dispatch.NAMES:
            raise Usage(f"there is no backend {name!r}; the known ones are {', '.join(dispatch.NAMES)}")
    wanted = set(named or dispatch.NAMES) | set(required)
    return [name for name in dispatch.NAMES if name in wanted]


def _one_format(*flags: bool) -> None:
    if sum(flags) > 1:
        raise Usage("--json, --csv and --md exclude each other")


def _only_beside_support(others: dict[str, Any]) -> None:
    given = [name for name, value in others.items() if value]
    if given:
        raise Usage(f"--support goes with --backend and --json only; got {', '.join(given)}")


def _run(cases: list[Case], on: list[Any]) -> list[Result]:
    results = []
    ready = [t for t in on if not unavailable(t.backend)]
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("{task.fields[failed]}"), TimeElapsedColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("conform", total=len(cases) * len(ready), failed="")
        failed = 0
        for result in run(cases, on):
            results.append(result)
            failed += result.status == FAIL
            bar.update(task, advance=result.case != "*", failed=f"{failed} failed" if failed else "")
    return results


def _broken_promises(results: list[Result], required: list[str]) -> list[str]:
    """Why a required backend did not prove itself: one sentence each."""
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
    print(json.dumps(text, indent=1).replace("Infinity", "1e999"))  # JSON has no infinity; 1e999 reads as one


def _print_csv(results: list[Result]) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(("backend", "isa", "framework", "status", "worst", "seconds", "case", "reasons"))
    for r in results:
        writer.writerow(
            (r.backend, r.isa or "", r.framework, r.status, f"{r.worst:.4g}", f"{r.seconds:.6f}", r.case,
             "; ".join(r.reasons)),
        )  # fmt: skip


def _print_md(results: list[Result], broken: list[str]) -> None:
    print("| backend | ISA | arrays | " + " | ".join(STATUSES) + " | worst error / allowed |")
    print("|---|---|---|" + "---:|" * (len(STATUSES) + 1))
    for row in summary(results):
        counts = " | ".join(str(row[s]) for s in STATUSES)
        print(f"| {row['backend']} | {row['isa'] or ''} | {_arrays(row)} | {counts} | {row['worst']:.2f} |")
    bad = [r for r in results if r.status == FAIL]
    if bad or broken:
        print()
    for text in broken:
        print(f"- {text}")
    for r in bad:
        print(f"- FAIL `{r.reproduce()}`: {'; '.join(r.reasons)}")


def _arrays(row: dict[str, Any]) -> str:
    """What the arrays of a target are: "numpy", "torch", "torch cuda"."""
    return " ".join(name for name in (row["framework"], row["device"]) if name != "cpu")


def _print_tables(results: list[Result], broken: list[str], verbose: bool) -> None:
    console = Console()
    table = Table(title=f"anydelta {__version__}: conformance")
    for heading in ("backend", "ISA", "arrays"):
        table.add_column(heading, no_wrap=True)
    # STATUSES, the worst error divided by the allowed one, and seconds: short, to fit 80 columns
    for heading in ("OK", "FAIL", "NOT S.", "SKIP", "worst", "s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in summary(results):
        style = "red" if row[FAIL] else "yellow" if not row[OK] else ""
        counts = [str(row[s]) for s in STATUSES]
        table.add_row(
            row["backend"], row["isa"] or "", _arrays(row), *counts, f"{row['worst']:.2f}",
            f"{row['seconds']:.1f}", style=style,
        )  # fmt: skip
    console.print(table)

    shown = [r for r in results if r.status == FAIL or (verbose and r.status != OK) or r.case == "*"]
    listed: dict[Any, int] = {}
    for r in shown:
        listed[r.target] = listed.get(r.target, 0) + 1
        if listed[r.target] > MAX_LISTED and not verbose:
            continue
        # Plain print: these lines are to be copied, so rich must neither wrap nor colour them.
        if r.case == "*":
            print(f"{r.status} {r.backend}: {'; '.join(r.reasons)}")
            continue
        print(f"{r.status} {r.reproduce()}")
        for reason in r.reasons:
            print(f"     {reason}")
    for target, n in listed.items():
        if n > MAX_LISTED and not verbose:
            print(f"... and {n - MAX_LISTED} more on {' '.join(filter(None, target))}; --verbose lists all")
    for text in broken:
        print(f"FAIL {text}")


def _print_support(found: dict[str, Any], as_json: bool) -> None:
    """The answers of the backends: JSON, or a table with the reasons below it."""
    if as_json:
        print(json.dumps(found, indent=1))
        return
    backends = found["backends"]
    title = f"anydelta {__version__}: what the backends accept"
    table = Table(title=title, box=None, pad_edge=False, padding=(0, 1, 0, 0))  # all backends in 80 columns
    table.add_column("feature")
    for name in backends:
        table.add_column(name, no_wrap=True)
    every = set(dispatch.PRIORITY)
    on = ("any" if set(b["devices"]) == every else "\n".join(b["devices"]) for b in backends.values())
    table.add_row("devices", *on)
    refusals: dict[str, list[str]] = {}
    for feature in found["cases"]:
        answers = {name: b["features"][feature] for name, b in backends.items()}
        table.add_row(
            escape(feature), *("[yellow]no[/]" if reasons else "yes" for reasons in answers.values())
        )
        for name, reasons in answers.items():
            if reasons:
                refusals.setdefault(f"{feature}: {'; '.join(reasons)}", []).append(name)
    Console().print(table)
    for text, names in refusals.items():
        print(f"no ({', '.join(names)}): {text}")
