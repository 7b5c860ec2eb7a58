"""The program: what it prints where, and its exit codes."""

from __future__ import annotations

import csv
import io
import json
import os
import shlex
import subprocess
import sys
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anydelta import __version__
from anydelta.conformance import Case, Target
from anydelta.conformance.cases import DECAYS, DTYPES, GATES, MASKS, MOST_ELEMENTS, STATE_STRIDES, STRIDES
from anydelta.conformance.mixer import MixerCase
from anydelta.conformance.run import STATUSES, parse, run_one
from anydelta.conformance.token_log import LogCase
from anydelta.core import dispatch
from conftest import CPU_REASONS, run_program

CASE = "B=1 T=3 H=2 HV=2 K=8 V=8"
REFERENCE = ("conform", "--backend", "reference", "--framework", "numpy")


@pytest.fixture
def program() -> Any:
    """program(*args) -> (exit code, stdout, stderr)"""
    return run_program


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
    for text in ("T=1000 H=1 HV=2 K=64 V=64 gate=mixed", r"T=1000 .*V=64 gate=m\w+$"):
        _, out, _ = program(*REFERENCE, "--filter", text, "--json")
        assert [r["case"] for r in json.loads(out)["results"]] == ["B=1 T=1000 H=1 HV=2 K=64 V=64 gate=mixed"]


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
        (
            ("--gradients", "--framework", "numpy"),
            "--gradients requires torch, and goes with --framework torch",
        ),
        (
            ("--gradients", "--case", CASE + " inplace"),
            "takes functional calls without snapshots",
        ),
    ],
)
def test_bad_input_is_one_sentence(program: Any, args: tuple[str, ...], text: str) -> None:
    code, out, err = program("conform", *args)
    assert code == 2
    assert out == ""
    assert text in err
    assert len(err.strip().splitlines()) == 1
    assert err.startswith("anydelta conform: ")


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("", "a line has at least one field"), ("mixer", "a line has at least one field"),
        ("K=0", "K must be at least 1; got 0"), ("B=-1", "B must be at least 0; got -1"),
        ("H=0", "H must be at least 1"), ("HV=3 H=2", "HV is a multiple of H"), ("T=1 T=2", "T must be given once"),
        ("T=1.5", "T cannot be '1.5'"), ("T=\N{ARABIC-INDIC DIGIT THREE}", "T cannot be"),
        ("T=1_0", "T cannot be '1_0'"),
        ("T", "T cannot be ''"), ("nothing=1", "no field is called 'nothing'"), ("kda=1", "kda cannot be '1'"),
        ("dtype=bf16", "dtype must be one of"), ("gate_dtype=int8", "gate_dtype must be one of"),
        ("state_dtype=int8", "state_dtype must be one of"), ("decay=exp", "decay must be one of"),
        ("heads=two", "heads must be one of"), ("layout=kk", "layout must be one of"),
        ("gate=x", "gate must be one of"),
        ("eps=nan", "eps cannot be 'nan'"), ("eps=-1", "eps is a number from 0"), ("scale=1e999", "scale is a number"),
        ("lower_bound=1 decay=raw", "lower_bound is a number up to 0"), ("seqlens=1,,2", "seqlens cannot be '1,,2'"),
        ("seqlens=5,-1", "seqlens must be at least 0; got -1"), ("T=5 seqlens=1,2", "T must be the sum of seqlens, 3"),
        ("pool=1 indices=1", "indices are -1 or rows of the pool, not [1]"), ("snapshots=-1", "snapshots must be"),
        ("scattered inplace pool=1 indices=0 snapshots=5 T=9", "scattered needs a row of the pool for each"),
        ("T=99999999999", "its arrays must have at most"), ("snapshots=9999999", "its arrays must have at most"),
        (f"T={'9' * 5000}", "T cannot be '999"), (f"seqlens={'999999999,' * 999}1", "its arrays must have at most"),
        ("mixer W=0", "W must be at least 1"), ("mixer W=4 S=1", "the conv state has at least W - 1 = 3 columns"),
        ("mixer W=999999999", "its arrays must have at most"), ("log step=0", "step must be at least 1"),
        ("log entries=0", "entries must be at least 1"), ("log blocks=99", "steps between two commits must fit"),
        ("log entries=999999999", "its arrays must have at most"), ("mixer log T=1", "no field is called 'log'"),
        ("T=\0", "T cannot be '\\x00'"), ("[red]T=1[/]", "no field is called '[red]T'"),
    ],
)  # fmt: skip
def test_a_wrong_line_is_one_sentence(program: Any, line: str, text: str) -> None:
    code, out, err = program("conform", "--case", line)
    assert (code, out) == (2, "")
    assert err.startswith("anydelta conform: case: ")
    assert text in err
    assert err.count("\n") == 1


