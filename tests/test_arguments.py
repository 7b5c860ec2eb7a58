"""The tables of arguments, and everything that must agree with them."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import anydelta
from anydelta.backends.devices import structs
from anydelta.core.arguments import ArrayRow, Operator, fields
from anydelta.mixer import arguments as mixer
from anydelta.rule import arguments as rule

ROOT = Path(__file__).resolve().parents[1]
EVERYWHERE = {"backend"}


def parameters(function: Any) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)


@pytest.mark.parametrize(
    ("function", "operator", "more"),
    [
        (anydelta.gated_delta_rule, rule.FUNCTIONAL, {"snapshots"}),
        (anydelta.gated_delta_rule_, rule.INPLACE, set()),
        (anydelta.gated_delta_mixer_, mixer.INPLACE, set()),
    ],
)
def test_a_public_signature_is_what_the_table_says(function: Any, operator: Operator, more: set[str]) -> None:
    got = parameters(function)
    arrays = {operator.public(name) for name in operator.tensors}
    assert set(got) == arrays | set(operator.flags) | more | EVERYWHERE
    for name in operator.flags:
        assert got[name].default == operator.options._field_defaults[name], name  # type: ignore[attr-defined]
        assert got[name].kind is inspect.Parameter.KEYWORD_ONLY
    for name in operator.tensors:
        optional = fields(operator.arrays)[name].optional and name not in operator.required
        assert (got[operator.public(name)].default is None) == optional, name


@pytest.mark.parametrize("table", [rule.Call, mixer.MixerCall])
def test_every_array_has_a_legend(table: type) -> None:
    for field in fields(table).values():
        assert isinstance(field.row, ArrayRow)
        assert field.row.shape.startswith("[")


def test_torch_knows_the_schemas_of_the_tables() -> None:
    torch = pytest.importorskip("torch")
    importlib.import_module("anydelta.mixer.torch_ops")  # which the first call of the mixer does
    for operator in (*rule.OPERATORS, mixer.INPLACE):
        known = getattr(torch.ops.anydelta, operator.name).default._schema
        assert known == torch._C.parse_schema(f"anydelta::{operator.schema()}")


def test_a_struct_is_written_once() -> None:
    struct = structs.Struct(("q", "far", 2), ("I", "n", 1), ("f", "x", 1))
    assert (
        struct.pack({"far": (1, 2), "x": 0.5})
        == b"\1" + bytes(7) + b"\2" + bytes(7) + bytes(4) + b"\0\0\0\x3f"
    )
    assert struct.text("metal") == "    long far[2];\n    uint n;\n    float x;\n"
    with pytest.raises(KeyError, match="no member y"):
        struct.pack({"y": 1})
    assert structs.bits(("a", "b"), "{name}={value};") == "A=1;\nB=2;\n"
    assert structs.flags(("a", "b", "c"), {"a": True, "c": True}) == 5


def test_the_build_reads_the_tables_with_the_standard_library_alone(tmp_path: Path) -> None:
    script = ROOT / "scripts" / "generate_arguments.py"
    subprocess.run([sys.executable, "-I", "-S", str(script), str(tmp_path)], check=True)
    order = (tmp_path / "arguments.h").read_text()
    names = ", ".join(name.upper() for name in rule.Call.__slots__)
    assert f"enum : size_t {{ {names}, COUNT }};" in order
    assert rule.INPLACE.schema() in (tmp_path / "torch_schemas.h").read_text()
