"""Fuzz targets for readers of files and lines: each returns the value, or raises a declared error of one line.

    python tests/fuzz/loaders.py case tests/fuzz/corpus/case -max_total_time=60     # libFuzzer's options; needs atheris

Each target is a function of bytes. `make fuzz` lets atheris look for bytes that break it, tests/test_fuzz.py gives it
those of corpus/.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType

LONGEST = 2000
"""Characters of an error's text."""


def only(error: type[Exception], prefix: str, read: Callable[[], object]) -> object:
    """What `read` returns. It may raise `error` with one line that begins with `prefix`, and nothing else."""
    try:
        return read()
    except error as caught:
        text = str(caught)
        assert text.startswith(prefix), repr(text)
        assert len(text.splitlines()) == 1, repr(text)
        assert len(text) <= LONGEST, repr(text)
        return None


def safetensors_of(data: bytes) -> bytes:
    """A file of these tensors: the JSON of the header, a zero byte, what lies behind it."""
    header, _, body = data.partition(b"\0")
    return len(header).to_bytes(8, "little") + header + body


def checkpoints(data: bytes) -> None:
    from anydelta.state import Checkpoints

    path = FOLDER / "a.safetensors"
    path.write_bytes(safetensors_of(data))
    only(ValueError, "Checkpoints.load: requires ", lambda: Checkpoints.load(path))
    only(ValueError, "Checkpoints.load: requires ", lambda: Checkpoints.load(path, device="cpu"))


def checkpoint(data: bytes) -> None:
    from anydelta.integrations.transformers.prefix import Checkpoint

    path = FOLDER / "a.safetensors"
    path.write_bytes(safetensors_of(data))
    only(ValueError, "Checkpoint.load: requires ", lambda: Checkpoint.load(path))


def case(data: bytes) -> None:
    from anydelta.conformance.run import parse

    line = data.decode("utf-8", "surrogateescape")
    parsed = only(ValueError, "case: ", lambda: parse(line))
    if parsed is not None:
        assert parse(str(parsed)) == parsed, f"{line!r} is a case that does not print as itself: {parsed}"


def table(data: bytes) -> None:
    from anydelta.backends.triton import tables

    path = FOLDER / "sm_90.json"
    path.write_bytes(data)
    only(ValueError, f"triton: the table {path} must ", lambda: tables.read(path))


def model(data: bytes) -> None:
    """The files of a model folder, each behind a line with its name: what `anydelta generate` says of them."""
    from anydelta.generate import checkpoint

    folder = FOLDER / "model"
    folder.mkdir(exist_ok=True)
    for file in folder.iterdir():
        file.unlink()
    for part in data.split(b"\n--- ")[1:]:
        name, _, content = part.partition(b"\n")
        for known in ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json",
                      "model.safetensors.index.json", "model.safetensors"):  # fmt: skip
            if name.decode(errors="replace") == known:
                (folder / known).write_bytes(
                    safetensors_of(content) if known == "model.safetensors" else content
                )
    only(checkpoint.CheckpointError, "requires ", lambda: checkpoint._check_folder(folder))


TARGETS: dict[str, Callable[[bytes], None]] = {
    f.__name__: f for f in (checkpoints, checkpoint, case, table, model)
}
FOLDER = Path()
"""Where targets write the files that are read."""


def replay(name: str, paths: list[Path]) -> None:
    """Give a target the contents of files, one after the other."""
    global FOLDER
    with tempfile.TemporaryDirectory() as folder:
        FOLDER = Path(folder)
        for path in paths:
            TARGETS[name](path.read_bytes())


def functions_of(*packages: str) -> Iterator[FunctionType]:
    """Those of all modules of these packages that are imported, and of their classes. (atheris's own hook does not see
    into an editable install.)"""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in packages:
            for owner in (module, *(x for x in vars(module).values() if isinstance(x, type))):
                for x in list(vars(owner).values()):  # looking at some imports others
                    function = getattr(x, "__func__", x)
                    if isinstance(function, FunctionType) and function.__module__ == name:
                        yield function


def main() -> None:
    import atheris

    global FOLDER
    name = sys.argv.pop(1)
    with tempfile.TemporaryDirectory() as folder:
        FOLDER = Path(folder)
        for path in (p for a in sys.argv if Path(a).is_dir() for p in Path(a).iterdir()):
            TARGETS[name](path.read_bytes())  # imports what it reads with
        for function in functions_of("anydelta", "json"):
            atheris.instrument_func(function)
        atheris.Setup(sys.argv, TARGETS[name])
        atheris.Fuzz()


if __name__ == "__main__":
    main()
