"""The responses of a step dealt to ranks, so that none waits long for another.

Who wrote a response does not matter to a loss that is a sum over all ranks. But a rank with long
ones scores and trains longer, and under ZeRO-3 all others wait for it in every layer.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence

from opd import distributed
from opd.types import Rollout


def work(length: int, hidden_size: int) -> float:
    """What a sequence costs in a decoder, in tokens.

    A layer takes about 24 h^2 floating-point operations for a token in its matrix products, with
    hidden size h, and 2 h for each pair of a token and one before it: length / (12 h) as many.
    """
    return length * (1 + length / (12 * hidden_size))


def assign(costs: Sequence[float], kinds: Sequence[Hashable], num_ranks: int) -> list[int]:
    """A rank for each item: about equal sums of `costs`, and equal counts of each kind up to one.

    The longest first, each to the rank with the least to do among those that may have one more of
    its kind (LPT: Graham, Bounds on multiprocessing timing anomalies, 1969). Counts are equal so
    that all ranks have as many micro-batches, of the same teachers and about the same lengths at
    the same place. A pure function.
    """
    ranks, loads, counts = [0] * len(costs), [0.0] * num_ranks, [0] * num_ranks
    items: dict[Hashable, list[int]] = defaultdict(list)
    for item, kind in enumerate(kinds):
        items[kind].append(item)
    # a kind of which the longest is long comes early: what follows levels it out
    for own in sorted(items.values(), key=lambda own: -max(costs[i] for i in own)):
        left = [len(own) // num_ranks] * num_ranks
        # what does not divide goes to those that have fewest
        for rank in sorted(range(num_ranks), key=lambda r: (counts[r], loads[r], r)):
            if sum(left) < len(own):
                left[rank] += 1
        for item in sorted(own, key=lambda i: (-costs[i], i)):
            rank = min((r for r in range(num_ranks) if left[r]), key=lambda r: (loads[r], r))
            ranks[item] = rank
            left[rank] -= 1
            counts[rank] += 1
            loads[rank] += costs[item]
    return ranks


def deal(
    rollouts: Sequence[Rollout], kind_of: Callable[[Rollout], Hashable], hidden_size: int
) -> list[Rollout]:
    """This rank's share of all ranks' rollouts, by `assign`. Collective.

    Token ids move, and only of what changes its rank. The share depends on lengths and kinds alone,
    so a resumed step is dealt as before.
    """
    if distributed.world_size() == 1:
        return list(rollouts)
    own = [
        (work(r.prompt.longest + len(r.response_ids), hidden_size), kind_of(r)) for r in rollouts
    ]
    parts = distributed.gather_objects(own)
    costs, kinds = zip(*(item for part in parts for item in part), strict=True)
    ranks, me = assign(costs, kinds, distributed.world_size()), distributed.rank()
    first = sum(map(len, parts[:me]))
    gone = {first + i: rollout for i, rollout in enumerate(rollouts) if ranks[first + i] != me}
    moved = {i: rollout for part in distributed.gather_objects(gone) for i, rollout in part.items()}
    stayed = {first + i: rollout for i, rollout in enumerate(rollouts)}
    return [(stayed | moved)[i] for i, rank in enumerate(ranks) if rank == me]
