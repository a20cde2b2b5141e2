#!/usr/bin/env bash
# Sets up the environment and runs the tests. Arguments are passed on to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."

bash scripts/setup.sh
export PATH="$(cd "${OPD_VENV:-.venv}" && pwd)/bin:$PATH"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # the models are tiny and processes share the cores

WORKERS=(-n 2 --dist loadfile --no-loadscope-reorder)
for ARGUMENT in "$@"; do
    if [ -e "${ARGUMENT%%::*}" ]; then WORKERS=(); fi # a file or folder: one process starts sooner
done
python -m pytest "${WORKERS[@]}" "$@"
