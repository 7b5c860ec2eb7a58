"""Context parallelism: one sequence over several processes of `torch.distributed`, for prompts longer than one machine.

    import anydelta.distributed as dist_delta

    o, state = dist_delta.gated_delta_rule(q, k, v, g=g, beta=beta, group=group)
    o, conv_state, state = dist_delta.gated_delta_mixer(qkv, conv_state, state, ..., group=group)

Each process gives its piece of the tokens and gets the outputs of that piece; every process gets the final states. The
result is that of one process, to rounding. What moves between processes does not grow with the tokens. No gradients.
"""

from .mixer import gated_delta_mixer
from .rule import gated_delta_rule

__all__ = ["gated_delta_mixer", "gated_delta_rule"]
