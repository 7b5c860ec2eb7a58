"""Open a checkpoint with Transformers, or say in one sentence what is wrong with it and what to do.

Transformers answers some faults with a traceback, a page of keys or a random layer. These faults are found first: in
the folder, its config.json, the class and every weight file. After loading, no tensor may still be as initialised.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import math
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.json_file import read_json
from ..terminal import Refused
from . import gguf_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = ("auto", "float32", "bfloat16", "float16")
"""Values of `dtype`. "auto" takes the checkpoint's."""

REPOSITORY_MODEL = Path(__file__).resolve().parents[3] / "examples" / "tiny_model"
"""Where the repository keeps its model, if this file is in a checkout."""

_HUB_NAME = re.compile(r"\w[\w.-]{0,95}(/\w[\w.-]{0,95})?", re.ASCII)

_GENERATION: dict[str, Any] = {
    **dict.fromkeys(("do_sample", "use_cache", "return_dict_in_generate", "output_scores", "use_mtp"), bool),
    **dict.fromkeys(
        ("max_length", "max_new_tokens", "min_length", "min_new_tokens", "top_k", "no_repeat_ngram_size", "num_beams",
         "num_return_sequences", "prompt_lookup_num_tokens", "num_assistant_tokens", "assistant_early_exit",
         "bos_token_id", "eos_token_id", "pad_token_id"),
        int,
    ),
    **dict.fromkeys(
        ("temperature", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty",
         "length_penalty", "guidance_scale", "max_time"),
        float,
    ),
}  # fmt: skip
"""Fields of generation_config.json that are checked, and their types; an id may be a list of ids."""

_LFS = b"version https://git-lfs"
"""The start of the text that replaces a large file in a clone without Git LFS."""

INSTALL = "pip install 'anydelta[transformers]'"


class CheckpointError(Refused):
    """A model that cannot be opened. The text is one sentence, then what to do."""


@dataclass(frozen=True)
class Opened:
    """A model ready to run, in eval mode on the CPU."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def default_model() -> str:
    """The repository's model, in the clone of this package or in the current folder.

    Raises:
        CheckpointError: neither is a clone.
    """
    for folder in (REPOSITORY_MODEL, Path("examples/tiny_model")):
        if (folder / "config.json").is_file():
            return str(folder)
    raise CheckpointError(
        "requires --model: the default is examples/tiny_model of a clone of anydelta; got a folder without it. "
        "Give --model a folder or a name on the Hugging Face hub, or run in a clone"
    )


def need_packages() -> None:
    """Check that torch and Transformers are installed, without importing them.

    Raises:
        CheckpointError: one is not.
    """
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        raise CheckpointError(f"requires {' and '.join(missing)}; got no such package. Run: {INSTALL}")


def open_checkpoint(
    name: str, dtype: str = "auto", trust_remote_code: bool = False, packed: bool = True
) -> Opened:
    """The model and the tokenizer of a folder, of a GGUF file, or of a name on the Hugging Face hub.

    The weights of a GGUF file stay packed, unless `packed` is False: then Transformers unpacks them.
    `trust_remote_code` runs the Python code that a checkpoint brings.

    Raises:
        CheckpointError: the model cannot be loaded completely.
    """
    need_packages()
    if dtype not in DTYPES:
        raise CheckpointError(f"requires a dtype of {', '.join(DTYPES)}; got {dtype!r}")
    try:
        folder = Path(name).expanduser()
        is_folder, is_file = folder.is_dir(), folder.exists()
    except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL, no such user
        raise CheckpointError(
            f"requires a folder, or a hub name; got {_shown(name)}: {getattr(error, 'strerror', None) or _line(error)}"
        ) from None
    if is_folder:
        name = str(folder)
        _check_folder(folder)
    elif gguf_file.is_gguf(name):
        with quiet():
            path = gguf_file.check(folder).path
            return Opened(name, *gguf_file.load(path, dtype, packed))
    elif is_file:
        raise CheckpointError(
            f"requires a folder with config.json and safetensors, a .gguf file, or a hub name; got the file {name}"
        )
    elif name.count("/") > 1 or not _HUB_NAME.fullmatch(name):
        raise CheckpointError(
            f"requires a folder, or a hub name such as Qwen/Qwen3.5-0.8B; got {_shown(name)}, which does not exist"
        )
    else:
        _check_hub(name)
    with quiet():
        return Opened(
            name, _load_model(name, dtype, trust_remote_code), _load_tokenizer(name, trust_remote_code)
        )


# ---- Before loading


def _check_folder(folder: Path) -> None:
    """Check that a folder has a config.json, and that its weight files are complete and its other files readable."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"requires a checkpoint folder; got {folder} without a config.json. Give the folder that "
            "save_pretrained or the hub wrote"
        )
    config = _read(folder / "config.json")
    for name in ("generation_config.json", "tokenizer_config.json", "tokenizer.json"):
        if (folder / name).exists():  # Transformers ignores a generation_config.json that it cannot read
            found = _read(folder / name)
            if name == "generation_config.json":
                _check_generation(folder / name, found)
    for file in _weight_files(folder):
        _check_whole(file, quantised=bool(config.get("quantization_config")))


