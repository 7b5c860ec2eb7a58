"""Finds the op libraries of src/anydelta/export, which are beside the extension. Nothing here imports a runtime."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from . import native

_FORMS = ("lib{}.so", "lib{}.dylib", "{}.dll", "{}.so")


def find(name: str, package: str, minimum: tuple[int, ...], env: str = "") -> tuple[Path | None, str]:
    """Return (the library, "") or (None, the reason why there is none).

    Args:
        name: of the library, such as "anydelta_torch".
        package: the distribution of its runtime, of `minimum` or newer.
        env: the environment variable that turns the library off if it is 0.
    """
    if env and os.environ.get(env) == "0":
        return None, f"{env}=0"
    if native.why_not:
        return None, native.why_not
    try:
        installed = version(package)
    except PackageNotFoundError:
        return None, f"{package} is not installed"
    if release(installed, len(minimum)) < minimum:
        return None, f"it needs {package} {'.'.join(map(str, minimum))} or newer; got {installed}"
    folder = Path(native.core.__file__).parent
    paths = (folder / form.format(name) for form in _FORMS)
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        return None, f"anydelta was built without {package}; see docs/export.md"
    return path, ""


def release(text: str, numbers: int) -> tuple[int, ...]:
    """The first numbers of a version."""
    return tuple(int(n) for n in text.split(".")[:numbers])
