"""The table of families: Transformers' models that use the rule, one row each.

A family's functions are found automatically (.find). With these alone it runs the rule. A row adds the mixer: how the
layer's projections become its arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

if TYPE_CHECKING:
    import torch
    from transformers.models.bailing_hybrid.modeling_bailing_hybrid import BailingHybridDeltaAttention
    from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention
    from transformers.models.olmo_hybrid.modeling_olmo_hybrid import OlmoHybridGatedDeltaNet
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

    LinearAttention: TypeAlias = (
        BailingHybridDeltaAttention
        | KimiLinearDeltaAttention
        | OlmoHybridGatedDeltaNet
        | Qwen3NextGatedDeltaNet
        | Qwen3_5GatedDeltaNet
    )
    """A layer of the table. Other layers have the attributes of one of these."""


class Projected(NamedTuple):
    """The results of a family's projections, as arguments of the mixer."""

    qkv: torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    """[B, T, C], or (q, k, v)."""
    z: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    A_log: torch.Tensor
    dt_bias: torch.Tensor
    lower_bound: float | None = None


@dataclass(frozen=True)
class Family:
    """A layer of Transformers, and the attributes that the mixer needs."""

    name: str
    layer: str
    """The class of the linear attention layer, in the module `transformers.models.<name>.modeling_<name>`."""
    since: str
    """The first release of Transformers that has it, from 5.15 on, the first whose functions can be replaced."""
    rule: str
    """GDA or KDA."""
    project: Callable[[LinearAttention, torch.Tensor], Projected]
    holds: frozenset[str]
    """The modules and parameters of a layer that `project` knows. A layer with others is not taken."""
    norm: str
    out: str
    heads: tuple[str, str, str]
    """Attributes with HV, K and V."""
    gate: str = ""
    """The module with the decay's parameters, if the layer has not. `project` reads them and never calls it."""
    z: str = ""
    """The projection whose whole output is z, or "" if z is part of another."""
    mtp: bool = False
    """Whether Transformers can run multi-token prediction layers of the family."""
    multimodal: str = ""
    """The family's class that sees images."""

    @property
    def module(self) -> str:
        return f"transformers.models.{self.name}.modeling_{self.name}"


def _qkvz(layer: Qwen3_5GatedDeltaNet, x: torch.Tensor) -> Projected:
    m = layer._modules  # faster than attributes, for which nn.Module searches three dictionaries in Python
    return Projected(
        m["in_proj_qkv"](x),
        m["in_proj_z"](x),
        m["in_proj_a"](x),
        m["in_proj_b"](x),
        layer.A_log,
        layer.dt_bias,
    )


def _qwen3_next(layer: Qwen3NextGatedDeltaNet, x: torch.Tensor) -> Projected:
    """One projection holds q, k, v and z of each q/k head side by side, another b and a. Read without copies."""
    groups, K = layer.num_k_heads, layer.head_k_dim
    values = layer.num_v_heads // groups
    V = values * layer.head_v_dim
    qkvz = layer.in_proj_qkvz(x).unflatten(-1, (groups, 2 * K + 2 * V))
    q, k, v, z = qkvz.split((K, K, V, V), -1)
    b, a = layer.in_proj_ba(x).unflatten(-1, (groups, 2 * values)).split(values, -1)
    return Projected((q, k, v), z, a.flatten(-2), b.flatten(-2), layer.A_log, layer.dt_bias)


def _olmo_hybrid(layer: OlmoHybridGatedDeltaNet, x: torch.Tensor) -> Projected:
    qkv = (layer.q_proj(x), layer.k_proj(x), layer.v_proj(x))
    return Projected(qkv, layer.g_proj(x), layer.a_proj(x), layer.b_proj(x), layer.A_log, layer.dt_bias)


def _low_rank(layer: KimiLinearDeltaAttention, x: torch.Tensor) -> Projected:
    """KDA whose decay and output gate each have two narrow projections (kimi_linear, glm5_next)."""
    qkv = (layer.q_proj(x), layer.k_proj(x), layer.v_proj(x))
    forget = layer.forget_gate
    a = forget.f_b_proj(forget.f_a_proj(x)).unflatten(-1, (layer.num_heads, layer.head_dim))
    z = layer.g_b_proj(layer.g_a_proj(x))
    bound = getattr(forget, "safe_gate_lower_bound", None)
    return Projected(qkv, z, a, layer.b_proj(x), forget.A_log.view(-1), forget.dt_bias, bound)


