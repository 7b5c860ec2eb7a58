"""ExecuTorch: the operators in its runtime, states that programs carry, and its own operators mapped to ours."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import anydelta
from conftest import without
from export_inputs import HV, B, K, T, V, call, randn

if importlib.util.find_spec("executorch") is None:
    without("the executorch package is not installed")

from anydelta.export import executorch as export
from anydelta.export.peers import use_anydelta
from anydelta.export.qwen3_5 import Config, Model, WithBuffers, generate

try:
    export.load()
except RuntimeError as error:
    without(str(error))

pytestmark = pytest.mark.filterwarnings("ignore")  # executorch's own, dozens


class Operator(torch.nn.Module):
    """One call; in place on a buffer where `state` is given."""

    def __init__(self, state: Tensor | None = None, **flags: Any):
        super().__init__()
        self.flags = flags
        if state is not None:
            self.register_buffer("state", state)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, **more: Tensor) -> Any:
        flags = {**self.flags, **more}
        if hasattr(self, "state"):
            return anydelta.gated_delta_rule_(q, k, v, self.state, g=g, beta=beta, **flags)
        return anydelta.gated_delta_rule(q, k, v, g=g, beta=beta, **flags)


CASES: dict[str, tuple[Callable[[], Operator], dict[str, Tensor]]] = {
    "functional": (Operator, {**call(), "initial_state": randn(B, HV, K, V)}),
    "subnormal": (  # comes out as zero
        Operator,
        {**call(), "beta": torch.zeros(B, T, HV), "initial_state": torch.full((B, HV, K, V), 1e-39)},
    ),
    "no_final_state": (lambda: Operator(output_final_state=False), call()),
    "kda_bf16_tiled": (lambda: Operator(heads="tiled", scale=0.5), call(kda=True, dtype=torch.bfloat16)),
    "raw": (
        lambda: Operator(
            decay="raw", lower_bound=-3.0, beta_is_logit=True, qk_l2norm=True, state_layout="vk"
        ),
        {**call(), "A_log": randn(HV), "dt_bias": randn(HV)},
    ),
    "in_place": (lambda: Operator(randn(B, HV, K, V)), call()),
    "pool": (
        lambda: Operator(randn(4, HV, K, V)),
        {**call(), "state_indices": torch.tensor([3, -1]), "mask": torch.arange(10).view(B, T) > 2},
    ),
}


@pytest.fixture(scope="module")
def programs() -> Any:
    """All of CASES as the methods of one ExecuTorch program; lowering takes most of this file's time."""
    from executorch.runtime import Runtime

    exported = {}
    with torch.no_grad():
        for name, (make, inputs) in CASES.items():
            exported[name] = torch.export.export(make(), (), inputs)
        exported["packed"] = torch.export.export(Packed(), PACKED)
    return Runtime.get().load_program(export.lower(exported).buffer)


class Packed(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, cu: Tensor) -> Any:
        return anydelta.gated_delta_rule(q, k, v, g=g, beta=beta, cu_seqlens=cu)


PACKED = (*(x[:1] for x in call().values()), torch.tensor([0, 2, 5]))


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_the_runtime_gives_what_eager_gives(programs: Any, name: str) -> None:
    make, inputs = CASES[name]
    eager, method = make(), programs.load_method(name)
    for _ in range(2):  # a state in a buffer goes on
        want = eager(**inputs)
        got = method.execute(list(inputs.values()))
        for a, b in zip(got, flat(want), strict=True):
            assert (a is None and b is None) or torch.equal(a, b)


@torch.no_grad()
def test_an_invalid_call_is_refused_in_one_sentence(programs: Any, capfd: pytest.CaptureFixture[str]) -> None:
    method = programs.load_method("packed")
    assert torch.equal(method.execute(PACKED)[0], Packed()(*PACKED)[0])
    with pytest.raises(RuntimeError):
        method.execute([*PACKED[:-1], torch.tensor([0, 3, 4])])
    assert (
        "gated_delta_rule: cu_seqlens must start at 0 and end at T = 5; got 0 and 4" in capfd.readouterr().err
    )
    assert torch.equal(method.execute(PACKED)[0], Packed()(*PACKED)[0])


