"""What the programs print: text from data literally, in every form and width; and how they end."""

from __future__ import annotations

import ast
import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")

import typer
from rich.console import Console
from rich.text import Text

import anydelta
from anydelta import cli, terminal
from anydelta.bench.measure import drafting as spec
from anydelta.bench.measure import drafting_report as spec_report
from anydelta.bench.measure import (
    model,
    model_report,
    ops,
    outputs,
    prefix,
    prefix_report,
    report,
    small_report,
)
from anydelta.bench.measure.profile import ORDER, Part
from anydelta.bench.measure.runners import Test as Work
from anydelta.conformance import cli as conform
from anydelta.conformance.run import FAIL, Result
from anydelta.tune import cli as tune
from conftest import run_program

SOURCE = Path(anydelta.__file__).parent

HOSTILE = (
    "[red]a[/]", "[/]", "[/nothing]", "[link=http://x]y", r"\[bold]", "pip install 'anydelta[vulkan]'", ":smile:",
    "$x^2$", "a\x1b[31mb\x1b]0;title\x07", "back\rward", "wide 字幕 text", "nul\0", "turn\u202eed", "a|b", "<b>",
    "&amp;", "W" * 150, "\udcff", "{x}", "%s",
)  # fmt: skip


@pytest.fixture(params=HOSTILE, ids=ascii)
def hostile(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def printed(*shown: Any, width: int = 80) -> str:
    """What `show` writes to a terminal of that width."""
    out = io.StringIO()
    console = terminal.console()
    console = Console(
        file=out, width=width, force_terminal=True, markup=console._markup, emoji=console._emoji, highlight=False,
        color_system=None,
    )  # fmt: skip
    console.print(*shown, sep="\n")
    return out.getvalue()


def joined(text: str) -> str:
    """Without what folding puts between the parts of a word, or a table around them."""
    return "".join(c for c in text if c not in " \n│┃|")


def holds(out: str, text: str) -> None:
    for word in terminal.literal(text).split():  # a table folds between words
        assert joined(word) in joined(out), out
    assert not set(out) & set("\x1b\x07\r\0\u202e\udcff"), out


# ---- One place that prints


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: str(p.relative_to(SOURCE)))
def test_only_one_module_prints(path: Path) -> None:
    """rich, and the printing functions, are the terminal's: whoever else used them would have to escape by itself."""
    if path.name in ("terminal.py", "aot.py", "gradients.py"):  # the last two are programs of their own
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            assert name not in ("print", "typer.echo", "typer.secho", "Console"), (
                f"{path}:{node.lineno} calls {name}"
            )
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            rich = [n for n in names if n.split(".")[0] == "rich"]
            kinds = {a.name for a in node.names}
            assert not rich or kinds == {"Group"}, f"{path}:{node.lineno} imports {rich}"


# ---- Literally


@pytest.mark.parametrize("width", [200, 80, 40])
def test_a_table_shows_every_text(hostile: str, width: int) -> None:
    for boxed in (False, True):
        rows = [(hostile, "1", hostile), ("x", "2", "")]
        out = printed(
            terminal.Table(hostile, ("name", hostile, "why"), rows, left=("why",), boxed=boxed), width=width
        )
        holds(out, hostile)
        assert "…" not in out
        assert all(Text(line).cell_len <= width for line in out.splitlines())


def test_lines_and_markdown_show_every_text(hostile: str) -> None:
    holds(printed(terminal.lines([hostile, "below"], "dim")), hostile)
    lines = terminal.markdown_table(("a", "b"), [(hostile, "1"), ("two\nlines", "2")])
    assert len(lines) == 4
    assert all(line.replace("\\|", "").count("|") == 3 for line in lines)
    holds(lines[2].replace("\\|", "|").replace("&lt;", "<"), hostile)