FIELDS = sorted({f.name for kind in (Case, MixerCase, LogCase) for f in fields(kind)})
VALUES = st.one_of(
    st.sampled_from(["", "0", "1", "-1", "2", "None", "True", "raw", "nan", "inf", "1e400", "float64", "kv", "1,2"]),
    st.integers().map(str), st.floats().map(str), st.lists(st.integers(-2, 9)).map(lambda x: ",".join(map(str, x))),
    st.text(max_size=20),
)  # fmt: skip
WORDS = st.one_of(
    st.builds("{}={}".format, st.sampled_from(FIELDS), VALUES), st.sampled_from(FIELDS), st.text(max_size=8)
)


@settings(derandomize=True, max_examples=1000, deadline=None)
@given(st.sampled_from(["", "mixer ", "log ", "mixer\t", "mixer log "]), st.lists(WORDS, max_size=8))
def test_any_line_is_a_case_or_one_sentence(kind: str, words: list[str]) -> None:
    line = kind + " ".join(words)
    try:
        case = parse(line)
    except ValueError as error:
        said = str(error).splitlines()
    else:
        said = [str(case)]
    assert len(said) == 1, said
    if said[0].startswith("case: "):
        return
    assert parse(str(case)) == case
    assert case.elements <= MOST_ELEMENTS


@settings(derandomize=True, max_examples=60, deadline=None)
@given(
    st.sampled_from(["", "mixer ", "log "]),
    st.fixed_dictionaries(
        {name: st.integers(1, 3) for name in ("B", "T", "H", "K", "V")},
        optional={
            "HV": st.sampled_from([2, 3, 6]), "kda": st.none(), "dtype": st.sampled_from(DTYPES),
            "mask": st.sampled_from(MASKS), "strides": st.sampled_from(STRIDES), "gate": st.sampled_from(GATES),
            "state_strides": st.sampled_from(STATE_STRIDES), "snapshots": st.integers(0, 4), "pool": st.integers(0, 4),
            "indices": st.lists(st.integers(-1, 3), max_size=3).map(lambda x: ",".join(map(str, x))),
            "seqlens": st.lists(st.integers(0, 3), max_size=3).map(lambda x: ",".join(map(str, x))),
            "inplace": st.none(), "fresh": st.none(), "nofinal": st.none(), "scattered": st.none(), "int64": st.none(),
            "decay": st.sampled_from(DECAYS), "dt_bias": st.sampled_from(["none", "full", "flat"]), "logit": st.none(),
            "l2norm": st.none(), "eps": st.sampled_from(["0", "1e-300"]), "scale": st.sampled_from(["0", "1e30"]),
        },
    ),
)  # fmt: skip
def test_a_case_that_parses_runs(kind: str, words: dict[str, Any]) -> None:
    line = kind + " ".join(name if value is None else f"{name}={value}" for name, value in words.items())
    try:
        case = parse(line)
    except ValueError:
        return
    result = run_one(case, Target("reference", None, "numpy"))
    assert result.status in STATUSES


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
    rules = tuple((lambda spec, reason=reason: reason) for reason in against)
    monkeypatch.setattr(type(backend), "accepts", backend.accepts.but(rules=rules))
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


# ---- what people expect of a program


def commands() -> dict[str, Any]:
    """Every command by its words."""
    import typer

    from anydelta.cli import build_app

    def below(words: str, command: Any) -> dict[str, Any]:
        found = {words: command}
        for name, inner in getattr(command, "commands", {}).items():
            found |= below(f"{words} {name}", inner)
        return found

    return below("anydelta", typer.main.get_command(build_app()))


