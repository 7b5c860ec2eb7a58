"""Train a tiny Qwen3.5 (Transformers' own classes, with MTP layers) on the King James Bible.

    python train.py --minutes 75 --data bible-kjv-text_*.deb

A run keeps everything in one folder (out/train_tiny, ignored by git): `state.pt` to resume from and
`model/`, the exported checkpoint. Ctrl-C or SIGTERM saves both; the same command then continues.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import statistics
import sys
import time
from collections import deque
from pathlib import Path

import bpe
import corpus
import torch
import torch.nn.functional as F
from muon import optimisers
from network import Network, make_config, save
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from transformers.utils import logging

import anydelta.integrations.transformers as adt

ROOT = Path(__file__).resolve().parents[2]
EXTRA = 3  # tokens a window holds beyond its length: the targets of the main head and of two MTP layers


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, help="bible.data or the .deb that holds it (default: installed)")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "train_tiny")
    parser.add_argument("--minutes", type=float, default=75, help="training time, stops not counted")
    parser.add_argument("--steps", type=int, help="train exactly this many steps instead (reproducible)")
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--length", type=int, default=512, help="doubled for the last 30%%")
    parser.add_argument("--vocab", type=int, default=1024)
    parser.add_argument("--mtp-weight", type=float, default=0.3)
    parser.add_argument("--lr", type=float, default=0.02, help="for matrices (Muon)")
    parser.add_argument("--lr-other", type=float, default=4e-3, help="for everything else (AdamW)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save-every", type=float, default=5, help="minutes between checkpoints")
    parser.add_argument("--seed", type=int, default=1611)
    parser.add_argument("--pid-file", type=Path, help="write this process's number here")
    return parser.parse_args()


class Stream:
    """Windows over the training tokens: each pass starts at another offset and is shuffled anew."""

    def __init__(self, tokens: torch.Tensor, seed: int):
        self.tokens, self.seed = tokens, seed
        self.passes, self.queue, self.length = 0, [], 0

    def next(self, rows: int, length: int) -> torch.Tensor:
        if length != self.length:
            self.queue, self.length = [], length
        while len(self.queue) < rows:
            random = torch.Generator().manual_seed(self.seed + self.passes)
            start = int(torch.randint(length, (1,), generator=random))
            begins = torch.arange(start, len(self.tokens) - length - EXTRA, length)
            self.queue += begins[torch.randperm(len(begins), generator=random)].tolist()
            self.passes += 1
        begins, self.queue = self.queue[:rows], self.queue[rows:]
        return torch.stack([self.tokens[b : b + length + EXTRA] for b in begins])


def losses(network: Network, ids: torch.Tensor) -> list[torch.Tensor]:
    """Cross-entropy of the main head, then of each MTP depth on every second row (to save time)."""
    depths = len(network.mtp.layers)
    length = ids.shape[1] - 1 - depths
    main = network.hidden(ids[:, :length])
    states = [(main, ids), *((h, ids[::2]) for h in network.drafts(ids[::2], main[::2]))]
    return [
        F.cross_entropy(
            network.main.lm_head(h).flatten(0, 1), rows[:, 1 + depth : 1 + depth + length].flatten()
        )
        for depth, (h, rows) in enumerate(states)
    ]


def rate(progress: float) -> float:
    """Learning-rate factor: a short warm-up, flat to 45%, then straight down to nothing."""
    return min(1.0, progress / 0.02, (1 - progress) / 0.55)


@torch.no_grad()
def valid_loss(network: Network, tokens: torch.Tensor, length: int = 512) -> list[float]:
    ids = tokens[: (len(tokens) - EXTRA) // length * length + EXTRA].unfold(0, length + EXTRA, length)
    rows = [torch.stack(losses(network, part)) for part in ids[:32].split(8)]
    return torch.stack(rows).mean(0).tolist()


def show(figures: list[float]) -> str:
    return " ".join(f"{x:.3f}" for x in figures)


class Clock:
    """Training time: a step far longer than its neighbours was interrupted, and counts for three at most."""

    def __init__(self, seconds: float = 0.0):
        self.seconds, self.recent = seconds, deque(maxlen=25)

    def add(self, step: float) -> None:
        usual = statistics.median(self.recent) if len(self.recent) >= 5 else step
        self.recent.append(step)
        self.seconds += min(step, 3 * usual)


def keep_freed_memory() -> None:
    """Ask glibc not to hand freed blocks back: faulting the pages in again costs some 10% of a step."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
            libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def main() -> None:
    args = arguments()
    keep_freed_memory()
    logging.set_verbosity_error()
    if args.pid_file:
        args.pid_file.write_text(str(os.getpid()))
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    console = Console(markup=False, emoji=False)

    split = corpus.load(args.data)
    tokenizer = bpe.train_tokenizer(split.train, args.vocab)
    end = tokenizer.eos_token_id

    def stream_of(documents: list[str]) -> torch.Tensor:
        return torch.tensor([t for ids in tokenizer(documents).input_ids for t in [end, *ids]])

    train, valid = stream_of(split.train), stream_of(split.valid)
    network = Network(make_config(tokenizer, mtp_layers=2))
    size = sum(p.numel() for p in network.main.parameters())
    extra = sum(p.numel() for p in network.parameters()) - size
    console.print(f"{size / 1e6:.2f}M parameters + {extra / 1e6:.2f}M in MTP layers, {len(train):,} tokens")

    optims = optimisers(network, args.lr, args.lr_other)
    base = [[g["lr"] for g in o.param_groups] for o in optims]
    stream, clock, step = Stream(train, args.seed), Clock(), 0
    state_file = args.out / "state.pt"
    args.out.mkdir(parents=True, exist_ok=True)
    if state_file.exists():
        state = torch.load(state_file)
        network.load_state_dict(state["network"])
        for o, saved in zip(optims, state["optims"], strict=True):
            o.load_state_dict(saved)
        step, clock.seconds = state["step"], state["seconds"]
        vars(stream).update(state["stream"])
        console.print(f"resumed at step {step} after {clock.seconds / 60:.1f} minutes")

    def checkpoint() -> None:
        position = {k: v for k, v in vars(stream).items() if k != "tokens"}
        state = {"network": network.state_dict(), "optims": [o.state_dict() for o in optims]}
        torch.save(state | {"step": step, "seconds": clock.seconds, "stream": position}, f"{state_file}.new")
        os.replace(f"{state_file}.new", state_file)
        save(network, tokenizer, args.out / "model", torch.float32)

    stopping = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopping.append(True))

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with adt.enable(), Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("training", total=1.0)
        last_save, smooth = clock.seconds, None
        while not stopping:
            progress = step / args.steps if args.steps else clock.seconds / (60 * args.minutes)
            if progress >= 1:
                break
            began = time.perf_counter()
            length = args.length * (2 if progress >= 0.7 else 1)
            for o, rates in zip(optims, base, strict=True):
                for group, lr in zip(o.param_groups, rates, strict=True):
                    group["lr"] = lr * rate(progress + 1e-4)
            parts = losses(network, stream.next(args.batch_tokens // length, length))
            (parts[0] + args.mtp_weight * sum(parts[1:]) / max(1, len(parts) - 1)).backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            for o in optims:
                o.step()
                o.zero_grad()
            step += 1
            clock.add(time.perf_counter() - began)
            now = torch.stack(parts).detach()
            smooth = now if smooth is None else smooth.lerp(now, 0.05)
            bar.update(task, completed=progress, description=f"step {step}  loss {smooth[0]:.3f}")
            if step % 25 == 0:
                speed = args.batch_tokens / statistics.median(clock.recent)
                position = f"step {step:5d}  {clock.seconds / 60:5.1f} min  pass {stream.passes}"
                console.print(f"{position}  losses {show(smooth.tolist())}  {speed:.0f} tokens/s")
            if clock.seconds - last_save > 60 * args.save_every:
                console.print(f"validation  {show(valid_loss(network, valid))}")
                checkpoint()
                last_save = clock.seconds
    checkpoint()
    console.print(f"step {step}, {clock.seconds / 60:.1f} minutes of training: {args.out / 'model'}")
    console.print(f"validation losses by depth: {show(valid_loss(network, valid))}")


if __name__ == "__main__":
    main()
