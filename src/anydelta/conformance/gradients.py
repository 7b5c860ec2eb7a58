"""Gradients of a case on a backend, compared with those of the float64 recurrence under torch's autograd.

The case's values are used, with random gradients of the output and of the final state. Each gradient is judged
separately (compare.py): NMSE <= 1e-7 in float32, twice the error of rounding in half types. Gates are computed in
float32, whatever their dtype.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..core import dispatch
from ..core.accepts import reasons
from ..core.late import late
from ..mixer import op as mixer_op
from ..mixer.arguments import TRACKED as TRACKED_BY_MIXER
from ..mixer.arguments import MixerCall, MixerOptions
from ..rule.arguments import TRACKED, Call, Options
from ..rule.spec import check_call
from .cases import CASES, STRONG, Case, Inputs, inputs
from .compare import Buffer, NotRunnable, Target, Verdict, buffers, call, dirty_memory, judge
from .mixer import (
    MIXER_CASES,
    MixerCase,
    MixerInputs,
    flat,
    mixer_buffers,
    mixer_call_on,
    mixer_inputs,
    mixer_options,
    mixer_qkv,
)
from .options import options_of_case

if TYPE_CHECKING:
    import torch

    from ..mixer import autograd as mixer_autograd
    from ..rule import autograd
else:
    autograd = late("anydelta.rule.autograd")
    mixer_autograd = late("anydelta.mixer.autograd")

GRADIENT_CASES: tuple[Case, ...] = tuple(
    Case.parse(line)
    for line in (
        "T=40 H=1 HV=1 K=16 V=16 gate=keep",
        "T=40 H=1 HV=1 K=16 V=16 kda gate=keep",
        "T=70 H=1 HV=2 K=20 V=31 gate=mixed heads=tiled layout=vk strides=permuted",
        "T=70 H=1 HV=2 K=20 V=31 kda gate=mixed heads=tiled layout=vk strides=permuted",
        "T=33 H=2 HV=4 K=32 V=16 gate=one l2norm",
        "T=33 H=2 HV=4 K=32 V=16 kda gate=one l2norm",
        "T=20 H=1 HV=1 K=16 V=16 gate=inf beta=ends",
        "T=20 H=1 HV=1 K=16 V=16 kda gate=inf beta=ends",
        "T=40 H=1 HV=1 K=16 V=16 gate=wipe",
        "T=40 H=1 HV=1 K=16 V=16 kda gate=wipe",
        "T=65 H=1 HV=1 K=64 V=16 gate=keep key=alike beta=one dtype=bfloat16",
        "T=65 H=1 HV=1 K=64 V=16 kda gate=keep key=alike beta=one dtype=bfloat16",
        "T=40 H=1 HV=2 K=16 V=16 l2norm decay=raw dt_bias=full logit dtype=bfloat16 gate_dtype=bfloat16",
        "T=34 H=1 HV=2 K=16 V=16 kda l2norm decay=raw dt_bias=flat lower_bound=-5.0 logit dtype=float16",
        "B=2 T=34 H=1 HV=1 K=16 V=16 mask=left gate=keep state_dtype=bfloat16",
        "B=2 T=34 H=1 HV=1 K=16 V=16 kda mask=random l2norm decay=raw dt_bias=full logit",
        "seqlens=33,0,70,1 H=1 HV=2 K=16 V=16 gate=keep pool=6 indices=5,1,-1,0 state_strides=padded",
        "seqlens=33,0,70,1 H=1 HV=1 K=16 V=16 kda gate=keep fresh",
        "B=3 T=20 H=1 HV=1 K=16 V=16 kda l2norm eps=0.0 key=vanishing mask=right pool=4 indices=2,0,2",
        "B=2 T=20 H=1 HV=1 K=16 V=16 pool=3 indices=2,-1 decay=raw lower_bound=-5.0 noA dt_bias=full logit",
        "T=5 H=1 HV=1 K=16 V=16 gate=keep nofinal",
        "T=34 H=1 HV=1 K=140 V=8 kda gate=keep",
    )
)
"""Small enough for an interpreter; scripts/gpu.py has larger shapes."""
LARGEST = 2_000_000
"""The most numbers of states over all tokens. With more, the recurrence under autograd takes seconds per case."""


def every_gradient_case() -> list[Case]:
    """GRADIENT_CASES, and the rule's and mixer's cases that are functional calls without snapshots."""
    mixers = (
        replace(c, inplace=False, snapshots=0) for c in MIXER_CASES if not c.refused and not c.scattered
    )
    return list(dict.fromkeys((*GRADIENT_CASES, *filter(_has_gradients, (*CASES, *mixers)))))


def _has_gradients(case: Case) -> bool:
    if case.inplace or case.snapshots or case.scattered or case.elsewhere or case.dtype == "float64":
        return False
    # With every gate at its bound, float64 rounds the slope of the sigmoid there to 0.
    bounded = case.lower_bound is not None and case.gate in (*STRONG, "twenty", "wipe", "inf")
    return not bounded and case.B * case.T * case.HV * case.K * case.V <= LARGEST


def check_gradients(case: Case, target: Target, *, native: bool = False) -> Verdict:
    """Run the case on the target's backend with every input requiring grad, and compare the gradients.

    Raises:
        NotRunnable: its arrays are not torch's.
        anydelta.UnsupportedError: the backend does not take the case, or with `native` has no backward pass for it.
    """
    if target.framework != "torch":
        raise NotRunnable(f"gradients are those of torch tensors, not of {target.framework} arrays")
    with target.active():
        if isinstance(case, MixerCase):
            return _check_mixer(case, target, native)
        return _check(case, target, native)


def _check(case: Case, target: Target, native: bool) -> Verdict:
    import torch

    values = inputs(case)
    rng = np.random.default_rng(len(str(case)))
    held = buffers(case, values, target)
    leaves: dict[str, torch.Tensor] = {n: b.array for n, b in held.items()}
    leaves.update({n: x.detach().requires_grad_() for n, x in leaves.items() if n in ("state", *TRACKED)})
    if native:
        _require_backward_pass(case, leaves, target.backend)
    o, state = call(case, leaves, target.backend)
    outputs: list[torch.Tensor] = [o] if case.nofinal else [o, state]
    grads = [torch.from_numpy(rng.standard_normal(x.shape)).to(x) for x in outputs]
    wanted = [n for n in ("state", *TRACKED) if n in leaves]
    with dirty_memory(case, target):
        got = torch.autograd.grad(outputs, [leaves[n] for n in wanted], grads, allow_unused=True)
    exact = _exact(case, values, [g.detach().cpu().double() for g in grads])
    if "state_in" in exact:
        exact["state"] = exact.pop("state_in")
    return _judged(case, held, leaves, dict(zip(wanted, got, strict=True)), exact)


def _judged(
    case: Case,
    held: dict[str, Buffer],
    leaves: dict[str, torch.Tensor],
    got: dict[str, torch.Tensor | None],
    exact: dict[str, NDArray[np.float64]],
) -> Verdict:
    v = Verdict()
    for name, x in got.items():
        want = exact[name]
        if x is None or tuple(x.shape) != want.shape or x.dtype != leaves[name].dtype:
            v.errors.append(f"gradient of {name}: is {x if x is None else (list(x.shape), x.dtype)}")
            continue
        dtype = held[name].dtype
        if dtype == "float64" != case.dtype:
            dtype = "float32"
        judge(v, f"gradient of {name}", x.cpu().double().numpy(), want, dtype)
    return v


def _check_mixer(case: MixerCase, target: Target, native: bool) -> Verdict:
    import torch

    values = mixer_inputs(case)
    rng = np.random.default_rng(len(str(case)))
    held = mixer_buffers(case, values, target)
    wanted = [n for n in ("q", *TRACKED_BY_MIXER) if n in held]
    leaves: dict[str, torch.Tensor] = {n: b.array for n, b in held.items()}
    leaves.update({n: leaves[n].detach().requires_grad_() for n in wanted})
    if native:
        _require_mixer_backward(case, leaves, target.backend)
    outputs = mixer_call_on(case, leaves, target.backend)
    grads = [torch.from_numpy(rng.standard_normal(x.shape)).to(x) for x in outputs]
    pairs = [(x, g) for x, g in zip(outputs, grads, strict=True) if x.requires_grad]
    with dirty_memory(case, target):
        got = torch.autograd.grad(
            [x for x, _ in pairs], [leaves[n] for n in wanted], [g for _, g in pairs], allow_unused=True
        )
    exact = _exact_mixer(case, values, [g.detach().cpu().double() for g in grads])
    return _judged(case, held, leaves, dict(zip(wanted, got, strict=True)), exact)


def _exact_mixer(
    case: MixerCase, values: MixerInputs, grads: list[torch.Tensor]
) -> dict[str, NDArray[np.float64]]:
    """As `_exact`, by the names of the case's arrays."""
    r = values.rule
    tensors = {
        name: _tensor(getattr(holder, name))
        for holder, names in (
            (values, ("conv_state", "conv_weight", "conv_bias", "z", "norm_weight")),
            (r, ("state", "g", "beta", "A_log", "dt_bias", "mask", "cu_seqlens", "state_indices")),
        )
        for name in names
    }
    tensors.update(zip(("qkv", "k", "v"), map(_tensor, flat(case, r)), strict=True))
    whole = MixerCall(**tensors)
    names = [n for n in TRACKED_BY_MIXER if getattr(whole, n) is not None]
    options = MixerOptions(**mixer_options(case))
    found = mixer_autograd.gradients(whole, options, names, grads, backend="reference")
    exact = {
        n: np.zeros(tuple(getattr(whole, n).shape)) if x is None else x.numpy() for n, x in found.items()
    }
    parts = [exact.pop("qkv"), exact.pop("k"), exact.pop("v")]
    if case.split == "split":
        return exact | dict(zip("qkv", parts, strict=True))
    if case.split == "grouped":
        parts = [
            x.reshape(case.B, case.T, case.H, -1)
            for x in (*parts, *([exact.pop("z")] if "z" in exact else []))
        ]
    return exact | {"qkv": np.concatenate(parts, -1)}


