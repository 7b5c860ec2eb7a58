"""Ahead-of-time compilation for GPUs that are not present, and the resources that the compiler reports.

The launches are those of a call on such a GPU (launch.py), with tensors on torch's meta device: same arguments, same
specialisation on values that are 1 or a multiple of 16.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ...mixer.arguments import MixerCall, MixerOptions
from ...mixer.spec import MixerSpec, check_mixer
from ...rule.arguments import Call, Options
from ...rule.spec import CallSpec, check_call
from . import tables
from .backward import BackwardLaunches, room
from .config import Machine
from .host import strides_of
from .launch import COMPILER, KernelCall, Launches
from .mixer import calls as mixer_calls

TARGETS: dict[str, tuple[GPUTarget, Machine]] = {
    "sm_80": (GPUTarget("cuda", 80, 32), Machine("sm_80", 108, 32, 163 * 1024)),
    "sm_90": (GPUTarget("cuda", 90, 32), Machine("sm_90", 132, 32, 227 * 1024)),
    "sm_100": (GPUTarget("cuda", 100, 32), Machine("sm_100", 148, 32, 227 * 1024)),
    "gfx942": (GPUTarget("hip", "gfx942", 64), Machine("gfx942", 304, 64, 64 * 1024)),
}
"""Targets: A100, H100 and H200, B200, MI300X."""

_TYPES = {
    "float32": "fp32",
    "bfloat16": "bf16",
    "float16": "fp16",
    "uint8": "u8",
    "int32": "i32",
    "int64": "i64",
}


NEVER_SPILL = ("recurrent", "convolve", "gated_norm")
"""Kernels of a decode step, which must not spill."""
SPILL_LIMIT = 16
"""The most bytes of stack per thread (NVIDIA) or spilled registers (AMD) of any other shipped kernel."""
FIRST_CALL = 15.0
"""The most seconds to compile all kernels of a call."""


def spill_limit(kernel: str, target: str, shape: str) -> int:
    """The bound for one launch."""
    if kernel == "recurrent" and target == "sm_100" and "mixer" in shape:
        return 8  # a stack frame despite free registers, only from ptxas with the norm's atomic
    return 0 if kernel in NEVER_SPILL else SPILL_LIMIT


@dataclass(frozen=True)
class Shape:
    """One shipped specialisation: a call, described by everything its kernels are compiled for."""

    T: int = 1
    N: int = 8
    H: int = 16
    HV: int = 32
    K: int = 128
    V: int = 128
    kda: bool = False
    dtype: str = "bfloat16"
    state_dtype: str = "float32"
    layout: str = "kv"
    decay: str = "log"
    l2norm: bool = True
    inplace: bool = True
    pool: bool = False
    packed: bool = False
    masked: bool = False
    erase: bool = False
    snapshots: int = 0
    rows: bool = False
    """The snapshots are rows of the pool."""
    backward: bool = False
    mixer: bool = False

    def __str__(self) -> str:
        names = ("kda", "l2norm", "inplace", "pool", "packed", "masked", "erase", "rows", "backward", "mixer")
        flags = [n for n in names if getattr(self, n)]
        sizes = f"T={self.T} N={self.N} H={self.H} HV={self.HV} K={self.K} V={self.V}"
        more = f"snapshots={self.snapshots}" if self.snapshots else ""
        types = f"{self.dtype} state={self.state_dtype}/{self.layout} {self.decay}"
        return " ".join(filter(None, (sizes, types, *flags, more)))


def shipped() -> Iterator[Shape]:
    """The calls of the models that use the rule (Qwen3-Next and Qwen3.5: GDA, 16 and 32 heads of 128; Kimi Linear: KDA,
    32 heads), and one for each feature that changes a kernel."""
    decode, prefill = Shape(), Shape(T=4096, N=1, inplace=False)
    yield decode
    yield replace(decode, dtype="float32", layout="vk", pool=True)
    yield replace(decode, decay="raw", pool=True, state_dtype="bfloat16", layout="vk")
    yield replace(decode, T=16, snapshots=16, masked=True, packed=True)
    yield replace(decode, kda=True, H=32)
    yield replace(decode, kda=True, H=32, K=256, V=256)
    yield replace(decode, kda=True, H=32, decay="raw", pool=True, state_dtype="bfloat16", layout="vk")
    yield replace(decode, erase=True, l2norm=False)
    yield prefill
    yield replace(prefill, dtype="float32")
    yield replace(prefill, kda=True, H=32)
    yield replace(prefill, erase=True, l2norm=False)
    yield replace(prefill, kda=True, H=32, erase=True, l2norm=False)
    yield replace(
        prefill,
        K=96,
        V=192,
        dtype="float16",
        N=16,
        packed=True,
        masked=True,
        pool=True,
        inplace=True,
        snapshots=4,
    )
    yield replace(prefill, H=2, HV=4, T=32768)  # cut into segments
    yield replace(decode, decay="raw", pool=True, mixer=True)
    yield replace(decode, decay="raw", kda=True, H=32, T=4, snapshots=4, mixer=True)
    yield replace(decode, decay="raw", T=4, snapshots=4, pool=True, rows=True, mixer=True)
    yield replace(prefill, decay="raw", packed=True, N=4, masked=True, inplace=True, mixer=True)
    yield replace(prefill, backward=True)
    yield replace(prefill, kda=True, H=32, decay="raw", backward=True)
    yield replace(
        prefill, K=96, V=192, dtype="float16", N=16, packed=True, masked=True, pool=True, backward=True
    )


def call_of(shape: Shape, device: str = "meta") -> tuple[CallSpec, Call]:
    """The call of a shape, on tensors without values; on the meta device also without memory."""

    def new(*size: int, dtype: str = "float32") -> torch.Tensor:
        return torch.empty(size, dtype=getattr(torch, dtype), device=device)

    s = shape
    B, T = (1, s.T) if s.packed else (s.N, s.T)
    q, k = (new(B, T, s.H, s.K, dtype=s.dtype) for _ in range(2))
    v = new(B, T, s.HV, s.V, dtype=s.dtype)
    gate = (B, T, s.HV)
    tail = (s.K, s.V) if s.layout == "kv" else (s.V, s.K)
    raw = s.decay == "raw"
    call = Call(
        q, k, v, new(*gate, *([s.K] if s.kda else []), dtype=s.dtype if raw else "float32"),
        None if s.erase else new(*gate),
        state_in=new(4 * s.N if s.pool else s.N, s.HV, *tail, dtype=s.state_dtype),
        A_log=new(s.HV) if raw else None,
        dt_bias=new(s.HV, *([s.K] if s.kda else [])) if raw else None,
        erase=new(B, T, s.HV, s.K, dtype=s.dtype) if s.erase else None,
        mask=new(B, T, dtype="bool") if s.masked else None,
        cu_seqlens=new(s.N + 1, dtype="int32") if s.packed else None,
        state_indices=new(s.N, dtype="int32") if s.pool else None,
        snapshots=new(s.snapshots, s.N, s.HV, *tail, dtype=s.state_dtype) if s.snapshots and not s.rows else None,
        snapshot_indices=new(s.snapshots, s.N, dtype="int32") if s.rows else None,
    )  # fmt: skip
    options = (MixerOptions().of_rule() if raw else Options())._replace(
        decay=s.decay, qk_l2norm=s.l2norm, state_layout=s.layout,
        op="gated_delta_rule_" if s.inplace else "gated_delta_rule",
    )  # fmt: skip
    spec = check_call(call, options, inplace=s.inplace)
    call.o = new(*v.shape, dtype=s.dtype)
    call.state_out = call.state_in if s.inplace else new(s.N, s.HV, *tail, dtype=s.state_dtype)
    return spec, call


def meta_mixer_call(shape: Shape) -> tuple[MixerSpec, MixerCall]:
    """The mixer's call of a shape: four taps, a packed qkv, a gated norm."""
    _, c = call_of(shape)
    s = shape

    def new(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=c.q.dtype, device="meta")

    B, T = c.q.shape[:2]
    width = s.HV * s.V
    channels = 2 * s.H * s.K + width
    call = MixerCall(
        new(B, T, channels), None, None, new(c.state_in.shape[0], channels, 4), c.state_in, c.g, c.beta,
        new(channels, 4), A_log=c.A_log, dt_bias=c.dt_bias, z=new(B, T, width), norm_weight=new(s.V), mask=c.mask,
        cu_seqlens=c.cu_seqlens, state_indices=c.state_indices, snapshots=c.snapshots,
        conv_snapshots=None if c.snapshots is None else new(s.snapshots, s.N, channels, 4),
        snapshot_indices=c.snapshot_indices, o=new(B, T, width),
    )  # fmt: skip
    return check_mixer(
        call, MixerOptions(state_layout=s.layout, norm_gate="sigmoid" if s.kda else "silu")
    ), call


