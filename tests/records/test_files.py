"""The run directory: logs that keep the console clean, files that hold no secret."""

import importlib.util
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from opd.log import redact, redact_argv, warn
from opd.records.files import write_rollouts, write_run_files
from tests.support.processes import ROOT

DEADLINE_S = 300


def refuse_constant(name: str):
    raise AssertionError(f"{name} is not JSON")


def run_script(path: Path, code: str, *launcher: str, **kwargs) -> subprocess.CompletedProcess:
    path.write_text(code)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **kwargs.pop("env", {})}
    command = [sys.executable, *launcher, str(path)]
    return subprocess.run(
        command, env=env, text=True, timeout=DEADLINE_S, cwd=path.parent, **kwargs
    )


# ---- logs ----------------------------------------------------------------------------------------

LIBRARIES = [name for name in ("deepspeed", "vllm") if importlib.util.find_spec(name)]
NOISY = f"""
import logging, warnings
from pathlib import Path
from transformers.utils import logging as hf_logging
hf_logging.get_logger("transformers.early").warning("before the setup: this one may be seen")

from opd.log import say, setup_logging
from opd.records.metrics import Metrics
print("----", flush=True)
for stream in (1, 2):
    import os; os.write(stream, b"====\\n")
setup_logging(Path("run"))
for name in {LIBRARIES!r}:
    __import__(name)
if "deepspeed" in {LIBRARIES!r}:
    from deepspeed.utils import logger
    logger.warning("noise of deepspeed")
if "vllm" in {LIBRARIES!r}:
    from vllm.logger import init_logger
    init_logger("vllm.engine").warning("noise of vllm")
hf_logging.get_logger("transformers.late").warning("noise of transformers")
import datasets
datasets.Dataset.from_dict({{"a": [1]}}).map(lambda row: row)
list(hf_logging.tqdm(range(2)))
late = logging.getLogger("some.library")
late.addHandler(logging.StreamHandler())
late.propagate = False
late.warning("noise of a library")
warnings.warn("noise of warnings")
logging.getLogger("opd.x").info("fetching http://user:canary-pass@host/x")
say("hello")
metrics = Metrics(Path("run"), num_steps=2, domains=[])
metrics.add("loss/total", 0.5)
metrics.flush(1)
metrics.flush(2)
metrics.close()
raise RuntimeError("the end")
"""


def test_libraries_write_to_the_log_and_not_to_the_console(tmp_path):
    done = run_script(
        tmp_path / "noisy.py", NOISY, capture_output=True, env={"DS_ACCELERATOR": "cpu"}
    )
    out, err = done.stdout.split("====\n")[1], done.stderr.split("====\n")[1]
    assert out == "hello\nstep 1/2  loss 0.5\nstep 2/2\n"
    assert err.startswith("Traceback") and err.endswith("RuntimeError: the end\n"), err
    log = (tmp_path / "run/logs/rank_0.log").read_text()
    for name in (*LIBRARIES, "transformers", "a library", "warnings"):
        assert log.count(f"noise of {name}\n") == 1, f"{name} is not in the log once:\n{log}"
    assert "http://***@host/x" in log and "canary-pass" not in log


# ---- run files -----------------------------------------------------------------------------------


def test_no_secret_reaches_the_run_directory(tmp_path, monkeypatch):
    secrets = {"HF_TOKEN": "canary-one", "VLLM_API_KEY": "canary2", "WANDB_API_KEY": "canary-three"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    monkeypatch.setenv("MY_NOTE", "canary-four")
    monkeypatch.setenv("VLLM_HOST_URL", "http://me:canary-five@host")
    config = {
        "max_response_tokens": 64,
        "domain_key": "data_source",
        "teachers": [
            {"name": "math", "model": "https://me:canary-six@host/m", "api_key": "canary-seven"}
        ],
        "note": "x canary-one y",
    }
    argv = [
        "train.py",
        "--hf_token",
        "canary-eight",
        "--api-key=canary-nine",
        "--teacher",
        "m=http://u:canary-ten@h/?token=canary-eleven",
        "--max_response_tokens",
        "64",
        "--domain_key",
        "data_source",
        "--note",
        "canary-one",
    ]
    write_run_files(tmp_path, config, argv)

    for path in tmp_path.rglob("*"):
        assert path.is_dir() or "canary" not in path.read_text(), path
    written = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert written["max_response_tokens"] == 64 and written["domain_key"] == "data_source"
    assert written["teachers"] == [
        {"name": "math", "model": "https://***@host/m", "api_key": "***"}
    ]
    command = (tmp_path / "command.txt").read_text()
    assert command.endswith("--max_response_tokens 64 --domain_key data_source --note '***'\n"), (
        command
    )
    env = dict(line.split("=", 1) for line in (tmp_path / "env.txt").read_text().splitlines())
    assert env["NCCL_DEBUG"] == "WARN" and env["VLLM_API_KEY"] == "***" and "MY_NOTE" not in env
    assert env["torch"] == torch.__version__.split("+")[0] or env["torch"] == torch.__version__
    assert config["teachers"][0]["api_key"] == "canary-seven", (
        "the caller's configuration was changed"
    )


def test_a_configuration_without_secrets_is_written_as_it_is(tmp_path):
    config = {
        "learning_rate": 1e-6,
        "clip_low": None,
        "teacher_kv_cache_gib": 0.25,
        "domains": ["a", "ä"],
        "student": "x@y",
    }
    write_run_files(tmp_path, config, ["train.py"])
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == config
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {
        "rollouts",
        "tb",
        "checkpoints",
        "logs",
    }


def test_a_second_launch_adds_its_command(tmp_path):
    for step in ("1", "2"):
        write_run_files(tmp_path, {}, ["train.py", "--num_steps", step])
    assert (
        tmp_path / "command.txt"
    ).read_text() == "train.py --num_steps 1\ntrain.py --num_steps 2\n"


@pytest.mark.parametrize(
    ("argv", "shown"),
    [
        (["--secret", "x", "y"], ["--secret", "***", "y"]),
        (["--secret", "--seed", "1"], ["--secret", "--seed", "1"]),
        (["AUTH_TOKEN=x"], ["AUTH_TOKEN=***"]),
        (["--answer_key", "a", "--prompt_key=b"], ["--answer_key", "a", "--prompt_key=b"]),
    ],
)
def test_redacted_arguments(argv, shown):
    assert redact_argv(argv) == shown


def test_redact_leaves_plain_text_alone():
    text = "see http://host:8000/v1?seed=1 or mail a@b.c, tokens=3"
    assert redact(text) == text
    assert redact("http://u:p@ss@host/x?a=1&api_key=z") == "http://***@host/x?a=1&api_key=***"


def test_rollouts_are_one_strict_object_a_line(tmp_path):
    rows = [{"text": "a\nb\u2028c", "reward": math.nan}, {"text": "é", "reward": 1.0}]
    path = write_rollouts(tmp_path, 7, rows)
    assert path == tmp_path / "rollouts/step_7.jsonl"
    lines = path.read_text().rstrip("\n").split("\n")
    assert [json.loads(line, parse_constant=refuse_constant) for line in lines] == [
        {**rows[0], "reward": None},
        rows[1],
    ]


def test_a_warning_is_written_in_one_piece(monkeypatch):
    """Ranks share a console, and `python -u` writes every piece at once."""
    pieces = []

    class Console(io.StringIO):
        def write(self, text: str) -> int:
            pieces.append(text)
            return len(text)

    monkeypatch.setattr(sys, "stderr", Console())
    warn("the disk is full")
    assert [piece for piece in pieces if piece] == ["warning: rank 0: the disk is full\n"]
