"""The benchmark: results are checked before they are timed, and the printed figures are the measured ones.

No test asserts a time. Cases are tiny; the reference backend stands in for anydelta, so no build is needed.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from anydelta.bench.contenders import packages as peers
from anydelta.bench.measure import ops, outputs, report
from anydelta.bench.measure.cases import DECAYS, Case, make_inputs, presets, select, subnormals, with_decays
from anydelta.bench.measure.contender import Result, Runner, RunnerBase
from anydelta.conformance.run import unavailable
from anydelta.core.probe import fails
from anydelta.rule import reference
from anydelta.terminal import Failed
from conftest import run_program, without

QUICK = ops.Settings(rounds=2, sample_seconds=1e-4)
TINY = ["gda-t1-h1x2-d8-b2", "kda-t4-h2x2-d8-b1-s4", "gda-t3-h2x4-d8-b1"]


class Fake:
    """A contender that answers with the oracle, after `bend` had its way with the result."""

    def __init__(self, name="fake", bend=lambda result: result):
        self.name, self.bend, self.ran = name, bend, 0

    def missing(self):
        return None

    def version(self):
        return "1"

    def refuses(self, case):
        return None

    def prepare(self, case, inputs, threads) -> Runner:
        want = reference.gated_delta_rule(
            *(x.astype(np.float64) for x in (inputs.q, inputs.k, inputs.v)),
            g=inputs.g.astype(np.float64),
            beta=inputs.beta.astype(np.float64),
            initial_state=inputs.state.astype(np.float64),
            snapshots=case.snapshots,
        )
        outer = self

        class Runs(RunnerBase):
            def result(self) -> Result:
                return outer.bend(Result(want.o.copy(), want.state.copy(), want.snapshots))

            def run(self, calls):
                outer.ran += calls

        return Runs(case, lambda i: None)


def run(cases, contenders, threads=(1,), settings=QUICK):
    return ops.measure(select(cases), contenders, threads=threads, settings=settings, backend="reference")


@pytest.fixture(scope="module", autouse=True)
def small_copies():
    """The copy bandwidth is not what is tested: keep its buffers small."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "COPY_MIB", 1)
        yield


@pytest.fixture(scope="module")
def measured():
    """One report with every kind of row but a peer's."""

    def wrong(result):
        result.state[0, 0, 0, 0] += 1.0
        return result

    return run(TINY, [peers.Anydelta("reference"), Fake(), Fake("wrong", wrong)])


def by_name(found, case, contender):
    return next(r for r in found.records if (r.case, r.contender) == (case, contender))


@pytest.mark.parametrize("case", presets(), ids=lambda c: c.name)
def test_a_case_is_its_name(case):
    for one in with_decays([case], ",".join(DECAYS)):
        assert Case.parse(one.name) == one


def test_each_case_is_measured_with_each_kind_of_decays():
    names = [c.name for c in with_decays(select(["gda-t1-h1x1-d16-b1"]), "mild,initialised")]
    assert names == ["gda-t1-h1x1-d16-b1", "gda-t1-h1x1-d16-b1-initialised"]
    named = select(["kda-t4-h1x1-d16-b1-s4-cold-trained"])
    assert with_decays(named, "mild,initialised") == named
    with pytest.raises(ValueError, match="--decays must be of mild, initialised, trained; got 'strong'"):
        with_decays(named, "strong")


@pytest.mark.parametrize("gate", ["gda", "kda"])
def test_decays_are_as_models_have_them(gate):
    size = {"T": 300, "H": 8, "HV": 8, "D": 16}
    initialised = make_inputs(Case(gate, **size, decay="initialised")).g
    trained = make_inputs(Case(gate, **size, decay="trained")).g
    assert (initialised < -8).mean() > 0.3
    assert 0 < (trained < -8).mean() < 0.2
    assert np.median(trained) > -0.5


def test_strong_decays_are_reported_beside_mild_ones(monkeypatch):
    from anydelta.bench.commands import decays

    monkeypatch.setattr(decays, "HEADS", 2)
    monkeypatch.setattr(decays, "D", 16)
    measured = decays.strong_decays([1, 9], [1], ops.Settings(rounds=2, sample_seconds=1e-3))
    assert [(r.call, r.tokens) for r in measured.records] == [
        (f"{op}, {gate}", T) for op in ("rule", "mixer") for gate in ("GDA", "KDA") for T in (1, 9)
    ]
    for r in measured.records:
        assert r.nmse < 1e-7
        assert min(r.mild_us, *(getattr(r, name) for name in decays.STRONG)) > 0
        assert list(r.columns())[4:] == list(decays.STRONG.values())


