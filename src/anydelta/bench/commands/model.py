"""`anydelta bench model`: the command line. Progress goes to stderr, results to stdout or a file."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...core.probe import available_cpus
from ...generate import gguf_file, presets
from ...generate.checkpoint import need_packages, open_checkpoint, quiet
from ...generate.write import with_anydelta
from ...integrations import transformers as plug
from ...terminal import Refused, progress, say
from ..contenders import llama
from ..measure import model, model_report, ops
from ..measure.runners import CompiledRunner, Test, TransformersRunner
from .options import Csv, Json, Md, Output, Plot, checked, numbers_of_threads, show

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

    from ..measure.runners import Enabled, Runner

LLAMA = "llama.cpp"
PACKED = "packed"
COMPILED = "compiled"
CONTENDERS = ("transformers", "anydelta", PACKED, COMPILED, LLAMA)
DTYPES = ("float32", "bfloat16", "float16")


def model_command(
    models: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            "-m",
            help="Presets (see --list), folders, .gguf files or hub names; commas allowed. Default: tiny.",
        ),
    ] = None,
    prompt: Annotated[
        str, typer.Option("--n-prompt", "-p", help="Prompt tokens, as 128,512; 0: none.")
    ] = "512",
    gen: Annotated[str, typer.Option("--n-gen", "-n", help="Tokens one by one, as 64,128; 0: none.")] = "128",
    depth: Annotated[
        str, typer.Option("--n-depth", "-d", help="Tokens of context before them, as 0,4096.")
    ] = "0",
    rounds: Annotated[int, typer.Option("--repetitions", "--rounds", "-r", help="Interleaved rounds.")] = 5,
    threads: Annotated[
        str | None, typer.Option("--threads", "-t", help="Numbers of threads, as 1,2. Default: all CPUs.")
    ] = None,
    dtype: Annotated[
        str, typer.Option("--dtype", help="float32, bfloat16, float16; commas allowed.")
    ] = "float32",
    layers: Annotated[int | None, typer.Option("--layers", help="Cut presets to this many layers.")] = None,
    contender: Annotated[
        list[str] | None,
        typer.Option(
            "--contender", "-c", help=f"Beside transformers: {', '.join(CONTENDERS[1:])} (repeat for more)."
        ),
    ] = None,
    profile: Annotated[bool, typer.Option("--profile", help="Also say where the time goes.")] = False,
    json: Json = False,
    csv: Csv = False,
    md: Md = False,
    output: Output = None,
    plot: Plot = None,
    list_: Annotated[bool, typer.Option("--list", help="Only list presets and contenders.")] = False,
) -> None:
    """Time whole models as llama-bench does: Transformers as it is, with anydelta, and llama.cpp.

    For a .gguf file, Transformers alone unpacks the weights; anydelta and llama.cpp keep them packed.

    ppN is N prompt tokens at once, tgN is N tokens one after the other. Presets have random weights in the shapes of
    the published models. Logits and greedy tokens are compared before anything is timed.

    Examples:
      anydelta bench model
      anydelta bench model -m qwen3.5-0.8b -p 512 -n 64 -t 2 --profile --plot model.svg
      anydelta bench model -m qwen3.5-4b --layers 8 --dtype bfloat16 -d 0,4096
      anydelta bench model -m Qwen3.5-0.8B-Q4_K_M.gguf -p 512 -n 128 -d 0,1024,4096 -t 1,2 -r 5 --md
    """
    form = checked(json, csv, md, output, plot)
    if rounds < 1:
        raise Refused(f"requires --rounds of at least 1; got {rounds}")
    tests = _tests(_numbers("-p", prompt), _numbers("-n", gen), _numbers("-d", depth))
    names = _names(models, "tiny")
    dtypes = _names([dtype], "float32")
    for one in dtypes:
        if one not in DTYPES:
            raise Refused(f"requires --dtype of {', '.join(DTYPES)}; got {one!r}")
    for one in contender or ():
        if one not in CONTENDERS:
            raise Refused(f"requires --contender of {', '.join(CONTENDERS)}; got {one!r}")
    counts = numbers_of_threads(threads, available_cpus())
    need_packages()
    if list_:
        _list()
        return
    with progress() as tell:
        report = _measure(names, dtypes, counts, layers, tests, rounds, profile, contender or [], tell)

    show(model_report, report, form, output, plot)
    if any(r.contender == "anydelta" and r.status in ("wrong", "failed") for r in report.records):
        raise typer.Exit(1)


def _measure(
    names: list[str],
    dtypes: list[str],
    counts: list[int],
    layers: int | None,
    tests: tuple[Test, ...],
    rounds: int,
    profile: bool,
    asked: list[str],
    tell: Callable[[str, float], None],
) -> model.Report:
    transformers = importlib.import_module("transformers")
    importlib.import_module("transformers.utils.logging").set_verbosity_error()
    with quiet():
        enabled = with_anydelta().context  # says at once if this Transformers is not supported
    settings = model.Settings(tests, rounds, profile)
    report = model.Report(ops.describe_machine(), settings)
    whole = len(names) * len(dtypes) * len(counts)
    for i, (name, dtype) in enumerate((n, d) for n in names for d in dtypes):
        tell(f"{name} {dtype}: building the model", i / len(names) / len(dtypes))
        if gguf_file.is_gguf(name):
            built, runners, dtype = _file(Path(name), tests, report, asked, enabled, tell)
            _measure_all(built, runners, dtype, counts, settings, report, tell, i * len(counts), whole)
            continue
        built = presets.build(name, dtype, layers)
        runners = [TransformersRunner("transformers", transformers.__version__, built.model)]
        if not asked or "anydelta" in asked:
            version = report.machine["anydelta"]
            runners.append(TransformersRunner("anydelta", version, built.model, enabled))
        if PACKED in asked:
            runners += _packed(built.model, report.machine["anydelta"], transformers.__version__, enabled)
        if COMPILED in asked:
            room = _room(tests)
            for runner in runners[: 1 + ("anydelta" in asked)]:
                runners.append(
                    CompiledRunner(
                        f"{runner.name}, compiled", runner.version, built.model, room, runner.enabled
                    )
                )
        if (not asked or LLAMA in asked) and (
            rival := _llama(built, dtype, tests, report, LLAMA in asked, tell)
        ):
            runners.append(rival)
        _measure_all(built, runners, dtype, counts, settings, report, tell, i * len(counts), whole)
    return report


def _measure_all(
    built: presets.Built,
    runners: list[Any],
    dtype: str,
    counts: list[int],
    settings: model.Settings,
    report: model.Report,
    tell: Callable[[str, float], None],
    before: int,
    whole: int,
) -> None:
    try:
        for j, threads in enumerate(counts):

            def part(text: str, done: float, at: int = before + j) -> None:
                tell(text, (at + done) / whole)

            model.measure(
                built, runners, dtype=dtype, threads=threads, settings=settings, report=report, progress=part
            )
    finally:
        for runner in runners:
            runner.close()


def _file(
    path: Path,
    tests: tuple[Test, ...],
    report: model.Report,
    asked: list[str],
    enabled: Enabled,
    tell: Callable[[str, float], None],
) -> tuple[presets.Built, list[Any], str]:
    """A GGUF file: unpacked for Transformers alone, packed for anydelta and for llama.cpp."""
    if others := [c for c in asked if c in (PACKED, COMPILED)]:
        raise Refused(f"requires no --contender {others[0]} with a GGUF file; got {path}")
    with quiet():
        header = gguf_file.check(path)
    tell(f"{path.name}: unpacking the file", 0.0)
    stock = open_checkpoint(str(path), "float32", packed=False).model
    built = presets.Built(header.architecture, stock, file=header)
    version = importlib.import_module("transformers").__version__
    runners: list[Any] = [TransformersRunner("transformers", version, stock)]
    if not asked or "anydelta" in asked:
        own = open_checkpoint(str(path)).model
        runners.append(TransformersRunner("anydelta", report.machine["anydelta"], own, enabled))
    if not asked or LLAMA in asked:
        why = llama.missing(None)
        if why and LLAMA in asked:
            raise Refused(f"requires that {LLAMA} can run {path.name} here; got: {why}")
        words = built.model.get_input_embeddings().num_embeddings
        for repacked, name in ((True, LLAMA), (False, f"{LLAMA}, plain buffers")):
            tell(f"{path.name}: {name}", 0.0)
            try:
                if why:
                    raise RuntimeError(why)
                runners.append(llama.LlamaRunner(path, "float16", _room(tests), words, repacked, name))
            except RuntimeError as error:
                report.absent[f"{name}, {path.name}"] = str(error)
    return built, runners, f"{model.FILE}{header.kind}"


def _packed(
    built: PreTrainedModel, version: str, transformers: str, enabled: Enabled
) -> list[TransformersRunner]:
    """Both again on weights packed for oneDNN, to show what torch's own linear layers lose."""
    try:
        packed = plug.pack(built)
    except (ValueError, RuntimeError) as error:
        raise Refused(str(error)) from error
    packed.off()

    def both(of: PreTrainedModel) -> contextlib.ExitStack:
        stack = contextlib.ExitStack()
        stack.enter_context(packed)
        stack.enter_context(enabled(of))
        return stack

    return [
        TransformersRunner("transformers, packed", transformers, built, lambda _: packed),
        TransformersRunner("anydelta, packed", version, built, both),
    ]


