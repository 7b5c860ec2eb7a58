"""Layers of Transformers whose parts are wrapped, or that somebody looks at give what Transformers gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
import torch.autograd.forward_ad as fw  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.utils import parametrizations, parametrize  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402

import test_transformers as plain  # noqa: E402
from test_transformers import LIMIT, adt, build, first_layer, mixed, tokens, why_not_mixed  # noqa: E402

family = plain.family
leave_no_trace = plain._leave_no_trace


class Half(nn.Module):
    def forward(self, weight: Any) -> Any:
        return weight * 0.5


def parametrized(layer: Any, part: str) -> None:
    parametrize.register_parametrization(getattr(layer, part), "weight", Half())


def weight_normed(layer: Any, part: str) -> None:
    parametrizations.weight_norm(getattr(layer, part), dim=0)
    with torch.no_grad():
        getattr(layer, part).parametrizations.weight.original0.mul_(0.5)


def hooked(layer: Any, part: str) -> None:
    """weight_norm as it was before parametrizations: the weight is made by a hook."""
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(getattr(layer, part), dim=0)
    with torch.no_grad():
        getattr(layer, part).weight_g.mul_(0.5)


class Wrapper(nn.Module):
    """As peft's modules_to_save: attributes of what is inside, and a copy of its own that computes."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner
        self.scale = 0.5

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._modules["inner"], name)

    def forward(self, *args: Any) -> Any:
        return self.scale * self.inner(*args)


def wrapped(layer: Any, part: str) -> None:
    setattr(layer, part, Wrapper(getattr(layer, part)))


def as_buffer(layer: Any, part: str) -> None:
    module = getattr(layer, part)
    weight = module.weight.detach() * 0.5
    del module.weight
    module.register_buffer("weight", weight)


WRAPS = {
    "parametrized": parametrized, "weight_norm": weight_normed, "weight_norm by a hook": hooked, "wrapped": wrapped,
    "a buffer": as_buffer,
}  # fmt: skip


def decode(model: Any, ids: Any) -> Any:
    cache = transformers.DynamicCache(config=model.config)
    parts = [ids[:, :4], *ids[:, 4:].split(1, 1)]
    return torch.cat([model(part, past_key_values=cache, use_cache=True).logits for part in parts], 1)


@pytest.mark.parametrize("scope", ["all models", "one model"])
@pytest.mark.parametrize("part", ["conv1d", "norm"])
@pytest.mark.parametrize("wrap", WRAPS)
def test_wrapped_parts_count(family: str, wrap: str, part: str, scope: str) -> None:
    model = build(family)
    ids, layer = tokens(1, 9), first_layer(model, family)
    if wrap == "wrapped" and part == "conv1d":
        pytest.skip("Transformers reads the weight of conv1d and never calls it")
    before = decode(model, ids)
    WRAPS[wrap](layer, part if part == "conv1d" else plain.ROWS[family].norm)
    want = decode(model, ids)
    if (wrap, part) != (
        "weight_norm by a hook",
        "conv1d",
    ):  # Transformers never calls conv1d, so no hook runs
        assert float((want - before).abs().max()) > LIMIT
    with adt.enable() if scope == "all models" else adt.enable(model):
        got = decode(model, ids)
        assert float((got - want).abs().max()) < LIMIT
        assert any(
            "its conv1d" in why or "its norm" in why or "hooks" in why for why in adt.status().passed_on
        )


