"""Which teachers read which domains."""

from collections import Counter
from collections.abc import Sequence

from opd.config import TeacherSpec
from opd.inputs.prompts import PromptSet
from opd.inputs.teacher_prompts import claimants


def routes(
    teachers: tuple[TeacherSpec, ...], prompt_sets: Sequence[PromptSet]
) -> dict[str, tuple[tuple[str, float], ...]]:
    """Domain -> ((teacher, weight), ...), weights summing to 1: the teachers that name it, else the
    "*" teacher.

    A domain without a teacher and a teacher without a domain are ValueErrors: neither is dropped,
    nor averaged over. A teacher of weight 0 has no part in its domains.
    """
    counts = sum((Counter(prompt_set.counts) for prompt_set in prompt_sets), Counter())
    in_data = "the data has " + ", ".join(
        f"{domain} ({n} rows)" for domain, n in sorted(counts.items())
    )
    table: dict[str, tuple[tuple[str, float], ...]] = {}
    for domain in sorted(counts):
        chosen = claimants(teachers, domain)
        table[domain] = tuple((t.name, t.share / sum(c.share for c in chosen)) for t in chosen)
    orphans = [
        f"{domain} ({counts[domain]} rows)" for domain, chosen in table.items() if not chosen
    ]
    if orphans:
        claims = ", ".join(f"{t.name}: {', '.join(t.domains)}" for t in teachers)
        raise ValueError(
            f"--teacher: no teacher for the domains {', '.join(orphans)}; the teachers take "
            f"{claims}"
        )
    used = {name for chosen in table.values() for name, _ in chosen}
    for teacher in teachers:
        absent = [d for d in teacher.domains if d not in counts] if teacher.domains != "*" else []
        if absent:
            raise ValueError(
                f"--teacher {teacher.name}: no row has the domain {', '.join(absent)}; {in_data}"
            )
        if teacher.name not in used:
            raise ValueError(
                f"--teacher {teacher.name}: never used, the others take every domain, or its "
                f"weight is 0; {in_data}"
            )
    return table
