"""Vulkan devices: instance, queue, memory, pipelines. host.py runs calls on them.

If host and device share their memory (integrated GPUs, CPU drivers), every buffer is mapped and nothing is copied
twice. Elsewhere states and inputs are in device-local memory and pass through mapped staging buffers.
"""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache, partial
from itertools import count
from pathlib import Path

import numpy as np
import vulkan as vk

import anydelta

from ...core.devices import Bytes, Device, DeviceArray, DeviceError, Memory
from ..devices.llvm import load_triton_first
from ..devices.staging import Launches

BINDINGS = 5
"""Storage buffers of a shader: inputs, output, state read, state written, snapshots (backends/vulkan/rule.glsl)."""
PUSH_BYTES = 100
"""Bytes of the struct Call in rule.glsl. Every driver allows 128."""
FOREVER = 2**64 - 1
VulkanError = vk.VkError

_TYPES = {
    vk.VK_PHYSICAL_DEVICE_TYPE_DISCRETE_GPU: "discrete GPU",
    vk.VK_PHYSICAL_DEVICE_TYPE_INTEGRATED_GPU: "integrated GPU",
    vk.VK_PHYSICAL_DEVICE_TYPE_VIRTUAL_GPU: "virtual GPU",
    vk.VK_PHYSICAL_DEVICE_TYPE_CPU: "CPU",
}
"""The kinds of devices, in the order in which devices are numbered."""

_DEVICE_LOCAL = vk.VK_MEMORY_PROPERTY_DEVICE_LOCAL_BIT
_MAPPED = vk.VK_MEMORY_PROPERTY_HOST_VISIBLE_BIT | vk.VK_MEMORY_PROPERTY_HOST_COHERENT_BIT
_CACHED = vk.VK_MEMORY_PROPERTY_HOST_CACHED_BIT
_FULL_SUBGROUPS = 2  # VK_PIPELINE_SHADER_STAGE_CREATE_REQUIRE_FULL_SUBGROUPS_BIT, which the package lacks


def shader(name: str) -> bytes | None:
    """The SPIR-V that was compiled when the package was built; None if it was built without glslang."""
    for folder in anydelta.__path__:  # an editable install has two: sources and build
        path = Path(folder, "backends", "vulkan", f"{name}.spv")
        if path.is_file():
            return path.read_bytes()
    return None


@cache
def instance() -> object:
    """The Vulkan instance of this process. Raises the loader's errors."""
    try:
        version = vk.vkEnumerateInstanceVersion()
    except (vk.ProcedureNotFoundError, AttributeError):
        version = vk.VK_MAKE_VERSION(1, 0, 0)
    names = {e.extensionName for e in vk.vkEnumerateInstanceExtensionProperties(None)}
    portable = "VK_KHR_portability_enumeration" in names  # MoltenVK
    # A structure with pointers must stay referenced until the call ends: another structure copies only the pointers,
    # and their targets are freed with the Python object.
    application = vk.VkApplicationInfo(
        pApplicationName="anydelta", apiVersion=min(version, vk.VK_MAKE_VERSION(1, 3, 0))
    )
    load_triton_first()
    made = vk.vkCreateInstance(
        vk.VkInstanceCreateInfo(
            flags=1 if portable else 0,  # VK_INSTANCE_CREATE_ENUMERATE_PORTABILITY_BIT_KHR
            pApplicationInfo=application,
            ppEnabledExtensionNames=["VK_KHR_portability_enumeration"] if portable else [],
        ),
        None,
    )
    atexit.register(_close, made)
    return made


_devices: list[VulkanDevice] = []


def _close(made: object) -> None:
    for device in _devices:
        device.close()
    vk.vkDestroyInstance(made, None)


