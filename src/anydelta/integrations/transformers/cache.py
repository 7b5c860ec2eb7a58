"""A cache for Transformers whose linear attention layers can drop their last tokens, exactly.

    cache = RollbackCache(config=model.config)
    cache.activate_past_recording()          # from here on the states of the last tokens are kept
    model(ids, past_key_values=cache)
    cache.crop(-3)                           # as if the last three tokens had never been

A KV cache drops tokens by dropping columns. A recurrent state cannot. While recording, the rule writes the state after
each token (the operator's `snapshots`), and `crop` returns to one of them without computing or copying anything. While
anydelta is enabled, `generate` uses this cache for calls that may drop tokens.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicSlidingWindowLayer, LinearAttentionLayer
from transformers.generation.utils import GenerationMixin

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

CACHES = ("cache", "cache_params", "past_key_values")
"""Names of the cache argument of models and layers. The first exists since Transformers 5.24."""
CACHE = next(
    name
    for name in CACHES
    if name in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
)
"""Its name in this Transformers."""
POSITIONS = "position_ids"
"""Where Transformers 5.20 keeps qwen4_exp's positions of all tokens: an attribute of the cache itself."""
ROLLBACK = 8
"""Tokens that can be dropped, unless the cache is told otherwise."""


class RollbackCache(DynamicCache):
    """Transformers' DynamicCache, whose `crop` is exact in linear attention layers too.

    Args:
        config: the model's.
        rollback: how many of the last tokens can be dropped while recording. Every layer keeps that many states plus
            one. Dropped tokens free theirs.
    """

    def __init__(
        self,
        *args: object,
        config: PreTrainedConfig | None = None,
        rollback: int = ROLLBACK,
        **kwargs: object,
    ):
        super().__init__(*args, config=config, **kwargs)
        with_rollback(self, config)
        self.config = config
        self.rollback = rollback
        self.is_assistants = False
        """Whether it belongs to a drafting model in `generate`."""

    @property
    def rollback(self) -> int:
        """How many tokens `crop` can take back while the cache records."""
        return max((layer.rollback for layer in _rolling(self)), default=0)

    @rollback.setter
    def rollback(self, tokens: int) -> None:
        if tokens < 0:
            raise ValueError(f"RollbackCache: requires rollback >= 0; got {tokens}. It is a number of tokens")
        for layer in _rolling(self):
            layer.rollback = tokens

    def skip(self, tokens: int) -> None:
        """Keep no states for the next `tokens` tokens, such as a prompt, which is never dropped."""
        for layer in _rolling(self):
            layer.skip = max(0, tokens)

    def allow(self, drafts: int) -> None:
        """Let one forward record `drafts` tokens, even if that is more than `rollback`."""
        for layer in _rolling(self):
            layer.drafts = drafts

    def stop_recording(self) -> None:
        """Stop recording and decode in place, until `activate_past_recording` is called again."""
        for layer in self.layers:
            if isinstance(layer, RollbackLayer | RollbackWindow) and layer.record_past:
                layer.keep_newest()
            if hasattr(layer, "record_past"):
                layer.record_past = False

    def crop(self, tokens_to_remove: int) -> None:
        """crop(-n) drops the last n tokens, in every layer or in none.

        Raises:
            RuntimeError: the cache does not record.
            ValueError: a positive number, or more tokens than are recorded.
        """
        for layer in _rolling(self):
            layer.check_crop(tokens_to_remove)
        super().crop(tokens_to_remove)
        if tokens_to_remove and (positions := getattr(self, POSITIONS, None)) is not None:
            setattr(self, POSITIONS, positions[..., :tokens_to_remove])


def with_rollback(cache: Cache, config: PreTrainedConfig | None = None) -> Cache:
    """Replace the layers of an empty cache by layers that can roll back; returns the cache. `config` is the model's."""
    text = None if config is None else config.get_text_config(decoder=True)
    end = getattr(text, "eos_token_id", None)
    for i, layer in enumerate(cache.layers):
        if type(layer) is LinearAttentionLayer:
            cache.layers[i] = ours = RollbackLayer(number_of_states=layer.number_of_states)
            ours.token_before = (end[0] if isinstance(end, list) else end) or 0
        elif type(layer) is DynamicSlidingWindowLayer:
            cache.layers[i] = RollbackWindow(sliding_window=layer.sliding_window)
    return cache


