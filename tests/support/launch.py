"""Trainers as their users start them, with tiny models, and what their runs leave."""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

from opd import processes
from opd.records import sample_ledger
from scripts.measure.forked import run_forked
from tests.support.processes import LAUNCH_VARIABLES, ROOT

BIN = Path(sys.executable).parent
DEADLINE = 420  # seconds; a run takes 20 to 60 when the machine is idle
SMALL = (
    "--num_steps 2 --prompts_per_step 8 --micro_batch_size 3 --max_prompt_tokens 16 "
    "--max_response_tokens 8 --learning_rate 1e-3 --rollout_kv_cache_gib 0.05 "
    "--teacher_kv_cache_gib 0.05 --parity_every 1 --enforce_eager"
)
LAUNCHERS = {
    "python": [sys.executable],
    "deepspeed": [str(BIN / "deepspeed"), "--num_gpus", "{ranks}", "--master_port", "{port}"],
    "torchrun": [str(BIN / "torchrun"), "--nproc-per-node", "{ranks}", "--master-port", "{port}"],
    "accelerate": [
        *(str(BIN / "accelerate"), "launch", "--config_file", "ds_configs/accelerate.yaml"),
        *("--num_processes", "{ranks}", "--main_process_port", "{port}"),
    ],
}


@dataclass(frozen=True)
class Models:
    student: Path
    teachers: dict[str, Path]
    train: tuple[str, ...]
    eval: Path


def command(
    models: Models, output_dir, *flags, script="train_mopd.py", launcher="python", ranks=1
) -> list[str]:
    teachers = [f"--teacher={name}={path}" for name, path in models.teachers.items()]
    # one teacher for every domain; the answers are the dataset's responses
    if script == "train_gkd.py":
        teachers = [f"--teacher={next(iter(models.teachers.values()))}", "--response_key=answer"]
    start = [part.format(ranks=ranks, port=processes.free_port()) for part in LAUNCHERS[launcher]]
    return [
        *(*start, script, "--student_model", str(models.student), *teachers),
        *("--data", *models.train, "--output_dir", str(output_dir), *SMALL.split(), *flags),
    ]


def start(arguments: list[str], *, forked=True, **env) -> subprocess.CompletedProcess:
    """Runs to the end; the output is in the error message if a test fails on it.

    What plain `python` starts is forked from a process that has imported everything, unless
    `forked` is false: imports take most of the time of a short run.
    """
    # this process may be a rank of its own
    mine = {k: v for k, v in os.environ.items() if k not in LAUNCH_VARIABLES}
    environment = {**mine, "OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}", **env}
    if forked and arguments[0] == sys.executable and arguments[1].startswith("train_"):
        return _fork(arguments, environment)
    options = {"cwd": ROOT, "env": environment, "timeout": DEADLINE, "check": False}
    return subprocess.run(arguments, capture_output=True, text=True, **options)


def _fork(arguments: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess:
    with tempfile.TemporaryDirectory() as streams:
        out, err = Path(streams) / "out", Path(streams) / "err"
        status = run_forked(arguments[1:], out, err, DEADLINE, environment)
        if status is None:
            raise subprocess.TimeoutExpired(arguments, DEADLINE)
        texts = [path.read_text(errors="replace") for path in (out, err)]
    return subprocess.CompletedProcess(arguments, status, *texts)


def succeed(arguments: list[str], *, forked=True, **env) -> str:
    done = start(arguments, forked=forked, **env)
    assert done.returncode == 0, (
        f"{' '.join(arguments)}\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    )
    return done.stdout


def at_most_two(jobs):
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda job: job(), jobs))


def metrics_of(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def losses_of(run_dir: Path) -> list[float]:
    return [row["loss/total"] for row in metrics_of(run_dir) if row["step"] > 0]


def parameter_hash(run_dir: Path) -> str:
    """Every parameter of the exported model, bit for bit."""
    digest = hashlib.sha256()
    for path in sorted((run_dir / "model").glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in sorted(file.keys()):
                digest.update(name.encode() + file.get_tensor(name).numpy().tobytes())
    return digest.hexdigest()


def ledger_of(run_dir):
    return sample_ledger.read(run_dir / sample_ledger.FILE)
