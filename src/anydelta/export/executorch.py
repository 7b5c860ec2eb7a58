"""ExecuTorch: lower exported programs that use the operator, and load its kernels into the Python runtime.

`lower` makes an ExecuTorch program whose calls are anydelta::gated_delta_rule.out, gated_delta_rule_snapshots.out and
gated_delta_rule_inplace.out. The kernels of these are in libanydelta_executorch (executorch_library.cpp), which Python
loads by `load()` and a C++ program links. Needs the `executorch` package, the one that anydelta was built with.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..core import libraries
from ..rule import torch_ops as torch_op
from ..rule.arguments import INPLACE

if TYPE_CHECKING:
    from executorch.exir import ExecutorchProgramManager
    from executorch.exir.passes import MemoryPlanningPass

MINIMUM = (1, 5)
"""The first executorch package with C++ libraries and a registry that accepts other operators."""


def library() -> Path:
    """The library that a C++ program links to run programs with the operator.

    Raises:
        RuntimeError: there is none; with the reason.
    """
    path, reason = libraries.find("anydelta_executorch", "executorch", MINIMUM)
    if path is None:
        raise RuntimeError(f"export: there is no anydelta_executorch to load or link: {reason}")
    return path


@cache
def load() -> ctypes.CDLL:
    """Register the kernels with the runtime of `executorch.runtime`, once.

    Raises:
        RuntimeError: there is no library, or it was built for another release.
    """
    from importlib.metadata import version

    path = library()
    # loads the C++ runtime, in which the library registers
    from executorch.extension.pybindings import portable_lib  # noqa: F401

    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise RuntimeError(f"export: {path.name} does not load ({error}). Build anydelta again") from None
    loaded.anydelta_executorch_version.restype = ctypes.c_char_p
    built = loaded.anydelta_executorch_version().decode().split("+")[0]
    if built != version("executorch").split("+")[0]:
        raise RuntimeError(
            f"export: anydelta_executorch was built for executorch {built}; got {version('executorch')}. "
            "Build anydelta again"
        )
    return loaded


def schemas() -> dict[str, tuple[str, str]]:
    """By ExecuTorch's name of the operator: its schema, and the schema with results as arguments."""
    both = {}
    for name, schema in torch_op.SCHEMAS.items():
        theirs = _name(name)
        head, _, returns = schema.removeprefix(name).rpartition(" -> ")
        count = returns.count("Tensor")
        marks = [f"Tensor({letter}!)" for letter in "yz"[:count]]
        outs = [f"{mark} out{i if count > 1 else ''}" for i, mark in enumerate(marks)]
        wrapped = marks[0] if count == 1 else f"({', '.join(marks)})"
        both[theirs] = (
            theirs + schema.removeprefix(name),
            f"{theirs}.out{head.removesuffix(')')}, {', '.join(outs)}) -> {wrapped}",
        )
    return both


def _name(name: str) -> str:
    """The name without a trailing underscore, which the exporter reads as a method of the first argument."""
    return name[:-1] + "_inplace" if name.endswith("_") else name


@cache
def _register() -> torch.library.Library:
    """Register the forms of the operators that ExecuTorch's exporter looks for."""
    library = torch.library.Library("anydelta", "FRAGMENT")
    for name, (schema, out) in schemas().items():
        if name not in torch_op.SCHEMAS:
            library.define(schema)
            ours = getattr(torch.ops.anydelta, name.removesuffix("_inplace") + "_").default
            library.impl(name, ours, "CompositeExplicitAutograd")
            torch.library.register_fake(f"anydelta::{name}", partial(torch_op._fake, INPLACE), lib=library)
        library.define(out)
    return library


