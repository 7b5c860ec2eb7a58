"""Which backend runs a call, and why the others do not.

`PRIORITY` is the whole policy: one list per device, best first. A backend answers two questions with
reasons, not booleans: `available()` (is its runtime here?) and `supports(spec)` (can it run this call?).
What `supports` accepts, `run` runs. `ANYDELTA_BACKEND` forces one for the whole process.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Protocol

from ..mixer.spec import MixerSpec
from ..rule.spec import MLX_GPU, Call, CallSpec

PRIORITY: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu", "reference"),
    "cuda": ("triton", "reference"),
    "xpu": ("triton", "reference"),
    "mps": ("metal", "reference"),
    MLX_GPU: ("metal", "cpu", "reference"),
    "vulkan": ("vulkan", "reference"),
    "webgpu": ("webgpu", "reference"),
    "opencl": ("opencl", "reference"),
    "sycl": ("sycl", "reference"),
}
"""Backends to try for tensors on a device, in order. A device that is not listed gets the reference. With states on an
`anydelta.device`, its kind counts."""

NAMES: tuple[str, ...] = ("cpu", "triton", "metal", "vulkan", "webgpu", "opencl", "sycl", "reference")
"""Every backend that this version has; each is the module `anydelta.backends.NAME`."""

ENV = "ANYDELTA_BACKEND"


def forced_by_env() -> str | None:
    """The backend that ANYDELTA_BACKEND names, or None."""
    return os.environ.get(ENV) or None


class UnsupportedError(RuntimeError):
    """A backend that was asked for by name cannot run the call. The text lists every reason."""


@dataclass(frozen=True)
class Rejected:
    """One reason why a backend does not take a call."""

    reason: str

    def __str__(self) -> str:
        return self.reason


class Backend(Protocol):
    """What a module in `anydelta.backends` provides.

    A backend with a kernel for the mixer has an attribute `mixer`, an object with `supports`, `prepare` and `run` for
    MixerSpec and MixerCall; `prepare` is also given the name of the backend that was asked for. One with a backward
    pass has `gradient_reasons(spec)`, why it does not take a call, and `gradients(spec, call, grad_o, grad_state)`.
    """

    name: str

    def available(self) -> Sequence[Rejected]:
        """Why the backend cannot run at all here; empty when it can."""
        ...

    def supports(self, spec: CallSpec) -> Sequence[Rejected]:
        """Why the backend cannot run this call; empty when it can. All reasons, not the first."""
        ...

    def prepare(self, spec: CallSpec, call: Call) -> Any:
        """Whatever can be computed once per CallSpec and array geometry; given back to `run`."""
        ...

    def run(self, plan: Any, spec: CallSpec, call: Call) -> None:
        """Write `call.o`, `call.state_out` and `call.snapshots`."""
        ...

    def describe(self) -> dict[str, Any]:
        """Facts for `anydelta info`: versions, devices, limits."""
        ...


@cache
def get_backend(name: str) -> Backend:
    """The backend of that name.

    Raises:
        ValueError: no such backend; the text lists the known ones.
    """
    if name not in NAMES:
        raise ValueError(f"backend must be 'auto' or one of {', '.join(map(repr, NAMES))}; got {name!r}")
    module = importlib.import_module(f"anydelta.backends.{name}.host")
    return module.BACKEND  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Trace:
    """What dispatch decided: the backend that runs the call, and why each one before it does not."""

    spec: CallSpec | MixerSpec
    chosen: str | None
    rejected: dict[str, tuple[Rejected, ...]]
    forced: str | None = None

    def __str__(self) -> str:
        lines = [f"{self.spec.options.op} {self.spec.shape_line()}"]
        if self.forced:
            lines.append(f"  forced by {self.forced}")
        lines += [f"  {name}: no: {r}" for name, reasons in self.rejected.items() for r in reasons]
        lines.append(f"  {self.chosen}: runs" if self.chosen else "  no backend runs this call")
        return "\n".join(lines)


def implementation(name: str, spec: CallSpec | MixerSpec) -> Any:
    """What runs such calls on a backend: itself for the rule, or its `mlx_host` for MLX arrays; its `mixer`, or None,
    for the mixer."""
    backend = get_backend(name)
    if isinstance(spec, MixerSpec):
        return getattr(backend, "mixer", None)
    return getattr(backend, "mlx_host", backend) if spec.framework == "mlx" else backend


def takes_rows(backend: Any, spec: CallSpec) -> bool:
    """Whether the backend writes to the rows that `snapshot_indices` name, if they are given, by itself."""
    return all(
        getattr(backend, flag, False) for flag in ("snapshot_rows", "final_rows") if getattr(spec, flag)
    )


def needs_A_log(backend: Any, spec: CallSpec, call: Call) -> bool:
    """Whether the call has no A_log where the backend wants one for raw gates."""
    return (
        spec.options.decay == "raw" and call.A_log is None and not getattr(backend, "optional_A_log", False)
    )


def without_rows(spec: CallSpec) -> CallSpec:
    """The call that op.py makes of one with `snapshot_indices` for the other backends: functional, dense snapshots."""
    options = replace(spec.options, output_final_state=False)
    return replace(spec, snapshot_rows=False, final_rows=False, inplace=False, options=options)


def reasons_against(name: str, spec: CallSpec | MixerSpec) -> tuple[Rejected, ...]:
    runs = implementation(name, spec)
    if reasons := tuple((get_backend(name) if isinstance(spec, MixerSpec) else runs).available()):
        return reasons
    if isinstance(spec, CallSpec) and not takes_rows(runs, spec):
        spec = without_rows(spec)
    return (Rejected("has no kernel for the mixer"),) if runs is None else tuple(runs.supports(spec))


def _candidates(spec: CallSpec | MixerSpec, backend: str) -> tuple[tuple[str, ...], str | None]:
    """The backends to ask, and what forced the only one."""
    if backend == "auto" and (name := forced_by_env()):
        return (name,), f"{ENV}={name}"
    if backend != "auto":
        return (backend,), f"backend={backend!r}"
    return PRIORITY.get(spec.device, ("reference",)), None


def choose(spec: CallSpec | MixerSpec, backend: str = "auto") -> Trace:
    """Walk the priority table for the device of the call; a named backend is the only candidate.

    Raises:
        ValueError: an unknown backend name, in the argument or in ANYDELTA_BACKEND.
    """
    if not isinstance(backend, str) or backend not in ("auto", *NAMES):
        raise ValueError(
            f"{spec.options.op}: backend must be 'auto' or one of {', '.join(map(repr, NAMES))}; got {backend!r}"
        )
    candidates, forced = _candidates(spec, backend)
    rejected: dict[str, tuple[Rejected, ...]] = {}
    for name in candidates:
        reasons = reasons_against(name, spec)
        if not reasons:
            return Trace(spec, name, rejected, forced)
        rejected[name] = reasons
    return Trace(spec, None, rejected, forced)


def with_gradients(spec: CallSpec, backend: str = "auto") -> Any | None:
    """The backend with a backward pass of its own for the call, or None: then the reference is differentiated.

    Warns once per process when a backend that has one does not take the call.
    """
    global _warned_of_gradients
    for name in _candidates(spec, backend)[0]:
        runs: Any = get_backend(name)
        if hasattr(runs, "gradients") and not reasons_against(name, spec):
            reasons = runs.gradient_reasons(spec)
            if not reasons:
                return runs
            if not _warned_of_gradients:
                _warned_of_gradients = True
                warnings.warn(
                    f"anydelta: no native backward pass takes this call, so the slow reference runs ({reasons[0]}). "
                    "This warning appears once",
                    RuntimeWarning,
                    stacklevel=4,
                )
    return None


_warned = False
_warned_of_gradients = False


def pick(spec: CallSpec | MixerSpec, backend: str = "auto") -> Any:
    """The `implementation` that runs the call. Warns once per process when auto falls back to the reference rule.

    The mixer's fallback is no loop but torch's convolution around the rule, which says itself when it is slow.

    Raises:
        UnsupportedError: the named (or forced) backend cannot run the call.
    """
    global _warned
    trace = choose(spec, backend)
    if trace.chosen is None:
        reasons = "; ".join(str(r) for rs in trace.rejected.values() for r in rs)
        raise UnsupportedError(
            f"{spec.options.op}: {trace.forced or 'auto'} cannot run this call: {reasons}. "
            f'Use backend="auto" to fall back to another backend'
        )
    slow = trace.chosen == "reference" and trace.forced is None and isinstance(spec, CallSpec)
    if slow and spec.dtype != "float64" and not _warned:
        _warned = True
        reasons = "; ".join(f"{n}: {r}" for n, rs in trace.rejected.items() for r in rs) or (
            f"there is no native backend for device {spec.device!r}"
        )
        warnings.warn(
            f"anydelta: no native kernel takes this call, so the slow reference runs ({reasons}). "
            f"This warning appears once; anydelta.explain(...) gives the reasons for any call",
            RuntimeWarning,
            stacklevel=4,
        )
    return implementation(trace.chosen, spec)
