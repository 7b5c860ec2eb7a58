"""The Metal backend without a Mac: its kernels and its host code on the emulator of tests/metal, and what it refuses.

The conformance list runs whole, by both kernels; with every access checked, and under AddressSanitizer, in parts that
are always the same. `python tests/metal/conform.py` runs any of it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="the Metal backend takes torch tensors")
if sys.platform != "linux":
    pytest.skip(
        "the emulator is for Linux; a Mac runs: anydelta conform --require metal", allow_module_level=True
    )

sys.path.insert(0, str(Path(__file__).parent / "metal"))

import conform
import emulator
import torch

import anydelta
from anydelta.backends.metal import host as metal
from anydelta.backends.metal import launch
from anydelta.bench.contenders import mac
from anydelta.bench.contenders import packages as peers
from anydelta.bench.measure import cases, ops
from anydelta.conformance import SHORT_CASES, Case
from anydelta.conformance.run import FAIL, NOT_SUPPORTED, OK
from anydelta.core import dispatch, plans
from anydelta.rule.arguments import Call, Options
from anydelta.rule.spec import CallSpec, check_call
from conftest import without
from test_dispatch import check_accepted, specs

if emulator.compiler() is None:
    without("there is no C++ compiler for the emulator of Metal")

ROOT = Path(__file__).parent.parent


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """tests/metal/conform.py as a command."""
    command = [sys.executable, str(Path(conform.__file__)), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def assert_ok(*arguments: str, every: int = 1) -> None:
    """All of the list but what the documents say is refused: K over 256, erase, and states in float16."""
    cases = SHORT_CASES[::every]
    refused = sum(c.K > launch.MAX_K or bool(c.erase) or c.state_dtype == "float16" for c in cases)
    done = run("--jobs", str(min(os.cpu_count() or 1, 8)), "--every", str(every), *arguments)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    count = f"{len(cases) - refused} OK" + (f", {refused} NOT SUPPORTED" if refused else "") + ";"
    assert done.stdout.splitlines()[-1].startswith(count), done.stdout


# ---- numbers

BOTH = pytest.mark.parametrize("kernel", [(), ("--chunks",)], ids=["tokens", "chunks"])


@BOTH
def test_the_whole_list(kernel: tuple[str, ...]) -> None:
    assert_ok(*kernel)


@BOTH
def test_every_access_is_in_bounds_and_ordered(kernel: tuple[str, ...]) -> None:
    assert_ok("--mode", "check", *kernel, every=13)


@BOTH
def test_under_address_sanitizer(kernel: tuple[str, ...]) -> None:
    assert_ok("--mode", "asan", *kernel, every=29)


def test_every_argument_is_in_the_list() -> None:
    """What must run, by the number of cases that have it and that Metal takes."""
    taken = [c for c in SHORT_CASES if c.K <= launch.MAX_K and not c.erase]
    assert {c.K for c in taken} >= set(range(32, 257, 32)) - {224}  # below
    for has in (
        lambda c: c.K != c.V, lambda c: c.heads == "tiled" and c.HV > c.H, lambda c: c.seqlens, lambda c: c.pool,
        lambda c: c.mask, lambda c: c.strides != "dense", lambda c: c.state_strides != "dense",
        lambda c: 0 < c.snapshots < c.T, lambda c: c.snapshots > c.T,
        lambda c: c.state_dtype == "bfloat16", lambda c: c.dtype == "float16", lambda c: c.dtype == "bfloat16",
    ):  # fmt: skip
        for kda in (False, True):
            assert sum(c.kda == kda and bool(has(c)) for c in taken) >= 3


@pytest.mark.parametrize("chunks", [False, True])
def test_the_most_threadgroup_memory(chunks: bool) -> None:
    """K = 224 is where KDA in chunks fills it to 32320 of 32768 bytes. It is not in the list."""
    lines = ("T=33 H=1 HV=1 K=224 V=40", "T=33 H=1 HV=1 K=224 V=40 kda gate=mixed")
    results = conform.conform([Case.parse(line) for line in lines], "check", chunks=chunks)
    assert [r.status for r in results] == [OK, OK], results


@pytest.mark.parametrize("chunks", [False, True])
def test_half_states(chunks: bool) -> None:
    """The operator has no float16 states, the kernels do."""
    q, k, v = torch.randn(3, 1, 20, 2, 32)
    call = Call(q, k, v, -torch.rand(1, 20, 2), torch.rand(1, 20, 2))
    full = {"initial_state": torch.randn(1, 2, 32, 32).half().float(), "qk_l2norm": True}
    want = anydelta.gated_delta_rule(q, k, v, g=call.g, beta=call.beta, backend="reference", **full)
    call = replace(
        call, state_in=full["initial_state"], o=torch.empty_like(v), state_out=torch.empty(1, 2, 32, 32)
    )
    plain = check_call(call, Options(qk_l2norm=True), inplace=False)
    call = replace(call, state_in=call.state_in.half(), state_out=call.state_out.half())
    half = replace(plain, state_dtype="float16")
    with metal.emulated(emulator.Emulator()), metal.forced_isa(metal.isas()[chunks]):
        metal.BACKEND.run(metal.BACKEND.prepare(half, call), half, call)
    torch.testing.assert_close(call.o, want[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(call.state_out.float(), want[1], rtol=1e-3, atol=1e-3)


# ---- the emulator finds what is planted


def planted(old: str, new: str, mode: str = "check", *, T: int = 20, chunks: bool = False) -> str:
    """What a changed kernel is told. The change must hit."""
    case = Case(T=T, H=1, HV=1, K=32, V=20)
    (result,) = conform.conform([case], mode, chunks=chunks, change=(old, new))
    assert result.status == FAIL
    return result.reasons[0]


def test_a_missing_barrier_is_found() -> None:
    barrier = "threadgroup_barrier(mem_flags::mem_threadgroup);"
    for before, after in (
        ("", "  // nobody reads the chunk before any more"),
        ("lane);\n        ", "\n\n        float G[C]"),
    ):
        text = planted(f"{before}{barrier}{after}", before + after, chunks=True)
        assert "race in threadgroup memory" in text


def test_two_lanes_that_write_one_place_are_found() -> None:
    text = planted("const bool gives = r < 2 && mine < V;", "const bool gives = mine < V;")
    assert "race in device memory" in text
    assert "write what another wrote" in text


def test_a_write_out_of_bounds_is_found() -> None:
    change = ("const bool gives = r < 2 && mine < V;", "const bool gives = r < 2;")
    text = planted(*change, T=1)
    assert "writes 4 bytes in no buffer" in text
    done = run("--mode", "asan", "--case", "T=1 K=32 V=20", "--change", *change)
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
    assert "WRITE of size 4" in done.stderr


READERS = """
kernel void readers(device float* x [[buffer(0)]], uint simdgroup [[simdgroup_index_in_threadgroup]],
                    uint lane [[thread_index_in_simdgroup]]) {
    const float here = simdgroup == 0 || lane < 2 ? x[0] : 0.0f;
    simdgroup_barrier(mem_flags::mem_device);
    BARRIER
    if (simdgroup == 1 && lane == 1) x[0] = here + 1.0f;
}
"""


def test_a_write_is_told_from_earlier_reads_of_another_simdgroup() -> None:
    source = "#include <metal_stdlib>\nusing namespace metal;\n" + READERS
    for barrier in ("", "threadgroup_barrier(mem_flags::mem_device);"):
        kernel = emulator.Emulator("check").compile_shader(source.replace("BARRIER", barrier)).readers
        if barrier:
            kernel(torch.zeros(1), threads=(64, 1, 1), group_size=(64, 1, 1))
            continue
        with pytest.raises(RuntimeError, match="write what another read"):
            kernel(torch.zeros(1), threads=(64, 1, 1), group_size=(64, 1, 1))


def test_unwritten_threadgroup_memory_is_poison() -> None:
    unwritten = "if (on) s.beta[i] = beta_of<Ref>(P, a, w, now);"
    text = planted("s.beta[i] = on ? beta_of<Ref>(P, a, w, now) : 0.0f;", unwritten, "fast", T=5, chunks=True)
    assert "not finite" in text


def test_lanes_that_part_ways_are_found() -> None:
    text = planted("    float mine = (odd", "    if (odd) return 0.0f;\n    float mine = (odd", "fast")
    assert "wait" in text or "different operations" in text


# ---- dispatch


def spec(framework: str = "torch", device: str = "mps", **changes: Any) -> CallSpec:
    x, gate = np.zeros((1, 4, 2, 16), np.float32), np.zeros((1, 4, 2), np.float32)
    plain = check_call(Call(x, x, x, gate, gate), Options(), inplace=False)
    return replace(plain, framework=framework, device=device, **changes)


@pytest.mark.parametrize(
    ("changes", "reasons"),
    [
        ({}, []), ({"K": 256, "V": 1}, []),
        ({"device": "cpu"}, ["takes tensors on mps; got device cpu"]),
        ({"framework": "numpy", "dtype": "float64"}, ["takes torch tensors; got numpy arrays",
                                                      "takes float32, bfloat16 and float16; got float64"]),
        ({"K": 257}, ["takes K up to 256; got 257"]),
    ],
)  # fmt: skip
def test_what_is_not_accepted_has_its_reasons(changes: dict[str, Any], reasons: list[str]) -> None:
    assert list(dispatch.against(metal.BACKEND, spec(**changes))) == reasons


def test_what_it_refuses_runs_on_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the device of the tensors, with a warning that says why."""
    monkeypatch.setitem(dispatch.PRIORITY, "cpu", dispatch.PRIORITY["mps"])
    monkeypatch.setattr(dispatch, "_warned", False)
    host = emulator.Emulator()
    for K in (32, 257):
        q, k, v = torch.randn(3, 1, 2, 1, K)
        gates = dict(g=-torch.rand(1, 2, 1), beta=torch.rand(1, 2, 1), qk_l2norm=True)
        want = anydelta.gated_delta_rule(q, k, v, **gates, backend="reference")
        with metal.emulated(host), warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            got = anydelta.gated_delta_rule(q, k, v, **gates)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        assert len(host.launches) == 1
        assert ("takes K up to 256; got 257" in "".join(str(w.message) for w in said)) == (K == 257)


