"""AOTInductor: compile an exported program so that it calls the kernels of anydelta_torch directly.

`compile_and_package` is `torch._inductor.aoti_compile_and_package` with the C functions of torch_library.cpp declared.
Without that the generated code would reach the operators through the proxy executor and the dispatcher. A program that
runs the package loads libanydelta_torch first: Python by `import anydelta.rule.torch_ops`, C++ by linking it.
"""

from __future__ import annotations

from pathlib import Path

import torch

from ..rule import torch_library
from ..rule import torch_ops as torch_op

_C_TYPES = {
    "Tensor": "AtenTensorHandle",
    "Optional[Tensor]": "AtenTensorHandle*",
    "float": "double",
    "Optional[float]": "double*",
    "bool": "int32_t",
    "str": "const char*",
}
"""The C types of the schema's arguments in the generated code."""


def c_shims() -> dict[torch._ops.OpOverload, list[str]]:
    """The C functions of the operators, for `torch._inductor.config.aot_inductor.custom_ops_to_c_shims`.

    Raises:
        RuntimeError: anydelta_torch is not in use; says why.
    """
    if torch_op.LIBRARY is None:
        raise RuntimeError(
            f"export: AOTInductor requires anydelta_torch, which is not in use: {torch_op.LIBRARY_REASON}"
        )
    shims = {}
    for name in torch_op.SCHEMAS:
        op = getattr(torch.ops.anydelta, name).default
        arguments = [_C_TYPES[str(a.type)] for a in op._schema.arguments]
        arguments += ["AtenTensorHandle*"] * len(op._schema.returns)
        shims[op] = [f"AOTITorchError aoti_torch_cpu_{name}({', '.join(arguments)})"]
    return shims


def compile_and_package(
    program: torch.export.ExportedProgram, path: str | Path, options: dict[str, object] | None = None
) -> Path:
    """Compile for the CPU into a .pt2 package; `options` as inductor's.

    Raises:
        RuntimeError: anydelta_torch is not in use; says why.
    """
    settings = {"aot_inductor.custom_ops_to_c_shims": c_shims(), **(options or {})}
    written = torch._inductor.aoti_compile_and_package(
        program, package_path=str(path), inductor_configs=settings
    )
    return Path(written)


def library() -> Path:
    """The library that a C++ program links to run a package.

    Raises:
        RuntimeError: there is none; says why.
    """
    path, reason = torch_library.find()
    if path is None:
        raise RuntimeError(f"export: there is no anydelta_torch to link: {reason}")
    return path
