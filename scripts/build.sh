#!/usr/bin/env bash
# Configures and builds one preset (host, host-faults, host-asan, host-tsan, cuda, cuda-faults,
# cuda-debug; default host) after installing missing packages (scripts/setup.sh).
#   scripts/build.sh [PRESET] [-DNAME=VALUE ...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
preset=host
if [[ $# -gt 0 && $1 != -* ]]; then
  preset=$1
  shift
fi
tests=(--tests)
[[ " $* " == *" -DNSA_TESTS=OFF "* ]] && tests=()
scripts/setup.sh "${tests[@]}"
for folder in TOMLPLUSPLUS_INCLUDE_DIR NLOHMANN_JSON_INCLUDE_DIR; do
  [[ -n ${!folder:-} ]] && set -- "$@" "-D$folder=${!folder}"
done
cmake --preset "$preset" "$@" >/dev/null
cmake --build --preset "$preset"
if [[ $preset == host ]] && command -v nvcc >/dev/null; then
  echo "build: found a CUDA compiler; scripts/build.sh cuda also builds the GPU backend"
fi
