#!/bin/bash
# Starts the training processes of this node with torchrun, without a scheduler. Run it on every
# node, with the address of the first one:
#   MASTER_ADDR=node0 NODES=2 bash scripts/train_multinode.sh configs/train/rodimus_plus_1b6.toml \
#       --parallel.replicate 2
# MAX_RESTARTS=3 lets torchrun restart all ranks when one fails, at most three times.
set -eu

: "${MASTER_ADDR:?must name the first node}"
# torchrun forwards SIGTERM and kills its workers 30 s later; newer versions wait this many seconds
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-240}
# otherwise restarted ranks find the addresses of the ranks that have ended
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
