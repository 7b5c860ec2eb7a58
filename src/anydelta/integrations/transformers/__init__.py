"""anydelta as the fast path of Hugging Face Transformers.

    import anydelta.integrations.transformers as adt

    adt.enable()                  # every model, built already or not yet
    adt.enable(model)             # the linear attention layers of one model only
    with adt.enable(): ...        # for the length of the block
    adt.disable()                 # what Transformers had before

Each time a linear attention layer runs, Transformers looks up four functions by name: the rule over a sequence, the
rule for one token, and the causal convolution in the same two forms. `enable()` replaces them in the modules.
`enable(model)` gives each layer of the model a class whose forward finds ours. A call that anydelta does not take falls
back to the original function. `status()` says what is replaced, how many calls anydelta ran, and why the others fell
back.
"""

from __future__ import annotations

import functools
import importlib
import sys
import types
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from ...core import dispatch
from ...core.late import late
from ..switch import LOCK, Patch, Place, Switch, guarded, stock, turn, warn
from .families import BY_LAYER
from .families import FAMILIES as FAMILIES

if TYPE_CHECKING:
    from torch import nn

    from . import classes as _classes
    from . import find as _find
    from . import functions as _functions
    from . import generate as _generate
    from . import gguf as _gguf
    from . import layer as _layer
    from . import packed_matrices as _packed_matrices
    from . import serving as _serving
    from . import tensor_parallel as _tensor_parallel
    from .find import Found
    from .generate import Method
    from .layer import Forward
    from .packed_matrices import Packed
else:  # they import torch and Transformers
    _classes, _find, _functions, _generate, _gguf, _layer, _packed_matrices, _serving, _tensor_parallel = (
        late(f"{__name__}.{name}")
        for name in (
            "classes",
            "find",
            "functions",
            "generate",
            "gguf",
            "layer",
            "packed_matrices",
            "serving",
            "tensor_parallel",
        )
    )


R = TypeVar("R")


@dataclass(frozen=True)
class Status:
    """What is replaced now, and which calls anydelta has run since the process began."""

    transformers: str
    everywhere: bool
    """Whether `enable()` is in force."""
    families: tuple[str, ...]
    """The families whose functions are replaced."""
    left: dict[str, str] = field(default_factory=dict)
    """Families and layers that are not replaced, with the reason."""
    layers: tuple[str, ...] = ()
    """The names of the given model's layers that run ours."""
    heads: dict[str, str] = field(default_factory=dict)
    """The heads that this process has of the given model, by layer, where they are split over several."""
    taken: dict[str, int] = field(default_factory=dict)
    """Calls that anydelta ran, by function."""
    passed_on: dict[str, int] = field(default_factory=dict)
    """Calls that fell back to Transformers, by function and reason. Code under torch.compile is not counted."""

    def __str__(self) -> str:
        lines = [
            f"transformers {self.transformers} ({', '.join(self.families) or 'no supported family'})",
            f"all models: {'on' if self.everywhere else 'off'}",
        ]
        if self.layers:
            lines.append(f"this model: {len(self.layers)} layers run anydelta: {', '.join(self.layers)}")
        lines += [f"heads of {name} here: {share}" for name, share in self.heads.items()]
        lines += [f"left as it is: {name}: {why}" for name, why in self.left.items()]
        lines += [f"taken: {name} x {n}" for name, n in self.taken.items()]
        lines += [f"passed on: {why} x {n}" for why, n in self.passed_on.items()]
        return "\n".join(lines)


def enable(model: nn.Module | None = None) -> Switch:
    """Run the linear attention of all models, or of one, on anydelta. A second call changes nothing.

    A plain call lasts until `disable()`. A block (`with enable():`) lasts until its own end, in whatever order blocks
    end. If several calls of `enable` and `disable` are in force, in any thread, the latest one decides.

    Raises:
        ImportError: Transformers or torch is missing, or Transformers has no cache of recurrent states.
        RuntimeError: a layer of the model has a forward that does not read the functions of its module.
        TypeError, ValueError: `model` is no torch.nn.Module, or has no supported layer.
    """
    with LOCK:
        bound = _families()
        _warn_without_backend()
        if model is None:
            return Switch(True, [_everywhere])
        layers = _layers(model, bound, "enable")
        _tensor_parallel.split(model)
        switch = Switch(True, _places(model, layers, bound))
        _warn_of_strangers(layers)
        return switch


