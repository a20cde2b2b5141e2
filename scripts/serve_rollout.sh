#!/usr/bin/env bash
# Serves the student to `train_mopd.py --mode async`: samples under the weights that the trainer pushes. Prints the YAML lines
# that name the servers to it. `--help` lists the flags.
exec bash "$(dirname "$0")/serve.sh" rollout "$@"
