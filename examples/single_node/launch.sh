#!/usr/bin/env bash
# Train on the GPUs of this machine: examples/single_node/launch.sh [--section.key value ...]
# To resume, run the same command again. To stop: Ctrl-C, or `touch runs/llama2-7b/STOP`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

# One process per GPU. "gpu" counts them; GPUS_PER_NODE=4 takes the first four.
GPUS_PER_NODE="${GPUS_PER_NODE:-gpu}"
# Logs, metrics and the stop file; checkpoints.
LOG_DIR="${LOG_DIR:-runs/llama2-7b}"
SAVE_DIR="${SAVE_DIR:-$LOG_DIR/checkpoints}"

# What `make venv` set up, where it has run; else whatever environment is active.
[ -d .venv/bin ] && PATH="$PWD/.venv/bin:$PATH"

# The GPU starts work in the order in which it was asked for, so that a collective asked for before a matrix product runs
# behind it rather than after it. (Hopper and newer order their queues themselves; there it does no harm.)
export CUDA_DEVICE_MAX_CONNECTIONS=1

arguments=(
  --standalone                       # a rendezvous of its own on a free port: several runs on one machine do not meet
  --nproc-per-node "$GPUS_PER_NODE"
  --shutdown-timeout 300             # seconds between SIGTERM (or Ctrl-C) and SIGKILL: time to finish a step and save;
                                     # torchrun's default of 30 is too short for 80 GB of state
  -m megatron train
  --config examples/single_node/config.yaml
  --log.dir "$LOG_DIR"
  --checkpoint.save "$SAVE_DIR"
)
exec torchrun "${arguments[@]}" "$@"
