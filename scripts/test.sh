#!/usr/bin/env bash
# Sets up the environment and runs the tests. Arguments are passed on to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."

# They compare with what the CPU builds compute, and start more ranks than a machine may have GPUs.
# CUDA_VISIBLE_DEVICES hides none: DeepSpeed's launcher sets it for each rank.
if [[ "$(nvidia-smi -L 2>&1 || true)" == GPU* ]]; then
    echo "test: the tests are for the CPU builds, and this machine has GPUs; run them in a" \
        "container that gets none. scripts/gpu_check.py checks a GPU" >&2
    exit 1
fi

bash scripts/setup.sh
export PATH="$(cd "${OPD_VENV:-.venv}" && pwd)/bin:$PATH"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # the models are tiny and processes share the cores

if [ "$*" != "" ] && [ "$*" != --all ]; then
    exec python -m pytest "$@"
fi
# Tests that measure times want no neighbour.
STATUS=0
python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not alone" "$@" || STATUS=$?
python -m pytest -m alone "$@" || STATUS=$?
exit "$STATUS"