def disable(model: nn.Module | None = None) -> Switch:
    """Undo `enable()`, or `enable(model)`: Transformers gets its functions back, if they were replaced.

    A plain call ends what plain calls of `enable` began, and turns off open blocks too. An `enable` that begins later
    counts again. A block (`with disable():`) turns off what began before it, until it ends.

    A model that was loaded packed from a GGUF file keeps our matrix products: nothing else can read its weights. Its
    linear attention is Transformers' again.

    Raises:
        ValueError: `disable(model)` while all models are enabled: no single model can be left out.
    """
    with LOCK:
        bound = _families()
        if model is None:
            return Switch(False, [_everywhere])
        if _everywhere.on:
            raise ValueError(
                "disable: requires that anydelta is not enabled for all models; got disable(model) under enable(). "
                "Call disable(), then enable(other_model) for each model that is to keep it"
            )
        return Switch(False, _places(model, _layers(model, bound, "disable"), bound))


def pack(model: nn.Module) -> Packed:
    """Compute a model's matrices on a CPU with oneDNN, on a second copy of their weights in its layout.

    The products are torch's own, which F.linear does not use. `off()` of the result, or its end as a block, undoes it.
    See .packed_matrices.

    Raises:
        TypeError, ValueError: `model` is no torch.nn.Module, or has no nn.Linear in float32 or bfloat16 on the CPU.
        RuntimeError: this torch has no oneDNN.
    """
    return _packed_matrices.pack(model)


def status(model: nn.Module | None = None) -> Status:
    """What is replaced, in all models and in the given one, and how many calls each function got."""
    with LOCK:
        bound = _families()
        layers = [] if model is None else _layers(model, bound, "status")
        left = dict(_left)
        if model is not None and (why := _tensor_parallel.why_whole(model)) is not None:
            left[f"tensor parallelism of {type(model).__name__}"] = why
        shares = ((name, _tensor_parallel.share_of(layer)) for name, layer, _ in layers)
        return Status(
            transformers=importlib.import_module("transformers").__version__,
            everywhere=_everywhere.on,
            families=tuple(b.name for b in bound),
            left=left,
            heads={name: str(share) for name, share in shares if share is not None},
            layers=tuple(name for name, layer, _ in layers if _classes.runs_ours(layer)),
            taken=dict(_taken),
            passed_on=dict(_passed_on),
        )


# ---- What is replaced

_bound: list[_Bound] = []
_left: dict[str, str] = {}
_taken: Counter[str] = Counter()
_passed_on: Counter[str] = Counter()


@functools.cache
def _files() -> tuple[Patch, ...]:
    """The patches that open GGUF files."""
    return tuple(_gguf.patches(_everywhere))


@functools.cache
def _server() -> tuple[Patch, ...]:
    """The patches for continuous batching, if Transformers has allocators of caches (5.24 and later)."""
    try:
        return tuple(_serving.patches(_everywhere))
    except ImportError:
        return ()


@functools.cache
def _loader() -> tuple[Patch, ...]:
    """What splits the heads of models over processes, where Transformers has the means (5.20)."""
    try:
        return tuple(_tensor_parallel.patches(_everywhere))
    except ImportError:
        return ()


def _turn(on: bool) -> list[str]:
    return turn((*_files(), *_server(), *_loader(), *(patch for b in _bound for patch in b.patches())), on)


_everywhere = Place(_turn)


