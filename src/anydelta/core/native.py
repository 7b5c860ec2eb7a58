"""The compiled CPU kernels, `anydelta._core` (backends/cpu/module.cpp), or the reason why they are missing."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

why_not = ""
if TYPE_CHECKING:
    from .. import _core

    core = _core
else:
    core = None
    try:
        core = importlib.import_module("anydelta._core")
    except ImportError as error:  # a source tree that was not built
        why_not = f"the extension anydelta._core is not built or does not load ({error})"
