"""Files of checkpoints: a file that is incomplete or of another model is refused in a sentence that names it.

And the stores of checkpoints under threads.
"""

from __future__ import annotations

import json
import random
import struct
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anydelta import Checkpoints, StatePool
from anydelta.state.checkpoints import Checkpoint as PoolCheckpoint

pytest.importorskip("safetensors")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import anydelta.integrations.transformers as adt  # noqa: E402
import test_transformers as plain_tests  # noqa: E402
from anydelta.integrations.transformers.cache import RollbackCache  # noqa: E402
from anydelta.integrations.transformers.prefix import Checkpoint, PrefixStore  # noqa: E402
from test_transformers import build, tokens  # noqa: E402


@pytest.fixture(params=plain_tests.FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def checkpoint(model: Any, length: int = 9) -> Checkpoint:
    ids = tokens(1, length)
    with adt.enable(), torch.no_grad():
        cache = RollbackCache(config=model.config)
        model(ids, past_key_values=cache)
    return Checkpoint.take(ids, cache)


def checkpoints(torch_ones: bool = False) -> Checkpoints:
    pool = StatePool(
        H=1, HV=2, K=8, V=4, layers=2, conv_channels=3, conv_width=4, capacity=2,
        device="cpu" if torch_ones else None,
    )  # fmt: skip
    found = Checkpoints()
    for name in ("a", "b"):
        s = pool.new()
        pool.begin(3, [s])
        rng = np.random.default_rng(ord(name))
        for layer in range(2):
            x = rng.standard_normal((1, 3, 2, 16)).astype(np.float32)
            make: Any = torch.from_numpy if torch_ones else (lambda a: a)
            pool.conv_inputs(make(np.ascontiguousarray(x[:, :, 0, :3])), layer=layer)
            pool.run(
                make(x[:, :, :1, :8]), make(x[:, :, 1:, :8]), make(x[..., 8:12]), layer=layer,
                g=make(-np.abs(x[..., 12])), beta=make(np.abs(x[..., 13]) % 1),
            )  # fmt: skip
        pool.commit(3)
        found[name] = pool.save(s, [1, 2, 3])
    return found


def parts(path: Path) -> tuple[dict[str, Any], bytes]:
    """A safetensors file's header, and what is behind it."""
    raw = path.read_bytes()
    (n,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + n]), raw[8 + n :]


def written(path: Path, header: dict[str, Any] | str, data: bytes) -> Path:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


KINDS: dict[str, tuple[Callable[[Path], Any], Callable[[Any], Any]]] = {}
"""By name: what writes a good file, and what loads one."""


def _kinds() -> dict[str, tuple[Any, Any]]:
    model = build("qwen3_5")
    good = checkpoint(model)
    return {
        "Checkpoint": (good.save, Checkpoint.load),
        "Checkpoint for a model": (good.save, lambda path: Checkpoint.load(path, config=model.config)),
        "Checkpoints": (checkpoints().save, Checkpoints.load),
        "Checkpoints in torch": (checkpoints(True).save, lambda path: Checkpoints.load(path, device="cpu")),
    }


