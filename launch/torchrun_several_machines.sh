#!/usr/bin/env bash
# The same command on each of several machines, started within ten minutes of one another:
#
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 launch/torchrun_several_machines.sh --checkpoint …
#   NNODES=2 NODE_RANK=1 MASTER_ADDR=10.0.0.1 launch/torchrun_several_machines.sh --checkpoint …
#
# MASTER_ADDR (name or IPv4 address) is machine 0, where all meet on port MASTER_PORT. --checkpoint
# must be on storage that all machines share: rank 0 writes it, everyone reads it.
set -euo pipefail
: "${NNODES:?how many machines}" "${NODE_RANK:?number of this machine, from 0 on}"
: "${MASTER_ADDR:?address of machine 0}"
here=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # threads of each process

# This machine's address and interface on the way to machine 0. Without them both would be guessed
# from the host name, which on many machines stands for 127.0.0.1, where nobody else can connect.
if [ -z "${LOCAL_ADDR:-}" ]; then
  LOCAL_ADDR=$("${PYTHON:-python}" -c '
import socket, sys
probe = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
probe.connect((sys.argv[1], 9))  # sends nothing
print(probe.getsockname()[0])' "$MASTER_ADDR")
fi
if command -v ip >/dev/null; then
  interface=$(ip -4 -o address | awk -v own="$LOCAL_ADDR/" 'index($4, own) == 1 {print $2; exit}')
  export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-$interface}"
  export NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-$interface}"
fi

exec "${PYTHON:-python}" -m torch.distributed.run \
  --nnodes "$NNODES" \
  --nproc-per-node "${PROCESSES:-auto}" \
  --max-restarts "${MAX_RESTARTS:-3}" \
  --rdzv-id "${JOB_ID:-train_ddp}" \
  --rdzv-backend c10d \
  --rdzv-endpoint "$MASTER_ADDR:${MASTER_PORT:-29400}" \
  --rdzv-conf "is_host=$((NODE_RANK == 0))" \
  --local-addr "$LOCAL_ADDR" \
  -m course_utils.train_ddp "$@"
