"""Transformers' continuous batching of a hybrid model: the text of every request is that of the request alone."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching import cache as paged
from transformers.generation.continuous_batching import offloading_manager
from transformers.generation.continuous_batching.requests import RequestState

import anydelta.integrations.transformers as adt
from anydelta.integrations.transformers import serving
from anydelta.integrations.transformers.serving import INTERVAL, LINEAR, LinearAttentionCacheAllocator
from test_transformers import FAMILIES, build

TINY = Path(__file__).parent.parent / "examples" / "tiny_model"
NEW = 12
EOS = 1023
"""A token that the model never writes."""


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()


@pytest.fixture(autouse=True)
def _enabled() -> Iterator[None]:
    with torch.no_grad(), adt.enable():
        yield
    assert LINEAR not in paged.ATTN_TYPE_TO_ALLOCATOR


def prompts_of(count: int, lengths: tuple[int, ...], *, shared: int = 0, seed: int = 0) -> list[list[int]]:
    """Prompts of random tokens; every third begins with the same `shared` ones."""
    choose = random.Random(seed)
    common = [choose.randrange(3, 1000) for _ in range(shared)]
    found = []
    for i in range(count):
        begin = common if i % 3 == 0 else []
        found.append(begin + [choose.randrange(3, 1000) for _ in range(choose.choice(lengths))])
    return found


def alone(model: Any, prompts: list[list[int]], new: int = NEW, eos: int = EOS) -> list[list[int]]:
    with adt.disable():
        return [
            model.generate(torch.tensor([p]), do_sample=False, max_new_tokens=new, eos_token_id=eos)[
                0, len(p) :
            ].tolist()
            for p in prompts
        ]


CONFIG = GenerationConfig(do_sample=False, max_new_tokens=NEW, eos_token_id=EOS)


def together(
    model: Any, prompts: list[list[int]], *, config: GenerationConfig = CONFIG, **options: Any
) -> list[list[int]]:
    options = dict(num_blocks=400, max_batch_tokens=512, max_memory_percent=0.3) | options
    answers = model.generate_batch(
        inputs=prompts, generation_config=config, continuous_batching_config=ContinuousBatchingConfig(**options),
        progress_bar=False,
    )  # fmt: skip
    ordered = sorted(answers.values(), key=lambda a: int(a.request_id.split("_")[-1]))
    assert not any(a.error for a in ordered)
    return [a.generated_tokens for a in ordered]


class Count:
    """How often a method has done something."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str):
        self.calls = 0
        theirs = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            found = theirs(*args, **kwargs)
            self.calls += found is None or bool(found)
            return found

        monkeypatch.setattr(owner, name, counted)


def test_64_requests_of_mixed_length(model: Any):
    prompts = prompts_of(64, (1, 2, 7, 30, 64, 100, 257, 300))
    assert together(model, prompts) == alone(model, prompts)


@pytest.mark.parametrize("tokens", [64, INTERVAL, 700])
def test_prompts_that_begin_alike(model: Any, monkeypatch: pytest.MonkeyPatch, tokens: int):
    """In pieces that end between, on, and beyond the tokens whose states are kept."""
    matched = Count(monkeypatch, LinearAttentionCacheAllocator, "acquire_prefix_blocks")
    prompts = prompts_of(12, (1, 5, 40, 300), shared=2 * INTERVAL + 10)
    assert together(model, prompts, max_batch_tokens=tokens) == alone(model, prompts)
    assert matched.calls >= 1


def test_without_sharing(model: Any, monkeypatch: pytest.MonkeyPatch):
    matched = Count(monkeypatch, LinearAttentionCacheAllocator, "acquire_prefix_blocks")
    prompts = prompts_of(6, (5, 40), shared=2 * INTERVAL)
    assert together(model, prompts, allow_block_sharing=False) == alone(model, prompts)
    assert matched.calls == 0


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], list[int]]]:
    """The free blocks of every cache that a test makes."""
    found: list[Callable[[], list[int]]] = []
    theirs = LinearAttentionCacheAllocator.register_cache_tensor

    def register(self: LinearAttentionCacheAllocator, *args: Any) -> None:
        theirs(self, *args)
        pool = self.pool
        found.append(lambda: [x for tree in pool._free_blocks[self.index].trees.values() for x in tree])

    monkeypatch.setattr(LinearAttentionCacheAllocator, "register_cache_tensor", register)
    return found


