"""anydelta as the fast path of Hugging Face Transformers.

    import anydelta.integrations.transformers as adt

    adt.enable()                  # every model, built already or not yet
    adt.enable(model)             # the linear attention layers of one model only
    with adt.enable(): ...        # for the length of the block
    adt.disable()                 # what Transformers had before

Transformers looks up four functions by name each time a linear attention layer runs (the rule over a whole
sequence, the rule for one token, and the causal convolution in the same two forms). `enable()` puts ours in
their place in the modules; `enable(model)` gives each layer of the model a forward that finds ours instead. A
call that anydelta does not take goes on to the function that was there. `status()` says what is replaced, how
many calls were taken, and why the others were not.
"""

from __future__ import annotations

import importlib
import inspect
import threading
import types
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .. import dispatch

if TYPE_CHECKING:
    from torch import nn

    from .transformers_packed import Packed

OLDEST, NEWEST = (5, 15), (5, 23)
"""The Transformers releases whose hooks are known. Before 5.15 each layer binds the functions when it is built."""
SUPPORTED = "transformers 5.15 to 5.23"


@dataclass(frozen=True)
class Family:
    """Where a model family keeps its linear attention, and which of our functions stands in for which of its."""

    name: str
    layer: str
    """The class of the linear attention layer."""
    chunk: str
    recurrent: str
    since: tuple[int, int] = OLDEST

    @property
    def module(self) -> str:
        return f"transformers.models.{self.name}.modeling_{self.name}"

    @property
    def functions(self) -> dict[str, str]:
        """The module's name of each function: the maker in transformers_functions of ours."""
        return {
            self.chunk: "chunk_rule",
            self.recurrent: "recurrent_rule",
            "causal_conv1d_fn": "conv",
            "causal_conv1d_update": "conv_update",
        }


_GDA = ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule")
_KDA = ("chunk_kimi_delta_attention", "recurrent_kimi_delta_attention")
FAMILIES: tuple[Family, ...] = (
    Family("qwen3_next", "Qwen3NextGatedDeltaNet", *_GDA),
    Family("qwen3_5", "Qwen3_5GatedDeltaNet", *_GDA),
    Family("qwen3_5_moe", "Qwen3_5MoeGatedDeltaNet", *_GDA),
    Family("olmo_hybrid", "OlmoHybridGatedDeltaNet", *_GDA),
    Family("kimi_linear", "KimiLinearDeltaAttention", *_KDA, since=(5, 17)),
)


@dataclass(frozen=True)
class Status:
    """What is replaced now, and what became of the calls since the process began."""

    transformers: str
    everywhere: bool
    """Whether `enable()` is in force."""
    families: tuple[str, ...]
    """Those that this Transformers has."""
    layers: tuple[str, ...] = ()
    """Of the model given: the layers that run ours, by their names."""
    taken: dict[str, int] = field(default_factory=dict)
    """Calls that anydelta ran, by function."""
    passed_on: dict[str, int] = field(default_factory=dict)
    """Calls that went on to Transformers, by function and reason. Code under torch.compile is not counted."""

    def __str__(self) -> str:
        lines = [
            f"transformers {self.transformers} ({', '.join(self.families) or 'no supported family'})",
            f"all models: {'on' if self.everywhere else 'off'}",
        ]
        if self.layers:
            lines.append(f"this model: {len(self.layers)} layers run anydelta: {', '.join(self.layers)}")
        lines += [f"taken: {name} x {n}" for name, n in self.taken.items()]
        lines += [f"passed on: {why} x {n}" for why, n in self.passed_on.items()]
        return "\n".join(lines)


class Switch:
    """What `enable` and `disable` return: as a context manager, it puts back what was before, at the end."""

    def __init__(self, restore: Callable[[], None]):
        self._restore: Callable[[], None] | None = restore

    def __enter__(self) -> Switch:
        return self

    def __exit__(self, *_: object) -> None:
        if self._restore is not None:
            restore, self._restore = self._restore, None
            restore()