@dataclass
class _Bound:
    """A family in this process, and what replaces parts of its module and classes."""

    found: Found
    functions: dict[str, Patch] = field(default_factory=dict)
    """By their names in the module."""
    dressed: dict[type, type] = field(default_factory=dict)
    """Classes for single modules, by the class that they replace."""

    def __post_init__(self) -> None:
        for name, hub in self.found.functions.items():
            make = getattr(_functions, _find.MAKERS[hub])
            self.functions[name] = Patch(self.module, name, functools.partial(self._function, make, name))
        classes = [c for c in vars(self.module).values() if isinstance(c, type) and hasattr(c, "generate")]
        self.generating = tuple(c for c in classes if c.__module__ == self.module.__name__)
        """The family's models that have `generate`."""
        self.layers = tuple(self.found.layers)
        self.forwards = {c: Patch(c, "forward", functools.partial(self._forward, c)) for c in self.layers}
        self.kept = [Patch(c, _classes.KEPT, lambda _: _classes.Rewired()) for c in self.layers]
        self.hooks = [
            Patch(owner, name, functools.partial(_hook, name))
            for owner in (self.generating if self.layers else ())
            for name in _hooks()
        ]
        self.learn()

    @property
    def name(self) -> str:
        return self.found.name

    @property
    def module(self) -> types.ModuleType:
        return self.found.module

    def patches(self) -> Iterator[Patch]:
        """Everything that `enable()` replaces."""
        self.learn()
        yield from (*self.functions.values(), *self.forwards.values(), *self.kept, *self.hooks)

    def learn(self) -> None:
        """Look at the current functions and layers, unless they are ours or known already."""
        news = [patch.learn() for patch in (*self.functions.values(), *self.forwards.values())]
        if any(news):
            self.dressed = {}

    def _function(
        self, make: Callable[..., Callable[..., R]], name: str, theirs: Callable[..., R]
    ) -> Callable[..., R]:
        ours = make(theirs, f"{self.name}.{name}", _taken, _passed_on)
        return guarded(theirs, ours, _everywhere)

    def _forward(self, layer: type[nn.Module], theirs: Forward) -> Forward:
        return guarded(theirs, self._ours(layer, theirs), _everywhere, name="forward")

    def _ours(self, layer: type[nn.Module], theirs: Forward) -> Forward:
        """The layer's forward: with the mixer if the table has a row for it, else one that records and advances."""
        row, cache = BY_LAYER.get((self.module.__name__, layer.__name__)), self.found.layers[layer]
        return (
            _functions.advancing(theirs, cache)
            if row is None
            else _layer.fused(theirs, cache, row, _taken, _passed_on)
        )

    def dress(self, base: type) -> type:
        """The class that `enable(model)` gives a layer, or a part that generates, to replace `base`."""
        if _classes.is_dressed(base):
            return base
        self.learn()
        if base not in self.dressed:
            self.dressed[base] = _classes.dressed(base, self._methods(base), _everywhere)
        return self.dressed[base]

    def _methods(self, base: type) -> dict[str, Callable[..., object]]:
        if not issubclass(base, self.layers):
            return {name: make(stock(getattr(base, name))) for name, make in _hooks().items()}
        layer = next(c for c in self.layers if issubclass(base, c))
        theirs = self.forwards[layer].theirs
        if stock(base.forward) is not theirs:
            return {}  # a subclass with a forward of its own
        ours = {name: patch.ours.anydelta.ours for name, patch in self.functions.items()}
        own = _with_globals(theirs, self.module, ours)
        if own is None:
            raise RuntimeError(
                f"enable: requires a forward of {layer.__name__} that reads the functions of {self.module.__name__}; "
                "got one that is not defined there. Has other code patched it? Call enable() without a model, or "
                "enable(model) before that"
            )
        return {"forward": self._ours(layer, own)}


def _hooks() -> dict[str, Callable[[Method], Method]]:
    return _generate.HOOKS


def _hook(name: str, theirs: Method) -> Method:
    return guarded(stock(theirs), _hooks()[name](stock(theirs)), _everywhere, name=name)


def _families() -> list[_Bound]:
    """The families of this process. New ones since the last call are replaced if all models are enabled."""
    _require_transformers()
    new, failed = _find.find()
    left = dict(failed)
    for found in new:
        _classes.LAYERS.update(found.layers, found.strangers)
        left |= {f"{found.name}.{layer}" if layer else found.name: why for layer, why in found.left.items()}
        if found.functions:
            _bound.append(bound := _Bound(found))
            if _everywhere.on:
                for patch in bound.patches():
                    patch.put()
    for name, why in left.items():
        if _left.get(name) != why:
            _left[name] = why
            warn(f"anydelta: {name} keeps Transformers' code: {why}")
    return _bound


