"""Run by test_watchers.py in a process of its own, because what it looks for ends one: every argument of every entry as
every kind of tensor that has no memory to read. Prints each case before it runs, and what is wrong with it."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate
from torch.masked import masked_tensor
from torch.testing._internal.two_tensor import TwoTensor

import anydelta

Arrays = dict[str, Any]
T, H, HV, K, V, W = 5, 2, 2, 8, 8, 3


def rule_arrays() -> Arrays:
    """Two sequences in one row, on a pool of states."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, T, H, K) / 2
    return dict(
        q=q, k=k, v=v, g=torch.randn(1, T, HV), beta=torch.rand(1, T, HV), state=torch.randn(6, HV, K, V),
        A_log=torch.randn(HV), dt_bias=torch.randn(HV), mask=torch.tensor([[True, True, False, True, True]]),
        cu_seqlens=torch.tensor([0, 3, T]), state_indices=torch.tensor([1, 0]), snapshots=torch.zeros(2, 2, HV, K, V),
    )  # fmt: skip


def mixer_arrays() -> Arrays:
    x = rule_arrays()
    C = 2 * H * K + HV * V
    q, k, v = (x.pop(n).flatten(-2) for n in ("q", "k", "v"))
    return dict(
        q=q, k=k, v=v, **x, conv_state=torch.randn(6, C, W), conv_weight=torch.randn(C, W), conv_bias=torch.randn(C),
        z=torch.randn(1, T, HV * V), norm_weight=torch.rand(V), conv_snapshots=torch.zeros(2, 2, C, W),
    )  # fmt: skip


def without_snapshots(x: Arrays) -> Arrays:
    return {n: a for n, a in x.items() if n not in ("snapshots", "conv_snapshots")}


def with_rows(x: Arrays) -> Arrays:
    """Snapshots as rows of the pool."""
    return {**without_snapshots(x), "snapshot_indices": torch.tensor([[2, 3], [4, 5]])}


def functional(x: Arrays) -> Any:
    x = {("initial_state" if n == "state" else n): a for n, a in x.items()}
    return anydelta.gated_delta_rule(x.pop("q"), x.pop("k"), x.pop("v"), **x, decay="raw")


def inplace(x: Arrays) -> Any:
    x = dict(x)
    qkvs = [x.pop(n) for n in ("q", "k", "v", "state")]
    return anydelta.gated_delta_rule_(*qkvs, **x, decay="raw")


def operator(x: Arrays) -> Any:
    x = {("initial_state" if n == "state" else n): a for n, a in x.items()}
    return torch.ops.anydelta.gated_delta_rule(**x, decay="raw")


def operator_snapshots(x: Arrays) -> Any:
    x = {("initial_state" if n == "state" else n): a for n, a in x.items()}
    return torch.ops.anydelta.gated_delta_rule_snapshots(**x, decay="raw")


def operator_inplace(x: Arrays) -> Any:
    return torch.ops.anydelta.gated_delta_rule_(**x, decay="raw")


def mixer(x: Arrays) -> Any:
    x = dict(x)
    qkv = tuple(x.pop(n) for n in ("q", "k", "v"))
    return anydelta.gated_delta_mixer(qkv, x.pop("conv_state"), x.pop("state"), **x)


def mixer_inplace(x: Arrays) -> Any:
    x = dict(x)
    qkv = tuple(x.pop(n) for n in ("q", "k", "v"))
    return anydelta.gated_delta_mixer_(qkv, x.pop("conv_state"), x.pop("state"), **x)


def operator_mixer(x: Arrays) -> Any:
    x = dict(x)
    return torch.ops.anydelta.gated_delta_mixer_([x.pop(n) for n in ("q", "k", "v")], **x)


ENTRIES: dict[str, tuple[Callable[[Arrays], Any], Callable[[], Arrays], tuple[str, ...]]] = {
    "gated_delta_rule": (functional, rule_arrays, ("snapshots",)),
    "gated_delta_rule_": (inplace, rule_arrays, ("state", "snapshots")),
    "gated_delta_rule_ rows": (inplace, lambda: with_rows(rule_arrays()), ("state",)),
    "ops.gated_delta_rule": (operator, lambda: without_snapshots(rule_arrays()), ()),
    "ops.gated_delta_rule_snapshots": (operator_snapshots, rule_arrays, ("snapshots",)),
    "ops.gated_delta_rule_": (operator_inplace, rule_arrays, ("state", "snapshots")),
    "ops.gated_delta_rule_ rows": (operator_inplace, lambda: with_rows(rule_arrays()), ("state",)),
    "gated_delta_mixer": (mixer, lambda: without_snapshots(mixer_arrays()), ()),
    "gated_delta_mixer snapshots": (mixer, mixer_arrays, ("snapshots", "conv_snapshots")),
    "gated_delta_mixer_": (mixer_inplace, mixer_arrays, ("state", "conv_state", "snapshots", "conv_snapshots")),
    "gated_delta_mixer_ rows": (mixer_inplace, lambda: with_rows(mixer_arrays()), ("state", "conv_state")),
    "ops.gated_delta_mixer_": (operator_mixer, mixer_arrays, ("state", "conv_state", "snapshots", "conv_snapshots")),
}  # fmt: skip
"""(call, arguments, those that it writes)"""


