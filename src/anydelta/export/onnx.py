"""ONNX: export programs that use the operator, for ONNX Runtime's CPU provider or with a standard operator.

`to_onnx(program)` writes each call as one node, by default `anydelta.GatedDeltaRule`, whose kernel is in
libanydelta_onnxruntime (onnxruntime_library.cpp). `session` loads that library. Needs the packages `onnx` and
`onnxscript`, and `onnxruntime` to run. An ONNX program cannot change its inputs: a state is an input and an output.
"""

from __future__ import annotations

from operator import getitem
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.export.graph_signature import InputKind, OutputKind, OutputSpec, TensorArgument
from torch.fx import Node
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten

from ..core import libraries
from ..rule import torch_ops as torch_op  # noqa: F401  (defines torch.ops.anydelta)
from ..rule.arguments import FUNCTIONAL, Options, write_strength

if TYPE_CHECKING:
    from collections.abc import Callable

    import onnxruntime

OPERATORS = ("anydelta", "com.microsoft", "onnx")
"""What a call becomes: anydelta's operator, ONNX Runtime's LinearAttention, or the ONNX standard's (opset 27)."""

LINEAR_ATTENTION_OPSET = 27
"""The first opset of the ONNX standard that has LinearAttention."""

_STANDARD = "anydelta.standard"
"""Replaces the standard's own domain while torch's exporter converts the other nodes from the opset that it writes:
there is no older LinearAttention to convert from."""

MINIMUM = (1, 17)
"""The first onnxruntime with everything that the library uses."""


def library() -> Path:
    """The library of custom operators, for `SessionOptions.register_custom_ops_library` or its C twin.

    Raises:
        RuntimeError: there is none; with the reason.
    """
    path, reason = libraries.find("anydelta_onnxruntime", "onnxruntime", MINIMUM)
    if path is None:
        raise RuntimeError(f"export: there is no anydelta_onnxruntime to load: {reason}")
    return path


def session(
    model: str | bytes | Path, options: onnxruntime.SessionOptions | None = None
) -> onnxruntime.InferenceSession:
    """An `onnxruntime.InferenceSession` on the CPU that has the operator. `options` are SessionOptions to extend.

    Raises:
        RuntimeError: there is no library to load; with the reason.
    """
    import onnxruntime

    options = options or onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(library()))
    model = str(model) if isinstance(model, Path) else model
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def to_onnx(program: torch.export.ExportedProgram, *, operator: str = "anydelta") -> torch.onnx.ONNXProgram:
    """An exported program as a `torch.onnx.ONNXProgram` (`.save(path)`, `.model_proto`).

    States that calls advance in place must be inputs of the program. The program gets an output NAME_out for each,
    after its own outputs and in the order of the inputs.

    Args:
        program: from `torch.export.export`. Its graph is changed.
        operator: one of `OPERATORS`. The last two compute gates and norms in separate nodes, and take neither masks nor
            packed sequences. "onnx" also repeats q and k if v has more heads.

    Raises:
        ValueError: a state is a buffer, which an ONNX program cannot keep; or the chosen operator cannot express the
            call. The text says which.
    """
    if operator not in OPERATORS:
        raise ValueError(f"to_onnx: operator must be one of {OPERATORS}; got {operator!r}")
    for node in list(program.graph.nodes):
        _functional(program.graph, node)
    program.graph_module.recompile()
    write = _gated_delta_rule if operator == "anydelta" else _linear_attention(operator)
    program = program.run_decompositions({torch.ops.anydelta.gated_delta_rule.default: write})
    states = _return_states(program)
    standard = operator == "onnx"
    exported = torch.onnx.export(
        program, dynamo=True, opset_version=LINEAR_ATTENTION_OPSET if standard else None, verbose=False
    )
    assert exported is not None  # which is for exports to a file
    if standard:
        for node in exported.model.graph:
            node.domain = node.domain.removeprefix(_STANDARD)
        del exported.model.opset_imports[_STANDARD]
    outputs = exported.model.graph.outputs
    for value, name in zip(outputs[len(outputs) - len(states) :], states, strict=True):
        value.name = f"{name}_out"
    return exported


# ---- the nodes: decompositions of torch.ops.anydelta.gated_delta_rule