@torch.no_grad()
def test_a_state_that_would_be_copied_is_refused() -> None:
    class StateAsInput(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> Any:
            return anydelta.gated_delta_rule_(q, k, v, state, g=g, beta=beta)

    program = torch.export.export(StateAsInput(), (*call().values(), randn(B, HV, K, V)))
    with pytest.raises(
        ValueError, match=r"requires the state to be a registered buffer; got the input 'state'"
    ):
        export.lower(program)


@torch.no_grad()
def test_shared_states_begin_at_zero() -> None:
    program = torch.export.export(Operator(randn(B, HV, K, V)), (), call())
    with pytest.raises(
        ValueError, match="shared states must begin at zero, as the runtime's memory does; got 'state'"
    ):
        export.lower({"decode": program}, share_states=True)


class Metal(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("state", randn(B, HV, V, K))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
        return torch.ops.metal.gated_delta_rule(q, k, v, g, beta, self.state)  # type: ignore[no-any-return]


class Llama(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, state: Tensor) -> Any:
        return torch.ops.llama.gated_delta_rule(q, k, v, decay, beta, state)


def llama_inputs(Hq: int, Hkv: int, kda: bool) -> tuple[Tensor, ...]:
    decay = randn(B, Hkv, T, K) if kda else randn(B, Hkv, T)
    qkv = randn(B, Hq, T, K), randn(B, Hkv, T, K) / 3, randn(B, Hkv, T, V)
    return *qkv, decay.sigmoid(), randn(B, Hkv, T).sigmoid(), randn(B, Hkv, K, V)


@torch.no_grad()
@torch.no_grad()
@pytest.mark.parametrize("share", [False, True])
def test_tensors_begin_with_cache_lines_where_malloc_gives_the_memory(share: bool) -> None:
    program = torch.export.export(Operator(torch.zeros(B, HV, K, V)), (), call())
    (plan,) = export.lower(program, share_states=share).executorch_program.execution_plan
    infos = [getattr(value.val, "allocation_info", None) for value in plan.values]
    places = [(i.memory_id, i.memory_offset_low) for i in infos if i is not None]
    assert {memory for memory, _ in places} == ({1, 2} if share else {1})
    assert all((export.AFTER_LINE + offset) % export.LINE == 0 for _, offset in places)
    state = 4 * B * HV * K * V
    last = max(offset for memory, offset in places if memory == 2 or not share)
    assert plan.non_const_buffer_sizes[-1] >= last + (state if share else 4)


def test_their_operators_become_ours() -> None:
    """In torch and in .pte, to within some roundings of O(1) numbers: float32 sums are taken in another order."""
    from executorch.backends.apple.metal.ops import gated_delta_rule  # noqa: F401  (defines metal::)
    from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401  (defines llama::)
    from executorch.runtime import Runtime

    inputs = call()
    metal = tuple({**inputs, "g": inputs["g"].exp()}.values())
    cases: dict[str, tuple[torch.nn.Module, tuple[Tensor, ...]]] = {
        "metal": (Metal(), metal),
        "llama": (Llama(), llama_inputs(2, 2, False)),
        "llama_kda_grouped": (Llama(), llama_inputs(4, 2, True)),
    }
    mapped = {}
    for name, (theirs, x) in cases.items():
        program = use_anydelta(torch.export.export(theirs, x))
        assert "gated_delta_rule" in program.graph_module.code
        assert "ops.llama" not in program.graph_module.code
        assert "ops.metal" not in program.graph_module.code
        mapped[name] = program
    runtime = Runtime.get().load_program(export.lower(mapped).buffer)
    for name, (theirs, x) in cases.items():
        in_torch = use_anydelta(torch.export.export(type(theirs)(), x)).module()
        method = runtime.load_method(name)
        for _ in range(2):
            want = flat(theirs(*x))
            for got in flat(in_torch(*x)), method.execute(x):
                for a, b in zip(got, want, strict=True):
                    assert (a - b).abs().max() < 1e-5


def flat(x: Any) -> list[Tensor]:
    return [x] if isinstance(x, Tensor) else list(x)


@torch.no_grad()
def test_mapping_comes_before_decomposition() -> None:
    from executorch.backends.apple.metal.ops import gated_delta_rule  # noqa: F401

    program = torch.export.export(Metal(), tuple(call().values())).run_decompositions({})
    with pytest.raises(ValueError, match=r"must be as torch\.export\.export returned it"):
        use_anydelta(program)


def test_the_benchmark_takes_turns_with_llama(monkeypatch: pytest.MonkeyPatch) -> None:
    from anydelta.bench.commands import executorch as bench
    from anydelta.bench.measure import ops

    monkeypatch.setattr(bench, "CALLS", {1: 3})
    monkeypatch.setattr(bench, "HEADS", 2)
    measured = bench.against_llama(ops.Settings(rounds=2, sample_seconds=1e-3))
    by_call = {r.call: r for r in measured.records}
    assert list(by_call) == [*bench.NAMES.values(), *bench.BARE.values()]
    assert all(r.nmse < 1e-7 and r.rounds == 2 for r in measured.records)
    assert by_call["llama::gated_delta_rule"].times == 1


SMALL = Config(
    vocab_size=48, hidden_size=16, intermediate_size=16, layer_types=["linear_attention", "full_attention"],
    num_attention_heads=2, num_key_value_heads=1, head_dim=8, linear_num_key_heads=1, linear_num_value_heads=2,
    linear_key_head_dim=8, linear_value_head_dim=8, linear_conv_kernel_dim=4, rms_norm_eps=1e-6, rope_theta=1e4,
    partial_rotary_factor=0.5,
)  # fmt: skip


@torch.no_grad()
def test_prefill_and_decode_share_their_states_in_python_and_cpp(tmp_path: Path) -> None:
    """A small model of random weights; `make demo-export` runs the trained one."""
    from executorch.runtime import Runtime

    torch.manual_seed(0)
    model = Model(SMALL).eval().requires_grad_(False)
    for p in model.parameters():
        p.copy_(torch.randn_like(p))
    length = torch.export.Dim("T", min=2, max=32)
    exported = {
        "decode": torch.export.export(
            WithBuffers(model, max_tokens=32), (torch.tensor([[1]]), torch.tensor([3]))
        ),
        "prefill": torch.export.export(
            WithBuffers(model, max_tokens=32),
            (torch.tensor([[1, 2, 3]]), torch.arange(3)),
            dynamic_shapes=({1: length}, {0: length}),
        ),
    }
    path = tmp_path / "tiny.pte"
    path.write_bytes(export.lower(exported, share_states=True).buffer)
    program = Runtime.get().load_program(path)
    methods = {name: program.load_method(name) for name in exported}

    def step(ids: Tensor, position: Tensor) -> Tensor:
        name = "decode" if ids.shape[1] == 1 else "prefill"
        return methods[name].execute([ids, position])[0]  # type: ignore[no-any-return]

    prompt, states = [7, 3, 11, 4], model.new_states(max_tokens=32)
    want = generate(lambda ids, position: model(ids, position, states), prompt, 16)
    assert len(set(want)) > 4  # a model that always says the same shows nothing
    assert generate(step, prompt, 16) == want

    runner = build_runner(tmp_path, "run_executorch")
    done = subprocess.run(
        [runner, tmp_path, "16", *map(str, prompt)], capture_output=True, text=True, check=True
    )
    assert [int(t) for t in done.stdout.split()] == want


def build_runner(folder: Path, target: str) -> Path:
    """One program of examples/export."""
    tools = Path(sys.executable).parent
    cmake = pytest.importorskip("cmake").CMAKE_BIN_DIR + "/cmake"
    ninja = next((p for p in (tools / "ninja", Path(cmake).parent / "ninja") if p.exists()), None)
    make = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
    source = Path(__file__).parents[1] / "examples" / "export"
    options = [f"-DPython_EXECUTABLE={sys.executable}", f"-DRUNNERS={target}"]
    subprocess.run(
        [cmake, *make, "-S", source, "-B", folder / "build", *options], check=True, capture_output=True
    )
    subprocess.run([cmake, "--build", folder / "build"], check=True, capture_output=True)
    return folder / "build" / target
