"""The memory of a run before it starts: who takes how much in which phase, what to choose, and whether it fits.

    python -m opd.plan --config run.yaml --gpus 8 --gpu_memory 80 --host_memory 512 --plot plan.png

takes a trainer's YAML file, and its flags too. It reads configurations of models only: no weights, tokenizers or data. The
trainers use the same planner with `--plan auto` and `--dry_run`.
"""

import argparse
import json
import math
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml

from opd import config as configuration
from opd import distributed
from opd.arguments import OneLineParser, parse
from opd.plan_types import GIB, Job, Machine
from opd.plan_view import as_json, draw, table, verdict
from opd.planner import OFFLOAD_LEVEL, Plan, as_configured, make_plan
from opd.run_files import say
from opd.shapes import ModelShape, read_model, shape_of
from opd.sharding import ZeroSettings
from opd.validation import load_ds_config, validate_common

PCIE_GB_S = 25.0  # what PCIe 4.0 x16 gives to a pinned copy in one direction


def machine_here(world_size: int, *, local_ranks: int | None = None, pcie_gb_s: float = PCIE_GB_S) -> Machine:
    """This machine: its GPUs' memory, or on a CPU each rank's share of the host's free memory."""
    free = _free_host_memory()
    if not torch.cuda.is_available():
        return Machine(world_size, free // (local_ranks or world_size), 0, pcie_gb_s * 1e9, is_gpu=False)
    device = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return Machine(world_size, device, free, pcie_gb_s * 1e9, is_gpu=True)


def _free_host_memory() -> int:
    """What the system could still give, within the container's limit if there is one."""
    free = psutil.virtual_memory().available
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and (most := limit.read_text().strip()).isdigit():
        free = min(free, int(most) - int(used.read_text()))
    return max(0, free)


def read_job(cfg, machine: Machine) -> Job:
    """Reads the models' configurations and the ds_config. ValueError with one line for what is wrong with them.

    A served teacher takes no memory here: the job does not know it.
    """
    cfg = replace(cfg, teachers=tuple(spec for spec in cfg.teachers if not spec.is_served))
    trust = cfg.model.trust_remote_code
    paths = {"": ("--student_model", cfg.model.student_model)}
    paths |= {spec.name: (f"--teacher {spec.name}", spec.model) for spec in cfg.teachers}
    shapes = {name: shape_of(read_model(flag, path, trust), flag, path) for name, (flag, path) in paths.items()}
    student = shapes.pop("")
    return make_job(cfg, student, shapes, machine)


def make_job(cfg, student: ModelShape, teachers: dict[str, ModelShape], machine: Machine) -> Job:
    """A run with models whose shapes are known. ValueError for tensor parallelism that does not divide their heads."""
    ranks = machine.gpus
    if cfg.rollout.prompts_per_step % ranks:
        raise ValueError(f"--prompts_per_step {cfg.rollout.prompts_per_step}: must be a multiple of the {ranks} ranks")
    size = cfg.rollout.rollout_tensor_parallel_size
    student.check_parallel("--rollout_tensor_parallel_size", size)
    for name, number in [
        ("--rollout_tensor_parallel_size", size),
        *((f"teachers: {spec.name}: tensor_parallel_size", spec.tensor_parallel_size) for spec in cfg.teachers),
    ]:
        if ranks % number:
            raise ValueError(f"{name} {number}: does not divide the {ranks} ranks; choose a divisor")
    for spec in cfg.teachers:
        flag = f"teachers: {spec.name}: tensor_parallel_size"
        teachers[spec.name].check_parallel(flag, getattr(spec, "tensor_parallel_size", 1))
    return Job(cfg, student, teachers, ZeroSettings.of(load_ds_config(cfg.run.ds_config)), machine)


def apply(cfg, plan: Plan) -> tuple[Any, list[str]]:
    """The configuration with the plan's choices, and one line for each value that changed."""
    choices = plan.choices
    values: dict[str, dict[str, Any]] = {
        "rollout": {},
        "loss": {"support": choices.support},
        "batch": {"max_tokens_per_micro_batch": choices.max_tokens},
    }
    lines = []
    if plan.job.machine.is_gpu and choices.offload != as_configured(plan.job).offload:
        levels = {level: name for name, level in OFFLOAD_LEVEL.items()}
        values["model"] = {"offload_student": levels[len(choices.offload)]}
    if choices.kv_cache != int(
        cfg.rollout.rollout_kv_cache_gib * GIB
    ):  # a number that was given stays as it was written
        values["rollout"]["rollout_kv_cache_gib"] = choices.kv_cache / GIB
    for group, changes in values.items():
        for name, value in changes.items():
            old = getattr(getattr(cfg, group), name)
            if value != old:
                lines.append(f"plan: --{name} {value:g}" if isinstance(value, float) else f"plan: --{name} {value}")
                cfg = replace(cfg, **{group: replace(getattr(cfg, group), **{name: value})})
    specs = []
    for spec in cfg.teachers:
        size = choices.tensor_parallel.get(spec.name, 1)  # a served teacher is not in the plan
        if size != getattr(spec, "tensor_parallel_size", 1):
            lines.append(f"plan: teachers: {spec.name}: tensor_parallel_size {size}")
            if hasattr(spec, "tensor_parallel_size"):
                spec = replace(spec, tensor_parallel_size=size)
        specs.append(spec)
    return replace(cfg, teachers=tuple(specs)), lines


def plan_run(cfg) -> tuple[Any, Plan | None, str]:
    """(configuration, plan, what to show of it) of a run on this machine; all ranks plan for the one with least memory.

    With `--plan auto` the configuration takes what was chosen, and each change is said. Otherwise a model whose
    configuration says too little leaves the run without a plan. Collective.
    """
    auto = cfg.run.plan == "auto"
    if auto:
        cfg = _with_choices_of(cfg)
    machine = machine_here(distributed.world_size())
    device_bytes, host_bytes = distributed.all_reduce([machine.device_bytes, machine.host_bytes], "min")
    machine = replace(machine, device_bytes=int(device_bytes), host_bytes=int(host_bytes))
    with distributed.agree_on_error("planning memory"):
        try:
            plan = make_plan(read_job(cfg, machine), cfg.explicit if auto else None)
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
    """A run that is resumed keeps the support that was planned for it: another one would make it another run."""
    recorded = Path(cfg.run.output_dir) / "config.yaml"
    if "support" in cfg.explicit or cfg.run.resume == "never" or not recorded.exists():
        return cfg
    try:
        support = yaml.safe_load(recorded.read_text())["support"]
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
        return cfg  # what is wrong with the directory is said elsewhere
    return replace(cfg, loss=replace(cfg.loss, support=support), explicit=cfg.explicit | {"support"})


# ---- Command line ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _OtherFlags:
    """Flags of train_gkd.py alone. They change no byte here."""

    lmbda: str | None = configuration.option(None, "Of train_gkd.py.")
    seq_kd: str | None = configuration.option(None, "Of train_gkd.py.", nargs="?", const="true")
    seq_kd_temperature: str | None = configuration.option(None, "Of train_gkd.py.")
    sft_alpha: str | None = configuration.option(None, "Of train_gkd.py.")


@dataclass(frozen=True)
class Config:
    """Any trainer's configuration."""

    model: configuration.ModelConfig
    teacher: configuration.TeacherConfig
    data: configuration.DataConfig
    rollout: configuration.RolloutConfig
    loss: configuration.LossConfig
    batch: configuration.BatchConfig
    optim: configuration.OptimConfig
    run: configuration.RunConfig
    other: _OtherFlags
    teachers: tuple[configuration.TeacherSpec, ...] = ()
    explicit: frozenset[str] = field(default=frozenset(), compare=False)


def parse_arguments(argv: list[str]) -> tuple[argparse.Namespace, Config]:
    """(the machine and the outputs, the run). ValueError with one line for a mistake."""
    parser = OneLineParser("python -m opd.plan", __doc__)
    parser.add_argument("--gpus", type=int, help="GPUs, one rank each (default: those of this machine)")
    parser.add_argument("--gpu_memory", type=float, help="GiB of each GPU (default: this machine's)")
    parser.add_argument("--host_memory", type=float, help="GiB of the host (default: what is free here)")
    parser.add_argument("--pcie_gb_s", type=float, default=PCIE_GB_S, help="GB/s between host and GPU (default 25)")
    parser.add_argument("--plot", help="a PNG file for the stacked bars")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    if {"-h", "--help"} & set(argv):
        parser.print_help()
        print("\nand every flag of the trainers, see docs/config.md")
        sys.exit(0)
    args, rest = parser.parse_known_args(argv)
    for flag in ("gpus", "gpu_memory", "host_memory", "pcie_gb_s"):
        value = getattr(args, flag)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{flag} {value:g}: must be above 0 and finite")
    cfg = parse(Config, rest)
    # Where prompts come from and results go does not matter here.
    complete = replace(
        cfg, data=replace(cfg.data, data=cfg.data.data or ["any"]),
        run=replace(cfg.run, output_dir=cfg.run.output_dir or "any"),
    )  # fmt: skip
    validate_common(complete)
    return args, cfg


def machine_of(args: argparse.Namespace) -> Machine:
    """The machine on the command line; what is not given is this one's."""
    count = args.gpus or (torch.cuda.device_count() if torch.cuda.is_available() else 1)
    machine = machine_here(count, pcie_gb_s=args.pcie_gb_s)
    if args.gpu_memory is not None:
        host = machine.host_bytes if machine.is_gpu else _free_host_memory()
        machine = replace(machine, is_gpu=True, device_bytes=int(args.gpu_memory * GIB), host_bytes=host)
    if args.host_memory is not None:
        host = int(args.host_memory * GIB)
        is_gpu = machine.is_gpu
        machine = replace(machine, host_bytes=host) if is_gpu else replace(machine, device_bytes=host // count)
    return machine


def main(argv: list[str] | None = None) -> int:
    """Exit status 0 if the run fits, 1 if it does not, 2 for a mistake."""
    try:
        args, cfg = parse_arguments(sys.argv[1:] if argv is None else argv)
        plan = make_plan(read_job(cfg, machine_of(args)), cfg.explicit)
        if args.plot:
            draw(plan, Path(args.plot))
    except ValueError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(as_json(plan)))
    else:
        print("\n".join([table(plan), *apply(cfg, plan)[1], verdict(plan)]))
    return 0 if plan.fits else 1


if __name__ == "__main__":
    sys.exit(main())
