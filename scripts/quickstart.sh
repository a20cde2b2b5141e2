#!/usr/bin/env bash
# From a fresh clone to a student that learned two teachers' skills from its own answers. No GPU needed; uses all there are.
# Arguments are passed on to train_mopd.py.
set -euo pipefail
cd "$(dirname "$0")/.."

bash scripts/setup.sh
export PATH="$(cd "${OPD_VENV:-.venv}" && pwd)/bin:$PATH"

RANKS=()
if ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    RANKS=(--num_gpus "${OPD_CPU_RANKS:-1}") # "GPUs" are ranks here
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # models this small lose more to thread barriers than they gain
else
    GPUS="$(nvidia-smi -L | grep -c '^GPU')"
    for N in 1 2 4 8; do # a step's 128 prompts must divide among the ranks
        if [ "$N" -le "$GPUS" ]; then RANKS=(--num_gpus "$N"); fi
    done
fi

python scripts/make_demo.py --output_dir demo
deepspeed "${RANKS[@]}" train_mopd.py --config scripts/quickstart.yaml "$@"
python -m opd.report runs/quickstart
