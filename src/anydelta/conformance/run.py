"""Runs cases on targets and returns records. cli.py prints them."""

from __future__ import annotations

import importlib
import importlib.util
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from ..core import dispatch
from ..terminal import first_line, one_line
from .cases import Case
from .compare import NotRunnable, Prepared, Target, Verdict, check
from .gradients import check_gradients
from .mixer import WORD, MixerCase, MixerPrepared, check_mixer_case
from .token_log import WORD as LOG_WORD
from .token_log import LogCase, check_log_case, runs_the_log

OK, FAIL, NOT_SUPPORTED, SKIPPED = "OK", "FAIL", "NOT SUPPORTED", "SKIPPED"
STATUSES = (OK, FAIL, NOT_SUPPORTED, SKIPPED)
EVERY_CASE = "*"


@dataclass(frozen=True)
class Result:
    """One case on one target. `case` is its reproduction line, or "*" if the target could not run at all."""

    backend: str
    isa: str | None
    framework: str
    case: str
    status: str
    reasons: tuple[str, ...] = ()
    worst: float = 0.0
    """The largest error of any part, divided by the allowed error: 1 is the limit."""
    seconds: float = 0.0
    device: str = "cpu"
    """The tensors' device, by torch's name."""
    gradients: bool = False
    """Whether the backward pass was run."""

    @property
    def target(self) -> tuple[str, str | None, str, str]:
        return self.backend, self.isa, self.framework, self.device

    def reproduce(self) -> str:
        """The command that repeats this one result."""
        isa = f" --isa {self.isa}" if self.isa else ""
        device = f" --device {self.device}" if self.device != "cpu" else ""
        where = f"--backend {self.backend}{isa} --framework {self.framework}{device}"
        where += " --gradients" if self.gradients else ""
        return f"anydelta conform {where} --case '{self.case}'"

    def record(self) -> dict[str, object]:
        return asdict(self)


def backend_of(name: str) -> dispatch.Backend:
    """As dispatch.get_backend, but a backend that is not built is a ValueError too."""
    backend = dispatch.get_backend(name)
    if backend is None:
        raise ValueError(f"backend {name!r} has no implementation in this installation")
    return backend


def unavailable(name: str) -> tuple[str, ...]:
    """Why the backend cannot run at all here; empty when it can."""
    try:
        return tuple(str(r) for r in backend_of(name).available())
    except (ImportError, ValueError) as error:
        return (str(error),)
    except (Exception, SystemExit) as error:  # any error of a package that is installed but does not import
        return (f"{type(error).__name__}: {one_line(error)}",)


def isas(name: str) -> list[str]:
    """The instruction sets that a backend can be forced to use on this machine."""
    if unavailable(name):
        return []
    offered = getattr(dispatch.host(name), "isas", None)
    return list(offered()) if offered else []


FRAMEWORKS = ("numpy", "torch", "mlx")


def frameworks() -> list[str]:
    """The default frameworks: NumPy, and torch if it is installed."""
    return ["numpy", "torch"] if importlib.util.find_spec("torch") else ["numpy"]


def targets(
    backends: Sequence[str] = dispatch.NAMES,
    only_isas: Sequence[str] = (),
    only_frameworks: Sequence[str] = (),
    device: str = "cpu",
) -> list[Target]:
    """One target per backend, ISA and framework. A backend that cannot run here also gets one, to say so.

    On another device than the CPU all arrays are torch tensors. A backend that takes no host arrays names its tensors'
    device in `tensors_on`. This replaces `device` if that is the CPU.

    Raises:
        ValueError: an ISA that none of the backends offers, or a device that is not here.
    """
    if device != "cpu":
        import torch

        try:
            torch.empty(1, device=device).cpu()
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise ValueError(
                f"device must be a torch device of this machine; got {device!r}: {first_line(error)}"
            ) from None
    offered = {name: isas(name) for name in backends}
    known = [isa for names in offered.values() for isa in names]
    for isa in only_isas:
        if isa not in known:
            names = ", ".join(dict.fromkeys(known)) or "but there is none"
            raise ValueError(f"isa must be one that runs on this machine, {names}; got {isa!r}")
    out = []
    for name in backends:
        if unavailable(name):
            if not only_isas:
                out.append(Target(name))
            continue
        chosen: list[str | None] = [i for i in offered[name] if not only_isas or i in only_isas]
        if not chosen:
            if only_isas:
                continue  # this backend has no such ISA
            chosen = [None]
        where = getattr(backend_of(name), "tensors_on", "cpu") if device == "cpu" else device
        wanted = only_frameworks or (frameworks() if where == "cpu" else ("torch",))
        out += [Target(name, isa, fw, where) for isa in chosen for fw in wanted]
    return out


