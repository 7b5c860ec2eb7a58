"""What Transformers does with `import fla` on anydelta. Each function needs a process in which no model of
Transformers has been imported: test_fla_install.py runs them so.
"""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

from anydelta.compat import fla as ours
from anydelta.integrations import transformers as adt

GDN = dict(
    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16,
    linear_conv_kernel_dim=4,
)  # fmt: skip
BASE = dict(
    vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    layer_types=["linear_attention", "full_attention"],
)  # fmt: skip
MOE = dict(moe_intermediate_size=32, shared_expert_intermediate_size=32, num_experts=4, num_experts_per_tok=2)
ROPE = dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.25, mrope_section=[1, 1, 0])
MLA = dict(
    moe_intermediate_size=32, num_key_value_heads=4, kv_lora_rank=32, qk_rope_head_dim=8, qk_nope_head_dim=16,
    v_head_dim=16, num_local_experts=4, num_experts_per_tok=2, n_shared_experts=1, n_group=1, topk_group=1,
)  # fmt: skip
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_next": ("Qwen3NextConfig", {**BASE, **GDN, **MOE}),
    "qwen3_5": ("Qwen3_5TextConfig", {**BASE, **GDN, "rope_parameters": ROPE}),
    "qwen3_5_moe": ("Qwen3_5MoeTextConfig", {**BASE, **GDN, **MOE, "rope_parameters": ROPE}),
    "olmo_hybrid": ("OlmoHybridConfig", {**BASE, **GDN, **dict(num_key_value_heads=4, linear_num_key_heads=4)}),
    "kimi_linear": (
        "KimiLinearConfig",
        {**{k: v for k, v in BASE.items() if k != "head_dim"}, **MLA,
         **dict(linear_head_dim=16, linear_num_heads=4, linear_conv_kernel_dim=4)},
    ),
    "bailing_hybrid": (
        "BailingHybridConfig", {**BASE, **MLA, **dict(first_k_dense_replace=1, short_conv_kernel_size=4)},
    ),
    "lara_mini": ("LaraMiniConfig", {**BASE, **GDN, **MOE}),
}  # fmt: skip
MODELS = Path(transformers.__file__).parent / "models"


def asking() -> list[str]:
    """The families whose modelling module asks for fla."""
    return sorted(f.parent.name for f in MODELS.glob("*/modeling_*.py") if '", "fla")' in f.read_text())


def modelling(family: str) -> Any:
    return importlib.import_module(f"transformers.models.{family}.modeling_{family}")


def decorated(family: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """Of the module's functions that look for a package: its own name, and what the decorator found, by hub name."""
    found = {}
    for name, function in vars(modelling(family)).items():
        if "is_new_implementation" in getattr(getattr(function, "__code__", None), "co_freevars", ()):
            held = inspect.getclosurevars(function).nonlocals
            found[held["func_name"]] = (name, held)
    return found


@contextmanager
def stock(family: str) -> Iterator[None]:
    """Transformers' reference functions in the module's names."""
    module, before = modelling(family), {}
    for name, held in decorated(family).values():
        before[name] = getattr(module, name)
        setattr(module, name, held["torch_function"])
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(module, name, function)


def build(family: str) -> Any:
    """A small random model, whose weights are large and whose decays are slow, so that errors show."""
    name, values = CONFIGS[family]
    config = getattr(importlib.import_module(f"transformers.models.{family}.configuration_{family}"), name)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config(**values)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("A_log"):
                p.uniform_(-4, 0)
            elif p.ndim == 2:
                p.mul_(4)
    return model


def families() -> list[str]:
    found = [f for f in CONFIGS if f in asking()]
    assert len(found) >= 4
    return found


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 64, shape, generator=torch.Generator().manual_seed(seed))


