"""Which backend runs, why the others do not, and that what a backend accepts it also runs."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import types
import warnings
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch

import anydelta
from anydelta.backends.reference.host import Reference
from anydelta.backends.triton import host as triton
from anydelta.conformance import NOT_SUPPORTED, OK, Case, Target
from anydelta.conformance.cases import inputs
from anydelta.conformance.compare import buffers, call
from anydelta.conformance.mixer import random_mixer_case
from anydelta.conformance.run import run_one, unavailable
from anydelta.core import dispatch, plans
from anydelta.core.dispatch import Rejected
from anydelta.rule.spec import CallSpec
from conftest import CPU_REASONS, CPU_TARGETS, REQUIRED

needs_cpu = pytest.mark.skipif(bool(CPU_REASONS), reason="; ".join(CPU_REASONS) or "runs")


def args(framework: str = "numpy", dtype: str = "float32", **shape: Any) -> dict[str, Any]:
    """The arrays of a small valid call."""
    case = Case(T=2, K=8, V=8, dtype=dtype, fresh=True, **shape)
    held = buffers(case, inputs(case), Target("auto", framework=framework))
    return {name: b.array for name, b in held.items()}


def _said(reason: str, spec: CallSpec) -> str:
    return reason


class Fake(Reference):
    """A backend with reasons."""

    def __init__(self, name: str, available: tuple[str, ...] = (), against: tuple[str, ...] = ()):
        self.name, self.reasons, self.ran = name, available, 0
        self.accepts = Reference.accepts.but(rules=tuple(partial(_said, reason) for reason in against))

    def available(self) -> list[Rejected]:
        return [Rejected(r) for r in self.reasons]

    def run(self, plan: None, spec: CallSpec, call: Any) -> None:
        self.ran += 1
        super().run(plan, spec, call)


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Any:
    """install(*backends): these, then the reference, are the whole priority list of the CPU."""

    def use(*backends: Any) -> None:
        for backend in backends:
            module = types.ModuleType(f"anydelta.backends.{backend.name}.host")
            module.BACKEND = backend  # type: ignore[attr-defined]
            monkeypatch.setitem(sys.modules, module.__name__, module)
        names = (*(b.name for b in backends), "reference")
        monkeypatch.setattr(dispatch, "NAMES", names)
        monkeypatch.setattr(dispatch, "PRIORITY", {"cpu": names})
        monkeypatch.setattr(dispatch, "_warned", False)
        monkeypatch.delenv(dispatch.ENV, raising=False)
        dispatch.get_backend.cache_clear()
        plans.forget()

    yield use
    dispatch.get_backend.cache_clear()
    plans.forget()


# ---- choosing
# ------------------------------------------------------------------------------------------------


def test_every_backend_answers_with_reasons() -> None:
    for name in dispatch.NAMES:
        backend = dispatch.get_backend(name)
        assert backend.name == name
        assert all(isinstance(r, Rejected) and str(r) for r in backend.available())
        assert not any(r.reason for r in backend.available()) or name != "reference"


def test_the_reference_ends_every_list() -> None:
    for names in dispatch.PRIORITY.values():
        assert names[-1] == "reference"
        assert set(names) <= set(dispatch.NAMES)


def test_an_unknown_name_lists_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    known = ", ".join(map(repr, dispatch.NAMES))
    for run in (anydelta.gated_delta_rule, anydelta.explain):
        with pytest.raises(ValueError, match=f"{known}; got 'cuda'"):
            run(**args(), backend="cuda")
    monkeypatch.setenv(dispatch.ENV, "cuda")
    for run in (anydelta.gated_delta_rule, anydelta.explain):
        with pytest.raises(ValueError, match=f"ANYDELTA_BACKEND: .*{known}; got 'cuda'"):
            run(**args())
    monkeypatch.setenv(dispatch.ENV, "auto")
    assert anydelta.explain(**args()).forced is None


def test_explain_takes_the_arguments_of_the_call() -> None:
    x = args()
    q = x.pop("q")
    for given, more, message in (
        ((), {}, "missing a required argument: 'q'"), ((q, q, q, q), {}, "multiple values for argument 'k'"),
        ((q,), {"q": q}, "multiple values for argument 'q'"),
        ((q,), {"state": q}, "unexpected keyword argument 'state'"),
        ((q,), {"op": "gated_delta_rule_"}, "unexpected keyword argument 'op'"),
    ):  # fmt: skip
        with pytest.raises(
            TypeError, match=f"explain: requires the arguments of gated_delta_rule.*{message}"
        ):
            anydelta.explain(*given, **{**x, **more})


def test_the_first_backend_without_reasons_runs(install: Any) -> None:
    first, second, third = (
        Fake("first", ("no device", "no driver")),
        Fake("second", (), ("no KDA",)),
        Fake("third"),
    )
    install(first, second, third)
    anydelta.gated_delta_rule(**args())
    assert (first.ran, second.ran, third.ran) == (0, 0, 1)
    trace = anydelta.explain(**args())
    assert trace.chosen == "third"
    assert {n: [str(r) for r in rs] for n, rs in trace.rejected.items()} == {
        "first": ["no device", "no driver"],
        "second": ["no KDA"],
    }
    lines = str(trace).splitlines()
    assert lines[0] == "gated_delta_rule GDA B=1 T=2 H=2 HV=2 K=8 V=8 N=1 float32 state=float32/kv on cpu"
    assert lines[1:] == [
        "  first: no: no device", "  first: no: no driver", "  second: no: no KDA", "  third: runs",
    ]  # fmt: skip


def test_a_named_backend_runs_or_gives_every_reason(install: Any) -> None:
    install(Fake("picky", (), ("no KDA", "no bfloat16")), Fake("able"))
    anydelta.gated_delta_rule(**args(), backend="able")
    with pytest.raises(anydelta.UnsupportedError) as caught:
        anydelta.gated_delta_rule(**args(), backend="picky")
    text = str(caught.value)
    assert text.startswith("gated_delta_rule: ")
    assert all(part in text for part in ("picky", "no KDA", "no bfloat16", 'backend="auto"'))


def test_the_environment_forces_a_backend(install: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = Fake("one"), Fake("two")
    install(one, two)
    anydelta.gated_delta_rule(**args())
    monkeypatch.setenv(dispatch.ENV, "two")  # after a plan was made: the plan must not hide it
    anydelta.gated_delta_rule(**args())
    assert (one.ran, two.ran) == (1, 1)
    assert anydelta.explain(**args()).forced == f"{dispatch.ENV}=two"
    anydelta.gated_delta_rule(**args(), backend="one")  # an argument is closer than the environment
    assert (one.ran, two.ran) == (2, 1)
    monkeypatch.delenv(dispatch.ENV)
    anydelta.gated_delta_rule(**args())
    assert one.ran == 3


def test_a_forced_backend_does_not_fall_back(install: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    install(Fake("absent", ("no device",)))
    monkeypatch.setenv(dispatch.ENV, "absent")
    with pytest.raises(
        anydelta.UnsupportedError, match="ANYDELTA_BACKEND=absent cannot run this call: no device"
    ):
        anydelta.gated_delta_rule(**args())


def test_the_fallback_warns_once_with_the_reasons(install: Any) -> None:
    install(Fake("absent", ("no device",)))
    with pytest.warns(RuntimeWarning, match=r"slow reference runs \(absent: no device\)"):
        anydelta.gated_delta_rule(**args())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        anydelta.gated_delta_rule(**args(HV=4))
        anydelta.gated_delta_rule(**args())


@pytest.mark.parametrize("how", ["named", "environment", "native"])
def test_no_warning_without_a_fallback(how: str, install: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    install(*([Fake("able")] if how == "native" else [Fake("absent", ("no device",))]))
    if how == "environment":
        monkeypatch.setenv(dispatch.ENV, "reference")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        anydelta.gated_delta_rule(**args(), backend="reference" if how == "named" else "auto")


def test_a_failure_during_the_run_is_not_a_reason_to_fall_back(install: Any) -> None:
    class Broken(Fake):
        def run(self, plan: None, spec: CallSpec, call: Any) -> None:
            raise OSError("launch failed")

    install(Broken("broken"))
    with pytest.raises(OSError, match="launch failed"):
        anydelta.gated_delta_rule(**args())


def test_an_invalid_call_is_refused_before_any_backend_is_asked(install: Any) -> None:
    class Silent(Fake):
        def available(self) -> list[Rejected]:
            raise AssertionError("asked")

    install(Silent("silent"))
    bad = args()
    bad["k"] = bad["k"][:, :1]
    with pytest.raises(ValueError, match="gated_delta_rule: k must be"):
        anydelta.gated_delta_rule(**bad)
    with pytest.raises(ValueError, match="gated_delta_rule: k must be"):
        anydelta.explain(**bad)


def test_explain_runs_nothing(install: Any) -> None:
    able = Fake("able")
    install(able)
    assert anydelta.explain(**args()).chosen == "able"
    assert able.ran == 0


@needs_cpu
@pytest.mark.parametrize("framework", ["numpy", "torch"])
def test_auto_takes_the_native_kernel(framework: str) -> None:
    for dtype in ("float32", "float16", "bfloat16"):
        assert anydelta.explain(**args(framework, dtype)).chosen == "cpu"
    assert anydelta.explain(**args(framework, "float64")).chosen == "reference"


@needs_cpu
def test_explain_says_what_the_forward_pass_under_autograd_runs() -> None:
    from anydelta import _core

    call_args = args("torch")
    call_args["q"] = call_args["q"].clone().requires_grad_()
    before = _core.calls()
    anydelta.gated_delta_rule(**call_args)
    assert _core.calls() > before  # the native kernel ran; the backward pass is the reference's
    assert anydelta.explain(**call_args).chosen == "cpu"


# ---- the instruction sets of the CPU
# -------------------------------------------------------------------------


@needs_cpu
def test_a_forced_isa_is_the_one_that_runs() -> None:
    from anydelta.backends.cpu import host as cpu

    case = Case(T=40, K=64, V=64, gate="keep")
    results = {}
    before = cpu.isa()
    for target in CPU_TARGETS:
        if target.framework == "numpy":
            with target.active():
                assert cpu.BACKEND.describe()["isa"] == target.isa
                held = {n: b.array for n, b in buffers(case, inputs(case), target).items()}
                results[target.isa] = call(case, held, "cpu")[0].tobytes()
    assert cpu.isa() == before
    # The baseline of x86-64 has no fused multiply-add, so its last bits differ from all others'.
    if len(results) > 1 and "avx2" in results:
        assert results["baseline"] != results["avx2"]


@needs_cpu
def test_an_unknown_isa_lists_the_known_ones() -> None:
    from anydelta.backends.cpu import host as cpu

    with pytest.raises(ValueError, match=f"{', '.join(cpu.isas())}.*'z80'"), cpu.forced_isa("z80"):
        pass


# ---- what a backend accepts, `run` runs
# ---------------------------------------------------------------------


def specs() -> list[Case]:
    """Every pair of the choices that a call has, on tiny shapes."""
    choices: dict[str, tuple[Any, ...]] = {
        "dtype": ("float32", "bfloat16", "float16", "float64"),
        "state_dtype": ("float32", "bfloat16", "float16"),
        "gate_dtype": ("float32", "bfloat16", "float16", "float64"),
        "kda": (False, True),
        "heads": ("interleaved", "tiled"),
        "layout": ("kv", "vk"),
        "decay": ("log", "linear", "raw"),
        "logit": (False, True),
        "l2norm": (False, True),
        "mask": ("", "left"),
        "snapshots": (0, 3),
        "where": ("rows", "pool", "packed", "packed pool", "fresh"),
        "out": ("functional", "inplace", "nofinal"),
        "strides": ("dense", "permuted", "strided", "expanded"),
        "state_strides": ("dense", "padded", "transposed"),
        "HV": (2, 6),
    }
    rng = np.random.default_rng(3)
    out: dict[Case, None] = {}
    for (a, xs), (b, ys) in itertools.combinations(choices.items(), 2):
        for x, y in itertools.product(xs, ys):
            row = {name: values[rng.integers(len(values))] for name, values in choices.items()} | {
                a: x,
                b: y,
            }
            where, how = row.pop("where"), row.pop("out")
            if row["dtype"] == "float64":
                row["state_dtype"] = "float64"
            if where == "fresh":
                row["fresh"] = True
                if row["state_dtype"] in ("bfloat16", "float16") and not row["snapshots"]:
                    row["state_dtype"] = "float32"
                how = "functional" if how == "inplace" else how
            if "packed" in where:
                row["seqlens"] = (2, 0, 3)
            else:
                row.update(B=2, T=2)
            if "pool" in where:
                row.update(pool=5, indices=(4, -1, 2) if "packed" in where else (4, 1))
            row[how] = True
            row.pop("functional", None)
            out[Case(H=2, K=8, V=5, **row)] = None
    return list(out)


@pytest.mark.parametrize("backend", REQUIRED)
def test_a_required_backend_runs(backend: str) -> None:
    assert unavailable(backend) == ()


def check_accepted(
    backend: str, runs: Any, framework: str, cases: Sequence[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the cases that `runs` accepts come out right, and are not refused any more when they are to run."""

    def strict(method: Any, *given: Any) -> Any:
        try:
            return method(*given)
        except anydelta.UnsupportedError as error:
            raise AssertionError(f"accepted, and then refused: {error}") from error

    for name in ("prepare", "run"):
        monkeypatch.setattr(runs, name, partial(strict, getattr(runs, name)))
    plans.forget()
    results = [run_one(case, Target(backend, framework=framework)) for case in cases]
    bad = [f"{r.reproduce()}: {r.reasons}" for r in results if r.status not in (OK, NOT_SUPPORTED)]
    assert not bad, "\n".join(bad)
    refused = sum(r.status == NOT_SUPPORTED for r in results)
    assert refused < len(cases) // 2
    assert backend != "reference" or not refused


