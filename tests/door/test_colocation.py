"""The phase table: who is awake when, which orders are refused, and what an exception leaves
behind.

The participants are plain objects that keep books; real engines follow the same calls in
test_engines.py and in the runs of test_trainers.py.
"""

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd.colocation import TABLE, Colocation
from opd.records.memory_ledger import Ledger

BOTH = {"weights", "kv_cache"}
PHASES = ("rollout", "score", "train", "sync")
STEP = ("rollout", "score", "train", "sync")
ALLOWED = {
    "rollout": {"sync", "rollout"},
    "score": {"rollout", "score", "sync"},
    "train": {"score"},
    "sync": {"start", "train", "score", "rollout"},
}
TEACHERS = ("math", "code", "law")


class Boom(Exception):
    pass


class Engine:
    """Starts asleep, as the trainers build it; wakes by tag.

    Raises when `house.fuse` burns down.
    """

    can_sleep = True

    def __init__(self, name: str, house: "House", bytes_awake: int = 100):
        self.name, self.house, self.bytes_awake = name, house, bytes_awake
        self.bytes_prefetched = bytes_awake
        self.up: set[str] = set()
        self.fetched = False

    @property
    def awake(self) -> bool:
        return "weights" in self.up

    def sleep(self) -> None:
        if self.up or self.fetched:
            self.house.note(self.name, "sleep")
        self.up, self.fetched = set(), False

    def rest(self) -> None:
        self.house.note(self.name, "rest")
        self.up -= {"kv_cache"}

    def prefetch(self) -> None:
        self.house.note(self.name, "prefetch")
        self.fetched = True

    def wake(self, tags: list[str] | None = None) -> None:
        new = set(tags or BOTH) - self.up
        if new:
            self.house.note(self.name, "wake", *sorted(new))
        self.up |= new
        self.fetched = False
        self.house.burn()
        self.house.check_caches()


class Student:
    def __init__(self, house: "House"):
        self.house, self.states, self.parameters, self.leaving = house, True, True, 0

    def place(self, *, states: bool, parameters: bool) -> int:
        self.house.burn()
        if (states, parameters) != (self.states, self.parameters):
            self.house.note("student", "place", states, parameters)
        self.leaving = 60 if self.states and not states else self.leaving
        self.states, self.parameters = states, parameters
        return self.leaving

    def settle(self) -> None:
        if self.leaving:
            self.house.note("student", "settle")
        self.leaving = 0


class House:
    """A colocation with its participants, and one list of everything that happened."""

    def __init__(self, path=None, rank=0, **options):
        self.events, self.fuse = [], None
        self.rollout, self.student = Engine("rollout", self), Student(self)
        self.teachers = [
            Engine(name, self, size) for name, size in zip(TEACHERS, (100, 50, 200), strict=True)
        ]
        self.ledger = Ledger(path, rank)
        self.colocation = Colocation(
            self.rollout, self.student, self.teachers, self.ledger, **options
        )

    def note(self, *event) -> None:
        self.events.append(event)

    def burn(self) -> None:
        if self.fuse is not None:
            self.fuse -= 1
            if self.fuse < 0:
                self.fuse = None
                raise Boom

    def check_caches(self) -> None:
        caches = [
            engine.name for engine in (self.rollout, *self.teachers) if "kv_cache" in engine.up
        ]
        assert len(caches) <= 1, f"two KV caches awake: {caches}"

    def run(self, *phases: str, names=TEACHERS) -> None:
        for phase in phases:
            with self.colocation.phase(phase):
                self.check(phase)
                self.burn()
                if phase == "score":
                    for name in self.colocation.turns(names):  # as TeacherPool.score does
                        up = [t.name for t in self.teachers if t.up == BOTH]
                        assert up == [name] and not self.rollout.up
                        self.burn()

    def check(self, phase: str) -> None:
        """The table of the module, row by row."""
        rollout_up = {"rollout": BOTH, "score": set(), "train": set(), "sync": {"weights"}}[phase]
        assert self.rollout.up == rollout_up, f"{phase}: {self.rollout.up}"
        assert self.student.states == (phase == "train"), phase
        assert self.student.parameters or phase in ("rollout", "score"), phase
        assert not any("kv_cache" in teacher.up for teacher in self.teachers), phase
        assert sum(teacher.awake for teacher in self.teachers) <= bool(self.colocation.spare), phase

    @property
    def asleep(self) -> bool:
        return not any(engine.up or engine.fetched for engine in (self.rollout, *self.teachers))

    def of(self, name: str) -> list[tuple]:
        return [event[1:] for event in self.events if event[0] == name]


def roomy(num_bytes: int) -> dict[str, int]:
    return dict.fromkeys(PHASES, num_bytes)


def everyone(step: int) -> tuple[str, ...]:
    return TEACHERS


