#!/usr/bin/env bash
# From a fresh clone to a student that is an adapter, taught by three teachers that are adapters on
# the same base. No GPU needed. Arguments are passed on to train_mopd.py; `--lora_r 0` trains all of
# the student.
set -euo pipefail
cd "$(dirname "$0")/../.."

bash scripts/setup.sh
export PATH="$(cd "${OPD_VENV:-.venv}" && pwd)/bin:$PATH"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # models this small lose more to thread barriers than they gain

python scripts/make_demo.py --lora --output_dir demo_lora
python train_mopd.py --config scripts/demos/lora.yaml "$@"
