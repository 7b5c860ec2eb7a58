"""The models that the checks serve: the repository's, and small new ones with random weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "examples" / "tiny_model"

# Of the repository's model, whose MTP layers have Transformers' names, to those of Qwen3.5's checkpoints.
MTP_NAMES = {
    "mtp.layers.0.eh_proj.": "mtp.fc.",
    "mtp.layers.0.enorm.": "mtp.pre_fc_norm_embedding.",
    "mtp.layers.0.hnorm.": "mtp.pre_fc_norm_hidden.",
    "mtp.layers.0.post_norm.": "mtp.norm.",
}


def _renamed(folder: Path, names: dict[str, str]) -> Path:
    """The same weights under other names."""
    weights = {}
    for name, x in load_file(folder / "model.safetensors").items():
        for old, new in names.items():
            name = name.replace(old, new)
        weights[name] = x
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def with_mtp(folder: Path) -> Path:
    """The repository's model with its first MTP layer as vLLM reads it."""
    shutil.copytree(TINY, folder)
    _renamed(folder, MTP_NAMES)
    weights = load_file(folder / "model.safetensors")
    first = {name: x for name, x in weights.items() if not name.startswith("mtp.layers.1.")}
    save_file(first, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["mtp_num_hidden_layers"] = 1
    for name in ("mtp_layer_types", "num_mtp_layers"):
        config.pop(name, None)
    # For text the three positions of a token are one. With these words vLLM's drafter makes three of them, where the
    # layers of a text model take one, and writes beyond its arrays.
    for name in ("mrope_section", "mrope_interleaved"):
        config["rope_parameters"].pop(name)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def qwen(folder: Path, *, layers: int = 4, hidden: int = 512, heads: int = 8, dim: int = 128) -> Path:
    """A Qwen3.5 with random weights and the heads that vLLM's own kernels take."""
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    torch.manual_seed(0)
    config = Qwen3_5TextConfig(
        vocab_size=1024, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, head_dim=128, linear_num_key_heads=heads,
        linear_num_value_heads=2 * heads, linear_key_head_dim=dim, linear_value_head_dim=dim,
        max_position_embeddings=8192, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return _save(Qwen3_5ForCausalLM(config), folder)


def kimi(folder: Path) -> Path:
    """A Kimi-Linear with random weights: three layers of Kimi Delta Attention, one of latent attention, and experts."""
    from transformers import KimiLinearConfig, KimiLinearForCausalLM

    torch.manual_seed(0)
    linear = ["linear_attention", "linear_attention", "linear_attention", "full_attention"]
    config = KimiLinearConfig(
        vocab_size=1024, hidden_size=128, moe_intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, n_shared_experts=1, qk_nope_head_dim=32, v_head_dim=32, num_local_experts=4,
        num_experts_per_tok=2, linear_head_dim=32, linear_num_heads=4, layer_types=linear,
        kv_lora_rank=512, qk_rope_head_dim=64,  # the sizes of vLLM's kernel for latent attention on CPUs
        mlp_layer_types=["sparse"] * 4, pad_token_id=0, bos_token_id=0, eos_token_id=0, max_position_embeddings=4096,
    )  # fmt: skip
    _save(_louder(KimiLinearForCausalLM(config)), folder)
    # vLLM reads the words of the published checkpoints.
    written = json.loads((folder / "config.json").read_text())
    written |= dict(
        mla_use_nope=True, first_k_dense_replace=0, moe_layer_freq=1, moe_router_activation_func="sigmoid",
        linear_attn_config=dict(
            head_dim=32, num_heads=4, short_conv_kernel_size=4,
            kda_layers=[i + 1 for i, kind in enumerate(linear) if kind == "linear_attention"],
            full_attn_layers=[i + 1 for i, kind in enumerate(linear) if kind == "full_attention"],
        ),
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(written))
    return folder


def qwen3_next(folder: Path) -> Path:
    """A Qwen3-Next with random weights: q, k, v and z of a head lie side by side; experts."""
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    torch.manual_seed(0)
    config = Qwen3NextConfig(
        vocab_size=1024, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=32,
        linear_value_head_dim=32, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64,
        shared_expert_intermediate_size=64, max_position_embeddings=4096, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return _save(_louder(Qwen3NextForCausalLM(config)), folder)


RANK, ALPHA = 8, 16


def adapter(folder: Path, model: torch.nn.Module) -> Path:
    """A LoRA adapter with random weights for every projection of the repository's model, merged into `model` too."""
    torch.manual_seed(0)
    folder.mkdir()
    weights, names = {}, set()
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and name != "lm_head":
            A = torch.randn(RANK, layer.in_features) / layer.in_features**0.5
            B = torch.randn(layer.out_features, RANK) * 0.3
            weights |= {f"base_model.model.{name}.lora_{x}.weight": w for x, w in (("A", A), ("B", B))}
            names.add(name.rpartition(".")[2])
            layer.weight.data += ALPHA / RANK * B @ A
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = dict(peft_type="LORA", r=RANK, lora_alpha=ALPHA, target_modules=sorted(names), bias="none")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def _louder(model: torch.nn.Module) -> torch.nn.Module:
    """So that the layers have a say in the logits, and states a memory."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("A_log"):
                p.uniform_(-4, 0)
            elif p.ndim >= 2:
                p.mul_(4)
    return model


def _save(model: torch.nn.Module, folder: Path) -> Path:
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, folder)
    return folder
