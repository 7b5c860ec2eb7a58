"""Open a checkpoint with Transformers, or say in one sentence what is wrong with it and what to do.

What Transformers answers with a traceback, a page of keys or a random layer is looked for before: the folder, its
config.json, the class, every weight file (whole?), and afterwards that no tensor was left as it was initialised.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DTYPES = ("auto", "float32", "bfloat16", "float16")
"""What `dtype` may be; "auto" is what the checkpoint says."""

REPOSITORY_MODEL = Path(__file__).resolve().parents[3] / "examples" / "tiny_model"
"""Where the repository keeps its model, if this file lies in a checkout."""

INSTALL = "pip install 'anydelta[transformers]'"


class CheckpointError(Exception):
    """A model that cannot be opened. The text is one sentence, and what to do."""


@dataclass(frozen=True)
class Opened:
    """A model ready to run, in eval mode on the CPU."""

    name: str
    model: Any
    tokenizer: Any


def default_model() -> str:
    """The repository's model.

    Raises:
        CheckpointError: this is not a checkout.
    """
    if not (REPOSITORY_MODEL / "config.json").is_file():
        raise CheckpointError(
            "requires --model: the default is examples/tiny_model of a checkout of anydelta; got an installed package "
            "without it. Give --model a folder or a name on the Hugging Face hub, or run from a clone"
        )
    return str(REPOSITORY_MODEL)


def need_packages() -> None:
    """Check that torch and Transformers are here, without importing them.

    Raises:
        CheckpointError: one is not.
    """
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        raise CheckpointError(f"requires {' and '.join(missing)}; got no such package. Run: {INSTALL}")


def open_checkpoint(name: str, dtype: str = "auto") -> Opened:
    """The model and the tokenizer of a folder, or of a name on the Hugging Face hub.

    Raises:
        CheckpointError: anything that keeps the model from being loaded whole.
    """
    need_packages()
    if dtype not in DTYPES:
        raise CheckpointError(f"requires a dtype of {', '.join(DTYPES)}; got {dtype!r}")
    folder = Path(name).expanduser()
    if folder.is_dir():
        name = str(folder)
        _check_folder(folder)
    elif folder.exists():
        raise CheckpointError(
            f"requires a folder with config.json and safetensors, or a hub name; got the file {name}"
        )
    elif name.count("/") > 1 or not name or name.startswith((".", "~", "/")) or name.endswith("/"):
        raise CheckpointError(
            f"requires a folder, or a hub name such as Qwen/Qwen3.5-0.8B; got {name}, which does not exist"
        )
    else:
        _check_hub(name)
    with quiet():
        return Opened(name, _load_model(name, dtype), _load_tokenizer(name))


# ---- Before loading


def _check_folder(folder: Path) -> None:
    """A folder must have a config.json, and weight files that are whole."""
    config = folder / "config.json"
    if not config.is_file():
        raise CheckpointError(
            f"requires a checkpoint folder; got {folder} without a config.json. Give the folder that "
            "save_pretrained or the hub wrote"
        )
    try:
        json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"requires a readable config.json; got {config}: {_line(error)}") from None
    for file in _weight_files(folder):
        _check_whole(file)


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(
                f"requires an index with a weight_map; got {index}: {type(error).__name__} {_line(error)}"
            ) from None
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


def _check_whole(file: Path) -> None:
    """A safetensors file says in its header how long it must be."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"requires whole weight files; got {file} of {file.stat().st_size} bytes, truncated or damaged "
            f"({_line(error)}). Download it again"
        ) from None


def _check_hub(name: str) -> None:
    """A hub name must be in the cache, or be found by one quick question (downloads themselves retry for long)."""
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


def _load_model(name: str, dtype: str) -> Any:
    transformers = importlib.import_module("transformers")
    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except Exception as error:  # whatever Transformers or the hub raise, the sentence names it
        raise CheckpointError(
            f"requires a model that Transformers {transformers.__version__} knows; got {name}: {_line(error)}"
        ) from None
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise CheckpointError(
            f"requires a class that writes text (a causal language model); got {name} of model_type "
            f"{config.model_type}, which Transformers has none for"
        )
    try:
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, output_loading_info=True
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


def _load_tokenizer(name: str) -> Any:
    transformers = importlib.import_module("transformers")
    try:
        return transformers.AutoTokenizer.from_pretrained(name)
    except Exception as error:
        raise CheckpointError(
            f"requires a tokenizer beside the model; got {name} without one that loads: {_line(error)}"
        ) from None


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries' reports and warnings off stderr: what matters of them becomes a sentence."""
    log = importlib.import_module("transformers.utils.logging")
    before, disabled = log.get_verbosity(), logging.root.manager.disable
    bar = log.is_progress_bar_enabled()
    log.set_verbosity(logging.CRITICAL)
    logging.disable(logging.CRITICAL)
    if not sys.stderr.isatty():
        log.disable_progress_bar()
    try:
        yield
    finally:
        logging.disable(disabled)
        log.set_verbosity(before)
        if bar:
            log.enable_progress_bar()


def _line(error: BaseException) -> str:
    """The first sentence of an error that may go on for pages."""
    text = str(error).strip().split("\n", 1)[0].strip() or type(error).__name__
    text = text.split(". ", 1)[0].rstrip(".")
    return text if len(text) <= 300 else text[:300] + "…"
