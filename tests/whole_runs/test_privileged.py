"""Whole runs whose teachers read prompts of their own: resumed, asynchronous with a served teacher,
and with sequences that the teacher writes; and the demo of a privileged teacher.
"""

import json
import subprocess
import sys

import pytest
import yaml

from opd.records import sample_ledger
from opd.servers.server_processes import serving
from tests.conftest import KEY_VARIABLE
from tests.support.launch import (
    BIN,
    at_most_two,
    command,
    losses_of,
    metrics_of,
    parameter_hash,
    succeed,
)
from tests.support.metrics_page import documented_keys, undocumented
from tests.support.processes import ROOT

pytestmark = pytest.mark.e2e
MADE = "python:tests.support.feedback:hint"
OWN = ("--teacher_prompt", "addition={answer}={prompt}abcdefgh", f"reversal={MADE}")
FLAGS = (*OWN, "--max_teacher_prompt_tokens", "48", "--num_steps", "4", "--save_every", "2")


@pytest.fixture(scope="module")
def sync(models, tmp_path_factory):
    """Four steps, and the same with the student's prompts."""
    root = tmp_path_factory.mktemp("own")
    own, plain = root / "own", root / "plain"
    held_out = ("--eval_data", str(models.eval), "--rollout_every", "1")
    (said, _) = at_most_two(
        [
            lambda: succeed(command(models, own, *FLAGS, *held_out)),
            lambda: succeed(command(models, plain, "--num_steps", "4")),
        ]
    )
    assert "teacher addition: has its own prompt in 6 of 6 held-out prompts" in said
    assert "teacher reversal: has its own prompt in 0 of 6 held-out prompts" in said
    return own, plain


def test_it_trains_on_what_teachers_say_behind_their_own_prompts(sync):
    own, plain = sync
    first, other = losses_of(own), losses_of(plain)
    assert abs(first[0] - other[0]) > 1e-3, "the same prompts and responses, other teachers' words"
    logged = metrics_of(own)
    assert not undocumented(
        {key for row in logged for key in row} - {"step"}, documented_keys(ROOT / "docs/metrics.md")
    )
    steps = [row for row in logged if row["step"] > 0]
    assert all(row["teacher/own_prompt/addition"] == 1 for row in steps)
    assert 0 < sum(row["teacher/own_prompt/reversal"] for row in steps) < len(steps)
    assert all(row["teacher/overlong_prompt/reversal"] == 0 for row in steps)
    assert all(row["teacher/prompt_tokens/addition"] > 16 for row in steps)
    assert "teacher/own_prompt/addition" not in metrics_of(plain)[-1]
    rows = [
        json.loads(line)
        for path in sorted((own / "rollouts").glob("*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    texts = [row["teacher_prompts"]["addition"] for row in rows if row["domain"] == "addition"]
    assert texts and all("abcdefgh" in text for text in texts)
    assert not any("abcdefgh" in row["prompt"] for row in rows)


@pytest.mark.long
def test_a_resumed_run_is_the_same_run(models, sync, tmp_path):
    own, _ = sync
    half = tmp_path / "half"
    flags = list(FLAGS)
    flags[flags.index("--num_steps") + 1] = "2"
    succeed(command(models, half, *flags))
    changed = command(models, half, *FLAGS, "--allow_change", "num_steps")
    said = succeed(changed)
    assert "resumes from" in said
    ledgers = (sample_ledger.read(d / sample_ledger.FILE) for d in (own, half))
    steps = [[row for row in rows if row["step"] <= 2] for rows in ledgers]
    assert not sample_ledger.differences(*steps)
    refused = [part.replace("abcdefgh", "abcdefg") for part in changed]
    done = subprocess.run(
        [*refused], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 2 and "teachers.addition.prompt" in done.stderr, done.stderr[-2000:]


@pytest.mark.long
def test_servers_hear_the_same_prompts(models, sync, tmp_path, key):
    """Asynchronous at staleness 0, with a served teacher whose function is asked while others
    write: the losses of the synchronous run.
    """
    own, _ = sync
    run_dir, config = tmp_path / "run", tmp_path / "run.yaml"
    reversal = str(models.teachers["reversal"])
    with serving(reversal, dtype="float32", start_seconds=300.0) as (server,):
        entries = [
            {"name": "addition", "model": str(models.teachers["addition"])},
            {"name": "reversal", "backend": "server", "urls": [server.url],
             "api_key_env": KEY_VARIABLE},
        ]  # fmt: skip
        config.write_text(yaml.safe_dump({"teachers": entries}))
        flags = ("--mode", "async", "--max_staleness", "0", "--config", str(config))
        arguments = command(models, run_dir, *FLAGS, *flags)
        succeed([part for part in arguments if not part.startswith("--teacher=")])
    assert losses_of(run_dir) == pytest.approx(losses_of(own), abs=1e-4)
    (before, after) = (sample_ledger.read(d / sample_ledger.FILE) for d in (own, run_dir))
    assert not sample_ledger.differences(before, after)


@pytest.mark.long
def test_a_teacher_writes_behind_its_own_prompt(models, tmp_path):
    """`--seq_kd`: responses to a prompt that the student does not see."""
    written = {}
    for name, flags in (("plain", ()), ("own", ("--teacher_prompt", "{prompt}abcdefgh"))):
        run_dir = tmp_path / name
        seq_kd = ("--seq_kd", "--lmbda", "0", "--seq_kd_temperature", "0", "--num_steps", "1")
        succeed(command(models, run_dir, *seq_kd, *flags, script="train_gkd.py"))
        written[name] = json.loads((run_dir / "seq_kd.json").read_text())["responses"]
    assert written["plain"] != written["own"]
    assert parameter_hash(tmp_path / "plain") != parameter_hash(tmp_path / "own")


@pytest.mark.long
def test_the_demo_of_a_privileged_teacher(tmp_path):
    """A student that is taught by itself with hints gains .8 of what a larger teacher gives. Wrong
    hints are seen in evaluation: the teacher's own score is that of its hints, and the student,
    evaluated without any, loses what it knew.
    """
    command = [sys.executable, str(ROOT / "scripts/demos/privileged.py"), "--control"]
    done = subprocess.run(
        [*command, "--output_dir", str(tmp_path)],
        cwd=ROOT,
        env={"PATH": f"{BIN}:/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=3000,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "the privileged teacher reaches" in done.stdout
    privileged, control = (
        json.loads((tmp_path / name / "report.json").read_text())["domains"]["addition"]
        for name in ("privileged", "control")
    )
    assert privileged["teacher"] > 0.9 > privileged["student_before"]
    assert control["teacher"] < 0.1 and control["student_after"] < control["student_before"]
