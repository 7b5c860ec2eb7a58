"""Where modules lie and what they import: the rules of HACKING.md that `lint-imports` does not know."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["anydelta", "anydelta.cli", "anydelta.bench.commands.ops"])
def test_importing_needs_no_optional_package(module: str) -> None:
    code = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    optional = {"torch", "triton", "transformers", "mlx.core", "vulkan", "wgpu", "pyopencl", "matplotlib"}
    assert not optional & {*done.stdout.split()}
