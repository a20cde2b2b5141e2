"""Task rewards: a number per response, and the group-relative advantage made of them.

A reward is a function (prompt, response text) -> float. Rewards join the loss as an advantage
relative to the other responses to the same prompt, so their scale does not matter and a group of
equal rewards teaches nothing.
"""

import functools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal

from opd.inputs.functions import import_function
from opd.types import Prompt

Reward = Callable[[Prompt, str], float]

# A minus counts as a sign unless it follows a word, a number or a bracket ("5-3"); commas only
# between groups of three.
_NUMBER = re.compile(
    r"(?:(?<![\w).])-)?\$?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)?(?:\.[0-9]+)?"
)


def _reference(prompt: Prompt) -> str:
    if prompt.answer is None:
        raise ValueError(
            f"prompt {prompt.prompt_id} ({prompt.domain}): the reward needs a reference; see "
            "--answer_key"
        )
    return prompt.answer


def exact_match(prompt: Prompt, text: str) -> float:
    """1 if the response is the answer, white space at the ends aside."""
    return float(text.strip() == _reference(prompt).strip())


def _last_number(text: str) -> Decimal | None:
    found = [m.group() for m in _NUMBER.finditer(text) if any(c.isdigit() for c in m.group())]
    return Decimal(found[-1].replace(",", "").replace("$", "")) if found else None


def last_number(prompt: Prompt, text: str) -> float:
    """1 if the last number of the response equals the reference, as for GSM8K (Cobbe et al., arXiv
    2110.14168).

    The reference is the last number of the answer, after `####` where it has one. Thousands
    separators, `$` and a closing full stop do not matter; 72 equals 72.0.
    """
    reference = _last_number(_reference(prompt).rpartition("####")[2])
    if reference is None:
        raise ValueError(
            f"--reward_fn last_number: no number in the answer of prompt {prompt.prompt_id}: "
            f"{prompt.answer!r:.80}; give the domain another reward, {prompt.domain}=REWARD"
        )
    return float(_last_number(text) == reference)


BUILT_IN: dict[str, Reward] = {"exact_match": exact_match, "last_number": last_number}


def _import(name: str) -> Reward:
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise ValueError(
            f"--reward_fn {name}: neither one of {', '.join(BUILT_IN)} nor module:function"
        )
    return import_function(f"--reward_fn {name}", name)


def load_reward(name: str) -> Reward:
    """A built-in reward, or `module:function` with the module importable from the working
    directory.

    The returned function raises a ValueError that names function and prompt if a reward is not a
    finite number.
    """
    function = BUILT_IN.get(name) or _import(name)

    @functools.wraps(function)
    def reward(prompt: Prompt, text: str) -> float:
        value = function(prompt, text)
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(
                f"--reward_fn {name}: {value!r:.80} for prompt {prompt.prompt_id}, not a finite "
                "number"
            )
        return number

    return reward


def _reward_names(values: Sequence[str], domains: Iterable[str]) -> dict[str, str]:
    """Domain -> name of its reward: `DOMAIN=REWARD` for one domain, `REWARD` for all others."""
    general = [value for value in values if "=" not in value]
    if len(general) > 1:
        raise ValueError(
            f"--reward_fn {' '.join(general)}: one reward for all domains; give others as "
            "DOMAIN=REWARD"
        )
    names = dict.fromkeys(domains, general[0] if general else "")
    for value in values:
        domain, equals, name = value.partition("=")
        if equals and domain not in names:
            raise ValueError(
                f"--reward_fn {value}: the data has no domain {domain}, only {', '.join(names)}"
            )
        if equals:
            names[domain] = name
    missing = [domain for domain, name in names.items() if not name]
    if missing:
        raise ValueError(
            f"--reward_fn: no reward for the domain {', '.join(missing)}; add DOMAIN=REWARD"
        )
    return names


def load_rewards(values: Sequence[str], domains: Iterable[str]) -> Reward:
    """One reward that asks each prompt's own domain.

    ValueError for an unknown domain, or one without a reward.
    """
    by_domain = {
        domain: load_reward(name) for domain, name in _reward_names(values, domains).items()
    }
    return lambda prompt, text: by_domain[prompt.domain](prompt, text)


def check_answers(prompts: Iterable[Prompt], values: Sequence[str], domains: Iterable[str]) -> None:
    """Asks the built-in rewards about every reference now, so that one they cannot read does not
    end a run midway.
    """
    names = _reward_names(values, domains)
    for prompt in prompts:
        if names[prompt.domain] in BUILT_IN:
            BUILT_IN[names[prompt.domain]](prompt, "")


def group_relative_advantages(rewards: list[float], group_size: int) -> list[float]:
    """(r - mean) / (std + 1e-6) inside each group of `group_size` neighbours.

    From GRPO with outcome supervision (DeepSeekMath, arXiv 2402.03300, section 4.1.2). The standard
    deviation is the population's. A group of equal rewards gets exactly 0: whatever rounding leaves
    of r - mean would be blown up a million times by the tiny denominator.

    >>> [round(a, 3) for a in group_relative_advantages([1.0, 0.0, 0.0, 0.0], 4)]
    [1.732, -0.577, -0.577, -0.577]
    """
    assert group_size > 0 and len(rewards) % group_size == 0, (len(rewards), group_size)
    advantages: list[float] = []
    for start in range(0, len(rewards), group_size):
        group = rewards[start : start + group_size]
        mean = math.fsum(group) / group_size
        std = math.sqrt(math.fsum((r - mean) ** 2 for r in group) / group_size)
        advantages += [
            0.0 if min(group) == max(group) else (r - mean) / (std + 1e-6) for r in group
        ]
    return advantages
