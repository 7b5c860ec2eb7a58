"""examples/finetune: it learns, and a run that was stopped and continued has the same result."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import CPU_REASONS, without

for name in ("torch", "transformers", "peft", "matplotlib"):
    if importlib.util.find_spec(name) is None:
        without(f"{name} is not installed")
if CPU_REASONS:
    pytest.skip("the cpu backend is not built", allow_module_level=True)

ROOT = Path(__file__).parents[1]
STEPS = 6


def command(out: Path, *more: str) -> list[str]:
    options = dict(rows=2, length=32, steps=STEPS, rank=2, threads=1)
    options["save-every"] = 2
    given = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    program = [sys.executable, str(ROOT / "examples/finetune/finetune.py"), str(ROOT / "docs/conventions.md")]
    return [*program, "--out", str(out), *given, *more]


def run(out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(out, *more), capture_output=True, text=True, check=False)


def curve(out: Path) -> Any:
    return json.loads((out / "loss.json").read_text())


def test_it_learns_and_goes_on(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    done = run(whole)
    assert done.returncode == 0, done.stderr
    found = curve(whole)
    assert len(found["train"]) == STEPS
    assert found["held_out"]["6"] < found["held_out"]["0"]
    assert (whole / "loss.svg").read_text().startswith("<?xml")
    assert (whole / "adapter" / "adapter_model.safetensors").exists()

    first = subprocess.Popen(command(parts), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert first.stdout
    for line in first.stdout:
        if line.startswith("step     2"):
            first.send_signal(signal.SIGTERM)
    assert first.wait() == 0
    assert 2 <= len(curve(parts)["train"]) < STEPS
    done = run(parts)
    assert done.returncode == 0, done.stderr
    assert "goes on after step" in done.stdout
    assert curve(parts) == found

    done = run(parts, "--lr", "0.5")
    assert (done.returncode, len(done.stderr.splitlines()[-1:])) == (2, 1)
    assert "holds a run with --lr 0.002" in done.stderr
    assert curve(parts) == found


def test_what_it_refuses(tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("too short")
    for given, sentence in (
        ([str(tmp_path / "missing.txt")], "missing.txt cannot be read as UTF-8 text"),
        ([str(short)], "the texts must hold more than"),
        ([str(short), "--steps", "0"], "--steps must be at least 1; got 0"),
        ([str(short), "--model", str(tmp_path / "none")], "cannot be loaded"),
    ):
        program = [
            sys.executable,
            str(ROOT / "examples/finetune/finetune.py"),
            "--out",
            str(tmp_path / "out"),
        ]
        done = subprocess.run([*program, *given], capture_output=True, text=True, check=False)
        assert done.returncode == 2, done.stderr
        assert done.stderr.splitlines()[-1].startswith("finetune: ")
        assert sentence in done.stderr
    assert not (tmp_path / "out").exists()
