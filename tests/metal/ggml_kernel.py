"""ggml's Metal kernel in the emulator, to count its work: see work.py. Nothing of ggml is in this repository.

The source comes with the sdist of llama-cpp-python, the package whose ggml `anydelta bench` measures:

    pip download --no-deps --no-binary :all: llama-cpp-python==0.3.36 && tar xf llama_cpp_python-0.3.36.tar.gz
    python tests/metal/work.py --ggml llama_cpp_python-0.3.36/vendor/llama.cpp/ggml/src/ggml-metal

The kernel's function constants (head size, length of a gate, snapshots) and its arguments are written into the text, as
ggml's host would give them for one sequence and one head.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from emulator import Emulator

HEADER = """
#include <cstddef>
#include <cstdint>
#include <metal_stdlib>
using namespace metal;
#define FOR_UNROLL(x) for (x)
"""

ENTRY = """
kernel void ggml_gated_delta_net(
    device const char* q [[buffer(0)]], device const char* k [[buffer(1)]], device const char* v [[buffer(2)]],
    device const char* g [[buffer(3)]], device const char* beta [[buffer(4)]], device const char* state [[buffer(5)]],
    device char* out [[buffer(6)]],
    uint3 group [[threadgroup_position_in_grid]], uint3 in_group [[thread_position_in_threadgroup]]) {
    ggml_metal_kargs_gated_delta_net args = {};
    args.ne01 = args.ne11 = args.ne21 = args.ne23 = 1;
    args.ne22 = %(T)d;
    args.ns02 = args.ns12 = args.ns22 = %(D)d;
    kernel_gated_delta_net_impl<%(simdgroups)d>(args, q, k, v, g, beta, state, out, out, group, in_group, in_group);
}
"""


def run(emulator: Emulator, folder: Path, x: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [1, T, 1, D] and final state [1, 1, D, D], of which ggml keeps column v in row v; scale D^-0.5.

    Args:
        folder: ggml/src/ggml-metal.
        x: as `work.inputs` makes it.
    """
    T, D = x["q"].shape[1], x["q"].shape[3]
    kernel = (folder / "kernels" / "gated_delta_net.metal").read_text(encoding="utf-8")
    kernel = kernel.split("typedef decltype")[0].replace('#include "common.h"', "").replace("#if 1", "")
    kernel = kernel.replace("kernel void", "void")  # a template; ENTRY calls it
    values = iter((D, x["g"].shape[3] if x["g"].ndim == 4 else 1, 1))  # ne20, ne30, K
    kernel = re.sub(r"\[\[function_constant\(.*?\)\]\]", lambda _: f"= {next(values)}", kernel)
    arguments = (folder / "ggml-metal-impl.h").read_text(encoding="utf-8")
    simdgroups = D // 32
    source = HEADER + arguments + kernel + ENTRY % {"T": T, "D": D, "simdgroups": simdgroups}
    out = torch.empty(T * D + D * D)
    function = emulator.compile_shader(source).ggml_gated_delta_net
    function(
        *(x[n].contiguous() for n in ("q", "k", "v", "g", "beta", "state")), out,
        threads=(D // simdgroups * 32, simdgroups, 1), group_size=(32, simdgroups, 1),
    )  # fmt: skip
    return out[: T * D].view(1, T, 1, D), out[T * D :].view(1, 1, D, D)
