"""Models that torchao quantised: their matrices are their own, linear attention runs on anydelta."""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import anydelta.integrations.transformers as adt  # noqa: E402
from anydelta.generate.checkpoint import REPOSITORY_MODEL  # noqa: E402
from conftest import CPU_REASONS, without  # noqa: E402

if CPU_REASONS:
    pytest.skip("; ".join(CPU_REASONS), allow_module_level=True)  # tests/test_cpu.py fails then
if not REPOSITORY_MODEL.is_dir():
    without("examples/tiny_model is not here: a clone has it, an sdist does not")
if importlib.util.find_spec("torchao") is None:
    pytest.skip("torchao is not installed", allow_module_level=True)

DRAFTING: dict[str, dict[str, Any]] = {
    "plain": {},
    "mtp": dict(use_mtp=True),
    "lookup": dict(prompt_lookup_num_tokens=5),
}


def quantised(dtype: torch.dtype) -> Any:
    """The repository's model with int8 weights."""
    from torchao.quantization import Int8WeightOnlyConfig

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = transformers.TorchAoConfig(Int8WeightOnlyConfig())
        return transformers.AutoModelForCausalLM.from_pretrained(
            str(REPOSITORY_MODEL), quantization_config=config, dtype=dtype
        ).eval()


@pytest.fixture(scope="module")
def model() -> Any:
    return quantised(torch.float32)


def written(model: Any, **more: Any) -> list[int]:
    x = torch.arange(5, 15)[None]
    out = model.generate(x, max_new_tokens=24, do_sample=False, pad_token_id=0, **more)
    return list(out[0, 10:].tolist())


@pytest.mark.parametrize("mode", DRAFTING)
def test_int8_weights_of_torchao(model: Any, mode: str) -> None:
    """The text is Transformers' own, whatever drafts; the mixer takes every call."""
    assert "Int8Tensor" in {type(p).__name__ for p in model.parameters()}
    want = written(model)
    before = adt.status()
    with adt.enable():
        assert written(model, **DRAFTING[mode]) == want
    after = adt.status()
    assert after.taken["qwen3_5.mixer"] > before.taken.get("qwen3_5.mixer", 0)
    assert after.passed_on == before.passed_on


@torch.no_grad()
def test_logits_of_int8_weights(model: Any) -> None:
    x = torch.arange(5, 45)[None]
    want = model(x).logits
    with adt.enable():
        assert float((model(x).logits - want).abs().max()) < 1e-4
