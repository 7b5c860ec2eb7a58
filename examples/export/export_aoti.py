"""Export the tiny model with AOTInductor: prefill.pt2 (any number of tokens from 2 on) and decode.pt2 (one token).

    python examples/export/export_aoti.py examples/tiny_model out/export

Both programs advance the same states, which the caller keeps and hands in: two tensors per layer, whose shapes are in
the packages' metadata. `run_python.py` and `run_aoti.cpp` generate text with them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from anydelta.export import aoti
from anydelta.export.qwen3_5 import Model

MAX_TOKENS = 256


def main(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    model = Model.load(source)
    states = model.new_states(max_tokens=MAX_TOKENS)
    shapes = " ".join("x".join(map(str, s.shape)) for s in states)
    options = {"aot_inductor.metadata": {"states": shapes}}
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
        print("wrote", aoti.compile_and_package(program, target / f"{name}.pt2", options), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    main(**vars(parser.parse_args()))
