"""Ranks, reductions, agreement on errors, seeds.

One process per GPU; plain `python` is one rank.
"""

import atexit
import datetime
import hashlib
import os
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager, suppress
from typing import NoReturn

import torch
import torch.distributed as dist

# A rank that waits longer than this for the others ends the run instead of hanging it.
COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=30)
# Looks at whether another rank has failed, and how long it may take to come there too.
WATCH_SECONDS, PATIENCE_SECONDS = 1.0, 15.0
# Rank 0 waits that long for the others to end before it, once all have met.
LAST_SECONDS = 30.0

# `agree_on_error` blocks that this rank has left, and its meetings since, by size of the group:
# equal on the ranks that meet.
_agreements = 0
_meetings: Counter[int] = Counter()
_process_groups: dict[int, dist.ProcessGroup] = {}
_agreed: BaseException | None = None  # what this rank raised when all ranks last agreed to
_store: dist.Store | None = None  # where the ranks meet when no group is left


def init(local_rank: int = -1) -> torch.device:
    """Joins the ranks that `deepspeed`, `accelerate launch` or `torchrun` started; plain `python`
    becomes one rank.

    `local_rank` is what older launchers pass as a flag; the environment wins. Returns this rank's
    device.
    """
    # not at the top: `exit_together` also ends programs that need torch alone
    from accelerate import PartialState

    global _store
    if local_rank >= 0:
        os.environ.setdefault("LOCAL_RANK", str(local_rank))
    store = None
    # the store takes a port itself: one chosen beforehand may be another run's by then
    if "RANK" not in os.environ:
        store = dist.TCPStore("127.0.0.1", 0, world_size=1, is_master=True)
        os.environ.update(
            RANK="0",
            LOCAL_RANK="0",
            WORLD_SIZE="1",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(store.port),
        )
    use_cuda = torch.cuda.is_available()
    # ranks that share the cores must not each take all of them
    if not use_cuda and "OMP_NUM_THREADS" not in os.environ:
        threads = max(
            1,
            (os.cpu_count() or 1)
            // int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])),
        )
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)
    if use_cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        own = {"store": store, "rank": 0, "world_size": 1} if store is not None else {}
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if use_cuda else "gloo", timeout=COLLECTIVE_TIMEOUT, **own
        )
    _store = dist.distributed_c10d._get_default_store()
    device = PartialState(cpu=not use_cuda).device
    # to accelerate's cpu:0, `Tensor.to` copies what lies on the cpu
    return device if use_cuda else torch.device("cpu")


