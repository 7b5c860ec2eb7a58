"""Decays as in models: g = -A softplus(x + dt_bias), with A and dt_bias per head (KDA: dt_bias per channel)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .values import F64

KINDS = ("initialised", "trained")


@dataclass(frozen=True)
class Gates:
    """The inputs of a layer's decays."""

    x: F64
    """[B, T, HV] or [B, T, HV, K]: the projection, decay="raw"'s g"""
    A: F64
    """[HV]"""
    dt_bias: F64
    """[HV] or [HV, K]"""

    def log(self) -> F64:
        """The log decays, of x's shape."""
        A = self.A[:, None] if self.x.ndim == 4 else self.A
        return np.asarray(-A * np.logaddexp(0, self.x + self.dt_bias))


def model_gates(kind: str, shape: tuple[int, ...], rng: np.random.Generator) -> Gates:
    """Gates of x's shape.

    "initialised": A in U(0.01, 16), dt_bias 1, as in new layers of Transformers. Half of the decays are below -8.
    "trained": the ranges of examples/tiny_model's parameters. Long memory, and some 3% of the decays below -8.
    """
    if kind == "initialised":
        return Gates(rng.standard_normal(shape), rng.uniform(0.01, 16, shape[2]), np.ones(shape[2:]))
    if kind == "trained":
        return Gates(
            rng.normal(0, 3, shape),
            np.exp(rng.uniform(-0.25, 3.35, shape[2])),
            rng.uniform(-7, -2.3, shape[2:]),
        )
    raise ValueError(f"model_gates: requires a kind of {KINDS}; got {kind!r}")
