"""The speed table and picture of README.md, from the JSON of `anydelta bench ops`.

    python scripts/speed_figures.py --from docs/measurements/readme.json                     print the table
    python scripts/speed_figures.py --from FILE --write README.md --plot docs/images/speed.svg
    python scripts/speed_figures.py --from FILE --check README.md                            exit 1 if it is an old one

`make figures` measures, keeps the JSON and calls this.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from table_between_marks import parser, run

MARKS = ("<!-- speed: written by `make figures` -->", "<!-- end of the speed -->")
PEERS = {
    "ggml": "ggml (llama.cpp)",
    "onnxruntime": "ONNX Runtime",
    "executorch": "ExecuTorch",
    "transformers": "Transformers",
}
BUSY_PCT = 10
CASES = {
    "gda-t1-h16x32-d128-b1-cold": "decode one token",
    "gda-t512-h16x32-d128-b1": "prefill 512 tokens",
}


def read(path: Path) -> dict[str, Any]:
    """The report that the command wrote."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        ratios(found)
    except (OSError, ValueError, TypeError, KeyError) as error:
        sys.exit(
            f"speed_figures: --from requires the JSON of `anydelta bench ops` on {', '.join(CASES)}; got {error!r}."
        )
    return found


def ratios(report: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Time over anydelta's, by case and peer."""
    timed = {(r["case"], r["contender"]): r["ratio"] for r in report["records"] if r["status"] == "ok"}
    return {case: {peer: float(timed[case, peer]) for peer in PEERS} for case in CASES}


def conditions(report: dict[str, Any]) -> str:
    """The machine and the shape, as a sentence."""
    machine, settings = report["machine"], report["settings"]
    threads = report["records"][0]["threads"]
    cores = f"{threads} thread{'s' * (threads > 1)}"
    busy = max(r["others_pct"] or 0.0 for r in report["records"])
    others = f" Other work took up to {busy:.0f}% of the CPUs." if busy >= BUSY_PCT else ""
    return (
        f"{machine['cpu']}, {cores}, {machine['date']}; 32 value heads of 128 x 128, float32, states from "
        f"memory; medians of {settings['rounds']} interleaved rounds, every result checked first.{others}"
    )


def table(report: dict[str, Any]) -> str:
    """The figures as Markdown."""
    from textwrap import wrap

    rows = ["| times as fast as | " + " | ".join(PEERS.values()) + " |", "|---|" + "---:|" * len(PEERS)]
    for case, found in ratios(report).items():
        rows.append(f"| {CASES[case]} | " + " | ".join(f"{found[peer]:.1f}" for peer in PEERS) + " |")
    return "\n".join([*rows, "", *wrap(conditions(report), 120, break_long_words=False)])


def plot(report: dict[str, Any], path: Path) -> None:
    """The figures as bars."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 10, "svg.fonttype": "none", "svg.hashsalt": "anydelta"})
    found = ratios(report)
    fig, panels = plt.subplots(1, len(found), figsize=(8, 2.2), layout="constrained", sharey=True)
    for axis, (case, by_peer) in zip(panels, found.items(), strict=True):
        names = ["anydelta", *PEERS.values()]
        times = [1.0, *by_peer.values()]
        bars = axis.barh(names, times, color=["#1b6ca8", *["#b0b7c3"] * len(PEERS)])
        axis.bar_label(bars, [f" {t:.1f}" for t in times], size=9)
        axis.invert_yaxis()
        axis.set_xlim(0, max(times) * 1.15)
        axis.set_title(f"{CASES[case]}: time, anydelta = 1", size=10)
        axis.spines[["top", "right", "bottom"]].set_visible(False)
        axis.tick_params(length=0, labelbottom=False)
    fig.savefig(path, metadata={"Date": None})
    plt.close(fig)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--from", dest="source", type=Path, metavar="FILE", required=True)
    options.add_argument("--plot", type=Path, metavar="FILE")
    args = options.parse_args()
    report = read(args.source)
    run(args, table(report), MARKS)
    if args.plot is not None:
        plot(report, args.plot)


if __name__ == "__main__":
    main()
