#!/usr/bin/env bash
# Installs the packages of the build and the tests on Debian 12 and Ubuntu 24.04, as root; other users get the command.
# On other systems (Spack, modules) it only prints what CMake searches for.
set -euo pipefail

packages=(g++ cmake ninja-build git python3 python3-venv openmpi-bin libopenmpi-dev libhdf5-dev libtomlplusplus-dev
  libcli11-dev libfmt-dev libopenblas-dev catch2)

if ! command -v dpkg-query >/dev/null; then
  echo "setup: no dpkg found; the build needs a C++20 compiler, CMake >= 3.25, Ninja, MPI, HDF5 (C, HL), toml++," \
    "CLI11, fmt and Catch2, and uses OpenBLAS if it is found"
  exit 0
fi

missing=()
for package in "${packages[@]}"; do
  [[ $(dpkg-query -W -f='${Status}' "$package" 2>/dev/null) == *"ok installed" ]] || missing+=("$package")
done
# Whether a tool or header is present from another source (pip, a module, an unpacked archive).
have() {
  case $1 in
    cmake | git | python3) command -v "$1" >/dev/null ;;
    ninja-build) command -v ninja >/dev/null ;;
    libtomlplusplus-dev) [[ -n ${TOMLPLUSPLUS_INCLUDE_DIR:-} ]] ;;
    libopenblas-dev) [[ ${NSA_WITHOUT_BLAS:-} == 1 ]] ;;
    *) false ;;
  esac
}
needed=()
for package in "${missing[@]}"; do have "$package" || needed+=("$package"); done
[[ ${#needed[@]} -eq 0 ]] && exit 0

if [[ $EUID -ne 0 ]]; then
  echo "setup: ${#needed[@]} packages are missing and only root can install them; run" >&2
  echo "  sudo apt-get install --no-install-recommends ${needed[*]}" >&2
  exit 2
fi
echo "setup: installing ${needed[*]}"
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${needed[@]}" >/dev/null
