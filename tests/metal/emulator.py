"""Metal on the CPU, for tests: compiles .metal texts with a C++ compiler and runs them lane by lane.

`Emulator` stands in for torch.mps: `compile_shader(source)` gives a library whose functions are called as torch's are,
on tensors of the CPU. metal_stdlib holds what the language needs, runtime.cpp runs the lanes and checks accesses.

The text is compiled as it is, but for two things that C++ cannot say. A threadgroup variable becomes a static one that
is announced to the runtime, and for every `kernel void` a function is added that takes its arguments from an array.

Modes: "fast"; "check", where every access is looked at: bounds, races, counts; "asan", AddressSanitizer, whose library
must be loaded before Python (`asan_environment`).
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

HERE = Path(__file__).parent
MODES = ("fast", "check", "asan")
_ATTRIBUTES = {
    "threadgroup_position_in_grid": "group",
    "thread_position_in_threadgroup": "in_group",
    "thread_position_in_grid": "in_grid",
    "simdgroup_index_in_threadgroup": "simdgroup",
    "thread_index_in_simdgroup": "lane",
}
_COUNTS = ("shuffles", "simd_sums", "matrix_loads", "matrix_stores", "matrix_multiplies", "simd_barriers")


@cache
def compiler() -> str | None:
    """A C++17 compiler: $CXX, g++ or clang++."""
    names = (os.environ.get("CXX", ""), "g++", "clang++", "clang++-19", "clang++-15")
    return next((path for n in names if n and (path := shutil.which(n))), None)


@cache
def _folder() -> Path:
    """Where compiled code is kept: by content, so that it is compiled once per machine."""
    place = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "anydelta" / "metal-emulator"
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError:
        place = Path(tempfile.mkdtemp())
    return place


def _flags(mode: str) -> list[str]:
    flags = ["-std=c++17", "-O2", "-fPIC", "-ffp-contract=fast", "-w", f"-I{HERE}"]
    if mode == "asan":
        flags += ["-fsanitize=address", "-fno-omit-frame-pointer", "-g1"]
    return flags


def _build(text: str, mode: str, name: str, *extra: str) -> Path:
    """A shared library of this C++ text."""
    cxx = compiler()
    assert cxx is not None
    command = [cxx, *_flags(mode), *extra]
    key = text + repr(command) + "".join((HERE / n).read_text() for n in ("metal_stdlib", "runtime.h"))
    target = _folder() / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:20]}.so"
    if target.exists():
        return target
    with tempfile.TemporaryDirectory() as work:
        source, made = Path(work) / f"{name}.cpp", Path(work) / "made.so"
        source.write_text(text)
        link = [f for f in command if f != "-fsanitize=thread"]  # its calls are answered by runtime.cpp
        done = subprocess.run(
            [*command, "-c", str(source), "-o", f"{made}.o"], capture_output=True, text=True
        )
        if done.returncode == 0:
            done = subprocess.run(
                [*link, "-shared", f"{made}.o", "-o", str(made)], capture_output=True, text=True
            )
        if done.returncode:
            raise SyntaxError(f"{Path(cxx).name} rejects the kernel:\n{done.stderr[:4000]}")
        moved = target.with_suffix(f".{os.getpid()}")
        shutil.copy(made, moved)
        moved.rename(target)
    return target


@cache
def _runtime(mode: str) -> ctypes.CDLL:
    mode = "asan" if mode == "asan" else "fast"
    path = _build((HERE / "runtime.cpp").read_text(), mode, "runtime", "-O2")
    library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    library.emu_run.restype = ctypes.c_char_p
    return library


def asan_environment() -> dict[str, str]:
    """What a process needs in its environment to use mode "asan"."""
    cxx = compiler()
    assert cxx is not None
    found = subprocess.run(
        [cxx, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    return {"LD_PRELOAD": found, "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0"}


_KERNEL = re.compile(r"kernel\s+void\s+(\w+)\s*\(((?:[^()]|\([^()]*\))*)\)\s*\{")
_THREADGROUP = re.compile(r"\bthreadgroup\s+(\w+)\s+(\w+)\s*((?:\[[^\]]*\])*)\s*;")


def translate(source: str) -> tuple[str, dict[str, list[str]]]:
    """The text for a C++ compiler, and the kinds of each kernel's buffers by name: "device", "const", "constant"."""
    wrappers, kinds = [], {}
    for name, parameters in _KERNEL.findall(source):
        passed, kinds[name] = [], []
        for parameter in parameters.split(","):
            declared, attribute, number = re.match(
                r"\s*(.*?)\s*\[\[(\w+)(?:\((\d+)\))?\]\]\s*$", parameter, re.DOTALL
            ).groups()  # type: ignore[union-attr]
            if attribute == "buffer":
                assert int(number) == len(kinds[name]), "buffers are numbered in their order"
                kind, _, rest = declared.partition(" ")
                base = re.sub(r"[&*]?\s*\w+$", "", rest).strip()
                reference = "&" in declared
                passed.append(f"{'*' if reference else ''}(({base}*)arguments[{number}])")
                kinds[name].append(
                    "constant" if kind == "constant" else "const" if "const " in declared else "device"
                )
            else:
                field = f"emu::me->{_ATTRIBUTES[attribute]}"
                wide = declared.split()[0][-1]
                passed.append(
                    f"{declared.split()[0]}{{{', '.join(f'{field}[{i}]' for i in range(int(wide)))}}}"
                    if wide in "23"
                    else field
                )
        wrappers.append(
            f'extern "C" void emu_{name}(void* const* arguments) {{ {name}({", ".join(passed)}); }}'
        )
    text = _THREADGROUP.sub(
        r"static threadgroup \1 \2\3; emu::threadgroup_memory((void*)&\2, sizeof \2);", source
    )
    return text + "\n" + "\n".join(wrappers) + "\n", kinds


