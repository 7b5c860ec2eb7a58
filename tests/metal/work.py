"""Counts the work of the Metal kernels per token and column of the state, and that of mlx-lm's kernels beside it.

    python tests/metal/work.py                  K = V = 128, float32, state [V, K], H = HV = 1
    python tests/metal/work.py --ggml FOLDER    and ggml's kernel: ggml_kernel.py says where to get it

All of them run in the emulator, which counts what reaches memory (as g++ -O2 leaves the loads) and what needs the
simdgroup. A count is the difference between two prompts, so that reading and writing the state once does not enter.
mlx-lm's kernels come from the installed package and are given the signature that MLX would write.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ggml_kernel
import numpy as np
import torch
from emulator import Counts, Emulator

import anydelta
from anydelta.backends.metal import host as metal

D = 128
SHORT, LONG = 64, 96


@dataclass(frozen=True)
class Work:
    """Per token and column."""

    name: str
    loads: float
    """By one lane each, of up to 16 bytes."""
    bytes: float
    exchanges: float
    """Steps in which the lanes of a simdgroup swap a register; a simd_sum takes five."""
    barriers: float
    """Threadgroup barriers, per token (a barrier is shared by all columns)."""


def inputs(T: int, kda: bool) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(T)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    k = torch.nn.functional.normalize(normal(1, T, 1, D), dim=-1)
    return {
        "q": normal(1, T, 1, D) / D, "k": k, "v": normal(1, T, 1, D), "beta": torch.rand(1, T, 1, generator=generator),
        "g": -torch.rand(1, T, 1, *[D] * kda, generator=generator), "state": normal(1, 1, D, D),
    }  # fmt: skip


def anydelta_run(emulator: Emulator, x: dict[str, torch.Tensor], chunks: bool) -> Any:
    with metal.emulated(emulator), metal.forced_isa(metal.isas()[chunks]):
        return anydelta.gated_delta_rule(
            x["q"], x["k"], x["v"], g=x["g"], beta=x["beta"], initial_state=x["state"], scale=1.0, state_layout="vk",
            backend="metal",
        )  # fmt: skip


def mlx_lm_run(emulator: Emulator, x: dict[str, torch.Tensor], packed: bool) -> Any:
    """mlx-lm's gated_delta_kernel as its models call it; linear decays."""
    import mlx.core as mx
    from mlx_host import MetalKernels

    host = MetalKernels(emulator)
    held = mx.metal.is_available, mx.fast.metal_kernel
    mx.metal.is_available, mx.fast.metal_kernel = (lambda: True), host.metal_kernel
    try:
        import mlx_lm.models.gated_delta as module

        module = importlib.reload(module)
        module._ENABLE_GDN_PACKED = packed
        q, k, v, beta, state = (mx.array(x[n].numpy()) for n in ("q", "k", "v", "beta", "state"))
        o, state = module.gated_delta_kernel(q, k, v, mx.array(np.exp(x["g"].numpy())), beta, state)
        return torch.from_numpy(np.array(o)), torch.from_numpy(np.array(state))
    finally:
        mx.metal.is_available, mx.fast.metal_kernel = held
        importlib.reload(module)


def ggml_run(emulator: Emulator, x: dict[str, torch.Tensor], folder: Path) -> Any:
    return ggml_kernel.run(emulator, folder, {**x, "q": x["q"] * D**0.5})  # its scale is D^-0.5


def work(name: str, run: Callable[[Emulator, dict[str, torch.Tensor]], Any], kda: bool) -> Work:
    counts = []
    for T in (SHORT, LONG):
        emulator = Emulator("check")
        emulator.counts()
        x = inputs(T, kda)
        got = run(emulator, x)
        counts.append(emulator.counts())
        want = anydelta.gated_delta_rule(
            x["q"], x["k"], x["v"], g=x["g"], beta=x["beta"], initial_state=x["state"], scale=1.0, state_layout="vk",
            backend="reference",
        )  # fmt: skip
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)

    def per(field: Callable[[Counts], float], over: int) -> float:
        return (field(counts[1]) - field(counts[0])) / ((LONG - SHORT) * over)

    return Work(
        name,
        per(lambda c: c.device_reads, D),
        per(lambda c: c.device_read_bytes, D),
        per(lambda c: (c.shuffles + 5 * c.simd_sums) / 32, D),
        per(lambda c: c.barriers, 1) / lanes(name),
    )


def lanes(name: str) -> int:
    """Lanes that come to a threadgroup barrier, over all threadgroups."""
    return D // 32 * 128 if "chunks" in name else 1


def table(ggml_folder: Path | None = None) -> list[Work]:
    out = []
    for gate, kda in (("GDA", False), ("KDA", True)):
        out.append(work(f"anydelta {gate}", lambda e, x: anydelta_run(e, x, False), kda))
        out.append(work(f"anydelta {gate} in chunks", lambda e, x: anydelta_run(e, x, True), kda))
        if not kda:
            out.append(work(f"mlx-lm {gate}, packed", lambda e, x: mlx_lm_run(e, x, True), kda))
        out.append(work(f"mlx-lm {gate}, generic", lambda e, x: mlx_lm_run(e, x, False), kda))
        if ggml_folder:
            out.append(work(f"ggml {gate}", lambda e, x: ggml_run(e, x, ggml_folder), kda))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ggml", type=Path, metavar="FOLDER", help="ggml/src/ggml-metal")
    folder = parser.parse_args().ggml
    print("| kernel | loads | bytes | exchanges | barriers per token |\n|---|---:|---:|---:|---:|")
    for w in table(folder):
        print(f"| {w.name} | {w.loads:.1f} | {w.bytes:.0f} | {w.exchanges:.2f} | {w.barriers:.3f} |")


if __name__ == "__main__":
    main()
