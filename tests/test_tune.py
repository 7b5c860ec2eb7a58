"""`anydelta tune` without a GPU: tables of launches, which ones are tried, the search with an invented clock."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from anydelta.backends.triton import host as backend

pytest.importorskip("triton", reason="the package triton is not installed")

from anydelta.backends.triton import aot, config, tables
from anydelta.bench.measure.cases import select
from anydelta.terminal import Refused
from anydelta.tune import cli as tune_cli
from anydelta.tune.problems import DEFAULT, groups, problems
from conftest import run_program

ROOT = Path(__file__).resolve().parent.parent
SM_90 = aot.TARGETS["sm_90"][1]
ASKED: dict[str, Any] = dict(K=64, V=64, kda=False, dtype="bfloat16", programs=40, tokens=1)
CLASS = "recurrent T<=1 heads<=128 K=64 V=64 gda bfloat16"
ALL = "recurrent K=64 V=64 gda bfloat16"
NO_GPU = not (torch.cuda.is_available() or torch.xpu.is_available())


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's folder of tables: empty."""
    monkeypatch.setenv(tables.ENV, str(tmp_path))
    tables.rows.cache_clear()
    yield tmp_path
    tables.rows.cache_clear()


def write(path: Path, rows: dict[str, Any], **changes: Any) -> None:
    path.write_text(json.dumps({"version": 1, "arch": path.stem, "rows": rows, **changes}))
    tables.rows.cache_clear()


# ---- tables
# ----------------------------------------------------------------------------------------------------


def test_a_table_comes_before_the_heuristic(user: Path) -> None:
    plain = config.choose(SM_90, **ASKED)
    assert plain == config.heuristic(SM_90, **{k: v for k, v in ASKED.items() if k != "tokens"})
    write(user / "sm_90.json", {CLASS: {"launch": {"BV": 8, "warps": 1}}, ALL: {"launch": {"BV": 64}}})
    assert config.choose(SM_90, **ASKED) == replace(plain, BV=8, warps=1)
    for other in ({"tokens": 4}, {"programs": 8}):  # of another class
        assert config.choose(SM_90, **{**ASKED, **other}).BV == 64
    for other in ({"K": 128}, {"V": 32}, {"kda": True}, {"dtype": "float16"}):
        assert config.choose(SM_90, **{**ASKED, **other}).BV in (16, 32)
    assert config.choose(replace(SM_90, arch="sm_80"), **ASKED) == plain
    with config.forced(BV=4):
        assert config.choose(SM_90, **ASKED).BV == 4


def test_a_row_may_say_that_the_heuristic_is_best(user: Path) -> None:
    write(user / "sm_90.json", {CLASS: {"launch": {}}, ALL: {"launch": {"BV": 64}}})
    assert config.choose(SM_90, **ASKED).BV == config.choose(replace(SM_90, arch="sm_91"), **ASKED).BV