class Plain(torch.Tensor):
    """A subclass with memory and nothing to say."""


def freed(x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


def freed_view(x: torch.Tensor) -> torch.Tensor:
    """As FSDP's parameters: a part of a flat tensor whose storage is gone."""
    flat = torch.cat((torch.zeros(64, dtype=x.dtype), x.flatten()))
    view = flat[64:].view(x.shape)
    flat.untyped_storage().resize_(0)
    return view


def fake(x: torch.Tensor) -> torch.Tensor:
    return FakeTensorMode(allow_non_fake_inputs=True).from_tensor(x)


def distributed(x: torch.Tensor) -> torch.Tensor:
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return DTensor.from_local(x.clone(), init_device_mesh("cpu", (1,)), [Replicate()])


KINDS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "freed": freed,
    "freed view": freed_view,
    "shrunk": lambda x: (y := x.clone(), y.untyped_storage().resize_(y.untyped_storage().nbytes() // 2))[0],
    "zero tensor": lambda x: torch._efficientzerotensor(x.shape, dtype=x.dtype),
    "meta": lambda x: x.to("meta"),
    "fake": fake,
    "two tensors": lambda x: TwoTensor(x.clone(), x.clone()),
    "distributed": distributed,
    "masked": lambda x: masked_tensor(x.clone(), torch.ones_like(x, dtype=torch.bool)),
    "subclass": lambda x: x.clone().as_subclass(Plain),
    "negated view": lambda x: torch._neg_view(-x),
    "functional": lambda x: torch._to_functional_tensor(x.clone()),
}
_REFUSED = ("freed", "freed view", "shrunk")
"""Kinds without a dispatch of their own: one error that names the argument."""


def results(name: str, x: Arrays) -> list[torch.Tensor]:
    """What an entry returns, then what it writes."""
    call, _, written = ENTRIES[name]
    out = call(x)
    out = out if isinstance(out, tuple) else (out,)
    return [a for a in (*out, *(x[n] for n in written if n in x)) if a is not None]


def has_values(x: torch.Tensor) -> bool:
    return type(x) in (torch.Tensor, torch.nn.Parameter, Plain) and not x.is_meta


def problems(name: str, argument: str, kind: str) -> Iterator[str]:
    _, arrays, written = ENTRIES[name]
    x = arrays()
    if kind == "zero tensor":
        if not x[argument].is_floating_point():
            return
        x[argument] = torch.zeros_like(x[argument])  # what a zero tensor stands for
    right = [a.clone() for a in results(name, dict(x))]
    x = arrays()
    if kind == "negated view" and x[argument].dtype is torch.bool:
        return  # there is none
    # two tensors: or what is written would be so twice
    for n in {argument, *written} & {*x} if kind == "two tensors" else {argument}:
        x[n] = KINDS[kind](x[n])
    try:
        got = results(name, x)
    except (TypeError, ValueError) as error:
        if argument not in str(error) and not (argument == "state" and "initial_state" in str(error)):
            if kind in _REFUSED or (kind == "negated view"):
                yield f"the error does not name the argument: {error}"
        elif kind in _REFUSED and not name.startswith("ops") and type(error) is not TypeError:
            yield f"{type(error).__name__}: {error}"
        elif kind == "subclass" or (kind == "negated view" and argument not in written):
            yield f"refused: {error}"
        return
    except Exception as error:  # a tensor's own dispatch says why
        if kind in (*_REFUSED, "subclass", "negated view"):
            yield f"{type(error).__name__}: {error}"
        return
    if kind in _REFUSED:
        yield "taken"
    if kind in ("fake", "meta"):  # nothing was computed, nor written
        if has_values(got[0]):
            yield "a result with values"
        return
    for a, b in zip(got, right, strict=True):
        a = (
            a.a
            if isinstance(a, TwoTensor)
            else torch._from_functional_tensor(a)
            if torch._is_functional_tensor(a)
            else a
        )
        if has_values(a) and not torch.allclose(a, b, rtol=1e-5, atol=1e-5, equal_nan=True):
            yield f"wrong by {(a - b).abs().max():.1e}"


def main() -> int:
    warnings.simplefilter("ignore")
    torch.set_grad_enabled(False)
    found = cases = 0
    for name in ENTRIES:
        for argument in ENTRIES[name][1]():
            for kind in KINDS:
                print(f"{name}, {argument}, {kind}", end="", flush=True)
                cases += 1
                for problem in problems(name, argument, kind):
                    print(f": {problem}", end="", flush=True)
                    found += 1
                print(flush=True)
    print(f"{cases} cases, {found} problems")
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main())
