"""What `enable()` changes in `generate` of the hybrid families: drafts are verified, and rejected ones rolled back.

Transformers refuses assisted generation for these families, since nothing can take a token out of a recurrent
state. RollbackCache can. The methods in `HOOKS` are replaced in the models of those families that generate, and
nowhere else; each maker takes the method that was there and returns ours.
"""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import transformers
from torch import nn
from transformers.cache_utils import CacheLayerMixin, MtpCache
from transformers.generation.candidate_generator import CandidateGenerator, EarlyExitCandidateGenerator
from transformers.generation.configuration_utils import GenerationConfig, GenerationMode
from transformers.modeling_layers import MtpModel

from .transformers_cache import RollbackCache, with_rollback
from .transformers_classes import require_ours

Method = Callable[..., Any]

SINCE = (5, 20)
"""The first Transformers whose `generate` drafts as the methods here expect; earlier ones cannot read the MTP layers of
these families, and crop caches otherwise."""
_DRAFTS = GenerationConfig._get_default_generation_params().get("num_assistant_tokens")


_rounds: ContextVar[list[tuple[int, int]] | None] = ContextVar("_rounds", default=None)


@contextmanager
def counting() -> Iterator[list[tuple[int, int]]]:
    """The drafted and the accepted tokens of each verification that `generate` makes meanwhile, in this thread."""
    found: list[tuple[int, int]] = []
    token = _rounds.set(found)
    try:
        yield found
    finally:
        _rounds.reset(token)


def _counted(generator: Any) -> Any:
    """The candidate generator, entering each round into the list of `counting`."""
    found = _rounds.get()
    if found is not None:
        update = generator.update_candidate_strategy

        def counted(input_ids: Any, scores: Any, num_matches: Any) -> Any:
            found.append((scores.shape[1] - 1, int(num_matches)))
            return update(input_ids, scores, num_matches)

        generator.update_candidate_strategy = counted
    return generator


class _As:
    """A model with some attributes changed, for one call: nothing is written to the model."""

    def __init__(self, model: Any, **changed: Any):
        self.__dict__.update(changed, _model=model)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type(self._model)


def validate_mode(theirs: Method) -> Method:
    """All of Transformers' checks but the one that the model is not stateful."""

    @functools.wraps(theirs)
    def ours(self: Any, generation_mode: Any, *args: Any, **kwargs: Any) -> Any:
        if generation_mode == GenerationMode.ASSISTED_GENERATION and _version() < SINCE:
            raise ValueError(
                f"generate: requires transformers {SINCE[0]}.{SINCE[1]} to 5.23 to draft tokens with "
                f"{type(self).__name__}; got {transformers.__version__}. pip install 'transformers>=5.20,<5.24', or "
                "leave out use_mtp, assistant_model, prompt_lookup_num_tokens and assistant_early_exit"
            )
        return theirs(_As(self, _is_stateful=False), generation_mode, *args, **kwargs)

    return ours


def _version() -> tuple[int, ...]:
    return tuple(int(part) for part in transformers.__version__.split(".")[:2])


def prepare_cache(theirs: Method) -> Method:
    """Where tokens may be dropped, make a RollbackCache; one given by the user must be that."""

    @functools.wraps(theirs)
    def ours(
        self: Any, generation_config: Any, model_kwargs: Any, generation_mode: Any, *args: Any, **kwargs: Any
    ) -> Any:
        cache = model_kwargs.get("past_key_values")
        assistant = bool(generation_config.is_assistant)
        if assistant or generation_mode == GenerationMode.ASSISTED_GENERATION:
            require_ours(self)
        if not assistant and generation_mode != GenerationMode.ASSISTED_GENERATION:
            if isinstance(cache, RollbackCache):
                cache.stop_recording()
        elif cache is None and generation_config.use_cache is not False and _is_dynamic(generation_config):
            cache = RollbackCache(config=self.config.get_text_config(decoder=True))
            model_kwargs["past_key_values"] = cache
            if assistant:  # it drafts token by token, and is cropped afterwards
                cache.is_assistants = True
                cache.rollback = generation_config.max_length
                cache.activate_past_recording()
            return None
        elif cache is not None and not isinstance(cache, RollbackCache):
            raise ValueError(
                f"generate: requires a RollbackCache to draft tokens with {type(self).__name__}; got "
                f"{type(cache).__name__}, which cannot drop a token. Leave past_key_values out, or pass an "
                "anydelta.integrations.transformers_cache.RollbackCache(config=model.config)"
            )
        return theirs(self, generation_config, model_kwargs, generation_mode, *args, **kwargs)

    return ours


