"""Two hosts on one machine: trainer ranks on both, a teacher on the second, and a cable that is
pulled in a step.
"""

import json
import os
import shutil
import signal
import subprocess
import time

import pytest

from tests.support.processes import ROOT, worker_environment

SCRIPT = ["bash", str(ROOT / "scripts" / "demos" / "two_nodes_local.sh")]
NEEDS_ROOT = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("ip") is None,
    reason="network namespaces need root and iproute2",
)


def namespaces(pid: int) -> list[str]:
    listed = subprocess.run(
        ["ip", "netns", "list"], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    return [line for line in listed.splitlines() if line.startswith(f"opd-{pid}-")]


def start(tiny, tmp_path, **more) -> subprocess.Popen:
    models = tmp_path / "models"
    models.mkdir()
    for name in ("student", "teacher_addition", "teacher_reversal"):
        (models / name).symlink_to(getattr(tiny, name.removeprefix("teacher_")))
    (models / "train.jsonl").symlink_to(tiny.train)
    environment = worker_environment(MODELS=str(models), RUN=str(tmp_path / "run"), **more)
    return subprocess.Popen(
        SCRIPT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.e2e
@pytest.mark.long
@NEEDS_ROOT
def test_a_run_on_two_hosts_outlives_a_pulled_cable(tiny, tmp_path):
    process = start(tiny, tmp_path, DOWN_S="5")
    output, _ = process.communicate(timeout=900)
    if "allows no network namespaces" in output:
        pytest.skip(output.strip())
    assert process.returncode == 0, output[-5000:]
    assert "the cable is pulled" in output and "3 steps on two hosts" in output
    rows = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert {path.name for path in (tmp_path / "run" / "logs").iterdir()} >= {
        "rank_0.log",
        "rank_1.log",
    }
    assert not namespaces(process.pid)


@NEEDS_ROOT
def test_a_signal_leaves_no_namespace(tiny, tmp_path):
    process = start(tiny, tmp_path)
    deadline = time.monotonic() + 60
    while not namespaces(process.pid) and process.poll() is None and time.monotonic() < deadline:
        pass
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode in (130, 2), output
    assert not namespaces(process.pid)


def test_without_iproute2_it_is_one_line(tmp_path):
    tools = ("bash", "dirname", "id")
    for tool in tools:
        (tmp_path / tool).symlink_to(shutil.which(tool))
    run = subprocess.run(
        SCRIPT, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False, timeout=60
    )
    assert run.returncode == 2
    (line,) = run.stderr.splitlines()
    assert "root" in line or "iproute2" in line
