"""Whole runs of a student that sees: with a teacher that sees and one for text alone, killed and
resumed, in turn with the sampler and on a rollout server.

The teacher for text has 40 tokens and the student 44: it lacks those that stand for images.
"""

import json
import random
import signal

import pytest
import torch

from opd.records import sample_ledger
from scripts.demos.vision_models import CHAT_TEMPLATE
from tests.support import vision
from tests.support.launch import (
    Models,
    command,
    ledger_of,
    losses_of,
    metrics_of,
    parameter_hash,
    start,
    succeed,
)

pytestmark = pytest.mark.e2e
SHARED = 40
STEPS = ("--num_steps", "4", "--save_every", "2", "--prompts_per_step", "12")


@pytest.fixture(scope="module")
def seeing(tiny, tokenizer, tmp_path_factory):
    """A student and a teacher that see, a teacher of additions for text alone, rows of both."""
    root = tmp_path_factory.mktemp("seeing")
    for seed, name in enumerate(("student", "reading")):
        torch.manual_seed(seed)
        vision.idefics3(root / name)
    rng, rows = random.Random(0), []
    for index in range(24):
        (root / f"{index}.png").write_bytes(vision.picture(index, 32, 32).source)
        image = {"prompt": "<image>=", "images": [f"{index}.png"], "data_source": "reading"}
        text = {"prompt": f"{rng.randrange(90)}+1=", "data_source": "addition"}
        rows += [image | {"answer": "7"}, text | {"answer": "8"}]
    (root / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    # the text teacher renders as the student does
    text = root / "addition"
    text.mkdir()
    for path in tiny.addition.iterdir():
        if path.name != "chat_template.jinja":
            (text / path.name).write_bytes(path.read_bytes())
    (text / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    teachers = {"reading": root / "reading", "addition": text}
    return Models(root / "student", teachers, (str(root / "train.jsonl"),), tiny.eval)


@pytest.fixture(scope="module")
def calm(seeing, tmp_path_factory):
    """Four undisturbed steps."""
    run_dir = tmp_path_factory.mktemp("calm") / "run"
    done = start(command(seeing, run_dir, *STEPS, "--rollout_every", "1"))
    assert done.returncode == 0, done.stderr[-3000:]
    return run_dir, done.stderr


def test_a_teacher_for_text_need_not_know_of_images(calm):
    """The random student writes an image's tokens here and there; a response ends at the first."""
    run_dir, said = calm
    rows = metrics_of(run_dir)[-4:]
    assert all(row["mismatch/abs_max"] < 1e-4 for row in rows)
    assert sum(row["rollout/unshared_tokens/addition"] for row in rows) > 0
    assert "a token that teacher addition does not share" in said
    for row, losses in zip(rows, losses_of(run_dir), strict=True):
        assert row["optim/loss_tokens"] > 0 and losses == losses


def test_killed_and_resumed_equals_undisturbed(seeing, calm, tmp_path):
    run_dir = tmp_path / "run"
    killed = start(command(seeing, run_dir, *STEPS), OPD_FAULT="train.before_step:kill@4")
    assert killed.returncode == -signal.SIGKILL
    assert "resumes from" in succeed(command(seeing, run_dir, *STEPS))
    assert parameter_hash(run_dir) == parameter_hash(calm[0])
    assert losses_of(run_dir) == losses_of(calm[0])


@pytest.mark.long
def test_images_are_issued_again_to_a_rollout_server(seeing, calm, tmp_path):
    """At staleness 0 it is the synchronous run, killed with responses in flight and resumed."""
    run_dir = tmp_path / "run"
    flags = (*STEPS, "--mode", "async", "--rollout_servers", "auto", "--max_staleness", "0")
    killed = start(command(seeing, run_dir, *flags), OPD_FAULT="ahead.landed:kill@40")
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    assert "resumes from" in succeed(command(seeing, run_dir, *flags))
    assert losses_of(run_dir) == losses_of(calm[0])
    assert parameter_hash(run_dir) == parameter_hash(calm[0])
    assert not sample_ledger.differences(ledger_of(calm[0]), ledger_of(run_dir))


def test_gradients_on_the_host_that_would_be_wrong_are_refused(seeing, tmp_path):
    offload = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": offload}))
    flags = ("--ds_config", str(tmp_path / "ds.json"))
    refused = start(command(seeing, tmp_path / "run", *flags))
    assert refused.returncode == 2
    (line,) = refused.stderr.splitlines()
    assert "ZeRO stage 2 with its optimizer on the host computes wrong gradients" in line
