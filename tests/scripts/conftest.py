"""What tests of the scripts share: scripts that run in this process, and their children."""

import json
import multiprocessing.forkserver
import sys
from pathlib import Path

import pytest

from scripts import bench_recovery, bench_step, gpu_check
from scripts.measure import async_runs
from scripts.measure.forked import run_forked
from scripts.measure.runs import RunFailed
from scripts.measure.tools import last_error


def stop_forkserver() -> None:
    """Ends the process that children are forked from: it is large, and some tests count the
    children of their own process. The next fork starts another.
    """
    multiprocessing.forkserver._forkserver._stop()


@pytest.fixture(scope="package", autouse=True)
def forkserver():
    yield
    stop_forkserver()


@pytest.fixture
def childless():
    """This process has no children yet."""
    stop_forkserver()


def forked_child(command: list[str], log: Path, env: dict[str, str], deadline_s: float = 600):
    """`runs.run_child`, without the seconds of importing."""
    assert command[0] == sys.executable
    status = run_forked(command[1:], log, log, deadline_s, env)
    if status != 0:
        text = log.read_text(errors="replace")
        raise RunFailed(f"exit status {status}: {last_error(text)}\n{text[-3000:]}")


@pytest.fixture
def run_main(monkeypatch, capsys):
    """A function: a script's `main` with flags as a user types them; what `--json` printed last,
    and all that was printed.
    """
    for module in (bench_step, bench_recovery, async_runs, gpu_check):
        monkeypatch.setattr(module, "run_child", forked_child)

    def run(module, flags: str) -> tuple[dict, str]:
        monkeypatch.setattr(sys, "argv", [module.__file__, "--json", *flags.split()])
        assert module.main() == 0
        printed = capsys.readouterr()
        return json.loads(printed.out.splitlines()[-1]), printed.out + printed.err

    return run
