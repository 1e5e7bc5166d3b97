#!/usr/bin/env bash
# nsa on the GPUs of one node, one rank each:   sbatch jobscripts/slurm/gpu_one_node.sh
# After the loss of a node Slurm puts the job back into the queue: it goes on with the points that its file holds.
#SBATCH --job-name=nsa-gpu
##SBATCH --account=PROJECT
##SBATCH --partition=PARTITION
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --gpu-bind=none
#SBATCH --cpus-per-task=8
#SBATCH --time=01:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
# Every rank sees all GPUs of its node and takes the one of its local rank. Binding them through Slurm (--gpu-bind, or
# --gpus-per-task, which implies it) would hide a rank's GPU from the others, and with it the direct path between them.
# module load gcc cuda nccl openmpi hdf5   # what nsa was built with
NSA=${NSA:-build/cuda/nsa}
INPUT=${INPUT:-inputs/scaling/scaling.toml}
BACKEND=${BACKEND:-cuda}                # "cuda" and not "auto": without its GPUs the job is to fail
LAUNCHER=${LAUNCHER:-srun}              # srun, if `srun --mpi=list` has pmix; or mpirun
read -ra OPTIONS <<<"${OPTIONS:-}"      # more of `nsa run`: OPTIONS="--set run.batch=4" sbatch ...

# ---- nothing below needs an edit ----
set -euo pipefail
name=$(basename "$INPUT" .toml)-$SLURM_JOB_ID
case $LAUNCHER in
  srun) launch=(srun --mpi=pmix --kill-on-bad-exit=1 --gpu-bind=none "--cpus-per-task=$SLURM_CPUS_PER_TASK") ;;
  mpirun) launch=(mpirun --map-by "ppr:$SLURM_NTASKS_PER_NODE:node:PE=$SLURM_CPUS_PER_TASK" --bind-to core) ;;
esac
"${launch[@]}" "$NSA" run "$INPUT" --set "run.backend=$BACKEND" --output "$name.h5" --json "$name.json" --resume \
  "${OPTIONS[@]}"
