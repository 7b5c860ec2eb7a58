"""`anydelta generate`: streams text to stdout, and prints figures to stderr."""

from __future__ import annotations

import dataclasses
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core.late import late
from ..terminal import Failed, say, tell, to_json
from . import write
from .checkpoint import DTYPES, CheckpointError, Opened, default_model, need_packages, open_checkpoint, quiet

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..compat import fla as fla_names
    from .write import Way, Written
else:
    fla_names = late("anydelta.compat.fla")

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p")
"""Options that only count when tokens are drawn."""


def register(app: typer.Typer) -> None:
    """Add `generate` to the command line."""
    app.command("generate")(generate_command)


def _option(*names_and_help: str) -> object:
    *names, text = names_and_help
    return typer.Option(*names, help=text)


def generate_command(
    prompt: Annotated[str | None, typer.Argument(help="The text to continue; - or none reads stdin.")] = None,
    model: Annotated[
        str | None,
        _option("--model", "-m", "A folder, a .gguf file, or a hub name. Default: the repository's model."),
    ] = None,
    max_new_tokens: Annotated[int, _option("--max-new-tokens", "-n", "How many tokens at most.")] = 128,
    min_new_tokens: Annotated[int | None, _option("--min-new-tokens", "How many at least.")] = None,
    do_sample: Annotated[
        bool | None,
        _option("--do-sample/--greedy", "Sample tokens, or take the likeliest. Default: the model's."),
    ] = None,
    temperature: Annotated[
        float | None, _option("--temperature", "Below 1: less random; above 1: more random.")
    ] = None,
    top_k: Annotated[int | None, _option("--top-k", "Sample from the k likeliest tokens.")] = None,
    top_p: Annotated[
        float | None, _option("--top-p", "Sample from the likeliest tokens with a total probability of p.")
    ] = None,
    min_p: Annotated[
        float | None, _option("--min-p", "Sample from tokens above p times the likeliest probability.")
    ] = None,
    typical_p: Annotated[float | None, _option("--typical-p", "Locally typical sampling.")] = None,
    repetition_penalty: Annotated[
        float | None, _option("--repetition-penalty", "Above 1: tokens seen before become less likely.")
    ] = None,
    no_repeat_ngram_size: Annotated[
        int | None, _option("--no-repeat-ngram-size", "No sequence of this many tokens occurs twice.")
    ] = None,
    stop_strings: Annotated[
        list[str] | None, _option("--stop-strings", "End after this text (repeat for more).")
    ] = None,
    seed: Annotated[int | None, _option("--seed", "Seed of the random draws.")] = None,
    chat: Annotated[
        bool, _option("--chat", "The prompt is a user's message in the model's chat form.")
    ] = False,
    echo: Annotated[bool, _option("--echo", "Write the prompt first.")] = False,
    dtype: Annotated[str, _option("--dtype", f"{', '.join(DTYPES)}: the checkpoint's own.")] = "auto",
    threads: Annotated[int | None, _option("--threads", "-t", "Number of threads. Default: torch's.")] = None,
    mtp: Annotated[bool, _option("--mtp", "Draft with the model's multi-token prediction layers.")] = False,
    draft: Annotated[
        str | None, _option("--draft", "Draft with this smaller model: a folder, or a hub name.")
    ] = None,
    lookup: Annotated[
        int | None,
        _option(
            "--lookup",
            "Draft up to this many tokens, as they followed the same words before. With --mtp: after its drafts.",
        ),
    ] = None,
    drafts: Annotated[
        int | None,
        _option(
            "--drafts", "How many tokens --mtp or --draft drafts at a time. Default: the model's choice."
        ),
    ] = None,
    pack: Annotated[
        bool, _option("--pack", "Compute the matrices by oneDNN, on a second copy of their weights (CPU).")
    ] = False,
    compile_: Annotated[
        bool, _option("--compile", "Compile the decode step (torch.compile: minutes), on a static cache.")
    ] = False,
    fla: Annotated[bool, _option("--fla", "Let the model's code import fla from anydelta.")] = False,
    trust_remote_code: Annotated[
        bool, _option("--trust-remote-code", "Run the Python code that comes with the model.")
    ] = False,
    plain: Annotated[bool, _option("--plain", "Transformers alone, without anydelta.")] = False,
    compare: Annotated[
        bool,
        _option("--compare", "Write with Transformers alone and with anydelta; exit 1 if the texts differ."),
    ] = False,
    as_json: Annotated[bool, _option("--json", "Print only the record of the run, as JSON.")] = False,
) -> None:
    """Continue a prompt with a model of Transformers, on anydelta.

    Examples:
      anydelta generate "And God said"
      anydelta generate --do-sample --temperature 0.7 --top-p 0.95 --seed 1 "Psalm 151"
      anydelta generate -m Qwen/Qwen3.5-0.8B --dtype bfloat16 --chat "What is a gated delta rule?"
      anydelta generate --compare "In the beginning"
      anydelta generate --mtp --compare "In the beginning"
      anydelta generate -m Qwen3.5-0.8B-Q4_K_M.gguf --chat "What is a gated delta rule?"
      anydelta generate -m moonshotai/Kimi-Linear-48B-A3B-Instruct --trust-remote-code --fla "Is 123 a prime?"
    """
    given = {
        name: value
        for name, value in dict(
            min_new_tokens=min_new_tokens, do_sample=do_sample, temperature=temperature, top_k=top_k, top_p=top_p,
            min_p=min_p, typical_p=typical_p, repetition_penalty=repetition_penalty,
            no_repeat_ngram_size=no_repeat_ngram_size, stop_strings=stop_strings,
        ).items()
        if value is not None
    }  # fmt: skip
    _check(max_new_tokens, threads, given, plain and compare)
    _check_drafting(mtp, draft, lookup, drafts, plain)
    drafts_asked = mtp or draft is not None or lookup is not None
    _check_compile(compile_, pack, drafts_asked)
    if fla and (plain or compare or drafts_asked):
        raise CheckpointError(
            "requires --fla without --plain, --compare and drafts, which need Transformers as it is; got one of them"
        )
    need_packages()
    name = default_model() if model is None else model
    text = _prompt(prompt)
    if fla:
        fla_names.install()
    opened = open_checkpoint(name, dtype, trust_remote_code, packed=not plain)
    _check_sampling(opened, given)
    if "stop_strings" in given:
        given["tokenizer"] = opened.tokenizer  # generate() needs it to find them
    options = {"max_new_tokens": max_new_tokens, **given}
    way = (
        write.with_fla()
        if fla
        else _way(
            plain,
            mtp,
            None if draft is None else open_checkpoint(draft, dtype, trust_remote_code),
            lookup,
            drafts,
        )
    )
    if pack:
        way = write.packed(way)
    if compile_:
        way = write.compiled(way)
    runs = _run(opened, text, options, threads, seed, chat, echo, way, compare, as_json)
    same = len(runs) < 2 or runs[0].tokens == runs[1].tokens
    if as_json:
        records = [dataclasses.asdict(r) for r in runs]
        say(to_json({"runs": records, "identical": same} if compare else records[0]))
    else:
        for run in runs:
            tell(_figures(run))
    if compare and not same:
        first = next(
            (i for i, pair in enumerate(zip(*(r.tokens for r in runs), strict=False)) if len(set(pair)) > 1),
            min(len(r.tokens) for r in runs),
        )
        raise Failed(f"the two texts differ from new token {first} on")
    if compare and not as_json:
        tell(f"The two texts are the same, token for token ({len(runs[0].tokens)} tokens).")


