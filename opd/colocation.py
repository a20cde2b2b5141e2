"""Who is awake when, on GPUs that student, rollout engine and teachers share.

| phase   | rollout weights | rollout KV cache | optimizer states | teachers                               |
|---------|-----------------|------------------|------------------|----------------------------------------|
| rollout | awake           | awake            | host             | asleep                                 |
| score   | asleep          | discarded        | host             | one awake at a time, each once         |
| train   | asleep          | discarded        | GPU              | asleep; one teacher's `lm_head` at most |
| sync    | awake           | discarded        | host             | asleep                                 |

The rollout engine sleeps at level 2, which drops its weights: they are due to be replaced. So after `train` the next phase
that wakes it is `sync`, never `rollout`, and the table refuses anything else. On a CPU the same calls are made and vLLM
ignores them; the table and the ledger still hold.
"""

import json
import resource
import time
from contextlib import contextmanager
from pathlib import Path

import torch

from opd.types import Offloadable, Sleeper

# phase -> phases that may come before it
FOLLOWS = {
    "rollout": ("sync", "rollout"),
    "score": ("rollout", "score", "sync"),
    "train": ("score",),
    "sync": ("start", "train", "score", "rollout"),
}


class Colocation:
    """Enters and leaves phases; writes a line to `ledger.jsonl` at each entry and exit."""

    def __init__(
        self, rollout_engine: Sleeper, student: Offloadable, teachers: list[Sleeper], ledger: Path | None, rank: int = 0
    ):
        self.rollout_engine = rollout_engine
        self.student = student
        self.teachers = teachers
        self.ledger = ledger
        self.rank = rank
        self.last = "start"
        self._step = -1

    @contextmanager
    def step(self, step: int):
        """Marks the ledger's lines with the step they belong to."""
        self._step = step
        yield

    @contextmanager
    def phase(self, name: str):
        """`with colocation.phase("rollout"): ...`. On an exception everything that the phase woke is put to sleep."""
        if self.last not in FOLLOWS[name]:
            raise RuntimeError(f"phase {name} after {self.last}: allowed after {', '.join(FOLLOWS[name])}")
        started = time.perf_counter()
        try:
            self._enter(name)
            self._record(name, "enter", 0.0)
            yield
        except BaseException:
            self._sleep_all()
            self.last = "start"
            raise
        self._record(name, "exit", time.perf_counter() - started)
        self.last = name

    def _enter(self, name: str) -> None:
        if name == "rollout":
            if self.last == "sync":
                self.rollout_engine.wake(["kv_cache"])
            return
        if name == "sync":
            self.student.offload()
            self.rollout_engine.sleep()
            self.rollout_engine.wake(["weights"])
            return
        self.rollout_engine.sleep()
        if name == "train":
            self.student.reload()

    def _sleep_all(self) -> None:
        self.rollout_engine.sleep()
        for teacher in self.teachers:
            teacher.sleep()

    def _record(self, name: str, event: str, seconds: float) -> None:
        if self.ledger is None:
            return
        cuda = torch.cuda.is_available()
        line = {
            "rank": self.rank,
            "step": self._step,
            "phase": name,
            "event": event,
            "seconds": round(seconds, 4),
            "awake": [s.name for s in [self.rollout_engine, *self.teachers] if getattr(s, "awake", False)],
            "gpu_allocated": torch.cuda.memory_allocated() if cuda else 0,
            "gpu_reserved": torch.cuda.memory_reserved() if cuda else 0,
            "gpu_free": torch.cuda.mem_get_info()[0] if cuda else 0,
            "host_peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
        with self.ledger.open("a") as file:
            file.write(json.dumps(line) + "\n")