def test_pieces_are_run_again_and_corrected(monkeypatch):
    from anydelta.bench.commands import pieces

    for name, size in {"HEADS": 2, "D": 16, "EXACT_TOKENS": 24}.items():
        monkeypatch.setattr(pieces, name, size)
    measured = pieces.pieces(40, ops.Settings(rounds=2, sample_seconds=1e-3))
    assert [(r.call, r.decays) for r in measured.records] == [
        (gate, decays) for gate in ("GDA", "KDA") for decays in ("mild", "initialised", "trained")
    ]
    for r in measured.records:
        assert max(r.errors.values()) < 1e-10
        assert max(r.half_errors.values()) < 1e-4
        assert min(r.one_us, r.summary, r.again, r.corrected) > 0


def test_gradients_are_reported_beside_the_peak_and_transformers(monkeypatch):
    from anydelta.bench.commands import gradients

    for name, size in {"H": 1, "HV": 2, "D": 16}.items():
        monkeypatch.setattr(gradients, name, size)
    measured = gradients.gradients([70], [1], 100, ops.Settings(rounds=2, sample_seconds=1e-3))
    assert [(r.rule, r.decays) for r in measured.records] == [
        (rule, decays) for rule in ("GDA", "KDA") for decays in gradients.GATES
    ]
    for r in measured.records:
        assert r.nmse < 1e-7
        assert min(r.both_us, r.backward_us, r.peak_pct, r.reference) > 0
        assert (r.transformers is None) == (
            r.rule == "KDA" or importlib.util.find_spec("transformers") is None
        )
        assert all(r.columns()[name] for name in ("both", "backward", "of peak", "loop"))


def test_selection_takes_groups_names_globs_and_expressions():
    assert [c.name for c in select(["gda-t7-h1x3-d16-b2"])] == ["gda-t7-h1x3-d16-b2"]
    assert all(c.kind == "prefill" for c in select(["prefill"]))
    assert all(c.cold for c in select(["cold"]))
    assert len(select(["kda-*"])) == sum(c.gate == "kda" for c in presets())
    assert {c.T for c in select(["t(2|8)-"])} == {2, 8}
    assert len(select(["all,all", "default"])) == len(presets())
    with pytest.raises(ValueError, match="no case matches 'nothing'"):
        select(["nothing"])
    with pytest.raises(ValueError, match="multiple of its q/k heads"):
        select(["gda-t1-h2x3-d8-b1"])


def test_the_presets_cover_what_the_models_use():
    every = presets()
    assert {c.T for c in every} >= {1, 2, 4, 8, 16, 64, 256, 512, 1024, 4096}
    assert {c.HV for c in every} >= {4, 16, 32, 48, 64}
    assert {(c.gate, c.D, c.B) for c in every} >= {
        (g, d, b) for g in ("gda", "kda") for d in (64, 128) for b in (1, 8)
    }


def test_work_and_limits():
    decode, kept = Case("gda", 1, 16, 32, 128), Case("gda", 4, 16, 32, 128, snapshots=4)
    assert decode.moved_bytes == 2 * 4 * 32 * 128 * 128
    assert kept.moved_bytes == 5 * 4 * 32 * 128 * 128
    assert Case("gda", 64, 16, 32, 128).flops == 6 * 128 * 128 * 32 * 64
    limits = ops.Limits((), 1)
    limits.best = {"fma": 100.0, "copy": 10.0}
    kind, value, seconds = limits.of(decode)
    assert (kind, value) == ("copy", 10.0)
    assert seconds == pytest.approx(decode.moved_bytes / 10e9)
    assert limits.of(Case("gda", 64, 16, 32, 128))[0] == "fma"


def test_a_cold_case_streams_from_memory():
    cold = Case("gda", 1, 16, 32, 128, cold=True)
    assert cold.states * cold.state_bytes >= 300 * 2**20


