"""`anydelta bench pieces`: what it costs to run a piece of a sequence before the state in front of it is known.

Two ways, beside the same tokens in one call from a known state:

    again       S and P without outputs (gated_delta_transition); then the piece again, from P S_0 + S before it
    corrected   one call with v and K zeros side by side, from zeros and the identity: its outputs are o_t and
                scale P_t^T q_t, and the piece's are o_t + S_0^T (scale P_t^T q_t)

`anydelta.distributed` does the former. Times are interleaved (turns.py), and the median of the rounds' ratios counts;
the errors of the outputs are those of a shorter piece, which the float64 oracle can follow.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from ... import gated_delta_rule, gated_delta_rule_, gated_delta_transition
from ...conformance.gates import KINDS, model_gates
from ...rule import reference
from ..measure.ops import Settings, describe_machine, nmse
from ..measure.report import time as in_words
from ..measure.small_report import Measured
from ..measure.turns import Progress, interleave, part_of, torch_threads
from .options import Csv, Json, Md, Output, Rounds, SampleMs, small

if TYPE_CHECKING:
    import torch

HEADS, D = 8, 128
EXACT_TOKENS, EXACT_HEADS = 256, 2
WAYS = ("one", "again", "corrected")


@dataclass
class PiecesRecord:
    """A piece of a sequence, each way."""

    call: str
    decays: str
    tokens: int
    rounds: int
    one_us: float
    """One call from a known state."""
    summary: float
    """S and P alone: time over one call, median of the rounds; here and below."""
    again: float
    corrected: float
    again_range: tuple[float, float]
    corrected_range: tuple[float, float]
    again_min: float
    """The same from the minima, which other work on the machine disturbs least; here and below."""
    corrected_min: float
    errors: dict[str, float]
    """NMSE of the outputs against the oracle, float32."""
    half_errors: dict[str, float]
    """The same in bfloat16."""
    others_pct: float | None = None

    def columns(self) -> dict[str, str]:
        def spread(name: str) -> str:
            low, high = getattr(self, f"{name}_range")
            return f"{getattr(self, name):.2f} ({low:.2f} to {high:.2f})"

        half = (f"{self.half_errors[way]:.1e}" for way in WAYS[1:])
        return {
            "call": f"{self.call}, {self.decays}", "one call": in_words(self.one_us), "S and P": f"{self.summary:.2f}",
            "again": spread("again"), "corrected": spread("corrected"),
            "of the minima": f"{self.again_min:.2f} {self.corrected_min:.2f}",
            "NMSE": f"{max(self.errors.values()):.0e}", "bfloat16": " ".join(half),
        }  # fmt: skip


def _inputs(kda: bool, decays: str, T: int, HV: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    import torch

    rng = np.random.default_rng(0)
    shape = (1, T, HV, D) if kda else (1, T, HV)
    g = -rng.uniform(0, 1e-3, shape) if decays == "mild" else model_gates(decays, shape, rng).log()
    x = {n: torch.from_numpy(rng.standard_normal((1, T, HV, D))).to(dtype) for n in "qkv"}
    x |= {"g": torch.from_numpy(g).float(), "beta": torch.from_numpy(rng.uniform(0, 1, (1, T, HV))).float()}
    return x | {"state": torch.from_numpy(rng.standard_normal((1, HV, D, D))).float()}


def _ways(x: dict[str, torch.Tensor]) -> dict[str, Callable[[], Any]]:
    import torch

    x = dict(x)
    state, q = x.pop("state"), x.pop("q")
    k, v = x.pop("k"), x.pop("v")
    gates: dict[str, Any] = {**x, "qk_l2norm": True}

    def one() -> torch.Tensor:
        o: torch.Tensor = gated_delta_rule(q, k, v, initial_state=state, **gates)[0]
        return o

    def again() -> torch.Tensor:
        gated_delta_transition(k, v, **gates)
        return one()

    def corrected() -> torch.Tensor:
        wide = torch.cat((v, torch.zeros_like(k)), -1)
        both = torch.zeros(1, k.shape[2], D, 2 * D)
        both[..., range(D), range(D, 2 * D)] = 1
        o: torch.Tensor = gated_delta_rule_(q, k, wide, both, **gates)
        rest = torch.einsum("bthk,bhkv->bthv", o[..., D:].float(), state)
        return (o[..., :D] + rest).to(v.dtype)

    return {
        "one": one,
        "again": again,
        "corrected": corrected,
        "summary": partial(gated_delta_transition, k, v, **gates),
    }


def _errors(kda: bool, decays: str, dtype: torch.dtype) -> dict[str, float]:
    """Of the second half of the tokens: in one call, and as a piece after what the first half makes of the state."""
    x = _inputs(kda, decays, 2 * EXACT_TOKENS, EXACT_HEADS, dtype)
    y: dict[str, Any] = {n: a.double().numpy() for n, a in x.items()}
    want = reference.gated_delta_rule(**y | {"initial_state": y.pop("state")}, qk_l2norm=True).o
    state = x["state"]
    before: dict[str, Any] = {n: a[:, :EXACT_TOKENS] for n, a in x.items() if n not in ("state", "q")}
    S, P = gated_delta_transition(**before, qk_l2norm=True)
    piece = {n: a if n == "state" else a[:, EXACT_TOKENS:] for n, a in x.items()} | {"state": P @ state + S}
    ways = _ways(piece)
    found = {
        "one": _ways(x)["one"]()[:, EXACT_TOKENS:],
        "again": ways["again"](),
        "corrected": ways["corrected"](),
    }
    return {way: nmse(found[way].double().numpy(), want[:, EXACT_TOKENS:]) for way in WAYS}


def pieces(
    tokens: int = 2048, settings: Settings | None = None, progress: Progress = lambda text, done: None
) -> Measured:
    """GDA and KDA, with decays that keep a state and with those of models."""
    import torch

    settings = settings or Settings()
    measured = Measured(
        f"{tokens} tokens whose first state is not known: {HEADS} heads, {D}x{D}, float32, one thread",
        describe_machine(), settings,
        [
            "times over one call from a known state, median of the rounds (extremes); of the minima: again, corrected",
            f"NMSE of {EXACT_TOKENS} tokens' outputs, {EXACT_HEADS} heads, against the float64 oracle, after as many "
            "others, whose S and P give their state; the largest of one call, again and corrected; in bfloat16: again, "
            "corrected",
            "mild: log decays in [-0.001, 0]; initialised, trained: as of `anydelta bench decays`",
        ],
    )  # fmt: skip
    groups = [(kda, decays) for kda in (False, True) for decays in ("mild", *KINDS)]
    for i, (kda, decays) in enumerate(groups):
        gate = "KDA" if kda else "GDA"
        with torch_threads(1), torch.no_grad():
            calls = _ways(_inputs(kda, decays, tokens, HEADS, torch.float32))
            samples, _, others = interleave(
                calls, settings, part_of(progress, f"{gate}, {decays}", i, len(groups))
            )
            errors, half = (_errors(kda, decays, dtype) for dtype in (torch.float32, torch.bfloat16))
        ratios = {
            way: [a / b for a, b in zip(samples[way], samples["one"], strict=True)]
            for way in ("summary", "again", "corrected")
        }
        measured.records.append(
            PiecesRecord(
                call=gate,
                decays=decays,
                tokens=tokens,
                rounds=settings.rounds,
                one_us=statistics.median(samples["one"]),
                summary=statistics.median(ratios["summary"]),
                again=statistics.median(ratios["again"]),
                corrected=statistics.median(ratios["corrected"]),
                again_range=(min(ratios["again"]), max(ratios["again"])),
                corrected_range=(min(ratios["corrected"]), max(ratios["corrected"])),
                again_min=min(samples["again"]) / min(samples["one"]),
                corrected_min=min(samples["corrected"]) / min(samples["one"]),
                errors=errors,
                half_errors=half,
                others_pct=others,
            )
        )
    return measured


def pieces_command(
    tokens: Annotated[
        int, typer.Option("--tokens", "-T", min=1, max=65536, help="Tokens of the piece.")
    ] = 2048,
    rounds: Rounds = 15,
    sample_ms: SampleMs = 15.0,
    json: Json = False,
    csv: Csv = False,
    md: Md = False,
    output: Output = None,
) -> None:
    """Time a piece of a sequence whose first state is not known, both ways: run again, or corrected.

    Examples:
      anydelta bench pieces
      anydelta bench pieces -T 512 --md -o pieces.md
    """
    small(partial(pieces, tokens), rounds, sample_ms, json, csv, md, output)
