"""Generate text with the packages of export_aoti.py, and compare with the model in eager mode.

python examples/export/run_aoti.py examples/tiny_model out/export 64 In the beginning God created
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer

from anydelta import torch_op  # noqa: F401  (loads the operators that the packages call)
from anydelta.export.qwen3_5 import Model, generate


def main(source: Path, packages: Path, new: int, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(source)
    prompt = tokenizer(text)["input_ids"]
    model = Model.load(source)
    prefill, decode = (
        torch._inductor.aoti_load_package(str(packages / f"{n}.pt2")) for n in ("prefill", "decode")
    )
    states, eager_states = model.new_states(), model.new_states()

    def step(ids: Tensor, position: Tensor) -> Tensor:
        return (decode if ids.shape[1] == 1 else prefill)(ids, position, states)  # type: ignore[no-any-return]

    with torch.no_grad():
        tokens = generate(step, prompt, new)
        eager = generate(lambda ids, position: model(ids, position, eager_states), prompt, new)
    print("prompt:", *prompt)
    print("tokens:", *tokens)
    print(f"as eager: {'yes' if tokens == eager else 'NO'}")
    print(tokenizer.decode(tokens))
    sys.exit(tokens != eager)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), " ".join(sys.argv[4:]))