@pytest.mark.parametrize("gate", ["gda", "kda"])
def test_inputs_stay_normal(gate):
    case = Case(gate, 300, 1, 2, 16)
    x = make_inputs(case)
    np.testing.assert_allclose(np.linalg.norm(x.k, axis=-1), 1, rtol=1e-5)
    assert -0.5 <= x.g.min() <= x.g.max() <= -0.05
    out = Fake().prepare(case, x, 1).result()
    assert not any(subnormals(a) for a in (*x.arrays().values(), out.state.astype(np.float32)))


def test_subnormals_are_counted():
    assert subnormals(np.array([0, 1, 1e-40, -1e-41], np.float32)) == 2


@pytest.mark.parametrize("name", TINY)
def test_anydelta_and_a_right_contender_are_timed(measured, name):
    for contender in ("anydelta", "fake"):
        r = by_name(measured, name, contender)
        assert (r.status, r.rounds, r.checked) == ("ok", 2, "float64 oracle")
        assert r.calls >= 1
        assert 0 < r.min_us <= r.median_us
        assert r.ratio > 0
        assert r.nmse_o <= ops.NMSE
        assert r.nmse_state <= ops.NMSE
        assert (r.nmse_snapshots is not None) == ("-s4" in name)
    assert by_name(measured, name, "anydelta").ratio == 1
    assert by_name(measured, name, "anydelta").detail == "backend reference"


@pytest.mark.parametrize("name", TINY)
def test_a_wrong_contender_is_listed_and_not_timed(measured, name):
    r = by_name(measured, name, "wrong")
    assert r.status == "wrong"
    assert "state" in r.reason
    assert r.nmse_state > ops.NMSE
    assert r.nmse_o <= ops.NMSE
    assert r.median_us is r.ratio is None


def bend_nan(result):
    result.o[0, 0, 0, 0] = np.nan
    return result


def bend_last_snapshot(result):
    result.snapshots[-1] *= 1.01
    return result


def bend_order(result):
    result.snapshots = result.snapshots[::-1]
    return result


def bend_missing(result):
    result.snapshots = None
    return result


def bend_shape(result):
    result.state = result.state[:, :1]
    return result


@pytest.mark.parametrize("bend", [bend_nan, bend_last_snapshot, bend_order, bend_missing, bend_shape])
def test_every_part_of_a_result_is_checked(bend):
    cheat = Fake("cheat", bend)
    r = by_name(run([TINY[1]], [cheat]), TINY[1], "cheat")
    assert r.status == "wrong", r
    assert cheat.ran == 0


def test_a_large_case_is_checked_on_some_heads_and_the_rest_against_anydelta(monkeypatch):
    monkeypatch.setattr(ops, "ORACLE_ELEMENTS", 10)

    def bend(result):
        result.o[0, :, 1] += 1.0  # head 1 is none of the first, middle and last
        return result

    name = "gda-t2-h8x8-d8-b1"
    found = run([name], [peers.Anydelta("reference"), Fake(), Fake("cheat", bend)])
    assert by_name(found, name, "fake").checked == "float64 oracle on 3 heads, all heads against anydelta"
    assert by_name(found, name, "fake").status == "ok"
    assert by_name(found, name, "cheat").status == "wrong"


def test_refusals_failures_and_absences_are_told_apart():
    refusing, failing, absent = Fake("refusing"), Fake("failing"), Fake("absent")
    refusing.refuses = lambda case: "not today"
    absent.missing = lambda: "not installed"

    def fail(case, inputs, threads):
        raise RuntimeError("it broke\nbadly")

    failing.prepare = fail
    found = run([TINY[0]], [peers.Anydelta("reference"), refusing, failing, absent])
    assert found.absent == {"absent": "not installed"}
    assert [(r.status, r.reason) for r in found.records[1:]] == [
        ("refused", "not today"),
        ("failed", "RuntimeError: it broke"),
    ]
    assert found.records[0].status == "ok"


def test_other_work_is_a_share_or_unknown():
    others = ops.Others()
    sum(range(10**6))
    assert others.percent() is None or 0 <= others.percent() <= 100
    others.start = None
    assert others.percent() is None


