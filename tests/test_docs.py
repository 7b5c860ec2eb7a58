"""The documents: their examples run, their tables are current, and everything that they name exists."""

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
import prose  # noqa: E402
import run_examples  # noqa: E402
import site_hooks as site  # noqa: E402
import speed_figures  # noqa: E402
import support_table  # noqa: E402
from table_between_marks import replaced  # noqa: E402

from anydelta.conformance.support import support  # noqa: E402

DOCUMENTS = [
    ROOT / name for name in ("README.md", "HACKING.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
] + sorted((ROOT / "docs").rglob("*.md"))
WITH_EXAMPLES = [path for path in DOCUMENTS if run_examples.blocks(path)]


def names(paths: list[Path]) -> list[str]:
    return [p.relative_to(ROOT).as_posix() for p in paths]


def test_documents_have_examples() -> None:
    """The list that is made of them: none is lost by a change of how examples are marked."""
    assert {"README.md", "docs/conventions.md", "docs/rollback.md", "docs/tutorials/first-engine.md"} <= set(
        names(WITH_EXAMPLES)
    )


@pytest.mark.parametrize("name", names(WITH_EXAMPLES))
def test_the_examples_run(name: str) -> None:
    if name == "docs/mlx.md" and importlib.util.find_spec("mlx_lm") is None:
        pytest.skip("mlx-lm is not installed")
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts/run_examples.py"), str(ROOT / name)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr


def test_examples_without_their_packages_are_left_out(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- needs: numpy no_such -->\n```python\n1 / 0\n```\n\n```python\nx = 1\n```\n")
    assert run_examples.run(page, allow_missing=True) == 1
    with pytest.raises(ZeroDivisionError):
        run_examples.run(page)


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
        "| | `x` |", "|---|---|", "| devices | d |", "| b | no |", "", "All accept a.",
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


def slugs(document: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    found = set()
    for heading in re.findall(
        r"^#+ (.*)$", prose.unfenced(document.read_text(encoding="utf-8")), re.MULTILINE
    ):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        found.add(re.sub(r"[^\w\- ]", "", plain).replace(" ", "-"))
    return found


@pytest.mark.parametrize("document", DOCUMENTS, ids=names(DOCUMENTS))
def test_anchors_exist_on_github_too(document: Path) -> None:
    """mkdocs makes other anchors of some headings, and `make docs` looks for those."""
    for target, anchor in re.findall(r"\]\(([^)#]*)#([^)]+)\)", document.read_text(encoding="utf-8")):
        if "://" not in target:
            where = document.parent / target if target else document
            assert anchor in slugs(where), f"{target}#{anchor}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=names(DOCUMENTS))
def test_make_targets_and_paths_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    makefiles = (ROOT / "Makefile", *ROOT.glob("tests/*/targets.mk"))
    recipes = "\n".join(path.read_text(encoding="utf-8") for path in makefiles)
    rules = set(re.findall(r"^([a-z0-9-]+):", recipes, re.MULTILINE))
    for target in re.findall(r"(?:`|^    )make ([a-z][a-z0-9-]*)", text, re.MULTILINE):
        assert target in rules, f"make {target}"
    for path in re.findall(r"`((?:src|tests|docs|scripts|examples|\.ci|\.github)/[\w./]+)`", text):
        assert (ROOT / path).exists(), path


# ---- prose


def test_prose_finds_long_lines_and_unusual_words(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A\n\n"
        + "x" * 121
        + "\nNothing, but for `but for` and\nthe plan.\n\n    but for\n\n```\nbut for\n```\n"
    )
    assert [line for line, _ in prose.problems(page)] == [3, 4, 5]
    module = tmp_path / "module.py"
    module.write_text('"""All but for one."""\n\nX = "but for"  # text\n# one\n# two, but\n# for three\n')
    assert [line for line, _ in prose.problems(module)] == [1, 5]


def test_prose_reads_every_document() -> None:
    read = prose.files()
    assert {ROOT / "README.md", ROOT / "docs/conventions.md", ROOT / "src/anydelta/terminal.py"} <= set(read)


# ---- the site


def test_links_of_the_repository_lead_to_pages_of_the_site() -> None:
    assert (
        site.linked("[a](docs/rule.md#one-token) [b](Makefile)", "index.md", "") == "[a](rule.md#one-token) b"
    )
    assert site.linked("[a](../../HACKING.md)", "tutorials/first-port.md", "") == "[a](../hacking.md)"
    assert site.linked("[b](Makefile)", "index.md", "https://x/y/") == "[b](https://x/y/blob/main/Makefile)"
    assert site.linked("[c](no-such.md) ```x```", "index.md", "") == "[c](no-such.md) ```x```"
    assert site.linked("```\n[b](Makefile)\n```\n", "index.md", "") == "```\n[b](Makefile)\n```\n"


def test_the_site_has_every_argument_and_command() -> None:
    for which, some in (("rule", "`initial_state` or `state`"), ("mixer", "`conv_weight`")):
        assert f"| {some} |" in site.arguments(which)
    assert "## `anydelta bench ops`" in site.program()


def test_a_public_name_without_a_docstring_is_found(tmp_path: Path) -> None:
    pytest.importorskip("griffe")
    (tmp_path / "undoc.py").write_text(
        '"""A."""\n\ndef said():\n    """B."""\n\ndef unsaid(): ...\n\ndef _own(): ...\n\n\n'
        'class C:\n    """D."""\n\n    def unsaid(self): ...\n'
    )
    assert site.undocumented(tmp_path, ["undoc"]) == ["undoc.unsaid", "undoc.C.unsaid"]
    assert site.undocumented(ROOT / "src", site.referred()) == []


def test_the_speed_table_is_that_of_its_record() -> None:
    record = speed_figures.read(ROOT / "docs/measurements/readme.json")
    old, new = replaced(ROOT / "README.md", speed_figures.table(record), speed_figures.MARKS)
    assert old == new, "run: make figures"


def test_a_recording_is_what_a_command_prints(tmp_path: Path) -> None:
    svg = tmp_path / "x.svg"
    bar = "\\x20" + "50% a" + "\\x66ter 15 s: x"  # the word is not in the command, which is recorded too
    command = f"{sys.executable} -c \"import sys; print('seen'); print('{bar}\\nlast', file=sys.stderr)\""
    subprocess.run([sys.executable, str(ROOT / "scripts/recording.py"), str(svg), command], check=True)
    text = svg.read_text(encoding="utf-8")
    assert "seen" in text
    assert "last" in text
    assert "after" not in text
    assert "http" not in text.replace("http://www.w3.org", "").replace("https://www.textualize.io", "")


def test_the_sources_name_documents_and_sections_that_exist() -> None:
    named = 0
    for path in sorted((ROOT / "src").rglob("*")):
        if path.suffix not in (".py", ".h", ".cpp", ".hpp", ".cl", ".metal", ".glsl", ".comp", ".wgsl"):
            continue
        text = re.sub(r"\s*\n\s*(//|#)?\s*", " ", path.read_text(encoding="utf-8"))
        for found in re.finditer(r'((?:docs/[\w/.-]+|HACKING)\.(?:md|json))(?:, "([^"]+)")?', text):
            document = ROOT / found[1]
            assert document.exists(), f"{path}: {found[1]}"
            named += 1
            if found[2]:
                assert re.search(
                    rf"^#+ {re.escape(found[2])}$", document.read_text(encoding="utf-8"), re.MULTILINE
                ), f"{path}: {found[0]}"
    assert named > 10
