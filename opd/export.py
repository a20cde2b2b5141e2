"""`python -m opd.export CHECKPOINT OUT`: the student of any checkpoint as a Hugging Face model."""

import sys

from opd.run.export_checkpoint import export_command

if __name__ == "__main__":
    sys.exit(export_command(sys.argv[1:]))