def _run(
    opened: Opened,
    prompt: str,
    options: Mapping[str, object],
    threads: int | None,
    seed: int | None,
    chat: bool,
    echo: bool,
    way: Way,
    compare: bool,
    as_json: bool,
) -> list[Written]:
    import torch

    ways = [write.PLAIN, way] if compare else [way]

    def show(piece: str) -> None:
        say(piece, end="")

    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    runs = []
    try:
        with quiet():  # Transformers' messages are about slow code, or about faults that were checked before
            for way in ways:
                if not as_json:
                    if compare:
                        say(f"--- {way.name}")
                    if echo:
                        show(prompt)
                runs.append(
                    write.write(
                        opened, prompt, way, options, seed=seed, chat=chat,
                        show=(lambda piece: None) if as_json else show,
                    )
                )  # fmt: skip
                if not as_json:
                    say()
    finally:
        torch.set_num_threads(before)
    return runs


def _way(plain: bool, mtp: bool, draft: Opened | None, lookup: int | None, drafts: int | None) -> Way:
    if plain:
        return write.PLAIN
    if not mtp and draft is None and lookup is None:
        return write.with_anydelta()
    return write.drafting(mtp=mtp, draft=draft, lookup=lookup, count=drafts)


def _check_drafting(
    mtp: bool, draft: str | None, lookup: int | None, drafts: int | None, plain: bool
) -> None:
    asked = [
        name
        for name, on in (("--mtp", mtp), ("--draft", draft), ("--lookup", lookup))
        if on not in (False, None)
    ]
    if len(asked) > 1 and asked != ["--mtp", "--lookup"]:
        raise CheckpointError(
            f"requires one of --mtp, --draft and --lookup, or --mtp with --lookup; got {' and '.join(asked)}"
        )
    if asked and plain:
        raise CheckpointError(
            f"requires anydelta for {asked[0]}, which Transformers alone refuses; got --plain"
        )
    for name, value in (("--lookup", lookup), ("--drafts", drafts)):
        if value is not None and not 1 <= value <= 1024:
            raise CheckpointError(f"requires {name} from 1 to 1024; got {value}")
    if drafts is not None and not mtp and draft is None:
        raise CheckpointError("requires --mtp or --draft with --drafts; got neither")