def runs() -> dict[str, Callable[[Any], torch.Tensor]]:
    """What a model is asked, by name."""
    ids, mask = tokens(2, 70), torch.ones(2, 70, dtype=torch.long)
    mask[0, :9] = 0

    def pieces(model: Any) -> torch.Tensor:
        cache, found = None, []
        for begin, end in ((0, 5), (5, 6), (6, 7), (7, 70)):
            out = model(ids[:, begin:end], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            found.append(out.logits)
        return torch.cat(found, 1)

    def text(model: Any) -> torch.Tensor:
        return model.generate(ids[:, :7], max_new_tokens=16, do_sample=False, pad_token_id=0)  # type: ignore[no-any-return]

    return {
        "prefill": lambda model: model(ids).logits,
        "pieces": pieces,
        "padded": lambda model: model(ids, attention_mask=mask).logits * mask[..., None],
        "text": text,
    }


ROWS = [tokens(n, seed=n) for n in (5, 1, 9)]


@torch.no_grad()
def wanted(family: str, model: Any) -> dict[str, torch.Tensor]:
    """What Transformers' reference functions answer; for packed rows, each row alone."""
    with stock(family):
        found = {name: run(model) for name, run in runs().items()}
        return found | {"packed": torch.cat([model(r[None], use_cache=False).logits[0] for r in ROWS])}


@torch.no_grad()
def packed(model: Any, **more: Any) -> torch.Tensor:
    """The rows in one, told apart by where they begin."""
    cu = torch.tensor([0, 5, 6, 15], dtype=torch.int32)
    positions = torch.cat([torch.arange(len(r)) for r in ROWS])[None]
    return model(  # type: ignore[no-any-return]
        torch.cat(ROWS)[None], position_ids=positions, use_cache=False, cu_seq_lens_q=cu, cu_seq_lens_k=cu,
        max_length_q=9, max_length_k=9, **more,
    ).logits[0]  # fmt: skip


@torch.no_grad()
def check(family: str, model: Any, want: dict[str, torch.Tensor]) -> None:
    for name, run in {**runs(), "packed": packed}.items():
        got = run(model)
        assert got.shape == want[name].shape
        assert (got - want[name]).abs().max() < 1e-4, (family, name, (got - want[name]).abs().max())


def _installed() -> None:
    assert ours.install()
    assert (
        not transformers.utils.is_flash_linear_attention_available()
    )  # it wants a GPU; and it does not raise


def functions() -> None:
    """Every family that asks for fla has our functions, and they give what its reference gives."""
    _installed()
    assert len(asking()) >= 4
    for family in asking():
        found = {hub: held for hub, (_, held) in decorated(family).items() if held["package"] == "fla"}
        assert len(found) == 2, (family, found)
        for hub, held in found.items():
            assert held["is_new_implementation"], (family, hub)
            assert held["implementation"] is ours.OFFERED["fla.ops"][hub], (family, hub)
            function, T, K, V = getattr(modelling(family), decorated(family)[hub][0]), 70, 8, 16
            generator = torch.Generator().manual_seed(1)
            q, k = torch.randn(2, 2, T, 4, K, generator=generator)
            v = torch.randn(2, T, 4, V, generator=generator)
            g = -torch.rand((2, T, 4, K) if "kda" in hub else (2, T, 4), generator=generator)
            beta, state = (
                torch.rand(2, T, 4, generator=generator),
                torch.randn(2, 4, K, V, generator=generator),
            )
            options = dict(initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True)
            for got, want in zip(
                function(q, k, v, g=g, beta=beta, **options),
                held["torch_function"](q, k, v, g=g, beta=beta, **options),
                strict=True,
            ):
                assert (got - want).abs().max() < 1e-4, (family, hub)
            cu = torch.tensor([0, 30, 70])
            name = "cu_seq_lens_q" if "kda" in hub else "cu_seqlens"
            options = dict(initial_state=None, output_final_state=True, use_qk_l2norm_in_kernel=True)
            o, states = function(q[:1], k[:1], v[:1], g=g[:1], beta=beta[:1], **options, **{name: cu})
            for n, (i, j) in enumerate(((0, 30), (30, 70))):
                one = [x[:1, i:j] for x in (q, k, v, g, beta)]
                want, end = held["torch_function"](*one[:3], g=one[3], beta=one[4], **options)
                assert (o[:, i:j] - want).abs().max() < 1e-4, (family, hub)
                assert (states[n] - end[0]).abs().max() < 1e-4, (family, hub)


def alone() -> None:
    """install() and nothing else."""
    _installed()
    for family in families():
        model = build(family)
        want = wanted(family, model)
        check(family, model, want)
        got = packed(model, seq_idx=torch.tensor([[0] * 5 + [1] + [2] * 9], dtype=torch.int32))
        assert (got - want["packed"]).abs().max() < 1e-4, family
    ours.uninstall()
    check(family, model, want)  # what was imported meanwhile goes on to work


def then_enable() -> None:
    """install(), models, and then enable() and disable()."""
    _installed()
    known = adt.status().families
    assert len(known) >= 4
    for family in families():
        model = build(family)
        want = wanted(family, model)
        if family in known:
            for arguments in ((), (model,)):
                taken = sum(adt.status().taken.values())
                with adt.enable(*arguments):
                    check(family, model, want)
                assert sum(adt.status().taken.values()) > taken, family
        check(family, model, want)
    ours.uninstall()
    with adt.enable():
        check(family, model, want)


def enable_first() -> None:
    """enable() imports modelling modules itself; install() comes after, and says what it cannot reach."""
    with adt.enable():
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            assert ours.install()
        late = [str(w.message) for w in seen if "did not find fla when imported" in str(w.message)]
        assert len(late) == 1
        assert "transformers.models.qwen3_5.modeling_qwen3_5" in late[0]
        for family in set(adt.status().families) & set(CONFIGS):
            model = build(family)
            with adt.disable():
                want = wanted(family, model)
            check(family, model, want)
    ours.uninstall()
    with stock("qwen3_5"):
        want = build("qwen3_5")(ROWS[0][None]).logits
    assert torch.equal(build("qwen3_5")(ROWS[0][None]).logits, want)  # as before all that


def late() -> None:
    """A model that was imported before keeps its reference; one that comes after has ours."""
    modelling("qwen3_5")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert ours.install()
    assert [str(w.message) for w in seen if "fla" in str(w.message)] == [
        "anydelta: transformers.models.qwen3_5.modeling_qwen3_5 did not find fla when imported, and keeps its "
        "reference functions. Call install() before, or use anydelta.integrations.transformers.enable()"
    ]
    assert seen[0].filename == __file__
    assert not decorated("qwen3_5")["chunk_gated_delta_rule"][1]["is_new_implementation"]
    assert decorated("olmo_hybrid")["chunk_gated_delta_rule"][1]["is_new_implementation"]


def training() -> None:
    """Gradients are those of the reference."""
    _installed()
    for family in ("qwen3_5", "kimi_linear"):
        if family not in families():
            continue
        model, ids = build(family).train(), tokens(1, 33)
        found = []
        for context in (stock(family), torch.enable_grad()):
            with context:
                model.zero_grad()
                model(ids, labels=ids, use_cache=False).loss.backward()
                found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        assert found[0].keys() == found[1].keys()
        for name, want in found[0].items():
            assert (found[1][name] - want).abs().max() < 1e-3 * max(1e-3, want.abs().max()), (family, name)


@torch.no_grad()
def graphs() -> None:
    """torch.compile takes ours in one graph; torch.export takes Transformers' reference, as with the real fla."""
    _installed()
    for family in ("qwen3_5", "kimi_linear"):
        if family not in families():
            continue
        model, ids = build(family), tokens(1, 9)
        with stock(family):
            want = model(ids, use_cache=False).logits
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert (compiled(ids, use_cache=False).logits - want).abs().max() < 1e-4, family
        exported = torch.export.export(model, (ids,), dict(use_cache=False))
        assert (exported.module()(ids, use_cache=False).logits - want).abs().max() < 1e-4, family
        if family == "qwen3_5":
            with adt.enable():
                assert (compiled(ids, use_cache=False).logits - want).abs().max() < 1e-4
                exported = torch.export.export(model, (ids,), dict(use_cache=False))
            assert (exported.module()(ids, use_cache=False).logits - want).abs().max() < 1e-4