def test_limits_say_what_is_missing(monkeypatch):
    monkeypatch.setattr(ops.native, "why_not", "the extension anydelta._core is not built")
    limits = ops.Limits(("fma",), 1)
    limits.sample()
    assert limits.of(Case("gda", 64, 1, 1, 8)) is None
    assert "anydelta._core is not built" in limits.why_not


FLOAT32 = ("gda-t1-h2x4-d32-b2", "kda-t4-h2x2-d32-b1-s4", "gda-t3-h2x6-d32-b2-s3", "gda-t5-h2x4-d32-b1")
HALF = (
    "gda-t70-h2x4-d64-b2-bf16",
    "gda-t1-h2x4-d128-b2-bf16-initialised",
    "gda-t1-h2x4-d64-b3-bf16-pool7",
    "gda-t1-h2x4-d64-b2-bf16-pool7bf16-cold-trained",
    "kda-t3-h2x4-d64-b2-pool5-initialised",
)


def check_contender(one, name):
    """Right at once, and after other calls."""
    case = Case.parse(name)
    inputs = make_inputs(case)
    runner = one.prepare(case, inputs, 1)
    record = ops.Record(name, case.kind, 1, one.name, one.version())
    assert ops.Oracle(case, inputs).check(runner.result(), record) == ""
    runner.reset()
    runner.run(3)
    assert ops.Oracle(case, inputs).check(runner.result(), record) == ""
    runner.close()


@pytest.mark.parametrize("peer", peers.every_peer(), ids=lambda p: p.name)
def test_installed_peers_agree_with_the_oracle(peer):
    if why := peer.missing():
        if peer.name == "vllm":
            pytest.skip(why)  # another project's wheel of 133 MB: only whoever wants it has it
        without(why)
    taken = [name for name in (*FLOAT32, *HALF) if peer.refuses(Case.parse(name)) is None]
    assert set(taken) >= set(HALF[:4] if peer.name == "vllm" else FLOAT32)
    for name in taken:
        check_contender(peer, name)


@pytest.mark.parametrize("name", [*FLOAT32, *HALF])
def test_anydelta_is_right_in_every_type_and_through_a_pool(name):
    check_contender(peers.Anydelta("reference"), name)


def test_half_types_are_held_to_the_contract_and_peers_to_a_right_answer():
    def bend(result):
        result.o *= 1.01
        return result

    found = run(["gda-t2-h1x2-d16-b1-bf16"], [Fake("anydelta", bend), Fake("peer", bend)])
    assert [r.status for r in found.records] == ["wrong", "ok"]
    assert found.records[0].nmse_o == found.records[1].nmse_o == pytest.approx(1e-4, rel=0.1)


@pytest.fixture
def vllm_stand_in(monkeypatch, tmp_path):
    """vLLM's two operators, answered by the reference: what the contender hands over must mean what it means there."""
    import torch

    from anydelta.bench.contenders import vllm

    if hasattr(torch.ops._C, vllm.PROMPT):
        pytest.skip("vLLM's own library is loaded")
    library = torch.library.Library("_C", "FRAGMENT")
    library.define(
        f"{vllm.PROMPT}(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor(a!) pool, bool final, Tensor ends, "
        "bool head_first, bool l2norm, Tensor rows, float eps=1e-5) -> (Tensor, Tensor)"
    )
    library.define(
        f"{vllm.TOKEN}(Tensor A_log, Tensor dt_bias, Tensor q, Tensor k, Tensor v, Tensor a, Tensor b, Tensor(a!) pool,"
        " Tensor rows, Tensor ends, bool l2norm, float softplus_beta=1., float softplus_threshold=20.) -> Tensor"
    )

    def run(q, k, v, g, beta, pool, ends, rows, **options):
        got = reference.gated_delta_rule(
            *(x.double().numpy() for x in (q, k, v)),
            g=g.double().numpy(),
            beta=beta.double().numpy(),
            initial_state=pool[rows].double().numpy(),
            cu_seqlens=ends.long().numpy(),
            **options,
        )
        pool[rows] = torch.from_numpy(got.state).to(pool.dtype)
        return torch.from_numpy(got.o).to(v.dtype)

    def prompt(q, k, v, g, beta, pool, final, ends, head_first, l2norm, rows, eps=1e-5):
        assert (g.dtype, v.dtype, pool.dtype, head_first) == (
            torch.float32,
            torch.bfloat16,
            torch.float32,
            False,
        )
        assert rows.dtype == ends.dtype == torch.int32
        return run(q, k, v, g, beta, pool, ends, rows, qk_l2norm=l2norm, qk_l2norm_eps=eps), pool.clone()

    def token(
        A_log, dt_bias, q, k, v, a, b, pool, rows, ends, l2norm, softplus_beta=1.0, softplus_threshold=20.0
    ):
        assert (softplus_beta, softplus_threshold, a.dim()) == (1.0, 20.0, 2)
        weights = {"A_log": A_log.double().numpy(), "dt_bias": dt_bias.double().numpy()}
        raw = {"decay": "raw", "beta_is_logit": True, "qk_l2norm": l2norm, **weights}
        return run(q, k, v, a[None], b[None], pool, ends, rows, **raw).transpose(0, 1).contiguous()

    library.impl(vllm.PROMPT, prompt, "CPU")
    library.impl(vllm.TOKEN, token, "CPU")
    (tmp_path / f"_C{vllm.builds()[0]}.abi3.so").write_bytes(b"")
    monkeypatch.setenv(vllm.VARIABLE, str(tmp_path))
    monkeypatch.setattr(vllm, "fails", lambda code: None)
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    yield vllm.Vllm()
    library._destroy()


