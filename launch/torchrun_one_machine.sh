#!/usr/bin/env bash
# All processes on this machine: one for each GPU, or for each processor where there is no GPU.
#
#   PROCESSES=2 launch/torchrun_one_machine.sh --epochs 5 --checkpoint run.pt
#
# What is added to the command goes to the program. A process that fails makes torchrun start all
# of them again, up to MAX_RESTARTS times; with --checkpoint they go on where they were.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # threads of each process

# `python -m torch.distributed.run` is torchrun, of the Python that will run the program
exec "${PYTHON:-python}" -m torch.distributed.run \
  --standalone \
  --nproc-per-node "${PROCESSES:-auto}" \
  --max-restarts "${MAX_RESTARTS:-3}" \
  -m course_utils.train_ddp "$@"