def test_what_is_accepted_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    with metal.emulated(emulator.Emulator()):
        check_accepted("metal", metal.BACKEND, "torch", specs()[::20], monkeypatch)


def test_a_compiler_that_refuses_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    host = emulator.Emulator(change=lambda text: text.replace("simdgroup_multiply(", "unknown("))
    monkeypatch.setattr(metal, "_host", lambda: host)
    q, k, v = torch.randn(3, 1, 64, 1, 32)
    call = Call(q, k, v, -torch.rand(1, 64, 1), torch.rand(1, 64, 1))
    with pytest.warns(RuntimeWarning, match="prompts go token by token"):
        assert not metal._chosen(check_call(call, Options(), inplace=False), call)


def test_here_it_says_why_not() -> None:
    (reason,) = map(str, metal.BACKEND.available())
    assert reason == "needs an Apple GPU through torch.mps; this is Linux"
    assert dispatch.choose(spec()).rejected["metal"]
    code = "from anydelta.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "conform", "--backend", "metal"], capture_output=True, text=True
    )
    assert f"SKIPPED metal: {reason}" in done.stdout


def test_chunks_are_for_long_prompts_that_fit() -> None:
    assert not launch.chunks_fit(spec(T=63))
    assert launch.chunks_fit(spec(T=64))
    assert not launch.chunks_fit(spec(T=64, snapshots=1))
    assert not launch.chunks_fit(spec(T=100, packed=True, N=2))
    assert launch.chunks_fit(spec(T=64, K=256))
    assert not launch.chunks_fit(spec(T=64, K=256, kda=True))


