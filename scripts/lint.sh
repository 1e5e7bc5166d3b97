#!/usr/bin/env bash
# Checks the form of the sources. Exits with 77 and the reason where a tool cannot be had.
#   scripts/lint.sh format          clang-format 14 (.clang-format) leaves every C, C++ and CUDA source as it is
#   scripts/lint.sh python          ruff check (ruff.toml)
#   scripts/lint.sh tidy [BUILD]    clang-tidy (.clang-tidy) on the host sources of BUILD (default build/host)
#   scripts/lint.sh                 all three
# Tools come from the PATH; clang-format and ruff else from the Python package index, into build/lint.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

skip() {
  echo "SKIPPED: $1"
  exit 77
}

from_index() { # from_index REQUIREMENT
  local log=build/lint.log
  mkdir -p build
  exec 9>build/lint.lock
  if command -v flock >/dev/null; then flock 9; fi
  [[ -x build/lint/bin/pip ]] || python3 -m venv build/lint >"$log" 2>&1 || skip "no virtual environment ($(tail -n 1 "$log"))"
  timeout 120 build/lint/bin/pip install --quiet --disable-pip-version-check --retries 1 "$1" >"$log" 2>&1 ||
    skip "pip cannot install $1 ($(tail -n 1 "$log")); connect to a package index"
  exec 9>&-
}

sources() { # sources ENDING...: files of the checkout, or of an unpacked archive
  if git rev-parse --is-inside-work-tree >/dev/null 2>&1; then
    git ls-files --cached --others --exclude-standard -- "${@/#/*.}"
  else
    find app lib tests -type f -regextype posix-extended -regex ".*\\.($(IFS='|' && echo "$*"))"
  fi
}

case ${1:-} in
  format)
    tool=$(command -v clang-format-14 || command -v clang-format || true)
    if [[ -z $tool || $("$tool" --version) != *"version 14."* ]]; then
      from_index clang-format==14.0.6
      tool=build/lint/bin/clang-format
    fi
    mapfile -t files < <(sources c cpp hpp cu cuh inc)
    "$tool" --dry-run -Werror "${files[@]}"
    echo "${#files[@]} files are formatted"
    ;;
  python)
    [[ -e ruff.toml ]] || skip "no ruff.toml"
    tool=$(command -v ruff || true)
    if [[ -z $tool ]]; then
      from_index 'ruff>=0.6,<1'
      tool=build/lint/bin/ruff
    fi
    "$tool" check --no-cache .
    ;;
  tidy)
    build=${2:-build/host}
    command -v clang-tidy >/dev/null || skip "no clang-tidy; install it"
    [[ -e $build/compile_commands.json ]] || skip "no $build/compile_commands.json; build first"
    python3 - "$build/compile_commands.json" <<'PYTHON' | xargs -0 -n 1 -P "$(nproc)" clang-tidy --quiet -p "$build"
import json, pathlib, sys
for entry in json.load(open(sys.argv[1])):
    path = pathlib.Path(entry["file"]).resolve()
    if path.suffix != ".cpp" or path.relative_to(pathlib.Path.cwd()).parts[0] not in ("app", "lib"):
        continue
    if "__builtin_cpu_supports" not in path.read_text():  # clang 14 does not know its x86-64-v3
        print(path, end="\0")
PYTHON
    ;;
  "")
    failed=0
    for check in format python tidy; do
      code=0
      scripts/lint.sh "$check" || code=$?
      [[ $code -eq 0 || $code -eq 77 ]] || failed=1
    done
    exit $failed
    ;;
  *)
    sed -n '2,7s/^# \?//p' "$0" >&2
    exit 2
    ;;
esac
