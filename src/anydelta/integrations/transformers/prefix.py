"""Prefix checkpoints: a beginning that prompts share is computed once.

    store = PrefixStore(model)
    cache = store.cache_for(ids)                             # runs what no checkpoint covers, and keeps the result
    out = model.generate(ids, past_key_values=cache)
    store.add(out, cache)                                    # the next turn begins after the answer

A hybrid model's cache cannot be cut back to a shared prefix as a KV cache can: the recurrent state at that point must
be kept. A checkpoint holds it, with the convolution windows and the attention layers' keys and values.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import torch
from transformers import cache_utils
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionCacheLayerMixin

from ...state.files import File, safetensors
from .cache import CACHE, POSITIONS, ROLLBACK, RollbackCache
from .tensor_parallel import ranks_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

FORMAT = "anydelta prefix 1"
_NAME = re.compile(
    r"(?P<layer>[0-9]{1,6})\.(?:(?P<kind>keys|values|indexer|positions)|(?P<state>conv|recurrent)\.(?P<index>[0-9]))"
)
_AXES = {"keys": 4, "values": 4, "indexer": 3, "positions": 3, "conv": 3, "recurrent": 4}
_PARTNER = {
    "keys": "values", "values": "keys", "indexer": "keys", "positions": "indexer", "conv": "recurrent",
    "recurrent": "conv",
}  # fmt: skip
"""Tensors that come in pairs. Windows after the first have no partner."""
_FACTS = (
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "layer_types",
    "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps", "hidden_act", "rope_parameters",
    "linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim",
    "linear_num_heads", "linear_head_dim", "linear_conv_kernel_dim", "linear_allow_neg_eigval",
    "kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim",
    "num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size",
)  # fmt: skip
"""The fields of a config that tell one model from another."""
_MORE = (
    "linear_lower_bound", "kda_safe_gate", "kda_lower_bound", "output_gate_type", "hc_mult", "hc_count", "index_topk",
    "index_kpool", "index_n_heads", "indexer_types", "indexer_budget", "indexer_compress_ratio", "indexer_n_heads",
    "ple_layer_ids", "ngram_size", "heads_per_ngram", "ngram_vocab_size_base", "seed",
)  # fmt: skip
"""The same for later families. They count only if a config has them, so that older digests stay valid."""
_GROWING = (DynamicLayer, getattr(cache_utils, "DynamicIndexedLayer", DynamicLayer))
"""Attention layers that keep all tokens."""
_INDEXER = {"indexer": "indexer_keys", "positions": "indexer_position_ids"}
_lock = threading.Lock()
"""Guards the lists of all stores; models run without it. (Stores with their own locks could not be copied.)"""


@dataclass(frozen=True)
class Checkpoint:
    """A model's cache after some tokens; it never changes."""

    tokens: tuple[int, ...]
    tensors: dict[str, torch.Tensor]
    """By name: "layer.keys", "layer.values", "layer.indexer" and "layer.positions" (of attention that chooses its
    tokens), "layer.conv.i" and "layer.recurrent.i". The batch is one row."""
    model: str | None = None
    """`fingerprint` of its model's config; None if unknown."""
    file: str | None = None
    """Where it was loaded from."""

    @classmethod
    def take(cls, input_ids: torch.Tensor, cache: RollbackCache) -> Checkpoint:
        """The cache as it is now. `input_ids` [1, T] begins with the tokens that the cache holds.

        States are copied. Keys and values are not: a DynamicCache appends to copies of them.

        Raises:
            ValueError: the cache is empty, holds more tokens than `input_ids`, more than one row, or layers of another
                kind.
        """
        held = cache.get_seq_length()
        if input_ids.ndim != 2 or input_ids.shape[0] != 1 or not 0 < held <= input_ids.shape[1]:
            raise ValueError(
                f"Checkpoint: requires input_ids [1, T] that begin with the cache's {held} tokens, at least one; got "
                f"{tuple(input_ids.shape)}"
            )
        tensors: dict[str, torch.Tensor] = {}
        positions = getattr(cache, POSITIONS, None)
        for i, layer in enumerate(cache.layers):
            if isinstance(layer, LinearAttentionCacheLayerMixin):
                for j in range(layer.number_of_states):
                    if layer.has_previous_state[j]:
                        tensors[f"{i}.conv.{j}"] = layer.conv_states[j].clone()
                    if layer.has_previous_state[j] and layer.recurrent_states[j] is not None:
                        tensors[f"{i}.recurrent.{j}"] = layer.recurrent_states[j].clone()
            elif isinstance(layer, DynamicSlidingWindowLayer):  # a recording cache holds more than the window
                begin = max(0, layer.keys.shape[-2] - layer.sliding_window + 1)
                tensors[f"{i}.keys"] = layer.keys[..., begin:, :].clone()
                tensors[f"{i}.values"] = layer.values[..., begin:, :].clone()
            elif type(layer) in _GROWING:
                tensors[f"{i}.keys"], tensors[f"{i}.values"] = layer.keys, layer.values
                for kind, name in _INDEXER.items():
                    if getattr(layer, name, None) is not None:
                        tensors[f"{i}.{kind}"] = getattr(layer, name)
                if positions is not None and f"{i}.indexer" in tensors:
                    tensors[f"{i}.positions"], positions = positions, None
            else:
                raise ValueError(
                    f"Checkpoint: requires attention layers that keep all tokens, or a window of them; got a "
                    f"{type(layer).__name__}. It is not supported"
                )
        config = getattr(cache, "config", None)
        model = None if config is None else fingerprint(config)
        return cls(tuple(input_ids[0, :held].tolist()), tensors, model)

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(x.nbytes for x in self.tensors.values())

    def cache(self, config: PreTrainedConfig, rollback: int = ROLLBACK) -> RollbackCache:
        """A new cache that continues from here; `config` is the model's.

        Raises:
            ValueError: the checkpoint is of another model.
        """
        self.check(config)
        cache = RollbackCache(config=config, rollback=rollback)
        for name, x in sorted(self.tensors.items()):  # keys before values
            index, kind, *state = name.split(".")
            layer = cache.layers[int(index)]
            if kind in ("keys", "values"):
                if kind == "keys":
                    layer.lazy_initialization(x, self.tensors[f"{index}.values"])
                    if hasattr(layer, "cumulative_length"):
                        layer.cumulative_length = len(self.tokens)
                setattr(layer, kind, x)
                continue
            if kind in _INDEXER:
                if kind == "indexer":
                    layer.lazy_initialization_indexer(x)
                if hasattr(layer, _INDEXER[kind]):
                    setattr(layer, _INDEXER[kind], x)
                else:
                    setattr(cache, POSITIONS, x)
                continue
            i = int(state[0])
            (layer.conv_states if kind == "conv" else layer.recurrent_states)[i] = x.clone()
            if kind == "conv":
                if not i:
                    layer.dtype, layer.device = x.dtype, x.device
                layer.conv_kernel_size[i] = x.shape[-1]
                layer.is_conv_states_initialized[i] = layer.has_previous_state[i] = True
            else:
                layer.is_recurrent_states_initialized[i] = True
        return cache

    def check(self, config: PreTrainedConfig, dtype: torch.dtype | None = None) -> None:
        """Whether a model with this config, and of this dtype, can continue from here.

        Raises:
            ValueError: it cannot.
        """
        text = config.get_text_config(decoder=True)
        if self.model is not None and self.model != fingerprint(config):
            ranks = ranks_of(config)
            self._refuse(
                text, "another config" if ranks is None else f"another config, or one that is not of {ranks}"
            )
        if max(self.tokens, default=0) >= text.vocab_size:
            self._refuse(text, f"token {max(self.tokens)} of a vocabulary of {text.vocab_size}")
        want = _shapes(text, len(self.tokens))
        if missing := sorted(set(want) ^ set(self.tensors)):
            self._refuse(text, f"other layers: {missing[0]} is in one of them only")
        for name, x in self.tensors.items():
            if tuple(x.shape) not in want[name]:
                self._refuse(text, f"{name} of {list(x.shape)} instead of {list(want[name][0])}")
            if ".conv." in name and not x.is_floating_point() and int(x.max()) >= text.vocab_size:
                self._refuse(text, f"{name} with token {int(x.max())} of a vocabulary of {text.vocab_size}")
            if dtype is not None and ".recurrent." not in name and x.is_floating_point() and x.dtype != dtype:
                self._refuse(text, f"{name} of {x.dtype} instead of {dtype}")

    def _refuse(self, text: PreTrainedConfig, got: str) -> NoReturn:
        where = "" if self.file is None else f"{self.file}, "
        raise ValueError(
            f"Checkpoint: requires the states of a {text.model_type} model with exactly this config; got {where}{got}. "
            "Take a new checkpoint with this model"
        )

    def save(self, path: str | Path) -> None:
        """Write it to a safetensors file."""
        tensors = {name: x.contiguous() for name, x in self.tensors.items()}
        facts = {"format": FORMAT, "tokens": json.dumps(self.tokens)}
        if self.model is not None:
            facts["model"] = self.model
        safetensors("Checkpoint.save", "torch").save_file(tensors, path, metadata=facts)

    @classmethod
    def load(
        cls, path: str | Path, device: str | torch.device = "cpu", config: PreTrainedConfig | None = None
    ) -> Checkpoint:
        """Read a file of `save`, for the model with this config. Without a config, `cache` compares it later.

        Raises:
            ValueError: there is no such file, or it is not a complete file of `save` with finite numbers, or it is of
                another model.
        """
        file = File("Checkpoint.load", path, FORMAT, "torch")
        tokens = file.tokens("tokens", file.parsed("tokens"))
        if not tokens:
            file.refuse("no tokens")
        dtypes = set()
        for name in file.arrays:
            match = _NAME.fullmatch(name)
            if match is None:
                file.refuse(f"an array {name!r}, which is of no layer")
            kind = match["kind"] or match["state"]
            whole = kind == "positions" or (match["index"] not in (None, "0") and kind == "conv")
            whole = whole and file.arrays[name].dtype == torch.int64
            x = file.check(name, 2 if whole and kind == "conv" else _AXES[kind], whole)
            partner = name.replace(kind, _PARTNER[kind])
            if partner not in file.arrays and not (kind == "conv" and match["index"] != "0"):
                file.refuse(f"{name!r} without its {_PARTNER[kind]}")
            rows = x.shape[1 if kind == "positions" else 0]
            lengths = [_length(kind, x)] if kind in ("keys", "values", "indexer", "positions") else []
            if kind == "keys":
                lengths.append(_length(kind, file.arrays[partner]))
            if rows != 1 or max(lengths, default=0) > len(tokens) or len(set(lengths)) > 1:
                file.refuse(f"{name!r} of {list(x.shape)} for one row of {len(tokens)} tokens")
            if kind == "recurrent" and x.dtype not in (torch.float32, torch.bfloat16):
                file.refuse(f"{name!r} of {x.dtype}, where states are float32")
            if whole and not 0 <= int(x.min()) <= int(x.max()) < 1 << 31:
                file.refuse(f"{name!r} with numbers from {int(x.min())} to {int(x.max())}")
            if kind != "recurrent" and not whole:
                dtypes.add(x.dtype)
        if len(dtypes) != 1:
            file.refuse(f"arrays of {', '.join(map(str, dtypes)) or 'no type'}, where a model has one type")
        tensors = {name: x.to(device) for name, x in file.arrays.items()}
        out = cls(tokens, tensors, file.metadata.get("model"), file.path)
        if config is not None:
            out.check(config)
        return out


