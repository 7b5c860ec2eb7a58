"""What backends declare: a row of the table that none of them knows is refused, and what they accept they run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from dataclasses import make_dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import Annotated, Any

import numpy as np
import pytest
import torch

import anydelta
from anydelta.backends.metal.mlx_host import HOST as METAL_FOR_MLX
from anydelta.backends.triton.host import interpreted
from anydelta.conformance.run import unavailable
from anydelta.core import dispatch
from anydelta.core.accepts import ANY, Accepts, Row, UpTo, reasons
from anydelta.core.arguments import ArrayRow, ChoiceRow, FlagRow, Operator, fields
from anydelta.core.devices import numpy_dtype
from anydelta.mixer import arguments as mixer
from anydelta.mixer.spec import check_mixer, unpack_qkv
from anydelta.rule import arguments as rule
from anydelta.rule import op
from anydelta.rule.spec import check_call

RULES: dict[str, Any] = {name: dispatch.get_backend(name) for name in dispatch.NAMES}
MIXERS = {f"{n} mixer": found for n in dispatch.NAMES if (found := dispatch.mixer_of(n)) is not None}
ALL = {**RULES, "metal for MLX": METAL_FOR_MLX, **MIXERS}
DECLARED = ("dtype", "state_dtype", "g_dtype", "beta_dtype", "framework", "device", "kda")
FLOATS = ("float32", "bfloat16", "float16", "float64")


# ---- a made-up row

MADE_UP: dict[str, tuple[Any, Any, Any]] = {
    "shout": (Annotated[bool, FlagRow()], False, True),
    "colour": (Annotated[str, ChoiceRow(("red", "blue"))], "red", "blue"),
}
"""Options that no backend has: row, default, another value."""


def wider(options: Any, **other: Any) -> Any:
    """Options of a table that has the made-up ones too, some of them `other` than by default."""
    table: Any = type(options)
    defaults = {**table._field_defaults, **{n: default for n, (_, default, _) in MADE_UP.items()}}
    make: Any = namedtuple
    found = make("Wider", tuple(defaults), defaults=tuple(defaults.values()), module=table.__module__)
    found.__annotations__ = {**table.__annotations__, **{n: hint for n, (hint, _, _) in MADE_UP.items()}}
    found.of_rule = getattr(table, "of_rule", None)
    return found(**options._asdict(), **other)


def wider_call(call: Any, **more: Any) -> Any:
    """A call of a table with one more array, `sigil`."""
    row = ("sigil", Annotated[Any, ArrayRow("[B]", optional=True)], None)
    table = make_dataclass("Wider", [row], bases=(type(call),))
    return table(**{n: getattr(call, n) for n in call.__dataclass_fields__}, **more)


def plain(runs: Any, options: Callable[[Any], Any] = lambda o: o, **more: Any) -> Any:
    """A call that the implementation accepts; `options` of it changed, or with another array."""
    x, gate = np.zeros((1, 4, 2, 16), np.float32), np.zeros((1, 4, 2), np.float32)
    state = np.zeros((1, 2, 16, 16), np.float32)
    if runs in MIXERS.values():
        qkv, conv = np.zeros((1, 4, 96), np.float32), np.zeros((1, 96, 3), np.float32)
        call: Any = mixer.MixerCall(qkv, None, None, conv, state, gate, gate, np.zeros((96, 4), np.float32))
        spec: Any = check_mixer(wider_call(call, **more), options(mixer.MixerOptions(decay="log")))
        return replace(spec, rule=_for(runs, spec.rule))
    call = wider_call(rule.Call(x, x, x, gate, gate, state), **more)
    return _for(runs, check_call(call, options(rule.Options()), inplace=False))


def _for(runs: Any, spec: Any) -> Any:
    """On a device and of a framework that the implementation is meant for."""
    rows = runs.accepts.rows
    device = "cpu" if rows["device"].allowed is ANY else rows["device"].allowed[0]
    framework = "numpy" if rows["framework"].allowed is ANY else rows["framework"].allowed[0]
    return replace(spec, device=device, framework=framework)


@pytest.mark.parametrize("name", ALL)
def test_a_made_up_option_is_refused_and_its_default_accepted(name: str) -> None:
    runs = ALL[name]
    assert dispatch.against(runs, plain(runs, wider), here=False) == ()
    for option, (_, default, other) in MADE_UP.items():
        spec = plain(runs, partial(wider, **{option: other}))
        want = f"takes {option}={default!r} only; got {other!r}"
        assert dispatch.against(runs, spec, here=False) == (want,)


@pytest.mark.parametrize("name", ALL)
def test_a_made_up_array_is_refused_and_its_absence_accepted(name: str) -> None:
    runs = ALL[name]
    assert dispatch.against(runs, plain(runs, sigil=None), here=False) == ()
    assert dispatch.against(runs, plain(runs, sigil=np.zeros(1)), here=False) == ("takes no sigil; got one",)


@pytest.mark.parametrize("name", ALL)
def test_a_new_word_of_a_known_option_is_refused(name: str) -> None:
    runs = ALL[name]
    for option, word in (("decay", "root"), ("heads", "woven"), ("state_layout", "kkv")):
        spec = plain(runs)
        spec = replace(spec, options=spec.options._replace(**{option: word}))
        (reason,) = dispatch.against(runs, spec, here=False)
        assert re.fullmatch(rf"takes {option} .*; got {word}", reason)


@pytest.mark.parametrize("name", ["triton"])
def test_a_backward_pass_refuses_it_too(name: str) -> None:
    runs = RULES[name]
    assert reasons(runs.accepts_gradients, plain(runs, wider)) == ()
    spec = plain(runs, partial(wider, shout=True))
    assert reasons(runs.accepts_gradients, spec) == ("takes shout=False only; got True",)
    assert reasons(runs.accepts_gradients, plain(runs, sigil=np.zeros(1))) == ("takes no sigil; got one",)


def test_dispatch_refuses_it_before_anything_is_touched() -> None:
    x, gate = np.ones((1, 4, 2, 16), np.float32), np.zeros((1, 4, 2), np.float32)
    call = wider_call(rule.Call(x, x, x, gate, gate, np.ones((1, 2, 16, 16), np.float32)), sigil=np.zeros(1))
    trace = dispatch.choose(check_call(call, rule.Options(), inplace=True))
    assert trace.chosen is None
    assert "reference: no: takes no sigil; got one" in str(trace)
    with pytest.raises(
        anydelta.UnsupportedError, match=r"auto cannot run this call: .*takes no sigil; got one"
    ):
        op.execute(call, rule.Options(), "auto", True, None)
    assert (call.state_in == 1).all()


# ---- what is declared, and said


@pytest.mark.parametrize("name", ALL)
def test_a_declaration_names_what_it_speaks_of(name: str) -> None:
    accepts: Accepts = ALL[name].accepts
    assert set(DECLARED) <= accepts.rows.keys()
    spec = plain(ALL[name])
    call, options = (mixer.MixerCall, mixer.MixerOptions) if name in MIXERS else (rule.Call, rule.Options)
    assert accepts.arrays <= call.__dataclass_fields__.keys()
    for row in accepts.rows:
        assert row in options._fields or hasattr(spec, row) or hasattr(spec.rule, row), row


def test_reasons_are_sentences_and_all_of_them() -> None:
    spec = replace(plain(RULES["cpu"]), K=300, dtype="float64", resident="vulkan:0", framework="mlx")
    accepts = Accepts(frozenset(spec.given)).but(
        dtype=("float32", "float16"), framework=("torch",), device=("cpu:1",), K=UpTo(256),
        B=Row((2,), "takes pairs; got {got} and {spec.T} tokens"),
        rules=(lambda s: "" if s.T > 9 else f"takes ten tokens; got {s.T}",),
        limits=(lambda s: "never asked",),
    )  # fmt: skip
    assert reasons(accepts, spec) == (
        "takes float32 and float16; got float64", "takes torch arrays; got mlx arrays",
        "takes tensors on cpu:1; got device vulkan:0", "takes K up to 256; got 300", "takes pairs; got 1 and 4 tokens",
        "takes ten tokens; got 4",
    )  # fmt: skip
    limited = Accepts(frozenset(spec.given), limits=(lambda s: "takes little; got much",))
    assert reasons(limited, spec) == ("takes little; got much",)
    assert reasons(limited, spec, here=False) == ()


# ---- what is accepted runs


class Draw:
    """Valid calls at random, made from the rows of a table: every choice, flag and array that it has."""

    def __init__(self, operator: Operator, framework: str, rng: Any):
        self.operator, self.framework, self.rng = operator, framework, rng
        self.mixes = operator.arrays is mixer.MixerCall

    def one_of(self, *values: Any) -> Any:
        return values[self.rng.integers(len(values))]

    def options(self) -> dict[str, Any]:
        out = {}
        for name in self.operator.flags:
            field = fields(self.operator.options)[name]
            row: Any = field.row
            if isinstance(row, ChoiceRow):
                out[name] = self.one_of(*row.values)
            elif isinstance(row, FlagRow):
                out[name] = self.one_of(False, True)
            else:
                number = float(self.rng.uniform(max(row.minimum, -2.0), min(row.maximum, 2.0)))
                out[name] = self.one_of(None, number) if field.optional else number
        if out["decay"] != "raw":
            out["lower_bound"] = None
        return out

    def arrays(self, options: dict[str, Any]) -> dict[str, Any]:
        packed, pooled = self.one_of(False, True), self.one_of(False, True)
        H, W = self.one_of(1, 2), self.one_of(1, 4)
        N, T = (
            (self.one_of(0, 1, 3), self.one_of(1, 4)) if packed else (self.one_of(1, 2), self.one_of(0, 1, 5))
        )
        T = 0 if N == 0 else T
        n = dict(
            B=1 if packed else N, T=T, H=H, HV=H * self.one_of(1, 3), K=self.one_of(3, 8), V=self.one_of(1, 6)
        )
        n |= dict(N=N, Ks=self.one_of(1, 3), W=W, S=W - 1 + self.one_of(0, 1))
        n["C"] = 2 * n["H"] * n["K"] + n["HV"] * n["V"]
        pool = N * (1 + n["Ks"]) + 1 if pooled else N
        dtype, state = self.one_of(*FLOATS), self.one_of("float32", "bfloat16")
        state = "float64" if dtype == "float64" else state
        conv = self.one_of(dtype, "float32") if dtype != "float64" else dtype
        out: dict[str, Any] = {}
        for name in self.operator.tensors:
            row: Any = fields(self.operator.arrays)[name].row
            optional = fields(self.operator.arrays)[name].optional and name not in self.operator.required
            with_it = {"cu_seqlens": packed, "state_indices": pooled}.get(name, self.one_of(False, True))
            if name in ("A_log", "dt_bias"):
                with_it = options["decay"] == "raw" and (with_it or options["lower_bound"] is None)
            if name == "state_in" and pooled:
                with_it = True
            if name == "snapshot_indices":
                with_it = with_it and pooled and "snapshots" not in out
            if name == "conv_snapshots":
                with_it = with_it and "snapshots" in out
            if name == "z":
                with_it = with_it and "norm_weight" in out
            if not optional or with_it:
                shape = self.shape(name, row.shape, n, pool, options["state_layout"])
                kind = {"state_in": state, "state": state, "snapshots": state, "conv_state": conv,
                        "conv_snapshots": conv}.get(name, dtype)  # fmt: skip
                small = "[HV" in row.shape or name in ("g", "beta", "conv_weight", "conv_bias", "norm_weight")
                out[name] = self.values(
                    name, shape, self.one_of(*FLOATS) if small else kind, n, pool, options
                )
        return out

    def shape(self, name: str, legend: str, n: dict[str, int], pool: int, layout: str) -> tuple[int, ...]:
        dims = self.one_of(*re.findall(r"\[(.*?)\]", legend)) if name != "qkv" else "B, T, 2 H K + HV V"
        texts = [self.one_of(*dim.split(" or ")) for dim in dims.split(",")]
        shape = [int(eval(re.sub(r"(?<=\w) (?=\w)", "*", text.strip()), {}, n)) for text in texts]
        if layout == "vk" and name in ("state_in", "state", "snapshots"):
            shape[-2:] = shape[:-3:-1]
        return (pool, *shape[1:]) if name in ("state_in", "state", "conv_state") else tuple(shape)

    def values(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: str,
        n: dict[str, int],
        pool: int,
        options: dict[str, Any],
    ) -> Any:
        rng = self.rng
        if name == "mask":
            x: Any = rng.random(shape) < 0.7
        elif name == "cu_seqlens":
            x = np.array(
                [0, *np.sort(rng.integers(0, n["T"] + 1, max(n["N"] - 1, 0))), *[n["T"]] * (n["N"] > 0)]
            )
        elif name == "state_indices":
            x = np.where(rng.random(shape) < 0.2, -1, np.arange(n["N"]))
        elif name == "snapshot_indices":
            x = (n["N"] + np.arange(n["Ks"] * n["N"])).reshape(shape)
        else:
            x = 0.3 * rng.standard_normal(shape)
            if name == "g" and options["decay"] != "raw":
                x = np.abs(x).clip(0, 1) if options["decay"] == "linear" else -np.abs(x)
            if self.framework == "torch":
                return torch.from_numpy(np.asarray(x)).to(getattr(torch, dtype))
            return x.astype(numpy_dtype(dtype))
        return torch.from_numpy(x) if self.framework == "torch" else x


def drive(name: str, operator: Operator, framework: str, function: Any, wanted: int) -> None:
    """Draw until so many calls were accepted; each must run."""
    draw = Draw(operator, framework, np.random.default_rng(7))
    runs = ALL[f"{name} mixer" if draw.mixes else name]
    accepted = tried = 0
    while accepted < wanted:
        tried += 1
        assert tried < 60 * wanted, "too few calls are valid and accepted"
        flags = draw.options()
        arrays = draw.arrays(flags)
        options = operator.options(operator.public_name, **flags)
        try:
            if draw.mixes:
                others = {n: x for n, x in arrays.items() if n != "qkv"}
                call = mixer.MixerCall(*unpack_qkv("", arrays["qkv"]), **others)
                spec: Any = check_mixer(call, options)
            else:
                spec = check_call(rule.Call(**arrays), options, inplace=operator.inplace)
        except ValueError:
            continue
        if dispatch.against(runs, spec):
            continue
        accepted += 1
        o = function(**{operator.public(n): x for n, x in arrays.items()}, **flags, backend=name)
        o = o[0] if isinstance(o, tuple) else o
        assert np.isfinite(
            torch.as_tensor(o.astype(np.float32) if framework == "numpy" else o).float().numpy()
        ).all()


@pytest.mark.filterwarnings("ignore:anydelta")
@pytest.mark.parametrize("framework", ["numpy", "torch"])
@pytest.mark.parametrize("name", [*RULES, *MIXERS])
def test_what_is_accepted_runs(name: str, framework: str) -> None:
    backend = name.removesuffix(" mixer")
    if why := unavailable(backend):
        pytest.skip("; ".join(why))
    if framework not in ALL[name].accepts.rows["framework"].allowed:
        pytest.skip(f"{name} takes no {framework} arrays")
    if name in MIXERS:
        drive(backend, mixer.INPLACE, framework, anydelta.gated_delta_mixer_, 40)
    else:
        drive(backend, rule.FUNCTIONAL, framework, anydelta.gated_delta_rule, 30)
        drive(backend, rule.INPLACE, framework, anydelta.gated_delta_rule_, 30)


@pytest.mark.skipif(
    interpreted() or find_spec("triton") is None, reason="the interpreter runs, or is not here"
)
def test_what_triton_accepts_runs_in_its_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", __file__, "-k", "what_is_accepted and triton"]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "1"}
    )
    assert done.returncode == 0, done.stdout[-2000:]
    assert done.stdout.startswith("s.s."), done.stdout[-2000:]