@pytest.mark.parametrize("name", HALF[:4])
def test_vllm_is_called_as_it_is_meant(vllm_stand_in, name):
    assert vllm_stand_in.missing() is vllm_stand_in.refuses(Case.parse(name)) is None
    check_contender(vllm_stand_in, name)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("kda-t8-h2x2-d64-b1-bf16", "it has no KDA"),
        ("gda-t2-h2x2-d64-b1-s2-bf16", "it keeps no snapshots"),
        ("gda-t8-h2x2-d64-b1", "it takes bfloat16 alone"),
        ("gda-t8-h2x2-d96-b1-bf16", "it takes heads of 64 or 128; got 96"),
        ("gda-t2-h2x2-d64-b1-bf16-pool3", "it takes raw gates for one token alone"),
    ],
)
def test_vllm_refuses_what_it_has_not(name, why):
    assert peers.Vllm().refuses(Case.parse(name)) == why


def test_a_vllm_that_is_not_there_or_does_not_load_says_why(tmp_path, monkeypatch):
    from anydelta.bench.contenders import vllm

    monkeypatch.setenv(vllm.VARIABLE, str(tmp_path))
    assert "holds none of _C" in peers.Vllm().missing()
    broken = tmp_path / "vllm" / f"_C{vllm.builds()[0]}.abi3.so"
    broken.parent.mkdir()
    broken.write_bytes(b"not a library")
    for place in (tmp_path, broken.parent, broken):
        monkeypatch.setenv(vllm.VARIABLE, str(place))
        assert f"{broken.name} does not load: OSError: " in peers.Vllm().missing()
    monkeypatch.setenv(vllm.VARIABLE, "")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "ANYDELTA_VLLM_CPU is not set" in peers.Vllm._found.func(peers.Vllm())


def test_a_ggml_without_its_libraries_says_why(tmp_path, monkeypatch):
    from anydelta.ggml.library import PACKAGES

    for name in PACKAGES:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("")
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    why = peers.Ggml().missing()
    assert why.startswith("ggml-python ? ships no usable ggml: OSError: ") or "ggml-python" in why
    assert "; llama-cpp-python" in why


def test_unknown_and_absent_peers(monkeypatch):
    with pytest.raises(
        ValueError,
        match="peer must be one of vllm, ggml, onnxruntime, executorch, mlx, transformers; got 'fla'",
    ):
        peers.choose_peers(["fla"])
    monkeypatch.setattr(peers.Mlx, "missing", lambda self: "gone")
    with pytest.raises(ValueError, match="peer 'mlx' cannot run here: gone"):
        peers.choose_peers(["mlx"])


BROKEN = {
    "raise ValueError('[red]no')": "ValueError: [red]no",
    "raise SystemExit(3)": "exit status 3",
    "import sys; sys.exit('good bye')": "good bye",
    "raise KeyboardInterrupt": "KeyboardInterrupt",
    "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)": "SIGSEGV",
    "1 +": "SyntaxError: invalid syntax",
}