def _read(path: Path) -> dict[str, object]:
    """The object in a JSON file."""
    try:
        found = read_json(path, infinities=True)
        if isinstance(found, dict):
            return found
        why = f"it holds a {type(found).__name__}, not an object"
    except ValueError as error:
        why = str(error)
    raise CheckpointError(f"requires a readable {path.name}; got {path}: {why}")


def _check_generation(path: Path, found: dict[str, Any]) -> None:
    """Check the types of the fields that generate() uses: Transformers checks them too late, or never."""
    for name, value in found.items():
        kind = _GENERATION.get(name)
        if kind is None or value is None:
            continue
        if name.endswith("_token_id"):
            ids = value if isinstance(value, list) else [value]
            right = all(type(i) is int and abs(i) < 2**31 for i in ids)
        elif kind is float:
            right = type(value) in (int, float) and math.isfinite(value)
        else:
            right = type(value) is kind and -(2**31) < value < 2**31
        if not right:
            what = {bool: "true or false", int: "a whole number", float: "a number"}[kind]
            raise CheckpointError(f"requires {name} to be {what} in {path}; got {_shown(repr(value))}")


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        files = _read(index).get("weight_map")
        names = sorted(set(map(str, files.values()))) if isinstance(files, dict) else []
        wrong = [n for n in names if not re.fullmatch(r"[^/\\\x00]{1,255}", n)]
        if not names or wrong:
            got = f"the file name {_shown(repr(wrong[0]))}" if wrong else "none"
            raise CheckpointError(f"requires a weight_map with the names of files in {index}; got {got}")
        absent = [n for n in names if not (folder / n).is_file()]
        if absent:
            raise CheckpointError(
                f"requires all {len(names)} weight files of {index.name}; got none named {absent[0]}"
                + (f" and {len(absent) - 1} more missing" if len(absent) > 1 else "")
                + ". Download the checkpoint again"
            )
        return [folder / n for n in names]
    found = sorted(folder.glob("*.safetensors"))
    if not found and not any(folder.glob("pytorch_model*.bin")):
        raise CheckpointError(
            f"requires weights in {folder}; got no *.safetensors file. Is the download complete?"
        )
    return found


def _check_whole(file: Path, quantised: bool) -> None:
    """Check a safetensors file against its header, which gives its length and contents."""
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise CheckpointError(f"requires weight files; got {file}, which is none")
    with file.open("rb") as raw:
        if raw.read(len(_LFS)) == _LFS:
            raise CheckpointError(
                f"requires the weights; got {file}, a pointer of Git LFS. Run: git lfs pull"
            )
    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  it is no dict
                kind = opened.get_slice(name).get_dtype()
                if name.endswith(".weight") and kind[0] in "IUB" and kind != "BF16" and not quantised:
                    raise CheckpointError(
                        "requires weights of a floating-point type, or a quantization_config in config.json; got "
                        f"{name} of type {kind} in {file}"
                    )
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"requires whole weight files; got {file} of {file.stat().st_size} bytes, truncated or damaged "
            f"({_line(error)}). Download it again"
        ) from None


