"""ONNX: our operator in ONNX Runtime, LinearAttention on request, states as inputs and outputs."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import anydelta
from conftest import without
from export_inputs import HV, B, K, T, V, call, randn

if missing := [
    name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None
]:
    without(f"not installed: {', '.join(missing)}")

from anydelta.export import onnx as export
from anydelta.export.qwen3_5 import Config, Model, generate

try:
    export.library()
except RuntimeError as error:
    without(str(error))

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's exporter, dozens


class Functional(torch.nn.Module):
    def __init__(self, **flags: Any):
        super().__init__()
        self.flags = flags

    def forward(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, **more: Tensor) -> Any:
        return anydelta.gated_delta_rule(q, k, v, g=g, beta=beta, **self.flags, **more)


class InPlace(Functional):
    def forward(  # type: ignore[override]
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, **more: Tensor
    ) -> Any:
        return anydelta.gated_delta_rule_(q, k, v, state, g=g, beta=beta, **self.flags, **more)


def exported(module: torch.nn.Module, inputs: dict[str, Tensor], operator: str = "anydelta") -> Any:
    with torch.no_grad():
        return export.to_onnx(torch.export.export(module, (), inputs), operator=operator)


def run(model: Any, inputs: dict[str, Tensor], run: Any = None) -> list[Tensor]:
    run = run or export.session(model.model_proto.SerializeToString()).run
    names = [x.name for x in model.model.graph.inputs]  # torch.export makes them lower-case
    arrays = dict(zip(names, (x.numpy() for x in inputs.values()), strict=True))
    return [torch.from_numpy(x) for x in run(None, arrays)]


FADED = {
    "beta": torch.zeros(B, T, HV),
    "initial_state": torch.full((B, HV, K, V), 1e-39),
}  # comes out as zero
RAW = {"A_log": randn(HV), "dt_bias": randn(HV)}
CASES: dict[str, tuple[dict[str, Any], dict[str, Tensor]]] = {
    "plain": ({}, {**call(), "initial_state": randn(B, HV, K, V)}),
    "half_kda_tiled": ({"heads": "tiled", "scale": 0.5}, call(kda=True, dtype=torch.float16)),
    "raw_vk": (
        dict(decay="raw", lower_bound=-3.0, beta_is_logit=True, qk_l2norm=True, state_layout="vk"),
        {**call(), "initial_state": randn(B, HV, V, K), **RAW},
    ),
    "subnormal": ({}, {**call(), **FADED}),
    "mask": ({"decay": "linear"}, {**call(), "mask": torch.arange(10).view(B, T) > 2}),
    "pool": ({}, {**call(), "initial_state": randn(3, HV, K, V), "state_indices": torch.tensor([2, -1])}),
}
CASES["mask"][1]["g"] = CASES["mask"][1]["g"].exp()


@pytest.mark.parametrize("name", CASES)
def test_our_operator_gives_what_eager_gives(name: str) -> None:
    flags, inputs = CASES[name]
    model = exported(Functional(**flags), inputs)
    assert [n.op_type for n in model.model.graph if n.domain == "anydelta"] == ["GatedDeltaRule"]
    for a, b in zip(run(model, inputs), Functional(**flags)(**inputs), strict=True):
        assert torch.equal(a, b)


def test_an_invalid_call_is_refused_in_one_sentence() -> None:
    flags, inputs = CASES["pool"]
    model = exported(Functional(**flags), inputs)
    with pytest.raises(Exception, match=r"state_indices must be") as refused:
        run(model, {**inputs, "state_indices": torch.tensor([1, 3])})
    assert "gated_delta_rule: state_indices must be -1 (skip) or in [0, P) with P = 3; got 3" in str(
        refused.value
    )


def test_a_state_that_is_advanced_comes_out() -> None:
    inputs = {**call(), "state": randn(B, HV, K, V)}
    model = exported(InPlace(), inputs)
    assert [x.name for x in model.model.graph.outputs][1:] == ["state_out"]
    state = inputs["state"].clone()
    for _ in range(3):
        want = InPlace()(**{**inputs, "state": state})
        got, inputs["state"] = run(model, inputs)
        assert torch.equal(got, want)
        assert torch.equal(inputs["state"], state)


def test_input_and_output_may_be_one_memory() -> None:
    import onnxruntime

    inputs = {**call(), "state": randn(B, HV, K, V)}
    session = export.session(exported(InPlace(), inputs).model_proto.SerializeToString())
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(x.numpy().copy()) for name, x in inputs.items()}
    binding = session.io_binding()
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    binding.bind_output(session.get_outputs()[0].name)
    binding.bind_ortvalue_output("state_out", values["state"])
    state = inputs["state"].clone()
    for _ in range(2):
        session.run_with_iobinding(binding)
        want = InPlace()(**{**inputs, "state": state})
        assert torch.equal(torch.from_numpy(binding.copy_outputs_to_cpu()[0]), want)
        assert torch.equal(torch.from_numpy(values["state"].numpy()), state)


def test_what_an_onnx_program_would_drop_is_refused() -> None:
    class Buffer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("state", torch.zeros(B, HV, K, V))

        def forward(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Any:
            return anydelta.gated_delta_rule_(q, k, v, self.state, g=g, beta=beta)

    with pytest.raises(ValueError, match=r"a state must be an input of the program.*got the buffer 'state'"):
        exported(Buffer(), call())
    pool = {**call(), "state": randn(3, HV, K, V), "state_indices": torch.tensor([2, -1])}
    with pytest.raises(ValueError, match="changes none of its inputs; got a call with state_indices"):
        exported(InPlace(), pool)
    with pytest.raises(ValueError, match="operator must be one of"):
        exported(Functional(), call(), "tvm")


@pytest.mark.parametrize("name", ["plain", "raw_vk"])
@pytest.mark.parametrize("operator", ["com.microsoft", "onnx"])
def test_linear_attention_on_request(operator: str, name: str, tmp_path: Path) -> None:
    """Within rounding: float32 in another order. The standard's runs in ONNX's reference and in ONNX Runtime, which
    refuses opset 27 as long as that is not final unless ALLOW_RELEASED_ONNX_OPSET_ONLY=0."""
    flags, inputs = CASES[name]
    model = exported(Functional(**flags), inputs, operator)
    domain = "" if operator == "onnx" else operator
    assert [n.domain for n in model.model.graph if n.op_type == "LinearAttention"] == [domain]
    want = Functional(**flags)(**inputs)
    results = []
    if operator == "onnx":
        from onnx.checker import check_model
        from onnx.reference import ReferenceEvaluator

        check_model(model.model_proto, full_check=True)
        results.append(run(model, inputs, ReferenceEvaluator(model.model_proto).run))
        model.save(tmp_path / "model.onnx")
        named = zip((x.name for x in model.model.graph.inputs), inputs.values(), strict=True)
        torch.save(dict(named), tmp_path / "inputs.pt")
        code = (
            "import sys, torch, onnxruntime; x = torch.load(sys.argv[2]);"
            "r = onnxruntime.InferenceSession(sys.argv[1]).run(None, {n: a.numpy() for n, a in x.items()});"
            "torch.save([torch.from_numpy(a) for a in r], sys.argv[2])"
        )
        environment = {**os.environ, "ALLOW_RELEASED_ONNX_OPSET_ONLY": "0"}
        arguments = [sys.executable, "-c", code, tmp_path / "model.onnx", tmp_path / "inputs.pt"]
        subprocess.run(arguments, check=True, capture_output=True, env=environment)
        results.append(torch.load(tmp_path / "inputs.pt"))
    else:
        results.append(run(model, inputs))
    for got in results:
        for a, b in zip(got, want, strict=True):
            assert (a - b).abs().max() < 1e-5


def test_linear_attention_refuses_what_it_cannot_express() -> None:
    for name, reason in {
        "mask": "a mask",
        "half_kda_tiled": "float16 q, k and v",
        "pool": "state_indices",
    }.items():
        flags, inputs = CASES[name]
        with pytest.raises(ValueError, match=rf"got {reason}\. Use operator=\"anydelta\""):
            exported(Functional(**flags), inputs, "com.microsoft")


SMALL = Config(
    vocab_size=48, hidden_size=16, intermediate_size=16, layer_types=["linear_attention", "full_attention"],
    num_attention_heads=2, num_key_value_heads=1, head_dim=8, linear_num_key_heads=1, linear_num_value_heads=2,
    linear_key_head_dim=8, linear_value_head_dim=8, linear_conv_kernel_dim=4, rms_norm_eps=1e-6, rope_theta=1e4,
    partial_rotary_factor=0.5,
)  # fmt: skip


@torch.no_grad()
def test_a_model_generates_as_in_eager() -> None:
    """A small model of random weights; `make demo-export` runs the trained one."""
    torch.manual_seed(0)
    model = Model(SMALL).eval().requires_grad_(False)
    for p in model.parameters():
        p.copy_(torch.randn_like(p))
    states = model.new_states(max_tokens=32)
    length, fixed = torch.export.Dim("T", min=2, max=32), [None] * len(states)
    sessions = {}
    for name, tokens, dynamic in ("decode", 1, None), ("prefill", 3, ({1: length}, {0: length}, fixed)):
        example = (torch.ones(1, tokens, dtype=torch.int64), torch.arange(tokens), states)
        program = torch.export.export(model, example, dynamic_shapes=dynamic)
        sessions[name] = export.session(export.to_onnx(program).model_proto.SerializeToString())
    arrays = [s.numpy() for s in model.new_states(max_tokens=32)]

    def step(ids: Tensor, position: Tensor) -> Tensor:
        session = sessions["decode" if ids.shape[1] == 1 else "prefill"]
        names = [x.name for x in session.get_inputs()]
        inputs = dict(zip(names, (ids.numpy(), position.numpy(), *arrays), strict=True))
        logits, *arrays[:] = session.run(None, inputs)
        return torch.from_numpy(logits)

    states, prompt = model.new_states(max_tokens=32), [7, 3, 11, 4]
    want = generate(lambda ids, position: model(ids, position, states), prompt, 16)
    assert len(set(want)) > 4  # a model that always says the same shows nothing
    assert generate(step, prompt, 16) == want
