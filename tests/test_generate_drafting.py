"""anydelta generate --mtp, --draft, --lookup: the same text, and refusals in one sentence."""

from __future__ import annotations

import json
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
