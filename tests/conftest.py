"""Shared by all tests: which targets exist here."""

from __future__ import annotations

from anydelta.conformance import Target, targets
from anydelta.conformance.run import unavailable

CPU_REASONS = unavailable("cpu")
"""Why the cpu backend does not run here; empty when it does."""
CPU_TARGETS: list[Target] = [] if CPU_REASONS else targets(["cpu"])
"""Every instruction set with every framework."""
