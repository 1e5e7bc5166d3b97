#!/usr/bin/env bash
# nsa on the cores of several nodes:   sbatch --nodes=4 jobscripts/slurm/cpu_nodes.sh
#SBATCH --job-name=nsa-cpus
##SBATCH --account=PROJECT
##SBATCH --partition=PARTITION
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --exclusive
#SBATCH --time=01:00:00
#SBATCH --output=%x-%j.out
# module load gcc openmpi hdf5          # what nsa was built with
NSA=${NSA:-build/host/nsa}
INPUT=${INPUT:-inputs/scaling.toml}
LAUNCHER=${LAUNCHER:-srun}              # srun, if `srun --mpi=list` has pmix; or mpirun
read -ra OPTIONS <<<"${OPTIONS:-}"      # more of `nsa run`: OPTIONS="--set parallel.kv=8" sbatch ...

# ---- nothing below needs an edit ----
set -euo pipefail
name=$(basename "$INPUT" .toml)-$SLURM_JOB_ID
case $LAUNCHER in
  srun) launch=(srun --mpi=pmix "--cpus-per-task=$SLURM_CPUS_PER_TASK") ;; # srun does not take it from sbatch
  mpirun) launch=(mpirun --map-by "ppr:$SLURM_NTASKS_PER_NODE:node:PE=$SLURM_CPUS_PER_TASK" --bind-to core) ;;
esac
"${launch[@]}" "$NSA" run "$INPUT" --set run.backend=host --output "$name.h5" --json "$name.json" "${OPTIONS[@]}"
