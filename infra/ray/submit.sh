#!/usr/bin/env bash
# Run a configuration as a job on a Ray cluster: submit.sh CONFIG [KEY=VALUE]...; waits, shows the job's log, and ends
# with 0 when the job ended with 0 and with 1 otherwise. The same command resumes.
#   RAY_API_SERVER_ADDRESS  http://127.0.0.1:8265   where the head takes jobs
#   RAY_AUTH_TOKEN          the cluster's secret
#   BD_STORE                the store: an absolute path that every node sees
# A CONFIG in configs/ travels with the code; any other must be a path that the head sees.
set -euo pipefail
: "${1:?usage: submit.sh CONFIG [KEY=VALUE]...}"
: "${BD_STORE:?set it to the absolute path of a store that every node sees}"
: "${RAY_AUTH_TOKEN:?set it to the secret that the head was started with}"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN
export RAY_API_SERVER_ADDRESS="${RAY_API_SERVER_ADDRESS:-http://127.0.0.1:8265}"
[[ "$BD_STORE" = /* ]] || { echo "BD_STORE=$BD_STORE: a job runs elsewhere, so give an absolute path" >&2; exit 2; }

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
config="$(realpath -- "$1")"
[[ -f "$config" ]] || { echo "configuration $1 does not exist" >&2; exit 2; }
[[ "$config" != "$root"/configs/* ]] || config="${config#"$root"/}"

# Code and configurations travel, and nothing else. What setup compiled travels with the code, though git ignores it: a
# node without it would compute other last bits, and so other bytes, under the same keys.
export RAY_RUNTIME_ENV_IGNORE_GITIGNORE=1
runtime_env="$(python3 - "$root" <<'PYTHON'
import json, os, sys

excludes = [f"/{name}" for name in os.listdir(sys.argv[1]) if name not in ("bd_core", "pipeline", "configs")]
excludes.append("__pycache__")
passed = [name for name in os.environ if name == "BD_STORE" or name.startswith("MLFLOW_")]
print(json.dumps({"working_dir": sys.argv[1], "excludes": excludes,
                  "env_vars": {name: os.environ[name] for name in passed}}))
PYTHON
)"
exec ray job submit --runtime-env-json "$runtime_env" -- python -m pipeline run "$config" "${@:2}"
