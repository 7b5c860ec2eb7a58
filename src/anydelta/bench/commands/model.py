"""Measure whole models: Transformers as it is, with anydelta, and llama.cpp on the same weights, in one process.

As llama-bench does: ppN is N prompt tokens in one go, tgN is N tokens one after the other, both after d tokens of
context. As everywhere here: the results are compared before anything is timed, the contenders take turns within a
round, a ratio is taken within a round, and the median of the rounds counts. The contenders of Transformers are one
model; what differs is whether anydelta is enabled while it runs.
"""

from __future__ import annotations

import copy
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from ...terminal import Failed, first_line
from ..measure.cases import F32
from ..measure.presets import Built
from .ops import SETTLE_SECONDS, Others

CHECK_PROMPT, CHECK_STEPS = 48, 8
"""Tokens that the contenders must agree about before they are timed."""

LOGIT_ERROR = 1e-4
"""float32: the largest difference from Transformers' logits, over the larger of 1 and the largest logit. A runner that
shares no code with Transformers sets its own."""

HALF_ERROR = 2.0
"""Half types: how many times as far from the float32 result as Transformers itself (RMS over all logits)."""


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


@dataclass(frozen=True)
class Settings:
    """What to measure, and how often."""

    tests: tuple[Test, ...]
    rounds: int = 5
    profile: bool = False
    """Also say where the time goes, in rounds of their own."""


@dataclass
class Record:
    """One contender on one test."""

    model: str
    cut: str
    params: int
    size_mib: float
    dtype: str
    threads: int
    test: str
    n: int
    depth: int
    contender: str
    version: str
    status: str = "ok"
    """ok; absent: it cannot run this model; failed: it raised; wrong: its logits are not right."""
    reason: str = ""
    checked: str = ""
    logit_error: float | None = None
    """float32: the largest difference from Transformers' logits. Half types: RMS difference from float32's."""
    same_tokens: str = ""
    """How many greedy tokens equal Transformers'."""
    rounds: int = 0
    median_tps: float | None = None
    """Tokens per second, median of the rounds."""
    std_tps: float | None = None
    """Their standard deviation."""
    ratio: float | None = None
    """Transformers' time over this one's, median of the rounds: above 1, this one is faster."""
    ratio_low: float | None = None
    ratio_high: float | None = None
    """Quartiles of that ratio."""
    others_pct: float | None = None
    """CPU time of other processes during the rounds, of all CPUs; Linux only."""


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
    """Transformers over anydelta, median of the rounds."""


@dataclass
class Report:
    """What was measured, on what, and who was absent."""

    machine: dict[str, Any]
    settings: Settings
    absent: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)


class Runner(Protocol):
    """A contender with a model loaded. One sequence at a time."""

    name: str
    version: str
    logit_error: float

    def threads(self, n: int) -> None:
        """Run on so many threads from now on; torch's number is set beside."""
        ...

    def context(self, ids: Sequence[int]) -> Any:
        """Process `ids` from the start, and keep what the next calls need. Not timed."""
        ...

    def restore(self, kept: Any) -> None:
        """Back to such a context. Not timed."""
        ...

    def prompt(self, ids: Sequence[int]) -> F32:
        """Process `ids` in one go; the logits after the last one, [vocabulary]."""
        ...

    def decode(self, token: int, n: int) -> None:
        """n tokens one after the other, each the likeliest after the last; `token` is the first one's input."""
        ...

    def close(self) -> None: ...


class TransformersRunner:
    """A model of Transformers, in a context that may enable anydelta."""

    logit_error = LOGIT_ERROR

    def __init__(
        self,
        name: str,
        version: str,
        model: Any,
        enabled: Callable[[Any], AbstractContextManager[Any]] = nullcontext,
    ):
        self.name, self.version, self.model = name, version, model
        self.enabled = enabled
        self._cache: Any = None

    def threads(self, n: int) -> None:
        """torch's number counts."""

    @contextmanager
    def running(self) -> Iterator[None]:
        import torch

        with torch.no_grad(), self.enabled(self.model):
            yield

    def context(self, ids: Sequence[int]) -> Any:
        self._cache = None
        self.prompt(ids)
        return self._cache

    def restore(self, kept: Any) -> None:
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
    """The same with the decode step under torch.compile, on one StaticCache; prompts run as they are.

    That is how `generate` compiles. The profile cannot look into it.
    """

    def __init__(self, name: str, version: str, model: Any, room: int, enabled: Any = nullcontext):
        import torch
        import transformers

        super().__init__(name, version, model, enabled)
        self._step: Any = torch.compile(model.forward, fullgraph=True, dynamic=False)
        self._cache = transformers.StaticCache(config=model.config, max_cache_len=room)

    def context(self, ids: Sequence[int]) -> Any:
        self.restore(None)
        self.prompt(ids)
        return copy.deepcopy(self._cache)

    def restore(self, kept: Any) -> None:
        if kept is None:
            self._cache.reset()
            return
        for to, source in zip(self._cache.layers, kept.layers, strict=True):  # a graph knows the tensors
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


