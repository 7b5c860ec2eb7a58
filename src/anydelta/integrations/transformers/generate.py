"""What `enable()` changes in `generate` of the hybrid families: it verifies drafts and rolls rejected ones back.

Transformers refuses assisted generation for these families, because it cannot take a token out of a recurrent state.
RollbackCache can. A drafting call runs on a temporary copy of the model, which shares all modules and has the methods
RollbackCache can. A call that drafts runs on a temporary copy of the model. The copy shares all modules, and the
methods of `Drafting` come before those of its class. Other threads see no change, and an interrupted call leaves
nothing behind. `HOOKS` are the methods that are replaced in the models; each maker takes the original method and
returns ours.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.generation.candidate_generator import AssistedCandidateGenerator
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.utils import GenerateDecoderOnlyOutput, GenerationMixin

from .cache import CACHE, CACHES, RollbackCache
from .classes import require_ours
from .copies import copy_for_call
from .mtp import Mtp, check_mtp

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
    from transformers.generation.candidate_generator import CandidateGenerator
    from transformers.generation.stopping_criteria import StoppingCriteriaList
    from transformers.generation.streamers import BaseStreamer
    from transformers.generation.utils import GenerateOutput
    from transformers.utils import ModelOutput

Method = Callable[..., "GenerateOutput | torch.Tensor"]

Kept = torch.Tensor | tuple[torch.Tensor, ...]
"""Kept for one token: its scores, or what each layer returned."""

_rounds: ContextVar[list[tuple[int, int]] | None] = ContextVar("_rounds", default=None)


@contextmanager
def counting() -> Iterator[list[tuple[int, int]]]:
    """Collects (drafted, accepted) tokens of each verification that `generate` makes in this block and thread."""
    found: list[tuple[int, int]] = []
    token = _rounds.set(found)
    try:
        yield found
    finally:
        _rounds.reset(token)


def generate(theirs: Method) -> Method:
    """Run some calls on a copy: those that draft, of a model that drafts for another, or with a RollbackCache."""
    names = list(inspect.signature(theirs).parameters)[1:]

    @functools.wraps(theirs)
    def ours(self: GenerationMixin, *args: object, **kwargs: object) -> GenerateOutput | torch.Tensor:
        if isinstance(self, Drafting):
            return theirs(self, *args, **kwargs)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        configs = (given.get("generation_config"), self.generation_config)
        if (
            given.get("assistant_model") is not None
            or any(isinstance(given.get(name), RollbackCache) for name in CACHES)
            or any(
                value is not None and value is not False
                for name in _ASKED
                for value in (given.get(name), *(getattr(c, name, None) for c in configs))
            )
        ):
            self = copy_for_call(self, _drafting(self.__class__))
        return theirs(self, *args, **kwargs)

    return ours


HOOKS: dict[str, Callable[[Method], Method]] = {"generate": generate}
_ASKED = ("use_mtp", "prompt_lookup_num_tokens", "assistant_early_exit", "is_assistant")
_INSTEAD = "Leave out use_mtp, assistant_model, prompt_lookup_num_tokens and assistant_early_exit"


@functools.cache
def _drafting(cls: type[GenerationMixin]) -> type[Drafting]:
    """The class of models whose `generate` drafts. It has the name of the model's class, which messages show."""
    return type(
        cls.__name__, (Drafting, cls), {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    )


class Drafting(GenerationMixin):
    """How `generate` differs from Transformers' during a call."""

    _is_stateful = False

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, object],
        generation_mode: GenerationMode,
        batch_size: int,
        *args: object,
    ) -> None:
        """Make a RollbackCache if tokens may be dropped. A cache that the user gives must be one."""
        cache = model_kwargs.get(CACHE)
        if generation_config.is_assistant:
            require_ours(self)
            if cache is None and _is_dynamic(generation_config):
                cache = model_kwargs[CACHE] = self._rollback_cache()
                cache.is_assistants = True
                cache.activate_past_recording()
            if isinstance(cache, RollbackCache):  # it drafts token by token, and is cropped afterwards
                cache.rollback = generation_config.max_length
                return
        elif generation_mode == GenerationMode.ASSISTED_GENERATION:
            _check(self, generation_config, model_kwargs, batch_size)
            if cache is None:
                model_kwargs[CACHE] = self._rollback_cache()
                return
        elif isinstance(cache, RollbackCache):
            cache.stop_recording()
        super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, *args
        )

    def _rollback_cache(self) -> RollbackCache:
        return RollbackCache(config=self.config.get_text_config(decoder=True))

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        *args: object,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: object,
    ) -> Any:  # Transformers looks for the parameter inputs_embeds
        cache = kwargs.get(CACHE)
        if isinstance(cache, RollbackCache) and cache.is_assistants and not cache.get_seq_length():
            cache.skip(input_ids.shape[1] - 2)  # it may be rolled back to just before the prompt's last token
            kwargs["is_first_iteration"] = True  # so that it sees the images
        return super().prepare_inputs_for_generation(input_ids, *args, inputs_embeds=inputs_embeds, **kwargs)

    def _drafter(
        self, config: GenerationConfig, assistant: PreTrainedModel | None, **options: Any
    ) -> CandidateGenerator:
        """The class that proposes tokens, for each way to draft."""
        if config.assistant_early_exit is not None:
            drafter: CandidateGenerator = EarlyExit(self, generation_config=config, **options)
        elif config.use_mtp:
            return Mtp(self, config, options["logits_processor"], options["input_ids"])
        else:
            drafter = self._get_candidate_generator(config, assistant_model=assistant, **options)
        if isinstance(drafter, AssistedCandidateGenerator):
            _only_draft(drafter)
        return drafter

    def _assisted_decoding(
        self,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: BaseStreamer | None = None,
        inputs_tensor: torch.Tensor | None = None,
        assistant_model: PreTrainedModel | None = None,
        assistant_tokenizer: PreTrainedTokenizerBase | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **model_kwargs: Any,
    ) -> GenerateOutput | torch.Tensor:
        """Decode as Transformers' `_sample` does, with the logits of several tokens from each forward.

        The logits processors and the stopping criteria see the verified tokens one by one, in the order and with the
        arguments of decoding without drafts.
        """
        drafter = self._drafter(
            generation_config,
            assistant_model,
            input_ids=input_ids,
            inputs_tensor=inputs_tensor,
            logits_processor=_for_drafts(logits_processor),
            target_tokenizer=tokenizer,
            assistant_tokenizer=assistant_tokenizer,
            model_kwargs=model_kwargs,
        )
        cache = model_kwargs[CACHE]
        cache.activate_past_recording()
        new = _new_tokens(input_ids, generation_config, model_kwargs)
        cache.skip(new - 1)  # the prompt is never dropped
        record = Record(generation_config)
        outputs, tokens, finished = None, 0, False
        while self._has_unfinished_sequences(finished, synced_gpus, device=input_ids.device):
            if finished:  # other processes are not done and wait for this one's forward
                self(input_ids=input_ids[:, -1:], use_cache=False)
                continue
            known = input_ids.shape[1]
            ids, guesses = drafter.get_candidates(
                input_ids,
                model_kwargs=model_kwargs,
                model_outputs=outputs,
                is_first_iteration=outputs is None,
                n_last_matches=tokens - 1,
            )
            room = generation_config.max_length - known - 1
            if outputs is None and model_kwargs.get("inputs_embeds") is not None:
                room = 0  # no drafts behind the prompt
            drafts = ids.to(input_ids.device)[:, known : known + max(0, room)]
            count = drafts.shape[1]
            longer = dict(model_kwargs)
            if count:
                longer = self._update_model_kwargs_for_generation({}, longer, num_new_tokens=count)
            inputs = self.prepare_inputs_for_generation(
                torch.cat((input_ids, drafts), 1),
                next_sequence_length=count + (new if outputs is None else 1),
                is_first_iteration=outputs is None,
                **longer,
            )
            if "logits_to_keep" in inputs:
                inputs["logits_to_keep"] = count + 1
            if isinstance(drafter, Mtp) and not inputs.get("output_hidden_states"):
                inputs["output_hidden_states"] = drafter.hidden_states
            cache.allow(count)
            outputs = self(**inputs, return_dict=True)
            logits = outputs.logits[:, -count - 1 :].to(
                device=input_ids.device, dtype=torch.float32, copy=True
            )
            for tokens in range(1, count + 2):
                row = logits[:, tokens - 1]
                scores = logits_processor(input_ids, row.clone())
                draft = drafts[:, tokens - 1 : tokens]
                guess = None if guesses is None or tokens > count else guesses[:, tokens - 1].to(row)
                token = _choose(scores, draft, guess, generation_config)
                record.add(scores, row)
                input_ids = torch.cat((input_ids, token), 1)
                finished = bool(stopping_criteria(input_ids, record.scores).all())
                if finished or tokens > count or not torch.equal(token, draft):
                    break
            record.add_layers(outputs, count, tokens)
            try:
                cache.crop(tokens - count - 1)
            except ValueError:
                require_ours(self)  # checked again: it did when the call began
                raise
            if streamer is not None:
                streamer.put(input_ids[:, known:].cpu())
            drafter.update_candidate_strategy(input_ids, logits, tokens - 1)
            if (found := _rounds.get()) is not None:
                found.append((count, tokens - 1))
            model_kwargs = self._update_model_kwargs_for_generation(
                outputs, model_kwargs, num_new_tokens=tokens
            )
        if streamer is not None:
            streamer.end()
        if isinstance(drafter, AssistedCandidateGenerator):
            settings = drafter.assistant_model.generation_config
            if settings.num_assistant_tokens_schedule == "heuristic":  # it is kept from call to call
                settings.num_assistant_tokens = drafter.num_assistant_tokens
        if not generation_config.return_dict_in_generate:
            return input_ids
        return GenerateDecoderOnlyOutput(sequences=input_ids, **{CACHE: cache}, **record.kept)


