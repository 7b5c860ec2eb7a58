"""How the plug-in changes a vLLM: it registers once, or not at all. A stand-in replaces vLLM's modules here.

With vLLM itself: tests/vllm_engine, by `make test-vllm`.
"""

from __future__ import annotations

import dataclasses
import importlib
import logging
import sys
import types
from collections.abc import Iterator
from importlib.metadata import entry_points
from typing import Any

import pytest
import torch

from anydelta import gated_delta_rule
from anydelta.integrations import vllm as plugin

GDN = "vllm.model_executor.layers.mamba.gdn"
LAYERS = {
    "QwenGatedDeltaNetAttention": (f"{GDN}.qwen_gdn_linear_attn", "forward_cpu(self, hidden_states)"),
    "OlmoHybridGatedDeltaNetAttention": (f"{GDN}.olmo_gdn_linear_attn", "forward(self, hidden_states, output)"),
    "KimiGatedDeltaNetAttention": (f"{GDN}.kimi_gdn_linear_attn", "forward(self, hidden_states, positions)"),
    "BailingMoeV3KimiDeltaAttention": (
        "vllm.model_executor.models.bailing_moe_v3", "forward(self, hidden_states, positions, output)",
    ),
}  # fmt: skip
METADATA = (
    "num_prefills", "num_decodes", "num_spec_decodes", "num_actual_tokens", "has_initial_state",
    "spec_query_start_loc", "non_spec_query_start_loc", "spec_state_indices_tensor", "non_spec_state_indices_tensor",
    "spec_sequence_masks", "spec_sequence_masks_cpu", "spec_token_indx", "non_spec_token_indx", "num_accepted_tokens",
)  # fmt: skip


