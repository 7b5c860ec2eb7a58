"""The launches of the kernels: block sizes, warps, pipeline stages, segments.

A table per architecture (tables.py, written by `anydelta tune`) comes first, then the heuristic below. Calls time
nothing: a shape always gets the same launch on the same machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from . import tables

MAX_CHUNKED_K = 256
"""Wider keys run token by token: a [K, 16] state and a [64, K] chunk no longer fit the registers and shared memory."""


@dataclass(frozen=True)
class Config:
    """One launch. Fields that a kernel does not have are ignored."""

    short: int = 16
    """Sequences of up to this many tokens (on average) run token by token."""
    BV: int = 32
    """Columns of the state that a program of `recurrent` owns."""
    warps: int = 4
    chunk: int = 64
    scan_BV: int = 32
    scan_warps: int = 4
    scan_stages: int = 1
    prepare_warps: int = 4
    scores_warps: int = 4
    backward_chunk: int = 32
    """For the backward pass. With 64, `gradients` puts 264 bytes per thread on the stack (sm_90, K = V = 128)."""
    back_prepare_warps: int = 4
    back_warps: int = 8
    pairs_warps: int = 4
    gradients_warps: int = 8
    gradients_BV: int = 32
    gradients_slice: int = 16
    """Channels of q and k that `gradients` takes at a time."""
    segments: int = 0
    """How many pieces a long sequence is cut into; 0 lets `segments()` choose."""


@dataclass(frozen=True)
class Machine:
    """The properties of a device that decide launches."""

    arch: str
    processors: int
    warp: int = 32
    shared: int = 100 * 1024
    """Bytes of shared memory that one program may use."""


def power_of_two(n: int, least: int = 1) -> int:
    return max(least, 1 << max(n - 1, 0).bit_length())


def heuristic(machine: Machine, *, K: int, V: int, kda: bool, dtype: str, programs: int) -> Config:
    """A launch that fits, for heads of K x V. `programs` is the number of heads in all sequences together."""
    BK = power_of_two(K, 16)
    # Decode: twice as many programs as fill the machine, each with 32 float32 of the state per thread (half of the
    # registers remain for the token), and rows of at least 64 bytes, so that whole sectors are used.
    BV = min(32, power_of_two(V))
    while BV > 16 and programs * -(-V // BV) < 2 * machine.processors:
        BV //= 2
    while BV > 1 and 32 * machine.warp * 8 < BK * BV:
        BV //= 2
    warps = min(8, max(1, BK * BV // (32 * machine.warp)))
    # Prefill. Everything except GDA in bfloat16 multiplies split rows, high and low. With these values, and configs/,
    # no shipped kernel uses the stack (docs/measurements/triton-aot.json). Chunks of 64, 32 columns and early loads
    # take registers, and compilers differ in how many.
    split = BK > 64 and (dtype != "bfloat16" or kda)
    scan_BV = 32 if BK <= 128 else 16
    # Also 16 columns if 32 would leave half of the processors without a program.
    if 2 * programs * -(-V // scan_BV) <= machine.processors:
        scan_BV = 16
    small = machine.shared < 128 * 1024 or BK > 128 or split
    narrow = small or (BK > 64 and machine.shared < 200 * 1024)
    return Config(
        BV=BV,
        warps=warps,
        chunk=32 if narrow else 64,
        scan_BV=scan_BV,
        scan_warps=8 if machine.warp == 32 and (split or (narrow and 64 < BK <= 128)) else 4,
        prepare_warps=8 if BK > 64 else 4,
        scan_stages=1 if small else 2,
        scores_warps=1 if BK <= 64 else 4,
    )


def segments(config: Config, machine: Machine, *, programs: int, tokens: int) -> int:
    """The number of pieces that a sequence of `tokens` is cut into, if `programs` would walk through it.

    The first of the two launches does the work for V + K columns, so fewer than four segments do not pay.
    """
    if config.segments:
        return config.segments
    chunks = tokens // config.chunk
    pieces = min(machine.processors // max(programs, 1), chunks // 8, 16)
    return pieces if pieces >= 4 else 1


_forced: dict[str, int] = {}


@contextmanager
def forced(**changes: int) -> Iterator[None]:
    """Inside the block, new plans use these values. For tests and tuning."""
    global _forced
    before = _forced
    _forced = {**before, **changes}
    try:
        yield
    finally:
        _forced = before


def choose(
    machine: Machine, *, K: int, V: int, kda: bool, dtype: str, programs: int, tokens: float = 1
) -> Config:
    """The launch for a shape: the heuristic, overridden by rows of the tables, then by `forced`.

    Raises:
        ValueError: a file that is not a table (tables.read).
    """
    config = heuristic(machine, K=K, V=V, kda=kda, dtype=dtype, programs=programs)
    known = tables.rows(machine.arch)
    launch: dict[str, int] = {}
    if known:
        for kernel in tables.FIELDS:
            names = tables.keys(kernel, tokens=tokens, heads=programs, K=K, V=V, kda=kda, dtype=dtype)
            row = next((known[name] for name in names if name in known), None)
            launch |= row["launch"] if row else {}
    return replace(config, **{**launch, **_forced})
