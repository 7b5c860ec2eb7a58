"""The contenders: anydelta and other implementations from installed packages.

ggml, vLLM and ONNX Runtime have their own files. The convention of each:

| contender | order | decay | scale | state | heads | snapshots |
|---|---|---|---|---|---|---|
| transformers | [B, T, H, D] | log | in the op | [B, HV, K, V] | interleaved | none: T calls |
| executorch | [B, HV, T, D] | linear | folded into q | [B, HV, K, V] | q, k repeated here | none: T calls |
| mlx | [B, T, H, D] | linear | folded into q | [B, HV, V, K] | interleaved | none: T calls |
| vllm | [1, B T, H, D] | log; raw in a pool | in the op | [P, HV, K, V], in place | interleaved | refused |
| onnxruntime | [B, T, H D] | log | an attribute | [B, HV, K, V] | interleaved | none: T calls |
| ggml | [B, T, H, D] | log | in the op | [B, HV, V, K] | tiled | in the op, newest first |
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import anydelta

from ...core.probe import package_version
from ..measure.cases import F32, Case, Inputs
from ..measure.contender import (
    Contender,
    Result,
    Runner,
    RunnerBase,
    faster,
    needs,
    only_plain,
    quiet_stderr,
    rows_of,
    tensors,
    tensors_on,
)
from .ggml import Ggml
from .mac import mac_peers
from .onnxruntime import OnnxRuntime
from .vllm import Vllm

if TYPE_CHECKING:
    import torch
    from mlx.core import array

    Kernel = Callable[..., tuple[torch.Tensor, torch.Tensor]]
    """A kernel of fla: returns (o, final state)."""


class Anydelta:
    """anydelta itself: in place, as a model calls it; with snapshots the final state is slot 0."""

    name = "anydelta"

    def __init__(self, backend: str = "auto"):
        self.backend = backend

    def missing(self) -> str | None:
        return None if importlib.util.find_spec("torch") else "PyTorch is not installed (pip install torch)"

    def version(self) -> str:
        return anydelta.__version__

    def refuses(self, case: Case) -> str | None:
        return None

    def prepare(self, case: Case, inputs: Inputs, threads: int) -> Runner:
        return _AnydeltaRunner(case, inputs, self.backend)


def finish(device: str) -> None:
    """Wait until the device has finished."""
    if device == "mps":
        import torch

        torch.mps.synchronize()


class _AnydeltaRunner(RunnerBase):
    def __init__(self, case: Case, inputs: Inputs, backend: str):
        import torch

        self.device = tensors_on(backend)
        self.x = x = {n: y.to(self.device) for n, y in tensors(case, inputs).items()}
        self.inputs = inputs
        self.states = x["state"][None].repeat(1 if case.pool else case.states, 1, 1, 1, 1)
        kept = (case.states if case.snapshots else 0, case.snapshots)
        self.snaps = self.states.new_zeros(*kept, *x["state"].shape)
        states, snaps = list(self.states), list(self.snaps)
        q, k, v, g, beta = (x[n] for n in ("q", "k", "v", "g", "beta"))
        more: dict[str, Any] = {"backend": backend}
        rows: list[torch.Tensor] = []
        if inputs.rows is not None:
            rows = list(torch.from_numpy(inputs.rows).to(self.device))
            states *= len(rows)
            more |= {n: x[n] for n in ("A_log", "dt_bias")}
            more |= {"decay": "raw", "beta_is_logit": True, "qk_l2norm": True}
        self.trace = anydelta.explain(
            q, k, v, g=g, beta=beta, initial_state=states[0], state_indices=rows[0] if rows else None, **more
        )

        def advance(i: int) -> object:
            return anydelta.gated_delta_rule_(q, k, v, states[i], g=g, beta=beta, **more)

        def advance_rows(i: int) -> object:
            return anydelta.gated_delta_rule_(
                q, k, v, states[i], g=g, beta=beta, state_indices=rows[i], **more
            )

        def keep(i: int) -> object:
            return anydelta.gated_delta_rule(
                q, k, v, g=g, beta=beta, initial_state=states[i], snapshots=snaps[i],
                output_final_state=False, backend=backend,
            )[0]  # fmt: skip

        call = keep if case.snapshots else advance_rows if rows else advance
        super().__init__(case, call, in_place=True)
        self.detail = f"backend {self.trace.chosen}"

    def run(self, calls: int) -> None:
        super().run(calls)
        finish(self.device)

    def reset(self) -> None:
        if not self.case.snapshots:
            self.states.copy_(self.x["state"])
        self._next = 0

    def result(self) -> Result:
        self.reset()
        self.snaps.fill_(float("nan"))  # NaN, so that elements that are not written show
        o = _copied(self.call(0))
        if self.case.snapshots:
            return Result(o, _copied(self.snaps[0, 0]), _copied(self.snaps[0]))
        state = _copied(self.states[0])
        if self.inputs.rows is not None:
            state = rows_of(state, self.inputs.state, self.inputs.rows[0])
        return Result(o, state)

    def close(self) -> None:
        super().close()
        del self.states, self.snaps, self.x


def _copied(x: torch.Tensor) -> F32:
    out: F32 = x.cpu().float().numpy().copy()
    return out


class Transformers:
    """The PyTorch path that Transformers falls back to without a GPU kernel."""

    name = "transformers"

    def __init__(self, device: str = "cpu"):
        self.device = device

    def missing(self) -> str | None:
        return needs("transformers", "transformers") or needs("torch", "torch")

    def version(self) -> str:
        return package_version("transformers")

    def refuses(self, case: Case) -> str | None:
        if case.gate == "kda" and case.H != case.HV:
            return "its KDA has no grouped value heads"
        return "it takes no pool of states" if case.pool else None

    def prepare(self, case: Case, inputs: Inputs, threads: int) -> Runner:
        with quiet_stderr():  # it warns that this path is slow
            if case.gate == "gda":
                m = importlib.import_module("transformers.models.qwen3_5.modeling_qwen3_5")
                token, chunk = m.torch_recurrent_gated_delta_rule, m.torch_chunk_gated_delta_rule
            else:
                m = importlib.import_module("transformers.models.kimi_linear.modeling_kimi_linear")
                token, chunk = m.recurrent_kimi_delta_attention, m.chunk_kimi_delta_attention
            return _TransformersRunner(case, inputs, token, chunk, self.device)


class _TransformersRunner(RunnerBase):
    def __init__(self, case: Case, inputs: Inputs, token: Kernel, chunk: Kernel, device: str):
        import torch

        self.device = device
        x = {n: y.to(device) for n, y in tensors(case, inputs).items()}
        args = [x[n] for n in ("q", "k", "v", "g", "beta")]
        start = x["state"]
        self.states: list[torch.Tensor] = [start.clone() for _ in range(case.states)]
        self.kept: list[Any] = [None] * case.states
        self.out: Any = None

        def whole(fn: Kernel) -> Callable[[int], None]:
            def call(i: int) -> None:
                with torch.inference_mode():
                    self.out, self.kept[i] = fn(*args, initial_state=self.states[i], output_final_state=True)
                finish(device)

            return call

        tokens = [[a[:, t : t + 1] for a in args] for t in range(case.T)] if case.snapshots else []

        def one_by_one(i: int) -> None:
            with torch.inference_mode():
                state, outs, snaps = self.states[i], [], []
                for a in tokens:
                    o, state = token(*a, initial_state=state, output_final_state=True)
                    outs.append(o)
                    snaps.append(state)
                self.out, self.kept[i] = outs, snaps

        options: dict[str, Callable[[int], object]] = {}
        if case.snapshots:
            options["T calls"] = one_by_one
        else:
            if case.T > 1 and self._chunk_fits(case):
                options["chunks of 64"] = whole(chunk)
            if case.T <= 64 or case.gate == "kda":  # its chunked KDA may be slower than its recurrence
                options["recurrence"] = whole(token)
        self.detail = faster(options)
        super().__init__(case, options[self.detail])

    @staticmethod
    def _chunk_fits(case: Case) -> bool:
        """Its chunked KDA holds [B, H, T, 64, K] pairwise decays at once."""
        tokens = -(-case.T // 64) * 64
        return case.gate == "gda" or 4 * case.B * case.HV * tokens * 64 * case.D <= 2**31

    def result(self) -> Result:
        with quiet_stderr():  # it warns that this path is slow
            self.call(0)
        if self.case.snapshots:
            o = np.concatenate([_copied(o) for o in self.out], axis=1)
            snaps = np.stack([_copied(s) for s in reversed(self.kept[0])])
            return Result(o, snaps[0], snaps)
        return Result(_copied(self.out), _copied(self.kept[0]))

    def close(self) -> None:
        super().close()
        self.states, self.kept = [], []


class ExecuTorch:
    """torch.ops.llama.gated_delta_rule, the CPU op of ExecuTorch's LLM runner."""

    name = "executorch"

    @cached_property
    def _folder(self) -> Path | None:
        spec = importlib.util.find_spec("executorch")
        places = spec.submodule_search_locations if spec else None
        return Path(next(iter(places))) if places else None

    def _library(self, stem: str) -> Path | None:
        if self._folder is None:
            return None
        return next(iter(sorted(self._folder.rglob(f"lib{stem}.*"))), None)

    def missing(self) -> str | None:
        if why := needs("executorch", "executorch") or needs("torch", "torch"):
            return why
        if self._library("custom_ops_aot_lib") is None:
            return f"executorch {self.version()} ships no libcustom_ops_aot_lib"
        return None

    def version(self) -> str:
        return package_version("executorch")

    def refuses(self, case: Case) -> str | None:
        return only_plain(case)

    def prepare(self, case: Case, inputs: Inputs, threads: int) -> Runner:
        import torch

        with quiet_stderr():
            torch.ops.load_library(str(self._library("custom_ops_aot_lib")))
            if not hasattr(torch.ops.llama, "gated_delta_rule"):
                raise RuntimeError(f"executorch {self.version()} has no llama::gated_delta_rule")
            got = self._set_threads(threads)
        return _ExecuTorchRunner(case, inputs, "" if got == threads else f"{got or 'unknown'} threads")

    def _set_threads(self, threads: int) -> int:
        """Its pool has no Python interface: the C++ function is found by name. 0 if this build names it differently."""
        try:
            lib = ctypes.CDLL(str(self._library("executorch_threadpool")))
            pool = lib._ZN10executorch9extension10threadpool14get_threadpoolEv
            count = lib._ZNK10executorch9extension10threadpool10ThreadPool16get_thread_countEv
            resize = lib._ZN10executorch9extension10threadpool10ThreadPool24_unsafe_reset_threadpoolEj
        except (OSError, AttributeError, TypeError):
            return 0
        pool.restype, pool.argtypes = ctypes.c_void_p, []
        count.restype, count.argtypes = ctypes.c_size_t, [ctypes.c_void_p]
        resize.restype, resize.argtypes = ctypes.c_bool, [ctypes.c_void_p, ctypes.c_uint32]
        here = pool()
        if count(here) != threads:
            resize(here, threads)
        return int(count(here))


