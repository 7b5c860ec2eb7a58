"""Shared by all tests: which targets exist here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NoReturn

import pytest

from anydelta import op
from anydelta.conformance import Target, targets
from anydelta.conformance.run import unavailable

REQUIRED = tuple(filter(None, os.environ.get("ANYDELTA_REQUIRE", "").split(",")))
"""Backends without which the tests must fail instead of skipping; CI names them."""
CPU_REASONS = unavailable("cpu")
"""Why the cpu backend does not run here; empty when it does."""
CPU_TARGETS: list[Target] = [] if CPU_REASONS else targets(["cpu"])
"""Every instruction set with every framework."""


def without(why: str) -> NoReturn:
    """Skip for want of something that `make setup` installs or a clone holds; in CI, fail."""
    if REQUIRED:
        pytest.fail(f"CI must have this: {why}")
    pytest.skip(why, allow_module_level=True)


@pytest.fixture
def fresh_plans() -> Iterator[None]:
    """Plans remember the device and how its kernel was cut: none from before, none left."""
    op._plans.clear()
    yield
    op._plans.clear()
