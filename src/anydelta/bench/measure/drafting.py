"""Measure drafting: MTP, prompt lookup, both and an assistant against decoding token by token, all on anydelta.

One process, one model. For each prompt the modes run interleaved in rounds, each from a fresh state, and write the same
number of tokens greedily. Ratios are taken within a round, and the median of the rounds counts. The text must be the
same as with plain decoding, except for ties of the two largest logits.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ...core.late import late
from .ops import Others
from .prompts import PROMPTS
from .report import BUSY_PCT
from .turns import torch_threads

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from ...integrations.transformers import generate
else:
    generate = late("anydelta.integrations.transformers.generate")

TIE = 1e-5
FLAG = 0.05
"""Runs that differ by more than this share from the median of their prompt and mode are flagged."""


@dataclass(frozen=True)
class Settings:
    """What to measure, and how often."""

    tokens: int = 192
    rounds: int = 5
    threads: int = 1
    lookup: int = 8
    """Tokens that prompt lookup drafts."""
    drafts: int | None = None
    """Tokens that MTP and the assistant draft. None: the number of MTP layers, and 3."""


@dataclass
class Record:
    """One mode on one prompt."""

    prompt: str
    mode: str
    detail: str
    status: str = "ok"
    """ok; absent: the model has no such layers; wrong: the text differs."""
    reason: str = ""
    prompt_tokens: int = 0
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    verifications: int = 0
    """Forwards of the model, including the prompt's."""
    accepted_share: float | None = None
    tokens_per_verification: float | None = None
    rounds: int = 0
    median_tps: float | None = None
    """New tokens over the time of the whole call, the prompt included; median of the rounds."""
    low_tps: float | None = None
    high_tps: float | None = None
    """Slowest and fastest round."""
    flagged: int = 0
    """Rounds more than 5% from the median."""
    ratio: float | None = None
    """Plain decoding's time / this one's, median of the rounds."""


@dataclass
class Report:
    """The measurements, and the machine. Also used by prefix.py, with its own settings and records."""

    machine: dict[str, object]
    model: str
    settings: Any
    notes: list[str] = field(default_factory=list)
    records: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class Mode:
    """A mode: the arguments that it adds to generate()."""

    name: str
    detail: str
    options: Mapping[str, object]


def modes(
    model: PreTrainedModel, settings: Settings, assistant: PreTrainedModel | None = None, name: str = ""
) -> list[Mode]:
    """Plain decoding, and the ways in which the model can draft."""
    config = model.config.get_text_config(decoder=True)
    drafts = settings.drafts or 3
    drafter = (model if assistant is None else assistant).generation_config
    drafter.num_assistant_tokens, drafter.num_assistant_tokens_schedule = drafts, "constant"
    drafter.assistant_confidence_threshold = 0
    found = [Mode("plain", "", {})]
    if layers := getattr(config, "num_mtp_layers", None):
        count = settings.drafts or layers
        mtp = {"use_mtp": True, "num_assistant_tokens": count}
        found.append(Mode("mtp", f"{count} drafts", mtp))
        both = mtp | {"prompt_lookup_num_tokens": settings.lookup}
        found.append(Mode("mtp+lookup", f"{count} drafts, then up to {settings.lookup}", both))
    found.append(Mode("lookup", f"{settings.lookup} drafts", {"prompt_lookup_num_tokens": settings.lookup}))
    if assistant is not None:
        found.append(Mode("assistant", f"{name}, {drafts} drafts", {"assistant_model": assistant}))
    elif "full_attention" in (config.layer_types or ()):
        depth = config.layer_types.index("full_attention") + 1
        detail = f"the first {depth} of {config.num_hidden_layers} layers, {drafts} drafts"
        found.append(Mode("assistant", detail, {"assistant_early_exit": depth}))
    return found


