"""Drafting in `generate`: the end of the text and the other results are those of decoding without drafts."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from transformers import LogitsProcessor, StoppingCriteria  # noqa: E402

import anydelta.integrations.transformers as adt  # noqa: E402
import test_speculative as speculative  # noqa: E402
import test_transformers as plain_tests  # noqa: E402
from anydelta.integrations.transformers.cache import RollbackCache  # noqa: E402
from test_speculative import MODES, drafting, tokens  # noqa: E402

if plain_tests.VERSION < (5, 20):
    pytest.skip("drafting with hybrid models takes transformers 5.20 or later", allow_module_level=True)

STEPS = 24
modes = pytest.mark.parametrize("mode", MODES)


@pytest.fixture(scope="module")
def tiny() -> Any:
    """The repository's model, whose drafts are good."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        speculative.TINY, attn_implementation="eager"
    ).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(speculative.TINY)


@pytest.fixture(scope="module")
def ids(tokenizer: Any) -> Any:
    text = "Psalm 23\n1 The LORD is my shepherd; I shall not want. 2 He maketh me"
    return tokenizer(text, return_tensors="pt")["input_ids"]


@pytest.fixture(autouse=True)
def _enabled(tiny: Any) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(1)
    before = copy.deepcopy(tiny.generation_config)
    with adt.enable(), torch.no_grad():
        yield
    tiny.generation_config = before
    torch.set_num_threads(threads)


def generate(model: Any, ids: Any, **options: Any) -> Any:
    settings = {
        "max_new_tokens": STEPS,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
        **options,
    }
    if ids is not None:
        settings = {"attention_mask": torch.ones_like(ids), **settings}
    return model.generate(ids, **settings)


class Stream:
    """What a streamer gets, the prompt aside."""

    def __init__(self) -> None:
        self.puts: list[list[int]] = []
        self.ended = False

    def put(self, value: Any) -> None:
        self.puts.append(value.reshape(-1).tolist())

    def end(self) -> None:
        self.ended = True

    @property
    def tokens(self) -> list[int]:
        return [token for put in self.puts[1:] for token in put]


def compare(model: Any, ids: torch.Tensor, mode: str, length: int = 3, **options: Any) -> torch.Tensor:
    """The text with drafts, which is that without; so is what was streamed, and how the cache goes on."""
    found = []
    for drafts in ({}, drafting(model, model, mode, length)):
        stream = Stream()
        out = generate(model, ids, streamer=stream, return_dict_in_generate=True, **{**options, **drafts})
        assert stream.ended
        assert stream.tokens == out.sequences[0, ids.shape[1] :].tolist()
        cache = out.past_key_values
        assert cache.get_seq_length() == out.sequences.shape[1] - 1
        more = torch.cat((out.sequences, tokens(3)), 1)
        found.append((out.sequences, generate(model, more, past_key_values=cache, max_new_tokens=4)))
    (want, further), (got, ours) = found
    assert torch.equal(got, want)
    assert torch.equal(ours, further)
    return want[0, ids.shape[1] :]


# ---- Where it stops


@modes
@pytest.mark.parametrize("stop", [" the", "e", ["zzz", "LORD"], "day of"])
def test_stop_strings(tiny: Any, tokenizer: Any, ids: Any, mode: str, stop: Any) -> None:
    new = compare(tiny, ids, mode, 5, stop_strings=stop, tokenizer=tokenizer)
    found = tokenizer.decode(new)
    stops = [stop] if isinstance(stop, str) else stop
    assert len(new) == STEPS or any(s in found for s in stops)
    assert not any(s in tokenizer.decode(new[:-1]) for s in stops)


@modes
def test_end_tokens(tiny: Any, ids: Any, mode: str) -> None:
    text = generate(tiny, ids)[0, ids.shape[1] :].tolist()
    for at in range(2, 9):
        new = compare(tiny, ids, mode, 7, eos_token_id=[text[at], 1])
        assert new.tolist() == text[: text.index(text[at]) + 1]


@modes
def test_a_time_limit(tiny: Any, ids: Any, mode: str) -> None:
    assert len(compare(tiny, ids, mode, max_time=1e-9)) == 1


class Asked(StoppingCriteria):
    """Stops at its n-th call; keeps what it was asked."""

    def __init__(self, calls: int):
        self.calls = calls
        self.seen: list[Any] = []

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        kept = None if scores is None else [x.argmax(-1).item() for x in scores]
        self.seen.append((input_ids.tolist(), kept))
        return torch.full((len(input_ids),), len(self.seen) >= self.calls)