def test_the_faster_way_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    host = emulator.Emulator()
    q, k, v = torch.randn(3, 1, 64, 1, 32)
    g, beta = -torch.rand(1, 64, 1), torch.rand(1, 64, 1)
    with metal.emulated(host):
        call = Call(q, k, v, g, beta)
        times = metal.measure_chunks(check_call(call, Options(), inplace=False), call)
        assert set(times) == {False, True}
        assert len(host.launches) == 12
        chosen = {}
        for way in ("0", "1"):
            monkeypatch.setenv(metal.CHUNK_ENV, way)
            plans.forget()
            chosen[way] = anydelta.gated_delta_rule(q, k, v, g=g, beta=beta, qk_l2norm=True, backend="metal")
    torch.testing.assert_close(chosen["0"], chosen["1"], rtol=1e-4, atol=1e-5)


def test_a_pool_that_is_a_snapshot_slot() -> None:
    """The state is read before the slots are written, although other lanes write them."""
    N, Ks, T, H, D = 3, 2, 4, 2, 32
    q, k, v = torch.randn(3, N, T, H, D)
    gates = dict(g=-torch.rand(N, T, H), beta=torch.rand(N, T, H), qk_l2norm=True, backend="metal",
                 state_indices=torch.tensor([2, 0, 1]))  # fmt: skip
    first = torch.randn(N, H, D, D)
    with metal.emulated(emulator.Emulator()):
        apart = torch.empty(Ks, N, H, D, D)
        o, s = anydelta.gated_delta_rule(q, k, v, initial_state=first, snapshots=apart, **gates)
        slots = torch.empty(Ks, N, H, D, D)
        slots[1] = first
        o2, s2 = anydelta.gated_delta_rule(q, k, v, initial_state=slots[1], snapshots=slots, **gates)
    assert torch.equal(o, o2)
    assert torch.equal(s, s2)
    assert torch.equal(apart, slots)


