#!/usr/bin/env bash
# The demo of scripts/quickstart.sh, asynchronously: rollout servers write the responses of coming steps while the trainer
# trains. Arguments are passed on to train_mopd.py.
set -euo pipefail
cd "$(dirname "$0")/.."

bash scripts/setup.sh
export PATH="$(cd "${OPD_VENV:-.venv}" && pwd)/bin:$PATH"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # models this small lose more to thread barriers than they gain
python scripts/make_demo.py --output_dir demo
deepspeed --num_gpus 1 train_mopd.py --config scripts/quickstart.yaml --output_dir runs/async \
    --mode async --max_staleness 1 --rollout_replicas "${ROLLOUT_REPLICAS:-1}" "$@"
python -m opd.report runs/async
