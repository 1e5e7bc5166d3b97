#!/usr/bin/env bash
# The M4 record of this machine (docs/M4.md, "Again, on another machine"): runs the three inputs, with a GPU also torch's
# SDPA on the same shapes, and writes docs/results/NAME/*.h5 and the verdict, docs/adr/NAME.md. An input with NOISY points
# runs again while there is time for it, and the run with fewest of them counts. What is there is replaced only when all
# has worked. Two quiet cores take two and a half minutes.
#
# usage: scripts/m4_record.sh NAME [NSA]
#   NAME    host: the host backend; else a GPU, such as h200
#   NSA     the program (default build/host/nsa, or build/cuda/nsa)
# In the environment: M4_SECONDS (240), after which no input runs again; M4_MAX_LOAD (0.5), the load of a core above
# which it refuses to measure.
set -euo pipefail
name=${1:?usage: scripts/m4_record.sh NAME [NSA]}
backend=cuda
[[ $name == host ]] && backend=host
nsa=$(realpath "${2:-$(dirname "$0")/../build/$backend/nsa}")
cd "$(dirname "$0")/.."
[[ -x $nsa ]] || { echo "m4_record.sh: $nsa is no program; build it (README.md), or name another one" >&2; exit 2; }
read -r load _ </proc/loadavg
if awk "BEGIN { exit !($load > ${M4_MAX_LOAD:-0.5} * $(nproc)) }"; then
  echo "m4_record.sh: the load is $load on $(nproc) cores, which disturb the times; wait, or raise M4_MAX_LOAD" >&2
  exit 1
fi
new=$(mktemp -d)
trap 'rm -rf "$new"' EXIT

# run INPUT: keeps the run with fewest NOISY points of up to three.
run() {
  local input=$1 fewest=-1 noisy begin
  for attempt in 1 2 3; do
    begin=$SECONDS
    "$nsa" run "inputs/gate/$input.toml" --set "run.backend=$backend" --output "$new/$input.$attempt.h5" >"$new/$input.txt"
    noisy=$(sed -n 's/^NOISY: \([0-9]*\) of .*/\1/p' "$new/$input.txt")
    echo "$SECONDS s: $input, attempt $attempt: $(tail -n 1 "$new/$input.txt"), ${noisy:=0} NOISY points"
    if ((fewest < 0 || noisy < fewest)); then
      mv "$new/$input.$attempt.h5" "$new/$input.h5"
      fewest=$noisy
    fi
    ((fewest == 0 || 2 * SECONDS - begin > ${M4_SECONDS:-240})) && break
  done
  return 0
}

files=(m4_decode.h5 m4_kernels.h5 flash_guard.h5)
for file in "${files[@]}"; do run "${file%.h5}"; done
if [[ $backend == cuda ]]; then
  python3 scripts/bench/bench_gpu.py --selection --output "$new/peers.h5"
  files+=(peers.h5)
fi
"$nsa" gate "${files[@]/#/$new/}" >/dev/null  # ends here where it cannot judge them
mkdir -p "docs/results/$name"
for file in "${files[@]}"; do mv "$new/$file" "docs/results/$name/$file"; done
"$nsa" gate "${files[@]/#/docs/results/$name/}" --adr "docs/adr/$name.md"
echo "$SECONDS s: docs/adr/$name.md is written; compare docs/M4.md with it, then commit both"
