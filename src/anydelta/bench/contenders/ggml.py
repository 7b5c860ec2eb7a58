"""ggml_gated_delta_net, called through the shared libraries that ggml-python or llama-cpp-python ships.

A graph of one node per state is built and planned once, with its tensors in a ggml CPU buffer. It is computed by one
thread pool that lives as long as the runner. Shapes (ggml's order, fastest first):

    q, k [D, H, T, B]   v [D, HV, T, B]   g [1 or D, HV, T, B]   beta [1, HV, T, B]   state [D, D, HV, B]
    result: [D, HV, T, B] outputs, then Ks states [D, D, HV, B], newest first

In NumPy's order these are our shapes, with two differences: a state is [HV, V, K]; value head j reads q/k head j % H
(tiled). Our head h, which reads h // (HV/H), is therefore at j = (h % r) H + h // r with r = HV/H.
"""

from __future__ import annotations

import ctypes as C
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ...ggml.library import GgmlError, load, usable
from ..measure.cases import F32, Case, Inputs
from ..measure.contender import Result, Runner, RunnerBase, only_plain

F32_TYPE = 0
"""GGML_TYPE_F32"""


class _InitParams(C.Structure):
    _fields_ = (("mem_size", C.c_size_t), ("mem_buffer", C.c_void_p), ("no_alloc", C.c_bool))


class _Plan(C.Structure):
    """struct ggml_cplan; only its first four fields are read here."""

    _fields_ = (
        ("work_size", C.c_size_t),
        ("work_data", C.c_void_p),
        ("n_threads", C.c_int),
        ("threadpool", C.c_void_p),
        ("abort_callback", C.c_void_p),
        ("abort_data", C.c_void_p),
        ("use_ref", C.c_bool),
        ("spare", C.c_byte * 64),
    )


_P = C.c_void_p
_BASE: dict[str, tuple[type | None, ...]] = {
    "ggml_init": (_P, _InitParams),
    "ggml_free": (None, _P),
    "ggml_new_tensor_4d": (_P, _P, C.c_int, *[C.c_int64] * 4),
    # Releases without snapshots lack the last argument. An extra one is harmless in the C ABI, and the size of the
    # result shows which release it is.
    "ggml_gated_delta_net": (_P, *[_P] * 7, C.c_int64),
    "ggml_nelements": (C.c_int64, _P),
    "ggml_new_graph_custom": (_P, _P, C.c_size_t, C.c_bool),
    "ggml_build_forward_expand": (None, _P, _P),
    "ggml_tensor_overhead": (C.c_size_t,),
    "ggml_graph_overhead_custom": (C.c_size_t, C.c_size_t, C.c_bool),
    "ggml_backend_alloc_ctx_tensors": (_P, _P, _P),
    "ggml_backend_buffer_free": (None, _P),
    "ggml_backend_tensor_set": (None, _P, _P, C.c_size_t, C.c_size_t),
    "ggml_backend_tensor_get": (None, _P, _P, C.c_size_t, C.c_size_t),
    "ggml_backend_free": (None, _P),
    "ggml_threadpool_params_init": (None, _P, C.c_int),
    "ggml_version": (C.c_char_p,),
}
_CPU: dict[str, tuple[type | None, ...]] = {
    "ggml_backend_cpu_init": (_P,),
    "ggml_graph_plan": (_Plan, _P, C.c_int, _P),
    "ggml_graph_compute": (C.c_int, _P, _P),
    "ggml_threadpool_new": (_P, _P),
    "ggml_threadpool_free": (None, _P),
}
_FEATURES = ("avx2", "fma", "avx512", "neon", "arm_fma")


class _Library:
    """The functions above as attributes, without the prefix `ggml_`."""

    def __init__(self, folder: Path):
        base, cpu = load(folder)
        for lib, names in ((base, _BASE), (cpu, _CPU)):
            for name, (result, *args) in names.items():
                fn = getattr(lib, name)
                fn.restype, fn.argtypes = result, args
                setattr(self, name.removeprefix("ggml_"), fn)
        self.features = [f for f in _FEATURES if hasattr(cpu, n := f"ggml_cpu_has_{f}") and getattr(cpu, n)()]

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)


class Ggml:
    """ggml's CPU op, from the first of ggml-python and llama-cpp-python that is installed."""

    name = "ggml"

    @cached_property
    def _lib(self) -> _Library | str:
        try:
            return _Library(usable(__name__, _Library.__name__))
        except GgmlError as error:
            return f"{error} (pip install ggml-python)"

    def missing(self) -> str | None:
        return self._lib if isinstance(self._lib, str) else None

    def version(self) -> str:
        lib = self._lib
        return lib if isinstance(lib, str) else f"{lib.version().decode()} {'+'.join(lib.features)}".strip()

    def refuses(self, case: Case) -> str | None:
        return only_plain(case)

    def prepare(self, case: Case, inputs: Inputs, threads: int) -> Runner:
        lib = self._lib
        if isinstance(lib, str):
            raise RuntimeError(lib)
        return _GgmlRunner(lib, case, inputs, threads)


