#!/bin/bash
# A run of glsd on a Slurm cluster that goes on by itself: when its time is nearly over, or when its nodes are wanted by somebody
# else, it writes a checkpoint, ends, and goes back into the queue.
#
#   sbatch --nodes 2 --gpus-per-node 8 examples/slurm.sh pretrain /data/imagenet --out /scratch/runs/first --batch-size 1024
#
# What stands behind the script's name is a `glsd` command; --nproc, --nnodes and --rdzv are added here. On CPUs, where Slurm knows
# of no GPUs, set NPROC to the number of processes on each node.
#
# A whole table, from a bare clone on a disk that all nodes see, is an array of such jobs:
#
#   sbatch --array 1-9 --gpus-per-node 8 examples/slurm.sh reproduce table_2 --scale paper -p data=/data/imagenet
#
# Each task runs the notebook, takes a run of the grid that nobody else has, on all GPUs of its node, then the next. A task that is
# killed goes back into the queue and on from a checkpoint. The task that ends last writes the table; so does the same command
# without sbatch, at any time after that. The first task installs glsd if there is none (that needs a network: if nodes have none, do
# `make install` before).
#SBATCH --job-name=glsd
#SBATCH --ntasks-per-node=1
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
set -u
nproc=${NPROC:-${SLURM_GPUS_ON_NODE:-1}}
if ! command -v glsd >/dev/null; then
    [ -x .venv/bin/glsd ] || { mkdir -p runs && flock runs/install.lock make install; } || exit 1
    export PATH="$PWD/.venv/bin:$PATH"
fi
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
meet="$first:$((20000 + SLURM_JOB_ID % 20000))"        # two jobs on one node must not meet each other

if [ "$1" = reproduce ]; then
    set -- "$@" -p jobs=1
    [ "$nproc" -eq 1 ] || set -- "$@" -p nproc="$nproc"
else
    set -- "$@" --nproc "$nproc" --nnodes "$SLURM_NNODES" --rdzv "$meet"
fi

srun --kill-on-bad-exit=1 glsd "$@" &
wait $!
code=$?
# 143: it was asked to end and has written a checkpoint. Every other code is for a person to look at
if [ "$code" -eq 143 ]; then
    echo "glsd: asked to end; back into the queue"
    exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
