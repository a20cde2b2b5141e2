"""What `--plan` does to a run: its prediction in front of the first step, and with `auto` its
choices in the configuration.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from opd import distributed
from opd.config import GIB
from opd.inputs.models import ModelFacts
from opd.log import say
from opd.plan.job import machine_here, make_job
from opd.plan.planner import OFFLOAD_LEVEL, Plan, as_configured, make_plan
from opd.plan.view import table, verdict


def apply(cfg, plan: Plan) -> tuple[Any, list[str]]:
    """The configuration with the plan's choices, and one line for each value that changed."""
    choices = plan.choices
    values: dict[tuple[str, str], Any] = {}
    # a number that was given stays as it was written
    if choices.kv_cache != int(cfg.rollout.rollout_kv_cache_gib * GIB):
        values["rollout", "rollout_kv_cache_gib"] = choices.kv_cache / GIB
    values["loss", "support"] = choices.support
    values["batch", "max_tokens_per_micro_batch"] = choices.max_tokens
    if choices.offload != as_configured(plan.job).offload:
        levels = {level: name for name, level in OFFLOAD_LEVEL.items()}
        values["model", "offload_student"] = levels[len(choices.offload)]
    lines = []
    for (group, name), value in values.items():
        section = getattr(cfg, group)
        if value != getattr(section, name):
            shown = f"{value:g}" if isinstance(value, float) else value
            lines.append(f"plan: --{name} {shown}")
            cfg = replace(cfg, **{group: replace(section, **{name: value})})
    specs = []
    for spec in cfg.teachers:
        size = choices.tensor_parallel.get(spec.name, 1)  # a served teacher is not in the plan
        if size != spec.tensor_parallel_size:
            lines.append(f"plan: teachers: {spec.name}: tensor_parallel_size {size}")
        specs.append(replace(spec, tensor_parallel_size=size))
    return replace(cfg, teachers=tuple(specs)), lines


def plan_run(cfg, facts: ModelFacts) -> tuple[Any, Plan | None, str]:
    """(configuration, plan, what to show of it) of a run on this machine; all ranks plan for the
    one with least memory.

    With `--plan auto` the configuration takes what was chosen, and each change is said. Otherwise a
    model whose configuration says too little leaves the run without a plan. Collective.
    """
    auto = cfg.run.plan == "auto"
    if auto:
        cfg = _with_choices_of(cfg)
    machine = machine_here(distributed.world_size())
    device_bytes, host_bytes = distributed.all_reduce(
        [machine.device_bytes, machine.host_bytes], "min"
    )
    machine = replace(machine, device_bytes=int(device_bytes), host_bytes=int(host_bytes))
    with distributed.agree_on_error("planning memory"):
        try:
            job = make_job(cfg, facts.student, facts.teachers, machine)
            plan = make_plan(job, cfg.explicit if auto else None)
        except ValueError as error:
            if auto:
                raise
            return cfg, None, f"Memory is not predicted: {error}"
    if auto:
        cfg, lines = apply(cfg, plan)
        for line in lines:
            say(line)
    return cfg, plan, f"{table(plan)}\n{verdict(plan)}"


def _with_choices_of(cfg):
    """A run that is resumed keeps the support that was planned for it: another one would make it
    another run.
    """
    recorded = Path(cfg.run.output_dir) / "config.yaml"
    if "support" in cfg.explicit or cfg.run.resume == "never" or not recorded.exists():
        return cfg
    try:
        support = yaml.safe_load(recorded.read_text())["support"]
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
        return cfg  # what is wrong with the directory is said elsewhere
    return replace(
        cfg, loss=replace(cfg.loss, support=support), explicit=cfg.explicit | {"support"}
    )
