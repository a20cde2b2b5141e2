"""In which order the teachers of a step wake.

Only one teacher is awake at a time, so each step wakes each of its teachers once, in any order. But the last one of a step
may stay awake until the next, and if it is the first one there, one wake is saved. Which teachers the coming steps need is
known beforehand, because the prompts of a step are a function of its number.
"""

from collections.abc import Collection, Mapping, Sequence


def wake_orders(
    needs: Sequence[Collection[str]], cost: Mapping[str, float], *, awake: str | None = None
) -> list[list[str]]:
    """The cheapest orders: for each step, the teachers that it needs in the order of their turns.

    `needs` are the teachers of this step and of those that follow, as far as one looks ahead; `cost` is what waking a
    teacher costs (bytes or seconds) and names the only ones that may stay awake between steps; `awake` is the one that is
    awake now. Exact over the steps given, by dynamic programming over who stays awake after each step. Of equal orders
    the one that keeps the given order of `needs` most is taken, so all ranks agree.

        >>> wake_orders([["a", "b"], ["b", "c"]], {"a": 1, "b": 5, "c": 2}, awake="a")
        [['a', 'b'], ['b', 'c']]
    """
    # stays[i]: who may be awake between step i - 1 and step i -> (what is saved from there back, the choice before it)
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
