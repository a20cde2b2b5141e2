"""When a run saves by the clock, when its time is over, and what a signal does to it."""

import os
import signal
import time

import pytest

from opd.config import RunConfig
from opd.run import stopping
from opd.run.pace import Pace, process_age_s


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def saves_of(save_s: float, hours: float, save_every: int | str = "auto", step_s: float = 60.0):
    """Minutes at which a run of equal steps and equal saves starts to save."""
    clock = Clock()
    pace, found, step = Pace(RunConfig(save_every=save_every), 0.0, clock), [], 0
    while clock.now < hours * 3600:
        clock.now += step_s
        step += 1
        pace.stepped()
        if pace.is_time_to_save or pace.is_due(step):
            found.append(round(clock.now / 60))
            clock.now += save_s
            pace.saved(save_s)
    return found


def test_auto_saves_as_often_as_it_costs_a_fiftieth_of_the_time():
    assert saves_of(save_s=1, hours=1) == [10, 20, 30, 40, 50, 60]  # not before 10 minutes
    assert saves_of(save_s=18, hours=1)[:3] == [10, 25, 41]  # 18 s are 2 % of 15 minutes
    assert saves_of(save_s=300, hours=2)[:3] == [10, 45, 80]  # but not after 30
    assert saves_of(save_s=1, hours=0.15) == []  # a short run saves at its end alone
    assert saves_of(save_s=1, hours=0.1, save_every=2) == [2, 4, 6]
    assert saves_of(save_s=1, hours=1, save_every=0) == []


@pytest.mark.parametrize(
    ("limit_h", "age_s", "save_s", "last_step"),
    [
        (1.0, 0, 30.0, 59),  # behind step 58 a step of 60 s and two saves of 30 s just fit
        (1.0, 600, 30.0, 49),  # the start-up counts
        (1.0, 0, None, 58),  # a save that nobody has measured is held to take a minute
        (0.001, 60, None, 1),  # at least a step is done
    ],
)
def test_time_is_over_before_a_step_and_its_save_could_pass_the_limit(
    limit_h, age_s, save_s, last_step
):
    clock = Clock()
    pace, steps = Pace(RunConfig(time_limit=limit_h), age_s, clock), 0
    while True:
        clock.now += 60
        steps += 1
        pace.stepped()
        if save_s is not None:
            pace.saved(save_s)
        if pace.is_over:
            break
    assert steps == last_step
    assert not Pace(RunConfig(), 1e9, clock).is_over


def test_the_age_of_a_process_counts_from_its_start():
    before = process_age_s()
    assert 0 < before < 24 * 3600
    time.sleep(0.05)
    assert 0.04 < process_age_s() - before < 5


@pytest.fixture
def listening(monkeypatch):
    """This process listens as a run does, and no longer afterwards."""
    handlers = {number: signal.getsignal(number) for number in stopping.SIGNALS}
    monkeypatch.setattr(stopping, "_asked", 0)
    stopping.listen()
    yield
    stopping.unlisten()
    monkeypatch.setattr(stopping, "_arrived", -1)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("listening")
def test_a_signal_ends_what_may_be_left_and_nothing_else():
    assert not stopping.has_arrived()
    with pytest.raises(stopping.Asked, match="SIGTERM"), stopping.interruptible():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    assert stopping.signal_here() == signal.SIGTERM and stopping.has_arrived()
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGTERM)  # a scheduler may repeat itself
    with stopping.interruptible(False):
        time.sleep(0.01)
    with pytest.raises(stopping.Asked), stopping.interruptible():
        raise AssertionError("entered after a signal")


@pytest.mark.usefixtures("listening")
def test_a_second_ctrl_c_ends_at_once_but_not_the_same_one_passed_on(monkeypatch):
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)  # by the launcher
    assert stopping.signal_here() == signal.SIGINT
    monkeypatch.setattr(stopping, "_moment", time.monotonic() - 2)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
