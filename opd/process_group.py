"""Child processes that leave nothing behind, however they or their parent end. Standard library only.

Linux kills a child when its parent dies, if the child has asked for it; it does not kill what the child has started, and
vllm 0.32's engine outlives a killed API server for ever. So a command is started through this very file, run as a script:

    parent ──> leader of a new process group, bound to its parent's life; it becomes the command
                   └──> guard, outside the group: when the leader is gone, it ends what the group still holds

The guard is there before the command is, so there is no instant at which a SIGKILL leaves something for good.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

GRACE_SECONDS = 7.0  # between SIGTERM and SIGKILL: vLLM takes 6.6 s to unlink its shared memory
POLL_SECONDS = 0.1


def start(command: Sequence[str], *, log: Path, env: Mapping[str, str]) -> subprocess.Popen:
    """Starts `command` as the leader of a process group of its own: the group's id is its pid. Its output goes to `log`.

    It is killed when the *thread* that calls this ends, as Linux has it, so call it in one that lives as long as it is needed.
    """
    shim = [sys.executable, "-I", "-S", __file__, str(os.getpid())]
    with log.open("ab") as output:
        return subprocess.Popen(
            [*shim, *command], stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=env, process_group=0
        )


def members(group: int) -> list[int]:
    """Pids of a process group that live; who has ended and waits to be reaped does not."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it ends while we look
                state, _, its_group, *_ = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(its_group) == group and state not in "ZX":
                    found.append(int(entry.name))
    return found


def end(group: int, grace_seconds: float = GRACE_SECONDS) -> None:
    """Ends a process group: SIGTERM to all of it, and SIGKILL to what is left after the grace. Returns when none lives."""
    deadline = time.monotonic() + grace_seconds
    with contextlib.suppress(ProcessLookupError):
        if grace_seconds > 0:
            os.killpg(group, signal.SIGTERM)
            while members(group) and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
        os.killpg(group, signal.SIGKILL)


def _lead(parent: int, command: list[str]) -> None:
    """In the leader: leaves a guard behind, binds itself to `parent`, becomes `command`."""
    leader = os.getpid()
    if os.fork() == 0:
        os.setpgid(0, 0)
        while os.getppid() == leader:
            time.sleep(POLL_SECONDS)
        end(leader)
        return
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == parent:  # else it died before we asked
        os.execvp(command[0], command)


if __name__ == "__main__":
    _lead(int(sys.argv[1]), sys.argv[2:])
