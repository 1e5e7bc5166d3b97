#!/usr/bin/env bash
# Builds nsa with its tests (installing what they need) and runs every test that this machine can run.
#   ./test.sh [CTEST OPTIONS]     e.g. ./test.sh -L unit, ./test.sh -R parity
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
scripts/build.sh host -DNSA_TESTS=ON
scripts/build.sh host-faults -DNSA_TESTS=ON
ctest --preset host "$@"
ctest --preset host-faults "$@"
