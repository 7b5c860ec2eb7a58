"""Models of Transformers that train under `enable()`: every call of a linear layer runs the mixer and its native
backward pass, and losses and gradients are those of Transformers' own layers.

The first tests are what Transformers' suite asks of every model that trains (its test_training, test_training_gradient_
checkpointing with both kinds, test_retain_grad_hidden_states_attentions, test_training_overfit), written anew.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import test_transformers as plain  # noqa: E402
from anydelta.backends.cpu import gradients as native  # noqa: E402
from test_transformers import LAYER, adt, build, mixed, tokens  # noqa: E402

family = plain.family
IDS = tokens(2, 20)
LINEAR = 3
"""Linear layers of each model."""


@pytest.fixture(autouse=True)
def _gradients() -> Iterator[None]:
    """As others' suites run: with gradients, and with nothing replaced afterwards."""
    with torch.enable_grad():
        yield
    adt.disable()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each call of the native backward pass."""
    found: list[int] = []
    run = native.mixer_gradients

    def counting(*arguments: Any) -> Any:
        found.append(1)
        return run(*arguments)

    monkeypatch.setattr(native, "mixer_gradients", counting)
    return found


def passed_on() -> dict[str, int]:
    return dict(adt.status().passed_on)


def loss_of(model: Any, ids: Any = IDS, **more: Any) -> Any:
    return model(ids, labels=ids, **more).loss


def gradients(model: Any, run: Callable[[Any], Any] = loss_of) -> dict[str, Any]:
    model.zero_grad()
    run(model).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def same(got: dict[str, Any], want: dict[str, Any], error: float = 1e-4) -> None:
    assert got.keys() == want.keys()
    for name, x in want.items():
        assert float((got[name] - x).norm()) <= error * float(x.norm()) + 1e-8, name


def test_training(family: str, calls: list[int]) -> None:
    """With a cache, which a model in training makes unless it is told not to, and without."""
    model = build(family).train()
    for run in (loss_of, partial(loss_of, use_cache=False)):
        want = gradients(model, run)
        before, left = mixed(family), passed_on()
        with adt.enable():
            got = gradients(model, run)
        assert mixed(family) - before == LINEAR
        assert passed_on() == left
        assert len(calls) == LINEAR
        calls.clear()
        same(got, want)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(family: str, reentrant: bool, calls: list[int]) -> None:
    """The first pass of the reentrant kind runs without gradients, the second with."""
    model = build(family).train()
    want = gradients(model)
    try:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    except ValueError as error:  # a family that has none
        pytest.skip(str(error))
    model.enable_input_require_grads()
    before, left = mixed(family), passed_on()
    with adt.enable(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about inputs without gradients
        got = gradients(model)
    assert mixed(family) - before == 2 * LINEAR
    assert passed_on() == left
    assert len(calls) == LINEAR
    same(got, want)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_under_autocast(family: str, reentrant: bool, calls: list[int]) -> None:
    """The second pass has the types of the first (pytorch#141896), as far as Transformers' own layers do.

    Those of olmo_hybrid round elsewhere in the second pass: with them alone gradients differ by 1%.
    """

    def run(model: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return loss_of(model)

    def twice() -> list[dict[str, torch.Tensor]]:
        model = build(family).train()
        want = gradients(model, run)
        try:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        except ValueError as error:
            pytest.skip(str(error))
        model.enable_input_require_grads()
        return [want, gradients(model, run)]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock = twice()
        with adt.enable():
            want, got = twice()
    assert len(calls) == 2 * LINEAR
    spread = max(apart(stock[1][name], grad) for name, grad in stock[0].items())
    assert max(apart(got[name], grad) for name, grad in want.items()) <= 1e-3 + 2 * spread


def apart(got: torch.Tensor, want: torch.Tensor) -> float:
    """How far a gradient is from another, relative to it."""
    return float((got - want).norm()) / (float(want.norm()) + 1e-8)


def test_hidden_states_retain_their_gradients(family: str, calls: list[int]) -> None:
    model = build(family).train()
    found = []
    for enabled in (False, True):
        if enabled:
            adt.enable()
        outputs = model(IDS, output_hidden_states=True)
        states = [x for x in outputs.hidden_states if x.requires_grad]
        for x in states:
            x.retain_grad()
        outputs.logits[0, -1].square().sum().backward()
        found.append([x.grad for x in states])
    assert len(calls) == LINEAR
    assert any(x is not None and x.any() for x in found[0])
    for got, want in zip(found[1], found[0], strict=True):
        assert (got is None) == (want is None)
        assert got is None or float((got - want).norm()) <= 1e-4 * float(want.norm()) + 1e-8


def test_overfits_a_sentence(family: str, calls: list[int]) -> None:
    """Thirty steps on one sentence, each loss as with Transformers' layers."""
    first = build(family).train()
    with torch.no_grad():
        for p in first.parameters():  # undo what `build` does to show errors: these weights do not train
            if p.ndim == 2:
                p.div_(4)
    losses: list[list[float]] = []
    for enabled in (False, True):
        model = copy.deepcopy(first)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        before = mixed(family)
        if enabled:
            adt.enable()
        losses.append([])
        for _ in range(30):
            optimizer.zero_grad()
            value = loss_of(model, IDS[:1])
            value.backward()
            optimizer.step()
            losses[-1].append(float(value))
    assert mixed(family) - before == 30 * LINEAR
    assert len(calls) == 30 * LINEAR
    assert losses[1][-1] < 0.6 * losses[1][0]
    for ours, theirs in zip(losses[1][:10], losses[0][:10], strict=True):
        assert abs(ours - theirs) < 1e-3 * theirs


def test_left_padding(family: str, calls: list[int]) -> None:
    model = build(family).train()
    mask = torch.ones_like(IDS)
    mask[0, :6] = 0

    def run(model: Any) -> Any:
        return loss_of(model, attention_mask=mask)

    want = gradients(model, run)
    with adt.enable():
        same(gradients(model, run), want)
    assert len(calls) == LINEAR


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(family: str, dtype: Any, calls: list[int]) -> None:
    """No further from float32 than Transformers' layers, in training and in evaluation."""
    model = build(family).train()

    def run(model: Any) -> Any:
        with torch.autocast("cpu", dtype):
            return loss_of(model)

    exact, theirs = gradients(model), gradients(model, run)
    before, left = mixed(family), passed_on()
    with adt.enable():
        ours = gradients(model, run)
        assert (mixed(family) - before, len(calls)) == (LINEAR, LINEAR)
        assert passed_on() == left
        with torch.no_grad():
            run(model)
            with torch.autocast("cpu", dtype):
                cache = model(IDS[:, :9], use_cache=True).past_key_values
                model(IDS[:, 9:10], past_key_values=cache)
        assert mixed(family) - before == 4 * LINEAR
    assert ours.keys() == exact.keys()

    def error(found: dict[str, Any]) -> float:
        whole = sum(float((found[n] - x).square().sum()) for n, x in exact.items())
        return (whole / sum(float(x.square().sum()) for x in exact.values())) ** 0.5

    assert error(ours) <= 1.5 * error(theirs) + 1e-3


def test_bfloat16(family: str, calls: list[int]) -> None:
    model = build(family).train()
    exact = gradients(model)
    half = copy.deepcopy(model).bfloat16()
    with adt.enable():
        ours = gradients(half)
    theirs = gradients(half)
    assert len(calls) == LINEAR
    for name, want in exact.items():
        assert ours[name].dtype == torch.bfloat16
        errors = [float((found[name].float() - want).norm()) for found in (ours, theirs)]
        assert errors[0] <= 2 * errors[1] + 0.1 * float(want.norm()), name


@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters(family: str, checkpointing: bool, calls: list[int]) -> None:
    """LoRA of peft on all linear layers: gradients of the adapters alone."""
    peft = pytest.importorskip("peft")
    model = build(family)
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(model, config).train()
        if checkpointing:
            try:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
            except ValueError as error:
                pytest.skip(str(error))
            model.enable_input_require_grads()
        want = gradients(model)
        before, left = mixed(family), passed_on()
        with adt.enable():
            got = gradients(model)
    assert mixed(family) - before == LINEAR * (1 + checkpointing)
    assert passed_on() == left
    assert len(calls) == LINEAR
    assert all("lora_" in name for name in want)
    same(got, want)


def test_accelerate(family: str, calls: list[int]) -> None:
    """A step of its loop, with accumulation and mixed precision."""
    accelerate = pytest.importorskip("accelerate")
    found = []
    for enabled in (False, True):
        if enabled:
            adt.enable()
        model = build(family).train()
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        model, optimizer = accelerator.prepare(model, optimizer)
        for row in IDS.split(1):
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, row))
                optimizer.step()
                optimizer.zero_grad()
        found.append({n: p.detach().clone() for n, p in model.named_parameters()})
    assert len(calls) == 2 * LINEAR
    same(found[1], found[0])


