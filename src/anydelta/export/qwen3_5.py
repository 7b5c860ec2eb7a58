"""A Qwen3.5 text model that can be exported whole: one module for prefill and decode, with every state as a tensor.

The maths and the names of the weights are those of Transformers' `Qwen3_5ForCausalLM`. Its caches are Python objects
that change shape. Here the states are arguments (or buffers) of fixed shape, and each call advances them in place. The
rotary embedding is for text, where its three axes agree.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import anydelta


@dataclass(frozen=True)
class Config:
    """The fields of Transformers' `Qwen3_5TextConfig` that are used."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layer_types: Sequence[str]
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int
    rms_norm_eps: float
    rope_theta: float
    partial_rotary_factor: float

    @staticmethod
    def read(folder: Path) -> Config:
        """The fields in config.json.

        Raises:
            ValueError: the folder holds another architecture.
        """
        raw = json.loads((folder / "config.json").read_text())
        if raw.get("model_type") != "qwen3_5_text":
            raise ValueError(
                f"export: the model must have model_type qwen3_5_text; got {raw.get('model_type')!r}"
            )
        raw |= raw["rope_parameters"]
        return Config(**{name: raw[name] for name in Config.__dataclass_fields__})


class Norm(nn.Module):
    """x / rms(x) * (1 + weight)"""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return (y * (1 + self.weight.float())).to(x.dtype)


class GatedNorm(nn.Module):
    """x / rms(x) * weight * silu(z)"""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return (self.weight * y.to(x.dtype) * F.silu(z.float())).to(x.dtype)


class GatedDeltaNet(nn.Module):
    """Projections, a causal convolution over 4 tokens, the gated delta rule, a gated norm.

    States: conv [B, channels, W - 1], the last inputs of the convolution; rule [B, HV, K, V].
    """

    def __init__(self, c: Config):
        super().__init__()
        self.c = c
        keys = c.linear_num_key_heads * c.linear_key_head_dim
        values = c.linear_num_value_heads * c.linear_value_head_dim
        self.sizes = [keys, keys, values]
        self.conv1d = nn.Conv1d(
            sum(self.sizes), sum(self.sizes), c.linear_conv_kernel_dim, groups=sum(self.sizes), bias=False
        )
        self.dt_bias = nn.Parameter(torch.ones(c.linear_num_value_heads))
        self.A_log = nn.Parameter(torch.zeros(c.linear_num_value_heads))
        self.norm = GatedNorm(c.linear_value_head_dim, c.rms_norm_eps)
        self.out_proj = nn.Linear(values, c.hidden_size, bias=False)
        self.in_proj_qkv = nn.Linear(c.hidden_size, sum(self.sizes), bias=False)
        self.in_proj_z = nn.Linear(c.hidden_size, values, bias=False)
        self.in_proj_b = nn.Linear(c.hidden_size, c.linear_num_value_heads, bias=False)
        self.in_proj_a = nn.Linear(c.hidden_size, c.linear_num_value_heads, bias=False)

    def states(self, batch: int, max_tokens: int) -> list[Tensor]:
        c, weight = self.c, self.conv1d.weight
        rule = (batch, c.linear_num_value_heads, c.linear_key_head_dim, c.linear_value_head_dim)
        return [weight.new_zeros(batch, weight.shape[0], weight.shape[2] - 1), torch.zeros(rule)]

    def forward(self, x: Tensor, position: Tensor, conv: Tensor, rule: Tensor) -> Tensor:
        c, T = self.c, x.shape[1]
        window = torch.cat([conv, self.in_proj_qkv(x).transpose(1, 2)], 2)
        weight = self.conv1d.weight
        taps = [window[:, :, i : i + T] * weight[:, :, i] for i in range(weight.shape[2])]
        qkv = F.silu(sum(taps[1:], taps[0])).transpose(1, 2).contiguous()
        conv.copy_(window[:, :, T:])
        q, k, v = qkv.split(self.sizes, -1)
        o = anydelta.gated_delta_rule_(
            q.unflatten(-1, (-1, c.linear_key_head_dim)),
            k.unflatten(-1, (-1, c.linear_key_head_dim)),
            v.unflatten(-1, (-1, c.linear_value_head_dim)),
            rule,
            g=self.in_proj_a(x),
            beta=self.in_proj_b(x),
            decay="raw",
            A_log=self.A_log,
            dt_bias=self.dt_bias,
            beta_is_logit=True,
            qk_l2norm=True,
        )
        z = self.in_proj_z(x).unflatten(-1, (-1, c.linear_value_head_dim))
        return self.out_proj(self.norm(o, z).flatten(-2))  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Grouped-query attention with an output gate. States: keys, values [B, max_tokens, heads, D]."""

    def __init__(self, c: Config):
        super().__init__()
        self.c = c
        D = c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * D * 2, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * D, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * D, bias=False)
        self.o_proj = nn.Linear(c.num_attention_heads * D, c.hidden_size, bias=False)
        self.q_norm = Norm(D, c.rms_norm_eps)
        self.k_norm = Norm(D, c.rms_norm_eps)

    def states(self, batch: int, max_tokens: int) -> list[Tensor]:
        shape = (batch, max_tokens, self.c.num_key_value_heads, self.c.head_dim)
        return [self.k_proj.weight.new_zeros(shape) for _ in range(2)]

    def forward(self, x: Tensor, position: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        D = self.c.head_dim
        q, gate = self.q_proj(x).unflatten(-1, (-1, 2 * D)).chunk(2, -1)
        turn = self.rotation(position)
        keys.index_copy_(1, position, turn(self.k_norm(self.k_proj(x).unflatten(-1, (-1, D)))))
        values.index_copy_(1, position, self.v_proj(x).unflatten(-1, (-1, D)))
        seen = torch.arange(keys.shape[1]) <= position[:, None]
        o = F.scaled_dot_product_attention(
            turn(self.q_norm(q)).transpose(1, 2),
            keys.transpose(1, 2),
            values.transpose(1, 2),
            attn_mask=seen,
            enable_gqa=True,
        ).transpose(1, 2)
        return self.o_proj((o * gate.sigmoid()).flatten(-2))  # type: ignore[no-any-return]

    def rotation(self, position: Tensor) -> Callable[[Tensor], Tensor]:
        """Turns the first channels of [B, T, heads, D] by their position."""
        n = int(self.c.head_dim * self.c.partial_rotary_factor)
        angle = position.float()[:, None] * self.c.rope_theta ** (-torch.arange(0, n, 2).float() / n)
        angle = torch.cat([angle, angle], -1)[:, None]
        cos, sin = angle.cos(), angle.sin()

        def turn(x: Tensor) -> Tensor:
            y, rest = x[..., :n], x[..., n:]
            half = torch.cat([-y[..., n // 2 :], y[..., : n // 2]], -1)
            return torch.cat([y * cos.to(x.dtype) + half * sin.to(x.dtype), rest], -1)

        return turn


class Mlp(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class Layer(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)); two states."""

    def __init__(self, c: Config, kind: str):
        super().__init__()
        if kind == "linear_attention":
            self.linear_attn = GatedDeltaNet(c)
        else:
            self.self_attn = Attention(c)
        self.mlp = Mlp(c)
        self.input_layernorm = Norm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = Norm(c.hidden_size, c.rms_norm_eps)

    @property
    def mixer(self) -> GatedDeltaNet | Attention:
        return self.linear_attn if hasattr(self, "linear_attn") else self.self_attn

    def forward(self, x: Tensor, position: Tensor, first: Tensor, second: Tensor) -> Tensor:
        x = x + self.mixer(self.input_layernorm(x), position, first, second)
        return x + self.mlp(self.post_attention_layernorm(x))  # type: ignore[no-any-return]


