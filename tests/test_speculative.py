"""Drafting in Transformers with anydelta: the same text as without, the same distribution, exact rollback.

By default a few prompts and lengths. The whole bar, every mode and draft length from 1 to 8 for every family and the
repository's model, is 4640 runs of 256 tokens, whose ties and number -rP shows:

    ANYDELTA_TEST_STEPS=256 ANYDELTA_TEST_PROMPTS=20 python -m pytest tests/test_speculative.py -k greedy_text -rP
"""

from __future__ import annotations

import copy
import math
import os
import pickle
import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import anydelta.integrations.transformers as adt  # noqa: E402
import test_transformers as plain_tests  # noqa: E402
from anydelta.integrations.transformers.cache import RollbackCache, RollbackLayer  # noqa: E402

STEPS = int(os.environ.get("ANYDELTA_TEST_STEPS", "16"))
PROMPTS = int(os.environ.get("ANYDELTA_TEST_PROMPTS", "1"))
LENGTHS: Any = range(1, 9) if PROMPTS >= 20 else (2, 7)
if given := os.environ.get("ANYDELTA_TEST_LENGTHS"):
    LENGTHS = [int(n) for n in given.split(",")]
TIE = 1e-5
"""Two largest logits no further apart may come out in either order."""
TINY = Path(__file__).parents[1] / "examples" / "tiny_model"
TYPES = ["linear_attention", "full_attention"] * 2
WINDOWS = ["linear_attention", "sliding_attention", "linear_attention", "full_attention"]
"""lara_mini's."""
EXIT = 2
LAST = {
    "olmo_hybrid": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "others": ("o_proj", "out_proj", "down_proj"),
}
"""The parameters that a block's part of the residual stream is multiplied by last."""
MODES = ["mtp", "mtp and lookup", "lookup", "assistant", "early exit"]


def build(family: str, **changes: Any) -> Any:
    """As in test_transformers, with attention in the middle, so that an early exit leaves layers out.

    These change little, so that an exit before them guesses right at times.
    """
    config, cls, options = plain_tests.CONFIGS[family]
    types = WINDOWS if family == "lara_mini" else TYPES
    more: dict[str, Any] = {"num_hidden_layers": 4, "layer_types": types, **changes}
    saved = plain_tests.CONFIGS[family]
    plain_tests.CONFIGS[family] = (config, cls, {**options, **more})
    try:
        model = plain_tests.build(family)
    finally:
        plain_tests.CONFIGS[family] = saved
    last = LAST["olmo_hybrid" if family == "olmo_hybrid" else "others"]
    for layer in model.get_decoder().layers[EXIT:]:
        for name, p in layer.named_parameters():
            if any(part in name for part in last):
                p.data *= 0.2
    return model


def with_mtp(model: Any, folder: Path, layers: int = 2) -> Any:
    """The model, saved with random MTP layers and loaded again."""
    from safetensors.torch import load_file, save_file
    from transformers.modeling_layers import MtpModel

    config = model.config.get_text_config()
    config.num_mtp_layers, config.mtp_layer_types = layers, ["full_attention"] * layers
    if getattr(config, "mlp_layer_types", None) is not None:
        config.mtp_mlp_layer_types = ["sparse"] * layers
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    random = torch.Generator().manual_seed(2)
    # Ling 3 counts them on behind the other layers.
    ling = config.model_type == "bailing_hybrid"
    where, first = ("model.layers.", config.num_hidden_layers) if ling else ("mtp.layers.", 0)
    if ling and plain_tests.VERSION < (
        5,
        24,
    ):  # which knows the one layer of the released model, by its number
        type(model)._keys_to_ignore_on_load_unexpected = [
            rf"model\.layers\.{first + i}\." for i in range(layers)
        ]
    for name, x in (
        MtpModel(model, layers).layers.state_dict().items()
    ):  # experts of MoE layers are not initialised
        wide = x.ndim > 1
        x = torch.randn(x.shape, generator=random) * 0.05 if wide else torch.ones_like(x)
        index, _, rest = name.replace("mtp_block.", "").partition(".")
        weights[f"{where}{int(index) + first}.{rest}"] = x
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return type(model).from_pretrained(folder).eval()