@cache
def physical_devices() -> list[object]:
    """The devices that can compute, GPUs before CPU drivers."""
    order = list(_TYPES)
    found = [
        (
            order.index(kind)
            if (kind := vk.vkGetPhysicalDeviceProperties(p).deviceType) in order
            else len(order),
            i,
            p,
        )
        for i, p in enumerate(vk.vkEnumeratePhysicalDevices(instance()))
        if vk.vkGetPhysicalDeviceProperties(p).apiVersion >= vk.VK_MAKE_VERSION(1, 1, 0)
    ]
    return [p for *_, p in sorted(found, key=lambda row: row[:2])]


class Facts:
    """What a physical device can do, as queried."""

    def __init__(self, physical: object):
        ffi = vk.ffi
        self.physical = physical
        subgroup = ffi.new("VkPhysicalDeviceSubgroupProperties*")
        subgroup.sType = vk.VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_SUBGROUP_PROPERTIES
        sizes = ffi.new("VkPhysicalDeviceSubgroupSizeControlProperties*")
        sizes.sType = vk.VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_SUBGROUP_SIZE_CONTROL_PROPERTIES
        storage = ffi.new("VkPhysicalDevice16BitStorageFeatures*")
        storage.sType = vk.VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_16BIT_STORAGE_FEATURES
        control = ffi.new("VkPhysicalDeviceSubgroupSizeControlFeatures*")
        control.sType = vk.VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_SUBGROUP_SIZE_CONTROL_FEATURES
        names = {e.extensionName for e in vk.vkEnumerateDeviceExtensionProperties(physical, None)}
        properties = ffi.new("VkPhysicalDeviceProperties2*")
        properties.sType = vk.VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_PROPERTIES_2
        features = ffi.new("VkPhysicalDeviceFeatures2*")
        features.sType = vk.VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_FEATURES_2
        properties.pNext, features.pNext = subgroup, storage
        api = vk.vkGetPhysicalDeviceProperties(physical).apiVersion
        core = api >= vk.VK_MAKE_VERSION(1, 3, 0)
        may_pin = core or "VK_EXT_subgroup_size_control" in names
        if may_pin:
            subgroup.pNext, storage.pNext = sizes, control
        vk.vkGetPhysicalDeviceProperties2(physical, properties)
        vk.vkGetPhysicalDeviceFeatures2(physical, features)
        self.name = ffi.string(properties.properties.deviceName).decode()
        self.type = _TYPES.get(properties.properties.deviceType, "other")
        self.api = f"{api >> 22 & 127}.{api >> 12 & 1023}.{api & 4095}"
        limits = properties.properties.limits
        self.max_range = int(limits.maxStorageBufferRange)
        self.max_shared = int(limits.maxComputeSharedMemorySize)
        self.max_invocations = min(
            int(limits.maxComputeWorkGroupInvocations), int(limits.maxComputeWorkGroupSize[0])
        )
        self.max_groups = tuple(int(n) for n in limits.maxComputeWorkGroupCount)
        self.alignment = int(limits.minStorageBufferOffsetAlignment)
        self.half_storage = bool(storage.storageBuffer16BitAccess)
        needed = (
            vk.VK_SUBGROUP_FEATURE_BASIC_BIT
            | vk.VK_SUBGROUP_FEATURE_ARITHMETIC_BIT
            | vk.VK_SUBGROUP_FEATURE_SHUFFLE_BIT
        )
        has_operations = subgroup.supportedOperations & needed == needed
        pinned = bool(
            may_pin and control.subgroupSizeControl and control.computeFullSubgroups
            and sizes.requiredSubgroupSizeStages & vk.VK_SHADER_STAGE_COMPUTE_BIT
        )  # fmt: skip
        self.subgroup = int(subgroup.subgroupSize) if has_operations and pinned else 0
        """The requested subgroup size; 0 if the driver has no shuffles or cannot pin a size."""
        self.extensions = [n for n in ("VK_KHR_portability_subset",) if n in names]
        if pinned and not core:
            self.extensions.append("VK_EXT_subgroup_size_control")
        families = vk.vkGetPhysicalDeviceQueueFamilyProperties(physical)
        self.family = next(
            (i for i, f in enumerate(families) if f.queueFlags & vk.VK_QUEUE_COMPUTE_BIT), None
        )
        memory = vk.vkGetPhysicalDeviceMemoryProperties(physical)
        self.memory_types = [int(memory.memoryTypes[i].propertyFlags) for i in range(memory.memoryTypeCount)]
        self.memory = max(
            (int(memory.memoryHeaps[i].size) for i in range(memory.memoryHeapCount)
             if memory.memoryHeaps[i].flags & vk.VK_MEMORY_HEAP_DEVICE_LOCAL_BIT), default=0,
        )  # fmt: skip
        shared = self.memory_type(_DEVICE_LOCAL | _MAPPED) is not None
        self.unified = shared and self.type in ("integrated GPU", "CPU")

    def memory_type(self, flags: int, allowed: int = 2**32 - 1) -> int | None:
        for i, has in enumerate(self.memory_types):
            if allowed >> i & 1 and has & flags == flags:
                return i
        return None

    def limits(self) -> dict[str, object]:
        return {
            "name": self.name, "type": self.type, "api": self.api, "memory": self.memory, "unified": self.unified,
            "max_array": self.max_range, "shared_memory": self.max_shared,
            "max_workgroup": self.max_invocations, "subgroup": self.subgroup or "not used",
            "16-bit storage": self.half_storage,
        }  # fmt: skip


