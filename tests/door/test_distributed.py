"""Two real ranks: errors are agreed on, crashes end everybody, and nobody outlives the launcher."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from opd import distributed, processes
from tests.support.processes import ROOT, is_running, worker_environment

WORKER = ROOT / "tests" / "support" / "workers" / "distributed_worker.py"
START = 120  # seconds that a launcher and two ranks may take to stand
CRASH = 30  # seconds from the first crash to the end of the last process
ORPHAN = 10  # seconds that a rank may outlive its launcher
BIN = Path(sys.executable).parent


def torchrun() -> list[str]:
    port = str(processes.free_port())
    where = ["--master-addr", "127.0.0.1", "--master-port", port]
    return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *where]


def deepspeed() -> list[str]:
    return [str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", str(processes.free_port())]


LAUNCHERS = {"torchrun": torchrun, "deepspeed": deepspeed}


def environment() -> dict[str, str]:
    return worker_environment(PATH=os.pathsep.join([str(BIN), os.environ["PATH"]]))


# ---- Agreement -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def agreed(tmp_path_factory):
    """What both ranks saw."""
    out = tmp_path_factory.mktemp("agree")
    result = subprocess.run(
        [*torchrun(), str(WORKER), "agree", str(out)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=START,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return out


def seen(out: Path, name: str, key: str) -> list:
    return [json.loads((out / f"{name}_{rank}.json").read_text())[key] for rank in (0, 1)]


def test_an_error_on_one_rank_is_raised_on_all_with_its_cause(agreed):
    assert (
        seen(agreed, "agree", "one")
        == ["RankError: the work failed on rank 1: RuntimeError: engine lost"] * 2
    )


def test_the_first_cause_is_named_on_all(agreed):
    assert (
        seen(agreed, "agree", "both")
        == ["RankError: the work failed on rank 0: OSError: disk 0"] * 2
    )


def test_a_users_mistake_stays_one(agreed):
    """A ValueError is for the console: where it was raised, it stays what it is."""
    assert seen(agreed, "agree", "user") == ["ValueError: --flag 1: wrong"] * 2
    other, own = seen(agreed, "agree", "user_on_one")
    assert own == "ValueError: --flag 1: wrong"
    assert other == "RankError: the work failed on rank 1: ValueError: --flag 1: wrong"


def test_without_an_error_nothing_is_raised_and_reductions_go_on(agreed):
    assert seen(agreed, "agree", "none") == ["nothing"] * 2
    assert seen(agreed, "agree", "sum") == [[3.0, 0.2]] * 2
    assert seen(agreed, "agree", "max") == [[1.0]] * 2
    assert seen(agreed, "agree", "gathered") == [[{"rank": 0}, {"rank": 1}]] * 2
    assert seen(agreed, "agree", "broadcast") == ["from 0"] * 2


def test_unequal_ranks_run_equally_many_micro_batches(agreed):
    assert seen(agreed, "micro_batches", "per_batch") == [[7, 3, 5], [7, 0, 0]], "the largest first"
    assert seen(agreed, "micro_batches", "total") == [22, 22]


# ---- Ends ----------------------------------------------------------------------------------------


@pytest.mark.e2e
def test_a_crash_inside_a_collective_ends_all_ranks(tmp_path):
    """The worker's orderly shutdown would take ten minutes."""
    started = time.time()
    result = subprocess.run(
        [*torchrun(), str(WORKER), "crash", str(tmp_path)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=START + CRASH,
    )
    assert result.returncode != 0
    assert "RuntimeError: lost in the forward pass" in result.stderr
    crashed_at = float((tmp_path / "crashed_at").read_text())
    assert started < crashed_at and time.time() - crashed_at < CRASH


@pytest.mark.e2e
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_no_rank_outlives_a_killed_launcher(launcher, tmp_path):
    """SIGKILL for the launcher alone: it cannot pass it on."""
    log = tmp_path / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [*LAUNCHERS[launcher](), str(WORKER), "wait", str(tmp_path)],
            env=environment(),
            stdout=output,
            stderr=output,
        )
    pid_files = [tmp_path / "pid_0", tmp_path / "pid_1"]
    ranks: list[int] = []
    try:
        wait_until(
            lambda: all(f.exists() for f in pid_files) or process.poll() is not None, START, log
        )
        ranks = [int(f.read_text()) for f in pid_files]
        assert all(is_running(pid) for pid in ranks)
        process.send_signal(signal.SIGKILL)
        process.wait()
        wait_until(lambda: not any(is_running(pid) for pid in ranks), ORPHAN, log)
    finally:
        process.kill()
        process.wait()
        for pid in filter(is_running, ranks):
            os.kill(pid, signal.SIGKILL)


def wait_until(condition, seconds: float, log: Path) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, (
            f"not within {seconds} seconds: {log.read_text()[-3000:]}"
        )
        time.sleep(0.05)


# ---- One process ---------------------------------------------------------------------------------


def test_one_rank_without_a_process_group():
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert distributed.all_reduce([1, 2]) == [1.0, 2.0]
    assert distributed.all_reduce([], "max") == []
    assert distributed.gather_objects("a") == ["a"]
    assert distributed.broadcast_object("a") == "a"
    distributed.barrier()
    expected = pytest.raises(distributed.RankError, match="loading failed on rank 0: KeyError: 'x'")
    with expected as caught, distributed.agree_on_error("loading"):
        raise KeyError("x")
    assert isinstance(caught.value.__cause__, KeyError)


def test_seeds_are_stable():
    """A resumed run, or one on another machine, samples the same."""
    assert distributed.fold_seed(0, 1, 2, "rollout") == 4589816770443911565
    assert (
        distributed.fold_seed(0, 12)
        != distributed.fold_seed(0, 1, 2)
        != distributed.fold_seed(1, 0, 2)
    )
    seeds = {distributed.fold_seed(0, step, prompt) for step in range(50) for prompt in range(50)}
    assert len(seeds) == 2500 and all(0 <= seed < 2**63 for seed in seeds)
