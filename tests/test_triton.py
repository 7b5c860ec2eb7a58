"""The Triton backend without a GPU: its numbers in Triton's interpreter, its answers to dispatch, and what its kernels
take on the GPUs they are compiled for. tests/test_gpu.py is for where a GPU is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from anydelta.backends.triton import host as backend
from anydelta.conformance import CASES
from anydelta.conformance.gradients import GRADIENT_CASES
from anydelta.conformance.run import parse, unavailable
from anydelta.core import dispatch
from anydelta.rule.arguments import Call, Options
from anydelta.rule.spec import CallSpec, check_call

pytest.importorskip("triton", reason="the package triton is not installed")

from anydelta.backends.triton import aot, tables

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "docs" / "measurements" / "triton-aot.json"


def interpret(jobs: list[tuple[str, dict[str, int]]]) -> list[tuple[str, list[str], list[str]]]:
    """(status, reasons, names of the kernels that ran) per job, from a process with TRITON_INTERPRET=1."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "interpret_triton.py")],
        input=json.dumps(jobs), capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "1"},
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def assert_ok(jobs: list[tuple[str, dict[str, int]]]) -> list[list[str]]:
    results = interpret(jobs)
    assert len(results) == len(jobs)
    bad = [
        f"{job}: {reasons}" for job, (status, reasons, _) in zip(jobs, results, strict=True) if status != "OK"
    ]
    assert not bad, "\n".join(bad)
    return [ran for _, _, ran in results]


