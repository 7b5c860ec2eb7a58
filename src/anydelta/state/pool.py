"""Commit and rollback of the recurrent and convolution states of many sequences.

    pool = StatePool(8, HV=32, K=128, V=128, layers=36, snapshots=5, conv_channels=8192, conv_width=4)
    s = pool.new()
    pool.begin(5)                                  # five tokens of every sequence are about to run
    for layer in range(36):
        window = pool.conv_inputs(x, layer=layer)                        # [N, W-1+T, C]
        o = pool.run(q, k, v, g=g, beta=beta, layer=layer)               # [N, T, HV, V]
    pool.commit(3)                                 # keep the first three; the last two never happened

If something fails between `begin` and `commit`, `cancel()` puts every sequence of the step back. `with pool.step(5):`
calls it by itself.

A recurrent state cannot be cropped like a key-value cache. The pool keeps earlier states in one of two forms:

    slots   the last `snapshots` states of a sequence, each a row of the pool; a rollback chooses another row
    log     one state, and per token since k, the delta d and the decay (token_log.py); a rollback shortens the log

Sequences are numbers that `new`, `fork` and `restore` return. One pool holds all layers of a model, which run the same
tokens, so the book-keeping is done once for all of them. A call that raises changes nothing: a successful call replaces
the pool's list of sequences at its end. Only one thread may use a pool at a time. Pools are independent of each other.
A copy (`copy.deepcopy`, `pickle`, `torch.save`) is an independent pool, even if it is taken in the middle of a step.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np

from ..core.arrays import Array
from ..core.devices import KINDS, Device, numpy_dtype
from ..core.devices import device as open_device
from ..core.dispatch import Trace
from .base import Pool
from .checkpoints import Checkpoint
from .sequence import LiveSequence, Step, nbytes
from .slots import Slots
from .token_log import Log

if TYPE_CHECKING:
    import torch

FORMS = ("slots", "log")
KEY_DTYPES = ("float32", "bfloat16", "float16")
FLOATS = (*KEY_DTYPES, "float64")


class StatePool(Pool):
    """The states of up to `capacity` sequences in all layers of a model.

    Args:
        capacity: how many sequences may live at once.
        HV: value heads of a state, as in `gated_delta_rule`.
        K: key channels of a state.
        V: value channels of a state.
        H: q/k heads, which the log needs; HV if None.
        layers: linear attention layers that share the pool.
        snapshots: Ks, how many states are kept. A sequence can go back by 0 to Ks - 1 tokens.
        form: "slots" or "log"; docs/rollback.md says which is faster when.
        kda: whether the gates are vectors over K (the log stores them).
        key_dtype: dtype of the keys in the log. "float32" takes any k. "bfloat16" and "float16" take k of that type
            only, keep its bits, and need less memory.
        conv_channels: C of the short convolution before the rule; 0: no convolution.
        conv_width: W of that convolution. Its last W - 1 + Ks raw inputs are kept, so that it can go back too.
        dtype: "float32", "bfloat16" or "float16", of the states.
        conv_dtype: of the convolution's inputs; "float32" if None.
        state_layout: "kv" or "vk".
        device: None for NumPy arrays; a torch device for tensors; or an `anydelta.device`, by name ("vulkan:0") or
            opened, on which the states then stay. The other arrays are NumPy's there, and the form is "slots".
        backend: as for `gated_delta_rule_`; for a log, a backend with kernels for it.

    Raises:
        ValueError, TypeError: a size below 1, an unknown form, layout or dtype.
        UnsupportedError, DeviceError: there is no such device of anydelta, or too little memory on it.
    """

    def __init__(
        self,
        capacity: int,
        *,
        HV: int,
        K: int,
        V: int,
        H: int | None = None,
        layers: int = 1,
        snapshots: int = 1,
        form: str = "slots",
        kda: bool = False,
        key_dtype: str = "float32",
        conv_channels: int = 0,
        conv_width: int = 0,
        dtype: str = "float32",
        conv_dtype: str | None = None,
        state_layout: str = "kv",
        device: torch.device | str | None = None,
        backend: str = "auto",
    ):
        H = HV if H is None else H
        sizes = dict(capacity=capacity, HV=HV, K=K, V=V, H=H, layers=layers, snapshots=snapshots)
        for name, value in sizes.items():
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"StatePool: {name} must be an int; got {type(value).__name__}")
            if value < 1:
                raise ValueError(f"StatePool: {name} must be >= 1; got {value}")
        if HV % H:
            raise ValueError(f"StatePool: HV must be a multiple of H; got HV={HV}, H={H}")
        for name, choice, known in (
            ("form", form, FORMS),
            ("state_layout", state_layout, ("kv", "vk")),
            ("key_dtype", key_dtype, KEY_DTYPES),
        ):
            if choice not in known:
                raise ValueError(
                    f"StatePool: {name} must be one of {', '.join(map(repr, known))}; got {choice!r}"
                )
        if (conv_channels > 0) != (conv_width > 0):
            raise ValueError(
                "StatePool: conv_channels and conv_width go together; "
                f"got conv_channels={conv_channels}, conv_width={conv_width}"
            )
        self.capacity, self.layers, self.snapshots, self.form = capacity, layers, snapshots, form
        self.H, self.HV, self.K, self.V, self.kda = H, HV, K, V, kda
        self.conv_channels, self.conv_width = conv_channels, conv_width
        self.state_layout, self.device, self.backend = state_layout, device, backend
        self.key_dtype = key_dtype
        self.resident = _resident(device)
        if self.resident is not None:
            self.device = None  # of tensors; the other arrays are NumPy's
            if form != "slots":
                raise ValueError(
                    f"StatePool: form must be 'slots' on a device of anydelta; got {form!r} on {self.resident.name}"
                )
        self.dtype = str(dtype)
        self._sequences = [None] * capacity
        self._batch: list[int] | None = None  # of the last begin
        self._step = None
        tail = (HV, K, V) if state_layout == "kv" else (HV, V, K)
        self._form: Any
        if form == "slots":
            self._form = Slots(self, tail)
        else:
            self._form = Log(self, tail)
        # Twice the inputs that must survive a step, so that they seldom have to move to the front.
        self._kept = conv_width - 1 + snapshots if conv_width else 0
        self._conv = None
        if conv_width:
            shape = (layers, capacity, 2 * self._kept + 1, conv_channels)
            self._conv = self._zeros(shape, conv_dtype or "float32")

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._form.connect()

    def __copy__(self) -> StatePool:
        return copy.deepcopy(self)

    def explain(self) -> Trace:
        """Which backend runs the steps of a pool with form="log", and why the others do not. Runs nothing.

        Raises:
            ValueError: the form is "slots", whose steps are calls that `anydelta.explain` explains.
        """
        if not isinstance(self._form, Log):
            self._fail("explain", 'requires form="log"; got "slots". Use anydelta.explain for its calls')
        return self._form.explain()

    # ---- sequences

    @property
    def sequences(self) -> list[int]:
        """The sequences that live, in ascending order."""
        return [i for i, s in enumerate(self._sequences) if s is not None]

    def _get(self, method: str, sequence: object) -> LiveSequence:
        found: LiveSequence | None = None
        if _is_int(sequence) and 0 <= sequence < self.capacity:
            found = self._sequences[sequence]
        if found is None:
            self._fail(method, f"requires a living sequence; got {sequence!r}. Living: {self.sequences}")
        return found

    def _vacancy(self, method: str) -> int:
        for i, s in enumerate(self._sequences):
            if s is None:
                return i
        self._fail(
            method,
            f"requires a free place; got a pool whose {self.capacity} sequences all live. Free one first",
        )

    def _not_running(self, method: str) -> None:
        if self._step is not None and (self._step.todo or self._step.conv_todo):
            self._fail(method, f"requires that all layers have run since begin; {self._missing(self._step)}")

    def _missing(self, step: Step) -> str:
        parts = [
            f"{len(left)} of {self.layers} {what} are missing"
            for left, what in ((step.todo, "calls of run"), (step.conv_todo, "calls of conv_inputs"))
            if left
        ]
        return "got a step of which " + " and ".join(parts) + ". Run them, or cancel()"

    def new(self) -> int:
        """A sequence that has seen nothing: states and convolution inputs of zeros.

        Raises:
            ValueError: every place is taken.
        """
        self._not_running("new")
        return self._start("new", 0, 0, 0)

    def _start(self, method: str, states: Array, conv: Array, length: int) -> int:
        place = self._vacancy(method)
        held = {row for s in self._sequences if s for row in s.rows}
        row = next(row for row in range(self._form.P) if row not in held)
        self._form.write(row, states)
        conv_end = 0
        if self._conv is not None:
            conv_end = self.conv_width - 1
            self._conv[:, place, :conv_end] = conv
        sequences = list(self._sequences)
        sequences[place] = LiveSequence((row,), length=length, conv_end=conv_end)
        self._accept(sequences)
        return place

    def fork(self, sequence: int) -> int:
        """A second sequence with the same past and history.

        The recurrent state is shared, not copied: the next step of either writes elsewhere. The convolution's inputs
        (and a log) are small and copied.

        Raises:
            ValueError: no such sequence, or every place is taken.
        """
        self._not_running("fork")
        parent = self._get("fork", sequence)
        place = self._vacancy("fork")
        for x in self._own():
            x[:, place] = x[:, sequence]
        sequences = list(self._sequences)
        sequences[place] = parent
        self._accept(sequences)
        return place

    def free(self, sequence: int) -> None:
        """End a sequence. Other sequences get its rows.

        Raises:
            ValueError: no such sequence.
        """
        self._not_running("free")
        self._get("free", sequence)
        sequences = list(self._sequences)
        sequences[sequence] = None
        batch = self._batch and [s for s in self._batch if s != sequence]  # its number may be reused
        self._sequences, self._step, self._batch = sequences, None, batch

    def select(self, parents: Sequence[int], sequences: Sequence[int] | None = None) -> None:
        """Beam search's step: sequence i of `sequences` (all if None) continues from the past of parents[i].

        Raises:
            ValueError: lists of different lengths, or no such sequence.
        """
        self._not_running("select")
        targets = self._numbers("select", sequences, self.sequences)
        sources = self._numbers("select", parents, [])
        if len(targets) != len(sources) or len(set(targets)) != len(targets):
            self._fail(
                "select",
                f"requires one parent for each of {len(targets)} different sequences; got {len(sources)}",
            )
        children = [self._get("select", p) for p in sources]
        if not targets:
            return
        chosen = list(self._sequences)
        for target, child in zip(targets, children, strict=True):
            chosen[target] = child
        arrays = self._own()
        before, copies = ([x[:, those] for x in arrays] for those in (targets, sources))
        try:
            for x, copied in zip(arrays, copies, strict=True):
                x[:, targets] = copied
            self._sequences, self._step = chosen, None
        except BaseException:
            for x, old in zip(arrays, before, strict=True):
                x[:, targets] = old
            raise

    def _own(self) -> list[Array]:
        """The arrays [layers, capacity, ...] in which each sequence has its own part."""
        return [*self._form.arrays, *([] if self._conv is None else [self._conv])]

    def _numbers(self, method: str, sequences: object, default: list[int]) -> list[int]:
        """The numbers of living sequences."""
        if sequences is None:
            return default
        numbers = sequences.tolist() if hasattr(sequences, "tolist") else sequences
        if isinstance(numbers, str) or not isinstance(numbers, Iterable):
            self._fail(method, f"requires a list of sequences; got {sequences!r}")
        found = list(numbers)
        return [int(s) for s in found if self._get(method, s)]

    def length(self, sequence: int) -> int:
        """Tokens that the sequence has seen, including uncommitted ones."""
        return self._get("length", sequence).length

    def recorded(self, sequence: int) -> int:
        """How many tokens the sequence can be taken back by now."""
        return int(self._form.recorded(self._get("recorded", sequence)))

    # ---- steps

    def begin(
        self,
        tokens: int | Sequence[int],
        sequences: Sequence[int] | None = None,
        *,
        record: bool = True,
        undo: bool = True,
    ) -> None:
        """Announce that the next `tokens` tokens of each sequence will run, in every layer.

        Args:
            tokens: T for all sequences (arrays are [N, T, ...]), or one number each (packed arrays, [1, sum T, ...]).
            sequences: the batch, in its order; all that live if None.
            record: False for tokens that are certain (a prefill, plain decoding): they are committed as they run, the
                states advance in place, and nothing before or among them can be rolled back.
            undo: whether `cancel` can put the sequences back once layers have run. Where a step overwrites the states
                that it began with (certain tokens, or more than the record holds), each layer copies them first,
                about as long as decoding a token takes. False saves that; `cancel` then ends such sequences.

        Raises:
            ValueError: no tokens, no such sequence, one named twice, or layers of the last step that have not run.
        """
        self._not_running("begin")
        batch, found = self._chosen("begin", sequences, self.sequences)
        lengths = self._counts("begin", "tokens", tokens, len(batch))
        if min(lengths) < 0 or max(lengths) < 1:
            self._fail("begin", f"tokens must be >= 1; got {tokens}")
        step = Step(
            batch,
            lengths,
            bool(record),
            bool(undo),
            before=self._sequences,
            batch_before=self._batch,
            cu=None if _is_int(tokens) else self._index([0, *np.cumsum(lengths).tolist()]),
            todo=set(range(self.layers)),
            conv_todo=set(range(self.layers if self._conv is not None else 0)),
        )
        after = list(self._sequences)
        self._form.begin(step, after)
        for place, s, n in zip(batch, found, lengths, strict=True):
            end = self._conv_room(step, s.conv_end, n) if self._conv is not None else 0
            rows, used, *_ = after[place] or s
            pending = s.pending if not n else s.pending + n if record else 0
            after[place] = LiveSequence(rows, used, pending, s.length + n, end)
        self._sequences, self._step, self._batch = after, step, batch

    def cancel(self) -> list[int]:
        """Take back the last `begin`, also if layers have run or failed since.

        Every sequence of the step is where it was, to the bit. Its history is complete if no layer has run; otherwise
        the step may have overwritten a part of it, and `recorded` says what is left. A step can be cancelled until the
        next call that changes the pool, such as `commit`.

        Returns:
            The sequences that could not be restored and were ended; none unless `begin(..., undo=False)`.

        Raises:
            ValueError: there is no step to take back.
        """
        step = self._step
        if step is None:
            self._fail(
                "cancel", "requires a begin that no commit or other change has followed; got none. Call begin"
            )
        for layer in step.conv_saved:
            self._conv_back(step, layer)
        sequences = list(step.before)
        lost: list[int] = self._form.cancel(step, sequences)
        for place in lost:
            sequences[place] = None
        batch = step.batch_before
        self._batch = batch if batch is None else [s for s in batch if s not in lost]
        self._accept(sequences)
        return lost

    @contextmanager
    def step(
        self,
        tokens: int | Sequence[int],
        sequences: Sequence[int] | None = None,
        *,
        record: bool = True,
        undo: bool = True,
    ) -> Iterator[StatePool]:
        """`begin`, and `cancel` if the block raises before it commits:

        with pool.step(5):
            ...                                    # the layers, and whatever may fail
            pool.commit(3)

        Raises:
            ValueError: as `begin`.
        """
        before = self._step
        try:
            self.begin(tokens, sequences, record=record, undo=undo)
            yield self
        except BaseException:
            if self._step is not None and self._step is not before:
                self.cancel()
            raise

    def run(
        self, q: Array, k: Array, v: Array, *, g: Array, beta: Array, layer: int = 0, **options: object
    ) -> Array:
        """The rule over the tokens announced by `begin`, in one layer.

        Args:
            q: as for `gated_delta_rule`, with one row per sequence of the batch (packed: one row).
            k: as q.
            v: as q.
            g: as for `gated_delta_rule`.
            beta: as for `gated_delta_rule`.
            layer: which layer's states.
            options: the other arguments of `gated_delta_rule`: scale, decay, A_log, heads, qk_l2norm, mask, ...

        Returns:
            o [N, T, HV, V]

        Raises:
            ValueError, TypeError: no begin, a layer that has run already, other token counts than announced, or an
                invalid call. The layer then still has to run.
        """
        step = self._running("run", layer)
        if _shape(q)[:2] != (want := self._lead(step)):
            self._fail(
                "run", f"q must be [{want[0]}, {want[1]}, H, K] as begin announced; got {list(_shape(q))}"
            )
        o = self._form.run(step, layer, q, k, v, g=g, beta=beta, **options)
        step.todo.discard(layer)
        return o

    def arguments(self, layer: int = 0) -> dict[str, Array]:
        """The states that a layer reads and writes, for callers that run the operator themselves (slots only):
        `gated_delta_rule_(q, k, v, g=g, beta=beta, **pool.arguments(layer))`. The layer then counts as run.

        Raises:
            ValueError: as `run`; or the pool keeps a log.
        """
        if self.form != "slots":
            self._fail("arguments", "requires slots; got a log, whose states only run() can advance")
        step = self._running("arguments", layer)
        found: dict[str, Array] = self._form.arguments(step, layer)
        step.todo.discard(layer)
        return found

    def _running(self, method: str, layer: int, conv: bool = False) -> Step:
        """The current step, in which this layer must not have run yet."""
        if not _is_int(layer) or not 0 <= layer < self.layers:
            self._fail(method, f"layer must be in [0, {self.layers}); got {layer!r}")
        step = self._step
        if step is None or layer not in (step.conv_todo if conv else step.todo):
            self._fail(method, f"requires begin, once for each step; got layer {layer} without one")
        if not conv and not step.undo and layer in step.touched:
            self._fail(
                method, f"requires cancel(); got layer {layer}, which failed in the middle, and no undo"
            )
        return step

    def _lead(self, step: Step) -> tuple[int, int]:
        """The first two axes of this step's arrays."""
        return (len(step.batch), step.lengths[0]) if step.cu is None else (1, sum(step.lengths))

    def commit(self, accepted: int | Sequence[int], sequences: Sequence[int] | None = None) -> None:
        """Keep the first `accepted` tokens of those run since the last commit; the rest never happened.

        Nothing is copied and no model runs again; in slots no state is touched.

        Args:
            accepted: one number for all sequences, or one each.
            sequences: those of the last `begin` if None.

        Raises:
            ValueError: nothing is pending (committed twice, no begin), more tokens than are pending, fewer than the
                record allows, or layers that have not run.
        """
        self._not_running("commit")
        batch, found = self._chosen("commit", sequences, self._batch or [])
        counts = self._counts("commit", "accepted", accepted, len(batch))
        back = []
        for place, s, n in zip(batch, found, counts, strict=True):
            if not s.pending:
                self._fail("commit", f"requires tokens run since the last commit; sequence {place} has none")
            if not 0 <= n <= s.pending:
                self._fail("commit", f"accepted must be in [0, {s.pending}] for sequence {place}; got {n}")
            back.append(s.pending - n)
        self._take_back("commit", batch, found, back)

    def rollback(self, tokens: int | Sequence[int], sequences: Sequence[int] | None = None) -> None:
        """Take each sequence back by its last `tokens` tokens, and commit the others.

        Tokens that were committed before can be taken back as well, as far as `recorded` says.

        Args:
            tokens: one number for all sequences, or one each.
            sequences: those of the last `begin` if None; all that live if there was none.

        Raises:
            ValueError: further back than is recorded, a negative number, or layers that have not run.
        """
        self._not_running("rollback")
        batch, found = self._chosen(
            "rollback", sequences, self.sequences if self._batch is None else self._batch
        )
        counts = self._counts("rollback", "tokens", tokens, len(batch))
        if min(counts, default=0) < 0:
            self._fail("rollback", f"tokens must be >= 0; got {tokens}")
        self._take_back("rollback", batch, found, counts)

    def fold(self, sequences: Sequence[int] | None = None) -> None:
        """Fold committed tokens into the states now; a full log does so by itself. They cannot be taken back
        afterwards. Slots have nothing to fold.

        Raises:
            ValueError: no such sequence, or layers that have not run.
        """
        self._not_running("fold")
        batch, _ = self._chosen("fold", sequences, self.sequences)
        self._form.fold(list(self._sequences), batch)

    def _chosen(
        self, method: str, sequences: object, default: list[int]
    ) -> tuple[list[int], list[LiveSequence]]:
        batch = self._numbers(method, sequences, default)
        if not batch or len(set(batch)) != len(batch):
            self._fail(method, f"requires at least one sequence, each once; got {batch}")
        return batch, [self._sequences[s] or self._get(method, s) for s in batch]

    def _counts(self, method: str, name: str, value: object, n: int) -> list[int]:
        counts = value.tolist() if hasattr(value, "tolist") else value
        if _is_int(counts):
            return [int(counts)] * n
        counts = list(counts) if isinstance(counts, Iterable) else [counts]
        if len(counts) != n or not all(map(_is_int, counts)):
            self._fail(method, f"{name} must be an int or one per sequence, {n} ints; got {value!r}")
        return [int(x) for x in counts]

    def _take_back(self, method: str, batch: list[int], found: list[LiveSequence], back: list[int]) -> None:
        for place, s, n in zip(batch, found, back, strict=True):
            if n > (recorded := self._form.recorded(s)):
                self._fail(
                    method,
                    f"requires a way back of {n} tokens for sequence {place}; "
                    f"{recorded} are recorded (snapshots={self.snapshots})",
                )
        after = list(self._sequences)
        for place, s, n in zip(batch, found, back, strict=True):
            rows, used = self._form.take_back(s, n) if n else (s.rows, s.used)
            after[place] = LiveSequence(rows, used, 0, s.length - n, max(0, s.conv_end - n))
        self._accept(after)

    # ---- the convolution

    def _conv_room(self, step: Step, end: int, tokens: int) -> int:
        """Note where this step's inputs go, after those that end at `end`, and return their end. What must survive
        moves to the front if they do not fit."""
        size, start = 2 * self._kept + 1, max(0, end - self._kept)
        if end + tokens <= size:
            step.conv.append((start, end, end))
            return end + tokens
        if end - start + tokens <= size:
            step.conv.append((start, end, end - start))
            return end - start + tokens
        step.conv.append((start, end, -1))  # a long prefill: only its end stays
        return self._kept

    def conv_inputs(self, x: Array, *, layer: int = 0) -> Array:
        """Record the convolution's inputs of this step, and return them after the W-1 earlier ones.

        Args:
            x: [N, T, C] raw inputs, before the convolution (packed: [1, sum T, C]).

        Returns:
            [N, W-1+T, C], what a convolution without padding takes; packed: a list of [W-1+T_n, C].

        Raises:
            ValueError: no begin, a layer called twice, a wrong shape, or a pool without a convolution.
        """
        if self._conv is None:
            self._fail(
                "conv_inputs", "requires conv_channels and conv_width; got a pool without a convolution"
            )
        step = self._running("conv_inputs", layer, conv=True)
        want = [*self._lead(step), self.conv_channels]
        if _shape(x) != tuple(want):
            self._fail(
                "conv_inputs", f"x must be [N, T, C] = {want} as begin announced; got {list(_shape(x))}"
            )
        if self.device is None and not isinstance(x, np.ndarray):
            raise TypeError(
                f"StatePool.conv_inputs: x must be a NumPy array, as the pool's are; got {type(x).__name__}"
            )
        if self.device is not None and isinstance(x, np.ndarray):
            raise TypeError("StatePool.conv_inputs: x must be a tensor, as the pool's are; got a NumPy array")
        own = x if self.device is None else x.detach()  # the record has no gradient
        taps, buffers = self.conv_width - 1, self._conv[layer]
        self._conv_back(step, layer)
        pieces, news, saved, at = [], [], [], 0
        for i, (place, n, (start, end, to)) in enumerate(
            zip(step.batch, step.lengths, step.conv, strict=True)
        ):
            rows = (i,) if step.cu is None else (0, slice(at, at + n))
            at += n
            pieces.append(self._join(buffers[place, end - taps : end], x[rows]))
            news.append(own[rows])
            saved.append(None if to == end else self._copy(buffers[place, start:end]))
        windows = pieces if step.cu is not None else self._stack(pieces)
        step.conv_saved[layer] = saved
        try:
            for place, n, (start, end, to), new, old in zip(
                step.batch, step.lengths, step.conv, news, saved, strict=True
            ):
                if to < 0:
                    buffers[place, : self._kept] = new[n - self._kept :]
                    continue
                if to < end:
                    buffers[place, : end - start] = old
                buffers[place, to : to + n] = new
        except BaseException:
            self._conv_back(step, layer)
            raise
        step.conv_todo.discard(layer)
        return windows

    def _conv_back(self, step: Step, layer: int) -> None:
        """Put back what conv_inputs has moved or overwritten in a layer."""
        for place, (start, end, _), old in zip(
            step.batch, step.conv, step.conv_saved.get(layer, []), strict=False
        ):
            if old is not None:
                self._conv[layer, place, start:end] = old  # type: ignore[index]

    # ---- checkpoints

    def state(self, sequence: int) -> Array:
        """A copy of the sequence's recurrent states, [layers, HV, K, V] (or V, K)."""
        self._not_running("state")
        return self._form.state(sequence, self._get("state", sequence))

    def save(self, sequence: int, tokens: Iterable[int] | None = None) -> Checkpoint:
        """A copy of the sequence's states, for `Checkpoints` or `restore`, in this pool or another.

        Raises:
            ValueError: no such sequence, or tokens of it that are not committed.
        """
        self._not_running("save")
        s = self._get("save", sequence)
        if s.pending:
            self._fail("save", f"requires a committed sequence; {s.pending} tokens of {sequence} are pending")
        conv = None
        if self._conv is not None:
            conv = self._copy(self._conv[:, sequence, s.conv_end - self.conv_width + 1 : s.conv_end])
        seen = None if tokens is None else tuple(int(t) for t in tokens)
        return Checkpoint(self._form.state(sequence, s), conv, self.state_layout, s.length, seen)

    def restore(self, checkpoint: Checkpoint) -> int:
        """A new sequence that continues from a checkpoint. It cannot go back beyond it.

        Raises:
            ValueError: the checkpoint is of another kind of pool, or every place is taken.
        """
        self._not_running("restore")
        if not isinstance(checkpoint, Checkpoint):
            raise TypeError(
                f"StatePool.restore: requires a Checkpoint, as save returns; got {type(checkpoint).__name__}"
            )
        tail = (self.HV, self.K, self.V) if self.state_layout == "kv" else (self.HV, self.V, self.K)
        want: list[object] = [(self.layers, *tail), self.state_layout, None]
        if self._conv is not None:
            want[2] = (self.layers, self.conv_width - 1, self.conv_channels)
        got = [
            _shape(checkpoint.states),
            checkpoint.state_layout,
            None if checkpoint.conv is None else _shape(checkpoint.conv),
        ]
        if want != got:
            self._fail("restore", f"requires states, layout and convolution inputs {want}; got {got}")
        for name in ("states", "conv") if checkpoint.conv is not None else ("states",):
            if (dtype := str(getattr(checkpoint, name).dtype).removeprefix("torch.")) not in FLOATS:
                self._fail("restore", f"requires {name} in one of {', '.join(FLOATS)}; got {dtype}")
        if not _is_int(checkpoint.length) or checkpoint.length < 0:
            self._fail("restore", f"requires a length >= 0 in tokens; got {checkpoint.length!r}")
        states = self._like(checkpoint.states)
        conv = 0 if checkpoint.conv is None else self._like(checkpoint.conv)
        if self.resident is not None:
            states = states.astype(numpy_dtype(self.dtype), copy=False)
        return self._start("restore", states, conv, int(checkpoint.length))

    def nbytes(self) -> dict[str, int]:
        """Bytes held: "states" (slots: capacity * snapshots states; log: capacity; and copies that `cancel` needs),
        "log", "conv", and "per_sequence": all of it divided by the capacity."""
        out = dict(self._form.nbytes())
        out["conv"] = 0 if self._conv is None else nbytes(self._conv)
        out["per_sequence"] = sum(out.values()) // self.capacity
        return out


def _resident(device: object) -> Device | None:
    """The anydelta device that holds the states, or None for a torch device."""
    if isinstance(device, str) and device.partition(":")[0] in KINDS:
        return open_device(device)
    return device if isinstance(device, Device) else None


def _is_int(x: object) -> TypeGuard[int]:
    return isinstance(x, (int, np.integer)) and not isinstance(x, bool)


def _shape(x: Array) -> tuple[int, ...]:
    return tuple(getattr(x, "shape", ()))
