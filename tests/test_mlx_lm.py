"""anydelta inside mlx-lm: every family, with and without, as mlx-lm itself calls its models; and drafting.

Models are tiny and random, with the two changes of test_transformers.py that make errors show: larger weights, slow
decays.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import inspect
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from conftest import CPU_REASONS, without

MISSING = [name for name in ("mlx", "mlx_lm") if importlib.util.find_spec(name) is None]
if MISSING and sys.version_info >= (3, 11):
    without(f"{' and '.join(MISSING)} not installed")
if MISSING:
    pytest.skip("mlx-lm needs Python 3.11", allow_module_level=True)
if CPU_REASONS:
    pytest.skip("the cpu backend is not built", allow_module_level=True)

import mlx.core as mx  # noqa: E402
import mlx.optimizers as optimizers  # noqa: E402
import numpy as np  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402
from mlx_lm.models import cache as theirs  # noqa: E402

import anydelta.integrations.mlx_lm as adm  # noqa: E402
from anydelta.integrations.mlx_lm import families  # noqa: E402
from anydelta.integrations.mlx_lm import functions as functions  # noqa: E402
from anydelta.integrations.mlx_lm.cache import RollbackCache  # noqa: E402

generate = importlib.import_module("mlx_lm.generate")
LIMIT = 1e-4

BASE = dict(
    vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-6,
)  # fmt: skip
GDN = dict(
    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=24,
    linear_conv_kernel_dim=4, full_attention_interval=2,
)  # fmt: skip
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
ROPE = dict(rope_theta=10000.0, partial_rotary_factor=0.25, max_position_embeddings=2048)
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3_next": {
        **BASE, **GDN, **MOE, **ROPE, "decoder_sparse_step": 2, "shared_expert_intermediate_size": 32,
        "mlp_only_layers": [],
    },
    "qwen3_5": {**BASE, **GDN, "max_position_embeddings": 2048},
    "kimi_linear": {
        **BASE, **MOE, "rope_theta": 10000.0, "model_max_length": 2048, "num_key_value_heads": 4, "kv_lora_rank": 32,
        "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "num_experts_per_token": 2,
        "num_shared_experts": 1, "first_k_dense_replace": 1, "num_experts": 0,
        "linear_attn_config": dict(
            num_heads=4, head_dim=16, short_conv_kernel_size=4, kda_layers=[1, 3], full_attn_layers=[2, 4]),
    },
    "olmo_hybrid": {
        **BASE, **{**GDN, "linear_num_key_heads": 4}, "num_key_value_heads": 4,
        "linear_allow_neg_eigval": True, "max_position_embeddings": 2048,
        "tie_word_embeddings": False, "attention_bias": False,
        "layer_types": ["linear_attention", "full_attention"] * 2,
    },
}  # fmt: skip
CONFIGS["bailing_moe_v3"] = {
    **BASE, **MOE, "moe_shared_expert_intermediate_size": 32, "num_shared_experts": 1, "first_k_dense_replace": 4,
    "n_group": 1, "topk_group": 1, "layer_group_size": 2, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8, "v_head_dim": 16, "short_conv_kernel_size": 4,
}  # fmt: skip
CONFIGS["kimi_k3"] = {k: v for k, v in CONFIGS["kimi_linear"].items() if k != "rope_theta"}
CONFIGS["kimi_k3"]["linear_attn_config"] = {
    **CONFIGS["kimi_linear"]["linear_attn_config"], "gate_lower_bound": -5.0, "use_full_rank_gate": True,
}  # fmt: skip
REFUSAL = "requires a trimmable prompt cache"
REFUSES = REFUSAL in inspect.getsource(generate)
"""Whether mlx-lm alone refuses to draft for these models; 0.31.1 goes on, with states that nothing took back."""


def refused() -> Any:
    return pytest.raises(ValueError, match=REFUSAL) if REFUSES else nullcontext()


FAMILIES = [name for name in CONFIGS if name in adm.status().families]


def build(family: str, seed: int = 0) -> Any:
    module = importlib.import_module(f"mlx_lm.models.{family}")
    config = {"model_type": family, **CONFIGS[family]}
    mx.random.seed(seed)
    model = module.Model(module.ModelArgs.from_dict(config))
    weights = []
    for name, p in tree_flatten(model.parameters()):
        if name.endswith("A_log"):
            p = mx.random.uniform(-4, 0, p.shape)
        elif p.ndim == 2:
            p = p * 4
        weights.append((name, p))
    model.load_weights(weights)
    model.eval()
    mx.eval(model.parameters())
    return model


def worse(model: Any, much: float) -> Any:
    """A draft model that often agrees with the model, and often does not."""
    out = copy.deepcopy(model)
    mx.random.seed(5)
    out.load_weights(
        [
            (n, p + much * mx.abs(p).mean() * mx.random.normal(p.shape))
            for n, p in tree_flatten(out.parameters())
        ]
    )
    return out


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
    yield
    assert not adm.status().enabled


def tokens(*shape: int, seed: int = 0) -> mx.array:
    return mx.random.randint(1, 64, shape, key=mx.random.key(seed))


def same(got: mx.array, want: mx.array) -> None:
    assert got.shape == want.shape
    worst = float(mx.abs(got - want).max())
    assert worst <= LIMIT * float(mx.abs(want).max()), worst


def in_pieces(model: Any, x: mx.array, cache: Any, ends: list[int]) -> mx.array:
    starts = [0, *ends[:-1]]
    return mx.concatenate([model(x[:, a:b], cache=cache) for a, b in zip(starts, ends, strict=True)], axis=1)


# ---- the same logits


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits(family: str, model: Any, dtype: str) -> None:
    """A prompt in chunks, decoded tokens, without a cache, several sequences."""
    if dtype == "bfloat16":
        if family == "qwen3_next":
            pytest.skip("MLX's CPU device multiplies experts in float32 only")
        model = copy.deepcopy(model)
        model.set_dtype(mx.bfloat16)
    x = tokens(2, 23)
    ends = [16, 21, 22, 23]
    exact = in_pieces(model, x, model.make_cache(), ends)
    before = adm.status()
    with adm.enable():
        got = in_pieces(model, x, model.make_cache(), ends)
        whole = model(x)
    layers = len([c for c in model.make_cache() if isinstance(c, theirs.ArraysCache)])
    after = adm.status()
    assert after.taken - before.taken == layers * (len(ends) + 1)
    assert after.passed_on == before.passed_on
    if dtype == "float32":
        same(got, exact)
        same(whole, exact)
        return
    wide = copy.deepcopy(model)
    wide.set_dtype(mx.float32)
    truth = wide(x)
    assert float(mx.square(got - truth).sum()) <= 1.5 * float(mx.square(exact - truth).sum())


def test_padded_batches(family: str, model: Any) -> None:
    """Left padding, and right padding with lengths as mlx-lm's BatchGenerator prepares it; then a token each."""
    if family == "olmo_hybrid":
        pytest.skip("mlx-lm's olmo_hybrid convolves padding: its own logits depend on the padding token")
    if not hasattr(theirs.ArraysCache, "batch_size") and not REFUSES:
        pytest.skip("this mlx-lm merges no caches that are empty")
    x, y = tokens(2, 9), tokens(2, 1, seed=1)
    short = 4
    left = mx.concatenate([mx.full((1, 9 - short), 7), x[1:, :short]], axis=1)
    right = mx.concatenate([x[1:, :short], mx.full((1, 9 - short), 7)], axis=1)

    def run(batch: mx.array, on_the_left: bool) -> tuple[mx.array, mx.array]:
        caches = [c.merge([c, copy.deepcopy(c)]) for c in model.make_cache()]
        for c in caches:
            if on_the_left:
                if isinstance(c, theirs.ArraysCache):
                    c.left_padding = mx.array([0, 9 - short])
                else:
                    c.prepare(left_padding=[0, 9 - short])
            else:
                c.prepare(lengths=[9, short], right_padding=[0, 9 - short])
        prompt = model(batch, cache=caches)
        for c in caches:
            c.finalize()
        return prompt, model(y, cache=caches)

    for batch, on_the_left in (
        (mx.concatenate([x[:1], left]), True),
        (mx.concatenate([x[:1], right]), False),
    ):
        want = run(batch, on_the_left)
        with adm.enable():
            got = run(batch, on_the_left)
        mine = slice(9 - short, 9) if on_the_left else slice(0, short)
        same(got[0][0], want[0][0])
        same(got[0][1, mine], want[0][1, mine])  # what padding yields is nobody's business
        same(got[1], want[1])


