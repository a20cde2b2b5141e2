"""Fault points: each name is known and used, each action strikes where and when it is told, and a
typo is refused.
"""

import ast
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext

import pytest

from opd import faults
from tests.support.processes import ROOT, worker_environment

SOURCES = [
    *sorted((ROOT / "opd").rglob("*.py")),
    *ROOT.glob("train_*.py"),
    *sorted((ROOT / "scripts").rglob("*.py")),
]

CHILD = """
from opd.faults import fault_point
for i in range(3):
    print("before", i, flush=True)
    fault_point("backward")
print("survived", flush=True)
"""


def points_in(source: str) -> list[str]:
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    named = [
        c for c in calls if getattr(c.func, "id", getattr(c.func, "attr", "")) == "fault_point"
    ]
    assert all(len(c.args) == 1 and isinstance(c.args[0], ast.Constant) for c in named), (
        "a point is a literal"
    )
    return [c.args[0].value for c in named]


def test_every_point_is_registered_and_every_name_has_a_place():
    used = [name for path in SOURCES for name in points_in(path.read_text())]
    assert set(used) == set(faults.POINTS)
    assert len(used) == len(set(used)), "a name is one place"
    assert all(len(text.split()) > 1 and "\n" not in text for text in faults.POINTS.values())


def child(fault: str, **env) -> subprocess.CompletedProcess:
    environment = worker_environment(OPD_FAULT=fault, **env)
    return subprocess.run(
        [sys.executable, "-c", CHILD], env=environment, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize(
    ("fault", "env", "status", "reached"),
    [
        ("", {}, 0, 3),
        ("backward:kill", {}, -signal.SIGKILL, 1),
        ("backward:kill@3", {}, -signal.SIGKILL, 3),
        ("backward:kill@4", {}, 0, 3),
        ("backward:exit@2", {}, 1, 2),
        ("backward:raise@2", {}, 1, 2),
        ("rollout:kill", {}, 0, 3),
        ("backward:kill", {"RANK": "1"}, 0, 3),
        ("backward:kill", {"RANK": "1", "OPD_FAULT_RANK": "1"}, -signal.SIGKILL, 1),
        ("backward:kill", {"RANK": "1", "OPD_FAULT_RANK": "all"}, -signal.SIGKILL, 1),
        ("backward:delay=0.01", {}, 0, 3),
    ],
)
def test_actions_strike_where_and_when_they_are_told(fault, env, status, reached):
    done = child(fault, **env)
    assert (done.returncode, done.stdout.count("before")) == (status, reached), done.stderr
    assert ("survived" in done.stdout) == (status == 0)
    assert ("fault injected at backward" in done.stderr) == ("raise" in fault)


def test_a_stopped_process_lives_and_does_not_answer():
    started = subprocess.Popen(
        [sys.executable, "-c", CHILD], env=worker_environment(OPD_FAULT="backward:stop")
    )
    try:
        deadline = time.monotonic() + 60
        pid, status = 0, 0
        while pid == 0 and time.monotonic() < deadline:
            pid, status = os.waitpid(started.pid, os.WUNTRACED | os.WNOHANG)
            time.sleep(0.01)
        assert os.WIFSTOPPED(status) and os.WSTOPSIG(status) == signal.SIGSTOP
    finally:
        started.kill()
        started.wait(timeout=60)


def test_counting_begins_anew_with_another_fault(monkeypatch):
    faults.fault_point("rollout")  # unset: nothing
    for _ in range(2):
        for text in ("rollout:raise", "rollout:raise@1"):
            monkeypatch.setenv("OPD_FAULT", text)
            faults.fault_point("backward")
            with pytest.raises(RuntimeError, match="fault injected at rollout"):
                faults.fault_point("rollout")
            faults.fault_point("rollout")  # once


def test_a_delay_is_as_long_as_it_says(monkeypatch):
    monkeypatch.setenv("OPD_FAULT", "sync.before:delay=0.2")
    begin = time.monotonic()
    faults.fault_point("sync.before")
    assert time.monotonic() - begin >= 0.2


@pytest.mark.parametrize(
    ("fault", "rank", "message"),
    [
        ("rolout:kill", "0", "no point is called 'rolout'; there are build.engine, rollout, "),
        ("rollout", "0", "no action is called ''; write POINT:ACTION"),
        ("rollout:explode", "0", "no action is called 'explode'"),
        ("rollout:delay", "0", "no action is called 'delay'"),
        ("rollout:kill=3", "0", "no action is called 'kill=3'"),
        ("rollout:delay=soon", "0", "delay=soon: must be seconds"),
        ("rollout:kill@0", "0", "@0: must be a whole number of at least 1"),
        ("rollout:kill@", "0", "@: must be a whole number"),
        ("rollout:kill", "-1", "OPD_FAULT_RANK -1: must be a rank or `all`"),
        ("rollout:kill", "any", "OPD_FAULT_RANK any: must be"),
    ],
)
def test_a_typo_is_refused_at_start(fault, rank, message, monkeypatch):
    monkeypatch.setenv("OPD_FAULT", fault)
    monkeypatch.setenv("OPD_FAULT_RANK", rank)
    with pytest.raises(ValueError) as caught:
        faults.check()
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("point", faults.POINTS)
def test_every_point_may_be_struck(point, monkeypatch):
    """What `check` lets pass strikes: the second time, there and nowhere else, on the ranks that
    are named.
    """
    other = next(name for name in faults.POINTS if name != point)
    for rank, strikes in (("0", True), ("7", False), ("all", True)):
        monkeypatch.setattr(faults, "_last", ("", 0))
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("OPD_FAULT", f"{point}:raise@2")
        monkeypatch.setenv("OPD_FAULT_RANK", rank)
        faults.check()
        for name in (point, other, other):
            faults.fault_point(name)
        with (
            pytest.raises(RuntimeError, match=f"fault injected at {point}$")
            if strikes
            else nullcontext()
        ):
            faults.fault_point(point)