class StandIn:
    """vLLM's modules, with as much in them as the plug-in reads."""

    def __init__(self) -> None:
        self.modules: dict[str, types.ModuleType] = {}
        self.registry: dict[str, type] = {}
        self.models: dict[str, str] = {}
        self.lines: list[str] = []
        self.cpu = True

        registry = self.registry

        class Plugged(torch.nn.Module):
            @classmethod
            def register_oot(cls, *, name: str) -> Any:
                def keep(ours: type) -> type:
                    assert name not in registry
                    registry[name] = ours
                    return ours

                return keep

        for name, (module, method) in LAYERS.items():
            self.module(module, **{name: self.layer(name, method)})
        theirs = self.layer("ChunkGatedDeltaRule", "forward_native(self)", Plugged)

        def __init__(rule: Any) -> None:
            Plugged.__init__(rule)
            rule._forward_method = rule.forward_native

        theirs.__init__ = __init__  # type: ignore[misc]
        arguments = [
            "q", "k", "v", "g", "beta", "initial_state", "output_final_state", "cu_seqlens", "chunk_indices",
            "chunk_offsets", "use_qk_l2norm_in_kernel", "core_attn_out", "aiter_prefill_metadata",
        ]  # fmt: skip
        space: dict[str, Any] = {}
        exec(f"def forward_native(self, {', '.join(arguments)}): return 'theirs'", space)
        theirs.forward_native = space["forward_native"]
        theirs.forward = lambda rule, *args, **kwargs: rule._forward_method(*args, **kwargs)
        self.module(f"{GDN}.qwen_gdn_linear_attn", ChunkGatedDeltaRule=theirs)
        self.module("vllm.forward_context", get_forward_context=lambda: None)
        self.module(
            "vllm.model_executor.custom_op",
            PluggableLayer=Plugged,
            CustomOp=Plugged,
            op_registry_oot=registry,
        )
        self.module("vllm.model_executor.layers.mamba.mamba_utils", is_conv_state_dim_first=lambda: False)
        models = types.SimpleNamespace(register_model=self.models.__setitem__)
        self.module("vllm.model_executor.models.registry", ModelRegistry=models)
        self.module("vllm.utils.torch_utils", direct_register_custom_op=lambda **_: None)
        self.module(
            "vllm.v1.attention.backends.gdn_attn",
            GDNAttentionMetadata=dataclasses.make_dataclass("GDNAttentionMetadata", METADATA),
            GDNAttentionMetadataBuilder=type(
                "Builder", (), {"build": lambda self, prefix, common: common.made}
            ),
        )
        runner = type("CPUModelRunner", (), {"_zero_block_ids": lambda self, ids: self.zeroed.extend(ids)})
        self.module("vllm.v1.worker.cpu_model_runner", CPUModelRunner=runner)
        mla = type("CPUMLABackend", (), {"get_supported_kernel_block_sizes": staticmethod(lambda: [16])})
        self.module("vllm.v1.attention.backends.mla.cpu_mla", CPUMLABackend=mla)
        log = logging.Logger("stand-in")
        log.handle = lambda record: self.lines.append(record.getMessage())  # type: ignore[method-assign]
        self.module("vllm.logger", init_logger=lambda _: log)
        platform = types.SimpleNamespace(is_cpu=lambda: self.cpu)
        self.module("vllm.platforms", current_platform=platform)

    def layer(self, name: str, method: str, base: type = object) -> type:
        space: dict[str, Any] = {}
        exec(f"def {method}: return 'theirs'", space)
        space.pop("__builtins__")
        return type(name, (base,), space)

    def module(self, name: str, **content: object) -> None:
        parts = name.split(".")
        for i in range(1, len(parts) + 1):
            part = ".".join(parts[:i])
            if part not in self.modules:
                self.modules[part] = types.ModuleType(part)
                self.modules[part].__path__ = []
                if i > 1:
                    setattr(self.modules[".".join(parts[: i - 1])], parts[i - 1], self.modules[part])
        vars(self.modules[name]).update(content)


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    stand_in = StandIn()
    for name, module in stand_in.modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delenv("ANYDELTA_VLLM", raising=False)
    ours = [f"anydelta.integrations.vllm.{name}" for name in ("layers", "gpu")]
    for name in ours:
        monkeypatch.delitem(sys.modules, name, raising=False)
    importlib.reload(plugin)
    yield stand_in
    for name in ours:
        sys.modules.pop(name, None)
    importlib.reload(plugin)


def test_vllm_finds_it_by_its_entry_point():
    found = [e for e in entry_points(group="vllm.general_plugins") if e.name == "anydelta"]
    assert [e.value for e in found] == ["anydelta.integrations.vllm:register"]
    assert found[0].load() is plugin.register


def test_its_layers_stand_for_vllm_s(vllm: StandIn):
    plugin.register()
    assert set(vllm.registry) == set(LAYERS)
    for name, (module, _) in LAYERS.items():
        assert issubclass(vllm.registry[name], getattr(sys.modules[module], name))
    assert "KimiLinearForCausalLM" in vllm.models
    backend = sys.modules["vllm.v1.attention.backends.mla.cpu_mla"].CPUMLABackend
    assert [backend.supports_block_size(n) for n in (None, 16, 128, 24)] == [True, True, True, False]
    [line] = vllm.lines
    assert line.startswith("anydelta: runs Qwen")


def test_metadata_say_which_drafted_sequences_are_new(vllm: StandIn):
    plugin.register()
    builder = sys.modules["vllm.v1.attention.backends.gdn_attn"].GDNAttentionMetadataBuilder()
    made = types.SimpleNamespace(spec_sequence_masks_cpu=torch.tensor([True, False, True]))
    common = types.SimpleNamespace(made=made, compute_num_computed_tokens=lambda: torch.tensor([0, 0, 7]))
    assert builder.build(0, common) is made
    assert made.anydelta_new.tolist() == [True, False]
    made.spec_sequence_masks_cpu = None
    del made.anydelta_new
    assert not hasattr(builder.build(0, common), "anydelta_new")