@contextmanager
def driver_errors(device: VulkanDevice, what: str, states: str = "States are as they were") -> Iterator[None]:
    """Turn the driver's errors into one sentence each."""
    try:
        yield
    except (vk.VkErrorOutOfDeviceMemory, vk.VkErrorOutOfHostMemory, vk.VkErrorTooManyObjects) as error:
        raise DeviceError(
            f"{device.name} requires more memory for {what}; got {type(error).__name__} from the driver. {states}: "
            f"free some arrays and call again"
        ) from None
    except vk.VkErrorDeviceLost:
        device.lost = f"while {what}"
        device.check()


class VulkanMemory(Memory):
    """A storage buffer, mapped if the memory type allows it."""

    def __init__(self, device: VulkanDevice, nbytes: int, *, flags: Sequence[int], what: str):
        self.device, self.nbytes, self.serial = device, nbytes, next(device.serials)
        self.buffer = self.memory = None
        device.memories.add(self)
        d, f = device.handle, device.facts
        with driver_errors(device, what):
            self.buffer = vk.vkCreateBuffer(
                d,
                vk.VkBufferCreateInfo(
                    size=nbytes,
                    usage=vk.VK_BUFFER_USAGE_STORAGE_BUFFER_BIT
                    | vk.VK_BUFFER_USAGE_TRANSFER_SRC_BIT
                    | vk.VK_BUFFER_USAGE_TRANSFER_DST_BIT,
                    sharingMode=vk.VK_SHARING_MODE_EXCLUSIVE,
                ),
                None,
            )
            needs = vk.vkGetBufferMemoryRequirements(d, self.buffer)
            kinds = ((want, f.memory_type(want, needs.memoryTypeBits)) for want in flags)
            asked, kind = next((row for row in kinds if row[1] is not None), (0, None))
            if kind is None:
                raise DeviceError(
                    f"{device.name} requires memory of a suitable type for {what}; got none from the driver"
                )
            self.memory = vk.vkAllocateMemory(
                d, vk.VkMemoryAllocateInfo(allocationSize=needs.size, memoryTypeIndex=kind), None
            )
            vk.vkBindBufferMemory(d, self.buffer, self.memory, 0)
            self.mapped: Bytes | None = None
            if asked & _MAPPED == _MAPPED:
                self.mapped = np.frombuffer(vk.vkMapMemory(d, self.memory, 0, nbytes, 0), np.uint8)

    def write(self, offset: int, data: Bytes) -> None:
        if self.mapped is not None:
            self.mapped[offset : offset + data.size] = data
        else:
            self.device.through_staging(self, offset, data, to_device=True)

    def read(self, offset: int, out: Bytes) -> None:
        if self.mapped is not None:
            out[...] = self.mapped[offset : offset + out.size]
        else:
            self.device.through_staging(self, offset, out, to_device=False)

    def zero(self, offset: int, nbytes: int) -> None:
        if self.mapped is not None:
            self.mapped[offset : offset + nbytes] = 0
        elif offset % 4 or nbytes % 4:  # vkCmdFillBuffer fills only whole words
            self.write(offset, np.zeros(nbytes, np.uint8))
        else:
            self.device.run_once(lambda cb: vk.vkCmdFillBuffer(cb, self.buffer, offset, nbytes, 0), "filling")

    def copy_from(self, offset: int, source: Memory, source_offset: int, nbytes: int) -> None:
        assert isinstance(source, VulkanMemory)
        if self.mapped is not None and source.mapped is not None:
            self.mapped[offset : offset + nbytes] = source.mapped[source_offset : source_offset + nbytes]
            return
        record = partial(_copy, (source.buffer, source_offset), (self.buffer, offset), nbytes)
        self.device.run_once(record, "copying on the device")

    def free(self) -> None:
        if self.device.handle is None:
            return
        self.mapped = None
        if self.memory is not None:
            vk.vkFreeMemory(self.device.handle, self.memory, None)  # unmaps
        if self.buffer is not None:
            vk.vkDestroyBuffer(self.device.handle, self.buffer, None)
        self.memory = self.buffer = None

    def __del__(self) -> None:
        self.device.forget(self.serial)
        self.free()