def test_mlx_lms_batch_generator(family: str, model: Any) -> None:
    if family == "olmo_hybrid":
        pytest.skip("mlx-lm's olmo_hybrid convolves padding: its own text depends on the batch")
    if not hasattr(generate.BatchGenerator, "next_generated"):
        pytest.skip("this mlx-lm has another BatchGenerator")
    prompts = [tokens(n, seed=n).tolist() for n in (3, 9, 6)]

    def run() -> dict[int, list[int]]:
        generator = generate.BatchGenerator(
            model, max_tokens=6, completion_batch_size=4, prefill_batch_size=2
        )
        names = generator.insert(prompts)
        out: dict[int, list[int]] = {name: [] for name in names}
        while responses := generator.next_generated():
            for r in responses:
                out[r.uid].append(r.token)
        return out

    want = run()
    with adm.enable():
        assert list(run().values()) == list(want.values())
    assert all(len(text) == 6 for text in want.values())


def gradients(model: Any) -> Any:
    x = tokens(1, 20)

    def loss(weights: Any) -> mx.array:
        model.update(weights)
        return model(x).square().mean()

    return mx.grad(loss)(model.trainable_parameters())


def test_training_has_the_gradients_of_mlx_lm(model: Any) -> None:
    model.train()
    try:
        try:
            want = gradients(model)
        except ValueError as error:
            pytest.skip(f"this mlx-lm does not train it on MLX {mx.__version__}: {error}")
        before = adm.status().taken
        with adm.enable():
            got = gradients(model)
    finally:
        model.eval()
    assert adm.status().taken > before
    for (name, a), (_, b) in zip(tree_flatten(got), tree_flatten(want), strict=True):
        assert float(mx.square(a - b).sum()) <= 1e-8 * float(mx.square(b).sum()) + 1e-16, name


