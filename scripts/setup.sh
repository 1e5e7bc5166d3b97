#!/usr/bin/env bash
# Installs the Debian or Ubuntu packages that the build needs and this machine lacks, as root; other users get the
# command. A compiler, tool or library that CMake finds (a module, Spack, pip) counts as present.
#   setup.sh [--tests]        --tests: what the tests need too
# NSA_NO_APT=1: installs nothing; CMake then says what it does not find. NSA_WITHOUT_BLAS=1: not OpenBLAS.
set -euo pipefail
[[ ${NSA_NO_APT:-} == 1 ]] && exit 0

packages=(g++ cmake ninja-build git openmpi-bin libopenmpi-dev libhdf5-dev libtomlplusplus-dev nlohmann-json3-dev
  libcli11-dev libfmt-dev)
[[ ${NSA_WITHOUT_BLAS:-} == 1 ]] || packages+=(libopenblas-dev)
[[ ${1:-} == --tests ]] && packages+=(catch2 python3 python3-venv)

if ! command -v dpkg-query >/dev/null; then
  echo "setup: no dpkg found; the build needs a C++20 compiler, CMake >= 3.25, Ninja, MPI, HDF5 (C, HL), toml++," \
    "nlohmann-json, CLI11 and fmt, the tests need Catch2 and Python; OpenBLAS is used if it is found"
  exit 0
fi

missing=()
for package in "${packages[@]}"; do
  [[ $(dpkg-query -W -f='${Status}' "$package" 2>/dev/null) == *"ok installed" ]] || missing+=("$package")
done
[[ ${#missing[@]} -eq 0 ]] && exit 0

# What CMake finds: lines "found: NAME". Nothing without CMake and a compiler.
found=""
if command -v cmake ninja >/dev/null; then
  folder=$(mktemp -d)
  trap 'rm -rf "$folder"' EXIT
  found=$(cmake -S "$(dirname "${BASH_SOURCE[0]}")/.." -B "$folder" -G Ninja -DNSA_PROBE=ON \
    ${TOMLPLUSPLUS_INCLUDE_DIR:+"-DTOMLPLUSPLUS_INCLUDE_DIR=$TOMLPLUSPLUS_INCLUDE_DIR"} \
    ${NLOHMANN_JSON_INCLUDE_DIR:+"-DNLOHMANN_JSON_INCLUDE_DIR=$NLOHMANN_JSON_INCLUDE_DIR"} 2>/dev/null) || true
fi
finds() { [[ $found == *"found: $1"* ]]; }
have() {
  case $1 in
    g++) finds CXX ;;
    cmake | git | python3) command -v "$1" >/dev/null ;;
    python3-venv) python3 -c 'import ensurepip, venv' 2>/dev/null ;;
    ninja-build) command -v ninja >/dev/null ;;
    openmpi-bin) finds MPI && command -v mpirun >/dev/null ;;
    libopenmpi-dev) finds MPI ;;
    libhdf5-dev) finds HDF5 ;;
    libtomlplusplus-dev) finds toml++ ;;
    nlohmann-json3-dev) finds nlohmann-json ;;
    libcli11-dev) finds CLI11 ;;
    libfmt-dev) finds fmt ;;
    libopenblas-dev) finds CBLAS ;;
    catch2) finds Catch2 ;;
  esac
}
needed=()
for package in "${missing[@]}"; do have "$package" || needed+=("$package"); done
[[ ${#needed[@]} -eq 0 ]] && exit 0

if [[ $EUID -ne 0 ]]; then
  what="1 package is missing and only root can install it"
  [[ ${#needed[@]} -gt 1 ]] && what="${#needed[@]} packages are missing and only root can install them"
  echo "setup: $what; run" >&2
  echo "  sudo apt-get install --no-install-recommends ${needed[*]}" >&2
  echo "or load modules that provide the same, or set NSA_NO_APT=1 to build with what CMake finds" >&2
  exit 2
fi
echo "setup: installing ${needed[*]}"
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${needed[@]}" >/dev/null
