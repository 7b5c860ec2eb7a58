"""vLLM's chunked rule on a GPU as `gated_delta_rule`: what ANYDELTA_VLLM=cuda registers.

Written against the interface of vLLM 0.32's ChunkGatedDeltaRule and tested with stand-ins for vLLM. It has never run
inside vLLM on a GPU.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import vllm.model_executor.layers.mamba.gdn.qwen_gdn_linear_attn as qwen
from vllm.model_executor.custom_op import CustomOp, op_registry_oot

from ...core.dispatch import UnsupportedError
from ...rule.op import gated_delta_rule

NAME = "ChunkGatedDeltaRule"
ARGUMENTS = (
    "self", "q", "k", "v", "g", "beta", "initial_state", "output_final_state", "cu_seqlens", "chunk_indices",
    "chunk_offsets", "use_qk_l2norm_in_kernel", "core_attn_out", "aiter_prefill_metadata",
)  # fmt: skip
EPS = 1e-6


class ChunkGatedDeltaRule(qwen.ChunkGatedDeltaRule):
    """The prefill of packed sequences. Calls that no native kernel takes fall back to vLLM's own."""

    _forward_method: Any

    def __init__(self) -> None:
        super().__init__()
        self._theirs = self._forward_method
        self._forward_method = self.forward_anydelta

    def forward_anydelta(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        initial_state: torch.Tensor,
        output_final_state: bool,
        cu_seqlens: torch.Tensor | None = None,
        chunk_indices: torch.Tensor | None = None,
        chunk_offsets: torch.Tensor | None = None,
        use_qk_l2norm_in_kernel: bool = True,
        core_attn_out: torch.Tensor | None = None,
        aiter_prefill_metadata: object | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """q, k [1, T, H, K], v [1, T, HV, V], g and beta [1, T, HV], initial_state [N, HV, V, K]."""
        try:
            o, state = gated_delta_rule(
                q, k, v, g=g, beta=beta, initial_state=initial_state, state_layout="vk", cu_seqlens=cu_seqlens,
                qk_l2norm=use_qk_l2norm_in_kernel, qk_l2norm_eps=EPS, output_final_state=output_final_state,
                backend=BACKEND[q.device.type],
            )  # fmt: skip
        except (KeyError, UnsupportedError):
            found: tuple[torch.Tensor, torch.Tensor | None] = self._theirs(
                q, k, v, g, beta, initial_state, output_final_state, cu_seqlens, chunk_indices, chunk_offsets,
                use_qk_l2norm_in_kernel, core_attn_out, aiter_prefill_metadata,
            )  # fmt: skip
            return found
        if core_attn_out is not None:
            core_attn_out.reshape(-1)[: o.numel()].copy_(o.reshape(-1))
        return o, state


BACKEND = {"cuda": "triton", "xpu": "triton"}
"""The native backend of a device. If it refuses, vLLM's kernel runs: the reference would be slower."""


def register() -> list[str]:
    """Replace vLLM's by ours.

    Returns:
        The names of what is replaced.

    Raises:
        LookupError: with the reason, if this vLLM is not supported.
    """
    got: Any = tuple(inspect.signature(qwen.ChunkGatedDeltaRule.forward_native).parameters)
    if got != ARGUMENTS:
        raise LookupError(f"its {NAME} takes {', '.join(got)}, not {', '.join(ARGUMENTS)}")
    if NAME in op_registry_oot:
        raise LookupError(f"{op_registry_oot[NAME].__module__} has registered an operator for {NAME} already")
    CustomOp.register_oot(name=NAME)(ChunkGatedDeltaRule)
    return [NAME]