@pytest.mark.parametrize("compiled", [False, True])
def test_lora_of_mlx_lm(monkeypatch: pytest.MonkeyPatch, compiled: bool) -> None:
    """As `mlx_lm.lora` trains: its trainer compiles the step, in which mlx-lm's own recurrence runs."""
    from mlx_lm.tuner import trainer, utils

    texts = [(tokens(24, seed=i).tolist(), 0) for i in range(2)]
    reports: dict[bool, list[float]] = {False: [], True: []}
    for ours in (False, True):
        model = build("qwen3_5")
        model.freeze()
        utils.linear_to_lora_layers(model, 4, {"rank": 4, "scale": 8.0, "dropout": 0.0})
        mx.random.seed(1)
        np.random.seed(1)

        class Report:
            def on_train_loss_report(self, info: dict[str, Any], into: list[float] = reports[ours]) -> None:
                into.append(float(info["train_loss"]))

            def on_val_loss_report(self, info: dict[str, Any]) -> None:
                raise AssertionError

        arguments = trainer.TrainingArgs(
            batch_size=2, iters=6, steps_per_report=1, steps_per_eval=100, steps_per_save=100, max_seq_length=32,
            adapter_file=os.devnull,
        )  # fmt: skip
        with adm.enable() if ours else nullcontext():
            before = adm.status().taken
            with monkeypatch.context() as patch:
                patch.setattr(mx, "save_safetensors", lambda *_: None)
                if not compiled:
                    patch.setattr(mx, "compile", lambda f, *_, **__: f)
                trainer.train(
                    model,
                    optimizers.Adam(learning_rate=1e-3),
                    texts,
                    args=arguments,
                    training_callback=Report(),
                )
            assert (adm.status().taken > before) == (ours and not compiled)
    assert len(reports[True]) == 6
    assert reports[True][-1] < reports[True][0]
    np.testing.assert_allclose(reports[True], reports[False], atol=1e-3)


def test_a_compiled_layer_goes_on_to_mlx_lm() -> None:
    layer = build("qwen3_5").layers[0].linear_attn
    x = mx.random.normal((1, 1, 64), key=mx.random.key(0))
    want = layer(x)
    with adm.enable():
        same(mx.compile(lambda x: layer(x))(x), want)
    assert any("mx.compile" in why for why in adm.status().passed_on)


# ---- drafting


def plain(model: Any, n: int, prompt: mx.array) -> list[int]:
    return [int(t) for t, _ in generate.generate_step(prompt, model, max_tokens=n)]


def drafted(
    model: Any, draft: Any, n: int, k: int, prompt: mx.array, **options: Any
) -> tuple[list[int], int]:
    """The text, and how many of its tokens were drafted."""
    out = list(
        generate.speculative_generate_step(prompt, model, draft, max_tokens=n, num_draft_tokens=k, **options)
    )
    return [int(t) for t, _, _ in out], sum(bool(d) for _, _, d in out)