# ---- The table -----------------------------------------------------------------------------------


def test_the_table_over_steps_and_evaluations():
    house = House()
    house.run("sync", "rollout")  # the first push, and the evaluation before the first step
    for _ in range(3):
        house.run(*STEP)
    house.run("rollout")  # an evaluation after a step
    house.run(*STEP)
    assert house.of("student").count(("place", True, True)) == 4
    for name in TEACHERS:
        assert house.of(name) == [("wake", "kv_cache", "weights"), ("sleep",)] * 4, (
            "each wakes once per step"
        )


def test_score_may_come_in_parts_and_sync_may_come_early():
    house = House()
    house.run(
        "sync",
        "rollout",
        "rollout",
        "score",
        "score",
        "train",
        "sync",
        "score",
        "sync",
        "rollout",
        "sync",
    )
    for name in TEACHERS:
        assert house.of(name).count(("sleep",)) == 3, (
            "each score phase wakes it once, and lets it sleep"
        )


@pytest.mark.parametrize("order", list(itertools.product(PHASES, repeat=3)), ids="-".join)
def test_every_order_of_three_phases_is_legal_or_refused(order):
    """Never a state outside the table; a phase that would sample from dropped weights is refused
    before it begins.
    """
    house, last = House(), "start"
    for phase in ("sync", *order):
        if last not in ALLOWED[phase]:
            events = list(house.events)
            with pytest.raises(RuntimeError, match=f"phase {phase} after {last}: allowed after"):
                house.run(phase)
            assert house.events == events, "nothing moved"
            return
        house.run(phase)
        last = phase


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(PHASES),
            st.sets(st.sampled_from(TEACHERS)),
            st.none() | st.integers(0, 8),
        ),
        max_size=25,
    ),
    st.sampled_from([0, 60, 150, 1000]),
)
def test_random_sequences_with_failures(actions, spare):
    """Whatever is asked and whatever fails: the table holds, a failure leaves all asleep, and only
    a push heals it.
    """
    house, last, step = House(spare=roomy(spare) if spare else None, needs=everyone), "start", 0
    for phase, names, fuse in actions:
        house.ledger.step, house.fuse = step, fuse
        if last not in ALLOWED[phase]:
            with pytest.raises(RuntimeError, match=f"phase {phase} after {last}"):
                house.run(phase)
            continue
        try:
            house.run(phase, names=names)
        except Boom:
            assert house.asleep, [(e.name, e.up) for e in house.teachers]
            last = "start"
        else:
            last, step = phase, step + (phase == "sync")
        house.fuse = None
    house.colocation.close()
    assert house.asleep


def test_a_push_comes_first():
    """The engine is built with the weights of a file, and they are dropped."""
    assert set(TABLE) == set(PHASES)
    for phase in ("rollout", "score", "train"):
        with pytest.raises(RuntimeError, match=f"phase {phase} after start: allowed after"):
            House().run(phase)


def test_a_phase_that_is_not_there():
    with pytest.raises(
        RuntimeError, match="phase dream: there are only rollout, score, train, sync"
    ):
        House().run("dream")


def test_no_phase_inside_another():
    house = House()
    with house.colocation.phase("sync"):
        with (
            pytest.raises(RuntimeError, match="phase rollout inside sync"),
            house.colocation.phase("rollout"),
        ):
            pass
        assert house.rollout.up == {"weights"}, "the outer phase goes on"
    house.run("rollout")


def test_turns_are_for_the_score_phase():
    house = House()
    house.run("sync")
    with pytest.raises(AssertionError, match="in the score phase"):
        next(house.colocation.turns(TEACHERS))


def test_the_weights_are_loaded_before_the_cache_wakes():
    house = House()
    house.run("sync", *STEP, "rollout")
    push = [("wake", "weights"), ("wake", "kv_cache")]
    assert house.of("rollout") == [*push, ("sleep",), *push]


def test_optimizer_states_have_left_before_the_engine_wakes():
    house = House()
    house.run("sync", *STEP)
    train = house.events.index(("student", "place", True, True))
    assert house.events[train:] == [
        ("student", "place", True, True),
        ("student", "place", False, True),
        ("student", "settle"),
        ("rollout", "wake", "weights"),
    ]
    assert ("rollout", "sleep") in house.events[:train]


def test_optimizer_states_leave_while_the_engine_wakes_if_both_fit():
    house = House(spare=roomy(60))
    house.run("sync", *STEP)
    assert house.events[-3:] == [
        ("student", "place", False, True),
        ("rollout", "wake", "weights"),
        ("student", "settle"),
    ]


# ---- Turns ---------------------------------------------------------------------------------------


def steps(house: House, count: int, names=TEACHERS) -> None:
    house.run("sync")
    for step in range(count):
        with house.colocation.step(step):
            house.run(*STEP, names=names)