def _require_transformers() -> None:
    try:
        importlib.import_module("torch")
        importlib.import_module("transformers")
        from transformers.cache_utils import LinearAttentionLayer  # noqa: F401
    except ImportError as error:
        version = getattr(sys.modules.get("transformers"), "__version__", "")
        got = f"transformers {version} without it" if version else f"no {error.name or 'module of that name'}"
        raise ImportError(
            f"anydelta.integrations.transformers: requires torch and a transformers that has LinearAttentionLayer "
            f"(5.15 or later); got {got}. pip install 'transformers>=5.15'"
        ) from error


# ---- One model


def _layers(model: object, bound: list[_Bound], op: str) -> list[tuple[str, nn.Module, _Bound]]:
    """The linear attention layers of a model."""
    import torch

    if not isinstance(model, torch.nn.Module):
        raise TypeError(
            f"{op}: requires a torch.nn.Module, or nothing for all models; got {type(model).__name__}"
        )
    found = [
        (name, module, b)
        for name, module in model.named_modules()
        for b in bound
        if isinstance(module, b.layers)
    ]
    if not found:
        families = ", ".join(b.name for b in bound)
        raise ValueError(
            f"{op}: requires a model with gated delta rule layers ({families}); got {type(model).__name__}, "
            "which has none. anydelta would not speed it up"
        )
    return found


def _places(
    model: nn.Module, layers: list[tuple[str, nn.Module, _Bound]], bound: list[_Bound]
) -> list[Place]:
    """The model's layers and the parts of it that generate. Raises before anything is changed."""
    modules = [(layer, b) for _, layer, b in layers]
    modules += [(m, b) for m in model.modules() for b in bound if isinstance(m, b.generating)]
    for module, b in modules:
        b.dress(type(module))
    return [_classes.place(module, b.dress) for module, b in modules]


def _warn_of_strangers(layers: list[tuple[str, nn.Module, _Bound]]) -> None:
    for kind in {type(layer).__name__ for _, layer, _ in layers if not _classes.runs_ours(layer)}:
        warn(f"anydelta: a {kind} already has its own forward (a kernel?), which is kept")


def _with_globals(
    function: Any, module: types.ModuleType, replaced: dict[str, object]
) -> types.FunctionType | None:
    """The same function with its decorators, but it looks up names in `replaced` before its module.

    Returns None if no function of that module is inside.
    """
    if function.__globals__ is module.__dict__:
        # With __name__, torch.compile would read that module's globals instead of these.
        scope = {name: value for name, value in vars(module).items() if name != "__name__"} | replaced
        return _copy_function(function, scope, function.__closure__)
    for i, cell in enumerate(
        function.__closure__ or ()
    ):  # a decorator's wrapper holds what it wraps in a cell
        inner = cell.cell_contents
        if isinstance(inner, types.FunctionType) and (changed := _with_globals(inner, module, replaced)):
            cells = list(function.__closure__ or ())
            cells[i] = types.CellType(changed)
            copy = _copy_function(function, function.__globals__, tuple(cells))
            if hasattr(copy, "__wrapped__"):
                copy.__wrapped__ = changed
            return copy
    return None


def _copy_function(
    function: types.FunctionType, scope: dict[str, object], closure: tuple[types.CellType, ...] | None
) -> types.FunctionType:
    copy = types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__, closure)
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__dict__.update(function.__dict__)
    for name in ("__module__", "__qualname__", "__doc__", "__annotations__"):
        setattr(copy, name, getattr(function, name))
    return copy


def _warn_without_backend() -> None:
    if not _functions.NATIVE_DEVICES and dispatch.forced_by_env() is None:
        reasons = "; ".join(
            f"{n}: {r}"
            for n in dispatch.NAMES
            if n != "reference"
            for r in dispatch.get_backend(n).available()
        )
        warnings.warn(
            f"anydelta: no native backend runs here, so Transformers keeps its own functions ({reasons})",
            RuntimeWarning,
            stacklevel=3,
        )
