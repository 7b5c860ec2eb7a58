"""The model: Transformers' own Qwen3.5 classes at a tiny size, with their MTP layers, and how it is saved.

`generate(..., use_mtp=True)` builds a `MtpModel` from the config's `num_mtp_layers` and `mtp_layer_types`
and fills it from the checkpoint keys that begin with `mtp.`; the main model ignores those keys. So both
are trained as two modules that share embedding and head, and saved into one file.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen3_5ForCausalLM, Qwen3_5TextConfig
from transformers.modeling_layers import MtpModel


def make_config(tokenizer: PreTrainedTokenizerFast, mtp_layers: int) -> Qwen3_5TextConfig:
    return Qwen3_5TextConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=8,  # three gated-delta layers, then one of attention, twice
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        linear_num_key_heads=2,
        linear_num_value_heads=4,  # grouped: two value heads read each key head
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        linear_conv_kernel_dim=4,
        max_position_embeddings=4096,
        # half of each head turns: 8 frequencies, dealt to the three (here equal) mrope axes
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "mrope_section": [3, 3, 2],
            "mrope_interleaved": True,
        },
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,  # the end token pads; as an embedding's padding_idx it would never be learnt
        num_mtp_layers=mtp_layers,
        mtp_layer_types=["full_attention"] * mtp_layers,
    )


class Network(nn.Module):
    """The causal model and its MTP layers, run together on every position."""

    def __init__(self, config: Qwen3_5TextConfig):
        super().__init__()
        self.main = Qwen3_5ForCausalLM(config)
        self.mtp = MtpModel(self.main, config.num_mtp_layers)  # shares main's embedding, head and rotary
        self.main.apply(give_memory)
        for name, weight in self.named_parameters():
            if name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight")):
                nn.init.zeros_(weight)  # every block starts as the identity

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        """The main model's hidden states after its final norm: position t predicts token t + 1."""
        return self.main.model(ids, use_cache=False).last_hidden_state

    def drafts(self, ids: torch.Tensor, hidden: torch.Tensor) -> list[torch.Tensor]:
        """The MTP layers' states, one tensor per depth 1, 2 ...: position t predicts token t + 1 + depth.

        ids holds, beyond the T positions of `hidden`, at least one token per depth. Layer d reads what
        generate() feeds it: the embedding of token t + d, at rotary position t + d, and the state of
        the depth before (the main model's normed one first) at position t.
        """
        length, states = hidden.shape[1], []
        for depth, layer in enumerate(self.mtp.layers, start=1):
            embeds = self.main.model.embed_tokens(ids[:, depth : depth + length])
            positions = torch.arange(depth, depth + length).expand(len(ids), -1)
            hidden = layer(
                embeds,
                hidden,
                position_embeddings=self.main.model.rotary_emb(embeds, positions),
                position_ids=positions,
                attention_mask=None,  # causal
                past_key_values=None,
            )
            states.append(hidden)
        return states


def give_memory(module: nn.Module) -> None:
    """Start the decay gates with memories from a few tokens to a thousand.

    Transformers initialises dt_bias to 1, which forgets everything within a token (g is about -10);
    the models it loads were initialised like this, step sizes log-uniform in [0.001, 0.1].
    """
    if hasattr(module, "dt_bias"):
        dt = torch.exp(torch.empty_like(module.dt_bias).uniform_(math.log(1e-3), math.log(1e-1)))
        module.dt_bias.data = dt + torch.log(-torch.expm1(-dt))  # the inverse of softplus


def save(network: Network, tokenizer: PreTrainedTokenizerFast, folder: Path, dtype: torch.dtype) -> None:
    """Write what `AutoModelForCausalLM.from_pretrained(folder)` and `generate(use_mtp=True)` read."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: v for k, v in network.main.state_dict().items() if k != "lm_head.weight"}  # tied
    for name, value in network.mtp.state_dict().items():
        if name.startswith("layers."):  # the rest is shared with the main model
            tensors["mtp." + name.replace(".mtp_block.", ".")] = value
    tensors = {k: v.detach().to(dtype).contiguous() for k, v in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    config = network.main.config.to_dict()
    config |= {"architectures": ["Qwen3_5ForCausalLM"], "dtype": str(dtype).removeprefix("torch.")}
    config.pop("_name_or_path", None)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    generation = {"bos_token_id": config["bos_token_id"], "eos_token_id": config["eos_token_id"]}
    generation |= {"pad_token_id": tokenizer.pad_token_id}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that every version knows
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
