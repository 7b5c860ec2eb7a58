"""From a call to its Metal launches: the text to compile, the bytes of Params, the arrays, the grid.

Nothing here touches a device, so PyTorch, MLX and the tests' emulator share it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from ...rule.spec import Call, CallSpec, dtype_name, element_strides
from ..devices.params import TYPE, dense_strides, pack_params

MAX_K = 256
"""Rows of a state that fit the registers of the lanes that share a column: 8 lanes of 32 rows of two columns."""
THREADS = 128
"""Of a threadgroup: four simdgroups."""
ARRAYS = (
    "q", "k", "v", "g", "beta", "state_in", "A_log", "dt_bias", "mask", "cu_seqlens", "state_indices",
    "snapshot_indices", "o", "state_out", "snapshots",
)  # fmt: skip
"""The order of the kernels' buffers behind Params."""
FLAGS = (
    "has_state", "writes_state", "has_dt_bias", "masked", "packed", "pooled", "rows", "head", "tail", "in_dense",
)  # fmt: skip
"""Bits of Params.flags in shared.metal, from the lowest."""
_EXTRA = struct.Struct("=2q2i")
"""What follows pack_params in Params: strides of snapshot_indices, whether they are 64 bits wide, flags."""
_STATE_IN, _STATE_OUT, _SNAPSHOTS, _OUT_DENSE = 23 * 8, 27 * 8, 31 * 8, 44 * 8 + 19 * 4
"""Where state_in[4], state_out[4], snapshots[5] and out_dense lie in Params, in bytes."""
CHUNK_MIN_TOKENS = 64
"""Per sequence on average: eight chunks. Below, setting up weighs more than it saves."""
MAX_SCRATCH = 32768
"""Bytes of threadgroup memory that every Apple GPU has."""


@dataclass(frozen=True)
class Launch:
    """One launch of `gated_delta_rule` in `source`.

    Attributes:
        params: Params, as 64-bit integers.
        arrays: by name, in the order of ARRAYS; None where there is none, "carry" for the state between two launches.
        threads: the grid in threads; `group_size`: a threadgroup.
    """

    source: str
    params: tuple[int, ...]
    arrays: tuple[str | None, ...]
    threads: tuple[int, int, int]
    group_size: tuple[int, int, int] = (THREADS, 1, 1)


@cache
def text(name: str) -> str:
    """A file of backends/metal."""
    return (resources.files("anydelta") / "backends" / "metal" / f"{name}.metal").read_text(encoding="utf-8")


@cache
def source(
    algorithm: str,
    K: int,
    kda: bool,
    qkv: int,
    gate: int,
    state_in: int,
    state_out: int,
    entry: str = "entry",
) -> str:
    """The text of a kernel for these sizes and types (as backends/params.py counts them)."""
    macros = {
        "K": K, "KDA": int(kda), "QKV": qkv, "GATE": gate, "STATE_IN": state_in, "STATE_OUT": state_out,
    }  # fmt: skip
    defined = "".join(f"#define AD_{name} {value}\n" for name, value in macros.items())
    return defined + text("shared") + text(algorithm) + (text(entry) if entry else "")


CHUNK_COLUMNS = 32
"""Columns of a state that a threadgroup of delta_chunk.metal owns."""


def columns(K: int) -> int:
    """Columns of a state that a threadgroup of delta_rule.metal owns: WIDTH and SIMDGROUPS there."""
    lanes = 4 if K <= 128 else 8
    return THREADS // lanes * 2