def _rolling(cache: Cache) -> list[RollbackLayer | RollbackWindow]:
    return [layer for layer in cache.layers if isinstance(layer, RollbackLayer | RollbackWindow)]


def _check(tokens_to_remove: int, recording: bool, known: float, rollback: int) -> None:
    if tokens_to_remove > 0:
        raise ValueError(
            f"crop: requires a negative number of tokens, or 0; got {tokens_to_remove}. -n drops the last n"
        )
    if not recording:
        raise RuntimeError(
            "crop: requires a cache that records its past; got one without. Call activate_past_recording() before "
            "the tokens that may be dropped"
        )
    if -tokens_to_remove > max(0, known):
        raise ValueError(
            f"crop: requires at most {max(0, known)} tokens, whose states are recorded; got {-tokens_to_remove}. "
            f"Set the cache's `rollback` (now {rollback}) higher, crop before more tokens run, and run them under "
            "torch.no_grad(): a forward with gradients records nothing"
        )


class RollbackWindow(DynamicSlidingWindowLayer):
    """Keys and values of a window. While recording it also keeps earlier ones, which return when tokens are dropped.

    Transformers' own layer cuts them to the window at each `crop`, so a second crop is impossible.
    """

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, sliding_window: int, **kwargs: object):
        super().__init__(sliding_window=sliding_window, **kwargs)
        self.record_past: bool = False
        self.rollback = ROLLBACK
        self.drafts = self.skip = 0

    def activate_past_recording(self) -> None:
        self.record_past = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        if self.record_past:
            tokens = key_states.shape[-2]
            kept, seen = (
                self.sliding_window - 1 + max(self.rollback, min(self.drafts, tokens)),
                self.sliding_window - 1,
            )
            self.keys, self.values = self.keys[..., -kept:, :], self.values[..., -kept:, :]
            keys, values = keys[..., -seen - tokens :, :], values[..., -seen - tokens :, :]
        return keys, values

    def check_crop(self, tokens_to_remove: int) -> None:
        """Raise as `crop` would."""
        held, known = self.cumulative_length, math.inf
        if held > (here := self.keys.shape[-2] if self.is_initialized else 0):
            known = here - self.sliding_window + 1
        _check(tokens_to_remove, self.record_past, known, self.rollback)

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last n tokens for -n."""
        self.check_crop(tokens_to_remove)
        if tokens_to_remove and self.is_initialized:
            self.keys, self.values = (
                self.keys[..., :tokens_to_remove, :],
                self.values[..., :tokens_to_remove, :],
            )
            self.cumulative_length += tokens_to_remove

    def keep_newest(self) -> None:
        """Drop the columns before the window."""
        if self.is_initialized and (window := self.sliding_window - 1):
            self.keys, self.values = (
                self.keys[..., -window:, :].clone(),
                self.values[..., -window:, :].clone(),
            )


class RollbackLayer(LinearAttentionLayer):
    """The convolution and recurrent states of one layer; while recording, also those after each of the last tokens.

    `conv_states[i]` [B, C, k] and `recurrent_states[i]` [B, HV, K, V] are the newest, as in Transformers.
    """

    def __init__(self, number_of_states: int = 1, **kwargs: object):
        super().__init__(number_of_states=number_of_states, **kwargs)
        self.record_past: bool = False
        self.rollback = ROLLBACK
        self.drafts = 0
        self.skip = 0
        self._past = {i: _Past() for i in range(number_of_states)}
        self._columns: dict[int, torch.Tensor] = {}
        """For states that are only a window, such as qwen4_exp's n-grams: the window and the columns before it."""
        self.token_before = 0
        """The token before the first one, in windows of tokens such as n-grams."""
        self._tokens: float = math.inf
        """Tokens recorded since the layer was empty. inf: it was not empty when recording began."""

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` can put the layer back as it was, once `activate_past_recording` was called."""
        return True

    def activate_past_recording(self) -> None:
        if not self.record_past:
            self._forget()
            if not any(self.has_previous_state.values()):
                self._tokens = 0
        self.record_past = True

    # ---- Called by the forward of a linear attention layer

    def begin(self, state_idx: int = 0) -> None:
        """Note the states before a forward of the layer's own code."""
        if self.record_past:
            self._past[state_idx].start(*self._states(state_idx))
            window = self.conv_states[state_idx]
            if window is not None:  # the convolution of one token may shift the window in place
                self.conv_states[state_idx] = window.clone()

    def pools(
        self,
        state: tuple[int, ...],
        window: tuple[int, ...],
        like: torch.Tensor,
        tokens: int,
        state_idx: int = 0,
    ) -> Pools:
        """The places where the mixer reads both states before `tokens` tokens, and writes them after the last ones.

        `state` and `window` are the shapes [B, HV, K, V] and [B, C, k]. They are zeros if the layer has seen no token.
        The caller then calls `adopt`.
        """
        past = self._past[state_idx]
        past.start(*self._states(state_idx), (state, window), like)
        return past.rows(tokens, *self._recorded(tokens))

    def adopt(self, state_idx: int = 0) -> None:
        """Continue from the states that the mixer wrote into the pools."""
        past = self._past[state_idx]
        self._count(past.tokens)
        past.end()
        window = past.window()
        self.recurrent_states[state_idx], self.conv_states[state_idx] = past.state(), window
        if not self.is_conv_states_initialized[state_idx]:
            self.dtype, self.device = window.dtype, window.device
            self.conv_kernel_size[state_idx] = window.shape[-1]
            self.is_conv_states_initialized[state_idx] = True
        self.is_recurrent_states_initialized[state_idx] = self.has_previous_state[state_idx] = True

    def update_conv_state(
        self,
        conv_states: torch.Tensor,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
        **kwargs: object,
    ) -> torch.Tensor:
        """Append columns [B, C, T]. Returns them after the earlier columns that the convolution still needs."""
        if not self.record_past:
            full = super().update_conv_state(
                conv_states, state_idx, conv_kernel_size=conv_kernel_size, **kwargs
            )
            return full  # type: ignore[no-any-return]
        if not self.is_conv_states_initialized[state_idx]:
            self.lazy_initialization(
                conv_states=conv_states, state_idx=state_idx, conv_kernel_size=conv_kernel_size
            )
            if not conv_states.is_floating_point():
                self.conv_states[state_idx].fill_(self.token_before)
        self.has_previous_state[state_idx] = True
        window, k = self.conv_states[state_idx], self.conv_kernel_size[state_idx]
        full = torch.cat((window, conv_states), -1)
        if state_idx:  # the first window is rolled back with the rule's state
            _, limit = self._recorded(conv_states.shape[-1])
            before = self._columns.get(state_idx, window)
            self._columns[state_idx] = torch.cat((before, conv_states), -1)[..., -k - limit :].clone()
        else:
            self._past[state_idx].columns = full
        self.conv_states[state_idx] = full[..., -k:].clone()
        return full

    def can_record(self, state_idx: int = 0) -> bool:
        """Whether the convolution's window is known. A layer without a window, or one that sets it last, cannot be
        rolled back."""
        return self.conv_states[state_idx] is not None

    def snapshots(
        self, shape: tuple[int, ...], like: torch.Tensor, tokens: int, state_idx: int = 0
    ) -> torch.Tensor:
        """Memory for the states after the last of `tokens` tokens: [n, *shape], newest first.

        The current state may be read while these are written. `update_recurrent_state(result[0])` adopts them.
        """
        window = self.conv_states[state_idx]
        past = self._past[state_idx]
        past.start(None, None, (shape, tuple(window.shape)), like)
        return past.room(tokens, *self._recorded(tokens))

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, state_idx: int = 0, **kwargs: object
    ) -> torch.Tensor:
        if not self.record_past or not self.can_record(state_idx):
            return super().update_recurrent_state(recurrent_states, state_idx, **kwargs)  # type: ignore[no-any-return]
        self.is_recurrent_states_initialized[state_idx] = True
        past, window = self._past[state_idx], self.conv_states[state_idx]
        self._count(past.tokens)
        if past.holds(recurrent_states):
            past.put_windows(window)
            past.end()
        else:  # not in our memory: it has no past
            past.clear()
            past.start(recurrent_states, window)
        self.recurrent_states[state_idx] = past.state()
        result: torch.Tensor = self.recurrent_states[state_idx]
        return result

    def _states(self, state_idx: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if not self.has_previous_state[state_idx]:
            return None, None
        return self.recurrent_states[state_idx], self.conv_states[state_idx]

    def _count(self, tokens: int) -> None:
        self.skip = max(0, self.skip - tokens)
        self._tokens += tokens

    def _recorded(self, tokens: int) -> tuple[int, int]:
        """How many tokens' states are kept, and the largest number of states."""
        limit = max(self.rollback, min(self.drafts, tokens)) + 1
        return min(max(1, tokens - self.skip), limit), limit

    # ---- Rolling back

    def check_crop(self, tokens_to_remove: int) -> None:
        """Raise as `crop` would."""
        unused = -tokens_to_remove if math.isinf(self._tokens) else self._tokens
        known = min((len(past.slots) - 1 for past in self._used().values()), default=unused)
        _check(tokens_to_remove, self.record_past, known, self.rollback)

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last n tokens for -n; the errors are those of `check_crop`, and change nothing."""
        self.check_crop(tokens_to_remove)
        for i, past in self._used().items():
            past.drop(-tokens_to_remove)
            if tokens_to_remove:
                self.recurrent_states[i], self.conv_states[i] = past.state(), past.window()
        self._tokens += tokens_to_remove
        for i, columns in self._columns.items() if tokens_to_remove else ():
            self._columns[i] = columns = columns[..., :tokens_to_remove]
            self.conv_states[i] = columns[..., -self.conv_kernel_size[i] :].clone()
            if not self._tokens:  # before the first token the layer has no window, not one of zeros
                self.has_previous_state[i] = False

    def _used(self) -> dict[int, _Past]:
        return {i: past for i, past in self._past.items() if self.is_recurrent_states_initialized[i]}

    def _forget(self) -> None:
        for past in self._past.values():
            past.clear()
        self._columns = {}
        self._tokens = math.inf

    def keep_newest(self) -> None:
        """Drop all states except the newest, and their memory."""
        self._change(torch.clone)

    # ---- Changes of the batch: the result becomes the oldest state that `crop` can reach

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
        self._tokens = 0


class Pools(NamedTuple):
    """Arguments of `gated_delta_mixer_` for recording: both pools, the rows to read [B] and the rows to write [n,
    B]."""

    windows: torch.Tensor
    states: torch.Tensor
    read: torch.Tensor
    written: torch.Tensor


class _Past:
    """The state and the convolution's window before the recorded tokens and after each of them.

    They are in slots of two buffers and never move. A forward writes to free neighbouring slots, newest first, and
    dropped tokens free their slots. The first forward after a drop keeps only one earlier state, its starting point.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self._states = self._windows = torch.empty(0)
        self.slots: list[int] = []  # oldest first; the last holds the newest state
        self.tokens = 0  # of the current forward
        self.columns: torch.Tensor | None = None  # its window and its new columns, [B, C, k + T]
        self._dropped = True
        self._room: tuple[int, int] | None = None  # first slot and number
        self._kept: list[int] = []

    def state(self) -> torch.Tensor:
        return self._states[self.slots[-1]]

    def window(self) -> torch.Tensor:
        return self._windows[self.slots[-1]]

    def start(
        self,
        state: torch.Tensor | None,
        window: torch.Tensor | None,
        shapes: tuple[tuple[int, ...], tuple[int, ...]] | None = None,
        like: torch.Tensor | None = None,
    ) -> None:
        """Write these into the first slot if there is none yet. None: zeros of the given shapes, with the window's
        kind taken from a tensor."""
        if self.slots or (shapes is None and (state is None or window is None)):
            return
        if state is not None and window is not None:
            shapes, like = (tuple(state.shape), tuple(window.shape)), window
        assert shapes is not None
        assert like is not None
        self._allocate(4, shapes, like)
        self._states[0], self._windows[0] = 0 if state is None else state, 0 if window is None else window
        self.slots = [0]

    def _allocate(
        self, slots: int, shapes: tuple[tuple[int, ...], tuple[int, ...]], like: torch.Tensor
    ) -> None:
        self._states = like.new_empty((slots, *shapes[0]), dtype=torch.float32)  # [slots, B, HV, K, V]
        self._windows = like.new_empty((slots, *shapes[1]))  # [slots, B, C, k]
        self._number_rows()

    def _number_rows(self) -> None:
        self._flat = self._windows.flatten(0, 1), self._states.flatten(0, 1)
        slots, batch = self._states.shape[:2]
        self._rows = torch.arange(slots * batch, device=self._states.device).view(slots, batch)

    def __getstate__(self) -> dict[str, object]:
        return {name: x for name, x in self.__dict__.items() if name not in ("_flat", "_rows")}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        if self.slots:  # pickle would make `_flat` a copy
            self._number_rows()

    def room(self, tokens: int, recorded: int, limit: int) -> torch.Tensor:
        """Free slots for the states after the last `recorded` of `tokens` tokens: [recorded, B, HV, K, V]."""
        begin = self._find(tokens, recorded, limit)
        return self._states[begin : begin + recorded]

    def rows(self, tokens: int, recorded: int, limit: int) -> Pools:
        """The same as rows of the buffers, sequence by sequence."""
        begin = self._find(tokens, recorded, limit)
        return Pools(*self._flat, self._rows[self.slots[-1]], self._rows[begin : begin + recorded])

    def _find(self, tokens: int, recorded: int, limit: int) -> int:
        kept = self.slots[-1:] if self._dropped else self.slots
        if recorded < tokens:  # the states in between would be missing
            kept = []
        kept = kept[max(0, len(kept) + recorded - limit) :]
        begin = 0
        for slot in [*sorted({*kept, self.slots[-1]}), len(self._states)]:
            if slot - begin >= recorded:
                break
            begin = slot + 1
        else:
            begin, kept = self._grow(kept, recorded)
        self._kept, self._room, self.tokens = kept, (begin, recorded), tokens
        return begin

    def _grow(self, kept: list[int], more: int) -> tuple[int, list[int]]:
        """Allocate larger buffers with spare slots. Returns the first free slot and the new slots of the kept ones."""
        moved = kept or self.slots[-1:]
        states, windows = self._states, self._windows
        self._allocate(2 * (len(moved) + more), (states.shape[1:], windows.shape[1:]), windows)
        for to, slot in enumerate(moved):
            self._states[to], self._windows[to] = states[slot], windows[slot]
        self.slots = list(range(len(moved)))
        return len(moved), self.slots if kept else []

    def holds(self, state: torch.Tensor) -> bool:
        """Whether this is the newest state in the buffers."""
        return self._room is not None and state.data_ptr() == self._states[self._room[0]].data_ptr()

    def put_windows(self, window: torch.Tensor) -> None:
        """Store the windows of the current forward; `window` is the last of them."""
        assert self._room is not None
        begin, recorded = self._room
        if self.columns is None:  # one token, whose column is already in the window
            self._windows[begin] = window
            return
        end, k = self.columns.shape[-1], window.shape[-1]
        for slot in range(recorded):
            self._windows[begin + slot] = self.columns[..., end - slot - k : end - slot]

    def end(self) -> None:
        """End a forward: its slots are written."""
        assert self._room is not None
        begin, recorded = self._room
        self.slots = [*self._kept, *range(begin + recorded - 1, begin - 1, -1)]
        self._room, self.columns, self._dropped, self.tokens = None, None, False, 0

    def drop(self, tokens: int) -> None:
        if tokens:
            del self.slots[-tokens:]
        self._dropped = True
