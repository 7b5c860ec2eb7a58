"""Run a model on a prompt and time it: the first token, and the tokens after it.

A `Way` says how: plain Transformers, Transformers with anydelta, or with drafts. It has a context to run in, more
keyword arguments for `model.generate`, or a function to call instead.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.late import late
from ..integrations import transformers as plug
from ..terminal import Failed, Refused, first_line
from .checkpoint import CheckpointError, Opened

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..integrations.transformers import generate as drafts
else:
    drafts = late("anydelta.integrations.transformers.generate")

_PACKAGE = str(Path(__file__).parents[1])

Context = Callable[["PreTrainedModel"], AbstractContextManager[object]]


@dataclass(frozen=True)
class Way:
    """How a model is run."""

    name: str
    context: Context = lambda model: nullcontext()
    """Makes the context manager around the run from the model."""
    options: Mapping[str, object] = field(default_factory=dict)
    """More keyword arguments for generate()."""
    generate: Callable[..., torch.Tensor] | None = None
    """Called as generate(model, **inputs and options) instead of model.generate."""
    drafts: bool = False
    """Whether it drafts tokens, so that drafts are counted."""
    compiles: bool = False
    """Whether its first tokens wait for torch.compile. A few tokens then run first, untimed."""


PLAIN = Way("transformers")


def with_anydelta() -> Way:
    """Transformers with the linear attention layers of the model on anydelta.

    Raises:
        CheckpointError: this Transformers is not supported.
    """
    try:
        plug.status()
    except (ImportError, RuntimeError) as error:
        raise CheckpointError(str(error)) from None
    return Way("anydelta", context=plug.enable)


def with_fla() -> Way:
    """Keep what `import fla` gave the model's code, and use the mixer of enable() for layers that it knows."""

    def context(model: PreTrainedModel) -> AbstractContextManager[object]:
        try:
            return plug.enable(model)
        except (ImportError, RuntimeError, ValueError):  # its layers are unknown and call what they imported
            return nullcontext()

    return Way("anydelta, fla", context)


def drafting(
    *, mtp: bool = False, draft: Opened | None = None, lookup: int | None = None, count: int | None = None
) -> Way:
    """With anydelta, and drafts from another model, prompt lookup, MTP layers, or MTP layers and then lookup.

    `count` is how many tokens MTP or the other model drafts at a time. None: their default.
    """
    base = with_anydelta()
    if mtp or lookup is not None:
        options: dict[str, object] = {} if lookup is None else {"prompt_lookup_num_tokens": lookup}
        if mtp:
            options |= {"use_mtp": True} | ({} if count is None else {"num_assistant_tokens": count})
        name = ", ".join(("anydelta", *(["mtp"] if mtp else []), *([] if lookup is None else ["lookup"])))
        return replace(base, name=name, options=options, drafts=True)
    assert draft is not None
    helper = draft.model
    if count is not None:
        helper.generation_config.num_assistant_tokens = count
        helper.generation_config.num_assistant_tokens_schedule = "constant"

    @contextmanager
    def both(model: PreTrainedModel) -> Iterator[None]:
        with base.context(model), ExitStack() as stack:
            with suppress(ValueError):  # it has no linear attention layer
                stack.enter_context(base.context(helper))
            yield

    return Way(f"anydelta, draft by {draft.name}", both, {"assistant_model": helper}, drafts=True)


def packed(way: Way) -> Way:
    """The same, with the model's matrices packed for oneDNN (`pack()`)."""

    @contextmanager
    def both(model: PreTrainedModel) -> Iterator[None]:
        try:
            kept = plug.pack(model)
        except (ValueError, RuntimeError) as error:
            raise CheckpointError(str(error)) from error
        with way.context(model), kept:
            yield

    return replace(way, name=f"{way.name}, packed", context=both)


def compiled(way: Way) -> Way:
    """The same, with generate()'s decode step compiled, on a static cache."""
    from transformers.generation import CompileConfig

    config = CompileConfig(fullgraph=True, mode="default")
    config._compile_all_devices = True  # on a CPU too, where Transformers does not by default
    options = {**way.options, "cache_implementation": "static", "compile_config": config}
    return replace(way, name=f"{way.name}, compiled", options=options, compiles=True)


