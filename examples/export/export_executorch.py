"""Export the tiny model with ExecuTorch: tiny.pte, with the methods prefill (2 tokens or more) and decode (one token).

    python examples/export/export_executorch.py examples/tiny_model out/export

The states are buffers of the program that both methods advance. `run_python.py` and `run_executorch.cpp` generate text
with it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from anydelta.export import executorch
from anydelta.export.qwen3_5 import Model, WithBuffers

MAX_TOKENS = 256


def main(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    model = Model.load(source)
    T = torch.export.Dim("T", min=2, max=MAX_TOKENS)
    examples = {
        "decode": ((torch.tensor([[1]]), torch.tensor([3])), None),
        "prefill": ((torch.tensor([[1, 2, 3]]), torch.arange(3)), ({1: T}, {0: T})),
    }
    with torch.no_grad():
        programs = {
            name: torch.export.export(
                WithBuffers(model, max_tokens=MAX_TOKENS), example, dynamic_shapes=dynamic
            )
            for name, (example, dynamic) in examples.items()
        }
    path = target / "tiny.pte"
    path.write_bytes(executorch.lower(programs, share_states=True).buffer)
    print("wrote", path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    main(**vars(parser.parse_args()))