def test_drafted_text_is_the_same(model: Any) -> None:
    """More drafts than the convolution has taps, and fewer; drafts that are taken, sometimes taken, and never."""
    prompt = tokens(11)
    with refused():
        drafted(model, model, 4, 2, prompt)
    want = plain(model, 20, prompt)
    accepted = []
    with adm.enable():
        assert plain(model, 20, prompt) == want
        for draft, k in (
            (model, 2),
            (worse(model, 0.03), 5),
            (worse(model, 0.1), 3),
            (build("qwen3_5", 9), 1),
        ):
            text, taken = drafted(model, draft, 20, k, prompt)
            assert text == want
            accepted.append(taken)
        assert drafted(model, worse(model, 0.2), 8, 3, prompt[:1])[0] == plain(model, 8, prompt[:1])
    assert accepted[0] >= 13  # two of every three
    assert 0 < accepted[1] < 17


def test_a_callers_caches_go_on(model: Any) -> None:
    """Chat: the caches that were given are mlx-lm's own again, and hold what was said, to the token."""
    prompt, more = tokens(7), tokens(3, seed=2)
    draft = worse(model, 0.2)
    with adm.enable():
        caches = theirs.make_prompt_cache(model) + theirs.make_prompt_cache(draft)
        text, _ = drafted(model, draft, 9, 3, prompt, prompt_cache=caches)
        assert not any(isinstance(c, RollbackCache) for c in caches)
        mine = caches[: len(model.layers)]
        seen = next(c for c in mine if isinstance(c, theirs.KVCache)).offset
        said = mx.concatenate([prompt, mx.array(text)])
        want = model(mx.concatenate([said[:seen], more])[None])[:, -3:]
        same(model(more[None], cache=mine), want)


def test_trim_is_exact_at_every_step(model: Any) -> None:
    """Prompts longer and shorter than the depth, tokens one by one, trims in between, against a run without them."""
    x = tokens(2, 24)
    with adm.enable():
        want = in_pieces(model, x, model.make_cache(), list(range(1, 25)))
        for depth, prompt in ((6, 11), (6, 3), (1, 5), (9, 1)):
            caches = adm.make_prompt_cache(model, depth)
            model(x[:, :prompt], cache=caches)
            at = prompt
            for ahead, back in ((4, 3), (1, 1), (1, 0), (1, 0), (2, 4), (6, 6), (3, 1), (2, 3)):
                back = min(back, depth)
                model(x[:, at : at + ahead], cache=caches)
                assert theirs.trim_prompt_cache(caches, back) == back
                at += ahead - back
                probe = copy.deepcopy(caches)
                same(model(x[:, at : at + 2], cache=probe), want[:, at : at + 2])


def test_trim_to_nothing_and_no_further(model: Any) -> None:
    x = tokens(1, 6)
    with adm.enable():
        caches = adm.make_prompt_cache(model, 4)
        model(x[:, :3], cache=caches)
        linear = next(c for c in caches if isinstance(c, RollbackCache))
        assert linear.recorded == 3
        size = linear.nbytes
        with pytest.raises(
            ValueError, match=r"requires at most 3 tokens, those recorded \(4 at most\); got 4"
        ):
            linear.trim(4)
        assert linear.recorded == 3
        theirs.trim_prompt_cache(caches, 3)
        assert linear.empty()
        assert linear.nbytes < size
        same(model(x, cache=caches), model(x))
        assert linear.recorded == 4


def test_what_ends_the_way_back() -> None:
    model = build("qwen3_5")
    with adm.enable():
        caches = adm.make_prompt_cache(model, 4)
        model(tokens(2, 6), cache=caches)
        linear = next(c for c in caches if isinstance(c, RollbackCache))
        for change in (
            lambda c: c.filter(mx.array([0])),
            lambda c: c.extend(c),
            lambda c: c.__setitem__(0, c[0]),
            lambda c: setattr(c, "state", c.state),
            lambda c: (c.prepare(lengths=[3, 3]), model.layers[0].linear_attn(mx.zeros((2, 3, 64)), None, c)),
        ):
            c = copy.deepcopy(linear)
            assert c.recorded == 4
            change(c)
            assert c.recorded == 0
            assert c.is_trimmable()
        one = [linear.extract(i) for i in (0, 1)]
        assert {type(c) for c in (*one, RollbackCache.merge(one))} == {theirs.ArraysCache}
    c = copy.deepcopy(linear)
    model.layers[0].linear_attn(mx.zeros((2, 3, 64)), None, c)  # mlx-lm alone goes on, and records nothing
    assert c.recorded == 0
    with adm.enable(), pytest.raises(ValueError, match="requires at most 0 tokens"):
        c.trim(1)