_DTYPES = {"gate": torch.float32, "weight": torch.float32, "index": torch.int64}
"""Dtypes of the node's inputs by the kinds of the table. Other inputs keep theirs."""


def _bind(
    tensors: tuple[Tensor | None, ...], given: dict[str, object]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(arrays by name, the options that were given)."""
    arrays, _ = FUNCTIONAL.bind(*tensors, **given)
    return dict(zip(FUNCTIONAL.arguments, arrays, strict=True)), {
        n: given[n] for n in FUNCTIONAL.flags if n in given
    }


def _gated_delta_rule(*tensors: Tensor | None, **options: object) -> tuple[Tensor, Tensor]:
    """The node anydelta.GatedDeltaRule, with inputs in its types."""
    arrays, flags = _bind(tensors, options)
    q, v, initial_state = arrays["q"], arrays["v"], arrays.get("state_in")
    inputs = []
    for name in FUNCTIONAL.tensors:
        x = arrays.get(name)
        inputs.append(None if x is None else x.to(_DTYPES.get(FUNCTIONAL.row(name).kind, x.dtype)))
    while inputs[-1] is None:
        inputs.pop()
    keep = {name: value for name, value in flags.items() if value is not None and name in _ATTRIBUTES}
    state = _state_shape(q, v, arrays.get("cu_seqlens"), flags)
    o, final = torch.onnx.ops.symbolic_multi_out(
        "anydelta::GatedDeltaRule",
        inputs,
        {name: int(value) if isinstance(value, bool) else value for name, value in keep.items()},
        dtypes=(v.dtype, torch.float32 if initial_state is None else initial_state.dtype),
        shapes=(v.shape, state),
        version=1,
    )
    return o, final


_ATTRIBUTES = frozenset(FUNCTIONAL.flags) - {"output_final_state"}


def _state_shape(
    q: Tensor, v: Tensor, cu_seqlens: Tensor | None, flags: dict[str, object]
) -> list[int | torch.SymInt]:
    N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    K, V = q.shape[3], v.shape[3]
    return [N, v.shape[2], *((K, V) if flags.get("state_layout", "kv") == "kv" else (V, K))]


_LINEAR_ATTENTION = ("q", "k", "v", "g", "beta", "state_in", "A_log", "dt_bias")
"""The arrays that LinearAttention can take."""


def _linear_attention(domain: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """LinearAttention of the standard or of com.microsoft, after nodes for log decay, beta and normalised keys."""

    def write(*tensors: Tensor | None, **options: object) -> tuple[Tensor, Tensor]:
        arrays, flags = _bind(tensors, options)
        found = {name: x for name, x in arrays.items() if x is not None}
        taken = [found.pop(name, None) for name in _LINEAR_ATTENTION]
        refused = ["a mask" if name == "mask" else name for name in found]
        q, k, v, g, beta, initial_state, A_log, dt_bias = taken
        if q.dtype != torch.float32:
            refused.append(f"{str(q.dtype).removeprefix('torch.')} q, k and v")
        if flags.get("scale") == 0:
            refused.append("scale 0")
        if refused:
            raise ValueError(
                f"to_onnx: LinearAttention takes float32 batches of equal length; got {', '.join(refused)}. "
                'Use operator="anydelta"'
            )
        B, T, H, K = q.shape
        HV, V = v.shape[2:]
        if flags.get("qk_l2norm"):
            q, k = (
                x * torch.rsqrt(x.square().sum(-1, keepdim=True) + flags.get("qk_l2norm_eps", 1e-6))
                for x in (q, k)
            )
        if HV != H and (domain == "onnx" or flags.get("heads") == "tiled"):
            each = HV // H
            q, k = (
                x.repeat(1, 1, each, 1) if flags.get("heads") == "tiled" else x.repeat_interleave(each, 2)
                for x in (q, k)
            )
        g, beta = _gates(g.float(), beta.float(), A_log, dt_bias, flags)
        vk = flags.get("state_layout") == "vk"
        if initial_state is None:
            state = q.new_zeros(B, HV, K, V)
        else:
            state = initial_state.float()
            state = state.transpose(2, 3) if vk else state
        scale = flags.get("scale")
        o, final = torch.onnx.ops.symbolic_multi_out(
            f"{_STANDARD if domain == 'onnx' else domain}::LinearAttention",
            (q.flatten(2), k.flatten(2), v.flatten(2), state, g.flatten(2), beta),
            dict(
                q_num_heads=q.shape[2],
                kv_num_heads=HV,
                update_rule="gated_delta",
                scale=K**-0.5 if scale is None else scale,
            ),
            dtypes=(v.dtype, state.dtype),
            shapes=([B, T, HV * V], [B, HV, K, V]),
            version=1,
        )
        final = final.transpose(2, 3) if vk else final
        return o.unflatten(-1, (HV, V)), final if initial_state is None else final.to(initial_state.dtype)

    return write


def _gates(
    g: Tensor, beta: Tensor, A_log: Tensor | None, dt_bias: Tensor | None, flags: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """The log decay and the write strength, as docs/conventions.md defines them."""
    decay = flags.get("decay", "log")
    if decay == "linear":
        g = g.log()
    elif decay == "raw":
        assert A_log is not None
        if dt_bias is not None:
            g = g + dt_bias.float().view(g.shape[2:])
        A = A_log.float().exp()
        A = A[:, None] if g.dim() == 4 else A
        bound = flags.get("lower_bound")
        g = -A * F.softplus(g) if bound is None else bound * torch.sigmoid(A * g)
    return g, write_strength(beta, Options(**flags))


# ---- the graph


def _functional(graph: torch.fx.Graph, node: Node) -> None:
    """gated_delta_rule_ as gated_delta_rule and a copy into the state. Decomposition then separates them."""
    ops = torch.ops.anydelta
    if node.target is ops.gated_delta_rule_snapshots.default:
        raise ValueError("to_onnx: an ONNX operator changes none of its inputs; got a call with snapshots")
    if node.target is not ops.gated_delta_rule_.default:
        return
    names = [a.name for a in ops.gated_delta_rule_.default._schema.arguments]
    given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    for name in ("snapshots", "snapshot_indices", "state_indices"):
        if given.pop(name, None) is not None:
            raise ValueError(f"to_onnx: an ONNX operator changes none of its inputs; got a call with {name}")
    state = given.pop("state")
    with graph.inserting_before(node):
        call = graph.call_function(
            ops.gated_delta_rule.default, (), {**given, "initial_state": state, "output_final_state": True}
        )
        o, final = (graph.call_function(getitem, (call, i)) for i in (0, 1))
        copy = graph.call_function(torch.ops.aten.copy_.default, (state, final))
    o.meta.update(node.meta)
    final.meta.update(node.meta, val=state.meta["val"])
    copy.meta.update(final.meta)
    call.meta.update(node.meta, val=(o.meta["val"], final.meta["val"]))
    node.replace_all_uses_with(o)
    graph.erase_node(node)


def _return_states(program: torch.export.ExportedProgram) -> list[str]:
    """Return as outputs what the program writes to its inputs: the exporter would silently drop it.

    Returns the names of these inputs, in the order of the outputs.
    """
    signature = program.graph_signature
    buffers = signature.buffers_to_mutate
    if buffers:
        raise ValueError(
            "to_onnx: a state must be an input of the program, because ONNX programs keep nothing between calls; got "
            f"the buffer {next(iter(buffers.values()))!r}. Pass it in, and its output in again"
        )
    inputs = [s.arg.name for s in signature.input_specs if s.kind is InputKind.USER_INPUT]
    output = program.graph.output_node()
    values = dict(zip((id(s) for s in signature.output_specs), output.args[0], strict=True))
    own = [s for s in signature.output_specs if s.kind is not OutputKind.USER_INPUT_MUTATION]
    states = [s for s in signature.output_specs if s.kind is OutputKind.USER_INPUT_MUTATION]
    states.sort(key=lambda s: inputs.index(s.target))
    fresh = [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(s.arg.name), None) for s in states]
    output.args = (tuple(values[id(s)] for s in (*own, *states)),)
    signature.output_specs = [*own, *fresh]
    flat = tuple(range(len(signature.output_specs)))
    program.module_call_graph[0].signature.out_spec = tree_flatten(flat)[1]
    program.graph_module.recompile()
    return [s.target for s in states]