def test_rows_of_the_user_come_before_those_shipped(user: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = user / "shipped"
    shipped.mkdir()
    monkeypatch.setattr(tables, "SHIPPED", shipped)
    write(shipped / "sm_90.json", {CLASS: {"launch": {"BV": 8}}, ALL: {"launch": {"BV": 64}}})
    assert config.choose(SM_90, **ASKED).BV == 8
    write(user / "sm_90.json", {CLASS: {"launch": {"BV": 16}}})
    assert config.choose(SM_90, **ASKED).BV == 16
    assert config.choose(SM_90, **{**ASKED, "tokens": 4}).BV == 64
    monkeypatch.setenv(tables.ENV, "")
    tables.rows.cache_clear()
    assert tables.user_folder() is None
    assert config.choose(SM_90, **ASKED).BV == 8


def test_the_users_folder_is_in_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(tables.ENV, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert tables.user_folder() == Path("/somewhere/anydelta/triton")


def test_a_process_reads_its_tables_once(user: Path) -> None:
    """A shape keeps its launch, whatever another process writes: graphs and plans rely on it."""
    before = config.choose(SM_90, **ASKED)
    text = {"version": 1, "arch": "sm_90", "rows": {CLASS: {"launch": {"BV": 8}}}}
    (user / "sm_90.json").write_text(json.dumps(text))
    assert config.choose(SM_90, **ASKED) == before


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "be JSON with rows"), ("[]", "be JSON with rows"), ("", "be JSON with rows"),
        ("[" * 100_000, "be JSON with rows; got 'it is nested too deeply"),
        ('{"version": 1, "rows": {"a": ' + "[" * 900 + "]" * 900 + "}}", "got 'it is nested too deeply"),
        ('{"version": NaN, "arch": "sm_90", "rows": {}}', "got 'it holds NaN"),
        ('{"version": ' + "9" * 5000 + ', "arch": "sm_90", "rows": {}}', "be JSON with rows; got 'Exceeds the limit"),
        ('{"version": 1, "arch": "sm_90", "rows": []}', "be JSON with rows"),
        ('{"version": 1, "arch": ["sm_90"], "rows": {}}', "be for sm_90"),
        (json.dumps({"version": 1, "arch": "sm_90", "rows": {ALL: 5}}), "have a launch in"),
        (json.dumps({"version": 1, "arch": "sm_90", "rows": {ALL: {"launch": []}}}), "have a launch in"),
        (json.dumps({"version": 1, "arch": "sm_90", "rows": {ALL: {"launch": {"BV": [8]}}}}), "a valid BV"),
        (json.dumps({"version": 1, "arch": "sm_90", "rows": {ALL: {"launch": {"BV": 8.0}}}}), "a valid BV"),
        (json.dumps({"version": 1, "arch": "sm_90", "rows": {ALL.replace("1", "\u0663"): {}}}), "have rows named"),
        ('{"version": 2, "arch": "sm_90", "rows": {}}', "have version 1; got '2'"),
        ('{"version": 1, "arch": "sm_80", "rows": {}}', "be for sm_90; got 'sm_80'"),
        ('{"version": 1, "arch": "sm_90", "rows": {"scan K=64": {"launch": {}}}}', "have rows named like .*'scan"),
        (json.dumps({"version": 1, "arch": "sm_90", "rows": {ALL: {}}}), "have a launch in"),
        (json.dumps({"version": 1, "arch": "sm_90", "rows": {ALL: {"launch": {"chunk": 32}}}}), "set BV, warps in"),
        (json.dumps({"version": 1, "arch": "sm_90", "rows": {ALL: {"launch": {"BV": 24}}}}), "a valid BV"),
        (json.dumps({"version": 1, "arch": "sm_90", "rows": {ALL: {"launch": {"BV": True}}}}), "a valid BV"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_table_is_refused(user: Path, text: str, why: str) -> None:
    path = user / "sm_90.json"
    path.write_text(text)
    for use in (lambda: config.choose(SM_90, **ASKED), lambda: tables.merge(path, {})):
        with pytest.raises(ValueError, match=rf"sm_90\.json must .*{why}") as error:
            use()
        assert "\n" not in str(error.value)
    assert path.read_text() == text


def test_new_rows_replace_their_own_and_leave_the_others(user: Path) -> None:
    path = user / "new" / "sm_90.json"
    tables.merge(path, {ALL: {"launch": {"BV": 8}, "how": "once"}})
    tables.merge(path, {CLASS: {"launch": {"BV": 16}}, ALL: {"launch": {"BV": 32}, "how": "again"}})
    assert tables.read(path) == {ALL: {"launch": {"BV": 32}, "how": "again"}, CLASS: {"launch": {"BV": 16}}}
    assert [p.name for p in path.parent.iterdir()] == ["sm_90.json"]
    assert len(path.read_text().splitlines()) == 4  # a line for each row


def test_what_ships_is_a_table_for_a_known_target() -> None:
    shipped = sorted(tables.SHIPPED.glob("*.json"))
    assert shipped
    for path in shipped:
        assert path.stem in aot.TARGETS
        assert all(row["how"] for row in tables.read(path).values())


# ---- what is tried
# ---------------------------------------------------------------------------------------------


def test_problems_are_the_rows_of_the_table() -> None:
    found = problems(select(DEFAULT), ["bfloat16", "float32"], gradients=False)
    assert len({p.key for p in found}) == len(found) == 26
    assert {p.kernel for p in found} == {"recurrent", "chunks"}
    same = problems(select(["gda-t1-h4x4-d64-b8", "gda-t1-h16x16-d64-b2"]), ["float16"], gradients=True)
    assert [(p.key, p.case) for p in same] == [
        ("recurrent T<=1 heads<=32 K=64 V=64 gda float16", "gda-t1-h4x4-d64-b8")
    ]
    (_, back) = problems(select(["kda-t512-h4x4-d64-b1"]), ["float16"], gradients=True)
    assert back.key == "backward T<=1024 heads<=8 K=64 V=64 kda float16"


@pytest.mark.parametrize("target", aot.TARGETS)
def test_every_launch_that_is_tried_may_stand_in_a_table(target: str, user: Path) -> None:
    machine = aot.TARGETS[target][1]
    for problem in problems(select([*DEFAULT, "gda-t20-h1x1-d16-b1"]), ["bfloat16"], gradients=True):
        tried = [change for group in groups(problem, machine) for change in group]
        assert len(tried) == len({tuple(change.items()) for change in tried}) >= 4
        for change in tried:
            tables.merge(user / f"{target}.json", {problem.key: {"launch": change}})


# ---- the search
# ------------------------------------------------------------------------------------------------


def search(*jobs: list[Any]) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "interpret_tune.py")], input=json.dumps(jobs), capture_output=True,
        text=True, env={**os.environ, "TRITON_INTERPRET": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


TINY = "gda-t1-h1x1-d16-b1"


def test_the_fastest_launch_wins_unless_it_is_wrong(user: Path) -> None:
    likes = {"BV": 8, "warps": 1}
    fast, wrong, broken, none = search(
        [TINY, "float32", "recurrent", likes, None],
        [TINY, "float32", "recurrent", likes, ["BV", 8, "spoil"]],
        [TINY, "float32", "recurrent", likes, ["BV", 8, "raise"]],
        [TINY, "bfloat16", "recurrent", {}, None],
    )
    assert fast["launch"] == likes
    assert fast["us"] < 0.98 * fast["heuristic_us"]
    assert all(t["us"] and not t["why_not"] for t in fast["trials"])
    assert wrong["launch"] == {}
    assert wrong["us"] == wrong["heuristic_us"]
    assert [t["why_not"][:22] for t in wrong["trials"] if t["wrong"]] == ["o differs from the heu"]
    assert [t["why_not"] for t in broken["trials"] if t["why_not"]] == ["out of resource: shared memory"]
    assert not any(t["wrong"] for t in broken["trials"])
    assert none["launch"] == {}
    tables.merge(user / "interpreter.json", {fast["key"]: fast["row"]})
    machine = config.Machine("interpreter", 1)
    chosen = config.choose(machine, K=16, V=16, kda=False, dtype="float32", programs=1)
    assert (chosen.BV, chosen.warps) == (8, 1)


def test_chunks_and_the_backward_pass_are_searched_group_by_group() -> None:
    chunks, back = search(
        ["kda-t17-h1x1-d16-b1", "bfloat16", "chunks", {"chunk": 64, "scores_warps": 2}, None],
        ["gda-t17-h1x1-d16-b1", "float32", "backward", {"gradients_slice": 16, "backward_chunk": 64}, None],
    )
    assert chunks["launch"]["chunk"] == 64
    assert chunks["launch"]["scores_warps"] == 2
    assert back["launch"]["backward_chunk"] == 64
    assert back["key"] == "backward T<=128 heads<=2 K=16 V=16 gda float32"


# ---- the command
# -----------------------------------------------------------------------------------------------


@pytest.mark.skipif(not NO_GPU or backend.interpreted(), reason="Triton runs here")
def test_without_a_gpu_it_refuses_in_one_sentence(user: Path) -> None:
    for args in ((), ("--dry-run",)):
        code, out, err = run_program("tune", *args)
        assert (code, out) == (2, "")
        assert err.startswith("anydelta tune: requires a GPU that Triton knows; got none (")
        assert err.endswith("--dry-run --target sm_90 compiles what would be tried.\n")
        assert err.count("\n") == 1
    assert not list(user.iterdir())


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (["--target", "sm_90"], "--target goes with --dry-run"),
        (
            ["--dry-run", "--target", "sm_7"],
            "--target must be one of sm_80, sm_90, sm_100, gfx942; got 'sm_7'",
        ),
        (["--dry-run", "--target", "sm_90", "--dtype", "int8"], "--dtype must name some of bfloat16"),
        (["--dry-run", "--target", "sm_90", "--cases", "nothing"], "no case matches 'nothing'"),
        (["-r", "0"], "--rounds must be at least 1; got 0"),
        (["--seconds", "0"], "--seconds must be above 0; got 0"),
    ],
)
def test_bad_options_are_named(args: list[str], why: str) -> None:
    code, out, err = run_program("tune", *args)
    assert (code, out) == (2, "")
    assert err.startswith(f"anydelta tune: {why}")


