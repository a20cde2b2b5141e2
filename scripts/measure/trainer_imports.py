"""What trainers import, imported.

Processes that are forked from one that has this start within a second.

`scripts/check_families.py` starts hundreds of runs of a few steps, most of whose time were imports.
"""

import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

from opd.engines.vllm_process import import_vllm

import_vllm()

import deepspeed  # noqa: E402, F401
import vllm.v1.engine.core  # noqa: E402
import vllm.v1.worker.cpu_model_runner  # noqa: E402
import vllm.v1.worker.cpu_worker  # noqa: E402, F401
from vllm import LLM  # noqa: E402, F401
from vllm.model_executor.models import registry  # noqa: E402

import train_gkd  # noqa: E402, F401
import train_mopd  # noqa: E402, F401

# vllm asks a new process, which imports all that again, what a model class can do: that keeps a
# parent off the GPU. Here each run is such a process.
registry._run_in_subprocess = lambda function: function()

gc.collect()
gc.freeze()  # no child has to visit all that at each collection