def test_what_is_beyond_it_is_refused() -> None:
    case = Case.parse("T=2 K=257 V=16")
    (result,) = conform.conform([case])
    assert result.status == NOT_SUPPORTED


# ---- the work per token, and the commands of a Mac


def test_less_work_than_mlx_lm() -> None:
    """Loads, bytes, exchanges between lanes and barriers; mlx-lm's kernels also agree with the reference."""
    pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "metal" / "work.py")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = {}
    for line in done.stdout.splitlines()[2:]:
        name, *numbers = (cell.strip() for cell in line.strip("|").split("|"))
        rows[name] = [float(n) for n in numbers]
    for gate, theirs in (("GDA", ("packed", "generic")), ("KDA", ("generic",))):
        for other in theirs:
            mine = rows[f"anydelta {gate}"]
            assert all(a <= b for a, b in zip(mine, rows[f"mlx-lm {gate}, {other}"], strict=True)), rows
    page = (ROOT / "docs" / "measurements" / "metal-work.md").read_text(encoding="utf-8")
    assert all(
        f"| {name} |" in page for name in rows
    )  # how many loads a compiler leaves depends on its version


def test_the_benchmark_of_a_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its wiring, with the emulator for the GPU and MLX's CPU device; and here it says why not."""
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
    monkeypatch.setattr(mac.MlxBuiltin, "missing", lambda self: None)
    case = next(c for c in cases.presets() if c.name == "gda-t1-h4x4-d64-b1")
    with metal.emulated(emulator.Emulator()), mx.stream(mx.cpu):
        field = [peers.Anydelta("metal"), mac.MlxBuiltin(), peers.Transformers()]
        settings = ops.Settings(rounds=2, sample_seconds=0.001)
        report = ops.measure([case], field, threads=[1], settings=settings, backend="metal")
    assert [(r.contender, r.status) for r in report.records] == [(c.name, "ok") for c in field]
    assert report.records[0].detail == "backend metal"

    code = "from anydelta.cli import main; main()"
    command = [sys.executable, "-c", code, "bench", "ops", "--backend", "metal", "--peers"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (
        2, "anydelta bench ops: needs an Apple GPU through torch.mps; this is Linux.\n",
    )  # fmt: skip


SOURCES = [
    launch.source(algorithm, K, kda, dtype, dtype, dtype, dtype)
    for algorithm in ("delta_rule", "delta_chunk")
    for K, kda, dtype in ((128, False, 0), (100, True, 1), (256, False, 2))
]


@pytest.mark.skipif(
    not (CLANG := shutil.which("clang++") or shutil.which("clang++-15")), reason="needs clang"
)
def test_pointers_keep_their_address_space() -> None:
    """As C++14 with device, constant and threadgroup as address spaces, which the emulator leaves out."""
    assert CLANG
    for source in SOURCES:
        assert not emulator.parse(source, CLANG)
        wrong = source.replace(
            "device const uchar* base, bool wide", "threadgroup const uchar* base, bool wide"
        )
        assert wrong != source
        assert "error" in emulator.parse(wrong, CLANG)


def test_every_reference_names_its_address_space() -> None:
    """As Metal demands of parameters and variables. torch takes ASCII alone."""
    for source in SOURCES:
        assert source.isascii()
        code = re.sub(r"//.*|#define UNROLL.*", "", source)
        for declared in re.findall(r"([\w ]+?)\s*(?:[*&]|\(&)\s*\w+\s*[,)=;\[]", code):
            words = declared.split()
            if words and words[-1] in (
                "uchar",
                "float",
                "float2",
                "Params",
                "Arrays",
                "Work",
                "Scratch",
                "S8",
            ):
                assert {"device", "constant", "threadgroup", "thread"} & set(words), declared


def test_torch_takes_the_text_as_it_is() -> None:
    """compile_shader puts torch's own headers in the place of some #include lines; of ours it must leave all."""
    from torch.utils._cpp_embed_headers import _embed_headers

    include = Path(torch.__file__).parent / "include"
    for algorithm in ("delta_rule", "delta_chunk"):
        source = launch.source(algorithm, 128, True, 1, 0, 0, 0)
        lines = [line + "\n" for line in source.split("\n")]
        assert _embed_headers(lines, [include], set()).strip() == source.strip()
