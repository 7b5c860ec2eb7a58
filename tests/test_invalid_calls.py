"""Invalid calls, generated: every argument wrong in every way that its kind allows, for both functions and
frameworks.

Each must raise ValueError or TypeError whose text starts with the name of the function and names the
argument, and must leave every array bit for bit as it was. The same holds after a valid call of that geometry
was planned.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

import anydelta
from anydelta.core import plans

B, T, H, HV, K, V, P, KS = 2, 3, 2, 4, 8, 5, 6, 2
Args = dict[str, Any]


def valid(packed: bool, framework: str) -> Args:
    """A valid in-place call that uses every argument. Packed: GDA from logs; otherwise raw KDA gates."""
    rng = np.random.default_rng(1)
    b, n = (1, 2) if packed else (B, B)

    def f32(*shape: int) -> Any:
        return rng.uniform(-1, 0, shape).astype(np.float32)

    args: Args = {
        "q": f32(b, T, H, K), "k": f32(b, T, H, K), "v": f32(b, T, HV, V), "beta": -f32(b, T, HV),
        "g": f32(b, T, HV) if packed else f32(b, T, HV, K), "state": f32(P, HV, K, V),
        "state_indices": np.array([4, 1], np.int64), "snapshots": f32(KS, n, HV, K, V),
        "mask": np.array([[True, False, True]] * b),
    }  # fmt: skip
    if packed:
        args["cu_seqlens"] = np.array([0, 1, T], np.int32)
    else:
        args.update(A_log=f32(HV), dt_bias=f32(HV, K), decay="raw", lower_bound=-5.0)
    args.update(
        scale=0.5, beta_is_logit=False, heads="interleaved", qk_l2norm=True, qk_l2norm_eps=1e-6,
        state_layout="kv", backend="auto",
    )  # fmt: skip
    if framework == "torch":
        args = {n: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for n, x in args.items()}
    return args


ARRAYS = (
    "q", "k", "v", "g", "beta", "state", "state_indices", "snapshots", "mask", "cu_seqlens", "A_log",
    "dt_bias",
)  # fmt: skip
WRITTEN = ("state", "snapshots")
REQUIRED = ("q", "k", "v", "g", "beta", "state")


@dataclass(frozen=True)
class Wrong:
    """One way to be wrong: `change` edits the arguments of a valid call."""

    argument: str
    how: str
    change: Callable[[Args], None]
    framework: str | None = None
    """Only with these arrays; None for both."""
    function: str | None = None
    packed: bool | None = None

    def __str__(self) -> str:
        return f"{self.argument}: {self.how}"


def swap(name: str, make: Callable[[Any], Any]) -> Callable[[Args], None]:
    """A change that replaces one argument by a function of itself."""

    def change(args: Args) -> None:
        args[name] = make(args[name])

    return change


def put(**values: Any) -> Callable[[Args], None]:
    return lambda args: args.update(values)


def lib(x: Any) -> Any:
    return torch if isinstance(x, torch.Tensor) else np


def zeros(x: Any, shape: tuple[int, ...]) -> Any:
    return lib(x).zeros(shape, dtype=x.dtype)


def as_dtype(name: str) -> Callable[[Any], Any]:
    return lambda x: x.to(getattr(torch, name)) if isinstance(x, torch.Tensor) else x.astype(name)


def misaligned(x: Any) -> Any:
    raw = np.zeros(x.nbytes + 1, np.uint8)
    out = raw[1:].view(x.dtype).reshape(x.shape)
    out[...] = x
    return out


def odd_strides(x: Any) -> Any:
    """A field of packed records: its strides are no multiple of the element."""
    records = np.zeros(x.shape, np.dtype([("pad", np.uint8), ("x", x.dtype)]))
    records["x"] = x
    return records["x"]


def readonly(x: Any) -> Any:
    x = x.copy()
    x.flags.writeable = False
    return x


def expanded(x: Any) -> Any:
    if isinstance(x, torch.Tensor):
        return x[:1].expand(x.shape)
    return np.lib.stride_tricks.as_strided(x[:1].copy(), x.shape, (0, *x.strides[1:]))


def overlapping(x: Any) -> Any:
    """Rows that share memory without a stride of 0: a sliding window."""
    size = x.itemsize if isinstance(x, np.ndarray) else 1
    strides = [s * size for s in (*range(x.ndim, 1, -1), 1)]
    if isinstance(x, torch.Tensor):
        return torch.zeros(x.numel()).as_strided(x.shape, strides)
    return np.lib.stride_tricks.as_strided(np.zeros(x.size, x.dtype), x.shape, strides)


ALLOWED_DTYPES = {
    **dict.fromkeys(("q", "k", "v"), ()),  # all three must agree: any other dtype is wrong
    **dict.fromkeys(("g", "beta", "A_log", "dt_bias"), ("float16", "float64", "bfloat16")),
    **dict.fromkeys(WRITTEN, ()),
    **dict.fromkeys(("state_indices", "cu_seqlens"), ("int32", "int64")),
    "mask": ("bool",),
}


def wrong_arrays() -> Iterator[Wrong]:
    """What can be wrong with any array."""
    shapes = {
        "q": 4, "k": 4, "v": 4, "g": 4, "beta": 3, "state": 4, "state_indices": 1, "snapshots": 5, "mask": 2,
        "cu_seqlens": 1, "A_log": 1, "dt_bias": 2,
    }  # fmt: skip
    for name in ARRAYS:
        packed = {"cu_seqlens": True, "A_log": False, "dt_bias": False}.get(name)
        one: dict[str, Any] = {"packed": packed}
        if name in REQUIRED:
            yield Wrong(
                name, "is None", put(**{name: None}), function="_" if name == "state" else None, **one
            )
        for text, thing in (
            ("a string", "abc"),
            ("a number", 3.0),
            ("an object", object()),
            ("a dict", {"a": 1}),
        ):
            yield Wrong(name, f"is {text}", put(**{name: thing}), **one)
        yield Wrong(name, "is a list", swap(name, lambda x: x.tolist()), **one)
        yield Wrong(name, "is a tuple of arrays", swap(name, lambda x: (x,)), **one)
        yield Wrong(name, "is NumPy among torch", swap(name, lambda x: x.numpy()), framework="torch", **one)
        yield Wrong(name, "is torch among NumPy", swap(name, torch.from_numpy), framework="numpy", **one)
        yield Wrong(name, "has a leading axis too many", swap(name, lambda x: x[None]), **one)
        yield Wrong(name, "has a trailing axis too many", swap(name, lambda x: x[..., None]), **one)
        yield Wrong(name, "has an axis too few", swap(name, lambda x: x[0]), **one)
        if name != "mask":  # [1, T] is its shape when packed
            yield Wrong(name, "is one row", swap(name, lambda x: x.reshape(1, -1)), **one)
        yield Wrong(name, "has no axis", swap(name, lambda x: x.reshape(-1)[0:1].reshape(())), **one)
        for axis in range(shapes[name]):
            for delta in (1, -1):
                if name == "snapshots" and axis == 0:  # any number of slots is fine
                    continue
                if name == "state" and axis == 0:  # so is any size of the pool that holds the indices
                    continue

                def resize(x: Any, axis: int = axis, delta: int = delta) -> Any:
                    if axis >= x.ndim:
                        return x[None]  # GDA gates have one axis less: as wrong
                    shape = list(x.shape)
                    shape[axis] += delta
                    return zeros(x, tuple(shape))

                yield Wrong(name, f"axis {axis} is {delta:+d}", swap(name, resize), **one)
        for axis in range(1, shapes[name]):

            def empty(x: Any, axis: int = axis) -> Any:
                shape = list(x.shape)
                shape[min(axis, x.ndim - 1)] = 0
                return zeros(x, tuple(shape))

            yield Wrong(name, f"axis {axis} is empty", swap(name, empty), **one)
        for dtype in (
            "int8",
            "uint8",
            "int16",
            "int32",
            "int64",
            "bool",
            "complex64",
            "float16",
            "float64",
            "bfloat16",
        ):
            if dtype in ALLOWED_DTYPES[name]:
                continue
            # bfloat16 has a meaning for the state and its snapshots, but they must agree.
            framework = "torch" if dtype == "bfloat16" else None
            yield Wrong(name, f"is {dtype}", swap(name, as_dtype(dtype)), framework=framework, **one)
        for dtype in ("object", "U4", "S4", "datetime64[s]", "longdouble", "uint32"):
            yield Wrong(
                name, f"is {dtype}",
                swap(name, lambda x, d=dtype: np.ones(x.shape).astype("int64").astype(d)), framework="numpy",
                **one,
            )  # fmt: skip
        yield Wrong(
            name,
            "is a record array",
            swap(name, lambda x: np.zeros(x.shape, "f4,i4")),
            framework="numpy",
            **one,
        )
        if name != "mask":
            yield Wrong(
                name,
                "has swapped bytes",
                swap(name, lambda x: x.astype(x.dtype.newbyteorder())),
                framework="numpy",
                **one,
            )
            yield Wrong(name, "is misaligned", swap(name, misaligned), framework="numpy", **one)
            yield Wrong(name, "has odd strides", swap(name, odd_strides), framework="numpy", **one)
        yield Wrong(
            name, "is on the meta device", swap(name, lambda x: x.to("meta")), framework="torch", **one
        )
        yield Wrong(name, "is sparse", swap(name, lambda x: x.to_sparse()), framework="torch", **one)
        if name not in ("A_log", "dt_bias", "conv_bias", "norm_weight", "state_indices", "cu_seqlens"):
            yield Wrong(
                name,
                "is nested",
                swap(name, lambda x: torch.nested.nested_tensor(list(x), layout=torch.jagged)),
                framework="torch",
                **one,
            )
        if name not in ("mask", "state_indices", "cu_seqlens"):
            yield Wrong(
                name, "is quantized",
                swap(name, lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)), framework="torch",
                **one,
            )  # fmt: skip
            if name in WRITTEN:  # what is read runs, with the right signs: test_watchers.py
                yield Wrong(
                    name, "has the negative bit",
                    swap(name, lambda x: torch.complex(x, x).conj().imag), framework="torch",
                    function="_" if name == "state" else None, **one,
                )  # fmt: skip
        yield Wrong(
            name,
            "is a parameter list",
            swap(name, lambda x: torch.nn.ParameterList()),
            framework="torch",
            **one,
        )


def wrong_written() -> Iterator[Wrong]:
    """What can be wrong with memory that the call writes."""
    for name in WRITTEN:
        function = "_" if name == "state" else None
        yield Wrong(name, "is read-only", swap(name, readonly), framework="numpy", function=function)
        yield Wrong(name, "is expanded", swap(name, expanded), function=function)
        yield Wrong(name, "overlaps itself", swap(name, overlapping), function=function)
        yield Wrong(
            name,
            "requires grad",
            swap(name, lambda x: x.clone().requires_grad_()),
            framework="torch",
            function=function,
        )
    yield Wrong("snapshots", "has no slot", swap("snapshots", lambda x: x[:0]))
    yield Wrong("snapshots", "in the other layout", swap("snapshots", lambda x: x.swapaxes(-1, -2)))
    yield Wrong("state", "in the other layout", swap("state", lambda x: x.swapaxes(-1, -2)))
    yield Wrong("snapshots", "is the state", lambda a: a.update(snapshots=a["state"]))
    for name in ("q", "k", "v", "g", "beta"):
        yield Wrong(
            name, "requires grad in place", swap(name, lambda x: x.clone().requires_grad_()),
            framework="torch", function="_",
        )  # fmt: skip


def wrong_values() -> Iterator[Wrong]:
    """Index data."""

    def index(name: str, *values: int) -> Callable[[Args], None]:
        return swap(name, lambda x: lib(x).asarray(values, dtype=x.dtype))

    big = np.iinfo(np.int64).max
    for how, values in (
        ("does not start at 0", (1, 2, T)), ("starts below 0", (-1, 1, T)), ("ends early", (0, 1, T - 1)),
        ("ends late", (0, 1, T + 1)), ("decreases", (0, T + 1, T)), ("decreases below 0", (0, -2, T)),
        ("is all zero", (0, 0, 0)), ("is huge", (0, 2**31 - 1, T)), ("is tiny", (0, -(2**31), T)),
    ):  # fmt: skip
        yield Wrong("cu_seqlens", how, index("cu_seqlens", *values), packed=True)
    yield Wrong("cu_seqlens", "has no entry", swap("cu_seqlens", lambda x: x[:0]), packed=True)
    yield Wrong("cu_seqlens", "with B = 2", lambda a: a.update(cu_seqlens=a["state_indices"]), packed=False)
    for how, values in (
        ("is P", (P, 1)), ("is beyond P", (1, 1000)), ("is huge", (big, 1)), ("is tiny", (-big - 1, 1)),
        ("is -2", (-2, 1)), ("is below -1 and repeated", (-3, -3)), ("mixes -1 and P", (-1, P)),
        ("mixes -1 and -2", (-1, -2)),
    ):  # fmt: skip
        yield Wrong("state_indices", how, index("state_indices", *values))
    for how, values in (("is repeated", (3, 3)), ("is repeated at 0", (0, 0))):
        yield Wrong("state_indices", how, index("state_indices", *values), function="_")
    yield Wrong("state_indices", "without a state", put(state=None), function="")
    yield Wrong("state", "has no row for each sequence", put(state_indices=None))


def wrong_options() -> Iterator[Wrong]:
    """Names, flags, numbers and their combinations."""
    names = {
        "decay": ("log", "linear", "raw"),
        "heads": ("tiled", "interleaved"),
        "state_layout": ("kv", "vk"),
    }
    for name, known in names.items():
        for value in (
            None, "", "nonsense", known[0].upper(), f" {known[0]}", 0, True, 1.5, [known[0]], (known[0],),
            known[0].encode(), {known[0]}, {known[0]: 1}, object(),
        ):  # fmt: skip
            yield Wrong(
                name, f"is {value if type(value) is not object else 'an object'!r}", put(**{name: value})
            )
        yield Wrong(name, "is an array of names", put(**{name: np.array([known[0]])}))
    for name in ("beta_is_logit", "qk_l2norm", "output_final_state"):
        function = "" if name == "output_final_state" else None
        for value in (
            None,
            0,
            1,
            1.0,
            "True",
            "",
            [],
            [True],
            np.bool_(True),
            np.array(True),
            torch.tensor(True),
        ):
            yield Wrong(
                name, f"is {value!r} ({type(value).__name__})", put(**{name: value}), function=function
            )
    numbers = (
        "1", "", [1.0], (), {}, True, False, 1 + 0j, float("nan"), float("inf"), -float("inf"), 10**400,
        -(10**400), 1e39, np.array(1.0), torch.tensor(1.0), b"1",
    )  # fmt: skip
    for name in ("scale", "qk_l2norm_eps", "lower_bound"):
        for value in numbers:
            text = repr(value) if len(repr(value)) < 30 else f"{repr(value)[:5]}... ({type(value).__name__})"
            packed = False if name == "lower_bound" else None
            yield Wrong(name, f"is {text}", put(**{name: value}), packed=packed)
    for value in (None, -1e-6, -1.0, -5):
        yield Wrong("qk_l2norm_eps", f"is {value}", put(qk_l2norm_eps=value))
    for value in (1e-9, 1.0, 5, 0.5):
        yield Wrong("lower_bound", f"is {value}", put(lower_bound=value), packed=False)
    for decay in ("log", "linear"):
        yield Wrong(
            "lower_bound", f"with decay={decay}", put(decay=decay, A_log=None, dt_bias=None), packed=False
        )
        yield Wrong(
            "A_log", f"with decay={decay}", put(decay=decay, lower_bound=None, dt_bias=None), packed=False
        )
        yield Wrong(
            "dt_bias", f"with decay={decay}", put(decay=decay, lower_bound=None, A_log=None), packed=False
        )
    yield Wrong("A_log", "missing with decay=raw", put(decay="raw"), packed=True)
    yield Wrong("dt_bias", "flat for GDA", lambda a: a.update(g=a["g"][..., 0]), packed=False)
    for value in (
        "nonsense",
        "",
        "CPU",
        None,
        3,
        True,
        ["cpu"],
        ("cpu",),
        object(),
        {"a": 1},
        b"cpu",
        np.array(1.0),
    ):
        yield Wrong(
            "backend", f"is {value if type(value) is not object else 'an object'!r}", put(backend=value)
        )
    for name in ("unknown", "use_qk_l2norm_in_kernel", "initial_states", "chunk_size"):
        yield Wrong(name, "is no argument", put(**{name: True}))
    for name in ("g", "beta"):
        yield Wrong(name, "is missing", lambda a, n=name: a.pop(n))


def wrong_erase() -> Iterator[Wrong]:
    """The key that is read, which stands in the place of beta."""

    def instead(change: Callable[[Args], None]) -> Callable[[Args], None]:
        """In a call that has it."""

        def both(args: Args) -> None:
            args.update(erase=args["k"] * 1, beta=None)
            change(args)

        return both

    yield Wrong("beta", "stands beside erase", lambda a: a.update(erase=a["k"]))
    yield Wrong("beta", "is a logit beside erase", instead(put(beta_is_logit=True)))
    for text, thing in (("a string", "abc"), ("a number", 3.0), ("an object", object()), ("a list", [1.0])):
        yield Wrong("erase", f"is {text}", instead(put(erase=thing)))
    yield Wrong(
        "erase", "is NumPy among torch", instead(swap("erase", lambda x: x.numpy())), framework="torch"
    )
    yield Wrong(
        "erase", "is on the meta device", instead(swap("erase", lambda x: x.to("meta"))), framework="torch"
    )
    yield Wrong("erase", "is misaligned", instead(swap("erase", misaligned)), framework="numpy")
    for how, change in (
        ("has a leading axis too many", lambda x: x[None]), ("has an axis too few", lambda x: x[0]),
        ("has no heads", lambda x: x[:, :, 0]), ("lacks a token", lambda x: x[:, 1:]),
        ("lacks a channel", lambda x: x[..., 1:]), ("has no head", lambda x: x[:, :, :0]),
        ("has other heads", lambda x: zeros(x, (*x.shape[:2], 3 * HV, K))),
        ("has the channels of v", lambda x: zeros(x, (*x.shape[:2], HV, K + 1))),
    ):  # fmt: skip
        yield Wrong("erase", how, instead(swap("erase", change)))
    for dtype in ("int32", "bool", "float16", "float64", "complex64"):
        yield Wrong("erase", f"is {dtype}", instead(swap("erase", as_dtype(dtype))))
    yield Wrong(
        "erase", "requires grad in place", instead(swap("erase", lambda x: x.clone().requires_grad_())),
        framework="torch", function="_",
    )  # fmt: skip


KINDS = [*wrong_arrays(), *wrong_written(), *wrong_values(), *wrong_options(), *wrong_erase()]
SIZES_COME_FROM = ("q", "v", "g", "cu_seqlens")
"""Their shapes say what the others' must be, so a wrong one may be reported as another argument's
mismatch."""


def test_there_are_many_different_kinds() -> None:
    assert len({str(w) for w in KINDS}) == len(KINDS) > 400


def snapshot(args: Args) -> dict[str, bytes]:
    """The bits of every array, expanded ones included."""
    out = {}
    for name, x in args.items():
        if (
            isinstance(x, torch.Tensor)
            and x.layout == torch.strided
            and not x.is_quantized
            and x.device.type == "cpu"
        ):
            x = x.detach().resolve_neg().contiguous()
            out[name] = x.view(torch.uint8).numpy().tobytes() if x.ndim else x.clone().numpy().tobytes()
        elif isinstance(x, np.ndarray) and x.dtype != object:
            out[name] = x.tobytes()
    return out


def invoke(args: Args, function: str) -> Any:
    args = dict(args)
    if function == "":
        args["initial_state"] = args.pop("state")
    return getattr(anydelta, f"gated_delta_rule{function}")(**args)


def complaint(wrong: Wrong, packed: bool, framework: str, function: str, warm: bool) -> str | None:
    """What is not as it should be about the refusal of one call; None when all is well."""
    plans.forget()
    args = valid(packed, framework)
    if warm:
        invoke(args, function)
        args = valid(packed, framework)
    wrong.change(args)
    before = snapshot(args)
    try:
        invoke(args, function)
    except (ValueError, TypeError) as error:
        text = str(error)
    except BaseException as error:
        return f"raised {type(error).__name__}: {error}"
    else:
        return "ran"
    if snapshot(args) != before:
        return f"changed an array; said: {text}"
    if wrong.argument == "backend":  # see test_a_wrong_backend_is_named
        return None
    name = f"gated_delta_rule{function}"
    if not re.match(rf"{name}(: |\(\) )", text):
        return f"does not start with {name}: {text}"
    argument = "initial_state" if wrong.argument == "state" and function == "" else wrong.argument
    names = {
        argument,
        *((*ARRAYS, "initial_state") if argument in SIZES_COME_FROM and "axis" in wrong.how else ()),
    }
    if not any(re.search(rf"\b{n}\b", text.removeprefix(name)) for n in names):
        return f"does not name {argument}: {text}"
    return None


def only_cold(wrong: Wrong) -> bool:
    """What the plan of an earlier valid call hides, by design: op.py looks calls up by geometry.

    1 == True, so it finds the plan of a valid flag, and means the same. The alignment of the data is not part of the
    look-up; the kernels load unaligned.
    """
    equal = re.search(r"is (0|1|1\.0|True|False|np.True_)( \(|$)", wrong.how)
    return bool(equal) or wrong.how == "is misaligned"


@pytest.mark.filterwarnings("ignore:torch.quantize")  # on their way out, and still there
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("function", ["", "_"], ids=["functional", "inplace"])
@pytest.mark.parametrize("framework", ["numpy", "torch"])
def test_invalid_calls_are_refused(framework: str, function: str, warm: bool) -> None:
    bad = []
    count = 0
    for wrong in KINDS:
        if wrong.framework not in (None, framework) or wrong.function not in (None, function):
            continue
        if warm and only_cold(wrong):
            continue
        for packed in (False, True):
            if wrong.packed in (None, packed):
                count += 1
                if said := complaint(wrong, packed, framework, function, warm):
                    bad.append(f"{wrong}{' (packed)' if packed else ''}: {said}")
    assert count > 900
    assert not bad, f"{len(bad)} of {count}:\n" + "\n".join(bad)


@pytest.mark.parametrize("function", ["", "_"])
@pytest.mark.parametrize("value", [w.how for w in KINDS if w.argument == "backend"])
def test_a_wrong_backend_is_named(value: str, function: str) -> None:
    args = valid(False, "numpy")
    next(w for w in KINDS if str(w) == f"backend: {value}").change(args)
    with pytest.raises(
        (ValueError, TypeError), match=rf"^gated_delta_rule{function}: backend must be 'auto' or"
    ):
        invoke(args, function)


@pytest.mark.parametrize("framework", ["numpy", "torch"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("function", ["", "_"])
def test_the_valid_call_is_valid(framework: str, packed: bool, function: str) -> None:
    invoke(valid(packed, framework), function)


ROWS = {
    "needs a pool": (dict(state_indices=None, state=np.zeros((2, HV, K, V), np.float32)), "require state_indices"),
    "both kinds": (dict(snapshots=np.zeros((KS, 2, HV, K, V), np.float32)), r"must be \[1, N\]"),
    "wrong shape": (dict(snapshot_indices=np.array([[0], [3]])), r"must be \[Ks, N\]"),
    "wrong dtype": (dict(snapshot_indices=np.array([[0.0, 2], [3, 5]])), "dtype int32 or int64"),
    "not there": (dict(snapshot_indices=np.array([[0, 2], [3, P]])), r"in \[0, P\)"),
    "below -1": (dict(snapshot_indices=np.array([[0, 2], [3, -2]])), r"in \[0, P\)"),
    "twice": (dict(snapshot_indices=np.array([[0, 2], [3, 0]])), "unique"),
    "read by another": (dict(snapshot_indices=np.array([[0, 2], [3, 4]])), "another sequence reads"),
    "shared and own": (
        dict(state_indices=np.array([4, 4]), snapshot_indices=np.array([[4, 2], [3, 5]])), "another sequence reads",
    ),
}  # fmt: skip


@pytest.mark.parametrize("framework", ["numpy", "torch"])
@pytest.mark.parametrize("how", ROWS)
def test_wrong_snapshot_rows_are_refused(how: str, framework: str) -> None:
    args = valid(False, "numpy")
    args |= {"snapshots": None, "snapshot_indices": np.array([[0, 2], [3, 5]])}
    change, text = ROWS[how]
    args |= change
    if framework == "torch":
        args = {n: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for n, x in args.items()}
    state = args["state"].copy() if framework == "numpy" else args["state"].clone()
    qkv = [args.pop(n) for n in ("q", "k", "v", "state")]
    with pytest.raises(ValueError, match=f"gated_delta_rule_: .*{text}"):
        anydelta.gated_delta_rule_(*qkv, **args)
    assert bool((qkv[3] == state).all())
