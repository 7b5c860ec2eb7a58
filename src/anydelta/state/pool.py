"""Commit and rollback: the recurrent and convolution states of many sequences, and the way back.

    pool = StatePool(8, HV=32, K=128, V=128, layers=36, snapshots=5, conv_channels=8192, conv_width=4)
    s = pool.new()
    pool.begin(5)                                  # five tokens of every sequence are about to run
    for layer in range(36):
        window = pool.conv_inputs(x, layer=layer)                        # [N, W-1+T, C]
        o = pool.run(q, k, v, g=g, beta=beta, layer=layer)               # [N, T, HV, V]
    pool.commit(3)                                 # keep the first three; the last two never happened

A recurrent state cannot be cropped as a key-value cache can. The pool keeps the way back in one of two forms:

    slots   the last `snapshots` states of a sequence, each a row of the pool; a rollback chooses another row
    log     one state, and per token since k, the delta d and the decay (log.py); a rollback shortens the log

Sequences are numbers that `new`, `fork` and `restore` give out. One pool holds all layers of a model, which run the
same tokens: the book-keeping is done once for all of them. A call that raises has changed nothing. A pool is
used by one thread at a time; different pools know nothing of each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import numpy as np

from ..devices import KINDS, Device
from ..devices import device as open_device
from ..spec import LAYOUTS
from .log import Log
from .sequence import LiveSequence, nbytes
from .slots import Slots
from .snapshots import Snapshot

Array = Any
FORMS = ("slots", "log")
KEY_DTYPES = ("float32", "bfloat16", "float16")


class StatePool:
    """The states of up to `capacity` sequences in all layers of a model.

    Args:
        capacity: how many sequences may live at once.
        HV, K, V: heads and sizes of a state, as in `gated_delta_rule`; H: q/k heads (for the log; HV if None).
        layers: linear attention layers that share the pool.
        snapshots: K of the contract. A sequence can be taken back by 0 to K - 1 tokens.
        form: "slots" or "log"; docs/rollback.md says which is faster when.
        kda: whether the gates are vectors over K (the log stores them).
        key_dtype: in which the log keeps the keys. "float32" takes any; "bfloat16" and "float16" take k of that type
            only, keep its bits, and need less memory.
        conv_channels, conv_width: C and W of the short convolution before the rule; its last W-1+K raw inputs are
            kept, so that it goes back with the states. 0: no convolution.
        dtype: "float32" or "bfloat16", of the states. conv_dtype: of the convolution's inputs, "float32" if None.
        state_layout: "kv" or "vk".
        device: None for NumPy arrays; a torch device for tensors; or one of `anydelta.device`, by its name ("vulkan:0")
            or opened, on which the states then stay. The other arrays are NumPy's there, and the form is "slots".
        backend: as for `gated_delta_rule_`.

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
        device: Any = None,
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
            ("state_layout", state_layout, LAYOUTS),
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
        self._sequences: list[LiveSequence | None] = [None] * capacity
        self._batch: list[int] = []
        self._lengths: list[int] = []
        self._todo: set[int] = set()  # layers whose rule has yet to run
        self._conv_todo: set[int] = set()
        self._certain = False  # the tokens of this begin are committed as they run
        self._undo: Any = None  # how `cancel` restores the book-keeping
        tail = (HV, K, V) if state_layout == "kv" else (HV, V, K)
        self._form: Any
        if form == "slots":
            self._form = Slots(self, tail)
        else:
            self._form = Log(self, tail)
        # What must survive a step, and as much again, so that moving it to the front is rare.
        self._kept = conv_width - 1 + snapshots if conv_width else 0
        self._conv = None
        if conv_width:
            shape = (layers, capacity, 2 * self._kept + 1, conv_channels)
            self._conv = self._zeros(shape, conv_dtype or "float32")
        self._conv_at: list[tuple[int, int]] = []  # per sequence of the batch: (read up to, write from)

    # ---- arrays of either kind

    def _zeros(self, shape: tuple[int, ...], dtype: str | None = None) -> Array:
        name = dtype or self.dtype
        if self.device is not None:
            import torch

            return torch.zeros(shape, dtype=getattr(torch, name), device=self.device)
        if name == "bfloat16":
            import ml_dtypes

            return np.zeros(shape, ml_dtypes.bfloat16)
        return np.zeros(shape, name)

    def _index(self, values: Any) -> Array:
        if self.device is not None:
            import torch

            return torch.tensor(values, dtype=torch.int64, device=self.device)
        return np.array(values, np.int64)

    def _copy(self, x: Array) -> Array:
        return x.clone() if self.device is not None else x.copy()

    def _fail(self, method: str, text: str) -> NoReturn:
        raise ValueError(f"StatePool.{method}: {text}")

    # ---- sequences

    @property
    def sequences(self) -> list[int]:
        """The sequences that live, in ascending order."""
        return [i for i, s in enumerate(self._sequences) if s is not None]

    def _get(self, method: str, sequence: int) -> LiveSequence:
        found = None
        if isinstance(sequence, (int, np.integer)) and 0 <= sequence < self.capacity:
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
        if self._todo or self._conv_todo:
            self._fail(method, f"requires that all layers have run since begin; {self._missing()}")

    def _missing(self) -> str:
        parts = [
            f"{len(left)} of {self.layers} {what} are missing"
            for left, what in ((self._todo, "calls of run"), (self._conv_todo, "calls of conv_inputs"))
            if left
        ]
        return "got a step of which " + " and ".join(parts) + ". Run them, or cancel()"

    def new(self) -> int:
        """A sequence that has seen nothing: states and convolution inputs of zeros.

        Raises:
            ValueError: every place is taken.
        """
        self._not_running("new")
        place = self._vacancy("new")
        s = LiveSequence([self._form.fresh(place)])
        if self._conv is not None:
            s.conv_end = self.conv_width - 1
            self._conv[:, place, : s.conv_end] = 0
        self._sequences[place] = s
        return place

    def fork(self, sequence: int) -> int:
        """A second sequence with the same past, its way back included.

        The recurrent state is shared and copied by nobody: the next step of either writes elsewhere. The
        convolution's inputs (and a log) are copied, being small.

        Raises:
            ValueError: no such sequence, or every place is taken.
        """
        self._not_running("fork")
        parent = self._get("fork", sequence)
        place = self._vacancy("fork")
        self._sequences[place] = child = parent.copy()
        self._form.share(sequence, place, child)
        if self._conv is not None:
            self._conv[:, place] = self._conv[:, sequence]
        return place

    def free(self, sequence: int) -> None:
        """End a sequence. Its rows serve others.

        Raises:
            ValueError: no such sequence.
        """
        self._not_running("free")
        s = self._get("free", sequence)
        self._form.release(sequence, s)
        self._sequences[sequence] = None

    def select(self, parents: Sequence[int], sequences: Sequence[int] | None = None) -> None:
        """Beam search's step: sequence i of `sequences` (all if None) goes on from the past of parents[i].

        Raises:
            ValueError: lists of different lengths, or no such sequence.
        """
        self._not_running("select")
        targets = self.sequences if sequences is None else [int(s) for s in sequences]
        sources = [int(p) for p in parents]
        if len(targets) != len(sources) or len(set(targets)) != len(targets):
            self._fail(
                "select",
                f"requires one parent for each of {len(targets)} different sequences; got {len(sources)}",
            )
        for s in (*targets, *sources):
            self._get("select", s)
        children = [self._get("select", p).copy() for p in sources]
        conv = None
        if self._conv is not None:
            conv = self._copy(self._conv[:, sources])
        self._form.select(sources, targets, children)
        for i, (target, child) in enumerate(zip(targets, children, strict=True)):
            self._sequences[target] = child
            if conv is not None:
                self._conv[:, target] = conv[:, i]  # type: ignore[index]

    def length(self, sequence: int) -> int:
        """Tokens that the sequence has seen, those not yet committed included."""
        return self._get("length", sequence).length

    def recorded(self, sequence: int) -> int:
        """How many tokens the sequence could be taken back by now."""
        return int(self._form.recorded(sequence, self._get("recorded", sequence)))

    # ---- steps

    def begin(
        self, tokens: int | Sequence[int], sequences: Sequence[int] | None = None, *, record: bool = True
    ) -> None:
        """Announce that the next `tokens` tokens of each sequence will run, in every layer.

        Args:
            tokens: T for all sequences (arrays are [N, T, ...]), or one number each (packed arrays, [1, sum T, ...]).
            sequences: the batch, in its order; all that live if None.
            record: False for tokens that are certain (a prefill, plain decoding): they are committed as they run, the
                states advance in place, and nothing before or among them can be rolled back.

        Raises:
            ValueError: no tokens, no such sequence, one named twice, or layers of the last step that have not run.
        """
        self._not_running("begin")
        batch = self.sequences if sequences is None else [int(s) for s in sequences]
        if not batch or len(set(batch)) != len(batch):
            self._fail("begin", f"requires at least one sequence, each once; got {batch}")
        found = [self._get("begin", s) for s in batch]
        packed = not isinstance(tokens, (int, np.integer))
        lengths = self._counts("begin", "tokens", tokens, len(batch))
        if min(lengths) < 0 or max(lengths) < 1:
            self._fail("begin", f"tokens must be >= 1; got {tokens}")
        self._form.check(batch, found, lengths, record)
        self._form.room(batch, found, lengths, record)
        before = [s.copy() for s in found]
        self._batch, self._lengths, self._certain = batch, lengths, not record
        self._undo = (before, self._form.begin(batch, found, lengths, 1 if not record else self.snapshots))
        self._cu = None
        if packed:
            self._cu = self._index([0, *np.cumsum(lengths).tolist()])
        self._todo = set(range(self.layers))
        if self._conv is not None:
            self._conv_todo = set(range(self.layers))
            self._conv_at = [
                self._conv_room(place, s, n) for place, s, n in zip(batch, found, lengths, strict=True)
            ]
        for s, n in zip(found, lengths, strict=True):
            s.length += n
            s.pending = s.pending + n if record else 0

    def cancel(self) -> None:
        """Take back a `begin` of which no layer has run yet.

        Raises:
            ValueError: there is none, or a layer has run.
        """
        started = len(self._todo) < self.layers or (
            self._conv is not None and len(self._conv_todo) < self.layers
        )
        if self._undo is None or started:
            self._fail("cancel", "requires a begin of which no layer has run; got none")
        before, token = self._undo
        for place, s in zip(self._batch, before, strict=True):
            self._sequences[place] = s
        self._form.cancel(token)
        self._undo = None
        self._todo, self._conv_todo = set(), set()

    def run(
        self, q: Array, k: Array, v: Array, *, g: Array, beta: Array, layer: int = 0, **options: Any
    ) -> Array:
        """The rule over the tokens announced by `begin`, in one layer.

        Args:
            q, k, v, g, beta: as for `gated_delta_rule`, with one row per sequence of the batch (packed: one row).
            layer: which layer's states.
            options: the other arguments of `gated_delta_rule`: scale, decay, A_log, heads, qk_l2norm, mask, ...

        Returns:
            o [N, T, HV, V]

        Raises:
            ValueError, TypeError: no begin, a layer that has run already, other token counts than announced, or an
                invalid call. The layer then still has to run.
        """
        self._check_layer("run", layer, self._todo)
        rows = 1 if self._cu is not None else len(self._batch)
        T = sum(self._lengths) if self._cu is not None else self._lengths[0]
        if tuple(q.shape[:2]) != (rows, T):
            self._fail("run", f"q must be [{rows}, {T}, H, K] as begin announced; got {list(q.shape)}")
        o = self._form.run(layer, q, k, v, g=g, beta=beta, **options)
        self._todo.discard(layer)
        return o

    def arguments(self, layer: int = 0) -> dict[str, Array]:
        """For callers that run the operator themselves (slots only): which states it reads and writes, as in
        `gated_delta_rule_(q, k, v, g=g, beta=beta, **pool.arguments(layer))`. The layer counts as run.

        Raises:
            ValueError: as `run`; or the pool keeps a log.
        """
        if self.form != "slots":
            self._fail("arguments", "requires slots; got a log, whose states only run() can advance")
        self._check_layer("arguments", layer, self._todo)
        self._todo.discard(layer)
        return self._form.arguments(layer)  # type: ignore[no-any-return]

    def _check_layer(self, method: str, layer: int, todo: set[int]) -> None:
        if not isinstance(layer, int) or not 0 <= layer < self.layers:
            self._fail(method, f"layer must be in [0, {self.layers}); got {layer!r}")
        if layer not in todo:
            self._fail(method, f"requires begin, once for each step; got layer {layer} without one")

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
        batch, found = self._chosen("commit", sequences, self._batch)
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

        Raises:
            ValueError: further back than is recorded, a negative number, or layers that have not run.
        """
        self._not_running("rollback")
        batch, found = self._chosen("rollback", sequences, self._batch or self.sequences)
        counts = self._counts("rollback", "tokens", tokens, len(batch))
        if min(counts, default=0) < 0:
            self._fail("rollback", f"tokens must be >= 0; got {tokens}")
        self._take_back("rollback", batch, found, counts)

    def fold(self, sequences: Sequence[int] | None = None) -> None:
        """Fold what is committed into the states now; a log does so by itself when it is full. Nothing before can be
        taken back then. Slots have nothing to fold.

        Raises:
            ValueError: no such sequence, or layers that have not run.
        """
        self._not_running("fold")
        batch, found = self._chosen("fold", sequences, self.sequences)
        self._form.fold(list(zip(batch, found, strict=True)))

    def _chosen(
        self, method: str, sequences: Sequence[int] | None, default: list[int]
    ) -> tuple[list[int], list[LiveSequence]]:
        batch = default if sequences is None else [int(s) for s in sequences]
        if not batch or len(set(batch)) != len(batch):
            self._fail(method, f"requires at least one sequence, each once; got {batch}")
        return batch, [self._get(method, s) for s in batch]

    def _counts(self, method: str, name: str, value: Any, n: int) -> list[int]:
        if isinstance(value, (int, np.integer)):
            return [int(value)] * n
        counts = value.tolist() if hasattr(value, "tolist") else list(value)
        if len(counts) != n or not all(isinstance(x, (int, np.integer)) for x in counts):
            self._fail(method, f"{name} must be an int or one per sequence, {n} ints; got {value!r}")
        return counts

    def _take_back(self, method: str, batch: list[int], found: list[LiveSequence], back: list[int]) -> None:
        for place, s, n in zip(batch, found, back, strict=True):
            if n and n > self._form.recorded(place, s):
                self._fail(
                    method,
                    f"requires a way back of {n} tokens for sequence {place}; "
                    f"{self._form.recorded(place, s)} are recorded (snapshots={self.snapshots})",
                )
        for place, s, n in zip(batch, found, back, strict=True):
            s.pending = 0
            if n:
                self._form.take_back(place, s, n)
                s.length -= n
                s.conv_end -= n
        self._undo = None

    # ---- the convolution

    def _conv_room(self, place: int, s: LiveSequence, tokens: int) -> tuple[int, int]:
        """Where to read and write this step's inputs; moves those that must survive to the front if they do not fit."""
        size = 2 * self._kept + 1
        assert self._conv is not None
        if s.conv_end + tokens > size and tokens <= size - self._kept:
            start = max(0, s.conv_end - self._kept)
            self._conv[:, place, : s.conv_end - start] = self._copy(self._conv[:, place, start : s.conv_end])
            s.conv_end -= start
        read = s.conv_end
        if read + tokens > size:  # a long prefill: only its end stays
            s.conv_end = self._kept
            return read, -1
        s.conv_end = read + tokens
        return read, read

    def conv_inputs(self, x: Array, *, layer: int = 0) -> Array:
        """Record the convolution's inputs of this step and return them behind the W-1 before them.

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
        self._check_layer("conv_inputs", layer, self._conv_todo)
        rows = 1 if self._cu is not None else len(self._batch)
        T = sum(self._lengths) if self._cu is not None else self._lengths[0]
        if tuple(x.shape) != (rows, T, self.conv_channels):
            want = [rows, T, self.conv_channels]
            self._fail("conv_inputs", f"x must be [N, T, C] = {want} as begin announced; got {list(x.shape)}")
        pieces, start = [], 0
        for i, (place, n) in enumerate(zip(self._batch, self._lengths, strict=True)):
            own = x[i] if self._cu is None else x[0, start : start + n]
            start += n
            buffer, (read, write) = self._conv[layer, place], self._conv_at[i]
            pieces.append(self._join(buffer[read - self.conv_width + 1 : read], own))
            if write >= 0:
                buffer[write : write + n] = own
            elif n >= self._kept:
                buffer[: self._kept] = own[n - self._kept :]
        self._conv_todo.discard(layer)
        if self._cu is not None:
            return pieces
        if self.device is not None:
            import torch

            return torch.stack(pieces)
        return np.stack(pieces)

    def _join(self, before: Array, own: Array) -> Array:
        if self.device is not None:
            import torch

            return torch.cat([before.to(own.dtype), own])
        return np.concatenate([before.astype(own.dtype, copy=False), own])

    # ---- checkpoints

    def state(self, sequence: int) -> Array:
        """A copy of the sequence's recurrent states, [layers, HV, K, V] (or V, K)."""
        self._not_running("state")
        return self._form.state(sequence, self._get("state", sequence))

    def save(self, sequence: int, tokens: Iterable[int] | None = None) -> Snapshot:
        """A checkpoint: a copy of the sequence's states, to be kept in `Snapshots` or restored, here or elsewhere.

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
        return Snapshot(self._form.state(sequence, s), conv, self.state_layout, s.length, seen)

    def restore(self, snapshot: Snapshot) -> int:
        """A new sequence that goes on from a checkpoint. There is no way back beyond it.

        Raises:
            ValueError: the checkpoint is of another kind of pool, or every place is taken.
        """
        self._not_running("restore")
        tail = (self.HV, self.K, self.V) if self.state_layout == "kv" else (self.HV, self.V, self.K)
        want: list[Any] = [(self.layers, *tail), self.state_layout]
        got: list[Any] = [tuple(snapshot.states.shape), snapshot.state_layout]
        if self._conv is not None:
            want.append((self.layers, self.conv_width - 1, self.conv_channels))
            got.append(None if snapshot.conv is None else tuple(snapshot.conv.shape))
        elif snapshot.conv is not None:
            want.append(None)
            got.append(tuple(snapshot.conv.shape))
        if want != got:
            self._fail("restore", f"requires states, layout and convolution inputs {want}; got {got}")
        place = self.new()
        s = self._get("restore", place)
        self._form.put(place, s, self._like(snapshot.states))
        s.length = snapshot.length
        if self._conv is not None:
            self._conv[:, place, : s.conv_end] = self._like(snapshot.conv)
        return place

    def _like(self, x: Array) -> Array:
        """x as this pool's kind of array."""
        if self.device is None:
            return x if isinstance(x, np.ndarray) else x.cpu().numpy()
        import torch

        return torch.as_tensor(x, device=self.device)

    def nbytes(self) -> dict[str, int]:
        """Bytes held: "states" (slots: capacity * snapshots states; log: capacity), "log", "conv", and
        "per_sequence": all of it divided by the capacity."""
        out = dict(self._form.nbytes())
        out["conv"] = 0 if self._conv is None else nbytes(self._conv)
        out["per_sequence"] = sum(out.values()) // self.capacity
        return out


def _resident(device: Any) -> Device | None:
    """The device of anydelta that holds the states, if it is one and not torch's."""
    if isinstance(device, str) and device.partition(":")[0] in KINDS:
        return open_device(device)
    return device if isinstance(device, Device) else None
