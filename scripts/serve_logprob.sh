#!/usr/bin/env bash
# Serves the student's log-probabilities to train_mopd.py, under the weights that it pushes. Prints the YAML line that names the
# servers to it. `--help` lists the flags.
exec bash "$(dirname "$0")/serve.sh" logprob "$@"
