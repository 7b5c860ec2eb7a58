"""torch.ops.anydelta.*: the operator for torch.compile, torch.export and autograd.

Eager calls of the public functions skip the dispatcher (it costs more than a decode step of a small model);
traced ones and those that need gradients come through here. Three operators share one implementation:

    gated_delta_rule            functional, differentiable            -> (o, final_state)
    gated_delta_rule_snapshots  functional, but writes snapshots      -> (o, final_state)
    gated_delta_rule_           advances state, may write snapshots   -> o

A fourth, gated_delta_rule_backward, is the backward pass: a tracer records one node for it and not its loop over
tokens.

If the C++ library anydelta_torch exists (export/torch_library.cpp), it has the schemas and runs the calls on CPU
tensors, which saves 4 us per call. It passes calls that its kernels do not take (float64, a named backend) to
`python_gated_delta_rule` and its siblings. Fake kernels and gradients are registered here either way.
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch._C._functorch import is_functorch_wrapped_tensor, is_legacy_batchedtensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves, tree_map_only

from ..core import dispatch
from ..core.arguments import Operator, fields
from ..core.arrays import Arrays
from ..core.devices import DeviceArray
from ..core.native import core as _core
from ..core.plans import Plan, Rest, find
from . import op, torch_library
from .arguments import FUNCTIONAL, INPLACE, OPERATORS, SNAPSHOTS, TRACKED, Call, Options
from .autograd import gradients
from .spec import check_call, check_gradients, check_values

mark_written = torch._C._increment_version
"""Raise the version counts of a sequence of tensors, as torch's operators do for tensors that they write."""


def _load_library() -> tuple[ctypes.CDLL | None, str]:
    """The path of anydelta_torch, or the reason why it is not used."""
    path, reason = torch_library.find()
    if path is None:
        return None, reason
    try:
        torch.ops.load_library(path)
        # visible to all: code that AOTInductor generates calls its functions by name
        library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        return None, f"{path.name} does not load ({error})"
    assert _core is not None
    library.anydelta_torch_attach(ctypes.c_void_p(_core.runner()))
    library.anydelta_torch_threads.restype = ctypes.c_void_p
    _core.share_threads_of(library.anydelta_torch_threads())
    return library, ""


LIBRARY, LIBRARY_REASON = _load_library()
"""Load the C++ library, which then runs calls on CPU tensors; or return why it is not used."""
SCHEMAS = {o.name: o.schema() for o in OPERATORS}
"""The operators' schemas by name."""

_LIB = torch.library.Library("anydelta", "FRAGMENT" if LIBRARY else "DEF")
# must stay alive: dropping it removes the operators
if not LIBRARY:
    for _schema in SCHEMAS.values():
        _LIB.define(_schema)
_TENSORS, _, _FLAGS = FUNCTIONAL.schema().partition("(")[2].partition(") ->")[0].partition(", *, ")
_LIB.define(
    f"gated_delta_rule_backward({_TENSORS.replace('=None', '')}, Tensor grad_o, Tensor grad_state, int[] wanted, *, "
    f"{_FLAGS}) -> Tensor[]"
)

_INPUTS = FUNCTIONAL.tensors
"""The differentiable operator's tensors, in the order of its schema, by their names in Call."""


