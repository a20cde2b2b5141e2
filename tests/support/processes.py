"""Child processes of tests: their environment, their sockets, and where the repository lies."""

import contextlib
import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LAUNCH_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)


def leave_vllm() -> None:
    """Ends vLLM's process groups, so that the next module of tests may build engines in this
    process again.
    """
    import gc

    from vllm.distributed.parallel_state import (
        destroy_distributed_environment,
        destroy_model_parallel,
    )

    gc.collect()
    destroy_model_parallel()
    destroy_distributed_environment()


def worker_environment(**more: str) -> dict[str, str]:
    """For subprocesses on the CPU: nothing of this process's ranks or faults, one thread each."""
    kept = {
        k: v
        for k, v in os.environ.items()
        if k not in LAUNCH_VARIABLES and not k.startswith("OPD_FAULT")
    }
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {
        **kept,
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": path,
        **more,
    }


def listening_addresses(pid: int) -> set[str]:
    """Local addresses, in the kernel's own hexadecimal, of the TCP sockets on which a process
    listens.
    """
    inodes = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):  # it closes while we look
            inodes.add(os.readlink(descriptor).removeprefix("socket:[").removesuffix("]"))
    found = set()
    for table in ("tcp", "tcp6"):
        for row in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = row.split()[:10]
            if state == "0A" and inode in inodes:
                found.add(local.partition(":")[0])
    return found


LOOPBACK = {"0100007F", "00000000000000000000000001000000"}


def is_running(pid: int) -> bool:
    """A zombie holds nothing any more."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
