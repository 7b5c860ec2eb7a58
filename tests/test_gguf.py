"""GGUF files: written, opened by Transformers with packed weights, refused in one sentence.

The files are the repository's model, which `anydelta gguf write` makes here. Logits are compared with those of the
numbers that a file holds, as Transformers alone loads it.
"""

from __future__ import annotations

import functools
import json
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import anydelta.integrations.transformers as adt  # noqa: E402
from anydelta.bench.measure.model import QUANTISED_ERROR  # noqa: E402
from anydelta.generate import gguf_file  # noqa: E402
from anydelta.generate.checkpoint import REPOSITORY_MODEL, open_checkpoint  # noqa: E402
from anydelta.ggml.library import PACKAGES, folders, library  # noqa: E402
from anydelta.gguf import mixes, names, write  # noqa: E402
from conftest import CPU_REASONS, run_program, without  # noqa: E402

if CPU_REASONS:
    pytest.skip("; ".join(CPU_REASONS), allow_module_level=True)  # tests/test_cpu.py fails then
if not folders():
    without(f"ggml's library is not here (pip install {next(iter(PACKAGES.values()))})")
if why := write.missing():
    without(why)
if not REPOSITORY_MODEL.is_dir():
    without("examples/tiny_model is not here: a clone has it, an sdist does not")

from anydelta.integrations.transformers import gguf, gguf_layers  # noqa: E402

LAYERS = 8
BOUND = QUANTISED_ERROR * (2 * LAYERS) ** 0.5
PROMPT = "And it came to pass in those days, that 12 men"
TYPES = ("Q8_0", "Q4_K_M", "F32", "BF16")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("gguf")


@pytest.fixture(scope="module")
def file(folder):
    @functools.cache
    def make(kind: str) -> Path:
        path = folder / f"tiny-{kind}.gguf"
        done = run_program("gguf", "write", str(REPOSITORY_MODEL), "--type", kind, "-o", str(path))
        assert done.exit_code == 0, done.output
        return path

    return make


@pytest.fixture(scope="module")
def opened(file):
    return functools.cache(lambda kind, packed=True: open_checkpoint(str(file(kind)), packed=packed))


@pytest.fixture(scope="module")
def tiny():
    return open_checkpoint(str(REPOSITORY_MODEL))


def ids(opened, text: str = PROMPT) -> torch.Tensor:
    return opened.tokenizer(text, return_tensors="pt").input_ids


@torch.no_grad()
def logits(model, x: torch.Tensor, step: int | None = None) -> torch.Tensor:
    """Of a prompt in one go, or of its tokens `step` at a time."""
    if step is None:
        return model(x).logits
    cache, found = None, []
    for begin in range(0, x.shape[1], step):
        out = model(x[:, begin : begin + step], cache=cache, use_cache=True)
        cache = out.past_key_values if "past_key_values" in out else out.cache
        found.append(out.logits)
    return torch.cat(found, 1)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def written(model, x: torch.Tensor, n: int = 40, **more) -> list[int]:
    out = model.generate(x, max_new_tokens=n, do_sample=False, pad_token_id=0, **more)
    return out[0, x.shape[1] :].tolist()


# ---- What is written


@pytest.mark.parametrize("kind", TYPES)
def test_a_file_holds_the_model(kind, file, tiny):
    """As numbers, by Transformers alone: every weight, to within its type."""
    stock = open_checkpoint(str(file(kind)), packed=False)
    x = ids(tiny)
    assert torch.equal(ids(stock), x)
    own, other = tiny.model.state_dict(), stock.model.state_dict()
    assert own.keys() == other.keys()
    bits = {"F32": 0, "BF16": 0.004, "Q8_0": 0.008, "Q4_K_M": 0.09}[kind]
    for name, w in own.items():
        assert relative(other[name].float(), w) <= bits + 1e-6, name
    if kind == "F32":
        assert torch.allclose(logits(stock.model, x), logits(tiny.model, x), atol=1e-4)


def test_the_header_says_what_is_inside(file):
    done = run_program("gguf", "show", str(file("Q4_K_M")), "--json")
    told = json.loads(done.stdout)
    assert told["architecture"] == "qwen35"
    assert told["kind"] == "Q4_K_M"
    assert told["mtp_layers"] == 2
    assert told["parameters"] == 2097008
    assert "tiny_model" in run_program("gguf", "show", str(file("Q4_K_M"))).stdout


