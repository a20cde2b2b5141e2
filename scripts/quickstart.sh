#!/usr/bin/env bash
# From a fresh clone to a student that learned two teachers' skills from its own answers. No GPU
# needed; it uses up to eight, of those in CUDA_VISIBLE_DEVICES if that is set. Arguments are passed
# on to train_mopd.py.
set -euo pipefail
cd "$(dirname "$0")/.."

bash scripts/setup.sh
export PATH="$(cd "${OPD_VENV:-.venv}" && pwd)/bin:$PATH"

RANKS=()
if ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    RANKS=(--num_gpus "${OPD_CPU_RANKS:-1}") # "GPUs" are ranks here
    # Models this small lose more to thread barriers than they gain.
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
else
    ALL="$(python -c 'import torch; print(*range(torch.cuda.device_count()), sep=",")')"
    IFS=, read -ra VISIBLE <<<"${CUDA_VISIBLE_DEVICES:-$ALL}"
    N=8 # a step's 128 prompts must divide among the ranks
    while ((N > ${#VISIBLE[@]})); do N=$((N / 2)); done
    # DeepSpeed's launcher starts a rank on each of these; --num_gpus would take the first of all.
    export CUDA_VISIBLE_DEVICES="$(IFS=, && echo "${VISIBLE[*]:0:N}")"
fi

python scripts/make_demo.py --output_dir demo
deepspeed "${RANKS[@]}" train_mopd.py --config scripts/quickstart.yaml "$@"
python -m opd.report runs/quickstart
