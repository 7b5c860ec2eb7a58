"""Makes Triton's interpreter about twice as fast: for tests without a GPU.

Whenever a kernel calls a function, the interpreter searches all of triton.language for things to replace. The start of
the kernel has replaced them already. This removes the second search.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


@cache
def quicken() -> None:
    """Do it once per process. A Triton that is built differently stays unchanged."""
    original = getattr(interpreter, "_patch_lang", None)
    scope = getattr(interpreter, "_LangPatchScope", None)
    if original is None or scope is None:
        return

    def patch(fn: Any) -> Any:
        seen = [module for module in (tl, tl.core) if any(x is module for x in fn.__globals__.values())]
        return original(fn) if any(tl.core.is_builtin(module.load) for module in seen) else scope()

    interpreter._patch_lang = patch
