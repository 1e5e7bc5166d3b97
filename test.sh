#!/usr/bin/env bash
# Builds nsa with its tests (installing what they need), runs every test that this machine can run, as many side by side
# as it has cores, and prints what was skipped and why.
#   ./test.sh [--all] [CTEST OPTIONS]     e.g. ./test.sh -L unit, ./test.sh -R parity
# --all adds the long repetitions and clang-tidy (docs/TESTING.md).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
if [[ ${1:-} == --all ]]; then
  shift
  set -- -C Long "$@"
  export NSA_TEST_ALL=1
fi
cores=$(nproc)
export CTEST_PARALLEL_LEVEL=${CTEST_PARALLEL_LEVEL:-$((cores < 8 ? cores : 8))}
failed=0
for preset in host host-faults; do
  scripts/build.sh "$preset" -DNSA_TESTS=ON
  rm -f "build/$preset/Testing/Temporary/LastTest.log"
done
for preset in host host-faults; do
  ctest --preset "$preset" "$@" || failed=1
done
tests/skipped.py build/host build/host-faults
exit $failed
