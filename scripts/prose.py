"""The part of `make lint` that reads prose: lines of Markdown, and words that a stranger stumbles over.

    python scripts/prose.py            every Markdown file that git knows, docstrings and comments of src/anydelta
    python scripts/prose.py FILE...    these only

codespell finds what is spelled wrong. Here are the words of ours that have a usual word. A line of a Markdown file has
at most 120 columns; tables count, what a program printed does not (docs/measurements in fenced blocks).
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
COLUMNS = 120

USUAL = {
    r"the plan('s)?\b(?! (is|for a|of a|cache|key|that|kept|plan))": "say what the reader gets",
    r"\bbars?\b(?= (of|is|are|for|that|in|stands?|cannot)\b)": "say the figure and its limit",
    r"\bof which there\b": "say what there is, subject first",
    r"\b(is|are|has|have|be|become) no \w+ but\b": "say what it is",
    r"\b(was|were|be|is) to be had\b|\bcould be had\b|\bcannot be had\b": "be available, or be possible",
    r"\bof one's own\b": "of your own",
    r"\bin earnest\b": "for real",
    r"\b(is|are) as ever\b|, as ever\b": "unchanged",
    r"\bbut for\b": "except",
    r"\bwhosoever\b|\bwhoever\b": "a caller who, or code that",
    r"\bin turns\b": "interleaved",
    r"\btwice over\b": "twice",
    r"\bin the place of\b": "instead of",
    r"\bwhat comes back\b": "the result",
    r"\bgoes? on to (the|what|mlx|Transformers|its|their)\b": "falls back to",
    r"\bno such thing\b|\bit is nothing of the kind\b": "say what it is",
    r"\bstands? (in|at|below|above) (the|`|docs|src)": "is in",
    r"\bthe head of (the|this|that) file\b": "the top of the file",
    r"\bbehind the (answer|call|backend|kernel)\b": "after",
    r"\bmultiplicit|\bheretofore\b|\bthereof\b|\bwherein\b": "a plain word",
}
"""What is written, as a regular expression, and what to write instead."""

_USUAL = [
    (re.compile(pattern.replace(" ", r"\s+"), re.IGNORECASE), instead) for pattern, instead in USUAL.items()
]
_CODE = re.compile(r"`[^`\n]*`|\]\([^)]*\)|<!--.*?-->")


def long_lines(text: str) -> Iterator[tuple[int, str]]:
    """(number, what is wrong) of the lines of a Markdown file that are too long."""
    for number, line in enumerate(text.splitlines(), 1):
        if len(line) > COLUMNS:
            yield number, f"{len(line)} columns; at most {COLUMNS}"


def unusual(text: str, first: int = 1) -> Iterator[tuple[int, str]]:
    """(number, what is wrong) of the words of a text whose first line has the number `first`."""
    plain = _CODE.sub(lambda found: " " * len(found[0]), text)
    for pattern, instead in _USUAL:
        for found in pattern.finditer(plain):
            written = " ".join(text[found.start() : found.end()].split())
            yield first + text.count("\n", 0, found.start()), f"{written!r}: {instead}"


def unfenced(markdown: str) -> str:
    """A Markdown text with its fenced and indented blocks blank."""
    lines, fenced = [], False
    for line in markdown.splitlines():
        fence = line.lstrip().startswith(("```", "~~~"))
        lines.append("" if fenced or fence or line.startswith("    ") else line)
        fenced ^= fence
    return "\n".join(lines)


def prose_of_python(source: str) -> Iterator[tuple[int, str]]:
    """(number of its first line, text) of each docstring and of each run of comments."""
    for node in ast.walk(ast.parse(source)):
        value = getattr(node, "value", None)
        if isinstance(node, ast.Expr) and isinstance(value, ast.Constant) and isinstance(value.value, str):
            yield node.lineno, value.value
    run: list[str] = []
    first = last = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            if run and token.start[0] != last + 1:
                yield first, "\n".join(run)
                run = []
            first = first if run else token.start[0]
            run.append(token.string.lstrip("# "))
            last = token.start[0]
    if run:
        yield first, "\n".join(run)


def problems(path: Path) -> list[tuple[int, str]]:
    """What is wrong in a file: (line, sentence)."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return sorted([*long_lines(text), *unusual(unfenced(text))])
    return sorted({found for first, prose in prose_of_python(text) for found in unusual(prose, first)})


def files() -> list[Path]:
    """The Markdown files that git knows, or will know, and the modules of the package."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md", "src/anydelta/*.py", "examples/*.py"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    return [ROOT / name for name in sorted(set(listed.splitlines())) if (ROOT / name).exists()]


def main() -> None:
    found = 0
    for path in [Path(name) for name in sys.argv[1:]] or files():
        for line, wrong in problems(path):
            shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
            print(f"{shown}:{line}: {wrong}")
            found += 1
    if found:
        sys.exit(f"prose: {found} problems.")


if __name__ == "__main__":
    main()