def test_a_part_that_is_wrapped_between_two_steps(family: str) -> None:
    model = build(family)
    ids, layer = tokens(1, 9), first_layer(model, family)

    def run() -> Any:
        cache = transformers.DynamicCache(config=model.config)
        out = [model(ids[:, :4], past_key_values=cache, use_cache=True).logits]
        for i in range(4, 9):
            if i == 7:
                parametrized(layer, "conv1d")
            out.append(model(ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits)
        parametrize.remove_parametrizations(layer.conv1d, "weight", leave_parametrized=False)
        return torch.cat(out, 1)

    want = run()
    with adt.enable():
        assert float((run() - want).abs().max()) < LIMIT


HOOKS = ("forward_pre_hook", "forward_hook", "full_backward_pre_hook", "full_backward_hook")


@pytest.mark.filterwarnings("ignore:For backward hooks", "ignore:Full backward hook")
@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("whose", ["its norm", "all modules"])
def test_hooks_run_as_often(family: str, whose: str, kind: str) -> None:
    """Those of the backward pass too, as captum's and zennit's (pytorch#54405), and those set while decoding."""
    model = build(family)
    norm = getattr(first_layer(model, family), plain.ROWS[family].norm)
    names = {module: name for name, module in model.named_modules()}
    seen: list[str] = []

    def look(module: Any, *_: Any) -> None:
        if module in names:  # and not an activation that Transformers makes for the call
            seen.append(names[module])

    def hook() -> Any:
        if whose == "its norm":
            return getattr(norm, f"register_{kind}")(look)
        return getattr(nn.modules.module, f"register_module_{kind}")(look)

    def train(ids: Any) -> list[str]:
        seen.clear()
        handle = hook()
        with torch.enable_grad():
            model(ids, use_cache=False).logits.square().mean().backward()
        handle.remove()
        return sorted(seen)

    def generate(ids: Any) -> list[str]:
        seen.clear()
        cache = transformers.DynamicCache(config=model.config)
        parts = ids[:, :4], *ids[:, 4:].split(1, 1)
        for part in parts[:3]:
            model(part, past_key_values=cache, use_cache=True)
        handle = hook()
        for part in parts[3:]:
            model(part, past_key_values=cache, use_cache=True)
        handle.remove()
        return sorted(seen)

    ids = tokens(1, 9)
    for run in (train, generate):
        want = run(ids)
        assert (names[norm] in want) == (run is train or "backward" not in kind)
        with adt.enable():
            assert run(ids) == want


def test_peft_adapters(family: str) -> None:
    peft = pytest.importorskip("peft")
    ids, parts = tokens(1, 9), plain.ROWS[family]
    model = build(family)
    saved = parts.norm
    config = peft.LoraConfig(r=4, target_modules=[parts.out], modules_to_save=[saved])
    adapted = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                p.add_(torch.rand_like(p) / 4)
    want = decode(adapted, ids)
    for switch in (adt.enable, lambda: adt.enable(model)):
        with switch():
            assert float((decode(adapted, ids) - want).abs().max()) < LIMIT


# ---- Strided projections


class Strided(nn.Linear):
    """Its output has a stride in its last dimension."""

    def forward(self, x: Any) -> Any:
        return torch.stack((y := super().forward(x), torch.zeros_like(y)), -1)[..., 0]


def test_strided_gates(family: str) -> None:
    model = build(family)
    ids = tokens(1, 9)
    want = decode(model, ids)
    for module in model.modules():
        for name, child in list(module.named_children()):
            if name in ("in_proj_a", "in_proj_b", "in_proj_ba", "a_proj", "b_proj"):
                child.__class__ = Strided
    taken = mixed(family)
    with adt.enable():
        assert float((decode(model, ids) - want).abs().max()) < LIMIT
    assert mixed(family) > taken


def test_as_many_value_heads_as_key_heads(family: str) -> None:
    """qwen3_next then gives a and b with a stride: they lie in turns in one projection."""
    options = plain.CONFIGS[family][2]
    alike = {n: options["linear_num_key_heads"] for n in ("linear_num_value_heads",) if n in options}
    model = plain.build(family, **alike)
    ids = tokens(2, 9)
    want = decode(model, ids)
    taken = mixed(family)
    with adt.enable():
        assert float((decode(model, ids) - want).abs().max()) < LIMIT
    assert mixed(family) > taken


# ---- Who keeps z


def keeps(seen: list[tuple[Any, Any]], y: Any) -> Any:
    seen.append((y, y.clone()))
    return y


def views(seen: list[tuple[Any, Any]], y: Any) -> Any:
    seen.append((y.detach(), y.clone()))
    return y


def function_mode(monkeypatch: Any, keep: Callable[[Any], Any]) -> Any:
    class Tap(TorchFunctionMode):
        def __torch_function__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            y = f(*args, **(kwargs or {}))
            return keep(y) if f is F.linear else y

    return Tap()


def replaced(owner: Any, name: str) -> Callable[[Any, Callable[[Any], Any]], Any]:
    def put(monkeypatch: Any, keep: Callable[[Any], Any]) -> Any:
        theirs = getattr(owner, name)

        def ours(*args: Any, **kwargs: Any) -> Any:
            y = theirs(*args, **kwargs)
            return keep(y) if isinstance(y, torch.Tensor) else y

        monkeypatch.setattr(owner, name, ours)
        return torch.no_grad()

    return put


TAPS = {
    "a function mode": function_mode,
    "F.linear": replaced(F, "linear"),
    "nn.Linear.forward": replaced(nn.Linear, "forward"),
    "nn.Module.__call__": replaced(nn.Module, "__call__"),
    "nn.Module._call_impl": replaced(nn.Module, "_call_impl"),
}


@pytest.mark.parametrize("how", [keeps, views])
@pytest.mark.parametrize("tap", TAPS)
def test_what_was_recorded_stays_as_it_was(
    family: str, tap: str, how: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Any, Any]] = []
    ids, model = tokens(1, 9), build(family)
    want = decode(model, ids)
    with adt.enable(), monkeypatch.context() as patch, TAPS[tap](patch, lambda y: how(seen, y)):
        got = decode(model, ids)
    assert len(seen) > 9
    assert all(torch.equal(y, copy) for y, copy in seen)
    assert float((got - want).abs().max()) < LIMIT