@pytest.mark.parametrize("framework", ["numpy", "torch"])
@pytest.mark.parametrize("kind", ["rule", "mixer"])
@pytest.mark.parametrize("backend", dispatch.NAMES)
def test_what_a_backend_accepts_it_runs(
    backend: str, kind: str, framework: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if reasons := unavailable(backend):
        pytest.skip("; ".join(reasons))
    runs = dispatch.mixer_of(backend) if kind == "mixer" else dispatch.get_backend(backend)
    if runs is None or framework not in runs.accepts.rows["framework"].allowed:
        pytest.skip(f"{backend} has no {kind} on {framework} arrays")
    rng = np.random.default_rng(4)
    cases: Any = specs() if kind == "rule" else [random_mixer_case(rng) for _ in range(60)]
    assert len(cases) >= (300 if kind == "rule" else 60)
    every = 3 if backend == "reference" else 12 if triton.interpreted() else 1
    check_accepted(backend, runs, framework, cases[::every], monkeypatch)


@pytest.mark.skipif(find_spec("triton") is None or triton.interpreted(), reason="not here, or it runs above")
def test_what_triton_accepts_runs_in_its_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", __file__, "-k", "accepts_it_runs and triton and torch"]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "1"}
    )
    assert done.stdout.startswith(".."), done.stdout[-2000:]
    assert done.returncode == 0


def test_torch_and_numpy_plans_do_not_mix() -> None:
    case = Case(T=3, K=8, V=8)
    values = inputs(case)
    got = []
    for framework in ("numpy", "torch", "numpy", "torch"):
        held = {n: b.array for n, b in buffers(case, values, Target("auto", framework=framework)).items()}
        o, _ = call(case, held, "auto")
        assert isinstance(o, torch.Tensor if framework == "torch" else np.ndarray)
        got.append(np.asarray(o).tobytes())
    assert got[0] == got[2]
    assert got[1] == got[3]