def measure(
    model: PreTrainedModel,
    encode: Callable[[str], torch.Tensor],
    ways: Sequence[Mode],
    settings: Settings,
    report: Report,
    prompts: Mapping[str, str] = PROMPTS,
    progress: Callable[[str, float], None] = lambda text, done: None,
) -> None:
    """Add the records of all prompts to the report. `encode` turns a text into ids [1, T]; anydelta is enabled."""
    with observed(report):
        for i, (name, text) in enumerate(prompts.items()):
            ids = encode(text)
            records = {w.name: Record(name, w.name, w.detail, prompt_tokens=ids.shape[1]) for w in ways}
            report.records += records.values()
            _check(model, ids, ways, settings, records)
            good = [w for w in ways if records[w.name].status == "ok"]
            seconds: dict[str, list[float]] = {w.name: [] for w in good}
            for turn in range(settings.rounds):
                progress(f"{name}, round {turn + 1}", (i + turn / settings.rounds) / len(prompts))
                for way in good[turn % len(good) :] + good[: turn % len(good)]:
                    start = time.perf_counter()
                    _write(model, ids, way, settings)
                    seconds[way.name].append(time.perf_counter() - start)
            for way in good:
                _speeds(records[way.name], seconds[way.name], seconds["plain"])


@contextmanager
def observed(report: Report) -> Iterator[None]:
    """Inside the block torch has the threads of the settings. Adds a note if other work disturbed it."""
    others = Others()
    with torch_threads(report.settings.threads):
        yield
    busy = others.percent()
    if busy is not None and busy >= BUSY_PCT:
        report.notes.append(f"other work took {busy:.0f} % of the CPUs")


def difference(model: PreTrainedModel, ids: torch.Tensor, got: torch.Tensor, want: torch.Tensor) -> str:
    """Where two continuations of `ids` differ, in words. Empty if they do not, or only after a tie."""
    import torch

    if torch.equal(got, want):
        return ""
    at = int((got != want)[0].nonzero()[0])
    with torch.no_grad():
        top = model(want[:, :at]).logits[0, -1].float()
    if abs(float(top[got[0, at]] - top[want[0, at]])) <= TIE:
        return ""
    return f"the text differs from new token {at - ids.shape[1]} on"


def _write(model: PreTrainedModel, ids: torch.Tensor, way: Mode, settings: Settings) -> torch.Tensor:
    import torch

    n = settings.tokens
    out: torch.Tensor = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=n, eos_token_id=None,
        pad_token_id=0, **way.options,
    )  # fmt: skip
    return out


def _check(
    model: PreTrainedModel,
    ids: torch.Tensor,
    ways: Sequence[Mode],
    settings: Settings,
    records: dict[str, Record],
) -> None:
    """Count the drafts of each mode, and compare its text with that of plain decoding. This also warms up."""
    want = None
    for way in ways:
        record = records[way.name]
        try:
            with generate.counting() as rounds:
                got = _write(model, ids, way, settings)
        except (ValueError, RuntimeError) as error:
            record.status, record.reason = "absent", " ".join(str(error).split())
            if way.name == "plain":
                raise
            continue
        record.tokens = got.shape[1] - ids.shape[1]
        record.drafted, record.accepted = sum(d for d, _ in rounds), sum(a for _, a in rounds)
        record.verifications = len(rounds) or record.tokens
        record.accepted_share = record.accepted / record.drafted if record.drafted else None
        record.tokens_per_verification = record.tokens / record.verifications
        if want is None:
            want = got
        elif reason := difference(model, ids, got, want):
            record.status, record.reason = "wrong", reason


def _speeds(record: Record, seconds: list[float], plain: list[float]) -> None:
    tps = [record.tokens / s for s in seconds]
    middle = statistics.median(tps)
    record.rounds, record.median_tps = len(tps), middle
    record.low_tps, record.high_tps = min(tps), max(tps)
    record.flagged = sum(abs(t - middle) > FLAG * middle for t in tps)
    record.ratio = statistics.median(p / s for p, s in zip(plain, seconds, strict=True))