class _ExecuTorchRunner(RunnerBase):
    def __init__(self, case: Case, inputs: Inputs, detail: str):
        import torch

        rep = case.HV // case.H
        op = torch.ops.llama.gated_delta_rule.out

        def heads_first(x: F32) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(np.swapaxes(x, 1, 2)))

        args = [
            heads_first(np.repeat(inputs.q, rep, axis=2) * np.float32(case.D**-0.5)),
            heads_first(np.repeat(inputs.k, rep, axis=2)),
            heads_first(inputs.v),
            heads_first(np.exp(inputs.g)),
            heads_first(inputs.beta),
        ]
        start = torch.from_numpy(inputs.state)
        self.states = start[None].repeat(case.states, 1, 1, 1, 1)
        # Each in its own storage: the op treats two views of one storage as aliases.
        self.kept = [[torch.zeros_like(start) for _ in range(max(1, case.snapshots))] for _ in self.states]
        self.outs = [torch.zeros_like(args[2])]
        states, kept = list(self.states), self.kept

        def whole(i: int) -> None:
            op(*args, states[i], out=self.outs[0], final_state_out=kept[i][0])

        tokens = []
        if case.snapshots:
            tokens = [[a[:, :, t : t + 1].contiguous() for a in args] for t in range(case.T)]
            self.outs = [torch.zeros_like(a[2]) for a in tokens]

        def one_by_one(i: int) -> None:
            state = states[i]
            for a, o, final in zip(tokens, self.outs, reversed(kept[i]), strict=True):
                op(*a, state, out=o, final_state_out=final)
                state = final

        super().__init__(case, one_by_one if case.snapshots else whole)
        self.detail = ", ".join(filter(None, (detail, "T calls" if case.snapshots else "")))

    def run(self, calls: int) -> None:
        with quiet_stderr():  # it logs a line per call
            super().run(calls)

    def result(self) -> Result:
        for x in (*self.kept[0], *self.outs):
            x.fill_(float("nan"))  # NaN, so that elements that are not written show
        with quiet_stderr():
            self.call(0)
        o = np.concatenate([np.swapaxes(o.numpy(), 1, 2) for o in self.outs], axis=1)
        kept = np.stack([x.numpy() for x in self.kept[0]])
        return Result(o, kept[0], kept if self.case.snapshots else None)

    def close(self) -> None:
        super().close()
        del self.states, self.kept


