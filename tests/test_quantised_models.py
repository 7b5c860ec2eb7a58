"""Models that torchao quantised: their matrices run on torchao, linear attention on anydelta."""

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


def _int8() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig()


def _int8_activations() -> Any:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return Int8DynamicActivationInt8WeightConfig()


def _int4() -> Any:
    """torch's own int4 product for CPUs."""
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

    return PrototypeInt4WeightOnlyConfig(group_size=32)


def _intx() -> Any:
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup

    return IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))


QUANTISERS = {
    _int8: "Int8Tensor", _int8_activations: "Int8Tensor", _int4: "Int4OpaqueTensor", _intx: "IntxUnpackedToInt8Tensor"
}  # fmt: skip
"""What torchao makes of the weights."""


@pytest.fixture(scope="module", params=QUANTISERS, ids=lambda f: f.__name__.strip("_"))
def model(request: pytest.FixtureRequest) -> Any:
    """The repository's model with weights of a few bits."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if request.param is _int4:  # of 16 rows at a time, which a and b have not
            from torchao.quantization import quantize_

            found = transformers.AutoModelForCausalLM.from_pretrained(
                str(REPOSITORY_MODEL), dtype=torch.bfloat16
            )
            quantize_(
                found,
                _int4(),
                lambda m, name: type(m) is torch.nn.Linear and m.out_features % 16 == 0 and name != "lm_head",
            )
        else:
            found = transformers.AutoModelForCausalLM.from_pretrained(
                str(REPOSITORY_MODEL),
                quantization_config=transformers.TorchAoConfig(request.param()),
                dtype=torch.float32,
            )
    assert QUANTISERS[request.param] in {type(p).__name__ for p in found.parameters()}
    return found.eval()


def written(model: Any, **more: Any) -> list[int]:
    x = torch.arange(5, 15)[None]
    out = model.generate(x, max_new_tokens=24, do_sample=False, pad_token_id=0, **more)
    return list(out[0, 10:].tolist())


@pytest.mark.parametrize("mode", DRAFTING)
def test_weights_of_torchao(model: Any, mode: str) -> None:
    """The text is Transformers' own, whatever drafts; the mixer takes every call."""
    want = written(model)
    before = adt.status()
    with adt.enable():
        assert written(model, **DRAFTING[mode]) == want
    after = adt.status()
    assert after.taken["qwen3_5.mixer"] > before.taken.get("qwen3_5.mixer", 0)
    assert after.passed_on == before.passed_on


@torch.no_grad()
def test_logits(model: Any, request: pytest.FixtureRequest) -> None:
    """To float32's rounding; where activations have 8 bits, to a rounding of 2^-8 in each of the 8 layers."""
    x = torch.arange(5, 45)[None]
    want = model(x).logits.float()
    with adt.enable():
        got = model(x).logits.float()
    rounded = request.node.callspec.params["model"] in (_int8_activations, _int4)
    assert float((got - want).norm() / want.norm()) < (8 * 2**-8 if rounded else 1e-5)
