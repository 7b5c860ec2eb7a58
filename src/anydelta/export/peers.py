"""A graph pass: calls of ExecuTorch's own gated delta rules in an exported program become calls of anydelta's.

    metal::gated_delta_rule    [B, T, H, D], the decay itself, state [B, Hv, Dv, Dk] advanced in place, no scale
    llama::gated_delta_rule [B, H, T, D], the decay itself, state [B, Hkv, K, V] in and out, no scale; query heads may
                               be more than the others, which are then repeated

`anydelta.compat.executorch` describes both.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

if TYPE_CHECKING:
    from collections.abc import Callable


from ..rule import torch_ops as torch_op  # noqa: F401  (defines torch.ops.anydelta)

METAL = "metal::gated_delta_rule"
LLAMA = "llama::gated_delta_rule"


def use_anydelta(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Replace the calls in the program, as `torch.export.export` returned it; gives the same program back.

    Raises:
        ValueError: the program was decomposed, so that the state of metal::gated_delta_rule is no longer in its call.
    """
    graph = program.graph
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if any(isinstance(arg, torch._ops.OpOverload) and arg._schema.name == METAL for arg in node.args):
            raise ValueError(
                "use_anydelta: the program must be as torch.export.export returned it; got one in which "
                f"{METAL} is functionalised. Call it before run_decompositions and to_edge"
            )
        name = getattr(getattr(node.target, "_schema", None), "name", None)
        if name == METAL:
            _metal(node)
        elif name == LLAMA:
            _llama(graph, node)
    graph.lint()
    program.graph_module.recompile()
    return program


def _arguments(node: Node, *names: str) -> list[Any]:
    return [*node.args, *(node.kwargs[name] for name in names[len(node.args) :])]


def _metal(node: Node) -> None:
    node.args = tuple(_arguments(node, "q", "k", "v", "g", "beta", "state"))
    node.kwargs = {"scale": 1.0, "decay": "linear", "state_layout": "vk"}
    node.target = torch.ops.anydelta.gated_delta_rule_.default


def _llama(graph: torch.fx.Graph, node: Node) -> None:
    aten = torch.ops.aten
    inputs = _arguments(node, "query", "key", "value", "decay", "beta", "initial_state")
    each = inputs[0].meta["val"].shape[1] // inputs[1].meta["val"].shape[1]

    def call(target: Callable[..., object], *args: Any, **kwargs: Any) -> Node:
        new = graph.call_function(target, args, kwargs)
        real = [a.meta["val"] if isinstance(a, Node) else a for a in args]
        new.meta.update({k: v for k, v in node.meta.items() if k != "val"}, val=target(*real, **kwargs))
        return new

    with graph.inserting_before(node):
        if each != 1:
            inputs[1:] = [call(aten.repeat_interleave.self_int, x, each, 1) for x in inputs[1:]]
        *tokens, state = inputs
        tokens = [call(aten.transpose.int, x, 1, 2) for x in tokens]
        ours = call(torch.ops.anydelta.gated_delta_rule.default, *tokens, state, scale=1.0, decay="linear")
        o, final = call(operator.getitem, ours, 0), call(operator.getitem, ours, 1)
        results = [call(aten.contiguous.default, call(aten.transpose.int, o, 1, 2)), final]
        if each != 1:
            kept = call(aten.slice.Tensor, final, 1, 0, torch.iinfo(torch.int64).max, each)
            results[1] = call(aten.contiguous.default, kept)
    for user in list(node.users):
        if user.target is not operator.getitem:
            raise ValueError(
                f"use_anydelta: {LLAMA}'s results must be taken one by one; got {user.format_node()}"
            )
        user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index]
        graph.erase_node(user)
    graph.erase_node(node)