@pytest.mark.parametrize(("rows", "zeroed"), [(10, [2, 5]), (40, [8, 9, 10, 11, 20, 21, 22, 23])])
def test_a_new_block_is_zeroed_whole(vllm: StandIn, rows: int, zeroed: list[int]):
    """Kimi Delta Attention comes with latent attention, whose cache has several of its kernel's blocks in a block."""
    plugin.register()
    for _ in range(2):  # layers of a model
        vllm.registry["KimiGatedDeltaNetAttention"]()
    runner = sys.modules["vllm.v1.worker.cpu_model_runner"].CPUModelRunner()
    runner.zeroed, runner.kv_cache_config = [], types.SimpleNamespace(num_blocks=10)
    layers = {"kda": [torch.zeros(10, 3), torch.zeros(10, 4)], "mla": torch.zeros(rows, 16, 576)}
    context = {name: types.SimpleNamespace(kv_cache=cache) for name, cache in layers.items()}
    runner.compilation_config = types.SimpleNamespace(static_forward_context=context)
    runner._zero_block_ids([2, 5])
    assert runner.zeroed == zeroed


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("names", [("conv1d",), ("q_conv1d", "k_conv1d", "v_conv1d")])
def test_other_weights_are_loaded(vllm: StandIn, names: tuple[str, ...], packed: bool):
    """vLLM's reload copies weights into the same tensors, and packs a convolution in bfloat16 anew."""
    plugin.register()
    from anydelta.integrations.vllm import layers

    class Layer(torch.nn.Module):
        made = 0

        def parameters_of_core(self) -> Any:
            self.made += 1
            parts = [self._modules[name] for name in names]
            weight = layers._conv_weight(parts[0]) if len(parts) == 1 else layers._joined_weight(parts)
            return types.SimpleNamespace(conv_weight=weight)

    def load(weights: torch.Tensor) -> None:
        for name, weight in zip(names, weights, strict=True):
            part: Any = layer._modules[name]
            part.weight.data.copy_(weight)
            if packed:
                part._cpu_unpacked_conv_weight = weight.flatten(1).clone()
                part.weight.data.fill_(float("nan"))

    layer = Layer()
    for name in names:
        layer.add_module(name, torch.nn.Conv1d(8, 8, 4, groups=8, bias=False))
    for weights in torch.randn(2, len(names), 8, 1, 4):
        load(weights)
        for _ in range(3):
            with torch.inference_mode():
                found = layers._parameters(layer).conv_weight
            torch.testing.assert_close(found, weights.flatten(0, 1)[:, 0])
    assert layer.made == (2 if packed else 1)


def test_loading_twice_is_loading_once(vllm: StandIn):
    plugin.register()
    before = dict(vllm.registry)
    plugin.register()
    assert vllm.registry == before
    assert len(vllm.lines) == 1


