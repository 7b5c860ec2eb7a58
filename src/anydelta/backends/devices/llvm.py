"""Keeps two copies of LLVM in one process apart: Triton's, and that of CPU drivers such as Mesa's lavapipe or pocl."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import sys
from functools import cache
from pathlib import Path


@cache
def load_triton_first() -> None:
    """Call this before loading a driver that may bring its own LLVM. Takes 0.2 s if triton is installed.

    libtriton.so contains an LLVM and exports its symbols. If wgpu-native has loaded Mesa's libLLVM before, libtriton's
    start-up code binds to that version, and `import triton` crashes with SIGSEGV. In this order each uses its own.
    """
    if "triton" in sys.modules or sys.platform != "linux":
        return
    found = importlib.util.find_spec("triton")  # does not import it
    for folder in (found.submodule_search_locations or ()) if found else ():
        library = Path(folder) / "_C" / "libtriton.so"
        if library.is_file():
            with contextlib.suppress(OSError):  # a Triton that does not load does no harm
                ctypes.CDLL(str(library))
