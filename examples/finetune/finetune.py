"""Fine-tune a hybrid model on your own texts with LoRA, on a CPU.

    python finetune.py notes.txt more/*.md --steps 300

The run lies in one folder (out/finetune, ignored by git): `adapter/` as PEFT saves it, `loss.svg`, the curve so far,
and `state.pt` to go on from. Ctrl-C or SIGTERM saves all three; the same command then goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

ROOT = Path(__file__).resolve().parents[2]
DECIDE = ("texts", "model", "rank", "length", "rows", "lr", "steps", "seed")
"""Arguments that a run which goes on must share with its beginning."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("texts", type=Path, nargs="+", metavar="TEXT", help="files of UTF-8 text")
    parser.add_argument(
        "--model", default=str(ROOT / "examples" / "tiny_model"), help="a folder, or a name on the hub"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "finetune")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rows", type=int, default=8, help="windows of text in a step")
    parser.add_argument("--length", type=int, default=256, help="tokens of a window")
    parser.add_argument("--rank", type=int, default=16, help="of the LoRA matrices")
    parser.add_argument("--lr", type=float, default=2e-3, help="learning rate at its height")
    parser.add_argument("--save-every", type=int, default=50, help="steps")
    parser.add_argument("--threads", type=int, help="default: as torch has them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--stock", action="store_true", help="train through Transformers' own functions, to compare"
    )
    asked = parser.parse_args()
    for name in ("steps", "rows", "length", "rank", "save_every"):
        if getattr(asked, name) < 1:
            refuse(f"--{name.replace('_', '-')} must be at least 1; got {getattr(asked, name)}")
    return asked


def refuse(sentence: str) -> NoReturn:
    print(f"finetune: {sentence}", file=sys.stderr)
    raise SystemExit(2)


