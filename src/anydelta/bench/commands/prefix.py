"""`anydelta bench prefix`: the command line. Progress goes to stderr, results to stdout or a file."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...generate.checkpoint import default_model, need_packages, open_checkpoint, quiet
from ...generate.write import with_anydelta
from ...terminal import Refused, progress, refusing
from ..measure import drafting as spec
from ..measure import ops, prefix, prefix_report
from ..measure.prompts import PROMPTS
from .options import Csv, Json, Md, Output, checked, show

if TYPE_CHECKING:
    from collections.abc import Callable


def prefix_command(
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="A folder, or a hub name. Default: the repository's model."),
    ] = None,
    prefixes: Annotated[
        str, typer.Option("--prefixes", "-p", help="Lengths of the shared prefix, in tokens.")
    ] = ",".join(map(str, prefix.Settings.prefixes)),
    turn: Annotated[int, typer.Option("--turn", help="Tokens of a question.")] = prefix.Settings.turn,
    tokens: Annotated[
        int, typer.Option("--n-gen", "-n", help="New tokens of an answer.")
    ] = prefix.Settings.tokens,
    rounds: Annotated[int, typer.Option("--repetitions", "--rounds", "-r", help="Interleaved rounds.")] = 5,
    threads: Annotated[int, typer.Option("--threads", "-t", help="Number of threads.")] = 1,
    json: Json = False,
    csv: Csv = False,
    md: Md = False,
    output: Output = None,
) -> None:
    """Time prefix checkpoints: the first token of a chat's next turn, from a checkpoint and without one.

    The texts of both must be the same.

    Examples:
      anydelta bench prefix
      anydelta bench prefix -m Qwen/Qwen3.5-0.8B -p 1024,8192 -t 8 --md -o prefix.md
    """
    form = checked(json, csv, md, output)
    lengths = tuple(int(n) if re.fullmatch(" *[0-9]{1,9} *", n) else 0 for n in prefixes.split(","))
    for name, value, most in (
        *(("--prefixes", n, 1 << 20) for n in lengths), ("--turn", turn, 1 << 16), ("--n-gen", tokens, 1 << 16),
        ("--rounds", rounds, 1 << 20), ("--threads", threads, 1024),
    ):  # fmt: skip
        least = 2 if name == "--turn" else 1
        if not least <= value <= most:
            got = prefixes if name == "--prefixes" else value
            raise Refused(f"requires {name} from {least} to {most}; got {got}")
    need_packages()
    settings = prefix.Settings(lengths, turn, tokens, rounds, threads)
    with progress() as tell:
        report = _measure(model, settings, tell)

    show(prefix_report, report, form, output)
    if any(r.status == "wrong" for r in report.records):
        raise typer.Exit(1)


def _measure(name: str | None, settings: prefix.Settings, tell: Callable[[str, float], None]) -> spec.Report:
    importlib.import_module("transformers.utils.logging").set_verbosity_error()
    with quiet():
        enabled = with_anydelta().context  # says at once if this Transformers is not supported
    tell("loading the model", 0.0)
    opened = open_checkpoint(name or default_model(), "auto")
    text = opened.tokenizer("\n".join(PROMPTS.values()))["input_ids"]
    report = spec.Report(ops.describe_machine(), Path(opened.name).name, settings)
    with refusing(ValueError):  # a model without such layers
        on = enabled(opened.model)
    with on:
        prefix.measure(opened.model, text, settings, report, tell)
    return report
