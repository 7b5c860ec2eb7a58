"""`anydelta gguf`: writes a GGUF file, or says what it holds."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core.probe import available_cpus
from ..generate import gguf_file, presets
from ..generate.checkpoint import need_packages, open_checkpoint, quiet
from ..terminal import Refused, Table, check_writable, progress, refusing, say, show, tell, to_json
from . import write

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Json = Annotated[bool, typer.Option("--json", help="The record as JSON on stdout.")]


def register(app: typer.Typer) -> None:
    """Add `gguf` to the command line."""
    group = typer.Typer(no_args_is_help=True, help=HELP)
    group.command("write")(write_command)
    group.command("show")(show_command)
    app.add_typer(group, name="gguf")


HELP = """GGUF files: write one, or say what one holds.

Examples:
  anydelta gguf write examples/tiny_model --type Q8_0 -o tiny-Q8_0.gguf
  anydelta gguf show tiny-Q8_0.gguf
"""


def write_command(
    model: Annotated[
        str,
        typer.Argument(help="A folder, a hub name, or a preset with random weights (bench model --list)."),
    ],
    type_: Annotated[
        str, typer.Option("--type", help="Q4_K_M, Q8_0, ... or BF16; --list names all.")
    ] = "Q4_K_M",
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The file. Default: NAME-TYPE.gguf here.")
    ] = None,
    threads: Annotated[int | None, typer.Option("--threads", "-t", help="Default: all CPUs.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
    as_json: Json = False,
) -> None:
    """Write a model as a GGUF file, for llama.cpp and for Transformers.

    ggml's own functions pack the matrices. Their types are those that llama.cpp would choose. Multi-token prediction
    layers and the tokenizer are included.

    Examples:
      anydelta gguf write examples/tiny_model --type Q8_0 -o tiny-Q8_0.gguf
      anydelta gguf write qwen3.5-0.8b --type Q4_K_M
    """
    need_packages()
    with refusing(RuntimeError):  # ggml is not installed
        known = write.types()
    if type_ not in known:
        raise Refused(f"requires --type of {', '.join(known)}; got {type_!r}")
    if why := write.missing():
        raise Refused(f"requires the package gguf; got: {why}")
    if threads is not None and not 1 <= threads <= 1024:
        raise Refused(f"requires --threads from 1 to 1024; got {threads}")
    path = output if output is not None else Path(f"{Path(model).name}-{type_}.gguf")
    if path.suffix != ".gguf":
        raise Refused(f"requires -o to end in .gguf; got {path}")
    check_writable(path)
    if path.exists() and not force:
        raise Refused(f"requires a new file, or --force; got {path}, which exists")
    with progress() as draw:
        draw(f"opening {model}", 0.0)
        if model in {p.name for p in presets.PRESETS}:
            built = presets.build(model)
            given: dict[str, Any] = dict(model=built.model, name=built.name, tokenizer=None, mtp=None)
        else:
            opened = open_checkpoint(model)
            given = dict(
                model=opened.model, name=Path(model).name, tokenizer=opened.tokenizer, mtp=_mtp(opened.model)
            )
        summary = write.write(path=path, mix=type_, tell=draw, threads=threads or available_cpus(), **given)
    if as_json:
        say(to_json(dataclasses.asdict(summary)))
        return
    kinds = ", ".join(f"{n} {kind}" for kind, n in summary.matrices.items())
    layers = f", {summary.mtp_layers} MTP layers" if summary.mtp_layers else ""
    tell(
        f"{path}: {summary.bytes / 2**20:.1f} MiB, {summary.parameters / 1e6:.1f} M parameters "
        f"({kinds}{layers})"
    )


def _mtp(model: PreTrainedModel) -> Any:
    """Transformers' MTP layers of a model, if it has any."""
    if not getattr(model.config.get_text_config(decoder=True), "num_mtp_layers", None):
        return None
    reading = importlib.import_module("anydelta.integrations.transformers.mtp")
    with quiet(), refusing(ValueError):
        return reading.read(model)


def show_command(
    path: Annotated[Path, typer.Argument(help="A GGUF file.")],
    as_json: Json = False,
) -> None:
    """Say what a GGUF file holds, and whether it can be run here.

    Examples:
      anydelta gguf show Qwen3.5-0.8B-Q4_K_M.gguf
    """
    need_packages()
    with quiet():
        header = gguf_file.check(path)
    if as_json:
        say(to_json({**dataclasses.asdict(header), "path": str(path)}))
        return
    rows = [
        ("name", header.name),
        ("architecture", header.architecture),
        ("parameters", f"{header.parameters / 1e6:.1f} M"),
        ("size", f"{header.bytes / 2**20:.1f} MiB"),
        ("tensors", ", ".join(f"{n} {kind}" for kind, n in header.types.items())),
        ("MTP layers", str(header.mtp_layers)),
    ]
    show(Table("", ("", ""), rows, left=("",)))
