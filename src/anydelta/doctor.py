"""`anydelta doctor`: what would make this machine faster, most first, and the command for it."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution, version
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit
from urllib.request import url2pathname

from . import terminal
from .conformance.run import unavailable
from .core import dispatch, libraries, native
from .rule import torch_library

if TYPE_CHECKING:
    import typer

DRAFTING = (5, 20)
"""The first Transformers that lets hybrid models draft."""


class Advice(NamedTuple):
    what: str
    command: str


def build(beside_torch: bool = False) -> str:
    """The command that builds anydelta again, from the folder that it was installed from if there is one.

    `beside_torch`: without isolation, so that the build finds the installed torch.
    """
    command = "pip install --force-reinstall --no-deps --no-cache-dir"
    if beside_torch:
        command = f"pip install scikit-build-core nanobind cmake ninja && {command} --no-build-isolation"
    return f"{command} {shlex.quote(_source())}"


def _source() -> str:
    try:
        url = json.loads(distribution("anydelta").read_text("direct_url.json") or "{}").get("url", "")
    except (PackageNotFoundError, ValueError):
        url = ""
    return url2pathname(urlsplit(url).path) if url.startswith("file:") else "anydelta"


def advice() -> Iterator[Advice]:
    """Findings, the largest gain first."""
    if native.why_not:
        yield Advice(f"The CPU kernels do not run: {native.why_not}. A C++17 compiler builds them.", build())
    if (forced := dispatch.forced_by_env()) is not None:
        yield Advice(f"{dispatch.ENV} names {forced} for every call.", f"unset {dispatch.ENV}")
    yield from _gpu()
    if not native.why_not:
        yield from _cpu()
    yield from _torch()
    yield from _transformers()


def _gpu() -> Iterator[Advice]:
    if sys.platform == "darwin" and os.uname().machine == "arm64" and _version("mlx") is None:
        yield Advice(
            "MLX, through which mlx-lm's models run on this Mac's GPU, is not installed.", "pip install mlx"
        )
    if shutil.which("nvidia-smi") is None and shutil.which("rocm-smi") is None:
        return
    reasons = unavailable("triton")
    if reasons:
        yield Advice(
            f"There is a GPU, and Triton does not run on it: {reasons[0]}.",
            "install the PyTorch of this GPU (pytorch.org/get-started), then: pip install triton",
        )
        return
    if "tables" not in dispatch.get_backend("triton").describe():
        yield Advice(
            "The Triton kernels run with their heuristic: nothing was tuned on this GPU.", "anydelta tune"
        )


def _cpu() -> Iterator[Advice]:
    facts: dict[str, Any] = dispatch.get_backend("cpu").describe()
    isa, threads = facts["isa"], facts["threads"]
    best = [name for name in facts["isas"] if name != "amx"][-1]  # amx runs by name only
    if isa not in (best, "amx"):
        yield Advice(f"The kernels for {isa} run; this CPU runs those for {best}.", "unset ANYDELTA_CPU_ISA")
    affinity = getattr(os, "sched_getaffinity", None)
    cpus = len(affinity(0)) if affinity else (os.cpu_count() or 1)
    if threads < cpus:
        yield Advice(f"OMP_NUM_THREADS allows {threads} of {cpus} CPUs.", "unset OMP_NUM_THREADS")


def _torch() -> Iterator[Advice]:
    if _version("torch") is None or native.why_not:
        return
    path, reason = torch_library.find()
    if path is not None:
        return
    left_out = reason == f"{torch_library.ENV}=0"
    yield Advice(
        f"torch.ops.anydelta runs from Python and not from C++: {reason}.",
        f"unset {torch_library.ENV}" if left_out else build(beside_torch=True),
    )


def _transformers() -> Iterator[Advice]:
    found = _version("transformers")
    if found is not None and libraries.release(found, 2) < DRAFTING:
        yield Advice(
            f"Transformers {found} refuses drafts with hybrid models; 5.20 takes them.",
            "pip install -U transformers",
        )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def register(app: typer.Typer) -> None:
    """Add `anydelta doctor`."""
    import typer

    json_flag = typer.Option(False, "--json", help="As JSON on stdout.")

    @app.command()
    def doctor(as_json: bool = json_flag) -> None:
        """Say what would make this machine faster, most first, and the command for it.

        Examples:
          anydelta doctor
          anydelta doctor --json
        """
        found = list(advice())
        if as_json:
            return terminal.say(terminal.to_json([each._asdict() for each in found]))
        for number, each in enumerate(found, 1):
            terminal.say(f"{number}. {each.what}\n   {each.command}")
        if not found:
            terminal.say("Nothing to do: this machine runs its fastest kernels. See anydelta info.")