def enable(model: nn.Module | None = None) -> Switch:
    """Run the linear attention of all models, or of one, on anydelta. Enabling twice is enabling once.

    Raises:
        ImportError: Transformers or torch is missing, or its version is not one of those supported.
        RuntimeError: the version is right but its functions are not those it is known for.
        TypeError, ValueError: `model` is no torch.nn.Module, or has no layer that anydelta knows.
    """
    with _lock:
        bound = _families()
        _warn_without_backend()
        if model is None:
            was = _everywhere
            _set_everywhere(bound, True)
            return Switch(lambda: _set_everywhere(bound, was))
        before = [(layer, b, _own_slot(layer) is not None) for _, layer, b in _layers(model, bound, "enable")]
        _set_layers([(layer, b, True) for layer, b, _ in before])
        return Switch(_in_turn(lambda: _set_layers(before), _set_generating(model, bound, True)))


def disable(model: nn.Module | None = None) -> Switch:
    """Undo `enable()`, or `enable(model)`: Transformers gets back what it had. Nothing happens if it was not enabled.

    Raises:
        ValueError: `disable(model)` while all models are enabled, which a single model cannot escape.
    """
    with _lock:
        bound = _families()
        if model is None:
            was = _everywhere
            _set_everywhere(bound, False)
            return Switch(lambda: _set_everywhere(bound, was))
        if _everywhere:
            raise ValueError(
                "disable: requires that anydelta is not enabled for all models; got disable(model) under enable(). "
                "Call disable(), then enable(other_model) for each model that is to keep it"
            )
        before = [
            (layer, b, _own_slot(layer) is not None) for _, layer, b in _layers(model, bound, "disable")
        ]
        _set_layers([(layer, b, False) for layer, b, _ in before])
        return Switch(_in_turn(lambda: _set_layers(before), _set_generating(model, bound, False)))


def pack(model: nn.Module) -> Packed:
    """Compute a model's matrices on a CPU with oneDNN, on a second copy of their weights in its layout.

    This is not anydelta's: it is what torch has and F.linear does not use. `off()` of the result, or its end as a
    block, puts back what was before. See .transformers_packed.

    Raises:
        TypeError, ValueError: `model` is no torch.nn.Module, or has no nn.Linear in float32 or bfloat16 on the CPU.
        RuntimeError: this torch has no oneDNN.
    """
    from .transformers_packed import pack

    return pack(model)


def status(model: nn.Module | None = None) -> Status:
    """What is replaced, in all models and in the given one, and how many calls went where."""
    with _lock:
        bound = _families()
        names: list[str] = []
        if model is not None:
            names = [
                name for name, layer, _ in _layers(model, bound, "status") if _everywhere or _own_slot(layer)
            ]
        return Status(
            transformers=importlib.import_module("transformers").__version__,
            everywhere=_everywhere,
            families=tuple(b.family.name for b in bound),
            layers=tuple(names),
            taken=dict(_taken),
            passed_on=dict(_passed_on),
        )


# ---- What is replaced

_lock = threading.RLock()
_everywhere = False
_bound: list[_Bound] | None = None
_taken: Counter[str] = Counter()
_passed_on: Counter[str] = Counter()


@dataclass
class _Bound:
    """A family in the running Transformers: what its module holds, and what we put there."""

    family: Family
    module: types.ModuleType
    layer: type[nn.Module]
    functions: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    """Name in the module: (theirs, ours)."""
    forward: tuple[Any, Any] | None = None
    """The layer's (theirs, ours) while all models are enabled."""
    own_forward: Any = None
    hooks: dict[tuple[type, str], Any] = field(default_factory=dict)
    """By a class that generates and the name of its method: ours, where it stands in the class."""

    @property
    def generating(self) -> list[type]:
        """The family's models that have `generate`."""
        classes = [c for c in vars(self.module).values() if isinstance(c, type) and hasattr(c, "generate")]
        return [c for c in classes if c.__module__ == self.module.__name__]

    def set_hooks(self, on: bool) -> None:
        """Put our methods of `generate` into the classes, or take them out."""
        from .transformers_generate import HOOKS

        for owner in self.generating:
            for name, maker in HOOKS.items():
                if on:
                    self.hooks[owner, name] = maker(getattr(owner, name))
                    setattr(owner, name, self.hooks[owner, name])
                elif owner.__dict__.get(name) is self.hooks.pop((owner, name)):
                    delattr(owner, name)

    def learn(self) -> None:
        """Look at what is there now, unless that is ours or already known."""
        from . import transformers_functions as _functions
        from .transformers_layers import fused

        for name, maker in self.family.functions.items():
            here = getattr(self.module, name)
            if name not in self.functions or not any(here is known for known in self.functions[name]):
                ours = getattr(_functions, maker)(here, f"{self.family.name}.{name}", _taken, _passed_on)
                self.functions[name] = (here, ours)
                self.own_forward = None
        here = self.layer.__dict__["forward"]
        if self.forward is None or not any(here is known for known in self.forward):
            self.forward = (here, fused(here, self.family.name, _taken, _passed_on))
            self.own_forward = None

    def forward_for_one(self) -> Any:
        """The forward that `enable(model)` gives a layer."""
        from .transformers_layers import fused

        self.learn()
        if self.own_forward is None:
            assert self.forward is not None
            ours = {name: ours for name, (_, ours) in self.functions.items()}
            own = _with_globals(self.forward[0], self.module, ours)
            if own is None:
                raise RuntimeError(
                    f"anydelta.integrations.transformers: requires the hooks of {SUPPORTED}; got a forward of "
                    f"{self.family.layer} that is not defined in {self.family.module}. Is it patched by someone else?"
                )
            self.own_forward = fused(own, self.family.name, _taken, _passed_on)
            _own_forwards.append(self.own_forward)
        return self.own_forward


