"""Open a GGUF file with Transformers and keep its weights packed, or say in one sentence what is wrong with it."""

from __future__ import annotations

import importlib
import importlib.util
import os
import struct
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.late import late
from ..integrations import transformers as plug
from ..terminal import Refused, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..integrations.transformers import gguf as files
else:
    files = late("anydelta.integrations.transformers.gguf")

SINCE = "5.23"
"""The first Transformers that loads these files itself."""

HEADROOM = 300 << 20
"""The least memory of a model beyond the size of its file, in bytes."""

WORDS = ("tokenizer.ggml.model", "tokenizer.ggml.tokens", "tokenizer.ggml.merges")
"""The keys that Transformers needs for a byte-level tokenizer."""


@dataclass(frozen=True)
class Header:
    """What a file says about itself."""

    path: Path
    architecture: str
    name: str
    bytes: int
    parameters: int
    kind: str
    """The type in the file's name: Q4_K_M."""
    types: Mapping[str, int]
    """The number of tensors of each type of ggml."""
    mtp_layers: int


def is_gguf(name: str) -> bool:
    return name.lower().endswith(".gguf")


def check(path: Path) -> Header:
    """Check a file before anything is loaded.

    Raises:
        Refused: it is cut off, not GGUF, of an unknown model, or larger than the memory.
    """
    if not path.is_file():
        raise Refused(f"requires a GGUF file; got {path}, which does not exist")
    if path.suffix != ".gguf":
        raise Refused(f"requires a file whose name ends in .gguf, for Transformers; got {path}. Rename it")
    if importlib.util.find_spec("transformers.integrations.gguf") is None:
        version = importlib.import_module("transformers").__version__
        raise Refused(f"requires Transformers {SINCE} or later for GGUF files; got {version}")
    reader = importlib.import_module("transformers.integrations.gguf.reader")
    known = importlib.import_module("transformers.integrations.gguf.gguf_conversion_mapping").GGUF_ARCHS
    files.learn_types()
    size = path.stat().st_size
    with path.open("rb") as raw:
        start = raw.read(24)
    if start[:4] != b"GGUF":
        raise Refused(
            f"requires a GGUF file; got {path}, which begins with other bytes. Is it a pointer of Git LFS?"
        )
    if len(start) == 24 and int.from_bytes(start[4:8], "little") >= 1 << 16:
        raise Refused(f"requires a GGUF file in little-endian byte order; got {path}, which is big-endian")
    try:
        metadata, _ = reader.read_gguf_metadata(str(path))
        architecture = str(metadata["general.architecture"])
        if architecture not in known:
            names = ", ".join(sorted(known))
            raise Refused(
                f"requires a GGUF file of {names}, which Transformers keeps in blocks; got {path} of {architecture}"
            )
        if (parts := metadata.get("split.count", 1)) > 1:
            raise Refused(
                f"requires a GGUF file in one piece; got {path}, one of {parts}. Join them: llama-gguf-split --merge"
            )
        header = reader.GgufHeader.from_file(str(path))
    except Refused:
        raise
    except (struct.error, IndexError, UnicodeDecodeError, KeyError, OverflowError, MemoryError):
        raise Refused(
            f"requires a whole GGUF file; got {path} of {size} bytes, cut off or damaged. Download it again"
        ) from None
    except ValueError as error:
        raise Refused(f"requires a GGUF file that Transformers reads; got: {first_line(error)}") from None
    end = max((header.data_start + t.offset + t.nbytes for t in header.tensors), default=0)
    if end > size:
        raise Refused(
            f"requires a whole GGUF file; got {path} of {size} bytes where its header tells of {end}. Download it again"
        )
    if lacking := [key for key in WORDS if key not in metadata]:
        raise Refused(f"requires a GGUF file with its tokenizer; got {path} without {lacking[0]}")
    free = available_memory()
    if free is not None and size + HEADROOM > free:
        raise Refused(
            f"requires {(size + HEADROOM) / 2**30:.1f} GiB of memory for {path}; got {free / 2**30:.1f} GiB available"
        )
    names_ = importlib.import_module("transformers.integrations.gguf.dequant").GGML_NAME
    types: dict[str, int] = {}
    for t in header.tensors:
        word = {0: "F32", 1: "F16", 30: "BF16"}.get(t.ggml_type) or names_.get(t.ggml_type, str(t.ggml_type))
        types[word] = types.get(word, 0) + 1
    return Header(
        path,
        architecture,
        str(metadata.get("general.name", path.stem)),
        size,
        sum(_count(t.shape) for t in header.tensors),
        _kind(metadata.get("general.file_type"), types),
        types,
        int(metadata.get(f"{architecture}.nextn_predict_layers", 0)),
    )


FILE_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S", 12: "Q3_K_M",
    13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 25: "IQ4_NL", 30: "IQ4_XS",
    32: "BF16",
}  # fmt: skip
"""general.file_type of common files (llama_ftype)."""


def _kind(number: object, types: Mapping[str, int]) -> str:
    """The name of a file's type. If it is not listed, the type of most of its matrices."""
    quantised = {name: n for name, n in types.items() if name not in ("F32", "F16", "BF16")}
    return (
        FILE_TYPES.get(number, "")
        if isinstance(number, int) and number in FILE_TYPES
        else max(quantised or types, key=lambda name: (quantised or types)[name])
    )


def _count(shape: tuple[int, ...]) -> int:
    n = 1
    for size in shape:
        n *= size
    return n


def available_memory() -> int | None:
    """Available bytes, or None if the system does not say."""
    try:
        with open("/proc/meminfo") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) << 10
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None


def load(
    path: Path, dtype: str = "auto", packed: bool = True
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and the tokenizer of a file that `check` has passed.

    Args:
        packed: keep the weights packed, as `enable()` does. False: Transformers unpacks them.

    Raises:
        Refused: Transformers does not load it.
    """
    transformers = importlib.import_module("transformers")
    # The whole path: for a bare name Transformers first looks in the current folder.
    folder, given = str(path.resolve().parent), dict(gguf_file=str(path.resolve()))
    place = dict(device_map="cpu") if packed else {}  # even with a GPU, to which Transformers would move it
    try:
        with plug.enable() if packed else nullcontext():
            model, report = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, output_loading_info=True, **given, **place
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **given)
    except Exception as error:  # Transformers raises any type; the sentence names it
        text = f"no {error}" if isinstance(error, KeyError) else first_line(error)
        if "ignore_mismatched_sizes" in str(error):
            text = "its tensors have other shapes than its header says"
        raise Refused(f"requires a GGUF file that Transformers loads; got {path}: {text}") from None
    if missing := sorted(report["missing_keys"]):
        raise Refused(
            f"requires every tensor of {type(model).__name__}; got {path} without {len(missing)} of them, such as "
            f"{missing[0]}. Is the file whole, and its header its own?"
        )
    return model.eval(), tokenizer
