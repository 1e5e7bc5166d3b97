#!/bin/sh
# Runs Python tests that need analysis/ and what its tests need: run.sh VENV PYTHON-ARGUMENT...
# They are installed into VENV, once. Where that cannot be, it says why and exits with 77: skipped.
root=$(cd "$(dirname "$0")/../.." && pwd)
venv=$1
shift
imports='import h5netcdf, ipykernel, nbclient, nbformat, netCDF4, nsa_analysis.cli, pytest, xarray'

skip() {
  echo "SKIPPED: $1"
  exit 77
}

install() {
  [ "$venv/.complete" -nt "$root/analysis/pyproject.toml" ] && return
  log=$venv.log
  python3 -m venv "$venv" >"$log" 2>&1 ||
    skip "python3 cannot make a virtual environment ($(tail -n 1 "$log")); on Debian and Ubuntu install python3-venv"
  timeout 450 "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --retries 1 \
    -e "$root/analysis[test]" >>"$log" 2>&1 ||
    skip "pip cannot install analysis[test] ($(tail -n 1 "$log")); connect to a package index"
  # What is installed and does not run is no reason to skip.
  "$venv/bin/python" -c "$imports" || exit 1
  touch "$venv/.complete"
}

command -v python3 >/dev/null || skip "no python3; install it"
mkdir -p "$(dirname "$venv")"
if command -v flock >/dev/null; then # tests run side by side: one of them installs, the others wait
  exec 9>"$venv.lock"
  flock 9
  install
  exec 9>&-
else
  install
fi
PYTHONDONTWRITEBYTECODE=1
export PYTHONDONTWRITEBYTECODE
exec "$venv/bin/python" "$@"