def test_left_padding_is_trimmed_too() -> None:
    model = build("qwen3_5")
    with adm.enable():
        cache = RollbackCache(2, 3, left_padding=[0, 2])
        layer, x = model.layers[0].linear_attn, mx.random.normal((2, 5, 64), key=mx.random.key(0))
        layer(x, cache.make_mask(5), cache)
        want = cache.left_padding.tolist()
        layer(x[:, :2], cache.make_mask(2), cache)
        cache.trim(2)
        assert cache.left_padding.tolist() == want
        assert want == ([-5, -3] if cache.advances else [0, 2])


def test_caches_that_cannot_be_made() -> None:
    for bad in (0, True, 1.5):
        with pytest.raises(ValueError, match="rollback must be a number of tokens >= 1"):
            adm.make_prompt_cache(build("qwen3_5"), bad)
    module = importlib.import_module("mlx_lm.models.mamba")
    mamba = module.Model(module.ModelArgs("mamba", 64, 32, 64, 8, 1, 4, False, False, 4))
    with pytest.raises(ValueError, match=r"got mlx_lm\.models\.mamba with layers 0 \(ArraysCache\)"):
        adm.make_prompt_cache(mamba, 2)
    with adm.enable(), refused():
        drafted(mamba, mamba, 4, 2, tokens(3))


# ---- on and off


def test_enable_and_disable() -> None:
    module = importlib.import_module("mlx_lm.models.qwen3_5")
    layer = module.GatedDeltaNet
    held = [
        (module, "gated_delta_update"), (layer, "__call__"), (generate, "speculative_generate_step"),
    ]  # fmt: skip
    before = [owner.__dict__[name] for owner, name in held]
    with adm.enable():
        inside = [owner.__dict__[name] for owner, name in held]
        assert not any(a is b for a, b in zip(before, inside, strict=True))
        with adm.enable(), adm.disable():
            assert [owner.__dict__[name] for owner, name in held] == before
        assert [owner.__dict__[name] for owner, name in held] == inside
        assert "on" in str(adm.status()).splitlines()[0]
    assert [owner.__dict__[name] for owner, name in held] == before
    adm.disable()


def test_someone_elses_function_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("mlx_lm.models.qwen3_5")
    original = module.gated_delta_update
    switch = adm.enable()
    module.gated_delta_update = other = object()
    with (
        pytest.warns(RuntimeWarning, match=r"qwen3_5\.gated_delta_update was replaced by other code"),
        switch,
    ):
        pass
    assert module.gated_delta_update is other
    module.gated_delta_update = original


def test_blocks_that_overlap() -> None:
    def steps() -> Iterator[None]:
        with adm.enable():
            yield

    a, b = steps(), steps()
    next(a)
    next(b)
    a.close()
    assert adm.status().enabled
    with adm.disable():
        assert not adm.status().enabled
        b.close()
    assert not adm.status().enabled
    with adm.enable():
        adm.enable()
    assert adm.status().enabled
    adm.disable()


def test_what_others_wrapped_follows_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The function, the layer's call, and a generator that begins when it is first asked."""
    module = importlib.import_module("mlx_lm.models.qwen3_5")
    model, prompt = build("qwen3_5"), tokens(5)
    want = model(prompt[None])
    places = [(module, "gated_delta_update"), (module.GatedDeltaNet, "__call__")]
    for owner, name in places:  # put back at the end of the test
        monkeypatch.setattr(owner, name, getattr(owner, name))
    adm.enable()
    for owner, name in places:
        ours = getattr(owner, name)
        setattr(owner, name, lambda *args, _ours=ours, **how: _ours(*args, **how))
    taken = adm.status().taken
    same(model(prompt[None]), want)
    assert adm.status().taken > taken
    late = generate.speculative_generate_step(prompt, model, model, max_tokens=2)
    with pytest.warns(RuntimeWarning, match="was replaced by other code"):
        adm.disable()
    before = adm.status()
    assert mx.array_equal(model(prompt[None]), want)
    with refused():
        next(late)
    assert adm.status() == before


