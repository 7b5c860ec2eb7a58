"""`anydelta generate`: the text and the figures, and one clear sentence for everything that cannot be opened or run."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import anydelta  # noqa: E402
from anydelta.generate import checkpoint, write  # noqa: E402
from conftest import CPU_REASONS, run_program  # noqa: E402

MODEL = checkpoint.REPOSITORY_MODEL
if not MODEL.is_dir():
    pytest.skip("the repository's model is not here", allow_module_level=True)
native = pytest.mark.skipif(bool(CPU_REASONS), reason="; ".join(CPU_REASONS) or "runs")

PROMPT = "In the beginning"


@pytest.fixture
def program() -> Any:
    """program(*args) -> (exit code, stdout, stderr) of `anydelta generate`"""
    return partial(run_program, "generate")


@pytest.fixture(scope="module")
def opened() -> checkpoint.Opened:
    return checkpoint.open_checkpoint(checkpoint.default_model())


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MODEL, tmp_path / "model"))


def changed(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@native
def test_both_ways_write_the_same_and_say_how_fast(program: Any) -> None:
    code, out, err = program("--compare", "-n", "12", "-t", "1", PROMPT)
    assert code == 0
    first, second = out.removeprefix("--- transformers\n").split("\n--- anydelta\n")
    assert first.strip("\n") == second.strip("\n") != ""
    assert "the same, token for token (12 tokens)" in err
    assert "tokens/s" in err
    assert "falling back" not in err


@native
@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
def test_packed_matrices_write_the_same(program: Any) -> None:
    code, out, err = program("--pack", "--compare", "-n", "12", "-t", "1", PROMPT)
    assert code == 0, err
    assert "--- anydelta, packed\n" in out
    assert "the same, token for token (12 tokens)" in err


@native
def test_a_compiled_step_writes_the_same(opened: checkpoint.Opened) -> None:
    way = write.compiled(write.with_anydelta())
    way.options["compile_config"].backend = "eager"  # the graph is what is tested, not inductor's minutes
    want = write.write(opened, PROMPT, write.PLAIN, {"max_new_tokens": 8})
    got = write.write(opened, PROMPT, way, {"max_new_tokens": 8})
    assert got.tokens == want.tokens
    assert got.way == "anydelta, compiled"
    assert got.compile_s > 0


@native
def test_a_difference_exits_1(program: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bent = write.Way("anydelta", options={"repetition_penalty": 2.0})
    monkeypatch.setattr(write, "with_anydelta", lambda: bent)
    code, _, err = program("--compare", "-n", "24", PROMPT)
    assert code == 1
    assert "the two texts differ from new token" in err


@native
def test_anydelta_is_what_runs_and_only_meanwhile(opened: checkpoint.Opened) -> None:
    import anydelta.integrations.transformers as adt

    before = adt.status().taken
    write.write(opened, PROMPT, write.PLAIN, {"max_new_tokens": 2})
    assert adt.status().taken == before
    write.write(opened, PROMPT, write.with_anydelta(), {"max_new_tokens": 2})
    assert adt.status().taken != before
    assert not adt.status(opened.model).layers


@native
def test_the_commands_of_the_documents_run(program: Any) -> None:
    root = Path(__file__).parent.parent
    text = (root / "README.md").read_text(encoding="utf-8")
    recipes = (root / "Makefile").read_text(encoding="utf-8").replace("$(DEMO_PROMPT)", '"In those days"')
    text += "\n".join(line for line in recipes.splitlines() if line.startswith("\t"))
    found = re.findall(r"anydelta generate (.*?)(?: +#.*)?$", text, re.MULTILINE)
    assert len(found) >= 4
    for line in dict.fromkeys(found):
        if ".gguf" in line:  # tests/test_gguf.py
            continue
        code, out, err = program(*shlex.split(line), "-n", "4")
        assert code == 0, err
        assert out


def test_the_record_is_alone_on_stdout(program: Any) -> None:
    code, out, _ = program("--plain", "--json", "-n", "5", "--threads", "1", PROMPT)
    found = json.loads(out)
    assert code == 0
    assert found["way"] == "transformers"
    assert found["threads"] == 1
    assert found["stop"] == "length"
    assert len(found["tokens"]) == 5
    assert found["first_token_s"] > 0
    assert found["tokens_per_s"] > 0


def test_the_stream_is_the_text(opened: checkpoint.Opened) -> None:
    pieces: list[str] = []
    done = write.write(opened, PROMPT, write.PLAIN, {"max_new_tokens": 16}, show=pieces.append)
    assert "".join(pieces) == done.text
    assert len(pieces) > 4
    want = opened.model.generate(
        **opened.tokenizer(PROMPT, return_tensors="pt"), max_new_tokens=16, do_sample=False
    )
    assert done.tokens == want[0, -16:].tolist()


def test_characters_of_several_tokens_are_shown_whole() -> None:
    class Bytes:
        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            return bytes(ids).decode("utf-8", errors="replace")

    pieces: list[str] = []
    stream = write._Stream(Bytes(), pieces.append)
    stream.put(torch.tensor([[1, 2]]))  # the prompt
    for byte in "aé😀".encode():
        stream.put(torch.tensor([byte]))
    stream.end()
    assert pieces == ["a", "é", "😀"]


def test_a_seed_repeats_and_options_count(opened: checkpoint.Opened) -> None:
    def draw(seed: int, **options: Any) -> list[int]:
        options = {"max_new_tokens": 12, "do_sample": True, **options}
        return write.write(opened, PROMPT, write.PLAIN, options, seed=seed).tokens

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    greedy = write.write(opened, PROMPT, write.PLAIN, {"max_new_tokens": 12, "do_sample": False}).tokens
    assert draw(1, top_k=1) == greedy


def test_a_way_can_bring_its_own_loop(opened: checkpoint.Opened) -> None:
    seen: dict[str, Any] = {}

    def loop(model: Any, *, input_ids: Any, streamer: Any, **options: Any) -> Any:
        seen.update(options)
        streamer.put(input_ids)
        streamer.put(torch.tensor([5, 6]))
        streamer.end()
        return torch.cat((input_ids, torch.tensor([[5, 6]])), 1)

    way = write.Way("mine", options={"mtp": 2}, generate=loop)
    done = write.write(opened, PROMPT, way, {"max_new_tokens": 9})
    assert done.tokens == [5, 6]
    assert seen["mtp"] == 2
    assert seen["max_new_tokens"] == 9


def test_stop_strings_and_the_end_of_a_chapter(opened: checkpoint.Opened) -> None:
    options = {"max_new_tokens": 60, "stop_strings": [","], "tokenizer": opened.tokenizer}
    done = write.write(opened, PROMPT, write.PLAIN, options)
    assert done.stop == "other"
    assert done.text.rstrip().endswith(",")
    end = opened.model.config.eos_token_id
    assert write._why_it_ended(opened.model, [4, end], 9) == "end"


def test_an_empty_prompt_begins_a_text(opened: checkpoint.Opened) -> None:
    assert write.write(opened, "", write.PLAIN, {"max_new_tokens": 2}).prompt_tokens == 1


# ---- One sentence


def fails(program: Any, text: str, *args: str) -> None:
    code, out, err = program(*args)
    assert code == 2
    assert out == ""
    assert text in err
    assert err.startswith("anydelta generate: ")
    assert len(err.strip().splitlines()) == 1, err


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (("-n", "0", "x"), "requires --max-new-tokens of at least 1; got 0"),
        (("-t", "0", "x"), "requires --threads from 1 to 1024; got 0"),
        (("--plain", "--compare", "x"), "requires one of --plain and --compare; got both"),
        (("--pack", "--compile", "x"), "requires one of --compile and --pack; got both"),
        (("--compile", "--lookup", "4", "x"), "got --compile, whose cache is static"),
        (("--do-sample", "--temperature", "0", "x"), "requires a --temperature above 0; got 0. --greedy"),
        (("--top-p", "0.9", "x"), "requires --do-sample with --top-p; got greedy decoding"),
        (("--plain", "--do-sample", "--top-p", "7", "x"), "requires --top-p above 0 and at most 1; got 7"),
        (("--repetition-penalty", "0", "x"), "requires --repetition-penalty above 0; got 0"),
        (("--dtype", "float64", "x"), "requires a dtype of auto, float32, bfloat16, float16; got 'float64'"),
        (("--plain", "--chat", "x"), "--chat requires a chat template"),
        (("-m", "no/such/folder", "x"), "got no/such/folder, which does not exist"),
        (("-m", "a\0b", "x"), "got a\\x00b, which does not exist"),
        (("-m", "\ud8ff", "x"), "got \\ud8ff, which does not exist"),
        (("-m", "x" * 5000, "x"), "xxx…: File name too long"),
        (
            ("-m", "~nobody-of-that-name/x", "x"),
            "got ~nobody-of-that-name/x: Could not determine home directory",
        ),
        (("-m", "[red]x[/]", "x"), "got [red]x[/], which does not exist"),
        (("-m", "\x1b[31mx", "x"), "got \\x1b[31mx, which does not exist"),
        (("-m", "./nowhere", "x"), "got ./nowhere, which does not exist"),
        (
            ("-m", __file__, "x"),
            "requires a folder with config.json and safetensors, a .gguf file, or a hub name; got the file",
        ),
    ],
)
def test_bad_input(program: Any, args: tuple[str, ...], text: str) -> None:
    fails(program, text, *args)


def test_a_hub_name_without_network(program: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    fails(
        program,
        "the Hugging Face hub was not reached (ConnectionError: no route to host)",
        "-m",
        "no/body",
        "x",
    )


def truncated(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def empty_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def lost_shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    shards = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(shards))


DEEP = "[" * 100_000 + "]" * 100_000
Damage = Callable[[Path], Any]


def written(name: str, content: str | bytes) -> Damage:
    return lambda f: (f / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def generates(**values: Any) -> Damage:
    return written("generation_config.json", json.dumps(values))


def index(name: Any) -> Damage:
    return written("model.safetensors.index.json", json.dumps({"weight_map": {"a": name}}))


def piped(name: str) -> Damage:
    """A pipe, on which a reader would wait for ever."""

    def damage(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return damage


def reweighted(folder: Path, change: Callable[[Any], Any]) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    save_file({k: change(v) for k, v in load_file(file).items()}, file, metadata={"format": "pt"})


def as_integers(folder: Path) -> None:
    reweighted(folder, lambda x: x.to(torch.int32))


def beyond_the_vocabulary(folder: Path) -> None:
    found = json.loads((folder / "tokenizer.json").read_text())
    found["model"]["vocab"] = {k: i + 100_000 * (len(k) == 1) for k, i in found["model"]["vocab"].items()}
    (folder / "tokenizer.json").write_text(json.dumps(found))


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (truncated, "truncated or damaged"),
        (empty_weights, "of 0 bytes, truncated or damaged"),
        (lost_shard, "requires all 2 weight files of model.safetensors.index.json; got none named model-2"),
        (lambda f: (f / "model.safetensors").unlink(), "got no *.safetensors file"),
        (lambda f: (f / "config.json").unlink(), "without a config.json"),
        (lambda f: (f / "config.json").write_text("{"), "requires a readable config.json"),
        (lambda f: changed(f, model_type="nonsense"), "model type `nonsense`"),
        (lambda f: changed(f, model_type="vit"), "requires a class that writes text"),
        (lambda f: changed(f, hidden_size=96), "its tensors have other shapes than its config.json says"),
        (lambda f: changed(f, num_hidden_layers=9, layer_types=None), "requires every tensor of Qwen3_5ForCausalLM"),
        (lambda f: (f / "tokenizer.json").unlink(), "requires a tokenizer beside the model"),
        (lambda f: [x.unlink() for x in f.iterdir()], "without a config.json"),
        (written("model.safetensors", "version https://git-lfs.github.com/spec/v1\n"), "a pointer of Git LFS"),
        (piped("model.safetensors"), "which is none"),
        (piped("config.json"), "without a config.json"),
        (piped("generation_config.json"), "generation_config.json: there is no such file"),
        (as_integers, "requires weights of a floating-point type"),
        (written("config.json", f'{{"a": {DEEP}}}'), "config.json: it is nested too deeply"),
        (written("config.json", '{"a": ' + "[" * 900 + "]" * 900 + "}"), "config.json: it is nested too deeply"),
        (written("config.json", b'{"a": "\xff"}'), "can't decode byte 0xff"),
        (written("config.json", "[]"), "config.json: it holds a list, not an object"),
        (written("tokenizer_config.json", f'{{"a": {DEEP}}}'), "tokenizer_config.json: it is nested too deeply"),
        (written("tokenizer.json", DEEP), "tokenizer.json: it is nested too deeply"),
        (written("generation_config.json", "{"), "requires a readable generation_config.json"),
        (written("generation_config.json", b"\xff"), "requires a readable generation_config.json"),
        (generates(temperature="hot"), "requires temperature to be a number"),
        (written("generation_config.json", '{"temperature": NaN}'), "requires temperature to be a number"),
        (generates(eos_token_id=1.5), "requires eos_token_id to be a whole number"),
        (generates(eos_token_id=["x"]), "requires eos_token_id to be a whole number"),
        (generates(min_new_tokens="5"), "requires min_new_tokens to be a whole number"),
        (generates(top_k=10**30), "requires top_k to be a whole number"),
        (generates(do_sample="maybe"), "requires do_sample to be true or false"),
        (written("model.safetensors.index.json", DEEP), "requires a readable model.safetensors.index.json"),
        (index(5), "got none named 5"), (index("../../etc/passwd"), "got the file name '../../etc/passwd'"),
        (index("x\0.safetensors"), "got the file name 'x\\x00.safetensors'"), (index("x" * 5000), "got the file name"),
        (beyond_the_vocabulary, "requires a tokenizer of the model's 1024 tokens; got token 1000"),
    ],
)  # fmt: skip
def test_a_damaged_or_wrong_checkpoint(program: Any, copied: Path, damage: Any, text: str) -> None:
    damage(copied)
    fails(program, text, "-m", str(copied), "x")


@pytest.mark.parametrize("options", [(), ("--do-sample",), ("--plain",), ("--json",), ("--lookup", "4")])
def test_logits_that_are_nan_exit_1(program: Any, copied: Path, options: tuple[str, ...]) -> None:
    if CPU_REASONS and "--plain" not in options:
        pytest.skip("; ".join(CPU_REASONS))
    reweighted(copied, lambda x: x * float("nan"))
    code, out, err = program("-m", str(copied), *options, "x")
    assert (code, out) == (1, "")
    assert err.startswith("anydelta generate: requires logits that are numbers; got NaN for new token 1.")
    assert err.count("\n") == 1


def test_what_a_model_is_asked_to_return_does_not_count(program: Any, copied: Path) -> None:
    generates(return_dict_in_generate=True)(copied)
    code, out, _ = program("-m", str(copied), "--plain", "-n", "2", PROMPT)
    assert code == 0
    assert out


def test_a_fault_is_blamed_on_whoever_has_it(opened: checkpoint.Opened) -> None:
    def theirs(model: Any, **_: Any) -> Any:
        raise IndexError("index out of range")

    def ours(model: Any, **_: Any) -> Any:
        return anydelta.gated_delta_rule(None, None, None, g=None, beta=None)

    with pytest.raises(
        checkpoint.CheckpointError, match=r"that Transformers runs; got .*: IndexError: index out"
    ):
        write.write(opened, PROMPT, write.Way("theirs", generate=theirs))
    with pytest.raises(TypeError):
        write.write(opened, PROMPT, write.Way("ours", generate=ours))


@native
def test_a_class_without_the_rule(program: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = transformers.LlamaConfig(
        vocab_size=1024, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / name, tmp_path)
    capsys.readouterr()
    fails(program, "requires a model with gated delta rule layers", "-m", str(tmp_path), "x")
    code, _, _ = program("-m", str(tmp_path), "--plain", "-n", "2", "x")
    assert code == 0


def test_the_default_is_the_model_of_the_clone_that_one_is_in(
    program: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An installed package has no model beside it."""
    monkeypatch.setattr(checkpoint, "REPOSITORY_MODEL", tmp_path)
    monkeypatch.chdir(tmp_path)
    fails(program, "requires --model: the default is examples/tiny_model of a clone", "x")
    (tmp_path / "examples/tiny_model").mkdir(parents=True)
    (tmp_path / "examples/tiny_model/config.json").touch()
    assert checkpoint.default_model() == "examples/tiny_model"


@pytest.mark.parametrize("missing", ["torch", "transformers"])
def test_a_missing_package(missing: str) -> None:
    code = (
        "import importlib.util as u; find = u.find_spec\n"
        f"u.find_spec = lambda name, *a: None if name == {missing!r} else find(name, *a)\n"
        "from anydelta.cli import main; main(['generate', 'x'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip() == (
        f"anydelta generate: requires {missing}; got no such package. Run: pip install 'anydelta[transformers]'."
    )
