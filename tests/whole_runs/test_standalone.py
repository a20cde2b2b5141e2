"""Whole runs with served teachers: the same losses wherever a teacher runs, and what is left when
its servers die.
"""

import json
import os
import signal
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from opd import faults
from opd.records import sample_ledger
from opd.servers.server_processes import ServerProcess, serving
from tests.conftest import KEY_VARIABLE
from tests.support.launch import (
    BIN,
    DEADLINE,
    Models,
    at_most_two,
    command,
    ledger_of,
    losses_of,
    metrics_of,
    parameter_hash,
    start,
    succeed,
)
from tests.support.metrics_page import documented_keys, undocumented
from tests.support.processes import LAUNCH_VARIABLES, ROOT

pytestmark = pytest.mark.e2e
STEPS, STRUCK = 6, 3  # of a run; the step in which its servers are killed
WAIT_S = 8  # --teacher_wait_s
# One request in a batch: its bits do not depend on what else the server is asked at the moment.
JSON_SERVER = {"protocol": "json", "dtype": "float32", "kv_cache_gib": 0.03, "start_seconds": 300.0,
               "extra": ["--enforce-eager", "--max-num-seqs", "1"]}  # fmt: skip
BINARY_SERVER = {"protocol": "binary", "dtype": "float32", "start_seconds": 300.0,
                 "extra": ["--backend", "hf", "--max_sequences_per_batch", "1"]}  # fmt: skip


def with_urls(models: Models, run_dir: Path, urls: list[str], *flags: str, **entry) -> list[str]:
    """A launch with the addition teacher at `urls` and the reversal teacher on the trainer's own
    device.
    """
    teachers = [
        {"name": "addition", "backend": "server", "urls": urls, "domains": ["addition"], **entry},
        {"name": "reversal", "model": str(models.teachers["reversal"]), "domains": ["reversal"]},
    ]
    run_dir.mkdir(parents=True, exist_ok=True)
    config = run_dir.parent / f"{run_dir.name}.yaml"
    config.write_text(yaml.safe_dump({"teachers": teachers}))
    own = [part for part in command(models, run_dir, *flags) if not part.startswith("--teacher=")]
    return [*own, "--config", str(config)]


