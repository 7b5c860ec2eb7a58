"""The linear attention layer's own time: one qwen3.5-0.8b layer in Transformers without its projections.

    python scripts/time_mixer.py --rounds 9 --threads 2

The projections are replaced by fixed tensors, so what is left is what the mixer replaces: convolution, gates, rule,
norm, cache. Plain Transformers and anydelta take turns in one process; medians of the rounds and of their ratios, with
the smallest and the largest. The two outputs are compared first.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet

import anydelta.integrations.transformers as adt

HEADS, SIZE, HIDDEN = 16, 128, 1024


class Fixed(nn.Module):
    """A projection that costs nothing: the same numbers for every input of a shape."""

    def __init__(self, width: int, dtype: torch.dtype):
        super().__init__()
        self.width, self.dtype, self.held = width, dtype, dict[Any, torch.Tensor]()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        key = tuple(x.shape[:2])
        if key not in self.held:
            self.held[key] = torch.randn(*key, self.width).to(self.dtype)
        return self.held[key]


def build(dtype: torch.dtype) -> tuple[Any, Any]:
    config = transformers.Qwen3_5TextConfig(
        hidden_size=HIDDEN, num_hidden_layers=4, vocab_size=64, intermediate_size=64, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, linear_num_key_heads=HEADS, linear_num_value_heads=HEADS,
        linear_key_head_dim=SIZE, linear_value_head_dim=SIZE, linear_conv_kernel_dim=4,
    )  # fmt: skip
    layer = Qwen3_5GatedDeltaNet(config, 0).eval().to(dtype)
    width = HEADS * SIZE
    for name, n in (("qkv", 3 * width), ("z", width), ("a", HEADS), ("b", HEADS)):
        setattr(layer, f"in_proj_{name}", Fixed(n, dtype))
    layer.out_proj = nn.Identity()
    return layer, config


def step(layer: Any, config: Any, tokens: int, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    """A prefill of `tokens` into a new cache, or, for one, a decode step on a cache that has seen some."""
    x = torch.randn(1, tokens, HIDDEN).to(dtype)
    if tokens > 1:
        return lambda: layer(x, cache_params=transformers.DynamicCache(config=config))
    cache = transformers.DynamicCache(config=config)
    layer(torch.randn(1, 8, HIDDEN).to(dtype), cache_params=cache)
    return lambda: layer(x, cache_params=cache)


def show(times: list[float], scale: float = 1e3) -> str:
    return f"{statistics.median(times) * scale:.3f} ({min(times) * scale:.3f} to {max(times) * scale:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=512, help="of the prefill")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    transformers.utils.logging.set_verbosity_error()
    print(f"qwen3.5-0.8b layer without projections, {options.threads} threads, ms: median (least to most)")
    with torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16):
            layer, config = build(dtype)
            for tokens in (options.tokens, 1):
                repeat = 1 if tokens > 1 else 20
                run: dict[str, Callable[[], torch.Tensor]] = {}
                times: dict[str, list[float]] = {"Transformers": [], "anydelta": []}
                for name in times:
                    torch.manual_seed(1)
                    with adt.enable() if name == "anydelta" else adt.disable():
                        run[name] = step(layer, config, tokens, dtype)
                        times[name] = []
                        first = run[name]()
                    if name == "Transformers":
                        want = first
                error = float((first.float() - want.float()).abs().max() / want.float().abs().max())
                assert error < (1e-4 if dtype == torch.float32 else 0.05), error
                for i in range(options.rounds):
                    for name in sorted(times, reverse=bool(i % 2)):
                        with adt.enable() if name == "anydelta" else adt.disable():
                            run[name]()
                            start = time.perf_counter()
                            for _ in range(repeat):
                                run[name]()
                            times[name].append((time.perf_counter() - start) / repeat)
                ratios = [a / b for a, b in zip(times["Transformers"], times["anydelta"], strict=True)]
                what = f"prefill {tokens}" if tokens > 1 else "decode"
                print(
                    f"{str(dtype).removeprefix('torch.'):9} {what:12} Transformers {show(times['Transformers'])}  "
                    f"anydelta {show(times['anydelta'])}  ratio {show(ratios, 1)}"
                )


if __name__ == "__main__":
    main()