def test_info_shows_reasons_as_they_are(hostile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    facts = {
        "anydelta": "1", "python": "3", "platform": hostile, "packages": {"numpy": hostile},
        "torch_library": {"available": False, "reason": hostile}, "forced": None, "priority": {"cpu": ["cpu"]},
        "backends": {
            "cpu": {"available": False, "reasons": [hostile]},
            "vulkan": {"available": True, "reasons": [], "x": hostile},
        },
    }  # fmt: skip
    monkeypatch.setattr(cli, "gather", lambda: facts)
    for width in ("80", "40"):
        monkeypatch.setenv("COLUMNS", width)
        ran = run_program("info")
        assert ran.exit_code == 0
        holds(ran.stdout, hostile)
    assert json.loads(run_program("info", "--json").stdout) == facts


def caught(act: Callable[[], None]) -> str:
    """What it writes to stdout."""
    out = io.StringIO()
    with redirect_stdout(out):
        act()
    return out.getvalue()


def test_conform_shows_reasons_as_they_are(hostile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    results = [
        Result("cpu", hostile, "numpy", "T=1", FAIL, (hostile,)),
        Result("x", None, "numpy", "*", "SKIPPED", (hostile,)),
    ]
    table, *lines = caught(lambda: conform._print_tables(results, [hostile], True)).split(
        "FAIL anydelta conform"
    )
    holds(table, hostile)
    assert hostile in lines[0]
    text = caught(lambda: conform._print_md(results, [hostile])).replace("\\|", "|").replace("&lt;", "<")
    holds(text.split("\n- ")[0], hostile)
    loaded = json.loads(caught(lambda: conform._print_json(results, [hostile])))
    assert loaded["results"][0]["reasons"] == [hostile]
    rows = list(csv.DictReader(io.StringIO(caught(lambda: conform._print_csv(results)), newline="")))
    assert rows[0]["reasons"] == terminal.literal(hostile)
    answers = {"cpu": {"devices": ["cpu"], "features": {hostile: [hostile]}}}
    found = {"version": "1", "cases": {hostile: ""}, "backends": answers}
    table, line = caught(lambda: conform._print_support(found, False)).split("no (cpu): ")
    holds(table, hostile)
    assert line == f"{hostile}: {hostile}\n"


MACHINE = {
    "cpu": "", "cpus": 1, "system": "", "python": "", "torch": "", "anydelta": "", "date": "", "backend": {},
}  # fmt: skip


@dataclass
class Small:
    """A record of a small measurement."""

    name: str
    others_pct: float | None = None
    seconds: float = float("nan")

    def columns(self) -> dict[str, str]:
        return {"name": self.name, "s": "1"}


def reports(text: str) -> Iterator[tuple[Any, Any]]:
    """Every kind of report that `anydelta bench` prints, with the text wherever data can stand."""
    machine = {**MACHINE, "cpu": text, "backend": {text: text}}
    records: list[Any] = [
        ops.Record(text, "decode", 1, text, text, status="failed", reason=text, detail=text)
    ]
    yield report, ops.Report(machine, ops.Settings(), absent={text: text}, notes=[text], records=records)
    yield small_report, small_report.Measured(text, machine, ops.Settings(), [text], [Small(text)])
    records = [spec.Record(text, text, text, status="failed", reason=text)]
    yield spec_report, spec.Report(machine, text, spec.Settings(), records=records, notes=[text])
    yield prefix_report, spec.Report(machine, text, prefix.Settings(), records=[], notes=[text])
    records = [
        model.Record(text, "", 1, 1.0, "float32", 1, "tg1", 1, 0, text, text, status="failed", reason=text),
    ]
    settings = model.Settings((Work("tg", 1, 0),), 1, False)
    yield model_report, model.Report(machine, settings, records=records, absent={text: text})


def test_every_report_of_bench_shows_every_text(hostile: str) -> None:
    for printers, measured in reports(hostile):
        for width in (160, 80, 40):
            out = printed(outputs.to_table(printers, measured), width=width)
            holds(out, hostile)
            assert "…" not in out
        loaded = json.loads(outputs.to_text(printers, measured, "json"), parse_constant=pytest.fail)
        assert hostile in str(loaded) or repr(hostile)[1:-1] in str(loaded)
        outputs.to_text(printers, measured, "csv")
        text = outputs.to_text(printers, measured, "md").replace("\\|", "|").replace("&lt;", "<")
        holds(text, " ".join(hostile.split()))


def test_the_table_of_tune_shows_every_text(hostile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from anydelta.tune import compiling

    def dry_run(as_json: bool) -> None:
        with pytest.raises(typer.Exit):
            tune._dry_run([], "sm_90", as_json)

    trial = compiling.Trial(hostile, {hostile: 1}, error=hostile)
    monkeypatch.setattr(compiling, "compile_all", lambda *args: [trial])
    holds(caught(lambda: dry_run(False)), hostile)
    assert json.loads(caught(lambda: dry_run(True)))["trials"][0]["error"] == hostile


def test_figures_show_dollars(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    text = r"a $\nothing{ b"
    good = ops.Record(text, "decode", 1, "anydelta", "1", min_us=1.0, median_us=1.0, ratio=1.0, ratio_min=1.0)
    path = tmp_path / "x.svg"
    report.plot(ops.Report({**MACHINE, "cpu": text}, ops.Settings(), records=[good]), path)
    assert r"a $\nothing{ b" in path.read_text()


def drawn() -> Iterator[tuple[str, Any, Any]]:
    """Reports as long as real ones, which `--plot` draws."""
    machine = {
        **MACHINE,
        "cpu": "AMD EPYC 9654 96-Core Processor",
        "cpus": 2,
        "anydelta": "0.1.0",
        "date": "2026-12-01",
    }
    cases = ("gda-t1-h16x32-d128-b8-bf16-pool512bf16-cold", "gda-t512-h16x32-d128-b1")
    peers = ("anydelta", "vllm", "onnxruntime", "ggml", "executorch", "mlx", "transformers")
    timed: list[Any] = [
        ops.Record(
            case, "decode", 2, peer, "1", median_us=1.0, min_us=1.0, ratio=1.0 + i, ratio_min=1.0, limit_pct=90.0 - i,
        )
        for case in cases
        for i, peer in enumerate(peers)
    ]  # fmt: skip
    yield "ops", report, ops.Report(machine, ops.Settings(), records=timed)
    for works in (("pp512",), ("pp512", "tg64", "tg64 @ d4096")):
        ways = ("transformers", "anydelta", "transformers, packed", "anydelta, packed", "anydelta, compiled")
        speeds: list[Any] = [
            model.Record(
                "qwen3.5-0.8b", "", 1, 1.0, "float32", 2, work, 1, 0, way, "1", rounds=3, median_tps=10.0, ratio=1.0 + i
            )
            for work in works
            for i, way in enumerate(ways)
        ]  # fmt: skip
        parts = [
            Part("qwen3.5-0.8b", "float32", 2, work, part, "ms per token", dict.fromkeys(ways[:2], 1.0), 1.0)
            for work in works
            for part in ORDER
        ]
        for shown in ([], parts):
            name = f"model, {len(works)} tests, {'parts' if shown else 'speed'}"
            settings = model.Settings((Work("tg", 1, 0),), 1, False)
            yield name, model_report, model.Report(machine, settings, records=speeds, parts=shown)
    drafts: list[Any] = [
        spec.Record(f"prompt {i}", mode, "the checkpoint's MTP layers, 2 drafts", accepted_share=0.1 * i, ratio=0.5 * i)
        for mode in ("mtp", "mtp+lookup", "lookup", "assistant")
        for i in range(9)
    ]  # fmt: skip
    yield "spec", spec_report, spec.Report(machine, "examples/tiny_model", spec.Settings(), records=drafts)


@pytest.mark.parametrize(
    "name", ["ops", *(f"model, {n} tests, {p}" for n in (1, 3) for p in ("speed", "parts")), "spec"]
)
def test_legends_cover_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No legend is on a title, an axis or another legend, or leaves the figure."""
    pytest.importorskip("matplotlib")
    import matplotlib.pyplot as plt

    monkeypatch.setattr(plt, "close", lambda figure: None)
    _, printers, measured = next(one for one in drawn() if one[0] == name)
    printers.plot(measured, tmp_path / "x.svg")
    fig = plt.gcf()
    monkeypatch.undo()
    draw = fig.canvas.get_renderer()  # type: ignore[attr-defined]
    boxes = {"title": fig._suptitle.get_window_extent(draw)}  # type: ignore[attr-defined]
    legends = {
        f"legend {i}": x for i, x in enumerate([*fig.legends, *(a.get_legend() for a in fig.axes)]) if x
    }
    for i, axis in enumerate(fig.axes):
        if axis.get_legend() is not None:
            axis.get_legend().set_in_layout(False)
        boxes[f"axis {i}"] = axis.get_tightbbox(draw)
    boxes |= {what: legend.get_window_extent(draw) for what, legend in legends.items()}
    plt.close(fig)
    assert legends
    for one in legends:
        box = boxes[one]
        assert fig.bbox.x0 <= box.x0 < box.x1 <= fig.bbox.x1, f"{one} leaves the figure"
        assert fig.bbox.y0 <= box.y0 < box.y1 <= fig.bbox.y1, f"{one} leaves the figure"
        for other, its in boxes.items():
            inside = min(box.x1, its.x1) - max(box.x0, its.x0), min(box.y1, its.y1) - max(box.y0, its.y0)
            assert other == one or min(inside) <= 1, f"{one} covers {other}"


def test_a_terminal_gets_escapes_and_a_file_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    for tty, want in ((True, "a\\x1b[31mb\n"), (False, "a\x1b[31mb\n")):
        out = io.StringIO()
        out.isatty = lambda tty=tty: tty  # type: ignore[method-assign, misc]
        monkeypatch.setattr(sys, "stdout", out)
        terminal.say("a\x1b[31mb")
        assert out.getvalue() == want


def test_json_knows_no_nan() -> None:
    text = terminal.to_json({"a": [float("nan"), float("inf"), 1.5], "b": (float("-inf"), "NaN Infinity")})
    assert json.loads(text, parse_constant=pytest.fail) == {
        "a": [None, None, 1.5],
        "b": [None, "NaN Infinity"],
    }


def test_no_color(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    terminal.show(terminal.Table("", ("a",), [("b",)], lambda cells: "red"))
    assert "\x1b[31m" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "args",
    [
        "--help", "bench --help", "bench ops --help", "conform --help", "generate --help", "tune --help", "info",
        "doctor",
    ],
)  # fmt: skip
def test_80_columns_without_colours(args: str) -> None:
    """Nothing is wider than the terminal, and NO_COLOR is followed."""
    given = {**os.environ, "COLUMNS": "80", "NO_COLOR": "1", "FORCE_COLOR": "1", "TERM": "xterm-256color"}
    done = subprocess.run(
        [sys.executable, "-m", "anydelta.cli", *args.split()], env=given, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]m", done.stdout)
    lines = Text.from_ansi(done.stdout).plain.splitlines()
    assert lines
    assert [line for line in lines if Text(line).cell_len > 80] == []


def every_help() -> list[tuple[str, ...]]:
    def of(command: Any, words: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        yield words
        for name, inner in getattr(command, "commands", {}).items():
            yield from of(inner, (*words, name))

    return list(of(typer.main.get_command(cli.build_app()), ()))


@pytest.mark.parametrize("columns", [50, 60, 71, 80])
def test_no_help_is_cut_off(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rich cuts words that do not fit their column; in a narrow terminal those were names of options."""
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", columns)
    for words in every_help():
        with pytest.raises(SystemExit) as stop:
            cli.main([*words, "--help"])
        shown = capsys.readouterr().out
        assert stop.value.code == 0
        assert "…" not in shown, words
        assert "Examples:\n" in re.sub(r" +\n", "\n", shown), words
        if columns < 72:  # plain: each example is a line
            first = shown[shown.index("Examples:") :].splitlines()[1]
            assert first.split()[0] == "anydelta"
            assert first.startswith("    ")


def test_a_shell_can_be_named() -> None:
    for shell, some in (
        ("bash", "complete -o"),
        ("zsh", "#compdef anydelta"),
        ("fish", "complete --command"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "anydelta.cli", "--show-completion", shell], capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert some in done.stdout
    done = subprocess.run(
        [sys.executable, "-m", "anydelta.cli", "--show-completion", "csh"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "csh" in done.stderr


def test_a_paragraph_of_help_fits_any_width() -> None:
    command = typer.main.get_command(cli.build_app())
    terminal.reflow(command)
    ops = command.commands["bench"].commands["ops"].help.split("\n\n")
    assert "\n" not in ops[1]
    assert ops[-1].startswith("Examples:\n  anydelta bench ops\n")


def test_progress_without_a_terminal_is_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 100.0
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now)
    with terminal.progress() as tell:
        for now in (100.0, 110.0, 116.0, 117.0, 140.0):
            tell("case\n[1]", (now - 100) / 50)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [" 32% after 16 s: case [1]", " 80% after 40 s: case [1]"]


@pytest.mark.parametrize(("variable", "value"), [("FORCE_COLOR", "1"), ("TERM", "dumb")])
def test_no_bar_goes_to_a_log(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(variable, value)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: variable == "TERM", raising=False)
    with terminal.progress() as tell:
        tell("x", 0.5)
    assert capsys.readouterr().err == ""


# ---- The end


class Program:
    """A program with one command, and a group with another, that do what they are told."""

    act: ClassVar[Callable[[], None]]

    @classmethod
    def build(cls) -> typer.Typer:
        app, group = typer.Typer(), typer.Typer()

        @app.command()
        def go(number: int = 0) -> None:
            cls.act()

        @group.command()
        def deep() -> None:
            cls.act()

        @group.command()
        def other() -> None: ...

        app.add_typer(group, name="group")
        return app

    @classmethod
    def run(cls, act: Callable[[], None], *args: str) -> tuple[int, str, str]:
        cls.act = staticmethod(act)  # type: ignore[assignment]
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as stop:
            terminal.run(cls.build, list(args))
        assert isinstance(stop.value.code, int)
        return stop.value.code, out.getvalue(), err.getvalue()


def raising(error: BaseException) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


@pytest.mark.parametrize(
    ("act", "args", "want"),
    [
        (lambda: terminal.say("fine"), ("go",), (0, "fine\n", "")),
        (raising(terminal.Refused("in\n two;\x1b got [y].")), ("go",), (2, "", "anydelta go: in two;\\x1b got [y].\n")),
        (raising(terminal.Refused("is it?")), ("group", "deep"), (2, "", "anydelta group deep: is it?\n")),
        (raising(terminal.Failed("wrong:")), ("go",), (1, "", "anydelta go: wrong.\n")),
        (raising(typer.Exit(3)), ("go",), (3, "", "")),
        (raising(KeyboardInterrupt()), ("go",), (130, "", "anydelta go: interrupted.\n")),
        (raising(BrokenPipeError()), ("go",), (141, "", "")),
        (raising(MemoryError()), ("go",), (1, "", "anydelta go: requires more memory than there is; got no more.\n")),
        (
            raising(OSError(28, "No space left")), ("go",),
            (1, "", "anydelta go: requires a file that can be read or written; got [Errno 28] No space left.\n"),
        ),
    ],
)  # fmt: skip
def test_how_a_command_ends(
    act: Callable[[], None], args: tuple[str, ...], want: tuple[int, str, str]
) -> None:
    assert Program.run(act, *args) == want


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (("nothing",), "anydelta: No such command 'nothing'"),
        (("go", "--nothing"), "anydelta go: No such option: --nothing"),
        (("go", "--number", "x\ny"), "anydelta go: Invalid value for '--number'"),
        (("group", "\x1b[31m"), "anydelta group: No such command '\\x1b[31m'"),
        (("go", "[red]"), "anydelta go: Got unexpected extra argument"),
    ],
)
def test_a_wrong_option_is_one_sentence(args: tuple[str, ...], text: str) -> None:
    code, out, err = Program.run(lambda: None, *args)
    assert (code, out) == (2, "")
    assert err.startswith(text)
    assert err.endswith(" --help.\n")
    assert err.count("\n") == 1


def test_a_fault_keeps_its_traceback() -> None:
    code, out, err = Program.run(raising(KeyError("[red]")), "go")
    assert (code, out) == (70, "")
    assert err.startswith("Traceback")
    assert err.splitlines()[-1].startswith("anydelta go: this is a bug of anydelta, please report it")
    assert err.splitlines()[-1].endswith("KeyError: '[red]'.")


def spawn(*args: str, **options: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "anydelta.cli", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


@pytest.mark.skipif(sys.platform == "win32", reason="pipes and signals of POSIX")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    "args", ["bench ops --list --no-peers --cases all", "conform --support", "generate --help", "--help"]
)
def test_a_reader_that_leaves_is_no_error(unbuffered: str, args: str) -> None:
    run = spawn(*args.split(), env={**os.environ, "PYTHONUNBUFFERED": unbuffered})
    assert run.stdout is not None
    assert run.stderr is not None
    run.stdout.close()
    assert run.wait(300) == 141
    assert run.stderr.read() == b""
    run.stderr.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_one_sentence() -> None:
    with Path("/dev/full").open("wb") as full:
        run = subprocess.run(
            [sys.executable, "-m", "anydelta.cli", "bench", "ops", "--list", "--no-peers"],
            stdout=full, stderr=subprocess.PIPE, check=False,
        )  # fmt: skip
    assert run.returncode == 1
    assert run.stderr.decode().startswith(
        "anydelta bench ops: requires a file that can be read or written; got"
    )
    assert run.stderr.count(b"\n") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="pipes and signals of POSIX")
def test_ctrl_c_is_one_line() -> None:
    code = (
        "import time, typer; from anydelta import terminal; app = typer.Typer()\n"
        "@app.command()\n"
        "def wait() -> None: terminal.say('ready', end=''); time.sleep(600)\n"
        "terminal.run(lambda: app, [])"
    )
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert run.stdout is not None
    assert run.stdout.read(5) == b"ready"
    run.send_signal(signal.SIGINT)
    assert run.communicate(timeout=300) == (b"", b"anydelta: interrupted.\n")
    assert run.returncode == 130


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_an_encoding_that_lacks_a_character(encoding: str) -> None:
    code = "from anydelta.terminal import _open_streams, say, tell; _open_streams(); say('\\u5b57 ok'); tell('\\u5b57')"
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"},
        capture_output=True, check=True,
    )  # fmt: skip
    assert run.stdout.split() == [b"\\u5b57", b"ok"]
    assert run.stderr.split() == [b"\\u5b57"]
