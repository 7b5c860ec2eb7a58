"""RollbackCache: the cache of a linear attention layer of mlx-lm that can take back its last tokens.

mlx-lm's ArraysCache holds the inputs that the convolutions still need and the recurrent state, both as they are after
the last token. This one also keeps earlier states (the snapshots of `anydelta.mlx.gated_delta_rule`) and the
convolutions' inputs. `trim(n)` chooses among them; nothing is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache


class RollbackCache(ArraysCache):
    """An ArraysCache that can be trimmed: one slot per convolution, the recurrent state in the last.

    A change other than running a layer while anydelta is enabled (padding on the right, `filter`, `extend`, an
    assignment) cannot be taken back.

    Args:
        size: slots, as of ArraysCache.
        depth: how many tokens can be taken back, at most.
    """

    depth = 0
    advances = False
    """Whether the layers of this mlx-lm advance the token count (from 0.31.2)."""
    cache: list[Any]
    left_padding: mx.array | None
    lengths: mx.array | None

    def __init__(self, size: int, depth: int, left_padding: list[int] | None = None):
        super().__init__(size, left_padding)
        self.depth = depth
        self._forget()

    @classmethod
    def of(cls, cache: ArraysCache, depth: int) -> RollbackCache:
        """A cache that continues from the contents of an ArraysCache."""
        out = cls(len(cache.cache), depth)
        hand_over(cache, out)
        out._forget()
        return out

    def _forget(self) -> None:
        self._past: list[mx.array | None] = []
        """The states 1, 2, ... tokens ago; None: there was none yet."""
        self._inputs: list[list[mx.array]] = [[c] if c is not None else [] for c in self.cache[:-1]]
        """What each convolution read, newest last: together [B, taps - 1 + n, C] for the last n tokens."""

    @property
    def recorded(self) -> int:
        """How many tokens can be taken back now."""
        return len(self._past)

    def record(self, step: Step) -> None:
        """Store the results of a layer."""
        depth, before = self.depth, self.cache[-1]
        self.cache = [*step.windows, step.states[0]]
        if self.lengths is not None or len(step.states) < min(step.tokens, depth + 1):
            self._forget()  # padded on the right, rows end at different tokens; or mlx-lm's own function ran
            return
        long = step.tokens > depth
        self._past = [*step.states[1:], *([] if long else [before, *self._past])][:depth]
        for kept, read, window in zip(self._inputs, step.inputs, step.windows, strict=True):
            before_it = window.shape[1]  # taps - 1
            if long:  # a prompt: drop most of it
                kept[:] = [mx.contiguous(read[:, -depth - before_it :])]
                mx.async_eval(kept)  # type: ignore[no-untyped-call]
            elif not kept:
                kept.append(read)
            else:
                kept.append(read[:, before_it:])
                while sum(x.shape[1] for x in kept[1:]) >= depth + before_it:
                    del kept[0]

    def is_trimmable(self) -> bool:
        return True

    def trim(self, n: int) -> int:
        """Take back the last n tokens.

        Raises:
            ValueError: more than are recorded; nothing was changed.
        """
        if n < 1:
            return 0
        if n > self.recorded:
            raise ValueError(
                f"RollbackCache.trim: requires at most {self.recorded} tokens, those recorded ({self.depth} at most); "
                f"got {n}. make_prompt_cache(model, rollback=...) says how many are kept"
            )
        state, self._past = self._past[n - 1], self._past[n:]
        for slot, kept in enumerate(self._inputs):
            taps = self.cache[slot].shape[1] + 1
            read = mx.concatenate(kept, axis=1)[:, :-n]
            kept[:] = [read] if state is not None else []
            self.cache[slot] = read[:, read.shape[1] - taps + 1 :] if state is not None else None
        self.cache[-1] = state
        if self.advances:
            self.advance(-n)
        return n

    def __setitem__(self, idx: int, value: object) -> None:
        super().__setitem__(idx, value)
        self._forget()

    @property
    def state(self) -> Any:
        return super().state  # in the form that this mlx-lm takes

    @state.setter
    def state(self, v: list[mx.array | None]) -> None:
        ArraysCache.state.fset(self, v)
        self._forget()

    def filter(self, batch_indices: mx.array) -> None:
        super().filter(batch_indices)
        self._forget()

    def extend(self, other: RollbackCache) -> None:
        super().extend(other)
        self._forget()

    @classmethod
    def merge(cls, caches: Sequence[ArraysCache]) -> ArraysCache:
        return ArraysCache.merge(caches)

    @property
    def nbytes(self) -> int:
        held = [x for kept in self._inputs for x in kept] + [x for x in self._past if x is not None]
        return int(super().nbytes) + sum(x.nbytes for x in held)


def hand_over(cache: ArraysCache, to: ArraysCache) -> None:
    """Move the contents of one cache to another."""
    to.cache, to.left_padding, to.lengths = list(cache.cache), cache.left_padding, cache.lengths


# mlx-lm's prompt cache files name the class of each cache, and only mlx-lm's classes can be loaded: name the plain one.
RollbackCache.__name__ = ArraysCache.__name__


class Step:
    """A RollbackCache as a layer sees it while it runs tokens. The layer passes it to gated_delta_update as `state`
    and gets it back.

    Attributes:
        states: after the update, the states after the last token, after the one before, ...: [B, HV, V, K] each.
        windows: the inputs that each convolution will need, [B, taps - 1, C], as the layer sets them.
        inputs: what each convolution read, [B, taps - 1 + tokens, C].
    """

    def __init__(self, cache: RollbackCache):
        self.cache = cache
        self.last = len(cache.cache) - 1
        self.windows = cache.cache[:-1]
        self.inputs: list[Any] = [None] * self.last
        self.states: list[mx.array] = []
        self.tokens: int = 0

    @property
    def lengths(self) -> mx.array | None:
        return self.cache.lengths

    def __getitem__(self, idx: int) -> mx.array | Step | None:
        return self if idx == self.last else self.windows[idx]

    def __setitem__(self, idx: int, value: object) -> None:
        if idx == self.last:
            self.cache.record(self)
        else:
            self.windows[idx] = value

    def advance(self, n: int) -> None:
        self.cache.advances = True
        self.cache.advance(n)
