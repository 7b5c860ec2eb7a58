"""Models of real shape with random weights, for `anydelta bench model`; and the repository's trained one.

A preset is a named configuration of Transformers. The larger ones are cut to fit into memory: fewer layers, fewer
experts (a token still uses as many as in the full model), and a smaller vocabulary. The record says what was cut.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .checkpoint import CheckpointError, default_model, open_checkpoint, quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .gguf_file import Header

REPOSITORY = "tiny"
"""The preset that is the repository's model."""


@dataclass(frozen=True)
class Preset:
    """A configuration of Transformers."""

    name: str
    config: str
    """The class of the configuration."""
    sizes: Mapping[str, Any] = field(default_factory=dict)
    cut: str = ""
    """What was cut from the original model."""
    around: str = ""
    """The class of the configuration that contains this one, if a text model has no class of its own."""


_WORDS = 32768
_QWEN3_5 = dict(vocab_size=248320, head_dim=256, num_key_value_heads=2, tie_word_embeddings=True)
"""For the small ones. The gated delta rule has 16 heads of 128 for q and k, and 16 or 32 for v."""

PRESETS = (
    Preset(
        "qwen3.5-0.8b", "Qwen3_5TextConfig",
        {**_QWEN3_5, **dict(hidden_size=1024, intermediate_size=3584, num_hidden_layers=24, num_attention_heads=8,
                            linear_num_value_heads=16)},
    ),
    Preset(
        "qwen3.5-2b", "Qwen3_5TextConfig",
        {**_QWEN3_5, **dict(hidden_size=2048, intermediate_size=6144, num_hidden_layers=24, num_attention_heads=8,
                            linear_num_value_heads=16)},
    ),
    Preset(
        "qwen3.5-4b", "Qwen3_5TextConfig",
        {**_QWEN3_5, **dict(hidden_size=2560, intermediate_size=9216, num_hidden_layers=32, num_attention_heads=16,
                            num_key_value_heads=4, linear_num_value_heads=32)},
    ),
    Preset(
        "qwen3-next", "Qwen3NextConfig", dict(num_hidden_layers=4, num_experts=32),
        "4 of 48 layers, 32 of 512 experts (10 a token)",
    ),
    Preset(
        "kimi-linear", "KimiLinearConfig", dict(num_hidden_layers=4, num_local_experts=16),
        "4 of 27 layers, 16 of 256 experts (8 a token)",
    ),
    Preset(
        "ling-3", "BailingHybridConfig", dict(num_hidden_layers=4, num_local_experts=32, vocab_size=_WORDS),
        "4 of 42 layers, 32 of 512 experts (8 a token), 32768 of 157184 words",
    ),
    Preset(
        "glm5-next", "Glm5NextTextConfig", dict(num_hidden_layers=4, n_routed_experts=16, vocab_size=_WORDS),
        "4 of 45 layers, 16 of 288 experts (8 a token), 32768 of 154880 words", "Glm5NextConfig",
    ),
    Preset(
        "qwen3.8", "Qwen4ExpTextConfig",
        dict(num_hidden_layers=4, num_experts=32, vocab_size=_WORDS, output_gate_type="sigmoid", indexer_n_heads=16,
             indexer_kv_heads=1, indexer_head_dim=128, indexer_budget=2048, indexer_compress_ratio=16,
             rope_parameters=dict(rope_type="default", rope_theta=1e7, partial_rotary_factor=0.25,
                                  mrope_section=[11, 11, 10])),
        "4 of 40 layers, 32 of 512 experts (10 a token), 32768 of 248320 words, no n-grams; the sizes of the class, "
        "and an indexer of our own choice",
    ),
)  # fmt: skip
"""Other sizes are the defaults of the class, which are those of the published model."""

NAMES = (*(p.name for p in PRESETS), REPOSITORY)


@dataclass
class Built:
    """A model to measure, in eval mode."""

    name: str
    model: PreTrainedModel
    cut: str = ""
    file: Header | None = None
    """What a GGUF file says about itself; None for other models."""

    @property
    def params(self) -> int:
        if self.file is not None:
            return self.file.parameters
        return sum(p.numel() for p in self.model.parameters())

    @property
    def size(self) -> int:
        """Bytes of the weights. Shared weights count once."""
        if self.file is not None:
            return self.file.bytes
        return sum(p.numel() * p.element_size() for p in self.model.parameters())


def build(name: str, dtype: str = "float32", layers: int | None = None, seed: int = 0) -> Built:
    """A preset, or the checkpoint in a folder or on the hub.

    Args:
        layers: cut a preset to this many layers.

    Raises:
        CheckpointError: a checkpoint that cannot be opened, a missing package, or a cut that removes nothing.
    """
    preset = next((p for p in PRESETS if p.name == name), None)
    if preset is None:
        opened = open_checkpoint(default_model() if name == REPOSITORY else name, dtype)
        if layers is not None:
            raise CheckpointError(f"requires a preset with --layers ({', '.join(NAMES[:-1])}); got {name}")
        return Built(name, opened.model)
    return _random(preset, dtype, layers, seed)


def _random(preset: Preset, dtype: str, layers: int | None, seed: int) -> Built:
    import torch

    transformers = importlib.import_module("transformers")
    if not hasattr(transformers, preset.config):
        raise CheckpointError(
            f"requires a Transformers that has {preset.config}; got {transformers.__version__}. "
            "Run: pip install -U transformers"
        )
    most, cut = preset.sizes["num_hidden_layers"], preset.cut
    if layers is not None and not 1 <= layers <= most:
        raise CheckpointError(f"requires --layers from 1 to {most} with {preset.name}; got {layers}")
    if layers is not None and layers < most:
        cut = f"{layers} of {most} layers" + (f"; {cut}" if cut else "")
    n = layers or most
    types = ["full_attention" if i % 4 == 3 else "linear_attention" for i in range(n)]
    config = getattr(transformers, preset.config)(
        **{**preset.sizes, "num_hidden_layers": n, "layer_types": types}
    )
    config.eos_token_id = config.bos_token_id = config.pad_token_id = None
    auto = transformers.AutoModelForCausalLM
    if preset.around:
        eyes = dict(
            depth=1, hidden_size=64, num_heads=1, intermediate_size=64, out_hidden_size=config.hidden_size
        )
        config = getattr(transformers, preset.around)(text_config=config.to_dict(), vision_config=eyes)
        auto = transformers.AutoModelForImageTextToText
    torch.manual_seed(seed)
    wanted = getattr(torch, "float32" if dtype == "auto" else dtype)
    with quiet(), torch.no_grad():
        model = auto.from_config(config, dtype=wanted).eval()
        _slow_decays(model)
    return Built(preset.name, model, cut)


def _slow_decays(model: PreTrainedModel) -> None:
    """Set decays with a long memory, as trained models have. Fresh ones forget within a token or two.

    Otherwise a check of the results would hardly see the state. As in Mamba 2: a time step between 0.001 and 0.1, drawn
    on a logarithmic scale and put through the inverse of softplus, with A from 1 to 16.
    """
    import torch

    for module in model.modules():
        if hasattr(module, "A_log") and hasattr(module, "dt_bias"):
            step = torch.empty(module.dt_bias.shape).uniform_(math.log(1e-3), math.log(0.1)).exp()
            module.dt_bias.copy_(step + torch.log(-torch.expm1(-step)))
            module.A_log.copy_(torch.empty(module.A_log.shape).uniform_(1, 16).log())
