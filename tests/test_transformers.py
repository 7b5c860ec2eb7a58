"""anydelta inside Hugging Face Transformers: every family, against Transformers' own torch path.

Models are tiny and random, with two changes that make errors show: two-dimensional weights times four (as initialised
the linear layers hardly matter) and slow decays (as initialised the state forgets within a few tokens). Padding is a
token whose embedding is not zero.
"""

from __future__ import annotations

import copy
import importlib
import io
import os
import subprocess
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from itertools import pairwise
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import anydelta.integrations.transformers as adt  # noqa: E402
from anydelta.integrations.transformers import find as finding  # noqa: E402
from anydelta.integrations.transformers import functions as functions  # noqa: E402
from anydelta.integrations.transformers import packed_matrices  # noqa: E402
from anydelta.integrations.transformers.find import MAKERS, look_at  # noqa: E402
from conftest import CPU_REASONS  # noqa: E402

VERSION = tuple(int(n) for n in transformers.__version__.split(".")[:2])
if CPU_REASONS:
    pytest.skip("the cpu backend is not built", allow_module_level=True)

transformers.utils.logging.set_verbosity_error()

PAD = 7  # an ordinary token: pad_token_id has an embedding of zeros, which would hide errors
STEPS = int(os.environ.get("ANYDELTA_TEST_STEPS", "64"))  # greedy tokens
LIMIT = 1e-4

GDN = dict(
    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16,
    linear_conv_kernel_dim=4,
)  # fmt: skip
BASE = dict(
    vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=2048, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
MOE = dict(moe_intermediate_size=32, shared_expert_intermediate_size=32, num_experts=4, num_experts_per_tok=2)
ROPE = dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.25, mrope_section=[1, 1, 0])
LAYERS = ["linear_attention"] * 3 + ["full_attention"]
CONFIGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen3_next": ("Qwen3NextConfig", "Qwen3NextForCausalLM", {**BASE, **GDN, **MOE}),
    "qwen3_5": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM", {**BASE, **GDN, "rope_parameters": ROPE}),
    "qwen3_5_moe": (
        "Qwen3_5MoeTextConfig", "Qwen3_5MoeForCausalLM", {**BASE, **GDN, **MOE, "rope_parameters": ROPE},
    ),
    "kimi_linear": (
        "KimiLinearConfig", "KimiLinearForCausalLM",
        {**BASE, **dict(
            moe_intermediate_size=32, num_key_value_heads=4, kv_lora_rank=32, qk_rope_head_dim=8, qk_nope_head_dim=16,
            v_head_dim=16, num_local_experts=4, num_experts_per_tok=2, n_shared_experts=1, n_group=1, topk_group=1,
            linear_head_dim=16, linear_num_heads=4, linear_conv_kernel_dim=4, layer_types=LAYERS)},
    ),
    "olmo_hybrid": (
        "OlmoHybridConfig", "OlmoHybridForCausalLM",
        {**BASE, **GDN, **dict(
            num_key_value_heads=4, linear_num_key_heads=4, linear_key_head_dim=12, linear_value_head_dim=24)},
    ),
}  # fmt: skip
KDA = dict(linear_head_dim=16, linear_num_heads=4, linear_conv_kernel_dim=4)
LATENT = dict(
    num_key_value_heads=4, kv_lora_rank=32, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16,
    moe_intermediate_size=32, num_experts_per_tok=2, n_shared_experts=1, n_group=1, topk_group=1,
)  # fmt: skip
VISION = dict(
    depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=64, patch_size=8, temporal_patch_size=2,
    spatial_merge_size=2,
)  # fmt: skip
CONFIGS |= {
    # Heads of 16: head_dim is that of KDA here, and becomes that of the rotary positions.
    "bailing_hybrid": (
        "BailingHybridConfig", "BailingHybridForCausalLM",
        {**BASE, **LATENT, **dict(num_local_experts=4, first_k_dense_replace=1, layer_types=LAYERS)},
    ),
    # A budget that all tokens of these tests fit into: the choice itself is not continuous.
    "qwen4_exp": (
        "Qwen4ExpTextConfig", "Qwen4ExpForCausalLM",
        {**BASE, **GDN, **MOE, **dict(
            rope_parameters=ROPE, layer_types=LAYERS, indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=16,
            indexer_budget=256, indexer_compress_ratio=4, output_gate_type="sigmoid", hc_count=2, hc_lowrank=8,
            ple_layer_ids=[1], ngram_vocab_size_base=50, heads_per_ngram=2, split_ngram_parts=1)},
    ),
    # Only as the class that sees images: a text config and a vision config.
    "glm5_next": (
        "Glm5NextTextConfig", "Glm5NextForConditionalGeneration",
        {**BASE, **LATENT, **KDA, **dict(
            q_lora_rank=32, qk_rope_head_dim=0, n_routed_experts=4, index_n_heads=2, index_head_dim=16, index_topk=256,
            hc_mult=2, hc_sinkhorn_iters=3, layer_types=LAYERS, mlp_layer_types=["dense"] + ["sparse"] * 3)},
    ),
    "lara_mini": (
        "LaraMiniConfig", "LaraMiniForCausalLM",
        {**BASE, **GDN, **MOE, **dict(
            num_hidden_layers=5, sliding_window=8,
            layer_types=["linear_attention", "sliding_attention", "linear_attention", "linear_attention",
                         "full_attention"])},
    ),
}  # fmt: skip
ROWS = {f.name: f for f in adt.FAMILIES}
FAMILIES = [name for name in ROWS if importlib.util.find_spec(f"transformers.models.{name}") is not None]
LAYER = {name: row.layer for name, row in ROWS.items()}


def build(family: str, seed: int = 0, **changes: Any) -> Any:
    config, cls, options = CONFIGS[family]
    options = {**options, **changes}
    options = {k: v for k, v in options.items() if not (family == "kimi_linear" and k == "head_dim")}
    torch.manual_seed(seed)
    made = getattr(transformers, config)(**options)
    if cls.endswith("ForConditionalGeneration"):
        whole = getattr(transformers, config.replace("Text", ""))
        made = whole(text_config=made.to_dict(), vision_config=VISION)
    model = getattr(transformers, cls)(made).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("A_log"):
                p.uniform_(-4, 0)
            elif name.endswith("ple.conv1d.weight"):  # zeros, as initialised
                p.normal_()
            elif p.ndim == 2:
                p.mul_(4)
    return model


_models: dict[str, Any] = {}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(family: str) -> Any:
    if family not in _models:
        _models[family] = build(family)
    return _models[family]


@pytest.fixture(autouse=True)
def _leave_no_trace() -> Iterator[None]:
    """Every test starts and ends with Transformers as it was."""
    torch.manual_seed(1)
    with torch.no_grad():
        yield
    left_on = adt.status().everywhere
    if left_on:
        adt.disable()  # the tests after this one start as they should
    assert not left_on
    for m in _models.values():
        assert not adt.status(m).layers


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(8, 256, shape, generator=torch.Generator().manual_seed(seed))


def counts() -> tuple[int, int]:
    s = adt.status()
    return sum(s.taken.values()), sum(s.passed_on.values())


