"""Copies of modules for the length of a call, so that nothing is written to what other threads use."""

from __future__ import annotations

import functools
import types
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import nn

M = TypeVar("M", bound="nn.Module")


def copy_for_call(module: M, cls: type[M] | None = None) -> M:
    """A module of which one call may change the attributes and the modules in it; all that it holds is shared."""
    own: M = object.__new__(cls or type(module))
    own.__dict__.update(module.__dict__)
    own.__dict__["_modules"] = dict(module._modules)
    for name, value in module.__dict__.items():  # methods of its own, as enable(model) and accelerate give it
        if isinstance(value, types.MethodType) and value.__self__ is module:
            own.__dict__[name] = types.MethodType(value.__func__, own)
        elif isinstance(value, functools.partial) and any(x is module for x in value.args):
            args = (own if x is module else x for x in value.args)
            own.__dict__[name] = rebound = functools.partial(value.func, *args, **value.keywords)
            rebound.__dict__.update(value.__dict__)  # __wrapped__, from which its signature comes
    return own
