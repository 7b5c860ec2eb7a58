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

Method = Callable[..., Any]

_LAST_HIDDEN = -1 if tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 23) else True
"""What asks a forward for its last hidden states; up to 5.22 it is all or none."""
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
    def ours(self: Any, *args: Any, **kwargs: Any) -> Any:
        return theirs(_As(self, _is_stateful=False), *args, **kwargs)

    return ours


def prepare_cache(theirs: Method) -> Method:
    """Where tokens may be dropped, make a RollbackCache; one given by the user must be that."""

    @functools.wraps(theirs)
    def ours(
        self: Any, generation_config: Any, model_kwargs: Any, generation_mode: Any, *args: Any, **kwargs: Any
    ) -> Any:
        cache = model_kwargs.get("past_key_values")
        assistant = bool(generation_config.is_assistant)
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
        if generation_config.use_mtp and generation_config.prompt_lookup_num_tokens is None:
            return _counted(Mtp(self, generation_config, kwargs.get("logits_processor")))
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
    number of MTP layers. Beyond those the last layer is used again, as engines do.

    Depth d of the chain reads, in the row of position i, the hidden state of depth d - 1 there and token i + 1 + d.
    So the last n - 1 rows of n depths have read drafts; unless those were right, they are computed anew.
    """

    requires_model_outputs = True

    def __init__(self, main_model: Any, generation_config: Any, logits_processor: Any):
        trained = getattr(main_model.config.get_text_config(decoder=True), "num_mtp_layers", None)
        if not trained:
            raise ValueError(
                f"generate: requires a model with MTP layers (num_mtp_layers in its config) for use_mtp; got a "
                f"{type(main_model).__name__} without. Use assistant_model or prompt_lookup_num_tokens"
            )
        count = generation_config.num_assistant_tokens
        if count is None or count == _DRAFTS:
            count = main_model.generation_config.num_assistant_tokens or trained
        self.model_kwargs_overrides = {"output_hidden_states": _LAST_HIDDEN}
        self._count = count
        self._model = _mtp_model(main_model, count)
        self._cache = with_rollback(MtpCache(config=self._model.config))
        self._cache.activate_past_recording()
        self._hidden: torch.Tensor | None = None  # the main model's, at the last positions [1, n, hidden]
        self._do_sample = generation_config.do_sample
        self._logits_processor = logits_processor

    def get_candidates(
        self,
        input_ids: torch.LongTensor,
        model_kwargs: Any = None,
        model_outputs: Any = None,
        is_first_iteration: bool = False,
        n_last_matches: int = 0,
        **_: Any,
    ) -> tuple[Any, Any]:
        if is_first_iteration:  # there is no hidden state to draft from: the prompt goes first
            return input_ids, None
        hidden = model_outputs.hidden_states[-1].to(next(self._model.layers.parameters()).device)
        redo = 0
        if self._hidden is None:
            self._hidden = hidden
        else:
            hidden = hidden[:, : n_last_matches + 1]  # those behind are of drafts that were wrong
            if n_last_matches < self._count - 1:
                redo = min(self._count - 1, self._hidden.shape[1])
                self._cache.crop(-redo)
            self._hidden = torch.cat((self._hidden, hidden), 1)
        rows = redo + hidden.shape[1]
        ids, logits, *_rest = self._model(
            input_ids=input_ids[:, -rows:],
            last_hidden_states=self._hidden[:, -rows:],
            attention_mask=None,
            position_ids=model_kwargs["position_ids"][:, -rows:],
            mtp_cache=self._cache,
            do_sample=self._do_sample,
            logits_processor=self._logits_processor,
            full_input_ids=input_ids,
        )
        self._hidden = self._hidden[:, max(0, self._hidden.shape[1] - self._count) :]
        return torch.cat((input_ids, ids), -1), logits

    def update_candidate_strategy(self, *_: Any, **__: Any) -> None:
        """Nothing to adapt."""


class _MtpModel(MtpModel):
    """Transformers' own, for any number of drafts; masks are made once per round."""

    _masks: tuple[Any, Any] = (None, None)

    def create_masks_for_mtp_layer(
        self, layer_idx: int, inputs_embeds: Any, mtp_cache: Any, position_ids: Any
    ) -> Any:
        # All layers see as many tokens, and have as many in the cache: only the first makes a mask.
        kind = None if self.config.layer_types is None else self.config.layer_types[layer_idx]
        key = (
            (kind, inputs_embeds.shape, mtp_cache.layers[layer_idx].get_seq_length())
            if (isinstance(mtp_cache.layers[layer_idx], CacheLayerMixin))
            else None
        )
        if key is None or key != self._masks[0]:
            masks = super().create_masks_for_mtp_layer(layer_idx, inputs_embeds, mtp_cache, position_ids)
            self._masks = (key, masks)
        return self._masks[1]


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
