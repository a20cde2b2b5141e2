"""Who is awake when, on GPUs that student, rollout engine and teachers share.

| phase   | rollout weights | rollout KV cache | optimizer states | parameters     | teachers                    |
|---------|-----------------|------------------|------------------|----------------|-----------------------------|
| rollout | awake           | awake            | host             | GPU, else host | asleep                      |
| score   | asleep          | discarded        | host             | GPU, else host | one at a time, each once    |
| train   | asleep          | discarded        | GPU              | GPU            | asleep                      |
| sync    | awake           | discarded        | host             | GPU            | asleep                      |

The rollout engine sleeps at level 2, which drops its weights: they are due to be replaced. So after
`train` the next phase that wakes it is `sync`, never `rollout`, and the table refuses anything
else. "Optimizer states" are the AdamW moments, float32 masters and gradients; parameters leave with
them only where `--offload_student all` says so.

Three things bend the table where memory is to spare, and only there. The teacher that had the last
turn keeps its weights (never its KV cache) until the next step, if it will have the first turn. The
next teacher's weights arrive while one is scoring. The optimizer states leave during the weight
sync instead of before it.

On a CPU the same calls are made. vLLM's engines keep their memory there and say so once; `backend:
hf` teachers give theirs back.
"""  # noqa: E501

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from opd.records.memory_ledger import Ledger
from opd.types import Offloadable, Sleeper, TeacherSleeper


@dataclass(frozen=True)
class PhaseRow:
    """One phase of the table."""

    after: tuple[str, ...]  # the phases that may come before it
    rollout: frozenset[str]  # the parts of the rollout engine that are awake
    states: bool  # whether the student's optimizer states are on the GPU
    parameters: bool  # whether the student's parameters must be


TABLE = {
    "rollout": PhaseRow(
        ("sync", "rollout"), frozenset({"weights", "kv_cache"}), states=False, parameters=False
    ),
    "score": PhaseRow(("rollout", "score", "sync"), frozenset(), states=False, parameters=False),
    "train": PhaseRow(("score",), frozenset(), states=True, parameters=True),
    "sync": PhaseRow(
        ("start", "train", "score", "rollout"),
        frozenset({"weights"}),
        states=False,
        parameters=True,
    ),
}


