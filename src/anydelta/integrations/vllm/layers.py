"""vLLM's gated delta layers on a CPU: vLLM's own projections around `core.run`.

Each class here is vLLM's layer with another forward, registered instead of vLLM's. Parameters, weights, caches and
tensor parallelism are vLLM's own. One custom operator runs everything after the projections, and torch.compile does not
trace into it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import vllm.model_executor.layers.mamba.gdn.kimi_gdn_linear_attn as kimi
import vllm.model_executor.layers.mamba.gdn.olmo_gdn_linear_attn as olmo
import vllm.model_executor.layers.mamba.gdn.qwen_gdn_linear_attn as qwen
import vllm.model_executor.models.bailing_moe_v3 as bailing
from vllm.forward_context import get_forward_context
from vllm.model_executor.custom_op import PluggableLayer, op_registry_oot
from vllm.model_executor.layers.mamba.mamba_utils import is_conv_state_dim_first
from vllm.model_executor.models.registry import ModelRegistry
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.attention.backends.gdn_attn import GDNAttentionMetadata, GDNAttentionMetadataBuilder
from vllm.v1.attention.backends.mla.cpu_mla import CPUMLABackend

from .core import Inputs, Parameters, run
from .step import NEW, step_of

OP = "anydelta_gated_delta_layer"


def gated_delta_layer(projections: list[torch.Tensor], out: torch.Tensor, layer_name: str) -> None:
    """The operator: a layer without its projections. It writes `out` [T, HV * V]."""
    context = get_forward_context()
    layer: Any = context.no_compile_layers[layer_name]
    metadata = context.attn_metadata
    if isinstance(metadata, dict):
        metadata = metadata.get(layer.prefix)
    if metadata is None or not layer.kv_cache or metadata.num_actual_tokens == 0:  # vLLM measures its memory
        out.zero_()
        return
    conv, state = _pools(layer)
    run(step_of(metadata), layer.inputs(*projections), conv, state, _parameters(layer), out)


def _layer_fake(projections: list[torch.Tensor], out: torch.Tensor, layer_name: str) -> None:
    return None


def _mixed(layer: Any, projections: Sequence[torch.Tensor], width: int) -> torch.Tensor:
    x = projections[0]
    out = x.new_empty(x.shape[0], width)
    getattr(torch.ops.vllm, OP)(list(projections), out, layer.prefix)
    return out


def _pools(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """conv [P, C, S] and state [P, HV, K, V], views of vLLM's pages."""
    conv, state = layer.kv_cache[:2]
    kept = layer.__dict__.get("anydelta_pools")
    if kept is None or kept[0] is not conv or kept[1] is not state:
        # vLLM declares [P, HV, V, K]. Only the layer reads it, so a state has the operator's layout.
        P, HV, V, K = state.shape
        kept = layer.__dict__["anydelta_pools"] = (
            conv,
            state,
            conv if is_conv_state_dim_first() else conv.transpose(1, 2),
            state.view(P, HV, K, V),
        )
    return kept[2], kept[3]


def _parameters(layer: Any) -> Parameters:
    """A layer's parameters, kept until vLLM loads other weights (`reload_weights`).

    It copies them into the same tensors, but makes a new original of a packed convolution.
    """
    modules = layer._modules
    originals = [getattr(modules[name], UNPACKED, None) for name in CONVOLUTIONS if name in modules]
    kept: tuple[list[object], Parameters] | None = layer.__dict__.get("anydelta_parameters")
    if kept is None or any(a is not b for a, b in zip(kept[0], originals, strict=True)):
        kept = layer.__dict__["anydelta_parameters"] = (originals, layer.parameters_of_core())
    return kept[1]


CONVOLUTIONS = ("conv1d", "q_conv1d", "k_conv1d", "v_conv1d")
UNPACKED = "_cpu_unpacked_conv_weight"
"""vLLM's attribute of a convolution whose weight it has packed for its own kernels: the original."""


