"""enable() and disable() for every integration: which call decides, and what is replaced.

A `Place` is where anydelta is switched on: all models, or one module. If several calls of enable() and disable() are in
force there, the latest one decides. The call of a block is in force until the block ends; blocks may overlap. Any other
call stays in force. A `Patch` is one attribute that is replaced while the place is on.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., object])

LOCK = threading.RLock()
"""Held while anything is switched on or off."""
MISSING: Any = object()


class Switch:
    """What `enable` and `disable` return. As a context manager, the call ends with the block."""

    def __init__(self, on: bool, places: Sequence[Place]):
        self._on, self._places = on, places
        self._calls: list[_Call] = []
        self._begin()

    def _begin(self) -> None:
        with LOCK:
            self._calls.append(_Call(self._on, self))
            for place in self._places:
                place.begin(self._calls[-1])

    def __enter__(self) -> Switch:
        with LOCK:
            if not self._calls or self._calls[-1].is_block:  # entered before: make another block
                self._begin()
            self._calls[-1].is_block = True
        return self

    def __exit__(self, *_: object) -> None:
        with LOCK:
            if self._calls:
                call = self._calls.pop()
                for place in self._places:
                    place.end(call)


class _Call:
    """A call of enable() or disable()."""

    def __init__(self, on: bool, switch: Switch | None = None):
        self.on, self.is_block = on, False
        self._switch = None if switch is None else weakref.ref(switch)

    @property
    def is_for_good(self) -> bool:
        """Whether it can no longer become a block, or end."""
        return not self.is_block and (self._switch is None or self._switch() is None)


class Place:
    """Where something is switched on; `change` is called when that changes, and returns warnings.

    Attributes:
        on: whether it is.
    """

    def __init__(self, change: Callable[[bool], Sequence[str]], on: bool = False):
        self.on = on
        self._change = change
        self._calls = [_Call(True)] if on else []
        """The calls in force, oldest first."""

    def begin(self, call: _Call) -> None:
        self._calls.append(call)
        last = max((i for i, c in enumerate(self._calls) if c.is_for_good), default=0)
        # A permanent call makes earlier permanent calls irrelevant.
        self._calls = [c for i, c in enumerate(self._calls) if i >= last or not c.is_for_good]
        self._settle()

    def end(self, call: _Call) -> None:
        self._calls = [c for c in self._calls if c is not call]
        self._settle()

    def _settle(self) -> None:
        on = bool(self._calls) and self._calls[-1].on
        if on != self.on:
            self.on = on
            for message in self._change(on):
                warn(message)


class Ours(NamedTuple):
    """The attribute `anydelta` of our functions."""

    function: Callable[..., object]
    """The function itself. Wrappers made by functools.wraps have the attribute too."""
    theirs: Any
    """The original, which runs while ours is off."""
    ours: Callable[..., object]
    place: Place
    also: Callable[..., bool] | None

    def is_on(self, owner: object) -> bool:
        """Whether ours runs as a method of this object."""
        return self.place.on or (self.also is not None and self.also(owner))


def guarded(
    theirs: Callable[P, R],
    ours: Callable[..., R],
    place: Place,
    also: Callable[..., bool] | None = None,
    name: str = "",
) -> Callable[P, R]:
    """`ours` while the place is on, or if `also` accepts the arguments; otherwise `theirs`.

    Code that keeps or wraps the function may call it at any time.
    """

    @functools.wraps(theirs, updated=())
    def either(*args: P.args, **kwargs: P.kwargs) -> R:
        if place.on or (also is not None and also(*args)):
            return ours(*args, **kwargs)
        return theirs(*args, **kwargs)

    if name:
        either.__name__ = name
    either.anydelta = Ours(either, theirs, ours, place, also)  # type: ignore[attr-defined]
    return either


def mark(function: object) -> Ours | None:
    """The attribute of one of our functions; None for all others."""
    found = getattr(function, "anydelta", None)
    return found if isinstance(found, Ours) and found.function is function else None


def stock(function: F) -> F:
    """The function that ours replaced."""
    while (found := mark(function)) is not None:
        function = found.theirs
    return function


def held(function: object, owner: object) -> Iterator[Callable[..., object]]:
    """The functions that a callable of `owner` may run: itself, and those in its methods, partials, closures and
    attributes."""
    seen: set[int] = set()
    rest = [function]
    while rest:
        function = rest.pop()
        if id(function) in seen or isinstance(function, type) or not callable(function):
            continue
        seen.add(id(function))
        yield function
        if isinstance(function, MethodType) and function.__self__ is owner:
            rest.append(function.__func__)
        elif isinstance(function, functools.partial):
            rest += [function.func, *function.args, *function.keywords.values()]
        elif isinstance(function, FunctionType):
            rest += [getattr(function, "__wrapped__", None), *_cells(function)]
        elif not hasattr(keeper := getattr(function, "__self__", function), "named_modules"):
            rest += list(getattr(keeper, "__dict__", {}).values())


def _cells(function: FunctionType) -> Iterator[object]:
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # empty
            yield cell.cell_contents


class Patch:
    """An attribute of a module or class: the original, and ours, which `make` makes from it."""

    def __init__(self, owner: type | ModuleType, name: str, make: Callable[[Any], object]):
        self.owner, self.name, self._make = owner, name, make
        self.theirs = self.ours = MISSING
        self._inherited = False

    def learn(self) -> bool:
        """Look at the current attribute. Returns whether it was unknown."""
        # a class's static method as it is; modules may load their attributes late
        look = inspect.getattr_static if isinstance(self.owner, type) else getattr
        here = look(self.owner, self.name, MISSING)
        if self.ours is not MISSING and (here is self.theirs or here is self.ours):
            return False
        self.theirs, self.ours = here, self._make(here)
        self._inherited = self.name not in vars(self.owner)
        return True

    def put(self) -> None:
        self.learn()
        setattr(self.owner, self.name, self.ours)

    def take(self) -> list[str]:
        """Restore the original, unless ours was replaced. Returns warnings."""
        if vars(self.owner).get(self.name) is not self.ours:
            return [
                f"anydelta: {self.owner.__name__}.{self.name} was replaced by other code since enable(), and stays as "
                "it is"
            ]
        if self._inherited:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self.theirs)
        return []


def turn(patches: Iterable[Patch], on: bool) -> list[str]:
    """Put our attributes in place, or the originals back. Returns warnings."""
    if not on:
        return [message for patch in patches for message in patch.take()]
    for patch in patches:
        patch.put()
    return []


def warn(message: str) -> None:
    """Raise a RuntimeWarning at the calling line outside of this package."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).startswith("anydelta."):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, RuntimeWarning, stacklevel=level)
