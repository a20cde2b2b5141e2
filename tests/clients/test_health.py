"""Who is in rotation, and how often one that fails is asked: the rules alone, by a clock that the
tests turn.
"""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd.clients.health import Health, Limits, ReplicaState

LIMITS = Limits()


def replicas(count: int, **limits) -> list[Health]:
    return [Health(f"http://{i}", Limits(**limits)) for i in range(count)]


# ---- Strikes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("strike", ["struck", "probe_struck"])
def test_the_third_strike_in_a_row_is_the_last(strike):
    (replica,) = replicas(1)
    assert [getattr(replica, strike)(f"error {i}") for i in range(3)] == [False, False, True]
    assert replica.last_error == "error 2"


@given(st.lists(st.sampled_from(["answered", "struck", "probed", "probe_struck"]), max_size=40))
def test_requests_forgive_requests_and_probes_forgive_probes(events):
    """A replica that fails every request, or says another model at every probe, is out whatever
    else it does well.
    """
    (replica,) = replicas(1)
    in_a_row = {"struck": 0, "probe_struck": 0}
    for event in events:
        if event == "answered":
            replica.answered()
            in_a_row["struck"] = 0
        elif event == "probed":
            replica.probed()
            in_a_row["probe_struck"] = 0
        else:
            in_a_row[event] += 1
            assert getattr(replica, event)("why") == (in_a_row[event] >= LIMITS.strikes)


def test_progress_of_long_ago_is_forgotten_with_a_good_probe():
    (replica,) = replicas(1)
    replica.engine_steps = 7.0
    replica.probed()
    assert replica.engine_steps < 0


# ---- In and out of rotation ----------------------------------------------------------------------


def test_it_stays_out_for_its_time_however_well_it_answers():
    (replica,) = replicas(1, shortest_out_s=2.0)
    replica.leave("dead", now=100.0)
    assert not replica.may_take(100.0) and replica.last_error == "dead"
    assert not replica.come_back(101.9) and not replica.may_take(101.9)
    assert replica.come_back(102.0) and replica.may_take(102.0)


def test_each_time_out_is_twice_the_last_up_to_the_longest_and_a_good_while_forgets_it():
    (replica,) = replicas(1, shortest_out_s=0.5, longest_out_s=30.0)
    now, out = 100.0, []
    for _ in range(9):
        replica.leave("again", now)
        out.append(replica.back_after - now)
        now = replica.back_after
        assert replica.come_back(now)
        now += 1.0  # and it fails at once
    assert out == [0.5, 1, 2, 4, 8, 16, 30, 30, 30]
    now += 4 * 30.0
    replica.leave("once", now)
    assert replica.back_after - now == 0.5


def test_who_comes_back_has_no_strikes():
    (replica,) = replicas(1)
    for _ in range(3):
        replica.struck("a")
        replica.probe_struck("b")
    replica.leave("c", 0.0)
    assert replica.come_back(1.0)
    assert (replica.strikes, replica.probe_strikes) == (0, 0)


def test_it_takes_no_more_than_its_bound_nothing_while_suspect_and_nothing_while_busy():
    (replica,) = replicas(1, max_inflight=2)
    replica.take("a", 0.0)
    assert replica.may_take(0.0)
    replica.state = ReplicaState.SUSPECT
    assert not replica.may_take(0.0)
    replica.state, replica.not_before = ReplicaState.SERVING, 5.0
    assert not replica.may_take(4.9) and replica.may_take(5.0)
    replica.take("b", 5.0)
    assert not replica.may_take(5.0)


# ---- One by one ----------------------------------------------------------------------------------


def gaps_of(replica: Health, start: float, seconds: float) -> list[float]:
    """It is given whatever it takes and answers nothing: the waits before each request."""
    taken = [start]
    for now in (start + i / 100 for i in range(round(100 * seconds))):
        if replica.may_take(now):
            replica.take(object(), now)
            taken.append(now)
    return [round(later - one, 1) for one, later in itertools.pairwise(taken)]


def test_whoever_has_failed_or_came_back_is_asked_less_and_less_often_until_it_answers():
    failed, back = replicas(2, max_inflight=100)
    failed.failed("HTTP 500", now=10.0)
    assert gaps_of(failed, 10.0, 10.0) == [0.1, 0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0, 2.0]
    back.leave("dead", now=0.0)
    assert back.come_back(10.0)
    assert gaps_of(back, 10.0, 10.0) == [0.0, 0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0, 2.0]
    for replica in (failed, back):
        replica.answered()
        assert len(gaps_of(replica, 20.0, 1.0)) == 100 - 9, "no gap is left"


def test_failures_of_what_was_under_way_together_are_one_reason_to_wait():
    (replica,) = replicas(1, max_inflight=100)
    for place in range(32):
        replica.take(place, 0.0)
    for place in range(32):
        replica.failed("HTTP 500", now=1.0 + place / 1000)
    assert replica.may_take(1.1)