class Colocation:
    """Enters and leaves phases, gives the teachers their turns, and writes the ledger.

    `spare` are the bytes of a GPU that the plan leaves free in each phase; without it nothing
    overlaps. `needs(step)` names the teachers that a step needs, on all ranks together and in the
    same order everywhere, for this step and the next; without it a teacher never stays awake.
    """

    def __init__(
        self,
        rollout_engine: Sleeper,
        student: Offloadable,
        teachers: Sequence[TeacherSleeper],
        ledger: Ledger,
        *,
        spare: Mapping[str, int] | None = None,
        needs: Callable[[int], Collection[str]] | None = None,
    ):
        self.rollout_engine, self.student, self.ledger = rollout_engine, student, ledger
        self.teachers = {teacher.name: teacher for teacher in teachers}
        self.spare, self.needs = dict(spare or {}), needs
        self.last, self.current = "start", None
        self._kept: str | None = None  # the teacher whose weights wait here for the next step
        self._planned: str | None = (
            None  # the one that waits on the ranks that had work for it: the same everywhere
        )

    @contextmanager
    def step(self, step: int):
        """Marks the ledger's lines with the step they belong to."""
        self.ledger.step = step
        yield

    @contextmanager
    def phase(self, name: str):
        """`with colocation.phase("rollout"): ...`.

        Any exception, also one while entering, leaves everything asleep.

        Raises RuntimeError where the table does not allow `name` now; nothing has moved then.
        """
        if self.current is not None:
            raise RuntimeError(f"phase {name} inside {self.current}: leave that one first")
        if name not in TABLE:
            raise RuntimeError(f"phase {name}: there are only {', '.join(TABLE)}")
        if self.last not in TABLE[name].after:
            raise RuntimeError(
                f"phase {name} after {self.last}: allowed after {', '.join(TABLE[name].after)}"
            )
        self.current = name
        try:
            self.ledger.begin()
            self._enter(TABLE[name])
            self.ledger.enter(name, self.awake)
            yield
            self.student.settle()
            self.ledger.leave(name, self.awake)
        except BaseException as error:
            self._sleep_all(error)
            self.last = "start"
            raise
        finally:
            self.current = None
        self.last = name

    def turns(self, names: Collection[str]) -> Iterator[str]:
        """The teachers of the step one by one, each awake until the next is asked for; inside the
        score phase.

        `names` are those with work on this rank. Ranks that name the same teachers get them in the
        same order.
        """
        assert self.current == "score", (
            f"teachers have their turns in the score phase, not in {self.current}"
        )
        order, stays = self._order(names)
        if self._kept is not None and order[:1] != [self._kept]:
            self._put_to_sleep(self._kept)
        for place, name in enumerate(order):
            teacher, following = self.teachers[name], order[place + 1 : place + 2]
            started = time.perf_counter()
            teacher.wake()
            self._kept = None
            self.ledger.turn("score", f"wake {name}", self.awake, time.perf_counter() - started)
            if following:
                self._prefetch(self.teachers[following[0]])
            yield name
            self.ledger.turn("score", f"done {name}", self.awake)
            if name == stays:
                teacher.rest()
                self._kept = name
            else:
                teacher.sleep()

    @property
    def awake(self) -> list[str]:
        """The names of all engines that hold their weights on the device."""
        return [
            engine.name for engine in (self.rollout_engine, *self.teachers.values()) if engine.awake
        ]

    def close(self) -> None:
        """Everything to sleep: the run is over."""
        self._sleep_all(None)
        self.last = "start"

    def _order(self, names: Collection[str]) -> tuple[list[str], str | None]:
        """This step's turns, and who stays awake after the last."""
        step = self.ledger.step
        if self.needs is None or step < 0:
            return [name for name in self.teachers if name in names], None
        room = min((self.spare.get(phase, 0) for phase in TABLE), default=0)
        may_stay = {
            n: t.bytes_awake
            for n, t in self.teachers.items()
            if t.can_sleep and t.bytes_awake <= room
        }
        needed, following = list(self.needs(step)), self.needs(step + 1)
        now, stays = turn_order(needed, following, may_stay, self._planned)
        self._planned = stays
        return [name for name in now if name in names], stays

    def _prefetch(self, teacher: TeacherSleeper) -> None:
        """Only a saving of time: what does not fit after all is left for `wake` to say."""
        if teacher.bytes_prefetched <= self.spare.get("score", 0):
            with suppress(RuntimeError):
                teacher.prefetch()

    def _enter(self, row: PhaseRow) -> None:
        """Makes room first, then fills it. What the table wants awake already is not touched."""
        if row.states:
            self.rollout_engine.sleep()
            self.student.place(states=True, parameters=True)
            return
        leaving = self.student.place(states=False, parameters=row.parameters)
        if not row.rollout:
            self.rollout_engine.sleep()
        elif "kv_cache" not in row.rollout:
            self.rollout_engine.sleep()  # weights and cache: a load never meets a live cache
            kept = self.teachers[self._kept].bytes_awake if self._kept is not None else 0
            if kept + leaving > self.spare.get("sync", 0):
                self.student.settle()
            self.rollout_engine.wake(["weights"])
            return  # what still leaves has until the end of the phase
        self.student.settle()
        if row.rollout and self.last == "sync":
            self.rollout_engine.wake(["kv_cache"])

    def _put_to_sleep(self, name: str) -> None:
        self.teachers[name].sleep()
        self._kept = None

    def _sleep_all(self, cause: BaseException | None) -> None:
        """Each engine has its own chance: one that fails to sleep does not keep the
        others awake.
        """
        self._kept = self._planned = None
        failures = []
        for engine in (self.rollout_engine, *self.teachers.values()):
            try:
                engine.sleep()
            except BaseException as error:  # an impatient second Ctrl-C too
                failures.append(error)
                if cause is not None:
                    cause.add_note(f"{engine.name} could not be put to sleep: {error}")
        if failures and cause is None:
            raise failures[0]


def turn_order(
    needed: Sequence[str], following: Collection[str], cost: Mapping[str, float], awake: str | None
) -> tuple[list[str], str | None]:
    """The turns of the teachers that a step needs, and who stays awake after the last one.

    The one that is still `awake` begins, and the costliest to wake of those that the next step
    needs too ends: each saves a wake. `cost` is what waking takes (bytes) and names the only ones
    that may stay awake. The other turns keep the order of `needed`, so all ranks agree.

        >>> turn_order(["a", "b", "c"], ["b", "c"], {"b": 5, "c": 2}, awake="c")
        (['c', 'a', 'b'], 'b')
    """
    first = awake if awake in needed else None
    may_end = [
        n for n in needed if n in following and n in cost and (n != first or len(needed) == 1)
    ]
    last = max(may_end, key=lambda name: cost[name], default=None)
    middle = [name for name in needed if name not in (first, last)]
    ends = [last] if last is not None and last != first else []
    return [*([first] if first else []), *middle, *ends], last
