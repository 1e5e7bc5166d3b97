#!/bin/sh
# Runs a Python test that needs the packages of requirements.txt: run.sh VENV SCRIPT [ARGUMENT...]
# They are installed into VENV, once. Where that cannot be, it says why and exits with 77: skipped.
here=$(cd "$(dirname "$0")" && pwd)
venv=$1
shift
imports='import h5py, h5netcdf, netCDF4, numpy, pandas, xarray'

skip() {
  echo "SKIPPED: $1"
  exit 77
}

command -v python3 >/dev/null || skip "no python3; install it"
if ! "$venv/bin/python" -c "$imports" 2>/dev/null; then
  mkdir -p "$(dirname "$venv")"
  log=$venv.log
  python3 -m venv "$venv" >"$log" 2>&1 ||
    skip "python3 cannot make a virtual environment ($(tail -n 1 "$log")); on Debian and Ubuntu install python3-venv"
  timeout 300 "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --retries 1 \
    -r "$here/requirements.txt" >>"$log" 2>&1 ||
    skip "pip cannot install tests/analysis/requirements.txt ($(tail -n 1 "$log")); connect to a package index"
fi
exec "$venv/bin/python" "$@"
