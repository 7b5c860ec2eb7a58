"""The compiled CPU kernels; backends/cpu/module.cpp says what is in here. Only backends/cpu.py and op.py call it."""

from typing import Any

def __getattr__(name: str) -> Any: ...