def test_a_table_that_cannot_be_merged_with_is_found_before_anything_is_timed(
    user: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune_cli, "_here", lambda device: ("cuda", "sm_90"))
    (user / "sm_90.json").write_text("{}")
    with pytest.raises(Refused, match="must be JSON with rows"):
        tune_cli._tune([], None, 1, None, None, False)
    monkeypatch.setenv(tables.ENV, "")
    with pytest.raises(Refused, match="requires a folder"):
        tune_cli._tune([], None, 1, None, None, False)


@pytest.mark.skipif(backend.interpreted(), reason="the interpreter does not compile")
def test_a_dry_run_compiles_what_would_be_tried(user: Path) -> None:
    args = ("--dry-run", "--target", "sm_90", "--cases", TINY, "--dtype", "bfloat16")
    code, out, _ = run_program("tune", *args, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["target"] == "sm_90"
    tried = [t["change"] for t in found["trials"]]
    (problem,) = problems(select([TINY]), ["bfloat16"], gradients=False)
    assert tried == [change for group in groups(problem, SM_90) for change in group]
    assert all(t["kernels"] and t["fits"] and not t["error"] for t in found["trials"])
    code, out, _ = run_program("tune", *args)
    assert code == 0
    assert out.splitlines()[-1].startswith(f"{len(tried)} launches for 1 rows, {len(tried)} kernels compiled")


def test_a_launch_that_does_not_compile_fails_the_dry_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("ptxas says no\nat length")

    monkeypatch.setattr("anydelta.tune.compiling.compile_call", fail)
    code, out, _ = run_program(
        "tune", "--dry-run", "--target", "sm_90", "--cases", TINY, "--dtype", "bfloat16"
    )
    assert code == 1
    assert "ptxas says no" in out
    assert "at length" not in out
