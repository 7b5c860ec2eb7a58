#!/usr/bin/env bash
# What a GPU machine shall run first: is it right, is it safe, how fast is it. Builds nothing; needs torch, Triton, NumPy
# and this checkout, and uses fla-core, flashinfer-python and transformers where they are installed.
#
#   bench/gpu.sh [FOLDER]            about 8 minutes; records go to FOLDER, default out/gpu
#   bench/gpu.sh --dry-run [FOLDER]  without a GPU, in Triton's interpreter: shows that the script works. ITS TIMES MEAN NOTHING
set -uo pipefail
cd "$(dirname "$0")/.."
dry=""
if [ "${1:-}" = --dry-run ]; then dry=--dry-run; shift; fi
out=${1:-out/gpu}
mkdir -p "$out"
python=${PYTHON:-python3}
export PYTHONPATH=src${PYTHONPATH:+:$PYTHONPATH}
failed=0

step() {  # step SECONDS NAME COMMAND...: the command's output goes to NAME.log
  local limit=$1 name=$2
  shift 2
  if timeout "$limit" "$@" >"$out/$name.log" 2>&1; then
    echo "ok      $name: $(tail -n 1 "$out/$name.log")"
  else
    echo "FAILED  $name (exit $?), the end of $out/$name.log:"
    tail -n 5 "$out/$name.log" | sed 's/^/          /'
    failed=1
  fi
}

if [ -n "$dry" ]; then
  export TRITON_INTERPRET=1
  echo "DRY RUN: Triton's interpreter on the CPU. This shows that the script works. Its times mean nothing."
fi
step 60 environment "$python" bench/gpu.py environment $dry --out "$out/environment.json"
step 170 conformance "$python" bench/gpu.py conform $dry --seconds 120 --out "$out/conformance.json"
if [ -n "$dry" ]; then
  echo "skipped sanitizer, graphs: they need a GPU"
else
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1  # so that a stray access leaves its block
  if command -v compute-sanitizer >/dev/null; then
    step 60 sanitizer compute-sanitizer --error-exitcode 9 "$python" bench/gpu.py conform --sample --seconds 40 --out "$out/sanitized.json"
    step 60 racecheck compute-sanitizer --tool racecheck --error-exitcode 9 "$python" bench/gpu.py conform --sample --seconds 40 --out "$out/races.json"
  else
    echo "skipped sanitizer: compute-sanitizer is not installed"
  fi
  unset PYTORCH_NO_CUDA_MEMORY_CACHING
  step 90 graphs "$python" -m pytest -q tests/test_gpu.py
fi
step 180 bench "$python" bench/gpu.py bench $dry --out "$out/bench.json"
grep '^|' "$out/bench.log"
exit $failed
