"""`anydelta tune --dry-run`: compiles every launch that would be tried, for any GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field

from ..backends.triton.aot import TARGETS, Compiled, calls_of, compile_call, source_of
from ..backends.triton.config import forced
from ..terminal import first_line
from .problems import Change, Problem, groups


@dataclass
class Trial:
    """One launch as compiled."""

    key: str
    change: Change
    kernels: list[Compiled] = field(default_factory=list)
    """Kernels of the call that no earlier trial compiled."""
    fits: bool = True
    """Whether all its kernels, also those compiled earlier, fit into shared memory."""
    error: str = ""


def compile_all(problems: Iterable[Problem], target: str, tell: Callable[[str, float], None]) -> list[Trial]:
    """Compile all launches of all problems for one of aot.TARGETS; a kernel that several share once."""
    machine = TARGETS[target][1]
    plan = [(p, change) for p in problems for group in groups(p, machine) for change in group]
    seen: dict[str, Compiled] = {}
    trials = []
    for i, (problem, change) in enumerate(plan):
        tell(f"{problem.key} {_text(change)}", i / len(plan))
        trial = Trial(problem.key, change)
        trials.append(trial)
        try:
            with forced(**{**asdict(problem.heuristic(machine)), **change}):
                calls = calls_of(problem.shape, machine)
            for call in calls:
                source = source_of(call)
                name = f"{call.kernel.fn.__name__} {source.signature} {source.constants} {source.attrs} {call.warps}"
                if name not in seen:
                    seen[name] = compile_call(call, target)
                    trial.kernels.append(seen[name])
                trial.fits &= seen[name].shared <= machine.shared
        except (
            Exception
        ) as error:  # compilers raise any kind of error: it is recorded, and the other trials go on
            trial.error = first_line(error)
    return trials


def _text(change: Change) -> str:
    return " ".join(f"{name}={value}" for name, value in change.items())
