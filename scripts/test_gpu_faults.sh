#!/usr/bin/env bash
# What only GPUs can show of docs/RELIABILITY.md: a rank killed, stopped, hanging or out of step in the middle of NCCL
# traffic ends the job in time, with the rank named; memory that runs out and bits that flip are found; and runs that
# nothing happens to are VALID, however often they are repeated. As many ranks as GPUs.
#   scripts/test_gpu_faults.sh [RANKS]     default: all GPUs of this host, 8 at most. Builds build/cuda-faults.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
gpus=$(nvidia-smi -L | wc -l)
ranks=${1:-$((gpus > 8 ? 8 : gpus))}
cmake --preset cuda-faults >/dev/null
cmake --build --preset cuda-faults
failed=0
ctest --preset cuda-faults || failed=1
nsa=$PWD/build/cuda-faults/nsa
deadline=15 promised=15
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1

# input KIND CONTEXT STEPS MODES MIN_TIME: kv = RANKS, so that every step exchanges.
input() {
  cat <<TOML
[task]
kind = "$1"
[model]
n_heads = 16
n_kv_groups = 2
d_k = 128
d_v = 128
[run]
backend = "cuda"
context = $2
fill = "synthetic"
steps = $3
modes = $4
min_time = $5
[parallel]
heads = 1
TOML
}
input decode 65536 200 '["total", "branches"]' 600.0 >long.toml
input decode 16384 50 '["branches", "total"]' 0.0 >decode.toml
input prefill 16384 20 '["branches", "total"]' 0.0 >prefill.toml

wrong() { echo "NOT as promised: $*" && cat err && failed=1; }

# ends CODE SECONDS PATTERN TITLE FAULT INPUT: a run with the fault ends with the code, in time, and says so.
ends() {
  local code=0 began=$SECONDS seconds
  rm -f r.h5* out err
  NSA_FAULT=$5 mpirun -n "$ranks" "$nsa" run "$6" --deadline $deadline --output r.h5 >out 2>err || code=$?
  seconds=$((SECONDS - began))
  echo "$4: exit code $code after $seconds s"
  grep -h '^nsa: \|^RESULT' err out || true
  [[ $code -eq $1 && $seconds -le $2 ]] && grep -qhE "$3" err out || wrong "$4"
}

# signalled SIGNAL RANK: sent while graphs are replayed; waits for the end of the job.
signalled() {
  local signal=$1 rank=$2 code=0 began seconds pid child
  rm -f r.h5* out err
  mpirun -n "$ranks" "$nsa" run long.toml --deadline $deadline --output r.h5 >out 2>err &
  local job=$!
  sleep 25 # MPI, NCCL, warm-up: then minutes of graph replays
  for child in $(pgrep -P $job); do
    grep -qz "^OMPI_COMM_WORLD_RANK=$rank$" "/proc/$child/environ" && pid=$child
  done
  [[ -n ${pid:-} ]] || { wrong "$signal of rank $rank: it was not running" && return; }
  began=$SECONDS
  kill -"$signal" "$pid"
  wait $job || code=$?
  seconds=$((SECONDS - began))
  echo "$signal of rank $rank of $ranks: exit code $code after $seconds s"
  grep '^nsa: ' err || true
  if [[ $signal == STOP ]]; then
    [[ $code -eq 4 && $seconds -le $((deadline + promised)) ]] || wrong "code or time"
    grep -q "rank $rank (.*) is late: no answer" err || wrong "the rank's name"
    [[ $(ls r.h5.rank*.ops.json | wc -l) -eq $ranks ]] || wrong "reports"
  else
    [[ $code -ne 0 && $seconds -le 10 ]] || wrong "code or time"
  fi
  ! kill -0 "$pid" 2>/dev/null || wrong "process $pid is left"
}

# No false alarm: the checks of measured passes hold bits (K and V) and values (outputs) of kernels that differ.
for kind in decode prefill; do
  for repeat in 1 2 3; do ends 0 300 '^RESULT: VALID' "undisturbed $kind, $repeat" "" $kind.toml; done
done
ends 3 300 '^RESULT: INVALID .*K or V' "a bit of K in decode" cache.k:rank=0:at=60:flip=3 decode.toml
ends 3 300 '^RESULT: INVALID .*K or V' "a bit of K in prefill" cache.k:rank=0:at=4:flip=3 prefill.toml
ends 5 300 'out of GPU memory' "no memory on the last rank" "device.allocate:rank=$((ranks - 1)):at=5:fail" decode.toml
if [[ $ranks -gt 1 ]]; then
  last=$((ranks - 1))
  ends 4 120 "rank $last .*did not do the same" "a skipped gather" "comm.all_gather:rank=$last:at=50:skip" decode.toml
  ends 4 120 "rank $last .*did not do the same" "a short gather" "comm.all_gather:rank=$last:at=50:shorten" decode.toml
  ends 4 120 "rank $last .* is late" "a rank that comes to nothing" "decode.step:rank=$last:at=20:hang" decode.toml
  signalled STOP $last # one rank alone that is stopped has nobody to miss it
  signalled STOP 0
fi
signalled KILL $((ranks - 1))
signalled KILL 0
[[ $failed -eq 0 ]] && echo "all as promised" || { echo "NOT as promised" && exit 1; }