def two_ranks(arguments: list[str]) -> list[str]:
    return [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2", *arguments[1:]]


def start_in_background(arguments: list[str], **env) -> subprocess.Popen:
    mine = {k: v for k, v in os.environ.items() if k not in LAUNCH_VARIABLES}
    environment = {**mine, "OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}", **env}
    return subprocess.Popen(
        arguments,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@contextmanager
def struck(arguments: list[str], run_dir: Path, *victims: ServerProcess):
    """A run whose servers are killed while it writes the responses of step STRUCK + 1; yields
    (output, status, seconds).
    """
    process = start_in_background(
        arguments, OPD_FAULT=f"rollout:delay=2@{STRUCK + 1}", OPD_FAULT_RANK="all"
    )
    try:
        deadline = time.monotonic() + DEADLINE
        path = run_dir / "metrics.jsonl"
        while not (path.exists() and f'{{"step": {STRUCK},' in path.read_text()):
            assert process.poll() is None, process.communicate(timeout=10)[0][-3000:]
            assert time.monotonic() < deadline, "the run does not get to the step"
            time.sleep(0.05)
        for victim in victims:
            victim.kill()
        killed = time.monotonic()
        output, _ = process.communicate(timeout=DEADLINE)
        yield output, process.returncode, time.monotonic() - killed
    finally:
        process.kill()
        process.wait(timeout=30)


def total(run_dir: Path, key: str) -> float:
    return sum(row.get(f"teacher/{key}/addition", 0) for row in metrics_of(run_dir))


def same_samples(run_dir: Path, other: Path) -> None:
    differences = sample_ledger.differences(
        sample_ledger.read(run_dir / sample_ledger.FILE),
        sample_ledger.read(other / sample_ledger.FILE),
    )
    assert not differences, differences


# ---- Servers die ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("victims", "server"),
    [
        ("only", BINARY_SERVER),
        pytest.param("only", JSON_SERVER, marks=pytest.mark.long),
        pytest.param("one of two", JSON_SERVER, marks=pytest.mark.long),
    ],
)
def test_a_run_survives_its_servers(models, tmp_path, key, victims, server):
    """Undisturbed; then one of two servers is killed, or the only one, and started again.

    Same samples, same bits at the end.
    """
    flags = ("--num_steps", str(STEPS), "--support_k", "16", "--save_every", "100")
    flags += ("--teacher_wait_s", str(WAIT_S))
    entry = {"api_key_env": KEY_VARIABLE}
    calm, hit = tmp_path / "calm", tmp_path / "struck"
    teacher = str(models.teachers["addition"])
    with serving(teacher, replicas=2, **server) as (first, second):
        urls = [first.url, second.url]
        succeed(two_ranks(with_urls(models, calm, urls, *flags, **entry)))
        assert not undocumented(
            {key for row in metrics_of(calm) for key in row if key != "step"},
            documented_keys(ROOT / "docs" / "metrics.md"),
        )
        asked = sum(row["domain"] == "addition" for row in ledger_of(calm))
        heads = 2 if server is BINARY_SERVER else 0  # each rank asks for the output projection
        assert total(calm, "failovers") == 0 and total(calm, "requests") == asked + heads
        if victims == "one of two":
            loses_one_of_two(two_ranks(with_urls(models, hit, urls, *flags, **entry)), hit, first)
            assert total(hit, "requests") == total(calm, "requests")
        else:
            arguments = two_ranks(with_urls(models, hit, [second.url], *flags, **entry))
            loses_its_only_server(arguments, hit, second)
    if victims == "only":
        with serving(teacher, replicas=1, **server) as (third,):
            output = succeed(two_ranks(with_urls(models, hit, [third.url], *flags, **entry)))
        assert f"resumes from {hit / 'checkpoints' / f'step_{STRUCK}'}" in output
    same_samples(calm, hit)
    assert losses_of(hit) == losses_of(calm)
    assert parameter_hash(hit) == parameter_hash(calm)

    written = [path for run in (calm, hit) for path in run.rglob("*") if path.is_file()]
    leaks = [path for path in written if key.encode() in path.read_bytes()]
    assert not leaks and len(written) > 20


def loses_one_of_two(arguments: list[str], run_dir: Path, victim: ServerProcess) -> None:
    with struck(arguments, run_dir, victim) as (output, status, _):
        assert status == 0, output[-3000:]
    assert total(run_dir, "ejections") >= 1


def loses_its_only_server(arguments: list[str], run_dir: Path, victim: ServerProcess) -> None:
    with struck(arguments, run_dir, victim) as (output, status, seconds):
        assert status == 1, output[-3000:]
        assert seconds < WAIT_S + 40, f"{seconds:.0f} s"
    assert output.count("RankError: scoring failed on rank") >= 2, output[-5000:]  # on each of them
    assert f"saving step {STRUCK}; the same command continues from there" in output
    assert "\nerror: scoring failed on rank" in output
    assert "teacher addition: no answer for" in output
    assert victim.url in output and "cannot connect" in output
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == [f"step_{STRUCK}"]


# ---- Faults at every point of a step -------------------------------------------------------------

# The points that a step passes, and how often before the fault strikes: at least one step of each
# start is done by then. Those of a checkpoint are struck in test_checkpoint.py, those of the
# asynchronous mode elsewhere too.
ELSEWHERE = ("save.", "ahead.", "push.")
PASSES = {
    "teachers.submit": 6,
    "pool.request": 6,
    "pool.answer": 6,
    "backward": 4,
    "sync.before": 3,
}


@pytest.mark.long
def test_a_run_killed_at_every_point_of_a_step_is_the_undisturbed_one(models, tmp_path):
    """Two runs, each killed at half of the points one after the other and resumed each time, with a
    served teacher.
    """
    points = [point for point in faults.POINTS if not point.startswith(ELSEWHERE)]
    assert set(PASSES) < set(points)
    flags = ("--save_every", "1", "--parity_every", "0", "--num_steps", str(2 * len(points)))

    def run(name: str, struck: list[str]) -> None:
        arguments = with_urls(models, tmp_path / name, [teacher.url], *flags)
        for point in struck:
            done = start(arguments, OPD_FAULT=f"{point}:kill@{PASSES.get(point, 2)}")
            assert done.returncode == -signal.SIGKILL, (
                f"{point}: {done.stdout[-2000:]}\n{done.stderr[-3000:]}"
            )
        succeed(arguments)

    with serving(str(models.teachers["addition"]), **BINARY_SERVER) as (teacher,):
        runs = {"calm": [], "first": points[::2], "second": points[1::2]}
        at_most_two(
            [lambda name=name: run(name, runs[name]) for name in ("first", "second", "calm")]
        )
    for name in ("first", "second"):
        same_samples(tmp_path / "calm", tmp_path / name)
        assert losses_of(tmp_path / name) == losses_of(tmp_path / "calm")
        assert parameter_hash(tmp_path / name) == parameter_hash(tmp_path / "calm")


# ---- Wherever a teacher runs ---------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["standalone", pytest.param("colocate", marks=pytest.mark.long)])
def test_a_served_teacher_teaches_what_a_colocated_one_does(models, tmp_path, mode):
    """The exact loss over the full vocabulary: hidden states travel, with and without a local
    head.
    """
    teacher = str(models.teachers["addition"])
    flags = ("--num_steps", "3", "--eval_data", str(models.eval))
    here, there = tmp_path / "here", tmp_path / "there"
    entry = {"model": teacher} if mode == "colocate" else {}
    with serving(teacher, protocol="binary", dtype="float32", kv_cache_gib=0.03) as (server,):
        flags_there = (*flags, "--teacher_mode", mode)
        arguments = with_urls(models, there, [server.url], *flags_there, **entry)
        _, output = at_most_two(
            [lambda: succeed(command(models, here, *flags)), lambda: succeed(arguments)]
        )
    assert losses_of(there) == pytest.approx(losses_of(here), rel=1e-4)
    assert all(row.get("distill/spilled") == 0 for row in metrics_of(there) if row["step"])
    same_samples(here, there)
    report = json.loads((there / "report.json").read_text())["domains"]["addition"]
    if mode == "colocate":
        assert report["teacher"] is not None
    else:
        assert report["teacher"] is None and "a scoring server does not write" in output
