"""`anydelta bench mlx`: the recurrence inside mlx-lm's models on MLX's CPU device, by mlx-lm's function and by ours.

Models have the heads of real checkpoints, random weights, and few and narrow layers, because only the recurrence is
timed. A clock runs around each call of gated_delta_update, with its inputs computed before and its outputs inside. Both
functions run interleaved. MLX's CPU device runs an op on one thread, anydelta on OMP_NUM_THREADS.
"""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...integrations import mlx_lm as plug
from ...terminal import Failed, Refused
from ..measure.contender import needs
from ..measure.ops import Others, Settings, describe_machine
from ..measure.report import time as in_words
from ..measure.small_report import Measured
from ..measure.turns import Progress
from .options import Csv, Json, Md, Output, Rounds, small

if TYPE_CHECKING:
    from mlx.nn.layers.base import Module

BASE = dict(
    vocab_size=256, hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8,
    num_key_value_heads=2, head_dim=64, rms_norm_eps=1e-6, max_position_embeddings=4096,
)  # fmt: skip
GDN = dict(
    linear_key_head_dim=128, linear_value_head_dim=128, linear_conv_kernel_dim=4, full_attention_interval=2
)
CONFIGS: dict[str, dict[str, object]] = {
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
ERROR = {"float32": 1e-4, "bfloat16": 0.05}
"""The limit for errors of logits, relative to mlx-lm's largest."""
DECODE_STEPS = 10
"""Decode steps per round of prefills."""


@dataclass
class MlxRecord:
    """A prefill or a decode step of one family."""

    family: str
    dtype: str
    call: str
    rounds: int
    mlx_lm_us: float
    """Time in the recurrence of two layers, median of the rounds; here and below."""
    anydelta_us: float
    ratio: float
    ratio_low: float
    """The lowest and the highest of the rounds."""
    ratio_high: float
    whole_ratio: float
    """The ratio of the whole model's times."""
    error: float
    others_pct: float | None = None

    def columns(self) -> dict[str, str]:
        return {
            "family": self.family, "dtype": self.dtype, "call": self.call, "mlx-lm": in_words(self.mlx_lm_us),
            "anydelta": in_words(self.anydelta_us),
            "ratio": f"{self.ratio:.3g} ({self.ratio_low:.3g} to {self.ratio_high:.3g})",
            "whole model": f"{self.whole_ratio:.2f}",
        }  # fmt: skip


def _model(family: str, dtype: str) -> Module:
    import mlx.core as mx

    module = importlib.import_module(f"mlx_lm.models.{family}")
    mx.random.seed(0)
    model: Module = module.Model(module.ModelArgs.from_dict({"model_type": family, **CONFIGS[family]}))
    model.set_dtype(getattr(mx, dtype))
    model.eval()
    mx.eval(model.parameters())  # type: ignore[no-untyped-call]
    return model


def _inside(family: str, run: Callable[[], object]) -> float:
    """Seconds in the family's gated_delta_update while `run` runs."""
    import mlx.core as mx

    module: Any = importlib.import_module(f"mlx_lm.models.{family}")
    function = module.gated_delta_update
    spent = 0.0

    def timed(*args: object, **kwargs: object) -> object:
        nonlocal spent
        mx.eval([x for x in (*args, *kwargs.values()) if isinstance(x, mx.array)])
        start = time.perf_counter()
        out = function(*args, **kwargs)
        mx.eval(out)
        spent += time.perf_counter() - start
        return out

    module.gated_delta_update = timed
    try:
        run()
    finally:
        module.gated_delta_update = function
    return spent


def _steps(model: Module, tokens: int) -> Callable[[], Callable[[], object]]:
    """Makes the timed call: a prefill into a new cache, or, for one token, a decode step on a filled one."""
    import mlx.core as mx

    x = mx.random.randint(0, 256, (1, tokens), key=mx.random.key(0))

    def prefill() -> Callable[[], object]:
        cache = model.make_cache()
        return lambda: mx.eval(model(x, cache=cache))

    def decode() -> Callable[[], object]:
        cache = model.make_cache()
        mx.eval(model(mx.concatenate([x] * 8, axis=1), cache=cache))
        step = lambda: mx.eval(model(x, cache=cache))  # noqa: E731
        return step

    return prefill if tokens > 1 else decode


def _measure(family: str, dtype: str, tokens: int, rounds: int, model: Module) -> MlxRecord:
    import mlx.core as mx

    x = mx.random.randint(0, 256, (1, tokens), key=mx.random.key(0))
    switches = {"mlx-lm": plug.disable, "anydelta": plug.enable}
    make = _steps(model, tokens)
    logits, steps = {}, {}
    for name, switch in switches.items():
        with switch():
            logits[name] = model(x).astype(mx.float32)
            mx.eval(logits[name])
            steps[name] = make()
    want = logits["mlx-lm"]
    error = float(mx.abs(logits["anydelta"] - want).max() / mx.abs(want).max())
    if not error <= ERROR[dtype]:
        raise Failed(f"{family}, {dtype}: logits must differ by at most {ERROR[dtype]}; got {error:.1e}")
    inside: dict[str, list[float]] = {name: [] for name in switches}
    whole: dict[str, list[float]] = {name: [] for name in switches}
    others = Others()
    for i in range(rounds if tokens > 1 else DECODE_STEPS * rounds):
        for name in sorted(switches, reverse=bool(i % 2)):
            with switches[name]():
                inside[name].append(_inside(family, make() if tokens > 1 else steps[name]))
                run = make() if tokens > 1 else steps[name]
                start = time.perf_counter()
                run()
                whole[name].append(time.perf_counter() - start)
    ratios, whole_ratios = (
        [a / b for a, b in zip(times["mlx-lm"], times["anydelta"], strict=True)] for times in (inside, whole)
    )
    theirs, ours = (1e6 * statistics.median(inside[name]) for name in switches)
    return MlxRecord(
        family, dtype, f"prefill of {tokens}" if tokens > 1 else "decode", len(ratios), theirs, ours,
        statistics.median(ratios), min(ratios), max(ratios), statistics.median(whole_ratios), error, others.percent(),
    )  # fmt: skip


def in_mlx_lm(
    tokens: int = 256,
    families: tuple[str, ...] = tuple(CONFIGS),
    settings: Settings | None = None,
    progress: Progress = lambda text, done: None,
) -> Measured:
    """Measure a prefill of `tokens` and a decode step of each family, in float32 and bfloat16.

    Raises:
        Failed: logits differ.
    """
    settings = settings or Settings()
    title = f"The recurrence in mlx-lm {version('mlx-lm')} on MLX {version('mlx')}'s CPU device"
    measured = Measured(title, describe_machine(), settings)
    pairs = [(family, dtype) for family in families for dtype in ERROR]
    for i, (family, dtype) in enumerate(pairs):
        model = _model(family, dtype)
        for n in (tokens, 1):
            progress(f"{family} {dtype}", i / len(pairs))
            measured.records.append(_measure(family, dtype, n, settings.rounds, model))
    measured.notes.append(
        "in the recurrence of two layers, medians of the rounds; ratio within a round (least to most)"
    )
    return measured


def mlx_command(
    tokens: Annotated[int, typer.Option("--tokens", "-T", help="Tokens of the prefill.")] = 256,
    family: Annotated[
        list[str] | None,
        typer.Option("--family", help=f"{', '.join(CONFIGS)} (repeat for more). Default: all."),
    ] = None,
    rounds: Rounds = 5,
    json: Json = False,
    csv: Csv = False,
    md: Md = False,
    output: Output = None,
) -> None:
    """Time the recurrence inside mlx-lm's models, by mlx-lm's function and by anydelta's.

    Examples:
      anydelta bench mlx
      anydelta bench mlx --family qwen3_5 -T 64
    """
    if not 2 <= tokens <= 65536:
        raise Refused(f"-T must be from 2 to 65536; got {tokens}")
    for name in family or ():
        if name not in CONFIGS:
            raise Refused(f"--family must be one of {', '.join(CONFIGS)}; got {name!r}")
    for module, package in (("torch", "torch"), ("mlx", "mlx"), ("mlx_lm", "mlx-lm")):
        if why := needs(module, package):
            raise Refused(why)
    small(partial(in_mlx_lm, tokens, tuple(family or CONFIGS)), rounds, 15.0, json, csv, md, output)