_own_forwards: list[Any] = []
"""Every forward we ever gave to a single layer; a copied or loaded model may still hold an old one."""


def _families() -> list[_Bound]:
    """The families of the running Transformers, found once."""
    global _bound
    if _bound is None:
        version = _version()
        found = [_bind(f) for f in FAMILIES if version >= f.since]
        _bound = found
    return _bound


def _version() -> tuple[int, int]:
    install = "pip install 'transformers>=5.15,<5.24'"
    try:
        importlib.import_module("torch")
        text = importlib.import_module("transformers").__version__
    except ImportError as error:
        missing = error.name or "a module"
        raise ImportError(
            f"anydelta.integrations.transformers: requires torch and {SUPPORTED}; got no {missing}. {install}"
        ) from error
    parts = text.split(".")
    version = (int(parts[0]), int(parts[1])) if len(parts) > 1 and (parts[0] + parts[1]).isdigit() else (0, 0)
    if not OLDEST <= version <= NEWEST:
        raise ImportError(
            f"anydelta.integrations.transformers: requires {SUPPORTED} (kimi_linear from 5.17); got {text}. {install}"
        )
    return version


def _bind(family: Family) -> _Bound:
    """The family's module, after checking that its hooks are the known ones.

    Raises:
        RuntimeError: a name is missing, or takes other parameters than the function we would put in its place.
    """
    module = importlib.import_module(family.module)
    problems = [n for n in (*family.functions, family.layer) if not hasattr(module, n)]
    if not problems:
        bound = _Bound(family, module, getattr(module, family.layer))
        bound.learn()
        for name, (theirs, ours) in bound.functions.items():
            if not inspect.isroutine(
                theirs
            ):  # a module that the kernels library put there: it takes anything
                continue
            want, got = _parameters(ours), _parameters(inspect.unwrap(theirs))
            if got[: len(want)] != want:
                problems.append(f"{name}({', '.join(got)})")
        if not problems:
            return bound
    raise RuntimeError(
        f"anydelta.integrations.transformers: requires the hooks of {SUPPORTED}; got {family.module} with other or "
        f"missing {'; '.join(problems)}. Install a supported version, or report this one"
    )


def _parameters(f: Callable[..., Any]) -> list[str]:
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    signature = inspect.signature(f, follow_wrapped=False)
    return [p.name for p in signature.parameters.values() if p.kind not in kinds]


def _set_everywhere(bound: list[_Bound], on: bool) -> None:
    global _everywhere
    with _lock:
        if on == _everywhere:
            return
        _everywhere = on
        for b in bound:
            if on:
                b.learn()
            for name, pair in b.functions.items():
                _swap(b.module, name, pair, on)
            assert b.forward is not None
            _swap(b.layer, "forward", b.forward, on)
            b.set_hooks(on)


def _swap(owner: Any, name: str, pair: tuple[Any, Any], on: bool) -> None:
    theirs, ours = pair
    if on:
        setattr(owner, name, ours)
    elif owner.__dict__[name] is ours:
        setattr(owner, name, theirs)
    else:
        warnings.warn(
            f"anydelta: {owner.__name__}.{name} was replaced by someone else since enable(), and stays as it is",
            RuntimeWarning,
            stacklevel=4,
        )


# ---- One model

_SLOTS = ("forward", "_old_forward")
"""Where an instance may carry a forward of its own; accelerate's hooks move it to the second."""


