#!/usr/bin/env bash
# Builds the CUDA preset and runs the tests that need GPUs: every stage against the host stage, the whole program
# against the float64 oracle, and every layout on all GPUs of this host.
#   scripts/test/test_gpu.sh [-DNSA_CUDA_ARCHITECTURES=90 ...]
# NSA_EXPECT_EXCHANGE="peer memory": GPUs without peer access fail the test.
# NSA_SHARE_GPU=1: also the layouts of more ranks than GPUs, with several ranks on a GPU; slow.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
scripts/build.sh cuda -DNSA_TESTS=ON "$@"
ctest --preset cuda -L gpu
