"""Every backend against the float64 oracle, on the list of cases; and a proof that the comparison can
fail."""

from __future__ import annotations

import itertools
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch

from anydelta.backends.reference.host import Reference
from anydelta.conformance import (
    CASES,
    FAIL,
    LOG_CASES,
    MIXER_CASES,
    NOT_SUPPORTED,
    OK,
    SKIPPED,
    Case,
    Target,
    check,
    run,
    targets,
)
from anydelta.conformance.cases import FLOAT64_CASES, KEYS, MASKS, NORMED_KEYS, STRIDES, STRONG, random_case
from anydelta.conformance.compare import Prepared
from anydelta.conformance.run import run_one, summary
from anydelta.core import dispatch
from anydelta.core.accepts import Row
from anydelta.rule.arguments import Call
from anydelta.rule.spec import CallSpec
from conftest import CPU_REASONS, CPU_TARGETS

BATCH = 60
TESTED = tuple(c for c in CASES if c.work <= 40e6)
"""`anydelta conform` runs the rest too, on which the oracle alone takes a minute."""
SMALL = tuple(c for c in CASES if c.work <= 20_000)[::3]
"""For the reference, which takes some 50 us a token."""


@lru_cache(maxsize=BATCH)
def prepared(case: Case) -> Prepared:
    """Values and exact answer, kept while the targets take their turns."""
    return Prepared.of(case)


def failures(cases: tuple[Case, ...], target: Target) -> list[str]:
    bad = [r for c in cases if (r := run_one(prepared(c), target)).status != OK]
    return [f"{r.status}: {r.reproduce()}: {'; '.join(r.reasons)}" for r in bad]


def batches(cases: tuple[Case, ...]) -> list[Any]:
    return [pytest.param(cases[i : i + BATCH], id=f"{i}+") for i in range(0, len(cases), BATCH)]


@pytest.mark.skipif(bool(CPU_REASONS), reason="; ".join(CPU_REASONS) or "runs")
@pytest.mark.parametrize("cases", batches(TESTED))
def test_cpu(cases: tuple[Case, ...]) -> None:
    for target in CPU_TARGETS:
        bad = failures(cases, target)
        assert not bad, f"{len(bad)} on {target}:\n" + "\n".join(bad)


@pytest.mark.parametrize("framework", ["numpy", "torch"])
@pytest.mark.parametrize("cases", batches(SMALL))
def test_reference(cases: tuple[Case, ...], framework: str) -> None:
    bad = failures(cases, Target("reference", framework=framework))
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize("framework", ["numpy", "torch"])
def test_float64_runs_on_the_reference(framework: str) -> None:
    assert not failures(FLOAT64_CASES, Target("reference", framework=framework))


@pytest.mark.skipif(bool(CPU_REASONS), reason="; ".join(CPU_REASONS) or "runs")
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_cpu_with_threads(threads: int) -> None:
    cases = tuple(c for c in TESTED if c.work > 200_000 or c.seqlens or c.indices)[::7]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert not failures(cases, Target("cpu", framework="torch"))
    finally:
        torch.set_num_threads(before)


# ---- the list
# ------------------------------------------------------------------------------------------------


def test_a_case_reads_back_from_its_line() -> None:
    assert len(set(CASES)) == len(CASES) > 1000
    for case in (*CASES, *FLOAT64_CASES):
        assert Case.parse(str(case)) == case


