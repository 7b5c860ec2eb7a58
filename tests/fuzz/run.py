"""Run fuzz targets one after the other, and print one line with the result of each. Used by `make fuzz`.

    python tests/fuzz/run.py --seconds 60 rule case

What is found lies in build/fuzz/found, with the command that repeats it; new inputs are kept in build/fuzz/corpus.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "fuzz"
CORE = ("spec", "rule", "backward", "mixer", "mixer_backward", "log")


def command(name: str) -> list[str]:
    """What runs a target on libFuzzer's arguments."""
    if name in CORE:
        return [str((BUILD / "tests" / "fuzz" / f"fuzz_{name}").relative_to(ROOT))]
    return [os.path.relpath(sys.executable, ROOT), "tests/fuzz/loaders.py", name]


def fuzz(name: str, seconds: int) -> bool:
    """Whether nothing was found in so many seconds."""
    new, found = BUILD / "corpus" / name, BUILD / "found"
    for folder in (new, found):
        folder.mkdir(parents=True, exist_ok=True)
    prefix = found / f"{name}-"
    log = BUILD / f"{name}.log"
    with log.open("w") as output:
        ended = subprocess.run(
            [
                *command(name), str(new), str(HERE / "corpus" / name), f"-max_total_time={seconds}", "-timeout=120",
                "-rss_limit_mb=4096", "-max_len=8192", f"-artifact_prefix={prefix}",
            ],
            cwd=ROOT, env={**os.environ, "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1"}, stdout=output,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
    text = log.read_text(errors="replace")
    runs = re.findall(r"^#(\d+)\s.*?cov: (\d+)", text, re.M)
    did = f"{runs[-1][0]} inputs, {runs[-1][1]} branches" if runs else "no input"
    if ended.returncode == 0:
        print(f"ok    {name:12} {seconds} s, {did}", flush=True)
        return True
    print(f"FAIL  {name:12} {did}; the whole output is in {log.relative_to(ROOT)}", flush=True)
    for line in re.findall(r"^(?:FAIL .*|\s+in .*|.*(?:ERROR|runtime error|Error): .*)$", text, re.M)[:6]:
        print(f"      {line.strip()[:200]}")
    for path in re.findall(r"Test unit written to (\S+)", text):
        print(f"      repeat it with: {' '.join(command(name))} {os.path.relpath(path, ROOT)}", flush=True)
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description="Run fuzz targets one after the other.")
    parser.add_argument("--seconds", type=int, default=60, help="of each target")
    parser.add_argument("targets", nargs="+")
    asked = parser.parse_args()
    good = [fuzz(name, asked.seconds) for name in asked.targets]
    sys.exit(not all(good))


if __name__ == "__main__":
    main()