def test_z_that_nobody_keeps_takes_the_output(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tests above must not lose: a decode step without a new tensor."""
    from anydelta.integrations.transformers import layer as layers

    if not plain.ROWS[family].z:
        pytest.skip("its z is a part of a wider projection")
    found: list[bool] = []
    alone = layers._alone
    monkeypatch.setattr(layers, "_alone", lambda *p: (found.append(alone(*p)), found[-1])[1])
    with adt.enable():
        decode(build(family), tokens(1, 9))
    assert found
    assert all(found)


# ---- Transforms and tracers of a layer


def of_layer(family: str) -> tuple[Any, Any, Any]:
    layer = first_layer(build(family), family).requires_grad_(False)
    h, along = torch.randn(2, 1, 9, 64)
    return layer, h, along


def test_a_layer_keeps_its_forward_derivative(family: str) -> None:
    layer, h, along = of_layer(family)

    def by_dual_numbers() -> Any:
        with fw.dual_level():
            return fw.unpack_dual(layer(fw.make_dual(h, along))).tangent

    def by_jvp() -> Any:
        return torch.func.jvp(layer, (h,), (along,))[1]

    for f in (by_dual_numbers, by_jvp):
        want = f()
        with adt.enable():
            assert torch.equal(f(), want)
            assert why_not_mixed(family, f) & {
                "a level of dual numbers looks on", "a transform of torch.func looks on"
            }  # fmt: skip


def test_a_layer_under_vmap_and_grad(family: str) -> None:
    layer, h, _ = of_layer(family)
    two = torch.stack([h, 2 * h])
    with torch.enable_grad():
        for f in (
            lambda: torch.func.vmap(layer)(two),
            lambda: torch.func.grad(lambda h: layer(h).sin().sum())(h),
            lambda: torch.func.vmap(torch.func.grad(lambda h: layer(h).sin().sum()))(two),
        ):
            want = f()
            with adt.enable():
                assert torch.equal(f(), want)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_traced_layer(family: str) -> None:
    layer, h, other = of_layer(family)
    want = layer(other)
    with adt.enable():
        traced = torch.jit.trace(layer, (h,), check_trace=False)
    assert "anydelta::gated_delta_rule" in str(traced.inlined_graph)
    assert float((traced(other) - want).abs().max()) < LIMIT


def test_cached_states_count_their_versions(family: str) -> None:
    model = build(family)
    ids, at = tokens(1, 9), first_layer(model, family).layer_idx
    with adt.enable():
        cache = transformers.DynamicCache(config=model.config)
        model(ids[:, :4], past_key_values=cache, use_cache=True)
        held = (cache.layers[at].recurrent_states[0], cache.layers[at].conv_states[0])
        for i in range(4, 9):
            before = [x._version for x in held]
            model(ids[:, i : i + 1], past_key_values=cache, use_cache=True)
            assert all(x._version > n for x, n in zip(held, before, strict=True))
