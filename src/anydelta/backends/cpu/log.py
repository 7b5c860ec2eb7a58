"""The host of the native kernels of a log (backends/cpu/log.inl.h): verify tokens, and fold entries into the states."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ...core.accepts import ANY, Row
from ...core.arrays import Array
from ...core.native import core as _core
from ...core.plans import Rest, find, keep
from ...rule.arguments import Call
from ...rule.spec import framework_of
from ...state.log_spec import Fold, Index, LogArrays, LogSpec
from ..accepts import FLOATS, RULE_CALLS, STATES
from . import host as cpu


@dataclass(slots=True)
class _Plan:
    native: _core.Plan
    copies: list[str]
    """Arrays that the kernels cannot read as they are."""


class CpuSteps:
    """One log. It holds the addresses of each layer's arrays: reading them costs more than a small head."""

    def __init__(self, log: LogArrays):
        self.log, self.torch = log, framework_of(log.states) == "torch"
        self.at = [
            (cpu.address(log.states[i]), tuple(cpu.address(x[i]) for x in log.arrays))
            for i in range(log.layers)
        ]

    def prepare(self, spec: LogSpec, call: Call) -> _Plan:
        strides, copies = cpu.token_strides(call)
        copies += cpu.scattered(call, ("A_log", "dt_bias"))
        fields, _, _ = cpu.rule_fields(spec.rule, call, strides)
        return _Plan(self._native(fields), copies)

    def verify(
        self, plan: Any, spec: LogSpec, layer: int, call: Call, index: Index, folded: dict[int, None] | None
    ) -> Array:
        base, rows, used, folds = index
        for name in plan.copies:
            setattr(call, name, cpu.contiguous(getattr(call, name)))
        o = call.v.new_empty(call.v.shape) if self.torch else np.empty(call.v.shape, call.v.dtype)
        self._run(
            plan.native, False, layer, folded, call.q, call.k, call.v, call.g, call.beta, o, self.at[layer][0], None,
            call.A_log, call.dt_bias, call.mask, call.cu_seqlens, base, *self.at[layer][1], self.log.parents, rows,
            used, folds, None,
        )  # fmt: skip
        return o

    def fold(self, group: list[Fold], layer: int, out: Array | None, folded: dict[int, None] | None) -> None:
        log = self.log
        places, rows, to, counts = (np.array(x, np.int64) for x in zip(*group, strict=True))
        spec = log.rule(len(group))
        rest: Rest = (
            "fold", self.torch, spec.N, spec.P, spec.H, spec.HV, spec.K, spec.V, spec.kda, spec.state_dtype,
            spec.options.state_layout, spec.options.heads,
        )  # fmt: skip
        found = find((), rest)
        if type(found) is not _Plan:
            nothing = Call(None, None, None, None, None, log.states[0])
            key, found = found, _Plan(self._native(cpu.rule_fields(spec, nothing, {})[0]), [])
            keep(key, rest, found)
        states, entries = self.at[layer]
        target = states if out is None else cpu.address(out)
        self._run(
            found.native, True, layer, folded, *[None] * 6, states, target, *[None] * 4, rows, *entries, log.parents,
            places, counts, None, to,
        )  # fmt: skip

    def _native(self, fields: dict[str, object]) -> _core.Plan:
        number, torch = cpu.threads_of("torch" if self.torch else "numpy")
        return _core.Plan(fields, None if torch else number)

    def _run(
        self, plan: _core.Plan, folding: bool, layer: int, folded: dict[int, None] | None, *arrays: Array
    ) -> None:
        log = self.log
        if self.torch:
            import torch

            torch._C._increment_version((log.states, *log.arrays))
        own = [x for x in arrays if hasattr(x, "dtype")]
        if not cpu.reads_arrays("torch" if self.torch else "numpy", own):
            arrays = tuple(cpu.address(x) if hasattr(x, "dtype") else x for x in arrays)
        head = (plan, folding, log.C, cpu.DTYPE[log.key_dtype])
        if folded is None:
            _core.run_log(*head, *arrays)
        else:  # call and mark without an interpreter step between them, where Ctrl-C could interrupt
            call = partial(_core.run_log, *head, *arrays[:-1])
            folded.update(zip((layer,), map(call, arrays[-1:]), strict=True))


class CpuLog:
    """The log of the cpu backend."""

    name = "cpu"
    accepts = RULE_CALLS.but(
        device=Row(("cpu",), cpu.DEVICE.said),
        framework=("torch", "numpy"),
        state_dtype=STATES,
        key_dtype=FLOATS,
        entries=ANY,
        limits=(),
    )
    folds_late = True

    def attach(self, log: LogArrays) -> CpuSteps:
        return CpuSteps(log)


LOG = CpuLog()
