"""llama.cpp as a contender: the model's own weights in a GGUF file, run by the library that llama-cpp-python builds.

The file goes to a temporary folder. Tensor names and what a GGUF holds in place of Transformers' tensors (-exp(A_log),
norms with their one added, value heads in tiled order) are llama.cpp's: its src/models/qwen35.cpp, qwen3next.cpp
and converters. Matrices and the key and value cache have the model's dtype, everything else is float32.
"""

from __future__ import annotations

import ctypes
import importlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..measure.cases import F32
from ..measure.contender import needs, package_version
from ..measure.presets import Built

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5Attention, Qwen3_5MLP
    from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeSparseMoeBlock

    from ...integrations.transformers.families import LinearAttention

ARCHITECTURES = {"qwen3_5_text": "qwen35", "qwen3_next": "qwen3next"}
"""model_type in Transformers: architecture in llama.cpp."""

GGML_TYPES = {"float32": 0, "float16": 1, "bfloat16": 30}

BATCH = 2048
"""Tokens per llama_decode; it works on 512 of them at a time, as llama-bench does by default."""


def missing(built: Built) -> str | None:
    """Why llama.cpp cannot run this model here, or None."""
    for module, package in (("llama_cpp", "llama-cpp-python"), ("gguf", "gguf")):
        if why := needs(module, package):
            return why
    kind = built.model.config.model_type
    if kind not in ARCHITECTURES:
        return f"no GGUF of a {kind} is written here; of {' and '.join(ARCHITECTURES)} it is"
    return None


class LlamaRunner:
    """llama.cpp with one model; a `Runner` of model.py."""

    name = "llama.cpp"
    logit_error = 1e-3
    """Other code throughout: another place for the epsilon of the L2 norm, another exp, other sums."""

    def __init__(self, built: Built, dtype: str, context: int):
        """Write the file and load it, for at most `context` tokens.

        Raises:
            RuntimeError: no room on the disk, or llama.cpp refuses the file; with its own words.
        """
        self.version = f"(llama-cpp-python {package_version('llama-cpp-python')})"
        self._lib = lib = importlib.import_module("llama_cpp")
        self._model = self._context = None
        self._said: list[str] = []
        self._log = lib.llama_log_callback(self._listen)  # llama.cpp keeps the pointer: it must live as long
        lib.llama_log_set(self._log, ctypes.c_void_p(0))
        self._folder = tempfile.TemporaryDirectory(prefix="anydelta-gguf-", ignore_cleanup_errors=True)
        try:
            path = Path(self._folder.name) / "model.gguf"
            if shutil.disk_usage(self._folder.name).free < 1.1 * built.size:
                raise RuntimeError(f"requires {built.size / 2**30:.1f} GiB of disk for the GGUF; got less")
            write_gguf(built, path)
            self._load(path, dtype, context)
        except BaseException:
            self.close()
            raise
        self._vocabulary = built.model.get_input_embeddings().num_embeddings

    def _load(self, path: Path, dtype: str, context: int) -> None:
        lib = self._lib
        lib.llama_backend_init()
        self._model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp does not load the GGUF: {self._words()}")
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = context, BATCH, 512
        params.type_k = params.type_v = GGML_TYPES[dtype]
        self._context = lib.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp makes no context: {self._words()}")

    def threads(self, n: int) -> None:
        self._lib.llama_set_n_threads(self._context, n, n)

    def _listen(self, level: int, text: bytes, _: object) -> None:
        if level == 4:  # an error
            self._said.append(text.decode("utf-8", errors="replace").strip())

    def _words(self) -> str:
        return " ".join(self._said[-3:]) or "no reason given"

    def context(self, ids: Sequence[int]) -> ctypes.Array[ctypes.c_uint8]:
        self.restore(None)
        self.prompt(ids)
        size = self._lib.llama_state_seq_get_size(self._context, 0)
        kept: ctypes.Array[ctypes.c_uint8] = (ctypes.c_uint8 * size)()
        if self._lib.llama_state_seq_get_data(self._context, kept, size, 0) != size:
            raise RuntimeError("llama.cpp does not give its state")
        return kept

    def restore(self, kept: ctypes.Array[ctypes.c_uint8] | None) -> None:
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        if kept is not None and not self._lib.llama_state_seq_set_data(self._context, kept, len(kept), 0):
            raise RuntimeError("llama.cpp does not take its state back")

    def prompt(self, ids: Sequence[int]) -> F32:
        for begin in range(0, len(ids), BATCH):
            self._decode(ids[begin : begin + BATCH])
        return np.array(self._logits())

    def decode(self, token: int, n: int) -> None:
        for _ in range(n):
            self._decode([token])
            token = int(np.argmax(self._logits()))

    def _decode(self, ids: Sequence[int]) -> None:
        tokens = (self._lib.llama_token * len(ids))(*ids)
        if code := self._lib.llama_decode(self._context, self._lib.llama_batch_get_one(tokens, len(ids))):
            raise RuntimeError(f"llama_decode returned {code}: {self._words()}")

    def _logits(self) -> F32:
        pointer = self._lib.llama_get_logits_ith(self._context, -1)
        return np.asarray(np.ctypeslib.as_array(pointer, (self._vocabulary,)))

    def close(self) -> None:
        if self._context:
            self._lib.llama_free(self._context)
        if self._model:
            self._lib.llama_model_free(self._model)
        self._context = self._model = None
        self._folder.cleanup()


