"""The gated delta rule over the ranks of a group."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from ..core import dispatch
from ..core.arguments import options_of
from ..rule import op as one_process
from ..rule.arguments import TRACKED, Call, Options
from ..rule.spec import CallSpec, check_call, refuse_gradients
from ..rule.transition import gated_delta_transition
from .checks import OF_GATES, check_device, digest, quiet, sizes, whether_given
from .peers import Peers, Summary, Told
from .run import final_states, placed, run

OP = "distributed.gated_delta_rule"
OUTSIDE = ("state_indices", "snapshots")
_SIGNATURE = inspect.signature(one_process.gated_delta_rule)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    backend: str = "auto",
    **arguments: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`anydelta.gated_delta_rule` over sequences whose tokens several processes hold, in the order of their ranks.

    Every rank of the group makes the same call, on its piece. Pieces may differ in length, and may be empty.

    Args:
        q: [B, T_r, H, K], the tokens of this rank; so are k, v and, of the arguments, g, beta, erase and mask.
        group: the processes; all of them if None. Its backend must move tensors of q's device.
        arguments: as in `anydelta.gated_delta_rule`, the same on every rank, without `state_indices` and `snapshots`.
            `cu_seqlens` [N+1] is over the tokens of all ranks together (B = 1); a piece may begin and end anywhere
            inside sequences. `initial_state` is [N, HV, K, V], or None on every rank; a rank reads the rows of
            sequences that begin in its piece, or have no token. `output_final_state=False` saves sending them.
        backend: of `anydelta`, as in `anydelta.gated_delta_rule`; it may differ between ranks.

    Returns:
        o [B, T_r, HV, V], the outputs of this rank's tokens, and the final states [N, HV, K, V] of all sequences, on
        every rank, or None.

    Raises:
        ValueError, TypeError, UnsupportedError: an invalid call, on any rank: every rank raises, before states move.
    """
    peers = Peers(OP, group)
    checked, told = peers.agree(lambda: _check(peers, q, k, v, arguments, backend))
    call, spec, options = checked.call, checked.spec, checked.options
    where = call.q.device if call.cu_seqlens is None else call.cu_seqlens.device
    held, layout = placed(OP, spec, checked.cu_seqlens, where, told)
    piece = held[peers.rank]
    with quiet(call.q):
        tokens = _Tokens(call, spec, options, backend, layout.rows(piece.sequences))
        o = run(peers, layout, piece, tokens, options.state_layout)
        if not options.output_final_state:
            return o, None
        begun = call.state_in.contiguous().clone() if call.state_in is not None else tokens.zeros(spec.N)
        return o, final_states(peers, layout, held, tokens.states, [begun])[0]


@dataclass
class _Checked:
    call: Call
    spec: CallSpec
    options: Options
    cu_seqlens: list[int] | None

    def told(self) -> Told:
        spec = self.spec
        same = {
            "the function": OP,
            **sizes(spec),
            **whether_given(spec.given, {"erase": "erase", "initial_state": "state_in", **OF_GATES}),
            **options_of(self.options),
            "cu_seqlens": digest(self.cu_seqlens),
        }
        return Told(tokens=spec.T, masked=spec.masked, same=same)


def _check(
    peers: Peers, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, arguments: dict[str, Any], backend: str
) -> _Checked:
    try:
        given = _SIGNATURE.bind(q, k, v, **arguments).arguments
    except TypeError as error:
        raise TypeError(
            f"{OP}: requires the arguments of gated_delta_rule; got a call with {error}"
        ) from None
    if extra := [n for n in OUTSIDE if given.pop(n, None) is not None]:
        raise TypeError(f"{OP}: takes neither state_indices nor snapshots; got {extra[0]}")
    arrays = {n: given.pop(n) for n in list(given) if n in Call.__slots__}
    call = Call(**arrays, state_in=given.pop("initial_state", None))
    options = Options(OP, **given)
    spec = check_call(call, options, inplace=False, kinds=("torch",))
    if spec.resident:
        raise TypeError(f"{OP}: initial_state must be a torch.Tensor; got an array on {spec.resident}")
    refuse_gradients(OP, "torch", {n: getattr(call, n) for n in TRACKED})
    check_device(OP, peers.group, call.q)
    dispatch.pick(spec, backend)
    return _Checked(call, spec, options, None if call.cu_seqlens is None else call.cu_seqlens.tolist())


class _Tokens:
    """See `run.Tokens`."""

    def __init__(self, call: Call, spec: CallSpec, options: Options, backend: str, rows: slice):
        self.call, self.spec, self.backend = call, spec, backend
        self.options = options_of(options, "output_final_state")
        dtype = torch.float64 if spec.dtype == "float64" else torch.float32
        if call.state_in is None:
            state = self.zeros(rows.stop - rows.start).to(dtype)
        else:
            state = call.state_in[rows].to(dtype, copy=True, memory_format=torch.contiguous_format)
        self.states = [state]

    def zeros(self, N: int) -> torch.Tensor:
        spec = self.spec
        inner = (spec.K, spec.V) if spec.options.state_layout == "kv" else (spec.V, spec.K)
        made: torch.Tensor = self.call.q.new_zeros(
            (N, spec.HV, *inner), dtype=getattr(torch, spec.state_dtype)
        )
        return made

    def empty(self) -> torch.Tensor:
        return torch.empty_like(self.call.v, memory_format=torch.contiguous_format)

    def outputs(self, tokens: slice, rows: slice, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
        call = self.call
        o: torch.Tensor = one_process.gated_delta_rule_(
            call.q[:, tokens], call.k[:, tokens], call.v[:, tokens], self.states[0][rows],
            **_gates(call, tokens), A_log=call.A_log, dt_bias=call.dt_bias, cu_seqlens=cu_seqlens,
            backend=self.backend, **self.options,
        )  # fmt: skip
        return o

    def summary(self) -> Summary:
        call = replace(self.call, cu_seqlens=None)
        options = {n: x for n, x in self.options.items() if n != "scale"}
        S, P = gated_delta_transition(
            call.k, call.v, **_gates(call, slice(None)), A_log=call.A_log, dt_bias=call.dt_bias, backend=self.backend,
            **options,
        )  # fmt: skip
        return S, P


def _gates(call: Call, tokens: slice) -> dict[str, Any]:
    """The arrays of these tokens that the rule takes by name."""
    return {
        n: None if (x := getattr(call, n)) is None else x[:, tokens] for n in ("g", "beta", "mask", "erase")
    }