def fingerprint(config: PreTrainedConfig) -> str:
    """A digest of what a model's config says about its layers, the same in all releases of Transformers."""
    text = config.get_text_config(decoder=True)
    facts = {name: getattr(text, name, None) for name in _FACTS}
    facts |= {name: found for name in _MORE if (found := getattr(text, name, None)) is not None}
    if "sliding_attention" in (text.layer_types or ()):
        facts["sliding_window"] = text.sliding_window
    if (ranks := ranks_of(config)) is not None:  # a checkpoint has the heads of one process
        facts["ranks"] = tuple(ranks)
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _shapes(config: PreTrainedConfig, tokens: int) -> dict[str, tuple[tuple[int, ...], ...]]:
    """The possible shapes of a checkpoint's tensors, by name."""
    W = config.linear_conv_kernel_dim
    if hasattr(config, "linear_num_heads"):
        HV, K, V = config.linear_num_heads, config.linear_head_dim, config.linear_head_dim
        C = 3 * HV * K
    else:
        HV, K, V = config.linear_num_value_heads, config.linear_key_head_dim, config.linear_value_head_dim
        C = 2 * config.linear_num_key_heads * K + HV * V
    heads = config.num_key_value_heads
    D = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    keys, values = [(heads, D)], [(heads, D)]
    if (
        rank := getattr(config, "kv_lora_rank", None)
    ) is not None:  # latent attention: compressed, or expanded
        rope = config.qk_rope_head_dim
        keys = [(1, rank), (heads, config.qk_nope_head_dim + rope)]
        values = [(1, rope), (heads, config.v_head_dim)]
    if (ranks := ranks_of(config)) is not None:
        C, HV = C // ranks.size, HV // ranks.size
        for places in (keys, values):  # split as well, or whole in every process
            places += [(h // ranks.size, d) for h, d in places if h % ranks.size == 0]
    found: dict[str, tuple[tuple[int, ...], ...]] = {}
    chosen = False
    for i, layer in enumerate(RollbackCache(config=config).layers):
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            found[f"{i}.conv.0"] = ((1, C, W), (1, C, W - 1))
            found[f"{i}.recurrent.0"] = ((1, HV, K, V),)
            if i + 1 in (
                getattr(config, "ple_layer_ids", None) or ()
            ):  # qwen4_exp's n-grams: values and tokens
                width = (config.ple_conv_kernel_size - 1) * config.ngram_size
                found[f"{i}.conv.1"] = ((1, config.hc_count * config.hidden_size, width),)
                found[f"{i}.conv.2"] = ((1, config.ngram_size - 1),)
            continue
        held = min(tokens, layer.sliding_window - 1) if getattr(layer, "is_sliding", False) else tokens
        found[f"{i}.keys"] = tuple((1, h, held, d) for h, d in keys)
        found[f"{i}.values"] = tuple((1, h, held, d) for h, d in values)
        if (
            hasattr(layer, "indexer_keys")
            and (getattr(config, "indexer_types", None) or {i: "full"})[i] == "full"
        ):
            own = getattr(
                config, "indexer_head_dim", None
            )  # glm5_next: keys, scores, and whether there is a token
            found[f"{i}.indexer"] = ((1, tokens, own or 2 * config.index_head_dim + 1),)
            if own and not chosen:  # qwen4_exp: one for all layers
                found[f"{i}.positions"] = ((3, 1, tokens),)
            chosen = True
    return found


def _length(kind: str, x: torch.Tensor) -> int:
    """The number of tokens in an attention layer's tensor."""
    return x.shape[{"indexer": 1, "positions": 2}.get(kind, -2)]


class PrefixStore:
    """Checkpoints of one model, found by the first tokens of a prompt. The least recently used are dropped first.

    Threads may share one.

    Args:
        model: a model that generates, of a family that anydelta knows.
        max_bytes: the most that all checkpoints may take. None: no limit.
        rollback: of the caches that it returns.
    """

    def __init__(self, model: PreTrainedModel, max_bytes: int | None = None, rollback: int = ROLLBACK):
        self.model = model
        self.max_bytes = max_bytes
        self.rollback = rollback
        self._kept: OrderedDict[tuple[int, ...], Checkpoint] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def nbytes(self) -> int:
        """Bytes of all checkpoints; shared keys and values count for each."""
        with _lock:
            return sum(c.nbytes for c in self._kept.values())

    def add(self, input_ids: torch.Tensor, cache: RollbackCache) -> Checkpoint:
        """Keep the cache as it is now; `input_ids` [1, T] begins with the tokens that the cache holds."""
        return self.put(Checkpoint.take(input_ids, cache))

    def put(self, checkpoint: Checkpoint) -> Checkpoint:
        """Keep a checkpoint, such as a loaded one.

        Raises:
            ValueError: it was loaded, and is of another model.
        """
        if checkpoint.file is not None:
            checkpoint.check(self.model.config, self.model.dtype)
        with _lock:
            self._kept[checkpoint.tokens] = checkpoint
            self._kept.move_to_end(checkpoint.tokens)
            held = 0 if self.max_bytes is None else sum(c.nbytes for c in self._kept.values())
            while self.max_bytes is not None and held > self.max_bytes and len(self._kept) > 1:
                held -= self._kept.popitem(last=False)[1].nbytes
        return checkpoint

    def find(self, input_ids: torch.Tensor) -> Checkpoint | None:
        """The longest checkpoint that is a prefix of these tokens [1, T] and leaves at least one to run.

        Raises:
            ValueError: `input_ids` is not one row of integers.
        """
        if not isinstance(input_ids, torch.Tensor) or input_ids.ndim != 2 or input_ids.shape[0] != 1:
            got = list(input_ids.shape) if isinstance(input_ids, torch.Tensor) else type(input_ids).__name__
            raise ValueError(f"PrefixStore: requires input_ids [1, T]; got {got}")
        if input_ids.is_floating_point() or not input_ids.shape[1]:
            raise ValueError(
                f"PrefixStore: requires input_ids [1, T] of integers, at least one; got {input_ids.dtype} "
                f"{list(input_ids.shape)}"
            )
        tokens = tuple(input_ids[0].tolist())
        with _lock:
            fits = [t for t in self._kept if len(t) < len(tokens) and tokens[: len(t)] == t]
            if not fits:
                return None
            best = max(fits, key=len)
            self._kept.move_to_end(best)
            return self._kept[best]

    def cache_for(self, input_ids: torch.Tensor) -> RollbackCache:
        """A cache that holds all of these tokens [1, T] except the last, for `generate` to continue from.

        Tokens after the nearest checkpoint are run, and the result is kept as another checkpoint.

        Raises:
            ValueError: as `find`.
        """
        found = self.find(input_ids)
        config = self.model.config.get_text_config(decoder=True)
        cache = (
            RollbackCache(config=config, rollback=self.rollback)
            if found is None
            else found.cache(config, self.rollback)
        )
        known = 0 if found is None else len(found.tokens)
        if known < input_ids.shape[1] - 1:
            with torch.no_grad():
                self.model(
                    input_ids=input_ids[:, known:-1], **{CACHE: cache}, use_cache=True, logits_to_keep=1
                )
            self.add(input_ids, cache)
        return cache
