"""com.microsoft::LinearAttention on ONNX Runtime's CPU: a graph of that one node, all arrays bound once.

    q, k [B, T, H D]   v, o [B, T, HV D]   g [B, T, HV] or [B, T, HV D], a log decay   beta [B, T, HV]
    state in and out [B, HV, D, D] (kv)

It computes in float32 only and has no snapshots. Snapshots take one call per token, each state in its own memory.
"""

from __future__ import annotations

import importlib
from functools import cached_property
from typing import Any

import numpy as np

from ...core.probe import package_version
from ..measure.cases import F32, Case, Inputs
from ..measure.contender import Result, Runner, RunnerBase, needs, only_plain

NAMES = ("q", "k", "v", "state", "g", "beta")
RESULTS = ("o", "final")


class OnnxRuntime:
    name = "onnxruntime"

    @cached_property
    def _lacks(self) -> str | None:
        """Why this release lacks the operator: older ones refuse a session with the graph."""
        case = Case("gda", 1, 1, 1, 8)
        try:
            _session(case, 1, 1)
        except Exception as error:
            said = str(error).strip().splitlines() or [type(error).__name__]
            return f"onnxruntime {self.version()} has no LinearAttention: {said[0]}"
        return None

    def missing(self) -> str | None:
        return needs("onnxruntime", "onnxruntime") or needs("onnx", "onnx") or self._lacks

    def version(self) -> str:
        return package_version("onnxruntime")

    def refuses(self, case: Case) -> str | None:
        return only_plain(case)

    def prepare(self, case: Case, inputs: Inputs, threads: int) -> Runner:
        return _OnnxRuntimeRunner(case, inputs, threads)


def _session(case: Case, T: int, threads: int) -> Any:
    onnxruntime, onnx = (importlib.import_module(name) for name in ("onnxruntime", "onnx"))
    helper, FLOAT = onnx.helper, onnx.TensorProto.FLOAT
    B, H, HV, D = case.B, case.H, case.HV, case.D
    o, state = (B, T, HV * D), (B, HV, D, D)
    shapes = {
        "q": (B, T, H * D), "k": (B, T, H * D), "v": o, "state": state,
        "g": (B, T, HV * (1 if case.gate == "gda" else D)), "beta": (B, T, HV), "o": o, "final": state,
    }  # fmt: skip
    values = {name: helper.make_tensor_value_info(name, FLOAT, shape) for name, shape in shapes.items()}
    node = helper.make_node(
        "LinearAttention", NAMES, RESULTS, domain="com.microsoft", q_num_heads=H, kv_num_heads=HV,
        update_rule="gated_delta", scale=float(D**-0.5),
    )  # fmt: skip
    inputs, results = ([values[name] for name in names] for names in (NAMES, RESULTS))
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([node], "rule", inputs, results)
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])


class _OnnxRuntimeRunner(RunnerBase):
    def __init__(self, case: Case, inputs: Inputs, threads: int):
        value = importlib.import_module("onnxruntime").OrtValue.ortvalue_from_numpy
        step = 1 if case.snapshots else case.T
        session = _session(case, step, threads)
        steps = range(0, case.T, step)

        def flat(x: F32, t: int) -> Any:
            return value(np.ascontiguousarray(x[:, t : t + step]).reshape(case.B, step, -1))

        tokens = [{n: flat(getattr(inputs, n), t) for n in ("q", "k", "v", "g", "beta")} for t in steps]
        self.outs = [value(np.zeros((case.B, step, case.HV * case.D), np.float32)) for _ in steps]
        self.kept, bindings = [], []
        for _ in range(case.states):
            state, kept, bound = value(inputs.state), [], []
            for given, o in zip(tokens, self.outs, strict=True):
                final = value(np.zeros_like(inputs.state))
                binding = session.io_binding()
                for name, x in {**given, "state": state}.items():
                    binding.bind_ortvalue_input(name, x)
                for name, x in (("o", o), ("final", final)):
                    binding.bind_ortvalue_output(name, x)
                bound.append(binding)
                kept.append(final)
                state = final
            self.kept.append(kept)
            bindings.append(bound)
        run = session.run_with_iobinding

        def call(i: int) -> None:
            for binding in bindings[i]:
                run(binding)

        super().__init__(case, call)
        self.detail = "T calls" if case.snapshots else ""

    def result(self) -> Result:
        c = self.case
        for x in (*self.outs, *self.kept[0]):
            x.update_inplace(np.full(x.shape(), np.nan, np.float32))  # so that unwritten elements show
        self.call(0)
        o = np.concatenate([x.numpy().reshape(c.B, -1, c.HV, c.D) for x in self.outs], axis=1)
        kept = np.stack([x.numpy() for x in reversed(self.kept[0])])
        return Result(o, kept[0], kept if c.snapshots else None)

    def close(self) -> None:
        super().close()
        self.outs, self.kept = [], []
