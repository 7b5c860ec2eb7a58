"""anydelta_torch, the C++ library of torch.ops.anydelta: what it needs, what it refuses, what it passes on."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

import anydelta
import test_invalid_calls as invalid
from anydelta.backends.cpu import host as cpu
from anydelta.rule import op, torch_library
from anydelta.rule import torch_ops as torch_op

OPS = torch.ops.anydelta
PATH, REASON = torch_library.find()

pytestmark = pytest.mark.skipif(PATH is None, reason=f"anydelta_torch is not in use: {REASON}")


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def make(T: int = 5, K: int = 4, V: int = 3, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    x = dict(q=normal(2, T, 1, K), k=normal(2, T, 1, K) / 2, v=normal(2, T, 2, V))
    x |= dict(g=-normal(2, T, 2).abs(), beta=normal(2, T, 2).sigmoid())
    return {name: a.to(dtype) for name, a in x.items()}


def same(got: Any, want: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


# ---- the binary
# ------------------------------------------------------------------------------------------------


def nm(*options: str) -> list[str]:
    try:
        out = subprocess.run(["nm", "-D", *options, str(PATH)], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"nm does not run here ({error})")
    return [line.split()[-1] for line in out.stdout.splitlines()]


def test_nothing_of_torch_is_used_but_its_stable_abi() -> None:
    needed = nm("--undefined-only")
    unversioned = [name for name in needed if "@" not in name]  # libc and libstdc++ version theirs
    foreign = [
        name for name in unversioned
        if not name.startswith(("aoti_torch_", "torch_", "_ITM_", "__gmon_start__", "__cxa_finalize"))
    ]  # fmt: skip
    assert not foreign
    assert not [name for name in needed if "c10" in name or "at6Tensor" in name or name.startswith("_ZN2at")]
    assert "torch_library_impl" in unversioned  # of torch 2.10: what is looked at is the library


def test_only_its_c_functions_can_be_called() -> None:
    exported = nm("--defined-only")
    names = [name for name in exported if not name.startswith(("_Z", "__bss_start", "_edata", "_end"))]
    shims = [f"aoti_torch_cpu_{name}" for name in torch_op.SCHEMAS]
    assert sorted(names) == sorted([*shims, "anydelta_torch_attach", "anydelta_torch_threads"])
    assert not [name for name in exported if "anydelta" in name and name.startswith("_Z")]


def test_needs_no_library_but_torch_cpu() -> None:
    try:
        out = subprocess.run(["readelf", "-d", str(PATH)], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"readelf does not run here ({error})")
    needed = [line.split("[")[1].rstrip("]") for line in out.splitlines() if "(NEEDED)" in line]
    system = ("libstdc++", "libm.", "libgcc_s", "libc.", "libdl", "libpthread", "ld-linux")
    assert [name for name in needed if not name.startswith(system)] == ["libtorch_cpu.so"]
    assert "RUNPATH" not in out
    assert "RPATH" not in out


# ---- what runs
# ------------------------------------------------------------------------------------------------


def test_calls_do_not_touch_python(monkeypatch: pytest.MonkeyPatch) -> None:
    x = make()
    want = anydelta.gated_delta_rule(**x)
    expected = torch.zeros(2, *want[1].shape)
    with_snapshots = anydelta.gated_delta_rule(**x, snapshots=expected)
    monkeypatch.setattr(op, "execute", None)
    calls = cpu._core.calls()
    assert same(OPS.gated_delta_rule(**x), want)
    state, snapshots = torch.zeros_like(want[1]), torch.zeros_like(expected)
    assert torch.equal(OPS.gated_delta_rule_(**x, state=state), want[0])
    assert torch.equal(state, want[1])
    assert same(OPS.gated_delta_rule_snapshots(**x, snapshots=snapshots), with_snapshots)
    assert torch.equal(snapshots, expected)
    assert cpu._core.calls() == calls + 3


@pytest.mark.parametrize("name", cpu.isas())
def test_the_forced_build_runs(name: str) -> None:
    with cpu.forced_isa(name):
        OPS.gated_delta_rule(**make())
        assert cpu._core.last_isa() == name


def test_strided_last_dimensions_and_float64_gates() -> None:
    x = make()
    want = anydelta.gated_delta_rule(**x)

    def strided(a: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(*a.shape, 2, dtype=a.dtype)[..., 0]
        return out.copy_(a)

    y = {name: strided(a.double() if name in ("g", "beta") else a) for name, a in x.items()}
    assert y["q"].stride(-1) == 2
    assert same(OPS.gated_delta_rule(**y), want)
    expected, zeros = torch.zeros(2, *want[1].shape), torch.zeros_like(want[1])
    want = anydelta.gated_delta_rule(**x, initial_state=zeros, snapshots=expected)
    state, snapshots = strided(zeros), strided(torch.zeros_like(expected))
    assert torch.equal(OPS.gated_delta_rule_(**y, state=state, snapshots=snapshots), want[0])
    assert torch.equal(state, want[1])
    assert torch.equal(snapshots, expected)


def test_raw_gates_whose_parameters_are_slices() -> None:
    x = make() | dict(A_log=normal(2), dt_bias=normal(2), decay="raw")
    want = anydelta.gated_delta_rule(**x)
    sliced = {name: torch.stack([x[name], x[name]], 1)[:, 0] for name in ("A_log", "dt_bias")}
    assert same(OPS.gated_delta_rule(**x | sliced), want)


def test_results_are_contiguous_and_of_the_documented_type() -> None:
    x = make(dtype=torch.bfloat16)
    x["v"] = x["v"].transpose(0, 1).contiguous().transpose(0, 1)
    o, state = OPS.gated_delta_rule(**x)
    assert (o.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert o.is_contiguous()
    assert state.is_contiguous()
    start = torch.zeros(2, 2, 4, 3, dtype=torch.bfloat16)
    assert OPS.gated_delta_rule(**x, initial_state=start)[1].dtype == torch.bfloat16
    assert OPS.gated_delta_rule(**x, output_final_state=False)[1].shape == (0,)


def test_torch_threads_do_the_work_once_each() -> None:
    """The provider of machines without an OpenMP runtime (macOS, Windows), called directly."""
    import ctypes
    import threading

    work = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    parallel = ctypes.CFUNCTYPE(None, ctypes.c_int, work, ctypes.c_void_p)(
        torch_op.LIBRARY.anydelta_torch_threads()
    )
    seen: list[int] = []
    parallel(2, work(lambda _: seen.append(threading.get_ident())), None)
    assert 1 <= len(seen) <= 2
    assert len(set(seen)) == len(seen)


# ---- what does not run here
# ------------------------------------------------------------------------------------------------


def test_other_backends_and_float64_go_to_python(monkeypatch: pytest.MonkeyPatch) -> None:
    x = make()
    calls = cpu._core.calls()
    for got in (
        OPS.gated_delta_rule(**x, backend="reference"),
        OPS.gated_delta_rule(**{name: a.double() for name, a in x.items()}),
    ):
        torch.testing.assert_close([a.float() for a in got], [*anydelta.gated_delta_rule(**x)])
        calls += 1  # the public function's
    monkeypatch.setenv("ANYDELTA_BACKEND", "reference")
    OPS.gated_delta_rule(**x)
    assert cpu._core.calls() == calls
    monkeypatch.setenv("ANYDELTA_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="backend must be 'auto' or one of"):
        OPS.gated_delta_rule(**x)
    monkeypatch.delenv("ANYDELTA_BACKEND")
    with pytest.raises(
        RuntimeError, match=r"^gated_delta_rule: backend='cpu' cannot run this call: takes float32"
    ):
        OPS.gated_delta_rule(**{name: a.double() for name, a in x.items()}, backend="cpu")


def test_refuses_with_the_sentences_of_spec_py() -> None:
    """Every wrong call that the dispatcher lets through: C++ says what Python says."""
    differ, compared = [], 0
    for wrong in invalid.KINDS:
        if wrong.framework == "numpy" or wrong.argument == "backend" or invalid.only_cold(wrong):
            continue
        for packed in (False, True):
            for function in ("", "_"):
                if wrong.packed not in (None, packed) or wrong.function not in (None, function):
                    continue
                texts = []
                for call in (through_the_library, through_python):
                    args = invalid.valid(packed, "torch")
                    wrong.change(args)
                    texts.append(call(args, function))
                if texts[1] is None:  # the dispatcher refused it, or it does not come to the CPU's kernel
                    continue
                compared += 1
                if texts[0] != texts[1]:
                    differ.append(f"{wrong}: {texts[0]!r}, not {texts[1]!r}")
    assert not differ, f"{len(differ)} of {compared}:\n" + "\n".join(differ[:20])
    assert compared > 400


@pytest.mark.parametrize("how", invalid.ROWS)
def test_refuses_wrong_snapshot_rows(how: str) -> None:
    texts = []
    for call in (through_the_library, through_python):
        args = invalid.valid(False, "numpy") | {
            "snapshots": None,
            "snapshot_indices": np.array([[0, 2], [3, 5]]),
        }
        args |= invalid.ROWS[how][0]
        args = {n: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for n, x in args.items()}
        texts.append(call(args, "_"))
    assert texts[0] == texts[1] != "ran"


def test_the_last_states_go_to_rows_of_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    x = make() | dict(state_indices=torch.tensor([4, 1]), snapshot_indices=torch.tensor([[0, 2], [3, 5]]))
    pools = [normal(6, 2, 4, 3) for _ in range(2)]
    want = anydelta.gated_delta_rule_(**x, state=pools[0])
    monkeypatch.setattr(op, "execute", None)
    assert torch.equal(OPS.gated_delta_rule_(**x, state=pools[1]), want)
    assert torch.equal(*pools)


def arguments(args: dict[str, Any], function: str) -> tuple[str, dict[str, Any]]:
    args = dict(args)
    if function == "":
        args["initial_state"] = args.pop("state")
        return "gated_delta_rule_snapshots", args
    return "gated_delta_rule_", args


def through_the_library(args: dict[str, Any], function: str) -> str:
    name, args = arguments(args, function)
    try:
        getattr(OPS, name)(**args)
    except ValueError as error:
        return str(error)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "ran"


def through_python(args: dict[str, Any], function: str) -> str | None:
    """The refusal in Python, None where the dispatcher refuses or chooses another kernel."""
    name, args = arguments(args, function)
    tensors = [a for a in args.values() if isinstance(a, torch.Tensor)]
    if any(a.layout != torch.strided or a.is_quantized or a.is_meta or a.is_neg() for a in tensors):
        return None
    try:
        error = getattr(OPS, f"python_{name}")(**args)[-1]
    except Exception:
        return None
    return bytes(error.tolist()).decode().partition(": ")[2] or "ran"


def test_left_out_on_request() -> None:
    code = (
        "import torch, anydelta\nfrom anydelta.rule import torch_ops\n"
        "x = dict(q=torch.ones(1,2,1,4), k=torch.ones(1,2,1,4), v=torch.ones(1,2,1,3), g=torch.zeros(1,2,1),\n"
        "         beta=torch.ones(1,2,1))\n"
        "assert torch.equal(torch.ops.anydelta.gated_delta_rule(**x)[0], anydelta.gated_delta_rule(**x)[0])\n"
        "print(torch_ops.LIBRARY, torch_ops.LIBRARY_REASON)"
    )
    environment = os.environ | {torch_library.ENV: "0"}
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert out.stdout.strip() == "None ANYDELTA_TORCH_LIBRARY=0"
