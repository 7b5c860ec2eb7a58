"""The contenders of `anydelta bench model`, and how a test is repeated, interleaved."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ...generate.presets import Built
from .cases import F32
from .ops import SETTLE_SECONDS

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.utils import ModelOutput

LOGIT_ERROR = 1e-4
"""float32: the largest difference from Transformers' logits, relative to the larger of 1 and the largest logit. A
runner that shares no code with Transformers sets its own."""


@dataclass(frozen=True)
class Test:
    """One row: N prompt tokens, or N tokens one after the other, after `depth` tokens of context."""

    kind: str
    """pp or tg"""
    n: int
    depth: int = 0

    @property
    def name(self) -> str:
        return f"{self.kind}{self.n}" + (f" @ d{self.depth}" if self.depth else "")


Enabled = Callable[["PreTrainedModel"], AbstractContextManager[object]]
"""The context in which a model runs."""


class Runner(Protocol):
    """A contender with a model loaded. One sequence at a time."""

    name: str
    version: str
    logit_error: float

    def threads(self, n: int) -> None:
        """Run on n threads from now on. torch's number is set separately."""
        ...

    def context(self, ids: Sequence[int]) -> object:
        """Process `ids` from the start, and keep the context for the next calls. Not timed."""
        ...

    def restore(self, kept: Any) -> None:
        """Return to a context from `context`. Not timed."""
        ...

    def prompt(self, ids: Sequence[int]) -> F32:
        """Process `ids` at once. Returns the logits after the last one, [vocabulary]."""
        ...

    def decode(self, token: int, n: int) -> None:
        """Generate n tokens greedily, one after the other; `token` is the first input."""
        ...

    def close(self) -> None: ...


class TransformersRunner:
    """A model of Transformers, in a context that may enable anydelta."""

    logit_error = LOGIT_ERROR

    def __init__(
        self,
        name: str,
        version: str,
        model: PreTrainedModel,
        enabled: Enabled = nullcontext,
    ):
        self.name, self.version, self.model = name, version, model
        self.enabled = enabled
        self._cache: Any = None

    def threads(self, n: int) -> None:
        """Nothing to do: torch's number counts."""

    @contextmanager
    def running(self) -> Iterator[None]:
        import torch

        with torch.no_grad(), self.enabled(self.model):
            yield

    def context(self, ids: Sequence[int]) -> object:
        self._cache = None
        self.prompt(ids)
        return self._cache

    def restore(self, kept: object) -> None:
        self._cache = copy.deepcopy(kept)

    def prompt(self, ids: Sequence[int]) -> F32:
        import torch

        out = self.model(
            input_ids=torch.tensor([ids]), past_key_values=self._cache, use_cache=True, logits_to_keep=1
        )
        self._cache = out.past_key_values
        return np.asarray(out.logits[0, -1].float().numpy())

    def decode(self, token: int, n: int) -> None:
        import torch

        model, cache = self.model, self._cache
        ids = torch.tensor([[token]])
        for _ in range(n):
            ids = model(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)

    def close(self) -> None:
        self._cache = None


class CompiledRunner(TransformersRunner):
    """The same with the decode step under torch.compile, on one StaticCache. Prompts run uncompiled.

    `generate` compiles in the same way. The profile cannot look inside.
    """

    def __init__(
        self, name: str, version: str, model: PreTrainedModel, room: int, enabled: Enabled = nullcontext
    ):
        import torch
        import transformers

        super().__init__(name, version, model, enabled)
        self._step: Callable[..., ModelOutput] = torch.compile(model.forward, fullgraph=True, dynamic=False)
        self._cache = transformers.StaticCache(config=model.config, max_cache_len=room)

    def context(self, ids: Sequence[int]) -> Any:
        self.restore(None)
        self.prompt(ids)
        return copy.deepcopy(self._cache)

    def restore(self, kept: Any) -> None:
        if kept is None:
            self._cache.reset()
            return
        for to, source in zip(
            self._cache.layers, kept.layers, strict=True
        ):  # a graph is bound to the tensors
            for name, value in vars(source).items():
                vars(to)[name] = _written(vars(to).get(name), value)

    def prompt(self, ids: Sequence[int]) -> F32:
        if len(ids) > 1:
            return super().prompt(ids)
        import torch

        out = self._step(input_ids=torch.tensor([ids]), past_key_values=self._cache, use_cache=True)
        return np.asarray(out.logits[0, -1].float().numpy())

    def decode(self, token: int, n: int) -> None:
        import torch

        ids = torch.tensor([[token]])
        for _ in range(n):
            out = self._step(input_ids=ids, past_key_values=self._cache, use_cache=True)
            ids = out.logits[:, -1:].argmax(-1)


def _written(to: object, value: object) -> object:
    """`value`, written into the tensors that `to` holds, if it holds any."""
    import torch

    if isinstance(value, torch.Tensor) and isinstance(to, torch.Tensor):
        return to.copy_(value)
    if isinstance(value, (list, dict)) and isinstance(to, type(value)):
        for key in range(len(value)) if isinstance(value, list) else value:
            to[key] = _written(to[key], value[key])
        return to
    return copy.deepcopy(value)


def random_ids(built: Built, n: int, seed: int = 0) -> list[int]:
    """Token ids that every model has."""
    size = int(built.model.get_input_embeddings().num_embeddings)
    return [int(i) for i in np.random.default_rng(seed).integers(3, size, n)]


def running(runner: Runner) -> AbstractContextManager[object]:
    return runner.running() if isinstance(runner, TransformersRunner) else nullcontext()


class Prepared:
    """A test that one runner can repeat."""

    def __init__(self, test: Test, runner: Runner, ids: Sequence[int]):
        self.test, self.runner = test, runner
        # At least one token of context: without context, layers take another path.
        depth = test.depth if test.kind == "pp" else max(1, test.depth)
        self.prompt, self.token = list(ids[depth : depth + test.n]), ids[depth]
        with running(runner):
            runner.restore(None)
            self.kept = runner.context(ids[:depth]) if depth else None
            self()  # a warm-up run; llama-bench does one too

    def __call__(self) -> float:
        """Seconds of one run."""
        runner = self.runner
        with running(runner):
            runner.restore(self.kept)
            start = time.perf_counter()
            if self.test.kind == "pp":
                runner.prompt(self.prompt)
            else:
                runner.decode(self.token, self.test.n)
            return time.perf_counter() - start


def prepare(test: Test, runners: Sequence[Runner], built: Built) -> list[Prepared]:
    ids = random_ids(built, test.depth + max(test.n, 2), seed=1)
    return [Prepared(test, runner, ids) for runner in runners]


def interleave(
    runs: Sequence[Callable[[], object]], rounds: int, tell: Callable[[str, float], None]
) -> list[list[Any]]:
    """The results of each run in each round, interleaved. Each round begins with another run."""
    results: list[list[object]] = [[] for _ in runs]
    for r in range(rounds):
        tell(f"round {r + 1} of {rounds}", r / rounds)
        first = r % len(runs)
        for i in [*range(first, len(runs)), *range(first)]:
            time.sleep(SETTLE_SECONDS)
            results[i].append(runs[i]())
    return results
