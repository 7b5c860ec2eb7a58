"""The table of the mixer's arguments, with the rule's, a row each. core/arguments.py says what is generated from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, NamedTuple

from ..core.arguments import ArrayRow, ChoiceRow, Operator, arrays
from ..core.arrays import Array
from ..rule.arguments import (
    ALog,
    Beta,
    CuSeqlens,
    Decay,
    DtBias,
    Eps,
    Flag,
    Gate,
    Heads,
    LowerBound,
    Mask,
    Options,
    Scale,
    SnapshotIndices,
    Snapshots,
    StateIndices,
    StateLayout,
)


class MixerOptions(NamedTuple):
    """The arguments of a mixer call that are not arrays. See `anydelta.gated_delta_mixer` for their meaning."""

    op: str = "gated_delta_mixer"
    activation: Annotated[str | None, ChoiceRow(("silu", None))] = "silu"
    scale: Scale = None
    decay: Decay = "raw"
    lower_bound: LowerBound = None
    beta_is_logit: Flag = True
    allow_neg_eigval: Flag = False
    heads: Heads = "interleaved"
    qk_l2norm: Flag = True
    qk_l2norm_eps: Eps = 1e-6
    norm_eps: Eps = 1e-6
    norm_gate: Annotated[str, ChoiceRow(("silu", "sigmoid"))] = "silu"
    state_layout: StateLayout = "kv"

    def of_rule(self, *, weighted: bool = False) -> Options:
        """The options of the rule inside. `weighted`: its beta has already been through the sigmoid."""
        inside = Options(**{n: getattr(self, n) for n in Options._fields if n in self._fields})
        return inside._replace(beta_is_logit=False) if weighted else inside


@dataclass(slots=True)
class MixerCall:
    """The arrays of one call. Backends read the inputs, advance `conv_state` and `state`, write `o` and the snapshots.

    `qkv` is the packed array, with `k` and `v` None, or q alone.
    """

    qkv: Annotated[Array, ArrayRow("[B, T, 2 H K + HV V] or q [B, T, H * K]")]
    k: Array
    v: Array
    conv_state: Annotated[Array, ArrayRow("[N, C, S]", "state", written=True)]
    state: Annotated[Array, ArrayRow("[N, HV, K, V]", "state", written=True)]
    g: Gate
    beta: Beta
    conv_weight: Annotated[Array, ArrayRow("[C, W]", "weight")]
    snapshots: Snapshots = None
    conv_snapshots: Annotated[Array, ArrayRow("[Ks, N, C, S]", "state", optional=True, written=True)] = None
    conv_bias: Annotated[Array, ArrayRow("[C]", "weight", optional=True)] = None
    A_log: ALog = None
    dt_bias: DtBias = None
    z: Annotated[Array, ArrayRow("[B, T, HV * V]", optional=True)] = None
    norm_weight: Annotated[Array, ArrayRow("[V]", "weight", optional=True)] = None
    mask: Mask = None
    cu_seqlens: CuSeqlens = None
    state_indices: StateIndices = None
    snapshot_indices: SnapshotIndices = None
    o: Annotated[Array, ArrayRow("[B, T, HV * V]", result=True)] = None


INPLACE = Operator(
    "gated_delta_mixer_", "gated_delta_mixer_", MixerCall, MixerOptions, "Tensor", True, lists=("qkv",)
)
FUNCTIONAL = Operator(
    "gated_delta_mixer", "gated_delta_mixer", MixerCall, MixerOptions, "(Tensor, Tensor, Tensor)", False,
    without=("snapshots", "conv_snapshots", "snapshot_indices"), lists=("qkv",), reads=("conv_state", "state"),
)  # fmt: skip
TRACKED = ("qkv", "k", "v", *(n for n in arrays(MixerCall, "token", "gate", "weight", "state")
                              if n not in ("qkv", "snapshots", "conv_snapshots")))  # fmt: skip
"""The arguments that may have a gradient."""