def _run(
    operator: Operator, *args: torch.Tensor | None, **given: object
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The implementation of each of the three operators."""
    arrays, rest = operator.bind(*args, **given)
    found = find(arrays, rest)
    if type(found) is not Plan:  # plans are cached only for calls without gradients
        if operator is not FUNCTIONAL:
            _refuse_grad(Call(*arrays), Options(*rest[:-1]), operator.inplace)
        found = op.plan(arrays, rest, found)
    state: torch.Tensor | None
    o: torch.Tensor
    state, o = found.call(arrays)
    if operator.inplace:
        return o
    return o, state if state is not None else arrays[0].new_empty(0)


def _refuse_grad(call: Call, options: Options, inplace: bool) -> None:
    """The operators that write to an argument have no gradient: say so instead of returning a constant."""
    if torch.is_grad_enabled() and any_requires_grad(call):
        check_gradients(call, options.op, inplace)
    refuse_tangents(options.op, {name: getattr(call, name) for name in _INPUTS})


_IMPLEMENTATIONS = {o.name: partial(_run, o) for o in OPERATORS}
for _name, _impl in _IMPLEMENTATIONS.items():
    # after the library's CPU kernels, if it is loaded
    _LIB.impl(_name, _impl, "CompositeExplicitAutograd")


def _twin(
    implementation: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]],
    outputs: int,
    *args: object,
    **kwargs: object,
) -> tuple[torch.Tensor, ...]:
    """Run a call that the library's kernels do not take: returns (*results, bytes of an error)."""
    try:
        result = implementation(*args, **kwargs)
    except Exception as error:
        kind = "ValueError" if isinstance(error, ValueError) else type(error).__name__
        text = list(f"{kind}: {error}".encode())
        return (*(torch.empty(0) for _ in range(outputs)), torch.tensor(text, dtype=torch.uint8))
    return (*(result if isinstance(result, tuple) else (result,)), torch.empty(0, dtype=torch.uint8))


if LIBRARY:
    for _name, _impl in _IMPLEMENTATIONS.items():
        _outputs = 1 if _name.endswith("_") else 2
        _LIB.define(
            f"python_{_name}" + SCHEMAS[_name].split(" -> ")[0].removeprefix(_name)
            + f" -> ({', '.join(['Tensor'] * (_outputs + 1))})"
        )  # fmt: skip
        _LIB.impl(f"python_{_name}", partial(_twin, _impl, _outputs), "CompositeExplicitAutograd")


def _fake(
    operator: Operator, *args: torch.Tensor | None, **given: object
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    arrays, rest = operator.bind(*args, **given)
    call, options = Call(*arrays), Options(*rest[:-1])
    if all(
        isinstance(n, int) for x in arrays if x is not None for n in x.shape
    ):  # a dynamic size would be pinned by a check
        check_call(call, options, inplace=operator.inplace)
    o: torch.Tensor = call.v.new_empty(call.v.shape)
    if operator.inplace:
        return o
    if not options.output_final_state:
        return o, call.q.new_empty(0)
    N = call.q.shape[0] if call.cu_seqlens is None else call.cu_seqlens.shape[0] - 1
    like = call.state_in if call.state_in is not None else call.snapshots
    wide = torch.float64 if call.q.dtype == torch.float64 else torch.float32
    K, V = call.q.shape[3], call.v.shape[3]
    tail = (K, V) if options.state_layout == "kv" else (V, K)
    return o, call.q.new_empty((N, call.v.shape[2], *tail), dtype=wide if like is None else like.dtype)


for _operator in OPERATORS:
    torch.library.register_fake(f"anydelta::{_operator.name}", partial(_fake, _operator), lib=_LIB)


def batched(x: torch.Tensor) -> bool:
    """Whether a vmap batches the tensor: torch.func's, or the older one for gradients."""
    return is_functorch_wrapped_tensor(x) or is_legacy_batchedtensor(x)


class _Differentiable(torch.autograd.Function):
    """The functional operator with a gradient. Tensors are in the order of its schema, None if absent."""

    @staticmethod
    def forward(
        ctx: Any, keys: torch._C.DispatchKeySet, flags: dict[str, object], *tensors: torch.Tensor | None
    ) -> Any:
        ctx.save_for_backward(*tensors)
        ctx.flags = flags
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.anydelta.gated_delta_rule.default.redispatch(keys & BELOW, *tensors, **flags)

    @staticmethod
    def backward(ctx: Any, grad_o: torch.Tensor, grad_state: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        wanted = [i for i, need in enumerate(ctx.needs_input_grad[2:]) if need]
        # create_graph=True: the gradient will be differentiated. is_grads_batched=True: vmap has no rule for
        # the operator below.
        again = torch.is_grad_enabled()
        if again or batched(grad_o) or batched(grad_state):
            call = Call(**dict(zip(_INPUTS, ctx.saved_tensors, strict=True)))
            names = [_INPUTS[i] for i in wanted]
            flags = {name: value for name, value in ctx.flags.items() if name != "backend"}
            with torch.enable_grad():
                found = gradients(call, Options(**flags), names, grad_o, grad_state, create_graph=True)
            return (None, None, *(found.get(name) for name in _INPUTS))
        grads: list[torch.Tensor | None] = [None] * len(_INPUTS)
        results = torch.ops.anydelta.gated_delta_rule_backward(
            *ctx.saved_tensors, grad_o, grad_state, wanted, **ctx.flags
        )
        for i, grad in zip(wanted, results, strict=True):
            grads[i] = grad
        return (None, None, *grads)


BELOW = torch._C._after_autograd_keyset


def _differentiable(keys: torch._C.DispatchKeySet, *tensors: torch.Tensor | None, **flags: object) -> object:
    """The functional operator at the Autograd key. torch.library.register_autograd would work, but takes 2 us
    longer."""
    if (forward_ad._current_level >= 0 or _in_transform()) and transformed(*tensors):
        return _by_recurrence(*tensors, **flags)
    if torch._C.is_grad_enabled() and torch._C._any_requires_grad(*tensors):
        absent = (None,) * (len(_INPUTS) - len(tensors))
        return _Differentiable.apply(keys, flags, *tensors, *absent)  # type: ignore[no-untyped-call]
    return _REDISPATCH(keys & BELOW, *tensors, **flags)


_REDISPATCH = torch.ops.anydelta.gated_delta_rule.default._handle.redispatch_boxed
_LIB.impl("gated_delta_rule", _differentiable, "Autograd", with_keyset=True)


def _transform(name: str, *arguments: object, **flags: object) -> object:
    """Refuse an operator that writes to an argument inside a transform of torch.func: there is no rule for it, and its
    kernel would not see the transform."""
    tensors = tree_leaves((arguments, flags))
    if any(isinstance(x, torch.Tensor) and is_functorch_wrapped_tensor(x) for x in tensors):
        raise ValueError(
            f"{name}: a call that writes to an argument has no derivative and no rule for vmap; got tensors that a "
            f"transform of torch.func follows. Use {name.removesuffix('_snapshots').rstrip('_')} without snapshots"
        )
    with temporarily_clear_interpreter_stack():
        return getattr(torch.ops.anydelta, name)(*arguments, **flags)


def _resolve(name: str, *arguments: Any, **flags: object) -> object:
    """Run an operator that writes to an argument, where an argument is a negated view. torch's fallback covers only
    operators that return what they write."""
    operator = getattr(torch.ops.anydelta, name)
    for described, x in zip(operator.default._schema.arguments, arguments, strict=False):
        if (
            described.alias_info is not None
            and described.alias_info.is_write
            and x is not None
            and x.is_neg()
        ):
            raise ValueError(
                f"{name.removesuffix('_snapshots')}: {described.name} must hold its own values; got a negated view. "
                "Call resolve_neg() first"
            )
    arguments, flags = tree_map_only(torch.Tensor, torch.Tensor.resolve_neg, (arguments, flags))
    return operator(*arguments, **flags)


def guard_writes(library: torch.library.Library, name: str) -> None:
    """Make an operator that writes to an argument refuse contexts in which it cannot."""
    library.impl(name, partial(_transform, name), "FuncTorchDynamicLayerFrontMode")
    library.impl(name, partial(_resolve, name), "Negative")


guard_writes(_LIB, "gated_delta_rule_snapshots")
guard_writes(_LIB, "gated_delta_rule_")


@contextmanager
def autograd_below() -> Iterator[None]:
    """Turn autograd on inside an operator. A caller such as AOTAutograd may have excluded it; the replayed recurrence
    would then record nothing, and every gradient would silently be zero."""
    key = torch._C.DispatchKey.AutogradFunctionality
    before = torch._C._dispatch_tls_is_dispatch_key_excluded(key)
    torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)
    try:
        yield
    finally:
        torch._C._dispatch_tls_set_dispatch_key_excluded(key, before)


def _backward_op(*arguments: Any, **flags: Any) -> list[torch.Tensor]:
    *arrays, grad_o, grad_state, wanted = arguments
    call = Call(**dict(zip(_INPUTS, arrays, strict=True)))
    names = [_INPUTS[i] for i in wanted]
    backend = flags.pop("backend", "auto")
    with autograd_below():
        found = gradients(call, Options(**flags), names, grad_o, grad_state, backend=backend)
    return apart([(found[n], getattr(call, n)) for n in names], (*arrays, grad_o, grad_state))


def apart(
    found: list[tuple[torch.Tensor | None, torch.Tensor]], arguments: Iterable[torch.Tensor | None]
) -> list[torch.Tensor]:
    """`found` pairs each gradient with its input. Returns the gradients as an operator's results: those that share
    memory with each other or with an argument are copied."""
    held = {_storage(x) for x in arguments if x is not None}
    results = []
    for grad, x in found:
        if grad is None:
            grad = torch.zeros_like(x, memory_format=torch.contiguous_format)
        elif not grad.is_contiguous() or _storage(grad) in held:
            grad = grad.clone(memory_format=torch.contiguous_format)
        held.add(_storage(grad))
        results.append(grad)
    return results


def _storage(x: torch.Tensor) -> int:
    return int(x.untyped_storage()._cdata)


def _fake_backward(*arguments: Any, **flags: object) -> list[torch.Tensor]:
    return [arguments[i].new_empty(arguments[i].shape) for i in arguments[-1]]


_LIB.impl("gated_delta_rule_backward", _backward_op, "CompositeExplicitAutograd")
torch.library.register_fake("anydelta::gated_delta_rule_backward", _fake_backward, lib=_LIB)


def _by_recurrence(*tensors: torch.Tensor | None, **flags: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The functional operator as the recurrence in torch's own operators, which all transforms go through."""
    _warn_of_recurrence()
    flags = {name: value for name, value in flags.items() if name != "backend"}
    call = Call(**dict(zip(_INPUTS, tensors, strict=False)))
    spec = check_call(call, Options(**flags), inplace=False)
    check_values(call, spec)
    o, state = dispatch.get_backend("reference").recurrence(spec, call, checkpointed=False)  # type: ignore[attr-defined]
    if not spec.options.output_final_state:
        return o.to(call.v.dtype), call.q.new_empty(0)
    state = state if spec.options.state_layout == "kv" else state.transpose(-1, -2)
    return o.to(call.v.dtype), state.to(getattr(torch, spec.state_dtype)).contiguous()


_LIB.define("gated_delta_rule_by_recurrence" + SCHEMAS["gated_delta_rule"].removeprefix("gated_delta_rule"))
_LIB.impl("gated_delta_rule_by_recurrence", _by_recurrence, "CompositeImplicitAutograd")


@cache
def _warn_of_recurrence() -> None:
    warnings.warn(
        "gated_delta_rule: derivatives by torch.func and by dual numbers come from the recurrence in torch, token by "
        "token, which is slow. Tensor.backward() runs faster",
        RuntimeWarning,
        stacklevel=2,
    )


# ---- Does torch watch the call?

_PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)
"""Types of plain tensors, without subclasses."""
_DEVICES = ("CPU", "CUDA", "HIP", "XPU", "MPS", "PrivateUse1")
_PLAIN_KEYS = 0
"""The dispatch keys of plain memory. Others mark a negated view, a wrapper, zeros without memory and the like."""
for _key in (
    "ADInplaceOrView",
    *(kind + _device for kind in ("", "Autograd", "Autocast") for _device in _DEVICES),
):
    if (_found := getattr(torch._C.DispatchKey, _key, None)) is not None:
        _PLAIN_KEYS |= torch._C.DispatchKeySet(_found).raw_repr()
_TRACKED = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView).raw_repr()
TRACER, TRANSFORM, DUAL_NUMBERS = "torch.jit.trace", "a transform of torch.func", "a level of dual numbers"
DISPATCH_MODE, FUNCTION_MODE = "a dispatch mode", "a function mode"
_in_transform = torch._C._are_functorch_transforms_active
_QUESTIONS = {
    TRACER: torch._C._is_tracing,
    TRANSFORM: _in_transform,
    DISPATCH_MODE: torch._C._len_torch_dispatch_stack,
    FUNCTION_MODE: torch._C._len_torch_function_stack,
}
"""What may watch a call, and whether it does. Dispatch modes are FakeTensorMode, make_fx, counters of FLOPs and the
like. torch has no public names for these functions."""
is_compiling = torch.compiler.is_compiling
_ACCOUNT = dict(
    types=_PLAIN_TYPES, plain=_PLAIN_KEYS, tracked=_TRACKED, questions=tuple(_QUESTIONS.values()),
    forward_ad=vars(forward_ad), is_grad_enabled=torch.is_grad_enabled,
    is_inference_mode_enabled=torch.is_inference_mode_enabled, increment_version=mark_written,
    get_num_threads=torch.get_num_threads,
    transform_keys=[
        int(key) for end in ("FrontMode", "BackMode")
        if (key := getattr(torch._C.DispatchKey, f"FuncTorchDynamicLayer{end}", None)) is not None
    ],
)  # fmt: skip
"""What the extension needs of torch; it borrows these objects. `_in_transform` looks for these keys."""


def onlooker() -> str | None:
    """What must see the operator, not only its effect on memory. A function mode is named last. None: nothing."""
    if forward_ad._current_level >= 0:
        return DUAL_NUMBERS
    return next((who for who, looks in _QUESTIONS.items() if looks()), None)


def quiet() -> bool:
    """Whether nothing watches the call."""
    return bool(_core.quiet()) if reads() else onlooker() is None


def plain(x: torch.Tensor) -> bool:
    """Whether a tensor is plain memory with a dtype, a shape and strides."""
    if reads():
        return bool(_core.plain(x))
    return type(x) in _PLAIN_TYPES and not torch._C._dispatch_keys(x).raw_repr() & ~_PLAIN_KEYS


def watched(*arrays: object) -> bool:
    """Whether a call on these arrays must go through the dispatcher: it is watched, or an array is not plain memory."""
    return not quiet() or not all(plain(x) for x in arrays if isinstance(x, torch.Tensor))


def transformed(*tensors: object) -> bool:
    """Whether torch.func or dual numbers ask for a derivative with respect to one of these tensors."""
    inside = _in_transform()
    if not inside and forward_ad._current_level < 0:
        return False
    given = [x for x in tensors if isinstance(x, torch.Tensor) and x.is_floating_point()]
    if inside and torch.is_grad_enabled() and any(x.requires_grad for x in given):
        return True
    return any(forward_ad.unpack_dual(x).tangent is not None for x in given)


def refuse_tangents(name: str, tensors: dict[str, object]) -> None:
    """Refuse derivatives of an operator that has none, instead of returning a constant."""
    if forward_ad._current_level < 0:
        return
    tracked = [n for n, x in tensors.items() if transformed(x)]
    if tracked:
        raise ValueError(
            f"{name}: requires inputs without tangents; got dual numbers for {', '.join(tracked)}. Calls that write to "
            f"an argument have no derivative: use {name.rstrip('_')} without snapshots"
        )


def reads() -> bool:
    """Whether the extension can read tensors and check all of this. It learns once, from plain tensors, which cannot be
    made under a tracer or a mode."""
    if _learned is None and not is_compiling() and onlooker() in (None, FUNCTION_MODE):
        _learn()
    return bool(_learned)


_learned: bool | None = False if _core is None else None


def _learn() -> None:
    global _learned
    with torch._C.DisableTorchFunction(), torch.inference_mode(False):
        x, z = (
            torch.empty(n, dtype=dtype, device="cpu")
            for n, dtype in ((3, torch.float32), (5, torch.complex64))
        )
        with torch.inference_mode():
            y = torch.empty(7, device="cpu")
        tensors = (x, y, z, torch.nn.Parameter(x), x[1:], torch._neg_view(x), z.conj())
        storages = [t.untyped_storage() for t in tensors]
        known = []
        for t, storage in zip(tensors, storages, strict=True):
            keys = torch._C._dispatch_keys(t).raw_repr()
            autograd = t.requires_grad or t._is_view()
            uses = t._use_count(), torch._C._storage_Use_Count(storage._cdata)  # type: ignore[attr-defined]
            at = storage._cdata, storage.data_ptr(), storage.nbytes()
            known.append((t, t._cdata, keys, *at, autograd, *uses))
    assert _core is not None
    _learned = _core.learn_torch(_ACCOUNT, known)


reads()  # here and not at the first call, which a tracer may be following


def refuse_old_exporter(op: str) -> None:
    """torch.onnx.export(dynamo=False) only has torch's operators, and fails only after it has traced the whole
    model."""
    if not torch.compiler.is_compiling() and torch._C._is_tracing() and torch.onnx.is_in_onnx_export():
        raise dispatch.UnsupportedError(
            f"{op}: torch.onnx.export requires dynamo=True for this operator; got dynamo=False. "
            "See anydelta.export.onnx for programs that run in ONNX Runtime"
        )


def refuse_nested(op: str, arrays: Mapping[str, object]) -> None:
    """A nested tensor's own dispatch would end in an error of torch that names no argument."""
    for name, x in arrays.items():
        if isinstance(x, torch.Tensor) and x.is_nested:
            name = name if name != "state_in" else "state" if op.endswith("_") else "initial_state"
            raise ValueError(
                f"{op}: {name} must be a dense strided tensor; got nested. Put the sequences behind each other in one "
                "row, and name their ends in cu_seqlens"
            )


_ask_requires_grad: Callable[[Call], bool] = eval(
    "lambda c: "
    + " or ".join(
        f"(c.{n} is not None and c.{n}.requires_grad)" if fields(Call)[n].optional else f"c.{n}.requires_grad"
        for n in TRACKED
    )
)


def any_requires_grad(c: Call) -> bool:
    """Written out, because every decode step with gradients enabled asks. Other kinds of array have no gradient."""
    try:
        return _ask_requires_grad(c)
    except AttributeError:  # not tensors: check_call says which
        return False


def looked_at(arrays: Arrays, rest: Rest) -> Arrays:
    """A call whose memory cannot simply be read, or whose plan must not be cached."""
    if watched(*arrays):
        return traced(arrays, rest)
    call, options, backend = Call(*arrays), Options(*rest[:-1]), rest[-1]
    if torch.is_grad_enabled() and any_requires_grad(call):
        check_call(call, options, inplace=options.op == INPLACE.public_name, grad_enabled=True)
        if backend not in ("auto", *dispatch.NAMES):
            dispatch.get_backend(backend)  # raises, naming the known ones
        return traced(arrays, rest)
    return op.plan(arrays, rest, None).call(arrays)


def traced(arrays: Arrays, rest: Rest) -> Arrays:
    """The call as a dispatcher operator, which tracers record."""
    call, options, backend = Call(*arrays), Options(*rest[:-1]), rest[-1]
    inplace = options.op == INPLACE.public_name
    refuse_old_exporter(options.op)
    if not is_compiling():
        refuse_nested(options.op, {name: getattr(call, name) for name in fields(Call)})
    for x in (call.state_in, call.snapshots):
        if type(x) is DeviceArray:
            raise dispatch.UnsupportedError(
                f"{options.op}: a tracer cannot follow a state on {x.device.name}. Leave this call out of "
                f"torch.compile (torch.compiler.disable) and torch.export"
            )
    if inplace or call.snapshots is not None:
        # Checked here too: under a tracer the kernels see tensors without their gradients.
        _refuse_grad(call, options, inplace)
    operator = INPLACE if inplace else FUNCTIONAL if call.snapshots is None else SNAPSHOTS
    tensors = (getattr(call, name) for name in operator.tensors)
    flags = {name: getattr(options, name) for name in operator.flags}
    name = operator.name
    if operator is FUNCTIONAL and is_compiling() and forward_ad._current_level >= 0:
        name = "gated_delta_rule_by_recurrence"  # under a torch.func level that Python does not see
    result = getattr(torch.ops.anydelta, name)(*tensors, **flags, backend=backend)
    if inplace:
        return call.state_in, result
    o, state = result
    return state if options.output_final_state else None, o