def _is_dynamic(config: GenerationConfig) -> bool:
    return config.use_cache is not False and config.cache_implementation in (None, "dynamic", "dynamic_full")


def _check(
    model: PreTrainedModel, config: GenerationConfig, model_kwargs: dict[str, object], batch_size: int
) -> None:
    """Refuse calls that cannot draft, before anything is touched."""
    require_ours(model)
    for option in ("prompt_lookup_num_tokens", "assistant_early_exit"):
        value = getattr(config, option)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(
                f"generate: requires {option} to be a whole number from 1; got {value!r}. Leave it out to draft nothing"
            )
    name, cache = type(model).__name__, model_kwargs.get(CACHE)
    if batch_size > 1:
        raise ValueError(
            f"generate: requires one sequence to draft tokens; got {batch_size}. Call it once per sequence, or "
            f"{_INSTEAD[0].lower()}{_INSTEAD[1:]}"
        )
    if cache is None and not _is_dynamic(config):
        got = (
            "use_cache=False"
            if config.use_cache is False
            else f"cache_implementation={config.cache_implementation!r}"
        )
        raise ValueError(
            f"generate: requires the cache that it makes itself to draft tokens with {name}; got {got}. {_INSTEAD}"
        )
    if cache is not None and not isinstance(cache, RollbackCache):
        raise ValueError(
            f"generate: requires a RollbackCache to draft tokens with {name}; got "
            f"{type(cache).__name__}, which cannot drop a token. Leave {CACHE} out, or pass an "
            "anydelta.integrations.transformers.cache.RollbackCache(config=model.config)"
        )
    depth = config.assistant_early_exit
    if depth is not None:
        text = model.config.get_text_config(decoder=True)
        first = next(i for i, kind in enumerate(text.layer_types, 1) if kind != "linear_attention")
        if not first <= depth <= text.num_hidden_layers:
            raise ValueError(
                f"generate: requires assistant_early_exit from {first} to {text.num_hidden_layers}, so that the first "
                f"attention layer (number {first}) is among the layers that draft; got {depth}"
            )
    elif config.use_mtp:
        check_mtp(model, config)
    by_model = depth is not None or not (config.use_mtp or config.prompt_lookup_num_tokens)
    if by_model and model_kwargs.get("inputs_embeds") is not None:
        raise ValueError(
            "generate: requires input_ids alone to draft with assistant_model or assistant_early_exit, because these "
            "read tokens; got inputs_embeds. Use use_mtp or prompt_lookup_num_tokens"
        )