def test_a_saved_cache_is_loaded_as_a_plain_one(model: Any, tmp_path: Path) -> None:
    x = tokens(1, 9)
    with adm.enable():
        caches = adm.make_prompt_cache(model, 4)
        model(x[:, :6], cache=caches)
        assert copy.deepcopy(caches[0]).recorded == 4
        theirs.save_prompt_cache(str(tmp_path / "a.safetensors"), caches)
        again = theirs.load_prompt_cache(str(tmp_path / "a.safetensors"))
        assert theirs.ArraysCache in {type(c) for c in again}
        same(model(x[:, 6:], cache=again), model(x[:, 6:], cache=caches))


def test_missing_packages() -> None:
    code = (
        "import sys; sys.modules[{!r}] = None\n"
        "import anydelta.integrations.mlx_lm as adm\n"
        "try: adm.enable()\nexcept ImportError as error: print(error)"
    )
    for name in ("mlx.core", "mlx_lm"):
        done = subprocess.run(
            [sys.executable, "-c", code.format(name)], capture_output=True, text=True, check=True
        )
        assert f"requires mlx and mlx-lm; got no {name}" in done.stdout


def test_a_family_that_does_not_fit_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Absent, with other arguments, without its layer: each has its reason, and the others are found."""
    models = "mlx_lm.models"
    monkeypatch.setattr(
        importlib.import_module(f"{models}.kimi_linear"), "gated_delta_update", lambda q, k: None
    )
    monkeypatch.delattr(importlib.import_module(f"{models}.qwen3_next"), "Qwen3NextGatedDeltaNet")
    rows = (*families.FAMILIES, families.Family("tomorrow", "Layer", ()))
    monkeypatch.setattr(families, "FAMILIES", rows)
    found, left = families.look()
    assert left["kimi_linear"].startswith("its gated_delta_update takes (q, k) and not (q, k, v, a, b")
    assert left["qwen3_next"] == (
        "it has no Qwen3NextGatedDeltaNet(x, mask, cache): the rule is anydelta's, but it cannot draft"
    )
    assert left["tomorrow"] == "this mlx-lm does not have it"
    names = [f.name for f in found]
    assert "kimi_linear" not in names
    assert next(f for f in found if f.name == "qwen3_next").layer is None
    assert next(f for f in found if f.name == "qwen3_5").layer is not None


def test_status_says_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adm, "_families", lambda: ([], {"tomorrow": "this mlx-lm does not have it"}))
    assert "left as it is: tomorrow: this mlx-lm does not have it" in str(adm.status())


def test_a_family_without_a_row_has_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """Found by the function that its module calls."""
    monkeypatch.setattr(families, "FAMILIES", tuple(f for f in families.FAMILIES if f.name != "qwen3_5"))
    found, left = families.look()
    assert next(f for f in found if f.name == "qwen3_5").layer is None
    assert "qwen3_5" not in left


def test_a_step_that_a_layer_compiles_follows_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    """kimi_k3 compiles its decode step on Metal, with the functions that are there then."""
    if "kimi_k3" not in FAMILIES:
        pytest.skip("this mlx-lm has no kimi_k3")
    model, x = build("kimi_k3"), tokens(1, 6)
    want = in_pieces(model, x, model.make_cache(), [4, 5, 6])
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    same(in_pieces(model, x, model.make_cache(), [4, 5, 6]), want)  # compiled, and theirs
    before = adm.status().taken
    with adm.enable():
        same(in_pieces(model, x, model.make_cache(), [4, 5, 6]), want)
        cache = adm.make_prompt_cache(model, rollback=2)
        same(in_pieces(model, x, cache, [4, 5, 6]), want)
        trim = theirs.trim_prompt_cache(cache, 2)
        assert trim == 2
        same(model(x[:, 4:5], cache=cache), want[:, 4:5])
    taken = adm.status().taken
    assert taken > before
    same(in_pieces(model, x, model.make_cache(), [4, 5, 6]), want)
    assert adm.status().taken == taken


def test_reasons() -> None:
    q, v = mx.zeros((1, 1, 1, 8)), mx.zeros((1, 1, 1, 8))
    assert functions._why_not(q, v, None, True, {}) is None
    assert "float16" in str(functions._why_not(q, v.astype(mx.float16), None, True, {}))
    assert "state" in str(functions._why_not(q, v, v.astype(mx.float16), True, {}))
    assert functions._why_not(q, v, None, True, {"scale": 2.0}) == "the argument scale"
    assert functions._why_not(q, v, None, True, {"scale": None, "lower_bound": -5.0}) is None
