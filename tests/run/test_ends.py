"""How programs end: the status, what the exit hooks still do, what the console shows, and no abort
in 200 starts.
"""

import contextlib
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from opd import processes
from tests.support.launch import Models, command, start
from tests.support.processes import ROOT, is_running, worker_environment

WORKERS = ROOT / "tests" / "support" / "workers"
DEADLINE = 300  # seconds
# seconds that a rank may take which waits for nobody; the hook that it must not run takes 120
HURRY = 20

# ---- Ends of one rank and of two -----------------------------------------------------------------

ALONE = (
    "well",
    "exit",
    "exit 0",
    "exit 3",
    "exit text",
    "raises",
    "agreed",
    "interrupted",
    "unread",
)
TOGETHER = {
    "both well": ["well", "slow"],
    "both without groups": ["busy", "freed"],
    "a mistake": ["user", "user"],
    "an agreed failure": ["agreed", "agreed"],
    "a lonely failure": ["waits", "raises"],
    "a lonely exit": ["waits", "exit 0"],
}
CLEANUPS = ["second cleanup", "first cleanup"]


class End:
    """How a rank of a case ended, and what it left."""

    def __init__(self, out: Path, case: str, rank: int, status: int, began: float, ended: float):
        self.status, self.ended, self.seconds = status, ended, ended - began
        self.stdout, self.stderr, self.log = (
            path.read_text() if path.exists() else ""
            for path in (out / f"{case}_{rank}.{kind}" for kind in ("stdout", "stderr", "log"))
        )


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """case -> the ends of its ranks."""
    out = tmp_path_factory.mktemp("ends")
    cases = {way: [way] for way in ALONE} | TOGETHER
    (out / "job.json").write_text(json.dumps({"out": str(out), "cases": cases}))
    done = subprocess.run(
        [sys.executable, str(WORKERS / "end_worker.py"), str(out / "job.json")],
        # output is in the buffer until the end flushes it
        env=worker_environment(PYTHONUNBUFFERED=""),
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found.keys() == cases.keys()
    return {case: [End(out, case, *end) for end in its_ends] for case, its_ends in found.items()}


@pytest.mark.parametrize(
    ("way", "status"),
    [
        ("well", 0),
        ("exit", 0),
        ("exit 0", 0),
        ("exit 3", 3),
        ("exit text", 1),
        ("raises", 1),
        ("agreed", 1),
        ("interrupted", -signal.SIGINT),
        ("unread", 0),
    ],
)
def test_a_program_ends_with_its_status_and_its_cleanups_run_once(ends, way, status):
    (end,) = ends[way]
    lines = end.log.splitlines()
    assert end.status == status, end.stderr
    assert [line for line in lines if line.endswith("cleanup")] == CLEANUPS
    assert lines[-2:] == CLEANUPS, "what is behind the end does not run"
    assert ("done" in lines) == (way in ("well", "unread"))


def test_a_good_end_does_what_the_interpreter_does_at_an_exit(ends):
    """Hooks, threads, buffered text, and the leftovers of libraries: a temporary folder, a pool,
    shared memory.
    """
    (end,) = ends["well"]
    assert end.stdout == "half a line" and end.stderr == ""
    said = dict(
        line.split() for line in end.log.splitlines() if line.startswith(("pool", "folder"))
    )
    assert "thread" in end.log.splitlines()
    assert not Path(said["folder"]).exists() and not is_running(int(said["pool"]))


@pytest.mark.parametrize("way", ["exit", "exit 0", "exit 3", "exit text"])
def test_sys_exit_runs_the_hooks(ends, way):
    (end,) = ends[way]
    assert end.log.splitlines()[0] == "hook"
    assert end.stderr == ("the trainer is gone\n" if way == "exit text" else "")


def test_an_exception_is_a_traceback_and_waits_for_no_hook(ends):
    (end,) = ends["raises"]
    assert end.seconds < HURRY and end.stderr.count("Traceback") == 1
    assert end.stderr.endswith("RuntimeError: lost in the forward pass\n")
    (end,) = ends["interrupted"]
    assert end.seconds < HURRY and end.stderr.endswith("KeyboardInterrupt\n")


def test_two_ranks_part_together_and_rank_0_goes_last(ends):
    """Whoever holds the store stays until the others are through with their hooks."""
    ranks = ends["both well"]
    assert [(end.status, end.stderr) for end in ranks] == [(0, ""), (0, "")]
    assert all(end.log.splitlines()[-2:] == CLEANUPS for end in ranks)
    (through,) = (
        float(line.split()[1]) for line in ranks[1].log.splitlines() if line.startswith("slow")
    )
    assert ranks[0].ended > through


def test_ranks_whose_groups_are_gone_meet_at_the_store(ends):
    ranks = ends["both without groups"]
    assert [(end.status, end.stderr) for end in ranks] == [(0, ""), (0, "")]
    (through,) = (
        float(line.split()[1]) for line in ranks[0].log.splitlines() if line.startswith("slow")
    )
    assert ranks[1].ended > through


def test_a_mistake_on_two_ranks_is_one_line(ends):
    ranks = ends["a mistake"]
    assert [end.status for end in ranks] == [2, 2]
    assert "".join(end.stderr for end in ranks) == "error: --flag 1: wrong; take 2\n"
    assert all(end.stdout == "" for end in ranks)


def test_what_all_ranks_raise_is_said_last_and_once(ends):
    ranks = ends["an agreed failure"]
    assert [end.status for end in ranks] == [1, 1]
    assert [
        end.stderr.count("\nerror: the work failed on rank 0: OSError: disk 0") for end in ranks
    ] == [1, 0]


@pytest.mark.parametrize(
    ("case", "statuses"), [("a lonely failure", [1, 1]), ("a lonely exit", [1, 0])]
)
def test_a_rank_that_leaves_alone_waits_for_nobody(ends, case, statuses):
    """The other one is in a collective operation, and hears of it."""
    assert [end.status for end in ends[case]] == statuses
    assert max(end.seconds for end in ends[case]) < HURRY


# ---- No abort ------------------------------------------------------------------------------------


@pytest.mark.e2e
@pytest.mark.parametrize("starts", [5, pytest.param(200, marks=pytest.mark.long)])
def test_no_start_on_two_ranks_is_aborted(tmp_path, starts):
    """An interpreter that took the groups down itself aborted one start in ten, after all work was
    done.
    """
    failed = []
    for index in range(starts):
        out, port = tmp_path / str(index), processes.free_port()
        out.mkdir()
        ranks = [
            subprocess.Popen(
                [sys.executable, str(WORKERS / "distributed_worker.py"), "agree", str(out)],
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=worker_environment(
                    RANK=str(rank),
                    LOCAL_RANK=str(rank),
                    WORLD_SIZE="2",
                    MASTER_ADDR="127.0.0.1",
                    MASTER_PORT=str(port),
                ),
            )
            for rank in (0, 1)
        ]
        with contextlib.ExitStack() as stack:
            for process in ranks:
                stack.callback(process.kill)
            said = [process.communicate(timeout=DEADLINE)[0] for process in ranks]
        if any(process.returncode for process in ranks) or any(said):
            failed.append(([process.returncode for process in ranks], said))
        assert len(list(out.glob("*.json"))) == 4, said
    assert not failed, f"{len(failed)} of {starts} starts: {failed[:3]}"


# ---- The console ---------------------------------------------------------------------------------

OURS = [
    r"plan: --\w+( \S+)?",
    r"plan: fits: \S+ of \S+ GiB in \w+ \(92% of the memory are counted on\)",
    r"starts fresh",
    r"training prompts: addition \d+, reversal \d+",
    r"step \d/2  loss \S+  \S+ tok/s  eta \S+  \S+s \(rollout \S+, score \S+, train \S+, sync "
    r"\S+\)",
    r"memory, predicted/measured: (\w+ \S+/\S+ GiB(, )?){4}",
    r"model: \S+/model",
    r"warning: rank \d: vLLM cannot sleep on a CPU: its engines keep their memory in every phase",
]
OURS_ASYNC = [
    r"step \d/2  loss \S+  \S+ tok/s  eta \S+  \S+s( \(.*\))?",
    r"(rollout|log-prob) servers: \S+",
]
STAMP = r"\[[-\d]+ [\d:,]+\] "
THEIRS = {
    "python": [],
    "torchrun": [],
    "accelerate": [],
    "deepspeed": [
        STAMP + r"\[(WARNING|INFO)\] \[real_accelerator\.py:\d+:get_accelerator\] Setting .*",
        STAMP + r"\[WARNING\] \[runner\.py:\d+:fetch_hostfile\] Unable to find hostfile, .*",
        STAMP + r"\[INFO\] \[runner\.py:\d+:main\] cmd = .*",
        STAMP + r"\[INFO\] \[launch\.py:\d+:main\] (WORLD INFO "
        r"DICT|nnodes|global_rank_mapping|dist_world_size|Setting CUDA).*",
        STAMP + r"\[INFO\] \[launch\.py:\d+:main\] process \d+ spawned with command: .*",
        STAMP + r"\[INFO\] \[launch\.py:\d+:main\] Process \d+ exits successfully\.",
    ],
}
FAILURE = [
    STAMP + r"\[INFO\] \[launch\.py:\d+:sigkill_handler\] Killing subprocess \d+",
    STAMP + r"\[ERROR\] \[launch\.py:\d+:sigkill_handler\] \[.*\] exits with return code = 2",
]
PARTS = ("starts", "training", "step", "memory", "model")  # what a run says, in this order
TENSOR_PARALLEL = ("--rollout_tensor_parallel_size", "2")


def unknown(console: str, patterns: list[str]) -> list[str]:
    """Lines that no pattern knows."""
    return [
        line
        for line in console.splitlines()
        if not any(re.fullmatch(pattern, line) for pattern in patterns)
    ]


def long(*values):
    return pytest.param(*values, marks=pytest.mark.long)


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("launcher", "ranks", "flags", "script"),
    [
        ("python", 1, (), "train_mopd.py"),
        long("deepspeed", 2, TENSOR_PARALLEL, "train_mopd.py"),
        *(long(launcher, 1, (), "train_mopd.py") for launcher in THEIRS if launcher != "python"),
        *(long(launcher, 2, (), "train_mopd.py") for launcher in THEIRS if launcher != "python"),
        long("torchrun", 2, TENSOR_PARALLEL, "train_mopd.py"),
        long("deepspeed", 2, ("--loss", "jsd", "--lmbda", "0.5"), "train_gkd.py"),
        long("torchrun", 2, ("--mode", "async", "--max_staleness", "1"), "train_mopd.py"),
    ],
)
def test_every_line_on_the_console_of_a_good_run_is_known(
    tiny, tmp_path, launcher, ranks, flags, script
):
    done = start(
        command(
            models(tiny), tmp_path / "run", *flags, launcher=launcher, ranks=ranks, script=script
        ),
        forked=False,
    )
    console = done.stdout + done.stderr
    assert done.returncode == 0, console
    more = OURS_ASYNC if "async" in flags else []
    assert not unknown(console, OURS + more + THEIRS[launcher])
    mine = [
        line.split()[0].rstrip(":,")
        for line in done.stdout.splitlines()
        if not unknown(line, OURS + more)
    ]
    assert [word for word in mine if word in PARTS] == [
        "starts",
        "training",
        "step",
        "step",
        "memory",
        "model",
    ], console


