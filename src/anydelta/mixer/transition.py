"""What a run of tokens makes of the states of a layer: as `anydelta.rule.transition`, with the convolution in front.

The convolution window is known before the tokens are, so only the state of the rule is open: S_T = P S_0 + S. The mixer
itself gives both, as the rule does: P with v = 0 and the identity as state, where the weights of v are zero too.
"""

from __future__ import annotations

from typing import Any

from ..core import dispatch
from ..core.arguments import options_of
from ..core.arrays import Array
from ..rule.spec import framework_of, refuse_gradients
from ..rule.transition import chunks, expanded, states, zeros
from .arguments import TRACKED, MixerCall, MixerOptions
from .op import check, gated_delta_mixer_, parse
from .spec import MixerSpec, parts

OUTSIDE = ("state_indices", "snapshots", "conv_snapshots", "snapshot_indices")
"""Arguments of the mixer that name other states than the one in front and the last."""


def gated_delta_mixer_transition(
    qkv: Array, conv_state: Array, state: Array, *, backend: str = "auto", **arguments: Any
) -> tuple[Array, Array, Array]:
    """What these tokens make of the states of a layer: both states after them, and the transition P, without outputs.

    The given states are left as they are. From another `state` in front of the same tokens, with the same `conv_state`,
    the state after them is P state + S, where S is the one from zeros; see `gated_delta_transition`.

    Args:
        conv_state: [N, C, S]: the last inputs in front of these tokens.
        qkv: as in `gated_delta_mixer`, and so are all other arguments, without `state_indices` and snapshots. z, the
            norm and the scale are not read.

    Returns:
        The conv state [N, C, S] in its dtype, the state [N, HV, K, V] and P [N, HV, K, K], both float32 (float64 for
        float64 tokens).

    Raises:
        ValueError, TypeError: an invalid call; nothing was read.
        UnsupportedError: the named backend cannot run it.
    """
    op = "gated_delta_mixer_transition"
    call, options = without(op, qkv, conv_state, state, arguments)
    spec = check(call, options)
    refuse_gradients(op, spec.framework, {n: getattr(call, n) for n in TRACKED})
    dispatch.pick(spec, backend)
    return transition(call, spec, backend)


def without(
    op: str, qkv: Array, conv_state: Array, state: Array, arguments: dict[str, Any]
) -> tuple[MixerCall, MixerOptions]:
    """A call without OUTSIDE, and its options.

    Raises:
        TypeError: an argument that the mixer does not have or that is one of those, or a missing one.
    """
    if extra := [n for n in OUTSIDE if arguments.get(n) is not None]:
        raise TypeError(
            f"{op}: requires states as rows of their own, without {', '.join(OUTSIDE)}; got {extra[0]}"
        )
    found = parse(qkv, conv_state, state, None, None, arguments, "auto", op=op)
    return found[0], found[1]


def transition(call: MixerCall, spec: MixerSpec, backend: str) -> tuple[Array, Array, Array]:
    """`gated_delta_mixer_transition` of a call that was checked."""
    key = spec.rule.H * spec.rule.K
    q, k, v = parts(call, spec)
    window = call.conv_state.clone() if framework_of(call.conv_state) == "torch" else call.conv_state.copy()
    after, found = states(spec.rule, like=call.conv_state)
    after[...] = call.state
    # k twice instead of q, and v = 0
    width = spec.rule.HV * spec.rule.K
    nothing = zeros(q, (1, 1, width))
    beside = _of_keys(call.conv_state, key, width, axis=1)
    weight = _of_keys(call.conv_weight, key, width, axis=0)
    bias = None if call.conv_bias is None else _of_keys(call.conv_bias, key, width, axis=0)
    tokens = dict(g=call.g, beta=call.beta, mask=call.mask)
    shared: dict[str, Any] = dict(
        A_log=call.A_log, dt_bias=call.dt_bias, backend=backend, **options_of(spec.options)
    )
    for part, packed in chunks(spec.rule, call.cu_seqlens):
        given: dict[str, Any] = {n: None if x is None else x[:, part] for n, x in tokens.items()}
        given |= shared | {"cu_seqlens": packed}
        own = dict(conv_weight=call.conv_weight, conv_bias=call.conv_bias)
        gated_delta_mixer_((q[:, part], k[:, part], v[:, part]), window, after, **own, **given)
        none = expanded(nothing, (*k[:, part].shape[:2], width))
        gated_delta_mixer_(
            (k[:, part], k[:, part], none), beside, found, conv_weight=weight, conv_bias=bias, **given
        )
    return window, after, found


def _of_keys(x: Array, key: int, width: int, *, axis: int) -> Array:
    """An array over the channels of q, k and v as one over those of k, k and so many channels that are zero."""
    keys = x[:, key : 2 * key] if axis else x[key : 2 * key]
    shape = list(map(int, x.shape))
    shape[axis] = 2 * key + width
    found = zeros(x, tuple(shape))
    for begin in (0, key):
        if axis:
            found[:, begin : begin + key] = keys
        else:
            found[begin : begin + key] = keys
    return found
