"""`make release-check`: checks that a release is complete, and that it works without other packages.

    python scripts/release_check.py                 every Python from 3.10 on that PATH has
    python scripts/release_check.py python3.12      these only

Builds sdist and wheel into build/release and looks at them with twine. For each Python it makes an empty environment
and installs the wheel, or the sdist where the wheel is of another Python, with the program and with what the examples
of README.md need. Then it runs these examples and the lines of README.md that begin with `anydelta`. Packages have the
versions of the groups in pyproject.toml. The time of each step is printed.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:  # of pip, which every environment has
    from pip._vendor import tomli as tomllib

ROOT = Path(__file__).parent.parent
OUT = ROOT / "build" / "release"
OLDEST = (3, 10)
EXTRAS = "transformers,cli"


def step(name: str, command: list[str], cwd: Path = ROOT) -> None:
    """Run a command, print its time, and end the program with what it printed if it fails."""
    began = time.monotonic()
    done = subprocess.run(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(f"{time.monotonic() - began:7.1f} s  {name}", flush=True)
    if done.returncode:
        sys.exit(f"{done.stdout}\nrelease-check: {name} failed: {shlex.join(command)}")


def pythons(named: list[str]) -> dict[str, str]:
    """Interpreters by version, as 3.11: those named, or all on PATH and of pyenv, and the one that runs this."""
    if named:
        found = named
    else:
        minors = range(OLDEST[1], 20)
        found = [path for minor in minors if (path := shutil.which(f"python3.{minor}"))]
        pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
        found += [str(path) for path in sorted(pyenv.glob("versions/*/bin/python3"))] + [sys.executable]
    versions: dict[str, str] = {}
    for python in found:
        code = "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])"
        asked = subprocess.run([python, "-c", code], capture_output=True, text=True)
        version = asked.stdout.strip()
        if asked.returncode:  # a shim of pyenv, or a Debian without venv
            if named:
                sys.exit(f"release-check: requires a Python with venv; got {python}")
        elif tuple(map(int, version.split("."))) >= OLDEST:
            versions.setdefault(version, python)
    return versions


def constraints() -> str:
    """The versions that the dependency groups pin."""
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["dependency-groups"]
    pinned = [line for group in groups.values() for line in group if "==" in line]
    return "\n".join(re.sub(r"\[.*?\]", "", line) for line in pinned) + "\n"  # pip takes no extras here


def readme_lines() -> list[str]:
    """The commands of README.md that run the program, without those on a FILE of the reader's."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = re.findall(r"^    (anydelta .*)$", text, re.MULTILINE)
    return [line.partition("  #")[0].strip() for line in lines if "FILE" not in line]


def check(version: str, python: str, folder: Path) -> None:
    """Install what was built for one Python, and run README's lines."""
    tag = f"cp{version.replace('.', '')}-"
    built = [path for path in OUT.iterdir() if path.suffix == ".whl" and tag in path.name]
    built = built or [path for path in OUT.iterdir() if path.name.endswith(".tar.gz")]
    place = folder / version
    run = place / "bin" / "python"
    step(f"Python {version}: an empty environment", [python, "-m", "venv", str(place)])
    limits = folder / "constraints.txt"
    limits.write_text(constraints(), encoding="utf-8")
    install = [str(run), "-m", "pip", "install", "-q", "-c", str(limits)]
    step(f"Python {version}: install {built[0].name}", [*install, str(built[0])])
    step(
        f"Python {version}: the package, with NumPy only",
        [str(run), "-c", "import anydelta; anydelta.StatePool"],
    )
    examples = [str(run), "scripts/run_examples.py", "--allow-missing", "README.md"]
    step(f"Python {version}: README's examples for NumPy", examples)
    step(f"Python {version}: install the extras {EXTRAS}", [*install, f"{built[0]}[{EXTRAS}]"])
    step(f"Python {version}: README's examples", [str(run), "scripts/run_examples.py", "README.md"])
    for line in readme_lines():
        words = shlex.split(line)
        step(f"Python {version}: {line}", [str(place / "bin" / words[0]), *words[1:]])


def main() -> None:
    shutil.rmtree(OUT, ignore_errors=True)
    step("build sdist and wheel", [sys.executable, "-m", "build", "--outdir", str(OUT), "."])
    files = [str(path) for path in OUT.iterdir()]
    step("twine check", [sys.executable, "-m", "twine", "check", "--strict", *files])
    found = pythons(sys.argv[1:])
    if not found:
        sys.exit("release-check: requires Python 3.10 or later with venv; got none.")
    with tempfile.TemporaryDirectory() as folder:
        for version, python in found.items():
            check(version, python, Path(folder))
    print(f"Ready: {', '.join(Path(name).name for name in files)} on Python {', '.join(found)}")


if __name__ == "__main__":
    main()
