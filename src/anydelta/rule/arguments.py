"""The table of the rule's arguments, one row each. core/arguments.py says what is generated from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, NamedTuple, Protocol

from ..core.arguments import ArrayRow, ChoiceRow, FlagRow, NumberRow, Operator, arrays, plain
from ..core.arrays import Array

# Shared by rule and mixer.
Scale = Annotated[float | None, NumberRow()]
Decay = Annotated[str, ChoiceRow(("log", "linear", "raw"))]
LowerBound = Annotated[float | None, NumberRow(maximum=0, why=", as the log decay is")]
Heads = Annotated[str, ChoiceRow(("interleaved", "tiled"))]
Flag = Annotated[bool, FlagRow()]
Eps = Annotated[float, NumberRow(minimum=0)]
StateLayout = Annotated[str, ChoiceRow(("kv", "vk"))]

Gate = Annotated[Array, ArrayRow("[B, T, HV] or [B, T, HV, K]", "gate")]
Beta = Annotated[Array, ArrayRow("[B, T, HV]", "gate")]
Snapshots = Annotated[Array, ArrayRow("[Ks, N, HV, K, V]", "state", optional=True, written=True)]
ALog = Annotated[Array, ArrayRow("[HV]", "weight", optional=True)]
DtBias = Annotated[Array, ArrayRow("[HV], for KDA [HV, K] or [HV * K]", "weight", optional=True)]
Mask = Annotated[Array, ArrayRow("[B, T]", "flag", optional=True)]
CuSeqlens = Annotated[Array, ArrayRow("[N+1]", "index", optional=True)]
StateIndices = Annotated[Array, ArrayRow("[N]", "index", optional=True)]
SnapshotIndices = Annotated[Array, ArrayRow("[Ks, N]", "index", optional=True)]


class Options(NamedTuple):
    """The arguments of a call that are not arrays. See `anydelta.gated_delta_rule` for their meaning."""

    op: str = "gated_delta_rule"
    scale: Scale = None
    decay: Decay = "log"
    lower_bound: LowerBound = None
    beta_is_logit: Flag = False
    heads: Heads = "interleaved"
    qk_l2norm: Flag = False
    qk_l2norm_eps: Eps = 1e-6
    state_layout: StateLayout = "kv"
    output_final_state: Flag = True


@dataclass(slots=True)
class Call:
    """The arrays of one call. Backends read the inputs and write `o`, `state_out` and `snapshots`.

    `state_out` is `state_in` itself for the in-place op, and None when no final state is wanted. With
    `state_indices`, `state_in` is a pool [P, ...]; `state_out` is that pool (in place) or dense [N, ...]. With
    `snapshot_indices` [Ks, N] the snapshots are rows of that pool, and nothing else of it is written.
    """

    q: Annotated[Array, ArrayRow("[B, T, H, K]")]
    k: Annotated[Array, ArrayRow("[B, T, H, K]")]
    v: Annotated[Array, ArrayRow("[B, T, HV, V]")]
    g: Gate
    beta: Annotated[Array, ArrayRow("[B, T, HV]", "gate", optional=True, explicit=True)] = None
    state_in: Annotated[
        Array, ArrayRow("[N, HV, K, V]", "state", optional=True, public=("initial_state", "state"))
    ] = None
    snapshots: Snapshots = None
    A_log: ALog = None
    dt_bias: DtBias = None
    mask: Mask = None
    cu_seqlens: CuSeqlens = None
    state_indices: StateIndices = None
    snapshot_indices: SnapshotIndices = None
    erase: Annotated[Array, ArrayRow("[B, T, H or HV, K]", optional=True)] = None
    state_out: Annotated[Array, ArrayRow("[N, HV, K, V]", "state", result=True)] = None
    o: Annotated[Array, ArrayRow("[B, T, HV, V]", result=True)] = None


TOKENS = arrays(Call, "token", "gate")
"""Arrays with an entry per token."""
TRACKED = tuple(n for n in arrays(Call, "token", "gate", "weight", "state") if n != "snapshots")
"""The arguments that may have a gradient."""

FUNCTIONAL = Operator(
    "gated_delta_rule", "gated_delta_rule", Call, Options, "(Tensor, Tensor)", False,
    without=("snapshots", "snapshot_indices"),
)  # fmt: skip
SNAPSHOTS = Operator(
    "gated_delta_rule_snapshots", "gated_delta_rule", Call, Options, "(Tensor, Tensor)", False, required=("snapshots",),
    without=("snapshot_indices",),
)  # fmt: skip
INPLACE = Operator(
    "gated_delta_rule_", "gated_delta_rule_", Call, Options, "Tensor", True, required=("state_in",),
    without=("output_final_state",),
)  # fmt: skip
PLAIN = plain(Options, INPLACE.flags)
"""The options that the CPU's kernels read as they are. Choices, and numbers that may be None, are converted first."""
OPERATORS = (FUNCTIONAL, SNAPSHOTS, INPLACE)
"""The operators that the C++ library has too."""


class _Strength(Protocol):
    @property
    def beta_is_logit(self) -> bool: ...


def write_strength(
    beta: Array, options: _Strength, sigmoid: Callable[[Array], Array] = lambda beta: beta.sigmoid()
) -> Array:
    """beta after the sigmoid if the options of a call (rule or mixer) ask for it; `sigmoid` is torch's by default."""
    return sigmoid(beta) if options.beta_is_logit else beta
