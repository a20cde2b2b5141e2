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
    same order everywhere, for this step and the next ones; without it a teacher never stays awake.
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
        lookahead: int = 3,
    ):
        self.rollout_engine, self.student, self.ledger = rollout_engine, student, ledger
        self.teachers = {teacher.name: teacher for teacher in teachers}
        self.spare, self.needs, self.lookahead = dict(spare or {}), needs, lookahead
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
        needs = [list(self.needs(step + ahead)) for ahead in range(self.lookahead)]
        room = min((self.spare.get(phase, 0) for phase in TABLE), default=0)
        may_stay = {
            n: t.bytes_awake
            for n, t in self.teachers.items()
            if t.can_sleep and t.bytes_awake <= room
        }
        now, following = wake_orders(needs, may_stay, awake=self._planned)[:2]
        stays = (
            now[-1]
            if now and following and now[-1] == following[0] and now[-1] in may_stay
            else None
        )
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


def wake_orders(
    needs: Sequence[Collection[str]], cost: Mapping[str, float], *, awake: str | None = None
) -> list[list[str]]:
    """The cheapest orders: for each step, the teachers that it needs in the order of their turns.

    `needs` are the teachers of this step and of those that follow, as far as one looks ahead;
    `cost` is what waking a teacher costs (bytes or seconds) and names the only ones that may stay
    awake between steps; `awake` is the one that is awake now. Exact over the steps given, by
    dynamic programming over who stays awake after each step. Of equal orders the one that keeps the
    given order of `needs` most is taken, so all ranks agree.

        >>> wake_orders([["a", "b"], ["b", "c"]], {"a": 1, "b": 5, "c": 2}, awake="a")
        [['a', 'b'], ['b', 'c']]
    """
    # stays[i]: who may be awake between step i - 1 and step i -> (what is saved from there back,
    # the choice before it)
    stays: list[dict[str | None, tuple[float, str | None]]] = [{awake: (0.0, None)}]
    for index, needed in enumerate(needs):
        following = needs[index + 1] if index + 1 < len(needs) else ()
        choices: dict[str | None, tuple[float, str | None]] = {}
        for last in (None, *(name for name in needed if name in following and name in cost)):
            for first, (saved, _) in stays[-1].items():
                if first is not None and first == last and len(needed) > 1:
                    continue  # it cannot have both the first and the last turn
                gain = saved + (cost[first] if first in needed and first in cost else 0.0)
                if last not in choices or gain > choices[last][0]:
                    choices[last] = (gain, first)
        stays.append(choices)
    last = max(stays[-1], key=lambda name: stays[-1][name][0])
    orders = []
    for index in reversed(range(len(needs))):
        first = stays[index + 1][last][1]
        ends = [name for name in (first, last) if name is not None]
        middle = [name for name in needs[index] if name not in ends]
        head = [first] if first in needs[index] else []
        tail = [last] if last is not None and last != first else []
        orders.append([*head, *middle, *tail])
        last = first
    return orders[::-1]
