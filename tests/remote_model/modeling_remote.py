"""A small model that brings its code, with the imports of released checkpoints.

One layer in each of their ways: `kimi` computes its gate outside the rule and packs padded batches, `ling` hands the
raw gate and its lower bound to the rule, `gdn` has one decay per head and more value heads than key heads, and
`lightning` has no delta.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

try:
    from fla.layers.utils import get_unpad_data, index_first_axis, pad_input
    from fla.modules import FusedRMSNormGated, ShortConvolution
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule
    from fla.ops.kda import chunk_kda, fused_recurrent_kda
    from fla.ops.kda.gate import fused_kda_gate
    from fla.ops.simple_gla.chunk import chunk_simple_gla
    from fla.ops.simple_gla.fused_recurrent import fused_recurrent_simple_gla
    from fla.ops.utils.index import prepare_cu_seqlens_from_mask, prepare_lens_from_mask
    from fla.utils import tensor_cache
except ImportError as error:
    raise ImportError("this model requires fla: pip install -U fla-core") from error

from .configuration_remote import RemoteConfig


@tensor_cache
def rows_of(mask):
    """Where a padded batch's rows lie when packed, by this file's own use of fla's helpers."""
    return prepare_cu_seqlens_from_mask(mask), int(prepare_lens_from_mask(mask).max())


class Norm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


class Linear(nn.Module):
    """A linear attention layer; its states are (q, k, v convolution caches, recurrent state)."""

    def __init__(self, config, kind):
        super().__init__()
        self.kind, self.lower_bound = kind, config.lower_bound
        self.heads, self.dim = config.num_heads, config.head_dim
        self.value_heads = config.num_value_heads if kind == "gdn" else config.num_heads
        keys, values = self.heads * self.dim, self.value_heads * self.dim
        hidden = config.hidden_size
        for name, size in (("q", keys), ("k", keys), ("v", values)):
            setattr(self, f"{name}_proj", nn.Linear(hidden, size, bias=False))
            setattr(
                self,
                f"{name}_conv1d",
                ShortConvolution(size, kernel_size=config.conv_size, activation="silu"),
            )
        gates = self.value_heads if kind == "gdn" else keys
        self.f_proj = nn.Linear(hidden, gates, bias=False)
        self.b_proj = nn.Linear(hidden, self.value_heads, bias=False)
        self.A_log = nn.Parameter(
            torch.empty(1, 1, self.value_heads, 1) if kind == "kimi" else torch.empty(self.value_heads)
        )
        self.dt_bias = nn.Parameter(torch.empty(gates))
        self.register_buffer("slopes", -(2.0 ** -torch.arange(1, self.heads + 1)), persistent=False)
        self.g_proj = nn.Linear(hidden, values, bias=False)
        self.o_norm = FusedRMSNormGated(
            self.dim, eps=config.rms_norm_eps, activation="swish" if kind == "gdn" else "sigmoid"
        )
        self.o_proj = nn.Linear(values, hidden, bias=False)

    def forward(self, x, mask=None, states=None, cu_seqlens=None):
        B, T, _ = x.shape
        indices = None
        if mask is not None:
            indices, cu_seqlens, longest = get_unpad_data(mask[:, -T:])
            assert longest == rows_of(mask[:, -T:])[1]
            x = index_first_axis(x.flatten(0, 1), indices).unsqueeze(0)
        before = states or (None, None, None, None)
        convolved = []
        for name, cache in zip("qkv", before, strict=False):
            projected = getattr(self, f"{name}_proj")(x)
            convolved.append(
                getattr(self, f"{name}_conv1d")(
                    x=projected, cache=cache, output_final_state=True, cu_seqlens=cu_seqlens
                )
            )
        (q, q_state), (k, k_state), (v, v_state) = convolved
        q, k, v = (y.unflatten(-1, (-1, self.dim)) for y in (q, k, v))
        beta = self.b_proj(x).sigmoid()
        chunk = self.training or T > 64
        common = dict(initial_state=before[3], output_final_state=True, cu_seqlens=cu_seqlens)
        if self.kind == "kimi":
            g = fused_kda_gate(self.f_proj(x), self.A_log, self.dim, g_bias=self.dt_bias)
            rule = chunk_kda if chunk else fused_recurrent_kda
            o, state = rule(q=q, k=k, v=v, g=g, beta=beta, use_qk_l2norm_in_kernel=True, **common)
        elif self.kind == "ling":
            rule = chunk_kda if chunk else fused_recurrent_kda
            o, state = rule(
                q=q, k=k, v=v, g=self.f_proj(x).unflatten(-1, (-1, self.dim)), beta=beta, A_log=self.A_log,
                dt_bias=self.dt_bias, use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True,
                lower_bound=self.lower_bound, **(dict(safe_gate=True) if chunk else {}), **common,
            )  # fmt: skip
        elif self.kind == "gdn":
            g = -self.A_log.exp() * F.softplus(self.f_proj(x) + self.dt_bias)
            rule = chunk_gated_delta_rule if chunk else fused_recurrent_gated_delta_rule
            o, state = rule(q=q, k=k, v=v, g=g, beta=beta, use_qk_l2norm_in_kernel=True, **common)
        else:
            rule = chunk_simple_gla if chunk else fused_recurrent_simple_gla
            o, state = rule(q=q, k=k, v=v, g_gamma=self.slopes, **common)
        o = self.o_norm(o, self.g_proj(x).unflatten(-1, (-1, self.dim)))
        o = self.o_proj(o.flatten(-2))
        if indices is not None:
            o = pad_input(o.squeeze(0), indices, B, T)
        return o, (q_state, k_state, v_state, state)


class States:
    """What the layers remember."""

    is_compileable = False

    def __init__(self, layers):
        self.layers, self.seen = [None] * layers, 0

    def get_seq_length(self, layer_idx=0):
        return self.seen


class RemotePreTrainedModel(PreTrainedModel):
    config_class = RemoteConfig
    _is_stateful = True

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, Linear):
            nn.init.uniform_(module.A_log, 0.0, 1.0)
            nn.init.uniform_(module.dt_bias, -2.0, 2.0)
            module.slopes.copy_(-(2.0 ** -torch.arange(1, module.heads + 1)))


class RemoteForCausalLM(RemotePreTrainedModel, GenerationMixin):
    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Linear(config, kind) for kind in config.layers)
        self.norms = nn.ModuleList(Norm(config.hidden_size, config.rms_norm_eps) for _ in config.layers)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls):
        return False

    def forward(
        self,
        input_ids,
        attention_mask=None,
        past_key_values=None,
        use_cache=None,
        cu_seqlens=None,
        labels=None,
        **kwargs,
    ):
        states = past_key_values if past_key_values is not None else States(len(self.layers))
        mask = attention_mask if attention_mask is not None and not attention_mask.all() else None
        x = self.embed_tokens(input_ids)
        for i, (layer, norm) in enumerate(zip(self.layers, self.norms, strict=True)):
            new, states.layers[i] = layer(norm(x), mask, states.layers[i], cu_seqlens)
            x = x + new
        states.seen += input_ids.shape[1]
        logits = self.lm_head(x)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=states if use_cache else None)

    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, attention_mask=None, **kwargs):
        if past_key_values is not None and past_key_values.seen:
            input_ids = input_ids[:, past_key_values.seen :]
        return dict(
            input_ids=input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            use_cache=True,
        )
