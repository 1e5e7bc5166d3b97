#!/usr/bin/env bash
# Builds nsa with AddressSanitizer and UBSan, and with ThreadSanitizer, and runs the tests that the presets host-asan
# and host-tsan list. Any finding fails the test. Leaks of Open MPI are suppressed by name: tests/suppressions.
#   scripts/test/test_sanitizers.sh [CTEST OPTIONS]     e.g. -R '^unit$'
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
for preset in host-asan host-tsan; do
  scripts/build.sh "$preset" -DNSA_TESTS=ON
  ctest --preset "$preset" "$@"
done
