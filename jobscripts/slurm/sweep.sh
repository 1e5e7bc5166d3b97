#!/usr/bin/env bash
# One run of a sweep list, as a task of a job array. scripts/sweep.py submits it, an array for each rank count:
#   scripts/sweep.py inputs/scaling/scaling.sweep --submit jobscripts/slurm/sweep.sh --ranks-per-node 8
#   scripts/sweep.py inputs/scaling/scaling.sweep --status           when they have ended, or meanwhile
# Submitting again runs what is missing; --retry-failed what has failed too. It sets --array, --nodes and --ntasks-per-node over these:
#SBATCH --job-name=nsa-sweep
##SBATCH --account=PROJECT
##SBATCH --partition=PARTITION
##SBATCH --gpus-per-node=8
##SBATCH --gpu-bind=none
#SBATCH --cpus-per-task=8
#SBATCH --time=00:30:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.out
# module load gcc openmpi hdf5          # what nsa was built with
NSA=${NSA:-build/host/nsa}
LAUNCHER=${LAUNCHER:-srun}              # srun, if `srun --mpi=list` has pmix; or mpirun

# ---- nothing below needs an edit ----
set -euo pipefail
# mpirun ends the job 20 s after a node was lost (Open MPI's default: 8 minutes).
for keep in time=5 intvl=5 probes=3; do export {OMPI,PRTE}_MCA_oob_tcp_keepalive_$keep; done # Open MPI 4, 5
export SLURM_PMIX_FENCE=tree            # of srun: the default lets a rank send before another one's MPI_Init can receive
case $LAUNCHER in
  srun) launch="srun --mpi=pmix --kill-on-bad-exit=1 --gpu-bind=none --cpus-per-task=$SLURM_CPUS_PER_TASK -n {ranks}" ;;
  mpirun) launch="mpirun -n {ranks} --map-by ppr:$SLURM_NTASKS_PER_NODE:node:PE=$SLURM_CPUS_PER_TASK --bind-to core" ;;
esac
scripts/sweep.py "${1:?submit it with scripts/sweep.py LIST --submit}" --results "$2" --case "$SLURM_ARRAY_TASK_ID" \
  --nsa "$NSA" --launch "$launch" &
sweep=$!
# 120 s before the time limit nsa is told to finish its point and end; the next submission goes on from there.
signals=0
trap 'signals=$((signals + 1)); kill -USR1 "$sweep"' USR1 TERM
seen=-1 code=0
while [[ $seen -ne $signals ]]; do # a trap ends a wait
  seen=$signals code=0
  wait "$sweep" || code=$?
done
exit "$code"