def _written(to: Any, value: Any) -> Any:
    """`value` in the tensors that `to` holds, where it holds any."""
    import torch

    if isinstance(value, torch.Tensor) and isinstance(to, torch.Tensor):
        return to.copy_(value)
    if isinstance(value, (list, dict)) and isinstance(to, type(value)):
        for key in range(len(value)) if isinstance(value, list) else value:
            to[key] = _written(to[key], value[key])
        return to
    return copy.deepcopy(value)


def measure(
    built: Built,
    runners: Sequence[Runner],
    *,
    dtype: str,
    threads: int,
    settings: Settings,
    report: Report,
    progress: Callable[[str, float], None] = lambda text, done: None,
) -> None:
    """Add the records of one model to the report; the first runner is what the others are compared with."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    for runner in runners:
        runner.threads(threads)
    collecting = gc.isenabled()
    try:
        progress(f"{built.name}: comparing results", 0.0)
        verdicts = _check(built, runners, dtype)
        gc.disable()  # a pause of the collector is nobody's speed
        good = [r for r in runners if verdicts[r.name].status == "ok"]
        for i, test in enumerate(settings.tests):

            def tell(text: str, share: float, i: int = i, test: Test = test) -> None:
                progress(f"{built.name} {dtype} {test.name}: {text}", (i + share) / len(settings.tests))

            records = {
                r.name: Record(
                    built.name, built.cut, built.params, built.size / 2**20, dtype, threads, test.name, test.n,
                    test.depth, r.name, r.version, **vars(verdicts[r.name]),
                )
                for r in runners
            }  # fmt: skip
            report.records += records.values()
            if runners[0] not in good:  # NaN logits: nothing to compare with
                continue
            runs = prepare(test, good, built)
            _time_test(runs, settings.rounds, records, tell)
            if settings.profile:
                from ..measure import profile

                report.parts += profile.measure(built, runs, settings.rounds, dtype, threads, tell)
            del runs
            gc.collect()
    finally:
        torch.set_num_threads(before)
        if collecting:
            gc.enable()
    progress(f"{built.name}: done", 1.0)


# ---- Right before fast


@dataclass
class _Verdict:
    status: str = "ok"
    reason: str = ""
    checked: str = ""
    logit_error: float | None = None
    same_tokens: str = ""


def _check(built: Built, runners: Sequence[Runner], dtype: str) -> dict[str, _Verdict]:
    """Logits after a prompt and after each of some tokens, the same tokens for everybody.

    float32 is compared with Transformers itself. In a half type two right results differ by the rounding of that type,
    so each is compared with the float32 result of the same weights, and may be about as far from it as Transformers is.
    """
    prompt = random_ids(built, CHECK_PROMPT)
    base = runners[0]
    forced: list[int] = []
    try:
        want = _walk(base, prompt, forced)
    except (Exception, SystemExit) as error:
        why = f"{type(error).__name__}: {first_line(error)}"
        raise Failed(f"requires that {base.name} runs the model; got {why}") from error
    exact = want if dtype == "float32" or not isinstance(base, TransformersRunner) else None
    if exact is None:
        with _upcast(base.model):  # type: ignore[attr-defined]
            exact = _walk(base, prompt, list(forced))
    scale = max(1.0, float(np.max(np.abs(exact))))
    own_error = _rms(want - exact)
    verdicts: dict[str, _Verdict] = {}
    for runner in runners:
        verdict = verdicts[runner.name] = _Verdict()
        try:
            got = want if runner is base else _walk(runner, prompt, forced)
        except (Exception, SystemExit) as error:  # a contender's failure is a row of the result
            verdict.status = "failed"
            verdict.reason = f"{type(error).__name__}: {first_line(error)}"
            continue
        same = np.argmax(got, -1) == np.argmax(want, -1)
        verdict.same_tokens = f"{int(same.sum())}/{len(same)}"
        if dtype == "float32":
            verdict.checked = "logits and tokens against Transformers"
            verdict.logit_error = float(np.max(np.abs(got - want)))
            bar, got_error = runner.logit_error * scale, verdict.logit_error
        else:
            verdict.checked = "logits against float32"
            verdict.logit_error = got_error = _rms(got - exact)
            bar = HALF_ERROR * own_error
        if not got_error <= bar:
            verdict.status = "wrong"
            verdict.reason = f"requires a logit error of at most {bar:.1e}; got {got_error:.1e}"
        elif dtype == "float32" and not np.all(same | (_margin(want) <= 2 * bar)):
            verdict.status, verdict.reason = "wrong", f"only {verdict.same_tokens} greedy tokens are the same"
    return verdicts


def _walk(runner: Runner, prompt: Sequence[int], forced: list[int]) -> F32:
    """Logits [steps + 1, vocabulary] after the prompt and each forced token; an empty list is filled greedily."""
    find = not forced
    with _running(runner):
        runner.restore(None)
        rows = [runner.prompt(prompt)]
        for i in range(CHECK_STEPS):
            if find:
                forced.append(int(np.argmax(rows[-1])))
            rows.append(runner.prompt([forced[i]]))
    return np.stack(rows)


@contextmanager
def _upcast(model: Any) -> Iterator[None]:
    """Let each part of a half-type model compute in float32, one part at a time, so that memory hardly grows."""
    base = model.base_model
    parts = [base.get_input_embeddings(), *base.layers, base.norm, model.get_output_embeddings()]

    before: dict[Any, Any] = {}

    def up(module: Any, *_: Any) -> None:
        for p in module.parameters():
            before[p] = p.dtype
            p.data = p.data.float()

    def down(module: Any, *_: Any) -> None:
        for p in module.parameters():
            p.data = p.data.to(before[p])  # exact: the values came from there

    hooks = [h for p in parts for h in (p.register_forward_pre_hook(up), p.register_forward_hook(down))]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _rms(x: F32) -> float:
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


def _margin(logits: F32) -> F32:
    """How far the likeliest token is ahead of the next."""
    top = np.partition(logits, -2, axis=-1)
    return np.asarray(top[:, -1] - top[:, -2])


def random_ids(built: Built, n: int, seed: int = 0) -> list[int]:
    """Token ids that every model has."""
    size = int(built.model.get_input_embeddings().num_embeddings)
    return [int(i) for i in np.random.default_rng(seed).integers(3, size, n)]


def _running(runner: Runner) -> AbstractContextManager[Any]:
    return runner.running() if isinstance(runner, TransformersRunner) else nullcontext()


# ---- Timing


class Prepared:
    """A test ready to be run again and again by one runner."""

    def __init__(self, test: Test, runner: Runner, ids: Sequence[int]):
        self.test, self.runner = test, runner
        # A token of context at least: the first token of an empty one goes another way through the layers.
        depth = test.depth if test.kind == "pp" else max(1, test.depth)
        self.prompt, self.token = list(ids[depth : depth + test.n]), ids[depth]
        with _running(runner):
            runner.restore(None)
            self.kept = runner.context(ids[:depth]) if depth else None
            self()  # a warm-up run; llama-bench does one too

    def __call__(self) -> float:
        """Seconds of one run."""
        runner = self.runner
        with _running(runner):
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
    runs: Sequence[Callable[[], Any]], rounds: int, tell: Callable[[str, float], None]
) -> list[list[Any]]:
    """What each run gave in each round, taking turns; the one that begins changes from round to round."""
    results: list[list[Any]] = [[] for _ in runs]
    for r in range(rounds):
        tell(f"round {r + 1} of {rounds}", r / rounds)
        first = r % len(runs)
        for i in [*range(first, len(runs)), *range(first)]:
            time.sleep(SETTLE_SECONDS)
            results[i].append(runs[i]())
    return results


def _time_test(
    runs: Sequence[Prepared],
    rounds: int,
    records: dict[str, Record],
    tell: Callable[[str, float], None],
) -> None:
    """Fill in the records of one test."""
    others = Others()
    seconds = interleave(runs, rounds, tell)
    disturbed = others.percent()
    for run, times in zip(runs, seconds, strict=True):
        record = records[run.runner.name]
        rates = [run.test.n / t for t in times]
        record.rounds, record.others_pct = len(times), disturbed
        record.median_tps = statistics.median(rates)
        record.std_tps = statistics.stdev(rates) if len(rates) > 1 else 0.0
        ratios = [base / t for base, t in zip(seconds[0], times, strict=True)]
        record.ratio = statistics.median(ratios)
        record.ratio_low, record.ratio_high = (float(x) for x in np.percentile(ratios, [25, 75]))