@pytest.fixture(params=["Checkpoint", "Checkpoint for a model", "Checkpoints", "Checkpoints in torch"])
def kind(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """A good file of the kind, and what loads it."""
    if not KINDS:
        KINDS.update(_kinds())
    save, load = KINDS[request.param]
    path = tmp_path / "a file.safetensors"
    save(path)
    load(path)
    return path, load


def refused(load: Callable[[Any], Any], path: Path, why: str | None = None) -> None:
    with pytest.raises(ValueError, match=why) as error:
        load(path)
    text = str(error.value)
    assert str(path) in text
    assert "requires" in text
    assert "\n" not in text
    assert type(error.value) is ValueError


# ---- Any file


def test_no_file(kind: Any, tmp_path: Path) -> None:
    _, load = kind
    refused(load, tmp_path / "nothing.safetensors", "no such file")
    refused(load, tmp_path, "a directory")
    empty = tmp_path / "empty"
    empty.write_bytes(b"")
    refused(load, empty)
    (tmp_path / "text").write_text("hello, this is no tensor at all")
    refused(load, tmp_path / "text")


def test_truncated_files(kind: Any, tmp_path: Path) -> None:
    path, load = kind
    raw = path.read_bytes()
    (n,) = struct.unpack("<Q", raw[:8])
    for end in (1, 7, 8, 9, 8 + n // 2, 8 + n, 8 + n + 5, len(raw) - 1):
        short = tmp_path / "short"
        short.write_bytes(raw[:end])
        refused(load, short)
    short.write_bytes(raw + b"\0" * 8)
    refused(load, short)


def test_bytes_that_changed(kind: Any, tmp_path: Path) -> None:
    """Whatever the bytes are: a load that is right, or a refusal."""
    path, load = kind
    raw, draw = path.read_bytes(), random.Random(0)
    (n,) = struct.unpack("<Q", raw[:8])
    seen = 0
    for _ in range(300):
        other = bytearray(raw)
        for _ in range(draw.choice((1, 1, 2, 8))):
            at = draw.randrange(8 + n) if draw.random() < 0.9 else draw.randrange(len(raw))
            other[at] = draw.choice((draw.randrange(256), ord(draw.choice('0123456789-.,:"[]{} eE'))))
        changed = tmp_path / "changed"
        changed.write_bytes(other)
        seen += not loads(load, changed)
    assert seen > 100


def loads(load: Callable[[Any], Any], path: Path) -> bool:
    try:
        load(path)
    except ValueError:
        refused(load, path)
        return False
    return True


DEEP = "[" * 200_000


@pytest.mark.parametrize(
    "value", [DEEP, "", "null", "3", '"a"', "{", "[[1]]", "[1e400]", "9" * 5000, '{"a": 1}']
)
def test_metadata_that_is_something_else(kind: Any, tmp_path: Path, value: str) -> None:
    path, load = kind
    header, data = parts(path)
    name = "tokens" if "tokens" in header["__metadata__"] else "snapshots"
    header["__metadata__"][name] = value
    refused(load, written(tmp_path / "other", header, data))
    del header["__metadata__"][name]
    refused(load, written(tmp_path / "other", header, data), f"no '{name}' in its metadata")
    header["__metadata__"] = {"format": "pt"}
    refused(load, written(tmp_path / "other", header, data), "the format 'pt'")
    del header["__metadata__"]
    refused(load, written(tmp_path / "other", header, data), "the format None")
    refused(load, written(tmp_path / "other", DEEP, data))
    refused(load, written(tmp_path / "other", '{"__metadata__":' + DEEP, data))


def test_arrays_that_are_something_else(kind: Any, tmp_path: Path) -> None:
    path, load = kind
    header, data = parts(path)
    names = [name for name in header if name != "__metadata__"]

    def other(change: Callable[[dict[str, Any]], Any]) -> Path:
        changed = json.loads(json.dumps(header))
        change(changed)
        return written(tmp_path / "other", changed, data)

    def end_with(name: str) -> Callable[[dict[str, Any]], Any]:
        """Without the last array in the file, or with another name for it."""

        def change(h: dict[str, Any]) -> None:
            last = max(names, key=lambda n: h[n]["data_offsets"][1])
            h[name] = h.pop(last)

        return change

    refused(load, other(end_with("another")))
    refused(load, other(end_with("7.keys")))
    refused(load, other(end_with("a/b/states")))
    for name in names:
        is_ = header[name]["shape"]
        fewer = is_[1:] if is_[0] == 1 else [int(np.prod(is_))]
        for shape in (fewer, [1, *is_], [2**40, *is_], [-1]):
            refused(load, other(lambda h, s=shape, n=name: h[n].update(shape=s)))
        refused(load, other(lambda h, n=name: h[n].update(dtype="I32")))
        refused(load, other(lambda h, n=name: h[n].update(dtype="no type")))
    begin = header[names[0]]["data_offsets"][0]
    for bad in (np.float32("nan"), np.float32("inf")):
        poisoned = data[:begin] + np.float32(bad).tobytes() + data[begin + 4 :]
        refused(load, written(tmp_path / "poisoned", header, poisoned), "not finite")


# ---- A checkpoint of Transformers


@pytest.mark.parametrize("bad", [[], [-1], [1.5], [True], [None], ["1"], [2**63], [[1]]], ids=str)
def test_tokens_that_are_none(tmp_path: Path, bad: Any) -> None:
    checkpoint(build("qwen3_5")).save(tmp_path / "a")
    header, data = parts(tmp_path / "a")
    header["__metadata__"]["tokens"] = json.dumps(bad)
    refused(Checkpoint.load, written(tmp_path / "a", header, data), "tokens")


def test_what_belongs_together(tmp_path: Path) -> None:
    good = checkpoint(build("qwen3_5"))

    def changed(**tensors: Any) -> Path:
        kept = {**good.tensors, **{name.replace("_", "."): x for name, x in tensors.items()}}
        path = tmp_path / "changed"
        Checkpoint(good.tokens, {n: x for n, x in kept.items() if x is not None}).save(path)
        return path

    for name, why in (("3_keys", "'3.values' without"), ("3_values", "'3.keys' without")):
        refused(Checkpoint.load, changed(**{name: None}), why)
    refused(Checkpoint.load, changed(**{"0_conv_0": None}), r"'0\.recurrent\.0' without its conv")
    refused(Checkpoint.load, changed(**{"0_recurrent_0": None}), r"'0\.conv\.0' without its recurrent")
    x = good.tensors["3.keys"]
    refused(Checkpoint.load, changed(**{"3_keys": x[:, :, :-1]}), "for one row of 9 tokens")
    refused(Checkpoint.load, changed(**{"3_keys": x.repeat(2, 1, 1, 1)}), "for one row of 9 tokens")
    refused(Checkpoint.load, changed(**{"3_keys": x.to(torch.bfloat16)}), "one type")
    refused(Checkpoint.load, changed(**{"3_other": x.clone()}), "of no layer")
    x = good.tensors["0.recurrent.0"]
    refused(Checkpoint.load, changed(**{"0_recurrent_0": x.double()}), "where states are float32")


def test_windows_of_tokens_and_positions(tmp_path: Path) -> None:
    if not hasattr(transformers, plain_tests.CONFIGS["qwen4_exp"][0]):
        pytest.skip("this Transformers has no qwen4_exp")
    model = build("qwen4_exp")
    good, path = checkpoint(model), tmp_path / "a file.safetensors"
    vocabulary = model.config.get_text_config().vocab_size
    for name, value, config in (
        ("0.conv.2", -7, None), ("0.conv.2", 1 << 62, None), ("3.positions", -1, None), ("0.conv.2", vocabulary, model),
    ):  # fmt: skip
        tensors = {n: x.clone() for n, x in good.tensors.items()}
        tensors[name].view(-1)[-1] = value
        Checkpoint(good.tokens, tensors).save(path)
        refused(lambda p, c=config: Checkpoint.load(p, config=c and c.config), path, str(value))


def test_what_a_store_takes() -> None:
    store = PrefixStore(build("qwen3_5"))
    for ids in (
        [1, 2], torch.tensor([1, 2]), torch.ones(2, 3, dtype=torch.long), torch.ones(1, 3), torch.ones(1, 0).long()
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"PrefixStore: requires input_ids \[1, T\]"):
            store.cache_for(ids)


def test_another_models_checkpoint(tmp_path: Path) -> None:
    """Refused where it is loaded for a model, put into its store or used with it; all else is as it was."""
    model = build("qwen3_5")
    good = checkpoint(model)

    def config(**changes: Any) -> Any:
        kind, _, options = plain_tests.CONFIGS["qwen3_5"]
        return getattr(transformers, kind)(**{**options, **changes})

    path = tmp_path / "a.safetensors"
    for old in (False, True):  # a file without a fingerprint, as earlier releases wrote it
        Checkpoint(good.tokens, good.tensors, None if old else good.model).save(path)
        assert ("model" in parts(path)[0]["__metadata__"]) != old
        for changes in (
            {"num_hidden_layers": 8},
            {"num_hidden_layers": 3, "layer_types": ["linear_attention"] * 3},
            {"layer_types": ["full_attention", *["linear_attention"] * 3]},
            {"linear_num_value_heads": 2},
            {"linear_key_head_dim": 8},
            {"linear_value_head_dim": 8, "linear_num_value_heads": 8},
            {"linear_conv_kernel_dim": 6},
            {"num_key_value_heads": 1},
            {"head_dim": 32},
            {"vocab_size": 9},
        ):
            refused(
                lambda p, c=changes: Checkpoint.load(p, config=config(**c)), path, "with exactly this config"
            )
            with pytest.raises(ValueError, match=r"a\.safetensors"):
                Checkpoint.load(path).cache(config(**changes))
        Checkpoint.load(path, config=config(use_cache=False))
    for changes in ({"rms_norm_eps": 1e-3}, {"rope_parameters": {**plain_tests.ROPE, "rope_theta": 5e5}}):
        Checkpoint(good.tokens, good.tensors).save(path)
        Checkpoint.load(path, config=config(**changes))  # nobody can tell
        good.save(path)
        refused(lambda p, c=changes: Checkpoint.load(p, config=config(**c)), path, "another config")
    store = PrefixStore(build("qwen3_next"))
    refused(lambda p: store.put(Checkpoint.load(p)), path)
    store = PrefixStore(build("qwen3_5").to(torch.bfloat16))
    refused(lambda p: store.put(Checkpoint.load(p)), path, "instead of torch.bfloat16")
    assert len(store) == 0
    store.model = model
    store.put(Checkpoint.load(path))
    assert len(store) == 1


def test_a_good_checkpoint_of_every_family(family: str, tmp_path: Path) -> None:
    model = build(family)
    good = checkpoint(model)
    assert good.model is not None
    good.save(tmp_path / "a")
    again = Checkpoint.load(tmp_path / "a", config=model.config)
    assert again.tokens == good.tokens
    assert again.tensors.keys() == good.tensors.keys()
    assert all(torch.equal(x, good.tensors[name]) for name, x in again.tensors.items())
    ids = tokens(1, 12)
    with adt.enable(), torch.no_grad():
        got = model(ids[:, 9:], past_key_values=again.cache(model.config)).logits
        want = model(ids).logits[:, 9:]
    assert float((got - want).abs().max()) < plain_tests.LIMIT


# ---- Checkpoints


@pytest.mark.parametrize(
    "change",
    [
        {"state_layout": "kk"}, {"state_layout": None}, {"state_layout": ["kv"]}, {"length": -1}, {"length": 1.5},
        {"length": None}, {"length": True}, {"tokens": 3}, {"tokens": [-1]}, {"tokens": ["a"]}, {"tokens": {}},
        {"conv": False},
    ],
    ids=str,
)  # fmt: skip
def test_facts_of_snapshots(tmp_path: Path, change: dict[str, Any]) -> None:
    checkpoints().save(tmp_path / "a")
    header, data = parts(tmp_path / "a")
    about = json.loads(header["__metadata__"]["snapshots"])
    about["b"].update(change)
    header["__metadata__"]["snapshots"] = json.dumps(about)
    refused(Checkpoints.load, written(tmp_path / "a", header, data))
    for key in set(change) - {"conv", "tokens"}:
        del about["b"][key]
        header["__metadata__"]["snapshots"] = json.dumps(about)
        refused(Checkpoints.load, written(tmp_path / "a", header, data))


def test_names_of_snapshots(tmp_path: Path) -> None:
    checkpoints().save(tmp_path / "a")
    header, data = parts(tmp_path / "a")
    about = json.loads(header["__metadata__"]["snapshots"])
    for other in (
        {"a": about["a"]},
        {**about, "c": about["a"]},
        {**about, "": about["a"]},
        [about],
        {"a": 3},
    ):
        header["__metadata__"]["snapshots"] = json.dumps(other)
        refused(Checkpoints.load, written(tmp_path / "other", header, data))


def test_snapshots_of_earlier_releases(tmp_path: Path) -> None:
    good = checkpoints()
    good.save(tmp_path / "a")
    header, data = parts(tmp_path / "a")
    about = json.loads(header["__metadata__"]["snapshots"])
    for facts in about.values():
        del facts["conv"]
    header["__metadata__"]["snapshots"] = json.dumps(about)
    again = Checkpoints.load(written(tmp_path / "old", header, data))
    assert all(np.array_equal(again[n].states, good[n].states) for n in good)
    assert all(np.array_equal(again[n].conv, good[n].conv) for n in good)


# ---- Threads


def together(*jobs: Callable[[], None], seconds: float = 1.0) -> None:
    """Each again and again in a thread of its own, all at once."""
    errors: list[BaseException] = []
    end, before = time.monotonic() + seconds, sys.getswitchinterval()

    def work(job: Callable[[], None]) -> None:
        try:
            while time.monotonic() < end and not errors:
                job()
        except BaseException as error:
            errors.append(error)

    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(job,)) for job in jobs]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    finally:
        sys.setswitchinterval(before)
    for error in errors:
        raise error