def difference(model: Any, run: Callable[[Any], torch.Tensor]) -> float:
    """The largest difference that anydelta makes to the result, having checked that it and nothing else ran."""
    plain = run(model)
    taken, passed = counts()
    with adt.enable():
        ours = run(model)
    assert counts()[0] > taken
    assert counts()[1] == passed
    assert ours.shape == plain.shape
    return float((ours - plain).abs().max())


# ---- The same logits


def prefill(model: Any) -> torch.Tensor:
    return model(tokens(2, 131)).logits


def decode(
    model: Any, cache: Any = None, *, ids: torch.Tensor | None = None, chunk: int = 1, first: int = 9
) -> Any:
    """A prompt, then the rest in chunks through the cache."""
    ids = tokens(2, 33) if ids is None else ids
    out = model(ids[:, :first], past_key_values=cache, use_cache=True)
    parts = [out.logits]
    for begin in range(first, ids.shape[1], chunk):
        out = model(ids[:, begin : begin + chunk], past_key_values=out.past_key_values, use_cache=True)
        parts.append(out.logits)
    return torch.cat(parts, 1)


def test_prefill(model: Any) -> None:
    assert difference(model, prefill) < LIMIT


@pytest.mark.parametrize("length", [1, 2, 3, 4, 63, 64, 65])
def test_short_and_edge_lengths(model: Any, length: int) -> None:
    assert difference(model, lambda m: m(tokens(1, length)).logits) < LIMIT


@pytest.mark.parametrize("chunk", [1, 2, 7])
def test_decode_and_chunked_prefill_equal_one_pass(model: Any, chunk: int) -> None:
    run = lambda m: decode(m, chunk=chunk, ids=tokens(2, 40))  # noqa: E731
    assert difference(model, run) < LIMIT
    with adt.enable():
        assert float((run(model) - model(tokens(2, 40)).logits).abs().max()) < LIMIT


def test_a_first_chunk_of_one_token(model: Any) -> None:
    assert difference(model, lambda m: decode(m, first=1)) < LIMIT


@pytest.mark.parametrize("lengths", [(24,), (24, 31, 5)], ids=["batch 1", "batch 3"])
def test_left_padding(model: Any, lengths: tuple[int, ...]) -> None:
    """Each padded row gives the logits of the row alone, at prefill and when decoding goes on."""
    rows = [tokens(1, n + 6, seed=n) for n in lengths]
    width = max(lengths) + 5
    ids = torch.full((len(rows), width), PAD)
    mask = torch.zeros(len(rows), width + 6, dtype=torch.long)
    for i, (row, n) in enumerate(zip(rows, lengths, strict=True)):
        ids[i, width - n :] = row[0, :n]
        mask[i, width - n :] = 1
    plain = [model(row).logits[0] for row in rows]
    with adt.enable():
        position = (mask.cumsum(1) - 1).clamp(min=0)
        out = model(ids, attention_mask=mask[:, :width], position_ids=position[:, :width], use_cache=True)
        parts = [out.logits]
        for t in range(6):
            new = torch.cat([row[:, n + t : n + t + 1] for row, n in zip(rows, lengths, strict=True)])
            at = width + t
            out = model(
                new, attention_mask=mask[:, : at + 1], position_ids=position[:, at : at + 1],
                past_key_values=out.past_key_values, use_cache=True,
            )  # fmt: skip
            parts.append(out.logits)
    logits = torch.cat(parts, 1)
    for i, want in enumerate(plain):
        assert float((logits[i, -len(want) :] - want).abs().max()) < LIMIT


PACKED = (0, 19, 20, 51)


@pytest.mark.parametrize("marks", ["cu_seq_lens", "cu_seq_lens and seq_idx"])
def test_packed_rows_are_the_rows_alone(model: Any, family: str, marks: str) -> None:
    """What Transformers without fla refuses (or in KDA families ignores) is right with anydelta.

    Without a cache, because with one the attention layers do not keep packed rows apart.
    """
    extra = packed_arguments()
    if "seq_idx" in marks:
        extra["seq_idx"] = torch.repeat_interleave(torch.arange(3), torch.tensor([19, 1, 31]))[None].int()
    if family in ("qwen4_exp", "glm5_next"):  # whose n-grams or indexers look beyond a row: the layer alone
        del extra["position_ids"]
        layer = first_layer(model, family)
        parts = [torch.randn(1, b - a, 64) for a, b in pairwise(PACKED)]
        plain = torch.cat([layer(x) for x in parts], 1)
        with adt.enable():
            packed = layer(torch.cat(parts, 1), **extra)
    else:
        rows = [tokens(1, b - a, seed=a) for a, b in pairwise(PACKED)]
        plain = torch.cat([model(row).logits for row in rows], 1)
        with adt.enable():
            packed = model(torch.cat(rows, 1), use_cache=False, **extra).logits
    assert float((packed - plain).abs().max()) < LIMIT


def packed_arguments() -> dict[str, Any]:
    cu = torch.tensor(PACKED, dtype=torch.int32)
    return dict(
        position_ids=torch.cat([torch.arange(b - a) for a, b in pairwise(PACKED)])[None],
        cu_seq_lens_q=cu, cu_seq_lens_k=cu, max_length_q=31, max_length_k=31,
    )  # fmt: skip


@pytest.mark.skipif(VERSION < (5, 20), reason="older versions ignore packed rows in every family")
def test_what_transformers_does_with_packed_rows(model: Any, family: str) -> None:
    """docs/transformers.md says so. Should this fail, Transformers has changed: say so there."""
    if importlib.util.find_spec("fla"):
        pytest.skip("with fla Transformers takes packed rows")
    rows = [tokens(1, b - a, seed=a) for a, b in pairwise(PACKED)]
    ids = torch.cat(rows, 1)
    if ROWS[family].rule == "KDA":
        plain = torch.cat([model(row).logits for row in rows], 1)
        assert float((model(ids, use_cache=False, **packed_arguments()).logits - plain).abs().max()) > 0.1
    else:
        with pytest.raises(ValueError, match="packed sequences"):
            model(ids, use_cache=False, **packed_arguments())


def test_bfloat16_is_no_further_from_float32(family: str) -> None:
    """Both against the float32 path with the same weights, over prefill and decode of 3 x 48 tokens."""
    half = build(family).bfloat16()
    exact = copy.deepcopy(half).float()
    ids = tokens(3, 48)
    want = torch.cat([exact(ids).logits, decode(exact, ids=ids)])

    def error(got: torch.Tensor) -> float:
        return float((got.float() - want).square().mean().sqrt())

    run = lambda m: torch.cat([m(ids).logits, decode(m, ids=ids)])  # noqa: E731
    theirs = error(run(half))
    with adt.enable():
        ours = error(run(half))
    assert ours <= theirs


def test_half_weights_beside_float32(family: str) -> None:
    """Checkpoints of the KDA families keep the convolution and the decay in float32: the mixer takes them so."""
    half = build(family).bfloat16()
    for layer in half.modules():
        if type(layer).__name__ == LAYER[family]:
            layer.conv1d.float()
            for name, p in layer.named_parameters():
                if name.endswith(("A_log", "dt_bias")):
                    p.data = p.data.float()
    exact = copy.deepcopy(half).float()
    ids = tokens(1, 12)
    want = decode(exact, ids=ids)

    def error(got: torch.Tensor) -> float:
        return float((got.float() - want).square().mean().sqrt())

    theirs, before = error(decode(half, ids=ids)), mixed(family)
    with adt.enable():
        ours = error(decode(half, ids=ids))
    assert mixed(family) == before + 3 * 4
    assert ours <= theirs


