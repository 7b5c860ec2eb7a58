"""What this machine has and runs. Code is tried in a separate process, because it may crash on another CPU."""

from __future__ import annotations

import importlib.metadata
import os
import signal
import subprocess
import sys
from functools import cache


@cache
def fails(code: str) -> str | None:
    """Why that code fails, in one line; None if it runs."""
    paths = os.pathsep.join(filter(None, sys.path))
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": paths}, capture_output=True,
            text=True, errors="replace", stdin=subprocess.DEVNULL, timeout=300,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return "no answer within 5 minutes"
    if done.returncode == 0:
        return None
    ended = f"exit status {done.returncode}" if done.returncode > 0 else signal.Signals(-done.returncode).name
    return (done.stderr.strip().splitlines() or [ended])[-1]


def package_version(name: str) -> str:
    """The version of a package, or "?" if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "?"


def available_cpus() -> int:
    """How many CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
