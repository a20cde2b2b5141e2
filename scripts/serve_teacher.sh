#!/usr/bin/env bash
# Serves a teacher to trainers on this machine, and prints the YAML entry that names it to them. `--help` lists the flags.
set -euo pipefail
ROOT="$(cd "$(dirname "$0")/.." && pwd)" # not the working directory: MODEL is relative to that

bash "$ROOT/scripts/setup.sh" >&2
export PATH="$(cd "$ROOT" && cd "${OPD_VENV:-.venv}" && pwd)/bin:$PATH"
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
exec python -m opd.serve "$@"
