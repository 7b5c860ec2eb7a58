"""Finds anydelta_torch, torch.ops.anydelta in C++ (torch_library.cpp), or the reason why it is not used.

It is built if torch is installed at build time (CMakeLists.txt), needs only libtorch's stable ABI, and runs calls on
CPU tensors instead of the registration in Python. Nothing here imports torch.
"""

from __future__ import annotations

from pathlib import Path

from ..core import libraries

MINIMUM_TORCH = (2, 10)
"""The first torch whose stable ABI allows strings as arguments of operators; TORCH_TARGET_VERSION of the build."""

ENV = "ANYDELTA_TORCH_LIBRARY"
"""0 registers the operators from Python even if the library exists."""


def find() -> tuple[Path | None, str]:
    """Return (the library, "") or (None, the reason why there is none)."""
    return libraries.find("anydelta_torch", "torch", MINIMUM_TORCH, ENV)