@modes
@pytest.mark.parametrize("scores", [False, True])
def test_criteria_are_asked_what_they_are_asked_without_drafts(
    tiny: Any, ids: Any, mode: str, scores: bool
) -> None:
    for calls in (1, 2, 6):
        plain, ours = Asked(calls), Asked(calls)
        options: dict[str, Any] = dict(return_dict_in_generate=scores, output_scores=scores)
        generate(tiny, ids, stopping_criteria=[plain], **options)
        generate(tiny, ids, stopping_criteria=[ours], **options, **drafting(tiny, tiny, mode, 4))
        assert ours.seen == plain.seen
        assert len(ours.seen) == calls


@modes
def test_lengths_shorter_than_the_drafts(tiny: Any, tokenizer: Any, mode: str) -> None:
    text = "And God said, Let there be light: and there was light. And God said, Let there be"
    for ids in (tokenizer(text, return_tensors="pt")["input_ids"], tokens(1)):
        for steps in (1, 2, 3, 4, 12):
            for length in (1, 12, 40):
                assert len(compare(tiny, ids, mode, length, max_new_tokens=steps)) == steps
    assert len(compare(tiny, ids, mode, 12, max_new_tokens=None, max_length=ids.shape[1] + 2)) == 2


def test_lookups_that_are_taken_behind_drafts_of_mtp(tiny: Any, ids: Any) -> None:
    from anydelta.integrations.transformers.generate import counting

    options: dict[str, Any] = {"use_mtp": True, "num_assistant_tokens": 2, "prompt_lookup_num_tokens": 8}
    long = torch.cat((generate(tiny, ids, max_new_tokens=40), ids), 1)
    want = generate(tiny, long, max_new_tokens=40)
    with counting() as rounds:
        assert torch.equal(generate(tiny, long, max_new_tokens=40, **options), want)
    assert max(accepted for _, accepted in rounds) > 2
    torch.manual_seed(3)
    generate(tiny, long, max_new_tokens=40, do_sample=True, top_k=3, temperature=0.3, **options)


def test_an_assistant_may_draft_more_and_more(tiny: Any) -> None:
    other = copy.deepcopy(tiny)
    settings = drafting(tiny, other, "assistant", 2)
    other.generation_config.num_assistant_tokens_schedule = "heuristic"
    compared = (
        generate(tiny, tokens(1), max_new_tokens=64),
        generate(tiny, tokens(1), max_new_tokens=64, **settings),
    )
    assert torch.equal(*compared)
    assert other.generation_config.num_assistant_tokens > 8  # as this schedule keeps it, for the next call