@dataclass
class Counts:
    """What launches did since the counts were taken last, over all lanes: accesses by memory (constants are none), and
    simdgroup operations in lanes that came to one."""

    device_reads: int
    device_read_bytes: int
    device_writes: int
    device_write_bytes: int
    shared_reads: int
    shared_read_bytes: int
    shared_writes: int
    shared_write_bytes: int
    shuffles: int
    simd_sums: int
    matrix_loads: int
    matrix_stores: int
    matrix_multiplies: int
    simd_barriers: int
    barriers: int


def parse(source: str, clang: str) -> str:
    """What clang says of a text as C++14, which is what Metal 3 is, with address spaces: "" if nothing."""
    text = _THREADGROUP.sub(r"extern threadgroup \1 \2\3;", source)
    flags = [
        "-std=c++14",
        "-DADDRESS_SPACES",
        "-Wall",
        "-Wno-unknown-attributes",
        "-Wno-unused-const-variable",
    ]
    command = [clang, *flags, f"-I{HERE}", "-fsyntax-only", "-x", "c++", "-"]
    return subprocess.run(command, input=text, capture_output=True, text=True).stderr


class Kernel:
    """A function of a library, called as torch's: lib.name(*arguments, threads=..., group_size=...)."""

    def __init__(self, emulator: Emulator, library: ctypes.CDLL, name: str, kinds: Sequence[str]):
        self.emulator, self.name, self.kinds = emulator, name, kinds
        self.entry = getattr(library, f"emu_{name}")

    strict = True
    """Whether constants must come by value, as they do from torch."""

    def launch(self, arguments: Sequence[Any], *, threads: Sequence[int], group_size: Sequence[int]) -> None:
        """As MLX: constants too are arrays."""
        self.strict = False
        self(*arguments, threads=threads, group_size=group_size)

    def __call__(self, *arguments: Any, threads: Sequence[int], group_size: Sequence[int]) -> None:
        assert len(arguments) == len(self.kinds), f"{self.name} takes {len(self.kinds)} arguments"
        held, addresses, ranges = [], [], []
        for x, kind in zip(arguments, self.kinds, strict=True):
            if isinstance(x, torch.Tensor):
                assert kind != "constant" or not self.strict, "a constant argument is a number or a list"
                reach = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) + 1
                addresses.append(x.data_ptr())
                ranges += [
                    x.data_ptr(),
                    reach * x.element_size() if x.numel() else 0,
                    ("constant", "const", "device").index(kind),
                ]
            else:  # as torch does: numbers in 64 bits, lists of them as bytes, at most 4 KiB
                array = np.asarray(x, np.int64 if not isinstance(x, float) else np.float32).reshape(-1)
                assert kind == "constant"
                assert array.nbytes <= 4096
                held.append(array)
                addresses.append(array.ctypes.data)
                ranges += [array.ctypes.data, array.nbytes, 0]
        groups = []
        for n, size in zip(threads, group_size, strict=True):
            assert n > 0, "the grid is not empty"
            assert n % size == 0, "the grid is whole threadgroups"
            groups.append(n // size)
        assert int(np.prod(group_size)) <= 1024
        pad = [1] * (3 - len(groups))
        passed = (ctypes.c_void_p * len(addresses))(*addresses)
        ranges += [ctypes.addressof(passed), ctypes.sizeof(passed), 0]
        runtime = self.emulator.runtime
        runtime.emu_check(int(self.emulator.mode == "check"))
        runtime.emu_buffers((ctypes.c_uint64 * len(ranges))(*ranges), len(ranges) // 3)
        error = runtime.emu_run(
            self.entry, passed, (ctypes.c_uint * 3)(*groups, *pad), (ctypes.c_uint * 3)(*group_size, *pad)
        )
        self.emulator.launches.append(self.name)
        if error:
            raise RuntimeError(f"{self.name}: {error.decode()}")


class Library:
    """What `compile_shader` returns."""

    def __init__(self, emulator: Emulator, source: str):
        text, self.kinds = translate(source)
        extra = ["-fsanitize=thread"] if emulator.mode == "check" else []
        self.emulator = emulator
        self.library = ctypes.CDLL(str(_build(text, emulator.mode, "kernel", *extra)))

    def __getattr__(self, name: str) -> Kernel:
        if name not in self.kinds:
            raise AttributeError(name)
        return Kernel(self.emulator, self.library, name, self.kinds[name])


class Emulator:
    """Stands in for torch.mps.

    Attributes:
        change: applied to every source before it is compiled, for tests that plant an error.
        launches: the names of the kernels that ran.
    """

    def __init__(self, mode: str = "fast", change: Any = None):
        assert mode in MODES
        self.mode, self.change = mode, change or (lambda text: text)
        self.runtime = _runtime(mode)
        self.launches: list[str] = []

    def compile_shader(self, source: str) -> Library:
        return Library(self, self.change(source))

    def synchronize(self) -> None:
        pass

    def counts(self) -> Counts:
        raw = (ctypes.c_ulong * 16)()
        self.runtime.emu_counts(raw)
        return Counts(*raw[:14], raw[15])


if sys.platform != "linux":
    raise ImportError("the emulator is for Linux; a Mac has Metal")
