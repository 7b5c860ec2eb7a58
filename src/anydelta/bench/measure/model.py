"""Measure whole models: Transformers as it is, with anydelta, and llama.cpp on the same weights, in one process.

As in llama-bench, ppN is N prompt tokens at once, tgN is N tokens one after the other, both after d tokens of context.
Results are compared before anything is timed. Contenders run interleaved in rounds, ratios are taken within a round,
and the median of the rounds counts. Transformers' contenders share one model. They differ in whether anydelta is
enabled.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ...generate.presets import Built
from ...terminal import Failed, first_line
from . import profile
from .cases import F32
from .ops import Others
from .runners import Prepared, Runner, Test, TransformersRunner, interleave, prepare, random_ids, running

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

CHECK_PROMPT, CHECK_STEPS = 48, 8
"""Tokens that the contenders must agree on before they are timed."""

FILE = "GGUF "
"""The beginning of `dtype` if a model is a file of quantised weights; its type follows."""

QUANTISED_ERROR = 0.0069
"""The relative error of one product when activations are rounded to 8 bits. ggml divides blocks of 256 by their largest
number, some 3 standard deviations, and rounds to 127 levels. The step is 3 / 127 of a deviation, which is
3 / 127 / sqrt(12) by RMS (quantize_row_q8_K of ggml-quants.c)."""

HALF_ERROR = 2.0
"""Half types: the largest distance from the float32 result, relative to Transformers' own (RMS over all logits)."""


@dataclass(frozen=True)
class Settings:
    """What to measure, and how often."""

    tests: tuple[Test, ...]
    rounds: int = 5
    profile: bool = False
    """Also measure the time of each part, in separate rounds."""


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
    """ok; absent: it cannot run this model; failed: it raised; wrong: its logits are wrong."""
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
    """Transformers' time / this one's, median of the rounds. Above 1, this one is faster."""
    ratio_low: float | None = None
    ratio_high: float | None = None
    """Quartiles of that ratio."""
    over_llama: float | None = None
    """llama.cpp's time, in its faster form, / this one's, median of the rounds."""
    over_llama_low: float | None = None
    over_llama_high: float | None = None
    others_pct: float | None = None
    """CPU time of other processes during the rounds, of all CPUs; Linux only."""


@dataclass
class Report:
    """The measurements, the machine, and the absent contenders."""

    machine: dict[str, Any]
    settings: Settings
    absent: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    parts: list[profile.Part] = field(default_factory=list)


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
    """Add the records of one model to the report. Other runners are compared with the first."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    for runner in runners:
        runner.threads(threads)
    collecting = gc.isenabled()
    try:
        progress(f"{built.name}: comparing results", 0.0)
        verdicts = _check(built, runners, dtype)
        gc.disable()  # pauses of the collector must not count
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
            if runners[0] not in good:  # NaN logits: there is nothing to compare with
                continue
            runs = prepare(test, good, built)
            _time_test(runs, settings.rounds, records, tell)
            if settings.profile:
                report.parts += profile.measure(built, runs, settings.rounds, dtype, threads, tell)
            del runs
            gc.collect()
    finally:
        torch.set_num_threads(before)
        if collecting:
            gc.enable()
    progress(f"{built.name}: done", 1.0)


# ---- Checks before timing


@dataclass
class _Verdict:
    status: str = "ok"
    reason: str = ""
    checked: str = ""
    logit_error: float | None = None
    same_tokens: str = ""


def _check(built: Built, runners: Sequence[Runner], dtype: str) -> dict[str, _Verdict]:
    """Compare logits after a prompt and after each of some tokens, the same tokens for every contender.

    Files of quantised weights are compared with their unpacked weights, in float32. Their products round the input to 8
    bits, and the errors of two such products per layer add up at most.

    float32 is compared with Transformers itself. In a half type, two correct results differ by rounding. So each is
    compared with the float32 result of the same weights, and may be about as far from it as Transformers is.
    """
    prompt = random_ids(built, CHECK_PROMPT)
    base = runners[0]
    forced: list[int] = []
    try:
        want = _walk(base, prompt, forced)
    except (Exception, SystemExit) as error:
        why = f"{type(error).__name__}: {first_line(error)}"
        raise Failed(f"requires that {base.name} runs the model; got {why}") from error
    full = dtype == "float32" or dtype.startswith(FILE)
    exact = want if full or not isinstance(base, TransformersRunner) else None
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
        except (Exception, SystemExit) as error:  # a contender's failure becomes a row of the result
            verdict.status = "failed"
            verdict.reason = f"{type(error).__name__}: {first_line(error)}"
            continue
        same = np.argmax(got, -1) == np.argmax(want, -1)
        verdict.same_tokens = f"{int(same.sum())}/{len(same)}"
        if dtype == "float32":
            verdict.checked = "logits and tokens against Transformers"
            verdict.logit_error = float(np.max(np.abs(got - want)))
            bar, got_error = runner.logit_error * scale, verdict.logit_error
        elif dtype.startswith(FILE):
            verdict.checked = "logits against the unpacked weights in float32"
            verdict.logit_error = got_error = _rms(got - exact) / _rms(exact)
            bar = QUANTISED_ERROR * 2 * len(built.model.base_model.layers)
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
    """Logits [steps + 1, vocabulary] after the prompt and each forced token. An empty list is filled greedily."""
    find = not forced
    with running(runner):
        runner.restore(None)
        rows = [runner.prompt(prompt)]
        for i in range(CHECK_STEPS):
            if find:
                forced.append(int(np.argmax(rows[-1])))
            rows.append(runner.prompt([forced[i]]))
    return np.stack(rows)


@contextmanager
def _upcast(model: PreTrainedModel) -> Iterator[None]:
    """Let each part of a half-type model compute in float32, one part at a time, so that memory hardly grows."""
    base = model.base_model
    parts = [base.get_input_embeddings(), *base.layers, base.norm, model.get_output_embeddings()]

    before: dict[nn.Parameter, torch.dtype] = {}

    def up(module: nn.Module, *_: object) -> None:
        for p in module.parameters():
            before[p] = p.dtype
            p.data = p.data.float()

    def down(module: nn.Module, *_: object) -> None:
        for p in module.parameters():
            p.data = p.data.to(before[p])  # exact: the values came from that type

    hooks = [h for p in parts for h in (p.register_forward_pre_hook(up), p.register_forward_hook(down))]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _rms(x: F32) -> float:
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


def _margin(logits: F32) -> F32:
    """The lead of the likeliest token over the next."""
    top = np.partition(logits, -2, axis=-1)
    return np.asarray(top[:, -1] - top[:, -2])


# ---- Timing


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
    rivals = [t for run, t in zip(runs, seconds, strict=True) if run.runner.name.startswith("llama.cpp")]
    for run, times in zip(runs, seconds, strict=True):
        record = records[run.runner.name]
        rates = [run.test.n / t for t in times]
        record.rounds, record.others_pct = len(times), disturbed
        record.median_tps = statistics.median(rates)
        record.std_tps = statistics.stdev(rates) if len(rates) > 1 else 0.0
        record.ratio, record.ratio_low, record.ratio_high = _ratio(seconds[0], times)
        if rivals:
            found = _ratio(min(rivals, key=statistics.median), times)
            record.over_llama, record.over_llama_low, record.over_llama_high = found


def _ratio(base: Sequence[float], times: Sequence[float]) -> tuple[float, float, float]:
    """base / times, round by round: the median and the quartiles."""
    ratios = [b / t for b, t in zip(base, times, strict=True)]
    low, high = (float(x) for x in np.percentile(ratios, [25, 75]))
    return statistics.median(ratios), low, high
