"""anydelta_torch: torch.ops.anydelta in C++ (torch_library.cpp), where it lies, and why it may not be in use.

It is built wherever torch is there at build time (CMakeLists.txt), needs nothing but libtorch's stable ABI, and runs
calls on CPU tensors in place of the registration in Python. Nothing here imports torch.
"""

from __future__ import annotations

from pathlib import Path

from ..core import libraries

MINIMUM_TORCH = (2, 10)
"""The first torch whose stable ABI has texts among an operator's arguments; TORCH_TARGET_VERSION of the build."""

ENV = "ANYDELTA_TORCH_LIBRARY"
"""Set to 0, the operators are registered from Python even where the library is there."""


def find() -> tuple[Path | None, str]:
    """(the library, "") or (None, why there is none to use)."""
    return libraries.find("anydelta_torch", "torch", MINIMUM_TORCH, ENV)
