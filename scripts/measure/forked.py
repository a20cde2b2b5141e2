"""Scripts in processes that are forked from one that has imported what trainers import.

They start within a second, where `python SCRIPT` takes ten for its imports.
"""

import multiprocessing
import os
import runpy
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

from scripts.measure.tools import ROOT

KILL_S = 30
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["scripts.measure.trainer_imports"])


def run_forked(
    command: list[str],
    stdout: Path,
    stderr: Path,
    timeout_s: float,
    env: Mapping[str, str] | None = None,
) -> int | None:
    """Exit status of `python COMMAND...` in the repository; its output is appended to the files.

    None if it took longer than `timeout_s`: then it was killed, and what it had started. `env` is
    all of its environment; without it that of the forkserver.
    """
    process = FORKSERVER.Process(target=_become, args=(command, stdout, stderr, env and dict(env)))
    process.start()
    process.join(timeout_s)
    status = process.exitcode
    if status is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.join(KILL_S)
    return status


def _become(command: list[str], stdout: Path, stderr: Path, env: dict[str, str] | None) -> None:
    os.setsid()
    for stream, path in ((1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    if env is not None:
        os.environ.clear()
        os.environ.update(env)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a forkserver's children ignore it
    os.chdir(ROOT)
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")
