"""Tensor parallelism of Transformers: two processes, each with half of the heads, against one process.

`tensor_parallel_ranks.py` is what the processes run, under torchrun with gloo on the loopback.
"""

from __future__ import annotations

import inspect
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
mixin = pytest.importorskip(
    "transformers.distributed.mixin", reason="Transformers distributes in another way"
)
if not hasattr(mixin.DistributedMixin, "_mesh_manager"):
    pytest.skip("Transformers distributes models in another way", allow_module_level=True)
if sys.platform != "linux" or not torch.distributed.is_gloo_available():
    pytest.skip("gloo on the loopback of Linux", allow_module_level=True)
if torch._C._get_accelerator().type != "cpu":
    pytest.skip("Transformers wants an accelerator for each process", allow_module_level=True)

import anydelta.integrations.transformers as adt  # noqa: E402
from anydelta.integrations.transformers import tensor_parallel  # noqa: E402
from anydelta.integrations.transformers.families import QKV, SHARES  # noqa: E402
from test_transformers import FAMILIES, ROWS  # noqa: E402

HERE = Path(__file__).parent
LIMIT = 1e-5
RANKS = (0, 1)

Found = dict[str, Any]


def torchrun(program: Path, *arguments: str) -> str:
    """Run a program in two processes; returns what they print."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | dict(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive", GLOO_SOCKET_IFNAME="lo")
    command = (
        "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port",
        str(port), str(program), *arguments,
    )  # fmt: skip
    ran = subprocess.run(
        (sys.executable, *command),
        capture_output=True,
        text=True,
        timeout=500,
        env=environment,
        cwd=HERE.parent,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return ran.stdout


def run(folder: Path, *scenarios: str) -> dict[str, tuple[Found, Found]]:
    """What both processes found, by scenario."""
    torchrun(HERE / "tensor_parallel_ranks.py", str(folder), *scenarios)
    return {
        name: tuple(json.loads((folder / f"{name}.{rank}.json").read_text()) for rank in RANKS)  # type: ignore[misc]
        for name in scenarios
    }


def checked(found: tuple[Found, Found]) -> tuple[Found, Found]:
    for rank in RANKS:
        assert "error" not in found[rank], found[rank]["error"]
    return found


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> tuple[Found, Found]:
    return run(tmp_path_factory.mktemp("families"), "families")["families"]


@pytest.fixture(scope="module")
def scenarios(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Found, Found]]:
    return run(tmp_path_factory.mktemp("model"), "generate", "later", "trained", "whole_models")


@pytest.mark.parametrize("family", FAMILIES)
def test_families(families: tuple[Found, Found], family: str) -> None:
    """Each has half of the heads and of the states, the logits and gradients of one process, and saves whole layers."""
    for rank, found in zip(RANKS, checked((families[0][family], families[1][family])), strict=True):
        heads = f"value heads {2 * rank} to {2 * rank + 1} of 4 (rank {rank} of 2)"
        assert found["heads"] == [heads] * found["layers"] == [heads] * 3
        for name in ("prefill", "decode", "rollback", "stock"):
            assert found[name] < LIMIT, name
        assert found["taken"] == 3 * (1 + 12)
        assert found["passed on"] == 0
        assert found["memory"] == 0.5
        assert found["saved"]
        assert set(found["gradients"]) > {"embeddings"}
        assert max(found["gradients"].values()) < 5e-5, found["gradients"]


@pytest.mark.parametrize(
    "way",
    [
        "greedy",
        "beams",
        "prompt lookup",
        "mtp",
        "early exit",
        "assistant",
        "static cache",
        "disabled",
    ],
)
def test_text(scenarios: dict[str, tuple[Found, Found]], way: str) -> None:
    for found in checked(scenarios["generate"]):
        assert found["heads"] == 6
        one, split = found[way]
        assert len(one) == 34
        assert split == one


def test_prefixes(scenarios: dict[str, tuple[Found, Found]]) -> None:
    """A checkpoint has the heads of its rank, and fits nowhere else."""
    for rank, found in zip(RANKS, checked(scenarios["generate"]), strict=True):
        prefix, text = found["prefix"], found["greedy"][0]
        assert prefix["text"] == prefix["from file"] == text
        assert f"another config, or one that is not of rank {rank} of 2" in prefix["other rank"]
        assert prefix["one process"].startswith("ValueError: Checkpoint: requires the states of")


def test_continuous_batching(scenarios: dict[str, tuple[Found, Found]]) -> None:
    found = checked(scenarios["generate"])[0]
    assert len(found["batch"]) == 2
    assert found["batch"] == found["batch alone"]


def test_a_model_that_was_loaded_before(scenarios: dict[str, tuple[Found, Found]]) -> None:
    for rank, found in zip(RANKS, checked(scenarios["later"]), strict=True):
        [why] = found["status before"].values()
        assert "enable(model), in every process, splits them" in why
        assert found["status after"] == [{}, 6]
        assert f"of 4 (rank {rank} of 2)" in found["status"]
        for name in ("whole", "split", "twice", "packed", "unwrapped"):
            assert found[name] < LIMIT, name
        assert found["copy"] == 0


def test_what_is_refused(scenarios: dict[str, tuple[Found, Found]]) -> None:
    for found in checked(scenarios["later"]):
        assert found["old cache"] == (
            "ValueError: qwen3_5.mixer: requires a cache with windows of 128 channels; got 256, those of other heads. "
            "Make a new cache"
        )
        assert found["distributed checkpoint"].startswith(
            "ValueError: save_pretrained: requires distributed_checkpoint=False for a model whose heads"
        )
        assert found["wrapped"] == (
            "ValueError: tensor parallelism: requires the layer's own in_proj_qkv to run split heads; got a "
            "torch.nn.modules.container.Sequential. Load the model under disable()"
        )


def test_training(scenarios: dict[str, tuple[Found, Found]]) -> None:
    """With clipped gradients: a norm that counted a share once a rank, or not at all, would part the replicas."""
    for found in checked(scenarios["trained"]):
        one, split = found["norms"]
        assert split == pytest.approx(one, rel=1e-5)
        assert min(one) > 0.1
        assert found["apart"] < LIMIT
        assert found["alike"]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("odd", "3 key and 3 value heads do not divide by 2 processes"),
        ("quantised", "quantised weights are not split"),
    ],
)
def test_heads_that_stay_whole(scenarios: dict[str, tuple[Found, Found]], name: str, why: str) -> None:
    for rank, both in zip(RANKS, checked(scenarios["whole_models"]), strict=True):
        if name not in both:
            pytest.skip("torchao is not installed")
        found = both[name]
        assert [why in w for w in found["warnings"]] == ([] if rank else [True])
        assert [why in w for w in found["left"]] == [True]
        assert found["heads"] == {}
        assert found["logits"] < LIMIT


def test_the_program_of_the_document(tmp_path: Path) -> None:
    """docs/serving.md shows what it prints."""
    page = (HERE.parent / "docs" / "serving.md").read_text()
    [block] = [b for b in page.split("```python\n")[1:] if "DistributedConfig" in b]
    code = block.partition("```")[0]
    (tmp_path / "program.py").write_text(code)
    printed = torchrun(tmp_path / "program.py")
    assert code.partition("print(adt.status(model))  # ")[2].strip() in printed


def test_every_part_of_a_family_has_a_share() -> None:
    for row in ROWS.values():
        assert row.holds - {row.gate} <= SHARES.keys()


def test_shares_come_back_in_order() -> None:
    runs, ranks = (4, 4, 12), 2
    x = torch.arange(20)[:, None]
    parts = [torch.cat([run.chunk(ranks)[rank] for run in x.split(runs)]) for rank in range(ranks)]
    assert not torch.equal(torch.cat(parts), x)
    assert torch.equal(tensor_parallel._in_order(torch.cat(parts), (2, 2, 6), ranks), x)
    assert QKV in SHARES.values()


def test_loading_is_as_it_was_after_disable() -> None:
    before = inspect.getattr_static(transformers.PreTrainedModel, tensor_parallel._LOADED)
    with adt.enable():
        assert inspect.getattr_static(transformers.PreTrainedModel, tensor_parallel._LOADED) is not before
    assert inspect.getattr_static(transformers.PreTrainedModel, tensor_parallel._LOADED) is before