def test_types_are_chosen_as_llama_cpp_chooses_them():
    """Of a model of 24 layers, every fourth with full attention; rows of 1024."""
    layers = [("attn_v" if i % 4 == 3 else "attn_qkv", i) for i in range(24)]
    matrices = [("token_embd.weight", 1024)]
    for what, i in layers:
        matrices += [(f"blk.{i}.{what}.weight", 1024), (f"blk.{i}.ffn_up.weight", 1024)]
        matrices += [(f"blk.{i}.ffn_down.weight", 3584)]
    values = {k.name: k.values for k in library().kinds.values()}
    chosen = mixes.choose("Q4_K_M", matrices, values)
    more = {0, 1, 2, 5, 8, 11, 14, 17, 20, 21, 22, 23}
    assert chosen["token_embd.weight"] == "Q6_K"
    for what, i in layers:
        assert chosen[f"blk.{i}.{what}.weight"] == ("Q6_K" if i in more else "Q4_K")
        assert chosen[f"blk.{i}.ffn_down.weight"] == ("Q6_K" if i in more else "Q4_K")
        assert chosen[f"blk.{i}.ffn_up.weight"] == "Q4_K"
    assert set(mixes.choose("Q8_0", matrices, values).values()) == {"Q8_0"}
    narrow = mixes.choose("Q4_K_M", [("blk.0.ffn_up.weight", 320), ("blk.0.ffn_gate.weight", 8)], values)
    assert list(narrow.values()) == ["Q5_0", "F16"]


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (("--type", "Q9"), "requires --type of Q3_K_S"),
        (("-o", "model.bin"), "requires -o to end in .gguf; got model.bin"),
        (("-o", "no/such/folder/x.gguf"), "whose folder does not exist"),
        (("-t", "0"), "requires --threads from 1 to 1024; got 0"),
    ],
)
def test_what_cannot_be_written_is_one_sentence(given, text):
    done = run_program("gguf", "write", str(REPOSITORY_MODEL), *given)
    assert done.exit_code == 2
    assert text in done.stderr


def test_a_file_that_is_there_stays(file):
    path = file("Q8_0")
    before = path.read_bytes()
    done = run_program("gguf", "write", str(REPOSITORY_MODEL), "--type", "F32", "-o", str(path))
    assert done.exit_code == 2
    assert "requires a new file, or --force" in done.stderr
    assert path.read_bytes() == before


