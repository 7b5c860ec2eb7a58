"""Transformers' own switches: use_kernels=True and kernelize(), before and after enable(), and USE_HUB_KERNELS.

Each case is a process of its own, because the library kernels changes what a modelling module holds when imported.
Transformers 5.20 and 5.22 want kernels 0.17, 5.23 and 5.24 want 0.18; with another one they act as without it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from conftest import CPU_REASONS  # noqa: E402

if CPU_REASONS:
    pytest.skip("the cpu backend is not built", allow_module_level=True)

KERNELS = transformers.utils.is_kernels_available()
needs_kernels = pytest.mark.skipif(
    not KERNELS, reason="no kernels of the release that this Transformers wants"
)

PRELUDE = """
import sys, tempfile, warnings
import torch, transformers
sys.path.insert(0, {here!r})
import fla_scenarios as small
import anydelta.integrations.transformers as adt

torch.set_grad_enabled(False)
ids = small.tokens(1, 9)

def logits(model):
    return model(ids).logits

def text(model):
    return model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)

def taken():
    return dict(adt.status().taken)

def grew(before):
    return sorted(name for name, n in taken().items() if n > before.get(name, 0))

model = small.build("qwen3_5")
want, words = logits(model), text(model)

def same(model):
    assert (logits(model) - want).abs().max() < 1e-4
    assert torch.equal(text(model), words)

def kernelized():
    from transformers.integrations.hub_kernels import kernelize
    other = small.build("qwen3_5")
    kernelize(other)
    return other

FUNCTIONS = ["qwen3_5.causal_conv1d_fn", "qwen3_5.torch_chunk_gated_delta_rule"]
"""


def alone(code: str, **environment: str) -> None:
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment}
    script = PRELUDE.format(here=str(Path(__file__).parent)) + code
    ran = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stdout + ran.stderr


@needs_kernels
def test_kernelize_before_enable() -> None:
    """The layer has a forward of its own then, which stays: rule and convolution are anydelta's, the mixer is not."""
    alone("""
model = kernelized()
same(model)
before = taken()
with adt.enable():
    same(model)
found = grew(before)
assert set(FUNCTIONS) <= set(found) and "qwen3_5.mixer" not in found, found
before = taken()
same(model)
assert not grew(before)
""")


@needs_kernels
def test_kernelize_before_enable_of_the_model() -> None:
    """It says that the layer's forward stays, and drafting is refused as for any such layer."""
    alone("""
model = kernelized()
before = taken()
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    switch = adt.enable(model)
with switch:
    same(model)
    assert adt.status(model).layers == ()
assert any("already has its own forward (a kernel?), which is kept" in str(w.message) for w in seen)
assert not grew(before)
""")


@needs_kernels
def test_kernelize_while_enabled() -> None:
    """What kernelize finds is ours, and it keeps that; the rule follows the switch all the same."""
    alone("""
with adt.enable():
    before = taken()
    model = kernelized()
    same(model)
    assert grew(before)
before = taken()
same(model)
assert not grew(before)
with adt.enable():
    same(model)
assert grew(before)
""")


@needs_kernels
@pytest.mark.parametrize("first", [True, False])
def test_use_kernels_of_from_pretrained(first: bool) -> None:
    alone(f"""
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    def load():
        return transformers.AutoModelForCausalLM.from_pretrained(folder, use_kernels=True).eval()
    model = None if {first} else load()
    with adt.enable():
        model = model or load()
        before = taken()
        same(model)
        assert grew(before)
    before = taken()
    same(model)
    assert not grew(before)
""")


@pytest.mark.parametrize("value", ["NO", "YES"])
def test_use_hub_kernels(value: str) -> None:
    """With NO, functions are plain again; either way the mixer is anydelta's, since nothing was kernelized."""
    alone(
        f"""
with adt.enable():
    before = taken()
    same(model)
    assert "qwen3_5.mixer" in grew(before)
before = taken()
same(model)
assert not grew(before)
import types
from transformers.models.qwen3_5 import modeling_qwen3_5
plain = isinstance(modeling_qwen3_5.causal_conv1d_fn, types.FunctionType)
assert plain == ({value == "NO"} or not {KERNELS})
""",
        USE_HUB_KERNELS=value,
    )


@pytest.mark.skipif(KERNELS, reason="kernels is here")
def test_without_kernels_transformers_says_so() -> None:
    alone("""
with adt.enable():
    try:
        kernelized()
    except ImportError as error:
        assert "kernels" in str(error)
    else:
        raise SystemExit("it did")
    same(model)
same(model)
""")
