"""The time of each part of a model, from timers around its modules and functions.

A clock is read whenever a part begins or ends. The time in between counts for the innermost open part. Linear layers
inside a linear attention layer are its projections. The rest of that layer is its mixer: convolution, gates, rule and
gated norm, and copies between them. If anydelta runs all of that as one operator, it is one part. Reading clocks takes
some microseconds per module, so the speeds in the table come from runs without them.
"""

from __future__ import annotations

import functools
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from ...core.late import late
from ...generate.presets import Built
from .runners import CompiledRunner, Prepared, TransformersRunner, interleave

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from ...integrations.transformers import find
    from ...integrations.transformers.find import Found
else:
    find = late("anydelta.integrations.transformers.find")

CONV, RULE, NORM, GLUE = "conv", "rule", "gated norm", "mixer (the rest, or fused)"
MIXER = (CONV, RULE, NORM, GLUE)
"""The parts of a linear attention layer, apart from its projections."""

MIXER_TOTAL = "mixer in all"
ORDER = (
    "embedding", "norms", "linear attention projections", *MIXER, MIXER_TOTAL, "attention projections", "attention",
    "mlp", "lm_head", "rest", "total",
)  # fmt: skip
"""rest: residual additions, masks, rotary tables, cache bookkeeping, Python between the modules."""


@dataclass
class Part:
    """The time of one part of a model in one test, by contender."""

    model: str
    dtype: str
    threads: int
    test: str
    part: str
    unit: str
    """ms per prompt, or ms per token."""
    ms: dict[str, float]
    """Median of the rounds."""
    ratio: float | None
    """Transformers' time / anydelta's, median of the rounds."""


P = ParamSpec("P")
R = TypeVar("R")


