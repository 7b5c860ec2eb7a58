"""vLLM with the plug-in, over HTTP: always the text of Transformers in float32. Run by `make test-vllm`.

Run by the Python of vLLM's environment: `python -m pytest tests/vllm_engine/serve_checks.py`.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from pathlib import Path

import openai
import pytest
import torch
from models import RANK, TINY, adapter, kimi, qwen3_next, with_mtp
from server import Server, serving
from texts import FLOAT32, NEW, mixed_prompts, of_transformers
from transformers import AutoModelForCausalLM

ALONE = ("--no-enable-prefix-caching",)
"""With drafts: on a CPU, vLLM's cache of prefixes for layers with a state has Triton kernels for these."""
RUNS_LAYERS = "anydelta: runs QwenGatedDeltaNetAttention"


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return mixed_prompts()


@pytest.fixture(scope="module")
def expected(prompts: list[list[int]]) -> list[list[int]]:
    return of_transformers(prompts)


def written(
    server: Server, prompts: list[list[int]], *, at_once: int = 32, model: str = "model"
) -> list[list[int]]:
    """The tokens that a server writes after each prompt, so many of them under way at a time."""

    async def one(client: openai.AsyncOpenAI, prompt: list[int], turns: asyncio.Semaphore) -> list[int]:
        async with turns:
            answer = await client.completions.create(
                model=model, prompt=prompt, max_tokens=NEW, temperature=0,
                extra_body={"return_token_ids": True},
            )  # fmt: skip
        return list(answer.choices[0].token_ids)  # type: ignore[attr-defined]

    async def all_of_them() -> list[list[int]]:
        turns = asyncio.Semaphore(at_once)
        async with server.client() as client:
            return list(await asyncio.gather(*(one(client, prompt, turns) for prompt in prompts)))

    return asyncio.run(all_of_them())


def scored(server: Server, prompts: list[list[int]]) -> list[tuple[list[float], list[int]]]:
    """The log probability of each token of each prompt but the first, and the tokens that are written after it."""

    async def one(client: openai.AsyncOpenAI, prompt: list[int]) -> tuple[list[float], list[int]]:
        answer = await client.completions.create(
            model="model", prompt=prompt, max_tokens=NEW, temperature=0, echo=True, logprobs=0,
            extra_body={"return_token_ids": True},
        )  # fmt: skip
        [choice] = answer.choices
        return choice.logprobs.token_logprobs[1 : len(prompt)], list(choice.token_ids)  # type: ignore[union-attr, attr-defined, index, return-value]

    async def all_of_them() -> list[tuple[list[float], list[int]]]:
        async with server.client() as client:
            return list(await asyncio.gather(*(one(client, prompt) for prompt in prompts)))

    return asyncio.run(all_of_them())


def check_texts(got: list[list[int]], expected: list[list[int]]) -> None:
    wrong = [i for i, (a, b) in enumerate(zip(got, expected, strict=True)) if a != b]
    assert not wrong, f"{len(wrong)} of {len(got)} texts differ, the first {wrong[0]}: {got[wrong[0]]}"


def test_batches_of_32_in_chunks(prompts: list[list[int]], expected: list[list[int]], tmp_path: Path):
    """Continuous batching, chunked prefill: no step takes more than 256 tokens."""
    options = (*FLOAT32, *ALONE, "--max-num-batched-tokens", "256")
    with serving(TINY, tmp_path / "log", *options) as server:
        check_texts(written(server, prompts), expected)
        check_texts(written(server, prompts[:20], at_once=1), expected[:20])
        assert RUNS_LAYERS in server.log_text()


def test_prefix_caching(prompts: list[list[int]], expected: list[list[int]], tmp_path: Path):
    options = (*FLOAT32, "--enable-prefix-caching")
    with serving(TINY, tmp_path / "log", *options) as server:
        check_texts(written(server, prompts), expected)
        before = server.metric("vllm:prefix_cache_hits_total")
        check_texts(written(server, prompts), expected)
        assert server.metric("vllm:prefix_cache_hits_total") - before > 2000


def test_mtp(prompts: list[list[int]], expected: list[list[int]], tmp_path: Path):
    drafting = '{"method": "mtp", "num_speculative_tokens": 2}'
    options = (*FLOAT32, *ALONE, "--speculative-config", drafting)
    with serving(with_mtp(tmp_path / "model"), tmp_path / "log", *options) as server:
        check_texts(written(server, prompts), expected)
        assert server.metric("vllm:spec_decode_num_accepted_tokens_total") > 200


def test_drafts_of_the_prompt(prompts: list[list[int]], expected: list[list[int]], tmp_path: Path):
    """As many drafts as are found, another number in every step, beside prefills."""
    drafting = (
        '{"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 1}'
    )
    options = (*FLOAT32, *ALONE, "--max-num-batched-tokens", "256", "--speculative-config", drafting)
    with serving(TINY, tmp_path / "log", *options) as server:
        check_texts(written(server, prompts), expected)
        assert server.metric("vllm:spec_decode_num_accepted_tokens_total") > 200


def test_tensor_parallel(prompts: list[list[int]], expected: list[list[int]], tmp_path: Path):
    with serving(TINY, tmp_path / "log", *FLOAT32, "--tensor-parallel-size", "2") as server:
        check_texts(written(server, prompts), expected)


def test_lora(prompts: list[list[int]], expected: list[list[int]], tmp_path: Path):
    """An adapter of all projections, and beside it the model without."""
    merged = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    folder = adapter(tmp_path / "adapter", merged)
    some, without = prompts[:30], expected[:30]
    wanted = of_transformers(some, merged)
    assert wanted != without
    options = (*FLOAT32, "--enable-lora", "--max-lora-rank", str(RANK), "--lora-modules", f"adapter={folder}")
    with serving(TINY, tmp_path / "log", *options) as server:
        check_texts(written(server, some, model="adapter"), wanted)
        check_texts(written(server, some), without)


@pytest.mark.parametrize("family", [kimi, qwen3_next])
def test_other_families(family: Callable[[Path], Path], tmp_path: Path):
    """Random weights: Kimi Delta Attention with latent attention and experts; q, k, v and z side by side. Prompts come
    while others are continued, whose blocks must stay as they are."""
    folder = family(tmp_path / "model")
    choose = random.Random(1)
    prompts = [[choose.randrange(3, 1000) for _ in range(n)] for n in (2, 5, 40, 100, 300, 3, 9, 200)]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    options = (*FLOAT32, *ALONE)
    with serving(folder, tmp_path / "log", *options) as server, torch.no_grad():
        for prompt, (logprobs, new) in zip(prompts, scored(server, prompts), strict=True):
            ids = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=NEW)[0]
            logits = model(ids[None]).logits[0].log_softmax(-1)
            expected = logits[:-1].gather(1, ids[1:, None])[: len(prompt) - 1, 0]
            torch.testing.assert_close(torch.tensor(logprobs), expected, rtol=0, atol=1e-4)
            assert new == ids[len(prompt) :].tolist()


def test_without_the_plug_in_the_model_does_not_run(prompts: list[list[int]], tmp_path: Path):
    """Why there is a plug-in; and that ANYDELTA_VLLM=0 leaves it out."""
    with serving(TINY, tmp_path / "log", *FLOAT32, ANYDELTA_VLLM="0") as server:
        with pytest.raises(Exception):  # noqa: B017 - the engine dies, and the client is told this or that
            written(server, prompts[:1])
        log = server.log_text()
    assert "anydelta: runs" not in log
    assert "CPU GDN attention requires BF16" in log
