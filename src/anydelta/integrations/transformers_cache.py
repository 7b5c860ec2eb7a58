"""A cache for Transformers whose linear attention layers can drop their last tokens, exactly.

    cache = RollbackCache(config=model.config)
    cache.activate_past_recording()          # from here on the states of the last tokens are kept
    model(ids, past_key_values=cache)
    cache.crop(-3)                           # as if the last three tokens had never been

A KV cache forgets tokens by dropping columns. A recurrent state cannot, so while the past is recorded the rule
writes the state after each token (the operator's `snapshots`) and `crop` goes back to one of them; nothing is
computed, and no state is copied. `enable()` in .transformers has `generate` use this cache where tokens may be
dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, LinearAttentionLayer

ROLLBACK = 8
"""Tokens that can be dropped, unless the cache is told otherwise."""


class RollbackCache(DynamicCache):
    """Transformers' DynamicCache, whose `crop` is exact in linear attention layers too.

    Args:
        config: the model's.
        rollback: how many of the last tokens can be dropped while the past is recorded. Every layer keeps that many
            states and one; tokens dropped free theirs.
    """

    def __init__(self, *args: Any, config: Any = None, rollback: int = ROLLBACK, **kwargs: Any):
        super().__init__(*args, config=config, **kwargs)
        with_rollback(self)
        self.rollback = rollback
        self.is_assistants = False
        """Whether it belongs to a model that drafts, in `generate`."""
        self.inputs_are_whole = False
        """Whether the first inputs that `generate` prepares repeat what the cache holds."""

    @property
    def rollback(self) -> int:
        return max((layer.rollback for layer in _linear(self)), default=0)

    @rollback.setter
    def rollback(self, tokens: int) -> None:
        if tokens < 0:
            raise ValueError(f"RollbackCache: requires rollback >= 0; got {tokens}. It is a number of tokens")
        for layer in _linear(self):
            layer.rollback = tokens

    def skip(self, tokens: int) -> None:
        """Keep no states for so many coming tokens: a prompt, which nobody will drop."""
        for layer in _linear(self):
            layer.skip = max(0, tokens)

    def allow(self, drafts: int) -> None:
        """Let one forward record so many tokens, though it be more than `rollback`."""
        for layer in _linear(self):
            layer.drafts = drafts

    def stop_recording(self) -> None:
        """Go on as a plain cache, which decodes in place, until `activate_past_recording` is called again."""
        for layer in self.layers:
            if hasattr(layer, "record_past"):
                layer.record_past = False

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last n tokens for -n; every layer or none.

        Raises:
            RuntimeError: no past is recorded.
            ValueError: a positive number, or more tokens than are recorded.
        """
        for layer in _linear(self):
            layer.check_crop(tokens_to_remove)
        super().crop(tokens_to_remove)


def with_rollback(cache: Cache) -> Cache:
    """Put layers that can roll back in the place of an empty cache's linear attention layers; returns the cache."""
    for i, layer in enumerate(cache.layers):
        if type(layer) is LinearAttentionLayer:
            cache.layers[i] = RollbackLayer(number_of_states=layer.number_of_states)
    return cache


def _linear(cache: Cache) -> list[RollbackLayer]:
    return [layer for layer in cache.layers if isinstance(layer, RollbackLayer)]


