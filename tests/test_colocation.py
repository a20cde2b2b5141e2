"""The phase table: who is awake when, which orders are refused, and what an exception leaves behind.

The participants are plain objects that keep books; real engines follow the same calls in test_engines.py.
"""

import itertools
import json

import pytest

from opd.colocation import FOLLOWS, Colocation

BOTH = {"weights", "kv_cache"}
PHASES = ("rollout", "score", "train", "sync")
STEP = ("rollout", "score", "train", "sync")


class Engine:
    """Starts asleep, as the trainers build it; wakes by tag."""

    def __init__(self, name: str, events: list):
        self.name, self.events, self.up = name, events, set()

    @property
    def awake(self) -> bool:
        return "weights" in self.up

    def sleep(self) -> None:
        if self.up:
            self.events.append((self.name, "sleep"))
        self.up = set()

    def wake(self, tags: list[str] | None = None) -> None:
        self.up |= set(tags or BOTH)
        self.events.append((self.name, "wake", *sorted(self.up)))


class Student:
    def __init__(self, events: list):
        self.events, self.on_gpu = events, True

    def offload(self) -> None:
        self.on_gpu = False
        self.events.append(("student", "offload"))

    def reload(self) -> None:
        self.on_gpu = True
        self.events.append(("student", "reload"))


class House:
    """A colocation with its participants and one list of everything that happened."""

    def __init__(self, ledger=None, rank=0):
        self.events = []
        self.rollout, self.student = Engine("rollout", self.events), Student(self.events)
        self.teachers = [Engine("math", self.events), Engine("code", self.events)]
        self.colocation = Colocation(self.rollout, self.student, self.teachers, ledger, rank)

    def run(self, *phases: str) -> None:
        for phase in phases:
            with self.colocation.phase(phase):
                self.check(phase)
                if phase == "score":
                    for teacher in self.teachers:  # as TeacherPool.score does
                        teacher.wake()
                        assert not self.rollout.up
                        teacher.sleep()

    def check(self, phase: str) -> None:
        """The table of the module, row by row."""
        rollout_up = {"rollout": BOTH, "score": set(), "train": set(), "sync": {"weights"}}[phase]
        assert self.rollout.up == rollout_up, f"{phase}: {self.rollout.up}"
        assert self.student.on_gpu == (phase == "train"), phase
        assert not any(teacher.up for teacher in self.teachers), phase


def test_the_table_over_steps_and_evaluations():
    house = House()
    house.run("sync", "rollout")  # the first push, and the evaluation before the first step
    for _ in range(3):
        house.run(*STEP)
    house.run("rollout")  # an evaluation after a step
    house.run(*STEP)
    assert ("student", "offload") in house.events


def test_score_may_come_in_parts_and_sync_may_come_early():
    house = House()
    house.run("sync", "rollout", "rollout", "score", "score", "train", "sync", "score", "sync", "rollout", "sync")


@pytest.mark.parametrize("order", list(itertools.product(PHASES, repeat=3)), ids="-".join)
def test_every_order_of_three_phases_is_legal_or_refused(order):
    """Never a state outside the table; a phase that would sample from dropped weights is refused before it begins."""
    allowed = {
        "rollout": {"sync", "rollout"},
        "score": {"rollout", "score", "sync"},
        "train": {"score"},
        "sync": {"start", "train", "score", "rollout"},
    }
    house, last = House(), "start"
    for phase in ("sync", *order):
        if last not in allowed[phase]:
            events = list(house.events)
            with pytest.raises(RuntimeError, match=f"phase {phase} after {last}: allowed after"):
                house.run(phase)
            assert house.events == events, "nothing moved"
            return
        house.run(phase)
        last = phase


def test_a_push_comes_first():
    """The engine is built with the weights of a file, and they are dropped."""
    assert set(FOLLOWS) == set(PHASES)
    for phase in ("rollout", "score", "train"):
        with pytest.raises(RuntimeError, match=f"phase {phase} after start: allowed after"):
            House().run(phase)


def test_the_weights_are_loaded_before_the_cache_wakes():
    house = House()
    house.run("sync", *STEP, "rollout")
    wakes = [event[2:] for event in house.events if event[:2] == ("rollout", "wake")]
    assert wakes == [("weights",), ("kv_cache", "weights")] * 2
    first_sleep = house.events.index(("rollout", "sleep"))
    assert house.events.index(("rollout", "wake", "kv_cache", "weights")) < first_sleep


def test_optimizer_states_leave_before_the_engine_wakes():
    house = House()
    house.run("sync", *STEP)
    in_sync = house.events[len(house.events) - house.events[::-1].index(("student", "reload")) :]
    assert in_sync == [("student", "offload"), ("rollout", "wake", "weights")]
    before_reload = house.events[: house.events.index(("student", "reload"))]
    assert ("rollout", "sleep") in before_reload


@pytest.mark.parametrize("phase", PHASES)
def test_an_exception_leaves_everything_asleep(phase):
    house = House()
    if phase != "sync":
        house.run("sync", *itertools.takewhile(lambda p: p != phase, STEP))
    with pytest.raises(KeyboardInterrupt), house.colocation.phase(phase):
        house.teachers[1].wake()
        raise KeyboardInterrupt
    assert not house.rollout.up and not any(teacher.up for teacher in house.teachers)
    for other in ("rollout", "score", "train"):
        with pytest.raises(RuntimeError, match=f"phase {other} after start"):
            house.run(other)
    house.run("sync", *STEP)  # a push heals it


def test_an_engine_that_cannot_wake_leaves_everything_asleep():
    house = House()
    house.run("sync")

    def fails(tags=None):
        house.rollout.up = set(BOTH)
        raise RuntimeError("out of memory")

    house.rollout.wake = fails
    with pytest.raises(RuntimeError, match="out of memory"):
        house.run("rollout")
    assert not house.rollout.up


def test_ledger(tmp_path):
    ledger = tmp_path / "ledger.jsonl"
    house = House(ledger, rank=3)
    house.run("sync")
    for step in range(2):
        with house.colocation.step(step):
            house.run(*STEP)
    lines = [json.loads(line) for line in ledger.read_text().splitlines()]
    assert [(x["step"], x["phase"], x["event"]) for x in lines] == [
        (step, phase, event)
        for step, phases in ((-1, ("sync",)), (0, STEP), (1, STEP))
        for phase in phases
        for event in ("enter", "exit")
    ]
    assert {line["rank"] for line in lines} == {3}
    awake = {phase: [line["awake"] for line in lines if line["phase"] == phase] for phase in PHASES}
    assert all(names == ["rollout"] for names in awake["rollout"] + awake["sync"])
    assert all(names == [] for names in awake["score"] + awake["train"])
    for line in lines:
        assert line["seconds"] == 0 if line["event"] == "enter" else line["seconds"] >= 0
        assert line["host_peak_rss"] > 1 << 20
        assert {"gpu_allocated", "gpu_reserved", "gpu_free"} <= line.keys()


def test_no_ledger_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    House().run("sync", *STEP)
    assert list(tmp_path.iterdir()) == []
