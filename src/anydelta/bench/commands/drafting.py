"""`anydelta bench spec`: the command line. Progress goes to stderr, results to stdout or a file."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...generate.checkpoint import default_model, need_packages, open_checkpoint, quiet
from ...generate.write import with_anydelta
from ...terminal import Refused, progress, refusing
from ..measure import drafting as spec
from ..measure import drafting_report as spec_report
from ..measure import ops
from ..measure.prompts import PROMPTS
from .options import Csv, Json, Md, Output, Plot, checked, show

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch


def spec_command(
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="A folder, or a hub name. Default: the repository's model."),
    ] = None,
    assistant: Annotated[
        str | None,
        typer.Option(
            "--assistant", "-a", help="A smaller model that drafts. Default: the model's first layers."
        ),
    ] = None,
    tokens: Annotated[int, typer.Option("--n-gen", "-n", help="New tokens per prompt.")] = 192,
    rounds: Annotated[int, typer.Option("--repetitions", "--rounds", "-r", help="Interleaved rounds.")] = 3,
    threads: Annotated[int, typer.Option("--threads", "-t", help="Number of threads.")] = 1,
    lookup: Annotated[int, typer.Option("--lookup", help="Tokens that prompt lookup drafts.")] = 8,
    drafts: Annotated[
        int | None,
        typer.Option(
            "--drafts", help="Drafts of MTP (default: one per layer) and of the assistant (default: 3)."
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", help=f"Only this one (repeat for more): {', '.join(PROMPTS)}."),
    ] = None,
    json: Json = False,
    csv: Csv = False,
    md: Md = False,
    output: Output = None,
    plot: Plot = None,
) -> None:
    """Time drafting: MTP, prompt lookup and an assistant against decoding token by token.

    Nine fixed prompts, a fresh state for each, greedy. The modes run interleaved, and must write the same text. Shows
    the share of accepted drafts, tokens per verification and tokens per second.

    Examples:
      anydelta bench spec
      anydelta bench spec -r 5 --lookup 4 --md -o spec.md --plot spec.svg
      anydelta bench spec -m Qwen/Qwen3.5-4B -a Qwen/Qwen3.5-0.8B -t 8
    """
    form = checked(json, csv, md, output, plot)
    for name, value, most in (
        ("--n-gen", tokens, 1 << 20), ("--rounds", rounds, 1 << 20), ("--threads", threads, 1024),
        ("--lookup", lookup, 1024), ("--drafts", 1 if drafts is None else drafts, 1024),
    ):  # fmt: skip
        if not 1 <= value <= most:
            raise Refused(f"requires {name} from 1 to {most}; got {value}")
    for one in prompt or ():
        if one not in PROMPTS:
            raise Refused(f"requires --prompt of {', '.join(PROMPTS)}; got {one!r}")
    need_packages()
    chosen = {name: text for name, text in PROMPTS.items() if not prompt or name in prompt}
    settings = spec.Settings(tokens, rounds, threads, lookup, drafts)
    with progress() as tell:
        report = _measure(model, assistant, chosen, settings, tell)

    show(spec_report, report, form, output, plot)
    if any(r.status == "wrong" for r in report.records):
        raise typer.Exit(1)


def _measure(
    name: str | None,
    helper: str | None,
    prompts: dict[str, str],
    settings: spec.Settings,
    tell: Callable[[str, float], None],
) -> spec.Report:
    importlib.import_module("transformers.utils.logging").set_verbosity_error()
    with quiet():
        enabled = with_anydelta().context  # says at once if this Transformers is not supported
    tell("loading the model", 0.0)
    opened = open_checkpoint(name or default_model(), "auto")
    other = open_checkpoint(helper, "auto") if helper else None

    def encode(text: str) -> torch.Tensor:
        ids: torch.Tensor = opened.tokenizer(text, return_tensors="pt")["input_ids"]
        return ids.long()

    report = spec.Report(ops.describe_machine(), Path(opened.name).name, settings)
    with refusing(ValueError):  # a model without such layers
        on = enabled(opened.model)
    with on:
        if other is None:
            ways = spec.modes(opened.model, settings)
            spec.measure(opened.model, encode, ways, settings, report, prompts, tell)
            return report
        ways = spec.modes(opened.model, settings, other.model, Path(other.name).name)
        try:
            helping = enabled(other.model)
        except ValueError:  # it has no linear attention layer
            spec.measure(opened.model, encode, ways, settings, report, prompts, tell)
            return report
        with helping:
            spec.measure(opened.model, encode, ways, settings, report, prompts, tell)
    return report
