"""The spec of a log's step, and the protocol of a backend that runs such steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

from ..core.accepts import Accepts
from ..core.arrays import Array
from ..rule.arguments import Call, Options
from ..rule.spec import AroundRule, CallSpec

Fold = tuple[int, int, int, int]
"""(sequence, row of its state, row that receives the folded one, entries)"""
Index = tuple[Array, ...]
"""[N] each: rows of the states, sequences, entries before the step, and whether the kernel folds them."""


@dataclass(frozen=True)
class LogSpec(AroundRule):
    """A valid step of a log, without its data: what a backend needs to accept or refuse it."""

    rule: CallSpec
    """The same step as an in-place call on the base states."""
    entries: int
    """C: the capacity of a sequence's log, in tokens."""
    key_dtype: str

    part: ClassVar[str] = "log"

    @property
    def options(self) -> Options:
        return self.rule.options._replace(op="StatePool.run")

    @property
    def given(self) -> tuple[str, ...]:
        return self.rule.given

    def shape_line(self) -> str:
        """The step in one line, in the names of the contract."""
        return f"{self.rule.shape_line()} log of {self.entries} entries, keys in {self.key_dtype}"


class LogArrays(Protocol):
    """The arrays of a log and what they are: see `token_log.Log`."""

    C: int
    layers: int
    states: Array
    keys: Array
    factors: Array
    deltas: Array
    decays: Array
    parents: Array
    key_dtype: str
    order: str | None

    @property
    def arrays(self) -> tuple[Array, Array, Array, Array]: ...

    def rule(self, sequences: int) -> CallSpec:
        """A call in float32 without tokens, on the states of `sequences` sequences."""
        ...

    def like(self, x: Array) -> Array:
        """A NumPy array as the pool's kind of array."""
        ...


class LogSteps(Protocol):
    """The steps of one log on one backend."""

    def prepare(self, spec: LogSpec, call: Call) -> object:
        """Prepare what `verify` needs for such calls; all logs share it."""
        ...

    def verify(
        self,
        plan: object,
        spec: LogSpec,
        layer: int,
        call: Call,
        index: Index,
        folded: dict[int, None] | None,
    ) -> Array:
        """Run tokens and append them to the log. If entries are folded on the way, the layer is added to `folded`.
        Returns o."""
        ...

    def fold(self, group: list[Fold], layer: int, out: Array | None, folded: dict[int, None] | None) -> None:
        """Fold entries of different sequences in one layer, into `out` if given; the layer is added to `folded`."""
        ...


class LogBackend(Protocol):
    """The protocol of `LOG` in the module that a backend names in `log`."""

    name: str
    accepts: Accepts
    folds_late: bool
    """Whether `verify` folds entries on its way through the state."""

    def attach(self, log: LogArrays) -> LogSteps:
        """The steps of one log, for this process and these arrays, which must not move."""
        ...