class Clock:
    """Exclusive time by part: time in a part does not count for the part around it."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._last = 0.0

    def begin(self, part: str) -> None:
        now = time.perf_counter()
        if self._open:
            self.spent[self._open[-1]] += now - self._last
        self._open.append(part)
        self._last = now

    def end(self) -> None:
        now = time.perf_counter()
        self.spent[self._open.pop()] += now - self._last
        self._last = now

    def wrap(self, part: str, function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def timed(*args: P.args, **kwargs: P.kwargs) -> R:
            self.begin(part)
            try:
                return function(*args, **kwargs)
            finally:
                self.end()

        return timed


def measure(
    built: Built,
    runs: Sequence[Prepared],
    rounds: int,
    dtype: str,
    threads: int,
    tell: Callable[[str, float], None],
) -> list[Part]:
    """The parts of the Transformers contenders, in separate rounds; llama.cpp and graphs cannot be profiled."""
    chosen = [
        run
        for run in runs
        if isinstance(run.runner, TransformersRunner) and not isinstance(run.runner, CompiledRunner)
    ]
    samples = interleave(
        [functools.partial(_sample, built.model, run) for run in chosen],
        rounds,
        lambda text, share: tell(f"profile, {text}", share),
    )
    test = chosen[0].test
    each, unit = (1, "ms per prompt") if test.kind == "pp" else (test.n, "ms per token")
    found = []
    for part in ORDER:
        times = [[1e3 * s.get(part, 0.0) / each for s in one] for one in samples]
        if not any(any(one) for one in times):
            continue
        ms = {run.runner.name: statistics.median(one) for run, one in zip(chosen, times, strict=True)}
        ratio = None
        if len(times) > 1 and all(times[1]):
            ratio = statistics.median(a / b for a, b in zip(times[0], times[1], strict=True))
        found.append(Part(built.name, dtype, threads, test.name, part, unit, ms, ratio))
    return found


def _sample(model: PreTrainedModel, run: Prepared) -> dict[str, float]:
    clock = Clock()
    with run.runner.running(), _watched(model, clock):  # type: ignore[attr-defined]
        total = run()
    spent = dict(clock.spent)
    spent["rest"] = total - sum(spent.values())
    spent[MIXER_TOTAL] = sum(spent.get(part, 0.0) for part in MIXER)
    spent["total"] = total
    return spent


@contextmanager
def _watched(model: PreTrainedModel, clock: Clock) -> Iterator[None]:
    """Puts timers around every call of a module that is a part, and around the functions that a mixer looks up."""
    undo = (_time_functions(model, clock), _time_modules(model, clock))
    try:
        yield
    finally:
        for one in reversed(undo):
            one()


def _time_modules(model: PreTrainedModel, clock: Clock) -> Callable[[], None]:
    """Put timers around whole calls, so that nn.Module's work around a forward counts for that part.

    They are in the class: a hook or a forward in a layer costs 20 us per module, and enable() would skip the layer.
    """
    from torch import nn

    call = nn.Module.__call__
    chosen = {id(module): part for module, part in parts(model)}

    def timed(self: nn.Module, *args: object, **kwargs: object) -> object:
        part = chosen.get(id(self))
        if part is None:
            return call(self, *args, **kwargs)
        clock.begin(part)
        try:
            return call(self, *args, **kwargs)
        finally:
            clock.end()

    nn.Module.__call__ = timed  # type: ignore[method-assign]

    def restore() -> None:
        nn.Module.__call__ = call  # type: ignore[method-assign]

    return restore


def parts(model: PreTrainedModel) -> list[tuple[nn.Module, str]]:
    """Modules, each with its part. Modules inside one of these may be another part."""
    from torch import nn

    linear = _linear_attention(model)
    base = model.get_decoder()
    found: list[tuple[nn.Module, str]] = [(base.get_input_embeddings(), "embedding")]
    if (norm := getattr(base, "norm", None)) is not None:
        found.append((norm, "norms"))
    if (head := model.get_output_embeddings()) is not None:
        found.append((head, "lm_head"))
    for layer in base.layers:
        for name, module in layer.named_children():
            if isinstance(module, linear):
                found += _inside(module, GLUE, "linear attention projections")
                found += [(m, NORM) for child, m in module.named_children() if "norm" in child]
            elif "attn" in name:
                found += _inside(module, "attention", "attention projections")
            elif "norm" in name:
                found.append((module, "norms"))
            elif isinstance(module, nn.Module):
                found.append((module, "mlp"))
    return found


def _inside(module: nn.Module, own: str, projections: str) -> list[tuple[nn.Module, str]]:
    from torch import nn

    return [(module, own)] + [(m, projections) for m in module.modules() if isinstance(m, nn.Linear)]


def _linear_attention(model: PreTrainedModel) -> tuple[type[nn.Module], ...]:
    """The layer class of the model's own family."""
    return tuple(layer for found in _families(model) for layer in found.layers)


def _families(model: PreTrainedModel) -> list[Found]:
    """The families whose layers the model has."""
    names = {cls.__module__ for m in model.modules() for cls in type(m).__mro__}
    modules = [module for name in sorted(names) if (module := sys.modules.get(name)) is not None]
    return [found for module in modules if (found := find.look_at(module)) is not None and found.layers]


def _time_functions(model: PreTrainedModel, clock: Clock) -> Callable[[], None]:
    """Put timers around rule and convolution, wherever the model's layers currently look them up."""
    undo: list[tuple[dict[str, object], str, object]] = []
    for found in _families(model):
        scopes = [vars(found.module)]
        kinds = tuple(found.layers)
        for m in model.modules():
            if isinstance(m, kinds):
                scopes += _scopes(m.forward, set(found.functions))
        for scope in {id(s): s for s in scopes}.values():
            for name in found.functions:
                part = CONV if "conv" in name else RULE
                undo.append((scope, name, scope[name]))
                scope[name] = clock.wrap(part, scope[name])

    def restore() -> None:
        for scope, name, function in undo:
            scope[name] = function

    return restore


def _scopes(function: object, names: set[str], depth: int = 8) -> list[dict[str, object]]:
    """The globals of a forward and of the functions that it wraps, if they have one of the names."""
    import types

    function = getattr(function, "__func__", function)
    if not isinstance(function, types.FunctionType) or depth == 0:
        return []
    found = [function.__globals__] if names <= function.__globals__.keys() else []
    for cell in function.__closure__ or ():
        try:
            found += _scopes(cell.cell_contents, names, depth - 1)
        except ValueError:  # an empty cell
            continue
    return found