def _full_rank(layer: BailingHybridDeltaAttention, x: torch.Tensor) -> Projected:
    """KDA with one projection each for the decay and the output gate (bailing_hybrid)."""
    qkv = (layer.q_proj(x), layer.k_proj(x), layer.v_proj(x))
    forget = layer.forget_gate
    a = forget.f_proj(x).unflatten(-1, (layer.num_heads, layer.head_dim))
    bound = forget.lower_bound if forget.safe_gate else None
    return Projected(qkv, layer.g_proj(x), a, layer.b_proj(x), forget.A_log, forget.dt_bias, bound)


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_GDN = _names("conv1d norm out_proj A_log dt_bias")
_QKVZ = _GDN | _names("in_proj_qkv in_proj_z in_proj_a in_proj_b")
_KDA = _names(
    "q_proj k_proj v_proj b_proj conv1d forget_gate o_norm o_proj forget_gate.A_log forget_gate.dt_bias"
)
_NARROW = _KDA | _names("g_a_proj g_b_proj forget_gate.f_a_proj forget_gate.f_b_proj")
_HEADS = ("num_v_heads", "head_k_dim", "head_v_dim")
_SQUARE = ("num_heads", "head_dim", "head_dim")

FAMILIES: tuple[Family, ...] = (
    Family(
        "qwen3_next", "Qwen3NextGatedDeltaNet", "5.15", "GDA", _qwen3_next,
        _GDN | _names("in_proj_qkvz in_proj_ba"), "norm", "out_proj", _HEADS, mtp=True,
    ),
    Family(
        "qwen3_5", "Qwen3_5GatedDeltaNet", "5.15", "GDA", _qkvz, _QKVZ, "norm", "out_proj", _HEADS, z="in_proj_z",
        mtp=True, multimodal="Qwen3_5ForConditionalGeneration",
    ),
    Family(
        "qwen3_5_moe", "Qwen3_5MoeGatedDeltaNet", "5.15", "GDA", _qkvz, _QKVZ, "norm", "out_proj", _HEADS,
        z="in_proj_z", mtp=True, multimodal="Qwen3_5MoeForConditionalGeneration",
    ),
    Family(
        "olmo_hybrid", "OlmoHybridGatedDeltaNet", "5.15", "GDA", _olmo_hybrid,
        _names("q_proj k_proj v_proj g_proj a_proj b_proj conv1d o_norm o_proj A_log dt_bias"), "o_norm", "o_proj",
        _HEADS, z="g_proj", mtp=True,
    ),
    Family(
        "kimi_linear", "KimiLinearDeltaAttention", "5.17", "KDA", _low_rank, _NARROW, "o_norm", "o_proj", _SQUARE,
        "forget_gate", "g_b_proj", mtp=True,
    ),
    Family(
        "qwen4_exp", "Qwen4ExpTextGatedDeltaNet", "5.16", "GDA", _qkvz, _QKVZ, "norm", "out_proj", _HEADS,
        z="in_proj_z", multimodal="Qwen4ExpForConditionalGeneration",
    ),
    Family(
        "glm5_next", "Glm5NextTextLinearAttention", "5.17", "KDA", _low_rank, _NARROW, "o_norm", "o_proj", _SQUARE,
        "forget_gate", "g_b_proj", multimodal="Glm5NextForConditionalGeneration",
    ),
    Family(
        "bailing_hybrid", "BailingHybridDeltaAttention", "5.20", "KDA", _full_rank,
        _KDA | _names("g_proj forget_gate.f_proj"), "o_norm", "o_proj", _SQUARE, "forget_gate", "g_proj", mtp=True,
    ),
    Family(
        "lara_mini", "LaraMiniGatedDeltaNet", "5.24", "GDA", _qkvz, _QKVZ, "norm", "out_proj", _HEADS, z="in_proj_z",
    ),
)  # fmt: skip

BY_LAYER = {(f.module, f.layer): f for f in FAMILIES}

# How the heads of a layer are split over processes (tensor_parallel.py).
ROWS = "rows"
"""Head by head along its first axis; what is grouped by key heads too."""
QKV = "q, k and v"
"""The same within each of three parts of the first axis."""
COLUMNS = "columns"
WHOLE = "whole"
"""Every process has all of it: it is of no head, or of all alike."""
SHARES: dict[str, str] = {
    **dict.fromkeys(("in_proj_qkv", "conv1d"), QKV),
    **dict.fromkeys(("out_proj", "o_proj"), COLUMNS),
    **dict.fromkeys(("norm", "o_norm", "g_a_proj", "forget_gate.f_a_proj"), WHOLE),
    **dict.fromkeys(
        _names("in_proj_qkvz in_proj_ba in_proj_z in_proj_a in_proj_b q_proj k_proj v_proj"), ROWS
    ),
    **dict.fromkeys(_names("g_proj a_proj b_proj g_b_proj A_log dt_bias forget_gate.A_log"), ROWS),
    **dict.fromkeys(_names("forget_gate.dt_bias forget_gate.f_b_proj forget_gate.f_proj"), ROWS),
}
"""By the names in `Family.holds`."""
