"""vLLM with its own kernels and with ours, in one engine, interleaved: the time of each workload, and its ratio.

    build/vllm/bin/python tests/vllm_engine/throughput.py [--rounds 7] [--threads 1]

The model is a Qwen3.5 with random weights and a shape that vLLM's own kernels take (heads of 128, bfloat16). Both ways
work on the same pools. A ratio is vLLM's time over ours, of one round; printed are its median and quartiles. With one
thread it is the time of the CPU, which other work on the machine lengthens less.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WORKLOADS = {  # prompts, tokens of each, new tokens
    "1 prompt of 1024": (1, 1024, 1),
    "8 prompts of 1024": (8, 1024, 1),
    "8 prompts of 1024, 64 new": (8, 1024, 64),
    "32 prompts of 128, 64 new": (32, 128, 64),
    "1 prompt of 16, 64 new": (1, 16, 64),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    os.environ.update(
        OMP_NUM_THREADS=str(args.threads), VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_OMP_THREADS_BIND="nobind",
        VLLM_CPU_KVCACHE_SPACE="2", HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="WARNING",
    )  # fmt: skip
    import torch
    from models import qwen
    from vllm import LLM, SamplingParams

    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        model = qwen(Path(folder) / "model", layers=args.layers, hidden=args.hidden, heads=16)
        llm = LLM(
            str(model), dtype="bfloat16", enforce_eager=True, max_model_len=2048, max_num_seqs=32,
            max_num_batched_tokens=2048, gpu_memory_utilization=0.2, enable_prefix_caching=False, seed=0,
        )  # fmt: skip
    clock = time.process_time if args.threads == 1 else time.perf_counter
    ways = {"vLLM": _theirs, "anydelta": _ours}
    layers = _layers(llm)
    torch.manual_seed(1)
    rows = {}
    for name, (count, length, new) in WORKLOADS.items():
        prompts: Any = [
            {"prompt_token_ids": torch.randint(3, 1000, (length,)).tolist()} for _ in range(count)
        ]
        sampling = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)

        def run(
            way: Callable[[Any], None], prompts: Any = prompts, sampling: Any = sampling
        ) -> tuple[float, Any]:
            for layer in layers:
                way(layer)
            before = clock()
            found = llm.generate(prompts, sampling, use_tqdm=False)
            return clock() - before, [list(x.outputs[0].token_ids) for x in found]

        texts = {way: run(change)[1] for way, change in ways.items()}  # and warm
        same = sum(a == b for a, b in zip(*texts.values(), strict=True))
        times: dict[str, list[float]] = {way: [] for way in ways}
        for i in range(args.rounds):
            for way in list(ways)[:: 1 if i % 2 else -1]:
                times[way].append(run(ways[way])[0])
        ratios = sorted(a / b for a, b in zip(*times.values(), strict=True))
        low, middle, high = statistics.quantiles(ratios, n=4)
        rows[name] = dict(ratio=middle, low=low, high=high, same=same, of=count, times=times)
        print(
            f"{name:28s} vLLM {min(times['vLLM']):7.3f} s, anydelta {min(times['anydelta']):7.3f} s, "
            f"ratio {middle:.2f} ({low:.2f} to {high:.2f}), {same} of {count} texts equal",
            flush=True,
        )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


def _layers(llm: Any) -> list[Any]:
    from anydelta.integrations.vllm.layers import QwenLayer

    worker = llm.llm_engine.model_executor.driver_worker.worker
    found = [layer for layer in worker.model_runner.model.modules() if isinstance(layer, QwenLayer)]
    assert found, "the plug-in is not in force"
    return found


def _ours(layer: Any) -> None:
    layer._forward_method = layer.forward_cpu


def _theirs(layer: Any) -> None:
    layer._forward_method = super(type(layer), layer).forward_cpu


if __name__ == "__main__":
    main()