def chunks_fit(spec: CallSpec, least: int = CHUNK_MIN_TOKENS) -> bool:
    """Whether delta_chunk.metal can take a call, and its prompt has `least` tokens per sequence on average."""
    rows = -(-spec.K // 32) * 32
    scratch = 4 * (8 * rows * (4 if spec.kda else 2) + 2 * 64 + 2 * 8 + 3 * 4 * 64)  # struct Scratch
    sequences = max(spec.N if spec.packed else 1, 1)
    return spec.T - spec.snapshots >= least * sequences and scratch <= MAX_SCRATCH


class Launches:
    """The launches of calls of one geometry.

    Args:
        copies: arrays that are copied before the call, dense.
        dense: whether all of them will be, as MLX makes them.
        chunked: whether the prompt runs in chunks (`chunks_fit`). The last tokens, whose states are asked for, then go
            one by one in a second launch, from the state that the first leaves in "carry" [N, HV, K, V] float32.
    """

    def __init__(
        self,
        spec: CallSpec,
        call: Call,
        copies: tuple[str, ...] = (),
        *,
        dense: bool = False,
        chunked: bool = False,
    ):
        self.spec = spec
        opt = spec.options
        tail = pack_params(spec, call, dense, copies)
        rows: tuple[int, ...] = (0, 0)
        wide = False
        if spec.snapshot_rows:
            rows = element_strides(call.snapshot_indices)
            wide = dtype_name(call.snapshot_indices) == "int64"
            pool = struct.unpack_from("=4q", tail, _STATE_IN)
            snapshots = struct.pack("=5q", 0, *pool)  # slots are rows of the pool
            tail = tail[:_SNAPSHOTS] + snapshots + tail[_SNAPSHOTS + 40 :]
        on = {
            "has_state": spec.has_state,
            "writes_state": (spec.inplace or opt.output_final_state) and not spec.snapshot_rows,
            "has_dt_bias": call.dt_bias is not None,
            "masked": spec.masked,
            "packed": spec.packed,
            "pooled": spec.pooled,
            "rows": spec.snapshot_rows,
        }
        self.extra, self.tail, self.on = (*rows, int(wide)), tail, on
        present = {
            n: n if getattr(call, n) is not None else None for n in ARRAYS if n not in ("o", "state_out")
        }
        present |= {"o": "o", "state_out": "state_out" if on["writes_state"] else None}
        if spec.snapshot_rows:
            present["snapshots"] = "state_in"
        self.types = dict(
            K=spec.K, kda=spec.kda, qkv=TYPE[spec.dtype], gate=TYPE.get(dtype_name(call.g), 0) if spec.kda else 0,
            state_in=TYPE[spec.state_dtype], state_out=TYPE[spec.state_dtype],
        )  # fmt: skip
        self.carries = chunked and spec.snapshots > 0
        self.all = tuple(self._launches(present, chunked)) if spec.N else ()

    def _launches(self, present: dict[str, str | None], chunked: bool) -> Iterator[Launch]:
        spec, tail, on, types = self.spec, self.tail, self.on, self.types
        if chunked:
            out, name = bytearray(tail), present["state_out"]
            head_on, head_types = on, types
            if self.carries:
                dense = dense_strides((spec.N, spec.HV, spec.K, spec.V))
                struct.pack_into("=4q", out, _STATE_OUT, *dense)
                struct.pack_into("=i", out, _OUT_DENSE, 1)
                head_on, head_types, name = (
                    {**on, "writes_state": True, "head": True},
                    {**types, "state_out": 0},
                    "carry",
                )
            yield self._launch(
                "delta_chunk", CHUNK_COLUMNS, bytes(out), head_on, head_types, {**present, "state_out": name}
            )
            if not self.carries:
                return
            into = bytearray(tail)
            struct.pack_into("=4q", into, _STATE_IN, *dense)
            tail, types, present = bytes(into), {**types, "state_in": 0}, {**present, "state_in": "carry"}
            on = {**on, "has_state": True, "tail": True, "in_dense": True}
        yield self._launch("delta_rule", columns(spec.K), tail, on, types, present)

    def _launch(
        self, algorithm: str, width: int, tail: bytes, on: dict[str, bool], types: dict[str, Any],
        present: dict[str, str | None],
    ) -> Launch:  # fmt: skip
        spec = self.spec
        return Launch(
            source(algorithm, **types), self._params(tail, on), tuple(present[n] for n in ARRAYS),
            (-(-spec.V // width) * THREADS, spec.HV, spec.N),
        )  # fmt: skip

    def _params(self, tail: bytes, on: dict[str, bool]) -> tuple[int, ...]:
        flags = sum(1 << i for i, name in enumerate(FLAGS) if on.get(name))
        packed = tail + _EXTRA.pack(*self.extra, flags)
        return struct.unpack(f"={len(packed) // 8}q", packed)