def test_nothing_is_left_of_a_file_that_fails(folder, tiny, monkeypatch):
    monkeypatch.setattr(write, "_stored", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write.write(tiny.model, folder / "half.gguf", "Q8_0", tokenizer=tiny.tokenizer)
    assert not [p for p in folder.iterdir() if "half" in p.name]


def test_a_preset_without_a_tokenizer(folder):
    """Random weights at a true shape; words that nobody reads."""
    config = transformers.Qwen3_5TextConfig(
        vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=32,
        linear_value_head_dim=32, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    path = folder / "random.gguf"
    write.write(model, path, "F32")
    back = open_checkpoint(str(path)).model
    x = torch.randint(0, 300, (1, 9))
    assert torch.allclose(logits(back, x), logits(model, x), atol=1e-5)
    model.config.layer_types = ["full_attention", "linear_attention"] * 2
    assert "layers in the order full_attention" in (names.irregular(model.config) or "")


def test_experts_stay_in_their_blocks(folder):
    config = transformers.Qwen3_5MoeTextConfig(
        vocab_size=300, hidden_size=64, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1, head_dim=32,
        linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=32, linear_value_head_dim=32,
        moe_intermediate_size=32, shared_expert_intermediate_size=32, num_experts=8, num_experts_per_tok=2,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    path = folder / "experts.gguf"
    write.write(model, path, "Q8_0")
    back = open_checkpoint(str(path))
    assert "GgufExperts" in {type(m).__name__ for m in back.model.modules()}
    stock = open_checkpoint(str(path), packed=False).model
    x = torch.randint(0, 300, (1, 12))
    with adt.enable():
        for step in (None, 1):
            assert relative(logits(back.model, x, step), logits(stock, x)) < BOUND


# ---- What is opened


@pytest.mark.parametrize("step", [None, 1, 3, 40])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K_M"])
def test_logits_are_those_of_the_numbers(kind, step, opened):
    packed, stock = opened(kind), opened(kind, False)
    assert "GgufLinear" in {type(m).__name__ for m in packed.model.modules()}
    x = ids(packed).repeat(1, 5)
    want = logits(stock.model, x)
    with adt.enable():
        error = relative(logits(packed.model, x, step), want)
    assert 0 < error < BOUND


def test_the_weights_take_the_files_bytes(opened, file):
    model = opened("Q8_0").model
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    assert held < 1.05 * file("Q8_0").stat().st_size


def test_a_few_tokens_run_in_chains(opened, monkeypatch):
    """And the calls of the mixer are counted as those of other models are."""
    packed, seen = opened("Q8_0"), []
    run = gguf_layers._Layer.run
    monkeypatch.setattr(gguf_layers._Layer, "run", lambda self, *a: seen.append(1) or run(self, *a))
    with adt.enable():
        before = adt.status().taken.get("qwen3_5.mixer", 0)
        logits(packed.model, ids(packed)[:, :3], 1)
        after = adt.status().taken["qwen3_5.mixer"]
    assert len(seen) == 3 * LAYERS
    assert after - before == 3 * 6


def test_models_of_numbers_are_left_alone(opened, tiny, monkeypatch):
    opened("Q8_0")  # from here on decoder layers are looked at
    monkeypatch.setattr(gguf_layers._Layer, "run", lambda *_: pytest.fail("a chain ran"))
    with adt.enable():
        logits(tiny.model, ids(tiny)[:, :3], 1)


def test_a_hook_sees_what_it_would_see(opened):
    packed, seen = opened("Q8_0"), []
    x = ids(packed)[:, :4]
    with adt.enable():
        want = logits(packed.model, x, 1)
        part = packed.model.model.layers[0].mlp.up_proj
        handle = part.register_forward_hook(lambda m, i, o: seen.append(o.shape))
        try:
            got = logits(packed.model, x, 1)
        finally:
            handle.remove()
    assert len(seen) == 4
    assert relative(got, want) < BOUND


@pytest.mark.parametrize("name", ["linear_attn", "mlp.act_fn", "mlp", "input_layernorm", "mlp.down_proj"])
def test_a_hook_has_its_effect_at_any_length(name, opened):
    """One token, some, and many go different ways through a layer."""
    model = opened("Q8_0").model
    part = model.model.layers[1].get_submodule(name)
    x = ids(opened("Q8_0")).repeat(1, 2)
    with adt.enable():
        for n in (1, 3, 12, 20):
            before = logits(model, x[:, :n])
            handle = part.register_forward_hook(lambda m, i, o: o * 0)
            try:
                assert relative(logits(model, x[:, :n]), before) > 1e-4
            finally:
                handle.remove()
            assert torch.equal(logits(model, x[:, :n]), before)


def test_autocast(opened):
    packed, stock = opened("Q8_0"), opened("Q8_0", False)
    x = ids(packed).repeat(1, 2)
    want = logits(stock.model, x)
    with adt.enable(), torch.autocast("cpu", torch.bfloat16):
        for step in (None, 1):
            assert relative(logits(packed.model, x, step).float(), want) < 2 * BOUND


def test_copies_know_their_file(opened, monkeypatch, tmp_path):
    import copy

    twin = copy.deepcopy(opened("Q8_0").model)
    monkeypatch.chdir(tmp_path)
    with adt.enable():
        assert len(written(twin, ids(opened("Q8_0")), 4, use_mtp=True)) == 4


def test_the_file_that_was_named_is_opened(file, folder, tmp_path, monkeypatch):
    """Not one of the same name in the current folder."""
    other = tmp_path / "sub" / "model.gguf"
    other.parent.mkdir()
    other.write_bytes(file("Q8_0").read_bytes())
    (tmp_path / "model.gguf").write_bytes(b"GGUF junk")
    monkeypatch.chdir(tmp_path)
    done = run_program("generate", "-m", "sub/model.gguf", "-n", "2", "x")
    assert done.exit_code == 0, done.output


def test_a_weight_that_is_replaced_counts(opened):
    import copy

    model = copy.deepcopy(opened("Q8_0").model)
    x = ids(opened("Q8_0"))[:, :2]
    with adt.enable():
        before = logits(model, x, 1)
        down = model.model.layers[-1].mlp.down_proj
        down.weight = torch.nn.Parameter(torch.zeros_like(down.weight), requires_grad=False)
        other = logits(model, x, 1)
        assert relative(other, before) > 0.01
        assert relative(logits(opened("Q8_0").model, x, 1), before) < 1e-6


def test_generation_drafts_and_the_switch(opened):
    packed = opened("Q4_K_M")
    x = ids(packed)
    with adt.enable():
        want = written(packed.model, x)
        assert written(packed.model, x, use_mtp=True)[:8] == want[:8]
        assert written(packed.model, x, prompt_lookup_num_tokens=4)[:8] == want[:8]
    assert written(packed.model, x)[:8] == want[:8]  # Transformers' linear attention on the packed weights
    with adt.enable(packed.model):
        assert written(packed.model, x) == want


def test_disabled_the_loader_is_transformers_own(file):
    with adt.enable(), adt.disable(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(
            str(file("Q8_0").parent), gguf_file=file("Q8_0").name
        )
    assert "GgufLinear" not in {type(m).__name__ for m in model.modules()}


@pytest.mark.parametrize(
    ("device_map", "accelerator", "packs"),
    [
        (None, False, True),
        (None, True, False),
        ("auto", True, False),
        ("cpu", True, True),
        ({"": "cpu"}, True, True),
        ("cuda:0", False, False),
        ({"a": "cpu", "b": 0}, True, False),
    ],
)
def test_what_goes_to_an_accelerator_is_left_to_transformers(device_map, accelerator, packs, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: accelerator)
    assert gguf.runs_on_cpu(device_map) is packs


def test_a_model_that_will_be_moved_holds_numbers(file, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    path, auto = file("Q8_0"), transformers.AutoModelForCausalLM
    given = dict(gguf_file=str(path))
    with adt.enable():
        moved = auto.from_pretrained(str(path.parent), **given)
        stays = auto.from_pretrained(str(path.parent), device_map="cpu", **given)
    kinds = [{type(m).__name__ for m in model.modules()} for model in (moved, stays)]
    assert ["GgufLinear" in names for names in kinds] == [False, True]
    part = stays.model.layers[0].mlp.up_proj
    assert not any("forward" in m.__dict__ for m in stays.modules())  # no hooks that move things
    part.weight = torch.nn.Parameter(part.weight.to("meta"), requires_grad=False)
    with (
        adt.enable(),
        pytest.raises(RuntimeError, match=r"requires blocks of a GGUF file on the CPU.*on meta"),
    ):
        part(torch.zeros(1, 128))


def test_without_ggml_the_loader_is_transformers_own(file, monkeypatch):
    def missing():
        raise gguf.GgmlError("gguf: requires ggml's library; got none")

    monkeypatch.setattr(gguf, "library", missing)
    with (
        adt.enable(),
        pytest.warns(RuntimeWarning, match="Transformers unpacks the GGUF weights"),
    ):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            str(file("Q8_0").parent), gguf_file=file("Q8_0").name
        )
    assert "GgufLinear" not in {type(m).__name__ for m in model.modules()}


def test_other_dtypes(file):
    model = open_checkpoint(str(file("Q8_0")), "bfloat16").model
    stock = open_checkpoint(str(file("Q8_0")), "float32", packed=False).model
    x = torch.arange(3, 20)[None]
    with adt.enable():
        assert relative(logits(model, x).float(), logits(stock, x)) < 2 * BOUND
        assert relative(logits(model, x, 1).float(), logits(stock, x)) < 2 * BOUND


def test_perplexity_of_eight_bits_is_that_of_the_folder(opened, tiny):
    text = (REPOSITORY_MODEL.parents[1] / "LICENSE").read_text()[:3000]
    x = ids(tiny, text)

    def perplexity(model) -> float:
        out = logits(model, x)[0, :-1]
        return float(torch.nn.functional.cross_entropy(out, x[0, 1:]).exp())

    with adt.enable():
        assert perplexity(opened("Q8_0").model) == pytest.approx(perplexity(tiny.model), rel=0.005)


def test_torch_compile_sees_operators(opened):
    packed = opened("Q8_0")
    linear = packed.model.model.layers[0].mlp.up_proj
    x = torch.randn(2, 128)
    with torch.no_grad():
        want = linear(x)
        compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), want)


# ---- What is refused


def cut(source: Path, to: Path, size: int) -> Path:
    to.write_bytes(source.read_bytes()[:size])
    return to


def edited(source: Path, to: Path, key: bytes, other: bytes) -> Path:
    data = source.read_bytes()
    assert key in data
    to.write_bytes(data.replace(key, other, 1))
    return to


def test_files_that_cannot_be_opened_are_one_sentence(file, folder, monkeypatch):
    source = file("Q8_0")
    size = source.stat().st_size
    (folder / "other.gguf").write_bytes(b"version https://git-lfs\n")
    wrong = {
        folder / "none.gguf": "which does not exist",
        folder / "other.gguf": "begins with other bytes",
        cut(source, folder / "short.gguf", 2000): "cut off or damaged",
        cut(source, folder / "half.gguf", size // 2): f"of {size // 2} bytes where its header tells of",
        edited(source, folder / "arch.gguf", struct.pack("<Q", 6) + b"qwen35", struct.pack("<Q", 6) + b"mamba2"):
            "requires a GGUF file of lfm2, qwen35, qwen35moe",
        edited(source, folder / "words.gguf", b"tokenizer.ggml.merges", b"tokenizer.ggml.merged"):
            "without tokenizer.ggml.merges",
    }  # fmt: skip
    for path, text in wrong.items():
        done = run_program("generate", "-m", str(path), "x")
        assert done.exit_code == 2, done.output
        assert text in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
    monkeypatch.setattr(gguf_file, "available_memory", lambda: 1 << 20)
    done = run_program("generate", "-m", str(source), "x")
    assert done.exit_code == 2
    assert "GiB of memory for" in done.stderr


def test_a_file_without_a_tensor_is_refused(file, folder):
    path = edited(file("F32"), folder / "lacks.gguf", b"blk.2.ffn_up.weight", b"blk.2.ffn_xx.weight")
    with pytest.raises(
        gguf_file.Refused, match=r"without 1 of them, such as model\.layers\.2\.mlp\.up_proj\.weight"
    ):
        gguf_file.load(path)
    upper = folder / "T.GGUF"
    upper.write_bytes(file("Q8_0").read_bytes())
    with pytest.raises(gguf_file.Refused, match=r"whose name ends in \.gguf"):
        gguf_file.check(upper)


def test_every_cut_of_a_file_is_refused(file, folder):
    """At any byte of its header, and of its data."""
    source = file("Q8_0")
    size = source.stat().st_size
    for at in [*np.random.default_rng(0).integers(0, 60000, 40).tolist(), size - 1]:
        with pytest.raises(gguf_file.Refused, match=r"requires a (whole )?GGUF file"):
            gguf_file.check(cut(source, folder / "cut.gguf", int(at)))


# ---- Commands


def test_generate_writes_from_a_file(file):
    done = run_program("generate", "-m", str(file("Q8_0")), "-n", "8", "--json", PROMPT)
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert len(told["tokens"]) == 8
    assert told["dtype"] == "float32"


def test_the_benchmark_has_llama_benchs_columns(file, tmp_path):
    out = tmp_path / "out.md"
    done = run_program(
        "bench", "model", "-m", str(file("Q8_0")), "-c", "anydelta", "-p", "20", "-n", "3", "-r", "1", "-t", "1",
        "-o", str(out),
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    lines = [line for line in out.read_text().splitlines() if line.startswith("|")]
    assert lines[0].startswith("| model | size | params | backend | threads | test | t/s |")
    assert [line.split("|")[4].strip() for line in lines[2:]] == ["transformers", "anydelta"] * 2
    assert "qwen35 Q8_0" in lines[2]


def test_gradient_checkpointing_of_other_models(opened):
    """Transformers checkpoints a layer only if its class has the forward that it wrapped."""
    opened("Q8_0")
    model = transformers.AutoModelForCausalLM.from_pretrained(str(REPOSITORY_MODEL)).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    seen = []
    model.model.layers[0].input_layernorm.register_forward_pre_hook(lambda *_: seen.append(1))
    with adt.enable():
        model(torch.arange(5, 25)[None], use_cache=False).logits.sum().backward()
    assert len(seen) == 2
