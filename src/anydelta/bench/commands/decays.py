"""`anydelta bench decays`: the time of calls with strong decays or faded states, relative to mild decays.

The same call with different decays, interleaved (turns.py). The median of the rounds' ratios counts. A kernel that
computes subnormal numbers takes up to 50 times as long on Intel's CPUs.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from ... import gated_delta_mixer, gated_delta_rule
from ...conformance.gates import model_gates
from ...mixer import reference as mixer_reference
from ...rule import reference
from ..measure.ops import Settings, describe_machine
from ..measure.report import time as in_words
from ..measure.small_report import Measured
from ..measure.turns import Progress, check, interleave, part_of, torch_threads
from .options import Csv, Json, Md, Output, Rounds, SampleMs, Threads, numbers, numbers_of_threads, small

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ...conformance.values import F64
    from ...core.arrays import Array
    from ..measure.cases import F32

HEADS, D = 16, 128
STRONG = {"initialised": "initialised", "trained": "trained", "g16": "-16", "g40": "-40", "faded": "faded"}
"""The record's field and its decays: a kind of conformance/gates.py, one g for all, or mild on a state of 1e-39."""
CHECKED = 64
"""Calls of up to this many tokens are compared with the float64 oracle, which needs seconds for more."""


@dataclass
class DecaysRecord:
    """One call with each kind of decays."""

    call: str
    tokens: int
    threads: int
    rounds: int
    mild_us: float
    initialised: float
    """Time relative to mild decays, median of the rounds; here and below."""
    trained: float
    g16: float
    g40: float
    faded: float
    initialised_min: float
    """The same from the minima, which other work on the machine disturbs least; here and below."""
    trained_min: float
    g16_min: float
    g40_min: float
    faded_min: float
    nmse: float | None
    others_pct: float | None = None

    def columns(self) -> dict[str, str]:
        return {
            "call": self.call, "T": str(self.tokens), "threads": str(self.threads), "mild": in_words(self.mild_us),
            **{
                kind: f"{getattr(self, name):.2f} ({getattr(self, f'{name}_min'):.2f})"
                for name, kind in STRONG.items()
            },
        }  # fmt: skip


def _log_decays(kind: str, shape: tuple[int, ...], rng: np.random.Generator) -> F64:
    if kind in ("mild", "faded"):
        return rng.uniform(-0.5, -0.05, shape)
    return np.full(shape, float(kind)) if kind.startswith("-") else model_gates(kind, shape, rng).log()


