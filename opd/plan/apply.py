"""What `--plan` does to a run: its prediction in front of the first step, and with `auto` its
choices in the configuration.
"""

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from opd import distributed
from opd.inputs.models import ModelFact, ModelFacts
from opd.inputs.shapes import Unplannable
from opd.log import say
from opd.plan.job import machine_here, make_job
from opd.plan.planner import OFFLOAD_LEVEL, Plan, as_configured, check_caches, make_plan
from opd.plan.view import table, verdict


def apply(cfg, plan: Plan) -> tuple[Any, list[str]]:
    """The configuration with the plan's choices, and one line for each value that changed."""
    choices = plan.choices
    values: dict[tuple[str, str], Any] = {
        ("loss", "support"): choices.support,
        ("batch", "max_tokens_per_micro_batch"): choices.max_tokens,
        ("model", "gradient_checkpointing"): choices.checkpointing,
    }
    if choices.chunk != cfg.loss.chunk_bytes:
        values["loss", "loss_chunk_bytes"] = choices.chunk
    if choices.offload != as_configured(plan.job).offload:
        levels = {level: name for name, level in OFFLOAD_LEVEL.items()}
        values["model", "offload_student"] = levels[len(choices.offload)]
    lines = []
    for (group, name), value in values.items():
        section = getattr(cfg, group)
        if value != getattr(section, name):
            lines.append(f"plan: --{name}" + ("" if value is True else f" {value}"))
            cfg = replace(cfg, **{group: replace(section, **{name: value})})
    specs = []
    for spec in cfg.teachers:
        size = choices.tensor_parallel.get(spec.name, 1)  # a served teacher is not in the plan
        if size != spec.tensor_parallel_size:
            lines.append(f"plan: teachers: {spec.name}: tensor_parallel_size {size}")
        specs.append(replace(spec, tensor_parallel_size=size))
    return replace(cfg, teachers=tuple(specs)), lines


def plan_run(cfg, facts: ModelFacts) -> tuple[Any, Plan | None, str]:
    """(configuration, plan, its table) of a run on this machine; all ranks plan for the one with
    least memory.

    With `--plan auto` the configuration takes what was chosen. The choices and the verdict are
    said. A model whose configuration says too little leaves the run without a plan. ValueError for
    caches that vLLM would refuse, and for a run that does not fit, unless it is a dry run or
    `--ignore_plan`. Collective.
    """
    auto = cfg.run.plan == "auto"
    if auto:
        cfg = _packed(_with_choices_of(cfg), facts.student)
    machine = machine_here(distributed.world_size())
    device_bytes, host_bytes = distributed.all_reduce(
        [machine.device_bytes, machine.host_bytes], "min"
    )
    machine = replace(machine, device_bytes=int(device_bytes), host_bytes=int(host_bytes))
    with distributed.agree_on_error("planning memory"):
        try:
            job = make_job(cfg, facts.student, facts.teachers, machine)
        except Unplannable as error:
            say(f"memory is not predicted: {error}")
            return cfg, None, ""
        check_caches(job)
        plan = make_plan(job, cfg.explicit if auto else None)
    lines: list[str] = []
    if auto:
        cfg, lines = apply(cfg, plan)
    said = verdict(plan)
    for line in [*lines, f"plan: {said}"]:
        say(line)
    if not (plan.fits or cfg.run.ignore_plan or cfg.run.dry_run):
        raise ValueError(f"the run {said}; or start it all the same with --ignore_plan")
    return cfg, plan, table(plan)


def _packed(cfg, student: ModelFact):
    """Sequences lie end to end where that costs nothing, and nobody has asked for rows or for an
    attention.
    """
    free = not cfg.explicit & {"packing", "attn_implementation"}
    if not (free and student.packs) or cfg.batch.packing:
        return cfg
    say("plan: --packing")
    return replace(cfg, batch=replace(cfg.batch, packing=True))


# What a resumed run keeps as it was chosen for it: other values compute other numbers.
KEPT_CHOICES = (
    ("loss", "support"),
    ("loss", "loss_chunk_bytes"),
    ("batch", "max_tokens_per_micro_batch"),
    ("batch", "packing"),
    ("model", "gradient_checkpointing"),
)
# Flags that say the same in another way.
OTHER_FORM = {"max_tokens_per_micro_batch": ("micro_batch_size",)}


def _with_choices_of(cfg):
    """A run that is resumed keeps what was chosen for it, whatever memory is free today.

    What does not go with flags that have changed since is chosen anew.
    """
    recorded = Path(cfg.run.output_dir) / "config.yaml"
    if cfg.run.resume == "never" or not recorded.exists():
        return cfg
    try:
        old = dict(yaml.safe_load(recorded.read_text()))
    except (OSError, ValueError, TypeError, yaml.YAMLError):
        return cfg  # what is wrong with the directory is said elsewhere
    for group, name in KEPT_CHOICES:
        if name in old and not cfg.explicit & {name, *OTHER_FORM.get(name, ())}:
            section = replace(getattr(cfg, group), **{name: old[name]})
            kept = replace(cfg, **{group: section}, explicit=cfg.explicit | {name})
            with contextlib.suppress(ValueError):
                kept.validate()
                cfg = kept
    return cfg
