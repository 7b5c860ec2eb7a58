"""The program: what it prints where, and its exit codes."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from typing import Any

import pytest

from anydelta import __version__, cli, dispatch
from anydelta.conformance import Case
from conftest import CPU_REASONS

CASE = "B=1 T=3 H=2 HV=2 K=8 V=8"
REFERENCE = ("conform", "--backend", "reference", "--framework", "numpy")


@pytest.fixture
def program(capsys: pytest.CaptureFixture[str]) -> Any:
    """program(*args) -> (exit code, stdout, stderr)"""

    def run(*args: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            cli.main(list(args))
        out, err = capsys.readouterr()
        return stop.value.code or 0, out, err  # type: ignore[return-value]

    return run


def test_info(program: Any) -> None:
    code, out, _ = program("info")
    assert code == 0
    for text in (__version__, "python", "platform", "numpy", *dispatch.NAMES):
        assert text in out


def test_info_as_json(program: Any) -> None:
    code, out, _ = program("info", "--json")
    facts = json.loads(out)
    assert code == 0
    assert set(facts["backends"]) == set(dispatch.NAMES)
    for backend in facts["backends"].values():
        assert backend["available"] == (not backend["reasons"])
    if not CPU_REASONS:
        assert facts["backends"]["cpu"]["isa"] in facts["backends"]["cpu"]["isas"]


def test_conform_shows_a_table(program: Any) -> None:
    code, out, _ = program(*REFERENCE, "--case", CASE)
    assert code == 0
    assert "reference" in out
    assert "FAIL" in out  # the heading


def test_conform_as_json_is_alone_on_stdout(program: Any) -> None:
    code, out, _ = program(*REFERENCE, "--case", CASE, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["version"] == __version__
    assert [(r["status"], r["case"]) for r in found["results"]] == [("OK", str(Case.parse(CASE)))]
    assert found["summary"][0]["OK"] == 1


def test_conform_as_csv_is_alone_on_stdout(program: Any) -> None:
    _, out, _ = program(*REFERENCE, "--case", CASE, "--case", CASE + " kda", "--csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [row["status"] for row in rows] == ["OK", "OK"]
    assert rows[1]["case"] == CASE + " kda"


def test_conform_as_markdown_is_alone_on_stdout(program: Any) -> None:
    _, out, _ = program(*REFERENCE, "--case", CASE, "--md")
    lines = out.splitlines()
    assert lines[0].startswith("| backend |")
    assert lines[2].startswith("| reference |  | numpy | 1 | 0 | 0 | 0 |")
    assert len(lines) == 3


def test_conform_support_as_json(program: Any) -> None:
    code, out, _ = program("conform", "--support", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["version"] == __version__
    assert list(found["backends"]) == list(dispatch.NAMES)
    for backend in found["backends"].values():
        assert list(backend["features"]) == list(found["cases"])
    assert found["backends"]["triton"]["devices"] == ["cuda", "xpu"]
    assert found["backends"]["triton"]["features"]["torch tensors"] == []
    assert found["backends"]["triton"]["features"]["NumPy arrays"] == [
        "takes torch tensors; got numpy arrays"
    ]


def test_conform_support_shows_a_table_and_the_reasons(program: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = program("conform", "--support")
    assert code == 0
    table, _, reasons = out.partition("no (")
    assert all(name in table for name in dispatch.NAMES)
    assert "triton, metal): NumPy arrays: takes torch tensors; got numpy arrays" in reasons
    code, out, _ = program("conform", "--support", "--backend", "reference")
    assert code == 0
    assert "triton" not in out
    assert "no (" not in out


def test_filter_by_text_or_regex(program: Any) -> None:
    for text in ("T=1000 H=1 HV=2 K=64 V=64 gate=keep", r"T=1000 .*V=64 gate=k\w+$"):
        _, out, _ = program(*REFERENCE, "--filter", text, "--json")
        assert [r["case"] for r in json.loads(out)["results"]] == ["B=1 T=1000 H=1 HV=2 K=64 V=64 gate=keep"]


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (("--backend", "cuda"), "there is no backend 'cuda'; the known ones are"),
        (("--require", "cuda"), "there is no backend 'cuda'; the known ones are"),
        (("--filter", "T=([0-9"), "as a regex it is wrong"),
        (("--filter", "no such case"), "matches none of the"),
        (("--case", "T=x"), "T cannot be 'x'"),
        (("--case", CASE, "--filter", "T"), "exclude each other"),
        (("--isa", "z80"), "isa must be one that runs on this machine"),
        (("--framework", "jax"), "must be numpy, torch or mlx"),
        (("--json", "--csv"), "exclude each other"),
        (
            ("--support", "--filter", "T", "--md"),
            "--support goes with --backend and --json only; got --filter, --md",
        ),
        (("--support", "--backend", "cuda"), "there is no backend 'cuda'"),
    ],
)
def test_bad_input_is_one_sentence(program: Any, args: tuple[str, ...], text: str) -> None:
    code, out, err = program("conform", *args)
    assert code == 2
    assert out == ""
    assert text in err
    assert len(err.strip().splitlines()) == 1
    assert err.startswith("anydelta conform: ")


def test_unknown_options_exit_2(program: Any) -> None:
    assert program("conform", "--nonsense")[0] == 2
    assert program("nonsense")[0] == 2


def broken(
    monkeypatch: pytest.MonkeyPatch, against: tuple[str, ...] = (), available: tuple[str, ...] = ()
) -> None:
    """Make the backend "reference" wrong, picky or absent."""
    backend = dispatch.get_backend("reference")
    run = backend.run

    def doubled(plan: Any, spec: Any, call: Any) -> None:
        run(plan, spec, call)
        call.o *= 2

    monkeypatch.setattr(backend, "run", doubled)
    monkeypatch.setattr(backend, "supports", lambda spec: [dispatch.Rejected(r) for r in against])
    monkeypatch.setattr(backend, "available", lambda: [dispatch.Rejected(r) for r in available])


def test_a_failure_exits_1_with_its_reproduction(program: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch)
    line = "B=1 T=4 H=2 HV=2 K=11 V=8"
    code, out, _ = program(*REFERENCE, "--case", line)
    assert code == 1
    assert f"FAIL anydelta conform --backend reference --framework numpy --case '{line}'" in out
    code, out, _ = program(*REFERENCE, "--case", line, "--md")
    assert code == 1
    assert line in out
    code, out, _ = program(*REFERENCE, "--case", line, "--json")
    assert code == 1
    assert "NMSE" in json.loads(out)["results"][0]["reasons"][0]


@pytest.mark.parametrize("how", ["against", "available"])
def test_require_turns_a_refusal_into_a_failure(
    program: Any, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    broken(monkeypatch, **{how: ("not today",)})
    line = "B=1 T=5 H=2 HV=2 K=12 V=8"
    code, out, _ = program(*REFERENCE, "--case", line, "--verbose")
    assert code == 0
    assert "not today" in out
    code, out, _ = program(*REFERENCE, "--case", line, "--require", "reference")
    assert code == 1
    assert "required backend reference has 1" in out


@pytest.mark.skipif(bool(CPU_REASONS), reason="; ".join(CPU_REASONS) or "runs")
def test_every_isa_can_be_chosen(program: Any) -> None:
    isas = json.loads(program("info", "--json")[1])["backends"]["cpu"]["isas"]
    for isa in isas:
        _, out, _ = program("conform", "--isa", isa, "--case", CASE, "--json", "--require", "cpu")
        assert {r["isa"] for r in json.loads(out)["results"] if r["backend"] == "cpu"} == {isa}


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_a_missing_package_is_one_sentence(missing: str) -> None:
    code = (
        "import importlib.util as u; find = u.find_spec\n"
        f"u.find_spec = lambda name, *a: None if name == {missing!r} else find(name, *a)\n"
        "from anydelta.cli import main; main(['info'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert (
        done.stderr.strip()
        == f"anydelta: the command line requires {missing}; run: pip install 'anydelta[cli]'"
    )


def test_progress_goes_to_stderr() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "anydelta.cli", *REFERENCE, "--case", CASE, "--json"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    json.loads(done.stdout)
