"""enable() and disable(): blocks that overlap, copies, and other code around our forward."""

from __future__ import annotations

import copy
import functools
import importlib
import io
import pickle
import random
import sys
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import anydelta.integrations.transformers as adt  # noqa: E402
import test_transformers as plain_tests  # noqa: E402
from anydelta.integrations.switch import Patch, Place, Switch  # noqa: E402
from anydelta.integrations.transformers.cache import RollbackCache  # noqa: E402
from conftest import without  # noqa: E402
from test_transformers import LIMIT, build, counts, prefill, tokens  # noqa: E402

drafts = pytest.mark.skipif(
    plain_tests.VERSION < (5, 20), reason="drafting with hybrid models takes transformers 5.20 or later"
)


@pytest.fixture(params=plain_tests.FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def _leave_no_trace() -> Iterator[None]:
    with torch.no_grad():
        yield
    assert not adt.status().everywhere


def is_on() -> bool:
    return adt.status().everywhere


def layers_of(model: Any) -> list[Any]:
    kinds = set(plain_tests.LAYER.values())
    return [m for m in model.modules() if type(m).__name__ in kinds]


def runs_ours(model: Any) -> bool:
    """Whether all of its layers do, by what `status` says and by what is counted; or none."""
    listed = len(adt.status(model).layers)
    taken = counts()[0]
    prefill(model)
    assert listed in (0, len(layers_of(model)))
    assert (counts()[0] > taken) == bool(listed)
    return bool(listed)


IDS = torch.randint(8, 90, (1, 9), generator=torch.Generator().manual_seed(0)).repeat(1, 3)


def text(model: Any, **how: Any) -> Any:
    return model.generate(
        IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=12, do_sample=False, eos_token_id=None, **how
    )


def drafts_right(model: Any) -> None:
    assert torch.equal(text(model, prompt_lookup_num_tokens=4), text(model))


# ---- Blocks


def test_blocks_of_two_threads_that_end_in_another_order() -> None:
    begun, second, ended = threading.Event(), threading.Event(), threading.Event()

    def first() -> None:
        with adt.enable():
            begun.set()
            second.wait()
        ended.set()

    thread = threading.Thread(target=first)
    thread.start()
    begun.wait()
    with adt.enable():
        second.set()
        ended.wait()
        assert is_on()
    thread.join()
    assert not is_on()


def test_blocks_of_generators_and_exit_stacks() -> None:
    def steps() -> Iterator[bool]:
        with adt.enable():
            yield is_on()

    a, b = steps(), steps()
    assert next(a)
    assert next(b)
    a.close()
    assert is_on()
    b.close()
    assert not is_on()

    stack, other = ExitStack(), ExitStack()
    stack.enter_context(adt.enable())
    other.push(adt.enable())  # without __enter__
    stack.close()
    assert is_on()
    other.close()
    assert not is_on()


def test_of_the_calls_in_force_the_one_that_began_last_decides() -> None:
    """Blocks of both kinds, entered and ended in every order, against a list of those in force."""
    draw = random.Random(0)
    model = build("qwen3_5")
    for what in (None, model):
        in_force: list[tuple[bool, Switch]] = []
        for _ in range(400):
            if draw.random() < 0.5 and len(in_force) < 6:
                on = draw.random() < 0.6
                in_force.append((on, (adt.enable if on else adt.disable)(what).__enter__()))
            elif in_force:
                in_force.pop(draw.randrange(len(in_force)))[1].__exit__(None, None, None)
            now = is_on() if what is None else bool(adt.status(what).layers)
            assert now == (bool(in_force) and in_force[-1][0])
        for _, switch in in_force:
            switch.__exit__(None, None, None)
    assert not adt.status(model).layers


def test_plain_calls_among_blocks() -> None:
    first = adt.enable().__enter__()
    adt.disable()  # turns off the block that is under way as well
    assert not is_on()
    with adt.enable():
        assert is_on()
    first.__exit__(None, None, None)
    assert not is_on()
    with adt.enable():
        adt.enable()
    assert is_on()  # the plain call stands
    with adt.disable():
        assert not is_on()
    assert is_on()
    adt.disable()
    assert not is_on()


def test_a_switch_can_be_entered_again() -> None:
    switch = adt.enable()
    for _ in range(2):
        with switch:
            assert is_on()
            with switch:
                assert is_on()
            assert is_on()
        assert not is_on()


def test_plain_calls_do_not_pile_up() -> None:
    place = Place(lambda on: ())
    for _ in range(50):
        Switch(True, [place])
        Switch(False, [place])
    assert len(place._calls) <= 2
    assert not place.on


def test_blocks_in_threads_that_race() -> None:
    """Whoever is inside a block finds it on, whatever the others do; after all of them it is off."""
    model = build("qwen3_5")
    off: list[str] = []
    before = sys.getswitchinterval()

    def work(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(60):
            one = draw.random() < 0.5
            with adt.enable(model if one else None):
                for _ in range(draw.randrange(4)):
                    if not (adt.status(model).layers if one else is_on()):
                        off.append("model" if one else "all")

    adt.status()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    finally:
        sys.setswitchinterval(before)
    assert not off
    assert not is_on()
    assert not adt.status(model).layers


def test_blocks_of_one_model_overlap() -> None:
    model, other = build("qwen3_5"), build("qwen3_5", seed=1)
    plain = prefill(model)
    a, b = adt.enable(model).__enter__(), adt.enable(model).__enter__()
    with adt.enable(other):
        a.__exit__(None, None, None)
        assert runs_ours(model)
        assert runs_ours(other)
    assert not runs_ours(other)
    b.__exit__(None, None, None)
    assert not runs_ours(model)
    assert torch.equal(prefill(model), plain)


def test_a_class_gets_back_the_methods_it_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own, and those that it inherits."""
    module = importlib.import_module("transformers.models.qwen3_5.modeling_qwen3_5")
    kinds = [module.Qwen3_5ForConditionalGeneration, module.Qwen3_5ForCausalLM]
    own = kinds[0].prepare_inputs_for_generation
    monkeypatch.setattr(kinds[0], "prepare_inputs_for_generation", lambda *args, **how: own(*args, **how))
    before = [dict(vars(kind)) for kind in kinds]
    for _ in range(2):
        with adt.enable():
            assert [dict(vars(kind)) for kind in kinds] != before
        assert [dict(vars(kind)) for kind in kinds] == before


# ---- accelerate


def accelerate() -> Any:
    try:
        return importlib.import_module("accelerate")
    except ImportError:
        return without("accelerate is not installed")


@drafts
@pytest.mark.parametrize("scope", ["all", "one"])
def test_hooks_of_accelerate_that_were_there_before(family: str, scope: str) -> None:
    hooks = accelerate().hooks
    model = build(family)
    want = text(model)
    for module in model.modules():  # as a device_map of several devices does
        hooks.add_hook_to_module(module, hooks.ModelHook())
    before = [dict(vars(m)) for m in layers_of(model)]
    for _ in range(2):
        taken = dict(adt.status().taken)
        with adt.enable(model if scope == "one" else None):
            assert torch.equal(text(model), want)
            assert torch.equal(text(model, prompt_lookup_num_tokens=4), want)
            assert runs_ours(model)
        name = f"{family}.mixer"
        assert adt.status().taken[name] > taken.get(name, 0)
        assert not runs_ours(model)
    assert [dict(vars(m)) for m in layers_of(model)] == before


@drafts
@pytest.mark.parametrize("scope", ["all", "one"])
def test_hooks_of_accelerate_that_came_later(scope: str) -> None:
    """Added while on and removed while off, and the other way round: what runs follows the switch."""
    hooks = accelerate().hooks
    model = build("qwen3_5")
    plain = prefill(model)
    with adt.enable(model if scope == "one" else None):
        for layer in layers_of(model):
            hooks.add_hook_to_module(layer, hooks.ModelHook())
        assert runs_ours(model)
        drafts_right(model)
    assert not runs_ours(model)
    assert torch.equal(prefill(model), plain)
    with adt.enable(model if scope == "one" else None):
        assert runs_ours(model)
        for layer in layers_of(model):
            hooks.remove_hook_from_module(layer)
        assert runs_ours(model)
        drafts_right(model)
    assert not runs_ours(model)
    assert torch.equal(prefill(model), plain)
    with adt.enable(model if scope == "one" else None):
        assert runs_ours(model)


@drafts
def test_offloaded_layers(tmp_path: Any) -> None:
    """Weights that come from the disk for each call: ours or Transformers' own, but the text is right."""
    model = build("qwen3_5")
    want = text(model)
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(4)}
    accelerate().dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    for what in (None, model):
        with adt.enable(what):
            assert torch.equal(text(model), want)
            assert torch.equal(text(model, prompt_lookup_num_tokens=4), want)


@drafts
def test_drafting_with_all_offloaded_is_refused() -> None:
    model = build("qwen3_5")
    want = text(model)
    accelerate().cpu_offload(model, execution_device=torch.device("cpu"))
    with adt.enable():
        assert torch.equal(text(model), want)
        with pytest.raises(ValueError, match="requires a model whose first weights are on a device"):
            text(model, prompt_lookup_num_tokens=4)


# ---- Copies


def saved(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    return lambda: torch.load(io.BytesIO(file.getvalue()), weights_only=False)


def pickled(model: Any) -> Any:
    data = [pickle.dumps(model, protocol) for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1)]
    assert not any(b"anydelta" in x for x in data)
    return lambda: pickle.loads(data[0])


@drafts
@pytest.mark.parametrize("save", [saved, pickled])
@pytest.mark.parametrize("scope", ["all", "one"])
def test_a_loaded_model_follows_the_switch(scope: str, save: Callable[[Any], Callable[[], Any]]) -> None:
    model = build("qwen3_5")
    want = prefill(model)
    with adt.enable(model if scope == "one" else None):
        load = save(model)
    loaded = load()  # while off
    assert type(loaded) is type(model)
    assert not runs_ours(loaded)
    assert torch.equal(prefill(loaded), want)
    for what in (None, loaded):
        with adt.enable(what):
            assert runs_ours(loaded)
            drafts_right(loaded)
        assert not runs_ours(loaded)
    with adt.enable():
        loaded = load()
        assert runs_ours(loaded)
        drafts_right(loaded)
    assert not runs_ours(loaded)
    assert torch.equal(prefill(loaded), want)


@drafts
def test_a_copied_model_is_switched_by_itself() -> None:
    model = build("qwen3_5")
    want = prefill(model)
    with adt.enable(model):
        other = copy.deepcopy(model)
    assert not runs_ours(model)
    assert runs_ours(other)
    drafts_right(other)
    with adt.enable(other):
        assert runs_ours(other)
    assert runs_ours(other)
    with adt.disable(other):
        assert not runs_ours(other)
    adt.disable(other)
    assert not runs_ours(other)
    assert torch.equal(prefill(other), want)
    assert type(other) is type(model)


def test_a_shallow_copy_of_a_layer_runs_itself() -> None:
    model = build("qwen3_5")
    layer, x = layers_of(model)[0], torch.randn(1, 5, model.config.hidden_size)
    with adt.enable(model):
        alone = copy.copy(layer)
        alone._modules = dict(layer._modules, out_proj=torch.nn.Linear(layer.out_proj.in_features, 3))
        taken = counts()[0]
        assert alone(x).shape == (1, 5, 3)
        assert counts()[0] > taken
        assert layer(x).shape == x.shape


def test_a_pickled_layer() -> None:
    model = build("qwen3_5")
    layer, x = layers_of(model)[0], torch.randn(1, 5, model.config.hidden_size)
    want = layer(x)
    with adt.enable(model):
        data = pickle.dumps(layer)
    alone = pickle.loads(data)
    assert torch.equal(alone(x), want)
    with adt.enable(alone):
        taken = counts()[0]
        assert float((alone(x) - want).abs().max()) < LIMIT
        assert counts()[0] > taken
        assert adt.status(alone).layers == ("",)


# ---- Forwards of others


@drafts
@pytest.mark.parametrize("scope", ["all", "one"])
def test_a_layer_with_a_forward_of_its_own(scope: str) -> None:
    """It is not ours, and status says so; drafting is refused with that reason, before anything runs."""
    model = build("qwen3_5")
    layer, stock = layers_of(model)[0], layers_of(model)[0].forward
    layer.forward = lambda *args, **kwargs: stock(*args, **kwargs)
    want = text(model)
    cache = RollbackCache(config=model.config)
    with pytest.warns(RuntimeWarning, match="its own forward") if scope == "one" else nullcontext():
        switch = adt.enable(model if scope == "one" else None)
    with switch:
        assert len(adt.status(model).layers) == 2
        assert torch.equal(text(model), want)
        for how in ({}, {"past_key_values": cache}):
            with pytest.raises(
                ValueError, match=r"its own forward in model\.layers\.0\.linear_attn\. Enable"
            ):
                text(model, prompt_lookup_num_tokens=4, **how)
        assert cache.get_seq_length() == 0
        del layer.forward
        drafts_right(model)


@drafts
def test_a_subclass_with_a_forward_of_its_own() -> None:
    model = build("qwen3_5")
    layer = layers_of(model)[0]
    seen: list[int] = []

    class Mine(type(layer)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            seen.append(1)
            return super().forward(*args, **kwargs)

    layer.__class__ = Mine
    with adt.enable():
        drafts_right(model)
        assert len(adt.status(model).layers) == 3
    seen.clear()
    with pytest.warns(RuntimeWarning, match="a Mine already has its own forward"):
        switch = adt.enable(model)
    with switch:
        prefill(model)
        assert seen == [1]
        with pytest.raises(ValueError, match="its own forward"):
            text(model, prompt_lookup_num_tokens=4)


class Wrapped:
    def __init__(self, forward: Any):
        self.inner = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


def closed(forward: Any) -> Any:
    return lambda *args, **kwargs: forward(*args, **kwargs)


WRAPPERS = {
    "functools.wraps": lambda forward: functools.wraps(forward)(closed(forward)),
    "closure": closed,
    "partial": lambda forward: functools.partial(closed(forward)),
    "object": Wrapped,
    "method": lambda forward: Wrapped(forward).__call__,
    "torch.compiler.disable": torch.compiler.disable,
    "itself": lambda forward: forward,
}


@drafts
@pytest.mark.parametrize("scope", ["all", "one"])
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapper_around_our_forward_follows_the_switch(scope: str, wrap: Any) -> None:
    model = build("qwen3_5")
    want = prefill(model)
    with adt.enable(model if scope == "one" else None):
        for layer in layers_of(model):
            layer.forward = wrap(layer.forward)
        assert runs_ours(model)
        drafts_right(model)
    assert not runs_ours(model)
    assert torch.equal(prefill(model), want)
    for what in (model, None) if scope == "one" else (None,):
        with adt.enable(what):
            assert runs_ours(model)
            drafts_right(model)
    assert torch.equal(prefill(model), want)


def test_a_wrapper_around_what_is_in_the_module_follows_the_switch() -> None:
    """The function, the class's forward and a method of generate: they stay, with a warning, and run stock."""
    module = importlib.import_module("transformers.models.qwen3_5.modeling_qwen3_5")
    model = build("qwen3_5").float()
    want, prompt = prefill(model), tokens(1, 9)
    places = [
        (module, "causal_conv1d_fn"),
        (module, "torch_chunk_gated_delta_rule"),
        (module.Qwen3_5GatedDeltaNet, "forward"),
        (module.Qwen3_5ForCausalLM, "generate"),
    ]
    before = [vars(owner).get(name) for owner, name in places]
    try:
        adt.enable()
        for owner, name in places:
            setattr(owner, name, functools.wraps(getattr(owner, name))(closed(getattr(owner, name))))
        assert runs_ours(model)
        with pytest.warns(RuntimeWarning, match="was replaced by other code") as told:
            adt.disable()
        assert len(told) == len(places)
        assert {warning.filename for warning in told} == {__file__}
        taken = counts()
        assert torch.equal(prefill(model), want)
        model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=3)
        assert counts() == taken
        with adt.enable():
            assert runs_ours(model)
    finally:
        for (owner, name), function in zip(places, before, strict=True):
            if function is None:
                delattr(owner, name)
            else:
                setattr(owner, name, function)
    with adt.enable():
        assert runs_ours(model)
    assert torch.equal(prefill(model), want)


@drafts
def test_a_class_derived_from_ours_stays_and_follows_the_switch() -> None:
    """torch's parametrizations give a module a class of its own."""
    model = build("qwen3_5")
    want = prefill(model)
    layer = layers_of(model)[0]
    with adt.enable(model):
        layer.__class__ = types.new_class("Derived", (type(layer),))
        assert len(adt.status(model).layers) == 3
        drafts_right(model)
    assert not adt.status(model).layers
    taken = counts()[0]
    assert torch.equal(prefill(model), want)
    assert counts()[0] == taken
    with adt.enable(model):
        assert len(adt.status(model).layers) == 3
    assert not adt.status(model).layers


class Unchanged(torch.nn.Module):
    """A parametrization."""

    def forward(self, x: Any) -> Any:
        return x * 1


@pytest.mark.parametrize("when", ["before", "while on"])
@pytest.mark.parametrize(
    "family", ["qwen3_next", "qwen3_5", "olmo_hybrid"]
)  # with a parameter in the layer itself
def test_a_parametrization_that_is_taken_off(family: str, when: str) -> None:
    from torch.nn.utils import parametrize

    model = build(family)
    layer = layers_of(model)[0]
    kind = type(layer)
    if when == "before":
        parametrize.register_parametrization(layer, "A_log", Unchanged())
    adt.enable(model)
    if when == "while on":
        parametrize.register_parametrization(layer, "A_log", Unchanged())
        adt.disable(model)
    parametrize.remove_parametrizations(layer, "A_log")
    assert runs_ours(model) == (when == "before")
    adt.disable(model)
    assert not runs_ours(model)
    assert type(layer) is kind


@drafts
@pytest.mark.parametrize("mode", [{"prompt_lookup_num_tokens": 4}, {"assistant_early_exit": 4}])
def test_a_draft_that_is_switched_off_says_so(mode: dict[str, Any]) -> None:
    model = build("qwen3_5")

    class SwitchesOff:
        puts = 0

        def put(self, _: Any) -> None:
            self.puts += 1
            if self.puts == 2:  # behind the prompt and a round
                adt.disable()

        def end(self) -> None: ...

    adt.enable()
    try:
        with pytest.raises(ValueError, match=r"requires anydelta to stay enabled while it drafts"):
            text(model, streamer=SwitchesOff(), **mode)
    finally:
        adt.disable()


def test_a_patch_of_what_a_module_loads_late_and_of_a_static_method() -> None:
    late = types.ModuleType("late")
    late.__getattr__ = {"double": lambda x: 2 * x}.__getitem__  # type: ignore[method-assign]
    patch = Patch(late, "double", lambda theirs: lambda x: theirs(x) + 1)
    patch.put()
    assert late.double(3) == 7
    assert patch.take() == []
    assert late.double(3) == 6

    class Owner:
        @staticmethod
        def double(x: int) -> int:
            return 2 * x

    patch = Patch(Owner, "double", lambda theirs: staticmethod(lambda x: theirs(x) + 1))
    patch.put()
    assert Owner.double(3) == Owner().double(3) == 7
    assert patch.take() == []
    assert Owner().double(3) == 6
