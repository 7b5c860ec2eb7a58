"""Turns a call into Metal launches: the text to compile, the bytes of Params, the arrays, the grid.

Nothing here touches a device, so PyTorch, MLX and the tests' emulator share it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from ...rule.arguments import Call
from ...rule.spec import CallSpec, dtype_name, element_strides
from ..devices import structs
from ..devices.params import TYPE, dense_strides, params_of
from ..devices.structs import METAL_FLAGS, PARAMS, bits, flags

MAX_K = 256
"""The most rows of a state in registers: 8 lanes share two columns, each with 32 rows."""
THREADS = 128
"""Threads of a threadgroup: four simdgroups."""
ARRAYS = (
    "q", "k", "v", "g", "beta", "state_in", "A_log", "dt_bias", "mask", "cu_seqlens", "state_indices",
    "snapshot_indices", "o", "state_out", "snapshots",
)  # fmt: skip
"""The order of the kernels' buffers after Params."""
CHUNK_MIN_TOKENS = 64
"""The least tokens per sequence on average for chunks: eight chunks. For fewer, the setup costs more than it saves."""
MAX_SCRATCH = 32768
"""Bytes of threadgroup memory that every Apple GPU has."""


@dataclass(frozen=True)
class Launch:
    """One launch of `gated_delta_rule` in `source`.

    Attributes:
        params: Params, as 64-bit integers.
        arrays: by name, in the order of ARRAYS; None if absent, "carry" for the state between two launches.
        threads: the grid in threads; `group_size`: a threadgroup.
    """

    source: str
    params: tuple[int, ...]
    arrays: tuple[str | None, ...]
    threads: tuple[int, int, int]
    group_size: tuple[int, int, int] = (THREADS, 1, 1)


def text(name: str) -> str:
    """A file of backends/metal."""
    return structs.source("metal", f"{name}.metal")


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
    """The text of a kernel for these sizes and types (numbered as in devices/params.py)."""
    macros = {
        "K": K, "KDA": int(kda), "QKV": qkv, "GATE": gate, "STATE_IN": state_in, "STATE_OUT": state_out,
    }  # fmt: skip
    defined = "".join(f"#define AD_{name} {value}\n" for name, value in macros.items())
    shared = text("shared").replace("    AD_PARAMS\n", PARAMS.text("metal"), 1)
    shared = shared.replace(
        "AD_FLAGS\n\n", bits(METAL_FLAGS, "constant constexpr int {name} = {value};") + "\n", 1
    )
    return defined + shared + text(algorithm) + (text(entry) if entry else "")


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
        dense: whether all arrays will be dense, as MLX makes them.
        chunked: whether the prompt runs in chunks (`chunks_fit`). The last tokens, whose states are wanted, then run
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
        params = params_of(spec, call, dense, copies)
        if spec.snapshot_rows:
            params["rows"] = element_strides(call.snapshot_indices)
            params["rows64"] = dtype_name(call.snapshot_indices) == "int64"
            params["snapshots"] = (0, *params["state_in"])  # slots are rows of the pool
        on = {
            "has_state": spec.has_state,
            "writes_state": (spec.inplace or opt.output_final_state) and not spec.snapshot_rows,
            "has_dt_bias": call.dt_bias is not None,
            "masked": spec.masked,
            "packed": spec.packed,
            "pooled": spec.pooled,
            "rows": spec.snapshot_rows,
        }
        self.params, self.on = params, on
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
        spec, params, on, types = self.spec, self.params, self.on, self.types
        if chunked:
            out, name = dict(params), present["state_out"]
            head_on, head_types = on, types
            if self.carries:
                dense = dense_strides((spec.N, spec.HV, spec.K, spec.V))
                out["state_out"], out["out_dense"] = dense, True
                head_on, head_types, name = (
                    {**on, "writes_state": True, "head": True},
                    {**types, "state_out": 0},
                    "carry",
                )
            yield self._launch(
                "delta_chunk", CHUNK_COLUMNS, out, head_on, head_types, {**present, "state_out": name}
            )
            if not self.carries:
                return
            params = {**params, "state_in": dense}
            types, present = {**types, "state_in": 0}, {**present, "state_in": "carry"}
            on = {**on, "has_state": True, "tail": True, "in_dense": True}
        yield self._launch("delta_rule", columns(spec.K), params, on, types, present)

    def _launch(
        self, algorithm: str, width: int, params: dict[str, object], on: dict[str, bool], types: dict[str, int],
        present: dict[str, str | None],
    ) -> Launch:  # fmt: skip
        spec = self.spec
        packed = PARAMS.pack({**params, "flags": flags(METAL_FLAGS, on)})
        return Launch(
            source(algorithm, **types), struct.unpack(f"={len(packed) // 8}q", packed),
            tuple(present[n] for n in ARRAYS), (-(-spec.V // width) * THREADS, spec.HV, spec.N),
        )  # fmt: skip