def _require_backward_pass(case: Case, arrays: dict[str, torch.Tensor], backend: str) -> None:
    arrays = {("state_in" if name == "state" else name): x for name, x in arrays.items()}
    options = Options(**options_of_case(case, Options), output_final_state=not case.nofinal)
    spec = check_call(Call(**arrays), options, inplace=False)
    runs: Any = dispatch.get_backend(backend)
    if not hasattr(runs, "gradients"):
        raise dispatch.UnsupportedError(f"{backend} has no backward pass: the reference's runs")
    if no := (*dispatch.reasons_against(backend, spec), *reasons(runs.accepts_gradients, spec)):
        raise dispatch.UnsupportedError(f"the backward pass of {backend}: {'; '.join(map(str, no))}")


def _require_mixer_backward(case: MixerCase, arrays: dict[str, torch.Tensor], backend: str) -> None:
    runs: Any = dispatch.mixer_of(backend)
    if not hasattr(runs, "gradients"):
        raise dispatch.UnsupportedError(f"{backend} has no backward pass of the mixer: its parts' run")
    qkv, arrays = mixer_qkv(case, arrays)
    q, k, v = qkv if isinstance(qkv, tuple) else (qkv, None, None)
    spec = mixer_op.check(MixerCall(q, k, v, **arrays), MixerOptions(**mixer_options(case)))
    if no := (*dispatch.reasons_against(backend, spec), *reasons(runs.accepts_gradients, spec)):
        raise dispatch.UnsupportedError(f"the backward pass of {backend}: {'; '.join(map(str, no))}")


