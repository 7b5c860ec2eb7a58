"""Which backend runs a call, and why the others do not.

`PRIORITY` is the whole policy: one list per device, best first. A backend answers two questions, with reasons:
is its runtime here (`available()`), and does its declaration `accepts` the call (core/accepts.py)? Accepted calls must
run. `ANYDELTA_BACKEND` forces one backend for the whole process.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any, Protocol

from .accepts import Accepts, Asked, reasons
from .arrays import Array

MLX_GPU = "mlx"
"""The device of a call on MLX arrays whose stream runs on the GPU, in `Spec.device`."""

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
"""Backends to try for tensors on a device, in order. Other devices get the reference. For states on an
`anydelta.device`, the key is its kind."""

NAMES: tuple[str, ...] = ("cpu", "triton", "metal", "vulkan", "webgpu", "opencl", "sycl", "reference")
"""Every backend that this version has; each is the package `anydelta.backends.NAME`."""

ENV = "ANYDELTA_BACKEND"


def forced_by_env() -> str | None:
    """The backend that ANYDELTA_BACKEND names, or None."""
    name = os.environ.get(ENV) or "auto"
    return None if name == "auto" else name


class UnsupportedError(RuntimeError):
    """A backend that was asked for by name cannot run the call. The text lists every reason."""


@dataclass(frozen=True)
class Rejected:
    """One reason why a backend does not take a call."""

    reason: str

    def __str__(self) -> str:
        return self.reason


class Spec(Asked, Protocol):
    """The fields of a valid call, of the rule or the mixer, that dispatch reads."""

    @property
    def part(self) -> str:
        """The kernel that a backend must have beside the rule: "mixer", "log" or ""."""
        ...

    @property
    def dtype(self) -> str: ...

    @property
    def framework(self) -> str: ...

    @property
    def snapshot_rows(self) -> bool:
        """Whether the snapshots go to rows of the state pool."""
        ...

    def without_rows(self) -> Spec:
        """The call that replaces this one on backends with dense snapshots only."""
        ...

    def shape_line(self) -> str: ...


class Gated(Protocol):
    """The arrays of a call that are read here."""

    @property
    def A_log(self) -> Array: ...


class Declares(Protocol):
    """The object that runs the rule, the mixer or the log on a backend."""

    @property
    def accepts(self) -> Accepts:
        """The calls that it runs."""
        ...


class Backend(Declares, Protocol):
    """The protocol of `BACKEND` in `anydelta.backends.NAME.host`.

    Optional attributes: `mixer` names the module whose MIXER has `accepts`, `prepare` and `run` for MixerSpec and
    MixerCall (`prepare` also gets the requested backend's name). `log` names the module whose LOG is a
    `state.log_spec.LogBackend`. `mlx_host` names the module whose HOST runs MLX arrays. A backend with a backward pass
    declares its calls in `accepts_gradients`, and has `gradients(spec, call, grad_o, grad_state)`; a MIXER has
    `gradients(spec, call, grads, wanted)`, with the gradients of its three results.
    """

    name: str

    def available(self) -> Sequence[Rejected]:
        """Why the backend cannot run at all here; empty when it can."""
        ...

    def prepare(self, spec: Spec, call: object) -> object:
        """Compute once per CallSpec and array geometry what `run` then gets."""
        ...

    def run(self, plan: object, spec: Spec, call: object) -> None:
        """Write `call.o`, `call.state_out` and `call.snapshots`."""
        ...

    def describe(self) -> dict[str, object]:
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
    return host(name).BACKEND  # type: ignore[no-any-return]


def host(name: str) -> ModuleType:
    """The module of a backend. It has `BACKEND`, and for several builds of its kernel `isas` and `forced_isa`."""
    return importlib.import_module(f"anydelta.backends.{name}.host")


@dataclass(frozen=True)
class Trace:
    """What dispatch decided: the backend that runs the call, and why each one before it does not."""

    spec: Spec
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


def implementation(name: str, spec: Spec) -> Any:
    """The object that runs such calls on a backend. For the rule: the backend itself, or its host for MLX arrays. For
    the mixer or the log: the backend's part, or None."""
    backend = get_backend(name)
    if spec.part:
        return part_of(name, spec.part)
    module = getattr(backend, "mlx_host", None) if spec.framework == "mlx" else None
    return importlib.import_module(module).HOST if module else backend


def part_of(name: str, part: str) -> Any:
    """The object that runs the mixer or the log on a backend, or None without such a kernel."""
    module = getattr(get_backend(name), part, None)
    return getattr(importlib.import_module(module), part.upper()) if module else None


def mixer_of(name: str) -> Any:
    """The object that runs the mixer on a backend, or None."""
    return part_of(name, "mixer")


def takes_rows(backend: Declares, spec: Spec) -> bool:
    """Whether the backend itself writes to the rows of `snapshot_indices`."""
    rows = backend.accepts.rows
    return all(getattr(spec, name) in rows[name].allowed for name in ("snapshot_rows", "final_rows"))


def needs_A_log(backend: Declares, spec: Spec, call: Gated) -> bool:
    """Whether the call lacks an A_log that the backend needs for raw gates."""
    return (
        spec.options.decay == "raw" and call.A_log is None and not getattr(backend, "optional_A_log", False)
    )


def reasons_against(name: str, spec: Spec) -> tuple[Rejected, ...]:
    runs = implementation(name, spec)
    if no := tuple((get_backend(name) if spec.part else runs).available()):
        return no
    return tuple(map(Rejected, against(runs, spec)))


def against(runs: Declares | None, spec: Spec, *, here: bool = True) -> tuple[str, ...]:
    """The reasons of an implementation's declaration against a call; `here` as in `reasons`."""
    if runs is None:
        return (f"has no kernel for the {spec.part}",)
    if not spec.part and not takes_rows(runs, spec):
        spec = spec.without_rows()
    return reasons(runs.accepts, spec, here=here)


def _candidates(spec: Spec, backend: str) -> tuple[tuple[str, ...], str | None]:
    """The backends to ask, and what forced the only one."""
    if backend == "auto" and (name := forced_by_env()):
        if name not in NAMES:
            known = ", ".join(map(repr, NAMES))
            raise ValueError(
                f"{spec.options.op}: {ENV}: backend must be 'auto' or one of {known}; got {name!r}"
            )
        return (name,), f"{ENV}={name}"
    if backend != "auto":
        return (backend,), f"backend={backend!r}"
    return PRIORITY.get(spec.device, ("reference",)), None


def choose(spec: Spec, backend: str = "auto") -> Trace:
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
        no = reasons_against(name, spec)
        if not no:
            return Trace(spec, name, rejected, forced)
        rejected[name] = no
    return Trace(spec, None, rejected, forced)


def with_gradients(spec: Spec, backend: str = "auto", *, warn: bool = True) -> Any | None:
    """The backend with a native backward pass for the call. None: the reference is differentiated.

    With `warn`, warns once per process if a backend with a backward pass does not take the call.
    """
    global _warned_of_gradients
    for name in _candidates(spec, backend)[0]:
        runs: Any = implementation(name, spec) if spec.part else get_backend(name)
        if hasattr(runs, "gradients") and not reasons_against(name, spec):
            no = reasons(runs.accepts_gradients, spec)
            if not no:
                return runs
            if warn and not _warned_of_gradients:
                _warned_of_gradients = True
                warnings.warn(
                    f"anydelta: no native backward pass takes this call, so the slow reference runs ({no[0]}). "
                    "This warning appears once",
                    RuntimeWarning,
                    stacklevel=4,
                )
    return None


_warned = False
_warned_of_gradients = False


def pick(spec: Spec, backend: str = "auto") -> Any:
    """The `implementation` that runs the call. Warns once per process when auto falls back to the reference rule.

    The mixer's fallback runs torch's convolution around the rule; the rule warns by itself when it is slow.

    Raises:
        UnsupportedError: the named (or forced) backend cannot run the call.
    """
    global _warned
    trace = choose(spec, backend)
    if trace.chosen is None:
        no = "; ".join(str(r) for rs in trace.rejected.values() for r in rs)
        raise UnsupportedError(
            f"{spec.options.op}: {trace.forced or 'auto'} cannot run this call: {no}. "
            f'Use backend="auto" to fall back to another backend'
        )
    slow = trace.chosen == "reference" and trace.forced is None and spec.part != "mixer"
    if slow and spec.dtype != "float64" and not _warned:
        _warned = True
        no = "; ".join(f"{n}: {r}" for n, rs in trace.rejected.items() for r in rs) or (
            f"there is no native backend for device {spec.device!r}"
        )
        warnings.warn(
            f"anydelta: no native kernel takes this call, so the slow reference runs ({no}). "
            f"This warning appears once; anydelta.explain(...) gives the reasons for any call",
            RuntimeWarning,
            stacklevel=4,
        )
    return implementation(trace.chosen, spec)
