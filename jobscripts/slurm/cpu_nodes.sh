#!/usr/bin/env bash
# nsa on the cores of several nodes:   sbatch --nodes=4 jobscripts/slurm/cpu_nodes.sh
# After the loss of a node Slurm puts the job back into the queue: it goes on with the points that its file holds.
#SBATCH --job-name=nsa-cpus
##SBATCH --account=PROJECT
##SBATCH --partition=PARTITION
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --exclusive
#SBATCH --time=01:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
# module load gcc openmpi hdf5          # what nsa was built with
NSA=${NSA:-build/host/nsa}
INPUT=${INPUT:-inputs/scaling/scaling.toml}
LAUNCHER=${LAUNCHER:-srun}              # srun, if `srun --mpi=list` has pmix; or mpirun
read -ra OPTIONS <<<"${OPTIONS:-}"      # more of `nsa run`: OPTIONS="--set parallel.kv=8" sbatch ...

# ---- nothing below needs an edit ----
set -euo pipefail
# mpirun ends the job 20 s after a node was lost (Open MPI's default: 8 minutes).
for keep in time=5 intvl=5 probes=3; do export {OMPI,PRTE}_MCA_oob_tcp_keepalive_$keep; done # Open MPI 4, 5
export SLURM_PMIX_FENCE=tree            # of srun: the default lets a rank send before another one's MPI_Init can receive
name=$(basename "$INPUT" .toml)-$SLURM_JOB_ID
case $LAUNCHER in # srun does not take --cpus-per-task from sbatch
  srun) launch=(srun --mpi=pmix --kill-on-bad-exit=1 "--cpus-per-task=$SLURM_CPUS_PER_TASK") ;;
  mpirun) launch=(mpirun --map-by "ppr:$SLURM_NTASKS_PER_NODE:node:PE=$SLURM_CPUS_PER_TASK" --bind-to core) ;;
esac
code=0
"${launch[@]}" "$NSA" run "$INPUT" --set run.backend=host --output "$name.h5" --json "$name.json" --resume \
  "${OPTIONS[@]}" || code=$?
if [[ $code -eq 4 || $code -eq 205 ]]; then
  # nsa (4) or mpirun (205) misses a node. Slurm, once it does too, ends this script and puts the job into the queue.
  sleep "$(scontrol show config | awk '/^SlurmdTimeout/ { print $3 + 60 }')"
fi
exit "$code"
