"""ExecuTorch's gated delta rules: metal:: and mlx::gated_delta_rule, and llama::gated_delta_rule.

All take the decay itself, in [0, 1], instead of its logarithm; beta after the sigmoid; and no scale (multiply q by it).
Their layouts differ: see the two functions.
"""

from __future__ import annotations

from ..core.arrays import Array
from ..rule.op import gated_delta_rule as _functional
from ..rule.op import gated_delta_rule_ as _in_place
from ..rule.spec import dtype_name, framework_of

"""A torch.Tensor or a numpy.ndarray; all arrays of a call are of one kind."""


def gated_delta_rule(
    q: Array, k: Array, v: Array, g: Array, beta: Array, state: Array, use_custom_kernel: bool = True
) -> Array:
    """metal::gated_delta_rule and mlx::gated_delta_rule: o [B, T, Hv, Dv], with `state` advanced in place.

    Args:
        q: [B, T, Hk, Dk]; value head hv reads head hv // (Hv/Hk).
        k: [B, T, Hk, Dk].
        v: [B, T, Hv, Dv].
        g: [B, T, Hv], the decay in [0, 1].
        beta: [B, T, Hv].
        state: [B, Hv, Dv, Dk] float32 or bfloat16, overwritten.
        use_custom_kernel: mlx's choice between two of its kernels. Checked, without effect on the result.

    Raises:
        ValueError, TypeError: an invalid call.
    """
    op = "executorch.gated_delta_rule"
    if not isinstance(use_custom_kernel, bool):
        raise TypeError(f"{op}: use_custom_kernel must be True or False; got {use_custom_kernel!r}")
    _dims(op, "g", g, 3, "[B, T, Hv]; for a decay per key channel use anydelta.gated_delta_rule_")
    return _in_place(q, k, v, state, g=g, beta=beta, scale=1.0, decay="linear", state_layout="vk")


def llama_gated_delta_rule(
    query: Array, key: Array, value: Array, decay: Array, beta: Array, initial_state: Array
) -> tuple[Array, Array]:
    """llama::gated_delta_rule: output [B, H, T, V], final state [B, Hkv, K, V]; initial_state is only read.

    Here there may be more *query* heads: each of the Hkv states serves H / Hkv neighbouring query heads. A state of
    anydelta serves one query head. So with H > Hkv, key, value and state heads are repeated, and each state is computed
    H / Hkv times, with the same bits.

    Args:
        query: [B, H, T, K] float32; H a multiple of Hkv. Query head h reads state h // (H/Hkv).
        key: [B, Hkv, T, K] float32.
        value: [B, Hkv, T, V] float32.
        decay: [B, Hkv, T] or [B, Hkv, T, K] float32, in [0, 1].
        beta: [B, Hkv, T] float32.
        initial_state: [B, Hkv, K, V] float32.

    Raises:
        ValueError, TypeError: an invalid call.
    """
    op = "executorch.llama_gated_delta_rule"
    for name, x, ndim, legend in (
        ("query", query, 4, "[B, H, T, K]"),
        ("key", key, 4, "[B, Hkv, T, K]"),
        ("value", value, 4, "[B, Hkv, T, V]"),
        ("decay", decay, None, ""),
        ("beta", beta, 3, "[B, Hkv, T]"),
        ("initial_state", initial_state, 4, "[B, Hkv, K, V]"),
    ):
        _dims(op, name, x, ndim, legend)
        if dtype_name(x) != "float32":
            raise ValueError(f"{op}: {name} must be float32; got {dtype_name(x)}")
    B, H, T, K = query.shape
    Hkv, V = key.shape[1], value.shape[3]
    if Hkv < 1 or H % Hkv:
        raise ValueError(f"{op}: query must have a multiple of key's heads; got H={H}, Hkv={Hkv}")
    for name, x, wanted, legend in (
        ("key", key, ((B, Hkv, T, K),), "[B, Hkv, T, K]"),
        ("value", value, ((B, Hkv, T, V),), "[B, Hkv, T, V]"),
        ("decay", decay, ((B, Hkv, T), (B, Hkv, T, K)), "[B, Hkv, T] or [B, Hkv, T, K]"),
        ("beta", beta, ((B, Hkv, T),), "[B, Hkv, T]"),
        ("initial_state", initial_state, ((B, Hkv, K, V),), "[B, Hkv, K, V]"),
    ):
        if tuple(x.shape) not in wanted:
            sizes = " or ".join(str(list(w)) for w in wanted)
            raise ValueError(f"{op}: {name} must be {legend} = {sizes}; got {list(x.shape)}")

    each = H // Hkv
    if each > 1:
        head = [h // each for h in range(H)]
        key, value, decay = key[:, head], value[:, head], decay[:, head]
        beta, initial_state = beta[:, head], initial_state[:, head]
    o, state = _functional(
        query.swapaxes(1, 2),
        key.swapaxes(1, 2),
        value.swapaxes(1, 2),
        g=decay.swapaxes(1, 2),
        beta=beta.swapaxes(1, 2),
        initial_state=initial_state,
        scale=1.0,
        decay="linear",
    )
    assert state is not None
    return _contiguous(o.swapaxes(1, 2)), _contiguous(state[:, ::each])


def _dims(op: str, name: str, x: Array, ndim: int | None, legend: str) -> None:
    if framework_of(x) is None:
        raise TypeError(f"{op}: {name} must be a torch.Tensor or a numpy.ndarray; got {type(x).__name__}")
    if ndim is not None and len(x.shape) != ndim:
        raise ValueError(f"{op}: {name} must be {legend}; got {list(x.shape)}")


def _contiguous(x: Array) -> Array:
    return x.contiguous() if framework_of(x) == "torch" else x.copy()
