"""How long a step takes under ZeRO-3, where ranks wait for each other in every micro-batch: with
responses in turn, and dealt by `opd/balance.py`. In units of a rank's mean work, padding included.

    python scripts/measure/balance_simulation.py

Lengths are simulated: lognormal, median 2,000, sigma 1, cut at 16,384.
"""

import random
from types import SimpleNamespace

from opd.balance import assign, work
from opd.padding import _cut_by_tokens

RANKS, HIDDEN, LONGEST, MAX_TOKENS, STEPS = 8, 2560, 16384, 32768, 30


def micro_batches(lengths: list[int], teachers: list[int], own: list[int]) -> list[float]:
    """The work of a rank's micro-batches, in the order of `make_micro_batches`."""
    items = [
        (SimpleNamespace(prompt=SimpleNamespace(token_ids=[]), response_ids=range(lengths[i] + 1)),)
        for i in sorted(own, key=lambda i: (teachers[i], lengths[i]))
    ]
    runs = _cut_by_tokens([(item, ()) for (item,) in items], MAX_TOKENS, packed=False)
    return [
        len(run) * work(max(len(rollout.response_ids) - 1 for rollout, _ in run), HIDDEN)
        for run in runs
    ]


def in_step(parts: list[list[float]]) -> float:
    """All ranks compute their first together, then their second, and so on."""
    most = max(map(len, parts))
    return sum(max(part[i] for part in parts if i < len(part)) for i in range(most))


def main() -> None:
    for each in (8, 16, 64):
        for num_teachers in (1, 4):
            turn, dealt = 0.0, 0.0
            for seed in range(STEPS):
                rng, count = random.Random(seed), each * RANKS
                lengths = [min(int(2000 * rng.lognormvariate(0, 1)), LONGEST) for _ in range(count)]
                teachers = [rng.randrange(num_teachers) for _ in range(count)]
                costs = [work(n, HIDDEN) for n in lengths]
                ranks = assign(costs, teachers, RANKS)
                mean = sum(costs) / RANKS
                parts = [list(range(rank, count, RANKS)) for rank in range(RANKS)]
                turn += in_step([micro_batches(lengths, teachers, own) for own in parts]) / mean
                parts = [[i for i in range(count) if ranks[i] == rank] for rank in range(RANKS)]
                sorted_parts = [
                    sorted(micro_batches(lengths, teachers, own), reverse=True) for own in parts
                ]
                dealt += in_step(sorted_parts) / mean
            print(
                f"{each} responses a rank, {num_teachers} teachers: in turn {turn / STEPS:.2f}, "
                f"dealt {dealt / STEPS:.2f}"
            )


if __name__ == "__main__":
    main()
