"""Where modules are and what they import: the rules of HACKING.md that `lint-imports` does not check."""

from __future__ import annotations

import ast
import importlib.metadata
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[1] / "src" / "anydelta"
TESTS = Path(__file__).parent


def ours(node: ast.AST) -> bool:
    if isinstance(node, ast.ImportFrom):
        return bool(node.level) or (node.module or "").partition(".")[0] == "anydelta"
    return isinstance(node, ast.Import) and any(a.name.partition(".")[0] == "anydelta" for a in node.names)


def imports_in_functions(tree: ast.AST) -> Iterator[int]:
    for function in ast.walk(tree):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from (node.lineno for node in ast.walk(function) if ours(node))  # type: ignore[attr-defined]


def test_modules_of_ours_are_imported_at_the_top() -> None:
    found = {
        f"{path.relative_to(SOURCES)}:{line}"
        for path in SOURCES.rglob("*.py")
        for line in imports_in_functions(ast.parse(path.read_text(encoding="utf-8")))
    }
    # torch.compile follows this one kind of late import, and rule and mixer must not need torch.
    assert {name.partition(":")[0] for name in found} <= {"mixer/op.py", "rule/op.py"}


@pytest.mark.parametrize("module", ["anydelta", "anydelta.cli", "anydelta.bench.commands.ops"])
def test_importing_needs_no_optional_package(module: str) -> None:
    code = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    optional = {"torch", "triton", "transformers", "mlx.core", "vulkan", "wgpu", "pyopencl", "matplotlib"}
    assert not optional & {*done.stdout.split()}


def test_importing_anydelta_imports_no_backend() -> None:
    code = "import sys, anydelta; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not [name for name in done.stdout.split() if name.startswith("anydelta.backends")]


def test_no_module_beside_the_tests_hides_a_package() -> None:
    """Tests put these folders on sys.path: a module there named as a package is found in its place."""
    packages = importlib.metadata.packages_distributions()
    assert "pytest" in packages
    folders = [TESTS, *(TESTS / name for name in ("metal", "fuzz", "vllm_engine")), TESTS.parent / "scripts"]
    assert not [path for folder in folders for path in folder.glob("*") if path.stem in packages]


def test_the_stub_of_the_extension_names_what_it_has() -> None:
    core = pytest.importorskip("anydelta._core")
    tree = ast.parse((SOURCES / "_core.pyi").read_text(encoding="utf-8"))
    said = {node.name: node for node in tree.body if isinstance(node, (ast.ClassDef, ast.FunctionDef))}
    numbers = {node.target.id for node in tree.body if isinstance(node, ast.AnnAssign)}  # type: ignore[union-attr]
    assert {*said, *numbers} == {name for name in dir(core) if not name.startswith("_")}
    for name, node in said.items():
        if isinstance(node, ast.ClassDef):
            methods = {m.name for m in node.body if isinstance(m, ast.FunctionDef)} - {"__init__"}
            assert methods == {m for m in vars(getattr(core, name)) if not m.startswith("_")}, name