def test_a_prefix_store_in_threads() -> None:
    model = build("qwen3_5")
    ids, text = tokens(1, 40), tuple(tokens(1, 40)[0].tolist())
    store = PrefixStore(model, max_bytes=400 * 32)
    kept = torch.zeros(8)

    def put(seed: int) -> Callable[[], None]:
        draw = random.Random(seed)
        return lambda: (
            store.put(Checkpoint((seed, draw.randrange(10**9), *text[2:]), {"0.keys": kept})) and None
        )

    def find() -> None:
        found = store.find(ids)
        assert found is None or found.tokens == text[: len(found.tokens)]
        assert 0 <= store.nbytes <= 402 * 32

    def prefix() -> None:
        store.put(Checkpoint(text[: random.randrange(1, 39)], {"0.keys": kept}))

    together(put(1), put(2), find, find, prefix)
    assert len(store) <= 400


def test_one_cache_for_many_threads() -> None:
    """Threads ask one store for a cache of the same prompts; each gets the right one, for itself."""
    model = build("qwen3_5")
    store = PrefixStore(model)
    prompts = [torch.cat((tokens(1, 20), tokens(1, 5, seed=n)), 1) for n in range(3)]
    with adt.enable(), torch.no_grad():
        want = [model(p).logits[0, -1] for p in prompts]

        def ask(n: int) -> Callable[[], None]:
            def job() -> None:
                with torch.no_grad():
                    cache = store.cache_for(prompts[n])
                    got = model(prompts[n][:, -1:], past_key_values=cache).logits[0, -1]
                assert float((got - want[n]).abs().max()) < plain_tests.LIMIT

            return job

        together(*[ask(n) for n in (0, 1, 2, 0)])
    assert len(store) == 3


def test_snapshots_in_threads(tmp_path: Path) -> None:
    store = Checkpoints({"0": PoolCheckpoint(np.zeros((1, 1, 2, 2), np.float32), tokens=(1, 2))})
    item = store["0"]

    def change(seed: int) -> Callable[[], None]:
        draw = random.Random(seed)

        def job() -> None:
            name = str(draw.randrange(1, 200))
            store[name] = item
            store.pop(str(draw.randrange(1, 200)), None)

        return job

    def read() -> None:
        assert store.nearest([1, 2, 3]) is not None
        assert all(x is item for x in store.values())
        assert all(x is item for _, x in store.items())
        assert len([*store]) >= 1

    together(change(1), change(2), read, lambda: store.save(tmp_path / "a"))
    assert len(Checkpoints.load(tmp_path / "a")) >= 1
    store.clear()
    assert not store
