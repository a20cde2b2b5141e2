"""The memory of a run before it starts: who takes how much in which phase, what to choose, and
whether it fits.

    python -m opd.plan --config run.yaml --gpus 8 --gpu_memory 80 --host_memory 512 --plot plan.png

takes a trainer's YAML file, and its flags too. It reads configurations of models only: no weights,
tokenizers or data. Every run of the trainers starts with the same plan.
"""

import argparse
import importlib
import json
import math
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from opd.config import GIB
from opd.hub_names import as_named
from opd.inputs.arguments import OneLineParser, given, parse
from opd.inputs.hub import find_models, with_models
from opd.inputs.models import check_context
from opd.inputs.teacher_prompts import with_bounds
from opd.options import groups_of
from opd.plan.apply import apply
from opd.plan.job import PCIE_GB_S, Machine, free_host_memory, machine_here, make_job, read_shapes
from opd.plan.planner import check_caches, make_plan
from opd.plan.view import as_json, draw, table, verdict


def trainer_config(argv: list[str]) -> type:
    """The Config of the trainer that these flags are for: train_gkd.py where only it has one of
    them.

    The trainers are programs and no part of this package, so this program finds them by name.
    """
    mopd, gkd = (importlib.import_module(name).Config for name in ("train_mopd", "train_gkd"))
    known, others = (
        {field.name for group in groups_of(config).values() for field in fields(group)}
        for config in (mopd, gkd)
    )
    return gkd if given(argv) & (others - known) else mopd


def plan_arguments(argv: list[str]) -> tuple[argparse.Namespace, Any]:
    """(the machine and the outputs, a trainer's Config). ValueError with one line for a mistake."""
    parser = OneLineParser("python -m opd.plan", __doc__)
    parser.add_argument(
        "--gpus", type=int, help="GPUs, one rank each (default: those of this machine)"
    )
    parser.add_argument(
        "--gpu_memory", type=float, help="GiB of each GPU (default: this machine's)"
    )
    parser.add_argument(
        "--host_memory", type=float, help="GiB of the host (default: what is free here)"
    )
    parser.add_argument(
        "--pcie_gb_s", type=float, default=PCIE_GB_S, help="GB/s between host and GPU (default 25)"
    )
    parser.add_argument("--plot", help="a PNG file for the stacked bars")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object instead of the table"
    )
    if {"-h", "--help"} & set(argv):
        parser.print_help()
        print("\nand every flag of the trainers, see docs/config.md")
        sys.exit(0)
    args, rest = parser.parse_known_args(argv)
    for flag in ("gpus", "gpu_memory", "host_memory", "pcie_gb_s"):
        value = getattr(args, flag)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{flag} {value:g}: must be above 0 and finite")
    cfg = parse(trainer_config(rest), rest)
    # Where prompts come from and results go does not matter here.
    complete = replace(
        cfg,
        data=replace(cfg.data, data=cfg.data.data or ["any"]),
        run=replace(cfg.run, output_dir=cfg.run.output_dir or "any"),
    )
    complete.validate()
    return args, cfg


def machine_of(args: argparse.Namespace) -> Machine:
    """The machine on the command line; what is not given is this one's."""
    count = args.gpus or (torch.cuda.device_count() if torch.cuda.is_available() else 1)
    machine = machine_here(count, pcie_gb_s=args.pcie_gb_s)
    if args.gpu_memory is not None:
        host = machine.host_bytes if machine.is_gpu else free_host_memory()
        machine = replace(
            machine, is_gpu=True, device_bytes=int(args.gpu_memory * GIB), host_bytes=host
        )
    if args.host_memory is not None:
        host = int(args.host_memory * GIB)
        is_gpu = machine.is_gpu
        machine = (
            replace(machine, host_bytes=host)
            if is_gpu
            else replace(machine, device_bytes=host // count)
        )
    return machine


def plan_command(argv: list[str] | None = None) -> int:
    """Exit status 0 if the run fits, 1 if it does not, 2 for a mistake."""
    try:
        args, cfg = plan_arguments(sys.argv[1:] if argv is None else argv)
        cfg = with_bounds(with_models(cfg, find_models(cfg)), {})
        student, teachers = read_shapes(cfg)
        for model in (student, *teachers.values()):
            check_context(model, cfg)
        job = make_job(cfg, student, teachers, machine_of(args))
        check_caches(job)
        plan = make_plan(job, cfg.explicit if cfg.run.plan == "auto" else None)
        if args.plot:
            draw(plan, Path(args.plot))
    except ValueError as error:
        print(f"error: {as_named(' '.join(str(error).split()))}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(as_json(plan)))
    else:
        print("\n".join([table(plan), *apply(cfg, plan)[1], verdict(plan)]))
    return 0 if plan.fits else 1


if __name__ == "__main__":
    sys.exit(plan_command())