# ---- The file


def write_gguf(built: Built, path: Path) -> None:
    """Write a model of Transformers as llama.cpp wants it."""
    import torch

    gguf = importlib.import_module("gguf")
    config = built.model.config
    arch = ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(path, arch)
    _write_sizes(writer, config, built)
    kinds = gguf.GGMLQuantizationType
    half = {torch.bfloat16: kinds.BF16, torch.float16: kinds.F16}
    with torch.no_grad():
        for name, tensor in _tensors(built.model, config):
            if tensor.ndim > 1 and "conv1d" not in name and tensor.dtype in half:
                writer.add_tensor(
                    name, tensor.contiguous().view(torch.uint8).numpy(), raw_dtype=half[tensor.dtype]
                )
            else:
                writer.add_tensor(name, tensor.float().contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    writer.close()


def _write_sizes(writer: Any, config: PreTrainedConfig, built: Built) -> None:
    rope = config.rope_parameters
    rotated = int(config.head_dim * rope.get("partial_rotary_factor", 0.25))
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    writer.add_rope_dimension_count(rotated)
    if (
        config.model_type == "qwen3_5_text"
    ):  # text has one position on all three axes, so any split of them is right
        axis = rotated // 6
        writer.add_rope_dimension_sections([rotated // 2 - 2 * axis, axis, axis, 0])
    writer.add_ssm_conv_kernel(config.linear_conv_kernel_dim)
    writer.add_ssm_state_size(config.linear_key_head_dim)
    writer.add_ssm_group_count(config.linear_num_key_heads)
    writer.add_ssm_time_step_rank(config.linear_num_value_heads)
    writer.add_ssm_inner_size(config.linear_value_head_dim * config.linear_num_value_heads)
    writer.add_full_attention_interval(config.layer_types.index("full_attention") + 1)
    if config.model_type == "qwen3_next":
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    writer.add_vocab_size(built.model.get_input_embeddings().num_embeddings)
    writer.add_tokenizer_model("no_vocab")


def _tensors(model: PreTrainedModel, config: PreTrainedConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor under its GGUF name. The norms of these families multiply by one plus their weight."""
    base = model.base_model
    yield "token_embd.weight", base.embed_tokens.weight
    yield "output_norm.weight", base.norm.weight.float() + 1
    if not config.tie_word_embeddings:
        yield "output.weight", model.lm_head.weight
    for i, layer in enumerate(base.layers):
        at = f"blk.{i}."
        yield at + "attn_norm.weight", layer.input_layernorm.weight.float() + 1
        yield at + "post_attention_norm.weight", layer.post_attention_layernorm.weight.float() + 1
        own = (
            _linear(layer.linear_attn, config)
            if hasattr(layer, "linear_attn")
            else _attention(layer.self_attn)
        )
        ffn = _experts(layer.mlp) if hasattr(layer.mlp, "experts") else _dense(layer.mlp, "")
        for name, tensor in (*own, *ffn):
            yield at + name, tensor


def _attention(attn: Qwen3_5Attention) -> Iterator[tuple[str, torch.Tensor]]:
    for ours, theirs in (
        ("q_proj", "attn_q"),
        ("k_proj", "attn_k"),
        ("v_proj", "attn_v"),
        ("o_proj", "attn_output"),
    ):
        yield theirs + ".weight", getattr(attn, ours).weight
    for norm in ("q_norm", "k_norm"):
        yield f"attn_{norm}.weight", getattr(attn, norm).weight.float() + 1


def _linear(attn: LinearAttention, config: PreTrainedConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """The gated delta rule's layer, value heads in tiled order: head i of ggml uses key head i mod their number."""
    import torch

    H, HV = config.linear_num_key_heads, config.linear_num_value_heads
    K, V = config.linear_key_head_dim, config.linear_value_head_dim

    def tiled(x: torch.Tensor, size: int, dim: int = 0) -> torch.Tensor:
        """Value heads of `size` along `dim`, from [H, HV / H] to [HV / H, H]."""
        parts: torch.Tensor = x.unflatten(dim, (H, HV // H, size))
        return parts.transpose(dim, dim + 1).flatten(dim, dim + 2)

    if hasattr(attn, "in_proj_qkvz"):  # qwen3_next: per key head its q, k, and the v and z of its value heads
        rest = HV // H * V
        rows = attn.in_proj_qkvz.weight.unflatten(0, (H, 2 * K + 2 * rest))
        q, k, v, z = (part.flatten(0, 1) for part in rows.split([K, K, rest, rest], 1))
        b, a = (
            part.flatten(0, 1)
            for part in attn.in_proj_ba.weight.unflatten(0, (H, 2 * HV // H)).split(HV // H, 1)
        )
    else:
        q, k, v = attn.in_proj_qkv.weight.split([H * K, H * K, HV * V], 0)
        z, b, a = attn.in_proj_z.weight, attn.in_proj_b.weight, attn.in_proj_a.weight
    taps = attn.conv1d.weight.squeeze(1)
    order = (
        tiled if config.model_type == "qwen3_5_text" else lambda x, size, dim=0: x
    )  # qwen3next repeats them itself
    yield "attn_qkv.weight", torch.cat((q, k, order(v, V)))
    yield "attn_gate.weight", order(z, V)
    yield "ssm_conv1d.weight", torch.cat((taps[: 2 * H * K], order(taps[2 * H * K :], V)))
    yield "ssm_dt.bias", order(attn.dt_bias, 1)
    yield "ssm_a", order(-attn.A_log.float().exp(), 1)
    if config.model_type == "qwen3_5_text":
        yield "ssm_beta.weight", order(b, 1)
        yield "ssm_alpha.weight", order(a, 1)
    else:  # packed as in Transformers
        yield "ssm_ba.weight", attn.in_proj_ba.weight
    yield "ssm_norm.weight", attn.norm.weight
    yield "ssm_out.weight", order(attn.out_proj.weight, V, 1)


def _dense(mlp: Qwen3_5MLP, tail: str) -> Iterator[tuple[str, torch.Tensor]]:
    for part in ("gate", "up", "down"):
        yield f"ffn_{part}{tail}.weight", getattr(mlp, f"{part}_proj").weight


def _experts(mlp: Qwen3_5MoeSparseMoeBlock) -> Iterator[tuple[str, torch.Tensor]]:
    yield "ffn_gate_inp.weight", mlp.gate.weight
    gate, up = mlp.experts.gate_up_proj.chunk(2, 1)  # [experts, 2 x hidden, model]
    yield "ffn_gate_exps.weight", gate
    yield "ffn_up_exps.weight", up
    yield "ffn_down_exps.weight", mlp.experts.down_proj
    yield "ffn_gate_inp_shexp.weight", mlp.shared_expert_gate.weight.squeeze(0)
    yield from _dense(mlp.shared_expert, "_shexp")
