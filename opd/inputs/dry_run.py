"""What `--dry_run` prints: what a run would do, with nothing loaded."""

import yaml

from opd.inputs.hub import not_checked
from opd.inputs.models import ModelFacts
from opd.inputs.prompts import PromptSet
from opd.inputs.teacher_prompts import own_prompts
from opd.options import to_dict
from opd.types import Prompt


def _marked(token_ids: list[int], tokenizer) -> str:
    """Text with every special token in brackets."""
    special, parts, text = set(tokenizer.all_special_ids), [], []
    for token_id in [*token_ids, None]:
        if token_id is not None and token_id not in special:
            text.append(token_id)
            continue
        parts.append(tokenizer.decode(text) if text else "")
        parts.append("" if token_id is None else f"[{tokenizer.convert_ids_to_tokens(token_id)}]")
        text = []
    return "".join(parts)


def _own(prompt: Prompt, tokenizer) -> str:
    """What teachers read in place of the prompt."""
    return "".join(
        f"\n--- teacher {name} reads, {len(ids)} tokens\n{_marked(ids, tokenizer)}"
        for name, ids in prompt.teacher_ids.items()
    )


def dry_run_report(
    config, prompt_set: PromptSet, tokenizer, facts: ModelFacts, *, memory: str
) -> str:
    """What a run would do: its configuration, its `memory` as the planner sees it, what is left to
    download, two prompts as the models will see them.
    """
    eos = ", ".join(f"{tokenizer.convert_ids_to_tokens(e)} ({e})" for e in facts.student.eos_ids)
    firsts = {prompt.domain: prompt for prompt in reversed(prompt_set.prompts)}
    chosen = [firsts[domain] for domain in prompt_set.domains[:2]]
    if len(chosen) < 2:
        chosen = list(prompt_set.prompts[:2])
    prompts = [
        f"--- prompt {p.prompt_id}, domain {p.domain}, {len(p.token_ids)} "
        f"tokens\n{_marked(p.token_ids, tokenizer)}<< the response starts here and ends with EOS: "
        f"{eos} >>" + _own(p, tokenizer)
        for p in chosen
    ]
    made = [
        f"teacher {own.name} reads what {own.text} makes of a prompt and its response"
        for own in own_prompts(config).values()
        if own.kind == "function"
    ]
    notes = not_checked()
    rows = ", ".join(
        f"{d} {n} ({prompt_set.overlong.get(d, 0)} over-long)" for d, n in prompt_set.counts.items()
    )
    return "\n\n".join(
        [
            "Configuration\n"
            + yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True).rstrip(),
            memory,
            *(["\n".join(["Weights that are not here yet", *notes])] if notes else []),
            "\n".join(
                [f"Prompts: {rows}; special tokens in brackets", *prompt_set.notes, *made, *prompts]
            ),
        ]
    )
