"""anydelta as the recurrence of mlx-lm's hybrid models.

    import anydelta.integrations.mlx_lm as adm

    adm.enable()                  # every model, loaded already or not yet
    with adm.enable(): ...        # until the end of the block
    adm.disable()                 # what mlx-lm had before

Each model module of mlx-lm looks up `gated_delta_update` by name when a layer runs; `enable()` replaces that name. A
call that anydelta does not take falls back to mlx-lm's function, and `status()` says which and why.

`enable()` also lets these models draft: mlx-lm's `speculative_generate_step` (and `generate` and `stream_generate` with
a `draft_model`) requires caches that can be trimmed, and a recurrent state cannot. During a generation, each linear
attention layer gets a `RollbackCache`. `make_prompt_cache(model, rollback=8)` makes such caches for your own loops.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from ...core.late import late
from ..switch import LOCK, Patch, Place, Switch, guarded, turn
from .families import RULE, Found, look

if TYPE_CHECKING:
    from mlx.nn.layers.base import Module
    from mlx_lm.models.cache import _BaseCache

_cache = late("anydelta.integrations.mlx_lm.cache")

_INSTALL = "pip install 'anydelta[mlx-lm]'"


@dataclass(frozen=True)
class Status:
    """Whether anydelta is enabled, and which calls it has run since the process began."""

    mlx_lm: str
    enabled: bool
    families: tuple[str, ...]
    """The families that this mlx-lm has."""
    taken: int
    """Calls that anydelta ran."""
    passed_on: dict[str, int] = field(default_factory=dict)
    """Calls that fell back to mlx-lm, by reason."""
    left: dict[str, str] = field(default_factory=dict)
    """Families that are not replaced, or only in part, and why."""

    def __str__(self) -> str:
        lines = [f"mlx-lm {self.mlx_lm} ({', '.join(self.families)}): {'on' if self.enabled else 'off'}"]
        lines.append(f"taken: {self.taken}")
        lines += [f"passed on: {why} x {n}" for why, n in self.passed_on.items()]
        lines += [f"left as it is: {name}: {why}" for name, why in self.left.items()]
        return "\n".join(lines)


def enable() -> Switch:
    """Run the linear attention of mlx-lm's models on anydelta. A second call changes nothing.

    A plain call lasts until `disable()`. A block (`with enable():`) lasts until its own end, and blocks may overlap. If
    several calls of `enable` and `disable` are in force, in any thread, the latest one decides.

    Raises:
        ImportError: mlx or mlx-lm is missing.
    """
    return _switch(True)


def disable() -> Switch:
    """Undo `enable()`: mlx-lm gets its functions back, if they were replaced.

    A plain call ends plain calls of `enable` and turns off open blocks; a later `enable` counts again. A block (`with
    disable():`) turns off what began before it, until it ends.

    Raises:
        ImportError: as `enable`.
    """
    return _switch(False)


def status() -> Status:
    """What is replaced, and how many calls ran or fell back."""
    _hooks()
    found, left = _families()
    return Status(
        importlib.import_module("mlx_lm").__version__,
        _everywhere.on,
        tuple(f.name for f in found),
        _taken[RULE],
        dict(_passed_on),
        left,
    )


def make_prompt_cache(model: Module, rollback: int) -> list[_BaseCache]:
    """A prompt cache whose last `rollback` tokens mlx-lm's `trim_prompt_cache` can take back, exactly.

    Memory: per linear attention layer and sequence, `rollback` more states than mlx-lm's cache. Call models with such
    a cache only while anydelta is enabled.

    Raises:
        ValueError: rollback < 1, or a layer's cache cannot be replaced.
        ImportError: as `enable`.
    """
    if isinstance(rollback, bool) or not isinstance(rollback, int) or rollback < 1:
        raise ValueError(f"make_prompt_cache: rollback must be a number of tokens >= 1; got {rollback!r}")
    _hooks()
    caches = importlib.import_module("mlx_lm.models.cache").make_prompt_cache(model)
    _make_trimmable(caches, [model], rollback)
    stuck = [f"{i} ({type(c).__name__})" for i, c in enumerate(caches) if not c.is_trimmable()]
    if stuck:
        known = ", ".join(f.name for f in _families()[0] if f.layer is not None)
        raise ValueError(
            f"make_prompt_cache: requires layers whose caches can be trimmed, or linear attention of {known}; got "
            f"{type(model).__module__} with layers {', '.join(stuck)}"
        )
    return list(caches)


# ---- What is replaced

_STEP = "speculative_generate_step"
_taken: Counter[str] = Counter()
_passed_on: Counter[str] = Counter()


def _switch(on: bool) -> Switch:
    with LOCK:
        _hooks()
        return Switch(on, [_everywhere])


def _set_everywhere(on: bool) -> list[str]:
    return turn(_hooks(), on)


_everywhere = Place(_set_everywhere)


R = TypeVar("R")


def _guarded(
    make: Callable[..., Callable[..., R]], *more: object
) -> Callable[[Callable[..., R]], Callable[..., R]]:
    return lambda theirs: guarded(theirs, make(theirs, *more), _everywhere)


@functools.cache
def _families() -> tuple[list[Found], dict[str, str]]:
    """The families of the installed mlx-lm, looked up once."""
    try:
        for name in ("mlx.core", "mlx_lm"):
            importlib.import_module(name)
    except ImportError as error:
        missing = error.name or "a module"
        raise ImportError(
            f"anydelta.integrations.mlx_lm: requires mlx and mlx-lm; got no {missing}. {_INSTALL}"
        ) from error
    found, left = look()
    wanted = {"model", "draft_model", "num_draft_tokens", "prompt_cache"}
    generate = importlib.import_module("mlx_lm.generate")
    if not wanted <= set(inspect.signature(getattr(generate, _STEP, lambda: None)).parameters):
        left["drafting"] = f"mlx_lm.generate.{_STEP} does not take {', '.join(sorted(wanted))}"
    return found, left


@functools.cache
def _hooks() -> tuple[Patch, ...]:
    """All patches."""
    found, left = _families()
    functions = importlib.import_module("anydelta.integrations.mlx_lm.functions")
    hooks = []
    for family in found:
        hooks.append(Patch(family.module, RULE, _guarded(functions.update, _taken, _passed_on)))
        if family.layer is not None:
            hooks.append(Patch(family.layer, "__call__", _guarded(functions.layer, family.convolutions)))
    if "drafting" not in left:
        hooks.append(Patch(importlib.import_module("mlx_lm.generate"), _STEP, _drafting))
    return tuple(hooks)


# ---- Drafting


def _drafting(theirs: Callable[..., Iterator[R]]) -> Callable[..., Iterator[R]]:
    """speculative_generate_step, with caches of hybrid models that can be trimmed while it runs."""
    hand_over = importlib.import_module("anydelta.integrations.mlx_lm.cache").hand_over
    signature = inspect.signature(theirs)
    make_cache = importlib.import_module("mlx_lm.models.cache").make_prompt_cache

    @functools.wraps(theirs)
    def speculative_generate_step(*args: object, **kwargs: object) -> Iterator[R]:
        if not _everywhere.on:  # at its first token, not when it was made
            yield from theirs(*args, **kwargs)
            return
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        models = [call.arguments["model"], call.arguments["draft_model"]]
        caches = call.arguments["prompt_cache"]
        if caches is None:
            caches = [c for model in models for c in make_cache(model)]
        plain = _make_trimmable(caches, models, max(call.arguments["num_draft_tokens"], 1))
        call.arguments["prompt_cache"] = caches
        try:
            yield from theirs(*call.args, **call.kwargs)
        finally:  # the caller's caches are mlx-lm's own again and can no longer be trimmed
            for place, cache in plain.items():
                hand_over(caches[place], cache)
                caches[place] = cache

    return speculative_generate_step


def _make_trimmable(caches: list[_BaseCache], models: list[Module], rollback: int) -> dict[int, _BaseCache]:
    """Replace each linear attention layer's cache by a RollbackCache. Returns the replaced caches."""
    ArraysCache = importlib.import_module("mlx_lm.models.cache").ArraysCache
    kinds = tuple(f.layer for f in _families()[0] if f.layer is not None)
    layers = [layer for model in models for layer in model.layers]
    replaced = {}
    for place, (cache, layer) in enumerate(zip(caches, layers, strict=False)):
        if type(cache) is ArraysCache and any(isinstance(m, kinds) for m in layer.modules()):
            replaced[place] = cache
            caches[place] = _cache.RollbackCache.of(cache, rollback)
    return replaced
