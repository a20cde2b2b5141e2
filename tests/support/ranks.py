"""Workers of tests as ranks that meet, forked from a process that has imported what they import.

`torchrun WORKER` computes the same, after ten seconds of imports for every rank.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

from opd import processes
from scripts.measure.forked import run_forked
from tests.support.processes import worker_environment


def run_ranks(worker: Path, *arguments: str, num_ranks: int, timeout_s: float) -> None:
    """Until all have ended; an assertion says how one ended that did not end well.

    A single rank has no launcher's variables, as under plain `python`.
    """
    port = str(processes.free_port())

    def run(rank: int) -> tuple[int | None, str]:
        place = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": num_ranks,
            "LOCAL_WORLD_SIZE": num_ranks,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        place = {name: str(value) for name, value in place.items()} if num_ranks > 1 else {}
        out, err = (Path(streams) / f"{name}_{rank}" for name in ("out", "err"))
        environment = worker_environment(**place)
        status = run_forked([str(worker), *arguments], out, err, timeout_s, environment)
        return status, err.read_text(errors="replace")[-4000:]

    with TemporaryDirectory() as streams, ThreadPoolExecutor(num_ranks) as pool:
        ends = list(pool.map(run, range(num_ranks)))
    for rank, (status, said) in enumerate(ends):
        assert status == 0, f"rank {rank}: status {status}\n{said}"
