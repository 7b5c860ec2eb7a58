"""The work of each process of tests/test_tensor_parallel.py; torchrun starts it.

    torchrun --nproc-per-node 2 tests/tensor_parallel_ranks.py FOLDER SCENARIO ...

Every process writes what it found to FOLDER/SCENARIO.RANK.json. `time` prints the mixer's time in a rank beside that of
one process, in turns.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig
from transformers.distributed.configuration_utils import DistributedConfig

import anydelta.integrations.transformers as adt
from anydelta.integrations.transformers.cache import CACHE, RollbackCache
from anydelta.integrations.transformers.prefix import Checkpoint, PrefixStore
from test_transformers import CONFIGS, FAMILIES, ROWS, build, tokens

TINY = Path(__file__).parent.parent / "examples" / "tiny_model"
PROMPT = [18, 829, 481, 55, 200, 3, 77, 18, 829, 481]
NEW = 24
EOS = 1023
"""A token that the model never writes."""


def rank() -> int:
    return dist.get_rank()


def load(folder: Path | str, cls: Any = AutoModelForCausalLM, **options: Any) -> Any:
    return cls.from_pretrained(folder, **options).eval()


def load_split(folder: Path | str, cls: Any = AutoModelForCausalLM, **options: Any) -> Any:
    with adt.enable():
        return load(
            folder, cls, distributed_config=DistributedConfig(tp_size=dist.get_world_size()), **options
        )


def layers(model: Any, family: str) -> list[tuple[str, Any]]:
    return [(n, m) for n, m in model.named_modules() if type(m).__name__ == ROWS[family].layer]


def steps(model: Any, cache: Any, ids: torch.Tensor, first: int = 9) -> torch.Tensor:
    parts = [model(ids[:, :first], **{CACHE: cache}, use_cache=True).logits]
    for t in range(first, ids.shape[1]):
        parts.append(model(ids[:, t : t + 1], **{CACHE: cache}, use_cache=True).logits)
    return torch.cat(parts, 1)


def state_bytes(cache: Any) -> int:
    return sum(
        x.nbytes
        for layer in cache.layers
        if hasattr(layer, "recurrent_states")
        for x in (layer.conv_states[0], layer.recurrent_states[0])
    )


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def apart_of(want: torch.Tensor, got: torch.Tensor) -> float:
    """In parts of the largest number."""
    return apart(want, got) / float(want.abs().max())


def whole(x: Any) -> torch.Tensor:
    return x.full_tensor() if hasattr(x, "full_tensor") else x


# ---- Families


def family(folder: Path, name: str) -> dict[str, Any]:
    """A family in one process, and split: logits, caches, rollback, gradients, and the file that it saves."""
    path, cls = folder / name, getattr(transformers, CONFIGS[name][1])
    if rank() == 0:
        build(name).save_pretrained(path)
    dist.barrier()
    one, split = load(path, cls), load_split(path, cls)
    ids, out = tokens(2, 20), {}
    out["heads"] = list(adt.status(split).heads.values())
    out["layers"] = len(layers(split, name))
    caches = [transformers.DynamicCache(config=m.config.get_text_config()) for m in (one, split)]
    with torch.no_grad():
        with adt.enable():
            want = [one(ids).logits, steps(one, caches[0], ids)]
            before = adt.status()
            got = [split(ids).logits, steps(split, caches[1], ids)]
            after = adt.status()
            out["prefill"], out["decode"] = (apart(a, b) for a, b in zip(want, got, strict=True))
            out["rollback"] = apart(*(_rolled_back(m, ids) for m in (one, split)))
        out["stock"] = apart(
            steps(split, transformers.DynamicCache(config=split.config.get_text_config()), ids), want[1]
        )
    out["taken"] = after.taken.get(f"{name}.mixer", 0) - before.taken.get(f"{name}.mixer", 0)
    out["passed on"] = sum(after.passed_on.values()) - sum(before.passed_on.values())
    out["memory"] = state_bytes(caches[1]) / state_bytes(caches[0])
    split.save_pretrained(folder / f"{name} saved")
    dist.barrier()
    again = load(folder / f"{name} saved", cls)
    out["saved"] = all(
        torch.equal(a, b) for a, b in zip(one.state_dict().values(), again.state_dict().values(), strict=True)
    )
    out["gradients"] = _gradients(one, split, name, ids)
    return out


def _rolled_back(model: Any, ids: torch.Tensor) -> torch.Tensor:
    cache = RollbackCache(config=model.config.get_text_config(), rollback=4)
    model(ids[:, :9], **{CACHE: cache}, use_cache=True)
    cache.activate_past_recording()
    model(ids[:, 9:13], **{CACHE: cache}, use_cache=True)
    cache.crop(-3)
    logits: torch.Tensor = model(ids[:, 15:18], **{CACHE: cache}, use_cache=True).logits
    return logits


def _gradients(one: Any, split: Any, name: str, ids: torch.Tensor) -> dict[str, float]:
    """The largest difference of each gradient of the first linear layer, in parts of the largest number in it."""
    found = {}
    with adt.enable():
        for model in (one, split):
            model.zero_grad()
            for row in ids:  # two backward passes before a step
                model(row[None], labels=row[None], use_cache=False).loss.backward()
    (_, layer), (where, part) = layers(one, name)[0], layers(split, name)[0]
    held: dict[str, Any] = {n: p.grad for n, p in part.named_parameters()}
    # What save_pretrained does for weights, for their gradients.
    names = {f"{where}.{n}": g for n, g in held.items()}
    full = split.gather_sharded_state_dict_for_save(split, names, split.config.distributed_config)
    for n, p in layer.named_parameters():
        found[n] = apart_of(p.grad, full[f"{where}.{n}"])
    embed = [whole(m.get_input_embeddings().weight.grad) for m in (one, split)]
    found["embeddings"] = apart_of(*embed)
    return found


def families(folder: Path) -> dict[str, Any]:
    return {name: _caught(family, folder, name) for name in FAMILIES}


# ---- The repository's model


def generate(folder: Path) -> dict[str, Any]:
    """Text by every way to generate, in one process and split."""
    transformers.utils.logging.set_verbosity_error()
    out: dict[str, Any] = {}
    one = load(TINY, dtype=torch.float32)
    with adt.enable(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        split = load(TINY, tp_plan="auto", dtype=torch.float32)  # the older way to ask for it
    out["heads"] = len(adt.status(split).heads)
    ids = torch.tensor([PROMPT])
    text: Callable[..., list[int]] = lambda m, **more: m.generate(  # noqa: E731
        ids, max_new_tokens=NEW, do_sample=False, eos_token_id=EOS, **more
    )[0].tolist()
    helper = load(TINY, dtype=torch.float32)
    ways: dict[str, dict[str, Any]] = {
        "greedy": {},
        "beams": dict(num_beams=3),
        "prompt lookup": dict(prompt_lookup_num_tokens=3),
        "mtp": dict(use_mtp=True),
        "early exit": dict(assistant_early_exit=4),
        "assistant": dict(assistant_model=helper),
        "static cache": dict(cache_implementation="static", disable_compile=True),
    }
    with torch.no_grad(), adt.enable():
        for way, options in ways.items():
            out[way] = [text(one, **options), text(split, **options)]
        out["prefix"] = _prefix(folder, split, ids, text)
        config = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=256)
        greedy = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=EOS)
        served = split.generate_batch(
            inputs=[PROMPT, PROMPT[:4]], generation_config=greedy, continuous_batching_config=config
        )
        # Only the first rank has the answers.
        out["batch"] = sorted(list(a.prompt_ids) + a.generated_tokens for a in served.values())
        out["batch alone"] = sorted(
            m.tolist()
            for p in (PROMPT, PROMPT[:4])
            for m in one.generate(torch.tensor([p]), generation_config=greedy)
        )
    with torch.no_grad():
        out["disabled"] = [text(one), text(split)]
    return out


def _prefix(folder: Path, split: Any, ids: torch.Tensor, text: Callable[..., list[int]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    store = PrefixStore(split)
    out["text"] = text(split, **{CACHE: store.cache_for(ids)})
    file = folder / f"prefix.{rank()}"
    store.find(ids).save(file)  # type: ignore[union-attr]
    dist.barrier()
    again = PrefixStore(split)
    again.put(Checkpoint.load(file))
    out["from file"] = text(split, **{CACHE: again.cache_for(ids)})
    out["other rank"] = _error(lambda: again.put(Checkpoint.load(folder / f"prefix.{1 - rank()}")))
    out["one process"] = _error(lambda: Checkpoint.load(file, config=load(TINY).config))
    return out


def _error(run: Callable[[], object]) -> str:
    try:
        run()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def later(folder: Path) -> dict[str, Any]:
    """A model that was loaded before anydelta was enabled, and what is refused."""
    out: dict[str, Any] = {}
    model = load(TINY, distributed_config=DistributedConfig(tp_size=2), dtype=torch.float32)
    one = load(TINY, dtype=torch.float32)
    ids = tokens(1, 20)
    old = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, **{CACHE: old})
        with adt.enable():
            out["whole"] = apart_of(one(ids).logits, model(ids).logits)
            out["status before"] = adt.status(model).left
        with adt.enable(model), adt.enable(one):
            out["status"] = str(adt.status(model))
            out["status after"] = [adt.status(model).left, len(adt.status(model).heads)]
            out["split"] = apart_of(one(ids).logits, model(ids).logits)
            out["old cache"] = _error(lambda: model(ids[:, :1], **{CACHE: old}))
        with adt.enable(model):
            out["twice"] = apart_of(one(ids).logits, model(ids).logits)
    out["distributed checkpoint"] = _error(
        lambda: model.save_pretrained(folder / "dcp", distributed_checkpoint=True)
    )
    copied = copy.deepcopy(model.model.layers[0].linear_attn)
    x = torch.randn(1, 5, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out["copy"] = apart(copied(x), model.model.layers[0].linear_attn(x))
    with torch.no_grad():
        packed = adt.pack(model)
        out["packed"] = apart_of(one(ids).logits, model(ids).logits)
        packed.off()
    projection = model.model.layers[0].linear_attn.in_proj_qkv
    model.model.layers[0].linear_attn.in_proj_qkv = torch.nn.Sequential(
        projection
    )  # as LoRA puts itself there
    out["wrapped"] = _error(lambda: model(ids))
    model.model.layers[0].linear_attn.in_proj_qkv = projection
    with torch.no_grad():
        out["unwrapped"] = apart_of(one(ids).logits, model(ids).logits)
    return out


def trained(folder: Path) -> dict[str, Any]:
    """Two steps with gradient checkpointing and clipping, in one process and split."""
    from torch.distributed.tensor.experimental import implicit_replication

    out: dict[str, Any] = {"norms": [], "logits": []}
    ids = tokens(2, 12)
    for model in (load(TINY, dtype=torch.float32), load_split(TINY, dtype=torch.float32)):
        model.train()
        model.gradient_checkpointing_enable()
        step, norms = torch.optim.SGD(model.parameters(), lr=1e-2), []
        for _ in range(2):
            with adt.enable():
                model(ids, labels=ids, use_cache=False).loss.backward()
            with implicit_replication():
                norms.append(whole(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)).item())
                step.step()
            step.zero_grad()
        out["norms"].append(norms)
        with torch.no_grad(), adt.enable():
            out["logits"].append(model.eval()(ids).logits)
    logits = out.pop("logits")
    out["apart"] = apart_of(*logits)
    alike = [torch.empty_like(logits[1]) for _ in range(2)]
    dist.all_gather(alike, logits[1].contiguous())
    out["alike"] = torch.equal(*alike)
    return out


def whole_models(folder: Path) -> dict[str, Any]:
    """Models whose heads stay whole: why, and their logits."""
    quantised: dict[str, Any] = {}
    if importlib.util.find_spec("torchao"):
        from torchao.quantization import Int8WeightOnlyConfig

        quantised = dict(quantization_config=transformers.TorchAoConfig(Int8WeightOnlyConfig()))
    out: dict[str, Any] = {
        "odd": _stays_whole(folder / "odd", dict(linear_num_key_heads=3, linear_num_value_heads=3), {})
    }
    if quantised:
        out["quantised"] = _stays_whole(folder / "quantised", {}, quantised)
    return out


def _stays_whole(path: Path, changes: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    if rank() == 0:
        build("qwen3_5", **changes).save_pretrained(path)
    dist.barrier()
    one = load(path)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        model = load_split(path, **options)
        with adt.enable(model):  # which asks again
            pass
    status = adt.status(model)
    with torch.no_grad():
        # Transformers' plan quantises a share of a matrix by itself, so that one process has other numbers.
        want = (model if options else one)(tokens(1, 9)).logits
        with adt.enable():
            logits = apart(want, model(tokens(1, 9)).logits)
    return dict(
        warnings=[str(w.message) for w in seen if "anydelta" in str(w.message)],
        left=list(status.left.values()),
        heads=status.heads,
        logits=logits,
    )


# ---- Times


def timed(folder: Path) -> dict[str, Any]:
    """CPU time of linear layers with whole heads in one process, split, and as Transformers' plan has them, in turns.

    The shape is that of Qwen3.5-0.8B; `mixer` is what lies between the projections.
    """
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    config = Qwen3_5TextConfig(
        vocab_size=256, hidden_size=1024, intermediate_size=256, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, head_dim=128, linear_num_key_heads=16, linear_num_value_heads=16,
        linear_key_head_dim=128, linear_value_head_dim=128, linear_conv_kernel_dim=4,
    )  # fmt: skip
    path = folder / "timed"
    if rank() == 0:
        torch.manual_seed(0)
        Qwen3_5ForCausalLM(config).save_pretrained(path)
    dist.barrier()
    planned = load(path, distributed_config=DistributedConfig(tp_size=dist.get_world_size()))
    models = [load(path), load_split(path), planned]
    out: dict[str, Any] = {}
    with torch.no_grad(), adt.enable():
        for what, rows, length in (("prefill of 512", 1, 512), ("decode, 8 rows", 8, 1)):
            rounds = [[_times(m, rows, length) for m in models] for _ in range(17)][2:]
            for i, part in enumerate(("mixer", "layer")):
                for way, name in ((1, "split"), (2, "Transformers' plan")):
                    ratios = [r[way][i] / r[0][i] for r in rounds]
                    out[f"{what}, {part}, {name}"] = statistics.quantiles(ratios, n=4)
    if rank() == 0:
        for name, (low, middle, high) in out.items():
            print(f"{name}: {middle:.2f} ({low:.2f} to {high:.2f}) of one process")
    return out


def _times(model: Any, rows: int, length: int) -> tuple[float, float]:
    """CPU seconds of this thread in the mixers of all linear layers, and in the layers."""
    from anydelta.integrations.transformers import layer as mixers

    layer = type(model.model.layers[0].linear_attn)
    spent = dict.fromkeys(("mixer", "layer"), 0.0)

    def clocked(theirs: Callable[..., Any], name: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            begin = time.thread_time()
            result = theirs(*args, **kwargs)
            spent[name] += time.thread_time() - begin
            return result

        return run

    ids = tokens(rows, length)
    cache = transformers.DynamicCache(config=model.config)
    if length == 1:
        for _ in range(2):
            model(ids, **{CACHE: cache}, use_cache=True)
    kept = mixers._Step.mix
    mixers._Step.mix = clocked(kept, "mixer")  # type: ignore[method-assign]
    layer.__call__ = clocked(layer.__call__, "layer")
    try:
        for _ in range(20 if length == 1 else 1):
            model(ids, **{CACHE: cache}, use_cache=True)
    finally:
        mixers._Step.mix = kept  # type: ignore[method-assign]
        del layer.__call__
    return spent["mixer"], spent["layer"]


SCENARIOS: dict[str, Callable[[Path], dict[str, Any]]] = {
    f.__name__: f for f in (families, generate, later, trained, whole_models, timed)
}


def _caught(run: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    try:
        return run(*args)
    except Exception:
        return {"error": traceback.format_exc()}


def main() -> None:
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    folder = Path(sys.argv[1])
    for name in sys.argv[2:]:
        found = _caught(SCENARIOS[name], folder)
        (folder / f"{name}.{rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