@dataclass
class Written:
    """What was written, and how fast."""

    model: str
    way: str
    dtype: str
    threads: int
    prompt_tokens: int
    text: str = ""
    """The text after the prompt."""
    tokens: list[int] = field(default_factory=list)
    stop: str = "length"
    """Why it ended: length, end (an end-of-text token) or other (a stop string, a time limit)."""
    compile_s: float = 0.0
    """Earlier, untimed elsewhere: torch.compile, and the three tokens that trigger it."""
    first_token_s: float = 0.0
    """From the call to the first token: the prompt, and generate()'s preparation."""
    seconds: float = 0.0
    """The whole call."""
    prompt_per_s: float | None = None
    """Prompt tokens over the time to the first token."""
    tokens_per_s: float | None = None
    """Tokens after the first ones, over their time."""
    drafted: int = 0
    accepted: int = 0
    """How many drafted tokens the model accepted."""
    verifications: int = 0
    """Forwards of the model in which drafts could be verified."""


def write(
    opened: Opened,
    prompt: str,
    way: Way,
    options: Mapping[str, Any] | None = None,
    *,
    seed: int | None = None,
    chat: bool = False,
    show: Callable[[str], None] = lambda text: None,
) -> Written:
    """Continue `prompt`; `show` gets the text piece by piece. `options` are generate()'s own.

    Raises:
        CheckpointError: the model has no layer for the way, no chat template, or refuses an option.
    """
    import torch

    inputs = _encode(opened, prompt, chat)
    n = inputs["input_ids"].shape[1]
    if opened.model.generation_config.stop_strings is not None:
        inputs["tokenizer"] = opened.tokenizer
    done = Written(
        opened.name, way.name, str(opened.model.dtype).removeprefix("torch."), torch.get_num_threads(), n
    )
    stream, begin = _Stream(opened.tokenizer, show), 0.0
    if seed is not None:
        torch.manual_seed(seed)
    try:
        with way.context(opened.model), _counting(way) as rounds:
            run = opened.model.generate if way.generate is None else partial(way.generate, opened.model)
            begin = time.perf_counter()
            if way.compiles:
                # a cache as long as the run's, so that the run can use the graph
                run(
                    **inputs,
                    **{**(options or {}), **way.options},
                    stopping_criteria=[
                        lambda ids, _, **__: ids.new_full(ids.shape[:1], ids.shape[1] >= n + 3) > 0
                    ],
                )
                done.compile_s, begin = time.perf_counter() - begin, time.perf_counter()
                if seed is not None:
                    torch.manual_seed(seed)
            given = {**(options or {}), **way.options, "return_dict_in_generate": False}
            ids = run(**inputs, **given, streamer=stream, logits_processor=[_finite(n)])
            done.seconds = time.perf_counter() - begin
    # enable() and generate() refuse: no supported layer, options that contradict each other, or a way that this class
    # of Transformers does not have (NotImplementedError). The cause stays attached in case it is a bug of ours.
    except (ValueError, NotImplementedError) as error:
        hint = ". --plain runs it without anydelta" if "gated delta rule layers" in str(error) else ""
        raise CheckpointError((" ".join(str(error).split()) or type(error).__name__) + hint) from error
    except Exception as error:
        if isinstance(error, Refused) or _through_ours(error):
            raise
        raise CheckpointError(
            f"requires a model and a generation_config.json that Transformers runs; got {opened.name}: "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error
    done.tokens = ids[0, n:].tolist()
    done.drafted, done.accepted = sum(d for d, _ in rounds), sum(a for _, a in rounds)
    done.verifications = len(rounds)
    done.text = opened.tokenizer.decode(done.tokens, skip_special_tokens=True)
    done.stop = _why_it_ended(opened.model, done.tokens, (options or {}).get("max_new_tokens"))
    if stream.times:
        done.first_token_s = stream.times[0] - begin
        done.prompt_per_s = n / done.first_token_s
        if len(stream.times) > 1:  # a way that drafts may deliver several tokens at once
            done.tokens_per_s = (len(stream.ids) - stream.first) / (stream.times[-1] - stream.times[0])
    return done


def _counting(way: Way) -> AbstractContextManager[list[tuple[int, int]]]:
    """Collects the drafted and the accepted tokens of each verification."""
    if not way.drafts:
        return nullcontext([])
    return drafts.counting()


def _encode(opened: Opened, prompt: str, chat: bool) -> dict[str, torch.Tensor]:
    """Token ids [1, T] and a mask of ones. If bos, eos and padding share a number, generate() would guess the mask."""
    import torch

    if chat:
        try:
            prompt = opened.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
        except (ValueError, AttributeError):
            raise CheckpointError(f"--chat requires a chat template; got {opened.name} without one") from None
    ids = opened.tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat)["input_ids"].long()
    if prompt and ids.shape[1] == 0:
        raise CheckpointError(
            f"requires a tokenizer that knows the prompt; got no token of it from {opened.name}'s"
        )
    if ids.shape[1] == 0:
        bos = opened.tokenizer.bos_token_id
        if bos is None:
            raise CheckpointError(
                "requires a prompt: this model has no token to begin with; got an empty one"
            )
        ids = torch.tensor([[bos]])
    most = opened.model.get_input_embeddings().weight.shape[0]
    if not 0 <= int(ids.min()) <= int(ids.max()) < most:
        raise CheckpointError(
            f"requires a tokenizer of the model's {most} tokens; got token {int(ids.max())} from that of "
            f"{opened.name}. Are tokenizer.json and config.json of two models?"
        )
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _finite(n: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """A logits processor for a prompt of n tokens that ends the run if a logit is NaN."""

    def check(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if bool(scores.amax().isnan()):  # the maximum is NaN if any number is
            raise Failed(
                f"requires logits that are numbers; got NaN for new token {ids.shape[1] - n + 1}. The weights hold "
                "NaN, or their type overflows: try --dtype float32"
            )
        return scores

    return check


def _through_ours(error: BaseException) -> bool:
    """Whether anydelta's code was running when it was raised, called by the library that runs the model."""
    frames = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
    outside = [i for i, name in enumerate(frames) if not name.startswith(_PACKAGE)]
    return not outside or any(name.startswith(_PACKAGE) for name in frames[outside[0] :])


def _why_it_ended(model: PreTrainedModel, tokens: list[int], limit: int | None) -> str:
    ends = model.generation_config.eos_token_id
    ends = [ends] if isinstance(ends, int) else ends or []
    if tokens and tokens[-1] in ends:
        return "end"
    return "length" if limit is None or len(tokens) >= limit else "other"


class _Stream:
    """Gets tokens from generate(): records their times, and shows text as soon as its characters are complete."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, show: Callable[[str], None]):
        self.tokenizer, self.show = tokenizer, show
        self.times: list[float] = []
        self.ids: list[int] = []
        self.first = 0
        """How many tokens came in the first delivery."""
        self._prompt = True
        self._from = self._read = 0

    def put(self, value: torch.Tensor) -> None:
        if self._prompt:  # generate() delivers the prompt first
            self._prompt = False
            return
        self.times.append(time.perf_counter())
        self.ids += value.reshape(-1).tolist()
        self.first = self.first or len(self.ids)
        self._flush(whole=False)

    def end(self) -> None:
        self._flush(whole=True)

    def _flush(self, *, whole: bool) -> None:
        # Decoded with a few earlier tokens: a token's text may depend on its left neighbour.
        shown = self._decode(self.ids[self._from : self._read])
        text = self._decode(self.ids[self._from :])
        if len(text) > len(shown) and (whole or not text.endswith("\N{REPLACEMENT CHARACTER}")):
            self.show(text[len(shown) :])
            self._from, self._read = self._read, len(self.ids)

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)) if ids else ""
