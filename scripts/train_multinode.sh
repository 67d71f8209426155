#!/bin/bash
# Starts the training processes of this node. Under Slurm it is called by train.slurm; by hand, on
# every node, with the address of the first one:
#   MASTER_ADDR=node0 NODES=2 bash scripts/train_multinode.sh configs/train/rodimus_plus_1b6.toml \
#       --parallel.replicate 2
set -eu

nodes=${NODES:-${SLURM_NNODES:-1}}
per_node=${GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-8}}
: "${MASTER_ADDR:?must name the first node}"

# exec: the signals of the scheduler reach torchrun itself
exec torchrun \
    --nnodes "$nodes" \
    --nproc-per-node "$per_node" \
    --rdzv-backend c10d \
    --rdzv-endpoint "$MASTER_ADDR:${MASTER_PORT:-29400}" \
    --rdzv-id "${SLURM_JOB_ID:-rodimus}" \
    -m rodimus.train "$@"
