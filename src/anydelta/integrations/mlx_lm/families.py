"""The model families of mlx-lm: one table, and which of them the installed mlx-lm has.

A family is a module of mlx_lm.models that calls `gated_delta_update`. It is found by that name, so families without a
row have the rule too. A row says where layers keep their states, which drafting needs.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlx.nn.layers.base import Module


@dataclass(frozen=True)
class Family:
    """Where a model family keeps its linear attention."""

    name: str
    layer: str
    """The class of the linear attention layer, whose cache's last slot is the recurrent state."""
    convolutions: tuple[str, ...]
    """Per slot of the layer's cache: the path to the convolution whose last inputs the slot holds."""


_THREE = ("q_conv1d", "k_conv1d", "v_conv1d")
FAMILIES: tuple[Family, ...] = (
    Family("qwen3_next", "Qwen3NextGatedDeltaNet", ("conv1d",)),
    Family("qwen3_5", "GatedDeltaNet", ("conv1d",)),  # and qwen3_5_moe, which uses its layers
    Family("kimi_linear", "KimiDeltaAttention", ("q_conv.conv", "k_conv.conv", "v_conv.conv")),
    Family("olmo_hybrid", "GatedDeltaNet", _THREE),
    Family("bailing_moe_v3", "BailingKDA", _THREE),
    Family("kimi_k3", "KimiK3DeltaAttention", ("qkv_conv.conv",)),
)

RULE = "gated_delta_update"
_ARGUMENTS = ["q", "k", "v", "a", "b", "A_log", "dt_bias", "state", "mask"]
"""The arguments of mlx-lm's gated_delta_update, in this order; more may follow."""


@dataclass(frozen=True)
class Found:
    """A supported family.

    Attributes:
        layer: the class of its linear attention layer; None if unknown: the family then has the rule but cannot draft.
    """

    name: str
    module: types.ModuleType
    layer: type[Module] | None = None
    convolutions: tuple[str, ...] = ()


def look() -> tuple[list[Found], dict[str, str]]:
    """The supported families, and the reasons why others are not replaced."""
    rows = {f.name: f for f in FAMILIES}
    found, left = [], {}
    for name in dict.fromkeys((*rows, *_callers())):
        try:
            module = importlib.import_module(f"mlx_lm.models.{name}")
        except ImportError as error:
            absent = error.name == f"mlx_lm.models.{name}"
            left[name] = "this mlx-lm does not have it" if absent else f"it cannot be imported: {error}"
            continue
        update, row = getattr(module, RULE, None), rows.get(name)
        if not callable(update):
            left[name] = f"it has no {RULE}"
            continue
        parameters = _parameters(update)
        if parameters[: len(_ARGUMENTS)] != _ARGUMENTS:
            left[name] = f"its {RULE} takes ({', '.join(parameters)}) and not ({', '.join(_ARGUMENTS)}, ...)"
            continue
        layer = None if row is None else getattr(module, row.layer, None)
        if row is not None and layer is not None and _parameters(layer.__call__)[2:] != ["mask", "cache"]:
            layer = None
        if row is not None and layer is None:
            left[name] = f"it has no {row.layer}(x, mask, cache): the rule is anydelta's, but it cannot draft"
        found.append(Found(name, module, layer, () if row is None or layer is None else row.convolutions))
    return found, left


def _callers() -> list[str]:
    """The modules of mlx_lm.models whose source names the function, without the one that defines it."""
    spec = importlib.util.find_spec("mlx_lm.models")
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.py"))]
    texts = {file.stem: file.read_text(encoding="utf-8", errors="replace") for file in files}
    return [name for name, text in texts.items() if RULE in text and f"def {RULE}(" not in text]


def _parameters(function: Callable[..., object]) -> list[str]:
    """The signature of the current function. functools.wraps gives ours the original's."""
    try:
        return list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return []