def check_once(free: list[Callable[[], list[int]]]) -> None:
    [blocks] = (each() for each in free)
    assert blocks
    assert len(blocks) == len(set(blocks))


@pytest.mark.parametrize(("length", "new"), [(INTERVAL, 1), (2 * INTERVAL, 1), (INTERVAL - NEW + 1, NEW)])
def test_a_request_ends_on_a_kept_state(
    model: Any, free: list[Callable[[], list[int]]], length: int, new: int
):
    """Its block goes back once. The same prompt for all, and other prompts after it."""
    config = GenerationConfig(do_sample=False, max_new_tokens=new, eos_token_id=EOS)
    prompts = prompts_of(6, (length, 2 * INTERVAL, INTERVAL - 1)) + 2 * prompts_of(1, (length,))
    assert together(model, prompts, config=config) == alone(model, prompts, new)
    check_once(free)


def test_a_failed_step(model: Any, free: list[Callable[[], list[int]]], monkeypatch: pytest.MonkeyPatch):
    """All blocks are free after it, each once."""

    def fail(*args: Any) -> None:
        raise RuntimeError("a failed step")

    monkeypatch.setattr(type(model.model.layers[0].mlp), "forward", fail)
    answers = model.generate_batch(
        inputs=prompts_of(4, (INTERVAL, 2 * INTERVAL, 5)), generation_config=CONFIG, progress_bar=False,
        continuous_batching_config=ContinuousBatchingConfig(
            num_blocks=100, max_batch_tokens=600, max_memory_percent=0.3
        ),
    )  # fmt: skip
    assert {a.error for a in answers.values()} == {"a failed step"}
    check_once(free)


def test_in_inference_mode(model: Any):
    """Transformers runs its thread in the caller's mode."""
    prompts = prompts_of(4, (5, 300))
    with torch.inference_mode():
        got = together(model, prompts)
    assert got == alone(model, prompts)


TIGHT = dict(num_blocks=20, page_size=16)
"""Memory for five requests, until they grow."""
GROWING = (118, 120, 122, 124)


def test_preempted(model: Any, monkeypatch: pytest.MonkeyPatch):
    """With too little memory requests are taken out and begin again."""
    again = Count(monkeypatch, RequestState, "create_equivalent_initial_request")
    prompts = prompts_of(10, GROWING)
    assert together(model, prompts, **TIGHT) == alone(model, prompts)
    assert again.calls >= 1


def test_offloaded(model: Any, monkeypatch: pytest.MonkeyPatch):
    """As before, into memory beside the cache: pinned for a GPU, which is not here."""
    empty = torch.empty

    def unpinned(*args: Any, **kwargs: Any) -> torch.Tensor:
        kwargs.pop("pin_memory", None)
        return empty(*args, **kwargs)

    monkeypatch.setattr(offloading_manager.torch, "empty", unpinned)
    restored: list[str] = []
    theirs = offloading_manager.OffloadingManager.restore_scheduled_requests

    def restore(self: Any, batch: list[Any]) -> None:
        restored.extend(x.state.request_id for x in batch if x.state.is_cpu_offloaded)
        theirs(self, batch)

    monkeypatch.setattr(offloading_manager.OffloadingManager, "restore_scheduled_requests", restore)
    prompts = prompts_of(10, GROWING, seed=1)
    got = together(model, prompts, **TIGHT, cpu_offload_space=0.1)
    assert got == alone(model, prompts)
    assert restored


def test_cancelled(model: Any):
    """Blocks of requests that left go to others, whose text is their own."""
    prompts = prompts_of(24, (5, 60, 200), shared=INTERVAL)
    expected = alone(model, prompts)
    with model.continuous_batching_context_manager(
        generation_config=CONFIG,
        continuous_batching_config=ContinuousBatchingConfig(
            num_blocks=60, page_size=32, max_batch_tokens=128, max_memory_percent=0.3
        ),
    ) as manager:
        names = [manager.add_request(p, max_new_tokens=NEW) for p in prompts]
        for i, name in enumerate(names):
            if i % 4 == 1:
                manager.cancel_request(name)
                time.sleep(0.01)
        left = {name: text for i, (name, text) in enumerate(zip(names, expected, strict=True)) if i % 4 != 1}
        got: dict[str, list[int]] = {}
        end = time.monotonic() + 120
        while set(left) - set(got) and time.monotonic() < end:
            answer = manager.get_result(timeout=1)
            if answer is not None and answer.is_finished():
                got[answer.request_id] = answer.generated_tokens
    assert {name: got.get(name) for name in left} == left


