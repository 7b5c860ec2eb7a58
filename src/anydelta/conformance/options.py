"""The options of a call, by the words of a case: a line says `logit`, the call beta_is_logit."""

from __future__ import annotations

from typing import Any

from ..core.arguments import fields

WORDS = {
    "beta_is_logit": "logit", "qk_l2norm": "l2norm", "qk_l2norm_eps": "eps", "state_layout": "layout",
    "allow_neg_eigval": "neg",
}  # fmt: skip
"""Options that a case has under another name."""


def options_of_case(case: object, table: type, *without: str) -> dict[str, Any]:
    """The options of a table that a case has, by their names in the table."""
    words = {name: WORDS.get(name, name) for name in fields(table) if name not in without}
    return {name: getattr(case, word) for name, word in words.items() if hasattr(case, word)}


def from_words(**words: object) -> dict[str, Any]:
    """Options by name from the words of a case."""
    return {name: words[word] for name, word in WORDS.items() if word in words} | {
        word: value for word, value in words.items() if word not in WORDS.values()
    }