@pytest.mark.e2e
def test_a_mistake_on_two_ranks_of_a_launcher_is_one_line_and_its_own(tiny, tmp_path):
    done = start(
        command(models(tiny), tmp_path / "run", "--domain_key=topic", launcher="deepspeed", ranks=2)
    )
    (line,) = unknown(done.stdout + done.stderr, THEIRS["deepspeed"] + FAILURE)
    assert (
        done.returncode == 2 and line.startswith("error: ") and "choose with --domain_key" in line
    )


@pytest.mark.e2e
@pytest.mark.long
@pytest.mark.parametrize(
    ("launcher", "ranks"), [("python", 1), *((name, 2) for name in THEIRS if name != "python")]
)
def test_a_dry_run_says_nothing_but_its_report(tiny, tmp_path, launcher, ranks):
    done = start(
        command(models(tiny), tmp_path / "run", "--dry_run", launcher=launcher, ranks=ranks),
        forked=False,
    )
    assert done.returncode == 0, done.stderr
    assert not unknown(done.stderr, THEIRS[launcher])
    first, *_, last = (line for line in done.stdout.splitlines() if unknown(line, THEIRS[launcher]))
    assert first == "Configuration" and "the response starts here" in last


def models(tiny) -> Models:
    teachers = {domain: getattr(tiny, domain) for domain in tiny.domains}
    return Models(tiny.student, teachers, (str(tiny.train),), tiny.eval)