def _inputs(op: str, kda: bool, T: int, kind: str) -> dict[str, NDArray[np.floating]]:
    """The call's arguments. Only g and the state differ between the kinds."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> F32:
        return rng.standard_normal(shape, np.float32)

    size = 1e-39 if kind == "faded" else 1.0
    x: dict[str, Any] = {"beta": rng.uniform(0.2, 0.8, (1, T, HEADS)), "state": normal(1, HEADS, D, D) * size}
    if op == "rule":
        x.update(zip("qkv", normal(3, 1, T, HEADS, D), strict=True))
    else:
        C = 3 * HEADS * D
        x.update(qkv=normal(1, T, C), conv_state=normal(1, C, 3), conv_weight=normal(C, 4) / 2)
        x.update(z=normal(1, T, HEADS * D), norm_weight=1 + normal(D) / 8)
        x["beta"] = np.log(x["beta"] / (1 - x["beta"]))  # the mixer takes a logit
    x["g"] = _log_decays(kind, (1, T, HEADS, D) if kda else (1, T, HEADS), rng)
    return {name: a.astype(np.float32) for name, a in x.items()}


def _call(op: str, x: dict[str, Any]) -> Callable[[], tuple[Array, Array]]:
    """Makes the functional call, which always begins from the same state. It returns (o, state)."""
    x = dict(x)
    state = x.pop("state")
    if op == "rule":
        return partial(gated_delta_rule, **x, initial_state=state, qk_l2norm=True)
    qkv, conv = x.pop("qkv"), x.pop("conv_state")

    def run() -> tuple[Array, Array]:
        o, _, after = gated_delta_mixer(qkv, conv, state, **x, decay="log")
        return o, after

    return run


def _exact(op: str, x: Mapping[str, NDArray[np.floating]]) -> tuple[F64, F64 | None]:
    y: dict[str, Any] = {name: a.astype(np.float64) for name, a in x.items()}
    state = y.pop("state")
    if op == "rule":
        want = reference.gated_delta_rule(**y, initial_state=state, qk_l2norm=True)
        return want.o, want.state
    q, k, v = np.split(y.pop("qkv"), 3, -1)
    found = mixer_reference.gated_delta_mixer(q, k, v, y.pop("conv_state"), state, **y, decay="log")
    return found.o, found.rule.state


def strong_decays(
    tokens: Sequence[int] = (1, 2, 4, 6, 16, 64, 1024),
    threads: Sequence[int] = (1, 2),
    settings: Settings | None = None,
    progress: Progress = lambda text, done: None,
) -> Measured:
    """Measure rule and mixer, GDA and KDA, with each kind of decays.

    Raises:
        RuntimeError: a result is wrong.
    """
    import torch

    settings = settings or Settings()
    measured = Measured(
        f"Strong decays: {HEADS} heads, {D}x{D}, float32", describe_machine(), settings,
        [
            "functional calls from torch; mild: time of a call; other columns: time relative to mild, median of the "
            "rounds (of the minima)",
            "initialised: A in U(0.01, 16), dt_bias 1; trained: 4% of the decays below -8; a number: all g; faded: "
            "mild, and a state of 1e-39",
        ],
    )  # fmt: skip
    groups = [
        (op, kda, T, n) for op in ("rule", "mixer") for kda in (False, True) for T in tokens for n in threads
    ]
    for i, (op, kda, T, n) in enumerate(groups):
        name = f"{op}, {'KDA' if kda else 'GDA'}"
        tell = part_of(progress, f"{name}, {T} tokens, {n} thread{'s' * (n > 1)}", i, len(groups))
        calls, worst = {}, []
        with torch_threads(n), torch.no_grad():
            for kind in ("mild", *STRONG.values()):
                x = _inputs(op, kda, T, kind)
                calls[kind] = _call(op, {k: torch.from_numpy(a) for k, a in x.items()})
                if T <= CHECKED:
                    worst.append(check(f"{name}, {kind}", calls[kind](), _exact(op, x)))
            samples, _, others = interleave(calls, settings, tell)
        mild = samples["mild"]
        ratios = {
            name: statistics.median(a / b for a, b in zip(samples[kind], mild, strict=True))
            for name, kind in STRONG.items()
        }
        ratios |= {f"{name}_min": min(samples[kind]) / min(mild) for name, kind in STRONG.items()}
        nmse = max(worst, default=None)
        measured.records.append(
            DecaysRecord(
                name, T, n, len(mild), statistics.median(mild), **ratios, nmse=nmse, others_pct=others
            )
        )
    return measured


def decays_command(
    tokens: Annotated[
        str, typer.Option("--tokens", "-T", help="Tokens of a call, as 1,4,64.")
    ] = "1,2,4,6,16,64,1024",
    threads: Threads = "1,2",
    rounds: Rounds = 15,
    sample_ms: SampleMs = 15.0,
    json: Json = False,
    csv: Csv = False,
    md: Md = False,
    output: Output = None,
) -> None:
    """Time strong decays and faded states against mild ones: rule and mixer, GDA and KDA.

    Examples:
      anydelta bench decays
      anydelta bench decays -T 1,64 -t 2 --md -o decays.md
    """
    measure = partial(strong_decays, numbers("-T", tokens, 65536), numbers_of_threads(threads, 1))
    small(measure, rounds, sample_ms, json, csv, md, output)
