"""The hook of `make docs` that mkdocs.yml names.

- README.md, HACKING.md and the other pages of the repository's root are pages of the site.
- A link to a file of the repository leads to its page, or to the repository where that is known (REPOSITORY_URL).
- `<!-- arguments: rule -->`, `<!-- arguments: mixer -->` and `<!-- program -->` become tables of the arguments and the
  help of every command.
- A public name without a docstring ends the build. Public is what docs/reference names, and its members.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"

OUTSIDE = {
    "README.md": "index.md",
    "HACKING.md": "hacking.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
    "examples/finetune/README.md": "finetune.md",
}
"""Pages that lie outside of docs/, by their places in the site."""

_LINK = re.compile(r"(!?)\[((?:[^][]|\[[^][]*\])*)\]\(([^)\s#]*)(#[^)\s]*)?\)")
_FENCE = re.compile(r"^(```|~~~)", re.MULTILINE)


# ---- Pages and links


def place(path: str) -> str | None:
    """Where a file of the repository is in the site, or None if it is no page of it."""
    if path in OUTSIDE:
        return OUTSIDE[path]
    return path.removeprefix("docs/") if path.startswith("docs/") else None


def source(uri: str) -> str:
    """The file of the repository that a page of the site is made of."""
    return {there: here for here, there in OUTSIDE.items()}.get(uri, f"docs/{uri}")


def linked(markdown: str, uri: str, repository: str) -> str:
    """The text of a page with the links of the repository turned into those of the site."""
    folder = (ROOT / source(uri)).parent

    def turn(match: re.Match[str]) -> str:
        picture, text, target, anchor = match[1], match[2], match[3], match[4] or ""
        if not target or "://" in target or target.startswith("mailto:"):
            return match[0]
        file = Path(os.path.normpath(folder / target))
        if not file.exists() or not file.is_relative_to(ROOT):
            return match[0]  # mkdocs names it
        path = file.relative_to(ROOT).as_posix()
        there = place(path)
        if there is not None and not file.is_dir():
            return f"{picture}[{text}]({os.path.relpath(there, Path(uri).parent)}{anchor})"
        return f"[{text}]({repository.rstrip('/')}/blob/main/{path})" if repository else text

    return outside_fences(markdown, lambda text: _LINK.sub(turn, text))


def outside_fences(markdown: str, change: Any) -> str:
    """The text with its parts outside of fenced blocks changed."""
    parts: list[str] = []
    plain: list[str] = []
    fenced = False
    for line in markdown.splitlines(keepends=True):
        if _FENCE.match(line):
            if not fenced:
                parts.append(change("".join(plain)))
                plain = []
            fenced = not fenced
            parts.append(line)
        elif fenced:
            parts.append(line)
        else:
            plain.append(line)
    return "".join([*parts, change("".join(plain))])


# ---- What is generated


def arguments(which: str) -> str:
    """The table of the rule's or the mixer's arguments as Markdown."""
    sys.path.insert(0, str(ROOT / "src"))
    from anydelta.core.arguments import ArrayRow, ChoiceRow, NumberRow, fields
    from anydelta.mixer.arguments import MixerCall, MixerOptions
    from anydelta.rule.arguments import Call, Options

    call: Any
    options: Any
    call, options = (Call, Options) if which == "rule" else (MixerCall, MixerOptions)
    lines = ["| array | shape | holds | optional | written |", "|---|---|---|---|---|"]
    for name, field in fields(call).items():
        row = field.row
        assert isinstance(row, ArrayRow)
        if not row.result:
            names = " or ".join(f"`{n}`" for n in row.public if n) or f"`{name}`"
            yes = ["yes" if on else "" for on in (row.optional, row.written)]
            lines.append(f"| {names} | {row.shape} | {row.kind} | {yes[0]} | {yes[1]} |")
    lines += ["", "| option | values | default |", "|---|---|---|"]
    for name, field in fields(options).items():
        row = field.row
        if isinstance(row, ChoiceRow):
            values = ", ".join(f"`{value!r}`" for value in row.values)
        elif isinstance(row, NumberRow):
            low, high = (f"{x:g}" for x in (row.minimum, row.maximum))
            values = f"a number >= {low}" if row.minimum == 0 else "a number"
            values = f"a number <= {high}" if row.maximum == 0 else values
        else:
            values = "`True`, `False`"
        lines.append(f"| `{name}` | {values} | `{options._field_defaults[name]!r}` |")
    return "\n".join(lines)


def program() -> str:
    """The help of every command of the program as Markdown."""
    sys.path.insert(0, str(ROOT / "src"))
    import typer

    from anydelta.cli import build_app

    def of(command: Any, words: list[str]) -> Iterator[str]:
        name = " ".join(words)
        text, _, examples = (command.help or "").partition("Examples:")
        yield f"## `{name}`\n\n{text.strip()}\n"
        rows = []
        for option in command.params:
            written = ", ".join(f"`{word}`" for word in [*option.opts, *option.secondary_opts])
            if option.name not in ("help", "install_completion", "show_completion"):
                rows.append(
                    f"| {written} | {(getattr(option, 'help', '') or '').replace('|', chr(92) + '|')} |"
                )
        if rows:
            yield "\n".join(["| option | meaning |", "|---|---|", *rows, ""])
        if examples:
            yield "```\n" + "\n".join(line.strip() for line in examples.strip().splitlines()) + "\n```\n"
        for word, inner in getattr(command, "commands", {}).items():
            yield from of(inner, [*words, word])

    return "\n".join(of(typer.main.get_command(build_app()), ["anydelta"]))


GENERATED = {
    "<!-- arguments: rule -->": lambda: arguments("rule"),
    "<!-- arguments: mixer -->": lambda: arguments("mixer"),
    "<!-- program -->": program,
}


# ---- Docstrings


def undocumented(src: Path, names: list[str]) -> list[str]:
    """The public names among these, and below them, that have no docstring."""
    import griffe

    loader = griffe.GriffeLoader(search_paths=[src])
    found = []

    def look(thing: Any) -> None:
        thing = thing.final_target if thing.is_alias else thing
        if not thing.has_docstring:
            found.append(thing.path)
        if thing.is_class:
            for name, member in thing.members.items():
                if (
                    name[0] != "_"
                    and not member.is_alias
                    and (member.is_function or "property" in member.labels)
                ):
                    look(member)

    packages = {name: loader.load(name) for name in {name.split(".")[0] for name in names}}
    loader.resolve_aliases(external=False)
    for name in names:
        root, _, inside = name.partition(".")
        thing = packages[root][inside] if inside else packages[root]
        if not thing.is_module:
            look(thing)
            continue
        if not thing.has_docstring:
            found.append(thing.path)
        listed = thing.exports or [n for n, m in thing.members.items() if n[0] != "_" and not m.is_alias]
        for member in map(thing.members.get, map(str, listed)):
            if member is not None and (member.is_class or member.is_function):
                look(member)
    return found


def referred() -> list[str]:
    """What docs/reference documents: the names behind `:::`."""
    pages = sorted((DOCS / "reference").glob("*.md"))
    return [
        name
        for page in pages
        for name in re.findall(r"^::: (\S+)", page.read_text(encoding="utf-8"), re.MULTILINE)
    ]


# ---- The hook


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    from mkdocs.exceptions import ConfigurationError

    if missing := undocumented(ROOT / "src", referred()):
        raise ConfigurationError(f"public names without a docstring: {', '.join(missing)}")
    records = sorted((DOCS / "measurements").glob("*.md"), reverse=True)
    listed = [f"measurements/{page.name}" for page in records if page.name != "index.md"]
    for entry in config.nav or []:
        if entry.get("Records") == "RECORDS":
            entry["Records"] = ["measurements/index.md", *listed]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    from mkdocs.structure.files import File

    for path, uri in OUTSIDE.items():
        files.append(File.generated(config, uri, content=(ROOT / path).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    for mark, make in GENERATED.items():
        if mark in markdown:
            markdown = markdown.replace(mark, make())
    return linked(markdown, page.file.src_uri, config.repo_url or "")
