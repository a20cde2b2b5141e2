"""The order in which teachers wake, against all orders there are."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd.colocation import wake_orders

NAMES = "abcdef"


def wakes(orders, cost, awake):
    """What the wakes of these orders cost, if whoever ends a step and begins the next stays awake
    between them.
    """
    total = 0.0
    for place, order in enumerate(orders):
        total += sum(cost.get(name, 1000) for name in order) - (
            cost[awake] if order and order[0] == awake else 0
        )
        following = orders[place + 1] if place + 1 < len(orders) else []
        awake = (
            order[-1]
            if order and following and order[-1] == following[0] and order[-1] in cost
            else None
        )
    return total


def cheapest(needs, cost, awake):
    return min(
        wakes(orders, cost, awake)
        for orders in itertools.product(*(itertools.permutations(n) for n in needs))
    )


NEEDS = st.lists(
    st.lists(st.sampled_from(NAMES[:4]), unique=True, max_size=4), min_size=1, max_size=3
)
COSTS = st.dictionaries(st.sampled_from(NAMES), st.integers(1, 100), max_size=6)


@settings(max_examples=120, deadline=None)
@given(NEEDS, COSTS, st.data())
def test_no_order_is_cheaper(needs, cost, data):
    awake = data.draw(st.sampled_from([None, *cost]))
    orders = wake_orders(needs, cost, awake=awake)
    assert [sorted(order) for order in orders] == [sorted(needed) for needed in needs], (
        "each wakes once per step"
    )
    assert wakes(orders, cost, awake) == cheapest(needs, cost, awake)


@pytest.mark.parametrize("steps", [1, 2])
def test_six_teachers(steps):
    cost = {name: 1 + place for place, name in enumerate(NAMES)}
    orders = wake_orders([list(NAMES)] * steps, cost, awake="c")
    assert wakes(orders, cost, "c") == cheapest([list(NAMES)] * steps, cost, "c")


def test_the_largest_stays_awake_and_the_order_alternates():
    orders = wake_orders([["small", "large"]] * 3, {"small": 1, "large": 5})
    assert orders[0][-1] == orders[1][0] == "large" and orders[1][-1] == orders[2][0] == "small"


def test_a_lone_teacher_never_sleeps_between_steps():
    assert wakes(wake_orders([["a"]] * 4, {"a": 7}), {"a": 7}, None) == 7


def test_nobody_stays_who_may_not():
    """Without memory to spare the order is the one given, so nothing changes from step to step."""
    assert wake_orders([["b", "a"], ["a", "b"]], {}) == [["b", "a"], ["a", "b"]]