def test_packed_rows(family: str, calls: list[int]) -> None:
    """Of two rows side by side, the gradients of both alone."""
    if family in ("qwen4_exp", "glm5_next"):
        pytest.skip("its other layers mix packed rows")
    model = build(family).train()
    ids = IDS.reshape(1, -1)
    cu = torch.tensor([0, 20, 40], dtype=torch.int32)
    more = dict(
        cu_seq_lens_q=cu, cu_seq_lens_k=cu, max_length_q=20, max_length_k=20,
        position_ids=torch.arange(20).repeat(2)[None], use_cache=False,
    )  # fmt: skip
    with adt.enable():
        before = mixed(family)
        got = gradients(model, lambda m: m(ids, **more).logits.square().mean())
        assert mixed(family) - before == LINEAR
        want = gradients(model, lambda m: m(IDS, use_cache=False).logits.square().mean())
    assert len(calls) == 2 * LINEAR
    same(got, want, 1e-3)


def test_frozen_but_one_weight(family: str, calls: list[int]) -> None:
    """The layer with it and those above have a backward pass, those below only a forward pass."""
    model = build(family).train()
    layers = [m for m in model.modules() if type(m).__name__ in LAYER.values()]
    model.requires_grad_(False)
    layers[1].conv1d.weight.requires_grad_()
    want = gradients(model)
    before = mixed(family)
    with adt.enable():
        got = gradients(model)
    assert mixed(family) - before == LINEAR
    assert len(calls) == LINEAR - 1
    assert len(want) == 1
    same(got, want)


