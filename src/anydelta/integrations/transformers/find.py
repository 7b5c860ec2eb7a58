"""Finds the modules of this process that have the rule, and whether ours can replace it.

Transformers marks a function that a kernel may replace with the kernel's name on the hub,
`use_kernel_func_from_hub_with_fallback("chunk_kda", "fla")`. A module that has such functions for the rule is taken,
whatever its name, if they have the parameters of ours. A layer of it is taken if its forward calls them and has the
parameters that ours passes on. Everything else is left unchanged, with a reason.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from torch import nn

from ..switch import stock
from . import functions
from .cache import CACHES
from .families import FAMILIES

MAKERS = {
    "chunk_gated_delta_rule": "chunk_rule",
    "fused_recurrent_gated_delta_rule": "recurrent_rule",
    "recurrent_gated_delta_rule": "recurrent_rule",
    "chunk_kda": "chunk_rule",
    "fused_recurrent_kda": "recurrent_rule",
    "causal_conv1d_fn": "conv",
    "causal_conv1d_update": "conv_update",
}
"""The functions of .functions that make ours, by the name on the hub."""
_UNMARKED = {
    "torch_chunk_gated_delta_rule": "chunk_gated_delta_rule",
    "torch_recurrent_gated_delta_rule": "fused_recurrent_gated_delta_rule",
    "chunk_kimi_delta_attention": "chunk_kda",
    "recurrent_kimi_delta_attention": "fused_recurrent_kda",
    "causal_conv1d_fn": "causal_conv1d_fn",
    "causal_conv1d_update": "causal_conv1d_update",
}
"""The name on the hub, by the function's name: up to Transformers 5.19 it is not visible."""


@dataclass
class Found:
    """A module that has the rule."""

    module: ModuleType
    functions: dict[str, str] = field(default_factory=dict)
    """Names on the hub, by the name in the module."""
    layers: dict[type[nn.Module], str] = field(default_factory=dict)
    """The layers that are taken, with the name of their cache argument."""
    left: dict[str, str] = field(default_factory=dict)
    """Why a layer, or for "" the whole module, is not taken."""
    strangers: list[type[nn.Module]] = field(default_factory=list)
    """Layers that call the rule and are not taken."""

    @property
    def name(self) -> str:
        """The family's name in Transformers: modeling_qwen3_5 is qwen3_5."""
        return self.module.__name__.rpartition(".")[2].removeprefix("modeling_")


_seen: dict[int, weakref.ref[ModuleType]] = {}
"""By id, because a module's class may have neither hash nor comparison."""


def find() -> tuple[list[Found], dict[str, str]]:
    """Modules that are new since the last call, and why some of Transformers' could not be imported."""
    failed: dict[str, str] = {}
    for name in _with_rule():
        try:
            importlib.import_module(name)
        except Exception as error:  # any error: the other modules must still work
            failed[name.rpartition(".")[2].removeprefix("modeling_")] = (
                f"{type(error).__name__}: {' '.join(str(error).split())}"
            )
    new, looked = [], {}
    for name, module in list(sys.modules.items()):
        try:
            if not isinstance(module, ModuleType) or _is_seen(module):
                continue
            if getattr(getattr(module, "__spec__", None), "_initializing", False):
                continue  # another thread is importing it
            looked[id(module)] = weakref.ref(module)
            if (found := look_at(module)) is not None:
                new.append(found)
        except Exception as error:  # a module may be any object and raise anything
            if name in _with_rule():
                failed[name.rpartition(".")[2].removeprefix("modeling_")] = f"{type(error).__name__}: {error}"
    _seen.update(looked)  # all of them, or none if interrupted
    return new, failed


def _is_seen(module: ModuleType) -> bool:
    found = _seen.get(id(module))
    return found is not None and found() is module


@functools.cache
def _with_rule() -> tuple[str, ...]:
    """Transformers' modules whose source names the rule; without sources, those of the table."""
    models = importlib.import_module("transformers.models")
    names = [f'"{hub}"'.encode() for hub, maker in MAKERS.items() if maker.endswith("rule")]
    files = [p for folder in models.__path__ for p in Path(folder).glob("*/modeling_*.py")]
    if not files:
        return tuple(f.module for f in FAMILIES)
    found = []
    for file in sorted(files):
        text = file.read_bytes()
        if any(name in text for name in names):
            found.append(f"transformers.models.{file.parent.name}.{file.stem}")
    return tuple(found)