def test_other_processes_go_on(tiny: Any, ids: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With synced_gpus a process that is done runs the model until all are."""
    want, ran = generate(tiny, ids), []
    hook = tiny.register_forward_hook(lambda *_: ran.append(1))

    def unfinished(self: Any, finished: bool, synced_gpus: bool, device: Any) -> bool:
        assert synced_gpus
        return not finished or len(ran) < 50

    monkeypatch.setattr(type(tiny), "_has_unfinished_sequences", unfinished)
    got = generate(tiny, ids, synced_gpus=True, prompt_lookup_num_tokens=3)
    hook.remove()
    assert torch.equal(got, want)
    assert len(ran) == 50


# ---- What comes back


@modes
@pytest.mark.parametrize("given", [False, True])
def test_what_is_returned_per_token(tiny: Any, ids: Any, mode: str, given: bool) -> None:
    """Scores, logits, hidden states and attentions, from the beginning and after a given cache."""
    found = []
    for drafts in ({}, drafting(tiny, tiny, mode, 3)):
        cache = None
        if given:
            cache = RollbackCache(config=tiny.config)
            tiny(ids[:, :-5], past_key_values=cache)
        found.append(
            generate(
                tiny, ids, past_key_values=cache, return_dict_in_generate=True, output_scores=True,
                output_logits=True, output_hidden_states=True, output_attentions=True,
                repetition_penalty=1.1, **drafts,
            )
        )  # fmt: skip
    want, got = found
    assert torch.equal(got.sequences, want.sequences)
    assert sorted(got.keys()) == sorted(want.keys())
    for name in ("scores", "logits"):
        assert len(got[name]) == len(want[name]) == STEPS
        for x, y in zip(got[name], want[name], strict=True):
            assert torch.allclose(x, y, atol=1e-4)
    for name in ("hidden_states", "attentions"):
        assert len(got[name]) == len(want[name]) == STEPS
        for xs, ys in zip(got[name], want[name], strict=True):
            for x, y in zip(xs, ys, strict=True):
                assert x.shape == y.shape
                assert torch.allclose(x, y, atol=1e-4)


@modes
@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.3},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 9, "eos_token_id": 3},
        {"suppress_tokens": [262, 265]},
        {"renormalize_logits": True, "encoder_repetition_penalty": 1.2},
    ],
    ids=lambda options: next(iter(options)),
)
def test_logits_processors(tiny: Any, ids: Any, mode: str, options: dict[str, Any]) -> None:
    compare(tiny, ids, mode, 4, **options)


class Turns(LogitsProcessor):
    """Forbids another token at each call, as a grammar goes on with each: it must be called once per token."""

    def __init__(self) -> None:
        self.turn = 0

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self.turn += 1
        return scores.masked_fill(torch.arange(scores.shape[1]) % 3 == self.turn % 3, -torch.inf)


@modes
@pytest.mark.parametrize("what", ["turns", "guidance"])
def test_logits_processors_that_go_from_token_to_token(tiny: Any, ids: Any, mode: str, what: str) -> None:
    def options() -> dict[str, Any]:
        return {"logits_processor": [Turns()]} if what == "turns" else {"guidance_scale": 1.5}

    want = generate(tiny, ids, **options())
    assert torch.equal(generate(tiny, ids, **options(), **drafting(tiny, tiny, mode, 3)), want)


@pytest.mark.parametrize("more", [{"use_mtp": True}, {"prompt_lookup_num_tokens": 3}])
def test_an_early_exit_comes_before_other_ways(tiny: Any, ids: Any, more: dict[str, Any]) -> None:
    compare(tiny, ids, "early exit", **more)


@modes
def test_inference_mode(tiny: Any, ids: Any, mode: str) -> None:
    with torch.inference_mode():
        compare(tiny, ids, mode)


@pytest.mark.parametrize("mode", ["mtp", "mtp and lookup", "lookup"])
@pytest.mark.parametrize("both", [False, True])
def test_embeddings_as_inputs(tiny: Any, ids: Any, mode: str, both: bool) -> None:
    embeds = tiny.get_input_embeddings()(ids) * 1.01  # which no tokens have
    given = {"inputs_embeds": embeds, "attention_mask": torch.ones_like(ids)}
    prompt = ids if both else None
    want = generate(tiny, prompt, **given)
    got = generate(tiny, prompt, **given, **drafting(tiny, tiny, mode, 3))
    assert torch.equal(got, want)
    padded = {
        "inputs_embeds": torch.cat((embeds[:, :2], embeds), 1),
        "attention_mask": torch.cat((torch.zeros(1, 2), torch.ones(1, ids.shape[1])), 1).long(),
    }
    want = generate(tiny, None, **padded)
    assert torch.equal(generate(tiny, None, **padded, **drafting(tiny, tiny, mode, 3)), want)


@modes
def test_a_cache_that_holds_the_whole_prompt(tiny: Any, ids: Any, mode: str) -> None:
    texts = []
    for options in ({}, drafting(tiny, tiny, mode, 3)):
        cache = RollbackCache(config=tiny.config)
        tiny(ids, past_key_values=cache)
        texts.append(generate(tiny, ids, past_key_values=cache, **options))
    assert torch.equal(*texts)


@modes
def test_token_healing(tiny: Any, tokenizer: Any, ids: Any, mode: str) -> None:
    options = {"token_healing": True, "tokenizer": tokenizer}
    assert torch.equal(
        generate(tiny, ids, **options, **drafting(tiny, tiny, mode, 3)), generate(tiny, ids, **options)
    )


@pytest.mark.parametrize(
    "options",
    [
        {"prompt_lookup_num_tokens": 0}, {"prompt_lookup_num_tokens": 2.5}, {"assistant_early_exit": 0},
        {"assistant_early_exit": "4"}, {"assistant_early_exit": True},
        {"use_mtp": True, "prompt_lookup_num_tokens": 2.5},
    ],
    ids=str,
)  # fmt: skip
def test_numbers_that_are_none(tiny: Any, ids: Any, options: dict[str, Any]) -> None:
    name = list(options)[-1]
    with pytest.raises(
        ValueError, match=f"requires {name} to be a whole number from 1; got {options[name]!r}"
    ):
        generate(tiny, ids, **options)


@modes
def test_a_padded_prompt(tiny: Any, ids: Any, mode: str) -> None:
    padded = torch.cat((torch.zeros(1, 3).long(), ids), 1)
    mask = torch.cat((torch.zeros(1, 3).long(), torch.ones_like(ids)), 1)
    want = generate(tiny, padded, attention_mask=mask)
    got = generate(tiny, padded, attention_mask=mask, **drafting(tiny, tiny, mode, 3))
    assert torch.equal(got, want)
    # The new tokens alone, with the mask of all, after a cache.
    found = []
    for drafts in ({}, drafting(tiny, tiny, mode, 3)):
        cache = RollbackCache(config=tiny.config)
        generate(tiny, padded[:, :-4], attention_mask=mask[:, :-4], past_key_values=cache, max_new_tokens=1)
        found.append(generate(tiny, padded[:, -4:], attention_mask=mask, past_key_values=cache, **drafts))
    assert torch.equal(*found)


def test_beams_draft_nothing(tiny: Any, ids: Any) -> None:
    """Transformers warns that drafting is ignored."""
    want = generate(tiny, ids, num_beams=2, max_new_tokens=8)
    assert torch.equal(generate(tiny, ids, num_beams=2, max_new_tokens=8, use_mtp=True), want)


# ---- What is accepted


@pytest.mark.parametrize("weight", [None, 0.5])
def test_speculative_sampling_gives_the_distribution(weight: float | None) -> None:
    """Tokens follow p, whatever the draft's distribution q is; with a weight, a mixture of both."""
    from anydelta.integrations.transformers.generate import _choose

    config = transformers.GenerationConfig(do_sample=True)
    config.assistant_ensemble_weight = weight
    p, q = torch.tensor([[0.5, 0.3, 0.2, 0.0]]), torch.tensor([[0.1, 0.6, 0.2, 0.1]])
    counts, draws = torch.zeros(4), 4000
    for _ in range(draws):
        draft = torch.multinomial(q, 1)
        counts[_choose(p.log(), draft, q.log(), config).item()] += 1
    expected = (p if weight is None else weight * p + (1 - weight) * q)[0] * draws
    assert (
        float(((counts - expected) ** 2 / expected.clamp(min=1)).sum()) < 16.3
    )  # 0.999 of chi-square, 3 degrees


# ---- What is refused, before anything ran


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"num_return_sequences": 2, "do_sample": True}, "num_return_sequences has to be 1"),
        ({"use_cache": False}, "requires the cache that it makes itself .*; got use_cache=False"),
        ({"cache_implementation": "static"}, "got cache_implementation='static'"),
    ],
)
@modes
def test_refusals(tiny: Any, ids: Any, mode: str, options: dict[str, Any], sentence: str) -> None:
    ran: list[int] = []
    hook = tiny.register_forward_hook(lambda *_: ran.append(1))
    with pytest.raises(ValueError, match=sentence):
        generate(tiny, ids, **options, **drafting(tiny, tiny, mode, 3))
    with pytest.raises(ValueError, match="requires one sequence to draft tokens; got 2"):
        generate(tiny, torch.cat((ids, ids)), **drafting(tiny, tiny, mode, 3))
    hook.remove()
    assert not ran