@pytest.mark.parametrize("code", BROKEN)
def test_a_peer_that_does_not_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "core.py").write_text("")
    (tmp_path / "mlx" / "__init__.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    for name in [n for n in sys.modules if n.partition(".")[0] == "mlx"]:
        monkeypatch.delitem(sys.modules, name)
    fails.cache_clear()
    why = peers.Mlx().missing()
    assert why == f"mlx.core is installed and does not import: {BROKEN[code]}"
    got = invoke("--peer", "mlx")
    assert got.exit_code == 2
    assert got.stderr == f"anydelta bench ops: peer 'mlx' cannot run here: {why.rstrip('.')}.\n"
    fails.cache_clear()


def test_a_peer_that_ends_the_process_is_a_row() -> None:
    leaving = Fake("leaving")

    def leave(case, inputs, threads):
        raise SystemExit("good bye")

    leaving.prepare = leave
    found = run([TINY[0]], [peers.Anydelta("reference"), leaving])
    assert [(r.status, r.reason) for r in found.records[1:]] == [("failed", "SystemExit: good bye")]


def test_what_cannot_be_written_is_found_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "measure", lambda *args, **kwargs: pytest.fail("it was measured"))
    (tmp_path / "folder.json").mkdir()
    kept = tmp_path / "kept.json"
    kept.write_text("before")
    paths = [tmp_path / "folder.json", tmp_path / ("x" * 300 + ".json"), tmp_path / "nul\0.json"]
    paths += [Path("/proc/x.json"), Path("/dev/full/x.json")] if sys.platform == "linux" else []
    for option in ("-o", "--plot"):
        for path in paths:
            got = invoke("--cases", TINY[0], "--no-peers", option, str(path))
            assert (got.exit_code, got.stdout) == (2, ""), got
            assert got.stderr.count("\n") == 1
    got = invoke("--cases", "nothing", "--no-peers", "-o", str(kept))
    assert got.exit_code == 2
    assert kept.read_text() == "before"
    assert invoke("--cases", "nothing", "--no-peers", "-o", str(tmp_path / "new.json")).exit_code == 2
    assert not (tmp_path / "new.json").exists()


def test_printers_show_every_record(measured):
    data = json.loads(outputs.to_text(report, measured, "json"))
    assert [r["case"] for r in data["records"]] == [r.case for r in measured.records]
    assert data["machine"]["cpus"] >= 1
    rows = list(csv.DictReader(io.StringIO(outputs.to_text(report, measured, "csv"))))
    assert len(rows) == len(measured.records)
    assert float(rows[0]["median_us"]) == measured.records[0].median_us
    text = outputs.to_text(report, measured, "md")
    for name in TINY:
        assert f"**{name}, 1 thread" in text
    assert text.count("| wrong: NMSE must be at most 1e-07; got state") == len(TINY)
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert widths == {len(report.HEAD) + 1}


def test_the_table_prints(measured):
    console = pytest.importorskip("rich.console").Console(file=io.StringIO(), width=140)
    console.print(outputs.to_table(report, measured))
    assert TINY[0] in console.file.getvalue()


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_the_figure_is_written(measured, tmp_path, suffix):
    pytest.importorskip("matplotlib")
    path = tmp_path / f"ops.{suffix}"
    report.plot(measured, path)
    head = path.read_bytes()
    assert head.startswith(b"\x89PNG" if suffix == "png" else b"<?xml")
    if suffix == "svg":
        assert TINY[0] in path.read_text()


def test_nothing_timed_is_nothing_to_plot(measured, tmp_path):
    empty = ops.Report(measured.machine, QUICK)
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="nothing was timed"):
        report.plot(empty, tmp_path / "x.svg")


def test_a_disturbed_case_says_so(measured):
    quiet, noisy = (replace(r, others_pct=p) for r, p in zip(measured.records[:2], (2.0, 60.0), strict=True))
    title = "other work took 60 %"
    assert title in outputs.to_text(report, ops.Report(measured.machine, QUICK, records=[noisy]), "md")
    assert "other work" not in outputs.to_text(
        report, ops.Report(measured.machine, QUICK, records=[quiet]), "md"
    )


