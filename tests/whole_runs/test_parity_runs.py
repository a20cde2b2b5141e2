"""Whole runs that are judged: a trainer whose sampler is broken, and servers that take pushes of
tied models and of experts.
"""

import sys
from dataclasses import replace

import pytest

from scripts.measure.families import BY_NAME, save
from tests.support.launch import command, metrics_of, start, succeed

pytestmark = pytest.mark.e2e

# A trainer in a process where a part of the package is another.
BROKEN = """
import runpy, sys
from opd.engines import vllm_engine
vllm_engine.reload_weights = lambda worker, **source: worker.reload_weights(**source)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_run_whose_sampler_keeps_its_old_head_ends_with_one_line(models, tiny_tied, tmp_path):
    arguments = command(
        replace(models, student=tiny_tied),
        tmp_path / "run",
        "--num_steps",
        "4",
        "--learning_rate",
        "1e-2",
    )
    assert arguments[:2] == [sys.executable, "train_mopd.py"]
    stopped = start([sys.executable, "-c", BROKEN, *arguments[1:]])
    assert stopped.returncode == 1, stopped.stderr[-3000:]
    last = stopped.stderr.strip().splitlines()[-1]
    assert last.startswith(
        "error: step 2: the sampler is not the student: after weights were pushed"
    )
    assert "Traceback" not in stopped.stdout + stopped.stderr
    assert [row["step"] for row in metrics_of(tmp_path / "run")] == [1]

    succeed([*arguments[:-1], arguments[-1], "--output_dir", str(tmp_path / "whole")])
    rows = metrics_of(tmp_path / "whole")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert max(row["mismatch/abs_max"] for row in rows) < 1e-4


@pytest.mark.parametrize("family", ["qwen3", pytest.param("qwen3_moe", marks=pytest.mark.long)])
def test_servers_have_the_weights_that_were_pushed(models, tokenizer, tmp_path, family):
    """A tied model, and experts: rollout and log-prob servers against each other and the trainer,
    after every push.
    """
    for seed, name in enumerate(("student", "teacher")):
        save(BY_NAME[family], tokenizer, tmp_path / name, seed)
    models = replace(
        models,
        student=tmp_path / "student",
        teachers=dict.fromkeys(models.teachers, tmp_path / "teacher"),
    )
    flags = [
        "--mode",
        "async",
        "--max_staleness",
        "0",
        "--rollout_servers",
        "auto",
        "--logprob_servers",
        "auto",
    ]
    flags += [
        "--old_logprobs",
        "server",
        "--is_mode",
        "truncate",
        "--learning_rate",
        "1e-2",
        "--num_steps",
        "3",
    ]
    succeed(command(models, tmp_path / "run", *flags))
    rows = metrics_of(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert row["mismatch/abs_max"] < 1e-4  # rollout servers against log-prob servers
        assert row["mismatch/old_policy_gap"] < 1e-5  # log-prob servers against the trainer