def _conv_weight(conv1d: Any) -> torch.Tensor:
    """[C, W]"""
    unpacked: torch.Tensor | None = getattr(conv1d, UNPACKED, None)
    return conv1d.weight.flatten(1) if unpacked is None else unpacked


def _joined_weight(parts: Sequence[Any]) -> torch.Tensor:
    """[C, W] of several convolutions, whose weights lie in it from now on: other weights are loaded into it too."""
    with torch.inference_mode(False):  # in which a later load could not write
        joined = torch.cat([_conv_weight(part) for part in parts])
    for part, piece in zip(parts, joined.split([part.weight.shape[0] for part in parts]), strict=True):
        if getattr(part, UNPACKED, None) is None:
            part.weight.data = piece.view_as(part.weight)
    return joined


class QwenLayer(qwen.QwenGatedDeltaNetAttention):
    """Qwen3-Next, Qwen3.5: Gated DeltaNet."""

    def forward_cpu(self, hidden_states: torch.Tensor) -> torch.Tensor:
        qkvz, _ = self.in_proj_qkvz(hidden_states)
        ba, _ = self.in_proj_ba(hidden_states)
        out = _mixed(self, (qkvz, ba), self.value_dim // self.tp_size)
        return self.out_proj(out)[0]  # type: ignore[no-any-return]

    def inputs(self, qkvz: torch.Tensor, ba: torch.Tensor) -> Inputs:
        T = qkvz.shape[0]
        HV = self.num_v_heads // self.tp_size
        if not self.gqa_interleaved_layout:
            channels = (2 * self.key_dim + self.value_dim) // self.tp_size
            b, a = self.split_ba(ba)
            return Inputs(qkvz[:, :channels], a, b, qkvz[:, channels:])
        # Per head of q and k: q, k, their heads of v, then of z; for the gates b, then a.
        H = self.num_k_heads // self.tp_size
        K, values = self.head_k_dim, HV // H * self.head_v_dim
        q, k, v, z = qkvz.view(T, H, -1).split_with_sizes([K, K, values, values], -1)
        b, a = ba.view(T, H, -1).chunk(2, -1)
        return Inputs((q, k, v), a.reshape(T, HV), b.reshape(T, HV), z)

    def parameters_of_core(self) -> Parameters:
        gate = "sigmoid" if self.norm.activation == "sigmoid" else "silu"
        return Parameters(
            _conv_weight(self.conv1d), self.A_log.data, self.dt_bias.data,
            self.norm.weight.data, self.norm.eps, gate, conv_bias=self.conv1d.bias,
        )  # fmt: skip


class OlmoLayer(olmo.OlmoHybridGatedDeltaNetAttention):
    """OLMo-Hybrid: Gated DeltaNet, with beta up to 2."""

    def forward(self, hidden_states: torch.Tensor, output: torch.Tensor) -> None:
        qkvz, _ = self.in_proj_qkvg(hidden_states)
        b, _ = self.b_proj(hidden_states)
        a, _ = self.a_proj(hidden_states)
        out = _mixed(self, (qkvz, a, b), self.value_dim // self.tp_size)
        output[: out.shape[0]] = self.o_proj(out)[0]

    def inputs(self, qkvz: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> Inputs:
        channels = (2 * self.key_dim + self.value_dim) // self.tp_size
        return Inputs(qkvz[:, :channels], a, b, qkvz[:, channels:])

    def parameters_of_core(self) -> Parameters:
        return Parameters(
            _conv_weight(self.conv1d), self.A_log.data, self.dt_bias.data,
            self.o_norm.weight.data, self.o_norm.eps, "silu",
            conv_bias=self.conv1d.bias, allow_neg_eigval=self.allow_neg_eigval,
        )  # fmt: skip


class KimiLayer(kimi.KimiGatedDeltaNetAttention):
    """Kimi-Linear: Kimi Delta Attention."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        zero_whole_blocks()

    def forward(self, hidden_states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        inside, D = self.local_projection_size, self.head_dim
        projected, _ = self.in_proj_qkvgfab(hidden_states)
        if self.use_full_rank_gate:
            sizes = [3 * inside, inside, D, self.local_num_heads]
            qkv, z, f, b = projected[:, : sum(sizes)].split_with_sizes(sizes, -1)
        else:
            qkv, b, f = projected.split_with_sizes([3 * inside, self.local_num_heads, D], -1)
            z = self.g_b_proj(self.g_a_proj(hidden_states)[0])[0]
        out = _mixed(self, (qkv, self.f_b_proj(f)[0], b, z), inside)
        return self.o_proj(out)[0]  # type: ignore[no-any-return]

    def inputs(self, qkv: torch.Tensor, g: torch.Tensor, b: torch.Tensor, z: torch.Tensor) -> Inputs:
        return Inputs(qkv, g.unflatten(1, (-1, self.head_dim)), b, z)

    def parameters_of_core(self) -> Parameters:
        return Parameters(
            _conv_weight(self.conv1d), self.A_log.data, self.dt_bias.data,
            self.o_norm.weight.data, self.o_norm.eps, "sigmoid",
            conv_bias=self.conv1d.bias, lower_bound=self.gate_lower_bound,
        )  # fmt: skip


class BailingLayer(bailing.BailingMoeV3KimiDeltaAttention):
    """Ling 3: Kimi Delta Attention, its gate bounded from below."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        zero_whole_blocks()

    def forward(self, hidden_states: torch.Tensor, positions: torch.Tensor, output: torch.Tensor) -> None:
        channels = 3 * self.projection_size_per_partition
        if self.separate_b_proj:
            qkv, b = self.qkv_proj(hidden_states)[0], self.b_proj(hidden_states)[0]
        else:
            qkvb = self.qkvb_proj(hidden_states)[0]
            qkv, b = qkvb[:, :channels], qkvb[:, channels:]
        g, z = self.f_proj(hidden_states)[0], self.g_proj(hidden_states)[0]
        output[:] = self.o_proj(_mixed(self, (qkv, g, b, z), self.projection_size_per_partition))[0]

    def inputs(self, qkv: torch.Tensor, g: torch.Tensor, b: torch.Tensor, z: torch.Tensor) -> Inputs:
        return Inputs(qkv, g.unflatten(1, (-1, self.head_dim)), b, z)

    def parameters_of_core(self) -> Parameters:
        parts = (self.q_conv1d, self.k_conv1d, self.v_conv1d)
        return Parameters(
            _joined_weight(parts), self.A_log.data.flatten(), self.dt_bias.data,
            self.o_norm.weight.data, self.o_norm.eps, "sigmoid",
            lower_bound=self.lower_bound if self.safe_gate else None,
        )  # fmt: skip


class Seam(NamedTuple):
    """A layer of vLLM that one of ours replaces."""

    theirs: type
    ours: type
    method: str
    """The method that ours replaces."""
    arguments: tuple[str, ...]
    """The arguments of that method."""


SEAMS = (
    Seam(qwen.QwenGatedDeltaNetAttention, QwenLayer, "forward_cpu", ("self", "hidden_states")),
    Seam(olmo.OlmoHybridGatedDeltaNetAttention, OlmoLayer, "forward", ("self", "hidden_states", "output")),
    Seam(kimi.KimiGatedDeltaNetAttention, KimiLayer, "forward", ("self", "hidden_states", "positions")),
    Seam(
        bailing.BailingMoeV3KimiDeltaAttention,
        BailingLayer,
        "forward",
        ("self", "hidden_states", "positions", "output"),
    ),
)

# The fields of vLLM's metadata that the step reads.
METADATA = (
    "num_prefills", "num_decodes", "num_spec_decodes", "num_actual_tokens", "has_initial_state",
    "spec_query_start_loc", "non_spec_query_start_loc", "spec_state_indices_tensor", "non_spec_state_indices_tensor",
    "spec_sequence_masks", "spec_sequence_masks_cpu", "spec_token_indx", "non_spec_token_indx", "num_accepted_tokens",
)  # fmt: skip

KIMI_FOR_CPU = "vllm.models.kimi_k3.amd.linear:KimiLinearForCausalLM"
"""The Kimi-Linear without CUDA streams. vLLM has two, and on a CPU it takes the one that asks for them."""


def register() -> list[str]:
    """Replace vLLM's layers by ours, all or none.

    Returns:
        The names of the layers.

    Raises:
        LookupError: with the reasons, if this vLLM is not supported.
    """
    for problem in _problems():
        raise LookupError(problem)
    if not hasattr(torch.ops.vllm, OP):
        direct_register_custom_op(
            op_name=OP, op_func=gated_delta_layer, mutates_args=["out"], fake_impl=_layer_fake
        )
    for seam in SEAMS:
        PluggableLayer.register_oot(name=seam.theirs.__name__)(seam.ours)
    ModelRegistry.register_model("KimiLinearForCausalLM", KIMI_FOR_CPU)
    CPUMLABackend.supports_block_size = classmethod(_whole_kernel_blocks)
    GDNAttentionMetadataBuilder.build = _with_new(GDNAttentionMetadataBuilder.build)
    olmo.set_triton_allocator = lambda device: None  # vLLM's OLMo layer asks for Triton when it is created
    return [seam.theirs.__name__ for seam in SEAMS]


def _with_new(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """Note which drafted sequences are new. vLLM's metadata does not, and treats a prompt of one token as drafted."""

    @functools.wraps(theirs)
    def build(self: Any, common_prefix_len: int, common_attn_metadata: Any, *args: Any, **kwargs: Any) -> Any:
        metadata = theirs(self, common_prefix_len, common_attn_metadata, *args, **kwargs)
        drafted = metadata.spec_sequence_masks_cpu
        if drafted is not None:
            computed = common_attn_metadata.compute_num_computed_tokens()
            setattr(metadata, NEW, (computed == 0)[drafted])
        return metadata

    return build


def _whole_kernel_blocks(backend: Any, block_size: int | None) -> bool:
    """Whether a block is a whole number of the kernel's blocks: beside layers with states it is as large as a state."""
    return block_size is None or block_size % backend.get_supported_kernel_block_sizes()[0] == 0


def zero_whole_blocks() -> None:
    """Let vLLM zero the blocks that it means.

    It zeroes a new block by its number. The cache of latent attention has several of the kernel's blocks in each, so
    that number is the place of another sequence's tokens.
    """
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner  # too much to load before the worker does

    theirs = getattr(CPUModelRunner, "_zero_block_ids", None)
    if theirs is None or theirs.__module__ == __name__:
        return

    @functools.wraps(theirs, assigned=("__name__", "__qualname__", "__doc__"))
    def zero(self: Any, block_ids: list[int]) -> None:
        layers = self.compilation_config.static_forward_context.values()
        caches = [x for x in (getattr(layer, "kv_cache", None) for layer in layers) if torch.is_tensor(x)]
        parts = max([1, *(x.shape[0] // self.kv_cache_config.num_blocks for x in caches)])
        theirs(self, [parts * block + i for block in block_ids for i in range(parts)])

    CPUModelRunner._zero_block_ids = zero


def _problems() -> list[str]:
    found = []
    fields = getattr(GDNAttentionMetadata, "__dataclass_fields__", {})
    missing = [name for name in METADATA if name not in fields]
    if missing:
        found.append(f"its GDNAttentionMetadata has no {', '.join(missing)}")
    for seam in SEAMS:
        name = seam.theirs.__name__
        got = tuple(inspect.signature(_method(seam.theirs, seam.method)).parameters)
        if got != seam.arguments:
            found.append(f"its {name}.{seam.method} takes {', '.join(got)}, not {', '.join(seam.arguments)}")
        if name in op_registry_oot:
            found.append(f"{op_registry_oot[name].__module__} has registered a layer for {name} already")
    return found


def _method(layer: type, name: str) -> Callable[..., object]:
    method = getattr(layer, name, None)
    if method is None:
        return lambda: None
    return method  # type: ignore[no-any-return]