# ---- The mixer


def mixed(family: str) -> int:
    return adt.status().taken.get(f"{family}.mixer", 0)


def why_not_mixed(family: str, run: Callable[[], Any]) -> set[str]:
    """Why the mixer left calls of `run` to the layer's own forward."""
    before = dict(adt.status().passed_on)
    run()
    new = (why for why, n in adt.status().passed_on.items() if n > before.get(why, 0))
    return {why.partition(": ")[2] for why in new if why.startswith(f"{family}.mixer: ")}


def test_the_mixer_takes_every_layer(model: Any, family: str) -> None:
    """Three linear layers, a prefill of 9 tokens and 24 steps; and the cache is left as Transformers leaves it."""
    caches = [transformers.DynamicCache(config=model.config) for _ in range(2)]
    decode(model, caches[0])
    before = mixed(family)
    with adt.enable():
        decode(model, caches[1])
    assert mixed(family) - before == 3 * 25
    for theirs, ours in zip(caches[0].layers, caches[1].layers, strict=True):
        if hasattr(theirs, "conv_states"):
            assert ours.has_previous_state == theirs.has_previous_state
            assert ours.conv_kernel_size == theirs.conv_kernel_size
            assert (ours.dtype, ours.device) == (theirs.dtype, theirs.device)
            for name in ("conv_states", "recurrent_states"):
                a, b = getattr(theirs, name)[0], getattr(ours, name)[0]
                assert (a.dtype, a.shape) == (b.dtype, b.shape)
                assert float((a - b).abs().max()) < LIMIT


