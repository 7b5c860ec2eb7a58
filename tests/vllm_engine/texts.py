"""Prompts of many lengths, Transformers' continuations, and requests to servers for the same."""

from __future__ import annotations

import random
from typing import Any

import torch
from models import TINY
from transformers import AutoModelForCausalLM, AutoTokenizer

from anydelta.bench.measure.prompts import PROMPTS

NEW = 24
"""Tokens that are asked for."""
FLOAT32 = (
    "--dtype", "float32", "--max-model-len", "1024", "--max-num-seqs", "32", "--gpu-memory-utilization", "0.2",
)  # fmt: skip


def mixed_prompts() -> list[list[int]]:
    """100 of 1 to 600 tokens; a quarter of them begin as another one does."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    text = tokenizer("\n".join(PROMPTS.values()))["input_ids"]
    choose = random.Random(0)
    found = []
    for i in range(100):
        length = choose.choice((1, 2, 5, 13, 32, 64, 100, 129, 256, 300, 450, 600))
        first = 0 if i % 4 == 0 else choose.randrange(len(text) - length)
        found.append(text[first : first + length])
        if i % 4 == 0 and length > 3:
            found[-1][-1] = choose.randrange(3, 1000)  # they end apart
    return found


def of_transformers(prompts: list[list[int]], model: Any = None) -> list[list[int]]:
    """What Transformers writes with a model, or with the repository's, one prompt at a time."""
    torch.set_num_threads(1)  # threads that wait for each other cost more here than they bring
    model = model or AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    found = []
    for prompt in prompts:
        ids = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=NEW)[0]
        found.append(ids[len(prompt) :].tolist())
    return found