def run(cases: Iterable[Case], on: Sequence[Target], *, gradients: bool = False) -> Iterator[Result]:
    """Run every case on every target, case by case, so that the oracle runs once. `gradients`: the backward pass."""
    usable = []
    for target in on:
        if reasons := unavailable(target.backend) if target.backend != "auto" else ():
            skipped = Result(target.backend, target.isa, target.framework, EVERY_CASE, SKIPPED, reasons)
            yield replace(skipped, device=target.device)
        else:
            usable.append(target)
    if any(target.framework == "torch" for target in usable):
        import torch  # noqa: F401  # its seconds are not the first case's
    for case in cases if usable else ():
        prepared = case if gradients else prepare(case)
        for target in usable:
            if is_asked(case, target):
                yield run_one(prepared, target, gradients=gradients)


def parse(line: str) -> Case:
    """The case that prints as `line`. Lines of the mixer and the log begin with that word.

    Raises:
        ValueError: an unknown field, or a value that does not fit it.
    """
    first, *others = line.split(maxsplit=1) or [""]
    if first == WORD.strip():
        return MixerCase.parse("".join(others))
    return LogCase.parse("".join(others)) if first == LOG_WORD.strip() else Case.parse(line)


def prepare(case: Case) -> Prepared | MixerPrepared:
    return MixerPrepared.of(case) if isinstance(case, MixerCase) else Prepared.of(case)


def is_asked(case: Case, target: Target) -> bool:
    """Whether the target runs cases of this kind at all."""
    if isinstance(case, MixerCase):
        return has_mixer(target.backend) and target.framework != "mlx"
    if isinstance(case, LogCase):
        return runs_the_log(target.backend) and target.framework != "mlx" and target.device == "cpu"
    return True


def has_mixer(backend: str) -> bool:
    """Whether the backend has a kernel for the mixer. Others do not run its cases."""
    return backend == "auto" or dispatch.mixer_of(backend) is not None


def run_one(case: Case | Prepared | MixerPrepared, target: Target, *, gradients: bool = False) -> Result:
    prepared = prepare(case) if isinstance(case, Case) and not gradients else case
    line = case if isinstance(case, Case) else case.case
    start, worst = time.perf_counter(), 0.0
    try:
        run_check: Callable[[Any, Target], Verdict] = (
            check_mixer_case if isinstance(prepared, MixerPrepared) else check
        )
        if isinstance(line, LogCase):
            run_check = check_log_case
        if gradients:
            run_check = partial(check_gradients, native=True)
        verdict = run_check(prepared, target)
        status, reasons, worst = (FAIL if verdict.errors else OK), tuple(verdict.errors), verdict.worst
    except dispatch.UnsupportedError as error:
        status, reasons = NOT_SUPPORTED, (str(error),)
    except NotRunnable as error:
        status, reasons = SKIPPED, (str(error),)
    seconds = time.perf_counter() - start
    return Result(
        target.backend, target.isa, target.framework, str(line), status, reasons, worst, seconds,
        target.device, gradients,
    )  # fmt: skip


def summary(results: Iterable[Result]) -> list[dict[str, object]]:
    """One record per target: how many results of each status, the worst score, the time."""
    rows: dict[object, dict[str, Any]] = {}
    for r in results:
        row = rows.setdefault(
            r.target,
            {
                "backend": r.backend,
                "isa": r.isa,
                "framework": r.framework,
                "device": r.device,
                **dict.fromkeys(STATUSES, 0),
                "worst": 0.0,
                "seconds": 0.0,
            },
        )
        row[r.status] += 1
        row["worst"] = max(row["worst"], r.worst)
        row["seconds"] += r.seconds
    return list(rows.values())
