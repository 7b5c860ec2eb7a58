"""Turns a call into kernel launches: which kernels, on which grid, with which arguments.

`Launches.calls` only computes arguments. So it also serves the interpreter and ahead-of-time compilation (aot.py),
which passes tensors without memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ...rule.arguments import TOKENS, Call
from ...rule.spec import CallSpec
from . import chunk, recurrent
from .chunk_parts import FACTORS as _FACTORS
from .config import MAX_CHUNKED_K, Config, Machine, choose, power_of_two, segments

FACTORS = int(_FACTORS.value)
COMPILER = {"enable_fp_fusion": True}
"""Set explicitly, because Triton's default will change: products and sums become FMAs."""


NO_NORM: Mapping[str, object] = dict(
    z=None, norm_weight=None, plain=None, arrivals=None, norm_eps=0.0, z_b=0, z_t=0, z_g=0, DOUBLE=False, GATE="",
    Z_GROUP=1,
)  # fmt: skip
"""The arguments of `recurrent` that only the mixer has."""


@dataclass(frozen=True)
class KernelCall:
    """One launch: kernel[(grid,)](**args, num_warps=..., num_stages=...)."""

    kernel: Any
    grid: int
    args: dict[str, Any]
    warps: int
    stages: int = 1

    def run(self) -> None:
        if self.grid:
            self.kernel[(self.grid,)](**self.args, **COMPILER, num_warps=self.warps, num_stages=self.stages)


def _named(prefix: str, axes: str, strides: tuple[int, ...]) -> dict[str, int]:
    return {f"{prefix}_{axis}": stride for axis, stride in zip(axes, strides, strict=True)}


