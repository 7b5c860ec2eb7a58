#!/usr/bin/env bash
# What a GPU machine shall run first: is it right, is it safe, how fast is it. Builds nothing; needs torch, Triton, NumPy
# and this checkout, and uses fla-core, flashinfer-python, transformers, pytest and compute-sanitizer where they are
# installed.
#
#   scripts/gpu.sh [FOLDER]            at most 8 minutes; records go to FOLDER, default out/gpu
#   scripts/gpu.sh --dry-run [FOLDER]  without a GPU, in Triton's interpreter: shows that the script works. ITS TIMES MEAN NOTHING
set -uo pipefail
cd "$(dirname "$0")/.."
dry=""
if [ "${1:-}" = --dry-run ]; then dry=--dry-run; shift; fi
out=${1:-out/gpu}
mkdir -p "$out"
python=${PYTHON:-python3}
export PYTHONPATH=src${PYTHONPATH:+:$PYTHONPATH}
failed=0

# The whole takes at most this long: a step gets its limit, or what is left. The interpreter is given ten times as much.
slow=1
if [ -n "$dry" ]; then slow=10; fi
budget=$((480 * slow))

step() {  # step SECONDS NAME COMMAND...: the command's output goes to NAME.log
  local limit=$(($1 * slow)) name=$2 left=$((budget - SECONDS))
  shift 2
  if [ "$left" -lt 10 ]; then
    echo "skipped $name: the $budget s are over"
    failed=1
  elif timeout "$((limit < left ? limit : left))" "$@" >"$out/$name.log" 2>&1; then
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
export ANYDELTA_TRITON_CONFIGS=  # what ships, and no table of the user's
step 20 environment "$python" scripts/gpu.py environment $dry --out "$out/environment.json"
fresh=$(mktemp -d)
TRITON_CACHE_DIR=$fresh step 45 first "$python" scripts/gpu.py first $dry --out "$out/first.json"
rm -rf "$fresh"
step 85 conformance "$python" scripts/gpu.py conform $dry --seconds 70 --out "$out/conformance.json"
step 165 bench "$python" scripts/gpu.py bench $dry --seconds 120 --out "$out/bench.json"
step 40 tune "$python" scripts/gpu.py tune $dry --seconds 25 --out "$out/tune.json"
if [ -n "$dry" ]; then
  echo "skipped graphs, sanitizer: they need a GPU"
else
  if "$python" -c 'import pytest' 2>/dev/null; then
    step 50 graphs "$python" -m pytest -q tests/test_gpu.py -k 'not conformance'
  else
    echo "skipped graphs: pytest is not installed"
  fi
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1  # so that a stray access leaves its block
  if command -v compute-sanitizer >/dev/null; then
    step 40 sanitizer compute-sanitizer --error-exitcode 9 "$python" scripts/gpu.py conform --sample --seconds 20 --out "$out/sanitized.json"
    step 35 racecheck compute-sanitizer --tool racecheck --error-exitcode 9 "$python" scripts/gpu.py conform --sample --seconds 15 --out "$out/races.json"
  else
    echo "skipped sanitizer: compute-sanitizer is not installed"
  fi
fi
grep -h '^|' "$out/first.log" "$out/bench.log"
echo "$SECONDS s in all, $budget at most"
exit $failed
