"""The calls that each backend declares (`Backend.accepts`), feature by feature: `anydelta conform --support`.

A yes means that the backend takes such a call. `anydelta conform` proves that it then computes the right result.
Nothing here depends on the machine: a backend answers without its hardware.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np

from .. import __version__
from ..core import dispatch
from ..rule.arguments import Call, Options
from ..rule.spec import CallSpec, check_call
from .cases import CASES, FLOAT64_CASES, Case
from .options import from_words


@dataclass(frozen=True)
class Feature:
    """One row: how it changes a plain call, and which conformance cases use it."""

    name: str
    change: Callable[[CallSpec], CallSpec]
    used_by: Callable[[Case], bool]

    @property
    def cases(self) -> int:
        """How many cases of the rule use it, including float64 cases that only the reference runs."""
        return sum(self.used_by(case) for case in (*CASES, *FLOAT64_CASES))


def _with(spec: CallSpec, **words: object) -> CallSpec:
    """The call with these options, in the words of a case."""
    return replace(spec, options=spec.options._replace(**from_words(**words)))


def _given(spec: CallSpec, *names: str, **facts: object) -> CallSpec:
    """The call with these arrays of the table."""
    return replace(spec, given=(*spec.given, *names), **facts)  # type: ignore[arg-type]


def _float64(spec: CallSpec) -> CallSpec:
    return replace(spec, dtype="float64", state_dtype="float64", g_dtype="float64", beta_dtype="float64")


FEATURES = (
    Feature("GDA: one decay per head", lambda s: s, lambda c: not c.kda),
    Feature("KDA: one decay per key channel", lambda s: replace(s, kda=True), lambda c: c.kda),
    Feature("linear decays", lambda s: _with(s, decay="linear"), lambda c: c.decay == "linear"),
    Feature(
        "raw gates (`A_log`, `dt_bias`)",
        lambda s: _given(_with(s, decay="raw"), "A_log", "dt_bias"),
        lambda c: c.decay == "raw",
    ),
    Feature("beta as a logit", lambda s: _with(s, logit=True), lambda c: c.logit),
    Feature("a separate key to read (`erase`)", lambda s: _given(s, "erase"), lambda c: bool(c.erase)),
    Feature("q/k L2 norm in the kernel", lambda s: _with(s, l2norm=True), lambda c: c.l2norm),
    Feature("tiled heads (GGUF)", lambda s: _with(s, heads="tiled"), lambda c: c.heads == "tiled"),
    Feature("state as [V, K]", lambda s: _with(s, layout="vk"), lambda c: c.layout == "vk"),
    Feature("any head size, K != V", lambda s: replace(s, K=7, V=33), lambda c: (c.K, c.V) == (7, 33)),
    Feature("q k v in bfloat16", lambda s: replace(s, dtype="bfloat16"), lambda c: c.dtype == "bfloat16"),
    Feature("q k v in float16", lambda s: replace(s, dtype="float16"), lambda c: c.dtype == "float16"),
    Feature("everything in float64", _float64, lambda c: c.dtype == "float64"),
    Feature("state in bfloat16", lambda s: replace(s, state_dtype="bfloat16"), lambda c: c.state_dtype == "bfloat16"),
    Feature("state in float16", lambda s: replace(s, state_dtype="float16"), lambda c: c.state_dtype == "float16"),
    Feature("in place", lambda s: _given(s, "state_in", inplace=True, has_state=True), lambda c: c.inplace),
    Feature("packed sequences", lambda s: _given(s, "cu_seqlens", packed=True), lambda c: c.seqlens is not None),
    Feature(
        "state pool",
        lambda s: _given(s, "state_in", "state_indices", has_state=True, pooled=True, P=8),
        lambda c: c.indices is not None,
    ),
    Feature("mask", lambda s: _given(s, "mask", masked=True), lambda c: bool(c.mask)),
    Feature("last-K snapshots", lambda s: _given(s, "snapshots", snapshots=4), lambda c: c.snapshots > 0),
    Feature("NumPy arrays", lambda s: replace(s, framework="numpy"), lambda c: True),
    Feature("torch tensors", lambda s: replace(s, framework="torch"), lambda c: True),
)  # fmt: skip


def devices(backend: str) -> list[str]:
    """The devices whose list in `dispatch.PRIORITY` has the backend."""
    return [device for device, names in dispatch.PRIORITY.items() if backend in names]


def plain(backend: str) -> CallSpec:
    """A small call without special features, on a device and with arrays of the backend."""
    x, gate = np.zeros((1, 4, 2, 16), np.float32), np.zeros((1, 4, 2), np.float32)
    spec = check_call(Call(x, x, x, gate, gate), Options(), inplace=False)
    on = [replace(spec, device=d, framework=f) for d in devices(backend) for f in ("numpy", "torch")]
    return next((s for s in on if not _against(backend, s)), spec)


def _against(backend: str, spec: CallSpec) -> tuple[str, ...]:
    """The declaration's reasons against a call, without limits of the machine."""
    return dispatch.against(dispatch.get_backend(backend), spec, here=False)


def answers(backend: str) -> dict[str, list[str]]:
    """Per feature, the backend's reasons against it. No reason is a yes."""
    spec = plain(backend)
    return {f.name: list(_against(backend, f.change(spec))) for f in FEATURES}


def support(backends: Iterable[str] = dispatch.NAMES) -> dict[str, object]:
    """The output of `anydelta conform --support --json`.

    Returns:
        version: anydelta's version. cases: per feature, the number of conformance cases that use it.
        backends: per backend its devices, and its features as from `answers`.
    """
    return {
        "version": __version__,
        "cases": {f.name: f.cases for f in FEATURES},
        "backends": {name: {"devices": devices(name), "features": answers(name)} for name in backends},
    }
