"""Shared by all tests: which targets exist here."""

from __future__ import annotations

import os

from anydelta.conformance import Target, targets
from anydelta.conformance.run import unavailable

REQUIRED = tuple(filter(None, os.environ.get("ANYDELTA_REQUIRE", "").split(",")))
"""Backends without which the tests must fail instead of skipping; CI names them."""
CPU_REASONS = unavailable("cpu")
"""Why the cpu backend does not run here; empty when it does."""
CPU_TARGETS: list[Target] = [] if CPU_REASONS else targets(["cpu"])
"""Every instruction set with every framework."""