def _is_dynamic(generation_config: Any) -> bool:
    return generation_config.cache_implementation in (None, "dynamic", "dynamic_full")


def candidate_generator(theirs: Method) -> Method:
    """Tell the cache which tokens are drafts, and draft by early exit and MTP with the classes below."""

    @functools.wraps(theirs)
    def ours(self: Any, generation_config: Any, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        model_kwargs = kwargs["model_kwargs"]
        cache = model_kwargs["past_key_values"]
        if isinstance(cache, RollbackCache):
            mask, length, known = (
                model_kwargs.get("attention_mask"),
                input_ids.shape[1],
                cache.get_seq_length(),
            )
            # The inputs are all tokens, or those that are not in the cache; the mask is always that of all.
            cache.inputs_are_whole = length == (
                getattr(generation_config, "_mask_length", length) if mask is None else mask.shape[1]
            )
            cache.allow(generation_config.max_length - length)
            cache.skip(length - (known if cache.inputs_are_whole else 0) - 1)
        if generation_config.assistant_early_exit is not None:
            return _counted(
                EarlyExit(
                    input_ids=input_ids,
                    assistant_model=self,
                    generation_config=generation_config,
                    model_kwargs=model_kwargs,
                    inputs_tensor=kwargs.get("inputs_tensor"),
                    logits_processor=kwargs.get("logits_processor"),
                )
            )
        if generation_config.use_mtp:
            return _counted(Mtp(self, generation_config, kwargs.get("logits_processor"), input_ids))
        return _counted(theirs(self, generation_config, input_ids, *args, **kwargs))

    return ours


def prepare_inputs(theirs: Method) -> Method:
    """The first forward after a given cache gets only what is not in it, as in decoding without drafts."""

    @functools.wraps(theirs)
    def ours(self: Any, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("past_key_values")
        if kwargs.get("is_first_iteration") and isinstance(cache, RollbackCache):
            if cache.is_assistants:  # afterwards it may be rolled back to the prompt's last token but one
                cache.skip(input_ids.shape[1] - cache.get_seq_length() - 2)
            elif cache.inputs_are_whole and kwargs.get("next_sequence_length", 0) is None:
                kwargs["next_sequence_length"] = input_ids.shape[1] - cache.get_seq_length()
            cache.inputs_are_whole = False
        return theirs(self, input_ids, *args, **kwargs)

    return ours


HOOKS: dict[str, Callable[[Method], Method]] = {
    "_validate_generation_mode": validate_mode,
    "_prepare_cache_for_generation": prepare_cache,
    "_get_candidate_generator": candidate_generator,
    "prepare_inputs_for_generation": prepare_inputs,
}

# ---- Drafts by the first layers of the model itself


class EarlyExit(EarlyExitCandidateGenerator):
    """Transformers' own, but the layers behind the exit are really left out (olmo_hybrid runs them all)."""

    def __init__(self, *, assistant_model: Any, generation_config: Any, **kwargs: Any):
        depth = generation_config.assistant_early_exit
        config = assistant_model.config.get_text_config(decoder=True)
        first = config.layer_types.index("full_attention") + 1
        if not first <= depth <= config.num_hidden_layers:
            raise ValueError(
                f"generate: requires assistant_early_exit from {first}, so that the first attention layer (number "
                f"{first}) is among the layers that draft, to {config.num_hidden_layers}; got {depth}"
            )
        super().__init__(assistant_model=assistant_model, generation_config=generation_config, **kwargs)

    def get_candidates(self, input_ids: torch.LongTensor, **kwargs: Any) -> Any:
        decoder = self.assistant_model.get_decoder()
        layers, count = decoder.layers, decoder.config.num_hidden_layers
        decoder.layers = nn.ModuleList(list(layers)[: self.assistant_early_exit])
        try:
            return super().get_candidates(input_ids, **kwargs)
        finally:
            decoder.layers, decoder.config.num_hidden_layers = layers, count


# ---- Drafts by the model's multi-token prediction layers


class Mtp(CandidateGenerator):
    """As Transformers' MTPCandidateGenerator, for any number of drafts; the weights are read once per model.

    The number is `num_assistant_tokens`, of this call or of the model's generation config; without one, it is the
    number of MTP layers. Beyond those the last layer is used again, as engines do. With `prompt_lookup_num_tokens` as
    well, so many tokens at most are added of what followed the last three earlier in the text, drafts among them.

    Depth d of the chain reads, in the row of position i, the hidden state of depth d - 1 there and token i + 1 + d.
    So the last n - 1 rows of n depths have read drafts; unless those were right, they are computed anew.
    """

    requires_model_outputs = True

    def __init__(
        self, main_model: Any, generation_config: Any, logits_processor: Any, input_ids: torch.Tensor
    ):
        trained = getattr(main_model.config.get_text_config(decoder=True), "num_mtp_layers", None)
        if not trained:
            raise ValueError(
                f"generate: requires a model with MTP layers (num_mtp_layers in its config) for use_mtp; got a "
                f"{type(main_model).__name__} without. Use assistant_model or prompt_lookup_num_tokens"
            )
        count = generation_config.num_assistant_tokens
        if count is None or count == _DRAFTS:
            count = main_model.generation_config.num_assistant_tokens or trained
        self.model_kwargs_overrides: dict[str, Any] = {}
        self._count = count
        self._model = _mtp_model(main_model, count)
        self._device = next(self._model.layers.parameters()).device
        self._cache = with_rollback(MtpCache(config=self._model.config))
        self._cache.activate_past_recording()
        self._normed = _LastHidden(main_model.get_decoder().norm)
        self._hidden: torch.Tensor | None = None  # the main model's, at the last positions [1, n, hidden]
        self._do_sample = generation_config.do_sample
        self._needs_logits = self._do_sample or generation_config.assistant_ensemble_weight is not None
        self._logits_processor = logits_processor
        self._max_length = generation_config.max_length
        self._lookup = None
        if generation_config.prompt_lookup_num_tokens is not None:
            ends = generation_config._eos_token_tensor
            self._lookup = Lookup(
                input_ids[0].tolist(),
                generation_config.prompt_lookup_num_tokens,
                [] if ends is None else ends.tolist(),
            )

    def get_candidates(
        self,
        input_ids: torch.LongTensor,
        model_kwargs: Any = None,
        model_outputs: Any = None,
        is_first_iteration: bool = False,
        n_last_matches: int = 0,
        **_: Any,
    ) -> tuple[Any, Any]:
        known = None if is_first_iteration else self._normed.take().to(self._device)
        self._normed.catch_next()
        if known is None:  # there is no hidden state to draft from: the prompt goes first
            return input_ids, None
        redo = 0
        if self._hidden is None:
            self._hidden = known
        else:
            known = known[:, : n_last_matches + 1]  # those behind are of drafts that were wrong
            if n_last_matches < self._count - 1:
                redo = min(self._count - 1, self._hidden.shape[1])
                self._cache.crop(-redo)
            self._hidden = torch.cat((self._hidden, known), 1)
        rows = redo + known.shape[1]
        ids, logits = self._model.draft(
            input_ids,
            self._hidden[:, -rows:],
            model_kwargs["position_ids"][:, -rows:],
            self._cache,
            self._do_sample,
            self._logits_processor,
        )
        self._hidden = self._hidden[:, max(0, self._hidden.shape[1] - self._count) :]
        if self._lookup is not None:
            self._lookup.extend(input_ids[0, len(self._lookup.tokens) :].tolist())
            room = self._max_length - ids.shape[1] - 1
            if more := self._lookup.after(ids[0, input_ids.shape[1] :].tolist(), room):
                ids = torch.cat((ids, ids.new_tensor([more])), -1)
                if self._needs_logits:  # these tokens are certain
                    sure = logits.new_full((1, len(more), logits.shape[-1]), -torch.inf)
                    sure[0, torch.arange(len(more)), more] = 0
                    logits = torch.cat((logits, sure), 1)
        return ids, logits

    def update_candidate_strategy(self, *_: Any, **__: Any) -> None:
        """Nothing to adapt."""


class _LastHidden:
    """What a model's last norm gives in its next forward; the hook is there no longer than that."""

    def __init__(self, norm: nn.Module):
        self._norm = norm
        self._hook: Any = None
        self._found: torch.Tensor | None = None

    def catch_next(self) -> None:
        def found(module: Any, inputs: Any, output: torch.Tensor) -> None:
            self._hook.remove()
            self._found = output

        self._hook = self._norm.register_forward_hook(found)

    def take(self) -> torch.Tensor:
        assert self._found is not None
        found, self._found = self._found, None
        return found


class Lookup:
    """What followed the same tokens earlier in a text; the latest place counts.

    Args:
        tokens: the text.
        most: how many tokens `after` gives.
        ends: tokens that nothing is to follow.
        match: how many tokens must be the same.
    """

    def __init__(self, tokens: list[int], most: int, ends: list[int], match: int = 3):
        self.tokens: list[int] = []
        self._most, self._ends, self._match = most, ends, match
        self._places: dict[tuple[int, ...], int] = {}
        """Where the text went on after `match` tokens."""
        self.extend(tokens)

    def extend(self, tokens: list[int]) -> None:
        """The text goes on."""
        for token in tokens:
            self._places[tuple(self.tokens[-self._match :])] = len(self.tokens)
            self.tokens.append(token)

    def after(self, drafts: list[int], room: int) -> list[int]:
        """What may follow the text and these drafts: as many tokens as there is room for, or fewer."""
        last = (*self.tokens[-self._match :], *drafts)[-self._match :]
        place = self._places.get(last)
        if place is None or len(last) < self._match or any(token in self._ends for token in drafts):
            return []
        found: list[int] = []
        for at in range(place, place + min(self._most, room)):
            beyond = at - len(self.tokens)
            token = (
                self.tokens[at] if beyond < 0 else (*drafts, *found)[beyond]
            )  # a repetition repeats itself
            if token in self._ends:
                break
            found.append(token)
        return found


class _MtpModel(MtpModel):
    """Transformers' own, for any number of drafts; what its layers share is computed once per round."""

    def draft(
        self,
        input_ids: torch.Tensor,
        hidden: torch.Tensor,
        position_ids: torch.Tensor,
        cache: Any,
        do_sample: bool,
        logits_processor: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add a token per layer to all tokens [1, L]; returns them and the logits [1, drafts, vocabulary].

        `hidden` [1, rows, hidden] and `position_ids` [1, rows] belong to the last tokens. The same as
        MtpModel.forward, whose logits go without the processors in Transformers 5.15.
        """
        rows, depth = hidden.shape[1], len(self.layers)
        embeds = self.embed_tokens(input_ids[:, -rows:]).to(hidden.device)
        last = position_ids[:, -1:]
        position_ids = torch.cat((position_ids, last + torch.arange(1, depth, device=last.device)), -1)
        shared = self.rotary_emb is not None and not getattr(self, "has_per_layer_rope", False)
        rotary = self.rotary_emb(embeds, position_ids=position_ids) if shared else None
        if rotary is not None and not (
            isinstance(rotary, tuple) and all(x.ndim == 3 and x.shape[1] == rows + depth - 1 for x in rotary)
        ):
            shared = False
        masks, found = None, []
        for i, layer in enumerate(self.layers):
            positions = position_ids[:, i : i + rows]
            angles = tuple(x[:, i : i + rows] for x in rotary) if shared and rotary is not None else None
            if not shared and self.rotary_emb is not None:
                kind = (
                    {"layer_type": self.config.layer_types[i]}
                    if getattr(self, "has_per_layer_rope", False)
                    else {}
                )
                angles = self.rotary_emb(embeds, position_ids=positions, **kind)
            # All layers see as many tokens, and attention layers have as many in the cache.
            if masks is None or not self._alike(i, cache):
                masks = self.create_masks_for_mtp_layer(i, embeds, cache, positions)
            hidden = layer(
                embeds,
                hidden,
                position_embeddings=angles,
                position_ids=positions,
                past_key_values=cache,
                **masks,
            )
            if self.use_shared_post_norm:
                hidden = self.shared_post_norm(hidden)
            logits = self._project_to_logits(hidden[:, -1:])[:, -1].to(input_ids.device, torch.float32)
            if logits_processor:
                logits = logits_processor(input_ids, logits)
            found.append(logits)
            if do_sample:
                token = torch.multinomial(logits.softmax(-1), num_samples=1)
            else:
                token = logits.argmax(-1, keepdim=True)
            input_ids = torch.cat((input_ids, token), -1)
            if i + 1 < depth:
                embeds = torch.cat((embeds[:, 1:], self.embed_tokens(token).to(embeds.device)), 1)
        return input_ids, torch.stack(found, 1)

    def _alike(self, layer: int, cache: Any) -> bool:
        """Whether the mask of a layer is that of the layer before."""
        kinds = self.config.layer_types
        return (
            (kinds is None or kinds[layer] == kinds[layer - 1] == "full_attention")
            and isinstance(cache.layers[layer], CacheLayerMixin)
            and cache.layers[layer].get_seq_length() == cache.layers[layer - 1].get_seq_length()
        )


_mtp_models: weakref.WeakKeyDictionary[Any, dict[int, _MtpModel]] = weakref.WeakKeyDictionary()
"""Per model: its MTP model by the number of drafts. Reading the weights takes as long as generating some text."""


def _mtp_model(main_model: Any, count: int) -> _MtpModel:
    weight = next(main_model.get_decoder().layers[-1].parameters())
    known = _mtp_models.setdefault(main_model, {})
    trained = main_model.config.get_text_config(decoder=True).num_mtp_layers
    base = known.get(trained)
    if base is not None:
        ours = next(base.layers.parameters())
        if (ours.device, ours.dtype) != (weight.device, weight.dtype):
            known.clear()
            base = None
    if base is None:
        patterns = main_model._keys_to_ignore_on_load_unexpected or [r"^mtp\."]  # kimi_linear has none
        model = MtpModel.from_pretrained(
            _As(main_model, _keys_to_ignore_on_load_unexpected=patterns), device_map={"": weight.device}
        ).eval()
        model.__class__ = _MtpModel  # only now: weights are found for Transformers' own classes
        base = known[trained] = model
    if count not in known:
        known[count] = _of_depth(base, count)
    known[count].tie_with_main_model(main_model)
    return known[count]


def _of_depth(base: _MtpModel, count: int) -> _MtpModel:
    """The same weights for `count` drafts: the first layers, or all and the last one again and again."""
    last = len(base.layers) - 1
    model = copy.copy(base)
    model._modules = dict(base._modules)
    model.config = config = copy.deepcopy(base.config)
    config.num_hidden_layers = model.num_mtp_layers = count
    for name in ("layer_types", "mlp_layer_types"):
        if (types := getattr(config, name, None)) is not None:
            setattr(config, name, [*types[:count], *[types[-1]] * (count - len(types))])
    layers = list(base.layers[:count])
    shared = {id(x): x for x in (*base.layers[last].parameters(), *base.layers[last].buffers())}
    for index in range(len(layers), count):  # only its place in the cache is its own
        layer = copy.deepcopy(base.layers[last], dict(shared))
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
        layers.append(layer)
    model.layers = nn.ModuleList(layers)
    return model
