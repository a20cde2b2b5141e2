"""The turns of teachers over the steps of a run: who begins, who stays awake, and what it saves."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd.colocation import turn_order

NAMES = "abcd"


def walk(needs, cost) -> tuple[list[list[str]], float]:
    """The orders of all steps, and what waking them costs."""
    awake, orders, spent = None, [], 0.0
    for step, needed in enumerate(needs):
        following = needs[step + 1] if step + 1 < len(needs) else ()
        order, stays = turn_order(needed, following, cost, awake)
        spent += sum(cost.get(name, 0) for name in order if name != awake)
        assert not awake or awake not in needed or order[0] == awake
        assert stays is None or (order[-1] == stays and stays in following and stays in cost)
        awake = stays
        orders.append(order)
    return orders, spent


steps = st.lists(st.lists(st.sampled_from(NAMES), unique=True), min_size=1, max_size=5)
costs = st.dictionaries(st.sampled_from(NAMES), st.integers(1, 9))


@settings(deadline=None)
@given(steps, costs)
def test_each_needed_teacher_has_one_turn_and_nothing_costs_more_than_waking_all(needs, cost):
    orders, spent = walk(needs, cost)
    assert [sorted(order) for order in orders] == [sorted(needed) for needed in needs]
    assert spent <= sum(cost.get(name, 0) for needed in needs for name in needed)


@pytest.mark.parametrize("steps", [2, 3, 7])
def test_with_the_same_teachers_in_every_step_one_wake_a_step_is_saved(steps):
    cost = dict.fromkeys(NAMES, 1)
    assert walk([list(NAMES)] * steps, cost)[1] == steps * len(NAMES) - (steps - 1)


def test_a_single_teacher_is_woken_once():
    assert walk([["a"]] * 4, {"a": 7}) == ([["a"]] * 4, 7)


def test_the_costliest_to_wake_stays_but_not_the_one_that_has_the_first_turn():
    assert turn_order(["small", "large"], ["small", "large"], {"small": 1, "large": 5}, None) == (
        ["small", "large"],
        "large",
    )
    assert turn_order(
        ["small", "large"], ["small", "large"], {"small": 1, "large": 5}, "large"
    ) == (["large", "small"], "small")


def test_without_room_the_given_order_stays():
    assert turn_order(["b", "a"], ["a", "b"], {}, None) == (["b", "a"], None)


def test_two_steps_are_as_cheap_as_the_cheapest_orders_there_are():
    cost = {"a": 1, "b": 5, "c": 2}
    needs = [["a", "b"], ["b", "c"]]
    cheapest = min(
        sum(cost.values()) + cost["b"] - (cost[first[-1]] if first[-1] == second[0] else 0)
        for first in itertools.permutations(needs[0])
        for second in itertools.permutations(needs[1])
    )
    assert walk(needs, cost)[1] == cheapest