def read(paths: list[Path]) -> list[str]:
    found = []
    for path in paths:
        try:
            found.append(path.read_text("utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            refuse(f"{path} cannot be read as UTF-8 text: {error}")
    return found


def load(asked: argparse.Namespace) -> tuple[Any, Any]:
    """(the model with LoRA matrices on every linear layer, the tokenizer)."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        refuse("needs PEFT. pip install peft")
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(asked.model)
        model = AutoModelForCausalLM.from_pretrained(asked.model, dtype=torch.float32)
    except (OSError, ValueError) as error:
        refuse(f"--model {asked.model} cannot be loaded: {str(error).splitlines()[0]}")
    lora = LoraConfig(
        r=asked.rank, lora_alpha=2 * asked.rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return get_peft_model(model, lora), tokenizer


def tokens_of(tokenizer: Any, texts: list[str]) -> torch.Tensor:
    end = tokenizer.eos_token_id
    return torch.tensor([t for ids in tokenizer(texts).input_ids for t in (*ids, end) if t is not None])


def loss_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of ids [rows, length + 1], every token but the first given those before it."""
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


def windows(tokens: torch.Tensor, rows: int, length: int, seed: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    begins = torch.randint(len(tokens) - length, (rows,), generator=random)
    return torch.stack([tokens[b : b + length + 1] for b in begins])


@torch.no_grad()
def held_out(model: Any, tokens: torch.Tensor, length: int) -> float:
    model.eval()
    rows = tokens[: (len(tokens) - 1) // length * length + 1].unfold(0, length + 1, length)
    found = float(torch.stack([loss_of(model, part) for part in rows[:32].split(8)]).mean())
    model.train()
    return found


def rate(progress: float) -> float:
    """Of the learning rate: up for a twentieth of the run, then down to nothing."""
    return min(progress / 0.05, (1 - progress) / 0.95)


def draw(trained: list[float], valid: dict[int, float], path: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        return  # said once, at the end
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(range(1, len(trained) + 1), trained, color="#9db8d9", label="training, each step")
    axes.plot(
        list(valid), list(valid.values()), color="#c0392b", marker="o", markersize=3, label="held-out text"
    )
    axes.set(xlabel="step", ylabel="loss (nats a token)", title="Fine-tuning with LoRA")
    axes.legend()
    figure.savefig(f"{path}.new", format=path.suffix[1:], dpi=120)
    plt.close(figure)
    os.replace(f"{path}.new", path)


def sample(model: Any, tokenizer: Any, prompt: torch.Tensor) -> str:
    model.eval()
    ids = model.generate(
        input_ids=prompt[None], max_new_tokens=60, do_sample=False, pad_token_id=tokenizer.eos_token_id
    )
    model.train()
    return str(tokenizer.decode(ids[0]))


def main() -> None:
    asked = arguments()
    if asked.threads:
        torch.set_num_threads(asked.threads)
    torch.manual_seed(asked.seed)
    texts = read(asked.texts)
    model, tokenizer = load(asked)
    tokens = tokens_of(tokenizer, texts)
    # The last tenth is held out, one window at least.
    cut = min(len(tokens) * 9 // 10, len(tokens) - asked.length - 1)
    if cut <= asked.length:
        refuse(
            f"the texts must hold more than {2 * asked.length + 2} tokens; got {len(tokens)}. Lower --length"
        )
    train, valid = tokens[:cut], tokens[cut:]

    console = Console(markup=False, emoji=False, highlight=False)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=asked.lr, weight_decay=0.0)
    decided = {name: str(getattr(asked, name)) for name in DECIDE}
    trained: list[float] = []
    losses: dict[int, float] = {}
    state_file = asked.out / "state.pt"
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        if state["decided"] != decided:
            other = [f"--{n} {state['decided'][n]}" for n in DECIDE if state["decided"][n] != decided[n]]
            refuse(
                f"{asked.out} holds a run with {', '.join(other)}. Go on with these, or name another --out"
            )
        with torch.no_grad():
            for p, saved in zip(weights, state["weights"], strict=True):
                p.copy_(saved)
        optimiser.load_state_dict(state["optimiser"])
        trained, losses = state["trained"], state["losses"]
        console.print(f"goes on after step {len(trained)}")
    asked.out.mkdir(parents=True, exist_ok=True)

    def save() -> None:
        state = {"weights": [p.detach() for p in weights], "optimiser": optimiser.state_dict()}
        torch.save(state | {"decided": decided, "trained": trained, "losses": losses}, f"{state_file}.new")
        os.replace(f"{state_file}.new", state_file)
        model.save_pretrained(asked.out / "adapter")
        (asked.out / "loss.json").write_text(json.dumps({"train": trained, "held_out": losses}))
        draw(trained, losses, asked.out / "loss.svg")
        draw(trained, losses, asked.out / "loss.png")

    stopping: list[bool] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopping.append(True))
    if asked.stock:
        block: Any = nullcontext()
    else:
        import anydelta.integrations.transformers as adt

        block = adt.enable()
    share = sum(p.numel() for p in weights) / sum(p.numel() for p in model.parameters())
    console.print(
        f"{len(train):,} tokens to train on, {len(valid):,} held out; {share:.0%} of the weights are trained"
    )
    seconds: list[float] = []
    with block:
        if not losses:
            losses[0] = held_out(model, valid, asked.length)
        run(asked, model, optimiser, weights, train, valid, trained, losses, seconds, stopping, save, console)
        save()
        if seconds:
            middle = sorted(seconds)[len(seconds) // 2]
            console.print(
                f"{middle:.2f} s a step (median), {asked.rows * asked.length / middle:,.0f} tokens/s"
            )
        first, last = losses[0], losses[max(losses)]
        console.print(f"loss of the held-out text: {first:.3f} before, {last:.3f} after step {max(losses)}")
        console.print(f"{asked.out}: adapter/, loss.svg, loss.png, loss.json")
        if not (asked.out / "loss.svg").exists():
            console.print("no curve was drawn: pip install matplotlib")
        console.print(f"\n{sample(model, tokenizer, valid[:24])}")


def run(
    asked: argparse.Namespace,
    model: Any,
    optimiser: torch.optim.Optimizer,
    weights: list[torch.Tensor],
    train: torch.Tensor,
    valid: torch.Tensor,
    trained: list[float],
    losses: dict[int, float],
    seconds: list[float],
    stopping: list[bool],
    save: Callable[[], None],
    console: Console,
) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    model.train()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("training", total=asked.steps, completed=len(trained))
        while len(trained) < asked.steps and not stopping:
            began, step = time.perf_counter(), len(trained)
            for group in optimiser.param_groups:
                group["lr"] = asked.lr * rate((step + 0.5) / asked.steps)
            loss = loss_of(model, windows(train, asked.rows, asked.length, asked.seed + step))
            if not torch.isfinite(loss):
                save()
                refuse(
                    f"the loss of step {step + 1} is {float(loss.detach())}; all before it is saved. Lower --lr"
                )
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimiser.step()
            optimiser.zero_grad()
            trained.append(float(loss.detach()))
            seconds.append(time.perf_counter() - began)
            bar.update(task, completed=step + 1, description=f"loss {trained[-1]:.3f}")
            if (step + 1) % asked.save_every == 0 or step + 1 == asked.steps:
                losses[step + 1] = held_out(model, valid, asked.length)
                console.print(
                    f"step {step + 1:5d}  loss {trained[-1]:.3f}  held-out text {losses[step + 1]:.3f}"
                )
                save()


if __name__ == "__main__":
    main()
