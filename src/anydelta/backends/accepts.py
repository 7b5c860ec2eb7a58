"""The calls that kernels of the rule and the mixer usually take. A backend declares its differences.

New arguments do not belong here. A backend whose kernels have one names it itself.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from ..core.accepts import ANY, Accepts, Row

FLOATS = ("float32", "bfloat16", "float16")
GATES = (*FLOATS, "float64")
"""float64 gates are converted to float32, in which they are computed."""
EITHER = (False, True)
TORCH = Row(("torch",), "takes torch tensors; got {got} arrays")


def reads_bfloat16_of_mlx(spec: Any) -> str:
    """MLX arrays come as NumPy's, which has no bfloat16 of its own."""
    held = (spec.dtype, spec.state_dtype, spec.g_dtype, spec.beta_dtype)
    if spec.framework == "mlx" and "bfloat16" in held and find_spec("ml_dtypes") is None:
        return "takes MLX's bfloat16 through the package ml_dtypes, which is not installed; pip install ml_dtypes"
    return ""


STATES = ("float32", "bfloat16", "float16", "float64")
"""Every dtype of a state."""

RULE_CALLS = Accepts(
    arrays=frozenset({
        "q", "k", "v", "g", "beta", "state_in", "snapshots", "A_log", "dt_bias", "mask", "cu_seqlens", "state_indices",
        "snapshot_indices",
    }),
    limits=(reads_bfloat16_of_mlx,),
).but(
    framework=("torch", "numpy", "mlx"), device=(),  # declared by each backend
    # options
    scale=ANY, decay=("log", "linear", "raw"), lower_bound=ANY, beta_is_logit=EITHER, heads=("interleaved", "tiled"),
    qk_l2norm=EITHER, qk_l2norm_eps=ANY, state_layout=("kv", "vk"), output_final_state=EITHER,
    # facts: float64 states require float64 q, which dtype declares; snapshot_indices become dense snapshots, unless a
    # backend takes such rows
    kda=EITHER, dtype=FLOATS, state_dtype=("float32", "bfloat16", "float64"), g_dtype=GATES, beta_dtype=GATES,
    snapshot_rows=(False,), final_rows=(False,),
)  # fmt: skip

MIXER_CALLS = Accepts(
    arrays=frozenset({
        "qkv", "k", "v", "conv_state", "state", "g", "beta", "conv_weight", "snapshots", "conv_snapshots", "conv_bias",
        "A_log", "dt_bias", "z", "norm_weight", "mask", "cu_seqlens", "state_indices", "snapshot_indices",
    }),
    rows={n: row for n, row in RULE_CALLS.rows.items() if n not in ("output_final_state", "snapshot_rows")},
).but(
    activation=("silu", None), allow_neg_eigval=EITHER, norm_eps=ANY, norm_gate=("silu", "sigmoid"),
    conv_dtype=GATES, weight_dtype=GATES, framework=("torch", "numpy"), final_rows=EITHER,
)  # fmt: skip
