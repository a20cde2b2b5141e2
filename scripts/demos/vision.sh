#!/usr/bin/env bash
# From a fresh clone to a vision-language student that learned from a vision teacher and from one
# for text alone. No GPU needed. MODE=async writes on a rollout server, asks a log-prob server, and
# trains with group advantages and the k1 policy gradient. Arguments are passed on to train_mopd.py.
set -euo pipefail
cd "$(dirname "$0")/../.."

bash scripts/setup.sh
export PATH="$(cd "${OPD_VENV:-.venv}" && pwd)/bin:$PATH"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # models this small lose more to thread barriers than they gain

RUN=runs/vision FLAGS=()
if [ "${MODE:-sync}" = async ]; then
    RUN=runs/vision_async
    FLAGS=(--mode async --rollout_servers auto --logprob_servers auto --old_logprobs server
        --max_staleness 1 --loss reverse_kl_pg --support sampled --clip_low 0.2 --clip_high 0.28
        --reward_weight 0.5 --num_generations 4 --prompts_per_step 48 --learning_rate 5e-4
        --num_steps 600)
fi
python scripts/make_demo.py --vision --output_dir demo_vision
python train_mopd.py --config scripts/demos/vision.yaml --output_dir "$RUN" "${FLAGS[@]}" "$@"