def _new_tokens(input_ids: torch.Tensor, config: GenerationConfig, model_kwargs: dict[str, Any]) -> int:
    """How many tokens of the prompt the cache does not hold. If it holds all of them, the whole prompt, as without
    drafts.

    The inputs are all tokens, or only those that are not in the cache. Embeddings and mask are always of all tokens.
    """
    embeds, mask = model_kwargs.get("inputs_embeds"), model_kwargs.get("attention_mask")
    given: int = (input_ids if embeds is None else embeds).shape[1]
    whole = getattr(config, "_mask_length", given) if mask is None else mask.shape[1]
    return given - (model_kwargs[CACHE].get_seq_length() if given == whole else 0) or given


def _choose(
    scores: torch.Tensor, draft: torch.Tensor, guess: torch.Tensor | None, config: GenerationConfig
) -> torch.Tensor:
    """The next token [1, 1] from its scores [1, vocabulary]. It equals the draft [1, 1] only if that is accepted.

    A draft that was drawn from the scores `guess` is accepted by speculative sampling: with probability
    min(1, p(draft) / q(draft)), else a token is drawn from max(0, p - q). The tokens then follow p. `guess` is None
    without a draft, or for a draft without scores.
    """
    weight = getattr(config, "assistant_ensemble_weight", None)
    if not config.do_sample:
        if guess is not None and weight is not None:
            scores = weight * scores.softmax(-1) + (1 - weight) * guess.softmax(-1)
        return scores.argmax(-1, keepdim=True)
    p = scores.softmax(-1)
    if guess is not None:
        q = guess.softmax(-1)
        ratio = p.gather(1, draft) / q.gather(1, draft)
        if weight is not None:  # the draft may follow (1 - weight) q + weight p instead
            ratio = 1 - weight + weight * ratio
        if torch.rand_like(ratio) <= ratio:
            return draft
        rest = (p - q).clamp(min=0)
        p = rest if rest.sum() > 0 else p
    return torch.multinomial(p, 1)


