"""The process in which llama.cpp runs. It loads a file and answers .llama through a pipe."""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from ..measure.cases import F32

GGML_TYPES = {"float32": 0, "float16": 1, "bfloat16": 30}

BATCH = 2048
"""Tokens per llama_decode; it works on 512 of them at a time, as llama-bench does by default."""


def serve(pipe: Connection, path: str, dtype: str, context: int, repacked: bool) -> None:
    """Answer (name of a method, arguments) with (True, result) or (False, error), until "close"."""
    try:
        llama = _Llama(path, dtype, context, repacked)
        pipe.send((True, None))
        while True:
            what, given = pipe.recv()
            if what == "close":
                return
            try:
                pipe.send((True, getattr(llama, what)(*given)))
            except RuntimeError as error:
                pipe.send((False, str(error)))
    except RuntimeError as error:
        pipe.send((False, str(error)))
    except (EOFError, KeyboardInterrupt):
        return


class _Llama:
    def __init__(self, path: str, dtype: str, context: int, repacked: bool):
        self._lib = lib = importlib.import_module("llama_cpp")
        self._said: list[str] = []
        self._log = lib.llama_log_callback(self._listen)  # llama.cpp keeps the pointer
        lib.llama_log_set(self._log, ctypes.c_void_p(0))
        lib.llama_backend_init()
        of_model = lib.llama_model_default_params()
        of_model.use_extra_bufts = repacked
        self._model = lib.llama_model_load_from_file(path.encode(), of_model)
        if not self._model:
            raise RuntimeError(f"llama.cpp does not load the GGUF: {self._words()}")
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = context, BATCH, 512
        params.type_k = params.type_v = GGML_TYPES[dtype]
        self._context = lib.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp makes no context: {self._words()}")
        self._contexts: dict[int, Any] = {}

    def threads(self, n: int) -> None:
        self._lib.llama_set_n_threads(self._context, n, n)

    def _listen(self, level: int, text: bytes, _: object) -> None:
        if level == 4:  # an error
            self._said.append(text.decode("utf-8", errors="replace").strip())

    def _words(self) -> str:
        return " ".join(self._said[-3:]) or "no reason given"

    def context(self, number: int, ids: Sequence[int]) -> None:
        self.restore(None)
        self._decode_all(ids)
        size = self._lib.llama_state_seq_get_size(self._context, 0)
        kept = (ctypes.c_uint8 * size)()
        if self._lib.llama_state_seq_get_data(self._context, kept, size, 0) != size:
            raise RuntimeError("llama.cpp does not give its state")
        self._contexts = {number: kept}  # one test at a time

    def restore(self, number: int | None) -> None:
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        if number is None:
            return
        kept = self._contexts[number]
        if not self._lib.llama_state_seq_set_data(self._context, kept, len(kept), 0):
            raise RuntimeError("llama.cpp does not take its state back")

    def prompt(self, ids: Sequence[int], vocabulary: int) -> F32:
        self._decode_all(ids)
        return np.array(self._logits(vocabulary))

    def decode(self, token: int, n: int, vocabulary: int) -> None:
        for _ in range(n):
            self._decode([token])
            token = int(np.argmax(self._logits(vocabulary)))

    def _decode_all(self, ids: Sequence[int]) -> None:
        for begin in range(0, len(ids), BATCH):
            self._decode(ids[begin : begin + BATCH])

    def _decode(self, ids: Sequence[int]) -> None:
        tokens = (self._lib.llama_token * len(ids))(*ids)
        if code := self._lib.llama_decode(self._context, self._lib.llama_batch_get_one(tokens, len(ids))):
            raise RuntimeError(f"llama_decode returned {code}: {self._words()}")

    def _logits(self, vocabulary: int) -> F32:
        pointer = self._lib.llama_get_logits_ith(self._context, -1)
        return np.asarray(np.ctypeslib.as_array(pointer, (vocabulary,)))