@pytest.mark.parametrize("mode", ["assistant", "early exit"])
def test_embeddings_are_refused_by_models_that_draft(tiny: Any, ids: Any, mode: str) -> None:
    embeds = tiny.get_input_embeddings()(ids)
    with pytest.raises(ValueError, match=r"requires input_ids alone .*; got inputs_embeds"):
        generate(tiny, None, inputs_embeds=embeds, **drafting(tiny, tiny, mode, 3))


def test_mtp_layers_that_cannot_draft(tmp_path: Path) -> None:
    model = speculative.build("qwen3_5")
    config = model.config
    config.num_mtp_layers, config.mtp_layer_types = 1, ["full_attention"]
    with pytest.raises(
        ValueError, match=r"requires the weights of the MTP layers .*: a model that was not loaded"
    ):
        generate(model, tokens(5), use_mtp=True)
    model.save_pretrained(tmp_path)
    bare = type(model).from_pretrained(tmp_path).eval()
    with pytest.raises(ValueError, match="requires the weights of the MTP layers"):
        generate(bare, tokens(5), use_mtp=True)
    config.num_mtp_layers, config.mtp_layer_types = 2, ["full_attention", "linear_attention"]
    with pytest.raises(ValueError, match=r"requires MTP layers of full_attention .*; got linear_attention"):
        generate(model, tokens(5), use_mtp=True)
    config.mtp_layer_types = ["full_attention"] * 2
    with pytest.raises(ValueError, match="requires num_assistant_tokens of at least 1 for use_mtp; got -1"):
        generate(model, tokens(5), use_mtp=True, num_assistant_tokens=-1)
