"""The type of each matrix in a file that is named after a mix, such as Q4_K_M.

The mixes are llama.cpp's (src/llama-quant.cpp). Most matrices get the type in the name. The output matrix gets more
bits, and in the mixes M and L so do some of the most important matrices.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

Where = Callable[[int, int], bool]
"""Whether the i-th of n matrices of one kind gets a type."""


def _all(i: int, n: int) -> bool:
    return True


def _more(i: int, n: int) -> bool:
    """At both ends, and every third in between."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def _first(count: int) -> Where:
    return lambda i, n: i < count


def _part(of: int) -> Where:
    return lambda i, n: i < n // of


@dataclass(frozen=True)
class Mix:
    """The types of matrices by their purpose. The first that applies counts, otherwise `base`."""

    base: str
    value: tuple[tuple[str, Where], ...] = ()
    """attn_v and attn_qkv."""
    down: tuple[tuple[str, Where], ...] = ()
    """ffn_down."""
    out: str | None = None
    """attn_output."""


MIXES = {
    "Q3_K_S": Mix("Q3_K"),
    "Q3_K_M": Mix(
        "Q3_K", (("Q5_K", _first(2)), ("Q4_K", _all)), (("Q5_K", _part(16)), ("Q4_K", _all)), "Q4_K"
    ),
    "Q3_K_L": Mix("Q3_K", (("Q5_K", _all),), (("Q5_K", _all),), "Q5_K"),
    "Q4_K_S": Mix("Q4_K", (("Q5_K", _first(4)),), (("Q5_K", _part(8)),)),
    "Q4_K_M": Mix("Q4_K", (("Q6_K", _more),), (("Q6_K", _more),)),
    "Q5_K_S": Mix("Q5_K"),
    "Q5_K_M": Mix("Q5_K", (("Q6_K", _more),), (("Q6_K", _more),)),
}
"""A file may also be named after any type of ggml that needs no importance matrix: Q8_0, Q4_0, IQ4_XS, F16."""

_NARROWER = {
    **dict.fromkeys(("Q2_K", "Q3_K", "IQ3_XXS", "IQ3_S", "IQ2_S", "IQ4_XS", "TQ1_0", "TQ2_0"), "IQ4_NL"),
    "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "NVFP4": "Q8_0", "Q1_0": "Q4_0",
}  # fmt: skip
"""The replacement for a type whose blocks do not divide the rows of a matrix."""


def is_matrix(name: str, dims: int) -> bool:
    """Whether a tensor is stored in blocks; all others are float32."""
    return dims > 1 and name.endswith(".weight") and not re.search(r"_norm\.|ffn_gate_inp|ssm_conv1d", name)


def choose(mix: str, names: Iterable[tuple[str, int]], values: dict[str, int]) -> dict[str, str]:
    """The type of every matrix.

    Args:
        names: names of all matrices, in the order of the file, and the lengths of their rows.
        values: numbers in a block, by type.
    """
    chosen, listed = MIXES.get(mix, Mix(mix)), list(names)
    tied = all(name != "output.weight" for name, _ in listed)
    values_, downs = (
        [name for name, _ in listed if re.search(pattern, name)]
        for pattern in (r"\.attn_(v|qkv)\.", r"\.ffn_down(_exps)?\.")
    )
    found = {}
    for name, n in listed:
        kind = chosen.base
        if name == "output.weight" or (tied and name == "token_embd.weight"):
            if kind not in ("F32", "F16", "BF16", "Q8_0"):
                kind = "Q6_K"
        elif ".attn_output." in name:
            kind = chosen.out or kind
        else:
            for sort, rules in ((values_, chosen.value), (downs, chosen.down)):
                if name in sort:
                    at = sort.index(name), len(sort)
                    kind = next((type_ for type_, where in rules if where(*at)), kind)
        while n % values[kind]:
            kind = _NARROWER.get(kind, "F16")
        found[name] = kind
    return found