def _check_compile(compile_: bool, pack: bool, drafts: bool) -> None:
    if compile_ and drafts:
        raise CheckpointError(
            "requires a cache that can roll back for drafts; got --compile, whose cache is static"
        )
    if compile_ and pack:
        raise CheckpointError(
            "requires one of --compile and --pack; got both. Compiled graphs take the weights as they were"
        )


def _prompt(prompt: str | None) -> str:
    if prompt is not None and prompt != "-":
        return prompt
    if prompt is None and sys.stdin.isatty():
        raise CheckpointError(
            'requires a prompt; got none. Give it in quotes: anydelta generate "In the beginning"'
        )
    return sys.stdin.read()


def _check(max_new_tokens: int, threads: int | None, given: dict[str, Any], both: bool) -> None:
    if both:
        raise CheckpointError("requires one of --plain and --compare; got both")
    if max_new_tokens < 1:
        raise CheckpointError(f"requires --max-new-tokens of at least 1; got {max_new_tokens}")
    if threads is not None and not 1 <= threads <= 1024:
        raise CheckpointError(f"requires --threads from 1 to 1024; got {threads}")
    if given.get("temperature", 1.0) <= 0:
        raise CheckpointError(
            f"requires a --temperature above 0; got {given['temperature']:g}. --greedy takes the likeliest token"
        )
    for name in ("top_p", "min_p", "typical_p"):
        if not 0 < given.get(name, 1.0) <= 1:
            raise CheckpointError(f"requires {_flag(name)} above 0 and at most 1; got {given[name]:g}")
    for name in ("top_k", "no_repeat_ngram_size", "repetition_penalty", "min_new_tokens"):
        if given.get(name, 1) <= 0:
            raise CheckpointError(f"requires {_flag(name)} above 0; got {given[name]:g}")


def _check_sampling(opened: Opened, given: dict[str, Any]) -> None:
    """Refuse options that would be accepted and then ignored."""
    asked = [name for name in SAMPLING if name in given]
    if asked and not given.get("do_sample", opened.model.generation_config.do_sample):
        raise CheckpointError(f"requires --do-sample with {_flag(asked[0])}; got greedy decoding")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _figures(run: Written) -> str:
    speed = "" if run.tokens_per_s is None else f", then {run.tokens_per_s:.1f} tokens/s"
    if run.drafted:
        speed += f"; {run.accepted} of {run.drafted} drafts accepted in {run.verifications} verifications"
    if run.compile_s:
        speed += f"; compiled before that in {run.compile_s:.1f} s"
    return (
        f"{run.way}: {len(run.tokens)} tokens in {run.seconds:.2f} s: the first after {run.first_token_s:.3f} s "
        f"({run.prompt_tokens} of prompt){speed}; {run.dtype}, {run.threads} thread{'s' * (run.threads > 1)}"
    )