def look_at(module: ModuleType) -> Found | None:
    """A module's functions and layers of the rule, or None."""
    own = vars(module)
    found = Found(module)
    marked = [(name, hub) for name, x in list(own.items()) if (hub := _hub_name(name, x)) is not None]
    rules = {name for name, hub in marked if MAKERS[hub].endswith("rule")}
    if not rules:
        return None
    users = [cls for cls in list(own.values()) if _calls(cls, module, rules)]
    if not users and not any(getattr(own[name], "__module__", None) == module.__name__ for name in rules):
        return None  # it only re-exports them
    if problems := [p for name, hub in marked if (p := _misfit(name, own[name], hub))]:
        found.left[""] = "; ".join(problems)
        found.strangers = users
        return found
    found.functions = dict(marked)
    for cls in users:
        names = list(inspect.signature(_undecorated(cls, module), follow_wrapped=False).parameters)
        cache = next((c for c in CACHES if c in names), None)
        if names[1:4] == ["hidden_states", cache, "attention_mask"] and "kwargs" in names:
            found.layers[cls] = str(cache)
        else:
            found.left[cls.__name__] = (
                f"its forward takes ({', '.join(names[1:])}) and not (hidden_states, cache, attention_mask, **kwargs), "
                "so the rule alone is replaced"
            )
            found.strangers.append(cls)
    return found


def _hub_name(name: str, x: Any) -> str | None:
    """The name on the hub of one of Transformers' functions, if ours can replace it."""
    kind = type(x)  # not isinstance, which proxies can deceive
    if issubclass(kind, nn.Module):  # put there by the kernels library
        hub = getattr(kind, "kernel_layer_name", None)
    elif kind is FunctionType:
        x = stock(x)
        code = x.__code__
        try:
            hub = x.__closure__[code.co_freevars.index("func_name")].cell_contents
        except (TypeError, ValueError):
            hub = None
        if hub is None and str(getattr(x, "__module__", "")).startswith("transformers.models."):
            hub = _UNMARKED.get(name)
    else:
        return None
    return hub if isinstance(hub, str) and hub in MAKERS else None


def _calls(cls: type[nn.Module], module: ModuleType, rules: set[str]) -> bool:
    """Whether it is a layer of this module whose forward calls the rule."""
    if not (issubclass(type(cls), type) and issubclass(cls, nn.Module) and cls.__module__ == module.__name__):
        return False
    code = getattr(_undecorated(cls, module), "__code__", None)
    return code is not None and not rules.isdisjoint(code.co_names)


def _undecorated(cls: type[nn.Module], module: ModuleType) -> Callable[..., object]:
    """A class's forward as written in the module. Up to 5.16 a decorator keeps it in a cell."""
    rest: list[Callable[..., object]] = [inspect.unwrap(stock(cls.forward))]
    while rest:
        function = rest.pop()
        if getattr(function, "__globals__", None) is vars(module):
            return function
        rest += [
            f
            for cell in getattr(function, "__closure__", None) or ()
            if type(f := cell.cell_contents) is FunctionType
        ]
    return cls.forward


def _misfit(name: str, theirs: Callable[..., object], hub: str) -> str | None:
    if not inspect.isroutine(theirs):  # the kernels library's, which takes any arguments
        return None
    want = parameters(getattr(functions, MAKERS[hub])(theirs, name, {}, {}))
    got = parameters(inspect.unwrap(theirs))
    if got[: len(want)] == want:
        return None
    return f"{name} takes ({', '.join(got)}) and not ({', '.join(want)})"


def parameters(f: Callable[..., object]) -> list[str]:
    """The names of a function's parameters, without *args and **kwargs."""
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    signature = inspect.signature(f, follow_wrapped=False)
    return [p.name for p in signature.parameters.values() if p.kind not in kinds]
