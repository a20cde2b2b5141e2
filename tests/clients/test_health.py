"""Who is in rotation, who is slow and what a retry costs: the rules alone, by a clock that the
tests turn.
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd.clients.health import Health, Limits, Patience, RetryBudget, slow_ones

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
            replica.answered(0.1)
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


def test_who_comes_back_has_neither_strikes_nor_pace():
    (replica,) = replicas(1)
    replica.answered(50.0, 10)
    for _ in range(3):
        replica.struck("a")
        replica.probe_struck("b")
    replica.leave("c", 0.0)
    assert replica.come_back(1.0)
    assert (replica.strikes, replica.probe_strikes, replica.latency(1.0)) == (0, 0, (0.0, 0.0))


def test_it_takes_no_more_than_its_bound_nothing_while_suspect_and_nothing_while_busy():
    (replica,) = replicas(1, max_inflight=2)
    replica.inflight["a"] = (0.0, 1)
    assert replica.may_take(0.0)
    replica.suspect = True
    assert not replica.may_take(0.0)
    replica.suspect, replica.not_before = False, 5.0
    assert not replica.may_take(4.9) and replica.may_take(5.0)
    replica.inflight["b"] = (0.0, 1)
    assert not replica.may_take(5.0)


# ---- Slow ----------------------------------------------------------------------------------------


def worked(replica: Health, seconds: float, size: int = 100, times: int = 20) -> None:
    for _ in range(times):
        replica.answered(seconds, size)


def windows_until_slow(pool: list[Health], start: float, windows: int = 60) -> dict[str, int]:
    """URL -> the window in which it was found slow, a second each."""
    found = {}
    for window in range(windows):
        for replica in slow_ones(pool, start + window):
            found.setdefault(replica.url, window)
    return found


def test_ten_times_slower_is_slow_after_three_windows():
    slow, fast = pool = replicas(2)
    worked(fast, 0.3)
    worked(slow, 3.0)
    slow.inflight["a"] = (100.0, 100)
    assert windows_until_slow(pool, 100.0, windows=3) == {slow.url: 2}


def test_a_window_that_is_not_slow_starts_the_count_again():
    slow, fast = pool = replicas(2)
    worked(fast, 0.3)
    for seconds in (3.0, 3.0, 0.3, 3.0, 3.0):
        slow._pace = seconds
        slow.inflight["a"] = (100.0, 100)
        assert not slow_ones(pool, 100.0)
    assert slow_ones(pool, 100.0) == [slow]


def test_one_that_answers_nothing_is_slow_by_the_age_of_what_it_holds():
    stuck, fast = pool = replicas(2)
    worked(stuck, 0.3)
    worked(fast, 0.3)
    stuck.inflight["a"] = (100.0, 100)
    assert windows_until_slow(pool, 100.0) == {stuck.url: 4}  # older than 1.5 s at 102, 103 and 104


@given(
    st.lists(st.floats(0.01, 100.0), min_size=1, max_size=5),
    st.floats(0.0, 60.0),
    st.floats(1.0, 4.9),
)
def test_nobody_is_slow_when_all_are_slow_alike(seconds, age, spread):
    base, pool = max(seconds), replicas(len(seconds))
    for place, replica in enumerate(pool):
        worked(replica, base * (spread if place else 1.0))
        replica.inflight["a"] = (100.0 - age, 100)
    assert not any(slow_ones(pool, 100.0) for _ in range(10))


def test_the_fastest_of_all_and_the_only_one_are_never_slow():
    (alone,) = pool = replicas(1)
    worked(alone, 0.1)
    alone.inflight["a"] = (0.0, 1)
    assert not windows_until_slow(pool, 1000.0)


def test_a_neighbour_that_answered_nothing_is_no_measure():
    """The last request of a step, with the neighbour idle since it came back: it would be sent back
    and forth.
    """
    busy, idle = pool = replicas(2)
    worked(busy, 2.0)
    busy.inflight["a"] = (100.0, 100)
    idle.probed()
    assert not windows_until_slow(pool, 100.0)
    worked(idle, 0.1)
    assert windows_until_slow(pool, 100.0)


def test_a_long_request_is_not_held_against_short_ones():
    long, short = pool = replicas(2)
    worked(long, 0.3, size=100)
    worked(short, 0.3, size=100)
    long.inflight["a"] = (100.0, 4000)
    found = windows_until_slow(pool, 100.0, windows=100)
    assert found == {long.url: 63}  # more than five times 40 x 0.3 s: first at 61


# ---- Retry budget --------------------------------------------------------------------------------


@given(st.lists(st.sampled_from(["earn", "spend", "ended"]), max_size=400))
def test_retries_are_a_tenth_and_a_reserve_and_then_one_at_a_time(events):
    budget, earned, paid, under_way = RetryBudget(LIMITS), 0, 0, False
    for event in events:
        if event == "earn":
            budget.earn()
            earned += 1
        elif event == "ended" and under_way:
            budget.one_under_way = under_way = False
        elif event == "spend":
            beyond = budget.spend()
            assert (beyond is None) == (under_way and budget.tokens < 1)
            if beyond:
                assert not under_way, "a second one beyond the budget"
                under_way = True
            paid += beyond is False
            assert paid <= LIMITS.retry_reserve + LIMITS.retry_share * earned + 1e-6
    assert paid >= min(events.count("spend"), LIMITS.retry_reserve), (
        "the reserve is there from the start"
    )


def test_what_is_saved_up_is_bounded():
    budget = RetryBudget(Limits(retry_reserve=3.0))
    for _ in range(10_000):
        budget.earn()
    spent = [budget.spend() for _ in range(40)]
    assert spent == [False] * 30 + [True] + [None] * 9


# ---- Patience ------------------------------------------------------------------------------------


def test_patience_follows_the_answers_and_doubles_with_each_time_out():
    patience = Patience(Limits(timeout_s=120, patience_s=15, patience_factor=10))
    assert patience.of(0) == 120  # nothing is known yet: the first request may compile
    patience.answered(30.0)
    assert patience.of(0) == 120
    for _ in range(100):
        patience.answered(0.1)
    assert [patience.of(n) for n in range(5)] == [15, 30, 60, 120, 120]
    patience.answered(4.0)
    assert patience.of(0) == 40
