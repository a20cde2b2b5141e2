"""Which prompts a step has: a pure function of (seed, step).

It does not depend on the number of ranks: a resumed run, or one on other hardware, sees the same
data.
"""

import functools
import random
from collections.abc import Sequence
from fractions import Fraction
from math import gcd, lcm

from opd.distributed import fold_seed
from opd.inputs.prompts import PromptSet
from opd.types import Prompt


@functools.lru_cache(maxsize=64)
def _permutation(seed: int, name: str, epoch: int, size: int) -> list[int]:
    order = list(range(size))
    random.Random(fold_seed(seed, "epoch", name, epoch)).shuffle(order)
    return order


def _walk(ids: Sequence[int], start: int, stop: int, seed: int, name: str) -> list[int]:
    """Items [start, stop) of the endless walk over `ids` that shuffles them anew in every epoch."""
    size = len(ids)
    return [ids[_permutation(seed, name, i // size, size)[i % size]] for i in range(start, stop)]


def _integer_weights(prompt_set: PromptSet, domain_weights: dict[str, float]) -> tuple[int, ...]:
    """Weights of `prompt_set.domains` as the smallest integers, so that shares are exact over any
    number of steps.
    """
    if set(domain_weights) != set(prompt_set.domains):
        given, known = ", ".join(domain_weights), ", ".join(prompt_set.domains)
        raise ValueError(
            f"--domain_weights: given for {given}; the data needs exactly one for each of {known}"
        )
    fractions = [Fraction(str(domain_weights[domain])) for domain in prompt_set.domains]
    if not any(fractions):
        raise ValueError("--domain_weights: at least one weight must be above 0")
    scaled = [int(f * lcm(*(f.denominator for f in fractions))) for f in fractions]
    return tuple(weight // gcd(*scaled) for weight in scaled)


@functools.lru_cache(maxsize=4)
def _cumulative_counts(weights: tuple[int, ...], prompts_per_step: int) -> list[tuple[int, ...]]:
    """Memo of `_counts_before`: entry s holds the prompts of each domain in the first s steps."""
    return [(0,) * len(weights)]


def _counts_before(step: int, weights: tuple[int, ...], prompts_per_step: int) -> tuple[int, ...]:
    """Prompts of each domain in the first `step` steps: always within 1 of the exact share, and
    never decreasing.

    Rounding each total on its own would let a count fall from one step to the next. Instead the
    n-th prompt of a domain with share w is a unit job that may not start before (n - 1) / w prompts
    and must be done by n / w prompts; taking the earliest deadlines first meets all of them (unit
    jobs on identical machines).
    """
    memo, total_weight = _cumulative_counts(weights, prompts_per_step), sum(weights)
    while len(memo) <= step:
        total = len(memo) * prompts_per_step
        counts = [max(c, total * w // total_weight) for c, w in zip(memo[-1], weights, strict=True)]
        waiting = [d for d, w in enumerate(weights) if counts[d] * total_weight < total * w]
        waiting.sort(key=lambda d: Fraction(counts[d] + 1, weights[d]))
        for d in waiting[: total - sum(counts)]:
            counts[d] += 1
        assert sum(counts) == total, (counts, total)
        memo.append(tuple(counts))
    return memo[step]


def prompt_batch(
    prompt_set: PromptSet,
    step: int,
    *,
    seed: int,
    prompts_per_step: int,
    domain_weights: dict[str, float],
    rank: int,
    world_size: int,
) -> list[Prompt]:
    """This rank's prompts of a step: items rank, rank + world_size, ... of a global batch that
    knows no ranks.

    Without weights the rows are walked in epochs, each shuffled, none dropped or repeated inside an
    epoch. With weights every domain is walked that way on its own, and after any number of steps
    its count is within 1 of its share.
    """
    if prompts_per_step % world_size:
        raise ValueError(
            f"--prompts_per_step {prompts_per_step}: must be a multiple of the {world_size} ranks"
        )
    if domain_weights:
        weights = _integer_weights(prompt_set, domain_weights)
        before, after = (_counts_before(s, weights, prompts_per_step) for s in (step, step + 1))
        ids = [
            prompt_id
            for domain, start, stop in zip(prompt_set.domains, before, after, strict=True)
            for prompt_id in _walk(prompt_set.ids_by_domain[domain], start, stop, seed, domain)
        ]
        random.Random(fold_seed(seed, "mix", step)).shuffle(ids)
    else:
        start = step * prompts_per_step
        ids = _walk(range(len(prompt_set.prompts)), start, start + prompts_per_step, seed, "")
    return [prompt_set.prompts[i] for i in ids[rank::world_size]]
