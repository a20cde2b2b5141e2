"""What is checked of the prompts that teachers alone read, once the data is read: how long they
are, and how they begin an answer.
"""

from collections.abc import Collection, Mapping
from typing import Any

from opd.inputs.models import ModelFacts, check_long_teacher
from opd.inputs.prompts import PromptSet
from opd.inputs.teacher_prompts import (
    BOUND_FLAG,
    OwnPrompt,
    check_first_token,
    longest_prompt,
    with_bounds,
)
from opd.inputs.templates import ChatTemplate
from opd.log import warn


def with_own_bounds(
    config, prompt_sets: Collection[PromptSet], facts: ModelFacts, served: Mapping[str, Any]
) -> Any:
    """The configuration in which every teacher's longest prompt is known.

    ValueError for one that does not fit the context of its teacher. `served` says of teachers at
    servers what context they have.
    """
    found = {
        spec.name: max(prompts.longest_of(spec.name) for prompts in prompt_sets)
        for spec in config.teachers
    }
    config = with_bounds(config, found)
    for spec in config.teachers:
        longest = longest_prompt(config, spec)
        if longest == config.data.max_prompt_tokens:
            continue
        response = config.rollout.max_response_tokens
        if spec.is_served:
            context = served[spec.name].context - 1  # a server that scores writes one token more
        else:
            context = facts.teachers[spec.name].context
        if context is not None and longest + response > context:
            raise ValueError(
                f"--teacher_prompt: teacher {spec.name} reads a prompt of up to {longest} tokens, "
                f"and with --max_response_tokens {response} it has a context of {context}; shorten "
                f"the prompt, or lower {BOUND_FLAG} or --max_response_tokens"
            )
        check_long_teacher(config, spec, longest + response)
    return config


def warn_of_first_tokens(
    own_prompts: Collection[OwnPrompt], tokenizer, prompt_sets: Collection[PromptSet]
) -> None:
    """A line for each teacher to which the first token of a response means something else."""
    if tokenizer.chat_template is None:
        return
    for own in own_prompts:
        for prompts in prompt_sets:
            template = ChatTemplate(tokenizer, prompts.moment)
            theirs = [s.chat for found in prompts.own_samples[own.name].values() for s in found]
            domains = prompts.own_samples[own.name]
            students = [s.chat for domain in domains for s in prompts.samples[domain]]
            if found := check_first_token(own, template, students, theirs):
                warn(found)
                break