def calls_of(shape: Shape, machine: Machine) -> list[KernelCall]:
    """The launches that a call of this shape makes on a machine."""
    if shape.mixer:
        mixer_spec, mixer_call = meta_mixer_call(shape)
        return list(mixer_calls(mixer_spec, mixer_call, mixer_call.state, machine))
    spec, call = call_of(shape)
    if shape.backward:
        launches = BackwardLaunches(spec, machine, strides_of(spec, call))
        return list(launches.calls(call, call.o, call.state_out, room(spec, call)))
    return list(Launches(spec, machine, strides_of(spec, call)).calls(call))


def launch_of(call: KernelCall) -> dict[str, int]:
    """The launch's sizes."""
    names = [name for name in ("BV", "C", "STAGES", "SEGMENTS", "SLICE", "BT") if name in call.args]
    return {**{name: int(call.args[name]) for name in names}, "warps": call.warps}


def source_of(call: KernelCall) -> ASTSource:
    """The source that Triton's just-in-time compiler would compile for these arguments."""
    signature: dict[str, str] = {}
    constants: dict[str, object] = {}
    attributes: dict[tuple[int, ...], list[list[object]]] = {}
    aligned = [["tt.divisibility", 16]]
    for i, parameter in enumerate(call.kernel.params):
        value = call.args[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + _TYPES[str(value.dtype).rpartition(".")[2]]
            attributes[(i,)] = aligned
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        elif value == 1 and not parameter.do_not_specialize:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(i,)] = aligned
    return ASTSource(call.kernel, signature, constants, attributes)


