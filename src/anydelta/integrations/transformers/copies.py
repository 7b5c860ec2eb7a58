"""Copies of modules for one call, so that nothing is written to modules that other threads use."""

from __future__ import annotations

import functools
import types
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import nn

M = TypeVar("M", bound="nn.Module")


def copy_for_call(module: M, cls: type[M] | None = None) -> M:
    """A copy of a module: one call may change its attributes and submodules, and everything they hold is shared."""
    own: M = object.__new__(cls or type(module))
    own.__dict__.update(module.__dict__)
    own.__dict__["_modules"] = dict(module._modules)
    for name, value in module.__dict__.items():  # its own methods, as enable(model) and accelerate set them
        if isinstance(value, types.MethodType) and value.__self__ is module:
            own.__dict__[name] = types.MethodType(value.__func__, own)
        elif isinstance(value, functools.partial) and any(x is module for x in value.args):
            args = (own if x is module else x for x in value.args)
            own.__dict__[name] = rebound = functools.partial(value.func, *args, **value.keywords)
            rebound.__dict__.update(value.__dict__)  # __wrapped__, which gives it its signature
    return own