def test_without_room_every_teacher_sleeps():
    house = House(needs=everyone)
    steps(house, 3)
    assert not any(event[1] in ("rest", "prefetch") for event in house.events)
    assert all(house.of(name).count(("sleep",)) == 3 for name in TEACHERS)


def test_the_last_teacher_stays_for_the_next_step():
    house = House(needs=everyone, spare={"rollout": 250, "score": 0, "train": 250, "sync": 250})
    steps(house, 1)
    assert not any(event[1] == "rest" for event in house.events), "it must fit in every phase"

    house = House(needs=everyone, spare=roomy(250))
    steps(house, 6)
    rests = [event[0] for event in house.events if event[1] == "rest"]
    assert len(rests) == 6 and {"law"} < set(rests), "the largest, by turns with the next"
    full_wakes = sum(event[1:] == ("wake", "kv_cache", "weights") for event in house.events)
    assert full_wakes == 3 * 6 - 5, "each step but the first begins with one that is awake"


def test_one_that_stayed_for_a_step_without_it_goes_to_sleep():
    house = House(needs=lambda step: ("math", "law") if step < 2 else ("code",), spare=roomy(250))
    house.run("sync")
    with house.colocation.step(0):
        house.run(*STEP, names=("math", "law"))
    kept = [teacher for teacher in house.teachers if teacher.awake]
    assert len(kept) == 1
    with house.colocation.step(2):  # a resume may jump
        house.run(*STEP, names=("code",))
    assert not kept[0].awake


def test_a_teacher_that_is_too_large_does_not_stay():
    house = House(needs=everyone, spare=roomy(120))
    steps(house, 3)
    assert {event[0] for event in house.events if event[1] == "rest"} <= {"math", "code"}


def test_the_next_teacher_is_fetched_while_one_scores():
    house = House(spare={"score": 60})
    house.run("sync", *STEP)
    assert house.of("code")[:2] == [("prefetch",), ("wake", "kv_cache", "weights")]
    assert ("prefetch",) not in house.of("math") + house.of("law"), (
        "the first has nobody before it; the last is too large"
    )


def test_what_takes_no_memory_is_fetched_without_room():
    """A teacher on the disk asks the kernel to read ahead."""
    house = House()
    house.teachers[1].bytes_prefetched = 0
    house.run("sync", *STEP)
    assert house.of("code")[0] == ("prefetch",) and ("prefetch",) not in house.of("law")


def test_a_prefetch_that_fails_is_left_to_the_wake():
    house = House(spare={"score": 1000})
    house.run("sync", "rollout")

    def full():
        raise RuntimeError("out of memory")

    house.teachers[1].prefetch = full
    house.run("score")
    assert house.of("code")[0] == ("wake", "kv_cache", "weights")


def test_what_a_teacher_that_stays_takes_is_not_spare_any_more():
    house = House(needs=lambda step: ("math",), spare=roomy(120))  # math stays with 100, 60 leave
    house.run("sync")
    with house.colocation.step(0):
        house.run(*STEP, names=("math",))
    assert house.of("math")[-1] == ("rest",)
    assert house.events[-2:] == [("student", "settle"), ("rollout", "wake", "weights")]


def test_only_teachers_with_work_have_a_turn():
    house = House()
    house.run("sync", "rollout")
    house.run("score", names=["law"])
    assert house.of("math") == house.of("code") == [] and len(house.of("law")) == 2


def test_ranks_that_share_a_teacher_wake_it_in_the_same_order():
    """Rank 0 has work for `math`, rank 1 for `law`, and both take part in `code`."""
    orders = []
    for mine in (["math", "code"], ["code", "law"]):
        house = House(needs=everyone, spare=roomy(250))
        steps(house, 3, names=mine)
        orders.append(
            [event[0] for event in house.events if event[0] in TEACHERS and event[1] == "wake"]
        )
        assert [name for name, *event in house.events if event == ["rest"]].count("code") <= 3
    both = [[name for name in order if name == "code"] for order in orders]
    assert both[0] == both[1] == ["code"] * 3


# ---- Failures ------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sets(st.sampled_from(TEACHERS), min_size=1),
            *[st.sets(st.sampled_from(TEACHERS))] * 2,
        ),
        max_size=8,
    )
)
def test_ranks_agree_on_a_shared_teacher(schedule):
    """Whatever else has work on a rank: `code` is woken, from sleep or from rest, by both ranks or
    by none.
    """
    seen = []
    for rank in (0, 1):
        house = House(
            needs=lambda step: [
                n for n in TEACHERS if step < len(schedule) and n in schedule[step][0]
            ],
            spare=roomy(250),
        )
        house.run("sync")
        for step, (needed, *mine) in enumerate(schedule):
            names = [n for n in TEACHERS if n in needed and (n in mine[rank] or n == "code")]
            with house.colocation.step(step):
                house.run(*STEP, names=names)
        seen.append([event for event in house.of("code") if event[0] != "prefetch"])
    assert seen[0] == seen[1]