def noisy(model: Any, noise: float = 0.15) -> Any:
    """A model that guesses this one's tokens often, and not always."""
    other = copy.deepcopy(model)
    head = other.get_output_embeddings().weight
    head.data = head + noise * head.std() * torch.randn(
        head.shape, generator=torch.Generator().manual_seed(3)
    )
    return other


@contextmanager
def guesses(text: torch.Tensor, share: float = 0.8) -> Iterator[None]:
    """MTP layers at random weights guess nothing: inside, so often they guess what comes next in `text`."""
    from anydelta.integrations.transformers import mtp as generating

    ours = generating._MtpModel.draft

    def draft(
        self: Any, ids: Any, embeds: Any, hidden: Any, positions: Any, cache: Any, sample: Any, some: Any
    ) -> Any:
        def hint(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
            at = ids.shape[1]
            if at < text.shape[1] and random.Random(at).random() < share:
                logits[:, text[0, at]] = logits.max() + 1
            return logits

        assert not some  # greedy: nothing else processes the logits
        return ours(self, ids, embeds, hidden, positions, cache, sample, hint)

    generating._MtpModel.draft = draft  # type: ignore[method-assign]
    try:
        yield
    finally:
        generating._MtpModel.draft = ours  # type: ignore[method-assign]


drafts = pytest.mark.skipif(
    plain_tests.VERSION < (5, 20), reason="drafting with hybrid models takes transformers 5.20 or later"
)
_models: dict[str, tuple[Any, Any]] = {}


@pytest.fixture(params=plain_tests.FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def pair(family: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A model, with MTP layers where the family has them, and another that drafts for it."""
    if family not in _models:
        model = build(family)
        if plain_tests.ROWS[family].mtp:
            model = with_mtp(model, tmp_path_factory.mktemp(family))
        _models[family] = (model, noisy(model))
    return _models[family]


@pytest.fixture(scope="module")
def tiny() -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(TINY).eval()


@pytest.fixture(autouse=True)
def _leave_no_trace() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # these models are too small for two
    torch.manual_seed(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)
    assert not adt.status().everywhere


def tokens(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(8, 256, (1, length), generator=torch.Generator().manual_seed(seed))


def prompts(count: int = PROMPTS) -> list[torch.Tensor]:
    """Half of them with a repetition, for prompt lookup to find."""
    found = []
    for seed in range(count):
        ids = tokens(3 + 5 * seed % 17, seed)
        found.append(ids if seed % 2 else torch.cat((ids, ids), 1))
    return found


def modes(model: Any) -> list[str]:
    """The ways of drafting that it has."""
    has_mtp = bool(getattr(model.config.get_text_config(), "num_mtp_layers", None))
    return [mode for mode in MODES if has_mtp or "mtp" not in mode]


def needs(model: Any, mode: str) -> None:
    if mode not in modes(model):
        pytest.skip("the family has no MTP layers")


def drafting(model: Any, assistant: Any, mode: str, length: int) -> dict[str, Any]:
    """The arguments of `generate` that draft `length` tokens at a time."""
    for drafter in (model, assistant):
        config = drafter.generation_config
        config.num_assistant_tokens, config.assistant_confidence_threshold = length, 0
        config.num_assistant_tokens_schedule = "constant"
    return {
        "mtp": {"use_mtp": True},
        "mtp and lookup": {"use_mtp": True, "prompt_lookup_num_tokens": length},
        "lookup": {"prompt_lookup_num_tokens": length},
        "assistant": {"assistant_model": assistant},
        "early exit": {
            "assistant_early_exit": EXIT if model.config.get_text_config().num_hidden_layers == 4 else 4
        },
    }[mode]


def greedy(model: Any, ids: torch.Tensor, steps: int = STEPS, **options: Any) -> torch.Tensor:
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=steps, eos_token_id=None, do_sample=False,
        pad_token_id=0, **options,
    )  # fmt: skip


def same_text(model: Any, got: torch.Tensor, want: torch.Tensor, what: str) -> bool:
    """Whether the texts are equal. They may differ from a tie on, which is printed."""
    if torch.equal(got, want):
        return True
    assert got.shape == want.shape, what
    at = int((got != want)[0].nonzero()[0])
    top = model(want[:, :at]).logits[0, -1].float()
    gap = float(top[want[0, at]] - top[got[0, at]])
    assert abs(gap) <= TIE, (
        f"{what}: token {at} is {got[0, at]}, not {want[0, at]}, whose logit is {gap:.2g} larger"
    )
    print(f"{what}: a tie at token {at}: logits {gap:.1e} apart")
    return False


def same_texts(model: Any, assistant: Any, mode: str, name: str, trained: bool = False) -> None:
    """Every prompt with every number of drafts, against plain decoding."""
    from anydelta.integrations.transformers.generate import counting

    same = runs = drafted = accepted = 0
    for i, ids in enumerate(prompts()):
        key = (name, i)
        if key not in _plain:
            _plain[key] = greedy(model, ids)
        for length in LENGTHS:
            with counting() as rounds, nullcontext() if trained else guesses(_plain[key]):
                got = greedy(model, ids, **drafting(model, assistant, mode, length))
            drafted, accepted = drafted + sum(d for d, _ in rounds), accepted + sum(a for _, a in rounds)
            same += same_text(model, got, _plain[key], f"{name}, {mode}, {length} drafts, prompt {i}")
            runs += 1
    print(
        f"{name}, {mode}: {same} of {runs} runs of {STEPS} tokens identical, {runs - same} up to a tie; "
        f"{accepted} of {drafted} drafts accepted"
    )
    assert accepted or mode == "lookup"


_plain: dict[tuple[str, int], torch.Tensor] = {}
"""By model and prompt: its text without drafts."""


# ---- The same text


@pytest.mark.parametrize("mode", MODES)
@drafts
def test_greedy_text_is_that_without_drafts(pair: tuple[Any, Any], family: str, mode: str) -> None:
    model, assistant = pair
    needs(model, mode)
    with adt.enable():
        same_texts(model, assistant, mode, family)


@pytest.mark.parametrize("mode", [m for m in MODES if m != "assistant"])
@drafts
def test_greedy_text_of_a_trained_model(tiny: Any, mode: str) -> None:
    """Where drafts are good: the repository's model, on prompts of its own vocabulary."""
    with adt.enable(tiny):
        same_texts(tiny, tiny, mode, "tiny_model", trained=True)
        tiny.generation_config.num_assistant_tokens = None


@drafts
def test_draft_lengths_that_change(pair: tuple[Any, Any]) -> None:
    """Transformers' own schedule: two more drafts after a round that was right, one fewer after another."""
    model, assistant = pair
    drafting(model, assistant, "assistant", 2)
    assistant.generation_config.num_assistant_tokens_schedule = "heuristic_transient"
    with adt.enable():
        for ids in prompts():
            same_text(
                model, greedy(model, ids, assistant_model=assistant), greedy(model, ids), "changing lengths"
            )


@drafts
def test_prompts_of_one_token(pair: tuple[Any, Any]) -> None:
    model, assistant = pair
    with adt.enable():
        want = greedy(model, tokens(1))
        for mode in modes(model):
            got = greedy(model, tokens(1), **drafting(model, assistant, mode, 3))
            same_text(model, got, want, mode)


@drafts
def test_text_after_a_given_cache(pair: tuple[Any, Any]) -> None:
    """Only what the cache does not hold is run, whether all tokens are given or the new ones alone."""
    model, assistant = pair
    ids = tokens(30)
    with adt.enable():
        want = greedy(model, ids)
        for mode in modes(model):
            cache = RollbackCache(config=model.config)
            model(ids[:, :20], past_key_values=cache)
            got = greedy(model, ids, past_key_values=cache, **drafting(model, assistant, mode, 3))
            same_text(model, got, want, mode)
            assert STEPS + 28 <= cache.get_seq_length() <= STEPS + 30


@drafts
def test_mtp_drafts_are_those_of_transformers(pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Our loop over the MTP layers, and the hidden state that it starts from, give the tokens and logits of theirs."""
    from anydelta.integrations.transformers import mtp as generating

    model, _ = pair
    needs(model, "mtp")
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    ours = generating._MtpModel.draft

    def both(
        self: Any,
        input_ids: Any,
        embeds: Any,
        hidden: Any,
        position_ids: Any,
        cache: Any,
        sample: Any,
        some: Any,
    ) -> Any:
        again = copy.deepcopy(cache)
        got = ours(self, input_ids, embeds, hidden, position_ids, cache, sample, some)
        rows = hidden.shape[1]
        masked = torch.ones(1, rows, dtype=torch.long)  # which 5.15 wants
        ids, logits, _ = transformers.modeling_layers.MtpModel.forward(
            self, input_ids[:, -rows:], hidden, masked, position_ids, again, full_input_ids=input_ids,
            logits_processor=some,
        )  # fmt: skip
        assert torch.equal(got[0][:, input_ids.shape[1] :], ids)
        allowed = got[1].isfinite()  # 5.15 gives the logits from before the processors
        assert torch.allclose(got[1][allowed], logits[allowed], atol=1e-5)
        seen.append((input_ids, hidden))
        return got

    monkeypatch.setattr(generating._MtpModel, "draft", both)
    with adt.enable():
        greedy(model, tokens(20), 8, **drafting(model, model, "mtp", 3))
        ids, hidden = seen[0]
        want = model(ids[:, :-1], output_hidden_states=True).hidden_states[-1]
        assert torch.allclose(hidden, want, atol=1e-5)
    assert len(seen) > 1
    assert not model.get_decoder().norm._forward_hooks


def test_lookup_finds_the_latest_place_and_repeats_repetitions() -> None:
    from anydelta.integrations.transformers.mtp import Lookup

    text = Lookup([1, 2, 3, 4, 9, 1, 2, 3, 5, 6, 7, 0, 1], 4, ends=[0])
    assert text.after([2, 3], 99) == [5, 6, 7]  # the latest; an end is not drafted
    assert text.after([2, 3], 2) == [5, 6]
    assert text.after([2], 99) == []
    assert text.after([2, 3, 0], 99) == []
    text.extend([2, 3, 4, 2, 3])
    assert text.after([4], 5) == [2, 3, 4, 2]
    assert text.after([4], 0) == text.after([4], -3) == []
    assert Lookup([1], 4, ends=[]).after([], 9) == []


# ---- Only where it was asked for


@drafts
def test_enable_for_one_model(pair: tuple[Any, Any]) -> None:
    model, _ = pair
    other = copy.deepcopy(model)
    with adt.enable(model):
        greedy(model, tokens(9), 4, prompt_lookup_num_tokens=2)
        assert greedy(copy.deepcopy(model), tokens(9), 4, prompt_lookup_num_tokens=2).shape[1] == 13
        with pytest.raises(ValueError, match="not supported with stateful models"):
            greedy(other, tokens(9), 4, prompt_lookup_num_tokens=2)
    with pytest.raises(ValueError, match="not supported with stateful models"):
        greedy(model, tokens(9), 4, prompt_lookup_num_tokens=2)


def test_nothing_changes_for_other_models() -> None:
    from transformers import GenerationMixin, LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM

    from anydelta.integrations.transformers.generate import HOOKS

    small = dict(vocab_size=256, hidden_size=32, intermediate_size=32, num_hidden_layers=2, bos_token_id=1)
    llama = LlamaForCausalLM(LlamaConfig(**small, num_attention_heads=2)).eval()
    mamba = MambaForCausalLM(MambaConfig(**small, state_size=4)).eval()
    before = {name: getattr(GenerationMixin, name) for name in HOOKS}
    with adt.enable():
        assert {name: getattr(GenerationMixin, name) for name in HOOKS} == before
        assert {name: getattr(LlamaForCausalLM, name) for name in HOOKS} == before
        want = greedy(llama, tokens(9), 8)
        assert torch.equal(greedy(llama, tokens(9), 8, prompt_lookup_num_tokens=2), want)
        out = llama.generate(tokens(9), max_new_tokens=2, return_dict_in_generate=True, pad_token_id=0)
        assert type(out.past_key_values) is transformers.DynamicCache
        with pytest.raises(ValueError, match="not supported with stateful models"):
            greedy(mamba, tokens(9), 4, prompt_lookup_num_tokens=2)


@drafts
def test_a_cache_that_cannot_drop_tokens_is_refused(pair: tuple[Any, Any]) -> None:
    model, _ = pair
    with adt.enable():
        cache = transformers.DynamicCache(config=model.config)
        with pytest.raises(ValueError, match="requires a RollbackCache to draft"):
            greedy(model, tokens(9), 4, prompt_lookup_num_tokens=2, past_key_values=cache)
        with pytest.raises(ValueError, match="requires assistant_early_exit from 2"):
            greedy(model, tokens(9), 4, assistant_early_exit=1)
        needs(model, "mtp")
        model.config.num_mtp_layers = 0
        with pytest.raises(ValueError, match="requires a model with MTP layers"):
            greedy(model, tokens(9), 4, use_mtp=True)
        model.config.num_mtp_layers = 2


@drafts
def test_plain_generation_stops_recording(pair: tuple[Any, Any]) -> None:
    model, _ = pair
    with adt.enable():
        cache = RollbackCache(config=model.config)
        greedy(model, tokens(9), 8, past_key_values=cache, prompt_lookup_num_tokens=2)
        assert cache.is_recording_past(0) if hasattr(cache, "is_recording_past") else True
        more = greedy(model, tokens(30), 8, past_key_values=RollbackCache(config=model.config))
        assert torch.equal(more, greedy(model, tokens(30), 8))


def test_an_older_transformers_drafts_without_mtp(
    pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.modeling_layers import MtpModel

    model, _ = pair
    needs(model, "mtp")
    with adt.enable():
        monkeypatch.delattr(MtpModel, "forward_layer", raising=False)
        with pytest.raises(
            ValueError, match=r"requires a transformers that can read the MTP layers .* got 5\."
        ):
            greedy(model, tokens(9), 4, use_mtp=True)
        assert greedy(model, tokens(9), 4, prompt_lookup_num_tokens=2).shape[1] == 13


# ---- Exact rollback


def states(cache: Any) -> list[torch.Tensor]:
    found = []
    for layer in cache.layers:
        if isinstance(layer, RollbackLayer):
            found += [
                x for x in (*layer.recurrent_states.values(), *layer.conv_states.values()) if x is not None
            ]
        else:
            seen = layer.sliding_window - 1 if layer.is_sliding else layer.keys.shape[-2]
            found += [layer.keys[..., -seen:, :], layer.values[..., -seen:, :]]
            indexer = (getattr(layer, name, None) for name in ("indexer_keys", "indexer_position_ids"))
            found += [x for x in indexer if x is not None]
    return [x.clone() for x in found]


def run(model: Any, ids: torch.Tensor, blocks: list[int], **options: Any) -> RollbackCache:
    """A recording cache after the tokens, run in blocks."""
    cache = RollbackCache(config=model.config, **options)
    cache.activate_past_recording()
    for block in ids.split(blocks, 1):
        model(block, past_key_values=cache)
    return cache


def test_crop_is_exact_in_the_same_blocks(pair: tuple[Any, Any]) -> None:
    """Token by token after a prompt: bit by bit what a run has that never saw the dropped tokens."""
    model, _ = pair
    ids = tokens(29)
    with adt.enable():
        for n in range(9):
            cropped = run(model, ids, [20, *[1] * 9])
            cropped.crop(-n)
            want = run(model, ids[:, : 29 - n], [20, *[1] * (9 - n)])
            assert cropped.get_seq_length() == want.get_seq_length() == 29 - n
            assert all(map(torch.equal, states(cropped), states(want)))
            if hasattr(cropped, "position_ids"):  # of qwen4_exp in Transformers 5.20
                assert torch.equal(cropped.position_ids, want.position_ids)
            # Going on, in place and recording, gives the same bits as well.
            more = tokens(3, seed=9)
            assert torch.equal(
                model(more, past_key_values=cropped).logits, model(more, past_key_values=want).logits
            )
            assert all(map(torch.equal, states(cropped), states(want)))


def test_crop_back_to_the_first_tokens(pair: tuple[Any, Any]) -> None:
    """Where windows reach before the text."""
    model, _ = pair
    ids = tokens(9)
    with adt.enable():
        for first in (1, 2, 3, 4, 8):
            for kept in range(first + 1):
                cache = run(model, ids[:, :first], [first])
                cache.crop(kept - first)
                rest = ids[:, kept : kept + 1]
                got = model(rest, past_key_values=cache).logits[0, -1]
                want = model(ids[:, : kept + 1], use_cache=False).logits[0, -1]
                assert float((got - want).abs().max()) < 1e-4, (first, kept)


def test_crop_of_a_block(tiny: Any) -> None:
    """Nine tokens in one forward, as in verification, against one token at a time: within 1e-6 on a real model."""
    ids = tokens(29)
    with adt.enable():
        for n in range(9):
            cropped = run(tiny, ids, [20, 9])
            cropped.crop(-n)
            for got, want in zip(
                states(cropped), states(run(tiny, ids[:, : 29 - n], [20, *[1] * (9 - n)])), strict=True
            ):
                assert float((got - want).abs().max()) <= 1e-6 * max(1.0, float(want.abs().max()))


def test_crop_can_be_repeated_and_undone(pair: tuple[Any, Any]) -> None:
    model, _ = pair
    ids = tokens(29)
    with adt.enable():
        cache = run(model, ids, [20, 9])
        want = states(run(model, ids, [20, 9]))
        cache.crop(-2)
        cache.crop(-3)
        cache.crop(0)
        model(ids[:, 24:], past_key_values=cache)
        for got, x in zip(states(cache), want, strict=True):
            assert torch.allclose(got, x, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_a_copied_cache_goes_on_alone(pair: tuple[Any, Any], how: Any) -> None:
    """With free slots, which the next forward of either writes."""
    model, _ = pair
    ids = tokens(29)
    with adt.enable():
        cache = run(model, ids[:, :24], [20, 4])
        cache.crop(-2)
        other = how(cache)
        before = [x.clone() for x in states(cache)]
        for n in (1, 2):
            model(ids[:, 22 : 22 + n], past_key_values=other)
            other.crop(1 - n)
        assert all(torch.equal(x, y) for x, y in zip(states(cache), before, strict=True))
        for n in (1, 2):
            model(ids[:, 22 : 22 + n], past_key_values=cache)
            cache.crop(1 - n)
        assert all(torch.equal(x, y) for x, y in zip(states(cache), states(other), strict=True))
        assert not any(torch.equal(x, y) for x, y in zip(states(cache), before, strict=True))


def test_what_crop_refuses(pair: tuple[Any, Any]) -> None:
    model, _ = pair
    with adt.enable():
        empty = RollbackCache(config=model.config)
        empty.activate_past_recording()
        with pytest.raises(ValueError, match="requires at most 0 tokens"):
            empty.crop(-1)
        empty.crop(0)
        cache = RollbackCache(config=model.config, rollback=3)
        model(tokens(9), past_key_values=cache)
        with pytest.raises(RuntimeError, match="requires a cache that records its past"):
            cache.crop(-1)
        cache.activate_past_recording()
        for _ in range(5):
            model(tokens(1), past_key_values=cache)
        before = states(cache)
        with pytest.raises(ValueError, match="requires at most 3 tokens"):
            cache.crop(-4)
        with pytest.raises(ValueError, match="requires a negative number"):
            cache.crop(1)
        assert cache.get_seq_length() == 14
        assert all(map(torch.equal, states(cache), before))
        cache.crop(-3)
        assert cache.get_seq_length() == 11
        with pytest.raises(ValueError, match="requires at most 0 tokens"):
            cache.crop(-1)
        with pytest.raises(ValueError, match="requires rollback >= 0"):
            cache.rollback = -1


def test_recording_that_began_later(pair: tuple[Any, Any]) -> None:
    """The state at that moment is the oldest that can be reached, with the window of its convolution."""
    model, _ = pair
    ids = tokens(12)
    with adt.enable():
        cache = RollbackCache(config=model.config)
        model(ids[:, :9], past_key_values=cache)
        want = states(cache)
        cache.activate_past_recording()
        model(ids[:, 9:10], past_key_values=cache)
        model(ids[:, 10:], past_key_values=cache)
        cache.crop(-3)
        assert all(map(torch.equal, states(cache), want))


def test_rows_of_a_batch_can_be_chosen(pair: tuple[Any, Any]) -> None:
    model, _ = pair
    ids = torch.cat((tokens(9, 1), tokens(9, 2)))
    with adt.enable():
        cache = run(model, ids, [6, 3])
        cache.crop(-2)
        cache.batch_select_indices(torch.tensor([1]))
        want = run(model, ids[1:], [6, 3])
        want.crop(-2)
        for got, x in zip(states(cache), states(want), strict=True):
            assert torch.allclose(got, x, atol=1e-4)
        with pytest.raises(ValueError, match="requires at most 0 tokens"):
            cache.crop(-1)


# ---- Sampling


def uniform_if_right(
    model: Any, ids: torch.Tensor, prompt: int, temperature: float, top_k: int
) -> list[float]:
    """For each new token its place in the distribution it should come from, in [0, 1].

    Tokens are laid out from the likeliest to the least likely, each as wide as it is probable, and the place is drawn
    within the token's width: uniform and independent exactly if each token follows its distribution.
    """
    logits = model(ids[:, :-1]).logits[0, prompt - 1 :].double() / temperature
    if top_k:
        logits[logits < logits.topk(top_k).values[:, -1:]] = -math.inf
    p = logits.softmax(-1)
    new = ids[0, prompt:, None]
    own = p.gather(1, new)
    order = torch.arange(p.shape[1])
    before = torch.where((p > own) | ((p == own) & (order < new)), p, 0).sum(1)
    return (before + torch.rand(len(new)) * own[:, 0]).tolist()  # type: ignore[no-any-return]


BINS = 10
DRAWS = int(os.environ.get("ANYDELTA_TEST_DRAWS", "600"))
"""Tokens per mode. A chi-square test over 10 bins at level 1e-3 finds, with 99% power, a distribution whose bins are
off by 14% in total (half the sum of the differences) with 600 tokens, 5% with 5000, and 1.1% with 100000."""
LIMIT = (
    27.88  # the quantile 0.999 of chi-square with 9 degrees of freedom; the power is that at noncentrality 50
)


def chi_square(places: list[float]) -> float:
    counts = torch.histc(torch.tensor(places), BINS, 0, 1)
    expected = len(places) / BINS
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 0), (0.8, 20)])
@drafts
def test_samples_follow_the_distribution(tiny: Any, mode: str, temperature: float, top_k: int) -> None:
    places: list[float] = []
    with adt.enable():
        other = noisy(tiny, 0.5)
        for seed in range(DRAWS // 100):
            ids = prompts(seed + 1)[seed]
            out = tiny.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=temperature, top_k=top_k,
                max_new_tokens=100, eos_token_id=None, pad_token_id=0, **drafting(tiny, other, mode, 3),
            )  # fmt: skip
            places += uniform_if_right(tiny, out, ids.shape[1], temperature, top_k)
        tiny.generation_config.num_assistant_tokens = None
    assert len(places) == DRAWS // 100 * 100
    assert chi_square(places) < LIMIT


def test_the_test_of_samples_finds_wrong_ones(tiny: Any) -> None:
    """Tokens that are drawn at another temperature, or are the drafts of another model, do not pass."""
    ids = prompts(1)[0]
    options: dict[str, Any] = dict(
        do_sample=True, top_k=0, max_new_tokens=600, eos_token_id=None, pad_token_id=0
    )
    with adt.enable():
        for model, temperature in ((tiny, 0.8), (noisy(tiny, 0.5), 1.0)):
            out = model.generate(ids, attention_mask=torch.ones_like(ids), temperature=temperature, **options)
            assert chi_square(uniform_if_right(tiny, out, ids.shape[1], 1.0, 0)) > LIMIT


# ---- Prefix checkpoints


@drafts
def test_a_chat_goes_on_from_checkpoints(pair: tuple[Any, Any], tmp_path: Path) -> None:
    """The second turn, an edited one, and a checkpoint from a file: the logits and text of computing all anew."""
    from anydelta.integrations.transformers.prefix import Checkpoint, PrefixStore

    model, assistant = pair
    ran: list[int] = []
    hook = model.get_input_embeddings().register_forward_hook(
        lambda _, inputs, __: ran.append(inputs[0].shape[1])
    )
    first = tokens(40)
    with adt.enable():
        store = PrefixStore(model)
        cache = store.cache_for(first)
        answer = greedy(model, first, 8, past_key_values=cache)
        assert torch.equal(answer, greedy(model, first, 8))
        store.add(answer, cache)
        for turn, known in (
            (torch.cat((answer, tokens(9, 1)), 1), 47),
            (torch.cat((first, tokens(9, 2)), 1), 39),
        ):
            found = store.find(turn)
            assert found is not None
            assert len(found.tokens) == known
            ran.clear()
            cache = store.cache_for(turn)
            assert sum(ran) == turn.shape[1] - 1 - known
            ours = model(turn[:, -1:], past_key_values=cache).logits[0, -1]
            assert float((ours - model(turn).logits[0, -1]).abs().max()) < 1e-4
            want = greedy(model, turn, 8)
            assert torch.equal(greedy(model, turn, 8, past_key_values=store.cache_for(turn)), want)
            drafted = greedy(
                model,
                turn,
                8,
                past_key_values=store.cache_for(turn),
                **drafting(model, assistant, modes(model)[0], 2),
            )
            assert torch.equal(drafted, want)
        found = store.find(answer)
        assert found is not None
        found.save(tmp_path / "prefix.safetensors")
        other = PrefixStore(model)
        other.put(Checkpoint.load(tmp_path / "prefix.safetensors"))
        assert torch.equal(
            greedy(model, answer, 8, past_key_values=other.cache_for(answer)), greedy(model, answer, 8)
        )
    hook.remove()


@drafts
def test_a_checkpoint_is_not_changed_by_what_follows(pair: tuple[Any, Any]) -> None:
    from anydelta.integrations.transformers.prefix import PrefixStore

    model, _ = pair
    ids = tokens(20)
    with adt.enable():
        store = PrefixStore(model)
        store.cache_for(ids)
        kept = store.find(ids)
        assert kept is not None
        before = {name: x.clone() for name, x in kept.tensors.items()}
        cache = store.cache_for(ids)
        greedy(model, ids, 8, past_key_values=cache)  # in place
        greedy(model, ids, 8, past_key_values=store.cache_for(ids), prompt_lookup_num_tokens=3)
        assert all(torch.equal(x, before[name]) for name, x in kept.tensors.items())


def test_a_store_forgets_what_was_not_used(pair: tuple[Any, Any]) -> None:
    from anydelta.integrations.transformers.prefix import Checkpoint, PrefixStore

    model, _ = pair
    with adt.enable():
        store = PrefixStore(model)
        for seed in range(3):
            store.cache_for(tokens(20, seed))
        assert store.nbytes == sum(c.nbytes for c in store._kept.values()) > 0
        store.find(tokens(20, 0))
        store.max_bytes = store.nbytes
        store.cache_for(tokens(20, 3))
        assert store.find(tokens(20, 0)) is not None
        assert store.find(tokens(20, 1)) is None
        with pytest.raises(ValueError, match="requires input_ids"):
            Checkpoint.take(tokens(3), RollbackCache(config=model.config))
