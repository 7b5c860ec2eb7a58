"""Gradients of the functional operator, by a backend's own backward pass or by the recurrence under torch's autograd.

Nothing but the inputs is kept from the forward pass. A backend with a backward pass (dispatch.with_gradients) runs its
kernels. Elsewhere, and for gradients of gradients, the recurrence is repeated in torch in blocks of tokens, and one
state per block is kept (see backends/reference.py), so memory does not grow with T times the state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch

from ..core import dispatch
from .arguments import Call, Options
from .spec import check_call


def gradients(
    call: Call,
    options: Options,
    wanted: list[str],
    grad_o: torch.Tensor,
    grad_state: torch.Tensor,
    *,
    backend: str = "auto",
    create_graph: bool = False,
) -> dict[str, torch.Tensor | None]:
    """d loss / d input for the inputs named in `wanted`, given d loss / d o and d loss / d final state.

    None for an input that nothing depends on (every token masked, T = 0, only skipped sequences). With
    `create_graph` the gradients can be differentiated in turn.
    """
    if not create_graph:
        spec = check_call(call, options, inplace=False)
        native = dispatch.with_gradients(spec, backend)
        if native is not None:
            with torch.no_grad():
                found = native.gradients(
                    spec, call, grad_o, grad_state if options.output_final_state else None
                )
            return {name: found[name] for name in wanted}

    def results(live: Call) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        spec = check_call(live, options, inplace=False)
        o, state = dispatch.get_backend("reference").recurrence(spec, live)  # type: ignore[attr-defined]
        if not options.output_final_state:
            return [(o, grad_o)]
        grad = grad_state.transpose(-1, -2) if options.state_layout == "vk" else grad_state
        return [(o, grad_o), (state, grad)]

    return replayed(call, wanted, results, create_graph)


C = TypeVar("C", bound=Any)  # Call, or the mixer's


def replayed(
    call: C,
    wanted: list[str],
    results: Callable[[C], list[tuple[torch.Tensor, torch.Tensor | None]]],
    create_graph: bool,
) -> dict[str, torch.Tensor | None]:
    """The gradients of the inputs that are wanted, by running a call again under autograd: `results` gives each of its
    results with that result's gradient."""
    with torch.enable_grad():
        leaves = {}
        for name in wanted:
            x = getattr(call, name)
            # A view: grad with respect to it leaves out the ways in which inputs depend on each other.
            leaves[name] = x.view_as(x) if create_graph else x.detach().requires_grad_()
        if not all(x.view_as(x).requires_grad for x in leaves.values()):
            raise RuntimeError("anydelta: autograd records nothing here, so no gradient can be computed")
        # A result need not depend on any input that is wanted: o depends on q and the state does not, for instance.
        pairs = [
            (out, grad.to(out.dtype))
            for out, grad in results(replace(call, **leaves))
            if grad is not None and out.requires_grad
        ]
        if not pairs:
            return dict.fromkeys(wanted)
        outputs, grads = zip(*pairs, strict=True)
        got = torch.autograd.grad(
            outputs, list(leaves.values()), grads, allow_unused=True, create_graph=create_graph
        )
    return dict(zip(leaves, got, strict=True))