@pytest.mark.parametrize(
    ("line", "text"),
    [("X=3", "no field is called 'X'"), ("T=x", "T cannot be 'x'"), ("T", "T cannot be ''"), 
     ("kda=3", "kda cannot be"),
     ("key=bad", "key must be one of"), ("B=2 seqlens=3,4", "seqlens go with B=1"),
     ("pool=3 indices=1,2", "one per"), ("fresh inplace", "fresh goes with")],
)  # fmt: skip
def test_a_wrong_line_says_what_is_wrong(line: str, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Case.parse(line)


# (heads, size, T, sequences, HV/H, permuted, KDA, K): ggml's tests/test-backend-ops.cpp, correctness and speed.
GGML = (
    (32, 128, 1, 1, 1, False, False, 1), (32, 16, 1, 1, 1, False, False, 1), (32, 16, 1, 1, 1, True, True, 1),
    (32, 16, 1, 1, 1, False, True, 1), (16, 64, 1, 2, 1, False, False, 1), (4, 64, 4, 1, 1, False, False, 1),
    (4, 64, 4, 2, 1, False, False, 1), (8, 32, 4, 2, 2, False, False, 1), (4, 64, 4, 2, 1, True, False, 1),
    (4, 64, 4, 1, 1, True, False, 1), (4, 64, 1, 1, 1, False, True, 1), (4, 64, 1, 2, 1, False, True, 1),
    (4, 16, 1, 2, 1, False, True, 1), (4, 32, 4, 1, 1, False, True, 1), (4, 64, 4, 2, 1, False, True, 1),
    (8, 32, 4, 2, 2, False, True, 1), (4, 64, 4, 2, 1, True, True, 1), (4, 16, 4, 2, 1, True, True, 1),
    *((4, 64, T, 1, 1, False, False, 1) for T in (64, 127, 256, 65, 100, 200)), (4, 64, 127, 2, 1, False, False, 1),
    (16, 128, 128, 1, 3, False, False, 1), (16, 128, 300, 2, 3, False, False, 1), (16, 128, 100, 1, 3, False, False, 1),
    (32, 128, 512, 1, 1, False, False, 1), (32, 128, 2048, 1, 1, False, False, 1),
    *((4, 64, T, 1, 1, False, True, 1) for T in (64, 33, 100)),
    (4, 16, 2, 1, 1, False, False, 2), (4, 32, 4, 1, 1, False, False, 4), (4, 64, 4, 2, 1, False, False, 4),
    (8, 128, 4, 1, 1, False, False, 4), (4, 64, 4, 2, 1, False, True, 4), (8, 32, 4, 2, 2, False, True, 4),
    (4, 32, 8, 1, 1, False, False, 3), (4, 64, 16, 2, 1, False, False, 4),
    (16, 64, 1, 1, 1, False, False, 1), (32, 128, 1, 1, 1, False, True, 1), (32, 128, 64, 1, 1, False, True, 1),
    *((heads, 128, T, 1, 1, False, False, 1) for heads in (4, 32) for T in (64, 256, 512, 1024)),
)  # fmt: skip


@pytest.mark.parametrize("kda", [False, True])
def test_the_list_has_ggmls(kda: bool) -> None:
    for heads, size, T, B, rep, permuted, vector, K in GGML:
        if vector != kda:
            continue
        twin = Case(
            B=B, T=T, H=heads, HV=heads * rep, K=size, V=size, kda=kda, strides="permuted" if permuted else "dense",
            snapshots=K, heads="tiled", layout="vk", gate="ggml", inplace=permuted,
        )  # fmt: skip
        assert twin in CASES, twin


def test_the_list_covers_the_contract() -> None:
    """Every kind of case that the list must have."""

    def some(**fields: Any) -> bool:
        return any(all(getattr(c, k) == v for k, v in fields.items()) for c in CASES)

    for T in (1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 100, 127, 128, 200, 256, 1000):
        assert some(T=T, kda=False)
        assert some(T=T, kda=True)
    for Ks in range(1, 18):
        mine = [c for c in CASES if c.snapshots == Ks and not c.seqlens]
        assert {np.sign(c.T - Ks) for c in mine} == {-1, 0, 1}
        both = [c for c in CASES if c.snapshots == Ks]
        assert any(c.mask for c in both)
        assert any(c.seqlens for c in both)
        assert any(c.indices for c in both)
        assert {c.layout for c in both} == {"kv", "vk"}
        assert any(c.state_dtype == "bfloat16" for c in both)
    assert {c.HV // c.H for c in CASES} >= {1, 2, 3, 4}
    for heads in ("interleaved", "tiled"):
        assert {c.HV // c.H for c in CASES if c.heads == heads and c.H > 1} >= {1, 2, 3, 4}
    assert {c.K for c in CASES if c.K == c.V} >= {1, 7, 16, 32, 33, 48, 64, 80, 96, 112, 128, 160, 192, 256}
    assert sum(c.K != c.V for c in CASES) > 100
    assert any(c.seqlens and 0 in c.seqlens for c in CASES)
    assert any(c.indices and c.pool > c.N and -1 in c.indices for c in CASES)
    assert any(c.refused for c in CASES)
    assert {c.mask for c in CASES} == {"", *MASKS}
    assert {c.key for c in CASES} == {*KEYS, *NORMED_KEYS}
    for kind in (CASES, MIXER_CASES, LOG_CASES):
        for gate, kda in itertools.product(STRONG, (False, True)):
            assert {c.T for c in kind if c.gate == gate and c.kda == kda} >= (
                {20} if kind is LOG_CASES else {1, 4, 64}
            )
        assert (
            {c.kda for c in kind if c.state == "faded"}
            == {c.kda for c in kind if c.key == "faint"}
            == {False, True}
        )
    assert {c.strides for c in CASES} == set(STRIDES)
    for gate, beta in itertools.product(
        ("keep", "one", "twenty", "wipe", "inf", "mixed"), ("zero", "one", "mid")
    ):
        assert some(gate=gate) or some(beta=beta)
    for dtype, state, gate in itertools.product(("float32", "bfloat16", "float16"), repeat=3):
        assert some(dtype=dtype, state_dtype=state, gate_dtype=gate)
    for decay, kda, logit in itertools.product(("log", "linear", "raw"), (False, True), (False, True)):
        assert some(decay=decay, kda=kda, logit=logit)


# ---- what a wrong backend looks like
# -------------------------------------------------------------------------


class Mutant(Reference):
    """The reference with one mistake."""

    def __init__(
        self, name: str, before: Callable[[CallSpec, Call], CallSpec | None] | None = None,
        after: Callable[[CallSpec, Call], None] | None = None,
    ):  # fmt: skip
        self.name, self.before, self.after = name, before, after

    def run(self, plan: None, spec: CallSpec, call: Call) -> None:
        wrong = (self.before and self.before(spec, call)) or spec
        super().run(plan, wrong, call)
        if self.after:
            self.after(spec, call)


def option(**changes: Any) -> Callable[[CallSpec, Call], CallSpec]:
    """An option that is ignored."""
    return lambda spec, call: replace(spec, options=replace(spec.options, **changes))


def nan_in_o(spec: CallSpec, call: Call) -> None:
    if call.o.size:
        call.o.reshape(-1)[-1] = np.nan


def stale_slot(spec: CallSpec, call: Call) -> None:
    if spec.snapshots > spec.T:
        call.snapshots[spec.T :] = 0


def one_slot_late(spec: CallSpec, call: Call) -> None:
    if spec.snapshots >= 2 and spec.T >= 2 and not spec.packed:
        call.snapshots[0] = call.snapshots[1]


def unnamed_row(spec: CallSpec, call: Call) -> None:
    if spec.inplace and spec.pooled:
        free = sorted(set(range(spec.P)) - set(call.state_indices.tolist()))
        call.state_out[free] = 0


def initial_state(spec: CallSpec, call: Call) -> None:
    if call.state_in is not None and not spec.inplace and call.state_in.flags.writeable:
        call.state_in[...] = 0


def scaled_q(spec: CallSpec, call: Call) -> None:
    if call.q.flags.writeable:
        call.q *= 2


def masked_output(spec: CallSpec, call: Call) -> None:
    if call.mask is not None:
        call.o[~call.mask] = 1e-6


def forgets_mask(spec: CallSpec, call: Call) -> None:
    if call.mask is not None:
        call.mask = np.ones_like(call.mask)


def no_decay(spec: CallSpec, call: Call) -> None:
    if spec.options.decay == "log":
        call.g = np.zeros_like(call.g)


def first_channel_gate(spec: CallSpec, call: Call) -> None:
    if spec.kda:
        call.g = np.broadcast_to(call.g[..., :1], call.g.shape)


def half_state(spec: CallSpec, call: Call) -> None:
    if call.state_out is not None and spec.state_dtype == "float32":
        call.state_out[...] = call.state_out.astype(np.float16)


def truncated_o(spec: CallSpec, call: Call) -> None:
    if spec.dtype == "float16":  # one bit less than the type holds
        call.o.view(np.uint16)[...] &= 0xFFFE


def skipped_output(spec: CallSpec, call: Call) -> None:
    if spec.pooled and not spec.packed:
        call.o[call.state_indices < 0] = 1


def loses_last_row(spec: CallSpec, call: Call) -> None:
    if call.state_out is not None and spec.N > 1 and not spec.pooled:
        call.state_out[-1] = 0


def gap_write(spec: CallSpec, call: Call) -> None:
    if (
        spec.inplace
        and not call.state_in.flags.c_contiguous
        and call.state_in.strides[-1] == call.state_in.itemsize
    ):
        shape = (*call.state_in.shape[:-1], call.state_in.shape[-1] + 1)
        np.lib.stride_tricks.as_strided(call.state_in, shape, call.state_in.strides)[..., -1] = 0


def raises(spec: CallSpec, call: Call) -> None:
    raise RuntimeError("launch failed")


MUTANTS = [
    Mutant("ignores_heads", option(heads="interleaved")),
    Mutant("ignores_eps", option(qk_l2norm_eps=0.0)),
    Mutant("ignores_norm", option(qk_l2norm=False)),
    Mutant("ignores_logit", option(beta_is_logit=False)),
    Mutant("ignores_lower_bound", option(lower_bound=None)),
    Mutant("ignores_scale", option(scale=None)),
    Mutant("forgets_mask", forgets_mask), Mutant("no_decay", no_decay),
    Mutant("gates_as_gda", first_channel_gate), Mutant("raises", raises), Mutant("nan_in_o", None, nan_in_o),
    Mutant("stale_slot", None, stale_slot), Mutant("one_slot_late", None, one_slot_late),
    Mutant("unnamed_row", None, unnamed_row), Mutant("writes_initial_state", None, initial_state),
    Mutant("writes_q", None, scaled_q), Mutant("masked_output", None, masked_output),
    Mutant("half_state", None, half_state), Mutant("truncated_o", None, truncated_o),
    Mutant("skipped_output", None, skipped_output), Mutant("loses_last_row", None, loses_last_row),
    Mutant("gap_write", None, gap_write),
]  # fmt: skip


def install(monkeypatch: pytest.MonkeyPatch, backend: Any) -> str:
    """Make a backend known to dispatch under a name of its own."""
    name = f"mutant_{backend.name}"
    module = types.ModuleType(f"anydelta.backends.{name}.host")
    module.BACKEND = backend  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(dispatch, "NAMES", (*dispatch.NAMES, name))
    return name


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_a_mistake_is_found(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    target = Target(install(monkeypatch, mutant))
    found = next((c for c in SMALL if run_one(c, target).status == FAIL), None)
    assert found is not None, f"no case of {len(SMALL)} notices that a backend {mutant.name}"


def test_a_backend_that_leaves_the_output_unwritten_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Idle(Reference):
        name = "idle"

        def run(self, plan: None, spec: CallSpec, call: Call) -> None:
            pass

    name = install(monkeypatch, Idle())
    case = Case(T=4, K=16, V=16)
    for framework in ("numpy", "torch"):
        assert not check(case, Target("reference", framework=framework)).errors
        assert check(case, Target(name, framework=framework)).errors


# ---- records
# -------------------------------------------------------------------------------------------------


def test_results_are_records(monkeypatch: pytest.MonkeyPatch) -> None:
    class Picky(Reference):
        name = "picky"

        accepts = Reference.accepts.but(kda=Row((False,), "takes GDA only"))

    name = install(monkeypatch, Picky())
    got = list(run([Case(K=8), Case(K=8, kda=True)], [Target(name)]))
    assert [r.status for r in got] == [OK, NOT_SUPPORTED]
    assert "takes GDA only" in got[1].reasons[0]
    assert summary(got)[0]["OK"] == 1
    assert got[0].record()["case"] == str(Case(K=8))
    assert got[0].reproduce().startswith(f"anydelta conform --backend {name}")


def test_a_backend_that_cannot_run_is_skipped_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    class Absent(Reference):
        name = "absent"

        def available(self) -> tuple[dispatch.Rejected, ...]:
            return (dispatch.Rejected("there is no such device"),)

    name = install(monkeypatch, Absent())
    got = list(run([Case(K=8)], targets([name])))
    assert [(r.status, r.reasons) for r in got] == [(SKIPPED, ("there is no such device",))]


def test_an_unknown_isa_is_named() -> None:
    with pytest.raises(ValueError, match=r"isa must be one that runs on this machine.*'z80'"):
        targets(["cpu"], ["z80"])


def test_random_cases_are_valid() -> None:
    rng = np.random.default_rng(5)
    for _ in range(300):
        case = random_case(rng)
        assert Case.parse(str(case)) == case
