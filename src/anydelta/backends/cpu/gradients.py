"""Gradients by the native kernels (backends/cpu/backward.inl.h). Of the forward pass only the inputs are kept."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ...core.arguments import in_order
from ...core.native import core as _core
from ...rule.arguments import TOKENS, Call
from ...rule.spec import CallSpec, dtype_name, element_strides
from . import host

if TYPE_CHECKING:
    import torch

_arrays = in_order(Call)
_SMALL = ("A_log", "dt_bias", "cu_seqlens", "state_indices")


def gradients(
    spec: CallSpec, call: Call, grad_o: torch.Tensor, grad_state: torch.Tensor | None
) -> dict[str, torch.Tensor | None]:
    """d loss / d input by name, given d loss / d o and d loss / d final state (in the caller's layout)."""
    import torch

    strides, copies = host.token_strides(call)
    copies += host.scattered(call, _SMALL)
    fields, state_copy, _ = host.rule_fields(spec, call, strides)
    inner = replace(call, **{name: host.contiguous(getattr(call, name)) for name in copies})
    if state_copy:
        inner.state_in = host.contiguous(call.state_in)
    grad_o = _dense_rows(grad_o)
    written: dict[str, Any] = {
        name: torch.empty_like(x, memory_format=torch.contiguous_format)
        for name in TOKENS
        if (x := getattr(inner, name)) is not None
    }
    new = call.q.new_empty
    channels = (spec.K,) if spec.kda else ()
    initial = A_log = dt_bias = None
    if call.state_in is not None:
        initial = new((spec.N, *call.state_in.shape[1:]), dtype=torch.float32)
    if call.A_log is not None:
        A_log = new((spec.N, spec.HV), dtype=torch.float32)
    if call.dt_bias is not None:
        dt_bias = new((spec.N, spec.HV, *channels), dtype=torch.float32)
    told = {name: _tokens(written.get(name)) for name in TOKENS}
    told["o"] = _tokens(grad_o)
    told["state"] = (0, 0, 0, 0)
    if grad_state is not None:
        grad_state = _dense_rows(grad_state)
        told["state"] = (0, *element_strides(grad_state)[:3])
    number, torchs = host.threads_of(spec.framework)
    plan = _core.Plan(fields, None if torchs else number)
    outs = (*(written.get(name) for name in ("q", "k", "v", "g", "beta", "erase")), initial, A_log, dt_bias)
    given = (*_arrays(inner), grad_o, grad_state)
    if not host.reads_arrays(spec.framework, ()):
        outs, given = tuple(map(host.address, outs)), tuple(map(host.address, given))
    _core.run_backward(plan, told, given[:-2], (*outs, *given[-2:]))
    if initial is not None and call.state_indices is not None:
        rows = call.state_indices.long().clamp(min=0)  # of a skipped sequence zeros
        initial = initial.new_zeros(tuple(call.state_in.shape)).index_add_(0, rows, initial)
    found = {**written, "state_in": initial}
    found["A_log"] = None if A_log is None else A_log.sum(0)
    found["dt_bias"] = None if dt_bias is None else dt_bias.sum(0).reshape(call.dt_bias.shape)
    return {name: None if x is None else x.to(getattr(call, name).dtype) for name, x in found.items()}


def _dense_rows(x: torch.Tensor) -> torch.Tensor:
    """With a contiguous last dimension."""
    return x if x.shape[-1] == 1 or x.stride(-1) == 1 else x.contiguous()


def _tokens(x: torch.Tensor | None) -> tuple[int, ...]:
    if x is None:
        return (0, 0, 0, 0, 0)
    return (host.DTYPE[dtype_name(x)], *element_strides(x)[:3], x.shape[2])
