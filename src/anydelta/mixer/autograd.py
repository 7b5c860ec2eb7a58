"""Gradients of the functional mixer, as `rule.autograd` computes those of the rule.

torch's convolution and norm run around the rule where no backend has a backward pass, and for gradients of gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..core import dispatch
from ..rule.autograd import replayed
from . import op
from .arguments import MixerCall, MixerOptions

Grads = Sequence[torch.Tensor | None]
"""The gradients of the output, the new conv state and the new state; None for zeros."""


def gradients(
    call: MixerCall,
    options: MixerOptions,
    wanted: list[str],
    grads: Grads,
    *,
    backend: str = "auto",
    create_graph: bool = False,
) -> dict[str, torch.Tensor | None]:
    """d loss / d input for the inputs named in `wanted`; None for one that nothing depends on. With `create_graph` the
    gradients can be differentiated in turn."""
    if not create_graph:
        spec = op.check(call, options)
        native = dispatch.with_gradients(spec, backend, warn=False)
        if native is not None:
            with torch.no_grad():
                found = native.gradients(spec, call, grads, wanted)
            return {name: found[name] for name in wanted}

    def results(live: MixerCall) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        made = dispatch.mixer_of("reference").differentiable(live, op.check(live, options), backend)
        return list(zip(made, grads, strict=True))

    return replayed(call, wanted, results, create_graph)
