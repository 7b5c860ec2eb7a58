"""ggml's shared libraries, as ggml-python or llama-cpp-python build them: its types and their functions.

    pip install anydelta[gguf]

Only functions of ggml's public headers are called: by ctypes, or by anydelta._core through their addresses.
"""

from __future__ import annotations

import ctypes as C
import importlib.util
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..core.native import core
from ..core.probe import fails, package_version

PACKAGES = {"ggml": "ggml-python", "llama_cpp": "llama-cpp-python"}
"""Modules with ggml's shared libraries in their folder lib, and the package of each."""

F32, F16, BF16 = 0, 1, 30
"""Types of ggml that are plain numbers, not blocks (enum ggml_type)."""

TYPES = 42
"""The number of types in ggml since OLDEST. Later ones are appended (GGML_TYPE_COUNT)."""

OLDEST = (0, 15)
"""The first release with all of them."""

_NO_NUMBERS = ("q8_1", "q8_K")
"""Types of inputs, which no file stores weights in."""


class GgmlError(RuntimeError):
    """There is no usable ggml. The text says what to do."""


class _Traits(C.Structure):
    """struct ggml_type_traits of ggml.h, up to the last field that is read here."""

    _fields_ = (
        ("type_name", C.c_char_p),
        ("blck_size", C.c_int64),
        ("blck_size_interleave", C.c_int64),
        ("type_size", C.c_size_t),
        ("is_quantized", C.c_bool),
        ("to_float", C.c_void_p),
        ("from_float_ref", C.c_void_p),
    )


class _CpuTraits(C.Structure):
    """struct ggml_type_traits_cpu of ggml-cpu.h."""

    _fields_ = (
        ("from_float", C.c_void_p),
        ("vec_dot", C.c_void_p),
        ("vec_dot_type", C.c_int),
        ("nrows", C.c_int64),
    )


@dataclass(frozen=True)
class Kind:
    """A type of ggml that weights are stored in."""

    type: int
    name: str
    """As in names of files: Q4_K."""
    values: int
    """Numbers in a block."""
    bytes: int
    quantised: bool

    def row_bytes(self, n: int) -> int:
        return n // self.values * self.bytes


@dataclass(frozen=True)
class Library:
    """ggml in this process."""

    base: C.CDLL
    cpu: C.CDLL
    version: str
    kinds: Mapping[int, Kind]
    """Types whose products the CPU computes, by their numbers."""
    to_bfloat16: int
    """The address of ggml_cpu_fp32_to_bf16."""
    to_float16: int

    def kind(self, name: str) -> Kind | None:
        return next((k for k in self.kinds.values() if k.name.lower() == name.lower()), None)

    def needs_matrix(self, kind: Kind) -> bool:
        """Whether quantising to this type needs the importance of the columns (an importance matrix)."""
        return bool(self.base.ggml_quantize_requires_imatrix(kind.type))

    def quantise(self, kind: Kind, rows: Any, importance: Any = None) -> Any:
        """Blocks [rows, bytes] of float32 rows [rows, n]; n must be a multiple of `kind.values`.

        `importance`: float32 [n], the weight of each column; required if `needs_matrix(kind)`.
        """
        import numpy as np

        rows = np.ascontiguousarray(rows, np.float32)
        out = np.zeros((rows.shape[0], kind.row_bytes(rows.shape[1])), np.uint8)
        self.base.ggml_quantize_chunk(
            kind.type, rows.ctypes.data, out.ctypes.data, 0, rows.shape[0], rows.shape[1],
            None if importance is None else importance.ctypes.data,
        )  # fmt: skip
        return out


def folders() -> dict[str, Path]:
    """The folders with libraries of the installed packages, by package."""
    found = {}
    for module, package in PACKAGES.items():
        spec = importlib.util.find_spec(module)
        if spec is not None and spec.submodule_search_locations:
            found[package] = Path(next(iter(spec.submodule_search_locations))) / "lib"
    return found


def usable(module: str, name: str) -> Path:
    """The first folder whose libraries the module's function or class `name` can open.

    Each is tried in another process first: a library built for another CPU ends the process.

    Raises:
        GgmlError: there is none; with the reason for each.
    """
    reasons = []
    for package, folder in folders().items():
        why = fails(f"from pathlib import Path; from {module} import {name}; {name}(Path({str(folder)!r}))")
        if why is None:
            return folder
        reasons.append(f"{package} {package_version(package)} ships no usable ggml: {why}")
    raise GgmlError("; ".join(reasons) or f"neither {' nor '.join(PACKAGES.values())} is installed")


def load(folder: Path) -> tuple[C.CDLL, C.CDLL]:
    """The libraries ggml-base and ggml-cpu."""
    end = {"darwin": "dylib", "win32": "dll"}.get(sys.platform, "so")
    start = "" if sys.platform == "win32" else "lib"
    base, cpu = (C.CDLL(str(folder / f"{start}ggml-{part}.{end}")) for part in ("base", "cpu"))
    return base, cpu


@cache
def library() -> Library:
    """ggml, loaded once.

    Raises:
        GgmlError: it is not installed, or does not run on this CPU.
    """
    if core is None:
        raise GgmlError("ggml: requires the extension anydelta._core; got a source tree that was not built")
    try:
        return _open(usable(__name__, _open.__name__))
    except GgmlError as error:
        raise GgmlError(
            f"ggml: requires ggml's library; got: {error}. Run: pip install 'anydelta[gguf]'"
        ) from None


def _open(folder: Path) -> Library:
    base, cpu = load(folder)
    base.ggml_get_type_traits.restype = C.POINTER(_Traits)
    cpu.ggml_get_type_traits_cpu.restype = C.POINTER(_CpuTraits)
    base.ggml_version.restype = C.c_char_p
    base.ggml_quantize_chunk.restype = C.c_size_t
    base.ggml_quantize_chunk.argtypes = (
        C.c_int, C.c_void_p, C.c_void_p, C.c_int64, C.c_int64, C.c_int64, C.c_void_p,
    )  # fmt: skip
    base.ggml_quantize_requires_imatrix.restype = C.c_bool
    version = base.ggml_version().decode()
    if tuple(int(n) for n in re.findall(r"\d+", version)[:2]) < OLDEST:
        raise GgmlError(f"ggml: requires ggml {'.'.join(map(str, OLDEST))} or later; got {version}")
    cpu.ggml_cpu_init()  # its tables
    all_ = {i: base.ggml_get_type_traits(i).contents for i in range(TYPES)}
    of_cpu = {i: cpu.ggml_get_type_traits_cpu(i).contents for i in range(TYPES)}
    kinds = {}
    for i, traits in all_.items():
        name, mine = (traits.type_name or b"").decode(), of_cpu[i]
        if not traits.type_size or not mine.vec_dot or name in _NO_NUMBERS:
            continue  # removed, or never in a file
        x_type = mine.vec_dot_type
        core.learn_kind(
            i, traits.to_float or 0, mine.vec_dot, traits.blck_size, traits.type_size,
            x_type, of_cpu[x_type].from_float or 0 if x_type != F32 else 0,
            all_[x_type].blck_size, all_[x_type].type_size,
        )  # fmt: skip
        kinds[i] = Kind(i, name.upper(), traits.blck_size, traits.type_size, traits.is_quantized)
    narrow = [C.cast(getattr(cpu, f"ggml_cpu_fp32_to_{n}"), C.c_void_p).value or 0 for n in ("bf16", "fp16")]
    return Library(base, cpu, version, kinds, *narrow)