@pytest.fixture(autouse=True)
def only_shipped_tables(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What this machine's user has tuned does not count."""
    monkeypatch.setenv(tables.ENV, "")
    tables.rows.cache_clear()
    yield
    tables.rows.cache_clear()


# ---- numbers
# ---------------------------------------------------------------------------------------------------


def test_token_by_token() -> None:
    """Every 9th of the small cases; all: TRITON_INTERPRET=1 anydelta conform --require triton --framework torch."""
    # Triton takes no states in float16, and says so
    cases = [c for c in CASES if c.T <= 16 and c.work <= 20_000 and c.state_dtype != "float16"][::25]
    assert len(cases) >= 25
    for ran in assert_ok([(str(c), {}) for c in cases]):
        assert set(ran) <= {"recurrent"}


CHUNKED = (
    "T=33 K=16 V=16 gate=mixed",
    "T=33 K=16 V=16 kda gate=mixed",
    "T=40 H=1 HV=2 K=20 V=31 kda gate=inf heads=tiled layout=vk inplace",
    "T=40 H=2 HV=4 K=33 V=8 gate=inf heads=tiled layout=vk dtype=float16",
    "T=65 H=1 HV=1 K=64 V=16 gate=keep key=alike beta=one",
    "T=65 H=1 HV=1 K=64 V=16 kda gate=keep key=alike beta=one dtype=bfloat16",
    "T=65 H=1 HV=2 K=16 V=16 l2norm decay=raw dt_bias=full logit dtype=bfloat16 gate_dtype=bfloat16",
    "T=34 H=1 HV=2 K=16 V=16 kda l2norm decay=raw dt_bias=flat lower_bound=-5.0 logit gate=one",
    "T=34 H=1 HV=1 K=16 V=16 decay=linear gate=wipe scale=-2.0",
    "B=2 T=34 H=1 HV=1 K=16 V=16 mask=left snapshots=3 state_dtype=bfloat16",
    "B=2 T=34 H=1 HV=1 K=16 V=16 kda mask=random snapshots=3 inplace state_strides=padded",
    "T=34 H=1 HV=1 K=16 V=16 snapshots=2 nofinal strides=permuted",
    "seqlens=33,0,70,1 K=16 V=16 snapshots=2 pool=6 indices=5,1,-1,0 inplace strides=fused",
    "seqlens=20,40,0 K=16 V=16 kda pool=4 indices=3,-1,0 int64 mask=random",
    "seqlens=64,1,63 H=1 HV=1 K=16 V=16 kda fresh layout=vk",
    "B=2 T=20 K=16 V=16 mask=none inplace",
)  # fmt: skip


def test_chunks() -> None:
    for ran in assert_ok([(line, {}) for line in CHUNKED]):
        assert ran[-1] == "scan" or ran[-2:] == ["scan", "recurrent"]
        assert "prepare" in ran


def test_every_launch_gives_the_same_result() -> None:
    """Block sizes, and sequences cut into segments: with fewer chunks than segments, packed, in place, and empty."""
    jobs: list[tuple[str, dict[str, int]]] = []
    for chunk in (16, 32, 64):
        jobs.append(("T=70 H=1 HV=1 K=16 V=40 kda gate=keep", {"chunk": chunk, "scan_BV": 16}))
    cut = {"segments": 3, "chunk": 16}
    jobs += [
        ("T=100 H=1 HV=1 K=16 V=24 gate=keep", cut),
        ("T=100 H=1 HV=1 K=20 V=40 kda gate=mixed inplace layout=vk snapshots=2", cut),
        ("T=20 H=1 HV=1 K=16 V=16 gate=keep fresh", cut),
        ("seqlens=70,0,40 H=1 HV=1 K=16 V=16 gate=keep inplace pool=5 indices=4,-1,2", cut),
        ("seqlens=70,0,40 H=1 HV=1 K=16 V=16 kda gate=keep", cut),
    ]
    ran = assert_ok(jobs)
    assert all(names.count("scan") == 2 for names in ran[3:])
    assert_ok([("T=5 K=20 V=31", {"BV": BV}) for BV in (1, 4, 32)] + [("T=20 K=20 V=31", {"short": 64})])


MIXER = (
    "mixer B=2 T=1 H=2 HV=4 K=16 V=64 split=grouped S=4",
    "mixer T=3 H=1 HV=2 K=16 V=33 kda norm=sigmoid split=split snapshots=3 heads=tiled bias dtype=bfloat16",
    "mixer B=2 T=5 H=1 HV=1 K=16 V=16 mask=random snapshots=3 norm=plain neg W=2 S=3 pool=4 indices=3,-1",
    "mixer seqlens=2,0,1 H=2 HV=2 K=16 V=16 norm=none linear W=1 S=1 layout=vk inplace=False",
    "mixer B=4 T=3 H=1 HV=2 K=16 V=32 pool=32 indices=2,-1,2,6 int64 snapshots=3 scattered W=3 S=4",
    "mixer B=2 T=40 H=1 HV=2 K=16 V=24 mask=random snapshots=2 neg conv_float dtype=float16",
    "mixer B=3 T=20 H=2 HV=2 K=16 V=16 pool=6 indices=4,-1,0 snapshots=2",
    "mixer B=3 T=20 H=2 HV=2 K=16 V=16 pool=16 indices=4,-1,0 snapshots=3 scattered kda mask=random",
    "mixer seqlens=20,0,50 H=1 HV=2 K=16 V=16 kda mask=random norm=sigmoid strides=strided W=5",
)


def test_mixer() -> None:
    """A step is two launches; all: TRITON_INTERPRET=1 anydelta conform --require triton --framework torch."""
    jobs: list[tuple[str, dict[str, int]]] = [(line, {"BV": 16}) for line in MIXER]
    ran = assert_ok(jobs)
    assert all(names == ["convolve", "recurrent"] for names in ran[:5])
    assert ran[5] == ["convolve", "convolve", "operands", "prepare", "scan", "recurrent", "gated_norm"]
    assert all("scan" in names for names in ran[6:])


def test_gradients() -> None:
    """Against the float64 recurrence under autograd; through torch.autograd.grad, so the wiring too. Every other case;
    all: TRITON_INTERPRET=1 python -m anydelta.conformance.gradients."""
    for ran in assert_ok([(str(c), {"gradients": 1}) for c in GRADIENT_CASES[::2]]):
        assert ran[-4:] == ["scan", "back", "pairs", "gradients"]


def test_gradients_that_the_kernels_do_not_take() -> None:
    """Linear gates: the recurrence in torch gives them, and says so once."""
    code = """
import warnings, torch, anydelta
q, k, v = torch.randn(3, 1, 4, 1, 16).requires_grad_()
g = torch.tensor([0.0, 0.5, 1.0, 0.0]).reshape(1, 4, 1).requires_grad_()
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    for _ in range(2):
        o, _ = anydelta.gated_delta_rule(q, k, v, g=g, beta=torch.ones(1, 4, 1), decay="linear", backend="triton")
        o.sum().backward()
assert [w for w in seen if "linear" in str(w.message)] and len(seen) == 1, [str(w.message) for w in seen]
assert g.grad.isfinite().all() and g.grad[0, 0].item() == 0 != g.grad[0, 3].item()
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "TRITON_INTERPRET": "1"})


def test_calls_compile_as_one_graph() -> None:
    """torch.compile(fullgraph=True) of rule and mixer; all that tests/test_gpu.py can do without a GPU:
    TRITON_INTERPRET=1 pytest tests/test_gpu.py."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(ROOT / "tests" / "test_gpu.py"), "-k", "compiles_as_one_graph and not 20"],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:]
    assert "2 passed" in done.stdout


def test_a_pool_that_is_a_snapshot_slot() -> None:
    """The state is read before the slots are written, although other programs write them."""
    code = """
import torch, anydelta
torch.manual_seed(0)
N, Ks, T, H, D = 3, 2, 4, 2, 16
q, k, v = torch.randn(3, N, T, H, D)
gates = dict(g=-torch.rand(N, T, H), beta=torch.rand(N, T, H), qk_l2norm=True,
             state_indices=torch.tensor([2, 0, 1]), backend="triton")
first = torch.randn(N, H, D, D)
apart = torch.empty(Ks, N, H, D, D)
o, s = anydelta.gated_delta_rule(q, k, v, initial_state=first, snapshots=apart, **gates)
slots = torch.empty(Ks, N, H, D, D); slots[1] = first
o2, s2 = anydelta.gated_delta_rule(q, k, v, initial_state=slots[1], snapshots=slots, **gates)
assert torch.equal(o, o2) and torch.equal(s, s2) and torch.equal(apart, slots)
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "TRITON_INTERPRET": "1"})


def test_triton_is_imported_behind_a_driver_with_another_llvm() -> None:
    """wgpu-native on lavapipe, then triton: two LLVMs, which ended the process before backends/llvm.py."""
    if unavailable("webgpu"):
        pytest.skip("webgpu does not run here")
    code = """
import numpy as np, anydelta
x = np.ones((1, 2, 1, 16), np.float32)
gates = dict(g=-np.ones((1, 2, 1), np.float32), beta=np.ones((1, 2, 1), np.float32))
for _ in range(2):
    anydelta.gated_delta_rule(x, x, x, **gates, backend="webgpu")
    import triton
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- dispatch
# --------------------------------------------------------------------------------------------------


def spec(framework: str = "torch", device: str = "cuda", **changes: Any) -> CallSpec:
    x, gate = np.zeros((1, 4, 2, 16), np.float32), np.zeros((1, 4, 2), np.float32)
    plain = check_call(Call(x, x, x, gate, gate), Options(), inplace=False)
    return replace(plain, framework=framework, device=device, **changes)


@pytest.mark.skipif(backend.interpreted(), reason="the interpreter was asked for")
@pytest.mark.parametrize(
    ("changes", "reasons"),
    [
        ({}, []), ({"device": "xpu"}, []), ({"K": 4096, "V": 1}, []),
        ({"device": "cpu"}, ["takes tensors on cuda or xpu; got device cpu"]),
        ({"framework": "numpy", "dtype": "float64"}, ["takes torch tensors; got numpy arrays",
                                                      "takes float32, bfloat16 and float16; got float64"]),
        ({"K": 4097}, ["takes K up to 4096; got 4097"]),
    ],
)  # fmt: skip
def test_what_is_not_accepted_has_its_reasons(changes: dict[str, Any], reasons: list[str]) -> None:
    assert list(dispatch.against(backend.BACKEND, spec(**changes))) == reasons


def test_gpus_ask_triton_first() -> None:
    for device in ("cuda", "xpu"):
        assert dispatch.PRIORITY[device] == ("triton", "reference")


@pytest.mark.skipif(
    backend.interpreted() or torch.cuda.is_available() or torch.xpu.is_available(), reason="Triton runs here"
)
def test_without_a_gpu_the_reason_says_what_to_do() -> None:
    (reason,) = backend.BACKEND.available()
    assert "no GPU driver" in str(reason)
    assert "TRITON_INTERPRET=1" in str(reason)


# ---- launches
# --------------------------------------------------------------------------------------------------


def test_arguments_come_from_shapes_alone() -> None:
    """On meta tensors, which hold nothing: whatever would wait for the device to read a value would raise."""
    for shape in aot.shipped():
        for _, machine in aot.TARGETS.values():
            names = [c.kernel.fn.__name__ for c in aot.calls_of(shape, machine)]
            if shape.backward:
                assert names[-4:] == ["scan", "back", "pairs", "gradients"]
            elif shape.mixer and shape.T <= 16:
                assert names == ["convolve", "recurrent"]
            elif shape.mixer:
                assert names == ["convolve", "convolve", "operands", "prepare", "scan", "gated_norm"]
            elif shape.T <= 16:
                assert names == ["recurrent"]
            else:
                assert names[-1 - bool(shape.snapshots)] == "scan"
                assert ("scores" in names) == shape.kda
                assert ("operands" in names) == (shape.kda or shape.dtype != "bfloat16")


def test_few_heads_are_cut_into_segments_and_many_are_not() -> None:
    machine = aot.TARGETS["sm_90"][1]
    few = aot.calls_of(aot.Shape(T=32768, N=1, H=2, HV=4, inplace=False), machine)
    many = aot.calls_of(aot.Shape(T=32768, N=1, inplace=False), machine)
    assert [c.args["SEGMENTS"] for c in few if "SEGMENTS" in c.args] == [4, 4]
    assert few[-1].grid == 128
    assert [c.args["SEGMENTS"] for c in many if "SEGMENTS" in c.args] == [1]


# ---- what the kernels take
# -------------------------------------------------------------------------------------


def recorded(target: str) -> list[dict[str, Any]]:
    """What `python -m anydelta.backends.triton.aot` wrote about a target."""
    rows = [row for row in json.loads(RECORD.read_text())["rows"] if row["target"] == target]
    if not rows:
        pytest.skip(f"{RECORD.name} has no rows for {target} yet")
    return rows


@pytest.mark.parametrize("target", aot.TARGETS)
def test_the_record_is_of_what_ships_and_within_bounds(target: str) -> None:
    machine = aot.TARGETS[target][1]
    rows = recorded(target)
    ships = [(s, c) for s in aot.shipped() for c in aot.calls_of(s, machine)]
    assert [(r["shape"], r["kernel"]) for r in rows] == [(str(s), c.kernel.fn.__name__) for s, c in ships]
    for row, (_, c) in zip(rows, ships, strict=True):
        assert row["launch"] == aot.launch_of(c), row
        assert row["shared"] <= machine.shared, row
        assert row["spilled"] <= aot.spill_limit(row["kernel"], target, row["shape"]), row
    for shape in {row["shape"] for row in rows}:  # the processor's seconds, recorded: nothing is timed here
        assert sum(row["seconds"] for row in rows if row["shape"] == shape) <= aot.FIRST_CALL, shape


SAMPLE = [("sm_90", aot.Shape()), ("gfx942", aot.Shape(kda=True, H=32))]
if os.environ.get("ANYDELTA_AOT") == "all":
    SAMPLE = [(target, shape) for target in aot.TARGETS for shape in aot.shipped()]


@pytest.mark.skipif(backend.interpreted(), reason="the interpreter does not compile")
@pytest.mark.parametrize(("target", "shape"), SAMPLE, ids=str)
def test_what_ships_compiles(target: str, shape: aot.Shape) -> None:
    """A sample; with ANYDELTA_AOT=all every specialisation for every target."""
    machine = aot.TARGETS[target][1]
    for c in aot.calls_of(shape, machine):
        done = aot.compile_call(c, target)
        assert done.spilled <= aot.spill_limit(done.kernel, target, str(shape)), done
        assert 0 < done.registers <= 512
        assert done.shared <= machine.shared


def test_cases_name_the_launches_they_need() -> None:
    assert all(parse(line) for line in (*CHUNKED, *MIXER))
