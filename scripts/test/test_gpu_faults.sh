#!/usr/bin/env bash
# The tests of docs/RELIABILITY.md that need GPUs: a rank killed, stopped, hanging or out of step during NCCL traffic
# ends the job in time, and the error names the rank; exhausted memory and flipped bits are detected; undisturbed runs
# are VALID on every repetition. As many ranks as GPUs; about 3 minutes on two.
#   scripts/test/test_gpu_faults.sh [RANKS]     default: all GPUs of this host, at most 8. Builds build/cuda-faults, unless
#   NSA_FAULTS_BINARY names a program with fault injection.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
gpus=$(nvidia-smi -L | wc -l)
ranks=${1:-$((gpus > 8 ? 8 : gpus))}
failed=0
if [[ -n ${NSA_FAULTS_BINARY:-} ]]; then
  nsa=$(realpath "$NSA_FAULTS_BINARY")
else
  cmake --preset cuda-faults >/dev/null
  cmake --build --preset cuda-faults
  ctest --preset cuda-faults || failed=1
  nsa=$PWD/build/cuda-faults/nsa
fi
# Seconds: the deadline of an operation, longer than the start of CUDA and NCCL; the longest delay that the watchdog
# adds; and the time before the fault and after the end: MPI, CUDA and NCCL, the checked pass, the launcher.
deadline=10 watchdog_delay=15 overhead=40
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
# Marks the environment of every process of this script's jobs.
export NSA_FAULTS_JOB=$folder

# input KIND CONTEXTS STEPS MIN_TIME: kv = RANKS, so that every step exchanges; one point a context.
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
modes = ["total", "branches"]
min_time = $4
[parallel]
heads = 1
TOML
}
input decode '[65536, 16384, 4096]' 50 0.2 >repeated_decode.toml
input prefill '[16384, 8192, 4096]' 10 0.2 >repeated_prefill.toml
input decode 16384 50 0.0 >decode.toml
input prefill 16384 10 0.0 >prefill.toml
input decode 65536 200 600.0 >long.toml

fail() {
  echo "NOT as expected: $*"
  cat out err
  failed=1
}

start() { # start FAULT INPUT: starts a job in the background; its process is $job
  rm -f r.h5* out err
  NSA_FAULT=$1 mpirun -n "$ranks" "$nsa" run "$2" --deadline $deadline --output r.h5 </dev/null >out 2>err &
  job=$!
  began=$SECONDS
}

finish() { # waits for the job; sets $code, and $seconds since $began
  code=0
  wait $job || code=$?
  seconds=$((SECONDS - began))
}

# check_run CODE SECONDS PATTERN TITLE FAULT INPUT: a run with the fault ends with the code, in time, and prints the
# pattern.
check_run() {
  start "$5" "$6"
  finish
  echo "$4: exit code $code after $seconds s"
  grep -h '^nsa: error\|^RESULT' err out | cut -c1-250 || true
  [[ $code -eq $1 && $seconds -le $2 ]] && grep -qhE "$3" err out || fail "$4"
}

# Running processes of the job: of rank $1, or of any rank.
running() {
  local environment
  for environment in /proc/[0-9]*/environ; do
    grep -qsz "^NSA_FAULTS_JOB=$folder$" "$environment" || continue
    grep -qsz "^OMPI_COMM_WORLD_RANK=${1:-[0-9]*}$" "$environment" || continue
    environment=${environment#/proc/}
    echo "${environment%/environ}"
  done
}

is_stopped() { # is_stopped RANK
  local pid
  pid=$(running "$1" | head -n 1)
  [[ -n $pid ]] && grep -qs '^State:.T' "/proc/$pid/status"
}

# check_stopped RANK: the rank stops itself between two graph replays while its peers wait for it in NCCL. Time is
# counted from that point.
check_stopped() {
  start "decode.step:rank=$1:at=60:stop" long.toml
  while ! is_stopped "$1" && kill -0 $job 2>/dev/null && [[ $((SECONDS - began)) -le $overhead ]]; do sleep 0.2; done
  is_stopped "$1" || echo "rank $1 was not seen stopped"
  began=$SECONDS
  finish
  echo "STOP of rank $1 of $ranks: exit code $code after $seconds s"
  grep '^nsa: error' err | cut -c1-250 || true
  [[ $code -eq 4 && $seconds -ge $((deadline - 2)) && $seconds -le $((deadline + watchdog_delay)) ]] ||
    fail "code or time"
  grep -q "rank $1 (.*) is late: no answer" err || fail "the rank's name"
  [[ $(find . -name 'r.h5.rank*.ops.json' | wc -l) -eq $ranks ]] || fail "reports"
  [[ -z $(running) ]] || fail "processes $(running | tr '\n' ' ')are left"
}

# check_killed RANK: killed during graph replays; the launcher ends the job immediately.
check_killed() {
  start "decode.step:rank=$1:at=60:kill" long.toml
  while [[ -z $(running "$1") ]] && kill -0 $job 2>/dev/null; do sleep 0.2; done
  while [[ -n $(running "$1") && $((SECONDS - began)) -le $overhead ]]; do sleep 0.2; done
  began=$SECONDS
  finish
  echo "KILL of rank $1 of $ranks: exit code $code, $seconds s later"
  [[ $code -ne 0 && $seconds -le 10 ]] || fail "code or time"
  [[ -z $(running) ]] || fail "processes $(running | tr '\n' ' ')are left"
}

last=$((ranks - 1))
# No false alarms: the checks of measured passes compare bits (K and V) and values (outputs) of different kernels.
check_run 0 300 '^RESULT: VALID' "undisturbed decode" "" repeated_decode.toml
check_run 0 300 '^RESULT: VALID' "undisturbed prefill" "" repeated_prefill.toml
if [[ $ranks -gt 1 ]]; then
  check_run 0 300 '^RESULT: VALID' "a refused launch on one rank" "attend.shard:rank=$last:fail" decode.toml
  check_stopped $last # needs a peer that detects it
  check_stopped 0
  check_run 4 $((overhead + deadline + watchdog_delay)) "rank $last .* is late" "a hanging rank" \
    "decode.step:rank=$last:at=20:hang" decode.toml
  check_run 4 $overhead "rank $last .*does not match the other ranks" "a skipped gather" \
    "comm.all_gather:rank=$last:at=50:skip" decode.toml
  check_run 4 $overhead "rank $last .*does not match the other ranks" "a short gather" \
    "comm.all_gather:rank=$last:at=50:shorten" decode.toml
fi
check_killed $last
check_killed 0
check_run 3 300 '^RESULT: INVALID .*K or V' "a bit of K in decode" cache.k:rank=0:at=60:flip=3 decode.toml
check_run 3 300 '^RESULT: INVALID .*K or V' "a bit of K in prefill" cache.k:rank=0:at=4:flip=3 prefill.toml
check_run 5 300 'out of GPU memory' "no memory on the last rank" "device.allocate:rank=$last:at=5:fail" decode.toml
if [[ $failed -ne 0 ]]; then
  echo "NOT as expected"
  exit 1
fi
echo "all as expected after $SECONDS s"
