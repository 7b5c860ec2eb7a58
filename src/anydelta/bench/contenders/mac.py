"""Contenders on an Apple GPU beside anydelta: MLX's built-in operator, mlx-lm's kernel, Transformers' torch path.

Each queues its calls, as its users do. The clock stops when the GPU has finished all of them.

| contender | decay | state | snapshots |
|---|---|---|---|
| mlx | linear | [B, HV, V, K] | none: T calls |
| mlx-lm | linear | [B, HV, V, K] | none: T calls |
| transformers | log | [B, HV, K, V] | none: T calls |
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ...core.probe import package_version
from ..measure.cases import Case, Inputs
from ..measure.contender import Contender, Result, Runner, RunnerBase, needs

if TYPE_CHECKING:
    from mlx.core import array


class MlxBuiltin:
    """mx.fast.gated_delta_update on the GPU."""

    name = "mlx"

    def missing(self) -> str | None:
        if why := needs("mlx.core", "mlx"):
            return why
        mx = importlib.import_module("mlx.core")
        if not mx.metal.is_available():
            return "mlx finds no Apple GPU"
        if not hasattr(mx.fast, "gated_delta_update"):
            return f"mlx {self.version()} has no mx.fast.gated_delta_update (0.32.3 and later do)"
        return None

    def version(self) -> str:
        return package_version("mlx")

    def refuses(self, case: Case) -> str | None:
        return "it takes one decay per head" if case.gate == "kda" else None

    def prepare(self, case: Case, inputs: Inputs, threads: int) -> Runner:
        return _MlxRunner(case, inputs, importlib.import_module("mlx.core").fast.gated_delta_update)


class MlxLm:
    """mlx-lm's own Metal kernel, as its models call it."""

    name = "mlx-lm"

    def missing(self) -> str | None:
        if why := needs("mlx.core", "mlx") or needs("mlx_lm", "mlx-lm"):
            return why
        mx = importlib.import_module("mlx.core")
        return None if mx.metal.is_available() else "mlx finds no Apple GPU"

    def version(self) -> str:
        return package_version("mlx-lm")

    def refuses(self, case: Case) -> str | None:
        return f"it takes head sizes that are multiples of 32; got {case.D}" if case.D % 32 else None

    def prepare(self, case: Case, inputs: Inputs, threads: int) -> Runner:
        return _MlxRunner(
            case, inputs, importlib.import_module("mlx_lm.models.gated_delta").gated_delta_kernel
        )


class _MlxRunner(RunnerBase):
    """`update(q, k, v, decay, beta, state)` returns (o, state). Calls are queued, computed at the end of a sample."""

    def __init__(self, case: Case, inputs: Inputs, update: Callable[..., tuple[array, array]]):
        mx = importlib.import_module("mlx.core")
        self.mx = mx
        scaled = inputs.q * np.float32(case.D**-0.5)
        args = [mx.array(x) for x in (scaled, inputs.k, inputs.v, np.exp(inputs.g), inputs.beta)]
        start = mx.array(np.ascontiguousarray(np.swapaxes(inputs.state, -1, -2)))
        self.states: list[array] = [start + 0 for _ in range(case.states)]
        self.queued: list[array] = []
        mx.eval(*args, *self.states)
        tokens = [[a[:, t : t + 1] for a in args] for t in range(case.T)] if case.snapshots else [args]

        def call(i: int) -> None:
            state, outs, kept = self.states[i], [], []
            for a in tokens:
                o, state = update(*a, state)
                outs.append(o)
                kept.append(state)
            self.last = outs, kept
            self.queued += [*outs, *kept]

        super().__init__(case, call)
        self.detail = "GPU" + (", T calls" if case.snapshots else "")

    def run(self, calls: int) -> None:
        super().run(calls)
        self.mx.eval(self.queued)
        self.queued.clear()

    def result(self) -> Result:
        self._next = 0
        self.run(1)
        outs, kept = self.last
        o = np.concatenate([np.array(x) for x in outs], axis=1)
        states = np.stack([np.array(x).swapaxes(-1, -2) for x in reversed(kept)])
        return Result(o, states[0], states if self.case.snapshots else None)

    def close(self) -> None:
        super().close()
        self.states, self.queued = [], []


def mac_peers() -> list[Contender]:
    """The peers on an Apple GPU, except Transformers, which packages.py has for all devices."""
    return [MlxBuiltin(), MlxLm()]