def _exact(case: Case, values: Inputs, grads: list[torch.Tensor]) -> dict[str, NDArray[np.float64]]:
    """Gradients by name, from the float64 recurrence under autograd. Zero at tokens that are not read."""
    names = [n for n in TRACKED if n != "state_in"]
    arrays = {n: _tensor(getattr(values, n)) for n in (*names, "mask", "cu_seqlens", "state_indices")}
    whole = Call(**arrays, state_in=_tensor(values.state))
    options = Options(**options_of_case(case, Options), output_final_state=not case.nofinal)
    names = [n for n in TRACKED if getattr(whole, n) is not None]
    found = autograd.gradients(whole, options, names, grads[0], grads[-1], backend="reference")
    return {n: np.zeros(tuple(getattr(whole, n).shape)) if x is None else x.numpy() for n, x in found.items()}


def _tensor(x: NDArray[np.generic] | None) -> torch.Tensor | None:
    import torch

    if x is None:
        return None
    return torch.from_numpy(np.where(np.isnan(x), 0.0, x) if x.dtype == np.float64 else x)


if __name__ == "__main__":
    for case in GRADIENT_CASES:
        verdict = check_gradients(case, Target("triton", framework="torch"))
        print(
            "FAIL" if verdict.errors else "OK",
            f"{verdict.worst:.2g} of the error allowed:",
            case,
            *verdict.errors,
        )