@dataclass(frozen=True)
class Compiled:
    """Resources of one kernel on one target."""

    kernel: str
    registers: int
    spilled: int
    """Bytes of stack per thread (NVIDIA), or spilled vector registers (AMD)."""
    shared: int
    warps: int
    seconds: float
    """Processor time of Triton, LLVM and the assembler, for which a first call waits."""


def compile_call(call: KernelCall, target: str) -> Compiled:
    """Compile one launch for one of TARGETS.

    Raises:
        the errors of Triton's compiler.
    """
    gpu, _ = TARGETS[target]
    start = _processor_seconds()
    done = triton.compile(
        source_of(call), target=gpu, options=dict(**COMPILER, num_warps=call.warps, num_stages=call.stages)
    )
    seconds = _processor_seconds() - start
    registers, spilled = _nvidia(done.asm["cubin"]) if gpu.backend == "cuda" else _amd(done.asm["amdgcn"])
    return Compiled(
        call.kernel.fn.__name__, registers, spilled, int(done.metadata.shared), call.warps, seconds
    )


def _processor_seconds() -> float:
    """Processor time of this process and of those it has waited for."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def _nvidia(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack) of a kernel. Values that do not fit the registers go to the stack."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        tool = knobs.nvidia.cuobjdump.path
        text = subprocess.run(
            [tool, "--dump-resource-usage", str(path)], check=True, capture_output=True, text=True
        ).stdout
    return int(_number(r"REG:(\d+)", text)), int(_number(r"STACK:(\d+)", text))


def _amd(assembly: str) -> tuple[int, int]:
    return (
        int(_number(r"\.vgpr_count:\s*(\d+)", assembly)),
        int(_number(r"\.vgpr_spill_count:\s*(\d+)", assembly)),
    )


def _number(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"aot: {pattern} is not in the output of the compiler's tools: {text[:200]!r}")
    return found.group(1)


def record(path: str, targets: list[str]) -> None:
    """Compile everything that ships and write its resources: `python -m anydelta.backends.triton.aot FILE [TARGET]`.

    It keeps rows of other targets in the file, and ignores the user's tables.
    """
    import json

    os.environ[tables.ENV] = ""
    tables.rows.cache_clear()

    knobs.compilation.always_compile = True  # so that the seconds are the compiler's
    file = Path(path)
    old = json.loads(file.read_text())["rows"] if file.exists() else []
    rows = [row for row in old if row["target"] not in targets]
    for target in targets:
        for shape in shipped():
            for call in calls_of(shape, TARGETS[target][1]):
                done = compile_call(call, target)
                facts = dict(target=target, shape=str(shape), launch=launch_of(call), **asdict(done))
                facts["seconds"] = round(done.seconds, 1)
                print(facts, flush=True)
                rows.append(facts)
        rows.sort(key=lambda row: list(TARGETS).index(row["target"]))
        text = ",\n".join(json.dumps(row) for row in rows)
        file.write_text(f'{{"triton": "{triton.__version__}", "rows": [\n{text}\n]}}\n')


if __name__ == "__main__":
    import sys

    record(sys.argv[1], sys.argv[2:] or list(TARGETS))
