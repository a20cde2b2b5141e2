#!/usr/bin/env bash
# Serves a teacher to trainers on this machine, and prints the YAML entry that names it to them. `--help` lists the flags.
exec bash "$(dirname "$0")/serve.sh" teacher "$@"
