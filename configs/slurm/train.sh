#!/bin/bash
# Trains on two machines with four GPUs each; edit the lines below and submit it from the checkout:
#   sbatch configs/slurm/train.sh --data.root /shared/photos
# A minute and a half before its time is up, or when it is preempted, the job saves, is put back into the queue, and goes on.
#SBATCH --job-name=train
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --signal=SIGUSR1@90
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
set -eu
root=$PWD
# the cache of decoded images lies in the current folder: each machine's own disk
export ROOT=$root PYTHONPATH=$root
srun bash -c 'mkdir -p "${TMPDIR:-/tmp}/project-$USER" && cd "${TMPDIR:-/tmp}/project-$USER" &&
    exec "$ROOT/.venv/bin/python" -m project.cli fit --config "$ROOT/configs/multinode.yaml" --runs "$ROOT/runs" "$@"' bash "$@"
