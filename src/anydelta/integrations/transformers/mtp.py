"""Drafts by a model's multi-token prediction (MTP) layers, for `generate` in .generate."""

from __future__ import annotations

import copy
import threading
import weakref
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn
from transformers.cache_utils import CacheLayerMixin, MtpCache
from transformers.generation.candidate_generator import CandidateGenerator
from transformers.generation.configuration_utils import GenerationConfig
from transformers.modeling_layers import MtpModel
from transformers.utils import output_capturing

from . import gguf, gguf_mtp
from .cache import CACHE
from .copies import copy_for_call

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel
    from transformers.cache_utils import Cache
    from transformers.generation.logits_process import LogitsProcessorList

_DRAFTS = GenerationConfig._get_default_generation_params().get("num_assistant_tokens")


def check_mtp(model: PreTrainedModel, config: GenerationConfig) -> None:
    """Refuse a model or a number of drafts that `Mtp` cannot work with."""
    text = model.config.get_text_config(decoder=True)
    if not getattr(text, "num_mtp_layers", None):
        raise ValueError(
            f"generate: requires a model with MTP layers (num_mtp_layers in its config) for use_mtp; got a "
            f"{type(model).__name__} without them. Use assistant_model or prompt_lookup_num_tokens"
        )
    kinds = getattr(text, "mtp_layer_types", None) or ()
    if not kinds and getattr(text, "layer_types", None) is not None:
        raise ValueError(
            f"generate: requires mtp_layer_types in the config of {type(model).__name__} for use_mtp, because its "
            "layers are of several kinds; got none. Set model.config.mtp_layer_types, or use prompt_lookup_num_tokens"
        )
    if others := [kind for kind in kinds if kind != "full_attention"]:
        raise ValueError(
            f"generate: requires MTP layers of full_attention for use_mtp; got {others[0]} in mtp_layer_types, which "
            "Transformers' MTP layers cannot run. Use assistant_model or prompt_lookup_num_tokens"
        )
    if not hasattr(MtpModel, "forward_layer"):
        raise ValueError(
            "generate: requires a transformers that can read the MTP layers of this family (5.20 or later) for use_mtp"
            f"; got {transformers.__version__}. Use assistant_model or prompt_lookup_num_tokens"
        )
    if (count := _count(model, config)) < 1:
        raise ValueError(f"generate: requires num_assistant_tokens of at least 1 for use_mtp; got {count}")


def _count(model: PreTrainedModel, config: GenerationConfig) -> int:
    """How many tokens to draft at a time."""
    count = config.num_assistant_tokens
    if count is None or count == _DRAFTS:
        trained = model.config.get_text_config(decoder=True).num_mtp_layers
        count = model.generation_config.num_assistant_tokens or trained
    return int(count)


class Mtp(CandidateGenerator):
    """As Transformers' MTPCandidateGenerator, for any number of drafts; the weights are read once per model.

    The number is `num_assistant_tokens` of this call or of the model's generation config, by default the number of MTP
    layers. For more drafts the last layer is used again, as engines do. With `prompt_lookup_num_tokens`, up to that
    many tokens are added: those that followed the last three tokens, drafts included, earlier in the text.

    In the row of position i, depth d of the chain reads the hidden state of depth d - 1 there and token i + 1 + d. So
    with n depths the last n - 1 rows have read drafts. Unless these were right, the rows are computed again.
    """

    def __init__(
        self,
        main_model: PreTrainedModel,
        generation_config: GenerationConfig,
        logits_processor: LogitsProcessorList,
        input_ids: torch.Tensor,
    ):
        self._count = _count(main_model, generation_config)
        self._model = _mtp_model(main_model, self._count)
        self._device = next(self._model.layers.parameters()).device
        self._cache = MtpCache(config=self._model.config)
        last = main_model.config.get_text_config(decoder=True).num_hidden_layers
        # Older Transformers cannot return single layers. It counts layers here, without the input of the first one.
        self.hidden_states = [0, last] if hasattr(output_capturing, "resolve_hidden_states_indices") else True
        """What each forward must return: the input of the first layer, and the last hidden state."""
        self._hidden = self._next = torch.empty(0)
        """At the last positions [1, n, hidden]: the hidden state, and the embedding of the next token."""
        self._do_sample = generation_config.do_sample
        self._needs_logits = (
            self._do_sample or getattr(generation_config, "assistant_ensemble_weight", None) is not None
        )
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
        **_: object,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """All tokens with the drafts after them, and the drafts' logits if they are needed."""
        # The prompt has no drafts: there is no hidden state yet to draft from.
        if is_first_iteration or input_ids.shape[1] + 1 >= self._max_length:
            return input_ids, None
        embeds, known = (model_outputs.hidden_states[i].to(self._device) for i in (0, -1))
        following = self._model.embed_tokens(input_ids[:, -n_last_matches - 1 :]).to(self._device)
        redo = 0
        if not self._hidden.numel():
            self._hidden, self._next = known, torch.cat((embeds[:, 1:], following), 1)
        else:
            known = known[:, : n_last_matches + 1]  # the later ones are of drafts that were wrong
            if n_last_matches < self._count - 1:
                redo = min(self._count - 1, self._hidden.shape[1])
                self._cache.crop(-redo)
            self._hidden = torch.cat((self._hidden, known), 1)
            self._next = torch.cat((self._next, following), 1)
        rows = redo + known.shape[1]
        ids, logits = self._model.draft(
            input_ids,
            self._next[:, -rows:],
            self._hidden[:, -rows:],
            model_kwargs["position_ids"][..., -rows:],
            self._cache,
            self._do_sample,
            self._logits_processor,
        )
        self._hidden, self._next = self._hidden[:, -self._count :], self._next[:, -self._count :]
        if self._lookup is not None:
            self._lookup.extend(input_ids[0, len(self._lookup.tokens) :].tolist())
            room = self._max_length - ids.shape[1] - 1
            if more := self._lookup.after(ids[0, input_ids.shape[1] :].tolist(), room):
                ids = torch.cat((ids, ids.new_tensor([more])), -1)
                if self._needs_logits:  # these tokens are certain
                    sure = logits.new_full((1, len(more), logits.shape[-1]), -torch.inf)
                    sure[0, torch.arange(len(more)), more] = 0
                    logits = torch.cat((logits, sure), 1)
        return ids, logits if self._needs_logits else None

    def update_candidate_strategy(self, *_: object, **__: object) -> None:
        """Nothing to adapt."""


