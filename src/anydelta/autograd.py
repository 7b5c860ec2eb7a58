"""Gradients of the functional operator: the recurrence run again in torch, under autograd.

Nothing but the inputs is kept from the forward pass. The backward pass repeats the recurrence in blocks of tokens
and keeps one state per block (see backends/reference.py), so memory does not grow with T times the state.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from .backends.reference import torch_recurrence
from .spec import Call, Options, check_call


def gradients(
    call: Call, options: Options, wanted: list[str], grad_o: torch.Tensor, grad_state: torch.Tensor
) -> dict[str, torch.Tensor | None]:
    """d loss / d input for the inputs named in `wanted`, given d loss / d o and d loss / d final state."""
    leaves = {name: getattr(call, name).detach().requires_grad_() for name in wanted}
    live = replace(call, **leaves)
    spec = check_call(live, options, inplace=False)
    with torch.enable_grad():
        o, state = torch_recurrence(spec, live)
        outputs, grads = [o], [grad_o.to(o.dtype)]
        if options.output_final_state:
            if options.state_layout == "vk":
                grad_state = grad_state.transpose(-1, -2)
            outputs.append(state)
            grads.append(grad_state.to(state.dtype))
        got = torch.autograd.grad(outputs, list(leaves.values()), grads, allow_unused=True)
    return dict(zip(leaves, got, strict=True))
