"""Promises of the CPU backend alone: which build ran, and how much memory a prefill takes."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

import anydelta
from anydelta.backends.cpu import host as cpu
from anydelta.rule import reference

# Every other test of the kernels is skipped without the extension, so this one must not be: it would all look green.
assert cpu.isas(), "the extension anydelta._core is not built or does not load; run make setup"
_core = cpu._core


def example(T: int = 9, H: int = 2, D: int = 32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    x = {name: rng.standard_normal((1, T, H, D), dtype=np.float32) for name in ("q", "k", "v")}
    x["k"] /= np.linalg.norm(x["k"], axis=-1, keepdims=True)
    return x | {
        "g": -rng.random((1, T, H), dtype=np.float32),
        "beta": rng.random((1, T, H), dtype=np.float32),
    }


@pytest.mark.parametrize("name", cpu.isas())
def test_the_forced_build_runs(name: str) -> None:
    """The name comes from the code that was compiled for that instruction set, not from the choice."""
    with cpu.forced_isa(name):
        anydelta.gated_delta_rule(**example(), backend="cpu")
        assert _core.last_isa() == name


@pytest.mark.parametrize(
    ("T", "dtype", "more", "taken"),
    [
        (64, "bfloat16", {}, True),
        (64, "float16", {}, True),
        (22, "bfloat16", {}, True),
        (40, "bfloat16", {}, True),
        (21, "bfloat16", {}, False),  # too few for a chunk
        (64, "float32", {}, False),  # 16 bits are too few
        (64, "bfloat16", {"kda": True}, False),
        (64, "bfloat16", {"snapshots": 64}, False),  # every state is asked for
    ],
)
def test_which_calls_the_matrix_unit_takes(T: int, dtype: str, more: dict[str, object], taken: bool) -> None:
    """Emulated AMX shares AVX2's blocks, to the bit; a chunk of its own rounds otherwise, within the contract."""
    if "amx_emulated" not in cpu.isas():
        pytest.skip("this build has no emulated AMX, or the CPU no AVX2")
    torch = pytest.importorskip("torch")
    x = {name: torch.from_numpy(value) for name, value in example(T, 2, 64).items()}
    x |= {name: x[name].to(getattr(torch, dtype)) for name in ("q", "k", "v")}
    if more.get("kda"):
        x["g"] = x["g"][..., None].repeat(1, 1, 1, 64)
    runs = {}
    for name in ("avx2", "amx_emulated"):
        kept = torch.zeros(more["snapshots"], 1, 2, 64, 64) if "snapshots" in more else None
        with cpu.forced_isa(name):
            runs[name] = anydelta.gated_delta_rule(**x, snapshots=kept, backend="cpu")
    (o, state), (o_, state_) = runs.values()
    assert torch.equal(state.nan_to_num(), state_.nan_to_num()) is not taken
    if not taken:
        assert torch.equal(o.nan_to_num(), o_.nan_to_num())
    elif not more:
        assert float(((state - state_) ** 2).sum() / (state**2).sum()) < 1e-8


@pytest.mark.parametrize("name", cpu.isas())
@pytest.mark.parametrize("where", ["q", "k", "v", "g", "beta"])
def test_nan_does_not_reach_earlier_tokens(name: str, where: str) -> None:
    """A product of matrices adds zero times NaN; a token of NaN still leaves alone those before it, and other heads."""
    torch = pytest.importorskip("torch")
    x = {n: torch.from_numpy(value) for n, value in example(64, 2, 64).items()}
    x |= {n: x[n].bfloat16() for n in ("q", "k", "v")}
    x[where][0, 50, 0] = float("nan")
    with cpu.forced_isa(name):
        o, state = anydelta.gated_delta_rule(**x, backend="cpu")
    assert o[0, :50].isfinite().all()
    assert o[0, :, 1].isfinite().all()
    assert o[0, 50, 0].isnan().any()
    assert state[0, 1].isfinite().all()


