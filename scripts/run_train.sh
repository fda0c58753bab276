#!/usr/bin/env bash
# Train: ./scripts/run_train.sh [--section.key value ...]; --help lists the keys.
#
#   CONFIG_FILE   the job's TOML, from here or from the repository's root
#                 (default: scripts/configs/debugmodel.toml)
#   NGPU          ranks on this node (default: one per visible GPU; without GPUs 2, on the CPU)
#   NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT   for several nodes; run this on each of them.
#                 NNODES may be a range, 1:2, for a job that goes on without a node that is gone
#   MAX_RESTARTS  how often ranks are started again after one has died (default: 0); with
#                 --checkpoint.enable they go on from the last checkpoint
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

config=${CONFIG_FILE:-scripts/configs/debugmodel.toml}
if [[ ! -f $config ]]; then
  if [[ ! -f $repo_root/$config ]]; then
    die "CONFIG_FILE=$config does not exist. Shipped with fp8dist:" \
      "$(cd "$repo_root" && echo scripts/configs/*.toml)"
  fi
  config=$repo_root/$config
fi

# With the repository's own fp8dist, also from another folder and where it is not installed.
find_python() {
  use_python train
  export PYTHONPATH=$repo_root${PYTHONPATH:+:$PYTHONPATH}
}
case " $* " in *" --help "* | *" -h "*)
  find_python
  exec "$python" -m fp8dist.train --help
  ;;
esac

# What needs no Python is refused before one is looked for, which takes seconds.
nodes=${NNODES:-1}
node=${NODE_RANK:-0}
restarts=${MAX_RESTARTS:-0}
[[ $restarts =~ ^[0-9]+$ ]] || die "MAX_RESTARTS=$restarts: a number is needed."
fewest=${nodes%:*}
most=${nodes#*:}
[[ $nodes =~ ^[1-9][0-9]*(:[1-9][0-9]*)?$ ]] && ((fewest <= most)) ||
  die "NNODES=$nodes: a positive number is needed, or the fewest and the most, as in 1:2."
[[ $node =~ ^[0-9]+$ ]] && ((node < most)) || die "NODE_RANK=$node: 0 to $((most - 1)) is needed."
# One node alone meets on a port that is free, several on one that all of them know.
if ((most == 1)); then
  host=localhost
  port=${MASTER_PORT:-0}
else
  host=${MASTER_ADDR:-}
  port=${MASTER_PORT:-29500}
  [[ -n $host ]] || die "NNODES=$nodes needs MASTER_ADDR, the host name or address of the node" \
    "with NODE_RANK=0."
fi
[[ $port =~ ^[0-9]+$ ]] && ((port < 65536)) || die "MASTER_PORT=$port: a port number is needed."

find_python
if [[ $gpus == 0 ]] && gpu_visible; then
  echo "GPUs are visible, but the torch of $python cannot use them: training on the CPU." \
    "If that torch is a CPU build in .venv, remove .venv and run this again." >&2
fi

if ((gpus > 0)); then ranks=${NGPU:-$gpus}; else ranks=${NGPU:-2}; fi
[[ $ranks =~ ^[1-9][0-9]*$ ]] || die "NGPU=$ranks: a positive number is needed."
if ((node == 0 && port > 0)); then
  "$python" -c 'import socket, sys; socket.create_server(("", int(sys.argv[1])))' "$port" \
    2>/dev/null || die "MASTER_PORT=$port is taken on this machine: choose another," \
    "or stop the job that holds it."
fi

# Share the cores out, counting what a container may use: torchrun's own default is one thread.
if [[ -z ${OMP_NUM_THREADS:-} ]]; then
  cores=$(nproc 2>/dev/null || echo 1)
  if read -r quota period 2>/dev/null </sys/fs/cgroup/cpu.max && [[ $quota != max ]]; then
    allowed=$(((quota + period - 1) / period))
    cores=$((allowed < cores ? allowed : cores))
  fi
  export OMP_NUM_THREADS=$((cores > ranks ? cores / ranks : 1))
fi

# Connection attempts that are retried are no news; errors are.
export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR}

# Ranks that are started again would find the addresses of those before them in a shared store.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}

# Only the node with NODE_RANK=0 hosts the rendezvous; the others wait for it.
exec "$python" -m torch.distributed.run \
  --nnodes "$nodes" --nproc-per-node "$ranks" --max-restarts "$restarts" \
  --rdzv-backend c10d --rdzv-endpoint "$host:$port" --rdzv-id fp8dist \
  --rdzv-conf "is_host=$((node == 0)),read_timeout=600" \
  -m fp8dist.train --job.config_file "$config" "$@"
