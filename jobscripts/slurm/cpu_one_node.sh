#!/usr/bin/env bash
# nsa on the cores of one node:   sbatch jobscripts/slurm/cpu_one_node.sh
# After the loss of a node Slurm puts the job back into the queue: it goes on with the points that its file holds.
#SBATCH --job-name=nsa-cpu
##SBATCH --account=PROJECT
##SBATCH --partition=PARTITION
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=01:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
# module load gcc openmpi hdf5          # what nsa was built with
NSA=${NSA:-build/host/nsa}
INPUT=${INPUT:-inputs/scaling/scaling.toml}
LAUNCHER=${LAUNCHER:-srun}              # srun, if `srun --mpi=list` has pmix; or mpirun
read -ra OPTIONS <<<"${OPTIONS:-}"      # more of `nsa run`: OPTIONS="--set run.batch=4" sbatch ...

# ---- nothing below needs an edit ----
set -euo pipefail
name=$(basename "$INPUT" .toml)-$SLURM_JOB_ID
case $LAUNCHER in # srun does not take --cpus-per-task from sbatch
  srun) launch=(srun --mpi=pmix --kill-on-bad-exit=1 "--cpus-per-task=$SLURM_CPUS_PER_TASK") ;;
  mpirun) launch=(mpirun --map-by "ppr:$SLURM_NTASKS_PER_NODE:node:PE=$SLURM_CPUS_PER_TASK" --bind-to core) ;;
esac
"${launch[@]}" "$NSA" run "$INPUT" --set run.backend=host --output "$name.h5" --json "$name.json" --resume \
  "${OPTIONS[@]}"
