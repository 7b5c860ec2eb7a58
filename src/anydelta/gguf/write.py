"""Write a model of Transformers as a GGUF file, for llama.cpp and for Transformers: `anydelta gguf write`.

The file is written under another name and renamed when it is complete. Matrices are packed one after the other, so only
one of them is in memory besides the model.
"""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..ggml.library import Kind, Library, library
from ..terminal import Refused
from . import names
from .mixes import MIXES, choose, is_matrix

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Told = Callable[[str, float], None]


@dataclass
class Summary:
    """What was written."""

    path: str
    type: str
    bytes: int
    parameters: int
    matrices: dict[str, int]
    """Numbers of matrices, by type."""
    mtp_layers: int


def types() -> list[str]:
    """The types that a file can be named after."""
    ggml = library()
    return [*MIXES, *(k.name for k in ggml.kinds.values() if not ggml.needs_matrix(k))]


def missing() -> str | None:
    """Why files cannot be written here, or None."""
    return (
        None if importlib.util.find_spec("gguf") else "gguf is not installed (pip install 'anydelta[gguf]')"
    )


def write(
    model: PreTrainedModel,
    path: Path,
    mix: str,
    *,
    name: str = "",
    tokenizer: PreTrainedTokenizerBase | None = None,
    mtp: Any = None,
    tell: Told = lambda text, done: None,
    threads: int = 1,
) -> Summary:
    """Write a file.

    Args:
        mix: one of `types()`.
        tokenizer: the model's tokenizer; without one the file has placeholder words.
        mtp: Transformers' MtpModel of the model.

    Raises:
        Refused: a model, a type or a tokenizer that a file cannot hold, or too little disk space.
    """
    if why := missing():
        raise Refused(f"gguf write requires the package gguf; got: {why}")
    ggml, config = library(), model.config
    if config.model_type not in names.ARCHITECTURES:
        known = ", ".join(names.ARCHITECTURES)
        raise Refused(f"gguf write requires a model of {known}; got {config.model_type}")
    if why := names.irregular(config):
        raise Refused(f"gguf write requires full attention in every n-th layer; got {why}")
    if mix not in types():
        raise Refused(f"gguf write requires --type of {', '.join(types())}; got {mix!r}")
    listed = list(names.tensors(model, mtp))
    kinds = {k.name: k for k in ggml.kinds.values()}
    chosen = choose(
        mix,
        [(t.name, t.shape[-1]) for t in listed if is_matrix(t.name, len(t.shape))],
        {n: k.values for n, k in kinds.items()},
    )
    of = {t.name: kinds[chosen.get(t.name, "F32")] for t in listed}
    size = sum(of[t.name].row_bytes(t.shape[-1]) * (int(np.prod(t.shape[:-1])) or 1) for t in listed)
    free = shutil.disk_usage(path.resolve().parent).free
    if free < 1.1 * size:
        raise Refused(
            f"gguf write requires {size / 2**30:.1f} GiB of disk for {path}; got {free / 2**30:.1f} GiB free"
        )
    whole = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        _write(
            whole,
            model,
            listed,
            of,
            mix=mix,
            name=name,
            tokenizer=tokenizer,
            mtp=mtp,
            ggml=ggml,
            tell=tell,
            threads=threads,
        )
        whole.replace(path)
    finally:
        whole.unlink(missing_ok=True)
    counts: dict[str, int] = {}
    for t in listed:
        if t.name in chosen:
            counts[of[t.name].name] = counts.get(of[t.name].name, 0) + 1
    return Summary(
        str(path),
        mix,
        path.stat().st_size,
        sum(int(np.prod(t.shape)) for t in listed),
        counts,
        0 if mtp is None else len(mtp.layers),
    )


def _write(
    path: Path,
    model: PreTrainedModel,
    listed: list[names.Tensor],
    of: dict[str, Kind],
    *,
    mix: str,
    name: str,
    tokenizer: PreTrainedTokenizerBase | None,
    mtp: Any,
    ggml: Library,
    tell: Told,
    threads: int,
) -> None:
    gguf = importlib.import_module("gguf")
    config = model.config
    writer = gguf.GGUFWriter(path, names.ARCHITECTURES[config.model_type])
    writer.add_name(name or config.model_type)
    number = getattr(gguf.LlamaFileType, f"MOSTLY_{mix}", None)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32 if mix == "F32" or number is None else number)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    vocabulary = model.get_input_embeddings().num_embeddings
    names.write_sizes(writer, config, vocabulary, 0 if mtp is None else len(mtp.layers))
    write_words(writer, gguf, tokenizer, vocabulary, config)
    for t in listed:
        kind = of[t.name]
        shape = (*t.shape[:-1], kind.row_bytes(t.shape[-1])) if kind.type else t.shape
        writer.add_tensor_info(
            t.name,
            shape,
            np.dtype(np.uint8 if kind.type else np.float32),
            int(np.prod(t.shape[:-1])) * kind.row_bytes(t.shape[-1]),
            gguf.GGMLQuantizationType(kind.type),
        )
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        done, total = 0, sum(int(np.prod(t.shape)) for t in listed)
        with ThreadPoolExecutor(threads) as pool:
            for t in listed:
                tell(t.name, done / total)
                writer.write_tensor_data(_stored(t, of[t.name], ggml, pool))
                done += int(np.prod(t.shape))
    finally:
        writer.close()