def test_it_is_left_out(vllm: StandIn, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ANYDELTA_VLLM", "0")
    plugin.register()
    assert not vllm.registry
    assert not vllm.lines


def test_another_value_changes_nothing_and_says_so(vllm: StandIn, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ANYDELTA_VLLM", "cpu")
    plugin.register()
    assert not vllm.registry
    assert vllm.lines == ["anydelta: ANYDELTA_VLLM must be 0, 1 or cuda; got 'cpu'. Nothing is changed."]


def test_a_gpu_is_left_alone_without_being_asked(vllm: StandIn):
    vllm.cpu = False
    plugin.register()
    assert not vllm.registry
    assert not vllm.lines


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_with_other_arguments_is_left_alone(vllm: StandIn, name: str):
    module, method = LAYERS[name]
    setattr(sys.modules[module], name, vllm.layer(name, method.replace(")", ", residual)")))
    plugin.register()
    assert not vllm.registry
    [line] = vllm.lines
    assert line.startswith(f"anydelta: this vLLM stays unchanged: its {name}.")
    assert "residual, not self, hidden_states" in line


def test_metadata_with_other_fields_is_left_alone(vllm: StandIn):
    vllm.module(
        "vllm.v1.attention.backends.gdn_attn",
        GDNAttentionMetadata=dataclasses.make_dataclass("GDNAttentionMetadata", METADATA[1:]),
    )
    plugin.register()
    assert not vllm.registry
    assert vllm.lines == ["anydelta: this vLLM stays unchanged: its GDNAttentionMetadata has no num_prefills"]


@pytest.mark.parametrize("name", LAYERS)
def test_a_vllm_without_the_layer_is_left_alone(vllm: StandIn, name: str):
    delattr(sys.modules[LAYERS[name][0]], name)
    plugin.register()
    assert not vllm.registry
    [line] = vllm.lines
    assert line.startswith("anydelta: this vLLM stays unchanged: ")


def test_a_layer_that_somebody_else_has_registered_is_left_alone(vllm: StandIn):
    vllm.registry["KimiGatedDeltaNetAttention"] = StandIn
    plugin.register()
    assert set(vllm.registry) == {"KimiGatedDeltaNetAttention"}
    [line] = vllm.lines
    assert "has registered a layer for KimiGatedDeltaNetAttention already" in line


def rule(vllm: StandIn, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The operator that a GPU would have, on this CPU."""
    vllm.cpu = False
    monkeypatch.setenv("ANYDELTA_VLLM", "cuda")
    plugin.register()
    from anydelta.integrations.vllm import gpu

    monkeypatch.setitem(gpu.BACKEND, "cpu", "cpu")
    assert set(vllm.registry) == {"ChunkGatedDeltaRule"}
    return vllm.registry["ChunkGatedDeltaRule"]()


def inputs(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    torch.manual_seed(0)
    T, H, HV, K, V, N = 20, 2, 4, 32, 16, 3
    return dict(
        q=torch.randn(1, T, H, K, dtype=dtype), k=torch.randn(1, T, H, K, dtype=dtype),
        v=torch.randn(1, T, HV, V, dtype=dtype), g=-torch.rand(1, T, HV), beta=torch.rand(1, T, HV),
        initial_state=torch.randn(N, HV, V, K), output_final_state=True,
        cu_seqlens=torch.tensor([0, 7, 8, 20], dtype=torch.int32), chunk_indices=None, chunk_offsets=None,
        use_qk_l2norm_in_kernel=True, core_attn_out=torch.full((T + 3, HV, V), 7.0, dtype=dtype),
        aiter_prefill_metadata=None,
    )  # fmt: skip


def test_the_rule_of_a_gpu(vllm: StandIn, monkeypatch: pytest.MonkeyPatch):
    given = inputs()
    o, state = rule(vllm, monkeypatch)(**given)
    expected, final = gated_delta_rule(
        *(given[n].double() for n in "qkv"), g=given["g"], beta=given["beta"], cu_seqlens=given["cu_seqlens"],
        initial_state=given["initial_state"].double().mT.contiguous(), qk_l2norm=True, backend="reference",
    )  # fmt: skip
    torch.testing.assert_close(o.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state.double(), final.mT, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(given["core_attn_out"][:20], o[0])
    assert (given["core_attn_out"][20:] == 7).all()


def test_what_no_kernel_takes_goes_to_vllm_s(vllm: StandIn, monkeypatch: pytest.MonkeyPatch):
    given = inputs(torch.float64)  # which the cpu backend has not
    given["initial_state"] = given["initial_state"].double()
    assert rule(vllm, monkeypatch)(**given) == "theirs"
    given = {n: x.to("meta") if isinstance(x, torch.Tensor) else x for n, x in inputs().items()}
    from anydelta.integrations.vllm import gpu

    monkeypatch.delitem(gpu.BACKEND, "cpu")
    assert vllm.registry["ChunkGatedDeltaRule"]()(**given) == "theirs"
