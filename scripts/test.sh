#!/usr/bin/env bash
# Sets up the environment and runs the tests. Arguments are passed on to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."

bash scripts/setup.sh
export PATH="$(cd "${OPD_VENV:-.venv}" && pwd)/bin:$PATH"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # the models are tiny and two processes share the cores
python -m pytest "$@"
