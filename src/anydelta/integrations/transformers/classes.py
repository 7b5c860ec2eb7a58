"""Gives one module a separate class of the same name, so that it runs ours while others of its class do not.

The new class is derived from the module's and holds our methods. Nothing is written into the module: its pickle is that
of the original, and a copy runs ours on its own weights. Changes by other libraries stay, such as accelerate's hooks,
which keep the forward that they found, and wrappers around a forward.
"""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from ..switch import LOCK, Place, guarded, held, mark, stock

KEPT = "_old_forward"
"""The attribute where accelerate's hooks keep the module's forward. `forward` itself is theirs."""
BASE = "_anydelta_base"
"""The original class of a class that `dressed` made."""
LAYERS: set[type[nn.Module]] = set()
"""The classes of linear attention layers of the families that are bound."""


class Rewired:
    """The class attribute `_old_forward`: a hook that found the original forward or ours runs the current one."""

    def __get__(self, module: nn.Module | None, cls: type | None = None) -> object:
        if module is None:
            return self
        try:
            kept = module.__dict__[KEPT]
        except KeyError:
            raise AttributeError(KEPT) from None
        now = type(module).forward
        if getattr(kept, "__self__", None) is module and stock(kept.__func__) is stock(now):
            return MethodType(now, module)
        return kept

    def __set__(self, module: nn.Module, value: object) -> None:
        module.__dict__[KEPT] = value

    def __delete__(self, module: nn.Module) -> None:
        if module.__dict__.pop(KEPT, None) is None:
            raise AttributeError(KEPT)


def dressed(base: type, methods: dict[str, Callable[..., object]], everywhere: Place) -> type:
    """A class like `base` with our methods. Each runs only while all models or its module are enabled."""

    def is_on(self: nn.Module, *_: object) -> bool:
        if type(self) is cls:
            return True
        # A class that other code derived from ours for this module stays when ours is removed.
        return isinstance(self, cls) and (torch.compiler.is_compiling() or _is_on(self))

    def __reduce_ex__(
        self: nn.Module, protocol: object
    ) -> tuple[object, ...]:  # later protocols require the exact class
        make, arguments, *rest = super(cls, self).__reduce_ex__(1)
        return (make, tuple(base if x is cls else x for x in arguments), *rest)

    def __copy__(self: nn.Module) -> nn.Module:
        out: nn.Module = cls.__new__(type(self))
        out.__setstate__(dict(self.__dict__))
        return out

    def __deepcopy__(self: nn.Module, memo: dict[int, object]) -> nn.Module:
        out: nn.Module
        memo[id(self)] = out = cls.__new__(type(self))
        out.__setstate__(copy.deepcopy(self.__dict__, memo))
        return out

    names = {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}
    ours: dict[str, object] = {
        name: guarded(stock(getattr(base, name)), method, everywhere, is_on, name)
        for name, method in methods.items()
    }
    if "forward" in ours:
        ours[KEPT] = Rewired()
    cls: Any = type(base)(
        base.__name__,
        (base,),
        names | ours | {f.__name__: f for f in (__reduce_ex__, __copy__, __deepcopy__)} | {BASE: base},
    )
    return cls  # type: ignore[no-any-return]


_places: weakref.WeakKeyDictionary[nn.Module, Place] = weakref.WeakKeyDictionary()


def place(module: nn.Module, dress: Callable[[type], type]) -> Place:
    """Keeps the calls of enable(module) and disable(module); `dress` makes the module's class while it is on."""
    with LOCK:
        found = _places.get(module)
        if found is None:  # a copy of an enabled module is enabled
            change = functools.partial(_change, weakref.ref(module), dress)
            found = _places[module] = Place(change, on=is_dressed(type(module)))
        return found


def _is_on(module: nn.Module) -> bool:
    found = _places.get(module)
    return found is None or found.on


def is_dressed(kind: type) -> bool:
    """Whether `dressed` made the class, or one that it is derived from."""
    return any(BASE in vars(cls) for cls in kind.__mro__)


def _change(module: weakref.ref[nn.Module], dress: Callable[[type], type], on: bool) -> tuple[str, ...]:
    here = module()
    if here is None:
        return ()
    outer, kind = None, type(here)
    while is_parametrized(here) and kind.__name__ == f"Parametrized{kind.__bases__[0].__name__}":
        outer, kind = (
            kind,
            kind.__bases__[0],
        )  # torch made `outer` for this module, and removes it by its base
    now = dress(kind) if on else vars(kind).get(BASE, kind)
    if outer is None:
        here.__class__ = now
    elif now is not kind:
        outer.__bases__ = (now, *outer.__bases__[1:])
    return ()


# ---- What a layer runs


def runs_ours(layer: nn.Module) -> bool:
    """Whether a call of the layer reaches our forward, as far as this can be seen, and anydelta is enabled for it."""
    own = layer.__dict__
    if KEPT in own:
        found = [getattr(layer, KEPT)]
    elif "forward" in own:
        found = [own["forward"]]
    else:
        found = []
        for cls in type(layer).__mro__:
            if "forward" in vars(cls):
                found.append(vars(cls)["forward"])
                if "__class__" not in getattr(getattr(found[-1], "__code__", None), "co_freevars", ()):
                    break  # it does not call super()
    marks = [mark(g) for f in found for g in held(f, layer)]
    return any(m.is_on(layer) for m in marks if m is not None)


def _has_own_forward(layer: nn.Module) -> bool:
    """Whether a layer's forward is neither its family's nor ours."""
    if vars(layer).keys() & {KEPT, "forward"}:
        return True
    owner = next(cls for cls in type(layer).__mro__ if "forward" in vars(cls))
    return owner not in LAYERS and BASE not in vars(owner)


def require_ours(model: nn.Module) -> None:
    """Refuse to draft if a layer does not run ours, because its states would not be recorded, or if this Transformers
    cannot draft.

    Raises:
        ValueError: either holds.
    """
    instead = "or leave out use_mtp, assistant_model, prompt_lookup_num_tokens and assistant_early_exit"
    kinds = tuple(LAYERS)
    strangers = {name: m for name, m in model.named_modules() if isinstance(m, kinds) and not runs_ours(m)}
    if strangers and not any(_has_own_forward(m) for m in strangers.values()):
        raise ValueError(
            "generate: requires anydelta to stay enabled while it drafts; got a disable() during the call, so the "
            f"states of {', '.join(strangers)} were not recorded. Disable after the call, {instead}"
        )
    if strangers:
        raise ValueError(
            "generate: requires linear attention layers that run anydelta to draft tokens, because only anydelta "
            f"records states to go back to; got {type(model).__name__} with its own forward in "
            f"{', '.join(strangers)}. Enable anydelta before the forward is wrapped, {instead}"
        )
    if getattr(getattr(model, "device", None), "type", None) == "meta":
        raise ValueError(
            "generate: requires a model whose first weights are on a device to draft tokens, because Transformers "
            f"puts the drafts there; got {type(model).__name__} with these offloaded. Keep the embedding on a device "
            f"(device_map), {instead}"
        )
