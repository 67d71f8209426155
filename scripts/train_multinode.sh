#!/bin/bash
# Starts the training processes of this node with torchrun, where there is no scheduler; on every
# node, with the address of the first one:
#   MASTER_ADDR=node0 NODES=2 bash scripts/train_multinode.sh configs/train/rodimus_plus_1b6.toml \
#       --parallel.replicate 2
# MAX_RESTARTS=3 lets torchrun start all ranks again when one has failed, three times at most.
set -eu

: "${MASTER_ADDR:?must name the first node}"
# torchrun passes SIGTERM on and kills its workers 30 s later; newer ones wait as long as is said here
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-240}
# else ranks that are started again find the addresses of those that have ended
# (https://github.com/pytorch/pytorch/issues/135712)
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

# exec: signals reach torchrun itself
exec torchrun \
    --nnodes "${NODES:-1}" \
    --nproc-per-node "${GPUS_PER_NODE:-8}" \
    --max-restarts "${MAX_RESTARTS:-0}" \
    --rdzv-backend c10d \
    --rdzv-endpoint "$MASTER_ADDR:${MASTER_PORT:-29400}" \
    --rdzv-id rodimus \
    -m rodimus.train "$@"