def rank() -> int:
    """This process's rank; 0 before `init` unless a launcher has set it."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Number of ranks; 1 before `init` unless a launcher has set it."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


def barrier() -> None:
    """Waits until every rank has arrived."""
    if world_size() > 1:
        dist.barrier()


def broadcast_object(value):
    """Rank 0's value on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(value, group=None) -> list:
    """Every rank's value, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def all_reduce(values: list[float], op: str = "sum") -> list[float]:
    """Reduces a list of numbers over the ranks in float64 on the host; `op` is sum, min or max."""
    if world_size() == 1 or not values:
        return [float(v) for v in values]
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor, op=getattr(dist.ReduceOp, op.upper()))
    return tensor.tolist()


@contextmanager
def others_wait(what: str, timeout: datetime.timedelta):
    """Around what rank 0 does alone, and for longer than a collective operation may take: the
    others wait in the store until it is done. A name serves once.
    """
    try:
        yield
    finally:
        if _store is not None and world_size() > 1:
            if rank() == 0:
                _store.set(f"opd/waited/{what}", "")
            else:
                _store.wait([f"opd/waited/{what}"], timeout)


class RankError(RuntimeError):
    """Raised on every rank when any rank failed; carries the first cause."""


class PeerError(RankError):
    """Raised where a rank would have waited for one that has failed; `agree_on_error` turns it into
    the cause.
    """


class Stop(RuntimeError):
    """Raised on every rank: the run must not go on, and one line says all about it.

    `exit_together` prints no traceback.

    `status` is the program's: 2 for what is refused before anything was trained, below 0 the signal
    that ends it.
    """

    def __init__(self, message: str, status: int = 1):
        super().__init__(message)
        self.status = status


def was_agreed(error: BaseException) -> bool:
    """Whether every rank raises at this point, so that they may still meet."""
    return error is _agreed


def gather_in_group(value, size: int, what: str) -> list:
    """The values of this rank's group in rank order; rank r belongs to group r // `size`.

    `what` names the work.

    Inside `agree_on_error` nobody waits for a rank that has failed on its way here: that raises
    PeerError. Raises TimeoutError if a rank does not come, RuntimeError on all if they came for
    different work.
    """
    if size == 1:
        return [value]
    first = rank() // size * size
    ranks = list(range(first, first + size))
    _meet(ranks, what)
    if size not in _process_groups:
        _process_groups[size] = dist.new_group(
            ranks, backend="gloo", timeout=COLLECTIVE_TIMEOUT, use_local_synchronization=True
        )
    gathered = [None] * size
    dist.all_gather_object(gathered, (what, value), group=_process_groups[size])
    if len({name for name, _ in gathered}) > 1:
        raise RuntimeError(
            f"ranks {ranks} of one group came for different work: {[name for name, _ in gathered]}"
        )
    return [value for _, value in gathered]


def _meet(ranks: list[int], what: str) -> None:
    """Returns when all `ranks` are here, or raises on all that are.

    They meet at the store, where the failed can leave word.

    A failure may be announced while the last one arrives: the first to write a verdict decides for
    all.
    """
    store = dist.distributed_c10d._get_default_store()
    _meetings[len(ranks)] += 1
    key = f"opd/{_agreements}/meeting/{ranks[0]}-{ranks[-1]}/{_meetings[len(ranks)]}"
    store.set(f"{key}/{rank()}", what)
    deadline = time.monotonic() + COLLECTIVE_TIMEOUT.total_seconds()
    verdict = None
    while verdict is None:
        if store.check([f"{key}/{r}" for r in ranks]):
            verdict = "meet"
        elif store.check([_failure_key()]):
            verdict = "part"
        elif time.monotonic() > deadline:
            missing = [r for r in ranks if not store.check([f"{key}/{r}"])]
            raise TimeoutError(f"{what}: ranks {missing} did not come within {COLLECTIVE_TIMEOUT}")
        else:
            time.sleep(0.001)
    if store.compare_set(f"{key}/verdict", "", verdict) != b"meet":
        raise PeerError(f"{what}: {store.get(_failure_key()).decode()}")


def _failure_key() -> str:
    return f"opd/{_agreements}/failure"


@contextmanager
def agree_on_error(what: str, *, timeout: datetime.timedelta | None = None):
    """Wraps work that holds no collective; on exit all ranks raise if any did, so that nobody waits
    for the dead.

    A rank that raises alone leaves the others in their next collective until its timeout. Here
    every rank reports, and all raise together with the first cause. Those who wait in
    `gather_in_group` meanwhile are called off. `timeout` is for work that may take one rank longer
    than another by more than `COLLECTIVE_TIMEOUT`.
    """
    global _agreements, _agreed
    error, report, patient = None, None, None
    if timeout is not None and world_size() > 1:
        patient = dist.new_group(backend="gloo", timeout=timeout)
    try:
        yield
    except PeerError as caught:
        error = caught  # the failed rank itself reports the cause
    except Exception as caught:
        error, report = caught, f"{type(caught).__name__}: {caught}"
        if world_size() > 1:
            dist.distributed_c10d._get_default_store().set(
                _failure_key(), f"rank {rank()} failed: {report}"
            )
    reports = gather_objects(report, patient)
    _agreements += 1
    _meetings.clear()
    first = next(((r, text) for r, text in enumerate(reports) if text is not None), None)
    if first is None:
        assert error is None, f"{what}: called off, but no rank says why"
        return
    if isinstance(error, ValueError):
        _agreed = error
        raise error
    _agreed = RankError(f"{what} failed on rank {first[0]}: {first[1]}")
    raise _agreed from error


@contextmanager
def not_left_alone():
    """Inside `agree_on_error`, around work of a library that may hold collectives of its own: a
    rank that waits there for one that has failed cannot be asked, so it ends, with the cause.

    vllm 0.32 reduces over all ranks when an engine is built, and a rank that runs out of memory
    before never comes.
    """
    if world_size() == 1:
        yield
        return
    store, key, over = dist.distributed_c10d._get_default_store(), _failure_key(), threading.Event()
    console = os.dup(2)  # what is in here may send its own elsewhere

    def watch() -> None:
        while not over.wait(WATCH_SECONDS):
            if store.check([key]) and not over.wait(PATIENCE_SECONDS):
                os.write(console, b"error: " + store.get(key) + b"\n")
                _end_now(1)

    watcher = threading.Thread(target=watch, name="watch over the others", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join(timeout=2 * WATCH_SECONDS)
        os.close(console)


# ---- The end of a program ------------------------------------------------------------------------

_cleanups: list[Callable[[], None]] = []


def at_end(cleanup: Callable[[], None]) -> None:
    """Calls `cleanup` once when this process ends, in whatever way short of a signal; the last one
    first. It must not raise.
    """
    if not _cleanups:
        atexit.register(_clean_up)
    _cleanups.append(cleanup)


def _clean_up() -> None:
    while _cleanups:
        _cleanups.pop()()


@contextmanager
def exit_together():
    """Around all that a program does which joins the ranks: here it ends, and with it the process.

    Nothing behind it runs.

    | the block | the status | who waits |
    |---|---|---|
    | ends | 0 | the ranks for each other, in a collective operation; then rank 0 for the others |
    | `sys.exit(status)` | `status` | rank 0 for the others, if it is 0 |
    | raises | 1, with a traceback | nobody |
    | raises `Stop` | its own, with one line | nobody |
    | Ctrl-C | SIGINT, with a traceback | nobody |
    """
    with collective_region():
        status = 0
        try:
            yield
            _meet_at_end()
        except SystemExit as stop:
            status = _status_of(stop)
        except KeyboardInterrupt:
            traceback.print_exc()
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            # a shell that runs a script of commands wants to know that it was Ctrl-C
            _end_now(-signal.SIGINT)
        _end_orderly(status)


def _meet_at_end() -> None:
    """Nobody leaves while another is in a collective operation.

    An engine of vllm 0.32 that is freed, as when `main` returns, takes all groups of its process
    with it. The store stays.
    """
    if dist.is_initialized():
        barrier()
    elif _store is not None and world_size() > 1:
        _store.set(f"opd/done/{rank()}", "")
        _store.wait([f"opd/done/{other}" for other in range(world_size())], COLLECTIVE_TIMEOUT)


def _status_of(stop: SystemExit) -> int:
    """As the interpreter has it: nothing is 0, and a text goes to stderr and is 1."""
    if stop.code is None or isinstance(stop.code, int):
        return stop.code or 0
    print(stop.code, file=sys.stderr)
    return 1


def _end_orderly(status: int) -> NoReturn:
    """Ends this process as multiprocessing ends its children: by what runs at an exit, and without
    the interpreter's teardown.

    That would destroy the groups' C++ objects while their threads run (torch 2.13), and now and
    then abort a finished run: "terminate called without an active exception". The hooks come first:
    vllm 0.32's raise if the groups are gone.
    """
    threading._shutdown()
    atexit._run_exitfuncs()
    if dist.is_initialized():
        dist.destroy_process_group()
    if _store is not None and status == 0 and world_size() > 1:
        _end_last(_store)
    _end_now(status)


def _end_last(store: dist.Store) -> None:
    """Rank 0 returns when the others are here: it may hold the store, of whose loss their libraries
    would complain.
    """
    # one that does not come, or a store that is gone: this rank is done
    with suppress(RuntimeError):
        if rank() > 0:
            store.set(f"opd/ended/{rank()}", "")
        else:
            others = [f"opd/ended/{other}" for other in range(1, world_size())]
            store.wait(others, datetime.timedelta(seconds=LAST_SECONDS))


def _end_now(status: int) -> NoReturn:
    """Ends this process, after `at_end`'s cleanups, with a status, or by the signal -`status`."""
    _clean_up()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # nobody reads it any more, or it is closed
            stream.flush()
    if status < 0:
        os.kill(os.getpid(), -status)
    os._exit(status & 0xFF)


@contextmanager
def collective_region():
    """Ends this process at once on an exception that the ranks could not agree on.

    Inside a collective region (forward, backward, weight gathering, a tensor-parallel engine at
    work) the others cannot be asked. A rank that leaves with a non-zero status makes every launcher
    end the rest within seconds; an orderly shutdown would wait for them instead.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        if not isinstance(error, Stop):
            traceback.print_exc()
        # what the user needs, below all that he does not; a run that was asked to stop has said so
        is_said = isinstance(error, Stop) and error.status < 0
        if rank() == 0 and not is_said and (was_agreed(error) or isinstance(error, Stop)):
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        _end_now(error.status if isinstance(error, Stop) else 1)


def fold_seed(*parts) -> int:
    """A 63-bit seed that is a function of its parts: (seed, step, prompt id, purpose, ...)."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def resolve_dtype(name: str) -> torch.dtype:
    """auto is bfloat16 on a GPU and float32 on a CPU."""
    if name == "auto":
        name = "bfloat16" if torch.cuda.is_available() else "float32"
    return getattr(torch, name)