def test_times_read_well():
    assert [report.time(x) for x in (0.5, 12.34, 4567.0, 2.5e6)] == ["0.5 µs", "12.3 µs", "4.57 ms", "2.5 s"]


def invoke(*args: str):
    return run_program("bench", "ops", *args)


def test_command_writes_results_and_figure(tmp_path: Path):
    pytest.importorskip("matplotlib")
    out, figure = tmp_path / "r.json", tmp_path / "r.svg"
    got = invoke(
        "--cases", "gda-t1-h1x2-d8-b1", "--no-peers", "--backend", "reference", "-t", "1,2", "-r", "1",
        "--sample-ms", "0.1", "-o", str(out), "--plot", str(figure),
    )  # fmt: skip
    assert got.exit_code == 0, got.output
    records = json.loads(out.read_text())["records"]
    name = "gda-t1-h1x2-d8-b1"
    assert [(r["case"], r["threads"]) for r in records] == [
        (case, n) for case in (name, f"{name}-initialised") for n in (1, 2)
    ]
    assert all(f"{name}-initialised, {n} thread" in figure.read_text() for n in (1, 2))
    assert f"{name}-initialised" in got.output


def test_command_prints_csv_on_stdout():
    got = invoke(
        "--cases", "gda-t1-h1x1-d8-b1", "--no-peers", "--backend", "reference", "-t", "1", "-r", "1",
        "--sample-ms", "0.1", "--csv",
    )  # fmt: skip
    assert got.exit_code == 0
    assert got.stdout.startswith("case,kind,threads,")


