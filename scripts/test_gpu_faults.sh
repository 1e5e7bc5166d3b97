#!/usr/bin/env bash
# A rank killed, and one stopped, in the middle of NCCL traffic: the job has to end by itself, in time, with the rank
# named. Needs as many GPUs as ranks; with one GPU a single rank is stopped and killed.
#   scripts/test_gpu_faults.sh [NSA [RANKS]]       default: build/cuda/nsa, all GPUs of this host
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
nsa=$(realpath "${1:-build/cuda/nsa}")
ranks=${2:-$(nvidia-smi -L | wc -l)}
deadline=15 promised=15
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
cat >in.toml <<TOML
[task]
kind = "decode"
[model]
n_heads = 16
n_kv_groups = 2
d_k = 128
d_v = 128
[run]
backend = "cuda"
context = 65536
fill = "synthetic"
steps = 200
modes = ["total", "branches"]
min_time = 600.0
[parallel]
heads = 1
TOML

failed=0
# fault SIGNAL RANK: sends it to a rank once the table's point is being measured, waits for the end of the job.
fault() {
  local signal=$1 rank=$2 code=0 began pids
  rm -f r.h5* out err
  mpirun -n "$ranks" "$nsa" run in.toml --deadline $deadline --output r.h5 >out 2>err &
  local job=$!
  sleep 25 # MPI, NCCL, warm-up: then minutes of graph replays
  mapfile -t pids < <(pgrep -P $job | sort -n)
  if ! kill -0 $job 2>/dev/null || [[ ${#pids[@]} -ne $ranks ]]; then
    echo "$signal of rank $rank: the job was not running" && cat err && failed=1 && return
  fi
  began=$SECONDS
  kill -"$signal" "${pids[$rank]}"
  wait $job || code=$?
  local seconds=$((SECONDS - began))
  echo "$signal of rank $rank of $ranks: exit code $code after $seconds s"
  grep '^nsa: ' err || true
  if [[ $signal == STOP ]]; then
    [[ $code -eq 4 && $seconds -le $((deadline + promised)) ]] || failed=1
    grep -q "rank $rank (.*) is late: no answer" err || failed=1
    [[ $(ls r.h5.rank*.ops.json | wc -l) -eq $ranks ]] || failed=1
  else
    [[ $code -ne 0 && $seconds -le 10 ]] || failed=1
  fi
  [[ -z $(pgrep -x nsa || true) ]] || { echo "processes are left" && failed=1; }
}

fault KILL $((ranks - 1))
fault KILL 0
if [[ $ranks -gt 1 ]]; then # one rank alone that is stopped has nobody to miss it
  fault STOP $((ranks - 1))
  fault STOP 0
fi
[[ $failed -eq 0 ]] && echo "all as promised" || { echo "NOT as promised" && exit 1; }
