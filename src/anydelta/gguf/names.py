"""A model of Transformers under llama.cpp's names: its sizes, and every tensor as a GGUF file holds it.

Names and contents are llama.cpp's (src/models/qwen35.cpp, qwen35moe.cpp, qwen3next.cpp and its converters). A file
holds -exp(A_log), norms with one added, and value heads in tiled order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5Attention, Qwen3_5MLP
    from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeSparseMoeBlock

    from ..integrations.transformers.families import LinearAttention

ARCHITECTURES = {"qwen3_5_text": "qwen35", "qwen3_5_moe_text": "qwen35moe", "qwen3_next": "qwen3next"}
"""model_type in Transformers: architecture in llama.cpp."""


@dataclass(frozen=True)
class Tensor:
    """A tensor of a file, computed on request."""

    name: str
    shape: tuple[int, ...]
    get: Callable[[], torch.Tensor]


def write_sizes(writer: Any, config: PreTrainedConfig, vocabulary: int, mtp_layers: int) -> None:
    """The keys of the file that give sizes."""
    kind, rope = config.model_type, config.rope_parameters
    rotated = int(config.head_dim * rope.get("partial_rotary_factor", 0.25))
    writer.add_block_count(config.num_hidden_layers + mtp_layers)
    if mtp_layers:
        writer.add_nextn_predict_layers(mtp_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    if kind != "qwen3_5_moe_text":
        writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    writer.add_rope_dimension_count(rotated)
    if kind != "qwen3_next":  # without sections any split is right: for text all axes have the same position
        axis = rotated // 6
        sections = list(rope.get("mrope_section") or [rotated // 2 - 2 * axis, axis, axis])
        writer.add_rope_dimension_sections([*sections, *[0] * (4 - len(sections))])
    writer.add_ssm_conv_kernel(config.linear_conv_kernel_dim)
    writer.add_ssm_state_size(config.linear_key_head_dim)
    writer.add_ssm_group_count(config.linear_num_key_heads)
    writer.add_ssm_time_step_rank(config.linear_num_value_heads)
    writer.add_ssm_inner_size(config.linear_value_head_dim * config.linear_num_value_heads)
    writer.add_full_attention_interval(_interval(config))
    if kind in ("qwen3_next", "qwen3_5_moe_text"):
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    writer.add_vocab_size(vocabulary)


def _interval(config: PreTrainedConfig) -> int:
    """Every n-th layer has full attention: n."""
    types = list(config.layer_types)
    return types.index("full_attention") + 1 if "full_attention" in types else len(types) + 1


def irregular(config: PreTrainedConfig) -> str | None:
    """Why a file cannot describe the kinds of layers, or None. It only says that every n-th has full attention."""
    n, types = _interval(config), list(config.layer_types)
    regular = ["linear_attention" if (i + 1) % n else "full_attention" for i in range(len(types))]
    return None if types == regular else f"layers in the order {', '.join(types)}"


def tensors(model: PreTrainedModel, mtp: Any = None) -> Iterator[Tensor]:
    """Every tensor under its GGUF name; `mtp` is Transformers' MtpModel of the model, if there is one."""
    config, base = model.config, model.base_model
    yield _whole("token_embd.weight", base.embed_tokens.weight)
    yield _norm("output_norm.weight", base.norm.weight)
    if not config.tie_word_embeddings:
        yield _whole("output.weight", model.lm_head.weight)
    for i, layer in enumerate(base.layers):
        yield from _block(f"blk.{i}.", layer, config)
    for i, layer in enumerate(mtp.layers if mtp is not None else ()):
        at = f"blk.{config.num_hidden_layers + i}."
        yield from _block(at, layer.mtp_block, config)
        yield _whole(f"{at}nextn.eh_proj.weight", layer.eh_proj.weight)
        for ours, theirs in (("enorm", "enorm"), ("hnorm", "hnorm"), ("post_norm", "shared_head_norm")):
            yield _norm(f"{at}nextn.{theirs}.weight", getattr(layer, ours).weight)


def _whole(name: str, x: torch.Tensor) -> Tensor:
    return Tensor(name, tuple(x.shape), lambda: x)


def _norm(name: str, x: torch.Tensor) -> Tensor:
    """The norms of these families multiply by one plus their weight."""
    return Tensor(name, tuple(x.shape), lambda: x.float() + 1)


