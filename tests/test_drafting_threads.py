"""Drafting writes nothing to what several calls share: each text in several threads is as if alone, and a call that
is cut short leaves nothing behind."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from transformers import LogitsProcessor, StoppingCriteria  # noqa: E402

import anydelta.integrations.transformers as adt  # noqa: E402
import test_speculative as speculative  # noqa: E402
import test_transformers as plain_tests  # noqa: E402
from anydelta.integrations.transformers.cache import RollbackCache  # noqa: E402
from test_speculative import MODES, drafting, greedy, tokens  # noqa: E402

if plain_tests.VERSION < (5, 20):
    pytest.skip("drafting with hybrid models takes transformers 5.20 or later", allow_module_level=True)

LENGTHS = (6, 11, 17)


@pytest.fixture(scope="module")
def tiny() -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(speculative.TINY).eval()


@pytest.fixture(autouse=True)
def _settings(tiny: Any) -> Iterator[None]:
    threads, interval = torch.get_num_threads(), sys.getswitchinterval()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    tiny.generation_config.num_assistant_tokens = None
    torch.set_num_threads(threads)
    sys.setswitchinterval(interval)


def together(*jobs: Callable[[], Any]) -> list[Any]:
    """What the jobs return, each in a thread, with as many changes from one to another as Python makes."""
    found: list[Any] = [None] * len(jobs)
    begin = threading.Barrier(len(jobs))

    def run(n: int) -> None:
        begin.wait()
        try:
            found[n] = jobs[n]()
        except Exception as error:
            found[n] = error

    sys.setswitchinterval(1e-5)
    threads = [threading.Thread(target=run, args=(n,)) for n in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("one", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_texts_in_threads_are_those_alone(tiny: Any, mode: str, one: bool) -> None:
    """Three texts that draft, and two that do not, on one model."""
    prompts = [tokens(length, length) for length in LENGTHS]
    with adt.enable(tiny) if one else adt.enable():
        want = [greedy(tiny, ids, 24) for ids in prompts]
        options = drafting(tiny, tiny, mode, 3)
        for _ in range(2):
            jobs = [functools.partial(greedy, tiny, ids, 24, **options) for ids in prompts]
            jobs += [functools.partial(greedy, tiny, ids, 24) for ids in prompts[:2]]
            for got, text in zip(together(*jobs), want + want[:2], strict=True):
                assert torch.equal(got, text)


def test_mtp_layers_are_read_once(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from anydelta.integrations.transformers import mtp as mtp

    read: list[int] = []
    ours = mtp._read
    monkeypatch.setattr(mtp, "_mtp_models", type(mtp._mtp_models)())
    monkeypatch.setattr(mtp, "_read", lambda *args: read.append(1) or ours(*args))
    with adt.enable():
        want = greedy(tiny, tokens(9), 8)
        jobs = [
            functools.partial(greedy, tiny, tokens(9), 8, use_mtp=True, num_assistant_tokens=n)
            for n in (2, 3, 4)
        ]
        assert all(torch.equal(got, want) for got in together(*jobs))
    assert read == [1]


def test_mtp_follows_changed_embeddings_and_types(tiny: Any) -> None:
    """The weights are read once, but those of the model, as they are now, are used beside them."""
    import copy

    from anydelta.integrations.transformers.generate import counting

    model, ids = copy.deepcopy(tiny), tokens(9)
    with adt.enable():
        for change in (
            lambda m: m,
            lambda m: m.set_output_embeddings(copy.deepcopy(m.lm_head)),
            lambda m: m.bfloat16(),
        ):
            change(model)
            want = greedy(model, ids, 24)
            with counting() as rounds:
                assert torch.equal(greedy(model, ids, 24, use_mtp=True), want)
            assert sum(accepted for _, accepted in rounds) > 4


# ---- Calls that are cut short


def trace(model: Any) -> Any:
    """All that its modules hold, by identity, and what its configurations say."""
    own = {
        name: {
            key: [(k, id(v)) for k, v in value.items()] if isinstance(value, dict) else id(value)
            for key, value in vars(module).items()
        }
        for name, module in model.named_modules()
    }
    return own, model.config.to_dict(), model.generation_config.to_dict()


class Cut(BaseException):
    """As KeyboardInterrupt: nobody catches it."""


class Cutter:
    """A streamer, or a hook, that ends the call at its n-th turn."""

    def __init__(self, turns: int):
        self.turns = turns

    def turn(self, *_: Any, **__: Any) -> None:
        self.turns -= 1
        if self.turns < 0:
            raise Cut

    put = end = turn


class CuttingCriterion(Cutter, StoppingCriteria):
    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        self.turn()
        return torch.zeros(1, dtype=torch.bool)


class CuttingProcessor(Cutter, LogitsProcessor):
    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self.turn()
        return scores


@pytest.mark.parametrize("where", ["streamer", "criterion", "processor", "layer"])
@pytest.mark.parametrize("mode", MODES)
def test_a_call_that_is_cut_short_leaves_nothing(tiny: Any, mode: str, where: str) -> None:
    ids, layer = tokens(9).repeat(1, 2), tiny.model.layers[2]
    with adt.enable():
        options = drafting(tiny, tiny, mode, 3)
        want = greedy(tiny, ids, 12)
        greedy(
            tiny, ids, 12, **options
        )  # MTP layers are read, and Transformers puts its hooks for hidden states
        before = trace(tiny)
        for turns in (0, 1, 3):
            cutter: Any = {"criterion": CuttingCriterion, "processor": CuttingProcessor}.get(where, Cutter)(
                turns
            )
            more: dict[str, Any] = {
                "streamer": {"streamer": cutter},
                "criterion": {"stopping_criteria": [cutter]},
                "processor": {"logits_processor": [cutter]},
                "layer": {},
            }[where]
            hook = layer.register_forward_pre_hook(cutter.turn) if where == "layer" else None
            try:
                with pytest.raises(Cut):
                    greedy(tiny, ids, 12, **more, **options)
            finally:
                if hook is not None:
                    hook.remove()
            assert trace(tiny) == before
        assert torch.equal(greedy(tiny, ids, 12), want)
        assert torch.equal(greedy(tiny, ids, 12, **options), want)
        assert trace(tiny) == before


@pytest.mark.parametrize("mode", MODES)
def test_a_given_cache_goes_on_after_a_streamer_raised(tiny: Any, mode: str) -> None:
    ids, cache = tokens(9).repeat(1, 2), RollbackCache(config=tiny.config)
    with adt.enable():
        want = greedy(tiny, ids, 12)
        got: list[torch.Tensor] = []

        class Few(Cutter):
            def put(self, value: Any) -> None:
                got.append(value.reshape(1, -1))
                self.turn()

        with pytest.raises(Cut):
            greedy(tiny, ids, 12, past_key_values=cache, streamer=Few(2), **drafting(tiny, tiny, mode, 3))
        text = torch.cat(got, 1)
        assert torch.equal(text, want[:, : text.shape[1]])
        assert cache.get_seq_length() == text.shape[1] - 1
        rest = want.shape[1] - text.shape[1]
        assert torch.equal(greedy(tiny, text, rest, past_key_values=cache), want)


# ---- The first layers of a model


def old_forward(module: Any, *args: Any, **kwargs: Any) -> Any:
    """As accelerate's hooks call a module's forward."""
    return module._old_forward(*args, **kwargs)


def test_an_early_exit_runs_the_first_layers_alone(tiny: Any) -> None:
    """Whether the decoder has a forward of its own, as hooks of others give it, or not."""
    ran: list[int] = []
    hooks = [
        layer.register_forward_pre_hook(lambda *_, n=n: ran.append(n))
        for n, layer in enumerate(tiny.model.layers)
    ]
    for own in (False, True):
        if own:
            for module in tiny.modules():
                module._old_forward = module.forward
                module.forward = functools.update_wrapper(
                    functools.partial(old_forward, module), module.forward
                )
        with adt.enable(tiny):
            ran.clear()
            want = greedy(tiny, tokens(9), 8)
            plain = len(ran)
            ran.clear()
            assert torch.equal(greedy(tiny, tokens(9), 8, **drafting(tiny, tiny, "early exit", 3)), want)
        last = len(tiny.model.layers) - 1
        assert plain == 8 * (last + 1)
        assert 0 < ran.count(last) <= 8
        assert ran.count(3) == ran.count(0) > ran.count(4) == ran.count(last)
    for module in tiny.modules():
        del module._old_forward, module.forward
    for hook in hooks:
        hook.remove()
