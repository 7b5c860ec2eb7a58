"""anydelta bench spec and bench prefix: what they measure and print, at tiny settings. No time is asserted."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

for _package in ("torch", "transformers", "typer"):
    pytest.importorskip(_package)

import transformers  # noqa: E402

from anydelta.bench.measure import drafting as spec  # noqa: E402
from anydelta.bench.measure import drafting_report as spec_report  # noqa: E402
from anydelta.bench.measure import outputs, prefix, prefix_report  # noqa: E402
from anydelta.generate.checkpoint import REPOSITORY_MODEL as MODEL  # noqa: E402
from conftest import CPU_REASONS, run_program, without  # noqa: E402

if tuple(int(n) for n in transformers.__version__.split(".")[:2]) < (5, 20):
    pytest.skip("drafting with hybrid models takes transformers 5.20 or later", allow_module_level=True)
if CPU_REASONS:
    pytest.skip("; ".join(CPU_REASONS), allow_module_level=True)  # tests/test_cpu.py fails then
if not MODEL.is_dir():
    without("examples/tiny_model is not here: a clone has it, an sdist does not")


def run(*args: str) -> Any:
    return run_program("bench", *args, "-r", "2")


SMALL = ("spec", "-n", "12", "--prompt", "song", "--prompt", "list")
MODES = ["plain", "mtp", "mtp+lookup", "lookup", "assistant"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """The record of `bench spec` on two prompts, and its figure."""
    folder = tmp_path_factory.mktemp("spec")
    figure = ["--plot", str(folder / "spec.svg")]
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        figure = []
    done = run(*SMALL, "--json", *figure)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout), folder / "spec.svg"


def test_every_mode_writes_the_text_of_plain_decoding(measured: tuple[dict[str, Any], Path]) -> None:
    records = measured[0]["records"]
    assert [(r["prompt"], r["mode"]) for r in records] == [(p, m) for p in ("list", "song") for m in MODES]
    for r in records:
        assert r["status"] == "ok", r["reason"]
        assert r["tokens"] == 12
        assert r["rounds"] == 2
        assert 0 < r["low_tps"] <= r["median_tps"] <= r["high_tps"]
        if r["mode"] == "plain":
            assert r["ratio"] == 1
            assert r["drafted"] == 0
        else:
            assert 0 <= r["accepted"] <= r["drafted"]
            assert r["tokens"] <= r["accepted"] + r["verifications"]
    assert any(r["accepted"] for r in records if r["mode"] == "mtp")


def test_the_figure_has_every_prompt(measured: tuple[dict[str, Any], Path]) -> None:
    pytest.importorskip("matplotlib")
    text = measured[1].read_text()
    assert all(name in text for name in ("song", "list", "mtp+lookup", "accepted drafts"))


def test_the_printers_show_every_record(measured: tuple[dict[str, Any], Path]) -> None:
    data = measured[0]
    records = [spec.Record(**r) for r in data["records"]]
    report = spec.Report(data["machine"], data["model"], spec.Settings(**data["settings"]), [], records)
    assert len(list(csv.DictReader(io.StringIO(outputs.to_text(spec_report, report, "csv"))))) == len(records)
    text = outputs.to_text(spec_report, report, "md")
    assert text.count("| song |") == text.count("| median |") == len(MODES)
    bad = replace(records[1], status="wrong", reason="the text differs", median_tps=None)
    assert "wrong: the text differs" in spec_report.row(bad)[3]


def test_another_text_exits_1(monkeypatch: pytest.MonkeyPatch) -> None:
    write = spec._write

    def wrong(model: Any, ids: Any, way: spec.Mode, settings: spec.Settings) -> Any:
        out = write(model, ids, way, settings)
        if way.name == "lookup":
            out[0, -1] = (out[0, -1] + 1) % 100
        return out

    monkeypatch.setattr(spec, "_write", wrong)
    done = run("spec", "-n", "4", "--prompt", "law")
    assert done.exit_code == 1
    assert "wrong: the text differs from new token 3 on" in " ".join(done.stdout.split())


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (("spec", "--prompt", "psalm"), "requires --prompt of narrative"),
        (("spec", "-n", "0"), "requires --n-gen from 1"),
        (("spec", "--plot", "a.txt"), "requires --plot to end in"),
        (("prefix", "-p", "12,none"), "requires --prefixes from 1 to 1048576; got 12,none"),
        (("prefix", "--turn", "1"), "requires --turn from 2"),
        (("prefix", "-m", "no/such/folder"), "no/such/folder"),
    ],
)
def test_refusals(args: tuple[str, ...], sentence: str) -> None:
    done = run(*args)
    assert done.exit_code == 2
    assert sentence in done.stderr
    assert "Traceback" not in done.output


# ---- bench prefix


def test_checkpoints_run_only_what_is_new(tmp_path: Path) -> None:
    done = run("prefix", "-p", "40,9", "--turn", "6", "-n", "5", "-o", str(tmp_path / "a.json"))
    assert done.exit_code == 0, done.output
    assert "a shared prefix of 40 tokens" in done.output
    data = json.loads((tmp_path / "a.json").read_text())
    assert [(r["prefix"], r["situation"]) for r in data["records"]] == [
        (n, s) for n in (40, 9) for s in prefix.SITUATIONS
    ]
    for r in data["records"]:
        assert r["status"] == "ok", r["reason"]
        # the answer's last token was never run
        new = {"next turn": 6 + 1, "edited turn": 3 + 6}.get(r["situation"], 6)
        assert r["run_tokens"] == new
        assert r["prompt_tokens"] == r["prefix"] + (6 + 5 + 6 if r["situation"] == "next turn" else new)
        assert r["checkpoint_bytes"] > 0
        assert r["plain_s"] > 0
        assert r["low_s"] <= r["median_s"] <= r["high_s"]
    records = [prefix.Record(**r) for r in data["records"]]
    report = spec.Report(data["machine"], data["model"], prefix.Settings(), [], records)
    assert outputs.to_text(prefix_report, report, "md").count("| next turn |") == 2
    bad = replace(records[0], status="wrong", reason="another", plain_s=None)
    assert "wrong: another" in prefix_report.row(bad)[3]
