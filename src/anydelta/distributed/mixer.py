"""The mixer over the ranks of a group: as the rule, after the convolution windows have gone to the next ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ..core import dispatch
from ..core.arguments import options_of
from ..mixer import op as one_process
from ..mixer.arguments import TRACKED, MixerCall
from ..mixer.spec import MixerSpec, check_mixer, parts
from ..mixer.transition import gated_delta_mixer_transition, without
from ..rule.spec import refuse_gradients
from .checks import OF_GATES, check_device, digest, quiet, sizes, whether_given
from .peers import Peers, Summary, Told
from .pieces import Piece, windows_needed
from .run import Layout, final_states, placed, run

OP = "distributed.gated_delta_mixer"


@torch.compiler.disable  # type: ignore[untyped-decorator]
def gated_delta_mixer(
    qkv: Any,
    conv_state: torch.Tensor,
    state: torch.Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    backend: str = "auto",
    **arguments: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`anydelta.gated_delta_mixer` over sequences whose tokens several processes hold, as `gated_delta_rule` does it.

    The last inputs of a piece go to the ranks whose convolution reads them, one rank unless pieces are shorter than
    the window.

    Args:
        qkv: the tokens of this rank; so are, of the arguments, g, beta, z and mask.
        conv_state: [N, C, S], given on every rank; read as `state` is.
        state: [N, HV, K, V]. A rank reads the rows of sequences that begin in its piece, or have no token.
        group: as in `gated_delta_rule`, and so are `cu_seqlens` and `backend`.
        arguments: as in `anydelta.gated_delta_mixer`, the same on every rank, without `state_indices` and snapshots.

    Returns:
        The outputs [B, T_r, HV * V] of this rank's tokens; and on every rank the conv states [N, C, S] and the states
        [N, HV, K, V] of all sequences.

    Raises:
        ValueError, TypeError, UnsupportedError: an invalid call, on any rank: every rank raises, before states move.
    """
    peers = Peers(OP, group)
    checked, told = peers.agree(lambda: _check(peers, qkv, conv_state, state, arguments, backend))
    call, spec = checked.call, checked.spec
    where = call.qkv.device if call.cu_seqlens is None else call.cu_seqlens.device
    held, layout = placed(OP, spec.rule, checked.cu_seqlens, where, told)
    piece = held[peers.rank]
    with quiet(call.qkv):
        tokens = _Tokens(call, spec, backend, layout.rows(piece.sequences))
        tokens.windows(peers, layout, held, masked=any(x.masked for x in told))
        o = run(peers, layout, piece, tokens, spec.options.state_layout)
        begun = [x.contiguous().clone() for x in (call.conv_state, call.state)]
        window, last = final_states(peers, layout, held, tokens.states, begun)
        return o, window, last


@dataclass
class _Checked:
    call: MixerCall
    spec: MixerSpec
    cu_seqlens: list[int] | None

    def told(self) -> Told:
        spec = self.spec
        names = {n: n for n in ("conv_bias", "z", "norm_weight")}
        same = {
            "the function": OP,
            **sizes(spec.rule),
            "conv_weight's taps": spec.W,
            "conv_state's columns": spec.S,
            "conv_state's dtype": spec.conv_dtype,
            **whether_given(spec.given, {**names, **OF_GATES}),
            **options_of(spec.options),
            "cu_seqlens": digest(self.cu_seqlens),
        }
        return Told(tokens=spec.rule.T, masked=spec.rule.masked, same=same)


def _check(
    peers: Peers,
    qkv: Any,
    conv_state: torch.Tensor,
    state: torch.Tensor,
    arguments: dict[str, Any],
    backend: str,
) -> _Checked:
    call, options = without(OP, qkv, conv_state, state, arguments)
    spec = check_mixer(one_process.writable(call), options)
    if spec.rule.framework != "torch":
        raise TypeError(f"{OP}: qkv must be a torch.Tensor; got an array of {spec.rule.framework}")
    refuse_gradients(OP, "torch", {n: getattr(call, n) for n in TRACKED})
    check_device(OP, peers.group, call.qkv)
    dispatch.pick(spec, backend)
    return _Checked(call, spec, None if call.cu_seqlens is None else call.cu_seqlens.tolist())


