"""`anydelta bench spec`: the command line. Progress goes to stderr, results to stdout or a file."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from ..generate.checkpoint import CheckpointError, default_model, need_packages, open_checkpoint
from . import spec, spec_report
from .cli import PLOTS, _fail, _output_form, _progress, bench
from .spec_prompts import PROMPTS


def fail(sentence: str) -> NoReturn:
    _fail(sentence.rstrip(".") + ".", "spec")


@bench.command("spec")
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
        typer.Option("--drafts", help="Tokens of MTP (default: its layers) and the assistant (default: 3)."),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", help=f"Only this one (repeat for more): {', '.join(PROMPTS)}."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    md: Annotated[bool, typer.Option("--md", help="Print Markdown.")] = False,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write there: .json, .csv or .md.")
    ] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw a figure: .svg, .png or .pdf.")] = None,
) -> None:
    """Time drafting: MTP, prompt lookup and an assistant against decoding token by token.

    Nine fixed prompts, a fresh state for each, greedy; the modes take turns, and must write the same text. The share of
    accepted drafts, tokens per verification, tokens per second.

    Examples:
      anydelta bench spec
      anydelta bench spec -r 5 --lookup 4 --md -o spec.md --plot spec.svg
      anydelta bench spec -m Qwen/Qwen3.5-4B -a Qwen/Qwen3.5-0.8B -t 8
    """
    form = _output_form(json, csv, md, output, "spec")
    try:
        for name, value, most in (
            ("--n-gen", tokens, 1 << 20), ("--rounds", rounds, 1 << 20), ("--threads", threads, 1024),
            ("--lookup", lookup, 1024), ("--drafts", 1 if drafts is None else drafts, 1024),
        ):  # fmt: skip
            if not 1 <= value <= most:
                raise CheckpointError(f"requires {name} from 1 to {most}; got {value}")
        for one in prompt or ():
            if one not in PROMPTS:
                raise CheckpointError(f"requires --prompt of {', '.join(PROMPTS)}; got {one!r}")
        for path in (output, plot):
            if path is not None and not path.parent.is_dir():
                raise CheckpointError(f"requires a folder that exists; got {path}")
        if plot is not None:
            if plot.suffix not in PLOTS:
                raise CheckpointError(f"requires --plot to end in {', '.join(PLOTS)}; got {plot.name!r}")
            if importlib.util.find_spec("matplotlib") is None:
                raise CheckpointError(
                    "requires matplotlib for --plot; got none. Run: pip install 'anydelta[plot]'"
                )
        need_packages()
        chosen = {name: text for name, text in PROMPTS.items() if not prompt or name in prompt}
        settings = spec.Settings(tokens, rounds, threads, lookup, drafts)
        with _progress() as tell:
            report = _measure(model, assistant, chosen, settings, tell)
    except (CheckpointError, ValueError) as error:
        fail(str(error))

    from rich.console import Console

    if form is not None:
        text = spec_report.to_text(report, form)
        if output is None:
            typer.echo(text, nl=False)
        else:
            output.write_text(text, encoding="utf-8")
    if form is None or output is not None:
        Console().print(spec_report.to_table(report))
    if plot is not None:
        try:
            spec_report.plot(report, plot)
        except ValueError as error:
            fail(f"no figure: {error}")
    if any(r.status == "wrong" for r in report.records):
        raise typer.Exit(1)


def _measure(
    name: str | None, helper: str | None, prompts: dict[str, str], settings: spec.Settings, tell: Any
) -> spec.Report:
    from ..generate.write import with_anydelta
    from . import ops

    importlib.import_module("transformers.utils.logging").set_verbosity_error()
    enabled = with_anydelta().context  # says at once if this Transformers is not supported
    tell("loading the model", 0.0)
    opened = open_checkpoint(name or default_model(), "auto")
    other = open_checkpoint(helper, "auto") if helper else None

    def encode(text: str) -> Any:
        return opened.tokenizer(text, return_tensors="pt")["input_ids"].long()

    report = spec.Report(ops.describe_machine(), Path(opened.name).name, settings)
    with enabled(opened.model):
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
