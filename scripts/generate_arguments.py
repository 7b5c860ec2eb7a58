"""Write the C++ headers of the tables of arguments: `python scripts/generate_arguments.py FOLDER`, as CMake does.

arguments.h has the order in which Python hands over the arrays of a call, the arrays and the options by name,
torch_schemas.h the schemas of torch.ops.anydelta, the others what the SYCL host and the Vulkan shaders have of
backends/devices/structs.py. Needs nothing but the standard library.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1] / "src" / "anydelta"


def tables() -> tuple[dict[str, type], tuple[Any, ...]]:
    """(classes of arrays by the name of their order, operators), read without importing the package's __init__."""
    package = types.ModuleType("anydelta")
    package.__path__ = [str(ROOT)]
    sys.modules.setdefault("anydelta", package)
    from anydelta.mixer.arguments import MixerCall
    from anydelta.rule.arguments import OPERATORS, Call

    return {"rule_array": Call, "mixer_array": MixerCall}, OPERATORS


def structs() -> dict[str, str]:
    from anydelta.backends.devices.structs import CALL, PARAMS, VULKAN_FLAGS, bits

    return {
        "params_members.hpp": PARAMS.text("c++"),
        "call.glsl": CALL.text("glsl"),
        "flags.glsl": bits(VULKAN_FLAGS, "const uint {name} = {value};"),
    }


def lists(operators: tuple[Any, ...]) -> list[str]:
    """The arrays of the rule as macros that apply X to each. In C++ an array has its name of the in-place operator."""
    from anydelta.rule.arguments import FUNCTIONAL, INPLACE, TOKENS, TRACKED

    def apply(name: str, items: list[str]) -> str:
        return f"#define ANYDELTA_{name}(X) {' '.join(items)}"

    def array(name: str) -> str:
        public = INPLACE.public(name)
        return f'X({public}, {name.upper()}, "{FUNCTIONAL.public(name)}", "{public}")'

    out = [
        "// X(member, its place in rule_array, its names in the functional and in the in-place operator)",
        apply("ARRAYS", [array(name) for name in INPLACE.tensors]),
        "// Those that each token has of its own.",
        apply("TOKENS", [array(name) for name in TOKENS]),
        "// Those that may have a gradient.",
        apply("TRACKED", [array(name) for name in TRACKED]),
        "// The tensors of an operator in its order: X(required or optional, member, kind)",
    ]
    for o in operators:
        words = [
            f"X({'optional' if o.optional(n) else 'required'}, {INPLACE.public(n)}, {o.row(n).kind})"
            for n in o.tensors
        ]
        out.append(apply(f"ARGUMENTS_{o.name}", words))
    return out


def options() -> list[str]:
    """The options of the rule as macros, like `lists`."""
    from anydelta.core.arguments import ChoiceRow, NumberRow, fields
    from anydelta.rule.arguments import INPLACE, PLAIN, Options

    def literal(value: object) -> str:
        return f'"{value}"' if isinstance(value, str) else repr(value).lower()

    def option(name: str) -> str:
        field, default = fields(Options)[name], Options._field_defaults[name]
        if isinstance(field.row, ChoiceRow):
            return f"X(choice, {name}, {literal(default)}, {', '.join(map(literal, field.row.values))})"
        if isinstance(field.row, NumberRow):
            allowed = f'{field.row.minimum}, {field.row.maximum}, "{field.row.why}"'
            kind, absent = ("maybe", "{}") if field.optional else ("number", default)
            return f"X({kind}, {name}, {absent}, {allowed})"
        return f"X(flag, {name}, {literal(default)}, )"

    plain = [f"X({'bool' if fields(Options)[n].type is bool else 'float'}, {n})" for n in PLAIN]
    return [
        "// The options that every operator has, in its order: X(kind, member, default, what its row allows ...)",
        f"#define ANYDELTA_OPTIONS(X) {' '.join(map(option, INPLACE.flags))}",
        "// Those that the kernels read as they are: X(type, member)",
        f"#define ANYDELTA_PLAIN_OPTIONS(X) {' '.join(plain)}",
    ]


def header(orders: dict[str, type], operators: tuple[Any, ...]) -> str:
    lines = [
        "// Written by scripts/generate_arguments.py from the tables of arguments.",
        "#pragma once",
        "#include <cstddef>",
        "",
        "namespace anydelta {",
    ]
    for name, table in orders.items():
        names = ", ".join(field.upper() for field in table.__dataclass_fields__)  # type: ignore[attr-defined]
        lines += [f"namespace {name} {{", f"enum : size_t {{ {names}, COUNT }};", "}"]
    return "\n".join([*lines, "}  // namespace anydelta", "", *lists(operators), *options(), ""])


def main(folder: Path) -> None:
    orders, operators = tables()
    folder.mkdir(parents=True, exist_ok=True)
    texts = ",\n    ".join(f'R"schema({schema})schema"' for schema in (o.schema() for o in operators))
    files = {
        "arguments.h": header(orders, operators),
        "torch_schemas.h": f"static const char* const SCHEMAS[] = {{\n    {texts}}};\n",
        **structs(),
    }
    for name, text in files.items():
        path = folder / name
        if (
            not path.exists() or path.read_text(encoding="utf-8") != text
        ):  # or all that includes it is built anew
            path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