def _stored(t: names.Tensor, kind: Kind, ggml: Library, pool: ThreadPoolExecutor) -> NDArray[Any]:
    """A tensor as the file stores it."""
    import torch

    with torch.no_grad():
        x: NDArray[np.float32] = t.get().detach().float().contiguous().numpy()
    if not kind.type:
        return x
    rows = x.reshape(-1, x.shape[-1])
    parts = [rows[i : i + 256] for i in range(0, len(rows), 256)]
    return np.concatenate(list(pool.map(lambda part: ggml.quantise(kind, part), parts)))


# ---- The tokenizer

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""Types of tokens (llama_token_type)."""


def write_words(
    writer: Any, gguf: Any, tokenizer: PreTrainedTokenizerBase | None, vocabulary: int, config: Any
) -> None:
    """The tokenizer's keys.

    Raises:
        Refused: a file can only describe byte-level BPE with a known way to split text.
    """
    if tokenizer is None:
        words, kinds, merges, split = _no_words(vocabulary)
        template = None
    else:
        words, kinds, merges, split = _words(tokenizer, vocabulary)
        template = getattr(tokenizer, "chat_template", None)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(words)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_add_bos_token(False)
    for key in ("bos", "eos", "pad"):
        own = getattr(config, f"{key}_token_id", None)
        number = own if own is not None else getattr(tokenizer, f"{key}_token_id", None)
        if isinstance(number, list):
            number = number[0]
        if number is not None:
            getattr(writer, f"add_{key}_token_id")(number)
    if template:
        writer.add_chat_template(template)


def _letters() -> list[str]:
    """The characters that stand for the 256 bytes in a byte-level vocabulary."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return list(bytes_to_unicode().values())


def _no_words(vocabulary: int) -> tuple[list[str], list[int], list[str], str]:
    letters = _letters()
    real = [*letters, letters[0] + letters[1]][:vocabulary]
    words = [*real, *(f"[PAD{i}]" for i in range(len(real), vocabulary))]
    kinds = [NORMAL] * len(real) + [UNUSED] * (vocabulary - len(real))
    return words, kinds, [f"{letters[0]} {letters[1]}"], "gpt-2"


def _words(
    tokenizer: PreTrainedTokenizerBase, vocabulary: int
) -> tuple[list[str], list[int], list[str], str]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise Refused(
            f"gguf write requires a tokenizer of the tokenizers library; got {type(tokenizer).__name__}"
        )
    told = importlib.import_module("json").loads(backend.to_str())
    inner = told["model"]
    if inner.get("type") != "BPE" or '"ByteLevel"' not in backend.to_str():
        raise Refused(f"gguf write requires a byte-level BPE tokenizer; got {inner.get('type')}")
    by_number = {number: word for word, number in tokenizer.get_vocab().items()}
    added = {x["id"]: x for x in told["added_tokens"]}
    words, kinds = [], []
    for i in range(vocabulary):
        words.append(added[i]["content"] if i in added else by_number.get(i, f"[PAD{i}]"))
        kinds.append(
            (CONTROL if added[i]["special"] else USER_DEFINED)
            if i in added
            else NORMAL
            if i in by_number
            else UNUSED
        )
    merges = [m if isinstance(m, str) else " ".join(m) for m in inner["merges"]]
    return words, kinds, merges, _split(told)


def _split(told: dict[str, Any]) -> str:
    """llama.cpp's name for the way that text is split before the merges."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    def patterns(x: object) -> Iterator[str]:
        if isinstance(x, dict):
            if x.get("type") == "Split":
                yield x["pattern"].get("Regex", "")
            for part in x.values():
                yield from patterns(part)
        elif isinstance(x, list):
            for part in x:
                yield from patterns(part)

    own = list(patterns(told.get("pre_tokenizer")))
    return next((str(name) for name, pattern in GGUF_PRE_TOKENIZER_SPLITS.items() if pattern in own), "gpt-2")
