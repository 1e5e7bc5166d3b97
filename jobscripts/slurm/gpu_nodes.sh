#!/usr/bin/env bash
# nsa on the GPUs of several nodes, one rank each:   sbatch --nodes=4 jobscripts/slurm/gpu_nodes.sh
# After the loss of a node Slurm puts the job back into the queue: it goes on with the points that its file holds.
#SBATCH --job-name=nsa-gpus
##SBATCH --account=PROJECT
##SBATCH --partition=PARTITION
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --gpu-bind=none
#SBATCH --cpus-per-task=8
#SBATCH --exclusive
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
# export NCCL_SOCKET_IFNAME=ib0         # where NCCL picks the wrong network; NCCL_DEBUG=INFO shows which one it took
LAUNCHER=${LAUNCHER:-srun}              # srun, if `srun --mpi=list` has pmix; or mpirun
read -ra OPTIONS <<<"${OPTIONS:-}"      # more of `nsa run`: OPTIONS="--set run.batch=4" sbatch ...

# ---- nothing below needs an edit ----
set -euo pipefail
# mpirun ends the job 20 s after a node was lost (Open MPI's default: 8 minutes).
for keep in time=5 intvl=5 probes=3; do export {OMPI,PRTE}_MCA_oob_tcp_keepalive_$keep; done # Open MPI 4, 5
export SLURM_PMIX_FENCE=tree            # of srun: the default lets a rank send before another one's MPI_Init can receive
name=$(basename "$INPUT" .toml)-$SLURM_JOB_ID
case $LAUNCHER in
  srun) launch=(srun --mpi=pmix --kill-on-bad-exit=1 --gpu-bind=none "--cpus-per-task=$SLURM_CPUS_PER_TASK") ;;
  mpirun) launch=(mpirun --map-by "ppr:$SLURM_NTASKS_PER_NODE:node:PE=$SLURM_CPUS_PER_TASK" --bind-to core) ;;
esac
code=0
"${launch[@]}" "$NSA" run "$INPUT" --set "run.backend=$BACKEND" --output "$name.h5" --json "$name.json" --resume \
  "${OPTIONS[@]}" || code=$?
if [[ $code -eq 4 || $code -eq 205 ]]; then
  # nsa (4) or mpirun (205) misses a node. Slurm, once it does too, ends this script and puts the job into the queue.
  sleep "$(scontrol show config | awk '/^SlurmdTimeout/ { print $3 + 60 }')"
fi
exit "$code"
