"""Simpler models of the same split, in bits per byte: xz, and an n-gram model over bytes."""

from __future__ import annotations

import lzma
import math
from collections import defaultdict


def xz(train: bytes, test: bytes) -> float:
    """What the test text adds to an `xz -9e` file that already holds the training text."""

    def size(data: bytes) -> int:
        return len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))

    return 8 * (size(train + test) - size(train)) / len(test)


def ngram(train: bytes, test: bytes, order: int) -> float:
    """An interpolated n-gram over bytes (Witten-Bell), trained on `train`; `order` bytes of context.

    P_n(c) = (count(context c) + kinds * P_{n-1}(c)) / (count(context) + kinds), where kinds is the number of
    different bytes seen after the context. Only contexts that occur in the test text are counted.
    """
    probability = [1 / 256] * len(test)
    for n in range(order + 1):
        contexts = {test[i - n : i] for i in range(n, len(test))}
        followers: dict[bytes, dict[int, int]] = {c: defaultdict(int) for c in contexts}
        for i in range(n, len(train)):
            found = followers.get(train[i - n : i])
            if found is not None:
                found[train[i]] += 1
        for i in range(n, len(test)):
            counts = followers[test[i - n : i]]
            kinds, total = len(counts), sum(counts.values())
            if total:
                seen = counts.get(test[i], 0)
                probability[i] = (seen + kinds * probability[i]) / (total + kinds)
    return -sum(math.log2(p) for p in probability) / len(test)