class Launches:
    """The launches of calls of one geometry."""

    def __init__(self, spec: CallSpec, machine: Machine, strides: Mapping[str, tuple[int, ...]]):
        self.spec, self.machine, self.strides = spec, machine, strides
        self.config = choose(
            machine, K=spec.K, V=spec.V, kda=spec.kda, dtype=spec.dtype, programs=spec.N * spec.HV,
            tokens=spec.T / max(spec.N, 1) if spec.packed else spec.T,
        )  # fmt: skip
        opt = spec.options
        self.sizes = dict(HV=spec.HV, K=spec.K, BK=power_of_two(spec.K, 16), H=spec.H)
        self.gates = dict(DECAY=opt.decay, BOUNDED=opt.lower_bound is not None)
        self.numbers = dict(
            N=spec.N, T=spec.T, Ks=spec.snapshots, scale=spec.scale, eps=float(opt.qk_l2norm_eps),
            lower_bound=float(opt.lower_bound or 0.0),
        )  # fmt: skip
        self.inputs: dict[str, int] = {}
        for name in TOKENS:
            self.inputs |= _named(name, "bth", strides[name])
        self.inputs |= _named("mask", "bt", strides["mask"])
        self.chunked = chunked(spec, self.config)

    def run(self, call: Call) -> None:
        for kernel_call in self.calls(call):
            kernel_call.run()

    def calls(self, call: Call) -> Iterator[KernelCall]:
        """The launches in order. Scratch memory is allocated as they are produced."""
        spec = self.spec
        if not self.chunked:
            yield self.recurrent(call, call.state_in, tail=False)
            return
        # With rows of the pool as snapshots, only these rows are written.
        out = None if spec.snapshot_rows else call.state_out
        carry, strides = out, self.strides["state_out"]
        if spec.snapshots and (carry is None or spec.state_dtype != "float32"):
            # The state between the chunks and the last tokens, not rounded.
            carry = call.q.new_empty((spec.N, spec.HV, spec.K, spec.V), dtype=torch.float32)
            strides = tuple(carry.stride())
        dense = carry is not out
        yield from self._chunks(call, carry, strides, pool=spec.inplace and spec.pooled and not dense)
        if spec.snapshots:
            yield self.recurrent(call, carry, tail=True, carry=strides, dense=dense)

    def recurrent(
        self,
        call: Call,
        state: torch.Tensor | None,
        *,
        tail: bool,
        norm: Mapping[str, object] = NO_NORM,
        carry: tuple[int, ...] | None = None,
        dense: bool = False,
    ) -> KernelCall:
        spec, config, opt = self.spec, self.config, self.spec.options
        pool_out = spec.inplace and spec.pooled
        args = dict(
            q=call.q, k=call.k, v=call.v, g=call.g, beta=call.beta, erase=call.erase, o=call.o,
            state=state, state_out=None if spec.snapshot_rows else call.state_out,
            snapshots=call.state_in if spec.snapshot_rows else call.snapshots,
            snapshot_indices=call.snapshot_indices, **_shared(call), **self.numbers, **self.inputs,
            **_named("s", "nhkv", carry or self.strides["state"]),
            **_named("u", "nhkv", self.strides["state_out"]), **_named("w", "snhkv", self.strides["snapshots"]),
            **self.sizes, V=spec.V, BV=config.BV, KDA=spec.kda, **self.gates, LOGIT=opt.beta_is_logit,
            L2NORM=opt.qk_l2norm, TILED=opt.heads == "tiled", ERASE=_heads(call.erase),
            POOL_IN=(pool_out and not dense) if tail else spec.pooled, POOL_OUT=pool_out, TAIL=tail,
            AHEAD=spec.T > 1, VV=power_of_two(spec.V), **norm,
        )  # fmt: skip
        grid = spec.N * spec.HV * -(-spec.V // config.BV)
        return KernelCall(recurrent.recurrent, grid, args, config.warps)

    def _chunks(
        self, call: Call, out: torch.Tensor | None, strides: tuple[int, ...], *, pool: bool
    ) -> Iterator[KernelCall]:
        spec, config = self.spec, self.config
        scratch = Scratch(spec, call, config.chunk)
        yield from self.prepare(call, scratch)
        columns = -(-spec.V // config.scan_BV)
        # With a mask there is only one segment: a state without a live token must keep its bits, which products do not.
        programs = spec.N * spec.HV * columns
        tokens = -(-spec.T // max(spec.N, 1)) if spec.packed else spec.T
        pieces = 1 if spec.masked else segments(config, self.machine, programs=programs, tokens=tokens)
        moved = None
        if pieces > 1:
            moved = call.q.new_empty((spec.N * spec.HV, pieces, spec.K, spec.V + spec.K), dtype=torch.float32)
        args = dict(
            **self.scan_args(call, scratch), state_out=out, pieces=moved, states=None,
            **_named("u", "nhkv", strides), POOL_OUT=pool, SEGMENTS=pieces,
        )  # fmt: skip
        if pieces > 1:
            grid = spec.N * spec.HV * (pieces - 1) * (columns + -(-spec.K // config.scan_BV))
            yield KernelCall(chunk.scan, grid, {**args, "TRANSITIONS": True}, config.scan_warps)
        # At the start of a segment, the product with M [K, K] takes as many registers again. With erase, four warps put
        # 72 bytes per thread on the stack (sm_100).
        warps = config.scan_warps if pieces == 1 and call.erase is None else 8
        yield KernelCall(chunk.scan, programs * pieces, {**args, "TRANSITIONS": False}, warps)

    def prepare(self, call: Call, scratch: Scratch, *, backward: bool = False) -> Iterator[KernelCall]:
        """The launches before the walk through the chunks."""
        spec, config, opt, inputs = self.spec, self.config, self.spec.options, self.inputs
        heads = scratch.slots * spec.HV
        args = dict(
            q=call.q, k=call.k, g=call.g, erase=call.erase, **_shared(call), **self.numbers,
            **{n: s for n, s in inputs.items() if n[:2] in ("q_", "k_", "g_", "er", "ma")}, **self.sizes, C=scratch.C,
            ERASE=_heads(call.erase), **self.gates, L2NORM=opt.qk_l2norm, TILED=opt.heads == "tiled",
            TAIL=spec.snapshots > 0,
        )  # fmt: skip
        if spec.kda or backward:
            scratch.found = call.q.new_empty(
                (scratch.slots, spec.HV, 2, scratch.C, scratch.C), dtype=torch.float32
            )
        if spec.kda:
            yield KernelCall(
                chunk.scores, heads * (scratch.C // 16), {**args, "out": scratch.found}, config.scores_warps
            )
        if not scratch.exact:
            more = dict(out=scratch.ready, last=scratch.ready_last, KDA=spec.kda)
            yield KernelCall(chunk.operands, heads, {**args, **more}, config.prepare_warps)
        args |= dict(
            beta=call.beta, found=scratch.found, out=scratch.solved, factors=scratch.factors,
            **{n: s for n, s in inputs.items() if n.startswith("beta_")}, KDA=spec.kda, LOGIT=opt.beta_is_logit,
            EXACT=scratch.exact, BACKWARD=backward, SLICE=min(32, self.sizes["BK"]),
        )  # fmt: skip
        yield KernelCall(chunk.prepare, heads, args, config.prepare_warps)

    def scan_args(self, call: Call, scratch: Scratch) -> dict[str, object]:
        """The arguments of `scan`, without those for results other than o."""
        spec, config, inputs = self.spec, self.config, self.inputs
        return dict(
            q=call.q, k=call.k, v=call.v, o=call.o, erase=call.erase, solved=scratch.solved, factors=scratch.factors,
            ready=scratch.ready, ready_last=scratch.ready_last, state=call.state_in, mask=_shared(call)["mask"],
            cu_seqlens=call.cu_seqlens, state_indices=call.state_indices,
            N=spec.N, T=spec.T, Ks=spec.snapshots,
            **{n: s for n, s in inputs.items() if n[:2] in ("q_", "k_", "v_", "er", "ma")},
            **_named("s", "nhkv", self.strides["state"]), **self.sizes, V=spec.V, BV=config.scan_BV, C=scratch.C,
            EXACT=scratch.exact, TILED=spec.options.heads == "tiled", ERASE=_heads(call.erase), TAIL=spec.snapshots > 0,
            STAGES=config.scan_stages,
        )  # fmt: skip


class Scratch:
    """Memory that the kernels of chunks pass to each other. Their arguments describe it."""

    def __init__(self, spec: CallSpec, call: Call, C: int):
        self.C = C
        self.slots = spec.T // C + spec.N if spec.packed else spec.N * -(-spec.T // C)
        self.exact = spec.dtype == "bfloat16" and not spec.kda
        heads = (self.slots, spec.HV)
        self.found: torch.Tensor | None = None
        self.ready = self.ready_last = None
        if not self.exact:
            self.ready = call.q.new_empty((*heads, 6, C, spec.K), dtype=torch.bfloat16)
            self.ready_last = call.q.new_empty((*heads, spec.K), dtype=torch.float32)
        self.solved = call.q.new_empty((*heads, 4, C, C), dtype=torch.bfloat16)
        self.factors = call.q.new_empty((*heads, FACTORS, C), dtype=torch.float32)


def chunked(spec: CallSpec, config: Config) -> bool:
    """Whether a call runs in chunks, or token by token. Depends only on shapes and options."""
    if spec.K > MAX_CHUNKED_K or spec.N == 0 or not products_fit(spec):
        return False
    tokens = spec.T / spec.N if spec.packed else spec.T
    return tokens - min(spec.snapshots, tokens) > config.short


def _heads(x: torch.Tensor) -> int:
    return 0 if x is None else int(x.shape[2])


def products_fit(spec: CallSpec) -> bool:
    """Whether chunks can multiply keys before normalising them, as GDA's do. With a smaller eps, products of valid keys
    would leave float32's range."""
    return spec.kda or not spec.options.qk_l2norm or spec.options.qk_l2norm_eps >= 2.0**-90


def _shared(call: Call) -> dict[str, object]:
    """The small arrays, by their names in the kernels. Booleans are read as bytes."""
    return dict(
        A_log=call.A_log, dt_bias=call.dt_bias,
        mask=None if call.mask is None else call.mask.view(torch.uint8), cu_seqlens=call.cu_seqlens,
        state_indices=call.state_indices,
    )  # fmt: skip
