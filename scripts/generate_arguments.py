"""Write what C++ takes from the tables of arguments: `python scripts/generate_arguments.py FOLDER`, as CMake does.

arguments.h has the order in which Python hands over the arrays of a call, torch_schemas.h the schemas of
torch.ops.anydelta, the others what the SYCL host and the Vulkan shaders have of backends/devices/structs.py. Needs
nothing but the standard library.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1] / "src" / "anydelta"


def tables() -> tuple[dict[str, type], list[str]]:
    """(classes of arrays by the name of their order, schemas), read without importing the package's __init__."""
    package = types.ModuleType("anydelta")
    package.__path__ = [str(ROOT)]
    sys.modules.setdefault("anydelta", package)
    from anydelta.mixer.arguments import MixerCall
    from anydelta.rule.arguments import OPERATORS, Call

    return {"rule_array": Call, "mixer_array": MixerCall}, [o.schema() for o in OPERATORS]


def structs() -> dict[str, str]:
    from anydelta.backends.devices.structs import CALL, PARAMS, VULKAN_FLAGS, bits

    return {
        "params_members.hpp": PARAMS.text("c++"),
        "call.glsl": CALL.text("glsl"),
        "flags.glsl": bits(VULKAN_FLAGS, "const uint {name} = {value};"),
    }


def header(orders: dict[str, type]) -> str:
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
    return "\n".join([*lines, "}  // namespace anydelta", ""])


def main(folder: Path) -> None:
    orders, schemas = tables()
    folder.mkdir(parents=True, exist_ok=True)
    texts = ",\n    ".join(f'R"schema({schema})schema"' for schema in schemas)
    files = {
        "arguments.h": header(orders),
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
