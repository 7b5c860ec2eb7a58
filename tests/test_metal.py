"""The Metal backend without a Mac: its kernels and its host code on the emulator of tests/metal, and what it refuses.

The whole list: python tests/metal/conform.py, then again with --chunks.
"""

from __future__ import annotations

import subprocess
import sys
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
from anydelta import dispatch
from anydelta.backends import metal
from anydelta.bench import cases, mac, ops, peers
from anydelta.conformance import CASES, Case
from anydelta.conformance.run import FAIL, NOT_SUPPORTED, OK
from anydelta.kernels.metal import launch
from anydelta.spec import Call, CallSpec, Options, check_call
from conftest import without

if emulator.compiler() is None:
    without("there is no C++ compiler for the emulator of Metal")

ROOT = Path(__file__).parent.parent


def assert_ok(cases: list[Case], mode: str = "fast", *, chunks: bool = False) -> None:
    results = conform.conform(cases, mode, chunks=chunks)
    bad = [f"{r.case}: {r.reasons}" for r in results if r.status != OK]
    assert not bad, "\n".join(bad)


# ---- numbers

LISTED = [c for c in CASES if c.K <= launch.MAX_K and c.work < 100_000]
CHUNKED = (
    "T=33 K=32 V=16 gate=mixed",
    "T=33 K=32 V=16 kda gate=mixed",
    "T=40 H=1 HV=2 K=20 V=31 kda gate=inf heads=tiled layout=vk inplace",
    "T=65 H=1 HV=1 K=128 V=40 gate=keep key=alike beta=one dtype=float16",
    "T=65 H=1 HV=1 K=64 V=16 kda gate=keep key=alike beta=one dtype=bfloat16",
    "T=34 H=1 HV=2 K=32 V=16 kda l2norm decay=raw dt_bias=flat lower_bound=-5.0 logit gate=one gate_dtype=bfloat16",
    "T=34 H=1 HV=1 K=256 V=8 decay=linear gate=wipe scale=-2.0",
    "B=2 T=34 H=1 HV=1 K=32 V=16 mask=left snapshots=3 state_dtype=bfloat16",
    "seqlens=33,0,70,1 K=32 V=16 snapshots=2 pool=6 indices=5,1,-1,0 inplace strides=fused",
    "B=2 T=9 H=1 HV=2 K=16 V=32 kda inplace pool=32 indices=5,-1 snapshots=2 scattered",
)  # fmt: skip


def test_token_by_token() -> None:
    assert_ok(LISTED[::25])


def test_in_chunks() -> None:
    assert_ok([Case.parse(line) for line in CHUNKED], chunks=True)


@pytest.mark.parametrize("chunks", [False, True])
def test_every_access_is_in_bounds_and_ordered(chunks: bool) -> None:
    assert_ok([Case.parse(line) for line in (CHUNKED[0], CHUNKED[4], CHUNKED[8])], "check", chunks=chunks)


def test_under_address_sanitizer() -> None:
    lines = [arg for line in (CHUNKED[2], CHUNKED[7]) for arg in ("--case", line)]
    command = [sys.executable, str(Path(conform.__file__)), "--mode", "asan"]
    done = subprocess.run(
        [*command, "--chunks", *lines], capture_output=True, text=True
    )  # the second needs both kernels
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "2 OK" in done.stdout


# ---- the emulator finds what is planted


def planted(old: str, new: str, mode: str = "check", *, T: int = 20, chunks: bool = False) -> str:
    """What a changed kernel is told. The change must hit."""

    def change(source: str) -> str:
        assert old in source
        return source.replace(old, new)

    case = Case(T=T, H=1, HV=1, K=32, V=20)
    (result,) = conform.conform([case], mode, chunks=chunks, change=change)
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
    command = [
        sys.executable,
        str(Path(conform.__file__)),
        "--mode",
        "asan",
        "--case",
        "T=1 K=32 V=20",
        "--change",
    ]
    done = subprocess.run([*command, *change], capture_output=True, text=True)
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
    assert "WRITE of size 4" in done.stderr


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
def test_supports_says_why_not(changes: dict[str, Any], reasons: list[str]) -> None:
    assert [str(r) for r in metal.BACKEND.supports(spec(**changes))] == reasons


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
            monkeypatch.setattr(anydelta.op, "_plans", {})
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
    page = (ROOT / "docs" / "backends" / "metal.md").read_text(encoding="utf-8")
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
        2, "anydelta bench ops: needs an Apple GPU through torch.mps; this is Linux\n",
    )  # fmt: skip


def test_torch_takes_the_text_as_it_is() -> None:
    """compile_shader puts torch's own headers in the place of some #include lines; of ours it must leave all."""
    from torch.utils._cpp_embed_headers import _embed_headers

    include = Path(torch.__file__).parent / "include"
    for algorithm in ("delta_rule", "delta_chunk"):
        source = launch.source(algorithm, 128, True, 1, 0, 0, 0)
        lines = [line + "\n" for line in source.split("\n")]
        assert _embed_headers(lines, [include], set()).strip() == source.strip()