class _Tokens:
    """See `run.Tokens`. The states are the convolution windows and the rule's."""

    def __init__(self, call: MixerCall, spec: MixerSpec, backend: str, rows: slice):
        self.call, self.spec, self.backend = call, spec, backend
        dtype = torch.float64 if spec.dtype == "float64" else torch.float32
        self.states = [
            call.conv_state[rows].clone(memory_format=torch.contiguous_format),
            call.state[rows].to(dtype, copy=True, memory_format=torch.contiguous_format),
        ]
        self.options: dict[str, Any] = dict(
            conv_weight=call.conv_weight, conv_bias=call.conv_bias, A_log=call.A_log, dt_bias=call.dt_bias,
            backend=backend, **options_of(spec.options),
        )  # fmt: skip

    def empty(self) -> torch.Tensor:
        rule = self.spec.rule
        o: torch.Tensor = self.call.qkv.new_empty((rule.B, rule.T, rule.HV * rule.V))
        return o

    def outputs(self, tokens: slice, rows: slice, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
        window, state = (x[rows] for x in self.states)
        call = self.call
        o: torch.Tensor = one_process.gated_delta_mixer_(
            self._qkv(tokens), window, state, norm_weight=call.norm_weight, cu_seqlens=cu_seqlens,
            **self._of_tokens(tokens, "g", "beta", "z", "mask"), **self.options,
        )  # fmt: skip
        return o

    def summary(self) -> Summary:
        window, state = self.states
        everything = slice(None)
        _, S, P = gated_delta_mixer_transition(
            self._qkv(everything), window, torch.zeros_like(state), **self._of_tokens(everything, "g", "beta", "mask"),
            **self.options,
        )  # fmt: skip
        return S, P

    def _qkv(self, tokens: slice) -> list[torch.Tensor]:
        call = self.call
        return [x[:, tokens] for x in (call.qkv, call.k, call.v) if x is not None]

    def _of_tokens(self, tokens: slice, *names: str) -> dict[str, Any]:
        return {n: None if (x := getattr(self.call, n)) is None else x[:, tokens] for n in names}

    # ---- windows

    def windows(self, peers: Peers, layout: Layout, held: Sequence[Piece], *, masked: bool) -> None:
        """Put into the first states what the convolution of the sequence that enters reads: inputs of earlier ranks."""
        S = self.spec.S
        piece = held[peers.rank]
        begin = self._leaving(layout, piece)
        if not S or not any(p.before for p in held):
            return
        count = self.states[0].shape[0]
        leaving = slice(0, count) if not layout.packed else slice(max(count - 1, 0), count)
        counts = self._counts(peers, layout, held, begin, masked=masked)
        own = None
        sends = []
        for rank in piece.after:
            if peers.rank in windows_needed(rank, held, counts, S):
                own = self._tail(begin, leaving, begins=not piece.inside) if own is None else own
                sends.append((rank, own))
        entering = slice(0, count) if not layout.packed else slice(0, min(count, 1))
        needed = windows_needed(peers.rank, held, counts, S)
        like = self.states[0][entering]
        receives = [(rank, torch.empty_like(like)) for rank in needed]
        peers.exchange(sends, receives)
        have = [0] * like.shape[0]
        for rank, tail in receives:
            for b, kept in enumerate(have):
                like[b] = torch.cat((tail[b, :, kept:], like[b, :, S - kept :]), 1)
                have[b] = min(S, kept + counts[rank][b])

    def _leaving(self, layout: Layout, piece: Piece) -> int:
        """Where the last sequence's tokens begin in this piece."""
        if not piece.sequences:
            return 0
        return max(0, layout.cu_seqlens[piece.sequences[-1]] - piece.begin)

    def _counts(
        self, peers: Peers, layout: Layout, held: Sequence[Piece], begin: int, *, masked: bool
    ) -> list[list[int]]:
        """How many of the last S inputs, by row, each rank knows of the sequence that leaves it."""
        S, rows = self.spec.S, 1 if layout.packed else layout.B
        if not masked:
            return [[min(S, p.tokens) if p.inside else S] * rows for p in held]
        mine = [S] * rows
        if held[peers.rank].inside:
            if self.call.mask is None:
                mine = [min(S, held[peers.rank].tokens)] * rows
            else:
                mine = self.call.mask[:, begin:].sum(1).clamp(max=S).tolist()
        return [x for x in peers.all(mine) if isinstance(x, list)]

    def _tail(self, begin: int, rows: slice, *, begins: bool) -> torch.Tensor:
        """The last S inputs of the sequence that leaves [rows, C, S], the newest last, where they are here."""
        S, mask = self.spec.S, self.call.mask
        window = self.states[0][rows]
        found = window.clone() if begins else torch.zeros_like(window)
        arrays = parts(self.call, self.spec)
        for b in range(found.shape[0]):
            if mask is None:
                inputs = torch.cat([x[b, max(begin, x.shape[1] - S) :] for x in arrays], -1)
            else:
                live = mask[b, begin:].nonzero()[:, 0][-S:] + begin
                inputs = torch.cat([x[b, live] for x in arrays], -1)
            found[b] = torch.cat((found[b], inputs.t().to(found.dtype)), 1)[:, inputs.shape[0] :]
        return found