@pytest.mark.parametrize("phase", PHASES)
def test_a_failure_at_the_exit_of_a_phase_leaves_everything_asleep(phase, monkeypatch):
    house = House()
    if phase != "sync":
        house.run("sync", *itertools.takewhile(lambda p: p != phase, STEP))

    def full(*args):
        raise OSError("the disk is full")

    monkeypatch.setattr(house.ledger, "leave", full)
    with pytest.raises(OSError):
        house.run(phase)
    assert house.asleep and house.colocation.last == "start"


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit, RuntimeError])
@pytest.mark.parametrize("phase", PHASES)
def test_an_exception_leaves_everything_asleep(phase, error):
    house = House()
    if phase != "sync":
        house.run("sync", *itertools.takewhile(lambda p: p != phase, STEP))
    with pytest.raises(error), house.colocation.phase(phase):
        if phase == "score":
            next(house.colocation.turns(TEACHERS))
        raise error
    assert house.asleep
    for other in ("rollout", "score", "train"):
        with pytest.raises(RuntimeError, match=f"phase {other} after start"):
            house.run(other)
    house.run("sync", *STEP)  # a push heals it


def test_an_engine_that_cannot_wake_leaves_everything_asleep():
    house = House()
    house.run("sync")
    house.fuse = 1  # the student's move goes well
    with pytest.raises(Boom):
        house.run("rollout")
    assert house.asleep


def test_one_that_cannot_sleep_does_not_keep_the_others_awake():
    house = House()
    house.run("sync", "rollout")

    def stuck():
        raise RuntimeError("driver lost")

    house.rollout.sleep = stuck
    with pytest.raises(KeyboardInterrupt) as caught, house.colocation.phase("rollout"):
        house.teachers[2].wake(["weights"])
        raise KeyboardInterrupt
    assert caught.value.__notes__ == ["rollout could not be put to sleep: driver lost"]
    assert not any(teacher.up for teacher in house.teachers)


# ---- The ledger ----------------------------------------------------------------------------------


def test_ledger(tmp_path):
    path = tmp_path / "ledger.jsonl"
    house = House(path, rank=3)
    house.run("sync")
    for step in range(2):
        with house.colocation.step(step):
            house.run(*STEP, names=["math"])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    events = {phase: ("enter", "exit") for phase in PHASES} | {
        "score": ("enter", "wake math", "done math", "exit")
    }
    assert [(x["step"], x["phase"], x["event"]) for x in lines] == [
        (step, phase, event)
        for step, phases in ((-1, ("sync",)), (0, STEP), (1, STEP))
        for phase in phases
        for event in events[phase]
    ]
    assert {line["rank"] for line in lines} == {3}
    awake = {(line["phase"], line["event"]): line["awake"] for line in lines}
    assert awake["rollout", "exit"] == awake["sync", "exit"] == ["rollout"]
    assert awake["score", "wake math"] == awake["score", "done math"] == ["math"]
    assert awake["score", "exit"] == awake["train", "enter"] == []
    for line in lines:
        assert line["seconds"] == 0 if line["event"] == "enter" else line["seconds"] >= 0
        assert line["host_peak_rss"] >= line["host_rss"] > 1 << 20
        assert {
            "gpu_allocated",
            "gpu_reserved",
            "gpu_peak",
            "gpu_held",
            "host_pinned",
        } <= line.keys()


def test_the_ledger_sees_what_a_phase_holds_and_compares(tmp_path):
    """On this machine's CPU: a phase that holds 200 MB more shows it, and it is gone in
    the next.
    """
    house = House(tmp_path / "ledger.jsonl")
    house.run("sync", "rollout", "score")
    with house.colocation.phase("train"):
        held = bytearray(200 << 20)
        held[::4096] = b"x" * len(held[::4096])
        del held
    house.run("sync")
    peaks = house.ledger.take_peaks()
    assert 190 << 20 < peaks["train"] - peaks["score"] < 230 << 20
    assert house.ledger.take_peaks() == {}
    measured = house.ledger.peaks["train"] - house.ledger.base
    result = house.ledger.compare({"train": 2 * measured, "eval": 5})
    assert result["train"]["measured"] == measured and result["train"]["error"] == pytest.approx(
        1.0
    )
    assert list(result) == ["train"], "only what was both predicted and measured"
    last = json.loads((tmp_path / "ledger.jsonl").read_text().splitlines()[-1])
    assert last == {"rank": 0, "event": "predicted and measured", "phases": result}


def test_no_ledger_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    House().run("sync", *STEP)
    assert list(tmp_path.iterdir()) == []