def test_amx_runs_by_name_only() -> None:
    """Its 16 bits are too few for `test_updates_that_cancel_each_other_out`, and its permission is the process's."""
    env = {name: value for name, value in os.environ.items() if name != cpu.ISA_ENV}
    code = "from anydelta.backends.cpu import host; print(host.isa())"
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == [name for name in cpu.isas() if name != "amx"][-1]


@pytest.mark.parametrize("name", [name for name in cpu.isas() if not name.startswith("amx")])
@pytest.mark.parametrize(
    ("cosine", "beta", "first"), [(1.0, 1.0, 100.0), (0.99, 1.9, 1.0), (0.999, 2.0, 1.0)]
)
def test_updates_that_cancel_each_other_out(name: str, cosine: float, beta: float, first: float) -> None:
    """Two keys in turn, nearly alike, and values that later ones replace: each update takes back most of the last."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(1)
    a, b = torch.linalg.qr(torch.randn(64, 2))[0].T
    k = torch.stack([a, cosine * a + (1 - cosine**2) ** 0.5 * b]).repeat(32, 1)[None, :, None].bfloat16()
    v = torch.randn(1, 64, 1, 64)
    v[:, :32] *= first
    x = {"q": torch.randn(1, 64, 1, 64).bfloat16(), "k": k, "v": v.bfloat16()}
    x |= {"g": torch.zeros(1, 64, 1), "beta": torch.full((1, 64, 1), beta)}
    with cpu.forced_isa(name):
        _, state = anydelta.gated_delta_rule(**x, qk_l2norm=True, backend="cpu")
    q, k, v, g, betas = (value.double().numpy() for value in x.values())
    want = reference.gated_delta_rule(q, k, v, g=g, beta=betas, qk_l2norm=True).state
    assert ((state.double().numpy() - want) ** 2).sum() / (want**2).sum() < 1e-7


@pytest.mark.parametrize("name", cpu.isas())
def test_the_environment_forces_a_build(name: str) -> None:
    code = "from anydelta.backends.cpu import host; print(host.isa())"
    env = os.environ | {"ANYDELTA_CPU_ISA": name}
    assert (
        subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
        ).stdout.strip()
        == name
    )


def test_an_unknown_build_is_refused_with_those_known() -> None:
    with (
        pytest.raises(ValueError, match=r"forced_isa must be one of .*baseline.*; got 'mmx'"),
        cpu.forced_isa("mmx"),
    ):
        pass
    env = os.environ | {"ANYDELTA_CPU_ISA": "mmx"}
    run = subprocess.run(
        [sys.executable, "-c", "import anydelta.backends.cpu.host"], env=env, capture_output=True, text=True
    )
    assert run.returncode != 0
    assert "ANYDELTA_CPU_ISA must be one of" in run.stderr


PREFILL = """
import resource, sys
import numpy as np
import anydelta
T, H, D = 2048, 16, 128
kda = sys.argv[1] == "kda"
x = {n: np.full((1, T, H, D), 0.01, np.float32) for n in ("q", "k", "v")}
x["g"] = np.full((1, T, H, D) if kda else (1, T, H), -0.1, np.float32)
x["beta"] = np.full((1, T, H), 0.5, np.float32)
warm = {n: a[:, :1].copy() for n, a in x.items()}
state = np.zeros((1, H, D, D), np.float32)
anydelta.gated_delta_rule_(warm["q"], warm["k"], warm["v"], state, g=warm["g"], beta=warm["beta"], backend="cpu")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
o = anydelta.gated_delta_rule_(x["q"], x["k"], x["v"], state, g=x["g"], beta=x["beta"], backend="cpu")
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((after - before) / 1024 - o.nbytes / 2**20)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads ru_maxrss in KiB, as Linux gives it")
@pytest.mark.parametrize("gate", ["gda", "kda"])
def test_a_prefill_takes_less_than_16_MiB_beside_its_arrays(gate: str) -> None:
    run = subprocess.run([sys.executable, "-c", PREFILL, gate], capture_output=True, text=True, check=True)
    assert float(run.stdout) < 16