@pytest.mark.parametrize("lengths", [(30, 70), (INTERVAL, 2 * INTERVAL), (INTERVAL + 1,)])
def test_several_answers_to_a_prompt(model: Any, lengths: tuple[int, ...]):
    """A state is copied when a request forks: one token before its prompt ends, so before or on a kept state."""
    prompts = prompts_of(3, lengths)
    config = GenerationConfig(
        do_sample=True, top_k=1, max_new_tokens=NEW, eos_token_id=EOS, num_return_sequences=3
    )
    answers = model.generate_batch(
        inputs=prompts, generation_config=config, progress_bar=False,
        continuous_batching_config=ContinuousBatchingConfig(
            num_blocks=400, max_batch_tokens=512, max_memory_percent=0.3
        ),
    )  # fmt: skip
    texts = sorted(tuple(a.generated_tokens) for a in answers.values())
    assert texts == sorted(tuple(text) for text in alone(model, prompts) for _ in range(3))


def test_a_block_of_another_size_divides_or_is_divided():
    for least in (1000, 4096, 100_000):
        for other in (640, 4096, 65536, 1 << 20, 3 << 20):
            size = serving._block_bytes(least, [other])
            assert size >= least
            assert size % other == 0 or other % size == 0


def test_pieces_wait_for_those_before_them():
    place = lambda read, written: serving.SOURCE * read + written  # noqa: E731
    places = [place(0, 5)] * 3 + [place(5, 6)] * 2 + [place(7, 7)] + [place(5, 8)] * 2 + [place(9, 9)]
    first, second = serving._rounds(torch.tensor(places))
    assert first.tokens.tolist() == [0, 1, 2, 5, 6, 7, 8]
    assert first.cu_seqlens.tolist() == [0, 3, 4, 6, 7]
    assert (first.read.tolist(), first.written.tolist()) == ([0, 7, 5, 9], [[5, 7, 8, 9]])
    assert second.tokens.tolist() == [3, 4]
    assert (second.read.tolist(), second.written.tolist()) == ([5], [[6]])
    [decode] = serving._rounds(torch.tensor([place(3, 3), place(4, 4)]))
    assert decode.tokens is None
    assert decode.cu_seqlens is None
    assert decode.written is None


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5_moe", "olmo_hybrid", "lara_mini"])
def test_other_families(family: str):
    if family not in FAMILIES:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    model = build(family)
    vocabulary = model.config.vocab_size
    prompts = [[x % (vocabulary - 2) + 1 for x in p] for p in prompts_of(5, (1, 5, 20, 40))]
    assert together(model, prompts, num_blocks=100) == alone(model, prompts)


def test_beside_sliding_attention():
    """Which shares no blocks, so no states are kept either. Prompts longer than the tokens between two of them."""
    if "lara_mini" not in FAMILIES:
        pytest.skip(f"transformers {transformers.__version__} has no lara_mini")
    model = build("lara_mini")
    assert {"sliding_attention", "full_attention", LINEAR} <= set(model.config.layer_types)
    eos = model.config.vocab_size - 1
    config = GenerationConfig(do_sample=False, max_new_tokens=NEW, eos_token_id=eos)
    prompts = [
        [x % (eos - 1) + 1 for x in p] for p in prompts_of(3, (INTERVAL + 44, 2 * INTERVAL + 8, INTERVAL))
    ]
    assert together(model, prompts, config=config) == alone(model, prompts, eos=eos)


@pytest.mark.parametrize("family", ["kimi_linear", "bailing_hybrid"])
def test_latent_attention_is_refused(family: str):
    if family not in FAMILIES:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    with pytest.raises(ValueError, match="continuous batching: requires attention with keys and values"):
        together(build(family), [[1, 2, 3]])


def test_disabled_it_is_refused_as_before(model: Any):
    with adt.disable(), pytest.raises(ValueError, match="Invalid layer type: linear_attention"):
        together(model, [[1, 2, 3]])