@pytest.mark.parametrize("words", list(commands()))
def test_every_help_has_examples_that_parse(words: str) -> None:
    """The words of an example are those of a command, and its options exist and have values of their kind."""
    _, found, examples = (commands()[words].help or "").partition("Examples:\n")
    lines = [line.strip() for line in examples.splitlines() if line.strip()]
    assert found, "no example"
    assert lines
    for line in lines:
        assert line.startswith(words), line
        command: Any = commands()["anydelta"]
        args = shlex.split(line)[1:]
        while hasattr(command, "commands"):
            assert args, line
            assert args[0] in command.commands, line
            command = command.commands[args.pop(0)]
        command.make_context(line, args)


@pytest.mark.parametrize(
    "args",
    [
        ("conform", "--case", CASE, "--backend", "reference"),
        ("doctor",),
        ("info",),
        ("bench", "ops", "--list"),
    ],
)
def test_commands_of_the_examples_run(program: Any, args: tuple[str, ...]) -> None:
    assert program(*args)[0] == 0


def test_the_version(program: Any) -> None:
    assert program("--version")[:2] == (0, f"anydelta {__version__}\n")


def test_a_shell_asks_how_the_words_go_on() -> None:
    given = {"COMP_WORDS": "anydelta bench o", "COMP_CWORD": "2", "_ANYDELTA_COMPLETE": "complete_bash"}
    code = "from anydelta.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **given}, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["ops", "overhead"]


def test_doctor_finds_what_was_switched_off(program: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from anydelta import doctor
    from anydelta.core import native

    monkeypatch.setenv("ANYDELTA_BACKEND", "reference")
    monkeypatch.setenv("ANYDELTA_TORCH_LIBRARY", "0")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(
        doctor, "_version", lambda package: {"torch": "2.13.0", "transformers": "5.19.1"}.get(package)
    )
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(doctor, "unavailable", lambda name: ("Triton is not installed",))
    facts = {"isas": ["baseline", "more"], "isa": "baseline", "threads": 1}
    monkeypatch.setattr(dispatch.get_backend("cpu"), "describe", lambda: facts, raising=False)
    monkeypatch.setattr(doctor.os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    code, out, _ = program("doctor", "--json")
    assert code == 0
    commands = [each["command"] for each in json.loads(out)]
    cpu = [] if CPU_REASONS else [
        "unset ANYDELTA_CPU_ISA", "unset OMP_NUM_THREADS", "unset ANYDELTA_TORCH_LIBRARY"
    ]  # fmt: skip
    gpu = "install the PyTorch of this GPU (pytorch.org/get-started), then: pip install triton"
    built = [doctor.build()] if CPU_REASONS else []
    assert commands == [*built, "unset ANYDELTA_BACKEND", gpu, *cpu, "pip install -U transformers"]
    text = program("doctor")[1]
    assert text.count("\n") == 2 * len(commands)
    assert "Triton is not installed." in text
    monkeypatch.setattr(native, "why_not", "it is not built")
    assert next(doctor.advice()).command == doctor.build()


@pytest.mark.parametrize(
    ("url", "source"),
    [
        ('{"url": "file:///home/a%20b/anydelta", "dir_info": {}}', "'/home/a b/anydelta'"),
        ('{"url": "https://example.org/anydelta.whl"}', "anydelta"),
        (None, "anydelta"),
    ],
)
def test_doctor_builds_from_where_it_was_installed(
    monkeypatch: pytest.MonkeyPatch, url: str | None, source: str
) -> None:
    from anydelta import doctor

    monkeypatch.setattr(doctor, "distribution", lambda name: SimpleNamespace(read_text=lambda file: url))
    assert doctor.build().split(" ", 5)[-1] == source
    assert doctor.build(beside_torch=True).endswith(f"--no-build-isolation {source}")


def test_doctor_finds_nothing(program: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from anydelta import doctor

    monkeypatch.setattr(doctor, "advice", lambda: iter(()))
    assert program("doctor")[1].startswith("Nothing to do")
    assert program("doctor", "--json")[1].strip() == "[]"


def test_doctor_asks_for_tuning(monkeypatch: pytest.MonkeyPatch) -> None:
    from anydelta import doctor

    facts: dict[str, Any] = {}
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(doctor, "unavailable", lambda name: ())
    monkeypatch.setattr(doctor.dispatch, "get_backend", lambda name: SimpleNamespace(describe=lambda: facts))
    assert [each.command for each in doctor._gpu()] == ["anydelta tune"]
    facts["tables"] = ["sm_90.json"]
    assert not list(doctor._gpu())