def lower(
    programs: torch.export.ExportedProgram | Mapping[str, torch.export.ExportedProgram],
    *,
    share_states: bool = False,
) -> ExecutorchProgramManager:
    """Exported programs as an `ExecutorchProgramManager`. Its `buffer` is the content of a .pte file.

    A state that is a registered buffer is part of the program and is advanced in place, without a copy.

    Args:
        programs: one program, which becomes the method "forward", or several by the names of their methods, from
            `torch.export.export`. Their graphs are changed.
        share_states: buffers with the same name share memory in all methods, so that a prefill passes its states to the
            decode step. They begin as the runtime's memory, which the `Module` of Python and of C++ (with
            share_memory_arenas) fills with zeros.

    Raises:
        ValueError: a program advances a state that is its input, and the runtime copies inputs. Or shared states do not
            begin at zero.
    """
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge
    from executorch.exir.passes.init_mutable_pass import InitializedMutableBufferPass

    _register()
    methods = dict(programs) if isinstance(programs, Mapping) else {"forward": programs}
    inplace = torch.ops.anydelta.gated_delta_rule_.default
    for name, program in methods.items():
        inputs = set(program.graph_signature.user_inputs)
        for node in program.graph.find_nodes(op="call_function", target=inplace):
            state = node.args[5] if len(node.args) > 5 else node.kwargs["state"]
            if state.name in inputs:
                raise ValueError(
                    f"export: ExecuTorch requires the state to be a registered buffer; got the input "
                    f"{state.name!r} of {name!r}, which the runtime copies before a call"
                )
            node.target = getattr(torch.ops.anydelta, _name("gated_delta_rule_")).default
        program.graph_module.recompile()
    # the check wants core ATen operators only
    edge = to_edge(methods, compile_config=EdgeCompileConfig(_check_ir_validity=False))
    initialized = []
    for name in methods:
        lowered = edge.exported_program(name)
        signature = lowered.graph_signature
        mutated = set(signature.buffers_to_mutate.values())
        for placeholder, buffer in signature.inputs_to_buffers.items():
            if buffer not in mutated:
                continue
            initialized.append(placeholder)
            value = lowered.state_dict.get(buffer, lowered.constants.get(buffer))
            if share_states and value is not None and value.any():
                raise ValueError(
                    f"export: shared states must begin at zero, as the runtime's memory does; got {buffer!r} of "
                    f"{name!r}. Lower the methods without share_states, or advance the state by a first call"
                )
    config = ExecutorchBackendConfig(
        passes=[] if share_states else [InitializedMutableBufferPass(initialized)],
        memory_planning_pass=_planning(share_states),
    )
    return edge.to_executorch(config)


LINE = 64
"""Bytes of a cache line, and of a vector of AVX-512."""
AFTER_LINE = 16
"""Offset from a cache line at which large blocks of glibc's malloc begin, and the runtime's memory with them."""


def _planning(share_states: bool) -> MemoryPlanningPass:
    """The pass that places every tensor in the runtime's memory: at the beginning of a cache line.

    A state across lines costs the kernel a fourth of its speed at T = 1. If the memory begins at another offset than
    AFTER_LINE, nothing is lost.
    """
    from executorch.exir.memory_planning import MemoryPlanningAlgorithmSuite
    from executorch.exir.passes import MemoryPlanningPass

    class Lines(MemoryPlanningAlgorithmSuite):  # type: ignore[misc]
        def __call__(self, alignment: int, specs: object, graph: Any, *more: object) -> object:
            taken = getattr(graph, "input_mem_buffer_sizes", None) or [0, 0]  # used by graphs inside this one
            graph.input_mem_buffer_sizes = [0, *(-(-n // LINE) * LINE + LINE - AFTER_LINE for n in taken[1:])]
            return super().__call__(alignment, specs, graph, *more)

    class Planning(MemoryPlanningPass):  # type: ignore[misc]
        def run_multimethod(self) -> None:
            super().run_multimethod()
            if not share_states:
                return
            for specs in self.state.mutable_buffers.values():
                for spec in specs:
                    spec.mem_offset += LINE - AFTER_LINE
            for graph in self.state.graph_modules:
                graph.meta["non_const_buffer_sizes"][2] += LINE - AFTER_LINE

    return Planning(Lines(), share_mutable_buffers=share_states, alignment=LINE)