def _check_hub(name: str) -> None:
    """Check that a hub name is cached, or that one quick request finds it (downloads retry for long)."""
    hub = importlib.import_module("huggingface_hub")
    if isinstance(hub.try_to_load_from_cache(name, "config.json"), str):
        return
    here = f"there is no folder {name} here, and "
    try:
        hub.HfApi().model_info(name, timeout=10)
    except hub.errors.GatedRepoError:
        raise CheckpointError(
            f"{here}the hub shows {name} to accepted users only. Accept its terms and run: hf auth login"
        ) from None
    except hub.errors.RepositoryNotFoundError:
        raise CheckpointError(
            f"{here}the Hugging Face hub has no model {name} that it shows you. Check the name"
        ) from None
    except hub.errors.HFValidationError as error:
        raise CheckpointError(f"{here}it is no hub name: {_line(error)}") from None
    except (
        Exception
    ) as error:  # no network, no name server, a proxy's page, offline mode: all are "not reached"
        raise CheckpointError(
            f"{here}the Hugging Face hub was not reached ({type(error).__name__}: {_line(error)}). "
            "Give a folder, or try again with network"
        ) from None


# ---- Loading


def _load_model(name: str, dtype: str, trust: bool) -> PreTrainedModel:
    transformers = importlib.import_module("transformers")
    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=trust)
    except Exception as error:  # Transformers and the hub raise any type; the sentence names it
        if "trust_remote_code" in str(error) and not trust:
            raise CheckpointError(
                f"requires --trust-remote-code for {name}, which comes with Python code; got none. Read the code first"
            ) from None
        raise CheckpointError(
            f"requires a model that Transformers {transformers.__version__} knows; got {name}: {_line(error)}"
        ) from None
    own = trust and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if not own and type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise CheckpointError(
            f"requires a class that writes text (a causal language model); got {name} of model_type "
            f"{config.model_type}, which Transformers has none for"
        )
    try:
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, output_loading_info=True, trust_remote_code=trust
        )
    except Exception as error:
        why = _line(error)
        if "ignore_mismatched_sizes" in str(error):
            why = "its tensors have other shapes than its config.json says"
        raise CheckpointError(f"requires a checkpoint that fits its config.json; got {name}: {why}") from None
    missing = sorted(report["missing_keys"])
    if missing:
        raise CheckpointError(
            f"requires every tensor of {type(model).__name__}; got {name} without {len(missing)} of them, such as "
            f"{missing[0]}. Is config.json of another model, or the checkpoint incomplete?"
        )
    return model.eval()


def _load_tokenizer(name: str, trust: bool) -> PreTrainedTokenizerBase:
    transformers = importlib.import_module("transformers")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=trust)
        if len(tokenizer):
            return tokenizer
        raise ValueError("it has no tokens. Is tokenizer.json missing?")
    except Exception as error:
        raise CheckpointError(
            f"requires a tokenizer beside the model; got {name} without one that loads: {_line(error)}"
        ) from None


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries' reports and warnings off stderr. The important ones become a sentence."""
    log = importlib.import_module("transformers.utils.logging")
    before, disabled = log.get_verbosity(), logging.root.manager.disable
    bar = log.is_progress_bar_enabled()
    log.set_verbosity(logging.CRITICAL)
    logging.disable(logging.CRITICAL)
    if not sys.stderr.isatty():
        log.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        log.set_verbosity(before)
        if bar:
            log.enable_progress_bar()


def _line(error: BaseException) -> str:
    """The first sentence of an error, which may have pages."""
    first, _, others = str(error).strip().partition("\n")
    text = first.strip() or type(error).__name__
    if text.endswith(":") and others:  # the line that it announces
        text += " " + others.strip().partition("\n")[0].strip()
    elif isinstance(error, KeyError):  # its text is only the key
        text = f"no {text}"
    text = text.split(". ", 1)[0].rstrip(".")
    return text if len(text) <= 300 else text[:300] + "…"


def _shown(text: str) -> str:
    """A text, shortened if it is long."""
    return text if len(text) <= 100 else text[:100] + "…"