class Model(nn.Module):
    """Tokens to logits. `states` are advanced in place: two tensors per layer, from `new_states`."""

    def __init__(self, c: Config):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c, kind) for kind in c.layer_types)
        self.norm = Norm(c.hidden_size, c.rms_norm_eps)

    @staticmethod
    def load(folder: Path) -> Model:
        """The model of a folder with config.json and model.safetensors (tied embeddings, no MTP layers)."""
        from safetensors.torch import load_file

        model = Model(Config.read(folder))
        weights = load_file(folder / "model.safetensors")
        model.load_state_dict(
            {name.removeprefix("model."): w for name, w in weights.items() if name.startswith("model.")}
        )
        return model.eval().requires_grad_(False)

    def new_states(self, batch: int = 1, max_tokens: int = 256) -> list[Tensor]:
        """The states before the first token. Keys and values have `max_tokens` places."""
        layers: Any = self.layers
        return [s for layer in layers for s in layer.mixer.states(batch, max_tokens)]

    def forward(self, ids: Tensor, position: Tensor, states: list[Tensor]) -> Tensor:
        """ids [B, T], position [T] (the tokens' places in the sequence) -> logits of the last token [B, vocabulary]."""
        x = self.embed_tokens(ids)
        for i, layer in enumerate(self.layers):
            x = layer(x, position, states[2 * i], states[2 * i + 1])
        return self.norm(x[:, -1]) @ self.embed_tokens.weight.T  # type: ignore[no-any-return]


class WithBuffers(nn.Module):
    """The model with its states as buffers, which the exported program carries from call to call."""

    def __init__(self, model: Model, batch: int = 1, max_tokens: int = 256):
        super().__init__()
        self.model = model
        self.count = 0
        for i, state in enumerate(model.new_states(batch, max_tokens)):
            self.register_buffer(f"state_{i}", state)
            self.count += 1

    def forward(self, ids: Tensor, position: Tensor) -> Tensor:
        states = [getattr(self, f"state_{i}") for i in range(self.count)]
        return self.model(ids, position, states)  # type: ignore[no-any-return]


def generate(step: Callable[[Tensor, Tensor], Tensor], prompt: Sequence[int], new: int) -> list[int]:
    """Greedy tokens: `step(ids [1, T], position [T])` gives the logits of the last token."""
    tokens = list(prompt)
    fresh = tokens
    for _ in range(new):
        start = len(tokens) - len(fresh)
        logits: Tensor = step(torch.tensor([fresh]), torch.arange(start, len(tokens)))
        fresh = [int(logits.argmax())]
        tokens += fresh
    return tokens[len(prompt) :]