class _GgmlRunner(RunnerBase):
    def __init__(self, lib: _Library, case: Case, inputs: Inputs, threads: int):
        self.lib, r = lib, case.HV // case.H
        h = np.arange(case.HV)
        self.slot = (h % r) * case.H + h // r  # ggml's place of our head h
        self.order = np.argsort(self.slot)  # our head at ggml's place j
        B, T, H, HV, D, n = case.B, case.T, case.H, case.HV, case.D, case.states
        self.keep = max(1, case.snapshots)

        nodes = 8
        memory = lib.tensor_overhead() * (2 * n + 16) + lib.graph_overhead_custom(nodes, False) * n + 65536
        self.ctx = lib.init(_InitParams(memory, None, True))
        q, k = (lib.new_tensor_4d(self.ctx, F32_TYPE, D, H, T, B) for _ in "qk")
        v = lib.new_tensor_4d(self.ctx, F32_TYPE, D, HV, T, B)
        g = lib.new_tensor_4d(self.ctx, F32_TYPE, 1 if case.gate == "gda" else D, HV, T, B)
        beta = lib.new_tensor_4d(self.ctx, F32_TYPE, 1, HV, T, B)
        states = [lib.new_tensor_4d(self.ctx, F32_TYPE, D, D, HV, B) for _ in range(n)]
        self.outs = [lib.gated_delta_net(self.ctx, q, k, v, g, beta, s, self.keep) for s in states]
        want = D * HV * T * B + self.keep * D * D * HV * B
        if lib.nelements(self.outs[0]) != want:
            lib.free(self.ctx)
            raise RuntimeError(f"ggml {lib.version().decode()} keeps no snapshots")
        graphs = [lib.new_graph_custom(self.ctx, nodes, False) for _ in range(n)]
        for graph, out in zip(graphs, self.outs, strict=True):
            lib.build_forward_expand(graph, out)

        self.backend = lib.backend_cpu_init()
        self.buffer = lib.backend_alloc_ctx_tensors(self.ctx, self.backend)
        if not self.buffer:
            raise MemoryError("ggml could not allocate the tensors of this case")
        for tensor, x in ((q, inputs.q), (k, inputs.k)):
            self._set(tensor, x)
        for tensor, x in ((v, inputs.v), (g, inputs.g), (beta, inputs.beta)):
            self._set(tensor, x[:, :, self.order])
        start = np.swapaxes(inputs.state[:, self.order], -1, -2)
        for tensor in states:
            self._set(tensor, start)

        params = C.create_string_buffer(8192)  # larger than struct ggml_threadpool_params, which ggml fills
        lib.threadpool_params_init(params, threads)
        self.pool = lib.threadpool_new(params)
        self.plans, self.work = [], []
        for graph in graphs:
            plan = lib.graph_plan(graph, threads, self.pool)
            work = np.zeros(plan.work_size + 64, np.uint8)
            plan.work_data = work.ctypes.data
            self.plans.append(plan)
            self.work.append(work)
        compute = lib.graph_compute
        calls = [(g, C.byref(p)) for g, p in zip(graphs, self.plans, strict=True)]

        def call(i: int) -> None:
            graph, plan = calls[i]
            if compute(graph, plan):
                raise RuntimeError("ggml_graph_compute failed")

        super().__init__(case, call)

    def _set(self, tensor: int, x: F32) -> None:
        x = np.ascontiguousarray(x, dtype=np.float32)
        self.lib.backend_tensor_set(tensor, x.ctypes.data, 0, x.nbytes)

    def result(self) -> Result:
        c = self.case
        shapes = (c.B, c.T, c.HV, c.D), (self.keep, c.B, c.HV, c.D, c.D)
        flat = np.full(sum(int(np.prod(s)) for s in shapes), np.nan, np.float32)
        self._set(self.outs[0], flat)  # NaN, so that elements that are not written show
        self.call(0)
        self.lib.backend_tensor_get(self.outs[0], flat.ctypes.data, 0, flat.nbytes)
        cut = int(np.prod(shapes[0]))
        o = flat[:cut].reshape(shapes[0])[:, :, self.slot]
        snaps = flat[cut:].reshape(shapes[1])[:, :, self.slot].swapaxes(-1, -2)
        return Result(o, snaps[0], snaps if c.snapshots else None)

    def close(self) -> None:
        super().close()
        self.lib.threadpool_free(self.pool)
        self.lib.backend_buffer_free(self.buffer)
        self.lib.backend_free(self.backend)
        self.lib.free(self.ctx)
