#!/usr/bin/env bash
# Builds the CUDA preset and runs the tests that need GPUs: every stage against its host twin, the float64 oracle
# through the whole program, and every layout on as many GPUs as there are.
#   scripts/test_gpu.sh [-DNSA_CUDA_ARCHITECTURES=90 ...]
# NSA_EXPECT_EXCHANGE="peer memory": GPUs that do not reach each other's memory are a failure.
# NSA_SHARE_GPU=1: the layouts of more ranks than there are GPUs too, the ranks taking turns; slow.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/build.sh cuda -DNSA_TESTS=ON "$@"
ctest --preset cuda -L gpu
