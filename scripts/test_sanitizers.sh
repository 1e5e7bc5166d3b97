#!/usr/bin/env bash
# Builds nsa under AddressSanitizer with UBSan, and under ThreadSanitizer, and runs the tests they are for (the presets
# host-asan and host-tsan say which). Whatever is found fails them. What Open MPI keeps is suppressed by name:
# tests/suppressions.
#   scripts/test_sanitizers.sh [CTEST OPTIONS]     e.g. -R '^unit$'
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
for preset in host-asan host-tsan; do
  scripts/build.sh "$preset" -DNSA_TESTS=ON
  ctest --preset "$preset" "$@"
done