class Launch:
    """A recorded call: descriptor sets and a command buffer. It can be submitted again with the same buffers."""

    __slots__ = ("command", "pool", "serials", "submit")

    def __init__(self, pool: object, command: object, serials: frozenset[int]):
        self.pool, self.command, self.serials = pool, command, serials
        self.submit = vk.VkSubmitInfo(pCommandBuffers=[command])


class VulkanDevice(Device):
    """One queue, used by one thread at a time."""

    def __init__(self, index: int):
        self.facts = facts = Facts(physical_devices()[index])
        super().__init__(f"vulkan:{index}", f"{facts.name} ({facts.type})")
        self.most_bytes, self.max_groups = facts.max_range, facts.max_groups
        self.lock = threading.RLock()
        self.serials = count()
        self.memories: weakref.WeakSet[VulkanMemory] = weakref.WeakSet()
        self.unified = facts.unified and os.environ.get("ANYDELTA_VULKAN_COPY") != "1"
        """False: copy between staging and device-local memory. The variable lets a test take that path anywhere."""
        self.handle: object = None
        self.inputs: VulkanMemory | None = None
        self.outputs: VulkanMemory | None = None
        self.local_inputs: VulkanMemory | None = None
        self.local_outputs: VulkanMemory | None = None
        self.generation = 0
        """Counts replacements of the staging buffers. Recordings of earlier buffers are invalid."""
        self.launches: Launches[Launch] = Launches(self._drop)
        self.best_chunk: dict[tuple[object, ...], int] = {}
        """The results of host.measure_chunks."""
        self._pipelines: dict[object, object] = {}
        self._modules: dict[str, object] = {}
        self._open()
        _devices.append(self)

    def _open(self) -> None:
        f = self.facts
        storage = vk.VkPhysicalDevice16BitStorageFeatures(storageBuffer16BitAccess=f.half_storage)
        control = vk.VkPhysicalDeviceSubgroupSizeControlFeatures(
            pNext=storage, subgroupSizeControl=1, computeFullSubgroups=1
        )
        queue = vk.VkDeviceQueueCreateInfo(
            queueFamilyIndex=f.family, pQueuePriorities=[1.0]
        )  # see instance()
        self.handle = vk.vkCreateDevice(
            f.physical,
            vk.VkDeviceCreateInfo(
                pNext=control if f.subgroup else storage,
                pQueueCreateInfos=[queue],
                ppEnabledExtensionNames=f.extensions,
            ),
            None,
        )
        d = self.handle
        self.queue = vk.vkGetDeviceQueue(d, f.family, 0)
        self.commands = vk.vkCreateCommandPool(
            d,
            vk.VkCommandPoolCreateInfo(
                flags=vk.VK_COMMAND_POOL_CREATE_RESET_COMMAND_BUFFER_BIT, queueFamilyIndex=f.family
            ),
            None,
        )
        self.fence = vk.vkCreateFence(d, vk.VkFenceCreateInfo(), None)
        self._fences = vk.ffi.new("VkFence[1]", [self.fence])
        self.sets = vk.vkCreateDescriptorSetLayout(
            d,
            vk.VkDescriptorSetLayoutCreateInfo(
                pBindings=[
                    vk.VkDescriptorSetLayoutBinding(
                        binding=i, descriptorType=vk.VK_DESCRIPTOR_TYPE_STORAGE_BUFFER, descriptorCount=1,
                        stageFlags=vk.VK_SHADER_STAGE_COMPUTE_BIT,
                    )
                    for i in range(BINDINGS)
                ]
            ),
            None,
        )  # fmt: skip
        push = vk.VkPushConstantRange(stageFlags=vk.VK_SHADER_STAGE_COMPUTE_BIT, offset=0, size=PUSH_BYTES)
        self.layout = vk.vkCreatePipelineLayout(
            d, vk.VkPipelineLayoutCreateInfo(pSetLayouts=[self.sets], pPushConstantRanges=[push]), None
        )
        self.pipeline_cache = vk.vkCreatePipelineCache(
            d, vk.VkPipelineCacheCreateInfo(initialDataSize=0), None
        )

    def close(self) -> None:
        """Free everything. Arrays that are still held become invalid."""
        if self.handle is None:
            return
        d = self.handle
        with suppress(vk.VkError):  # lost: there is nothing to wait for
            vk.vkDeviceWaitIdle(d)
        self.launches.clear()
        for memory in list(self.memories):
            memory.free()
        for pipeline in self._pipelines.values():
            vk.vkDestroyPipeline(d, pipeline, None)
        for module in self._modules.values():
            vk.vkDestroyShaderModule(d, module, None)
        vk.vkDestroyPipelineCache(d, self.pipeline_cache, None)
        vk.vkDestroyPipelineLayout(d, self.layout, None)
        vk.vkDestroyDescriptorSetLayout(d, self.sets, None)
        vk.vkDestroyFence(d, self.fence, None)
        vk.vkDestroyCommandPool(d, self.commands, None)
        vk.vkDestroyDevice(d, None)
        self.handle, self.lost = None, "it was closed"

    # ---- memory ----------------------------------------------------------------------------------------------------

    def allocate(self, nbytes: int) -> VulkanMemory:
        self.check()
        local = [_DEVICE_LOCAL | _MAPPED, _DEVICE_LOCAL] if self.unified else [_DEVICE_LOCAL]
        with self.lock:
            return VulkanMemory(self, -(-nbytes // 4) * 4, flags=local, what=f"an array of {nbytes} bytes")

    def limits(self) -> dict[str, object]:
        return self.facts.limits()

    def reserve(self, nbytes_in: int, nbytes_out: int) -> None:
        """Make the staging buffers at least this large."""
        inputs = self._grown(self.inputs, nbytes_in, [_DEVICE_LOCAL | _MAPPED, _MAPPED])
        outputs = self._grown(self.outputs, nbytes_out, [_MAPPED | _CACHED, _MAPPED])
        if inputs is self.inputs and outputs is self.outputs:
            return
        if not self.unified:
            what = "a device's copy of a call's inputs and outputs"
            self.local_inputs = VulkanMemory(self, inputs.nbytes, flags=[_DEVICE_LOCAL], what=what)
            self.local_outputs = VulkanMemory(self, outputs.nbytes, flags=[_DEVICE_LOCAL], what=what)
        self.inputs, self.outputs = inputs, outputs
        self.generation += 1
        self.launches.clear()

    def _grown(self, memory: VulkanMemory | None, nbytes: int, flags: list[int]) -> VulkanMemory:
        if memory is not None and memory.nbytes >= nbytes:
            return memory
        size = min(1 << max(nbytes - 1, 65535).bit_length(), self.facts.max_range)
        return VulkanMemory(self, size, flags=flags, what=f"the {nbytes} bytes of a call")

    def through_staging(self, memory: VulkanMemory, offset: int, data: Bytes, *, to_device: bool) -> None:
        """Copy to or from memory that is not mapped, in pieces."""
        with self.lock:
            self.reserve(1, 1)
            stage = self.inputs if to_device else self.outputs
            assert stage is not None
            assert stage.mapped is not None
            for at in range(0, data.size, stage.nbytes):
                piece = data[at : at + stage.nbytes]
                there, here = (memory.buffer, offset + at), (stage.buffer, 0)
                if to_device:
                    stage.mapped[: piece.size] = piece
                source, target = (here, there) if to_device else (there, here)
                self.run_once(partial(_copy, source, target, piece.size), "copying states")
                if not to_device:
                    piece[...] = stage.mapped[: piece.size]

    # ---- commands --------------------------------------------------------------------------------------------------

    def record(self, write: Callable[[object], None], *, once: bool = False) -> object:
        """A command buffer that `write` has filled."""
        command = vk.vkAllocateCommandBuffers(
            self.handle,
            vk.VkCommandBufferAllocateInfo(
                commandPool=self.commands, level=vk.VK_COMMAND_BUFFER_LEVEL_PRIMARY, commandBufferCount=1
            ),
        )[0]
        flags = vk.VK_COMMAND_BUFFER_USAGE_ONE_TIME_SUBMIT_BIT if once else 0
        vk.vkBeginCommandBuffer(command, vk.VkCommandBufferBeginInfo(flags=flags))
        write(command)
        barrier(command, vk.VK_PIPELINE_STAGE_HOST_BIT, vk.VK_ACCESS_HOST_READ_BIT)
        vk.vkEndCommandBuffer(command)
        return command

    def submit(self, info: object, what: str) -> None:
        """Submit and wait. If the device is lost, every state is invalid."""
        with driver_errors(self, what):
            vk.vkQueueSubmit(self.queue, 1, info, self.fence)
            vk.vkWaitForFences(self.handle, 1, self._fences, 1, FOREVER)
            vk.vkResetFences(self.handle, 1, self._fences)

    def run_once(self, write: Callable[[object], None], what: str) -> None:
        with self.lock:
            command = self.record(write, once=True)
            try:
                self.submit(vk.VkSubmitInfo(pCommandBuffers=[command]), what)
            finally:
                vk.vkFreeCommandBuffers(self.handle, self.commands, 1, [command])

    def _drop(self, launch: Launch) -> None:
        vk.vkFreeCommandBuffers(self.handle, self.commands, 1, [launch.command])
        vk.vkDestroyDescriptorPool(self.handle, launch.pool, None)

    def forget(self, serial: int) -> None:
        """Drop the recordings that use a buffer, which is freed."""
        with self.lock:
            self.launches.forget(serial)

    def descriptors(
        self, bindings: Sequence[Sequence[tuple[VulkanMemory, int, int]]]
    ) -> tuple[object, list[object]]:
        """(pool, sets): one set per row of (memory, offset, bytes)."""
        d = self.handle
        size = vk.VkDescriptorPoolSize(
            type=vk.VK_DESCRIPTOR_TYPE_STORAGE_BUFFER, descriptorCount=BINDINGS * len(bindings)
        )
        pool = vk.vkCreateDescriptorPool(
            d, vk.VkDescriptorPoolCreateInfo(maxSets=len(bindings), pPoolSizes=[size]), None
        )
        sets = vk.vkAllocateDescriptorSets(
            d, vk.VkDescriptorSetAllocateInfo(descriptorPool=pool, pSetLayouts=[self.sets] * len(bindings))
        )
        writes = [
            vk.VkWriteDescriptorSet(
                dstSet=sets[i], dstBinding=j, dstArrayElement=0, descriptorCount=1,
                descriptorType=vk.VK_DESCRIPTOR_TYPE_STORAGE_BUFFER,
                pBufferInfo=[vk.VkDescriptorBufferInfo(buffer=memory.buffer, offset=offset, range=nbytes)],
            )
            for i, row in enumerate(bindings)
            for j, (memory, offset, nbytes) in enumerate(row)
        ]  # fmt: skip
        vk.vkUpdateDescriptorSets(d, len(writes), writes, 0, None)
        return pool, list(sets)

    def bound(self, array: DeviceArray) -> tuple[tuple[VulkanMemory, int, int], int]:
        """((memory, offset, bytes) for a descriptor, first element after that offset)."""
        memory = array.memory
        assert isinstance(memory, VulkanMemory)
        rest = array.offset % self.facts.alignment
        start = array.offset - rest
        nbytes = min(-(-(rest + array.nbytes) // 4) * 4, memory.nbytes - start)
        return (memory, start, max(nbytes, 4)), rest // (2 if array.dtype == "bfloat16" else 4)

    def pipeline(self, name: str, invocations: int, subgroup: bool, constants: tuple[int, ...]) -> object:
        """A compute pipeline; `constants` are the specialisation constants after the workgroup size."""
        key = (name, invocations, subgroup, constants)
        if key not in self._pipelines:
            self._pipelines[key] = self._compile(name, subgroup, (invocations, *constants))
        return self._pipelines[key]

    def _compile(self, name: str, subgroup: bool, constants: tuple[int, ...]) -> object:
        if name not in self._modules:
            code = shader(name)
            assert code is not None, name
            info = vk.VkShaderModuleCreateInfo(codeSize=len(code), pCode=code)
            self._modules[name] = vk.vkCreateShaderModule(self.handle, info, None)
        data = np.array(constants, np.uint32).tobytes()
        entries = [
            vk.VkSpecializationMapEntry(constantID=i, offset=4 * i, size=4) for i in range(len(constants))
        ]
        special = vk.VkSpecializationInfo(
            pMapEntries=entries, dataSize=len(data), pData=vk.ffi.from_buffer(data)
        )
        pinned = vk.VkPipelineShaderStageRequiredSubgroupSizeCreateInfo(
            requiredSubgroupSize=self.facts.subgroup
        )
        stage = vk.VkPipelineShaderStageCreateInfo(
            pNext=pinned if subgroup else None,
            flags=_FULL_SUBGROUPS if subgroup else 0,
            stage=vk.VK_SHADER_STAGE_COMPUTE_BIT, module=self._modules[name], pName="main", pSpecializationInfo=special,
        )  # fmt: skip
        info = vk.VkComputePipelineCreateInfo(stage=stage, layout=self.layout)
        with driver_errors(self, f"compiling {name}"):
            return vk.vkCreateComputePipelines(self.handle, self.pipeline_cache, 1, [info], None)[0]


def _copy(source: tuple[object, int], target: tuple[object, int], nbytes: int, command: object) -> None:
    """Record a copy between two (buffer, offset)."""
    region = vk.VkBufferCopy(srcOffset=source[1], dstOffset=target[1], size=nbytes)
    vk.vkCmdCopyBuffer(command, source[0], target[0], 1, [region])


def barrier(command: object, stage: int, access: int) -> None:
    """Make earlier writes visible to `access` in `stage`."""
    written = vk.VK_ACCESS_SHADER_WRITE_BIT | vk.VK_ACCESS_TRANSFER_WRITE_BIT
    before = vk.VK_PIPELINE_STAGE_COMPUTE_SHADER_BIT | vk.VK_PIPELINE_STAGE_TRANSFER_BIT
    memory = vk.VkMemoryBarrier(srcAccessMask=written, dstAccessMask=access)
    vk.vkCmdPipelineBarrier(command, before, stage, 0, 1, [memory], 0, None, 0, None)
