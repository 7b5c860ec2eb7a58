"""Shared by all tests: the targets of this machine."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from typing import Any, NamedTuple, NoReturn

import pytest

from anydelta.conformance import SHORT_CASES, Target, targets
from anydelta.conformance.run import unavailable
from anydelta.core import plans

REQUIRED = tuple(filter(None, os.environ.get("ANYDELTA_REQUIRE", "").split(",")))
"""Backends without which the tests must fail instead of skipping; CI names them."""
CPU_REASONS = unavailable("cpu")
"""Why the cpu backend does not run here; empty when it does."""
CPU_TARGETS: list[Target] = [] if CPU_REASONS else targets(["cpu"])
"""Every instruction set with every framework."""

FOR_DEVICES = tuple(c for c in SHORT_CASES if not c.erase and c.state_dtype != "float16")
"""For the backends that take neither `erase` nor float16 states; test_accepts.py shows that they say so."""
LINES_FOR_DEVICES = r"^(?!.* (erase=|state_dtype=float16))"
"""The same for `anydelta conform --filter`."""


def without(why: str) -> NoReturn:
    """Skip for want of something that `make setup` installs or a clone holds; in CI, fail."""
    if REQUIRED:
        pytest.fail(f"CI must have this: {why}")
    pytest.skip(why, allow_module_level=True)


class Ran(NamedTuple):
    """What a run of the program left."""

    exit_code: int
    stdout: str
    stderr: str

    @property
    def output(self) -> str:
        return self.stdout + self.stderr


def run_program(*args: str) -> Ran:
    """`anydelta ARGS` in this process."""
    from anydelta import cli

    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as stop:
        cli.main(list(args))
    assert isinstance(stop.value.code, int)
    return Ran(stop.value.code, out.getvalue(), err.getvalue())


def count_native(monkeypatch: pytest.MonkeyPatch, module: Any, function: str) -> list[int]:
    """What each call of a function of the extension gives that this module makes from now on."""
    core, found = module._core, list[int]()

    class Counting:
        def __getattr__(self, name: str) -> Any:
            if name != function:
                return getattr(core, name)

            def counted(*arguments: Any) -> int:
                found.append(getattr(core, function)(*arguments))
                return found[-1]

            return counted

    monkeypatch.setattr(module, "_core", Counting())
    return found


def same_bits_on_threads(compute: Callable[[], dict[str, Any]]) -> None:
    """The same tensors, bit for bit, by one thread, two and three, and whatever scratch memory held before."""
    import torch

    from anydelta.core.native import core

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = compute()
        for threads in (2, 3):
            torch.set_num_threads(threads)
            core.fill_scratch(0xFF)
            for name, x in compute().items():
                assert torch.equal(x, want[name]), (threads, name)
    finally:
        core.fill_scratch(-1)
        torch.set_num_threads(before)


def states_kept(taken: Callable[..., int], state: int, lengths: tuple[int, ...]) -> None:
    """A backward pass of four value heads on two q/k heads keeps no more than a state per 64 tokens and head.

    Beside it there is a scratch for each thread, the same for any T. `taken(threads, *lengths)` gives bytes.
    """
    import torch

    before = torch.get_num_threads()
    try:
        scratch = taken(1, 64) - 2 * state  # those of the value heads of one q/k head
        for threads in (1, 2, 4):
            kept = taken(threads, *lengths) - min(threads, 2 * len(lengths)) * scratch
            assert 0 < kept <= sum(-(-t // 64) for t in lengths) * 4 * state
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def fresh_plans() -> Iterator[None]:
    """Plans remember the device and how its kernel was cut: none from before, none left."""
    plans.forget()
    yield
    plans.forget()
