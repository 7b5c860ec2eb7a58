"""The Vulkan backend: the whole list under the validation layers, every way through its code, its errors."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import anydelta
from anydelta.backends.vulkan import host as vulkan
from anydelta.conformance import OK, Target
from anydelta.conformance.run import run_one, unavailable
from anydelta.core import devices
from anydelta.rule.arguments import Call, Options
from anydelta.rule.spec import check_call
from conftest import FOR_DEVICES, LINES_FOR_DEVICES, without
from device_checks import check_a_lost_device_voids_its_states, failures, tokens

if REASONS := unavailable("vulkan"):
    pytest.skip("; ".join(REASONS), allow_module_level=True)

from anydelta.backends.vulkan import device as vulkan_device
from anydelta.backends.vulkan.device import vk

pytestmark = pytest.mark.usefixtures("fresh_plans")
SOME = tuple(c for c in FOR_DEVICES if c.work < 100_000 and c.K <= 32)[::4]
"""Cases for the ways that this machine's driver does not need."""


@pytest.fixture
def other_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """other_device(fact=value, ...): a second vulkan:0, which believes these facts of its driver."""
    made = []

    def make(unified: bool = True, **facts: Any) -> Any:
        before = vulkan_device.Facts.__init__

        def told(self: Any, physical: Any) -> None:
            before(self, physical)
            vars(self).update(facts)

        monkeypatch.setattr(vulkan_device.Facts, "__init__", told)
        monkeypatch.setenv("ANYDELTA_VULKAN_COPY", "0" if unified else "1")
        device = vulkan_device.VulkanDevice(0)
        monkeypatch.setattr(devices, "_open", {**devices._open, "vulkan:0": device})
        made.append(device)
        return device

    yield make
    for device in made:
        device.close()


def test_the_whole_list_under_the_validation_layers() -> None:
    """In processes of their own, which the loader gives the layers. They print what they find on stdout."""
    layer = "VK_LAYER_KHRONOS_validation"
    if layer not in {x.layerName for x in vk.vkEnumerateInstanceLayerProperties()}:
        without(f"{layer}, which Debian has in vulkan-validationlayers")

    def layered(*arguments: str, **more: str) -> tuple[int, str]:
        env = os.environ | {"VK_INSTANCE_LAYERS": layer} | more
        done = subprocess.run([sys.executable, *arguments], env=env, text=True, capture_output=True)
        return done.returncode, done.stdout + done.stderr

    conform = [
        "-m",
        "anydelta.cli",
        "conform",
        "--backend",
        "vulkan",
        "--require",
        "vulkan",
        "--framework",
        "numpy",
        "--filter",
    ]
    for code, text in (
        layered(*conform, LINES_FOR_DEVICES),
        layered(*conform, "T=127", ANYDELTA_VULKAN_CHUNK="1"),
    ):
        assert code == 0, text[-4000:]
        assert "Validation" not in text, text[:4000]
    assert "Validation" in layered("-c", _BAD)[1]  # the layer was listening


_BAD = """
import anydelta
from anydelta.backends.vulkan.device import vk
d = anydelta.device("vulkan:0")
d.zeros((4,))
vk.vkCreateBuffer(d.handle, vk.VkBufferCreateInfo(size=0, usage=32, sharingMode=0), None)
"""


def test_torch_tensors() -> None:
    bad = [r for c in FOR_DEVICES[::9] if (r := run_one(c, Target("vulkan", framework="torch"))).status != OK]
    assert not bad, [(r.case, r.reasons) for r in bad]


def test_long_prompts_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(vulkan.CHUNK_ENV, "1")
    monkeypatch.setattr(vulkan, "CHUNK_MIN_TOKENS", 16)
    long = [
        c for c in FOR_DEVICES if not c.refused and c.T - c.snapshots >= 16 * max(1, len(c.seqlens or ()))
    ]
    large = [c for c in long if c.K > 32]
    assert {64, 80, 128, 192, 256} <= {c.K for c in large}
    ran = []
    record = vulkan._record
    monkeypatch.setattr(
        vulkan, "_record", lambda plan, *a: (ran.append((plan.KP, plan.chunk)), record(plan, *a))[1]
    )
    assert not failures("vulkan", [*large, *[c for c in long if c.K <= 32][::4]])
    assert {64, 96, 128, 192, 256} <= {KP for KP, chunk in ran if chunk}
    assert {8, 16} <= {chunk for _, chunk in ran}


def test_the_way_of_a_long_prompt_is_measured() -> None:
    (q, k, v), gates = tokens(70)
    call = Call(q, k, v, **gates, state_in=np.zeros((1, 2, 16, 16), np.float32))
    spec = check_call(call, Options(), inplace=False)
    times = vulkan.measure_chunks(anydelta.device("vulkan:0"), spec, call, 16, rounds=1)
    assert set(times) == {0, 16}
    assert all(t > 0 for each in times.values() for t in each)


def test_without_subgroups(other_device: Any) -> None:
    other_device(subgroup=0, type="discrete GPU")
    assert not failures("vulkan", SOME)


def test_several_lanes_in_a_subgroup(other_device: Any) -> None:
    other_device(type="integrated GPU")
    assert not failures("vulkan", SOME[::2])


def test_without_unified_memory(other_device: Any) -> None:
    device = other_device(unified=False)
    assert not failures("vulkan", SOME)
    there = device.array(np.arange(24, dtype=np.float32).reshape(2, 3, 4))
    assert there.memory.mapped is None
    there[0].write(there[1])
    there[1].zero()
    assert np.array_equal(there.numpy()[0], np.arange(12, 24).reshape(3, 4))
    assert not there.numpy()[1].any()


def test_without_16_bit_storage(other_device: Any) -> None:
    other_device(half_storage=False)
    assert not failures("vulkan", tuple(c for c in SOME if c.dtype == c.state_dtype == "float32")[::3])
    halves = next(c for c in SOME if c.dtype == "bfloat16")
    result = run_one(halves, Target("vulkan"))
    assert result.status == "NOT SUPPORTED"
    assert "storageBuffer16BitAccess" in result.reasons[0]


# ---- errors


def test_out_of_memory_leaves_the_states(monkeypatch: pytest.MonkeyPatch) -> None:
    dev: Any = anydelta.device("vulkan:0")
    state = dev.array(np.ones((1, 2, 16, 16), np.float32))

    def full(*args: Any) -> None:
        raise vk.VkErrorOutOfDeviceMemory

    monkeypatch.setattr(vk, "vkAllocateMemory", full)
    with pytest.raises(
        anydelta.DeviceError, match=r"vulkan:0 requires more memory for an array of 16 bytes.*States are as"
    ):
        dev.zeros((4,))
    (q, k, v), gates = tokens(
        dev.inputs.nbytes // 4 // 80 if dev.inputs else 20_000
    )  # more than is staged so far
    with pytest.raises(anydelta.DeviceError, match=r"requires more memory for the .* of a call"):
        anydelta.gated_delta_rule_(q, k, v, state, **gates)
    monkeypatch.undo()
    assert (state.numpy() == 1).all()
    (q, k, v), gates = tokens()
    anydelta.gated_delta_rule_(q, k, v, state, **gates)
    assert (state.numpy() != 1).any()


def test_a_lost_device_voids_its_states(other_device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    wait = vk.vkWaitForFences

    def lost(*args: Any) -> None:
        wait(*args)  # the driver is not lost: it must not be working still when the buffers go
        raise vk.VkErrorDeviceLost

    check_a_lost_device_voids_its_states(
        other_device(), lambda: monkeypatch.setattr(vk, "vkWaitForFences", lost)
    )
