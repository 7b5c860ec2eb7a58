"""`anydelta bench layer`: the part that the mixer replaces in one qwen3.5-0.8b layer of Transformers.

Fixed tensors replace the projections, so convolution, gates, rule, norm and cache remain. Transformers runs with and
without anydelta, interleaved.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from ...generate.checkpoint import need_packages
from ...integrations import transformers as plug
from ...terminal import Failed, Refused
from ..measure.ops import Settings, describe_machine
from ..measure.report import time as in_words
from ..measure.small_report import Measured
from ..measure.turns import Progress, interleave, torch_threads
from .options import Csv, Json, Md, Output, Rounds, small

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedConfig

HEADS, SIZE, HIDDEN = 16, 128, 1024
ERROR = {"float32": 1e-4, "bfloat16": 0.05}
"""Relative to Transformers' largest output."""


@dataclass
class LayerRecord:
    """One call of the layer, with and without anydelta."""

    call: str
    dtype: str
    rounds: int
    transformers_us: float
    """Median of the rounds; here and below."""
    anydelta_us: float
    ratio: float
    ratio_low: float
    """The lowest and the highest of the rounds."""
    ratio_high: float
    error: float
    others_pct: float | None = None

    def columns(self) -> dict[str, str]:
        return {
            "call": self.call, "dtype": self.dtype, "Transformers": in_words(self.transformers_us),
            "anydelta": in_words(self.anydelta_us),
            "ratio": f"{self.ratio:.1f} ({self.ratio_low:.1f} to {self.ratio_high:.1f})",
        }  # fmt: skip


def _layer(dtype: torch.dtype) -> tuple[nn.Module, PreTrainedConfig]:
    """(the layer with fixed projections, its configuration)."""
    import torch
    import transformers
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet

    class Fixed(torch.nn.Module):
        """A projection that costs nothing: the same numbers for every input of a shape."""

        def __init__(self, width: int):
            super().__init__()
            self.width, self.held = width, dict[tuple[int, ...], torch.Tensor]()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            shape = (*x.shape[:2], self.width)
            if shape not in self.held:
                self.held[shape] = torch.randn(shape).to(dtype)
            return self.held[shape]

    config = transformers.Qwen3_5TextConfig(
        hidden_size=HIDDEN, num_hidden_layers=4, vocab_size=64, intermediate_size=64, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, linear_num_key_heads=HEADS, linear_num_value_heads=HEADS,
        linear_key_head_dim=SIZE, linear_value_head_dim=SIZE, linear_conv_kernel_dim=4,
    )  # fmt: skip
    layer = Qwen3_5GatedDeltaNet(config, 0).eval().to(dtype)
    for name, width in (("qkv", 3 * HEADS * SIZE), ("z", HEADS * SIZE), ("a", HEADS), ("b", HEADS)):
        setattr(layer, f"in_proj_{name}", Fixed(width))
    layer.out_proj = torch.nn.Identity()
    return layer, config


def _step(
    layer: nn.Module, config: PreTrainedConfig, tokens: int, dtype: torch.dtype
) -> Callable[[], torch.Tensor]:
    """A prefill into a new cache, or, for one token, a decode step on a filled cache."""
    import torch
    import transformers

    torch.manual_seed(1)
    x = torch.randn(1, tokens, HIDDEN).to(dtype)
    if tokens > 1:
        return lambda: layer(x, cache_params=transformers.DynamicCache(config=config))
    cache = transformers.DynamicCache(config=config)
    layer(torch.randn(1, 8, HIDDEN).to(dtype), cache_params=cache)
    return lambda: layer(x, cache_params=cache)


def _train(layer: nn.Module, tokens: int, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    """Forward and backward pass of a prefill. Returns the projections' gradients; those of weights are computed too."""
    import torch

    torch.manual_seed(1)
    x, grad = torch.randn(1, tokens, HIDDEN).to(dtype), torch.randn(1, tokens, HEADS * SIZE).to(dtype)
    projections = [getattr(layer, f"in_proj_{name}")(x) for name in ["qkv", "z", "a", "b"]]
    leaves = [*(p.requires_grad_() for p in projections), *layer.parameters()]

    def step() -> torch.Tensor:
        with torch.enable_grad():
            found = torch.autograd.grad(layer(x), leaves, grad)
        return torch.cat([g.flatten().float() for g in found[:2]])

    return step


def mixer_of_a_layer(
    tokens: int = 512,
    threads: int = 2,
    settings: Settings | None = None,
    progress: Progress = lambda text, done: None,
) -> Measured:
    """Measure a prefill of `tokens`, a decode step, and the prefill forward and backward, in float32 and bfloat16.

    Raises:
        Failed: a result is wrong.
    """
    import torch

    settings = settings or Settings()
    title = f"A qwen3.5-0.8b layer without projections, {threads} thread{'s' * (threads > 1)}"
    measured = Measured(title, describe_machine(), settings)
    switches: dict[str, Callable[[], AbstractContextManager[object]]] = {
        "Transformers": plug.disable, "anydelta": plug.enable,
    }  # fmt: skip
    with torch_threads(threads), torch.no_grad():
        for dtype, most in ERROR.items():
            torch.manual_seed(0)
            layer, config = _layer(getattr(torch, dtype))
            makers = {
                f"prefill of {tokens}": partial(_step, layer, config, tokens),
                "decode": partial(_step, layer, config, 1),
                f"training on {tokens}": partial(
                    _train, layer, tokens
                ),  # last: from here on gradients are wanted
            }
            for call, make in makers.items():
                steps, first = {}, {}
                for name, switch in switches.items():
                    with switch():
                        steps[name] = make(getattr(torch, dtype))
                        first[name] = steps[name]().float()
                want = first["Transformers"]
                error = float((first["anydelta"] - want).abs().max() / want.abs().max())
                if not error <= most:
                    raise Failed(f"{dtype}, {call}: the error must be at most {most}; got {error:.1e}")
                samples, _, others = interleave(steps, settings, progress, switches)
                ratios = [a / b for a, b in zip(samples["Transformers"], samples["anydelta"], strict=True)]
                theirs, ours = (statistics.median(samples[name]) for name in switches)
                measured.records.append(
                    LayerRecord(
                        call, dtype, len(ratios), theirs, ours, statistics.median(ratios), min(ratios), max(ratios),
                        error, others,
                    )
                )  # fmt: skip
    measured.notes.append("medians of the rounds; ratio: within a round (least to most)")
    return measured


def layer_command(
    tokens: Annotated[int, typer.Option("--tokens", "-T", help="Tokens of the prefill.")] = 512,
    threads: Annotated[int, typer.Option("--threads", "-t", help="Number of threads.")] = 2,
    rounds: Rounds = 9,
    json: Json = False,
    csv: Csv = False,
    md: Md = False,
    output: Output = None,
) -> None:
    """Time the part of a Transformers layer that the mixer replaces, forward and backward.

    Examples:
      anydelta bench layer
      anydelta bench layer -T 128 -t 1 --md
    """
    for name, value, least, most in (("-T", tokens, 2, 65536), ("-t", threads, 1, 1024)):
        if not least <= value <= most:
            raise Refused(f"{name} must be from {least} to {most}; got {value}")
    need_packages()
    small(partial(mixer_of_a_layer, tokens, threads), rounds, 15.0, json, csv, md, output)
