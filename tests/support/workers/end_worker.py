"""Programs that end in `distributed.exit_together`, each in its own way: `end_worker.py JOB`, a
JSON file.

The JOB has `out` (a directory) and `cases` (name -> [way of rank 0, way of rank 1, ...]). Each rank
is a fork, which saves the import of torch; it ends as a program does. Its files are
`out/NAME_RANK.stdout`, `.stderr` and `.log`, what the way writes down. One line at the end: case ->
[rank, exit status, when it began, when it ended] of each rank, on the clock `time.monotonic`.
"""

import atexit
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import weakref
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import shared_memory
from pathlib import Path

import torch.distributed as dist

from opd import distributed, processes

DEADLINE = 120  # seconds; a rank that hangs is ended by SIGALRM, and its test fails
SLOW = 1.0  # seconds that the slow rank needs for its exit hooks

left_open = []  # what a library keeps in a global until the interpreter ends


class Engine:
    """As vllm 0.32's: its finaliser destroys its group, and raises if that is gone already."""

    def __init__(self, group: dist.ProcessGroup):
        weakref.finalize(self, dist.destroy_process_group, group)


def late(log, seconds: float) -> None:
    time.sleep(seconds)
    log("thread")


def well(log) -> None:
    """Work that the interpreter would see to at its exit: hooks, a thread, text without a newline,
    others' leftovers.
    """
    threading.Thread(target=late, args=(log, 0.3)).start()
    folder = tempfile.TemporaryDirectory()
    pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork"))
    memory = shared_memory.SharedMemory(create=True, size=8)
    atexit.register(memory.unlink)
    own_group = dist.new_group([distributed.rank()], use_local_synchronization=True)
    left_open.extend([folder, pool, memory, Engine(own_group)])
    log(f"pool {pool.submit(os.getpid).result()}")
    log(f"folder {folder.name}")
    print("half a line", end="")


def slow(log) -> None:
    def hook() -> None:
        time.sleep(SLOW)
        log(f"slow {time.monotonic()}")

    atexit.register(hook)


def freed(log) -> None:
    """An engine that is freed has destroyed all groups; the other rank is not through."""
    dist.destroy_process_group()


def busy(log) -> None:
    time.sleep(SLOW)
    log(f"slow {time.monotonic()}")
    freed(log)


def raises(log) -> None:
    atexit.register(time.sleep, DEADLINE)  # such as a hook that waits for another rank
    raise RuntimeError("lost in the forward pass")


def user(log) -> None:
    from opd.run.prepare import user_errors  # not before the fork: it starts threads

    with user_errors():
        raise ValueError("--flag 1: wrong;\n take 2")


def agreed(log) -> None:
    with distributed.agree_on_error("the work"):
        if distributed.rank() == 0:
            raise OSError("disk 0")


def interrupted(log) -> None:
    # a shell's job in the background inherits that it is ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(DEADLINE)


def unread(log) -> None:
    """The console is gone before the end."""
    print("for nobody", end="")
    reader, writer = os.pipe()
    os.dup2(writer, 1)
    os.close(reader)


def waits(log) -> None:
    distributed.all_reduce([1.0])


def exits(*status):
    def exit_(log) -> None:
        atexit.register(log, "hook")
        sys.exit(*status)

    return exit_


WAYS = {
    "well": well,
    "slow": slow,
    "freed": freed,
    "busy": busy,
    "raises": raises,
    "user": user,
    "agreed": agreed,
    "interrupted": interrupted,
    "unread": unread,
    "waits": waits,
    "exit": exits(),
    "exit 0": exits(0),
    "exit 3": exits(3),
    "exit text": exits("the trainer is gone"),
}


def program(way: str, log) -> None:
    with distributed.exit_together():
        distributed.init()
        distributed.at_end(lambda: log("first cleanup"))
        distributed.at_end(lambda: log("second cleanup"))
        WAYS[way](log)
        log("done")
    log("behind the end")


def fork(way: str, rank: int, world_size: int, port: int, files: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    signal.alarm(DEADLINE)
    for descriptor, stream in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{files}.{stream}", os.O_WRONLY | os.O_CREAT), descriptor)
    if world_size > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))

    def log(line: str) -> None:
        with open(f"{files}.log", "a") as file:
            file.write(f"{line}\n")

    program(way, log)
    os._exit(99)  # never: `exit_together` does not return


def main() -> None:
    assert len(os.listdir("/proc/self/task")) == 1, "a fork would lose the other threads"
    job = json.loads(Path(sys.argv[1]).read_text())
    ends = {}
    for name, ways in job["cases"].items():
        port, started = processes.free_port(), time.monotonic()
        ranks = {
            fork(way, rank, len(ways), port, Path(job["out"], f"{name}_{rank}")): rank
            for rank, way in enumerate(ways)
        }
        ends[name] = []
        for _ in ways:
            pid, status = os.wait()
            ends[name].append(
                [ranks[pid], os.waitstatus_to_exitcode(status), started, time.monotonic()]
            )
        ends[name].sort()
    print(json.dumps(ends))


if __name__ == "__main__":
    main()
