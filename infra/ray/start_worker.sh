#!/usr/bin/env bash
# One more node of a Ray cluster, in the foreground: start_worker.sh HEAD_HOST:6380 [options of `ray start`].
# It needs the same environment as the head: the same packages, RAY_AUTH_TOKEN, and the store at the same path.
set -euo pipefail
: "${RAY_AUTH_TOKEN:?set it to the secret that the head was started with}"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN
address="${1:?usage: start_worker.sh HEAD_HOST:PORT [options of ray start]}"
exec ray start --address="$address" --block --disable-usage-stats --object-store-memory=268435456 "${@:2}"
