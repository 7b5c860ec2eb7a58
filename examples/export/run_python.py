"""Generate text with the output of export_RUNTIME.py, and compare with the model in eager mode.

    python examples/export/run_python.py RUNTIME examples/tiny_model out/export 64 In the beginning God created

RUNTIME is aoti, executorch or onnx. Exits with 1 where a token differs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer

from anydelta.export.qwen3_5 import Model, generate

Step = Callable[[Tensor, Tensor], Tensor]


def aoti(folder: Path, states: list[Tensor]) -> Step:
    """The caller keeps the states and hands them to both programs, which advance them in place."""
    from anydelta.rule import torch_ops as torch_op  # noqa: F401  (loads the operators that the packages call)

    prefill, decode = (
        torch._inductor.aoti_load_package(str(folder / f"{name}.pt2")) for name in ("prefill", "decode")
    )

    def step(ids: Tensor, position: Tensor) -> Tensor:
        return (decode if ids.shape[1] == 1 else prefill)(ids, position, states)  # type: ignore[no-any-return]

    return step


def executorch(folder: Path, states: list[Tensor]) -> Step:
    """The states are in the program."""
    from executorch.runtime import Runtime

    from anydelta.export import executorch

    executorch.load()
    program = Runtime.get().load_program(folder / "tiny.pte")
    prefill, decode = (program.load_method(name) for name in ("prefill", "decode"))

    def step(ids: Tensor, position: Tensor) -> Tensor:
        method = decode if ids.shape[1] == 1 else prefill
        return method.execute([ids, position])[0]  # type: ignore[no-any-return]

    return step


def onnx(folder: Path, states: list[Tensor]) -> Step:
    """Every call takes the states and gives the new ones."""
    from anydelta.export import onnx

    prefill, decode = (onnx.session(folder / f"{name}.onnx") for name in ("prefill", "decode"))
    arrays = [state.numpy() for state in states]

    def step(ids: Tensor, position: Tensor) -> Tensor:
        session = decode if ids.shape[1] == 1 else prefill
        names = [x.name for x in session.get_inputs()]
        inputs = dict(zip(names, (ids.numpy(), position.numpy(), *arrays), strict=True))
        logits, *arrays[:] = session.run(None, inputs)
        return torch.from_numpy(logits)

    return step


RUNTIMES = {"aoti": aoti, "executorch": executorch, "onnx": onnx}


def main(runtime: str, source: Path, folder: Path, new: int, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(source)
    prompt = tokenizer(text)["input_ids"]
    model = Model.load(source)
    states = model.new_states()
    with torch.no_grad():
        tokens = generate(RUNTIMES[runtime](folder, model.new_states()), prompt, new)
        eager = generate(lambda ids, position: model(ids, position, states), prompt, new)
    print("prompt:", *prompt)
    print("tokens:", *tokens)
    print(f"{runtime}: as eager: {'yes' if tokens == eager else 'NO'}")
    print(tokenizer.decode(tokens))
    sys.exit(tokens != eager)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runtime", choices=RUNTIMES)
    parser.add_argument("source", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("new", type=int)
    parser.add_argument("text", nargs="+")
    given = parser.parse_args()
    main(given.runtime, given.source, given.folder, given.new, " ".join(given.text))
