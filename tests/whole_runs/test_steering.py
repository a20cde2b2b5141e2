"""Runs that are stopped, changed, continued and exported, as their users do it."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from opd.records.files import parse_row
from opd.run.export_checkpoint import export_command
from tests.support.launch import (
    BIN,
    DEADLINE,
    command,
    ledger_of,
    losses_of,
    metrics_of,
    parameter_hash,
    start,
    succeed,
)
from tests.support.processes import ROOT, worker_environment

pytestmark = pytest.mark.e2e

FLAGS = ("--num_steps", "4", "--parity_every", "0")
LONG_S = 100  # what a rollout would take that nobody interrupts


@pytest.fixture(scope="module")
def undisturbed(models, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    succeed(command(models, run_dir, *FLAGS))
    return run_dir


PHASE_OF = {"rollout": "rollout", "score.done": "score", "train.before_step": "train"}


def is_in(run_dir: Path, phase: str, *, step: int) -> bool:
    """Whether a run has come to that phase of a step (0-based)."""
    path = run_dir / "ledger.jsonl"
    rows = map(parse_row, path.read_text().splitlines() if path.exists() else [])
    wanted = {"step": step, "phase": phase, "event": "enter"}
    return any(row and wanted.items() <= row.items() for row in rows)


def struck(
    arguments: list[str],
    run_dir: Path,
    *numbers: int,
    behind: int,
    at: str = "rollout",
    delay_s: float = LONG_S,
    to_all: bool = False,
) -> tuple[int, str]:
    """(status, console) of a run that gets signals, 2 s apart, behind step `behind`, while it waits
    for `delay_s` at a place of the next step. With `to_all` every process gets them, as from a
    terminal or Slurm.
    """
    environment = worker_environment(
        OPD_FAULT=f"{at}:delay={delay_s}@{behind + 1}",
        OPD_FAULT_RANK="all",
        PATH=f"{BIN}:{os.environ['PATH']}",
    )
    run = subprocess.Popen(
        arguments,
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        process_group=0,
    )
    try:
        deadline = time.monotonic() + DEADLINE
        while not is_in(run_dir, PHASE_OF[at], step=behind):
            assert run.poll() is None and time.monotonic() < deadline, run.communicate()[0]
            time.sleep(0.2)
        struck_at = time.monotonic()
        for index, number in enumerate(numbers):
            time.sleep(2 * index)
            (os.killpg if to_all else os.kill)(run.pid, number)
        console, _ = run.communicate(timeout=DEADLINE)
    finally:
        run.kill()
    assert time.monotonic() - struck_at < LONG_S / 2, "it has waited"
    return run.returncode, console


def long(*values):
    return pytest.param(*values, marks=pytest.mark.long)


@pytest.mark.parametrize(
    ("launcher", "ranks", "number", "to_all", "status"),
    [
        ("python", 1, signal.SIGINT, False, -signal.SIGINT),
        long("torchrun", 2, signal.SIGTERM, False, 1),
        long("torchrun", 2, signal.SIGINT, True, 1),
        long("accelerate", 2, signal.SIGTERM, False, 1),
        long("deepspeed", 2, signal.SIGINT, True, -signal.SIGINT),
        long("deepspeed", 2, signal.SIGTERM, True, -signal.SIGTERM),
    ],
)
def test_a_run_that_is_asked_to_stop_saves_and_continues_as_if_it_had_not(
    models, tmp_path, undisturbed, launcher, ranks, number, to_all, status
):
    """On one rank, whoever has saved it."""
    run_dir = tmp_path / "run"
    arguments = command(models, run_dir, *FLAGS, launcher=launcher, ranks=ranks)
    found, console = struck(arguments, run_dir, number, behind=2, to_all=to_all)
    assert found == status, console
    assert "asked to stop: step 2 is saved; the same command continues" in console
    assert "Traceback" not in console.split("asked to stop")[0]
    assert [p.name for p in (run_dir / "checkpoints").iterdir()] == ["step_2"]
    console = succeed(command(models, run_dir, *FLAGS))
    assert "resumes from" in console
    assert losses_of(run_dir) == pytest.approx(losses_of(undisturbed), abs=1e-5)
    assert [row["id"] for row in ledger_of(run_dir)] == [r["id"] for r in ledger_of(undisturbed)]
    if ranks == 1:
        assert parameter_hash(run_dir) == parameter_hash(undisturbed)


@pytest.mark.long
def test_a_step_in_training_is_finished_and_saved(models, tmp_path):
    """Its weights are about to change: there is no going back to those before."""
    run_dir = tmp_path / "run"
    arguments = command(models, run_dir, *FLAGS)
    found, console = struck(
        arguments, run_dir, signal.SIGTERM, behind=2, at="train.before_step", delay_s=8
    )
    assert found == -signal.SIGTERM and "step 3 is saved" in console, console
    assert [p.name for p in (run_dir / "checkpoints").iterdir()] == ["step_3"]
    assert [row["step"] for row in metrics_of(run_dir)] == [1, 2, 3]


@pytest.mark.long
def test_a_second_ctrl_c_ends_at_once_and_saves_nothing(models, tmp_path):
    run_dir = tmp_path / "run"
    arguments, twice = command(models, run_dir, *FLAGS), (signal.SIGINT, signal.SIGINT)
    found, console = struck(arguments, run_dir, *twice, behind=2, at="train.before_step")
    assert found == -signal.SIGINT and "KeyboardInterrupt" in console, console
    assert not any((run_dir / "checkpoints").iterdir())


@pytest.mark.long
def test_an_asynchronous_run_is_stopped_and_changed(models, tmp_path):
    """Every sample is trained on once, though those of step 4 were there when it stopped."""
    run_dir, flags = tmp_path / "run", (*FLAGS, "--mode", "async", "--max_staleness", "1")
    found, console = struck(
        command(models, run_dir, *flags), run_dir, signal.SIGTERM, behind=2, at="score.done"
    )
    assert found == -signal.SIGTERM and "step 2 is saved" in console
    (buffer,) = run_dir.glob("checkpoints/step_2/buffer_rank_0.json")
    assert json.loads(buffer.read_text())["finished"]
    changed = ("--temperature", "0.7", "--allow_change", "temperature")
    console = succeed(command(models, run_dir, *flags, *changed))
    assert "responses that were written ahead are written again" in console
    ids = [row["id"] for row in ledger_of(run_dir)]
    assert len(ids) == len(set(ids)) == 4 * 8


def test_a_checkpoint_is_exported_as_its_run_exports_it(undisturbed, tmp_path, capsys):
    """Every file but the card, bit for bit; and a mistake is one line."""
    checkpoint, out = undisturbed / "checkpoints" / "step_4", tmp_path / "new" / "model"
    assert export_command([str(checkpoint), str(out)]) == 0
    written = {path.name: path.read_bytes() for path in out.iterdir()}
    own = {path.name: path.read_bytes() for path in (undisturbed / "model").iterdir()}
    assert own.pop("README.md"), "the card is the run's: its report was not made at this step"
    assert written == own
    capsys.readouterr()
    damaged = tmp_path / "run" / "checkpoints" / "step_4"
    shutil.copytree(checkpoint, damaged)
    for wrong, said in {
        (checkpoint, out): f"OUT {out}: exists already and is not empty; choose another",
        (tmp_path / "step_9", tmp_path / "x"): "not a whole checkpoint: no such directory",
        (damaged, tmp_path / "x"): "config.yaml cannot be read",
    }.items():
        assert export_command([*map(str, wrong)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line
    (shard,) = damaged.rglob("*optim_states.pt")
    shard.write_bytes(shard.read_bytes()[:-1])
    assert export_command([str(damaged), str(tmp_path / "x")]) == 2
    assert "not a whole checkpoint: shards/" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_run_ends_before_its_time_and_goes_on_with_what_has_changed(models, tmp_path):
    run_dir = tmp_path / "run"
    limited = start(command(models, run_dir, *FLAGS, "--time_limit", "0.0001"))
    assert limited.returncode == 0, limited.stderr
    assert "--time_limit 0.0001: step 1 is saved; the same command continues" in limited.stdout
    assert not (run_dir / "model").exists()
    changed = ("--num_steps", "3", "--learning_rate", "2e-3", "--lr_schedule", "constant")
    refused = start(command(models, run_dir, *changed))
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    allowed = ("--allow_change", "num_steps,learning_rate,lr_schedule")
    console = succeed(command(models, run_dir, *changed, *allowed))
    assert "changes from here on: optim.learning_rate 0.001 -> 0.002" in console
    rates = {row["step"]: row["optim/learning_rate"] for row in metrics_of(run_dir)}
    assert rates == {1: 1e-3, 2: 2e-3, 3: 2e-3}
    rows = [json.loads(line) for line in (run_dir / "changes.jsonl").read_text().splitlines()]
    assert {(row["step"], row["name"]) for row in rows} == {
        (1, "optim.learning_rate"),
        (1, "optim.lr_schedule"),
        (1, "num_steps"),
    }
