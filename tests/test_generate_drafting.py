"""anydelta generate --mtp, --draft, --lookup: the same text, and refusals in one sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

for _package in ("torch", "transformers", "typer"):
    pytest.importorskip(_package)

import transformers  # noqa: E402

from anydelta.generate.checkpoint import REPOSITORY_MODEL as MODEL  # noqa: E402
from conftest import CPU_REASONS, run_program  # noqa: E402

if tuple(int(n) for n in transformers.__version__.split(".")[:2]) < (5, 20):
    pytest.skip("drafting with hybrid models takes transformers 5.20 or later", allow_module_level=True)
if CPU_REASONS or not MODEL.is_dir():
    pytest.skip("the cpu backend or the repository's model is not here", allow_module_level=True)


def run(*args: str) -> Any:
    return run_program("generate", "-t", "1", *args)


@pytest.mark.parametrize(
    "options",
    [
        ["--mtp"],
        ["--mtp", "--drafts", "3"],
        ["--lookup", "4"],
        ["--mtp", "--lookup", "4"],
        ["--draft", str(MODEL)],
    ],
)
def test_the_text_is_that_of_transformers_alone(options: list[str]) -> None:
    done = run(*options, "--compare", "--json", "-n", "16", "And God said, And God said, And God said,")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["identical"]
    plain, ours = found["runs"]
    assert plain["drafted"] == 0
    assert 0 < ours["accepted"] <= ours["drafted"]
    assert len(ours["tokens"]) <= ours["accepted"] + ours["verifications"]


@pytest.mark.parametrize(
    "options", [["--lookup", "12"], ["--mtp", "--drafts", "12"], ["--mtp", "--lookup", "12"]]
)
def test_fewer_tokens_than_drafts(options: list[str]) -> None:
    text = "And God said, Let there be light: and there was light. And God said, Let there be"
    for n in ("1", "4"):
        done = run(*options, "--compare", "--json", "-n", n, text)
        assert done.exit_code == 0, done.output
        found = json.loads(done.stdout)
        assert found["identical"]
        assert len(found["runs"][1]["tokens"]) == int(n)


def test_a_stop_string_inside_a_draft(tmp_path: Path) -> None:
    """In the model's generation config, as chat models have it."""
    model = shutil.copytree(MODEL, tmp_path / "model")
    settings = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps({**settings, "stop_strings": ["said"]}))
    done = run("--mtp", "--compare", "--json", "-n", "30", "-m", str(model), "And God said, And God said,")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["identical"]
    assert {run["stop"] for run in found["runs"]} == {"other"}
    assert len(found["runs"][0]["tokens"]) < 30


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            ["--mtp", "--draft", "m"],
            "requires one of --mtp, --draft and --lookup, or --mtp with --lookup; got --mtp and",
        ),
        (["--mtp", "--plain"], "requires anydelta for --mtp"),
        (["--lookup", "0"], "requires --lookup from 1 to 1024; got 0"),
        (["--lookup", "4", "--drafts", "2"], "requires --mtp or --draft with --drafts"),
        (["--draft", "no/such/folder"], "no/such/folder"),
    ],
)
def test_refusals(options: list[str], sentence: str) -> None:
    done = run(*options, "Psalm 23")
    assert done.exit_code == 2
    assert sentence in done.stderr
    assert "Traceback" not in done.output