def test_gradients_through_a_cache(family: str, calls: list[int]) -> None:
    """A second chunk, whose states carry the first one's gradients."""
    model = build(family).train()

    def run(model: Any) -> Any:
        cache = transformers.DynamicCache(config=model.config)
        model(IDS[:, :9], past_key_values=cache, use_cache=True)
        return model(IDS[:, 9:], past_key_values=cache, use_cache=True).logits.square().mean()

    with adt.enable():
        got = gradients(model, run)
    assert len(calls) == 2 * LINEAR
    whole = gradients(model, lambda m: m(IDS).logits[:, 9:].square().mean())
    same(got, whole)


def _train_a_share(rank: int, folder: str, how: str) -> None:
    """What each of two processes runs."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2, timeout=timedelta(minutes=3)
    )
    model = build("qwen3_5").train()
    if how == "sharded":
        mesh = init_device_mesh("cpu", (2,))
        model.gradient_checkpointing_enable()
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    else:
        model = DistributedDataParallel(model)
    ids = tokens(4, 9)[2 * rank : 2 * rank + 2]
    with torch.enable_grad(), adt.enable():
        loss_of(model, ids, use_cache=False).backward()
    assert mixed("qwen3_5") == LINEAR * (1 + (how == "sharded")), passed_on()
    found = {n.removeprefix("module."): p.grad for n, p in model.named_parameters()}
    if how == "sharded":
        found = {n: grad.full_tensor() for n, grad in found.items()}
    if rank == 0:
        torch.save(found, f"{folder}/gradients.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("how", ["replicated", "sharded"])
def test_two_processes(how: str, tmp_path: Path) -> None:
    """DDP, and FSDP2 with gradient checkpointing, where a layer's weights are whole only while it runs."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    torch.multiprocessing.spawn(_train_a_share, (str(tmp_path), how), nprocs=2)
    want = gradients(build("qwen3_5").train(), lambda m: loss_of(m, tokens(4, 9), use_cache=False))
    same(torch.load(tmp_path / "gradients.pt"), want)


@pytest.mark.parametrize("scope", ["all models", "one model"])
def test_compiled(scope: str) -> None:
    """Without a graph break, forward and backward; the rule is anydelta's operator."""
    model = build("qwen3_5").train()
    want = gradients(model, lambda m: loss_of(m, use_cache=False))
    taken = adt.status().taken
    with adt.enable() if scope == "all models" else adt.enable(model):
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        got = gradients(model, lambda _: loss_of(compiled, use_cache=False))
    assert adt.status().taken == taken  # compiled calls are not counted
    same(got, want)
