#!/usr/bin/env bash
# Sets up the environment and runs the tests. Arguments are passed on to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."

bash scripts/setup.sh
export PATH="$(cd "${OPD_VENV:-.venv}" && pwd)/bin:$PATH"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # the models are tiny and processes share the cores

if [ "$*" != "" ] && [ "$*" != --all ]; then
    exec python -m pytest "$@"
fi
# Whole runs have processes of their own, and tests that measure times want no neighbour.
STATUS=0
python -m pytest -n 2 --dist loadfile -m "not e2e and not alone" "$@" || STATUS=$?
python -m pytest -m "e2e or alone" "$@" || STATUS=$?
exit "$STATUS"
