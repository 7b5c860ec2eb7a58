"""The corpus of the fuzz targets as a regression test: inputs that once failed, and inputs that cover much code."""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FUZZ = ROOT / "tests" / "fuzz"
CORPUS = FUZZ / "corpus"
sys.path.insert(0, str(FUZZ))

import loaders  # noqa: E402
import run  # noqa: E402

FOLDERS = sorted(path.name for path in CORPUS.iterdir())


def test_corpus_fits_the_targets():
    assert sorted((*run.CORE, *loaders.TARGETS)) == FOLDERS
    assert all(any((CORPUS / name).iterdir()) for name in FOLDERS)
    assert sum(path.stat().st_size for path in CORPUS.rglob("*") if path.is_file()) < 200_000


@pytest.mark.parametrize("name", loaders.TARGETS)
def test_loaders(name):
    if name in ("checkpoints", "checkpoint", "model"):
        pytest.importorskip("torch")
        pytest.importorskip("safetensors")
    if name == "checkpoint":
        pytest.importorskip("transformers")
    loaders.replay(name, sorted((CORPUS / name).iterdir()))


def test_a_loader_that_raises_something_else_fails(tmp_path):
    (tmp_path / "a").write_bytes(b"")
    loaders.TARGETS["broken"] = lambda data: loaders.only(ValueError, "x: ", lambda: {}["key"])
    try:
        with pytest.raises(KeyError):
            loaders.replay("broken", [tmp_path / "a"])
    finally:
        del loaders.TARGETS["broken"]


@pytest.fixture(scope="module")
def build():
    """The folder that the package was built in, where the core's objects are."""
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    found = [p.parent for p in ROOT.glob(f"build/{tag}-*/build.ninja")]
    cmake = Path(sysconfig.get_path("scripts"), "cmake")
    if not found or not cmake.exists() or not shutil.which("c++"):
        pytest.skip("requires the build folder of an editable install, CMake and a C++ compiler")
    names = [f"replay_{name}" for name in run.CORE]
    subprocess.run([cmake, "--build", found[0], "--target", *names], check=True, capture_output=True)
    return found[0] / "tests" / "fuzz"


@pytest.mark.parametrize("name", run.CORE)
def test_core(build, name):
    ran = subprocess.run([build / f"replay_{name}", CORPUS / name], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr[-300:]
    assert ran.stdout == f"{len(list((CORPUS / name).iterdir()))} inputs\n"
