"""The recurrence's time inside mlx-lm's models on MLX's CPU device, with mlx-lm's own function and with anydelta's.

    python scripts/time_mlx.py --rounds 5 --threads 2

Models have the heads of real checkpoints, random weights, and few and narrow layers: the recurrence is what is timed.
A clock stands around each call of gated_delta_update, whose inputs are computed before and whose outputs before it
stops. Both take turns in one process; medians of the rounds and of their ratios, with the smallest and the largest.
Logits are compared first. MLX's CPU device runs an op on one thread; anydelta on --threads.
"""

from __future__ import annotations

import argparse
import importlib
import os
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

BASE = dict(
    vocab_size=256, hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8,
    num_key_value_heads=2, head_dim=64, rms_norm_eps=1e-6, max_position_embeddings=4096,
)  # fmt: skip
GDN = dict(
    linear_key_head_dim=128, linear_value_head_dim=128, linear_conv_kernel_dim=4, full_attention_interval=2
)
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3_5": {**BASE, **GDN, "linear_num_key_heads": 16, "linear_num_value_heads": 16},
    "qwen3_next": {
        **BASE, **GDN, "linear_num_key_heads": 16, "linear_num_value_heads": 32, "num_experts": 0,
        "num_experts_per_tok": 1, "decoder_sparse_step": 1, "shared_expert_intermediate_size": 1, "mlp_only_layers": [],
        "moe_intermediate_size": 1, "rope_theta": 10000.0, "partial_rotary_factor": 0.25,
    },
    "kimi_linear": {
        **BASE, "rope_theta": 10000.0, "model_max_length": 4096, "kv_lora_rank": 64, "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 16, "v_head_dim": 64, "num_experts": 0, "moe_intermediate_size": 1,
        "num_key_value_heads": 8,
        "linear_attn_config": dict(
            num_heads=32, head_dim=128, short_conv_kernel_size=4, kda_layers=[1, 3], full_attn_layers=[2, 4]),
    },
}  # fmt: skip


def build(family: str, dtype: Any) -> Any:
    import mlx.core as mx

    module = importlib.import_module(f"mlx_lm.models.{family}")
    mx.random.seed(0)
    model = module.Model(module.ModelArgs.from_dict({"model_type": family, **CONFIGS[family]}))
    model.set_dtype(dtype)
    model.eval()
    mx.eval(model.parameters())
    return model


class Clock:
    """Stands around a family's gated_delta_update."""

    def __init__(self, family: str):
        self.module: Any = importlib.import_module(f"mlx_lm.models.{family}")
        self.seconds = 0.0

    def around(self, run: Callable[[], Any]) -> float:
        """Seconds in the recurrence while `run` runs."""
        import mlx.core as mx

        function = self.module.gated_delta_update
        spent = 0.0

        def timed(*args: Any, **kwargs: Any) -> Any:
            nonlocal spent
            mx.eval([x for x in (*args, *kwargs.values()) if isinstance(x, mx.array)])
            start = time.perf_counter()
            out = function(*args, **kwargs)
            mx.eval(out)
            spent += time.perf_counter() - start
            return out

        self.module.gated_delta_update = timed
        try:
            run()
        finally:
            self.module.gated_delta_update = function
        return spent


def show(values: list[float], scale: float = 1e3) -> str:
    return f"{statistics.median(values) * scale:.3g} ({min(values) * scale:.3g} to {max(values) * scale:.3g})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="of anydelta")
    parser.add_argument("--tokens", type=int, default=256, help="of the prefill")
    parser.add_argument("--families", nargs="*", default=list(CONFIGS), choices=list(CONFIGS))
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # before anydelta reads it

    import mlx.core as mx
    import mlx_lm

    import anydelta.integrations.mlx_lm as adm

    print(
        f"mlx-lm {mlx_lm.__version__} on MLX {version('mlx')}'s CPU device, anydelta on {options.threads} threads"
    )
    print(
        "in the recurrence of 2 layers, ms: median (least to most); whole: the ratio of the whole model's times"
    )
    for family in options.families:
        clock = Clock(family)
        for dtype in options.dtypes:
            model = build(family, getattr(mx, dtype))
            for tokens in (options.tokens, 1):
                compare(adm, model, clock, f"{family} {dtype}", tokens, options.rounds)


def compare(adm: Any, model: Any, clock: Clock, name: str, tokens: int, rounds: int) -> None:
    """One line: a prefill of `tokens`, or, for one, a decode step on a cache that has seen some."""
    import mlx.core as mx

    x = mx.random.randint(0, 256, (1, tokens), key=mx.random.key(0))

    def prefill() -> Callable[[], Any]:
        cache = model.make_cache()
        return lambda: mx.eval(model(x, cache=cache))

    def decode() -> Callable[[], Any]:
        cache = model.make_cache()
        mx.eval(model(mx.concatenate([x] * 8, axis=1), cache=cache))
        return lambda: mx.eval(model(x, cache=cache))

    switches = {"mlx-lm": adm.disable, "anydelta": adm.enable}
    logits, steps = {}, {}
    for who, switch in switches.items():
        with switch():
            logits[who] = model(x).astype(mx.float32)
            mx.eval(logits[who])
            if tokens == 1:
                steps[who] = decode()
    want = logits["mlx-lm"]
    error = float(mx.abs(logits["anydelta"] - want).max() / mx.abs(want).max())
    assert error < (1e-4 if "float32" in name else 0.05), error

    inside: dict[str, list[float]] = {who: [] for who in switches}
    whole: dict[str, list[float]] = {who: [] for who in switches}
    for i in range(rounds if tokens > 1 else 10 * rounds):
        for who in sorted(switches, reverse=bool(i % 2)):
            with switches[who]():
                inside[who].append(clock.around(steps[who] if tokens == 1 else prefill()))
                run = steps[who] if tokens == 1 else prefill()
                start = time.perf_counter()
                run()
                whole[who].append(time.perf_counter() - start)

    def ratios(times: dict[str, list[float]]) -> list[float]:
        return [a / b for a, b in zip(times["mlx-lm"], times["anydelta"], strict=True)]

    what = f"prefill {tokens}" if tokens > 1 else "decode"
    print(
        f"{name:21} {what:11} mlx-lm {show(inside['mlx-lm'])}  anydelta {show(inside['anydelta'])}  "
        f"ratio {show(ratios(inside), 1)}  whole {show(ratios(whole), 1)}  logits differ by {error:.0e}",
        flush=True,
    )


if __name__ == "__main__":
    main()
