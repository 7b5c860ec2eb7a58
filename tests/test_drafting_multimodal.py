"""Drafting for classes of checkpoints that see images: the same text as without drafts."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import anydelta.integrations.transformers as adt  # noqa: E402
import test_speculative as speculative  # noqa: E402
import test_transformers as plain_tests  # noqa: E402
from anydelta.integrations.transformers.cache import RollbackCache  # noqa: E402

if plain_tests.VERSION < (5, 20):
    pytest.skip("drafting with hybrid models takes transformers 5.20 or later", allow_module_level=True)

IMAGE, START, END = 95, 93, 94
TEXT: dict[str, Any] = dict(
    vocab_size=99, hidden_size=32, intermediate_size=32, num_hidden_layers=4, layer_types=speculative.TYPES,
    num_attention_heads=2, num_key_value_heads=2, head_dim=16, linear_num_key_heads=2, linear_num_value_heads=2,
    linear_key_head_dim=16, linear_value_head_dim=16, linear_conv_kernel_dim=4, eos_token_id=None, pad_token_id=0,
    rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5, mrope_section=[2, 1, 1]),
)  # fmt: skip
EXPERTS = dict(
    num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16
)
COMMON: dict[str, Any] = dict(
    vision_config=dict(
        depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=32, patch_size=8,
        temporal_patch_size=2, spatial_merge_size=2, num_position_embeddings=16,
    ),
    image_token_id=IMAGE, video_token_id=96, vision_start_token_id=START, vision_end_token_id=END,
)  # fmt: skip


QWEN4 = dict(
    indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=16, indexer_budget=256, indexer_compress_ratio=4,
    hc_count=2, hc_lowrank=8, output_gate_type="sigmoid",
)  # fmt: skip
GLM5 = dict(
    vision_config=dict(
        depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=64, patch_size=8,
        projection_intermediate_size=32,
    ),
    image_token_id=IMAGE, video_token_id=96, image_start_token_id=START, image_end_token_id=END,
    video_start_token_id=97, video_end_token_id=98,
)  # fmt: skip
SEEING = [f.name for f in adt.FAMILIES if f.multimodal and f.name in plain_tests.FAMILIES]


@pytest.fixture(scope="module", params=SEEING)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A model with vision and MTP layers, and another that drafts for it."""
    torch.manual_seed(0)
    if request.param == "qwen3_5":
        text = transformers.Qwen3_5TextConfig(**TEXT)
        config: Any = transformers.Qwen3_5Config(text_config=text.to_dict(), **COMMON)
        model = transformers.Qwen3_5ForConditionalGeneration(config)
    elif request.param == "qwen4_exp":
        text = transformers.Qwen4ExpTextConfig(**TEXT, **EXPERTS, **QWEN4)
        config = transformers.Qwen4ExpConfig(text_config=text.to_dict(), **COMMON)
        model = transformers.Qwen4ExpForConditionalGeneration(config)
    elif request.param == "glm5_next":
        options = plain_tests.CONFIGS["glm5_next"][2]
        own = dict(vocab_size=99, layer_types=speculative.TYPES, eos_token_id=None, pad_token_id=0)
        text = transformers.Glm5NextTextConfig(**{**options, **own})
        config = transformers.Glm5NextConfig(text_config=text.to_dict(), **GLM5)
        model = transformers.Glm5NextForConditionalGeneration(config)
    else:
        text = transformers.Qwen3_5MoeTextConfig(**TEXT, **EXPERTS)
        config = transformers.Qwen3_5MoeConfig(text_config=text.to_dict(), **COMMON)
        model = transformers.Qwen3_5MoeForConditionalGeneration(config)
    for name, p in model.named_parameters():
        if p.ndim == 2:
            p.data *= 4
        if any(f"language_model.layers.{i}." in name for i in (2, 3)) and name.split(".")[-2] in (
            "o_proj",
            "out_proj",
            "down_proj",
        ):
            p.data *= 0.2  # so that an exit before them guesses right at times
    model.eval()
    if plain_tests.ROWS[request.param].mtp:
        model = speculative.with_mtp(model, tmp_path_factory.mktemp(request.param))
    return model, speculative.noisy(model)


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def prompt(*parts: int | tuple[int, int], padding: int = 0, seed: int = 1) -> dict[str, Any]:
    """What a processor gives for so many tokens of text, and for images of so many patches."""
    random = torch.Generator().manual_seed(seed)
    ids, kinds = [0] * padding, [0] * padding
    pixels, grids = [], []
    for part in parts:
        if isinstance(part, int):
            ids += torch.randint(5, 90, (part,), generator=random).tolist()
            kinds += [0] * part
        else:
            h, w = part
            ids += [START, *[IMAGE] * (h * w // 4), END]
            kinds += [0, *[1] * (h * w // 4), 0]
            pixels.append(torch.randn(h * w, 3 * 2 * 8 * 8, generator=random))
            grids.append([1, h, w])
    found = {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.tensor([[0] * padding + [1] * (len(ids) - padding)]),
    }
    if pixels:
        found["mm_token_type_ids"] = torch.tensor([kinds])
        found["pixel_values"], found["image_grid_thw"] = torch.cat(pixels), torch.tensor(grids)
    return found


PROMPTS: dict[str, Any] = {
    "text": prompt(9),
    "padded text": prompt(9, padding=3),
    "image": prompt(3, (4, 4), 6),
    "padded image": prompt(3, (4, 4), 6, padding=3),
    "two images": prompt(3, (4, 4), 2, (4, 8), 4),
    "image at the end": prompt(3, (4, 6)),
}


def greedy(model: Any, given: dict[str, Any], steps: int = 16, **options: Any) -> torch.Tensor:
    return model.generate(
        **given, max_new_tokens=steps, do_sample=False, eos_token_id=None, pad_token_id=0, **options
    )


@pytest.mark.parametrize("what", PROMPTS)
def test_logits_are_those_of_stock(pair: tuple[Any, Any], what: str) -> None:
    model, _ = pair
    given = PROMPTS[what]
    seen = given["attention_mask"].bool()
    with torch.no_grad():
        want = model(**given).logits[seen]
        with adt.enable():
            got = model(**given).logits[seen]
    assert float((got - want).abs().max()) < 1e-4 * max(1.0, float(want.abs().max()))


@pytest.mark.parametrize("what", PROMPTS)
@pytest.mark.parametrize("mode", speculative.MODES)
def test_greedy_text_is_that_without_drafts(pair: tuple[Any, Any], mode: str, what: str) -> None:
    from anydelta.integrations.transformers.generate import counting

    model, assistant = pair
    speculative.needs(model, mode)
    with adt.enable():
        want = greedy(model, PROMPTS[what])
        with counting() as rounds, speculative.guesses(want):
            got = greedy(model, PROMPTS[what], **speculative.drafting(model, assistant, mode, 3))
    assert torch.equal(got, want)
    assert sum(accepted for _, accepted in rounds) > 0 or mode == "lookup"


@pytest.mark.parametrize("mode", ["mtp", "early exit"])
def test_enable_for_one_model(pair: tuple[Any, Any], mode: str) -> None:
    model, _ = pair
    speculative.needs(model, mode)
    with adt.enable(model):
        want = greedy(model, PROMPTS["image"])
        assert torch.equal(
            greedy(model, PROMPTS["image"], **speculative.drafting(model, model, mode, 3)), want
        )


def test_a_text_model_drafts_for_one_with_images(pair: tuple[Any, Any]) -> None:
    """It is given the tokens alone."""
    model, _ = pair
    text = model.config.get_text_config()
    cls = getattr(transformers, type(text).__name__.replace("TextConfig", "ForCausalLM"), None)
    if cls is None:
        pytest.skip("Transformers has no class of this family that reads text alone")
    assistant = cls(text).eval()
    assistant.model.load_state_dict(model.get_decoder().state_dict())
    assistant.lm_head.load_state_dict(model.lm_head.state_dict())
    with adt.enable():
        for given in PROMPTS.values():
            want = greedy(model, given)
            got = greedy(model, given, **speculative.drafting(model, assistant, "assistant", 3))
            assert torch.equal(got, want)


@pytest.mark.parametrize("mode", speculative.MODES)
def test_a_second_turn_with_another_image(pair: tuple[Any, Any], mode: str) -> None:
    model, assistant = pair
    speculative.needs(model, mode)
    first = prompt(3, (4, 4), 6)
    with adt.enable():
        answer = greedy(model, first, 8)
        second = prompt(2, (4, 8), 3, seed=2)
        whole = {
            name: torch.cat((first[name], second[name]), 0) for name in ("pixel_values", "image_grid_thw")
        }
        new = answer.shape[1] - first["input_ids"].shape[1]
        middle = {"input_ids": answer[:, -new:], "mm_token_type_ids": torch.zeros(1, new, dtype=torch.long)}
        middle["attention_mask"] = torch.ones(1, new, dtype=torch.long)
        for name, x in middle.items():
            whole[name] = torch.cat((first[name], x, second[name]), 1)
        want = greedy(model, whole)
        got = greedy(model, whole, **speculative.drafting(model, assistant, mode, 3))
        assert torch.equal(got, want)
        # A text turn on the cache of the turn before goes on at the positions that its image left.
        cache = RollbackCache(config=model.config.get_text_config())
        answer = greedy(
            model, first, 8, past_key_values=cache, **speculative.drafting(model, assistant, mode, 3)
        )
        ids = torch.cat((answer, speculative.tokens(4) % 80 + 5), 1)
        turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        got = greedy(model, turn, past_key_values=cache, **speculative.drafting(model, assistant, mode, 3))
        plain = RollbackCache(config=model.config.get_text_config())
        assert torch.equal(greedy(model, first, 8, past_key_values=plain), answer)
        assert torch.equal(greedy(model, turn, past_key_values=plain), got)


def test_mtp_reads_images_as_the_model_does(pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The embeddings of a prompt's tokens, its hidden states, and the angles of its positions."""
    from anydelta.integrations.transformers import mtp as mtp

    model, _ = pair
    speculative.needs(model, "mtp")
    given, seen = PROMPTS["image"], []
    ours = mtp._MtpModel.draft

    def draft(self: Any, ids: Any, embeds: Any, hidden: Any, positions: Any, *more: Any) -> Any:
        seen.append((embeds, hidden, self.rotary_emb(embeds, position_ids=positions[1:])))
        return ours(self, ids, embeds, hidden, positions, *more)

    monkeypatch.setattr(mtp._MtpModel, "draft", draft)
    found: dict[str, Any] = {}
    hook = (
        model.get_decoder()
        .layers[0]
        .register_forward_hook(lambda module, args, kwargs, out: found.update(kwargs), with_kwargs=True)
    )
    with adt.enable(), torch.no_grad():
        out = model(**given, output_hidden_states=True)
        hook.remove()
        greedy(model, given, 8, use_mtp=True)
    embeds, hidden, angles = seen[0]
    assert torch.equal(embeds[:, :-1], out.hidden_states[0][:, 1:])
    assert torch.allclose(hidden, out.hidden_states[-1], atol=1e-5)
    for got, want in zip(angles, found["position_embeddings"], strict=True):
        assert torch.equal(got[:, :-1], want[:, 1:])
