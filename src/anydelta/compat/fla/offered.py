"""install() and uninstall(): `import fla` and `import causal_conv1d` find anydelta if the real packages are missing.

`OFFERED` lists all names: those that the code of released checkpoints and Transformers import. docs/fla.md says where
each is used. Any other name raises ImportError or AttributeError with that name.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import threading
import warnings
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, TypeVar

from . import convolution, gate, index, norm, ops, simple_gla

if TYPE_CHECKING:
    import torch

_VERSION = "0.5.2"
"""The release of fla that these names, arguments and conventions follow."""


R = TypeVar("R")


def _packed(function: Callable[..., R]) -> Callable[..., R]:
    """The same function, which also takes packed sequences under Transformers' name.

    Transformers passes the arguments that a signature names. In models of Kimi Delta Attention it calls them
    `cu_seqlens`, as in its attention layers.
    """

    def rule(*args: object, cu_seq_lens_q: torch.Tensor | None = None, **kwargs: object) -> R:
        if kwargs.get("cu_seqlens") is None and cu_seq_lens_q is not None:
            kwargs["cu_seqlens"] = cu_seq_lens_q
        return function(*args, **kwargs)

    rule.__name__ = rule.__qualname__ = function.__name__  # so that pickle finds it in this module
    rule.__doc__ = function.__doc__
    own = inspect.signature(function)
    *named, rest = own.parameters.values()
    extra = inspect.Parameter("cu_seq_lens_q", inspect.Parameter.KEYWORD_ONLY, default=None)
    rule.__signature__ = own.replace(parameters=[*named, extra, rest])  # type: ignore[attr-defined]
    return rule


def _names(*objects: Callable[..., object]) -> dict[str, object]:
    return {x.__name__: x for x in objects}


chunk_gated_delta_rule = _packed(ops.chunk_gated_delta_rule)
fused_recurrent_gated_delta_rule = _packed(ops.fused_recurrent_gated_delta_rule)
chunk_kda, fused_recurrent_kda = _packed(ops.chunk_kda), _packed(ops.fused_recurrent_kda)
_GDN = _names(chunk_gated_delta_rule, fused_recurrent_gated_delta_rule)
_KDA = _names(chunk_kda, fused_recurrent_kda)
_GLA = _names(simple_gla.chunk_simple_gla, simple_gla.fused_recurrent_simple_gla)

OFFERED: dict[str, dict[str, object]] = {
    "fla": {"__version__": _VERSION},
    "fla.layers": {},
    "fla.layers.utils": _names(index.get_unpad_data, index.index_first_axis, index.pad_input),
    "fla.modules": _names(norm.FusedRMSNormGated, convolution.ShortConvolution),
    "fla.ops": {**_GDN, **_KDA},
    "fla.ops.gated_delta_rule": _GDN,
    "fla.ops.kda": _KDA,
    "fla.ops.kda.gate": _names(gate.fused_kda_gate),
    "fla.ops.simple_gla": _GLA,
    "fla.ops.simple_gla.chunk": _names(simple_gla.chunk_simple_gla),
    "fla.ops.simple_gla.fused_recurrent": _names(simple_gla.fused_recurrent_simple_gla),
    "fla.ops.utils": {},
    "fla.ops.utils.index": _names(index.prepare_cu_seqlens_from_mask, index.prepare_lens_from_mask),
    "fla.utils": _names(index.tensor_cache),
    "causal_conv1d": _names(convolution.causal_conv1d_fn, convolution.causal_conv1d_update),
}
"""Module, name, object."""


def install() -> bool:
    """Let `import fla` and `import causal_conv1d` find anydelta, if the real packages are not installed.

    Returns whether it does. False: the real fla, or another replacement, is present, and nothing changes. Code that was
    imported earlier keeps what it found, so call this first. A second call changes nothing.
    """
    with _LOCK:
        if _finder in sys.meta_path:
            return True
        if _is_here("fla"):
            return False
        _finder.packages = {"fla", *(() if _is_here("causal_conv1d") else ("causal_conv1d",))}
        sys.meta_path.insert(0, _finder)
    late = _too_late()
    if late:
        warnings.warn(
            f"anydelta: {', '.join(late)} did not find fla when imported, and keeps its reference functions. Call "
            "install() before, or use anydelta.integrations.transformers.enable()",
            RuntimeWarning,
            stacklevel=2,
        )
    return True


def uninstall() -> None:
    """Undo install(), if it was called: from now on `import fla` finds what it found before.

    Code that imported names meanwhile keeps them, and they still work.
    """
    with _LOCK:
        if _finder not in sys.meta_path:
            return
        sys.meta_path.remove(_finder)
        for name, module in list(sys.modules.items()):
            if isinstance(module, _Module):
                del sys.modules[name]


_LOCK = threading.Lock()


def _is_here(package: str) -> bool:
    """Whether a package can be imported. A folder of that name without code does not count."""
    if package in sys.modules:
        return True
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return False
    return spec is not None and spec.origin is not None


class _Finder(MetaPathFinder, Loader):
    """Finds and makes the modules of OFFERED.

    Attributes:
        packages: the packages whose modules it finds.
    """

    packages: set[str] = set()  # noqa: RUF012

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        package = name.partition(".")[0]
        if package not in self.packages:
            return None
        if name not in OFFERED:
            raise ModuleNotFoundError(_missing(*name.rsplit(".", 1)))
        # All are packages: Python then asks this finder for a missing name, and passes on its error.
        return ModuleSpec(name, self, origin="anydelta", is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Module(
            spec.name, f"{spec.name} on anydelta: {', '.join(OFFERED[spec.name]) or 'nothing of its own'}."
        )

    def exec_module(self, module: ModuleType) -> None:
        vars(module).update(
            OFFERED[module.__name__], __all__=[n for n in OFFERED[module.__name__] if n[0] != "_"]
        )


class _Module(ModuleType):
    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        if (inner := f"{self.__name__}.{name}") in OFFERED and _finder in sys.meta_path:
            return importlib.import_module(inner)
        raise AttributeError(_missing(self.__name__, name))


_finder = _Finder()


def _too_late() -> list[str]:
    """The modelling modules of Transformers that did not find fla when they were imported."""
    found = []
    for name, module in sorted(sys.modules.items()):
        if name.startswith("transformers.models.") and ".modeling_" in name:
            functions = [x for x in list(vars(module).values()) if isinstance(x, FunctionType)]
            if any(map(_looked_in_vain, functions)):
                found.append(name)
    return found


def _looked_in_vain(function: FunctionType | None) -> bool:
    """Whether Transformers decorated it, or a function that it wraps, with fla's name and its own reference."""
    while function is not None:
        if "is_new_implementation" in getattr(getattr(function, "__code__", None), "co_freevars", ()):
            held = inspect.getclosurevars(function).nonlocals
            return held.get("package") == "fla" and not held["is_new_implementation"]
        function = getattr(function, "__wrapped__", None)
    return False


def _missing(module: str, name: str) -> str:
    real = {"fla": "flash-linear-attention"}.get(module.partition(".")[0], "it")
    return (
        f"anydelta.compat.fla: requires a name that anydelta offers; got {module}.{name}. docs/fla.md lists what is "
        f"there: ask for more, or install {real}"
    )
