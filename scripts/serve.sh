#!/usr/bin/env bash
# Starts servers on this machine and prints the YAML lines that name them to a trainer:
#
#     scripts/serve.sh teacher MODEL    a teacher
#     scripts/serve.sh rollout MODEL    the student, which samples for `train_mopd.py --mode async`
#     scripts/serve.sh logprob MODEL    the student's log-probabilities, for `--old_logprobs server`
#
# The last two have the weights that the trainer pushes. `scripts/serve.sh ROLE --help` lists flags.
set -euo pipefail
ROOT="$(cd "$(dirname "$0")/.." && pwd)" # not the working directory: MODEL is relative to that

bash "$ROOT/scripts/setup.sh" >&2
export PATH="$(cd "$ROOT" && cd "${OPD_VENV:-.venv}" && pwd)/bin:$PATH"
exec python -m opd.servers.launch "$@"
