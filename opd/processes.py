"""Child processes that leave nothing behind, however they or their parent end.

Standard library only.

Linux kills a child when its parent dies, if the child has asked for it; it does not kill what the
child has started, and vllm 0.32's engine outlives a killed API server for ever. So a command is
started through this very file, run as a script:

    parent ──> leader of a new process group, bound to its parent's life; it becomes the command
                   └──> guard, outside the group: when the leader is gone, it ends what the group
                   still holds

The guard is there before the command is, so there is no instant at which a SIGKILL leaves something
for good.
"""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

GRACE_SECONDS = 7.0  # between SIGTERM and SIGKILL: vLLM takes 6.6 s to unlink its shared memory
POLL_SECONDS = 0.1


def spawn(command: Sequence[str], *, log: Path, env: Mapping[str, str]) -> subprocess.Popen:
    """Starts `command` as the leader of a process group of its own: the group's id is its pid.

    Its output goes to `log`.

    It is killed when the *thread* that calls this ends, as Linux has it, so call it in one that
    lives as long as it is needed.
    """
    shim = [sys.executable, "-I", "-S", __file__, str(os.getpid())]
    with log.open("ab") as output:
        return subprocess.Popen(
            [*shim, *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=env,
            process_group=0,
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
    """Ends a process group: SIGTERM to all of it, and SIGKILL to what is left after the grace.

    Returns when none lives.
    """
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


def free_port() -> int:
    """A TCP port of the loopback interface that nothing uses at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def die_with_parent() -> None:
    """Asks Linux to kill this process when its parent dies.

    To be called in a child, before `exec`.
    """
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _parent_of(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    except (OSError, IndexError, ValueError):
        return 0


def _launcher_chain() -> list[int]:
    """This rank's ancestors that belong to a launcher: `deepspeed` puts two between the shell and
    the rank.
    """
    chain, pid = [], os.getppid()
    while pid > 1:
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
        except OSError:
            break
        if not any(
            name in command
            for name in (
                "deepspeed",
                "torchrun",
                "torch/distributed",
                "torch.distributed",
                "accelerate",
            )
        ):
            break
        chain.append(pid)
        pid = _parent_of(pid)
    return chain


LAUNCHER_SECONDS = 30.0  # what launchers give their ranks between SIGTERM and SIGKILL


def die_with_launcher(
    poll_seconds: float = 1.0, is_stopping: Callable[[], bool] = lambda: False
) -> None:
    """Ends this rank when its launcher is gone, however it died.

    A SIGKILL of a launcher cannot be forwarded to its ranks. A rank that was told to end itself, as
    all are when a scheduler signals every process of a job, has `LAUNCHER_SECONDS` to do so.
    """
    chain = _launcher_chain()
    if not chain:
        return

    def watch():
        me = os.getpid()
        while all(
            _parent_of(child) == parent
            for child, parent in zip([me, *chain[:-1]], chain, strict=True)
        ):
            time.sleep(poll_seconds)
        deadline = time.monotonic() + LAUNCHER_SECONDS
        while is_stopping() and time.monotonic() < deadline:
            time.sleep(poll_seconds)
        os._exit(1)

    threading.Thread(target=watch, name="launcher-watch", daemon=True).start()


if __name__ == "__main__":
    _lead(int(sys.argv[1]), sys.argv[2:])
