"""Prefix checkpoints: what many prompts begin with is computed once.

    store = PrefixStore(model)
    cache = store.cache_for(ids)                             # runs what no checkpoint covers, and keeps the result
    out = model.generate(ids, past_key_values=cache)
    store.add(out, cache)                                    # the next turn begins after the answer

A hybrid model's cache cannot be cut back to a shared prefix as a KV cache can: the recurrent state of that point must
have been kept. A checkpoint holds it, with the convolution windows and the attention layers' keys and values.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin

from .transformers_cache import ROLLBACK, RollbackCache

FORMAT = "anydelta prefix 1"


@dataclass(frozen=True)
class Checkpoint:
    """A model's cache after some tokens; it never changes."""

    tokens: tuple[int, ...]
    tensors: dict[str, torch.Tensor]
    """By "layer.keys", "layer.values", "layer.conv.i" and "layer.recurrent.i"; the batch is one row."""

    @classmethod
    def take(cls, input_ids: torch.Tensor, cache: RollbackCache) -> Checkpoint:
        """The cache as it is now. `input_ids` [1, T] begins with the tokens that it holds.

        States are copied. Keys and values are not: a DynamicCache appends to copies of them.

        Raises:
            ValueError: the cache is empty, holds more tokens, more than one row, or layers of another kind.
        """
        held = cache.get_seq_length()
        if input_ids.ndim != 2 or input_ids.shape[0] != 1 or not 0 < held <= input_ids.shape[1]:
            raise ValueError(
                f"Checkpoint: requires input_ids [1, T] that begin with the cache's {held} tokens, one at least; got "
                f"{tuple(input_ids.shape)}"
            )
        tensors: dict[str, torch.Tensor] = {}
        for i, layer in enumerate(cache.layers):
            if isinstance(layer, LinearAttentionCacheLayerMixin):
                for j in range(layer.number_of_states):
                    if layer.has_previous_state[j]:
                        tensors[f"{i}.conv.{j}"] = layer.conv_states[j].clone()
                        tensors[f"{i}.recurrent.{j}"] = layer.recurrent_states[j].clone()
            elif type(layer) is DynamicLayer:
                tensors[f"{i}.keys"], tensors[f"{i}.values"] = layer.keys, layer.values
            else:
                raise ValueError(
                    f"Checkpoint: requires attention layers that keep all tokens; got a {type(layer).__name__}. "
                    "Sliding windows are not supported"
                )
        return cls(tuple(input_ids[0, :held].tolist()), tensors)

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.tensors.values())

    def cache(self, config: Any, rollback: int = ROLLBACK) -> RollbackCache:
        """A new cache that goes on from here; `config` is the model's."""
        cache = RollbackCache(config=config, rollback=rollback)
        for name, x in self.tensors.items():
            index, kind, *state = name.split(".")
            layer = cache.layers[int(index)]
            if kind in ("keys", "values"):
                layer.dtype, layer.device, layer.is_initialized = x.dtype, x.device, True
                setattr(layer, kind, x)
                continue
            i = int(state[0])
            (layer.conv_states if kind == "conv" else layer.recurrent_states)[i] = x.clone()
            if kind == "conv":
                layer.dtype, layer.device = x.dtype, x.device
                layer.conv_kernel_size[i] = x.shape[-1]
                layer.is_conv_states_initialized[i] = layer.has_previous_state[i] = True
            else:
                layer.is_recurrent_states_initialized[i] = True
        return cache

    def save(self, path: str | Path) -> None:
        """To a safetensors file."""
        from safetensors.torch import save_file

        tensors = {name: x.contiguous() for name, x in self.tensors.items()}
        save_file(tensors, path, metadata={"format": FORMAT, "tokens": json.dumps(self.tokens)})

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> Checkpoint:
        """From a file that `save` wrote.

        Raises:
            ValueError: it is a safetensors file of something else.
        """
        from safetensors import safe_open

        with safe_open(path, framework="pt", device=str(device)) as file:
            facts = file.metadata() or {}
            if facts.get("format") != FORMAT:
                raise ValueError(
                    f"Checkpoint.load: requires a file that Checkpoint.save wrote ({FORMAT!r}); got {path} with "
                    f"{facts.get('format')!r}"
                )
            return cls(
                tuple(json.loads(facts["tokens"])),
                {name: file.get_tensor(name) for name in list(file.keys())},
            )


class PrefixStore:
    """Checkpoints of one model, found by the tokens that a prompt begins with; the least recently used go first.

    Args:
        model: one that generates, of a family that anydelta knows.
        max_bytes: what all checkpoints may take together; None: as much as there is.
        rollback: of the caches that come out.
    """

    def __init__(self, model: Any, max_bytes: int | None = None, rollback: int = ROLLBACK):
        self.model = model
        self.max_bytes = max_bytes
        self.rollback = rollback
        self._kept: OrderedDict[tuple[int, ...], Checkpoint] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def nbytes(self) -> int:
        """Of all checkpoints; keys and values that several share are counted for each."""
        return sum(c.nbytes for c in self._kept.values())

    def add(self, input_ids: torch.Tensor, cache: RollbackCache) -> Checkpoint:
        """Keep the cache as it is now; `input_ids` [1, T] begins with the tokens that it holds."""
        return self.put(Checkpoint.take(input_ids, cache))

    def put(self, checkpoint: Checkpoint) -> Checkpoint:
        """Keep a checkpoint, such as a loaded one."""
        self._kept[checkpoint.tokens] = checkpoint
        self._kept.move_to_end(checkpoint.tokens)
        while self.max_bytes is not None and self.nbytes > self.max_bytes and len(self._kept) > 1:
            self._kept.popitem(last=False)
        return checkpoint

    def find(self, input_ids: torch.Tensor) -> Checkpoint | None:
        """The longest checkpoint that these tokens [1, T] begin with, and that leaves one of them to run."""
        tokens = tuple(input_ids[0].tolist())
        fits = [t for t in self._kept if len(t) < len(tokens) and tokens[: len(t)] == t]
        if not fits:
            return None
        best = max(fits, key=len)
        self._kept.move_to_end(best)
        return self._kept[best]

    def cache_for(self, input_ids: torch.Tensor) -> RollbackCache:
        """A cache that holds all of these tokens [1, T] but the last, for `generate` to go on from.

        What lies behind the nearest checkpoint is run, and kept as another.
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
                    input_ids=input_ids[:, known:-1], past_key_values=cache, use_cache=True, logits_to_keep=1
                )
            self.add(input_ids, cache)
        return cache
