"""llama.cpp as a contender, on a GGUF file, through the library that llama-cpp-python builds.

It runs in a separate process: a library built for another CPU may end the process, and two releases of ggml in one
process would find each other's functions. A preset or a folder is first written as a file, with matrices in its dtype.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import shutil
import signal
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...core.probe import package_version
from ...generate.presets import Built
from ...gguf import names, write
from ...terminal import Refused
from ..measure.cases import F32
from ..measure.contender import needs
from . import llama_process

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

MIXES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""The type in a file's name, by dtype."""

START_SECONDS = 600
"""The time limit for llama.cpp to read a file."""


def missing(model_type: str | None) -> str | None:
    """Why llama.cpp cannot run a model of this type here, or None. Without a type: an existing file."""
    if why := needs("llama_cpp", "llama-cpp-python"):
        return why
    if model_type is None:
        return None
    if why := write.missing():
        return why
    if model_type not in names.ARCHITECTURES:
        return f"no GGUF of a {model_type} is written here; of {' and '.join(names.ARCHITECTURES)} it is"
    return None


class LlamaRunner:
    """llama.cpp with one model; a `Runner` of measure/runners.py."""

    logit_error = 1e-3
    """Its code differs: the place of the epsilon in the L2 norm, exp, the order of sums."""

    def __init__(
        self,
        file: Path | Built,
        dtype: str,
        context: int,
        vocabulary: int,
        repacked: bool = True,
        name: str = "llama.cpp",
    ):
        """Load a file, or write a model to one and load it, for at most `context` tokens.

        Args:
            dtype: of the key and value cache, and of the file that is written.
            repacked: let it repack matrices in the layouts of its extra buffer types.

        Raises:
            RuntimeError: too little disk space, or llama.cpp refuses the file or ends; with its message.
        """
        self.name = name
        self.version = f"(llama-cpp-python {package_version('llama-cpp-python')})"
        self._vocabulary = vocabulary
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._process: multiprocessing.process.BaseProcess | None = None
        self._kept = 0
        try:
            path = self._write(file, dtype) if isinstance(file, Built) else file
            self._start(path, dtype, context, repacked)
        except BaseException:
            self.close()
            raise

    def _write(self, built: Built, dtype: str) -> Path:
        self._folder = tempfile.TemporaryDirectory(prefix="anydelta-gguf-", ignore_cleanup_errors=True)
        if shutil.disk_usage(self._folder.name).free < 1.1 * built.size:
            raise RuntimeError(f"requires {built.size / 2**30:.1f} GiB of disk for the GGUF; got less")
        path = Path(self._folder.name) / "model.gguf"
        try:
            write.write(built.model, path, MIXES[dtype])
        except Refused as error:
            raise RuntimeError(str(error)) from error
        return path

    def _start(self, path: Path, dtype: str, context: int, repacked: bool) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pipe: Connection
        self._pipe, theirs = spawn.Pipe()
        self._process = spawn.Process(
            target=llama_process.serve, args=(theirs, str(path), dtype, context, repacked), daemon=True
        )
        self._process.start()
        theirs.close()
        self._answer(START_SECONDS)

    def _ask(self, what: str, *given: object) -> object:
        with contextlib.suppress(BrokenPipeError):
            self._pipe.send((what, given))
        return self._answer(None)

    def _answer(self, seconds: float | None) -> object:
        try:
            if seconds is not None and not self._pipe.poll(seconds):
                raise RuntimeError(f"llama.cpp has not answered for {seconds:.0f} s")
            good, value = self._pipe.recv()
        except (EOFError, ConnectionError):
            raise RuntimeError(f"llama.cpp ended: {self._ending()}") from None
        if not good:
            raise RuntimeError(str(value))
        return value

    def _ending(self) -> str:
        process = self._process
        if process is None:
            return "no process"
        process.join(5)
        code = process.exitcode or 0
        return signal.Signals(-code).name if code < 0 else f"exit status {code}"

    # ---- The methods of `Runner`

    def threads(self, n: int) -> None:
        self._ask("threads", n)

    def context(self, ids: Sequence[int]) -> int:
        self._kept += 1
        self._ask("context", self._kept, list(ids))
        return self._kept

    def restore(self, kept: int | None) -> None:
        self._ask("restore", kept)

    def prompt(self, ids: Sequence[int]) -> F32:
        found = self._ask("prompt", list(ids), self._vocabulary)
        return np.asarray(found, np.float32)

    def decode(self, token: int, n: int) -> None:
        self._ask("decode", token, n, self._vocabulary)

    def close(self) -> None:
        if self._process is not None:
            with contextlib.suppress(OSError):
                self._pipe.send(("close", ()))
            self._process.join(10)
            if self._process.is_alive():
                self._process.kill()
            self._pipe.close()
            self._process = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None
