#!/usr/bin/env bash
# Runs the GPU tests that are small enough under compute-sanitizer's tools. Any finding fails the test.
#   scripts/test/test_gpu_sanitizers.sh GPU_TESTS [TOOL...]      e.g. build/cuda/tests/gpu/gpu_tests racecheck
# racecheck also reports kernels of cuBLAS (docs/kernels/README.md). Needs compute-sanitizer in PATH.
set -euo pipefail
tests=${1:?the program gpu_tests}
shift
(($#)) || set -- memcheck synccheck initcheck racecheck
failed=0
for tool in "$@"; do
  echo "== $tool"
  compute-sanitizer --tool "$tool" --error-exitcode 1 "$tests" "[small]" -d yes || failed=1
done
exit "$failed"
