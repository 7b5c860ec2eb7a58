"""Export the tiny model with ONNX: prefill.onnx (any number of tokens from 2 on) and decode.onnx (one token).

    python examples/export/export_onnx.py examples/tiny_model out/export [OPERATOR]

Both take the states and give the new ones. OPERATOR says what the calls become: anydelta (the default), com.microsoft
or onnx. `run_python.py` generates text with them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from anydelta.export import onnx
from anydelta.export.qwen3_5 import Model

MAX_TOKENS = 256


def main(source: Path, target: Path, operator: str = "anydelta") -> None:
    target.mkdir(parents=True, exist_ok=True)
    model = Model.load(source)
    states = model.new_states(max_tokens=MAX_TOKENS)
    T = torch.export.Dim("T", min=2, max=MAX_TOKENS)
    programs = {
        "decode": ((torch.tensor([[1]]), torch.tensor([3]), states), None),
        "prefill": (
            (torch.tensor([[1, 2, 3]]), torch.arange(3), states),
            ({1: T}, {0: T}, [None] * len(states)),
        ),
    }
    for name, (example, dynamic) in programs.items():
        with torch.no_grad():
            program = torch.export.export(model, example, dynamic_shapes=dynamic)
        path = target / f"{name}.onnx"
        onnx.to_onnx(program, operator=operator).save(path)
        print("wrote", path, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("operator", nargs="?", default="anydelta")
    main(**vars(parser.parse_args()))