def _llama(
    built: presets.Built,
    dtype: str,
    tests: tuple[Test, ...],
    report: model.Report,
    asked: bool,
    tell: Callable[[str, float], None],
) -> Runner | None:
    """llama.cpp with this model, or None and the reason in the report. If it was named, it must run."""
    name = f"{LLAMA}, {built.name} {dtype}"
    if why := llama.missing(built.model.config.model_type):
        if asked:
            raise Refused(f"requires that {LLAMA} can run {built.name} here; got: {why}")
    else:
        tell(f"{built.name} {dtype}: writing the GGUF", 0.0)
        try:
            words = built.model.get_input_embeddings().num_embeddings
            return llama.LlamaRunner(built, dtype, _room(tests), words)
        except RuntimeError as error:
            why = str(error)
    report.absent[name] = why
    return None


def _room(tests: tuple[Test, ...]) -> int:
    """Tokens that a cache must hold."""
    return max(t.depth + t.n for t in tests) + model.CHECK_PROMPT + model.CHECK_STEPS


def _tests(prompts: list[int], gens: list[int], depths: list[int]) -> tuple[Test, ...]:
    tests = [
        Test(kind, n, d) for d in depths for kind, ns in (("pp", prompts), ("tg", gens)) for n in ns if n
    ]
    if not tests:
        raise Refused("requires -p or -n above 0; got nothing to measure")
    return tuple(dict.fromkeys(tests))


def _numbers(option: str, text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = [-1]
    if min(found) < 0 or max(found) > 1 << 20:
        raise Refused(f"requires {option} of numbers from 0 to 1048576 such as 128,512; got {text!r}")
    return found


def _names(items: list[str] | None, default: str) -> list[str]:
    found = [p.strip() for item in items or [default] for p in item.split(",") if p.strip()]
    if not found:
        raise Refused("requires a name; got an empty list")
    return list(dict.fromkeys(found))


def _list() -> None:
    for preset in presets.PRESETS:
        say(f"{preset.name}{f' ({preset.cut})' if preset.cut else ''}")
    say(f"{presets.REPOSITORY} (the repository's model, trained weights)")
