"""Modules of anydelta that need an optional package: imported when an attribute of them is first read."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any


class _Late:
    def __init__(self, name: str):
        self._name = name
        self._module: ModuleType | None = None

    def __getattr__(self, attribute: str) -> Any:
        if self._module is None:
            self._module = importlib.import_module(self._name)
        return getattr(self._module, attribute)


def late(name: str) -> Any:
    """The module of that full name, imported at its first use.

    Raises:
        ImportError: at that use, where its package is missing.
    """
    return _Late(name)
