#!/usr/bin/env bash
# A run that outlives its time limit: it is told in time, finishes its point, goes back into the queue and resumes.
#   sbatch jobscripts/slurm/requeue.sh
# The same happens when it is preempted or its node fails: what was sealed stays. One file in the end, as if undisturbed.
#SBATCH --job-name=nsa-long
##SBATCH --account=PROJECT
##SBATCH --partition=PARTITION
##SBATCH --gpus-per-node=8
##SBATCH --gpu-bind=none
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
# B: the signal comes to this script, which passes it on; 300 s must suffice for a point of the sweep.
# module load gcc openmpi hdf5          # what nsa was built with
NSA=${NSA:-build/host/nsa}
INPUT=${INPUT:-inputs/scaling/scaling.toml}
BACKEND=${BACKEND:-host}                # host or cuda
LAUNCHER=${LAUNCHER:-srun}              # srun, if `srun --mpi=list` has pmix; or mpirun
MAX_RESTARTS=${MAX_RESTARTS:-20}        # a point longer than the time limit would be started over and over
read -ra OPTIONS <<<"${OPTIONS:-}"      # more of `nsa run`: OPTIONS="--set run.batch=4" sbatch ...

# ---- nothing below needs an edit ----
set -euo pipefail
# mpirun ends the job 20 s after a node was lost (Open MPI's default: 8 minutes).
for keep in time=5 intvl=5 probes=3; do export {OMPI,PRTE}_MCA_oob_tcp_keepalive_$keep; done # Open MPI 4, 5
export SLURM_PMIX_FENCE=tree            # of srun: the default lets a rank send before another one's MPI_Init can receive
name=$(basename "$INPUT" .toml)-$SLURM_JOB_ID # the same job number after a requeue
case $LAUNCHER in
  srun) launch=(srun --mpi=pmix --kill-on-bad-exit=1 --gpu-bind=none "--cpus-per-task=$SLURM_CPUS_PER_TASK") ;;
  mpirun) launch=(mpirun --map-by "ppr:$SLURM_NTASKS_PER_NODE:node:PE=$SLURM_CPUS_PER_TASK" --bind-to core) ;;
esac

"${launch[@]}" "$NSA" run "$INPUT" --set "run.backend=$BACKEND" --output "$name.h5" --json "$name.json" --resume \
  "${OPTIONS[@]}" &
run=$!
signals=0 cancelled=0
trap 'signals=$((signals + 1)); kill -USR1 "$run"' USR1 # srun and mpirun pass it on to every rank
trap '[[ $signals -gt 0 ]] || cancelled=1; signals=$((signals + 1)); kill -USR1 "$run"' TERM
seen=-1 code=0
while [[ $seen -ne $signals ]]; do # a trap ends a wait
  seen=$signals code=0
  wait "$run" || code=$?
done
trap - USR1 TERM

if [[ $code -eq 4 || $code -eq 205 ]]; then
  # nsa (4) or mpirun (205) misses a node. Slurm, once it does too, ends this script and puts the job into the queue.
  sleep "$(scontrol show config | awk '/^SlurmdTimeout/ { print $3 + 60 }')"
fi
if [[ $code -eq 75 && $cancelled -eq 0 ]]; then # interrupted and resumable; after scancel it stays so
  if [[ ${SLURM_RESTART_COUNT:-0} -lt $MAX_RESTARTS ]]; then
    echo "requeue: job $SLURM_JOB_ID goes back into the queue, restart $((${SLURM_RESTART_COUNT:-0} + 1))"
    scontrol requeue "$SLURM_JOB_ID"
    sleep 60 # Slurm ends this script
  fi
  echo "requeue: not again after $MAX_RESTARTS restarts; nsa run --resume goes on with $name.h5" >&2
fi
exit "$code"