def test_a_decode_step_is_planned_once(model: Any, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the second step on a layer's call is only compared with the last; what differs goes the long way."""
    from anydelta import _core
    from anydelta.integrations.transformers import layer as layers

    short: list[bool] = []
    takes = layers._Step.takes
    monkeypatch.setattr(
        layers._Step, "takes", lambda *a: (held := takes(*a), short.append(held is not None))[0]
    )
    ids = tokens(2, 8)
    want = [model(ids[:, : i + 1]).logits[:, -1] for i in range(8)]

    def steps(cache: Any, first: int, last: int, rows: int = 2) -> list[bool]:
        short.clear()
        for i in range(first, last):
            got = model(ids[:rows, i : i + 1], past_key_values=cache, use_cache=True).logits[:, -1]
            assert float((got - want[i][:rows]).abs().max()) < LIMIT
        return [all(short[i : i + 3]) for i in range(0, len(short), 3)]

    with adt.enable():
        cache = transformers.DynamicCache(config=model.config)
        model(ids[:, :2], past_key_values=cache, use_cache=True)
        assert steps(cache, 2, 5)[-2:] == [True, True]  # the first of the three planned it, if nobody had
        other = transformers.DynamicCache(config=model.config)
        model(ids[:1, :4], past_key_values=other, use_cache=True)
        assert steps(other, 4, 6, rows=1) == [True, True]  # another batch: compared by the extension
        handle = first_layer(model, family).conv1d.register_forward_hook(lambda *_: None)
        assert steps(cache, 5, 6) == [False]
        handle.remove()
        assert steps(cache, 6, 7) == [True]
        monkeypatch.setenv("ANYDELTA_BACKEND", "reference")
        kernels = _core.calls()
        assert steps(cache, 7, 8) == [True]
        assert _core.calls() == kernels


def test_what_a_projection_gave_to_a_hook_stays_as_it_was(model: Any, family: str) -> None:
    """A planned step writes its output over z, unless somebody else has z."""
    projection = ROWS[family].z
    if not projection:
        pytest.skip("its z is a part of a wider projection, and no output is written over it")
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    ids = tokens(1, 8)
    want = [model(ids[:, : i + 1]).logits[:, -1] for i in range(8)]
    with adt.enable():
        cache = transformers.DynamicCache(config=model.config)
        for i in range(8):
            if i == 4:
                handle = getattr(first_layer(model, family), projection).register_forward_hook(
                    lambda m, a, z: seen.append((z, z.clone()))
                )
            got = model(ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits[:, -1]
            assert float((got - want[i]).abs().max()) < LIMIT
        handle.remove()
        of_all = torch.nn.modules.module.register_module_forward_hook(
            lambda m, a, z: (
                seen.append((z, z.clone())) if m is getattr(first_layer(model, family), projection) else None
            )
        )
        model(ids, past_key_values=transformers.DynamicCache(config=model.config), use_cache=True)
        of_all.remove()
    assert len(seen) == 5
    assert all(torch.equal(z, copy) for z, copy in seen)


@pytest.mark.parametrize("switch", ["on after the prefill", "off after the prefill", "in turns"])
def test_a_cache_goes_from_one_to_the_other(model: Any, switch: str) -> None:
    ids = tokens(2, 24)
    want = model(ids).logits
    out, parts = None, []
    for i, begin in enumerate((0, 9, 12, 13, 14, 20)):
        end = (9, 12, 13, 14, 20, 24)[i]
        ours = {"on": i > 0, "of": i == 0, "in": i % 2 == 1}[switch[:2]]
        cache = None if out is None else out.past_key_values
        with adt.enable() if ours else adt.disable():
            out = model(ids[:, begin:end], past_key_values=cache, use_cache=True)
        parts.append(out.logits)
    assert float((torch.cat(parts, 1) - want).abs().max()) < LIMIT


def test_a_cache_that_was_reset(model: Any) -> None:
    cache = transformers.DynamicCache(config=model.config)
    with adt.enable():
        model(tokens(2, 9, seed=5), past_key_values=cache)
        for layer in cache.layers:
            if hasattr(layer, "conv_states"):
                layer.reset()
                assert not layer.has_previous_state[0]
        layer = next(m for m in model.modules() if type(m).__name__ in LAYER.values())
        x = torch.randn(2, 6, 64)
        got = layer(x, cache_params=cache)
        fresh = layer(x, cache_params=transformers.DynamicCache(config=model.config))
    assert torch.equal(got, fresh)


def test_what_the_mixer_leaves_to_the_layer(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(family)
    layer = first_layer(model, family)
    x = torch.randn(1, 5, 64)
    with adt.enable():
        assert why_not_mixed(family, lambda: layer(x)) == set()
        with torch.enable_grad():
            assert why_not_mixed(family, lambda: layer(x)) == set()
            with monkeypatch.context() as forced:
                forced.setenv("ANYDELTA_BACKEND", "reference")
                assert why_not_mixed(family, lambda: layer(x)) == {"gradients are wanted"}
        with torch.autocast("cpu", torch.bfloat16):
            assert why_not_mixed(family, lambda: layer(x)) == set()
        handle = layer.conv1d.register_forward_hook(lambda *_: None)
        assert why_not_mixed(family, lambda: layer(x)) == {"hooks on its Conv1d"}
        handle.remove()
        cache = transformers.DynamicCache(config=model.config)
        cache.layers[layer.layer_idx].record_past = True
        assert why_not_mixed(family, lambda: layer(x, cache_params=cache)) == {"the cache records its past"}
        with torch.enable_grad():
            assert why_not_mixed(family, lambda: layer(x, cache_params=cache)) == {"gradients are wanted"}
        layer.activation = "gelu"
        assert why_not_mixed(family, lambda: layer(x)) == {"the activation gelu"}


# ---- The same text


def generate(model: Any, ids: torch.Tensor, **options: Any) -> list[list[int]]:
    options = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False, **options}
    return model.generate(ids, pad_token_id=0, **options).tolist()  # type: ignore[no-any-return]


def same_text(model: Any, ids: torch.Tensor, **options: Any) -> None:
    plain = generate(model, ids, **options)
    taken, passed = counts()
    with adt.enable():
        assert generate(model, ids, **options) == plain
    assert counts()[0] > taken
    assert counts()[1] == passed


def test_greedy_text(model: Any) -> None:
    same_text(model, tokens(1, 13))


def test_greedy_text_of_a_left_padded_batch(model: Any) -> None:
    ids, mask = tokens(2, 13), torch.ones(2, 13, dtype=torch.long)
    ids[0, :5], mask[0, :5] = PAD, 0
    same_text(model, ids, attention_mask=mask, max_new_tokens=24, min_new_tokens=24)


def test_beam_search(model: Any) -> None:
    same_text(model, tokens(1, 13), num_beams=4, max_new_tokens=16, min_new_tokens=16)


def test_sampled_text(model: Any) -> None:
    """Of one seed: the logits are so near that the same tokens are drawn."""

    def sample() -> list[list[int]]:
        torch.manual_seed(3)
        return generate(
            model,
            tokens(1, 13),
            do_sample=True,
            top_k=0,
            temperature=0.7,
            max_new_tokens=16,
            min_new_tokens=16,
        )

    plain = sample()
    with adt.enable():
        assert sample() == plain


def test_static_cache(model: Any) -> None:
    same_text(
        model,
        tokens(1, 13),
        cache_implementation="static",
        disable_compile=True,
        max_new_tokens=24,
        min_new_tokens=24,
    )


def test_prefill_in_chunks(model: Any) -> None:
    same_text(model, tokens(1, 40), prefill_chunk_size=7, max_new_tokens=8, min_new_tokens=8)


@pytest.mark.parametrize(
    ("family", "scope"), [("qwen3_5", "all models"), ("qwen3_5", "one model"), ("kimi_linear", "all models")]
)
def test_compiled_decode_with_a_static_cache(family: str, scope: str) -> None:
    """One graph, no breaks; the compiled model notices enable() and disable()."""
    if family not in FAMILIES:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    model = build(family)
    graphs: list[str] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(str(graph.graph))
        return graph

    def run(f: Any) -> torch.Tensor:
        cache = transformers.StaticCache(config=model.config, max_cache_len=64)
        ids = tokens(1, 16)
        return torch.cat(
            [model(ids[:, :12], past_key_values=cache, use_cache=True).logits]
            + [f(ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits for t in range(12, 16)],
            1,
        )

    plain = run(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=False)
    with adt.enable(*([] if scope == "all models" else [model])):
        assert float((run(compiled) - plain).abs().max()) < LIMIT
        assert graphs
        assert all("anydelta.gated_delta_rule" in g for g in graphs)
    graphs.clear()
    assert float((run(compiled) - plain).abs().max()) < LIMIT
    assert graphs
    assert not any("anydelta.gated_delta_rule" in g for g in graphs)
    torch._dynamo.reset()


def test_compiled_with_aot_autograd() -> None:
    """Functionalised: the operator's fake kernel and the cache's in-place updates are right. One layer, for time."""
    model = build("qwen3_5")
    layer, x = first_layer(model, "qwen3_5"), torch.randn(1, 12, 64)

    def run(f: Any) -> torch.Tensor:
        cache = transformers.StaticCache(config=model.config, max_cache_len=64)
        parts = [layer(x[:, :9], cache_params=cache)]
        return torch.cat(parts + [f(x[:, t : t + 1], cache_params=cache) for t in range(9, 12)], 1)

    plain = run(layer)
    torch._dynamo.reset()
    with adt.enable():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=False)
        assert float((run(compiled) - plain).abs().max()) < LIMIT
    torch._dynamo.reset()


# ---- What is replaced, and put back


def hooks(family: str) -> dict[str, Any]:
    module = importlib.import_module(ROWS[family].module)
    return {n: getattr(module, n) for n in look_at(module).functions} | {
        "forward": getattr(module, LAYER[family]).__dict__["forward"]
    }


def test_enable_and_disable_restore_the_very_functions(family: str) -> None:
    before = hooks(family)
    adt.enable()
    assert all(hooks(family)[n] is not f for n, f in before.items())
    adt.enable()
    adt.disable()
    assert all(hooks(family)[n] is f for n, f in before.items())
    adt.disable()


def test_blocks_put_back_what_was_before() -> None:
    on = lambda: adt.status().everywhere  # noqa: E731
    with adt.enable():
        with adt.enable():
            assert on()
        assert on()
        with adt.disable():
            assert not on()
            with adt.enable():
                assert on()
            assert not on()
        assert on()
        with pytest.raises(KeyError), adt.disable():
            raise KeyError
        assert on()
    assert not on()


def test_one_model_leaves_the_others_alone(model: Any, family: str) -> None:
    other = build(family, seed=1)
    before, layer = hooks(family), first_layer(model, family)
    state = dict(vars(layer))
    plain, plain_other = prefill(model), prefill(other)
    with adt.enable():
        everywhere = prefill(model)
    with adt.enable(model) as switch:
        assert len(adt.status(model).layers) == 3
        assert not adt.status(other).layers
        assert not adt.status().everywhere
        assert all(hooks(family)[n] is f for n, f in before.items())
        assert torch.equal(prefill(model), everywhere)
        taken = counts()
        assert torch.equal(prefill(other), plain_other)
        assert counts() == taken
        with adt.enable(model):
            pass
        assert adt.status(model).layers
        with adt.disable(model):
            assert not adt.status(model).layers
        assert adt.status(model).layers
    assert isinstance(switch, adt.Switch)
    assert vars(layer) == state
    assert torch.equal(prefill(model), plain)


def first_layer(model: Any, family: str) -> Any:
    return next(m for m in model.modules() if type(m).__name__ == LAYER[family])


def test_built_before_or_after() -> None:
    before = build("qwen3_5")
    with adt.enable():
        after = build("qwen3_5")
        taken = counts()[0]
        assert torch.equal(prefill(before), prefill(after))
        assert counts()[0] > taken


def test_decode_in_place_for_one_model(model: Any) -> None:
    plain = decode(model)
    with adt.enable(model):
        assert float((decode(model) - plain).abs().max()) < LIMIT


def test_copies_and_saved_models() -> None:
    """A copy keeps running ours on its own weights; a saved and loaded model runs Transformers' own."""
    model = build("qwen3_5")
    with adt.enable(model):
        copied = copy.deepcopy(model)
        saved = io.BytesIO()
        torch.save(model, saved)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert len(adt.status(copied).layers) == 3
    taken = counts()[0]
    want = prefill(build("qwen3_5"))
    assert float((prefill(copied) - want).abs().max()) < LIMIT
    assert counts()[0] > taken
    adt.disable(copied)
    assert not adt.status(copied).layers
    saved.seek(0)
    loaded = torch.load(saved, weights_only=False)
    assert torch.equal(prefill(loaded), want)
    assert not adt.status(loaded).layers


def test_a_layer_under_an_accelerate_hook(family: str) -> None:
    """The hook keeps running around ours. (accelerate moves a layer's forward to `_old_forward`.)"""
    model, seen = build(family), []
    layer = first_layer(model, family)
    plain = prefill(model)
    layer._old_forward = layer.forward

    def hooked(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(1)
        return self._old_forward(*args, **kwargs)

    layer.forward = types.MethodType(hooked, layer)
    before = dict(vars(layer))
    with adt.enable(model):
        assert len(adt.status(model).layers) == 3
        assert float((prefill(model) - plain).abs().max()) < LIMIT
        assert len(seen) == 1
    assert vars(layer) == before


def test_a_forward_of_someone_else_stays() -> None:
    model = build("qwen3_5")
    layer = first_layer(model, "qwen3_5")
    theirs = layer.forward = types.MethodType(type(layer).forward, layer)
    with pytest.warns(RuntimeWarning, match="its own forward"):
        adt.enable(model)
    assert layer.forward is theirs
    assert len(adt.status(model).layers) == 2
    adt.disable(model)
    assert layer.forward is theirs


def test_a_function_replaced_meanwhile_stays() -> None:
    module = importlib.import_module("transformers.models.qwen3_5.modeling_qwen3_5")
    original, theirs = module.causal_conv1d_fn, lambda *args, **kwargs: None
    try:
        adt.enable()
        module.causal_conv1d_fn = theirs
        with pytest.warns(RuntimeWarning, match="causal_conv1d_fn was replaced by other code"):
            adt.disable()
        assert module.causal_conv1d_fn is theirs
        with adt.enable():
            assert module.causal_conv1d_fn.__wrapped__ is theirs
        assert module.causal_conv1d_fn is theirs
    finally:
        module.causal_conv1d_fn = original
    with adt.enable():
        assert module.causal_conv1d_fn.__wrapped__ is original


def test_weights_that_are_fetched_for_each_call(family: str) -> None:
    """accelerate's offload: a gate's own parameters come only when the gate is called, which the mixer never does."""
    accelerate = pytest.importorskip("accelerate")
    model, ids = build(family), tokens(1, 10)
    plain = decode(model, ids=ids)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with adt.enable():
        assert float((decode(model, ids=ids) - plain).abs().max()) < LIMIT


# ---- The cache


def test_the_state_advances_in_place_only_where_it_is_copied_anyway() -> None:
    """A cache that keeps the old state, or records its past, is handed a new one."""
    from transformers.cache_utils import LinearAttentionLayer

    class Keeps(LinearAttentionLayer):
        kept: list[torch.Tensor]

        def update_recurrent_state(
            self, recurrent_states: torch.Tensor, *args: Any, **kwargs: Any
        ) -> torch.Tensor:
            if self.is_recurrent_states_initialized[0]:
                self.kept.append(self.recurrent_states[0].clone())
            return super().update_recurrent_state(recurrent_states, *args, **kwargs)

    model, ids = build("qwen3_5"), tokens(1, 12)

    def states(kind: str) -> list[torch.Tensor]:
        cache = transformers.DynamicCache(config=model.config)
        if kind == "keeps":
            cache.layers[0] = Keeps()
            cache.layers[0].kept = []
        if kind == "records":
            cache.activate_past_recording()
        found = []
        out = model(ids[:, :9], past_key_values=cache, use_cache=True)
        for t in range(9, 12):
            address = cache.layers[0].recurrent_states[0].data_ptr()
            if kind != "keeps":
                found.append(cache.layers[0].recurrent_states[0].clone())
            model(ids[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
            assert cache.layers[0].recurrent_states[0].data_ptr() == address
        return cache.layers[0].kept if kind == "keeps" else found

    plain = states("plain")
    for kind in ("plain", "keeps", "records"):
        with adt.enable():
            ours = states(kind)
        assert len(ours) == 3
        for got, want in zip(ours, plain, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_the_rule_itself_leaves_its_state_alone() -> None:
    with adt.enable():
        rule = importlib.import_module(
            "transformers.models.qwen3_5.modeling_qwen3_5"
        ).torch_recurrent_gated_delta_rule
        a = rule_arguments(T=1, state=True)
        before = a["initial_state"].clone()
        _, new = rule(**a)
    assert torch.equal(a["initial_state"], before)
    assert new.data_ptr() != a["initial_state"].data_ptr()


# ---- The functions one by one


def rule_arguments(
    *,
    T: int = 70,
    HV: int = 4,
    K: int = 16,
    V: int = 24,
    kda: bool = False,
    dtype: Any = torch.float32,
    state: bool = False,
) -> dict[str, Any]:
    g = torch.Generator().manual_seed(T)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    H = HV if kda else 2
    # Stride 1 in time, as at prefill; keys of length about 1/2, or the rule without l2norm grows without bound.
    query, key = ((rand(2, H, K, T) / (4 * K) ** 0.5).to(dtype).permute(0, 3, 1, 2) for _ in "qk")
    return dict(
        query=query, key=key, value=rand(2, HV, V, T).to(dtype).permute(0, 3, 1, 2),
        g=-rand(2, T, HV, K).abs() / 8 if kda else -rand(2, T, HV).abs() / 8,
        beta=rand(2, T, HV).sigmoid().to(dtype),
        initial_state=rand(2, HV, K, V) if state else None,
        output_final_state=True, use_qk_l2norm_in_kernel=True,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("state", [False, True], ids=["", "from a state"])
@pytest.mark.parametrize("kind", ["chunk", "recurrent"])
def test_rule_functions(family: str, kind: str, state: bool, dtype: Any) -> None:
    """Results, their dtypes and whether there is a final state, as Transformers' functions give them."""
    module = importlib.import_module(ROWS[family].module)
    name = next(name for name, hub in look_at(module).functions.items() if MAKERS[hub] == f"{kind}_rule")
    old_heads = (
        VERSION < (5, 23) or ROWS[family].rule == "KDA"
    )  # before 5.23 the layer repeats q and k, not the rule
    a = rule_arguments(
        T=70 if kind == "chunk" else 3, kda=ROWS[family].rule == "KDA", dtype=dtype, state=state
    )
    if old_heads and ROWS[family].rule == "GDA":
        a["query"], a["key"] = (a[n].repeat_interleave(2, 2) for n in ("query", "key"))
    positional = [a.pop(n) for n in ("query", "key", "value")]
    for flags in ({}, {"output_final_state": False}, {"use_qk_l2norm_in_kernel": False}):
        want, want_state = getattr(module, name)(*positional, **{**a, **flags})
        taken = counts()[0]
        with adt.enable():
            got, got_state = getattr(module, name)(
                *positional, **{**a, **flags}, use_cache=True, max_length_q=None
            )
        assert counts()[0] == taken + 1
        assert got.dtype == want.dtype == dtype
        limit = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
        scale = float(want.float().abs().max())
        assert float((got.float() - want.float()).abs().max()) <= limit * scale
        assert (got_state is None) == (want_state is None)
        if want_state is not None:
            assert got_state.dtype == want_state.dtype == torch.float32
            # Before 5.17 Transformers normalises q and k in their own dtype.
            rough = VERSION < (5, 17) and dtype != torch.float32
            limit = 3e-2 if rough else 1e-4
            scale = float(want_state.abs().max())
            torch.testing.assert_close(got_state, want_state, rtol=limit, atol=limit * scale)


def module_functions(name: str = "qwen3_5") -> Any:
    return importlib.import_module(f"transformers.models.{name}.modeling_{name}")


@pytest.mark.parametrize("activation", [None, "silu", "swish"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("shape", [(1, 5, 1), (2, 5, 2), (1, 8, 4), (2, 6, 40), (3, 8192, 25)], ids=str)
def test_conv(shape: tuple[int, int, int], bias: bool, activation: str | None) -> None:
    """Sequences shorter than the kernel, several blocks (the last case), both memory layouts."""
    B, C, T = shape
    w, b = torch.randn(C, 4), torch.randn(C) if bias else None
    for x in (torch.randn(B, C, T), torch.randn(B, T, C).transpose(1, 2)):
        want = module_functions().causal_conv1d_fn(x, w, b, activation=activation)
        with adt.enable():
            got = module_functions().causal_conv1d_fn(x, w, b, activation=activation)
            shifted = functions.shifted(x.transpose(1, 2), w, b, activation, None).transpose(1, 2)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(shifted, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("length", [4, 5, 9])
def test_conv_update(length: int, dtype: Any) -> None:
    """One token; states longer than the kernel (a recorded past) included. Half types: no further from the truth."""
    w, b, x = torch.randn(12, 4).to(dtype), torch.randn(12).to(dtype), torch.randn(2, 12, 1).to(dtype)
    state = torch.randn(2, 12, length).to(dtype)
    exact = module_functions().causal_conv1d_update(
        x.double(), state.double(), w.double(), b.double(), "silu"
    )
    want_state, got_state = state.clone(), state.clone()
    want = module_functions().causal_conv1d_update(x, want_state, w, b, "silu")
    with adt.enable():
        got = module_functions().causal_conv1d_update(x, got_state, w, b, "silu")
    assert got.dtype == dtype
    assert torch.equal(got_state, want_state)
    error = lambda y: float((y.double() - exact).square().mean())  # noqa: E731
    assert error(got) <= 1.01 * error(want) + 1e-13


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"activation": "gelu"}, "the activation gelu"),
        ({"dtype": torch.float64}, "float64"),
    ],
    ids=["activation", "dtype"],
)
def test_conv_goes_to_transformers(change: dict[str, Any], reason: str) -> None:
    dtype = change.pop("dtype", torch.float32)
    x, w = torch.randn(1, 6, 9, dtype=dtype), torch.randn(6, 4, dtype=dtype)
    options = {"activation": "silu", **change}
    want = module_functions().causal_conv1d_fn(x, w, None, **options)
    with adt.enable():
        assert torch.equal(module_functions().causal_conv1d_fn(x, w, None, **options), want)
    assert any(reason in why for why in adt.status().passed_on)


@pytest.mark.parametrize("change", ["float64", "meta", "state_v_first", "seq_idx"])
def test_rule_goes_to_transformers(change: str) -> None:
    rule = module_functions().torch_chunk_gated_delta_rule
    a = rule_arguments(dtype=torch.float64 if change == "float64" else torch.float32, HV=2)
    if change == "meta":
        a = {n: x.to("meta") if isinstance(x, torch.Tensor) else x for n, x in a.items()}
    if change == "state_v_first":
        a["state_v_first"] = True
    if change == "seq_idx":
        if VERSION < (5, 20):
            pytest.skip("older versions ignore it")
        a["seq_idx"] = torch.zeros(2, 70, dtype=torch.int32)
        with adt.enable(), pytest.raises(ValueError, match="packed"):
            module_functions().torch_chunk_gated_delta_rule(**a)
        return
    want, _ = rule(**a)
    taken = counts()[0]
    with adt.enable():
        got, _ = module_functions().torch_chunk_gated_delta_rule(**a)
    assert counts()[0] == taken
    assert change == "meta" or torch.equal(got, want)
    assert got.shape == want.shape


def test_wrong_packed_rows_are_refused() -> None:
    a = rule_arguments(HV=2)
    with adt.enable(), pytest.raises(ValueError, match="requires B = 1"):
        module_functions().torch_chunk_gated_delta_rule(**a, cu_seqlens=torch.tensor([0, 70]))


def test_a_forced_backend_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("qwen3_5")
    plain = prefill(model)
    monkeypatch.setenv("ANYDELTA_BACKEND", "reference")
    taken = counts()[0]
    with adt.enable():
        assert float((prefill(model) - plain).abs().max()) < LIMIT
    assert counts()[0] > taken


# ---- Errors


def import_all() -> None:
    for name in finding._with_rule():
        with suppress(Exception):
            importlib.import_module(name)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As in a process that has not called enable() yet, but has imported the models: Transformers does not stand a
    changed version while it imports them."""
    import_all()
    monkeypatch.setattr(adt, "_bound", [])
    monkeypatch.setattr(adt, "_left", {})
    monkeypatch.setattr(finding, "_seen", {})
    return monkeypatch


@pytest.mark.parametrize("version", ["5.14.1", "5.99.0", "6.0.0.dev0", "unknown"])
def test_a_number_refuses_nothing(fresh: pytest.MonkeyPatch, version: str) -> None:
    fresh.setattr(sys.modules["transformers"], "__version__", version)
    with adt.enable():
        assert set(FAMILIES) <= set(adt.status().families)
    assert f"transformers {version}" in str(adt.status())


def test_a_family_that_does_not_fit_is_left_alone(fresh: pytest.MonkeyPatch) -> None:
    """Named once, with the reason; the others run."""
    module, model, other = module_functions(), build("qwen3_5"), build("olmo_hybrid")
    theirs, hub_name = module.torch_chunk_gated_delta_rule, finding._hub_name

    def odd(q: Any, k: Any) -> Any:
        raise AssertionError

    with fresh.context() as patch:
        patch.setattr(finding, "_hub_name", lambda name, x: hub_name(name, theirs if x is odd else x))
        patch.setattr(module, "torch_chunk_gated_delta_rule", odd)
        with pytest.warns(RuntimeWarning, match=r"qwen3_5 keeps .*_delta_rule takes \(q, k\)") as seen:
            adt.enable()
        with adt.enable(), adt.enable(other):
            assert module.torch_chunk_gated_delta_rule is odd
            assert "qwen3_5" not in adt.status().families
            assert "takes (q, k) and not (query, key," in adt.status().left["qwen3_5"]
            assert "left as it is: qwen3_5: torch_chunk" in str(adt.status())
            assert len(adt.status(other).layers) == 3
            with pytest.raises(ValueError, match="which has none"):
                adt.enable(model)
            with pytest.raises(ValueError, match="stateful models"):
                model.generate(tokens(1, 4), max_new_tokens=2, prompt_lookup_num_tokens=2)
        adt.disable()
    assert len([w for w in seen if "qwen3_5 keeps" in str(w.message)]) == 1


def test_a_family_that_cannot_be_imported_is_left_alone(fresh: pytest.MonkeyPatch) -> None:
    fresh.setattr(
        finding, "_with_rule", lambda: (ROWS["qwen3_5"].module, "transformers.models.none.modeling_none")
    )
    with pytest.warns(RuntimeWarning, match=r"anydelta: none keeps Transformers' code: ModuleNotFoundError"):
        adt.status()
    assert "qwen3_5" in adt.status().families


MADE_UP = """
import torch
from torch import nn
from transformers.integrations.hub_kernels import use_kernel_func_from_hub_with_fallback
from transformers.models.{base}.modeling_{base} import *
from transformers.models.{base} import modeling_{base} as base


@use_kernel_func_from_hub_with_fallback("{hub}", "fla")
def my_chunks({parameters}, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=False, **kwargs):
    options = dict(initial_state=initial_state, output_final_state=output_final_state)
    return base.{function}(query, key, value, g, beta, use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel, **options)


class Layer(nn.Module):
    def __init__(self, layer_idx=0):
        super().__init__()
        self.layer_idx = layer_idx
        self.a, self.b = nn.Linear(16, {gates}), nn.Linear(16, 2)

    def forward(self, hidden_states, {cache}=None, attention_mask=None, **kwargs):
        B, T = hidden_states.shape[:2]
        q = hidden_states.view(B, T, 2, 8)
        state = None
        if {cache} is not None:
            state = {cache}.layers[self.layer_idx].recurrent_states[0]
            {cache}.update_conv_state(hidden_states.transpose(1, 2), self.layer_idx, conv_kernel_size=4)
        o, new = my_chunks(
            q, q.flip(-1), q.roll(1, -1), -self.a(hidden_states).exp().view(B, T, {shape}),
            self.b(hidden_states).sigmoid(), initial_state=state, output_final_state={cache} is not None,
            use_qk_l2norm_in_kernel=True, **kwargs,
        )
        if {cache} is not None:
            {cache}.update_recurrent_state(new, self.layer_idx)
        return o.flatten(2)
"""
CHUNK = "query, key, value, g, beta, chunk_size=64"


@contextmanager
def made_up(
    hub: str = "chunk_gated_delta_rule", parameters: str = CHUNK, cache: str = "cache"
) -> Iterator[Any]:
    """A module of a family that nobody has heard of, with Transformers' mark on its functions."""
    kda = hub == "chunk_kda"
    text = MADE_UP.format(
        hub=hub, parameters=parameters, cache=cache, base="kimi_linear" if kda else "qwen3_5",
        function="chunk_kimi_delta_attention" if kda else "torch_chunk_gated_delta_rule",
        gates=16 if kda else 2, shape="2, 8" if kda else 2,
    )  # fmt: skip
    module = types.ModuleType("modeling_made_up")
    sys.modules[module.__name__] = module
    try:
        exec(text, vars(module))
        yield module
    finally:
        del sys.modules[module.__name__]
        adt._bound[:] = [b for b in adt._bound if b.module is not module]
        for name in [name for name in adt._left if name.startswith("made_up")]:
            del adt._left[name]


marked = pytest.mark.skipif(
    VERSION < (5, 20), reason="earlier versions do not mark functions so that it can be seen"
)


def test_modules_that_answer_with_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is lost by them, nor by an interruption."""

    class Odd(types.ModuleType):
        __hash__ = None  # type: ignore[assignment]

        def __eq__(self, other: object) -> bool:
            raise RuntimeError("no comparison")

        def __getattr__(self, name: str) -> Any:
            raise RuntimeError("no attribute")

    import_all()  # Transformers' modules do not stand such a neighbour while they are imported
    monkeypatch.setattr(finding, "_seen", {})
    monkeypatch.setitem(sys.modules, "odd", Odd("odd"))
    known = {f.name for f in finding.find()[0]}
    assert set(FAMILIES) <= known
    monkeypatch.setattr(finding, "_seen", {})
    look = finding.look_at

    def interrupted(module: Any) -> Any:
        if module.__name__.endswith("modeling_qwen3_5"):
            raise KeyboardInterrupt
        return look(module)

    with monkeypatch.context() as patch:
        patch.setattr(finding, "look_at", interrupted)
        with pytest.raises(KeyboardInterrupt):
            finding.find()
    assert {f.name for f in finding.find()[0]} == known


@marked
@pytest.mark.parametrize("cache", ["cache", "cache_params"])
@pytest.mark.parametrize("hub", ["chunk_gated_delta_rule", "chunk_kda"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_family_that_nobody_has_heard_of_has_the_rule(hub: str, cache: str, when: str) -> None:
    """With in-place states, drafts that are rolled back, and no line of ours about it."""
    with adt.enable() if when == "after" else nullcontext(), made_up(hub, cache=cache) as module:
        layer, x = module.Layer(), torch.randn(1, 30, 16)
        function = module.my_chunks

        want = layer(x)
        taken = counts()[0]
        with adt.enable():
            assert "made_up" in adt.status().families
            assert module.my_chunks is not function
            assert float((layer(x) - want).abs().max()) < LIMIT
            assert counts()[0] == taken + 1
            held = recording()
            for begin, end in ((0, 20), (20, 21), (21, 26)):
                layer(x[:, begin:end], **{cache: held})
            held.layers[0].crop(-4)
            got = layer(x[:, 22:], **{cache: held})
            assert float((got - want[:, 22:]).abs().max()) < LIMIT
        with adt.enable(layer):
            assert adt.status(layer).layers == ("",)
            assert (module.my_chunks is function) == (when == "before")
            assert float((layer(x) - want).abs().max()) < LIMIT
        assert (module.my_chunks is function) == (when == "before")


def recording() -> Any:
    """A cache of one linear attention layer that can roll back."""
    from transformers.cache_utils import Cache, LinearAttentionLayer

    from anydelta.integrations.transformers.cache import with_rollback

    cache = with_rollback(Cache(layers=[LinearAttentionLayer()]))
    cache.activate_past_recording()
    return cache


@marked
def test_a_made_up_function_that_does_not_fit_is_left_alone() -> None:
    with made_up(parameters="query, key, value, beta, g, chunk_size=64") as module:
        theirs, layer = module.my_chunks, module.Layer()
        with pytest.warns(
            RuntimeWarning, match=r"made_up keeps .*my_chunks takes \(query, key, value, beta, g,"
        ):
            adt.enable()
        adt.disable()
        with adt.enable():
            assert module.my_chunks is theirs
            assert "made_up" not in adt.status().families
            assert "my_chunks takes (query, key, value, beta, g" in adt.status().left["made_up"]
            with pytest.raises(ValueError, match="which has none"):
                adt.enable(layer)


@marked
def test_a_made_up_layer_that_does_not_fit_runs_the_rule_alone() -> None:
    with made_up(cache="memory") as module:
        layer, x = module.Layer(), torch.randn(1, 30, 16)
        want, forward = layer(x), module.Layer.forward
        with pytest.warns(
            RuntimeWarning, match=r"made_up\.Layer keeps .*its forward takes \(hidden_states, memory,"
        ):
            adt.enable()
        adt.disable()
        with adt.enable():
            taken = counts()[0]
            assert module.Layer.forward is forward
            assert float((layer(x) - want).abs().max()) < LIMIT
            assert counts()[0] == taken + 1
            assert "so the rule alone is replaced" in adt.status().left["made_up.Layer"]


def test_a_gate_that_somebody_looks_at(family: str) -> None:
    """The mixer reads the gate's parameters and never calls it."""
    if not ROWS[family].gate:
        pytest.skip("its layer has the decay's parameters itself")
    model, x = build(family), torch.randn(1, 5, 64)
    layer = first_layer(model, family)
    gate = getattr(layer, ROWS[family].gate)
    handle = gate.register_forward_hook(lambda module, args, out: out * 0.5)
    want = layer(x)
    with adt.enable():
        assert why_not_mixed(family, lambda: layer(x)) == {f"hooks on its {type(gate).__name__}"}
        assert float((layer(x) - want).abs().max()) < LIMIT
    handle.remove()
    gate.more = torch.nn.Linear(2, 2)
    with adt.enable():
        assert why_not_mixed(family, lambda: layer(x)) == {
            f"other modules or parameters than {family} is known for: {ROWS[family].gate}.more"
        }


def test_a_layer_with_a_part_more_goes_to_its_own_forward(family: str) -> None:
    model = build(family)
    layer, x = first_layer(model, family), torch.randn(1, 5, 64)
    layer.more = torch.nn.Linear(2, 2)
    with adt.enable():
        assert why_not_mixed(family, lambda: layer(x)) == {
            f"other modules or parameters than {family} is known for: more"
        }


def test_a_layer_patched_by_someone_else() -> None:
    """A forward that is not Transformers' cannot find our functions: say so instead of doing nothing."""
    model = build("qwen3_5")
    cls = type(first_layer(model, "qwen3_5"))
    original = cls.forward
    try:
        cls.forward = lambda self, hidden_states, **kwargs: hidden_states
        with pytest.raises(
            RuntimeError, match="requires a forward of Qwen3_5GatedDeltaNet that reads the functions"
        ):
            adt.enable(model)
    finally:
        cls.forward = original
    with adt.enable(model):
        assert adt.status(model).layers


def test_a_missing_transformers() -> None:
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import anydelta.integrations.transformers as adt\n"
        "try: adt.enable()\nexcept ImportError as e: print(e)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(
        "anydelta.integrations.transformers: requires torch and a transformers that has"
    )
    assert "pip install 'transformers>=5.15'" in done.stdout
    assert done.stdout.count("\n") == 1


def test_models_without_such_layers() -> None:
    for call in (adt.enable, adt.disable, adt.status):
        with pytest.raises(ValueError, match=r"requires a model with gated delta rule layers .*got Linear"):
            call(torch.nn.Linear(2, 2))
        with pytest.raises(TypeError, match=r"requires a torch.nn.Module.*got str"):
            call("qwen")  # type: ignore[arg-type]


def test_one_model_cannot_escape_all() -> None:
    model = build("qwen3_5")
    with adt.enable(), pytest.raises(ValueError, match=r"disable\(\), then enable\(other_model\)"):
        adt.disable(model)


def test_status_reads_well() -> None:
    model = build("qwen3_5")
    with adt.enable(model):
        prefill(model)
        text = str(adt.status(model))
    assert f"transformers {transformers.__version__}" in text
    assert "all models: off" in text
    assert "this model: 3 layers run anydelta: model.layers.0.linear_attn" in text
    assert "taken: qwen3_5.torch_chunk_gated_delta_rule x " in text


def test_no_warnings_of_a_slow_path() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        with adt.enable():
            prefill(build("qwen3_5"))


# ---- pack()


@pytest.fixture
def packs_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine where packing makes all faster."""
    monkeypatch.setattr(packed_matrices, "faster", lambda layer, rows: True)


def test_only_what_is_faster_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each shape is measured once; one that is faster for a step alone leaves prompts to torch."""
    asked = []

    def faster(layer: torch.nn.Linear, rows: int) -> bool:
        asked.append((layer.out_features, rows))
        return (layer.out_features, rows) in {(5, 1), (6, 1), (6, 64)}

    monkeypatch.setattr(packed_matrices, "faster", faster)
    model = torch.nn.Sequential(*(torch.nn.Linear(8, n) for n in (5, 6, 7, 5)))
    packed = adt.pack(model)
    assert asked == [(n, rows) for n in (5, 6, 7) for rows in (1, 64)]
    assert [layer.out_features for layer in packed.layers] == [5, 6, 5]
    assert [m.__dict__.get("_most_rows", "plain") for m in model] == [8, None, "plain", 8]
    seen: list[int] = []
    inner = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, *a: seen.append(len(x)) or inner(x, *a))
    with torch.no_grad():
        for n in (1, 8, 9):
            assert model[0](torch.randn(n, 8)).shape == (n, 5)
    assert seen == [9]
    packed.off()
    assert all(type(m) is torch.nn.Linear and not {"_packed", "_most_rows"} & set(m.__dict__) for m in model)


def test_a_shape_is_measured() -> None:
    assert packed_matrices.faster(torch.nn.Linear(32, 32), 1) in (True, False)


def test_packed_matrices_give_the_same_text(model: Any, packs_all: None) -> None:
    prompt = tokens(2, 12)
    plain, text = prefill(model), model.generate(prompt, max_new_tokens=16, do_sample=False)
    with adt.enable(), adt.pack(model) as packed:
        assert float((prefill(model) - plain).abs().max()) < LIMIT
        assert torch.equal(model.generate(prompt, max_new_tokens=16, do_sample=False), text)
        assert packed.layers
        assert all(type(m).__name__ == "PackedLinear" for m in packed.layers)
    assert all(type(m) is torch.nn.Linear and "_packed" not in m.__dict__ for m in packed.layers)
    assert torch.equal(prefill(model), plain)


def test_packed_weights_follow_the_weights(packs_all: None) -> None:
    layer = torch.nn.Linear(8, 5)
    x = torch.randn(3, 8)
    with adt.pack(torch.nn.Sequential(layer)):
        assert torch.allclose(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias), atol=1e-6)
        layer.weight.copy_(torch.randn(5, 8))
        assert torch.allclose(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias), atol=1e-6)
        twin = copy.deepcopy(layer)
        layer.weight = torch.nn.Parameter(torch.randn(5, 8))
        assert torch.allclose(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias), atol=1e-6)
        assert torch.allclose(twin(x), torch.nn.functional.linear(x, twin.weight, twin.bias), atol=1e-6)
        with torch.enable_grad():
            layer(x).sum().backward()
        assert layer.weight.grad is not None
        assert layer(x[:0]).shape == (0, 5)
        layer.double()
        assert layer(x.double()).dtype == torch.float64


def test_what_cannot_be_packed() -> None:
    with pytest.raises(TypeError, match=r"requires a torch\.nn\.Module; got int"):
        adt.pack(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"requires a model with nn\.Linear layers.*got LayerNorm"):
        adt.pack(torch.nn.LayerNorm(4))
