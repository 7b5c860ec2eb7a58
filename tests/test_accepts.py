"""What backends declare; and that they refuse a row of the table that none of them knows.

test_dispatch.py runs what they accept.
"""

from __future__ import annotations

import re
from collections import namedtuple
from collections.abc import Callable
from dataclasses import make_dataclass, replace
from functools import partial
from typing import Annotated, Any

import numpy as np
import pytest

import anydelta
from anydelta.backends.metal.mlx_host import HOST as METAL_FOR_MLX
from anydelta.core import dispatch
from anydelta.core.accepts import ANY, Accepts, Row, UpTo, reasons
from anydelta.core.arguments import ArrayRow, ChoiceRow, FlagRow
from anydelta.mixer import arguments as mixer
from anydelta.mixer.spec import check_mixer
from anydelta.rule import arguments as rule
from anydelta.rule.spec import check_call
from anydelta.state.log_spec import LogSpec

RULES: dict[str, Any] = {name: dispatch.get_backend(name) for name in dispatch.NAMES}
MIXERS = {f"{n} mixer": found for n in dispatch.NAMES if (found := dispatch.mixer_of(n)) is not None}
LOGS = {f"{n} log": found for n in dispatch.NAMES if (found := dispatch.part_of(n, "log")) is not None}
ALL = {**RULES, "metal for MLX": METAL_FOR_MLX, **MIXERS, **LOGS}
DECLARED = ("dtype", "state_dtype", "g_dtype", "beta_dtype", "framework", "device", "kda")


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
    if runs in LOGS.values():
        spec = LogSpec(check_call(call, options(rule.Options()), inplace=True), 4, "float32")
        return replace(spec, rule=_for(runs, spec.rule))
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
        inner = spec.rule if runs in LOGS.values() else spec
        inner = replace(inner, options=inner.options._replace(**{option: word}))
        spec = replace(spec, rule=inner) if runs in LOGS.values() else inner
        (reason,) = dispatch.against(runs, spec, here=False)
        assert re.fullmatch(rf"takes {option} .*; got {word}", reason)


@pytest.mark.parametrize("name", ["triton"])
def test_a_backward_pass_refuses_it_too(name: str) -> None:
    runs = RULES[name]
    assert reasons(runs.accepts_gradients, plain(runs, wider)) == ()
    spec = plain(runs, partial(wider, shout=True))
    assert reasons(runs.accepts_gradients, spec) == ("takes shout=False only; got True",)
    assert reasons(runs.accepts_gradients, plain(runs, sigil=np.zeros(1))) == ("takes no sigil; got one",)


def test_dispatch_refuses_it() -> None:
    x, gate = np.ones((1, 4, 2, 16), np.float32), np.zeros((1, 4, 2), np.float32)
    spec = check_call(wider_call(rule.Call(x, x, x, gate, gate), sigil=gate), rule.Options(), inplace=False)
    trace = dispatch.choose(spec)
    assert trace.chosen is None
    assert "reference: no: takes no sigil; got one" in str(trace)
    with pytest.raises(
        anydelta.UnsupportedError, match=r"auto cannot run this call: .*takes no sigil; got one"
    ):
        dispatch.pick(spec)


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


def test_mlx_in_bfloat16_needs_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = replace(plain(RULES["reference"]), framework="mlx", state_dtype="bfloat16")
    monkeypatch.setattr("anydelta.backends.accepts.find_spec", lambda name: None)
    (reason,) = dispatch.against(RULES["reference"], spec)
    assert "ml_dtypes, which is not installed; pip install ml_dtypes" in reason
    assert dispatch.against(RULES["cpu"], spec) == ()
