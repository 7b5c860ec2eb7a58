"""The documents: their examples run, their table is the one of today, and what they name exists."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import families_table  # noqa: E402
import run_examples  # noqa: E402
import support_table  # noqa: E402
from table_between_marks import replaced  # noqa: E402

from anydelta.conformance.support import support  # noqa: E402

DOCUMENTS = [ROOT / name for name in ("README.md", "HACKING.md", "CHANGELOG.md")] + sorted(
    (ROOT / "docs").glob("*.md")
)


def names(paths: list[Path]) -> list[str]:
    return [p.name for p in paths]


@pytest.mark.parametrize(
    "name", ["README.md", "docs/conventions.md", "docs/mlx.md", "docs/backends/metal.md"]
)
def test_the_examples_run(name: str) -> None:
    if name == "docs/mlx.md" and importlib.util.find_spec("mlx_lm") is None:
        pytest.skip("mlx-lm is not installed")
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts/run_examples.py"), str(ROOT / name)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_a_broken_example_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("text\n\n```python\nx = 1\n```\n\n```python\nassert x == 2\n```\n")
    with pytest.raises(AssertionError) as failure:
        run_examples.run(page)
    assert failure.traceback[-1].lineno == 7  # counted from 0


def test_the_support_table_is_the_one_of_today() -> None:
    old, new = replaced(ROOT / "README.md", support_table.table(support()), support_table.MARKS)
    assert old == new, "run: make readme"


def test_the_table_of_families_is_the_one_of_today() -> None:
    path = ROOT / "docs" / "transformers.md"
    old, new = replaced(path, families_table.table(), families_table.MARKS)
    assert old == new, "run: make readme"


def test_every_family_of_the_table_is_tested() -> None:
    """What the table says was tested runs over the rows that tests/test_transformers.py has configurations of."""
    text = (ROOT / "tests" / "test_transformers.py").read_text(encoding="utf-8")
    for family in families_table.FAMILIES:
        assert f'"{family.name}": (' in text


def test_the_support_table_is_made_from_the_json_of_the_command(tmp_path: Path) -> None:
    found = {
        "cases": {"a": 1, "b": 2},
        "backends": {"x": {"devices": ["d"], "features": {"a": [], "b": ["r"]}}},
    }
    (tmp_path / "support.json").write_text(json.dumps(found))
    found = support_table.read(str(tmp_path / "support.json"))
    assert support_table.table(found).splitlines() == [
        "| | `x` |", "|---|---|", "| devices | d |", "| b | no |", "", "All backends accept a.", "", "- b: `x`: r.",
    ]  # fmt: skip
    (tmp_path / "support.json").write_text('{"results": []}')
    with pytest.raises(SystemExit, match="requires the output of"):
        support_table.read(str(tmp_path / "support.json"))


def test_every_row_of_the_table_is_in_the_conformance_list() -> None:
    assert [feature for feature, cases in support()["cases"].items() if not cases] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=names(DOCUMENTS))
def test_links_lead_somewhere(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert (document.parent / target).exists(), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=names(DOCUMENTS))
def test_make_targets_and_paths_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    makefiles = (ROOT / "Makefile", *ROOT.glob("tests/*/targets.mk"))
    recipes = "\n".join(path.read_text(encoding="utf-8") for path in makefiles)
    rules = set(re.findall(r"^([a-z]+):", recipes, re.MULTILINE))
    for target in re.findall(r"(?:`|^    )make ([a-z]+)", text, re.MULTILINE):
        assert target in rules, f"make {target}"
    for path in re.findall(r"`((?:src|tests|docs|scripts|examples|\.ci|\.github)/[\w./]+)`", text):
        assert (ROOT / path).exists(), path