def _layers(model: Any, bound: list[_Bound], op: str) -> list[tuple[str, nn.Module, _Bound]]:
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
        if isinstance(module, b.layer)
    ]
    if not found:
        families = ", ".join(b.family.name for b in bound)
        raise ValueError(
            f"{op}: requires a model with gated delta rule layers ({families}); got {type(model).__name__}, "
            "which has none. Nothing is gained there"
        )
    return found


def _own_slot(layer: nn.Module) -> str | None:
    """Where the layer keeps a forward of ours, if it has one."""
    for slot in _SLOTS:
        function = getattr(layer.__dict__.get(slot), "__func__", None)
        if function is not None and any(function is f for f in _own_forwards):
            return slot
    return None


def _set_layer(layer: nn.Module, b: _Bound, on: bool) -> None:
    slot = _own_slot(layer)
    if on == (slot is not None):
        return
    if slot is not None:
        if slot == "forward":
            del layer.__dict__[slot]
        else:
            layer.__dict__[slot] = types.MethodType(type(layer).forward, layer)
        return
    hooked = "_old_forward" in layer.__dict__  # accelerate's hook runs first and calls this one
    if not hooked and "forward" in layer.__dict__:
        warnings.warn(
            f"anydelta: a {type(layer).__name__} already has a forward of its own (a kernel?), which stays",
            RuntimeWarning,
            stacklevel=4,
        )
        return
    layer.__dict__["_old_forward" if hooked else "forward"] = types.MethodType(b.forward_for_one(), layer)


def _set_generating(model: nn.Module, bound: list[_Bound], on: bool) -> Callable[[], None]:
    """Give the parts of a model that generate our methods, or take them away; returns what undoes that."""
    from .transformers_generate import HOOKS

    classes = tuple(c for b in bound for c in b.generating)
    parts = [m for m in model.modules() if isinstance(m, classes)]
    before = [(part, {name: part.__dict__.get(name) for name in HOOKS}) for part in parts]
    for part in parts:
        for name, maker in HOOKS.items():
            part.__dict__.pop(name, None)
            if on:
                theirs = getattr(type(part), name)
                if any(theirs is ours for b in bound for ours in b.hooks.values()):
                    theirs = theirs.__wrapped__
                part.__dict__[name] = types.MethodType(maker(theirs), part)

    def undo() -> None:
        for part, methods in before:
            for name, method in methods.items():
                part.__dict__.pop(name, None)
                if method is not None:
                    part.__dict__[name] = method

    return undo


def _in_turn(*steps: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        for step in steps:
            step()

    return run


def _set_layers(wanted: list[tuple[nn.Module, _Bound, bool]]) -> None:
    with _lock:
        for layer, b, on in wanted:
            _set_layer(layer, b, on)


def _with_globals(function: Any, module: types.ModuleType, replaced: dict[str, Any]) -> Any:
    """The same function, decorators included, looking up `replaced` before the names of its module.

    Returns None if no function of that module is inside.
    """
    if function.__globals__ is module.__dict__:
        # Without __name__ torch.compile reads these globals and not those of the module of that name.
        scope = {name: value for name, value in vars(module).items() if name != "__name__"} | replaced
        return _copy_function(function, scope, function.__closure__)
    for i, cell in enumerate(
        function.__closure__ or ()
    ):  # a decorator's wrapper holds what it wraps in a cell
        inner = cell.cell_contents
        if isinstance(inner, types.FunctionType) and (changed := _with_globals(inner, module, replaced)):
            cells = list(function.__closure__)
            cells[i] = types.CellType(changed)
            copy = _copy_function(function, function.__globals__, tuple(cells))
            if hasattr(copy, "__wrapped__"):
                copy.__wrapped__ = changed
            return copy
    return None


def _copy_function(function: Any, scope: dict[str, Any], closure: tuple[types.CellType, ...] | None) -> Any:
    copy: Any = types.FunctionType(
        function.__code__, scope, function.__name__, function.__defaults__, closure
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__dict__.update(function.__dict__)
    for name in ("__module__", "__qualname__", "__doc__", "__annotations__"):
        setattr(copy, name, getattr(function, name))
    return copy


def _warn_without_backend() -> None:
    from .transformers_functions import NATIVE_DEVICES

    if not NATIVE_DEVICES and dispatch.forced_by_env() is None:
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
