"""The cache of plans, and the path of each call to its backend.

A `Plan` holds what is known of a call: its spec, its backend, what the backend prepared, how results are made.
The next equal call reuses it. Calls are equal if their keys are. A key has two parts:

    of the arrays   dtypes, shapes, strides, everything else that a check reads, and ANYDELTA_BACKEND. The extension
                    reads it in less than a microsecond (backends/cpu/arrays.h). It refuses if a plan must not be
                    cached: torch traces or watches the call, a tensor is not plain memory, or a gradient is wanted.
    the rest        a tuple of texts, numbers and None: the options of the call and the backend that was asked for.

A call equal to an earlier one then costs one look-up. Without the extension nothing is cached.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from .arrays import Array, Arrays
from .devices import DeviceArray
from .native import core

S = TypeVar("S")
C = TypeVar("C")
Rest = tuple[Any, ...]
"""Texts, numbers and None."""
Launch = Callable[[Arrays, Arrays], object]
"""Runs a call on its arrays and its results, both in the order of its table."""


@dataclass(slots=True)
class Plan(Generic[S]):
    spec: S
    make: Callable[[Arrays], Arrays]
    """Returns new results for the arrays of a call."""
    launch: Launch
    check: Callable[[Arrays], object] | None = None
    """Checks the values of index arrays, which no key holds; None without such arrays."""
    step: Callable[[Arrays, Arrays], core.MixerStep | None] | None = None
    """An object of the extension that repeats the call, if the backend has one."""

    def call(self, arrays: Arrays) -> Arrays:
        """The results."""
        if self.check is not None:
            self.check(arrays)
        made = self.make(arrays)
        self.launch(arrays, made)
        return made


Key: type = type(None) if core is None else core.Key
"""The key of a call's arrays."""


def _nothing(arrays: Arrays, rest: Rest, text: str | None = None) -> object:
    return None


find: Callable[..., object] = _nothing if core is None else core.find_plan
"""find(arrays, rest, text=None): the plan that is cached for such a call; or its key, for `keep`; or None if the call
may not be cached. `text` adds to the key what `arrays` do not hold."""


def find_on_devices(arrays: Arrays, rest: Rest) -> object:
    """`find` if some arrays are on an `anydelta.device`, which the extension does not read."""
    text = [f"{x.device.name} {x.shape} {x.dtype}" if type(x) is DeviceArray else "-" for x in arrays]
    return find(tuple(None if type(x) is DeviceArray else x for x in arrays), rest, "|".join(text))


def keep(key: object, rest: Rest, plan: object) -> None:
    """Cache a plan under the key that `find` returned."""
    if key is not None:
        core.keep_plan(key, rest, plan)


def forget() -> None:
    """Forget all plans: for code that changes what they were made from."""
    if core is not None:
        core.forget_plans()


def count() -> int:
    """How many plans are kept."""
    return 0 if core is None else int(core.count_plans())


def launcher(
    run: Callable[[C], object],
    table: Callable[..., C],
    written: Callable[[C], list[Array]] | None,
) -> Launch:
    """The launch for a backend that takes one object: `table` builds it from arrays and results. `written` returns the
    tensors whose version counts go up."""

    def launch(arrays: Arrays, made: Arrays) -> None:
        call = table(*arrays, *made)
        if written is not None:
            import torch

            torch._C._increment_version([x for x in written(call) if x is not None])
        run(call)

    return launch


atexit.register(forget)  # plans hold native objects, which must go before the extension does
