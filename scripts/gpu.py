"""The steps of scripts/gpu.sh: environment, first, conform, bench, tune. Needs torch, Triton and NumPy only.

With --dry-run on the CPU, in Triton's interpreter, on shapes that are too small to mean anything.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import anydelta

SHAPES = (
    # name, tokens per sequence, sequences, q/k heads, value heads, KDA
    *((f"decode b{n}", 1, n, 16, 32, False) for n in (1, 8, 64, 256)),
    *((f"decode kda b{n}", 1, n, 32, 32, True) for n in (1, 64)),
    ("prefill 512", 512, 1, 16, 32, False),
    ("prefill 4096", 4096, 1, 16, 32, False),
    ("prefill 32768", 32768, 1, 16, 32, False),
    ("prefill 32768 few heads", 32768, 1, 2, 4, False),
    ("prefill kda 4096", 4096, 1, 32, 32, True),
    ("packed 16x2048", 2048, 16, 16, 32, False),
)
DRY = (("decode b2", 1, 2, 1, 2, False), ("prefill 20", 20, 1, 1, 1, False))
D = 128


def device(dry: bool) -> str:
    return "cpu" if dry else "cuda" if torch.cuda.is_available() else "xpu"


def wait(dry: bool) -> None:
    if not dry:
        getattr(torch, device(dry)).synchronize()


def environment(dry: bool) -> dict[str, Any]:
    facts: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "python": platform.python_version()}
    for package in ("torch", "triton", "fla-core", "flashinfer-python", "transformers"):
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            facts[package] = None
    facts["device"] = "the interpreter" if dry else getattr(torch, device(dry)).get_device_name()
    return facts


def conform(dry: bool, sample: bool, seconds: float) -> dict[str, Any]:
    """Gradients, then cases of the rule and the mixer in a fixed random order, until the time is up, as each compiles
    its own kernels. A sample is every 40th small one."""
    from anydelta.conformance import CASES, Target
    from anydelta.conformance.gradients import GRADIENT_CASES, check_gradients
    from anydelta.conformance.mixer import MIXER_CASES
    from anydelta.conformance.run import run_one, summary

    cases = [*CASES, *(c for c in MIXER_CASES if c not in CASES)]
    if sample or dry:
        cases = [c for c in cases if c.work < (20_000 if dry else 200_000)][:: 100 if dry else 40]
    random.Random(0).shuffle(cases)
    target = Target("triton", framework="torch", device=device(dry))
    start, results = time.monotonic(), []
    wrong = []
    for case in GRADIENT_CASES[:: 10 if dry or sample else 1]:
        if time.monotonic() - start > seconds / 2:
            break
        verdict = check_gradients(case, target)
        wrong += verdict.errors
        print("gradients", "FAIL" if verdict.errors else "OK", f"{verdict.worst:.2f}", case, *verdict.errors)
    for case in cases:
        if time.monotonic() - start > seconds:
            break
        results.append(run_one(case, target))
        if results[-1].status != "OK":
            print(results[-1].status, results[-1].reproduce(), *results[-1].reasons)
    bad = sum(r.status != "OK" for r in results)
    print(
        f"{len(results)} of {len(cases)} cases ran, {bad} not OK, worst {max(r.worst for r in results):.2f}"
    )
    if bad or wrong:
        raise SystemExit(1)
    return {"summary": summary(results), "results": [r.record() for r in results]}


def first_calls(dry: bool) -> dict[str, Any]:
    """Seconds of the first call of each kind, compilation included; TRITON_CACHE_DIR must be an empty folder."""
    from anydelta.backends.triton import aot
    from anydelta.tune.problems import Problem
    from anydelta.tune.search import Contest

    size: dict[str, Any] = dict(H=1, HV=1, K=16, V=16) if dry else {}
    decode, prefill = (
        aot.Shape(**size),
        aot.Shape(**{**size, "T": 17 if dry else 4096, "N": 1, "inplace": False}),
    )
    kda: dict[str, Any] = {} if dry else {"H": 32}
    calls = {
        "decode": decode,
        "decode KDA": replace(decode, kda=True, **kda),
        "prefill": prefill,
        "prefill KDA": replace(prefill, kda=True, **kda),
        "backward": replace(prefill, backward=True),
    }
    rows = {}
    print("| first call | s |")
    print("|---|---:|")
    for name, shape in calls.items():
        contest = Contest(Problem("backward" if shape.backward else "", name, shape), device(dry))
        run = contest.run(contest.problem.heuristic(contest.machine))
        wait(dry)
        start = time.perf_counter()
        run()
        wait(dry)
        rows[name] = time.perf_counter() - start
        print(f"| {name} | {rows[name]:.1f} |", flush=True)
    return {"first_call_seconds": rows}


def tune(dry: bool, seconds: float, folder: Path) -> dict[str, Any]:
    """What `anydelta tune --seconds` does for the calls of SHAPES, into a table in `folder`."""
    from anydelta.backends.triton import tables
    from anydelta.bench.measure.cases import select
    from anydelta.tune import problems
    from anydelta.tune.search import Contest, gpu_times
    from anydelta.tune.search import tune as search

    def walls(runs: Any, rounds: int) -> list[list[float]]:
        spent = measured([Contender(str(i), run) for i, run in enumerate(runs)], True, rounds)
        return [[1e6 * x for x in spent[str(i)]] for i in range(len(runs))]

    start, outcomes = time.monotonic(), []
    chosen = problems.problems(
        select(["gda-t1-h1x1-d16-b1"] if dry else problems.DEFAULT), ["bfloat16"], gradients=False
    )

    def in_time() -> bool:
        return time.monotonic() - start < seconds

    wrong = []
    for problem in chosen:
        if not in_time():
            break
        contest = Contest(problem, device(dry))
        outcome = search(
            contest, walls if dry else gpu_times, rounds=5, in_time=in_time, tell=lambda text: None
        )
        tables.merge(
            folder / f"{contest.machine.arch}.json", {outcome.key: outcome.row(environment(dry)["device"])}
        )
        print(
            f"{outcome.key}: {outcome.heuristic_us:.1f} us, {outcome.us:.1f} us with {outcome.launch}",
            flush=True,
        )
        wrong += [f"{outcome.key} {t.change}: {t.why_not}" for t in outcome.trials if t.wrong]
        outcomes.append(outcome)
    print(*wrong, f"{len(outcomes)} of {len(chosen)} rows tuned, {len(wrong)} launches wrong", sep="\n")
    if wrong:
        raise SystemExit(1)
    return {"rows": [asdict(outcome) for outcome in outcomes]}


@dataclass
class Contender:
    name: str
    run: Callable[[], Any]
    """Returns o."""


def contenders(
    tokens: int, n: int, H: int, HV: int, kda: bool, packed: bool, dev: str
) -> tuple[list[Contender], Any]:
    """Those that are installed and take the shape, and the exact output of a small part of it, or None."""
    torch.manual_seed(0)
    B, T = (1, tokens * n) if packed else (n, tokens)
    q, k = (torch.randn(B, T, H, D, device=dev, dtype=torch.bfloat16) for _ in range(2))
    v = torch.randn(B, T, HV, D, device=dev, dtype=torch.bfloat16)
    g = -torch.rand(B, T, HV, *([D] if kda else []), device=dev)
    beta = torch.rand(B, T, HV, device=dev)
    state = torch.zeros(n, HV, D, D, device=dev)
    cu = torch.arange(n + 1, device=dev, dtype=torch.int32) * tokens if packed else None

    def ours() -> Any:
        return anydelta.gated_delta_rule_(
            q, k, v, state, g=g, beta=beta, qk_l2norm=True, cu_seqlens=cu, backend="triton"
        )

    found = [Contender("anydelta", ours)]
    try:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule
        from fla.ops.kda import chunk_kda, fused_recurrent_kda
    except ImportError:
        pass
    else:
        theirs = (fused_recurrent_kda if tokens == 1 else chunk_kda) if kda else (
            fused_recurrent_gated_delta_rule if tokens == 1 else chunk_gated_delta_rule
        )  # fmt: skip
        fla_cu = None if cu is None else cu.long()
        found.append(
            Contender(
                "fla",
                lambda: theirs(
                    q, k, v, g=g, beta=beta, initial_state=state, output_final_state=True,
                    use_qk_l2norm_in_kernel=True, cu_seqlens=fla_cu,
                )[0],
            )
        )  # fmt: skip
    try:
        from transformers.models.qwen3_next import modeling_qwen3_next as modeling
    except ImportError:
        pass
    else:
        if not kda and not packed and tokens <= 4096:
            rule = (
                modeling.torch_recurrent_gated_delta_rule
                if tokens == 1
                else modeling.torch_chunk_gated_delta_rule
            )
            wide = (x.repeat_interleave(HV // H, 2) for x in (q, k))
            wq, wk = wide
            found.append(
                Contender(
                    "transformers",
                    lambda: rule(
                        wq, wk, v, g=g, beta=beta, initial_state=state, output_final_state=True,
                        use_qk_l2norm_in_kernel=True,
                    )[0],
                )
            )  # fmt: skip
    try:
        from flashinfer.gdn_prefill import chunk_gated_delta_rule as flashinfer_prefill
    except ImportError:
        pass
    else:
        if not kda and tokens > 1:
            norm = [
                torch.nn.functional.normalize(x.float(), dim=-1).to(x.dtype).flatten(0, 1) for x in (q, k)
            ]
            starts = torch.arange(n + 1, device=dev, dtype=torch.int64) * tokens
            found.append(
                Contender(
                    "flashinfer",
                    lambda: flashinfer_prefill(
                        *norm, v.flatten(0, 1), g=g.exp().flatten(0, 1), beta=beta.flatten(0, 1),
                        cu_seqlens=starts, output_final_state=True,
                    )[0].view_as(v),
                )
            )  # fmt: skip

    def expected() -> Any:
        state.zero_()
        few = slice(0, min(T, 256))
        part = [x[:1, few].cpu() for x in (q, k, v, g, beta)]
        return anydelta.gated_delta_rule(
            *part[:3], g=part[3], beta=part[4], qk_l2norm=True, backend="reference"
        )[0]

    want = expected().float()
    right = []
    for c in found:
        state.zero_()
        try:
            got = c.run()[:1, : want.shape[1]].float().cpu()
        except Exception as error:  # another project's kernel: say so and go on without it
            print(f"{c.name} does not run: {type(error).__name__}: {str(error)[:200]}")
            continue
        off = float((got - want).norm() / want.norm().clamp_min(1e-20))
        if off > 2e-2:
            print(f"{c.name} is off by {off:.3g} and is not timed")
            continue
        right.append(c)
    return right, state


def measured(runs: list[Contender], dry: bool, rounds: int) -> dict[str, list[float]]:
    """Seconds per call, in turns: A B C, B C A, ... Each entry is the mean of enough calls to fill 2 ms."""
    repeat = {}
    for c in runs:
        c.run()
        wait(dry)
        start = time.perf_counter()
        c.run()
        wait(dry)
        repeat[c.name] = max(1, min(200, int(2e-3 / max(time.perf_counter() - start, 1e-6))))
    times: dict[str, list[float]] = {c.name: [] for c in runs}
    for i in range(rounds):
        for c in runs[i % len(runs) :] + runs[: i % len(runs)]:
            wait(dry)
            start = time.perf_counter()
            for _ in range(repeat[c.name]):
                c.run()
            wait(dry)
            times[c.name].append((time.perf_counter() - start) / repeat[c.name])
    return times


def bench(dry: bool, seconds: float) -> dict[str, Any]:
    """Contenders in turns, shape after shape until the time is up."""
    begin = time.monotonic()
    dev, rounds = device(dry), 1 if dry else 15
    if dry:
        print("DRY RUN: these times are those of an interpreter and mean nothing.")
    size = (1 << 20) if dry else (1 << 29)
    source = torch.empty(size, dtype=torch.uint8, device=dev)
    target = torch.empty_like(source)
    copy = Contender("copy", lambda: target.copy_(source))
    a = torch.randn(64 if dry else 8192, 64 if dry else 8192, device=dev, dtype=torch.bfloat16)
    matmul = Contender("matmul", lambda: a @ a)
    limits = {name: statistics.median(x) for name, x in measured([copy, matmul], dry, rounds).items()}
    bandwidth, flops = 2 * size / limits["copy"], 2 * a.shape[0] ** 3 / limits["matmul"]
    print(f"limits of this run: copy {bandwidth / 1e9:.0f} GB/s, bfloat16 matmul {flops / 1e12:.1f} TFLOP/s")
    print("| case | contender | median us | min us | spread | x anydelta | floor us | of floor |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    rows = []
    for name, tokens, n, H, HV, kda in DRY if dry else SHAPES:
        if time.monotonic() - begin > seconds:
            print(f"{name}: no time left")
            continue
        packed = name.startswith("packed")
        runs, state = contenders(tokens, n, H, HV, kda, packed, dev)
        if not runs:
            continue
        times = measured(runs, dry, rounds)
        # Floors: the state read and written once; for prefill also 6 K V flops per token and head at matmul speed.
        moved = 2 * state.numel() * 4 + n * tokens * 2 * D * (2 * H + 2 * HV)
        floor = max(moved / bandwidth, 6 * D * D * n * tokens * HV / flops)
        ours = statistics.median(times["anydelta"]) if "anydelta" in times else float("nan")
        for who, found in times.items():
            median = statistics.median(found)
            rows.append({"case": name, "contender": who, "seconds": found, "floor": floor})
            print(
                f"| {name} | {who} | {median * 1e6:.1f} | {min(found) * 1e6:.1f} "
                f"| {(max(found) - min(found)) / median:.0%} | {median / ours:.2f} | {floor * 1e6:.1f} "
                f"| {floor / median:.0%} |",
                flush=True,
            )
    return {"bandwidth": bandwidth, "matmul_flops": flops, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=("environment", "first", "conform", "bench", "tune"))
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--sample", action="store_true")
    parser.add_argument("--seconds", type=float, default=100)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if not args.dry_run and device(False) == "xpu" and not torch.xpu.is_available():
        sys.exit(
            "scripts/gpu.py: no GPU is here; --dry-run shows that the script works, its times mean nothing."
        )
    args.out.touch()  # what cannot be written is found before the minutes, not after
    facts = environment(args.dry_run)
    if args.step == "conform":
        result = conform(args.dry_run, args.sample, args.seconds)
    elif args.step == "bench":
        result = bench(args.dry_run, args.seconds)
    elif args.step == "first":
        result = first_calls(args.dry_run)
    elif args.step == "tune":
        result = tune(args.dry_run, args.seconds, args.out.parent)
    else:
        result = {}
        print(", ".join(f"{name} {value}" for name, value in facts.items()))
    record = {"dry_run": args.dry_run, "environment": facts, **result}
    args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
