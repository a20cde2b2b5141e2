"""Responses dealt to ranks: equal work, equal counts, and the same deal whenever it is made."""

import random

import pytest

from opd.balance import assign, work

RANKS, HIDDEN, LONGEST = 8, 2560, 16384


def lognormal(seed: int, count: int, num_kinds: int) -> tuple[list[float], list[int]]:
    """Costs and kinds of responses with a median of 2,000 tokens and sigma 1, cut at LONGEST."""
    rng = random.Random(seed)
    lengths = [min(int(2000 * rng.lognormvariate(0, 1)), LONGEST) for _ in range(count)]
    return [work(n, HIDDEN) for n in lengths], [rng.randrange(num_kinds) for _ in range(count)]


def slowest(costs: list[float], ranks: list[int]) -> float:
    """The most of a rank / the mean over ranks."""
    loads = [0.0] * RANKS
    for cost, rank in zip(costs, ranks, strict=True):
        loads[rank] += cost
    return max(loads) * RANKS / sum(loads)


@pytest.mark.parametrize("num_kinds", [1, 4])
@pytest.mark.parametrize(
    ("each", "in_turn", "dealt"), [(8, 1.6, 1.12), (16, 1.35, 1.06), (64, 1.15, 1.01)]
)
def test_no_rank_waits_long(each, in_turn, dealt, num_kinds):
    """The figures of docs/benchmarks.md: means over 200 steps."""
    before, after = [], []
    for seed in range(200):
        costs, kinds = lognormal(seed, each * RANKS, num_kinds)
        before.append(slowest(costs, [i % RANKS for i in range(len(costs))]))
        after.append(slowest(costs, assign(costs, kinds, RANKS)))
    print(f"{each} a rank, {num_kinds} teachers: {sum(before) / 200:.2f} -> {sum(after) / 200:.3f}")
    assert sum(before) / 200 > in_turn and sum(after) / 200 < dealt


@pytest.mark.parametrize("seed", range(20))
def test_counts_are_equal_up_to_one(seed):
    """Of each kind, and of all: ranks have as many micro-batches, of the same teachers."""
    rng = random.Random(seed)
    num_ranks = rng.randrange(2, 9)
    costs, kinds = lognormal(seed, rng.randrange(1, 60), 3)
    ranks = assign(costs, kinds, num_ranks)
    assert assign(list(costs), list(kinds), num_ranks) == ranks
    for kind in (0, 1, 2, None):
        own = [r for r, k in zip(ranks, kinds, strict=True) if kind in (k, None)]
        counts = [own.count(rank) for rank in range(num_ranks)]
        assert max(counts) - min(counts) <= 1, kind


def test_two_long_ones_part():
    assert assign([9, 8, 1, 1], "aaaa", 2) in ([0, 1, 0, 1], [0, 1, 1, 0])
    assert assign([5, 5, 5], "abc", 1) == [0, 0, 0]


def test_attention_counts_for_long_sequences():
    """One of 12 h tokens costs twice its tokens."""
    assert work(12 * HIDDEN, HIDDEN) == 2 * 12 * HIDDEN
    assert work(10, HIDDEN) == pytest.approx(10, rel=1e-3)