def _for_drafts(processors: LogitsProcessorList) -> LogitsProcessorList:
    """The processors that may see drafts too: Transformers' own, except two that go from token to token.

    Others may count their calls or remember what they saw, as grammars do, so they see only the final text.
    """
    going = ("UnbatchedClassifierFreeGuidanceLogitsProcessor", "SynthIDTextWatermarkLogitsProcessor")
    return LogitsProcessorList(
        p
        for p in processors
        if type(p).__module__ == LogitsProcessorList.__module__ and type(p).__name__ not in going
    )


class Record:
    """What `generate` returns beside the tokens, if its configuration asks for it: a tuple per kind, over tokens."""

    def __init__(self, config: GenerationConfig):
        kinds = ("scores", "logits", "attentions", "hidden_states") if config.return_dict_in_generate else ()
        self.kept: dict[str, tuple[Kept, ...]] = {n: () for n in kinds if getattr(config, f"output_{n}")}

    @property
    def scores(self) -> tuple[Kept, ...] | None:
        return self.kept.get("scores")

    def add(self, scores: torch.Tensor, logits: torch.Tensor) -> None:
        for name, x in (("scores", scores), ("logits", logits)):
            if name in self.kept:
                self.kept[name] += (x,)

    def add_layers(self, outputs: ModelOutput, count: int, tokens: int) -> None:
        """Add what the layers of a forward with `count` drafts returned for the last `tokens` tokens. The first token
        gets all rows before it too."""
        for name in ("attentions", "hidden_states"):
            for i in range(tokens) if name in self.kept else ():
                found = []
                for x in getattr(outputs, name):  # [1, rows, hidden] or [1, heads, rows, columns]
                    end = x.shape[-2] - count + i
                    columns = x.shape[-1] - (count - i if name == "attentions" else 0)
                    found.append(x[..., end - 1 if i else 0 : end, :columns])
                self.kept[name] += (tuple(found),)


# ---- Drafts by another model, or by the first layers of the model itself


class EarlyExit(AssistedCandidateGenerator):
    """The model itself drafts, without the layers after the exit."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        generation_config: GenerationConfig,
        target_tokenizer: PreTrainedTokenizerBase | None,
        assistant_tokenizer: PreTrainedTokenizerBase | None,
        **options: object,
    ):
        depth = generation_config.assistant_early_exit
        super().__init__(
            assistant_model=_first_layers(model, depth), generation_config=generation_config, **options
        )


def _first_layers(model: PreTrainedModel, depth: int) -> PreTrainedModel:
    """The model with only the first layers of its decoder."""
    decoder = model.get_decoder()
    path = next(name for name, module in model.named_modules() if module is decoder)
    own = inner = copy_for_call(model)
    for name in path.split("."):
        inner._modules[name] = copy_for_call(inner._modules[name])
        inner = inner._modules[name]
    inner.layers = nn.ModuleList(list(decoder.layers)[:depth])
    own.config = copy.deepcopy(model.config)  # its cache is made from this
    text = own.config.get_text_config(decoder=True)
    text.num_hidden_layers, text.layer_types = depth, text.layer_types[:depth]
    return own


def _only_draft(drafter: AssistedCandidateGenerator) -> None:
    """Restrict its model to drafting: the main model decides where the text stops and what is returned."""
    config, given = drafter.generation_config, drafter.assistant_kwargs
    config.stop_strings = config.assistant_early_exit = config.prompt_lookup_num_tokens = None
    config.use_mtp = config.token_healing = False
    for name in ("output_attentions", "output_hidden_states", "output_logits"):
        setattr(config, name, False)
        given.pop(name, None)
    parameters = inspect.signature(drafter.assistant_model.forward).parameters
    positions = given.get("position_ids")
    if "pixel_values" not in parameters and positions is not None and positions.ndim == 3:
        given["position_ids"] = positions[0]  # it sees no images; the first axis is that of the text
    for name in [name for name in given if name not in parameters]:
        del given[name]