def test_list_measures_nothing():
    got = invoke("--list", "--cases", "default")
    assert got.exit_code == 0
    assert "gda-t1-h16x32-d128-b1\n" in got.output
    assert "ggml: " in got.output


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--cases", "nothing"], "no case matches 'nothing'"),
        (["--decays", "strong"], "--decays must be of mild, initialised, trained; got 'strong'"),
        (["--cases", "gda-t99999999999-h1x1-d8-b1"], "at most 256 GiB of values and states"),
        (["--cases", "gda-t\N{ARABIC-INDIC DIGIT THREE}-h1x1-d8-b1"], "no case matches"),
        (["--cases", "gda-t1-h1x1-d99999999999-b1"], "at most 256 GiB of values and states"),
        (["-t", "0"], "-t must be numbers from 1 to 1024"),
        (["-t", "two"], "-t must be numbers from 1 to 1024"),
        (["-r", "0"], "--rounds must be at least 1"),
        (["--peer", "fla"], "peer must be one of"),
        (["--peer", "ggml", "--no-peers"], "contradict"),
        (["--backend", "nope"], "backend must be 'auto' or one of"),
        (["--json", "--csv"], "one output form at a time"),
        (["-o", "results.txt"], "-o must end in"),
        (["-o", "nowhere/results.json"], "does not exist"),
        (["--plot", "figure.gif"], "requires --plot to end in"),
        (["--sample-ms", "0"], "--sample-ms must be above 0"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_2(args, sentence):
    got = invoke(*args)
    assert got.exit_code == 2
    assert sentence in got.output
    assert len(got.output.strip().splitlines()) == 1


def test_rollback_reports_every_form() -> None:
    """Small sizes: what is measured is checked against the oracle first, and said in decode steps."""
    from anydelta.bench.commands import rollback

    measured = rollback.rollback(
        layers=2,
        heads=(1, 2),
        size=16,
        tokens=2,
        snapshots=3,
        decay="initialised",
        settings=ops.Settings(rounds=2),
    )
    calls = [r.call for r in measured.records]
    assert calls[0] == "decode step"
    for call in (
        "no way back: 2 tokens",
        "slots: verify 2, commit 1",
        "log: verify 2, commit 0",
        "log: commit 2 of 2 alone",
    ):
        assert call in calls
    assert all(r.steps > 0 and r.nmse < 1e-6 for r in measured.records)
    assert measured.records[0].steps == 1.0


def test_overhead_is_taken_over_the_bare_kernel() -> None:
    from anydelta.bench.measure import overhead

    measured = overhead.call_overhead(ops.Settings(rounds=2, sample_seconds=1e-3))
    calls = {r.call: r for r in measured.records}
    assert calls["bare kernel"].overhead_us == 0
    for call in ("torch, in place", "torch, in place, pool", "torch.ops, functional", "NumPy, in place"):
        assert calls[call].nmse < 1e-7
        assert calls[call].min_us > 0


def test_threads_alternate_with_matmuls() -> None:
    from anydelta.bench.commands import threads

    measured = threads.shared_threads([1], ops.Settings(rounds=2, sample_seconds=1e-3))
    assert {r.case for r in measured.records} == set(threads.SHAPES)
    assert all(r.nmse < 1e-7 and r.matmul_us > 0 and r.op_us > 0 and r.both_us > 0 for r in measured.records)


def test_matrices_are_compared_and_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    from anydelta.bench.commands import matrices

    monkeypatch.setattr(matrices, "SHAPES", ((48, 32), (32, 48)))
    measured = matrices.matrices([1], ops.Settings(rounds=2, sample_seconds=1e-3))
    assert {r.dtype for r in measured.records} == set(matrices.ERROR)
    assert {"F.linear", "torch.mv", "read (sum)"} <= {r.way for r in measured.records}
    assert all(0 < r.low <= r.gb_per_s <= r.high for r in measured.records)
    assert all(r.error <= matrices.ERROR[r.dtype] for r in measured.records)
    monkeypatch.setattr(matrices, "ERROR", {"float32": 0.0})
    with pytest.raises(Failed, match="must be at most 0"):
        matrices.matrices([1], ops.Settings(rounds=2, sample_seconds=1e-3))


def test_a_layer_without_projections_is_compared_and_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    from anydelta.bench.commands import layer

    monkeypatch.setattr(layer, "HEADS", 2)
    measured = layer.mixer_of_a_layer(5, 1, ops.Settings(rounds=2, sample_seconds=1e-3))
    assert [(r.call, r.dtype) for r in measured.records] == [
        (call, dtype) for dtype in layer.ERROR for call in ("prefill of 5", "decode", "training on 5")
    ]
    for r in measured.records:
        assert 0 < r.error <= layer.ERROR[r.dtype]
        assert 0 < r.ratio_low <= r.ratio <= r.ratio_high


def test_the_recurrence_in_mlx_lm_is_compared_and_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlx_lm")
    from anydelta.bench.commands import mlx

    monkeypatch.setattr(mlx, "DECODE_STEPS", 1)
    measured = mlx.in_mlx_lm(3, ("qwen3_5",), ops.Settings(rounds=2))
    assert [(r.dtype, r.call) for r in measured.records] == [
        (dtype, call) for dtype in mlx.ERROR for call in ("prefill of 3", "decode")
    ]
    for r in measured.records:
        assert r.error <= mlx.ERROR[r.dtype]
        assert 0 < r.ratio_low <= r.ratio <= r.ratio_high
        assert min(r.mlx_lm_us, r.anydelta_us, r.whole_ratio) > 0


@pytest.mark.parametrize("kinds", [("vulkan", "webgpu"), ("opencl", "sycl")], ids=" ".join)
@pytest.mark.parametrize("more", [(), ("--prompts", "5")], ids=["calls", "prompts"])
def test_devices_are_compared_with_the_cpu_and_timed(kinds: tuple[str, ...], more: tuple[str, ...]) -> None:
    here = [kind for kind in kinds if not unavailable(kind)]
    if not here:
        without(f"{kinds[0]} or {kinds[1]}")
    command = [
        "-m",
        "anydelta.cli",
        "bench",
        "devices",
        *here,
        *more,
        "--cuts",
        "columns",
        "-r",
        "2",
        "--json",
    ]
    done = subprocess.run([sys.executable, *command, "--sample-ms", "1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    records = json.loads(done.stdout)["records"]
    names = {r["way"] for r in records}
    assert "cpu" in names
    assert all(any(name.startswith(kind) for name in names) for kind in here)
    assert ("vulkan chunks" in names) == bool("vulkan" in here and more)
    for r in records:
        assert r["nmse"] <= 1e-7
        assert 0 < r["low_us"] <= r["median_us"] <= r["high_us"]
        if r["way"] in ("webgpu", "opencl columns copy"):
            assert r["staged_bytes"] > 2 * 16 * 16 * 4  # the state, there and back
