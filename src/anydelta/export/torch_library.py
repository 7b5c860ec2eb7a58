"""anydelta_torch: torch.ops.anydelta in C++ (torch_library.cpp), where it lies, and why it may not be in use.

It is built wherever torch is there at build time (CMakeLists.txt), needs nothing but libtorch's stable ABI, and runs
calls on CPU tensors in place of the registration in Python. Nothing here imports torch.
"""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

MINIMUM_TORCH = (2, 10)
"""The first torch whose stable ABI has texts among an operator's arguments; TORCH_TARGET_VERSION of the build."""

ENV = "ANYDELTA_TORCH_LIBRARY"
"""Set to 0, the operators are registered from Python even where the library is there."""

_NAMES = ("libanydelta_torch.so", "libanydelta_torch.dylib", "anydelta_torch.dll", "anydelta_torch.so")


def find() -> tuple[Path | None, str]:
    """(the library, "") or (None, why there is none to use)."""
    if os.environ.get(ENV) == "0":
        return None, f"{ENV}=0"
    try:
        from .. import _core
    except ImportError as error:
        return None, f"the extension anydelta._core is not built or does not load ({error})"
    try:
        torch = version("torch")
    except PackageNotFoundError:
        return None, "torch is not installed"
    if tuple(int(n) for n in torch.split(".")[:2]) < MINIMUM_TORCH:
        return None, f"it needs torch {'.'.join(map(str, MINIMUM_TORCH))} or newer; got {torch}"
    folder = Path(_core.__file__).parent
    path = next((folder / name for name in _NAMES if (folder / name).exists()), None)
    if path is None:
        return None, "anydelta was built where no torch was; see docs/export.md"
    return path, ""
