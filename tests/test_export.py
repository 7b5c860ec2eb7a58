"""Exported programs: the state stays mutated, and AOTInductor calls the kernels directly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import anydelta
from anydelta.rule import torch_ops as torch_op

H, D = 2, 4


def inputs() -> tuple[Tensor, ...]:
    random = torch.Generator().manual_seed(1)
    q, k, v = torch.randn((3, 1, 1, H, D), generator=random)
    return q, k / 2, v, -torch.rand((1, 1, H), generator=random), torch.rand((1, 1, H), generator=random)


class StateAsInput(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> Tensor:
        return anydelta.gated_delta_rule_(q, k, v, state, g=g, beta=beta)  # type: ignore[no-any-return]


class StateAsBuffer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("state", torch.zeros(1, H, D, D))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
        return anydelta.gated_delta_rule_(q, k, v, self.state, g=g, beta=beta)  # type: ignore[no-any-return]


class StateAsAttribute(StateAsBuffer):
    """Neither: the exporter would freeze it into a constant."""

    def __init__(self) -> None:
        torch.nn.Module.__init__(self)
        self.state = torch.zeros(1, H, D, D)


def functional(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    program = program.run_decompositions({})
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert "auto_functionalized_v2" in targets
    assert not [t for t in targets if "gated_delta_rule_" in t]
    return program


@torch.no_grad()
def test_functionalised_state_as_input() -> None:
    x, state, want_state = inputs(), torch.zeros(1, H, D, D), torch.zeros(1, H, D, D)
    program = functional(torch.export.export(StateAsInput(), (*x, state)))
    assert list(program.graph_signature.user_inputs_to_mutate.values()) == ["state"]
    run = program.module()
    for _ in range(3):
        want = StateAsInput()(*x, want_state)
        assert torch.equal(run(*x, state), want)
        assert torch.equal(state, want_state)
    assert state.abs().sum() > 0


@torch.no_grad()
def test_functionalised_state_as_buffer() -> None:
    x, eager = inputs(), StateAsBuffer()
    program = functional(torch.export.export(StateAsBuffer(), x))
    assert list(program.graph_signature.buffers_to_mutate.values()) == ["state"]
    run = program.module()
    for _ in range(3):
        assert torch.equal(run(*x), eager(*x))
        assert torch.equal(run.state, eager.state)


@torch.no_grad()
def test_a_state_that_would_be_frozen_is_refused() -> None:
    program = torch.export.export(StateAsAttribute(), inputs())
    with pytest.raises(RuntimeError, match="state is mutated in the forward method"):
        program.run_decompositions({})


needs_library = pytest.mark.skipif(
    torch_op.LIBRARY is None, reason=f"anydelta_torch is not in use: {torch_op.LIBRARY_REASON}"
)


@needs_library
def test_declarations_follow_the_schemas() -> None:
    from anydelta.export import aoti

    shims = {op.name(): text for op, (text,) in aoti.c_shims().items()}
    assert set(shims) == {f"anydelta::{name}" for name in torch_op.SCHEMAS}
    assert shims["anydelta::gated_delta_rule_"].startswith(
        "AOTITorchError aoti_torch_cpu_gated_delta_rule_(AtenTensorHandle, AtenTensorHandle, "
    )
    assert shims["anydelta::gated_delta_rule"].endswith("const char*, AtenTensorHandle*, AtenTensorHandle*)")


@needs_library
@torch.no_grad()
def test_aotinductor_calls_the_kernel_and_carries_the_state(tmp_path: Path) -> None:
    from anydelta.export import aoti

    x, state, want_state = inputs(), torch.zeros(1, H, D, D), torch.zeros(1, H, D, D)
    program = torch.export.export(StateAsInput(), (*x, state))
    path = aoti.compile_and_package(program, tmp_path / "op.pt2")
    import zipfile

    package = zipfile.ZipFile(path)
    code = next(package.read(n).decode() for n in package.namelist() if n.endswith(".wrapper.cpp"))
    assert "AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_gated_delta_rule_(" in code
    assert "aoti_torch_proxy_executor_call_function(proxy_executor" not in code
    run: Any = torch._inductor.aoti_load_package(str(path))
    for _ in range(3):
        assert torch.equal(run(*x, state), StateAsInput()(*x, want_state))
        assert torch.equal(state, want_state)


def test_the_exportable_model_generates_as_transformers_does() -> None:
    transformers = pytest.importorskip("transformers")
    from anydelta.export.qwen3_5 import Model, generate

    folder = Path(__file__).parents[1] / "examples" / "tiny_model"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ours, prompt = Model.load(folder), [259, 343, 12, 268]
    with torch.no_grad():
        states = ours.new_states()
        got = generate(lambda ids, position: ours(ids, position, states), prompt, 16)
        want = theirs.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False)[0, len(prompt) :]
    assert got == want.tolist()


def test_other_models_are_refused(tmp_path: Path) -> None:
    from anydelta.export.qwen3_5 import Config

    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="must have model_type qwen3_5_text; got 'llama'"):
        Config.read(tmp_path)