def _block(at: str, layer: Any, config: PreTrainedConfig) -> Iterator[Tensor]:
    yield _norm(f"{at}attn_norm.weight", layer.input_layernorm.weight)
    yield _norm(f"{at}post_attention_norm.weight", layer.post_attention_layernorm.weight)
    if hasattr(layer, "linear_attn"):
        yield from _linear(at, layer.linear_attn, config)
    else:
        yield from _attention(at, layer.self_attn)
    if hasattr(layer.mlp, "experts"):
        yield from _experts(at, layer.mlp)
    else:
        yield from _dense(at, layer.mlp, "")


def _attention(at: str, attn: Qwen3_5Attention) -> Iterator[Tensor]:
    for ours, theirs in (
        ("q_proj", "attn_q"),
        ("k_proj", "attn_k"),
        ("v_proj", "attn_v"),
        ("o_proj", "attn_output"),
    ):
        yield _whole(f"{at}{theirs}.weight", getattr(attn, ours).weight)
    for norm in ("q_norm", "k_norm"):
        yield _norm(f"{at}attn_{norm}.weight", getattr(attn, norm).weight)


def _linear(at: str, attn: LinearAttention, config: PreTrainedConfig) -> Iterator[Tensor]:
    """The gated delta rule's layer, value heads in tiled order: ggml's head i uses key head i mod H."""
    import torch

    H, HV = config.linear_num_key_heads, config.linear_num_value_heads
    K, V = config.linear_key_head_dim, config.linear_value_head_dim

    def order(x: torch.Tensor, size: int, dim: int = 0) -> torch.Tensor:
        """Value heads of `size` along `dim`, from [H, HV / H] to [HV / H, H]; qwen3next repeats heads itself."""
        if config.model_type == "qwen3_next":
            return x
        parts: torch.Tensor = x.unflatten(dim, (H, HV // H, size))
        return parts.transpose(dim, dim + 1).flatten(dim, dim + 2)

    if hasattr(attn, "in_proj_qkvz"):  # qwen3_next: per key head q, k, and the v and z of its value heads
        rest = HV // H * V
        rows = attn.in_proj_qkvz.weight.unflatten(0, (H, 2 * K + 2 * rest))
        q, k, v, z = (part.flatten(0, 1) for part in rows.split([K, K, rest, rest], 1))
    else:
        q, k, v = attn.in_proj_qkv.weight.split([H * K, H * K, HV * V], 0)
        z = attn.in_proj_z.weight
    taps, D = attn.conv1d.weight.squeeze(1), z.shape[1]
    keys = 2 * H * K
    yield Tensor(f"{at}attn_qkv.weight", (keys + HV * V, D), lambda: torch.cat((q, k, order(v, V))))
    yield Tensor(f"{at}attn_gate.weight", (HV * V, D), lambda: order(z, V))
    yield Tensor(
        f"{at}ssm_conv1d.weight", tuple(taps.shape), lambda: torch.cat((taps[:keys], order(taps[keys:], V)))
    )
    yield Tensor(f"{at}ssm_dt.bias", (HV,), lambda: order(attn.dt_bias, 1))
    yield Tensor(f"{at}ssm_a", (HV,), lambda: order(-attn.A_log.float().exp(), 1))
    if hasattr(attn, "in_proj_ba"):  # packed as in Transformers
        yield _whole(f"{at}ssm_ba.weight", attn.in_proj_ba.weight)
    else:
        yield Tensor(f"{at}ssm_beta.weight", (HV, D), lambda: order(attn.in_proj_b.weight, 1))
        yield Tensor(f"{at}ssm_alpha.weight", (HV, D), lambda: order(attn.in_proj_a.weight, 1))
    yield _whole(f"{at}ssm_norm.weight", attn.norm.weight)
    yield Tensor(f"{at}ssm_out.weight", (D, HV * V), lambda: order(attn.out_proj.weight, V, 1))


def _dense(at: str, mlp: Qwen3_5MLP, tail: str) -> Iterator[Tensor]:
    for part in ("gate", "up", "down"):
        yield _whole(f"{at}ffn_{part}{tail}.weight", getattr(mlp, f"{part}_proj").weight)


def _experts(at: str, mlp: Qwen3_5MoeSparseMoeBlock) -> Iterator[Tensor]:
    yield _whole(f"{at}ffn_gate_inp.weight", mlp.gate.weight)
    gate, up = mlp.experts.gate_up_proj.chunk(2, 1)  # [experts, 2 x hidden, model]
    yield _whole(f"{at}ffn_gate_exps.weight", gate)
    yield _whole(f"{at}ffn_up_exps.weight", up)
    yield _whole(f"{at}ffn_down_exps.weight", mlp.experts.down_proj)
    yield _whole(f"{at}ffn_gate_inp_shexp.weight", mlp.shared_expert_gate.weight.squeeze(0))
    yield from _dense(at, mlp.shared_expert, "_shexp")
