"""Measure a checkpoint on the held-out chapters: bits per byte, accepted drafts, sample text.

    python evaluate.py --data bible-kjv-text_*.deb [--baselines]

Every figure of the model card comes from here. Drafts are judged offline, which for greedy decoding is
exact: a drafted token is accepted if and only if it equals the token that plain decoding writes there,
and until the first miss the MTP layers have read just the tokens that plain decoding wrote.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import baselines
import corpus
import torch
import torch.nn.functional as F
from network import Network
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_layers import MtpModel
from transformers.utils import logging

HERE = Path(__file__).resolve().parent
PROMPTS = [
    "Genesis 1\n1 In the beginning",
    "And the LORD spake unto Moses, saying,",
    "Now these are the generations of",
    "Psalm 23\n1 The LORD is my shepherd",
]


def load(folder: Path) -> tuple[Network, AutoTokenizer]:
    """The main model as AutoModelForCausalLM loads it, the MTP layers as generate(use_mtp=True) does."""
    main, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    problems = {k: v for k, v in info.items() if v}
    if problems:
        raise SystemExit(f"{folder} does not load cleanly: {problems}")
    network = Network.__new__(Network)
    torch.nn.Module.__init__(network)
    network.main, network.mtp = main.eval(), MtpModel.from_pretrained(main).eval()
    return network, AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def read(network: Network, ids: torch.Tensor) -> list[torch.Tensor]:
    """Logits [T, vocab] of the main head and of each MTP depth, along one sequence of T tokens.

    Row t of entry d predicts token t + 1 + d. The last rows of the MTP entries lack an input and are cut.
    """
    hidden = network.hidden(ids[None])
    depths = len(network.mtp.layers)
    rows = hidden[:, : len(ids) - depths]
    return [network.main.lm_head(h[0]) for h in (hidden, *network.drafts(ids[None], rows))]


class Drafts:
    """Counts how often the draft of each depth is accepted, given that the shallower ones were."""

    def __init__(self, depths: int):
        self.tried, self.taken = [0] * depths, [0] * depths
        self.overlap = [0.0] * depths  # sum of min(p, q): the chance that speculative sampling accepts

    def greedy(self) -> str:
        return ", ".join(f"{a / max(1, n):.1%}" for a, n in zip(self.taken, self.tried, strict=True))

    def sampling(self) -> str:
        return ", ".join(f"{o / max(1, n):.1%}" for o, n in zip(self.overlap, self.tried, strict=True))

    def per_pass(self) -> float:
        """Expected tokens per run of the main model: its own, and the accepted drafts."""
        total, chance = 1.0, 1.0
        for taken, tried in zip(self.taken, self.tried, strict=True):
            chance *= taken / max(1, tried)
            total += chance
        return total

    def count(self, logits: list[torch.Tensor], ids: torch.Tensor, prompt: int | None = None) -> None:
        """Judge drafts along the text `ids`: those that start at every position, or, where the text is the
        model's own greedy continuation of `prompt` tokens, those that decoding would have made.
        """
        depths = len(logits) - 1
        starts = torch.arange(len(ids) - 1 - depths)
        alive, accepted = (
            torch.ones(len(starts), dtype=torch.bool),
            torch.zeros(len(starts), dtype=torch.long),
        )
        tried, overlaps = [], []
        for depth in range(1, depths + 1):
            target, draft = logits[0][starts + depth], logits[depth][starts]
            right = alive & (draft.argmax(-1) == target.argmax(-1))
            tried.append(alive)
            overlaps.append(torch.minimum(target.softmax(-1), draft.softmax(-1)).sum(-1))
            accepted += right
            # Where the text goes on otherwise, the next depth has not read its own draft.
            alive = right & (draft.argmax(-1) == ids[starts + depth + 1])
        if prompt is not None:
            # The first pass yields one token and no draft; each later one starts where the last ended.
            chosen, start = [], prompt - 1
            while start < len(starts):
                chosen.append(start)
                start += int(accepted[start]) + 1
            starts = torch.tensor(chosen)
        for depth in range(depths):
            mine = tried[depth][starts]
            self.tried[depth] += int(mine.sum())
            self.taken[depth] += int((accepted[starts] > depth).sum())
            self.overlap[depth] += float(overlaps[depth][starts][mine].sum())


def heldout(network: Network, tokenizer, documents: list[str]) -> tuple[float, Drafts]:
    """Bits per byte of each chapter, read whole, and the drafts from every position in them."""
    bits, drafts = 0.0, Drafts(len(network.mtp.layers))
    for text in documents:
        ids = torch.tensor([tokenizer.eos_token_id, *tokenizer(text).input_ids])
        logits = read(network, ids)
        bits += float(F.cross_entropy(logits[0][:-1], ids[1:], reduction="sum")) / math.log(2)
        drafts.count(logits, ids)
    return bits / sum(len(text.encode()) for text in documents), drafts


@torch.no_grad()
def continued(network: Network, tokenizer, documents: list[str], new: int) -> Drafts:
    """The drafts that greedy decoding makes and accepts, from the first 64 tokens of each chapter."""
    drafts = Drafts(len(network.mtp.layers))
    for text in documents:
        prompt = torch.tensor([[tokenizer.eos_token_id, *tokenizer(text).input_ids[:64]]])
        # Without an explicit mask, generate() would take the <|endoftext|> that opens the text for padding.
        options = {"attention_mask": torch.ones_like(prompt), "eos_token_id": None, "do_sample": False}
        ids = network.main.generate(prompt, max_new_tokens=new, **options)[0]
        drafts.count(read(network, ids), ids, prompt=prompt.shape[1])
    return drafts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, default=HERE.parent / "tiny_model")
    parser.add_argument("--data", type=Path, help="bible.data or the .deb that holds it (default: installed)")
    parser.add_argument("--baselines", action="store_true", help="xz and n-grams too (about two minutes)")
    parser.add_argument("--chapters", type=int, default=10, help="chapters continued to judge drafts")
    parser.add_argument("--new", type=int, default=192, help="tokens written for each")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1611)
    args = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    console = Console(highlight=False, markup=False, emoji=False)  # texts are not ours
    network, tokenizer = load(args.model)
    split = corpus.load(args.data)

    table = Table("held-out text", "bits per byte", title=f"{len(split.test)} chapters")
    bpb, drafts = heldout(network, tokenizer, split.test)
    table.add_row("this model", f"{bpb:.3f}")
    if args.baselines:
        train, test = ("".join(part).encode() for part in (split.train, split.test))
        for order in range(3, 8):
            table.add_row(f"{order + 1}-gram over bytes", f"{baselines.ngram(train, test, order):.3f}")
        table.add_row("xz -9e, after the training text", f"{baselines.xz(train, test):.3f}")
    console.print(table)

    table = Table("MTP drafts, by depth", "accepted, greedy", "accepted, sampling", "tokens per pass")
    greedy = continued(network, tokenizer, split.test[: args.chapters], args.new)
    for name, d in (("held-out text, every position", drafts), ("its greedy continuation", greedy)):
        table.add_row(name, d.greedy(), d.sampling(), f"{d.per_pass():.2f}")
    console.print(table)

    torch.manual_seed(args.seed)
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        out = network.main.generate(ids, max_new_tokens=120, do_sample=True, temperature=0.7, top_p=0.95)
        console.print(Text.assemble((prompt, "bold"), tokenizer.decode(out[0, ids.shape[1] :]), "\n"))


if __name__ == "__main__":
    main()
