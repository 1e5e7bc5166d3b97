#!/usr/bin/env bash
# Fuzzes the readers with libFuzzer, ASan and UBSan (needs clang): each target for SECONDS (default 60), one after the
# other. New inputs go to build/fuzz/found/TARGET, crashing inputs to build/fuzz/artifacts. Add both to
# tests/fuzz/corpus/TARGET (new inputs minimised with -merge=1); the tests replay that corpus.
#   scripts/test/fuzz.sh [SECONDS] [TARGET ...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
seconds=${1:-60}
shift || true
targets=("$@")
[[ ${#targets[@]} -gt 0 ]] || targets=(config csv result input)

CC=clang CXX=clang++ cmake --preset host -B build/fuzz -DNSA_FUZZ=ON -DCMAKE_BUILD_TYPE=RelWithDebInfo >/dev/null
cmake --build build/fuzz --target "${targets[@]/#/fuzz_}"
mkdir -p build/fuzz/artifacts
# HDF5 leaks after a rejected file and copies between overlapping ranges; both are suppressed.
export LSAN_OPTIONS=suppressions=$PWD/tests/fuzz/leaks.supp:print_suppressions=0
export ASAN_OPTIONS=fast_unwind_on_malloc=0:suppressions=$PWD/tests/fuzz/asan.supp
for target in "${targets[@]}"; do
  mkdir -p "build/fuzz/found/$target"
  "build/fuzz/tests/fuzz/fuzz_$target" "-max_total_time=$seconds" -rss_limit_mb=2500 -timeout=900 \
    "-artifact_prefix=build/fuzz/artifacts/$target-" -print_final_stats=1 \
    "build/fuzz/found/$target" "tests/fuzz/corpus/$target"
done