class Mlx:
    """mx.fast.gated_delta_update on MLX's CPU backend."""

    name = "mlx"

    def missing(self) -> str | None:
        if why := needs("mlx.core", "'mlx[cpu]'"):
            return why
        mx = importlib.import_module("mlx.core")
        if not hasattr(mx.fast, "gated_delta_update"):
            return f"mlx {self.version()} has no mx.fast.gated_delta_update (0.32.3 and later do)"
        return None

    def version(self) -> str:
        return package_version("mlx")

    def refuses(self, case: Case) -> str | None:
        return only_plain(case)

    def prepare(self, case: Case, inputs: Inputs, threads: int) -> Runner:
        return _MlxRunner(case, inputs)


class _MlxRunner(RunnerBase):
    def __init__(self, case: Case, inputs: Inputs):
        mx = importlib.import_module("mlx.core")
        update, cpu = mx.fast.gated_delta_update, mx.cpu
        args = [
            mx.array(x)
            for x in (
                inputs.q * np.float32(case.D**-0.5), inputs.k, inputs.v, np.exp(inputs.g), inputs.beta,
            )
        ]  # fmt: skip
        start = np.ascontiguousarray(np.swapaxes(inputs.state, -1, -2))
        self.states: list[array] = [mx.array(start) for _ in range(case.states)]
        self.kept: list[Any] = [None] * case.states
        self.out: Any = None
        mx.eval(*args, *self.states)

        def whole(i: int) -> None:
            self.out, self.kept[i] = update(*args, self.states[i], stream=cpu)
            mx.eval(self.out, self.kept[i])

        tokens = [[a[:, t : t + 1] for a in args] for t in range(case.T)] if case.snapshots else []
        for a in tokens:
            mx.eval(*a)

        def one_by_one(i: int) -> None:
            state, outs, snaps = self.states[i], [], []
            for a in tokens:
                o, state = update(*a, state, stream=cpu)
                outs.append(o)
                snaps.append(state)
            mx.eval(outs, snaps)
            self.out, self.kept[i] = outs, snaps

        super().__init__(case, one_by_one if case.snapshots else whole)
        self.detail = "1 thread" + (", T calls" if case.snapshots else "")

    def result(self) -> Result:
        self.call(0)
        if self.case.snapshots:
            o = np.concatenate([np.array(o) for o in self.out], axis=1)
            snaps = np.stack([np.array(s).swapaxes(-1, -2) for s in reversed(self.kept[0])])
            return Result(o, snaps[0], snaps)
        return Result(np.array(self.out), np.array(self.kept[0]).swapaxes(-1, -2))

    def close(self) -> None:
        super().close()
        self.states, self.kept = [], []


def every_peer(device: str = "cpu") -> list[Contender]:
    """The peers that compute on the same device as anydelta."""
    if device == "mps":
        return [*mac_peers(), Transformers(device)]
    return [Vllm(), Ggml(), OnnxRuntime(), ExecuTorch(), Mlx(), Transformers()]


def choose_peers(names: Sequence[str], device: str = "cpu") -> list[Contender]:
    """The peers of these names on a device; all for an empty list.

    Raises:
        ValueError: an unknown name, or a named peer that cannot run here.
    """
    known = {p.name: p for p in every_peer(device)}
    for name in names:
        if name not in known:
            raise ValueError(f"peer must be one of {', '.join(known)}; got {name!r}")
        if why := known[name].missing():
            raise ValueError(f"peer {name!r} cannot run here: {why}")
    return [p for n, p in known.items() if not names or n in names]
