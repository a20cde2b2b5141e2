#!/usr/bin/env bash
# `serve.sh ROLE MODEL ...`: what scripts/serve_teacher.sh, serve_rollout.sh and serve_logprob.sh have in common.
set -euo pipefail
ROOT="$(cd "$(dirname "$0")/.." && pwd)" # not the working directory: MODEL is relative to that

bash "$ROOT/scripts/setup.sh" >&2
export PATH="$(cd "$ROOT" && cd "${OPD_VENV:-.venv}" && pwd)/bin:$PATH"
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
exec python -m opd.servers.launch "$@"
