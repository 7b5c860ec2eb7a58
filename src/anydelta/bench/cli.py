"""`anydelta bench`: one command per file of commands/. Progress goes to stderr, results to stdout or a file."""

from __future__ import annotations

from collections.abc import Callable

import typer

from .commands import (
    decays,
    devices,
    drafting,
    executorch,
    gradients,
    layer,
    matrices,
    mlx,
    model,
    ops,
    overhead,
    pieces,
    prefix,
    rollback,
    threads,
)

HELP = """Measure the operator against other implementations and the limits of the machine.

Contenders run interleaved in one process, and each result is checked first.

Examples:
  anydelta bench ops
  anydelta bench model -p 512 -n 64 --profile
  anydelta bench ops --cases decode -t 1 --plot ops.svg
"""


def register(app: typer.Typer) -> None:
    """Add `bench` to the command line."""
    bench = typer.Typer(
        help=HELP,
        no_args_is_help=True,
    )
    commands: dict[str, Callable[..., object]] = {
        "ops": ops.ops_command,
        "overhead": overhead.overhead_command,
        "executorch": executorch.executorch_command,
        "threads": threads.threads_command,
        "decays": decays.decays_command,
        "devices": devices.devices_command,
        "gradients": gradients.gradients_command,
        "rollback": rollback.rollback_command,
        "layer": layer.layer_command,
        "matrices": matrices.matrices_command,
        "mlx": mlx.mlx_command,
        "spec": drafting.spec_command,
        "model": model.model_command,
        "prefix": prefix.prefix_command,
        "pieces": pieces.pieces_command,
    }
    for name, command in commands.items():
        bench.command(name)(command)
    app.add_typer(bench, name="bench")
