#!/usr/bin/env bash
# The head of a Ray cluster, in the foreground: end it with Ctrl-C or SIGTERM. Never `ray stop`, which ends every Ray of
# the machine. Every option of `ray start` may follow, e.g. --num-cpus=16.
#   RAY_AUTH_TOKEN   the cluster's secret, the same on every node and for whoever submits
#   BD_RAY_PORT      6380   nodes and drivers connect here
#   BD_RAY_API_PORT  8265   jobs are submitted here (loopback; tunnel to it)
set -euo pipefail
: "${RAY_AUTH_TOKEN:?set it to a secret, e.g. export RAY_AUTH_TOKEN=\$(openssl rand -hex 32)}"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN
exec ray start --head --block --disable-usage-stats \
  --port="${BD_RAY_PORT:-6380}" --dashboard-host=127.0.0.1 --dashboard-port="${BD_RAY_API_PORT:-8265}" \
  --object-store-memory=268435456 "$@"
