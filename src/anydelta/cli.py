"""The program `anydelta`: info | doctor | conform | generate | gguf | bench | tune. Needs the extra "cli".

How it prints and ends: terminal.py.
"""

from __future__ import annotations

import importlib
import importlib.util
import platform
from typing import TYPE_CHECKING, Any

from . import __version__, terminal
from .conformance.run import unavailable
from .core import dispatch
from .rule import torch_library

if TYPE_CHECKING:
    import typer


COMMANDS = (
    "anydelta.doctor",
    *(f"anydelta.{room}.cli" for room in ("conformance", "generate", "gguf", "bench", "tune")),
)
"""Modules whose `register(app)` adds a command. By name: they need typer, which may be missing."""


HELP = """The gated delta rule as one fast operator for every device.

Examples:
  anydelta doctor
  anydelta generate "And it came to pass"
  anydelta conform --backend cpu
  anydelta bench ops
"""


def main(args: list[str] | None = None) -> None:
    """Run the program; `args` as in sys.argv[1:]."""
    missing = [name for name in ("typer", "rich") if importlib.util.find_spec(name) is None]
    if missing:
        needed = " and ".join(missing)
        terminal.tell(f"anydelta: the command line requires {needed}; run: pip install 'anydelta[cli]'")
        raise SystemExit(2)
    terminal.run(build_app, args)


def build_app() -> typer.Typer:
    """The program with all its commands."""
    import typer

    app = typer.Typer(
        name="anydelta",
        help=HELP,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    def show_version(asked: bool) -> None:
        if asked:
            terminal.say(f"anydelta {__version__}")
            raise typer.Exit

    version = typer.Option(
        False, "--version", callback=show_version, is_eager=True, help="Show the version and exit."
    )

    @app.callback()
    def options(version: bool = version) -> None:
        pass

    # As a default value: typer, imported here, is not among the module's names that annotations may use.
    json_flag = typer.Option(False, "--json", help="As JSON on stdout.")

    @app.command()
    def info(as_json: bool = json_flag) -> None:
        """Show the version, this machine, and which backends run here or why not.

        Examples:
          anydelta info
          anydelta info --json
        """
        facts = gather()
        if as_json:
            terminal.say(terminal.to_json(facts))
        else:
            _print_info(facts)

    for name in COMMANDS:
        importlib.import_module(name).register(app)
    return app


def gather() -> dict[str, object]:
    """What `anydelta info` shows."""
    backends = {}
    for name in dispatch.NAMES:
        reasons = unavailable(name)
        facts = {} if reasons else dispatch.get_backend(name).describe()
        backends[name] = {"available": not reasons, "reasons": list(reasons), **facts}
    return {
        "anydelta": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in ("numpy", "torch", "ml_dtypes")},
        "torch_library": _torch_library(),
        "forced": dispatch.forced_by_env(),
        "priority": {device: list(names) for device, names in dispatch.PRIORITY.items()},
        "backends": backends,
    }


def _torch_library() -> dict[str, object]:
    path, reason = torch_library.find()
    return {"available": path is not None, "reason": reason}


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _print_info(facts: dict[str, Any]) -> None:
    top = [(key, facts[key]) for key in ("anydelta", "python", "platform")]
    top += [(name, found or "not installed") for name, found in facts["packages"].items()]
    library = facts["torch_library"]
    top.append(("anydelta_torch", "yes" if library["available"] else f"no: {library['reason']}"))
    top += [(f"order on {device}", ", ".join(names)) for device, names in facts["priority"].items()]
    if facts["forced"]:
        top.append(("forced", f"{dispatch.ENV}={facts['forced']}"))

    rows = []
    for name, backend in facts["backends"].items():
        details = [f"{k}: {_text(v)}" for k, v in backend.items() if k not in ("available", "reasons")]
        rows.append((name, "yes" if backend["available"] else "no", "\n".join(backend["reasons"] or details)))
    terminal.show(
        terminal.Table("", ("", ""), top, left=("",)),
        terminal.Table(
            "", ("backend", "available", "details"), rows, left=("available", "details"), boxed=True
        ),
    )


def _text(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


if __name__ == "__main__":
    main()