class RollbackLayer(LinearAttentionLayer):
    """The convolution and recurrent states of one layer, with those after each of the last tokens while recording.

    `conv_states[i]` [B, C, k] and `recurrent_states[i]` [B, HV, K, V] are the newest, as in Transformers.
    """

    def __init__(self, number_of_states: int = 1, **kwargs: Any):
        super().__init__(number_of_states=number_of_states, **kwargs)
        self.record_past: bool = False
        self.rollback = ROLLBACK
        self.drafts = 0
        self.skip = 0
        self._past = {i: _Past() for i in range(number_of_states)}

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` can put the layer back as it was, once `activate_past_recording` was called."""
        return True

    def activate_past_recording(self) -> None:
        if not self.record_past:
            self._forget()
        self.record_past = True

    # ---- What the forward of a linear attention layer calls

    def update_conv_state(
        self,
        conv_states: torch.Tensor,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Append columns [B, C, T]; returns them behind those that the convolution still sees."""
        if not self.record_past:
            full = super().update_conv_state(
                conv_states, state_idx, conv_kernel_size=conv_kernel_size, **kwargs
            )
            return full  # type: ignore[no-any-return]
        if not self.is_conv_states_initialized[state_idx]:
            self.lazy_initialization(
                conv_states=conv_states, state_idx=state_idx, conv_kernel_size=conv_kernel_size
            )
        self.has_previous_state[state_idx] = True
        full = torch.cat((self.conv_states[state_idx], conv_states), -1)
        self._past[state_idx].extend(full, conv_states)
        # A copy, because the convolution of one token may roll it in place.
        self.conv_states[state_idx] = full[..., -self.conv_kernel_size[state_idx] :].clone()
        return full

    def snapshots(
        self, shape: tuple[int, ...], like: torch.Tensor, tokens: int, state_idx: int = 0
    ) -> torch.Tensor:
        """Where the rule shall write the states after the last of `tokens` tokens: [n, *shape], newest first.

        The state before them may be read while these are written; `update_recurrent_state(result[0])` adopts them.
        """
        limit = max(self.rollback, min(self.drafts, tokens)) + 1
        recorded = min(max(1, tokens - self.skip), limit)
        return self._past[state_idx].room(shape, like, tokens, recorded, limit)

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, state_idx: int = 0, **kwargs: Any
    ) -> torch.Tensor:
        if not self.record_past:
            return super().update_recurrent_state(recurrent_states, state_idx, **kwargs)  # type: ignore[no-any-return]
        self.is_recurrent_states_initialized[state_idx] = True
        past = self._past[state_idx]
        self.skip = max(0, self.skip - past.tokens)
        state = past.adopt(recurrent_states, self.conv_states[state_idx])
        self.recurrent_states[state_idx] = state
        return state

    # ---- Rolling back

    def check_crop(self, tokens_to_remove: int) -> None:
        """Raise as `crop` would."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop: requires a negative number of tokens, or 0; got {tokens_to_remove}. -n drops the last n"
            )
        if not self.record_past:
            raise RuntimeError(
                "crop: requires that the past is recorded; got a cache without. Call activate_past_recording() before "
                "the tokens that may be dropped"
            )
        known = min((len(past.slots) - 1 for past in self._used().values()), default=-tokens_to_remove)
        if -tokens_to_remove > max(0, known):
            raise ValueError(
                f"crop: requires at most {max(0, known)} tokens, whose states are recorded; got {-tokens_to_remove}. "
                f"Set the cache's `rollback` (now {self.rollback}), or crop before more tokens are run"
            )

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last n tokens for -n; the errors are those of `check_crop`, and change nothing."""
        self.check_crop(tokens_to_remove)
        for i, past in self._used().items():
            past.drop(-tokens_to_remove)
            if tokens_to_remove:
                self.recurrent_states[i] = past.state()
                self.conv_states[i] = past.columns[..., -self.conv_kernel_size[i] :].clone()

    def _used(self) -> dict[int, _Past]:
        return {i: past for i, past in self._past.items() if self.is_recurrent_states_initialized[i]}

    def _forget(self) -> None:
        for i, past in self._past.items():
            window = self.conv_states[i]
            past.begin(
                self.recurrent_states[i] if self.has_previous_state[i] else None,
                None if window is None else window.clone(),
            )

    # ---- Changes of the batch: what comes out is the oldest state that can be reached

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._change(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._change(lambda x: x[indices, ...])

    def _change(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for states in (self.conv_states, self.recurrent_states):
            for i, x in states.items():
                if x is not None:
                    states[i] = change(x)
        self._forget()

    def reset(self) -> None:
        super().reset()
        self.skip = 0
        self._forget()


class _Past:
    """The states and convolution columns after each of the last tokens.

    States stand in slots of one buffer and are never moved: a forward writes into free neighbouring slots, newest
    first as the operator does, and dropping tokens frees theirs. The first forward after a drop keeps, of all that
    was before, the state that it starts from.
    """

    def __init__(self) -> None:
        self.begin(None, None)

    def begin(self, state: torch.Tensor | None, window: torch.Tensor | None) -> None:
        """Start from this state, and this window [B, C, k] of the convolution."""
        self.buffer: torch.Tensor | None = None  # [slots, B, HV, K, V]
        self.slots: list[int] = []  # oldest first
        self.columns: torch.Tensor = window  # type: ignore[assignment]  # [B, C, k + tokens that can be dropped]
        self.tokens = 0  # of the forward that is under way
        self._start = state
        self._dropped = True
        self._extended = False
        self._room: tuple[int, list[int]] | None = None

    def state(self) -> torch.Tensor:
        assert self.buffer is not None
        return self.buffer[self.slots[-1]]

    def extend(self, full: torch.Tensor, new: torch.Tensor) -> None:
        """Take new columns [B, C, T]; `full` has the window before them."""
        self.columns = full if self._dropped else torch.cat((self.columns, new), -1)
        self._extended = True

    def room(
        self, shape: tuple[int, ...], like: torch.Tensor, tokens: int, recorded: int, limit: int
    ) -> torch.Tensor:
        kept = self.slots[-1:] if self._dropped else self.slots
        if recorded < tokens:  # the states between would be missing
            kept = []
        elif not kept and recorded < limit:
            kept = [self._grow(shape, like, [], 1 + recorded)]
            self.buffer[0] = 0 if self._start is None else self._start  # type: ignore[index]
        kept = kept[max(0, len(kept) + recorded - limit) :]
        self._start = None
        begin = 0
        for slot in [*sorted(kept), 0 if self.buffer is None else self.buffer.shape[0]]:
            if slot - begin >= recorded:
                break
            begin = slot + 1
        else:
            begin = self._grow(shape, like, kept, recorded)
            kept = list(range(begin))
        assert self.buffer is not None
        self._room = (begin, [*kept, *range(begin + recorded - 1, begin - 1, -1)])
        self.tokens = tokens
        return self.buffer[begin : begin + recorded]

    def _grow(self, shape: tuple[int, ...], like: torch.Tensor, kept: list[int], more: int) -> int:
        """A buffer with room for more, and again as much; returns the first free slot. Kept ones come first."""
        buffer = like.new_empty((2 * (len(kept) + more), *shape), dtype=torch.float32)
        for to, slot in enumerate(kept):
            buffer[to] = self.buffer[slot]  # type: ignore[index]
        self.buffer = buffer
        return len(kept)

    def adopt(self, state: torch.Tensor, window: torch.Tensor) -> torch.Tensor:
        """End a forward, whose last state this is; returns it. If it is not in our room, it has no past."""
        room, self._room, self.tokens = self._room, None, 0
        if room is None or self.buffer is None or state.data_ptr() != self.buffer[room[0]].data_ptr():
            room = (0, [0])
            self.buffer = state.unsqueeze(0).clone()
        self.slots = room[1]
        k = window.shape[-1]
        if not self._extended:  # one token, whose column went straight into the window
            before = self.columns[..., -k:] if self._dropped else self.columns
            self.columns = torch.cat((before, window[..., -1:]), -1)
        wanted = k + len(self.slots) - 1
        if self.columns.shape[-1] > wanted:
            self.columns = self.columns[..., -wanted:].clone()
        self._dropped = self._extended = False
        return self.state()

    def drop(self, tokens: int) -> None:
        if tokens:
            del self.slots[-tokens:]
            self.columns = self.columns[..., :-tokens]
        self._dropped = True