class Lookup:
    """Finds what followed the same tokens earlier in a text, at the latest such place.

    Args:
        tokens: the text.
        most: the most tokens that `after` returns.
        ends: tokens before which a result stops.
        match: how many tokens must be the same.
    """

    def __init__(self, tokens: list[int], most: int, ends: list[int], match: int = 3):
        self.tokens: list[int] = []
        self._most, self._ends, self._match = most, ends, match
        self._places: dict[tuple[int, ...], int] = {}
        """Positions after each run of `match` tokens."""
        self.extend(tokens)

    def extend(self, tokens: list[int]) -> None:
        """Append tokens to the text."""
        for token in tokens:
            self._places[tuple(self.tokens[-self._match :])] = len(self.tokens)
            self.tokens.append(token)

    def after(self, drafts: list[int], room: int) -> list[int]:
        """What may follow the text and these drafts, at most `room` tokens."""
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
    """Transformers' own, for any number of drafts. What its layers share is computed once per round."""

    def draft(
        self,
        input_ids: torch.Tensor,
        embeds: torch.Tensor,
        hidden: torch.Tensor,
        position_ids: torch.Tensor,
        cache: Cache,
        do_sample: bool,
        logits_processor: LogitsProcessorList,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add one token per layer to all tokens [1, L]; returns them and the logits [1, drafts, vocabulary].

        `hidden` [1, rows, hidden] belongs to the tokens before the last ones, `embeds` (same shape) and `position_ids`
        [1, rows] to the last ones. With images, positions have a leading axis of three, or of four whose first is the
        text's. Same as MtpModel.forward, which does not pass the logits through the processors in Transformers 5.15.
        """
        rows, depth = hidden.shape[1], len(self.layers)
        ahead = torch.arange(1, depth, device=position_ids.device)
        position_ids = torch.cat((position_ids, position_ids[..., -1:] + ahead), -1)
        text: torch.Tensor | None = position_ids
        if position_ids.ndim == 3:
            text, position_ids = (
                (position_ids[0], position_ids[1:]) if len(position_ids) == 4 else (None, position_ids)
            )
        shared = self.rotary_emb is not None and not getattr(self, "has_per_layer_rope", False)
        rotary = self.rotary_emb(embeds, position_ids=position_ids) if shared else None
        if rotary is not None and not (
            isinstance(rotary, tuple) and all(x.ndim == 3 and x.shape[1] == rows + depth - 1 for x in rotary)
        ):
            shared = False
        masks, found = None, []
        for i, layer in enumerate(self.layers):
            positions = None if text is None else text[:, i : i + rows]
            angles = tuple(x[:, i : i + rows] for x in rotary) if shared and rotary is not None else None
            if not shared and self.rotary_emb is not None:
                kind = (
                    {"layer_type": self.config.layer_types[i]}
                    if getattr(self, "has_per_layer_rope", False)
                    else {}
                )
                angles = self.rotary_emb(embeds, position_ids=position_ids[..., i : i + rows], **kind)
            # All layers see the same number of tokens, and attention layers have as many in the cache.
            if masks is None or not self._alike(i, cache):
                masks = self.create_masks_for_mtp_layer(i, embeds, cache, positions)
            hidden = layer(
                embeds,
                hidden,
                position_embeddings=angles,
                position_ids=positions,
                **{CACHE: cache},
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

    def _alike(self, layer: int, cache: Cache) -> bool:
        """Whether a layer has the same mask as the layer before."""
        kinds = self.config.layer_types
        return (
            (kinds is None or kinds[layer] == kinds[layer - 1] == "full_attention")
            and isinstance(cache.layers[layer], CacheLayerMixin)
            and cache.layers[layer].get_seq_length() == cache.layers[layer - 1].get_seq_length()
        )


_mtp_models: weakref.WeakKeyDictionary[nn.Module, dict[int, _MtpModel]] = weakref.WeakKeyDictionary()
"""By decoder, then by the number of drafts. Reading the weights takes as long as generating some text."""
_reading = threading.Lock()


def _mtp_model(main_model: PreTrainedModel, count: int) -> _MtpModel:
    """An MTP model for `count` drafts, for this call only. Its layers are shared and never changed."""
    decoder = main_model.get_decoder()
    weight = _floating(decoder.layers[-1])
    trained = main_model.config.get_text_config(decoder=True).num_mtp_layers
    with _reading:
        known = _mtp_models.setdefault(decoder, {})
        if known:
            ours = _floating(known[trained].layers)
            if (ours.device, ours.dtype) != (weight.device, weight.dtype):
                known.clear()
        if not known:
            known[trained] = _read(main_model, weight)
        if count not in known:
            known[count] = _of_depth(known[trained], count)
        model: _MtpModel = copy_for_call(known[count])
    model.tie_with_main_model(main_model)  # its embeddings or head may have been replaced
    return model


def read(main_model: PreTrainedModel) -> MtpModel:
    """The MTP layers that are stored with the weights of a model.

    Raises:
        ValueError: there are none, or they cannot be read.
    """
    return _read(main_model, _floating(main_model.get_decoder().layers[-1]))


def _floating(module: nn.Module) -> torch.Tensor:
    """A parameter with the dtype that the module computes in; packed matrices are of bytes."""
    return next(p for p in module.parameters() if p.is_floating_point())


def _read(main_model: PreTrainedModel, weight: torch.Tensor) -> _MtpModel:
    """Read the MTP layers from the folder or the GGUF file that the model came from."""
    if (path := vars(main_model.get_decoder()).get(gguf.FILE)) is not None:
        found = gguf_mtp.read(main_model, path)
        found.__class__ = _MtpModel
        mine: _MtpModel = found
        return mine
    main = copy_for_call(main_model)
    main.config = copy.deepcopy(main.config)
    main.config.dtype = weight.dtype  # the model may have been cast, or made without a dtype
    if (
        not main._keys_to_ignore_on_load_unexpected
    ):  # kimi_linear; bailing_hybrid, whose decoder has the pattern
        decoders = getattr(main.get_decoder(), "_keys_to_ignore_on_load_unexpected", None) or ()
        main._keys_to_ignore_on_load_unexpected = [*decoders, r"^mtp\."]
    try:
        if not main.config.name_or_path:
            raise OSError("a model that was not loaded from a folder")
        model = MtpModel.from_pretrained(main, device_map={"": weight.device}).eval()
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"generate: requires the weights of the MTP layers beside those of the model for use_mtp; got: "
            f"{' '.join(str(error).split())}. Use assistant_model or prompt_lookup_num_tokens"
        ) from error
    model.__class__ = _MtpModel  # after loading: weights are found for Transformers' own classes only
    own: _MtpModel = model
    return own


def _of_depth(base: _MtpModel, count: int) -> _MtpModel:
    """The same weights for `count` drafts: the first layers, or all of them and then the last one repeatedly."""
    last = len(base.layers) - 1
    model: _MtpModel = copy_for_call(base)
    model.config = config = copy.deepcopy(base.config)
    config.num_hidden_layers = model.num_mtp_layers = count
    for name in ("layer_types", "mlp_layer_types"):
        if (types := getattr(config, name, None)) is not None:
            setattr(config, name, [*types[:count], *[types[-1]] * (count - len(types))])
    layers = list(base.layers[:count])
    shared = {id(x): x for x in (*base.layers[last].parameters(), *base.layers[last].buffers())}
    for index in range(len(layers), count):  # a copy that differs only in its place in the cache
        layer = copy.deepcopy(base.layers[last], dict(shared))
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
        layers.append(layer)
    model.layers = nn.ModuleList(layers)
    return model
