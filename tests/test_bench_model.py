"""`anydelta bench model`: contenders agree before they are timed, and the printed figures are the measured ones.

No test asserts a time. The models are the repository's, and presets cut to almost nothing.
"""

from __future__ import annotations

import csv
import functools
import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import anydelta.integrations.transformers as adt  # noqa: E402
from anydelta.bench.measure import model, model_report, ops, outputs, profile  # noqa: E402
from anydelta.bench.measure.runners import CompiledRunner, TransformersRunner, prepare  # noqa: E402
from anydelta.bench.measure.runners import Test as Work  # noqa: E402
from anydelta.generate import presets  # noqa: E402
from anydelta.generate.checkpoint import REPOSITORY_MODEL, CheckpointError  # noqa: E402
from anydelta.terminal import Failed  # noqa: E402
from conftest import CPU_REASONS, run_program, without  # noqa: E402

if CPU_REASONS:
    pytest.skip("; ".join(CPU_REASONS), allow_module_level=True)  # tests/test_cpu.py fails then
if not REPOSITORY_MODEL.is_dir():
    without("examples/tiny_model is not here: a clone has it, an sdist does not")

TESTS = (Work("pp", 9), Work("tg", 3), Work("tg", 2, depth=5))
SMALL = dict(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=32,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
)
LINEAR = dict(
    linear_num_key_heads=1, linear_num_value_heads=2, linear_key_head_dim=16, linear_value_head_dim=16
)
MOE = dict(moe_intermediate_size=16, num_experts_per_tok=2)
SHRUNK = {
    "qwen3.5-0.8b": {**SMALL, **LINEAR},
    "qwen3-next": {**SMALL, **LINEAR, **MOE, "num_experts": 4, "shared_expert_intermediate_size": 16},
    "kimi-linear": {
        **{k: v for k, v in SMALL.items() if k != "head_dim"}, **MOE, "num_key_value_heads": 2, "num_local_experts": 4,
        "linear_num_heads": 2, "linear_head_dim": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8, "v_head_dim": 16, "pad_token_id": 0,
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def short_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "CHECK_PROMPT", 12)
    monkeypatch.setattr(model, "CHECK_STEPS", 3)


@pytest.fixture(scope="module")
def tiny() -> presets.Built:
    return presets.build("tiny")


def contenders(built: presets.Built) -> list[Any]:
    make = TransformersRunner
    return [make("transformers", "1", built.model), make("anydelta", "1", built.model, adt.enable)]


def run(built: presets.Built, runners: list[Any], **settings: Any) -> model.Report:
    report = model.Report(ops.describe_machine(), model.Settings(TESTS, rounds=2, **settings))
    model.measure(built, runners, dtype=settings.get("dtype", "float32"), threads=1, settings=report.settings,
                  report=report)  # fmt: skip
    return report


@pytest.fixture(scope="module")
def measured(tiny: presets.Built) -> model.Report:
    return run(tiny, contenders(tiny), profile=True)


def test_every_contender_is_checked_and_timed(measured: model.Report) -> None:
    assert [(r.test, r.contender) for r in measured.records] == [
        (t, c) for t in ("pp9", "tg3", "tg2 @ d5") for c in ("transformers", "anydelta")
    ]
    for r in measured.records:
        assert r.status == "ok"
        assert r.rounds == 2
        assert r.median_tps is not None
        assert r.median_tps > 0
        assert r.ratio_low <= r.ratio <= r.ratio_high
        top, of = r.same_tokens.split("/")
        assert top == of
    assert all(r.ratio == 1 for r in measured.records if r.contender == "transformers")
    assert any(r.logit_error > 0 for r in measured.records if r.contender == "anydelta")


def test_anydelta_runs_in_its_turn_only(tiny: presets.Built) -> None:
    plain, fast = contenders(tiny)
    before = adt.status().taken
    for test in TESTS:
        prepare(test, [plain], tiny)
    assert adt.status().taken == before
    prepare(TESTS[0], [fast], tiny)
    assert adt.status().taken != before
    assert not adt.status(tiny.model).layers


def test_a_compiled_step_goes_back_to_its_context(
    tiny: presets.Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = functools.partial(
        torch.compile, backend="eager"
    )  # the graph is what is tested, not inductor's minutes
    monkeypatch.setattr(torch, "compile", made)
    runners = contenders(tiny)
    runners += [CompiledRunner(f"{r.name}, compiled", "1", tiny.model, 64, r.enabled) for r in runners]
    report = run(tiny, runners, profile=True)
    assert {r.status for r in report.records} == {"ok"}, [r.reason for r in report.records]
    assert {who for p in report.parts for who in p.ms} == {"transformers", "anydelta"}
    step = runners[-1]
    with step.running():
        kept = step.context([5, 6, 7])
        first = step.prompt([8])
        step.restore(kept)
        assert np.array_equal(step.prompt([8]), first)


class Bent(TransformersRunner):
    """Transformers with another result."""

    by = 1e-3
    name = "bent"

    def prompt(self, ids: Any) -> Any:
        logits = super().prompt(ids)
        return logits + self.by * np.abs(logits).max() * np.cos(np.arange(len(logits)))


def test_wrong_logits_are_not_timed(tiny: presets.Built) -> None:
    report = run(tiny, [contenders(tiny)[0], Bent("bent", "1", tiny.model)])
    bent = [r for r in report.records if r.contender == "bent"]
    assert {r.status for r in bent} == {"wrong"}
    assert all("requires a logit error of at most" in r.reason and r.median_tps is None for r in bent)


def test_other_tokens_are_wrong_even_with_close_logits(
    tiny: presets.Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Bent, "logit_error", 10.0)
    monkeypatch.setattr(model, "_margin", lambda logits: np.full(len(logits), np.inf))
    bent = Bent("bent", "1", tiny.model)
    bent.by = 3.0
    report = run(tiny, [contenders(tiny)[0], bent])
    assert "greedy tokens are the same" in report.records[1].reason


def test_a_contender_that_raises_is_a_row(tiny: presets.Built) -> None:
    class Broken(Bent):
        def prompt(self, ids: Any) -> Any:
            raise RuntimeError("no such kernel\nat all")

    report = run(tiny, [contenders(tiny)[0], Broken("broken", "1", tiny.model)])
    assert report.records[1].status == "failed"
    assert report.records[1].reason == "RuntimeError: no such kernel"
    assert report.records[0].median_tps is not None


def test_a_model_that_does_not_run_is_one_sentence(tiny: presets.Built) -> None:
    class Broken(Bent):
        def prompt(self, ids: Any) -> Any:
            raise NotImplementedError("no kernel")

    with pytest.raises(
        Failed, match="requires that broken runs the model; got NotImplementedError: no kernel"
    ):
        run(tiny, [Broken("broken", "1", tiny.model)])


def test_half_types_are_held_to_the_float32_result(tiny: presets.Built) -> None:
    half = presets.build("tiny", "bfloat16")
    before = {k: v.clone() for k, v in half.model.state_dict().items()}
    plain, fast = contenders(half)
    verdicts = model._check(half, [plain, fast, Bent("bent", "1", half.model)], "bfloat16")
    assert [v.status for v in verdicts.values()] == ["ok", "ok", "ok"]  # 1e-3 is less than bfloat16 rounds
    assert verdicts["transformers"].logit_error > 1e-3
    wide = Bent("bent", "1", half.model)
    wide.by = 0.3
    assert model._check(half, [plain, wide], "bfloat16")["bent"].status == "wrong"
    assert all(torch.equal(v, before[k]) for k, v in half.model.state_dict().items())
    # The float32 result is that of a float32 model with these weights.
    with model._upcast(half.model):
        got = model._walk(plain, [5, 6, 7], [8, 9, 10])
    with torch.no_grad():
        want = half.model.float()(torch.tensor([[5, 6, 7, 8, 9, 10]])).logits[0, 2:].numpy()
    assert np.max(np.abs(got - want)) < 1e-4


@pytest.mark.parametrize("name", SHRUNK)
def test_presets_of_every_family_are_profiled(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    preset = next(p for p in presets.PRESETS if p.name == name)
    monkeypatch.setattr(presets, "PRESETS", (replace(preset, sizes={**preset.sizes, **SHRUNK[name]}),))
    built = presets.build(name, layers=4)
    kinds = [
        type(getattr(x, "linear_attn", None) or getattr(x, "self_attn", None))
        for x in built.model.model.layers
    ]
    assert kinds[0] is kinds[1] is kinds[2] is not kinds[3]
    report = run(built, contenders(built), profile=True)
    assert {r.status for r in report.records} == {"ok"}, [r.reason for r in report.records]
    for test in TESTS:
        ms = {p.part: p.ms for p in report.parts if p.test == test.name}
        for who in ("transformers", "anydelta"):
            own = [part for part in ms if part not in (profile.MIXER_TOTAL, "total")]
            assert sum(ms[part][who] for part in own) == pytest.approx(ms["total"][who], rel=0.5)
            assert ms[profile.MIXER_TOTAL][who] > 0
            assert ms["mlp"][who] > 0
            assert ms["attention"][who] > 0
            assert ms["linear attention projections"][who] > 0
        assert ms[profile.RULE]["transformers"] > 0
        assert ms[profile.CONV]["transformers"] > 0


def test_a_clock_charges_the_innermost_part(monkeypatch: pytest.MonkeyPatch) -> None:
    times: Iterator[float] = iter([0.0, 1.0, 3.0, 7.0])
    monkeypatch.setattr(profile.time, "perf_counter", lambda: next(times))
    clock = profile.Clock()
    clock.begin("outer")
    clock.begin("inner")
    clock.end()
    clock.end()
    assert clock.spent == {"outer": 1.0 + 4.0, "inner": 2.0}


def test_profiling_leaves_no_trace(tiny: presets.Built, measured: model.Report) -> None:
    import transformers.models.qwen3_5.modeling_qwen3_5 as module

    assert measured.parts
    assert "timed" not in module.torch_chunk_gated_delta_rule.__qualname__
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in tiny.model.modules())


def test_states_are_slow_and_presets_have_the_published_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    want = {"qwen3.5-0.8b": 0.752e9, "qwen3.5-2b": 1.88e9, "qwen3.5-4b": 4.2e9}
    for preset in presets.PRESETS:
        if preset.name in want:
            with torch.device("meta"):
                config = getattr(transformers, preset.config)(**preset.sizes)
                made = transformers.AutoModelForCausalLM.from_config(config)
            assert sum(p.numel() for p in made.parameters()) == pytest.approx(want[preset.name], rel=0.01)


def test_what_cannot_be_built(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match=r"requires --layers from 1 to 24 with qwen3\.5-0\.8b; got 99"):
        presets.build("qwen3.5-0.8b", layers=99)
    with pytest.raises(CheckpointError, match="requires a preset with --layers"):
        presets.build("tiny", layers=2)


# ---- llama.cpp


def test_value_heads_are_tiled_in_a_gguf() -> None:
    from anydelta.gguf import names

    built = presets.build("tiny")  # 2 key heads, 4 value heads of 32
    attn = built.model.model.layers[0].linear_attn
    tensors = {t.name: t.get() for t in names._linear("", attn, built.model.config)}
    order = [0, 2, 1, 3]  # value head i of ggml has key head i mod 2; of Transformers i div 2
    assert torch.equal(tensors["ssm_alpha.weight"], attn.in_proj_a.weight[order])
    assert torch.equal(tensors["ssm_a"], -attn.A_log.exp()[order])
    assert torch.equal(tensors["attn_gate.weight"][32:64], attn.in_proj_z.weight[64:96])
    assert torch.equal(tensors["ssm_out.weight"][:, 32:64], attn.out_proj.weight[:, 64:96])
    assert torch.equal(tensors["attn_qkv.weight"][:128], attn.in_proj_qkv.weight[:128])
    assert torch.equal(tensors["ssm_conv1d.weight"][160:192], attn.conv1d.weight[192:224, 0])


@pytest.mark.parametrize("name", ["tiny", "qwen3-next"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_llama_cpp_gives_the_same_logits(name: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    pytest.importorskip("gguf", reason="gguf is not installed")
    from anydelta.bench.contenders import llama

    if name != "tiny":
        preset = next(p for p in presets.PRESETS if p.name == name)
        sizes = {**preset.sizes, **SHRUNK[name], **dict.fromkeys(("head_dim", "moe_intermediate_size"), 32)}
        sizes |= dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 32)
        monkeypatch.setattr(presets, "PRESETS", (replace(preset, sizes=sizes),))
    built = presets.build(name, dtype)
    runner = llama.LlamaRunner(built, dtype, 64, built.model.get_input_embeddings().num_embeddings)
    try:
        report = model.Report(ops.describe_machine(), model.Settings(TESTS, rounds=1))
        both = [contenders(built)[0], runner]
        model.measure(built, both, dtype=dtype, threads=1, settings=report.settings, report=report)
    finally:
        runner.close()
    assert {r.status for r in report.records} == {"ok"}, [r.reason for r in report.records]
    # A context that is kept and restored goes on as it would have.
    assert all(r.median_tps for r in report.records)


def test_llama_cpp_that_ends_is_one_sentence(tmp_path: Path) -> None:
    """Its process may be killed, as by an instruction that the CPU lacks; the benchmark goes on."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    from anydelta.bench.contenders import llama

    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF")
    with pytest.raises(RuntimeError, match=r"llama\.cpp does not load the GGUF"):
        llama.LlamaRunner(broken, "float16", 64, 1024)
    built = presets.build("tiny")
    runner = llama.LlamaRunner(built, "float32", 64, 1024)
    try:
        assert runner._process is not None
        runner._process.kill()
        with pytest.raises(RuntimeError, match=r"llama\.cpp ended: SIGKILL"):
            runner.prompt([1, 2])
    finally:
        runner.close()


def test_llama_cpp_says_what_is_missing(tiny: presets.Built, monkeypatch: pytest.MonkeyPatch) -> None:
    from anydelta.bench.contenders import llama

    kind = tiny.model.config.model_type
    monkeypatch.setattr(llama, "needs", lambda module, package: None)
    monkeypatch.setattr(llama.write, "missing", lambda: None)
    assert llama.missing(kind) is None
    monkeypatch.setattr(llama.names, "ARCHITECTURES", {})
    assert "no GGUF of a qwen3_5_text is written here" in llama.missing(kind)
    done = command("-c", "llama.cpp", "-p", "4", "-n", "0")
    assert done.exit_code == 2
    assert "requires that llama.cpp can run tiny here; got: no GGUF" in done.stderr


# ---- Printers and the command


def command(*args: str) -> Any:
    return run_program("bench", "model", *args)


def test_printers_show_every_record(measured: model.Report) -> None:
    rows = list(csv.DictReader(io.StringIO(outputs.to_text(model_report, measured, "csv"))))
    assert len(rows) == len(measured.records)
    loaded = json.loads(outputs.to_text(model_report, measured, "json"))
    assert len(loaded["records"]) == len(rows)
    assert len(loaded["parts"]) == len(measured.parts)
    text = outputs.to_text(model_report, measured, "md")
    for r in measured.records:
        assert f"| {r.test} | {r.contender} |" in text
    assert "mixer in all" in text
    bad = replace(measured.records[0], status="wrong", reason="off", median_tps=None, logit_error=None)
    assert "wrong: off" in model_report.row(bad)[2]


@pytest.mark.parametrize("parts", [True, False])
def test_the_figure_is_written(measured: model.Report, tmp_path: Path, parts: bool) -> None:
    pytest.importorskip("matplotlib")
    model_report.plot(replace(measured, parts=measured.parts if parts else []), tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text()
    assert "tg2 @ d5" in text
    assert ("projections" in text) == parts
    with pytest.raises(ValueError, match="nothing was timed"):
        model_report.plot(replace(measured, records=[]), tmp_path / "b.svg")


def test_command_writes_results_and_figure(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    done = command(
        "-p", "8", "-n", "2", "-r", "1", "-t", "1", "-c", "anydelta", "-o", str(tmp_path / "a.json"),
        "--plot", str(tmp_path / "a.svg"),
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "a.json").read_text())
    assert [r["test"] for r in found["records"]] == ["pp8", "pp8", "tg2", "tg2"]
    assert (tmp_path / "a.svg").exists()
    assert "tiny, 1.7 M parameters" in done.output


def test_command_prints_markdown_alone_on_stdout() -> None:
    done = command("-p", "4", "-n", "0", "-r", "1", "-t", "1", "-c", "anydelta", "--md")
    assert done.exit_code == 0
    assert "| pp4 | anydelta |" in done.stdout


def test_a_wrong_result_exits_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TransformersRunner, "logit_error", 1e-30)
    done = command("-p", "4", "-n", "0", "-r", "1", "-t", "1", "-c", "anydelta")
    assert done.exit_code == 1
    assert "wrong" in done.stdout


def test_list_measures_nothing() -> None:
    done = command("--list")
    assert done.exit_code == 0
    assert "qwen3-next (4 of 48 layers" in done.stdout


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (("-r", "0"), "requires --rounds of at least 1; got 0"),
        (("-p", "0", "-n", "0"), "requires -p or -n above 0; got nothing to measure"),
        (("-p", "x"), "requires -p of numbers from 0 to 1048576"),
        (("-d", "-3"), "requires -d of numbers from 0"),
        (("-t", "0"), "-t must be numbers from 1 to 1024"),
        (("--dtype", "int8"), "requires --dtype of float32, bfloat16, float16; got 'int8'"),
        (
            ("-c", "vllm"),
            "requires --contender of transformers, anydelta, packed, compiled, llama.cpp; got 'vllm'",
        ),
        (("-m", "./nowhere"), "got ./nowhere, which does not exist"),
        (("-m", "qwen3.5-0.8b", "--layers", "99"), "requires --layers from 1 to 24"),
        (("--plot", "x.gif"), "requires --plot to end in .svg, .png, .pdf; got 'x.gif'"),
        (("-o", "x.txt"), "-o must end in"),
        (("--json", "--md"), "one output form at a time"),
        (("-o", "/no/such/folder/x.json"), "requires a folder that exists"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_2(args: tuple[str, ...], sentence: str) -> None:
    done = command(*args)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert sentence in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("missing", "args", "sentence"),
    [
        ("transformers", (), "requires transformers; got no such package. Run: pip install 'anydelta[transformers]'."),
        (
            "matplotlib", ("--plot", "x.svg"),
            "requires matplotlib for --plot; got: matplotlib is not installed (pip install matplotlib).",
        ),
    ],
)  # fmt: skip
def test_a_missing_package(
    monkeypatch: pytest.MonkeyPatch, missing: str, args: tuple[str, ...], sentence: str
) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == missing else find(name, *a)
    )
    done = command(*args)
    assert done.exit_code == 2
    assert done.stderr == f"anydelta bench model: {sentence}\n"
