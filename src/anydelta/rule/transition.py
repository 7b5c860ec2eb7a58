"""What a run of tokens makes of any state: S_T = P S_0 + S, from the operator itself.

Every step of the rule is affine in the state, and so is a run of them:

    S_t = (I - beta_t k_t k_t^T) diag(exp(g_t)) S_(t-1) + beta_t k_t v_t^T       with erase: I - k_t erase_t^T

    S_T = P S_0 + S       P [K, K], the product of the matrices, latest on the left; S [K, V], what zeros become

(Gated DeltaNet, arXiv 2412.06464, equation 10.) P needs no kernel of its own: it is the final state of the same tokens
with v = 0 and the identity as the initial state, which is K values wide. So every backend has it, and every option
means what it means for the rule. Two runs, one after the other, are

    P = P_2 P_1,  S = P_2 S_1 + S_2

which is associative: the pieces of a sequence can be run apart, and joined in a scan (anydelta.distributed).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from ..core import dispatch
from ..core.arguments import options_of
from ..core.arrays import Array
from .arguments import Call, Options
from .op import gated_delta_rule_
from .spec import CallSpec, check_transition, check_values

CHUNK = 1024
"""Tokens of a call: the outputs, which nobody reads, are memory for so many tokens only."""


def gated_delta_transition(
    k: Array,
    v: Array,
    *,
    g: Array,
    beta: Array | None = None,
    initial_state: Array | None = None,
    decay: str = "log",
    A_log: Array | None = None,
    dt_bias: Array | None = None,
    lower_bound: float | None = None,
    beta_is_logit: bool = False,
    heads: str = "interleaved",
    qk_l2norm: bool = False,
    qk_l2norm_eps: float = 1e-6,
    state_layout: str = "kv",
    cu_seqlens: Array | None = None,
    mask: Array | None = None,
    erase: Array | None = None,
    backend: str = "auto",
) -> tuple[Array, Array]:
    """What these tokens make of a state: the final state, and the transition P, without outputs.

    From the initial state S_0 the tokens lead to S_0' = P S_0 + S, where S is the final state from zeros. So the piece
    of a sequence can be run before the state in front of it is known::

        S, P = gated_delta_transition(k, v, g=g, beta=beta)      # from zeros
        after = P @ before + S                                   # state_layout="kv"; with "vk" before @ P + S

    P is the final state of the same tokens with v = 0 and the identity as initial state. It has the layout of the
    states: with "vk" it is the transpose of what it is with "kv".

    Args:
        initial_state: [N, HV, K, V] float32, bfloat16 or float16; zeros if None.
        k: as in `gated_delta_rule`, and so are all other arguments. There is no q, no scale and no pool.

    Returns:
        The final state [N, HV, K, V] and P [N, HV, K, K], float32 (float64 for float64 tokens), of k's kind.

    Raises:
        ValueError, TypeError: an invalid call; nothing was read.
        UnsupportedError: the named backend cannot run it.
    """
    options = Options(
        op="gated_delta_transition", decay=decay, lower_bound=lower_bound, beta_is_logit=beta_is_logit, heads=heads,
        qk_l2norm=qk_l2norm, qk_l2norm_eps=qk_l2norm_eps, state_layout=state_layout,
    )  # fmt: skip
    call = Call(
        k, k, v, g, beta, initial_state, A_log=A_log, dt_bias=dt_bias, mask=mask, cu_seqlens=cu_seqlens, erase=erase
    )  # fmt: skip
    spec = check_transition(call, options)
    check_values(call, spec)
    dispatch.pick(spec, backend)
    state, transition = states(spec, like=k)
    if initial_state is not None:
        state[...] = initial_state
    nothing = zeros(k, (1, 1, 1, spec.K))
    shared: dict[str, Any] = dict(
        A_log=A_log, dt_bias=dt_bias, backend=backend, **options_of(options, "output_final_state")
    )
    tokens = dict(g=g, beta=beta, mask=mask, erase=erase)
    for part, packed in chunks(spec, cu_seqlens):
        given: dict[str, Any] = {n: None if x is None else x[:, part] for n, x in tokens.items()}
        given |= shared | {"cu_seqlens": packed}
        key, value = k[:, part], v[:, part]
        gated_delta_rule_(key, key, value, state, **given)
        none = expanded(nothing, (*value.shape[:3], spec.K))
        gated_delta_rule_(key, key, none, transition, **given)
    return state, transition


def chunks(spec: CallSpec, cu_seqlens: Array | None) -> Iterator[tuple[slice, Array | None]]:
    """Runs of CHUNK tokens of a call, each with the cu_seqlens of its part."""
    if spec.T <= CHUNK:
        yield slice(0, spec.T), cu_seqlens
        return
    for begin in range(0, spec.T, CHUNK):
        end = min(begin + CHUNK, spec.T)
        packed = None if cu_seqlens is None else cu_seqlens.clip(begin, end) - begin
        yield slice(begin, end), packed


def states(spec: CallSpec, *, like: Array) -> tuple[Array, Array]:
    """A state of zeros and the identity [N, HV, K, K], in which a transition begins."""
    N, HV, K, V = spec.N, spec.HV, spec.K, spec.V
    dtype = "float64" if spec.dtype == "float64" else "float32"
    state = zeros(like, (N, HV, K, V) if spec.options.state_layout == "kv" else (N, HV, V, K), dtype)
    transition = zeros(like, (N, HV, K, K), dtype)
    transition[:, :, range(K), range(K)] = 1
    return state, transition


def zeros(like: Array, shape: tuple[int, ...], dtype: str | None = None) -> Array:
    """Zeros of that dtype, or of `like`'s."""
    if isinstance(like, np.ndarray):
        return np.zeros(shape, dtype or like.dtype)
    return like.new_zeros(shape, dtype=getattr(sys.modules["torch"], dtype) if dtype else None)


def expanded(x: Array, shape: tuple[int, ...]) -> Array:
    """x as that shape, without memory of its own."""
    return np.broadcast_to(x, shape) if isinstance(x, np.ndarray) else x.expand(shape)
