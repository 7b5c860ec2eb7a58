"""Structs that hosts pack and kernels read. Each is defined once, here; its text in a device's language is generated.

`Struct.text` gives the members for a language, `bits` the constants of a field of flags. They are put before the device
code: by hosts at run time, by CMake at build time (scripts/generate_arguments.py). Only the standard library is used,
because the build reads this too.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources


@cache
def source(backend: str, file: str) -> str:
    """The text of a file of device code."""
    return (resources.files("anydelta") / "backends" / backend / file).read_text(encoding="utf-8")


TYPES: dict[str, dict[str, str]] = {
    "opencl": {"Q": "ulong", "q": "long", "i": "int", "I": "uint", "f": "float"},
    "metal": {"Q": "ulong", "q": "long", "i": "int", "I": "uint", "f": "float"},
    "c++": {"Q": "std::uint64_t", "q": "std::int64_t", "i": "int", "I": "unsigned", "f": "float"},
    "glsl": {"i": "int", "I": "uint", "f": "float"},
    "wgsl": {"i": "i32", "I": "u32", "f": "f32"},
}
"""Each language's names of number types, by their letters in Python's struct."""


class Struct:
    """Members in order: (letter of Python's struct, name, how many)."""

    def __init__(self, *members: tuple[str, str, int]):
        self.members = members
        self._packer = struct.Struct("=" + "".join(f"{n}{letter}" for letter, _, n in members))
        self.size = self._packer.size
        self._names = {name for _, name, _ in members}

    def pack(self, values: Mapping[str, object]) -> bytes:
        """The bytes of a struct. Members without a value are zero; a value without a member is an error."""
        if unknown := values.keys() - self._names:
            raise KeyError(f"no member {', '.join(sorted(unknown))}")
        flat: list[object] = []
        for _, name, n in self.members:
            value = values.get(name, (0,) * n)
            flat += value if isinstance(value, (tuple, list)) else (value,)
        return self._packer.pack(*flat)

    def text(self, language: str) -> str:
        """The members, declared in a device's language."""
        types, end = TYPES[language], "," if language == "wgsl" else ";"
        lines = []
        for letter, name, n in self.members:
            if language == "wgsl":
                lines.append(
                    f"    {name}: {types[letter] if n == 1 else f'array<{types[letter]}, {n}>'}{end}"
                )
            else:
                lines.append(f"    {types[letter]} {name}{f'[{n}]' if n > 1 else ''}{end}")
        return "\n".join(lines) + "\n"


def bits(names: Sequence[str], form: str) -> str:
    """Constants of a field of flags, the lowest bit first. `form` has places for {name} and {value}."""
    return "".join(form.format(name=name.upper(), value=1 << i) + "\n" for i, name in enumerate(names))


def flags(names: Sequence[str], on: Mapping[str, bool]) -> int:
    """A field of flags. Names that `on` lacks are off."""
    return sum(1 << i for i, name in enumerate(names) if on.get(name))


ARRAYS = (
    "q", "k", "v", "g", "beta", "state_in", "A_log", "dt_bias", "mask", "cu_seqlens", "state_indices", "o",
    "state_out", "snapshots",
)  # fmt: skip
"""The arrays of OpenCL's and SYCL's kernels, in the order of their addresses."""

PARAMS = Struct(
    # strides in elements, outermost axis first; those of states are [.., h, K, V] whatever the layout
    ("q", "q", 4), ("q", "k", 4), ("q", "v", 4), ("q", "g", 4), ("q", "beta", 3), ("q", "o", 4),
    ("q", "state_in", 4), ("q", "state_out", 4), ("q", "snapshots", 5),
    ("q", "mask", 2), ("q", "a_log", 1), ("q", "dt_bias", 2), ("q", "cu", 1), ("q", "indices", 1), ("q", "rows", 2),
    ("q", "T", 1),
    ("i", "H", 1), ("i", "HV", 1), ("i", "k_rows", 1), ("i", "V", 1), ("i", "N", 1), ("i", "Ks", 1),
    ("i", "qkv_type", 1), ("i", "g_type", 1), ("i", "beta_type", 1), ("i", "a_log_type", 1), ("i", "dt_bias_type", 1),
    ("i", "state_type", 1),
    ("i", "tiled", 1), ("i", "decay", 1), ("i", "has_lower_bound", 1), ("i", "logit", 1), ("i", "l2norm", 1),
    ("i", "cu64", 1), ("i", "indices64", 1), ("i", "rows64", 1), ("i", "out_dense", 1), ("i", "flags", 1),
    ("f", "scale", 1), ("f", "eps", 1), ("f", "lower_bound", 1), ("f", "padding", 1),
)  # fmt: skip
"""Params of OpenCL, SYCL and Metal. k_rows is K, because K is a macro there."""

CALL = Struct(
    ("I", "T", 1), ("I", "H", 1), ("I", "HV", 1), ("I", "K", 1), ("I", "V", 1), ("I", "N", 1), ("I", "Ks", 1),
    ("I", "flags", 1), ("f", "scale", 1), ("f", "eps", 1), ("f", "lower_bound", 1),
    # where the inputs begin, in words of 4 bytes
    ("I", "q", 1), ("I", "k", 1), ("I", "v", 1), ("I", "g", 1), ("I", "beta", 1), ("I", "A_log", 1),
    ("I", "dt_bias", 1), ("I", "mask", 1), ("I", "cu", 1), ("I", "indices", 1), ("I", "rows", 1),
    # first elements of the states and the snapshots
    ("I", "s_in", 1), ("I", "s_out", 1), ("I", "snap", 1),
)  # fmt: skip
"""Call of Vulkan and WebGPU."""

VULKAN_FLAGS = (
    "packed", "in_indexed", "out_indexed", "masked", "has_state", "write_state", "tiled", "vk", "linear", "raw",
    "lower", "dt_bias", "logit", "l2norm", "skips", "zero_skipped", "chunked", "snapshot_rows",
)  # fmt: skip
WEBGPU_FLAGS = (
    "packed", "indexed", "masked", "has_state", "tiled", "vk", "linear", "raw", "lower", "dt_bias", "logit", "l2norm",
    "skips", "snapshot_rows",
)  # fmt: skip
METAL_FLAGS = (
    "has_state", "writes_state", "has_dt_bias", "masked", "packed", "pooled", "rows", "head", "tail", "in_dense",
)  # fmt: skip

OF_OPTIONS = {"logit": "beta_is_logit", "l2norm": "qk_l2norm"}
"""The options that become members or flags unchanged, by their names there."""
