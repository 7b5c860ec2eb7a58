"""Measure prefix checkpoints: the time to the first token of a prompt that begins like an earlier one.

For each length of the shared prefix there are four situations of a chat: a new question after the prefix, the next turn
after an answer, the same turn edited, and the prefix from a file. Each is run from nothing and from a `PrefixStore`,
interleaved. Both must write the same tokens, except for ties of the two largest logits. Ratios are taken within a
round, and the median of the rounds counts.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...core.late import late
from .drafting import Report, difference, observed

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel
    from transformers.cache_utils import Cache

    from ...integrations.transformers import prefix as stores
    from ...integrations.transformers.prefix import PrefixStore
else:
    stores = late("anydelta.integrations.transformers.prefix")

SITUATIONS = {
    "new question": "the prefix is known, another question follows",
    "next turn": "the last answer is known, a question follows",
    "edited turn": "the last question was changed",
    "from a file": "as the new question, the checkpoint read from a safetensors file",
}


@dataclass(frozen=True)
class Settings:
    """What to measure, and how often."""

    prefixes: tuple[int, ...] = (128, 512, 2048)
    """Tokens of the shared prefix."""
    turn: int = 24
    """Tokens of a question."""
    tokens: int = 8
    """New tokens of an answer."""
    rounds: int = 5
    threads: int = 1


@dataclass
class Record:
    """One situation with one prefix."""

    situation: str
    prefix: int
    prompt_tokens: int
    run_tokens: int
    """Tokens of the prompt that run with checkpoints. Without them all run."""
    status: str = "ok"
    """ok; wrong: the text differs."""
    reason: str = ""
    checkpoint_bytes: int = 0
    """Bytes of the checkpoint that was used."""
    rounds: int = 0
    plain_s: float | None = None
    """From the prompt to the first token without checkpoints; median of the rounds."""
    median_s: float | None = None
    """The same with checkpoints, including the time to find one and to add the new one."""
    low_s: float | None = None
    high_s: float | None = None
    ratio: float | None = None
    """Time without checkpoints / time with them, median of the rounds."""


def measure(
    model: PreTrainedModel,
    text: Sequence[int],
    settings: Settings,
    report: Report,
    progress: Callable[[str, float], None] = lambda text, done: None,
) -> None:
    """Add the records to the report. Prefixes and questions are taken from the tokens `text`. anydelta is enabled."""
    with observed(report):
        for i, prefix in enumerate(settings.prefixes):
            progress(f"a prefix of {prefix} tokens", i / len(settings.prefixes))
            _measure_one(model, text, prefix, settings, report)


def _measure_one(
    model: PreTrainedModel, text: Sequence[int], prefix: int, settings: Settings, report: Report
) -> None:
    import torch

    repeated = list(text) * (1 + (prefix + 4 * settings.turn) // len(text))
    shared = torch.tensor([repeated[:prefix]])
    first, second, edited = (
        torch.tensor([repeated[prefix + i * settings.turn :][: settings.turn]]) for i in range(3)
    )
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        known = stores.PrefixStore(model)
        # The prefix ends where the question begins. Its last token always runs again, with the question.
        known.cache_for(torch.cat((shared, first[:, :1]), 1))
        prompt = torch.cat((shared, first), 1)
        cache = known.cache_for(prompt)
        answer = _write(model, prompt, settings.tokens, cache)
        known.add(answer, cache)
        start = known.find(prompt)
        assert start is not None
        file = Path(folder) / "prefix.safetensors"
        chat = tuple(known._kept.values())

        def from_memory() -> PrefixStore:
            store = stores.PrefixStore(model)
            for checkpoint in chat:
                store.put(checkpoint)
            return store

        def from_file() -> PrefixStore:
            store = stores.PrefixStore(model)
            store.put(stores.Checkpoint.load(file))
            return store

        chat[0].save(file)
        prompts = {
            "new question": (torch.cat((shared, second), 1), from_memory),
            "next turn": (torch.cat((answer, second), 1), from_memory),
            "edited turn": (torch.cat((shared, edited[:, : settings.turn // 2], first), 1), from_memory),
            "from a file": (torch.cat((shared, second), 1), from_file),
        }
        for situation, (ids, store) in prompts.items():
            found = store().find(ids)
            assert found is not None
            record = Record(
                situation,
                prefix,
                ids.shape[1],
                ids.shape[1] - len(found.tokens),
                checkpoint_bytes=found.nbytes,
            )
            report.records.append(record)
            want = _write(model, ids, settings.tokens)
            got = _write(model, ids, settings.tokens, store().cache_for(ids))
            record.reason = difference(model, ids, got, want)
            if record.reason:
                record.status = "wrong"
            else:
                _time(model, ids, store, settings, record)


def _write(
    model: PreTrainedModel, ids: torch.Tensor, tokens: int, cache: Cache | None = None
) -> torch.Tensor:
    import torch

    more = {} if cache is None else {"past_key_values": cache}
    out: torch.Tensor = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens, eos_token_id=None,
        pad_token_id=0, **more,
    )  # fmt: skip
    return out


def _time(
    model: PreTrainedModel,
    ids: torch.Tensor,
    store: Callable[[], PrefixStore],
    settings: Settings,
    record: Record,
) -> None:
    seconds: dict[bool, list[float]] = {False: [], True: []}
    in_time = record.situation == "from a file"  # reading the file counts
    for turn in range(settings.rounds):
        for checkpoints in (turn % 2 == 0, turn % 2 == 1):
            held = store() if checkpoints and not in_time else None
            start = time.perf_counter()
            cache = (store() if held is None else held).cache_for(ids) if checkpoints else None
            _write(model, ids, 1, cache)
            seconds[checkpoints].append(time.perf_counter() - start)
    plain, ours = seconds[False], seconds[True]
    record.rounds = settings.rounds
    record.plain_s, record.median_s = statistics.median(plain), statistics.median(ours)
    record.low_s, record.high_s = min(ours), max(ours)
    record.ratio = statistics.median(p / s for p, s in zip(plain, ours, strict=True))
