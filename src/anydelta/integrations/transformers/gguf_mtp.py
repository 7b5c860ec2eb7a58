"""Reads multi-token prediction layers from a GGUF file. Transformers' loader skips them.

A file holds them as blocks after the model's own, `blk.N.*` with `nextn.*` (llama.cpp's src/models/qwen35.cpp).
Matrices stay packed if the model's do.
"""

from __future__ import annotations

import copy
import importlib
import re
import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.modeling_layers import MtpModel

from ...ggml import torch_ops

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NAMES = {
    "eh_proj": "nextn.eh_proj", "enorm": "nextn.enorm", "hnorm": "nextn.hnorm", "post_norm": "nextn.shared_head_norm",
    "mtp_block.input_layernorm": "attn_norm", "mtp_block.post_attention_layernorm": "post_attention_norm",
    "mtp_block.self_attn.q_proj": "attn_q", "mtp_block.self_attn.k_proj": "attn_k",
    "mtp_block.self_attn.v_proj": "attn_v", "mtp_block.self_attn.o_proj": "attn_output",
    "mtp_block.self_attn.q_norm": "attn_q_norm", "mtp_block.self_attn.k_norm": "attn_k_norm",
    "mtp_block.mlp.gate_proj": "ffn_gate", "mtp_block.mlp.up_proj": "ffn_up", "mtp_block.mlp.down_proj": "ffn_down",
}  # fmt: skip
"""Modules of Transformers' MtpLayer, each with its tensor's name in a block."""


def count(metadata: Mapping[str, Any]) -> int:
    """How many MTP layers a file has."""
    return int(metadata.get(f"{metadata['general.architecture']}.nextn_predict_layers", 0))


def read(main_model: PreTrainedModel, path: str) -> MtpModel:
    """The MTP layers of that file, for a model that was loaded from it.

    Raises:
        ValueError: the file holds them in an unknown form.
    """
    reader = importlib.import_module("transformers.integrations.gguf.reader")
    main = copy.copy(main_model)
    main.config = copy.deepcopy(main_model.config)
    config = main.config.get_text_config(decoder=True)
    dtype = main_model.dtype if main_model.dtype.is_floating_point else torch.float32
    main.config.dtype = dtype
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = MtpModel(main, config.num_mtp_layers).eval()
    finally:
        torch.set_default_dtype(before)
    try:
        stored = reader.load_gguf_state_dict(reader.GgufHeader.from_file(path))
    except (OSError, ValueError, IndexError, struct.error) as error:
        raise ValueError(
            f"generate: requires {path} with its MTP layers for use_mtp; got: {' '.join(str(error).split())}. "
            "Use assistant_model or prompt_lookup_num_tokens"
        ) from error
    packed = _packs(main_model)
    for i, layer in enumerate(model.layers):
        at = f"blk.{config.num_hidden_layers + i}."
        for name, module in list(layer.named_modules()):
            if module._modules or not module._parameters:
                continue
            tensor = stored.get(f"{at}{_NAMES.get(name)}.weight")
            if tensor is None:
                raise ValueError(
                    f"generate: requires {at}{_NAMES.get(name, name)}.weight in {path} for use_mtp; got a file "
                    "without it. Use assistant_model or prompt_lookup_num_tokens"
                )
            _fill(layer, name, module, tensor, dtype, packed)
    return model


def _packs(model: PreTrainedModel) -> bool:
    return any(type(m).__name__ == "GgufLinear" for m in model.modules())


def _fill(
    layer: nn.Module, name: str, module: nn.Module, stored: Any, dtype: torch.dtype, packed: bool
) -> None:
    quantised = stored.ggml_type not in torch_ops.NUMBERS
    x = stored[...]
    if quantised and packed and type(module) is nn.Linear:
        utils = importlib.import_module("transformers.integrations.gguf.utils")
        own = utils.GgufLinear(module.in_features, module.out_features, stored.ggml_type, False)
        own.weight = nn.Parameter(x, requires_grad=False)
        layer.set_submodule(name, own)
        return
    if quantised:
        x = torch_ops.numbers(x, stored.ggml_type, torch.float32)
    if re.search("norm$", name):
        x = x.float() - 1  # a file holds one plus the weight
    module._parameters["weight"] = nn.Parameter(x.to(dtype), requires_grad=False)
