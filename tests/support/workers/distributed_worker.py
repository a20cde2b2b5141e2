"""One rank of a launcher: `distributed_worker.py MODE OUT`.

Each mode does one thing that a test then looks at.
"""

import argparse
import atexit
import json
import os
import time
from pathlib import Path

from opd import distributed, processes


def raised_by(work) -> str:
    try:
        with distributed.agree_on_error("the work"):
            work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def agree(out: Path) -> None:
    """What each rank sees of an error on rank 1, on both, on none; then reductions, which need all
    ranks alive.
    """
    rank = distributed.rank()

    def fail(error):
        raise error

    seen = {
        "one": raised_by(lambda: fail(RuntimeError("engine lost")) if rank == 1 else None),
        "both": raised_by(lambda: fail(OSError(f"disk {rank}"))),
        "user": raised_by(lambda: fail(ValueError("--flag 1: wrong"))),
        "user_on_one": raised_by(
            lambda: fail(ValueError("--flag 1: wrong")) if rank == 1 else None
        ),
        "none": raised_by(lambda: None),
        "sum": distributed.all_reduce([rank + 1.0, 0.1]),
        "max": distributed.all_reduce([float(rank)], "max"),
        "gathered": distributed.gather_objects({"rank": rank}),
        "broadcast": distributed.broadcast_object(f"from {rank}"),
    }
    distributed.barrier()
    (out / f"agree_{rank}.json").write_text(json.dumps(seen))


def micro_batches(out: Path) -> None:
    """Five responses on rank 0, one on rank 1, two to a micro-batch."""
    import torch

    from opd.padding import count_loss_tokens, make_micro_batches
    from opd.types import Prompt, Rollout, TeacherScores

    rank = distributed.rank()
    lengths = [1, 2, 3, 4, 5] if rank == 0 else [7]
    rollouts = [
        Rollout(
            sample_id=f"0/{i}/0",
            prompt=Prompt(prompt_id=i, domain="d", token_ids=[1, 2]),
            source="dataset",
            response_ids=[3] * length,
            rollout_logprobs=None,
            finish_reason="stop",
            policy_version=0,
        )
        for i, length in enumerate(lengths)
    ]
    scores = [
        (TeacherScores(teacher="t", weight=1.0, hidden=torch.zeros(length, 4)),)
        for length in lengths
    ]
    batches = make_micro_batches(rollouts, scores, micro_batch_size=2, pad_id=0, domains=["d"])
    counts = {
        "per_batch": [mb.num_loss_tokens for mb in batches],
        "total": count_loss_tokens(batches),
    }
    (out / f"micro_batches_{rank}.json").write_text(json.dumps(counts))


def crash(out: Path) -> None:
    """Rank 1 fails where the others cannot be asked: they are in a collective.

    Nobody leaves by an orderly shutdown.
    """

    def wait_for_the_others():
        time.sleep(600)

    atexit.register(wait_for_the_others)
    if distributed.rank() == 1:
        (out / "crashed_at").write_text(str(time.time()))
        raise RuntimeError("lost in the forward pass")
    distributed.all_reduce([1.0])


def wait(out: Path) -> None:
    """Works until the launcher is gone."""
    processes.die_with_launcher()
    distributed.barrier()
    pid_file = out / f"pid_{distributed.rank()}"
    pid_file.with_suffix(".tmp").write_text(str(os.getpid()))
    pid_file.with_suffix(".tmp").rename(pid_file)
    time.sleep(600)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("mode", choices=["agree", "crash", "wait"])
    parser.add_argument("out", type=Path)
    parser.add_argument("--local_rank", type=int, default=-1)
    args = parser.parse_args()
    distributed.init(args.local_rank)
    if args.mode == "agree":
        agree(args.out)
        micro_batches(args.out)
    elif args.mode == "crash":
        crash(args.out)
    else:
        wait(args.out)


if __name__ == "__main__":
    with distributed.exit_together():
        main()
